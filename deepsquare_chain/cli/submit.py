"""From a job file to a paid job: quote, submit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Format, Kind
from deepsquare_chain.cli.types import (
    GaslessOption,
    WaitTimeoutOption,
    YesOption,
    some,
    whole,
)
from deepsquare_chain.credits import format_credits

if TYPE_CHECKING:
    from deepsquare_chain.chain.bindings.contracts import Contracts
    from deepsquare_chain.client.submission import Bill
    from deepsquare_chain.job import Terms
    from deepsquare_chain.store.gateway_client import GatewayClient
    from deepsquare_chain.workflow import JobFile

app = typer.Typer()

_QUOTES: Final = (
    Column("provider_id", "provider", Kind.NUMBER),
    Column("account", "account", Kind.HASH, detail=True),
    Column("rate", "rate", Kind.RATE),
    Column("cost", "max cost", Kind.CREDITS),
    Column("longest", "max runtime", Kind.SECONDS),
    Column("start", "start"),
    Column("starts_in", "starts in", Kind.SECONDS, detail=True),
    Column("eligible", "eligible", Kind.FLAG),
    Column("reason", "reason"),
)
_BILL: Final = (
    Column("jobs", "jobs", Kind.NUMBER),
    Column("total", "into escrow", Kind.CREDITS),
    Column("balance", "credits", Kind.CREDITS),
    Column("approval", "needs an approval", Kind.FLAG),
    Column("gas", "max gas (coin)", Kind.COIN),
)
_SUBMITTED: Final = (
    Column("id", "job", Kind.NUMBER),
    Column("name", "name"),
    Column("escrow", "escrow", Kind.CREDITS),
    Column("definition", "definition", Kind.HASH, detail=True),
    Column("transaction", "transaction", Kind.HASH),
)

JobFilePath = Annotated[Path, typer.Argument(metavar="FILE", help="Job file (YAML).")]
CreditsOption = Annotated[
    int | None,
    typer.Option("--credits", parser=some, metavar="CREDITS", help="Escrow; wins over the file."),
]
LimitOption = Annotated[
    str | None,
    typer.Option("--time-limit", metavar="TIME", help="Such as 90s, 10m, 2d; wins over the file."),
]


def _read(file: Path, credits: int | None, limit: str | None) -> tuple[JobFile, Terms]:
    from deepsquare_chain.errors import UsageError
    from deepsquare_chain.workflow import load_job_file, parse_duration

    job_file = load_job_file(file)
    try:
        seconds = None if limit is None else parse_duration(limit)
    except ValueError as error:
        raise UsageError(f"--time-limit: {error}", hint="Write 90s, 10m or 1h30m.") from None
    return job_file, job_file.terms(credits=credits, time_limit=seconds)


@command(app)
async def quote(
    context: CommandContext,
    file: JobFilePath,
    credits: CreditsOption = None,
    time_limit: LimitOption = None,
) -> None:
    """Show what a job would cost at each provider, how long it could run, and when it may start."""
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.client.offers import offers

    _, terms = _read(file, credits, time_limit)
    async with open_grid(context.settings) as contracts:
        found = await offers(contracts, terms)
    context.printer.rows(
        _QUOTES,
        (
            (
                *(o.provider_id, o.account, o.rate, o.cost, o.longest),
                *(o.start, o.starts_in, o.eligible, o.refusal),
            )
            for o in found
        ),
        empty="No provider is registered.",
    )


@command(app)
async def submit(
    context: CommandContext,
    file: JobFilePath,
    credits: CreditsOption = None,
    time_limit: LimitOption = None,
    array: Annotated[
        int,
        typer.Option("--array", parser=whole(1), metavar="N", help="Submit it N times at once."),
    ] = 1,
    permit: Annotated[
        bool, typer.Option("--permit", help="Sign a permit instead of sending an approval.")
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", metavar="KEY", help="Your name of this submission; repeated, it pays once."
        ),
    ] = None,
    gasless: GaslessOption = False,
    yes: YesOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, pay nothing.")
    ] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", help="Show its output and wait for the end; exit with its own code."
        ),
    ] = False,
    wait_timeout: WaitTimeoutOption = None,
) -> int | None:
    """Pay for a job and put it into the grid's queue."""
    from deepsquare_chain.cli.signing import open_sending
    from deepsquare_chain.client.gateways import definitions_of
    from deepsquare_chain.client.quotes import cheapest, quotes
    from deepsquare_chain.client.submission import (
        Request,
        bill,
        refuse_relayed_key,
        repeated,
        submit,
    )
    from deepsquare_chain.store.definitions import FolderDefinitionStore
    from deepsquare_chain.store.gateway_client import GatewayDefinitionStore

    job_file, terms = _read(file, credits, time_limit)
    async with (
        open_sending(context, gasless=gasless, yes=yes) as wallet,
        definitions_of(context.settings, wallet.contracts.deployment, wallet.account) as store,
    ):
        gateways = store.gateways if isinstance(store, GatewayDefinitionStore) else ()
        if not gasless:
            refuse_relayed_key(wallet.store, key)
        requests = [Request(terms, (job_file.definition.to_bytes(),) * array)]
        done = await repeated(
            wallet.contracts, wallet.sender, requests, key, context.settings.timeout
        )
        if done is not None:
            context.printer.note(f"The key {key!r} was used before: nothing more is paid.")
        else:
            due = await bill(wallet.contracts, wallet.address, requests, gasless=gasless)
            due.check()
            if cheapest(await quotes(wallet.contracts, terms)) is None:
                context.printer.note(
                    "Warning: no provider could run this now; see `deepsquare quote`. The job "
                    "would wait, and can be cancelled for a full refund."
                )
            if isinstance(store, FolderDefinitionStore) and not store.readers():
                context.printer.note(
                    f"Warning: no provider is known to read definitions from {store.path} (setting "
                    "store). Where none does, the job waits and can be cancelled for a full refund."
                )
            _announce(context, due, permit=permit or gasless, gasless=gasless)
            if dry_run:
                context.printer.note("Dry run: nothing was sent.")
                if context.printer.style is not Format.TABLE:
                    row = (due.jobs, due.total, due.balance, due.approval, due.gas_wei)
                    context.printer.record(_BILL, row)
                return None
            done = await submit(
                wallet.contracts,
                wallet.sender,
                store,
                requests,
                permit=wallet.account if permit else None,
                timeout=context.settings.timeout,
                key=key,
            )
        digest, sent = job_file.definition.digest.hex(), done.receipts[-1].hash
        submitted = [(i, terms.name, terms.amount, digest, sent) for i in done.job_ids]
        if not wait:
            context.printer.rows(_SUBMITTED, submitted)
            return None
        ids = ", ".join(map(str, done.job_ids))
        context.printer.note(f"Submitted and paid for: job{'s' * (array > 1)} {ids}.")
        try:
            return await _wait(context, wallet.contracts, gateways, done.job_ids, wait_timeout)
        except BaseException:
            # They are paid for: whoever waited must know which they are, whatever comes after.
            context.printer.rows(_SUBMITTED, submitted)
            raise


