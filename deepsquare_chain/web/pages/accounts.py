"""Accounts: balances, statement, and the statement as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.indexer.read_models import MovementRow
from deepsquare_chain.web.formats import clock, exact
from deepsquare_chain.web.pages.common import ask, cursor_of, show, site_of

_CHUNK = 200
_JOBS = 8
COLUMNS = (
    *("block", "log_index", "time", "time_utc", "kind", "job", "counterparty", "debit"),
    *("credit", "balance", "debit_credits", "credit_credits", "balance_credits", "transaction"),
    "final",
)


async def account(request: Request) -> Response:
    """One account."""
    index = site_of(request).index
    row = await ask(index.account, request.path_params["account"])
    found = await ask(index.statement, row.address, cursor_of(request))
    own = await ask(index.jobs, limit=_JOBS, customer=row.address)
    return await show(
        request,
        "account.html",
        row=row,
        found=found,
        jobs=own.items,
        first=cursor_of(request) is None,
    )


async def account_jobs(request: Request) -> Response:
    """All jobs of a customer."""
    index = site_of(request).index
    row = await ask(index.account, request.path_params["account"])
    found = await ask(index.jobs, cursor_of(request), customer=row.address)
    return await show(request, "account_jobs.html", row=row, found=found)


async def statement(request: Request) -> Response:
    """The whole statement as CSV, oldest first; amounts in credit-wei and in credits."""
    index = site_of(request).index
    row = await ask(index.account, request.path_params["account"])
    name = f"statement-{row.address}.csv"
    return StreamingResponse(
        _lines(index, row.address),
        media_type="text/csv; charset=utf-8",
        headers={
            "Content-Disposition": f'attachment; filename="{name}"',
            "Cache-Control": "no-store",
        },
    )


def _lines(index: Index, account: str) -> Iterator[str]:
    """Chunk by chunk: a statement may be longer than memory."""
    yield ",".join(COLUMNS) + "\n"
    cursor: str | None = None
    while True:
        found = index.statement(account, cursor, _CHUNK, oldest_first=True)
        yield _text(found.items)
        cursor = found.next
        if cursor is None:
            return


def _text(rows: tuple[MovementRow, ...]) -> str:
    """Nothing in these rows is a stranger's text, so that no cell can be a formula."""
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
