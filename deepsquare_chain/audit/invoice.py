"""The invoice of a job with the evidence for every amount, and its printable HTML page. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any, Final

from deepsquare_chain.audit.bill import JobBill
from deepsquare_chain.audit.entries import ZERO_ADDRESS, JobEntry
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.credits import format_credits, hourly

#: Of the page; a server that forbids styles within pages lets this one through by its hash.
STYLE: Final = """
@page { size: A4; margin: 18mm }
body { font: 10pt/1.45 system-ui, sans-serif; max-width: 180mm; margin: 2em auto; padding: 0 1em; color: #111 }
h1 { font-size: 16pt } h2 { font-size: 11pt; margin-top: 1.6em }
table { border-collapse: collapse; width: 100% } tr { break-inside: avoid }
th, td { text-align: left; padding: .25em .6em .25em 0; border-bottom: 1px solid #ccc; vertical-align: top; overflow-wrap: anywhere }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
small { color: #444 }
"""
_PARTIES: Final = ("customer", "provider")


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """Evidence: a movement of credits (in credit-wei) or, if it has no amount, a transition."""

    time: int
    what: str
    amount: int | None
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Invoice:
    """The invoice of a job. Amounts are credit-wei, times are chain time in seconds.

    `ok` tells whether the bill matches the one recomputed from rate and times.
    """

    job: JobEntry
    bill: JobBill
    chain_id: int
    contract: str
    block: int
    lines: tuple[InvoiceLine, ...]

    @property
    def ok(self) -> bool:
        """Whether the bill matches the recomputed one."""
        return self.bill.ok

    def row(self) -> tuple[Any, ...]:
        """Return the values of the invoice, in column order."""
        job = self.job
        return (
            job.id,
            job.name,
            job.status.name,
            job.customer,
            None if job.provider == ZERO_ADDRESS else job.provider,
            job.started_at or None,
            job.ended_at or None,
            job.billed_seconds,
            job.rate,
            job.paid + job.fee,
            job.paid,
            job.fee,
            job.funded + job.carried_in,
            job.refunded,
            self.ok,
            self.chain_id,
            self.contract,
            self.block,
            job.definition.hex(),
        )


def invoice_of(ledger: Ledger, job_id: int, bill: JobBill) -> Invoice:
    """Return the invoice of a job.

    Args:
        ledger: The ledger that contains the job.
        job_id: ID of the job.
        bill: The recomputed bill of the job.
    """
    job = ledger.jobs[job_id]
    lines = [
        InvoiceLine(time, f"became {status.name}", None, tx_hash)
        for time, status, tx_hash in job.transitions
    ]
    # A provider may be its own customer: its movements are listed once.
    parties: dict[str, str] = {}
    for name in _PARTIES:
        parties.setdefault(getattr(job, name), name)
    parties.pop(ZERO_ADDRESS, None)
    for account, name in parties.items():
        lines += [
            InvoiceLine(row.time, f"{row.kind.value} ({name})", row.amount, row.tx_hash)
            for row in ledger.statement(account)
            if row.job_id == job_id
        ]
    lines.sort(key=lambda line: (line.time, line.amount is not None))
    deployment = ledger.deployment
    return Invoice(job, bill, deployment.chain_id, deployment.scheduler, ledger.block, tuple(lines))


def render_html(invoice: Invoice) -> str:
    """Return the invoice as an HTML page for A4, without scripts or external resources."""
    job, bill = invoice.job, invoice.bill
    total = job.paid + job.fee
    summary = [
        ("Job", f"{job.id}, {job.name or 'without a name'}"),
        ("Status", f"{job.status.name}: {job.status.meaning}"),
        ("Customer", job.customer),
        ("Provider", "none" if job.provider == ZERO_ADDRESS else job.provider),
        ("Started", _time(job.started_at)),
        ("Ended", _time(job.ended_at)),
        ("Definition (SHA-256)", job.definition.hex()),
    ]
    amounts = [
        ("Rate", f"{hourly(job.rate)} credits per hour"),
        ("Billed time", f"{job.billed_seconds} s"),
        (f"To the provider, {job.billed_seconds} s x rate less the fee", _credits(job.paid)),
        (f"Fee, {job.fee_bps / 100:g} %", _credits(job.fee)),
        ("Total", _credits(total)),
        ("Paid in", _credits(job.funded + job.carried_in)),
        ("Returned", _credits(job.refunded)),
    ]
    bill_checks = [
        (
            line.name,
            _credits(line.expected),
            _credits(line.actual),
            "yes" if not line.difference else "NO",
        )
        for line in bill.lines
    ]
    evidence = [
        (
            _time(line.time),
            line.what,
            "" if line.amount is None else _credits(line.amount),
            line.tx_hash,
        )
        for line in invoice.lines
    ]
    verdict = "The bill is as computed anew." if invoice.ok else "THE BILL IS NOT AS COMPUTED."
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Invoice, job {job.id}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>Invoice for job {job.id}</h1>
{_table((), summary)}
<h2>Amounts</h2>
{_table((), amounts, numbers={1})}
<h2>Bill check</h2>
<p>{escape(verdict)} Rule: {escape(bill.why or "nothing to bill")}.</p>
{_table(("Sum", "Must be", "Is", "Same"), bill_checks, numbers={1, 2})}
<h2>Evidence</h2>
{_table(("Time (UTC)", "What", "Credits", "Transaction"), evidence, numbers={2})}
<p><small>From the events of MetaScheduler {escape(invoice.contract)} on chain {invoice.chain_id}, up to block
{invoice.block}. Anyone with an endpoint repeats it with <code>deepsquare audit invoice {job.id}</code>.</small></p>
</body></html>
"""


def _table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: frozenset[int] | set[int] = frozenset(),
) -> str:
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="n">{escape(cell)}</td>'
            if column in numbers
            else f"<td>{escape(cell)}</td>"
            for column, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return (
        f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"
    )


def _credits(amount: int) -> str:
    return f"{format_credits(amount)} credits"


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else "-"
