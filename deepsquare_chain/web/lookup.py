"""What the index does not hold, asked of the node: blocks and transactions without any event."""

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
    """A transaction as the node tells it; amounts in wei of the chain's own coin.

    `block` is None while it waits; `reason` says why it was refused, as far as that can be told.
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
    """Ask the node; None where it does not know either, or does not answer."""
    if not _HASH.fullmatch(tx_hash):
        return None
    eth = contracts.w3.eth
    try:
        sent: Any = await eth.get_transaction(HexBytes(tx_hash))
    except (TransactionNotFound, Web3Exception, GridError):
        return None
    try:
        receipt: Any = await eth.get_transaction_receipt(HexBytes(tx_hash))
    except (TransactionNotFound, Web3Exception, GridError):
        receipt = None
    ok = None if receipt is None else receipt["status"] == 1
    reason, hint = await _reason(contracts, sent, receipt) if ok is False else ("", "")
    return _found(contracts, tx_hash, sent, receipt, reason=reason, hint=hint)


async def look_up_block(contracts: Contracts, which: int | str) -> Header | None:
    """A block by number or hash; None where the chain has none, or none yet.

    Raises:
        EndpointError: The node does not answer, or not lawfully.
    """
    if isinstance(which, str) and not _HASH.fullmatch(which):
        return None
    if isinstance(which, int):
        asked = ("eth_getBlockByNumber", [hex(which), False])
    else:
        asked = ("eth_getBlockByHash", [which, False])
    try:
        (answer,) = await ask_all(contracts.w3, [asked])
        return None if answer is None else read_header(answer)
    except (Web3Exception, KeyError, TypeError, ValueError) as error:
        raise EndpointError(f"The node gave no proper block: {str(error)[:200]}") from None


def _found(
    contracts: Contracts, tx_hash: str, sent: Any, receipt: Any, *, reason: str, hint: str
) -> LookedUp:
    to = str(to_checksum_address(sent["to"])) if sent.get("to") else None
    ours = names_of(contracts.deployment)
    name = ours.get(to or "", "")
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
        inner=inner_calls(data, ours) if name == FORWARDER else (),
        input=data[:20_000],
    )


async def _reason(contracts: Contracts, sent: Any, receipt: Any) -> tuple[str, str]:
    """Try it again on the block before, as near as a node can come to where it stood."""
    body: Any = {"from": sent["from"], "data": sent["input"], "value": sent["value"]}
    if sent.get("to"):
        body["to"] = sent["to"]
    try:
        await contracts.w3.eth.call(body, int(receipt["blockNumber"]) - 1)
    except ContractLogicError as error:
        found = decode_revert(error)
        return found.message, found.hint
    except (Web3Exception, GridError):
        return "The node does not tell why.", ""
    return "It ran out of gas, or what it met had changed within its block.", ""
