"""Transactions and blocks."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.explorer.index.rows import TransactionDetail
from deepsquare_chain.explorer.web import views
from deepsquare_chain.explorer.web.decoding import decode_call
from deepsquare_chain.explorer.web.lookup import look_up
from deepsquare_chain.explorer.web.pages.common import ask, cursor_of, number_of, show, site_of


async def transactions(request: Request) -> Response:
    """Transactions that did something to the grid, latest first."""
    found = await ask(site_of(request).index.transactions, cursor_of(request))
    return await show(request, "transactions.html", found=found)


async def transaction(request: Request) -> Response:
    """One transaction; one that the index does not hold is looked up at the node."""
    site = site_of(request)
    which = request.path_params["hash"].lower()
    try:
        detail: TransactionDetail = await ask(site.index.transaction, which)
    except NotFoundError as error:
        found = await look_up(site.contracts, which)
        if found is None:
            raise error from None
        return await show(request, "unindexed.html", found=found, fields=views.fields)
    row = detail.row
    return await show(
        request,
        "transaction.html",
        detail=detail,
        row=row,
        call=decode_call(row.contract, detail.input) if row.contract else None,
        fields=views.fields,
    )


async def blocks(request: Request) -> Response:
    """Blocks with events of the grid, latest first."""
    found = await ask(site_of(request).index.blocks, cursor_of(request))
    return await show(request, "blocks.html", found=found)


async def block(request: Request) -> Response:
    """One block, by its number or hash."""
    which = request.path_params["block"]
    key = which if which.startswith("0x") else number_of(which, "block number")
    detail = await ask(site_of(request).index.block, key)
    return await show(request, "block.html", detail=detail, row=detail.row)
