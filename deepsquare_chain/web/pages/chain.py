"""Transactions and blocks."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.indexer.read_models import BlockDetail, BlockRow, Status, TransactionDetail
from deepsquare_chain.web import views
from deepsquare_chain.web.decoding import decode_call, inner_calls, names_of
from deepsquare_chain.web.lookup import look_up, look_up_block
from deepsquare_chain.web.pages.common import ask, number_of, page_of, show, site_of
from deepsquare_chain.web.site import Site


async def transactions(request: Request) -> Response:
    """The list of transactions with events of the grid, latest first."""
    page = await ask(site_of(request).index.transactions, page_of(request))
    return await show(request, "transactions.html", found=page)


async def transaction(request: Request) -> Response:
    """One transaction; read from the node if it is not indexed."""
    site = site_of(request)
    tx_hash = request.path_params["hash"].lower()
    try:
        detail: TransactionDetail = await ask(site.index.transaction, tx_hash)
    except NotFoundError as error:
        looked_up = await look_up(site.contracts, tx_hash)
        if looked_up is None:
            raise error from None
        return await show(request, "unindexed.html", found=looked_up, fields=views.fields)
    row = detail.row
    names = names_of(site.contracts.deployment)
    return await show(
        request,
        "transaction.html",
        detail=detail,
        row=row,
        call=decode_call(row.contract, detail.input) if row.contract else None,
        # The index holds the same requests with their results.
        inner=list(zip(inner_calls(detail.input, names), detail.forwarded, strict=False)),
        fields=views.fields,
    )


async def blocks(request: Request) -> Response:
    """The list of blocks with events of the grid, latest first."""
    page = await ask(site_of(request).index.blocks, page_of(request))
    return await show(request, "blocks.html", found=page)


async def block(request: Request) -> Response:
    """One block by number or hash; read from the node if it is not indexed."""
    text = request.path_params["block"].lower()
    key = text if text.startswith("0x") else number_of(text, "block number")
    site = site_of(request)
    status = await ask(site.index.status)
    try:
        detail = await ask(site.index.block, key)
    except NotFoundError:
        detail = await _unindexed(site, key, status)
    row = detail.row
    return await show(
        request, "block.html", detail=detail, row=row, unread=row.number > status.block
    )


async def _unindexed(site: Site, key: int | str, status: Status) -> BlockDetail:
    """Read a block from the node that has no events or is not indexed yet."""
    header = await look_up_block(site.contracts, key)
    if header is None:
        ahead = isinstance(key, int) and key > status.head
        raise NotFoundError(
            f"There is no block {str(key)[:80]}{' yet' if ahead else ''}",
            hint=f"The head of the chain is block {status.head:,}." if status.head >= 0 else "",
        )
    row = BlockRow(
        number=header.number,
        hash=header.hash,
        parent=header.parent,
        time=header.time,
        gas_used=header.gas_used,
        gas_limit=header.gas_limit,
        base_fee=header.base_fee,
        all_transactions=header.transactions,
        transactions=0,
        finalized=header.number <= status.finalized,
    )
    return BlockDetail(row=row, transactions=(), more_transactions=False)
