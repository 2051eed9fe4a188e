"""Commands for audits, which rebuild jobs and balances from events alone."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from deepsquare_chain.cli.audit_output import (
    EXCEPTIONS,
    EXPORT,
    INVOICE,
    INVOICE_LINES,
    STATEMENT,
    exception_rows,
    print_job,
    print_report,
)
from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Format
from deepsquare_chain.cli.types import (
    AccountArgument,
    FromOption,
    JobArgument,
    MonthOption,
    TableKind,
    ToOption,
    whole_number,
)

app = typer.Typer(help="Audit the ledgers from events alone.", no_args_is_help=True)

BlockOption = Annotated[
    int | None,
    typer.Option(
        parser=whole_number(0),
        metavar="N",
        help="Last block; the newest by default.",
        show_default=False,
    ),
]


@command(app)
async def verify(
    context: CommandContext,
    export: Annotated[
        Path | None, typer.Argument(help="An export to replay instead of the events of the chain.")
    ] = None,
    block: BlockOption = None,
    block_hash: Annotated[
        str, typer.Option(help="Expected hash of the last block, from a trusted source.")
    ] = "",
    proofs: Annotated[
        bool, typer.Option("--proofs", help="Verify every log against the hashes of block headers.")
    ] = False,
    compare_endpoint: Annotated[
        str, typer.Option(help="A second endpoint, which must return the same data.")
    ] = "",
    events_only: Annotated[
        bool, typer.Option("--events-only", help="Skip the comparison with the contracts' storage.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Verify the export without a chain.")
    ] = False,
) -> int:
    """Rebuild every job and balance from events, compare with storage; exit 10 on any inconsistency."""
    from deepsquare_chain.audit.runner import Depth, audit_export, audit_grid
    from deepsquare_chain.chain.rpc.connection import connected
    from deepsquare_chain.client.network import open_grid, transport_of
    from deepsquare_chain.errors import AuditError, UsageError

    if export is None and offline:
        raise UsageError("Only an export can be verified offline", hint="Give its folder.")
    if export is not None and (proofs or compare_endpoint or block is not None or block_hash):
        raise UsageError(
            "An export is compared with one chain at its own last block",
            hint="Leave out --proofs, --compare-endpoint, --block and --block-hash.",
        )
    async with AsyncExitStack() as stack:
        contracts = (
            None if offline else await stack.enter_async_context(open_grid(context.settings))
        )
        second_endpoint = None
        if compare_endpoint and contracts is not None:
            chain_id = contracts.deployment.chain_id
            second_endpoint = await stack.enter_async_context(
                connected(
                    compare_endpoint, chain_id=chain_id, transport=transport_of(context.settings)
                )
            )
        depth = Depth(not events_only, proofs, second_endpoint, block_hash)
        if export is not None:
            report = await audit_export(contracts, export, depth=depth, bars=_bars)
        elif contracts is not None:
            report = await audit_grid(contracts, to_block=block, depth=depth, bars=_bars)
    print_report(context, report)
    return 0 if report.ok else AuditError.exit_code


def _bars(title: str) -> Any:
    from deepsquare_chain.cli.output import progress

    return progress(title)


@command(app)
async def exceptions(context: CommandContext, block: BlockOption = None) -> None:
    """Show notable events: overruns, panics, role changes and the like."""
    from deepsquare_chain.audit.runner import Depth, audit_grid
    from deepsquare_chain.client.network import open_grid

    async with open_grid(context.settings) as contracts:
        report = await audit_grid(contracts, to_block=block, depth=Depth(storage=False), bars=_bars)
    rows = exception_rows(report.exceptions)
    context.printer.rows(EXCEPTIONS, rows, empty="No notable events.")


@command(app)
async def statement(
    context: CommandContext,
    account: AccountArgument = None,
    month: MonthOption = None,
    first: FromOption = None,
    last: ToOption = None,
) -> int:
    """Show all credits that an account paid and received; exit 10 if they do not match its balance."""
    return await print_statement(context, account, month, first, last)


async def print_statement(
    context: CommandContext,
    account: str | None,
    month: str | None = None,
    first: str | None = None,
    last: str | None = None,
) -> int:
    """Print all credits that an account paid and received in a period, oldest first; return the exit code."""
    from deepsquare_chain.audit.entries import statement_cells
    from deepsquare_chain.audit.runner import account_statement
    from deepsquare_chain.client.network import open_grid, own_address
    from deepsquare_chain.client.periods import blocks_of, parse_period
    from deepsquare_chain.credits import format_credits
    from deepsquare_chain.errors import AuditError

    period = parse_period(month, first, last)
    address = own_address(context.settings, account)
    async with open_grid(context.settings) as contracts:
        since, until = await blocks_of(contracts.w3, period, contracts.deployment.block)
        account_history, names, check = await account_statement(
            contracts, address, first=since, last=until, bars=_bars
        )
    rows = [statement_cells(row, names.get(row.job_id, "")) for row in account_history.rows]
    context.printer.rows(STATEMENT, rows, empty=f"No credits of {address} moved in this period.")
    opening, closing = (
        format_credits(account_history.opening),
        format_credits(account_history.closing),
    )
    context.printer.note(
        f"Opening balance {opening}, closing balance {closing}; blocks {account_history.first} to {account_history.last}."
    )
    if not check.ok:
        balance = format_credits(check.right.amount)
        context.printer.note(f"balanceOf on the chain returns {balance}: the statement is wrong.")
    return 0 if check.ok else AuditError.exit_code


@command(app)
async def invoice(
    context: CommandContext,
    job: JobArgument,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a printable HTML page."),
    ] = None,
) -> int:
    """Show what a job cost, with the evidence: events, transactions and the recomputed bill.

    Exit 10 if the bill differs from the recomputed one.
    """
    from deepsquare_chain.audit.bill import invoice_of, render_html
    from deepsquare_chain.audit.reader import read_ledger
    from deepsquare_chain.audit.runner import job_bill
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.errors import AuditError, NotFoundError, UsageError

    async with open_grid(context.settings) as contracts:
        with _bars("Reading events") as progress:
            ledger, last = await read_ledger(contracts, progress=progress)
        if job not in ledger.jobs:
            raise NotFoundError(
                f"Job {job} does not exist up to block {last}",
                hint="List jobs with `deepsquare job list`.",
            )
        job_invoice = invoice_of(ledger, job, await job_bill(contracts, ledger, job))
    if html is not None:
        try:
            html.write_text(render_html(job_invoice), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{html} can't be written: {error.strerror}") from None
        context.printer.note(f"Wrote {html}; print it, or save it as PDF, from a browser.")
    context.printer.record(INVOICE, job_invoice.row())
    if context.printer.style is Format.TABLE:
        context.printer.rows(
            INVOICE_LINES, [(e.time, e.what, e.amount, e.tx_hash) for e in job_invoice.lines]
        )
    return 0 if job_invoice.ok else AuditError.exit_code


@command(app)
async def export(
    context: CommandContext,
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    block: BlockOption = None,
    tables: Annotated[
        TableKind, typer.Option("--format", help="Format of the tables.")
    ] = TableKind.CSV,
) -> int:
    """Write raw logs, tables and a manifest of their hashes, for others to verify."""
    from deepsquare_chain.audit.export import LOGS, MANIFEST, TableFormat
    from deepsquare_chain.audit.export import export as write
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.errors import AuditError

    style = TableFormat(tables.value)
    async with open_grid(context.settings) as contracts:
        with _bars("Reading events") as progress:
            manifest, ledger = await write(
                contracts, folder, to_block=block, style=style, progress=progress
            )
    location = (
        manifest.deployment.chain_id,
        manifest.deployment.block,
        manifest.last_block,
        manifest.block_hash,
    )
    row = (str(folder), *location, manifest.files[LOGS].rows, str(folder / MANIFEST))
    context.printer.record(EXPORT, row)
    if ledger.findings:
        context.printer.note(
            f"The audit found {len(ledger.findings)} inconsistencies: see `audit verify`."
        )
    return AuditError.exit_code if ledger.findings else 0


@command(app)
async def job(context: CommandContext, job: JobArgument, block: BlockOption = None) -> int:
    """Show a job's status changes, payments and recomputed bill; exit 10 if they do not add up."""
    from deepsquare_chain.audit.conservation import job_conservation
    from deepsquare_chain.audit.reader import read_ledger
    from deepsquare_chain.audit.runner import job_bill
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.errors import AuditError, NotFoundError

    async with open_grid(context.settings) as contracts:
        with _bars("Reading events") as progress:
            ledger, last = await read_ledger(contracts, to_block=block, progress=progress)
        entry = ledger.jobs.get(job)
        if entry is None:
            raise NotFoundError(
                f"Job {job} does not exist up to block {last}",
                hint="List jobs with `deepsquare job list`.",
            )
        bill = await job_bill(contracts, ledger, job)
    check = job_conservation(entry, ledger.deployment, last)
    findings = [finding for finding in ledger.findings if finding.job_id == job]
    print_job(context, entry, bill, check)
    for finding in findings:
        context.printer.note(str(finding))
    return 0 if bill.ok and check.ok and not findings else AuditError.exit_code
