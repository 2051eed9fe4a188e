"""Jobs: list, look at, watch, read their output, cancel, top up, retry."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Format, Kind
from deepsquare_chain.cli.types import (
    CreditsArgument,
    GaslessOption,
    JobArgument,
    JobArguments,
    LimitOption,
    WaitTimeoutOption,
    YesOption,
    some,
)
from deepsquare_chain.job import Job

if TYPE_CHECKING:
    from deepsquare_chain.chain.bindings.contracts import Contracts
    from deepsquare_chain.client.gasless import GaslessWallet
    from deepsquare_chain.client.history import History
    from deepsquare_chain.client.job_list import ListedJob
    from deepsquare_chain.client.network import WalletConnection
    from deepsquare_chain.client.watching import Ended
    from deepsquare_chain.errors import EndpointError
    from deepsquare_chain.store.gateway_client import GatewayClient

app = typer.Typer(
    help="List, look at, watch, read, fetch, cancel, top up, retry, challenge.",
    no_args_is_help=True,
)

_LIST: Final = (
    Column("id", "job", Kind.NUMBER),
    Column("name", "name"),
    Column("status", "status", Kind.WORD),
    Column("provider", "provider", Kind.NUMBER),
    Column("elapsed", "elapsed", Kind.SECONDS),
    Column("exit_code", "exit", Kind.NUMBER),
    Column("escrow", "escrow", Kind.CREDITS),
    Column("cost", "cost", Kind.CREDITS),
    Column("time_limit", "time limit", Kind.SECONDS, detail=True),
    Column("since", "last change (UTC)", Kind.TIME, detail=True),
    Column("customer", "customer", Kind.HASH, detail=True),
)
_JOB: Final = (
    Column("id", "job", Kind.NUMBER),
    Column("name", "name"),
    Column("status", "status", Kind.WORD),
    Column("meaning", "meaning"),
    Column("customer", "customer", Kind.HASH),
    Column("provider_id", "provider id", Kind.NUMBER),
    Column("provider", "provider"),
    Column("since", "last change (UTC)", Kind.TIME),
    Column("tasks", "tasks", Kind.NUMBER),
    Column("cpus", "CPUs", Kind.NUMBER),
    Column("memory", "memory (MB)", Kind.NUMBER),
    Column("gpus", "GPUs", Kind.NUMBER),
    Column("time_limit", "time limit", Kind.SECONDS),
    Column("until_spent", "until spent", Kind.FLAG),
    Column("uses", "requirements"),
    Column("rate", "rate", Kind.RATE),
    Column("escrow", "escrow", Kind.CREDITS),
    Column("cost", "cost", Kind.CREDITS),
    Column("funded", "funded", Kind.CREDITS),
    Column("paid", "paid to the provider", Kind.CREDITS),
    Column("fee", "fee", Kind.CREDITS),
    Column("refunded", "refunded", Kind.CREDITS),
    Column("billed_seconds", "billed", Kind.SECONDS),
    Column("exit_code", "exit code", Kind.NUMBER),
    Column("reason", "reason"),
    Column("retries_left", "retries left", Kind.NUMBER),
    Column("retry_of", "requeued from", Kind.NUMBER),
    Column("successor", "requeued as", Kind.NUMBER),
    Column("definition", "definition (SHA-256)", Kind.HASH),
)
_WHY: Final = (
    Column("id", "job", Kind.NUMBER),
    Column("status", "status", Kind.WORD),
    Column("why", "why"),
    Column("providers", "providers"),
    Column("next", "next"),
)
#: Jobs that one transaction cancels: each may cost a refund and an event.
_CANCELLED_AT_ONCE: Final = 100
_RESULTS: Final = (
    Column("job", "job", Kind.NUMBER),
    Column("name", "file"),
    Column("size", "bytes", Kind.NUMBER),
    Column("sha256", "SHA-256", Kind.HASH),
    Column("on_chain", "as on chain", Kind.FLAG),
    Column("problem", "problem"),
)


@command(app, "list")
async def list_jobs(
    context: CommandContext,
    everybody: Annotated[bool, typer.Option("--all", help="Jobs of all customers.")] = False,
    status: Annotated[
        list[str] | None, typer.Option("--status", help="Only this status; may be repeated.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="NAME", help="Only jobs of this name, such as 'train-*'."),
    ] = None,
    limit: LimitOption = 50,
    follow: Annotated[
        bool, typer.Option("--watch", help="List them again and again, until Ctrl-C.")
    ] = False,
) -> None:
    """List the newest jobs: status, elapsed time, exit code, credits in escrow and spent."""
    import asyncio

    from deepsquare_chain.chain.rpc.connection import chain_time
    from deepsquare_chain.client.job_list import newest, parse_statuses
    from deepsquare_chain.client.network import open_grid, own_address

    wanted = parse_statuses(status or [])
    customer = None if everybody else own_address(context.settings, None)
    empty = "No jobs." if everybody else "No jobs of this wallet; --all lists everybody's."
    if status or name:
        empty = "No such jobs."
    async with open_grid(context.settings) as contracts:
        while True:
            found = await newest(
                contracts, limit=limit, customer=customer, statuses=wanted, names=name or ()
            )
            now = await chain_time(contracts.w3)
            if follow:
                context.printer.clear()
            context.printer.rows(_LIST, [_list_row(each, now) for each in found], empty=empty)
            if not follow:
                return
            await asyncio.sleep(context.settings.poll_interval)


@command(app)
async def get(context: CommandContext, job: JobArgument) -> None:
    """Show all that the chain knows of a job."""
    from deepsquare_chain.client.network import open_grid

    async with open_grid(context.settings) as contracts:
        await _print_job(context, contracts, await contracts.scheduler.get_job(job))


@command(app)
async def why(context: CommandContext, job: JobArgument) -> None:
    """Tell in words why a job is where it is."""
    from deepsquare_chain.cli.why import explain
    from deepsquare_chain.client.network import open_grid

    async with open_grid(context.settings) as contracts:
        found = await explain(contracts, job)
    if context.printer.style is Format.TABLE:
        context.printer.text(found.words)
        return
    why = (found.job.id, found.job.status.name, found.text, "\n".join(found.details))
    context.printer.record(_WHY, (*why, found.advice))


@command(app)
async def watch(
    context: CommandContext,
    jobs: JobArguments,
    wait_timeout: WaitTimeoutOption = None,
) -> int:
    """Follow jobs and their successors to the end; exit with the first code that is not zero."""
    from deepsquare_chain.client.network import open_grid

    async with open_grid(context.settings) as contracts:
        return await wait_for_all(
            context, contracts, await _selected(context, contracts, jobs), wait_timeout
        )


async def _selected(
    context: CommandContext, contracts: Contracts, words: Sequence[str]
) -> list[int]:
    from deepsquare_chain.client.job_list import select
    from deepsquare_chain.client.network import own_address

    return await select(contracts, words, lambda: own_address(context.settings, None))


async def wait_for_all(
    context: CommandContext,
    contracts: Contracts,
    job_ids: Sequence[int],
    timeout: float | None,
    *,
    gateways: Sequence[GatewayClient] = (),
    wallet: WalletConnection | GaslessWallet | None = None,
) -> int:
    """Wait for all of them, `timeout` seconds in all; the first code that is not zero wins.

    What each prints is shown as it comes where a gateway has it: on stdout for people, on stderr
    where stdout is for data. With a wallet, jobs whose dependencies can't hold any more are cancelled by it.
    """
    from deepsquare_chain.cli.outputs import LogPrinter

    deadline = None if timeout is None else time.monotonic() + timeout
    found = []
    for job_id in job_ids:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        async with LogPrinter(context, contracts, gateways) as logs:
            ended = await follow_to_end(
                context, contracts, job_id, left, on_change=logs.saw, wallet=wallet
            )
            found.append(ended)
            await logs.finish()
    await print_ended(context, found)
    return next((each.exit_code for each in found if each.exit_code), 0)


async def follow_to_end(
    context: CommandContext,
    contracts: Contracts,
    job_id: int,
    timeout: float | None,
    *,
    on_change: Callable[[Job], None] = lambda _: None,
    wallet: WalletConnection | GaslessWallet | None = None,
) -> Ended:
    """Wait for the end of a job's line; each change, and why it stands still, goes to stderr."""
    from deepsquare_chain.cli.why import Teller
    from deepsquare_chain.client.watching import watch

    def tell(job: Job) -> None:
        where = f" at provider {job.provider_id}" if job.provider_id else ""
        continues = f" (requeued from job {job.retry_of})" if job.retry_of else ""
        context.printer.note(f"job {job.id}{continues}: {job.status.name}{where}")
        on_change(job)

    context.goes_on = (
        f"Job {job_id} goes on: look with `deepsquare job get {job_id}`, end it with "
        f"`deepsquare job cancel {job_id}`."
    )
    interval = context.settings.poll_interval
    trouble = partial(tell_trouble, context, f"waiting for job {job_id} goes on")

    async def give_up(job: Job) -> None:
        if wallet is not None:
            await wallet.send(contracts.scheduler.cancel([job.id]))
            context.printer.note(f"Job {job.id} was cancelled: it could not run any more.")

    async with Teller(contracts, context.printer.note, give_up) as teller:
        return await watch(
            contracts,
            job_id,
            interval=interval,
            timeout=timeout,
            on_change=tell,
            on_rest=teller.look,
            on_trouble=trouble,
        )


