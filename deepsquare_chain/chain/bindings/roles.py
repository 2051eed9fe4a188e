"""The roles of the contracts and their on-chain identifiers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from eth_utils.crypto import keccak

ADMIN_ROLE: Final = bytes(32)
MINTER_ROLE: Final = keccak(text="MINTER_ROLE")
APPROVER_ROLE: Final = keccak(text="APPROVER_ROLE")
METASCHEDULER_ROLE: Final = keccak(text="METASCHEDULER_ROLE")

#: Role names as written in the contracts, by identifier.
ROLE_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "0x" + ADMIN_ROLE.hex(): "DEFAULT_ADMIN_ROLE",
        "0x" + MINTER_ROLE.hex(): "MINTER_ROLE",
        "0x" + APPROVER_ROLE.hex(): "APPROVER_ROLE",
        "0x" + METASCHEDULER_ROLE.hex(): "METASCHEDULER_ROLE",
    }
)


def role_name(role: bytes) -> str:
    """Return the name of a role, or its identifier in hexadecimal if it is not known."""
    identifier = f"0x{bytes(role).hex()}"
    return ROLE_NAMES.get(identifier, identifier)
