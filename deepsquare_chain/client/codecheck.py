"""Whether the code on chain is what this program was built with."""

from __future__ import annotations

from dataclasses import dataclass

from deepsquare_chain.chain.artifacts import load_artifact
from deepsquare_chain.chain.contracts import Contracts


@dataclass(frozen=True, slots=True)
class CodeCheck:
    """One contract's comparison; constructor arguments are left aside."""

    name: str
    address: str
    matches: bool


async def check_code(contracts: Contracts) -> list[CodeCheck]:
    """Compare all three contracts."""
    found = []
    for each in (contracts.credit, contracts.registry, contracts.scheduler):
        code = bytes(await contracts.w3.eth.get_code(each.address))
        matches = load_artifact(each.artifact).matches(code)
        found.append(CodeCheck(each.artifact, str(each.address), matches))
    return found
