"""Commands for audits, which rebuild jobs and balances from events alone, and their output."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Format, Kind, as_object, progress, row_of
from deepsquare_chain.cli.types import (
    AccountArgument,
    FromOption,
    JobArgument,
    MonthOption,
    TableKind,
    ToOption,
    number_option,
)
from deepsquare_chain.errors import AuditError, NotFoundError, UsageError

if TYPE_CHECKING:
    from deepsquare_chain.audit.anomalies import Anomaly
    from deepsquare_chain.audit.bill import JobBill
    from deepsquare_chain.audit.conservation import ConservationCheck
    from deepsquare_chain.audit.entries import JobEntry
    from deepsquare_chain.audit.ledger import Ledger
    from deepsquare_chain.audit.runner import AuditReport

AUDIT: Final = (
    Column("ok", "OK", Kind.FLAG),
    Column("difference", "difference", Kind.CREDITS),
    Column("block", "up to block", Kind.NUMBER),
    Column("jobs", "jobs", Kind.NUMBER),
    Column("supply", "supply", Kind.CREDITS),
    Column("scheduler_balance", "scheduler's balance", Kind.CREDITS),
    Column("escrow", "escrow of live jobs", Kind.CREDITS),
    Column("parked", "withdrawable", Kind.CREDITS),
    Column("paid", "paid to providers", Kind.CREDITS),
    Column("fees", "fees", Kind.CREDITS),
    Column("refunded", "refunded", Kind.CREDITS),
    Column("compared", "compared with storage", Kind.FLAG),
    Column("proven", "proven by headers", Kind.FLAG),
)
FINDINGS: Final = (
    Column("code", "finding"),
    Column("job_id", "job", Kind.NUMBER),
    Column("block", "block", Kind.NUMBER),
    Column("message", "what"),
    Column("transaction", "transaction", Kind.HASH, detail=True),
)
CHECKS: Final = (
    Column("name", "check"),
    Column("left", "one side", Kind.CREDITS),
    Column("right", "the other", Kind.CREDITS),
    Column("difference", "difference", Kind.CREDITS),
)
EXCEPTIONS: Final = (
    Column("severity", "look"),
    Column("code", "exception"),
    Column("job_id", "job", Kind.NUMBER),
    Column("block", "block", Kind.NUMBER),
    Column("time", "time (UTC)", Kind.TIME),
    Column("message", "what"),
    Column("account", "account", Kind.HASH, detail=True),
    Column("transaction", "transaction", Kind.HASH, detail=True),
)
BILL: Final = (
    Column("settled", "settled", Kind.FLAG),
    Column("ok", "as computed", Kind.FLAG),
    Column("started_at", "started (UTC)", Kind.TIME),
    Column("ended_at", "ended (UTC)", Kind.TIME),
    Column("elapsed", "elapsed (s)", Kind.NUMBER),
    Column("reported", "reported (s)", Kind.NUMBER),
    Column("allotment", "granted (s)", Kind.NUMBER),
    Column("seconds", "to be billed (s)", Kind.NUMBER),
    Column("billed_seconds", "billed (s)", Kind.NUMBER),
    Column("rate", "rate", Kind.RATE),
    Column("fee_bps", "fee (basis points)", Kind.NUMBER),
    Column("cost", "seconds x rate", Kind.CREDITS),
    Column("why", "rule"),
    Column("collected_seconds", "interim payments billed (s)", Kind.NUMBER),
    Column("collected", "interim payments, fees included", Kind.CREDITS),
)
LINES: Final = (
    Column("name", "sum"),
    Column("expected", "expected", Kind.CREDITS),
    Column("actual", "is", Kind.CREDITS),
    Column("difference", "difference", Kind.CREDITS),
)
EXPORT: Final = (
    Column("folder", "export"),
    Column("chain_id", "chain", Kind.NUMBER),
    Column("first_block", "from block", Kind.NUMBER),
    Column("last_block", "to block", Kind.NUMBER),
    Column("block_hash", "hash"),
    Column("logs", "logs", Kind.NUMBER),
    Column("manifest", "manifest"),
)
STATEMENT: Final = (
    Column("block", "block", Kind.NUMBER),
    Column("time", "time (UTC)", Kind.TIME),
    Column("kind", "kind"),
    Column("job_id", "job", Kind.NUMBER),
    Column("job_name", "name", detail=True),
    Column("debit", "out", Kind.CREDITS),
    Column("credit", "in", Kind.CREDITS),
    Column("balance", "balance", Kind.CREDITS),
    Column("counterparty", "with", Kind.HASH, detail=True),
    Column("transaction", "transaction", Kind.HASH, detail=True),
    Column("log_index", "log", Kind.NUMBER, detail=True),
)
INVOICE: Final = (
    Column("job_id", "job", Kind.NUMBER),
    Column("job_name", "name"),
    Column("status", "status", Kind.WORD),
    Column("customer", "customer", Kind.HASH),
    Column("provider", "provider", Kind.HASH),
    Column("started_at", "started (UTC)", Kind.TIME),
    Column("ended_at", "ended (UTC)", Kind.TIME),
    Column("billed_seconds", "billed", Kind.SECONDS),
    Column("rate", "rate", Kind.RATE),
    Column("cost", "total", Kind.CREDITS),
    Column("paid", "to the provider", Kind.CREDITS),
    Column("fee", "fee", Kind.CREDITS),
    Column("funded", "paid in", Kind.CREDITS),
    Column("refunded", "returned", Kind.CREDITS),
    Column("ok", "bill as computed", Kind.FLAG),
    Column("chain_id", "chain", Kind.NUMBER),
    Column("contract", "MetaScheduler", Kind.HASH),
    Column("block", "up to block", Kind.NUMBER),
    Column("definition", "definition (SHA-256)", Kind.HASH),
)
INVOICE_LINES: Final = (
    Column("time", "time (UTC)", Kind.TIME),
    Column("what", "what"),
    Column("amount", "credits", Kind.CREDITS),
    Column("transaction", "transaction", Kind.HASH),
)
TRANSITIONS: Final = (
    Column("time", "time (UTC)", Kind.TIME),
    Column("status", "became"),
    Column("transaction", "transaction", Kind.HASH),
)
JOB: Final = (
    Column("id", "job", Kind.NUMBER),
    Column("name", "name"),
    Column("status", "status", Kind.WORD),
    Column("customer", "customer", Kind.HASH),
    Column("provider", "provider", Kind.HASH),
    Column("options", "options"),
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


def print_report(context: CommandContext, report: AuditReport) -> None:
    """Print the sums, checks and findings of an audit."""
    audit, printer = report.audit, context.printer
    record = row_of(
        AUDIT,
        audit.totals,
        ok=report.ok,
        difference=audit.difference,
        block=audit.block,
        compared=audit.compared,
        proven=report.proven,
    )
    findings = [
        row_of(FINDINGS, finding, job_id=finding.job_id or None, transaction=finding.tx_hash)
        for finding in audit.findings
    ]
    if printer.style is Format.CSV and findings:
        printer.rows(FINDINGS, findings)
    elif printer.style is Format.JSON:
        body = as_object(AUDIT, record)
        body["block_hash"] = report.block_hash or None
        body["findings"] = [as_object(FINDINGS, row) for row in findings]
        body["checks"] = [_check_object(check) for check in report.checks]
        rows = [_exception_row(anomaly) for anomaly in report.anomalies]
        body["exceptions"] = [as_object(EXCEPTIONS, row) for row in rows]
        printer.document(body)
    else:
        printer.record(AUDIT, record)
        if printer.style is Format.TABLE:
            printer.rows(CHECKS, [_check_row(check) for check in report.checks])
            printer.rows(FINDINGS, findings, empty="No inconsistencies found.")
        if count := len(report.anomalies):
            printer.note(
                f"{count} notable event{'s' * (count != 1)}: see `deepsquare audit exceptions`."
            )


def _check_row(check: ConservationCheck) -> tuple[Any, ...]:
    return row_of(CHECKS, check, left=check.left.amount, right=check.right.amount)


def _check_object(check: ConservationCheck) -> dict[str, Any]:
    """Return a check as JSON: both sums with their terms, and RPC calls to recompute them by hand."""
    body = as_object(CHECKS, _check_row(check))
    for name, side in (("left", check.left), ("right", check.right)):
        terms = {term: str(amount) for term, amount in side.terms}
        body[name] = {"title": side.title, "amount": str(side.amount), "terms": terms}
    body["how_to_repeat"] = [
        {
            "what": request.description,
            "method": request.method,
            "params": list(request.params),
            "cast": request.cast,
        }
        for request in check.requests
    ]
    return body


def _exception_row(anomaly: Anomaly) -> tuple[Any, ...]:
    return row_of(
        EXCEPTIONS,
        anomaly,
        severity=anomaly.severity.value,
        code=anomaly.code.value,
        job_id=anomaly.job_id or None,
        transaction=anomaly.tx_hash,
    )


def print_job(
    context: CommandContext, entry: JobEntry, bill: JobBill, check: ConservationCheck
) -> None:
    """Print a job, its status changes, and its recomputed bill."""
    printer = context.printer
    options = ", ".join(str(flag.name) for flag in entry.terms.flags)
    job_row = row_of(JOB, entry, status=entry.status.name, options=options)
    transitions = [(time, status.name, tx_hash) for time, status, tx_hash in entry.transitions]
    bill_row, lines = row_of(BILL, bill), [row_of(LINES, line) for line in bill.lines]
    if printer.style is Format.JSON:
        body = as_object(JOB, job_row)
        body["transitions"] = [as_object(TRANSITIONS, row) for row in transitions]
        body["bill"] = as_object(BILL, bill_row)
        body["bill"]["lines"] = [as_object(LINES, line) for line in lines]
        body["conservation"] = _check_object(check)
        printer.document(body)
        return
    printer.record(JOB, job_row)
    if printer.style is Format.TABLE:
        printer.rows(TRANSITIONS, transitions)
        printer.record(BILL, bill_row)
        printer.rows(LINES, lines)


app = typer.Typer()

BlockOption = Annotated[
    int | None, number_option("Last block; the newest by default.", 0, show_default=False)
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
    from deepsquare_chain.audit.runner import AuditOptions, audit_export, audit_grid
    from deepsquare_chain.chain.rpc.pool import connected
    from deepsquare_chain.client.network import transport_of

    if export is None and offline:
        raise UsageError("Only an export can be verified offline", hint="Give its folder.")
    if export is not None and (proofs or compare_endpoint or block is not None or block_hash):
        raise UsageError(
            "An export is compared with one chain at its own last block",
            hint="Leave out --proofs, --compare-endpoint, --block and --block-hash.",
        )
    async with AsyncExitStack() as stack:
        contracts = None if offline else await stack.enter_async_context(context.grid())
        second_endpoint = None
        if compare_endpoint and contracts is not None:
            chain_id = contracts.deployment.chain_id
            second_endpoint = await stack.enter_async_context(
                connected(
                    compare_endpoint, chain_id=chain_id, transport=transport_of(context.settings)
                )
            )
        options = AuditOptions(not events_only, proofs, second_endpoint, block_hash)
        if export is not None:
            report = await audit_export(contracts, export, options=options, bars=progress)
        elif contracts is not None:
            report = await audit_grid(contracts, to_block=block, options=options, bars=progress)
    print_report(context, report)
    return 0 if report.ok else AuditError.exit_code


@command(app)
async def exceptions(context: CommandContext, block: BlockOption = None) -> None:
    """Show notable events: overruns, panics, role changes and the like."""
    from deepsquare_chain.audit.runner import AuditOptions, audit_grid

    async with context.grid() as contracts:
        report = await audit_grid(
            contracts, to_block=block, options=AuditOptions(storage=False), bars=progress
        )
    rows = [_exception_row(anomaly) for anomaly in report.anomalies]
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
    from deepsquare_chain.audit.entries import statement_cells
    from deepsquare_chain.audit.runner import account_statement
    from deepsquare_chain.client.network import own_address
    from deepsquare_chain.client.periods import blocks_of, parse_period
    from deepsquare_chain.credits import format_credits

    period = parse_period(month, first, last)
    address = own_address(context.settings, account)
    async with context.grid() as contracts:
        since, until = await blocks_of(contracts.w3, period, contracts.deployment.block)
        history, names, check = await account_statement(
            contracts, address, first=since, last=until, bars=progress
        )
    rows = [statement_cells(row, names.get(row.job_id, "")) for row in history.rows]
    context.printer.rows(STATEMENT, rows, empty=f"No credits of {address} moved in this period.")
    context.printer.note(
        f"Opening balance {format_credits(history.opening)}, closing balance "
        f"{format_credits(history.closing)}; blocks {history.first} to {history.last}."
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
        Path | None, typer.Option(metavar="FILE", help="Write a printable HTML page.")
    ] = None,
) -> int:
    """Show what a job cost, with the evidence: events, transactions and the recomputed bill.

    Exit 10 if the bill differs from the recomputed one.
    """
    from deepsquare_chain.audit.bill import invoice_of, render_html

    ledger, _, bill = await _read_job(context, job)
    job_invoice = invoice_of(ledger, job, bill)
    if html is not None:
        try:
            html.write_text(render_html(job_invoice), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{html} can't be written: {error.strerror}") from None
        context.printer.note(f"Wrote {html}; print it, or save it as PDF, from a browser.")
    context.printer.record(INVOICE, job_invoice.row())
    if context.printer.style is Format.TABLE:
        context.printer.rows(
            INVOICE_LINES, [(e.time, e.description, e.amount, e.tx_hash) for e in job_invoice.lines]
        )
    return 0 if job_invoice.bill.ok else AuditError.exit_code


async def _read_job(
    context: CommandContext, job_id: int, block: int | None = None
) -> tuple[Ledger, int, JobBill]:
    """Return the ledger up to a block, the number of this block, and the recomputed bill of a job.

    Raises:
        NotFoundError: The job does not exist up to the block.
    """
    from deepsquare_chain.audit.reader import read_ledger
    from deepsquare_chain.audit.runner import job_bill

    async with context.grid() as contracts:
        with progress("Reading events") as update:
            ledger, last = await read_ledger(contracts, to_block=block, progress=update)
        if job_id not in ledger.jobs:
            raise NotFoundError(
                f"Job {job_id} does not exist up to block {last}",
                hint="List jobs with `deepsquare job list`.",
            )
        return ledger, last, await job_bill(contracts, ledger, job_id)


@command(app)
async def export(
    context: CommandContext,
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    block: BlockOption = None,
    month: MonthOption = None,
    last: ToOption = None,
    tables: Annotated[
        TableKind, typer.Option("--format", help="Format of the tables.")
    ] = TableKind.CSV,
) -> int:
    """Write raw logs, tables and a manifest of their hashes, for others to verify.

    An export begins with the deployment, so that it can be verified without the chain. It ends with
    the newest block, or with the last block of the month, of the day or time, or of --block.
    """
    from deepsquare_chain.audit.export import LOGS, MANIFEST, TableFormat
    from deepsquare_chain.audit.export import export as write
    from deepsquare_chain.client.periods import Period, blocks_of, parse_period

    style, period = TableFormat(tables.value), parse_period(month, None, last)
    if block is not None and period != Period():
        raise UsageError("--block is an end already", hint="Leave out --month and --to.")
    async with context.grid() as contracts:
        if block is None:
            _, block = await blocks_of(contracts.w3, period, contracts.deployment.block)
        first = contracts.deployment.block
        if block is not None and block < first:
            raise UsageError(
                f"Block {block} is before the deployment: there is nothing to export",
                hint=f"Give {first} or a later block, or a later date.",
            )
        with progress("Reading events") as update:
            manifest, ledger = await write(
                contracts, folder, to_block=block, style=style, progress=update
            )
    row = row_of(
        EXPORT,
        manifest,
        folder=str(folder),
        chain_id=manifest.deployment.chain_id,
        first_block=manifest.deployment.block,
        logs=manifest.files[LOGS].rows,
        manifest=str(folder / MANIFEST),
    )
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

    ledger, last, bill = await _read_job(context, job, block)
    entry = ledger.jobs[job]
    check = job_conservation(entry, ledger.deployment, last)
    findings = [finding for finding in ledger.findings if finding.job_id == job]
    print_job(context, entry, bill, check)
    for finding in findings:
        context.printer.note(str(finding))
    return 0 if bill.ok and check.ok and not findings else AuditError.exit_code
