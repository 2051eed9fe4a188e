"""Transactions of our wallet that we did not send: which one used a nonce."""

from __future__ import annotations

from typing import Any, Final

from eth_utils.address import to_checksum_address
from web3 import AsyncWeb3
from web3.exceptions import Web3Exception

from deepsquare_chain.chain.receipts import to_hex
from deepsquare_chain.errors import EndpointError

#: Blocks that are looked through backwards; nodes forget older states anyhow.
_DEPTH: Final = 8_192


async def who_used(w3: AsyncWeb3[Any], address: str, nonce: int) -> str:
    """Where a used nonce of an account went, in words; that it can't be found is words too."""
    try:
        found = await _find(w3, to_checksum_address(address), nonce)
    except (EndpointError, Web3Exception, KeyError, TypeError, ValueError):
        found = None
    if found is None:
        return "in a transaction that the node can't show"
    tx_hash, block = found
    return f"in transaction {tx_hash} of block {block}"


async def _find(w3: AsyncWeb3[Any], address: Any, nonce: int) -> tuple[str, int] | None:
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
            return to_hex(each["hash"]), high
    return None
