"""Pages of one thing: job, account, provider."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, NamedTuple

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from deepsquare_chain.chain.revertwords import sentence
from deepsquare_chain.credits import SECONDS_PER_HOUR, format_credits
from deepsquare_chain.errors import GridError, NotFoundError
from deepsquare_chain.explorer.index.rows import (
    JobDetail,
    ProviderDetail,
    ProviderFigures,
    TransitionRow,
)
from deepsquare_chain.explorer.web import charts, texts
from deepsquare_chain.explorer.web.bill import recompute
from deepsquare_chain.explorer.web.site import Site
from deepsquare_chain.job import JobStatus

J = JobStatus

_LATEST: Final = 10
_STEPS: Final = {
    (J.NONE, J.PENDING): "submitted; the credits went into escrow",
    (J.PENDING, J.META_SCHEDULED): "assigned; rate and fee are fixed",
    (J.META_SCHEDULED, J.SCHEDULED): "claimed and queued by the provider",
    (J.SCHEDULED, J.RUNNING): "started; the meter runs",
    (J.META_SCHEDULED, J.PENDING): "went back into the queue",
    (J.SCHEDULED, J.PENDING): "went back into the queue",
}
_ENDS: Final = {
    J.FINISHED: "ended by itself with exit code zero",
    J.FAILED: "ended by itself with another exit code than zero",
    J.OUT_OF_CREDITS: "used its whole allotment",
    J.CANCELLED: "cancelled by the customer",
    J.PANICKED: "given up; nothing is paid for it",
}


class Step(NamedTuple):
    """A line of a job's life."""

    row: TransitionRow
    words: str


async def job(site: Site, request: Request) -> Response:
    """A job's page."""
    found = await site.ask(site.index.job, _number(request, "job"))
    steps = _flow(found)
    return await site.page(
        request,
        "job.html",
        job=found,
        row=found.row,
        uses=[each for each in found.uses.split(",") if each],
        life=[Step(row, _step_words(row)) for row in found.transitions],
        why=await _why(site, found),
        bill=recompute(found),
        waterfall=charts.waterfall(
            [(label, amount, _exact(amount), css) for label, amount, css in steps],
            title=f"Where the credits of job {found.row.id} went",
        ),
        waterfall_rows=[
            (label, texts.credits(amount, signed=True), amount) for label, amount, _ in steps
        ],
        waterfall_words=_flow_words(found),
    )


def _exact(amount: int) -> str:
    return texts.credits_text(amount)


def _flow(found: JobDetail) -> list[tuple[str, int, str]]:
    """Where a job's credits came from and went: label, signed credit-wei, class."""
    row = found.row
    first = next((m.debit for m in found.movements if m.kind == "escrow" and m.debit), 0)
    topped = row.funded - first if first else 0
    steps = [
        ("carried in", found.carried_in, "carried"),
        ("submitted", row.funded - topped, "in"),
        ("topped up", topped, "in"),
        ("to the provider", -row.paid, "paid"),
        ("fee", -row.fee, "fee"),
        ("carried on", -found.carried_out, "carried"),
        ("refunded", -row.refunded, "back"),
        ("in escrow now", -row.escrow, "held"),
    ]
    return [each for each in steps if each[1]]


def _flow_words(found: JobDetail) -> str:
    row = found.row
    if row.escrow:
        return "What is in escrow is paid out or refunded by the transaction that ends the job."
    if found.carried_out:
        return f"Job {row.successor} goes on with the whole escrow."
    return "Nothing is left: what came in went out, to the credit-wei."


def _step_words(row: TransitionRow) -> str:
    words = _STEPS.get((row.before, row.after)) or _ENDS.get(row.after, "")
    if row.before is J.NONE and row.provider:
        return "opened to go on with an earlier job's credits"
    return words


async def _why(site: Site, found: JobDetail) -> dict[str, Any] | None:
    """Why a waiting job waits, asked of the contract for each provider."""
    if found.row.status is not J.PENDING:
        return None
    rows = [row for row in await site.ask(site.index.providers) if row.id is not None]
    if not rows:
        return {"title": "No provider is registered yet", "lines": []}
    try:
        answers = await asyncio.gather(
            *(
                site.contracts.scheduler.is_eligible(found.row.id, row.id)
                for row in rows
                if row.id is not None
            )
        )
    except GridError as error:
        return {"title": "Why it waits can't be told now", "lines": [error.message]}
    able = [row for row, (eligible, _) in zip(rows, answers, strict=True) if eligible]
    lines = [
        f"Provider {row.id}: {sentence(reason, {'job_id': found.row.id})}."
        for row, (eligible, reason) in zip(rows, answers, strict=True)
        if not eligible
    ]
    if able:
        names = ", ".join(str(row.id) for row in able)
        title = f"It may run at provider {names}, and waits for room there or for a meta-scheduler"
    else:
        title = "No provider may take it now"
    return {"title": title, "lines": lines}


