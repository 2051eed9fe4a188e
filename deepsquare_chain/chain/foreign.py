"""Transactions of our wallet that we did not send: which one used a nonce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from eth_utils.address import to_checksum_address
from web3 import AsyncWeb3
from web3.exceptions import Web3Exception

from deepsquare_chain.chain.endpoint import WrongEndpointError
from deepsquare_chain.chain.receipts import to_hex
from deepsquare_chain.errors import EndpointError

#: Blocks that are looked through backwards; nodes forget older states anyhow.
_DEPTH: Final = 8_192


@dataclass(frozen=True, slots=True)
class Spender:
    """The mined transaction that used a nonce; `to` and `data` say what it called."""

    tx_hash: str
    block: int
    to: str
    data: bytes

    def __str__(self) -> str:
        return f"in transaction {self.tx_hash} of block {self.block}"


async def find_spender(w3: AsyncWeb3[Any], address: str, nonce: int) -> Spender | None:
    """The transaction of an account that used a nonce; None where the node can't show it."""
    try:
        return await _find(w3, to_checksum_address(address), nonce)
    except WrongEndpointError:
        raise
    except (EndpointError, Web3Exception, KeyError, TypeError, ValueError):
        return None


def used_by(spender: Spender | None) -> str:
    """Where a used nonce went, in words; that it can't be found is words too."""
    return "in a transaction that the node can't show" if spender is None else str(spender)


async def _find(w3: AsyncWeb3[Any], address: Any, nonce: int) -> Spender | None:
    """The block after which the account's count passed the nonce, found by halving."""
    high = int(await w3.eth.block_number)
    low, step = high, 1
    while low >= 0 and await w3.eth.get_transaction_count(address, low) > nonce:
        high, low, step = low, low - step, 2 * step
        if step > _DEPTH:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if await w3.eth.get_transaction_count(address, middle) > nonce:
            high = middle
        else:
            low = middle
    block: Any = await w3.eth.get_block(high, True)
    for each in block["transactions"]:
        if str(each["from"]).lower() == address.lower() and int(each["nonce"]) == nonce:
            data = each.get("input") or each.get("data") or b""
            return Spender(to_hex(each["hash"]), high, str(each.get("to") or ""), bytes(data))
    return None
