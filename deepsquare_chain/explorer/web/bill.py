"""A job's bill computed again from what the index holds, beside what the chain says. Pure."""

from __future__ import annotations

from typing import NamedTuple

from deepsquare_chain.credits import cost, fee
from deepsquare_chain.explorer.index.rows import JobDetail
from deepsquare_chain.explorer.web import texts
from deepsquare_chain.job import JobStatus


class Item(NamedTuple):
    """One line of a bill."""

    name: str
    how: str
    computed: object
    told: object
    agrees: bool


def recompute(found: JobDetail) -> list[Item]:
    """Seconds times rate, the floored fee, and the rest; empty before the job's end."""
    row = found.row
    if not row.status.is_final:
        return []
    elapsed = row.ended_at - row.started_at if row.started_at else 0
    most = min(elapsed, found.allotment) if found.allotment else elapsed
    whole = cost(row.rate, row.billed_seconds)
    share = fee(whole, found.fee_bps)
    in_all = row.funded + found.carried_in
    back = 0 if found.carried_out else in_all - whole
    seconds = Item(
        "Billed time",
        f"at most {texts.duration(most)} between start and end"
        + (" within the allotment" if found.allotment else ""),
        f"\u2264 {most} s",
        f"{row.billed_seconds} s",
        row.billed_seconds <= most,
    )
    paid = _item("To the provider", f"{row.billed_seconds} s \u00d7 rate \u2212 fee",
                 whole - share, row.paid)  # fmt: skip
    charged = _item("Fee", f"{found.fee_bps / 100:g} % of the cost, floored", share, row.fee)
    if row.status is JobStatus.PANICKED and found.carried_out:
        rest = _item("Carried on", "the whole escrow", in_all, found.carried_out)
    else:
        rest = _item("Refunded", "what came in \u2212 cost", back, row.refunded)
    return [seconds, paid, charged, rest]


def _item(name: str, how: str, computed: int, told: int) -> Item:
    return Item(name, how, texts.credits(computed), texts.credits(told), computed == told)