async def account(site: Site, request: Request) -> Response:
    """An account's page."""
    address, cursor = request.path_params["address"], request.query_params.get("cursor")
    found, page, own = await asyncio.gather(
        site.ask(site.index.account, address),
        site.ask(site.index.statement, address, cursor),
        site.ask(site.index.jobs, limit=_LATEST, customer=address),
    )
    return await site.page(
        request, "account.html", account=found, page=page, jobs=own, cursor=cursor
    )


async def statement_csv(site: Site, request: Request) -> Response:
    """The whole statement of an account, oldest first, exact to the credit-wei."""
    found = await site.ask(site.index.account, request.path_params["address"])
    headers = {
        "Content-Disposition": f'attachment; filename="statement-{found.address}.csv"',
        "Cache-Control": "no-store",
    }
    lines = _statement_lines(site, found.address)
    return StreamingResponse(lines, media_type="text/csv; charset=utf-8", headers=headers)


async def _statement_lines(site: Site, address: str) -> AsyncIterator[str]:
    yield _csv(
        "block", "time", "final", "kind", "job", "counterparty", "debit_wei", "credit_wei",
        "balance_wei", "balance", "transaction", "log_index",
    )  # fmt: skip
    cursor = None
    while True:
        page = await site.ask(site.index.statement, address, cursor, 200, oldest_first=True)
        for row in page.items:
            yield _csv(
                row.at.block, row.at.time, row.at.finalized, row.kind, row.job_id or "",
                row.counterparty, row.debit, row.credit, row.balance, format_credits(row.balance),
                row.at.tx_hash, row.at.log_index,
            )  # fmt: skip
        cursor = page.next
        if cursor is None:
            return


def _csv(*values: object) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue()


async def provider(site: Site, request: Request) -> Response:
    """A provider's page, by its account or id."""
    key = request.path_params["key"]
    plain = key.isascii() and key.isdigit() and len(key) < 6
    found = await site.ask(site.index.provider, int(key) if plain else key)
    account_ = found.row.account
    use, own, prices = await asyncio.gather(
        site.ask(site.index.utilisation, 48, account=account_),
        site.ask(site.index.jobs, limit=_LATEST, provider=account_),
        site.ask(site.index.provider_history, account_, limit=200, kind="prices"),
    )
    state = await site.ask(site.index.status)
    points = [(each.at.time, each.values) for each in reversed(prices.items)]
    ends = _ends(found.row.figures)
    shares = [(p.time, p.share) for each in use for p in each.points if p.offered_seconds]
    return await site.page(
        request,
        "provider.html",
        provider=found,
        row=found.row,
        jobs=own,
        utilisation=_share(found, use),
        ends=ends,
        ends_chart=charts.share_bar(dict(ends), title="How its jobs ended"),
        price_chart=_price_chart(points, state.time),
        price_rows=[_price_row(time, values) for time, values in points],
        use_chart=charts.lines(
            [time for time, _ in shares],
            [charts.Series("percent of the offer", [100 * share for _, share in shares], "line")],
            title="Utilisation over time",
            top=100,
            unit="%",
        ),
    )


def _share(found: ProviderDetail, use: Sequence[Any]) -> float | None:
    points = [point for each in use for point in each.points]
    offered = sum(point.offered_seconds for point in points)
    return sum(point.cpu_seconds for point in points) / offered if offered else None


def _ends(figures: ProviderFigures) -> list[tuple[str, int]]:
    counts = (
        ("FINISHED", figures.finished),
        ("FAILED", figures.failed),
        ("OUT_OF_CREDITS", figures.out_of_credits),
        ("CANCELLED", figures.cancelled),
        ("PANICKED", figures.panicked),
    )
    return [each for each in counts if each[1]]


def _price(values: Any, which: str) -> int:
    inner = values.get("prices", values)
    return int(inner.get(which, 0))


def _price_chart(points: Sequence[tuple[int, Any]], now: int) -> Markup:
    if not points:
        return Markup("")
    times = [time for time, _ in points] + [max(now, points[-1][0] + 1)]
    cpu = [_price(values, "cpu") * SECONDS_PER_HOUR / 10**18 for _, values in points]
    series = [charts.Series("credits an hour for a cpu", [*cpu, cpu[-1]], "line")]
    return charts.lines(times, series, title="Price of a cpu over time", stepped=True)


def _price_row(time: int, values: Any) -> tuple[Any, ...]:
    names = ("cpu", "gpu", "mem")
    return (texts.moment(time), *(texts.rate(_price(values, name)) for name in names))


def _number(request: Request, what: str) -> int:
    text = str(request.path_params["id"])
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise NotFoundError(f"{text[:60]!r} is no number of a {what}")
    return int(text)
