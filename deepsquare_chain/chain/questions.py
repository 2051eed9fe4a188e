"""RPC batches: several questions to a node, in one request where the endpoint takes that.

One node then answers all of them. The parts of a split batch may reach nodes of different heights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError
from web3.types import RPCEndpoint, RPCResponse

from deepsquare_chain.chain.endpoint import SplitAnswers


async def ask_all(w3: AsyncWeb3[Any], asked: Sequence[tuple[str, list[Any]]]) -> list[Any]:
    """Raw results in the order of the questions; null where the node has nothing.

    Raises:
        EndpointError: The node does not answer.
        Web3RPCError: It refused one of them.
    """
    results, _ = await ask_together(w3, asked)
    return results


async def ask_together(
    w3: AsyncWeb3[Any], asked: Sequence[tuple[str, list[Any]]]
) -> tuple[list[Any], bool]:
    """Raw results in the order of the questions, and whether one request held all of them.

    Raises:
        EndpointError: The node does not answer.
        Web3RPCError: It refused one of them.
    """
    if not asked:
        return [], True
    batch = [(RPCEndpoint(method), params) for method, params in asked]
    provider: Any = w3.provider
    answers: list[RPCResponse] | RPCResponse = await provider.make_batch_request(batch)
    if not isinstance(answers, list):
        # A connection that does not split batches itself.
        answers = SplitAnswers(
            [await provider.make_request(method, params) for method, params in batch]
        )
    for answer in answers:
        if "error" in answer:
            raise Web3RPCError(str(answer["error"])[:300], rpc_response=answer)
    return [answer["result"] for answer in answers], not isinstance(answers, SplitAnswers)
