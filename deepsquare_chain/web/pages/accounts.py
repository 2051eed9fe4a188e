"""Accounts: balances, statement, and the statement as CSV."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from deepsquare_chain.audit.entries import MovementKind
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.pagination import TimeRange
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.indexer.read_models import MovementRow, Place
from deepsquare_chain.web.formats import clock, exact
from deepsquare_chain.web.pages.common import ask, page_of, period_of, show, site_of, text_of

_CHUNK: Final = 200
_JOBS: Final = 8
#: Shortest run of alike lines that is shown as one line.
_FOLDED: Final = 4
COLUMNS = (
    *("block", "log_index", "time", "time_utc", "kind", "job", "counterparty", "debit"),
    *("credit", "balance", "debit_credits", "credit_credits", "balance_credits", "transaction"),
    "final",
)


@dataclass(frozen=True, slots=True)
class FoldedMovements:
    """A run of statement lines of one kind and counterparty: the sums, and the final balance.

    `at` is the place of the latest line, `first` that of the earliest.
    """

    count: int
    at: Place
    first: Place
    account: str
    kind: str
    counterparty: str
    debit: int
    credit: int
    balance: int
    job_id: int | None = None


def fold(rows: Sequence[MovementRow]) -> list[MovementRow | FoldedMovements]:
    """Fold runs of alike rows, latest first, into one each."""
    result: list[MovementRow | FoldedMovements] = []
    for (kind, counterparty), run in itertools.groupby(rows, lambda r: (r.kind, r.counterparty)):
        alike = list(run)
        if len(alike) < _FOLDED:
            result += alike
            continue
        latest = alike[0]
        result.append(
            FoldedMovements(
                count=len(alike),
                at=latest.at,
                first=alike[-1].at,
                account=latest.account,
                kind=kind,
                counterparty=counterparty,
                debit=sum(row.debit for row in alike),
                credit=sum(row.credit for row in alike),
                balance=latest.balance,
            )
        )
    return result


async def account(request: Request) -> Response:
    """The page of one account."""
    index = site_of(request).index
    row = await ask(index.account, request.path_params["account"])
    kind = _kind_of(request)
    page = await ask(
        index.statement, row.address, page_of(request), period=period_of(request), kind=kind
    )
    jobs = await ask(index.jobs, limit=_JOBS, customer=row.address)
    lines = page.items if kind or text_of(request, "lines") == "all" else fold(page.items)
    return await show(
        request,
        "account.html",
        row=row,
        found=page,
        lines=lines,
        jobs=jobs.items,
        kind=kind,
        kinds=[kind_of_movement.value for kind_of_movement in MovementKind],
        texts={"from": text_of(request, "from"), "to": text_of(request, "to")},
    )


def _kind_of(request: Request) -> str | None:
    """Return the chosen kind of movements; None for all.

    Raises:
        UsageError: There is no such kind.
    """
    kind = text_of(request, "kind")
    if kind and kind not in list(MovementKind):
        raise UsageError(
            f"{kind!r} is not a kind of movement", hint=f"There are {', '.join(MovementKind)}."
        )
    return kind or None


async def statement(request: Request) -> Response:
    """The statement as CSV, oldest first; amounts in credit-wei and in credits.

    The filters of the page apply; without filters, it has all lines.
    """
    index = site_of(request).index
    row = await ask(index.account, request.path_params["account"])
    name = f"statement-{row.address}.csv"
    return StreamingResponse(
        _lines(index, row.address, period_of(request), _kind_of(request)),
        media_type="text/csv; charset=utf-8",
        headers={
            "Content-Disposition": f'attachment; filename="{name}"',
            "Cache-Control": "no-cache",
        },
    )


def _lines(index: Index, account: str, period: TimeRange | None, kind: str | None) -> Iterator[str]:
    """Yield the CSV in chunks: a statement may be too large for memory."""
    yield ",".join(COLUMNS) + "\n"
    cursor: str | None = None
    while True:
        page = index.statement(account, cursor, _CHUNK, oldest_first=True, period=period, kind=kind)
        yield _text(page.items)
        cursor = page.next
        if cursor is None:
            return


def _text(rows: tuple[MovementRow, ...]) -> str:
    """Format rows as CSV. They contain no untrusted text, so that no cell can be a formula."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in rows:
        writer.writerow(
            (
                *(row.at.block, row.at.log_index, row.at.time, clock(row.at.time), row.kind),
                *("" if row.job_id is None else row.job_id, row.counterparty),
                *(row.debit, row.credit, row.balance),
                *(exact(row.debit), exact(row.credit), exact(row.balance)),
                *(row.at.tx_hash, "yes" if row.at.finalized else "no"),
            )
        )
    return file.getvalue()