def _announce(context: CommandContext, due: Bill, *, permit: bool, gasless: bool) -> None:
    jobs = "" if due.jobs == 1 else f" for {due.jobs} jobs"
    total = format_credits(due.total)
    allowed = "the allowance covers it"
    if due.approval:
        allowed = f"{'signs a permit' if permit else 'sends an approval'} for exactly {total}"
    gas = "a relay pays the gas"
    if not gasless:
        gas = f"max gas {format_credits(due.gas_wei)} coin"
    context.printer.note(
        f"Escrowing {total} of {format_credits(due.balance)} credits{jobs}; {allowed}; {gas}."
    )


async def _wait(
    context: CommandContext,
    contracts: Contracts,
    gateways: Sequence[GatewayClient],
    job_ids: tuple[int, ...],
    timeout: float | None,
) -> int:
    """Wait for all of them, `timeout` seconds in all; the first code that is not zero wins.

    What each prints is shown as it comes where a gateway has it: on stdout for people, on stderr
    where stdout is for data.
    """
    from deepsquare_chain.cli.job import follow_to_end, print_ended
    from deepsquare_chain.cli.outputs import LogPrinter

    deadline = None if timeout is None else time.monotonic() + timeout
    found = []
    for job_id in job_ids:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        async with LogPrinter(context, contracts, gateways) as logs:
            found.append(await follow_to_end(context, contracts, job_id, left, on_change=logs.saw))
            await logs.finish()
    await print_ended(context, found)
    return next((each.exit_code for each in found if each.exit_code), 0)
