"""The format of an audit export: raw logs, and the tables derived from them. Pure.

`logs.jsonl` and `blocks.jsonl` contain data from a node. Every other file is computed from them, so
that a reader of the export can recompute it. The same history always gives the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import pydantic_core

from deepsquare_chain import __version__
from deepsquare_chain.audit.entries import JobEntry
from deepsquare_chain.audit.ledger import Ledger, normalised
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.errors import AuditError, GridError

SCHEMA: Final = "deepsquare-audit/3"
MANIFEST: Final = "manifest.json"
LOGS: Final = "logs.jsonl"
BLOCKS: Final = "blocks.jsonl"
MAX_MANIFEST: Final = 1_000_000
#: Columns in credit-wei. They can exceed the integer range of many JSON parsers.
_AMOUNTS: Final = frozenset(
    {
        *("debit", "credit", "balance", "rate", "funded", "carried_in", "escrow", "paid"),
        *("fee", "refunded", "carried_out", "collected"),
    }
)


class TableFormat(StrEnum):
    """File format of the tables."""

    CSV = "csv"
    JSONL = "jsonl"


@dataclass(frozen=True, slots=True)
class Table:
    """A table derived from a ledger. Amounts are credit-wei, times are seconds."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Ledger], Iterator[tuple[Any, ...]]]

    def lines(self, ledger: Ledger, style: TableFormat) -> Iterator[bytes]:
        """Yield the lines of the file, including line ends."""
        if style is TableFormat.CSV:
            yield _csv(self.columns)
            yield from (_csv(row) for row in self.rows(ledger))
        else:
            for row in self.rows(ledger):
                yield json_line(
                    {
                        name: str(value) if name in _AMOUNTS else value
                        for name, value in zip(self.columns, row, strict=True)
                    }
                )


