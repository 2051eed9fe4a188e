"""The built contracts that travel with the package: ABI, bytecode and where they came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Final

from deepsquare_chain.errors import NotFoundError

CONTRACTS: Final = ("Credit", "ProviderRegistry", "MetaScheduler", "ERC2771Forwarder")


@dataclass(frozen=True, slots=True)
class Artifact:
    """One built contract.

    `input_digest` is the SHA-256 of what the compiler was given, `metadata` the text of the
    compiler's `metadata.json`, byte for byte.
    """

    name: str
    abi: tuple[Mapping[str, Any], ...] = field(repr=False)
    bytecode: bytes = field(repr=False)
    deployed_bytecode: bytes = field(repr=False)
    immutables: tuple[tuple[int, int], ...] = field(repr=False)
    input_digest: str
    metadata: str = field(repr=False)

    def masked(self, code: bytes) -> bytes:
        """The code with its immutables set to zero, as the compiler leaves them."""
        bare = bytearray(code)
        for start, length in self.immutables:
            bare[start : start + length] = bytes(length)
        return bytes(bare[: len(code)])

    def matches(self, code: bytes) -> bool:
        """Whether code found on a chain is this contract, whatever its constructor was given."""
        if len(code) != len(self.deployed_bytecode):
            return False
        return self.masked(code) == self.masked(self.deployed_bytecode)


@cache
def load_artifact(name: str) -> Artifact:
    """Read a built contract.

    Raises:
        NotFoundError: The package holds no contract of this name.
    """
    if name not in CONTRACTS:
        raise NotFoundError(f"There is no built contract {name!r}", hint=f"One of {CONTRACTS}.")
    file = resources.files(__package__) / "artifacts" / f"{name}.json"
    try:
        built = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            f"The built contract {name} is missing from the package",
            hint="Run scripts/compile.py.",
        ) from None
    places = (place for group in built["immutableReferences"].values() for place in group)
    return Artifact(
        name=name,
        abi=tuple(built["abi"]),
        bytecode=bytes.fromhex(built["bytecode"].removeprefix("0x")),
        deployed_bytecode=bytes.fromhex(built["deployedBytecode"].removeprefix("0x")),
        immutables=tuple((place["start"], place["length"]) for place in places),
        input_digest=built["inputDigest"],
        metadata=built["metadata"],
    )


@cache
def standard_input() -> Mapping[str, Any]:
    """What the compiler was given: standard JSON with all sources.

    Raises:
        NotFoundError: The package does not hold it.
    """
    file = resources.files(__package__) / "artifacts" / "standard-input.json"
    try:
        found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            "The compiler's input is missing from the package", hint="Run scripts/compile.py."
        ) from None
    return found
