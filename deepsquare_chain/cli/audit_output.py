"""Output of audits: columns, and reports in each format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from deepsquare_chain.cli.frame import CommandContext
from deepsquare_chain.cli.output import Column, Format, Kind

if TYPE_CHECKING:
    from deepsquare_chain.audit.anomalies import Anomaly
    from deepsquare_chain.audit.bill import JobBill
    from deepsquare_chain.audit.conservation import ConservationCheck
    from deepsquare_chain.audit.entries import JobEntry
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
    audit, totals, printer = report.audit, report.audit.totals, context.printer
    values = (report.ok, audit.difference, audit.block, totals.jobs, totals.supply)
    sums = (totals.scheduler_balance, totals.escrow, totals.parked)
    flows = (totals.paid, totals.fees, totals.refunded, audit.compared, report.proven)
    record = (*values, *sums, *flows)
    findings = [(f.code, f.job_id or None, f.block, f.message, f.tx_hash) for f in audit.findings]
    checks = [_check_row(check) for check in report.checks]
    if printer.style is Format.CSV and findings:
        printer.rows(FINDINGS, findings)
    elif printer.style is Format.JSON:
        body = printer.as_object(AUDIT, record)
        body["block_hash"] = report.block_hash or None
        body["findings"] = [printer.as_object(FINDINGS, row) for row in findings]
        body["checks"] = [_check_object(context, check) for check in report.checks]
        rows = exception_rows(report.exceptions)
        body["exceptions"] = [printer.as_object(EXCEPTIONS, row) for row in rows]
        printer.document(body)
    else:
        printer.record(AUDIT, record)
        if printer.style is Format.TABLE:
            printer.rows(CHECKS, checks)
            printer.rows(FINDINGS, findings, empty="No inconsistencies found.")
        if count := len(report.exceptions):
            printer.note(
                f"{count} notable event{'s' * (count != 1)}: see `deepsquare audit exceptions`."
            )


def _check_row(check: ConservationCheck) -> tuple[Any, ...]:
    return (check.name, check.left.amount, check.right.amount, check.difference)


def _check_object(context: CommandContext, check: ConservationCheck) -> dict[str, Any]:
    """Return a check as JSON: both sums with their terms, and RPC calls to recompute them by hand."""
    body = context.printer.as_object(CHECKS, _check_row(check))
    for name, side in (("left", check.left), ("right", check.right)):
        terms = {term: str(amount) for term, amount in side.terms}
        body[name] = {"title": side.title, "amount": str(side.amount), "terms": terms}
    body["how_to_repeat"] = [
        {"what": call.shown, "method": call.method, "params": list(call.params), "cast": call.cast}
        for call in check.how_to_repeat
    ]
    return body


def exception_rows(rows: Iterable[Anomaly]) -> list[tuple[Any, ...]]:
    """Return anomalies as rows of `EXCEPTIONS`."""
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


def print_job(
    context: CommandContext, entry: JobEntry, bill: JobBill, check: ConservationCheck
) -> None:
    """Print a job, its status changes, and its recomputed bill."""
    printer = context.printer
    transitions = [(time, status.name, tx_hash) for time, status, tx_hash in entry.transitions]
    lines = [(line.name, line.expected, line.actual, line.difference) for line in bill.lines]
    inputs = tuple(getattr(bill, column.key) for column in BILL)
    if printer.style is Format.JSON:
        body = printer.as_object(JOB, _job_row(entry))
        body["transitions"] = [printer.as_object(TRANSITIONS, step) for step in transitions]
        body["bill"] = printer.as_object(BILL, inputs)
        body["bill"]["lines"] = [printer.as_object(LINES, line) for line in lines]
        body["conservation"] = _check_object(context, check)
        printer.document(body)
        return
    printer.record(JOB, _job_row(entry))
    if printer.style is Format.TABLE:
        printer.rows(TRANSITIONS, transitions)
        printer.record(BILL, inputs)
        printer.rows(LINES, lines)


def _job_row(entry: JobEntry) -> tuple[Any, ...]:
    return (
        entry.id,
        entry.name,
        entry.status.name,
        entry.customer,
        entry.provider,
        ", ".join(str(flag.name) for flag in entry.terms.flags),
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
