"""Reads blocks and transactions from the node that are not in the index: those without events."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from web3.exceptions import ContractLogicError, TransactionNotFound, Web3Exception

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.reverts import decode_revert
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.errors import EndpointError, GridError
from deepsquare_chain.indexer.block_data import FORWARDER, Header, read_header
from deepsquare_chain.web.decoding import (
    DecodedCall,
    InnerCall,
    decode_call,
    inner_calls,
    names_of,
)

_HASH: Final = re.compile(r"0x[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class LookedUp:
    """A transaction as read from the node; amounts in wei of the chain's native coin.

    `block` is None while it is in the mempool; `reason` is why it reverted, as far as known.
    """

    hash: str
    sender: str
    to: str | None
    contract: str
    nonce: int
    value: int
    block: int | None
    ok: bool | None
    gas_used: int
    gas_price: int
    reason: str
    hint: str
    call: DecodedCall | None
    inner: tuple[InnerCall, ...]
    input: str


async def look_up(contracts: Contracts, tx_hash: str) -> LookedUp | None:
    """Read a transaction from the node; None if it is unknown or the node does not answer."""
    if not _HASH.fullmatch(tx_hash):
        return None
    eth = contracts.w3.eth
    try:
        transaction: Any = await eth.get_transaction(HexBytes(tx_hash))
    except (TransactionNotFound, Web3Exception, GridError):
        return None
    try:
        receipt: Any = await eth.get_transaction_receipt(HexBytes(tx_hash))
    except (TransactionNotFound, Web3Exception, GridError):
        receipt = None
    ok = None if receipt is None else receipt["status"] == 1
    reason, hint = await _reason(contracts, transaction, receipt) if ok is False else ("", "")
    return _found(contracts, tx_hash, transaction, receipt, reason=reason, hint=hint)


async def look_up_block(contracts: Contracts, which: int | str) -> Header | None:
    """Read a block by number or hash; None if there is no such block (yet).

    Raises:
        EndpointError: The node does not answer, or its response is invalid.
    """
    if isinstance(which, str) and not _HASH.fullmatch(which):
        return None
    if isinstance(which, int):
        rpc_call = ("eth_getBlockByNumber", [hex(which), False])
    else:
        rpc_call = ("eth_getBlockByHash", [which, False])
    try:
        (answer,) = await ask_all(contracts.w3, [rpc_call])
        return None if answer is None else read_header(answer)
    except (Web3Exception, KeyError, TypeError, ValueError) as error:
        raise EndpointError(f"The node gave no proper block: {str(error)[:200]}") from None


def _found(
    contracts: Contracts, tx_hash: str, sent: Any, receipt: Any, *, reason: str, hint: str
) -> LookedUp:
    to = str(to_checksum_address(sent["to"])) if sent.get("to") else None
    contract_names = names_of(contracts.deployment)
    name = contract_names.get(to or "", "")
    data = "0x" + bytes(sent["input"]).hex()
    return LookedUp(
        hash=tx_hash,
        sender=str(to_checksum_address(sent["from"])),
        to=to,
        contract=name,
        nonce=int(sent["nonce"]),
        value=int(sent["value"]),
        block=None if receipt is None else int(receipt["blockNumber"]),
        ok=None if receipt is None else receipt["status"] == 1,
        gas_used=0 if receipt is None else int(receipt["gasUsed"]),
        gas_price=int((receipt or {}).get("effectiveGasPrice") or sent.get("gasPrice") or 0),
        reason=reason,
        hint=hint,
        call=decode_call(name, data) if name else None,
        inner=inner_calls(data, contract_names) if name == FORWARDER else (),
        input=data[:20_000],
    )


async def _reason(contracts: Contracts, sent: Any, receipt: Any) -> tuple[str, str]:
    """Return why a transaction reverted: simulate it on the parent block, the nearest state."""
    body: Any = {"from": sent["from"], "data": sent["input"], "value": sent["value"]}
    if sent.get("to"):
        body["to"] = sent["to"]
    try:
        await contracts.w3.eth.call(body, int(receipt["blockNumber"]) - 1)
    except ContractLogicError as error:
        revert = decode_revert(error)
        return revert.message, revert.hint
    except (Web3Exception, GridError):
        return "The node does not tell why.", ""
    return "It ran out of gas, or what it met had changed within its block.", ""