def tell_trouble(context: CommandContext, goes_on: str, error: EndpointError | None) -> None:
    """Say on stderr that the endpoint fails and what goes on all the same, or that it is back."""
    context.printer.note(
        "The endpoint answers again." if error is None else f"{error.message}; {goes_on}."
    )


async def print_ended(context: CommandContext, found: Sequence[Ended]) -> None:
    """Jobs that ended: a list as data, one after the other for people."""
    rows = [_job_row(each.job, each.history) for each in found]
    if context.printer.style is not Format.TABLE:
        context.printer.rows(_JOB, rows)
        return
    for row in rows:
        context.printer.record(_JOB, row)


@command(app)
async def logs(
    context: CommandContext,
    jobs: JobArguments,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
) -> None:
    """Print what jobs printed, from a gateway.

    Where no gateway is set, from the run's folder of a provider on this machine.
    """
    from deepsquare_chain.cli.outputs import stream
    from deepsquare_chain.client.network import open_grid

    async with open_grid(context.settings) as contracts:
        chosen = await _selected(context, contracts, jobs)
        for job in chosen:
            if len(chosen) > 1:
                context.printer.note(f"==> job {job} <==")
            await stream(context, contracts, job, follow=follow)


@command(app)
async def results(
    context: CommandContext,
    jobs: JobArguments,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            "--into",
            metavar="FOLDER",
            help="Copy them into a new folder; of several jobs each into FOLDER/job-ID.",
        ),
    ] = None,
) -> int:
    """List the files that jobs left, or download them, and compare the output with the chain.

    They come from a gateway, or from a provider's folder on this machine where none is set. Exit 1
    if a file can't be read; the others are listed and fetched all the same.
    """
    from deepsquare_chain.client.gateways import gateways_of
    from deepsquare_chain.client.network import open_account, open_grid
    from deepsquare_chain.client.results import job_results
    from deepsquare_chain.store.gateway_client import gateway_urls

    found = []
    async with AsyncExitStack() as stack:
        contracts = await stack.enter_async_context(open_grid(context.settings))
        chosen = await _selected(context, contracts, jobs)
        gateways: tuple[GatewayClient, ...] = ()
        if gateway_urls(context.settings, contracts.deployment):
            account = await open_account(context.settings)
            gateways = await stack.enter_async_context(
                gateways_of(context.settings, contracts.deployment, account)
            )
        for job in chosen:
            folder = to / f"job-{job}" if to is not None and len(chosen) > 1 else to
            files = await job_results(
                contracts,
                context.settings.state_dir,
                job,
                folder,
                gateways=gateways,
                report=context.printer.note,
                key_file=context.settings.result_key_file,
            )
            found += [(job, each) for each in files]
    rows = (
        (job, each.name, each.size, each.digest or None, each.on_chain, each.problem or None)
        for job, each in found
    )
    left = f"Job {chosen[0]} left no file." if len(chosen) == 1 else "They left no file."
    context.printer.rows(_RESULTS, rows, empty=left)
    if any(each.on_chain for _, each in found):
        context.printer.note("The output is the one whose SHA-256 the provider reported on chain.")
    problems = sum(1 for _, each in found if each.problem and not each.special)
    special = sum(1 for _, each in found if each.special)
    if special:
        context.printer.note(
            f"{special} of {len(found)} are links, pipes, sockets or devices, which are not copied."
        )
    if problems:
        done = "listed" if to is None else f"copied into {to}"
        context.printer.note(
            f"{problems} of {len(found)} files or folders have a problem; the others are {done}."
        )
    return 1 if problems else 0


