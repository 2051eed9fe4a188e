"""The books, rebuilt from events alone."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deepsquare_chain.cli.frame import Desk, command
from deepsquare_chain.cli.output import Column, Format, Kind
from deepsquare_chain.cli.types import AccountArgument, JobArgument, TableKind

if TYPE_CHECKING:
    from deepsquare_chain.explorer.auditing import Report
    from deepsquare_chain.explorer.bill import Bill
    from deepsquare_chain.explorer.books import JobEntry
    from deepsquare_chain.explorer.conservation import Check
    from deepsquare_chain.explorer.exceptions import ExceptionRow

app = typer.Typer(help="Check the books from events alone.", no_args_is_help=True)

BlockOption = Annotated[
    int | None, typer.Option(min=0, help="Last block; the newest by default.", show_default=False)
]
_AUDIT: Final = (
    Column("ok", "in order", Kind.FLAG),
    Column("difference", "difference", Kind.CREDITS),
    Column("block", "up to block", Kind.NUMBER),
    Column("jobs", "jobs", Kind.NUMBER),
    Column("supply", "supply", Kind.CREDITS),
    Column("scheduler_balance", "held by the scheduler", Kind.CREDITS),
    Column("escrow", "escrow of live jobs", Kind.CREDITS),
    Column("parked", "parked", Kind.CREDITS),
    Column("paid", "paid to providers", Kind.CREDITS),
    Column("fees", "fees", Kind.CREDITS),
    Column("refunded", "refunded", Kind.CREDITS),
    Column("compared", "compared with storage", Kind.FLAG),
    Column("proven", "proven by headers", Kind.FLAG),
)
_FINDINGS: Final = (
    Column("code", "finding"),
    Column("job_id", "job", Kind.NUMBER),
    Column("block", "block", Kind.NUMBER),
    Column("message", "what"),
    Column("transaction", "transaction", detail=True),
)
_CHECKS: Final = (
    Column("name", "what must be equal"),
    Column("left", "one side", Kind.CREDITS),
    Column("right", "the other", Kind.CREDITS),
    Column("difference", "difference", Kind.CREDITS),
)
_EXCEPTIONS: Final = (
    Column("severity", "look"),
    Column("code", "exception"),
    Column("job_id", "job", Kind.NUMBER),
    Column("block", "block", Kind.NUMBER),
    Column("time", "time (UTC)", Kind.TIME),
    Column("message", "what"),
    Column("account", "account", detail=True),
    Column("transaction", "transaction", detail=True),
)
_BILL: Final = (
    Column("settled", "settled", Kind.FLAG),
    Column("ok", "as computed", Kind.FLAG),
    Column("started_at", "started (UTC)", Kind.TIME),
    Column("ended_at", "ended (UTC)", Kind.TIME),
    Column("elapsed", "elapsed (s)", Kind.NUMBER),
    Column("reported", "reported (s)", Kind.NUMBER),
    Column("allotment", "allotted (s)", Kind.NUMBER),
    Column("seconds", "to be billed (s)", Kind.NUMBER),
    Column("billed_seconds", "billed (s)", Kind.NUMBER),
    Column("rate", "rate", Kind.RATE),
    Column("fee_bps", "fee (basis points)", Kind.NUMBER),
    Column("cost", "seconds x rate", Kind.CREDITS),
    Column("why", "rule"),
)
_LINES: Final = (
    Column("name", "sum"),
    Column("expected", "must be", Kind.CREDITS),
    Column("actual", "is", Kind.CREDITS),
    Column("difference", "difference", Kind.CREDITS),
)
_EXPORT: Final = (
    Column("folder", "export"),
    Column("chain_id", "chain", Kind.NUMBER),
    Column("first_block", "from block", Kind.NUMBER),
    Column("last_block", "to block", Kind.NUMBER),
    Column("block_hash", "its hash"),
    Column("logs", "logs", Kind.NUMBER),
    Column("manifest", "manifest"),
)
_STATEMENT: Final = (
    Column("block", "block", Kind.NUMBER),
    Column("time", "time (UTC)", Kind.TIME),
    Column("kind", "kind"),
    Column("job_id", "job", Kind.NUMBER),
    Column("debit", "out", Kind.CREDITS),
    Column("credit", "in", Kind.CREDITS),
    Column("balance", "balance", Kind.CREDITS),
    Column("counterparty", "with", detail=True),
    Column("transaction", "transaction", detail=True),
    Column("log_index", "log", Kind.NUMBER, detail=True),
)
_TRANSITIONS: Final = (
    Column("time", "time (UTC)", Kind.TIME),
    Column("status", "became"),
    Column("transaction", "transaction"),
)
_JOB: Final = (
    Column("id", "job", Kind.NUMBER),
    Column("name", "name"),
    Column("status", "status"),
    Column("customer", "customer"),
    Column("provider", "provider"),
    Column("rate", "rate", Kind.RATE),
    Column("billed_seconds", "billed (s)", Kind.NUMBER),
    Column("funded", "funded", Kind.CREDITS),
    Column("carried_in", "carried in", Kind.CREDITS),
    Column("escrow", "in escrow", Kind.CREDITS),
    Column("paid", "paid", Kind.CREDITS),
    Column("fee", "fee", Kind.CREDITS),
    Column("refunded", "refunded", Kind.CREDITS),
    Column("carried_out", "carried out", Kind.CREDITS),
    Column("difference", "difference", Kind.CREDITS),
)


@command(app)
async def verify(
    desk: Desk,
    export: Annotated[
        Path | None, typer.Argument(help="An export to replay, instead of the chain's own events.")
    ] = None,
    block: BlockOption = None,
    block_hash: Annotated[
        str, typer.Option(help="Hash that the last block must have, from a source you trust.")
    ] = "",
    proofs: Annotated[
        bool, typer.Option("--proofs", help="Prove every log by the hashes of block headers.")
    ] = False,
    compare_endpoint: Annotated[
        str, typer.Option(help="A second endpoint, which must tell the same.")
    ] = "",
    events_only: Annotated[
        bool, typer.Option("--events-only", help="Do not compare with the contracts' storage.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Hold the export against itself alone.")
    ] = False,
) -> int:
    """Rebuild every job and balance, compare with storage; exit 10 if it does not add up."""
    from deepsquare_chain.chain.rpc import connected
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.errors import AuditError, UsageError
    from deepsquare_chain.explorer.auditing import Depth, audit_export, audit_grid

    if export is None and offline:
        raise UsageError("Only an export can be verified offline", hint="Name its folder.")
    if export is not None and (proofs or compare_endpoint or block is not None or block_hash):
        raise UsageError(
            "An export is held against one chain at its own last block",
            hint="Leave out --proofs, --compare-endpoint, --block and --block-hash.",
        )
    async with AsyncExitStack() as stack:
        contracts = None if offline else await stack.enter_async_context(open_grid(desk.settings))
        other = None
        if compare_endpoint and contracts is not None:
            chain_id = contracts.deployment.chain_id
            other = await stack.enter_async_context(connected(compare_endpoint, chain_id=chain_id))
        depth = Depth(not events_only, proofs, other, block_hash)
        if export is not None:
            found = await audit_export(contracts, export, depth=depth, bars=_bars)
        elif contracts is not None:
            found = await audit_grid(contracts, to_block=block, depth=depth, bars=_bars)
    _print_report(desk, found)
    return 0 if found.ok else AuditError.exit_code


def _bars(title: str) -> Any:
    from deepsquare_chain.cli.progress import progress

    return progress(title)


def _print_report(desk: Desk, report: Report) -> None:
    audit, totals, printer = report.audit, report.audit.totals, desk.printer
    values = (report.ok, audit.difference, audit.block, totals.jobs, totals.supply)
    sums = (totals.scheduler_balance, totals.escrow, totals.parked)
    flows = (totals.paid, totals.fees, totals.refunded, audit.compared, report.proven)
    record = (*values, *sums, *flows)
    findings = [(f.code, f.job_id or None, f.block, f.message, f.tx_hash) for f in audit.findings]
    checks = [_check_row(check) for check in report.checks]
    if printer.style is Format.CSV and findings:
        printer.rows(_FINDINGS, findings)
    elif printer.style is Format.JSON:
        body = printer.as_object(_AUDIT, record)
        body["block_hash"] = report.block_hash or None
        body["findings"] = [printer.as_object(_FINDINGS, row) for row in findings]
        body["checks"] = [_check_object(desk, check) for check in report.checks]
        rows = _exception_rows(report.exceptions)
        body["exceptions"] = [printer.as_object(_EXCEPTIONS, row) for row in rows]
        printer.document(body)
    else:
        printer.record(_AUDIT, record)
        if printer.style is Format.TABLE:
            printer.rows(_CHECKS, checks)
        printer.rows(_FINDINGS, findings, empty="Nothing was found that can't be.")
        if count := len(report.exceptions):
            printer.note(f"{count} lawful exceptions: see `deepsquare audit exceptions`.")


def _check_row(check: Check) -> tuple[Any, ...]:
    return (check.name, check.left.amount, check.right.amount, check.difference)


def _check_object(desk: Desk, check: Check) -> dict[str, Any]:
    """A check as JSON: its sums with their terms, and how to count them by hand."""
    body = desk.printer.as_object(_CHECKS, _check_row(check))
    for name, side in (("left", check.left), ("right", check.right)):
        terms = {term: str(amount) for term, amount in side.terms}
        body[name] = {"title": side.title, "amount": str(side.amount), "terms": terms}
    body["how_to_repeat"] = [
        {"what": each.shown, "method": each.method, "params": list(each.params), "cast": each.cast}
        for each in check.how_to_repeat
    ]
    return body


def _exception_rows(rows: tuple[ExceptionRow, ...]) -> list[tuple[Any, ...]]:
    return [
        (
            row.severity.value,
            row.code.value,
            row.job_id or None,
            row.block,
            row.time,
            row.message,
            row.account,
            row.tx_hash,
        )
        for row in rows
    ]


@command(app)
async def exceptions(desk: Desk, block: BlockOption = None) -> None:
    """Show what is lawful but worth a look: overruns, panics, role changes and the like."""
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.explorer.auditing import Depth, audit_grid

    async with open_grid(desk.settings) as contracts:
        found = await audit_grid(contracts, to_block=block, depth=Depth(storage=False), bars=_bars)
    rows = _exception_rows(found.exceptions)
    desk.printer.rows(_EXCEPTIONS, rows, empty="Nothing out of the ordinary.")


@command(app)
async def statement(
    desk: Desk,
    account: AccountArgument = None,
    first: Annotated[int, typer.Option("--from", min=0, help="First block.")] = 0,
    last: Annotated[
        int | None, typer.Option("--to", min=0, help="Last block; the newest by default.")
    ] = None,
) -> int:
    """Show all that an account paid and got; exit 10 if it does not end at its balance."""
    return await print_statement(desk, account, first, last)


async def print_statement(
    desk: Desk, account: str | None, first: int = 0, last: int | None = None
) -> int:
    """All movements of an account in a range of blocks, oldest first; the exit code."""
    from deepsquare_chain.client.network import open_grid, own_address
    from deepsquare_chain.credits import format_credits
    from deepsquare_chain.errors import AuditError, UsageError
    from deepsquare_chain.explorer.auditing import account_statement

    if last is not None and last < first:
        raise UsageError(f"No block is from {first} on and up to {last}")
    address = own_address(desk.settings, account)
    async with open_grid(desk.settings) as contracts:
        found, check = await account_statement(
            contracts, address, first=first, last=last, bars=_bars
        )
    rows = [
        (
            row.block,
            row.time,
            row.kind.value,
            row.job_id or None,
            max(-row.amount, 0) or None,
            max(row.amount, 0) or None,
            row.balance,
            row.counterparty,
            row.tx_hash,
            row.log_index,
        )
        for row in found.rows
    ]
    desk.printer.rows(_STATEMENT, rows, empty=f"No credits of {address} moved in these blocks.")
    opening, closing = format_credits(found.opening), format_credits(found.closing)
    desk.printer.note(
        f"Opening balance {opening}, closing balance {closing} at block {found.last}."
    )
    if not check.ok:
        held = format_credits(check.right.amount)
        desk.printer.note(f"The chain's balanceOf says {held}: the statement is wrong.")
    return 0 if check.ok else AuditError.exit_code


@command(app)
async def export(
    desk: Desk,
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    block: BlockOption = None,
    tables: Annotated[
        TableKind, typer.Option("--format", help="How tables are written.")
    ] = TableKind.CSV,
) -> int:
    """Write raw logs, tables and a manifest of their hashes, for others to verify."""
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.errors import AuditError
    from deepsquare_chain.explorer.export import LOGS, MANIFEST, TableFormat
    from deepsquare_chain.explorer.exporting import export as write

    style = TableFormat(tables.value)
    async with open_grid(desk.settings) as contracts:
        with _bars("Reading events") as progress:
            done, ledger = await write(
                contracts, folder, to_block=block, style=style, progress=progress
            )
    place = (done.deployment.chain_id, done.deployment.block, done.last_block, done.block_hash)
    row = (str(folder), *place, done.files[LOGS].rows, str(folder / MANIFEST))
    desk.printer.record(_EXPORT, row)
    if ledger.findings:
        desk.printer.note(f"The audit found {len(ledger.findings)} faults: see `audit verify`.")
    return AuditError.exit_code if ledger.findings else 0


@command(app)
async def job(desk: Desk, job: JobArgument, block: BlockOption = None) -> int:
    """Show a job's way, money and recomputed bill; exit 10 if it does not add up."""
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.errors import AuditError, NotFoundError
    from deepsquare_chain.explorer.auditing import job_bill
    from deepsquare_chain.explorer.conservation import job_conservation
    from deepsquare_chain.explorer.reader import read_ledger

    async with open_grid(desk.settings) as contracts:
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
    _print_job(desk, entry, bill, check)
    for finding in findings:
        desk.printer.note(str(finding))
    return 0 if bill.ok and check.ok and not findings else AuditError.exit_code


