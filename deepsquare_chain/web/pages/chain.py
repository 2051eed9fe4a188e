"""Transactions, blocks and contracts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from web3.exceptions import ContractLogicError, Web3RPCError

from deepsquare_chain.audit.entries import from_attributes
from deepsquare_chain.chain.bindings.abi import AbiError, interface, load_artifact
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.reverts import decode_revert
from deepsquare_chain.chain.rpc.responses import node_message
from deepsquare_chain.errors import EndpointError, GridError, NotFoundError
from deepsquare_chain.indexer.read_models import BlockDetail, BlockRow, Status
from deepsquare_chain.web.lookup import (
    Field,
    decode_call,
    fields,
    find_view,
    functions,
    named_values,
    read_argument,
    read_block,
    read_transaction,
    signed_requests,
)
from deepsquare_chain.web.site import PageRequest


def transactions(request: Request) -> Response:
    """The list of transactions with events of the grid, latest first."""
    page = PageRequest(request)
    return page.render("transactions.html", listing=page.index.transactions(page.number))


async def transaction(request: Request) -> Response:
    """One transaction; read from the node if it is not indexed."""
    page = PageRequest(request)
    contracts, tx_hash = page.site.contracts, page.argument("hash").lower()
    try:
        detail = await run_in_threadpool(page.index.transaction, tx_hash)
    except NotFoundError as error:
        unindexed = await read_transaction(contracts, tx_hash)
        if unindexed is None:
            raise error from None
        return await run_in_threadpool(page.render, "unindexed.html", transaction=unindexed)
    requests = signed_requests(detail.input, contracts.deployment.contract_names)
    return await run_in_threadpool(
        page.render,
        "transaction.html",
        detail=detail,
        call=decode_call(detail.row.contract, detail.input),
        # The index holds the same requests with their results.
        requests=list(zip(requests, detail.forwarded, strict=False)),
    )


def blocks(request: Request) -> Response:
    """The list of blocks with events of the grid, latest first."""
    page = PageRequest(request)
    return page.render("blocks.html", listing=page.index.blocks(page.number))


async def block(request: Request) -> Response:
    """One block by number or hash; read from the node if it is not indexed."""
    page = PageRequest(request)
    text = page.argument("block").lower()
    key = text if text.startswith("0x") else page.argument_number("block", "block number")
    status = await run_in_threadpool(page.index.status)
    try:
        detail = await run_in_threadpool(page.index.block, key)
    except NotFoundError:
        detail = await _unindexed(page.site.contracts, key, status)
    unread = detail.row.number > status.block
    return await run_in_threadpool(page.render, "block.html", detail=detail, unread=unread)


async def _unindexed(grid: Contracts, key: int | str, status: Status) -> BlockDetail:
    """Read a block from the node that has no events or is not indexed yet."""
    header = await read_block(grid, key)
    if header is None:
        ahead = isinstance(key, int) and key > status.head
        raise NotFoundError(
            f"There is no block {str(key)[:80]}{' yet' if ahead else ''}",
            hint=f"The head of the chain is block {status.head:,}." if status.head >= 0 else "",
        )
    row = from_attributes(
        BlockRow,
        header,
        all_transactions=header.transactions,
        transactions=0,
        finalized=header.number <= status.finalized,
    )
    return BlockDetail(row=row, transactions=(), more_transactions=False)


# -- contracts: their addresses, the verification of their code, and their read functions

PURPOSES: Final[Mapping[str, str]] = {
    "Credit": "The token that jobs are paid in: balances, allowances, permits.",
    "ProviderRegistry": "Providers: hardware and its approval, offers, prices, labels.",
    "MetaScheduler": "Jobs: their status machine, their escrow and its settlement.",
    "ERC2771Forwarder": "Executes calls that customers signed and for which relays pay the gas.",
}


@dataclass(frozen=True, slots=True)
class Verified:
    """Whether a contract has the code of this package; None if the node does not answer."""

    ok: bool | None
    text: str


async def contracts(request: Request) -> Response:
    """All contracts, the parameters and the roles."""
    page = PageRequest(request)
    grid = page.site.contracts
    rows = [
        (name, address, PURPOSES[name], await verified(grid, name, address))
        for name, address in _addresses(grid).items()
    ]
    return await run_in_threadpool(
        page.render,
        "contracts.html",
        rows=rows,
        deployment=grid.deployment,
        parameters=await run_in_threadpool(page.index.parameters),
        roles=await run_in_threadpool(page.index.roles),
    )


async def contract(request: Request) -> Response:
    """One contract, and the result of a read function if one is called."""
    page = PageRequest(request)
    grid = page.site.contracts
    name, address = _contract_address(grid, page.argument("contract"))
    function_name = page.query.get("call", "")
    answer, problem = None, None
    if function_name:
        try:
            answer = await _call_view(grid, name, function_name, page.query)
        except GridError as error:
            problem = error
    return await run_in_threadpool(
        page.render,
        "contract.html",
        name=name,
        address=address,
        purpose=PURPOSES[name],
        verified=await verified(grid, name, address),
        views=functions(name, read_only=True),
        changes=functions(name, read_only=False),
        interface=interface(name),
        function_name=function_name,
        arguments=page.query,
        answer=answer,
        problem=problem,
        status_code=400 if problem else 200,
    )


def abi(request: Request) -> Response:
    """The ABI as JSON."""
    page = PageRequest(request)
    name, _ = _contract_address(page.site.contracts, page.argument("contract"))
    return JSONResponse(load_artifact(name).abi)


async def verified(grid: Contracts, name: str, address: str) -> Verified:
    """Compare the code on chain with the artifact of this package."""
    try:
        code = bytes(await grid.w3.eth.get_code(to_checksum_address(address)))
    except (GridError, Web3RPCError):
        return Verified(None, "the node does not respond")
    if not code:
        return Verified(ok=False, text="there is no contract at this address")
    if load_artifact(name).matches(code):
        return Verified(ok=True, text="same code as this package's build")
    return Verified(ok=False, text="its code differs from this package's build")


def _addresses(grid: Contracts) -> dict[str, str]:
    """Return the addresses of the deployment's contracts by name; the forwarder is optional."""
    contracts = grid.deployment.contracts
    return {name: address for name, address in contracts.items() if int(address, 16)}


def _contract_address(grid: Contracts, name: str) -> tuple[str, str]:
    addresses = _addresses(grid)
    if name not in addresses:
        raise NotFoundError(
            f"There is no contract {name[:60]!r}", hint=f"There are {', '.join(addresses)}."
        )
    return name, addresses[name]


async def _call_view(
    grid: Contracts, name: str, function_name: str, texts: Mapping[str, str]
) -> tuple[Field, ...]:
    function = find_view(name, function_name)
    if function is None:
        raise NotFoundError(f"{name} has no function {function_name[:60]!r} that is read-only")
    arguments = [
        read_argument(parameter, texts.get(f"a{index}", ""))
        for index, parameter in enumerate(function.inputs)
    ]
    address, data = grid.deployment.contracts[name], HexBytes(function.encode(*arguments))
    try:
        result = await grid.w3.eth.call({"to": to_checksum_address(address), "data": data})
        return fields(named_values(function.outputs, function.decode(bytes(result))))
    except ContractLogicError as error:
        raise decode_revert(error) from None
    except (Web3RPCError, AbiError) as error:
        reason = node_message(error) if isinstance(error, Web3RPCError) else "an invalid result"
        raise EndpointError(f"The node could not read {function.name}: {reason}") from None