@command(app)
async def share(
    context: CommandContext,
    job: JobArgument,
    reader: Annotated[str, typer.Argument(metavar="ADDRESS", help="Who may read.")],
    until: Annotated[
        str,
        typer.Option(
            "--until", metavar="WHEN", help="A date (2026-12-24) or a time from now (7d, 12h)."
        ),
    ] = "7d",
    end: Annotated[bool, typer.Option("--end", help="End an earlier share at once.")] = False,
) -> None:
    """Let another address read a job's output and results at the gateway, until a date.

    The wallet signs; nothing goes to the chain. The definition stays private.
    """
    from deepsquare_chain.chain.bindings.calls import checked_address
    from deepsquare_chain.chain.sign_in import rfc3339
    from deepsquare_chain.client.gateways import gateways_of, no_gateway, share_end
    from deepsquare_chain.client.network import open_account, open_grid

    address, ends = checked_address(reader), 0 if end else share_end(until)
    async with open_grid(context.settings) as contracts:
        account = await open_account(context.settings)
        async with gateways_of(context.settings, contracts.deployment, account) as gateways:
            if not gateways:
                raise no_gateway()
            for each in gateways:
                await each.share(job, address, ends)
    words = "is not shared" if end else f"is shared until {rfc3339(ends)}"
    context.printer.note(f"Job {job} {words} with {address}.")