def _print_job(desk: Desk, entry: JobEntry, bill: Bill, check: Check) -> None:
    printer = desk.printer
    way = [(time, status.name, tx_hash) for time, status, tx_hash in entry.transitions]
    lines = [(line.name, line.expected, line.actual, line.difference) for line in bill.lines]
    inputs = tuple(getattr(bill, column.key) for column in _BILL)
    if printer.style is Format.JSON:
        body = printer.as_object(_JOB, _job_row(entry))
        body["transitions"] = [printer.as_object(_TRANSITIONS, step) for step in way]
        body["bill"] = printer.as_object(_BILL, inputs)
        body["bill"]["lines"] = [printer.as_object(_LINES, line) for line in lines]
        body["conservation"] = _check_object(desk, check)
        printer.document(body)
        return
    printer.record(_JOB, _job_row(entry))
    if printer.style is Format.TABLE:
        printer.rows(_TRANSITIONS, way)
        printer.record(_BILL, inputs)
        printer.rows(_LINES, lines)


def _job_row(entry: JobEntry) -> tuple[Any, ...]:
    return (
        entry.id,
        entry.name,
        entry.status.name,
        entry.customer,
        entry.provider,
        entry.rate,
        entry.billed_seconds,
        entry.funded,
        entry.carried_in,
        entry.escrow,
        entry.paid,
        entry.fee,
        entry.refunded,
        entry.carried_out,
        entry.difference,
    )
