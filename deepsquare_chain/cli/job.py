"""Commands for jobs: list, show, watch, print output, cancel, top up, retry; and the live view."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command, open_sending, require
from deepsquare_chain.cli.output import Column, Format, Kind, row_of
from deepsquare_chain.cli.types import (
    CreditsArgument,
    GaslessOption,
    JobArgument,
    JobArguments,
    LimitOption,
    OptionalJobArguments,
    WaitTimeoutOption,
    YesOption,
    positive_credits,
)
from deepsquare_chain.errors import EndpointError, RevertedError, UsageError
from deepsquare_chain.job import Job

if TYPE_CHECKING:
    from deepsquare_chain.chain.bindings.contracts import Contracts
    from deepsquare_chain.client.gasless import GaslessWallet
    from deepsquare_chain.client.jobs import Ended, History, ListedJob
    from deepsquare_chain.client.network import WalletConnection
    from deepsquare_chain.store.gateway_client import GatewayClient

app = typer.Typer()
#: The command `deepsquare top`, which belongs to no group.
root_app = typer.Typer()

_LIST: Final = (
    Column("id", "job", Kind.NUMBER),
    Column("name", "name"),
    Column("status", "status", Kind.WORD),
    Column("provider_id", "provider", Kind.NUMBER),
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
#: Maximum jobs that one transaction cancels; each may cost the gas of a refund and an event.
_CANCELLED_AT_ONCE: Final = 100
_RESULTS: Final = (
    Column("job_id", "job", Kind.NUMBER),
    Column("name", "file"),
    Column("size", "bytes", Kind.NUMBER),
    Column("sha256", "SHA-256", Kind.HASH),
    Column("on_chain", "matches the chain", Kind.FLAG),
    Column("problem", "problem"),
)


@command(app, "list")
async def list_jobs(
    context: CommandContext,
    everybody: Annotated[bool, typer.Option("--all", help="Jobs of all customers.")] = False,
    status: Annotated[
        list[str] | None, typer.Option(help="Only jobs of this status; may be repeated.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only jobs of this name, such as 'train-*'."),
    ] = None,
    limit: LimitOption = 50,
    follow: Annotated[bool, typer.Option("--watch", help="Repeat the list until Ctrl-C.")] = False,
) -> None:
    """List the newest jobs: status, elapsed time, exit code, credits in escrow and spent."""
    import asyncio

    from deepsquare_chain.chain.rpc.pool import chain_time
    from deepsquare_chain.client.jobs import newest, parse_statuses
    from deepsquare_chain.client.network import own_address

    statuses = parse_statuses(status or [])
    customer = None if everybody else own_address(context.settings, None)
    empty = (
        "No jobs." if everybody else "No jobs of this wallet; --all lists those of all customers."
    )
    if status or name:
        empty = "No such jobs."
    async with context.grid() as contracts:
        while True:
            listed_jobs = await newest(
                contracts, limit=limit, customer=customer, statuses=statuses, names=name or ()
            )
            now = await chain_time(contracts.w3)
            if follow:
                context.printer.clear()
            context.printer.rows(
                _LIST, [_list_row(listed, now) for listed in listed_jobs], empty=empty
            )
            if not follow:
                return
            await asyncio.sleep(context.settings.poll_interval)


@command(app)
async def get(context: CommandContext, job: JobArgument) -> None:
    """Show all data of a job on the chain."""

    async with context.grid() as contracts:
        await _print_job(context, contracts, await contracts.scheduler.get_job(job))


@command(app)
async def why(context: CommandContext, job: JobArgument) -> None:
    """Explain why a job has its current status."""
    from deepsquare_chain.cli.why import explain

    async with context.grid() as contracts:
        situation = await explain(contracts, job)
    if context.printer.style is Format.TABLE:
        context.printer.text(situation.words)
        return
    job_record, details = situation.job, "\n".join(situation.details)
    row = (job_record.id, job_record.status.name, situation.text, details, situation.advice)
    context.printer.record(_WHY, row)


@command(app)
async def watch(
    context: CommandContext, jobs: JobArguments, wait_timeout: WaitTimeoutOption = None
) -> int:
    """Wait for jobs and their successors to end; exit with the first exit code that is not zero."""

    async with context.grid() as contracts:
        return await wait_for_all(
            context, contracts, await _selected(context, contracts, jobs), wait_timeout
        )


async def _selected(
    context: CommandContext, contracts: Contracts, words: Sequence[str]
) -> list[int]:
    from deepsquare_chain.client.jobs import select
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
    """Wait for jobs to end; return the first exit code that is not zero, or 0.

    `timeout` is in seconds and covers all jobs. Output is printed as it arrives if a gateway has
    it: to stdout with the table format, otherwise to stderr. With a wallet, jobs whose
    dependencies can no longer be met are cancelled.
    """
    from deepsquare_chain.cli.job_output import LogPrinter

    deadline = None if timeout is None else time.monotonic() + timeout
    ended_jobs = []
    for job_id in job_ids:
        time_left = None if deadline is None else max(0.0, deadline - time.monotonic())
        async with LogPrinter(context, contracts, gateways) as logs:
            ended = await follow_to_end(
                context, contracts, job_id, time_left, on_change=logs.on_job_change, wallet=wallet
            )
            ended_jobs.append(ended)
            await logs.finish()
    await print_ended(context, ended_jobs)
    return next((job.exit_code for job in ended_jobs if job.exit_code), 0)


async def follow_to_end(
    context: CommandContext,
    contracts: Contracts,
    job_id: int,
    timeout: float | None,
    *,
    on_change: Callable[[Job], None] = lambda _: None,
    wallet: WalletConnection | GaslessWallet | None = None,
) -> Ended:
    """Wait for a job or its last successor to end; prints changes and reasons for waiting to stderr."""
    from deepsquare_chain.cli.why import ReasonPrinter
    from deepsquare_chain.client.jobs import watch

    def print_change(job: Job) -> None:
        where = f" at provider {job.provider_id}" if job.provider_id else ""
        continues = f" (requeued from job {job.retry_of})" if job.retry_of else ""
        context.printer.note(f"job {job.id}{continues}: {job.status.name}{where}")
        on_change(job)

    context.continues = continuing(job_id)
    interval = context.settings.poll_interval

    async def give_up(job: Job) -> None:
        if wallet is not None:
            await wallet.send(contracts.scheduler.cancel([job.id]))
            context.printer.note(f"Job {job.id} was cancelled: it could not run any more.")

    async with ReasonPrinter(contracts, context.printer.note, give_up) as reasons:
        return await watch(
            contracts,
            job_id,
            interval=interval,
            timeout=timeout,
            on_change=print_change,
            on_waiting=reasons.start_explaining,
            on_outage=partial(print_outage, context, f"continuing to wait for job {job_id}"),
        )


def continuing(job_id: int) -> str:
    """Return the text that a job continues after Ctrl-C."""
    return (
        f"Job {job_id} continues: see `deepsquare job get {job_id}`, end it with "
        f"`deepsquare job cancel {job_id}`."
    )


def print_outage(context: CommandContext, continues: str, error: EndpointError | None) -> None:
    """Print to stderr that the endpoint fails and what continues, or (None) that it responds again."""
    context.printer.note(
        "The endpoint responds again." if error is None else f"{error.message}; {continues}."
    )


async def print_ended(context: CommandContext, ended_jobs: Sequence[Ended]) -> None:
    """Print jobs that ended: as records with the table format, otherwise as a list."""
    rows = [_job_row(ended.job, ended.history) for ended in ended_jobs]
    if context.printer.style is not Format.TABLE:
        context.printer.rows(_JOB, rows)
        return
    for row in rows:
        context.printer.record(_JOB, row)


@command(app)
async def logs(
    context: CommandContext,
    jobs: JobArguments,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the log until the job ends.")
    ] = False,
) -> None:
    """Print the output of jobs, from a gateway.

    If no gateway is set, it is read from the run folder of a provider on this machine.
    """
    from deepsquare_chain.cli.job_output import stream

    async with context.grid() as contracts:
        job_ids = await _selected(context, contracts, jobs)
        for job in job_ids:
            if len(job_ids) > 1:
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
            help="Copy the files into a new folder; with several jobs into FOLDER/job-ID.",
        ),
    ] = None,
) -> int:
    """List or download the result files of jobs, and compare the output with its hash on chain.

    Files come from a gateway, or from a provider's folder on this machine if no gateway is set.
    Exit 1 if a file can't be read; the others are listed and downloaded nevertheless.
    """
    from deepsquare_chain.client.gateways import gateways_of, job_results
    from deepsquare_chain.client.network import open_account
    from deepsquare_chain.store.gateway_client import gateway_urls

    job_files = []
    async with AsyncExitStack() as stack:
        contracts = await stack.enter_async_context(context.grid())
        job_ids = await _selected(context, contracts, jobs)
        gateways: tuple[GatewayClient, ...] = ()
        if gateway_urls(context.settings, contracts.deployment):
            account = await open_account(context.settings)
            gateways = await stack.enter_async_context(
                gateways_of(context.settings, contracts.deployment, account)
            )
        for job in job_ids:
            folder = to / f"job-{job}" if to is not None and len(job_ids) > 1 else to
            files = await job_results(
                contracts,
                context.settings.state_dir,
                job,
                folder,
                gateways=gateways,
                report=context.printer.note,
                key_file=context.settings.result_key_file,
            )
            job_files += [(job, file) for file in files]
    rows = (
        (job, file.name, file.size, file.digest or None, file.on_chain, file.problem or None)
        for job, file in job_files
    )
    empty = f"Job {job_ids[0]} left no file." if len(job_ids) == 1 else "The jobs left no files."
    context.printer.rows(_RESULTS, rows, empty=empty)
    if any(file.on_chain for _, file in job_files):
        context.printer.note("The output is the one whose SHA-256 the provider reported on chain.")
    problems = sum(1 for _, file in job_files if file.problem and not file.special)
    special = sum(1 for _, file in job_files if file.special)
    if special:
        context.printer.note(
            f"{special} of {len(job_files)} are links, pipes, sockets or devices, which are not copied."
        )
    if problems:
        action = "listed" if to is None else f"copied into {to}"
        context.printer.note(
            f"{problems} of {len(job_files)} files or folders have a problem; the others are {action}."
        )
    return 1 if problems else 0


@command(app)
async def share(
    context: CommandContext,
    job: JobArgument,
    reader: Annotated[str, typer.Argument(metavar="ADDRESS", help="Address that may read.")],
    until: Annotated[
        str, typer.Option(metavar="WHEN", help="A date (2026-12-24) or a time from now (7d, 12h).")
    ] = "7d",
    end: Annotated[bool, typer.Option("--end", help="End an earlier share at once.")] = False,
) -> None:
    """Let another address read a job's output and results at the gateway, until a date.

    The wallet signs a message; no transaction is sent. The definition stays private.
    """
    from deepsquare_chain.chain.bindings.calls import checked_address
    from deepsquare_chain.chain.sign_in import rfc3339
    from deepsquare_chain.client.gateways import gateways_of, no_gateway, parse_share_end
    from deepsquare_chain.client.network import open_account

    address, expiry = checked_address(reader), 0 if end else parse_share_end(until)
    async with context.grid() as contracts:
        account = await open_account(context.settings)
        async with gateways_of(context.settings, contracts.deployment, account) as gateways:
            if not gateways:
                raise no_gateway()
            for gateway in gateways:
                await gateway.share(job, address, expiry)
    change = "is not shared" if end else f"is shared until {rfc3339(expiry)}"
    context.printer.note(f"Job {job} {change} with {address}.")


@command(app, sends=True)
async def cancel(
    context: CommandContext,
    jobs: OptionalJobArguments = None,
    unmet: Annotated[
        bool, typer.Option("--unmet", help="Your jobs whose dependencies can never be met.")
    ] = False,
    gasless: GaslessOption = False,
    yes: YesOption = False,
) -> int:
    """End jobs of this wallet: a running one is paid for the time used, the rest is refunded."""
    from deepsquare_chain.chain.bindings.events import TransitionSkipped
    from deepsquare_chain.cli.why import unmet_jobs
    from deepsquare_chain.client.jobs import select

    if bool(jobs) == unmet:
        raise UsageError(
            "Give either jobs or --unmet",
            hint="Jobs are IDs, ranges or names, such as 7, 3-5 or train-*.",
        )
    receipts = []
    async with open_sending(context, gasless=gasless, yes=yes) as wallet:
        contracts = wallet.contracts
        if unmet:
            job_ids = await unmet_jobs(contracts, wallet.address)
        else:
            job_ids = await select(contracts, jobs or (), lambda: wallet.address)
            records = await contracts.scheduler.get_existing_jobs(job_ids)
            if len(job_ids) > 1:
                for job in records:
                    if not job.status.is_live:
                        context.printer.note(
                            f"Job {job.id} was skipped, because it is {job.status.name}."
                        )
                job_ids = [job.id for job in records if job.status.is_live]
        if not job_ids:
            context.unchanged(
                "All of them have ended."
                if jobs
                else "No job has dependencies that can never be met."
            )
        for start in range(0, len(job_ids), _CANCELLED_AT_ONCE):
            batch = job_ids[start : start + _CANCELLED_AT_ONCE]
            receipts.append(await wallet.send(contracts.scheduler.cancel(batch)))
    for receipt in receipts:
        context.receipt(receipt)
    skipped = [
        event
        for mined in receipts
        for event in mined.events
        if isinstance(event, TransitionSkipped)
    ]
    for event in skipped:
        context.printer.note(
            f"Job {event.job_id} was skipped, because it is {event.status.name} ({event.reason_name}); "
            f"see `deepsquare job get {event.job_id}`."
        )
    return RevertedError.exit_code if skipped else 0


@command(app, sends=True)
async def challenge(context: CommandContext, job: JobArgument) -> None:
    """Challenge the provider of a live job; a provider that does not answer in time loses its jobs."""
    async with context.wallet() as wallet:
        scheduler = wallet.contracts.scheduler
        record = await scheduler.get_job(job)
        receipt = await wallet.send(scheduler.challenge(job))
        parameters = await scheduler.parameters()
    context.receipt(receipt)
    context.printer.note(
        f"Provider {record.provider_id} must answer within {parameters.response_timeout} s and "
        f"{parameters.response_blocks} blocks to get new jobs; after {parameters.lost_timeout} s anyone may "
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
            parser=positive_credits, metavar="CREDITS", help="Escrow; as before by default."
        ),
    ] = None,
    gasless: GaslessOption = False,
    yes: YesOption = False,
) -> None:
    """Submit a job again with the same definition and terms."""
    from deepsquare_chain.client.submission import resubmit

    async with open_sending(context, gasless=gasless, yes=yes) as wallet:
        submitted = await resubmit(wallet, context.settings, job, credits)
        for job_id in submitted.job_ids:
            await _print_job(
                context, wallet.contracts, await wallet.contracts.scheduler.get_job(job_id)
            )


async def _print_job(context: CommandContext, contracts: Contracts, job: Job) -> None:
    from deepsquare_chain.client.jobs import histories

    history = (await histories(contracts, [job.id]))[job.id]
    context.printer.record(_JOB, _job_row(job, history))


def _list_row(listed: ListedJob, now: int) -> tuple[Any, ...]:
    return row_of(
        _LIST, listed.job, elapsed=listed.elapsed(now), **_shared_fields(listed.job, listed.history)
    )


def _job_row(job: Job, history: History) -> tuple[Any, ...]:
    is_final = job.status.is_final
    return row_of(
        _JOB,
        job,
        **_shared_fields(job, history),
        meaning=job.status.meaning,
        provider=history.provider or None,
        tasks=job.resources.tasks,
        cpus=job.resources.cpus,
        memory=job.resources.memory,
        gpus=job.resources.gpus,
        uses=history.uses,
        rate=job.rate or None,
        funded=history.funded,
        paid=history.paid if is_final else None,
        fee=history.fee if is_final else None,
        refunded=history.refunded if is_final else None,
        billed_seconds=history.billed_seconds,
        reason=history.reason,
        retry_of=job.retry_of or None,
        successor=history.successor,
        definition=job.definition.hex(),
    )


def _shared_fields(job: Job, history: History) -> dict[str, Any]:
    """Return the values that a list and a record of jobs both show and that are no attributes of it."""
    return {
        "name": history.name,
        "status": job.status.name,
        "provider_id": job.provider_id or None,
        "exit_code": history.exit_code,
        "escrow": job.escrow if job.status.is_live else 0,
        "cost": history.paid + history.fee,
    }


@command(root_app)
async def top(
    context: CommandContext,
    everybody: Annotated[bool, typer.Option("--all", help="List jobs of all customers.")] = False,
    read_only: Annotated[
        bool,
        typer.Option(
            "--read-only", help="Do not open a wallet: jobs can't be cancelled or topped up."
        ),
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.5, max=3_600, metavar="SECONDS", help="Poll interval.")
    ] = 2.0,
) -> None:
    """Show your jobs, the queue and providers live; keys: logs, cancel, top up, quit."""
    require("top", "top")
    from deepsquare_chain.cli.job_output import log_of
    from deepsquare_chain.cli.top_screen import Actions, TopApp
    from deepsquare_chain.client.accounts import top_up
    from deepsquare_chain.client.network import open_wallet, own_address
    from deepsquare_chain.client.offers import OverviewReader

    settings = context.settings
    has_wallet = settings.keystore is not None or bool(settings.signer)
    async with AsyncExitStack() as stack:
        if has_wallet and not read_only:
            # Opened before the full-screen view starts, since it may prompt for the password.
            wallet = await stack.enter_async_context(open_wallet(settings))
            contracts, customer = wallet.contracts, wallet.address
        else:
            wallet = None
            contracts = await stack.enter_async_context(context.grid())
            customer = own_address(settings, None) if has_wallet else ""

        def logs(job_id: int) -> AsyncIterator[bytes]:
            return log_of(settings, contracts, job_id, follow=True)

        async def cancel(job_id: int) -> None:
            assert wallet is not None  # noqa: S101 - offered with a wallet only
            await wallet.send(contracts.scheduler.cancel([job_id]))

        async def pay(job_id: int, amount: int) -> None:
            assert wallet is not None  # noqa: S101 - offered with a wallet only
            await top_up(wallet, job_id, amount)

        can_send = wallet is not None
        actions = Actions(logs, cancel if can_send else None, pay if can_send else None)
        reader = OverviewReader(contracts, None if everybody or not customer else customer)
        await TopApp(
            reader.read,
            actions,
            interval=interval,
            chain_id=contracts.deployment.chain_id,
            customer=customer,
        ).run_async()
