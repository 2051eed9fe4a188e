"""The compiled contracts in this package: ABI, bytecode, and compiler input."""

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
    """One compiled contract.

    `input_digest` is the SHA-256 of the compiler's input, `metadata` the exact text of the
    compiler's `metadata.json`.
    """

    name: str
    abi: tuple[Mapping[str, Any], ...] = field(repr=False)
    bytecode: bytes = field(repr=False)
    deployed_bytecode: bytes = field(repr=False)
    immutables: tuple[tuple[int, int], ...] = field(repr=False)
    input_digest: str
    metadata: str = field(repr=False)

    def masked(self, code: bytes) -> bytes:
        """Return the code with its immutables set to zero, as in the compiler's output."""
        masked_code = bytearray(code)
        for start, length in self.immutables:
            masked_code[start : start + length] = bytes(length)
        return bytes(masked_code[: len(code)])

    def matches(self, code: bytes) -> bool:
        """Return whether code on a chain is this contract, for any constructor arguments."""
        if len(code) != len(self.deployed_bytecode):
            return False
        return self.masked(code) == self.masked(self.deployed_bytecode)


@cache
def load_artifact(name: str) -> Artifact:
    """Read a compiled contract.

    Raises:
        NotFoundError: The package contains no contract of this name.
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
    references = (
        reference for group in built["immutableReferences"].values() for reference in group
    )
    return Artifact(
        name=name,
        abi=tuple(built["abi"]),
        bytecode=bytes.fromhex(built["bytecode"].removeprefix("0x")),
        deployed_bytecode=bytes.fromhex(built["deployedBytecode"].removeprefix("0x")),
        immutables=tuple((reference["start"], reference["length"]) for reference in references),
        input_digest=built["inputDigest"],
        metadata=built["metadata"],
    )


@cache
def standard_input() -> Mapping[str, Any]:
    """Return the compiler's input: standard JSON with all sources.

    Raises:
        NotFoundError: The package does not contain it.
    """
    file = resources.files(__package__) / "artifacts" / "standard-input.json"
    try:
        compiler_input: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            "The compiler's input is missing from the package", hint="Run scripts/compile.py."
        ) from None
    return compiler_input