@command(app, sends=True)
async def cancel(
    context: CommandContext,
    jobs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="JOB...",
            help="Ids, ranges (3-7), a submission (sub-1f3a9c04) or names of own jobs (train-*).",
        ),
    ] = None,
    unmet: Annotated[
        bool, typer.Option("--unmet", help="Own jobs whose dependencies can't hold any more.")
    ] = False,
    gasless: GaslessOption = False,
    yes: YesOption = False,
) -> int:
    """End jobs of this wallet: a running one is paid for the time used, the rest is refunded."""
    from deepsquare_chain.chain.bindings.events import TransitionSkipped
    from deepsquare_chain.cli.signing import open_sending
    from deepsquare_chain.cli.why import unmet_jobs
    from deepsquare_chain.client.job_list import select
    from deepsquare_chain.errors import RevertedError, UsageError

    if bool(jobs) == unmet:
        raise UsageError("Which jobs?", hint="Name them, such as 7, 3-5 or train-*; or --unmet.")
    receipts = []
    async with open_sending(context, gasless=gasless, yes=yes) as wallet:
        contracts = wallet.contracts
        if unmet:
            chosen = await unmet_jobs(contracts, wallet.address)
        else:
            chosen = await select(contracts, jobs or (), lambda: wallet.address)
            records = [await contracts.scheduler.get_job(job_id) for job_id in chosen]
            if len(chosen) > 1:
                for job in records:
                    if not job.status.is_live:
                        context.printer.note(f"Job {job.id} was left out, it is {job.status.name}.")
                chosen = [job.id for job in records if job.status.is_live]
        if not chosen:
            context.unchanged("All of them have ended." if jobs else "No job waits in vain.")
        for at in range(0, len(chosen), _CANCELLED_AT_ONCE):
            part = chosen[at : at + _CANCELLED_AT_ONCE]
            receipts.append(await wallet.send(contracts.scheduler.cancel(part)))
    for receipt in receipts:
        context.receipt(receipt)
    left_out = [
        each for one in receipts for each in one.events if isinstance(each, TransitionSkipped)
    ]
    for each in left_out:
        context.printer.note(
            f"Job {each.job_id} was left out, it is {each.status.name} ({each.reason_name}); "
            f"see `deepsquare job get {each.job_id}`."
        )
    return RevertedError.exit_code if left_out else 0


