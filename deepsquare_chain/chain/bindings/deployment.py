"""The deployment record, a JSON file with a grid's contracts, and the roles of the contracts."""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from eth_utils.address import is_address, to_checksum_address
from eth_utils.crypto import keccak
from pydantic_core import from_json

from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.job import DAY

FORMAT: Final = 1
MAX_BYTES: Final = 1_000_000
_ADDRESSES: Final = ("credit", "registry", "scheduler", "treasury", "forwarder")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts of a grid in seconds (`response_blocks` in blocks); fixed at deployment."""

    claim_timeout: int = 300
    pending_timeout: int = 600
    pending_expiry: int = 30 * DAY
    response_timeout: int = 300
    response_blocks: int = 10
    lost_timeout: int = 1_800
    report_grace: int = 3_600
    top_up_notice: int = 60
    collect_interval: int = 21_600


#: Names of the timeouts in the order of MetaScheduler's constructor.
TIMES: Final = tuple(field.name for field in dataclasses.fields(Timeouts))


@dataclass(frozen=True)
class Deployment:
    """Addresses of a grid's contracts, and how they were deployed.

    `block` is the first block that can hold their events; `transactions` are the transaction
    hashes of the deployment by name; `constructor_args` are the arguments by contract, with
    unconverted integers; `compiler_digest` is the SHA-256 of the compiler's input; `extra` holds
    optional values (faucet, endpoint, ...). Addresses become checksummed, as in events.
    """

    chain_id: int
    credit: str
    registry: str
    scheduler: str
    treasury: str
    forwarder: str
    block: int
    transactions: Mapping[str, str] = field(default_factory=dict)
    constructor_args: Mapping[str, Any] = field(default_factory=dict)
    compiler_digest: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _ADDRESSES:
            object.__setattr__(self, name, str(to_checksum_address(getattr(self, name))))

    @property
    def contracts(self) -> dict[str, str]:
        """Address of each contract by artifact name."""
        return {
            "Credit": self.credit,
            "ProviderRegistry": self.registry,
            "MetaScheduler": self.scheduler,
            "ERC2771Forwarder": self.forwarder,
        }

    @property
    def contract_names(self) -> dict[str, str]:
        """Artifact name of each contract by address."""
        return {address: name for name, address in self.contracts.items()}

    @property
    def timeouts(self) -> dict[str, int]:
        """Timeouts that the MetaScheduler was deployed with, by name; empty if not recorded.

        In seconds; `response_blocks` in blocks.
        """
        recorded = self.constructor_args.get("MetaScheduler")
        times = recorded.get("timeouts") if isinstance(recorded, Mapping) else None
        if not isinstance(times, list | tuple):
            return {}
        pairs = zip(TIMES, times, strict=False)
        return {name: value for name, value in pairs if isinstance(value, int)}

    @property
    def addresses(self) -> tuple[str, str, str]:
        """Contracts whose events are read: credit, registry, scheduler."""
        return (self.credit, self.registry, self.scheduler)

    def to_json(self) -> str:
        """Return the record as the text of its file."""
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(body, indent=2, sort_keys=True) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the file with fsync and an atomic rename; create its folder if needed."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".deployment-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            # mkstemp creates a private file, but the record is public.
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Deployment:
        """Read a record from a file.

        Raises:
            NotFoundError: The file does not exist.
            UsageError: It can't be read, or is not a deployment record.
        """
        try:
            with Path(path).open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise NotFoundError(
                f"There is no deployment record at {path}",
                hint="Start a grid with `deepsquare devnet up`, deploy one with `deepsquare "
                "contracts deploy`, or give --deployment.",
            ) from None
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror}") from None
        return cls.from_json(raw, source=str(path))

    @classmethod
    def from_json(cls, text: bytes | str, *, source: str = "deployment record") -> Deployment:
        """Read a record from its text.

        Raises:
            UsageError: It is not a deployment record; the message names the source.
        """
        try:
            return cls._from_body(
                from_json(_without_bom(text[: MAX_BYTES + 1]), allow_inf_nan=False)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{source} is not a deployment record: {_reason(error)}",
                hint="It is written by `deepsquare contracts deploy` and `deepsquare devnet up`.",
            ) from None

    @classmethod
    def _from_body(cls, body: Any) -> Deployment:
        if not isinstance(body, dict):
            raise TypeError("it is not a JSON object")
        if body.get("format", FORMAT) != FORMAT:
            raise ValueError(f"format {str(body['format'])[:20]!r} is unknown")
        for name in ("chain_id", "block"):
            if type(body[name]) is not int or body[name] < 0:
                raise TypeError(f"{name} is not a number")
        for name in _ADDRESSES:
            if not is_address(body[name]):
                raise ValueError(f"{name} is not an address")
        for name in ("transactions", "constructor_args", "extra"):
            if not isinstance(body.get(name, {}), dict):
                raise TypeError(f"{name} is not an object")
        field_names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in body.items() if name in field_names})


def _without_bom(text: bytes | str) -> bytes | str:
    """Return the text without a byte order mark, which some editors write first."""
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    return text.removeprefix(codecs.BOM_UTF8)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    message = str(error)
    # The JSON parser's errors contain a position; all other errors are raised in this module.
    return "no JSON" if " at line " in message else message[:200]


# -- the roles of the contracts and their on-chain identifiers

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
