"""The books, rebuilt from events alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import typer

from deepsquare_chain.cli.frame import Desk, command
from deepsquare_chain.cli.output import Column, Format, Kind
from deepsquare_chain.cli.types import AccountArgument, JobArgument

if TYPE_CHECKING:
    from deepsquare_chain.explorer.books import JobEntry

app = typer.Typer(help="Check the books from events alone.", no_args_is_help=True)

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
)
_FINDINGS: Final = (
    Column("code", "finding"),
    Column("job_id", "job", Kind.NUMBER),
    Column("block", "block", Kind.NUMBER),
    Column("message", "what"),
    Column("transaction", "transaction", detail=True),
)
_STATEMENT: Final = (
    Column("block", "block", Kind.NUMBER),
    Column("time", "time (UTC)", Kind.TIME),
    Column("kind", "kind"),
    Column("job_id", "job", Kind.NUMBER),
    Column("amount", "amount", Kind.CREDITS),
    Column("balance", "balance", Kind.CREDITS),
    Column("counterparty", "with", detail=True),
    Column("transaction", "transaction", detail=True),
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
async def verify(desk: Desk) -> int:
    """Rebuild every job and balance, compare with storage; exit 10 if it does not add up."""
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.errors import AuditError
    from deepsquare_chain.explorer.reader import audit_chain

    async with open_grid(desk.settings) as contracts:
        _, audit = await audit_chain(contracts)
    totals = audit.totals
    values = (audit.ok, audit.difference, audit.block, totals.jobs, totals.supply)
    sums = (totals.scheduler_balance, totals.escrow, totals.parked)
    flows = (totals.paid, totals.fees, totals.refunded, audit.compared)
    findings = [(f.code, f.job_id or None, f.block, f.message, f.tx_hash) for f in audit.findings]
    if desk.printer.style is Format.CSV and findings:
        desk.printer.rows(_FINDINGS, findings)
    elif desk.printer.style is Format.JSON:
        body = desk.printer.as_object(_AUDIT, (*values, *sums, *flows))
        body["findings"] = [desk.printer.as_object(_FINDINGS, row) for row in findings]
        desk.printer.document(body)
    else:
        desk.printer.record(_AUDIT, (*values, *sums, *flows))
        desk.printer.rows(_FINDINGS, findings, empty="Nothing was found that can't be.")
    return 0 if audit.ok else AuditError.exit_code


@command(app)
async def statement(desk: Desk, account: AccountArgument = None) -> None:
    """Show all that an account paid and got, with the balance after each."""
    await print_statement(desk, account)


async def print_statement(desk: Desk, account: str | None) -> None:
    """All movements of an account, oldest first."""
    from deepsquare_chain.client.network import open_grid, own_address
    from deepsquare_chain.explorer.reader import read_ledger

    address = own_address(desk.settings, account)
    async with open_grid(desk.settings) as contracts:
        ledger, _ = await read_ledger(contracts)
    desk.printer.rows(
        _STATEMENT,
        (
            (
                row.block,
                row.time,
                row.kind.value,
                row.job_id or None,
                row.amount,
                row.balance,
                row.counterparty,
                row.tx_hash,
            )
            for row in ledger.statement(address)
        ),
        empty=f"No credits of {address} ever moved.",
    )


@command(app)
async def job(desk: Desk, job: JobArgument) -> None:
    """Show a job's way and money as its events tell them."""
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.explorer.reader import read_ledger

    async with open_grid(desk.settings) as contracts:
        await contracts.scheduler.get_job(job)
        ledger, _ = await read_ledger(contracts)
    entry = ledger.jobs[job]
    way = [(time, status.name, tx_hash) for time, status, tx_hash in entry.transitions]
    row = _job_row(entry)
    if desk.printer.style is Format.JSON:
        body = desk.printer.as_object(_JOB, row)
        body["transitions"] = [desk.printer.as_object(_TRANSITIONS, step) for step in way]
        desk.printer.document(body)
        return
    desk.printer.record(_JOB, row)
    if desk.printer.style is Format.TABLE:
        desk.printer.rows(_TRANSITIONS, way)


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