@command(app, sends=True)
async def challenge(context: CommandContext, job: JobArgument) -> None:
    """Ask the provider of a live job for a sign of life; one that does not answer loses its jobs."""
    async with context.wallet() as wallet:
        scheduler = wallet.contracts.scheduler
        record = await scheduler.get_job(job)
        receipt = await wallet.send(scheduler.challenge(job))
        times = await scheduler.parameters()
    context.receipt(receipt)
    context.printer.note(
        f"Provider {record.provider_id} must answer within {times.response_timeout} s and "
        f"{times.response_blocks} blocks to get new jobs; after {times.lost_timeout} s anyone may "
        "end its running jobs with a full refund."
    )


@command(app, sends=True)
async def topup(
    context: CommandContext,
    job: JobArgument,
    credits: CreditsArgument,
    gasless: GaslessOption = False,
    yes: YesOption = False,
) -> None:
    """Add credits to a live job, and time if it has a provider and a limit."""
    from deepsquare_chain.cli.signing import open_sending
    from deepsquare_chain.client.accounts import top_up

    async with open_sending(context, gasless=gasless, yes=yes) as wallet:
        context.receipt(await top_up(wallet, job, credits))


@command(app, sends=True)
async def retry(
    context: CommandContext,
    job: JobArgument,
    credits: Annotated[
        int | None,
        typer.Option(
            "--credits", parser=some, metavar="CREDITS", help="Escrow; as before by default."
        ),
    ] = None,
    gasless: GaslessOption = False,
    yes: YesOption = False,
) -> None:
    """Submit a job again, with the definition and terms that it had."""
    from deepsquare_chain.cli.signing import open_sending
    from deepsquare_chain.client.submission import resubmit

    async with open_sending(context, gasless=gasless, yes=yes) as wallet:
        done = await resubmit(wallet, context.settings, job, credits)
        for job_id in done.job_ids:
            await _print_job(
                context, wallet.contracts, await wallet.contracts.scheduler.get_job(job_id)
            )


async def _print_job(context: CommandContext, contracts: Contracts, job: Job) -> None:
    from deepsquare_chain.client.history import histories

    history = (await histories(contracts, [job.id]))[job.id]
    context.printer.record(_JOB, _job_row(job, history))


def _list_row(listed: ListedJob, now: int) -> tuple[Any, ...]:
    job, history = listed.job, listed.history
    return (
        job.id,
        history.name,
        job.status.name,
        job.provider_id or None,
        listed.elapsed(now),
        history.exit_code,
        job.escrow if job.status.is_live else 0,
        history.paid + history.fee,
        job.time_limit,
        job.since,
        job.customer,
    )


def _job_row(job: Job, history: History) -> tuple[Any, ...]:
    size = job.resources
    settled = job.status.is_final
    return (
        job.id,
        history.name,
        job.status.name,
        job.status.meaning,
        job.customer,
        job.provider_id or None,
        history.provider or None,
        job.since,
        size.tasks,
        size.cpus,
        size.memory,
        size.gpus,
        job.time_limit,
        job.until_spent,
        history.uses,
        job.rate or None,
        job.escrow if job.status.is_live else 0,
        history.paid + history.fee,
        history.funded,
        history.paid if settled else None,
        history.fee if settled else None,
        history.refunded if settled else None,
        history.billed_seconds,
        history.exit_code,
        history.reason,
        job.retries_left,
        job.retry_of or None,
        history.successor,
        job.definition.hex(),
    )
