"""RPC batches: several questions to a node, in one request where the endpoint takes that.

One node then answers all of them; where a batch is split, block hashes tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError
from web3.types import RPCEndpoint


async def ask_all(w3: AsyncWeb3[Any], asked: Sequence[tuple[str, list[Any]]]) -> list[Any]:
    """Raw results in the order of the questions; null where the node has nothing.

    Raises:
        EndpointError: The node does not answer.
        Web3RPCError: It refused one of them.
    """
    if not asked:
        return []
    batch = [(RPCEndpoint(method), params) for method, params in asked]
    provider: Any = w3.provider
    answers = await provider.make_batch_request(batch)
    if not isinstance(answers, list):
        # A connection that does not split batches itself.
        answers = [await provider.make_request(method, params) for method, params in batch]
    for answer in answers:
        if "error" in answer:
            raise Web3RPCError(str(answer["error"])[:300], rpc_response=answer)
    return [answer["result"] for answer in answers]
