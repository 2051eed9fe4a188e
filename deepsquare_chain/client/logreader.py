"""Reading logs once, for a person who waits: no cursor, ranges halved where a node wants that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.chain.nodeerrors import NodeError, classify, node_message
from deepsquare_chain.errors import EndpointError


async def read_logs(
    w3: AsyncWeb3[Any],
    address: str | Sequence[str],
    topics: Sequence[Any],
    first: int,
    last: int | None = None,
) -> list[dict[str, Any]]:
    """Logs of a contract from block `first` to `last`, the head by default.

    Raises:
        EndpointError: The node does not answer, or refuses even one block.
    """
    head = int(await w3.eth.block_number) if last is None else last
    if head < first:
        return []
    query: Any = {
        "address": address,
        "topics": list(topics),
        "fromBlock": hex(first),
        "toBlock": hex(head),
    }
    try:
        return [dict(log) for log in await w3.eth.get_logs(query)]
    except Web3RPCError as error:
        if classify(error) is not NodeError.RANGE_TOO_LARGE or head == first:
            raise EndpointError(f"The node refuses to give events: {node_message(error)}") from None
    middle = (first + head) // 2
    lower = await read_logs(w3, address, topics, first, middle)
    return lower + await read_logs(w3, address, topics, middle + 1, head)
