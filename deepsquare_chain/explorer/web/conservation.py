"""Conservation at the index's block: sums of the events against what the contracts hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hexbytes import HexBytes
from web3.exceptions import Web3Exception

from deepsquare_chain.chain.abi import AbiError, interface
from deepsquare_chain.chain.contracts import Contracts
from deepsquare_chain.errors import GridError
from deepsquare_chain.explorer.index.rows import Overview


@dataclass(frozen=True, slots=True)
class Side:
    """Two sides of an equation in credit-wei; `held` is None where the node can't tell.

    `parts` are the terms of the events' side; `body` is the JSON-RPC request that repeats the
    other one by hand.
    """

    title: str
    parts: tuple[tuple[str, int], ...]
    held: int | None
    call: str
    body: str

    @property
    def told(self) -> int:
        """What the events say."""
        return sum(amount for _, amount in self.parts)

    @property
    def difference(self) -> int | None:
        """Zero, or the books do not add up."""
        return None if self.held is None else self.held - self.told


async def sides(contracts: Contracts, overview: Overview, donated: int = 0) -> tuple[Side, ...]:
    """Supply and the scheduler's balance at the block of the overview."""
    minted = (("minted", overview.minted), ("burned", -overview.burned))
    holds = [("in escrow", overview.escrow), ("parked", overview.parked)]
    if donated:
        holds.append(("given away to it", donated))
    scheduler = contracts.scheduler.address
    return (
        await _side(contracts, "Supply of credits", minted, overview.block, "totalSupply"),
        await _side(
            contracts,
            "Balance of the MetaScheduler",
            tuple(holds),
            overview.block,
            "balanceOf",
            scheduler,
        ),
    )


async def _side(
    contracts: Contracts,
    title: str,
    parts: tuple[tuple[str, int], ...],
    block: int,
    name: str,
    *arguments: Any,
) -> Side:
    function = interface("Credit").function(name)
    data = function.encode(*arguments)
    body: Any = {"to": contracts.credit.address, "data": HexBytes(data)}
    try:
        answer = await contracts.w3.eth.call(body, max(block, 0))
        (held,) = function.decode(bytes(answer))
    except (GridError, Web3Exception, AbiError):
        held = None
    request = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "eth_call",
        "params": [
            {"to": contracts.credit.address, "data": "0x" + data.hex()},
            hex(max(block, 0)),
        ],
    }
    shown = ", ".join(str(each) for each in arguments)
    return Side(title, parts, held, f"Credit.{name}({shown})", json.dumps(request))
