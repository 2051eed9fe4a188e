"""Recomputes the bill of a job, compares it with the payments, and makes the invoice. Pure.

The cost is seconds x rate. The fee is floor(cost x basis points / 10000). The provider receives the
rest of the cost, and the customer receives the rest of the escrow. The settlement bills only the
time since the last interim payment; the lines of a bill include both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deepsquare_chain.audit.entries import ZERO_ADDRESS, JobEntry, from_attributes
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.credits import credit_count, hourly
from deepsquare_chain.credits import fee as fee_of
from deepsquare_chain.job import JobStatus


@dataclass(frozen=True, slots=True)
class BillLine:
    """One amount of a bill: expected and actual, in credit-wei."""

    name: str
    expected: int
    actual: int

    @property
    def difference(self) -> int:
        """Actual minus expected amount; nonzero if the bill is wrong."""
        return self.actual - self.expected


@dataclass(frozen=True, slots=True)
class JobBill:
    """A recomputed bill with its inputs. Times are chain time in seconds.

    `reported` is the duration in the provider's transaction; None if the transaction was not read
    or if the status needs no report. `settled` is false while the job is live; its lines then
    contain no comparison. `allotment`, `maximum` (the maximum that can be billed), `reported`,
    `seconds`, `escrow` and `cost` belong to the settlement. `collected_seconds` and `collected`
    (paid and fee, in credit-wei) belong to interim payments. `billed_seconds` and the lines include
    both. `why` is the rule that determined `seconds`.
    """

    job_id: int
    status: JobStatus
    settled: bool
    started_at: int
    ended_at: int
    reported: int | None
    allotment: int
    maximum: int
    seconds: int
    billed_seconds: int
    rate: int
    fee_bps: int
    escrow: int
    cost: int
    collected_seconds: int
    collected: int
    why: str
    lines: tuple[BillLine, ...]

    @property
    def elapsed(self) -> int:
        """Seconds from the start to the end of the run; zero if the job never ran."""
        return self.ended_at - self.started_at if self.started_at else 0

    @property
    def ok(self) -> bool:
        """Whether the billed seconds and all amounts are as expected."""
        if not self.settled:
            return True
        total = self.collected_seconds + self.seconds
        return total == self.billed_seconds and not any(line.difference for line in self.lines)


def recompute_bill(
    job: JobEntry, *, now: int | None = None, reported: int | None = None
) -> JobBill:
    """Compute a job's bill from start, end, rate and fee.

    Args:
        job: The job, as derived from its events.
        now: Chain time up to which a running job is charged; its `since` by default.
        reported: Seconds in the provider's report. If None, the billed seconds are only compared
            with their maximum.
    """
    final, escrow = job.status.is_final, job.last_escrow
    ended_at = job.ended_at if final else max(now or 0, job.since)
    maximum = min(ended_at - job.billed_until, job.allotment) if job.started_at else 0
    if not job.status.is_reported:
        reported = None
    seconds, rule = _seconds(job, maximum, reported)
    cost = job.rate * seconds
    share = fee_of(cost, job.fee_bps)
    refund = 0 if job.carried_out else escrow - cost
    expected = {
        "paid": job.collected_paid + cost - share,
        "fee": job.collected_fee + share,
        "refunded": refund,
        "carried_out": escrow if job.carried_out else 0,
    }
    # Before the settlement there are no final amounts to compare with.
    lines = [
        BillLine(name, amount, getattr(job, name) if final else amount)
        for name, amount in expected.items()
    ]
    return from_attributes(
        JobBill,
        job,
        job_id=job.id,
        settled=final,
        ended_at=ended_at,
        reported=reported,
        maximum=maximum,
        seconds=seconds,
        escrow=escrow,
        cost=cost,
        why=rule,
        lines=tuple(lines),
    )


def _seconds(job: JobEntry, maximum: int, reported: int | None) -> tuple[int, str]:
    """Return the seconds that the settlement must have billed, and the rule behind them."""
    settled_seconds = job.billed_seconds - job.collected_seconds
    if not job.started_at:
        result = 0, "it never ran"
    elif job.status.is_reported and reported is not None:
        result = min(reported, maximum), "the minimum of reported, elapsed and granted seconds"
    elif job.status.is_reported:
        result = min(settled_seconds, maximum), "the reported seconds, at most elapsed and granted"
    elif job.status is JobStatus.PANICKED:
        result = 0, "a panic costs nothing"
    elif job.status is not JobStatus.CANCELLED:
        result = maximum, "so far: elapsed seconds, at most the allotment"
    elif settled_seconds == 0:
        # The replay checks whether the run was lost, because it has the provider's challenges.
        result = 0, "cancelled as a lost run, which costs nothing"
    else:
        result = maximum, "cancelled while it ran: elapsed seconds, at most the allotment"
    return result


# -- the invoice of a job with the evidence for every amount, and its printable HTML page

_TEMPLATES: Final = Path(__file__).parent / "templates"
#: Style sheet of the page. The explorer permits it by its hash in the Content-Security-Policy.
STYLE: Final = "\n" + (_TEMPLATES / "invoice.css").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """Evidence: a movement of credits (in credit-wei) or, if it has no amount, a transition."""

    time: int
    description: str
    amount: int | None
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Invoice:
    """The invoice of a job. Amounts are credit-wei, times are chain time in seconds."""

    job: JobEntry
    bill: JobBill
    chain_id: int
    contract: str
    block: int
    lines: tuple[InvoiceLine, ...]

    def row(self) -> tuple[Any, ...]:
        """Return the values of the invoice, in column order."""
        job = self.job
        provider = None if job.provider == ZERO_ADDRESS else job.provider
        return (
            *(job.id, job.name, job.status.name, job.customer, provider),
            *(job.started_at or None, job.ended_at or None, job.billed_seconds, job.rate),
            *(job.paid + job.fee, job.paid, job.fee, job.funded + job.carried_in, job.refunded),
            *(self.bill.ok, self.chain_id, self.contract, self.block, job.definition.hex()),
        )


def invoice_of(ledger: Ledger, job_id: int, bill: JobBill) -> Invoice:
    """Return the invoice of a job of a ledger, given its recomputed bill."""
    job = ledger.jobs[job_id]
    movements = (
        (account, InvoiceLine(row.time, row.kind.value, row.amount, row.tx_hash))
        for account in dict.fromkeys((job.customer, job.provider))
        for row in ledger.statement(account)
        if row.job_id == job_id
    )
    return make_invoice(job, bill, ledger.deployment, ledger.block, movements)


def make_invoice(
    job: JobEntry,
    bill: JobBill,
    deployment: Deployment,
    block: int,
    movements: Iterable[tuple[str, InvoiceLine]],
) -> Invoice:
    """Return the invoice of a job from its recomputed bill and its transitions up to a block.

    `movements` are account and line of each movement of credits for the job.
    """
    # A provider may be its own customer: its movements are listed as those of the customer.
    parties = {job.provider: "provider", job.customer: "customer"}
    parties.pop(ZERO_ADDRESS, None)
    lines = [
        InvoiceLine(time, f"became {status.name}", None, tx_hash)
        for time, status, tx_hash in job.transitions
    ]
    lines += [
        replace(line, description=f"{line.description} ({parties[account]})")
        for account, line in movements
        if account in parties
    ]
    lines.sort(key=lambda line: (line.time, line.amount is not None))
    return Invoice(job, bill, deployment.chain_id, deployment.scheduler, block, tuple(lines))


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else "-"


_ENVIRONMENT: Final = Environment(
    loader=FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"credits": credit_count, "hourly": hourly, "time": _time}


def render_html(invoice: Invoice) -> str:
    """Return the invoice as an HTML page for A4, without scripts or external resources."""
    return _ENVIRONMENT.get_template("invoice.html").render(
        invoice=invoice,
        job=invoice.job,
        bill=invoice.bill,
        style=Markup(STYLE),  # noqa: S704 - a constant
        zero_address=ZERO_ADDRESS,
    )