def json_line(body: Mapping[str, Any]) -> bytes:
    """Return one line of ASCII JSON, with keys in the given order."""
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def _csv(row: Iterable[Any]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(row)
    return out.getvalue().encode()


def _jobs(ledger: Ledger) -> Iterator[tuple[Any, ...]]:
    for job in ledger.jobs.values():
        amounts = (job.funded, job.carried_in, job.escrow, job.paid, job.fee, job.refunded)
        parties = (job.id, job.status.name, job.customer, job.provider or None)
        terms = (job.rate, job.fee_bps, job.time_limit)
        ran = (job.started_at or None, job.ended_at or None, job.billed_seconds)
        times = (job.submitted_at, *ran)
        linked = (job.retry_of or None, job.successor or None)
        retry_fields = (job.carried_out, *linked, job.definition.hex())
        interim = (int(job.terms.flags), job.collected_seconds)
        yield (*parties, *terms, *times, *amounts, *retry_fields, *interim, _collected(job))


def _collected(job: JobEntry) -> int:
    return job.collected_paid + job.collected_fee


def _statements(ledger: Ledger) -> Iterator[tuple[Any, ...]]:
    for account in ledger.accounts:
        for row in ledger.statement(account):
            debit, credit = max(-row.amount, 0), max(row.amount, 0)
            details = (row.kind.value, row.job_id or None, row.counterparty or None)
            location = (row.tx_hash, row.log_index)
            yield (account, row.block, row.time, *details, debit, credit, row.balance, *location)


def _exceptions(ledger: Ledger) -> Iterator[tuple[Any, ...]]:
    for row in ledger.exceptions:
        location = (row.block, row.time, row.tx_hash)
        who = (row.job_id or None, row.account or None)
        yield (row.code.value, row.severity.value, *who, *location, row.message)


TABLES: Final = (
    Table(
        "jobs",
        (
            *("job_id", "status", "customer", "provider", "rate", "fee_bps", "time_limit"),
            *("submitted_at", "started_at", "ended_at", "billed_seconds", "funded"),
            *("carried_in", "escrow", "paid", "fee", "refunded", "carried_out", "retry_of"),
            *("successor", "definition", "flags", "collected_seconds", "collected"),
        ),
        _jobs,
    ),
    Table(
        "statements",
        (
            *("account", "block", "time", "kind", "job_id", "counterparty", "debit", "credit"),
            *("balance", "transaction", "log_index"),
        ),
        _statements,
    ),
    Table(
        "exceptions",
        ("code", "severity", "job_id", "account", "block", "time", "transaction", "message"),
        _exceptions,
    ),
)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of an export: its number of lines, and the SHA-256 of its bytes."""

    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of an export. `deployment` contains only what an audit needs.

    The export covers the blocks from `deployment.block` to `last_block`. `block_hash` and
    `block_time` (chain time in seconds) belong to the last block.
    """

    deployment: Deployment
    last_block: int
    block_hash: str
    block_time: int
    style: TableFormat
    files: Mapping[str, FileEntry]
    program: str = __version__

    def body(self) -> dict[str, Any]:
        """Return the manifest as a JSON object, without its digest."""
        return {
            "schema": SCHEMA,
            "program": self.program,
            "deployment": json.loads(self.deployment.to_json()),
            "first_block": self.deployment.block,
            "last_block": self.last_block,
            "block_hash": self.block_hash,
            "block_time": self.block_time,
            "format": self.style.value,
            "files": {
                name: {"rows": entry.rows, "sha256": entry.sha256}
                for name, entry in sorted(self.files.items())
            },
        }

    def to_json(self) -> bytes:
        """Return the bytes of the file.

        The digest detects accidental damage. Only a comparison with the chain detects forgery.
        """
        body = self.body()
        return (json.dumps(body | {"sha256": digest_of(body)}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Parse a manifest.

        Raises:
            AuditError: It can't be parsed, has another schema, or was changed.
        """
        try:
            return cls._checked(pydantic_core.from_json(raw, allow_inf_nan=False))
        except (ValueError, KeyError, TypeError, AttributeError, GridError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:200]
            raise AuditError(
                f"The manifest can't be trusted: {reason}",
                hint="Export again with `deepsquare audit export`.",
            ) from None

    @classmethod
    def _checked(cls, body: Any) -> Manifest:
        digest = body.pop("sha256")
        if body["schema"] != SCHEMA:
            raise ValueError(f"its schema is {str(body['schema'])[:40]!r}, not {SCHEMA!r}")
        manifest = cls._from_body(body)
        if manifest.body() != body or digest_of(body) != digest:
            raise ValueError("it was changed: its own SHA-256 is another")
        return manifest

    @classmethod
    def _from_body(cls, body: Mapping[str, Any]) -> Manifest:
        deployment = Deployment.from_json(json.dumps(body["deployment"]), source="its deployment")
        files = {
            str(name): FileEntry(_count(entry["rows"]), str(entry["sha256"]))
            for name, entry in body["files"].items()
        }
        style = TableFormat(body["format"])
        if set(files) != set(file_names(style)):
            raise ValueError("it names other files than an export has")
        return cls(
            deployment,
            _count(body["last_block"]),
            str(body["block_hash"]),
            _count(body["block_time"]),
            style,
            files,
            str(body["program"]),
        )


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no number")
    return value


def digest_of(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON of a manifest without its digest."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def file_names(style: TableFormat) -> tuple[str, ...]:
    """Return the names of an export's files, without the manifest."""
    return (LOGS, BLOCKS, *(f"{table.name}.{style.value}" for table in TABLES))


def audited(deployment: Deployment) -> Deployment:
    """Return the part of a deployment record that an audit depends on."""
    timeouts = list(deployment.timeouts.values())
    checksummed = normalised(deployment)
    return Deployment(
        checksummed.chain_id,
        checksummed.credit,
        checksummed.registry,
        checksummed.scheduler,
        checksummed.treasury,
        checksummed.forwarder,
        checksummed.block,
        constructor_args={"MetaScheduler": {"timeouts": timeouts}} if timeouts else {},
    )


def log_line(log: Mapping[str, Any]) -> bytes:
    """Return a raw log as a line of `logs.jsonl`, with values encoded as in JSON-RPC."""
    return json_line(
        {
            "blockNumber": _hex_number(log["blockNumber"]),
            "logIndex": _hex_number(log["logIndex"]),
            "blockHash": _hex(log["blockHash"]),
            "transactionHash": _hex(log["transactionHash"]),
            "address": _hex(log["address"]),
            "topics": [_hex(topic) for topic in log["topics"]],
            "data": _hex(log["data"]),
        }
    )


def block_line(number: int, block_hash: str, time: int) -> bytes:
    """Return a block with events as a line of `blocks.jsonl`."""
    return json_line({"number": number, "hash": block_hash, "time": time})


def _hex(value: Any) -> str:
    return value.lower() if isinstance(value, str) else "0x" + bytes(value).hex()


def _hex_number(value: Any) -> str:
    return value.lower() if isinstance(value, str) else hex(value)


def place_of(log: Mapping[str, Any]) -> tuple[int, int]:
    """Return block number and log index of a raw log.

    Raises:
        ValueError: One of them is missing or invalid.
    """
    try:
        return int(str(log["blockNumber"]), 16), int(str(log["logIndex"]), 16)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None


def first_difference(ours: Iterable[bytes], theirs: Iterable[bytes]) -> int:
    """Return the number of the first line that differs, counted from one; zero if none does."""
    left, right = iter(ours), iter(theirs)
    number = 0
    while True:
        number += 1
        left_line, right_line = next(left, None), next(right, None)
        if left_line != right_line:
            return number
        if left_line is None:
            return 0
