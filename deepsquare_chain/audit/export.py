"""Audit exports: raw logs, and the tables derived from them. Writes and verifies them.

`logs.jsonl` and `blocks.jsonl` contain data from a node. Every other file is computed from them, so
that a reader of the export can recompute it. The same history always gives the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import IO, Any, Final

import pydantic_core

from deepsquare_chain import __version__
from deepsquare_chain.audit.entries import STATEMENT_COLUMNS, AuditFinding, statement_cells
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.audit.reader import Progress, log_position, read_history
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import Event, decode_log
from deepsquare_chain.credits import format_credits, hourly
from deepsquare_chain.errors import AuditError, GridError, NotFoundError, UsageError
from deepsquare_chain.observability.redaction import csv_text

SCHEMA: Final = "deepsquare-audit/4"
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
            yield csv_header(self.columns)
            for row in self.rows(ledger):
                yield csv_line(self.columns, row)
        else:
            for row in self.rows(ledger):
                yield json_line(
                    {
                        name: str(value) if name in _AMOUNTS and value is not None else value
                        for name, value in zip(self.columns, row, strict=True)
                    }
                )


def json_line(body: Mapping[str, Any]) -> bytes:
    """Return one line of ASCII JSON, with keys in the given order."""
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def csv_header(columns: Iterable[str]) -> bytes:
    """Return the line of column names; an amount also has a column in credits."""
    return _csv(name for column in columns for name in _csv_names(column))


def csv_line(columns: Iterable[str], values: Iterable[Any]) -> bytes:
    """Return a line of the values of columns, amounts in credit-wei; None is an empty cell."""
    pairs = zip(columns, values, strict=True)
    return _csv(cell for column, value in pairs for cell in _csv_cells(column, value))


def _csv(row: Iterable[Any]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(row)
    return out.getvalue().encode()


def _csv_names(column: str) -> tuple[str, ...]:
    """Return the names of a column in CSV: amounts in credit-wei are followed by decimals."""
    if column not in _AMOUNTS:
        return (column,)
    return (column, f"{column}_credits{'_per_hour' if column == 'rate' else ''}")


def _csv_cells(column: str, value: Any) -> tuple[Any, ...]:
    """Return the cells of `_csv_names`; None is an empty cell."""
    if column in _AMOUNTS:
        if value is None:
            return (None, None)
        return (value, hourly(value) if column == "rate" else format_credits(value))
    return (csv_text(value) if isinstance(value, str) else value,)


def _jobs(ledger: Ledger) -> Iterator[tuple[Any, ...]]:
    for job in ledger.jobs.values():
        amounts = (job.funded, job.carried_in, job.escrow, job.paid, job.fee, job.refunded)
        parties = (job.id, job.name or None, job.status.name, job.customer, job.provider or None)
        terms = (job.rate, job.fee_bps, job.time_limit)
        ran = (job.started_at or None, job.ended_at or None, job.billed_seconds)
        times = (job.submitted_at, *ran)
        linked = (job.retry_of or None, job.successor or None)
        retry_fields = (job.carried_out, *linked, job.definition.hex())
        interim = (int(job.terms.flags), job.collected_seconds)
        yield (*parties, *terms, *times, *amounts, *retry_fields, *interim, job.collected)


def _statements(ledger: Ledger) -> Iterator[tuple[Any, ...]]:
    for account in ledger.accounts:
        for row in ledger.statement(account):
            name = ledger.jobs[row.job_id].name if row.job_id else ""
            yield (account, *statement_cells(row, name))


def _anomalies(ledger: Ledger) -> Iterator[tuple[Any, ...]]:
    for row in ledger.anomalies:
        location = (row.block, row.time, row.tx_hash)
        subject = (row.job_id or None, row.account or None)
        yield (row.code.value, row.severity.value, *subject, *location, row.message)


TABLES: Final = (
    Table(
        "jobs",
        (
            *("job_id", "job_name", "status", "customer", "provider"),
            *("rate", "fee_bps", "time_limit"),
            *("submitted_at", "started_at", "ended_at", "billed_seconds", "funded"),
            *("carried_in", "escrow", "paid", "fee", "refunded", "carried_out", "retry_of"),
            *("successor", "definition", "flags", "collected_seconds", "collected"),
        ),
        _jobs,
    ),
    Table("statements", ("account", *STATEMENT_COLUMNS), _statements),
    Table(
        "exceptions",
        ("code", "severity", "job_id", "account", "block", "time", "transaction", "message"),
        _anomalies,
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
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
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
            return cls._from_body(pydantic_core.from_json(raw, allow_inf_nan=False))
        except (ValueError, KeyError, TypeError, AttributeError, GridError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:200]
            raise AuditError(
                f"The manifest is invalid: {reason}",
                hint="Export again with `deepsquare audit export`.",
            ) from None

    @classmethod
    def _from_body(cls, body: Any) -> Manifest:
        digest = body.pop("sha256")
        if body["schema"] != SCHEMA:
            raise ValueError(f"its schema is {str(body['schema'])[:40]!r}, not {SCHEMA!r}")
        manifest = cls(
            Deployment.from_json(json.dumps(body["deployment"]), source="its deployment"),
            _count(body["last_block"]),
            str(body["block_hash"]),
            _count(body["block_time"]),
            TableFormat(body["format"]),
            {
                name: FileEntry(_count(entry["rows"]), str(entry["sha256"]))
                for name, entry in body["files"].items()
            },
            str(body["program"]),
        )
        if set(manifest.files) != set(file_names(manifest.style)):
            raise ValueError("it lists other files than an export has")
        if manifest.body() != body or digest_of(body) != digest:
            raise ValueError("it was changed: its SHA-256 does not match")
        return manifest


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is not a number of zero or more")
    return value


def digest_of(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON of a manifest without its digest."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def file_names(style: TableFormat) -> tuple[str, ...]:
    """Return the names of an export's files, without the manifest."""
    return (LOGS, BLOCKS, *(f"{table.name}.{style.value}" for table in TABLES))


def audit_deployment(deployment: Deployment) -> Deployment:
    """Return the part of a deployment record that an audit depends on."""
    timeouts = list(deployment.timeouts.values())
    return replace(
        deployment,
        transactions={},
        constructor_args={"MetaScheduler": {"timeouts": timeouts}} if timeouts else {},
        compiler_digest="",
        extra={},
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


def first_difference(expected: Iterable[bytes], actual: Iterable[bytes]) -> int:
    """Return the number of the first line that differs, counted from one; zero if none does."""
    pairs = enumerate(zip_longest(expected, actual), 1)
    return next((number for number, (left, right) in pairs if left != right), 0)


# -- files of an export: written to a folder, and verified on their own and against a chain

#: Maximum bytes per line. No log can be longer.
_MAX_LINE: Final = 4_000_000
#: Maximum number of findings that are recorded.
_MAX_FINDINGS: Final = 100


class _Writer:
    """Writes a file of an export, counts its lines and hashes its bytes."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._hash = hashlib.sha256()
        self._rows = 0

    def write(self, line: bytes) -> None:
        self._file.write(line)
        self._hash.update(line)
        self._rows += 1

    def close(self) -> FileEntry:
        self._file.close()
        return FileEntry(self._rows, self._hash.hexdigest())


class _LogWriter(_Writer):
    """A log sink that writes `logs.jsonl` and keeps the hashes of the blocks."""

    def begin(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._hash, self._rows = hashlib.sha256(), 0
        self.hashes: dict[int, str] = {}

    def take(self, logs: Sequence[Mapping[str, Any]]) -> None:
        for log in logs:
            self.write(log_line(log))
            self.hashes[int(log["blockNumber"], 16)] = log["blockHash"]


async def export(
    contracts: Contracts,
    folder: Path,
    *,
    to_block: int | None = None,
    style: TableFormat = TableFormat.CSV,
    progress: Progress | None = None,
) -> tuple[Manifest, Ledger]:
    """Write all logs up to a block, and the tables derived from them.

    The manifest is written last, so that an incomplete export has no manifest.

    Raises:
        UsageError: The folder is not empty, or can't be written.
        EndpointError: The node does not answer.
    """
    _make_folder(folder)
    deployment = audit_deployment(contracts.deployment)
    try:
        logs = _LogWriter(folder / LOGS)
        history = await read_history(
            contracts.w3, deployment, to_block=to_block, progress=progress, sink=logs
        )
        ledger = history.ledger(deployment)
        block_lines = (
            block_line(number, logs.hashes[number], time)
            for number, time in sorted(history.block_times.items())
        )
        files = {LOGS: logs.close(), BLOCKS: _write(folder / BLOCKS, block_lines)}
        for table in TABLES:
            name = f"{table.name}.{style.value}"
            files[name] = _write(folder / name, table.lines(ledger, style))
        manifest = Manifest(
            deployment, history.to_block, history.block_hash, history.time, style, files
        )
        (folder / MANIFEST).write_bytes(manifest.to_json())
    except OSError as error:
        raise UsageError(
            f"{folder} can't be written: {error.strerror}; the export is not complete",
            hint="Free disk space, remove the folder, and export again.",
        ) from None
    return manifest, ledger


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(
                f"{folder} is not empty",
                hint="Give a new folder: an export does not replace files.",
            )
    except OSError as error:
        raise UsageError(f"{folder} can't be written: {error.strerror}") from None


def _write(path: Path, lines: Iterable[bytes]) -> FileEntry:
    writer = _Writer(path)
    for line in lines:
        writer.write(line)
    return writer.close()


@contextmanager
def _open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Open a file of an export for reading.

    Exports are untrusted: a pipe or a device could block or never end, so only regular files are
    accepted.

    Raises:
        UsageError: The file can't be read, or is not a regular file.
        FileNotFoundError: The file does not exist.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UsageError(
                    f"{path} is not a regular file", hint="An export contains only regular files."
                )
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from None


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file of an export. Raises the errors of `_open_regular`."""
    with _open_regular(path) as file:
        yield from iter(lambda: file.readline(_MAX_LINE), b"")


@dataclass(frozen=True, slots=True)
class Replayed:
    """The result of replaying an export. `ledger` is None if the logs could not be parsed."""

    manifest: Manifest
    ledger: Ledger | None
    findings: tuple[AuditFinding, ...]


def replay_export(path: Path) -> Replayed:
    """Replay an export and verify its hashes, order, ledger and tables.

    Args:
        path: Folder or manifest of the export.

    Raises:
        NotFoundError: There is no manifest.
        AuditError: The manifest is invalid.
        UsageError: A file can't be read.
    """
    folder, manifest = read_manifest(path)
    check = _Check(folder, manifest)
    for name, entry in sorted(manifest.files.items()):
        check.file(name, entry)
    times = check.blocks()
    events = list(check.events(times))
    if check.broken:
        return Replayed(manifest, None, tuple(check.findings))
    ledger = Ledger.replay(
        events,
        manifest.deployment,
        {number: time for number, (_, time) in times.items()},
        to_block=manifest.last_block,
        now=manifest.block_time,
    )
    check.tables(ledger)
    return Replayed(manifest, ledger, (*check.findings, *ledger.findings))


def read_manifest(path: Path) -> tuple[Path, Manifest]:
    """Return folder and manifest of an export. Raises the errors of `replay_export`."""
    file = path / MANIFEST if path.is_dir() else path
    try:
        with _open_regular(file) as handle:
            raw = handle.read(MAX_MANIFEST + 1)
    except FileNotFoundError:
        raise NotFoundError(
            f"There is no export at {path}",
            hint="Create one with `deepsquare audit export FOLDER`.",
        ) from None
    return file.parent, Manifest.from_json(raw)


class _Check:
    """Verifies the consistency of one export."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.findings: list[AuditFinding] = []
        #: Whether logs or blocks can't be parsed, so that no ledger can be built.
        self.broken = False
        self._folder = folder
        self._manifest = manifest

    def report(self, code: str, message: str, block: int = 0) -> None:
        if len(self.findings) < _MAX_FINDINGS:
            self.findings.append(AuditFinding(code, message, block))

    def file(self, name: str, entry: FileEntry) -> None:
        """Check number of lines and digest of a file against the manifest."""
        rows, digest = 0, hashlib.sha256()
        try:
            for line in _lines(self._folder / name):
                rows += 1
                digest.update(line)
        except FileNotFoundError:
            self.broken = self.broken or name in {LOGS, BLOCKS}
            self.report("file", f"{name} is missing")
            return
        if rows != entry.rows:
            self.report("file", f"{name} has {rows} rows, but the manifest has {entry.rows}")
        if digest.hexdigest() != entry.sha256:
            self.report("file", f"{name} does not match the SHA-256 of the manifest")

    def _parsed(self, name: str) -> Iterator[tuple[int, bytes, Any]]:
        if not (self._folder / name).exists():
            return
        for number, line in enumerate(_lines(self._folder / name), 1):
            try:
                body = pydantic_core.from_json(line)
            except ValueError:
                self._break(f"line {number} of {name} is not JSON")
            else:
                yield number, line, body

    def _break(self, message: str) -> None:
        """Report logs or blocks that can't be parsed, so that no ledger can be built."""
        self.broken = True
        self.report("file", message)

    def blocks(self) -> dict[int, tuple[str, int]]:
        """Return hash and chain time of each block with events."""
        blocks: dict[int, tuple[str, int]] = {}
        previous = -1
        for number, line, body in self._parsed(BLOCKS):
            try:
                block, block_hash, time = int(body["number"]), str(body["hash"]), int(body["time"])
            except (KeyError, TypeError, ValueError, OverflowError):
                self._break(f"line {number} of {BLOCKS} is not a block")
                continue
            if block <= previous or line != block_line(block, block_hash, time):
                self.report("order", f"line {number} of {BLOCKS} is out of order or shape", block)
            blocks[block], previous = (block_hash, time), block
        return blocks

    def events(self, times: Mapping[int, tuple[str, int]]) -> Iterator[Event]:
        """Yield the events of the logs, in file order."""
        previous, blocks_with_logs = (-1, -1), set()
        manifest = self._manifest
        addresses = {contract.lower() for contract in manifest.deployment.addresses}
        for number, line, body in self._parsed(LOGS):
            subject = f"line {number} of {LOGS}"
            try:
                position = log_position(body)
                canonical = line == log_line(body)
                address, block_hash = body["address"], body["blockHash"]
            except (KeyError, TypeError, ValueError, AttributeError):
                self._break(f"{subject} is not a log")
                continue
            block = position[0]
            if position <= previous or not canonical:
                self.report("order", f"{subject} is out of order or shape", block)
            previous = position
            blocks_with_logs.add(block)
            if address not in addresses:
                self.report("address", f"{subject} belongs to another contract", block)
            if not manifest.deployment.block <= block <= manifest.last_block:
                self.report("range", f"{subject} is outside of the range", block)
            if times.get(block, ("", 0))[0] != block_hash:
                self.broken = self.broken or block not in times
                self.report("block", f"{subject} belongs to another block", block)
            if (event := decode_log(body)) is not None:
                yield event
        self._check_unused_blocks(times, blocks_with_logs)

    def _check_unused_blocks(
        self, times: Mapping[int, tuple[str, int]], blocks_with_logs: set[int]
    ) -> None:
        for block in sorted({*times} - blocks_with_logs):
            self.report("block", f"block {block} is in {BLOCKS} without a log", block)
        manifest = self._manifest
        last_block = times.get(manifest.last_block)
        if last_block is not None and last_block != (manifest.block_hash, manifest.block_time):
            self.report("block", "the last block differs from the manifest")

    def tables(self, ledger: Ledger) -> None:
        """Check that every table matches the ledger."""
        style = self._manifest.style
        for table in TABLES:
            name = f"{table.name}.{style.value}"
            if not (self._folder / name).exists():
                continue
            lines = table.lines(ledger, style), _lines(self._folder / name)
            if different_line := first_difference(*lines):
                self.report("table", f"line {different_line} of {name} does not match the logs")


class _Comparer:
    """A log sink that compares a chain's logs with those of an export, both in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.findings: list[AuditFinding] = []

    def begin(self) -> None:
        self.findings.clear()
        self._export_lines = (
            (log_position(pydantic_core.from_json(line)), line) for line in _lines(self._path)
        )
        self._next = next(self._export_lines, None)

    def take(self, logs: Sequence[Mapping[str, Any]]) -> None:
        for log in logs:
            line = log_line(log)
            position = log_position(pydantic_core.from_json(line))
            self.skip_to(position)
            if self._next is None or self._next[0] > position:
                self._report(position, "is missing from the export")
                continue
            if self._next[1] != line:
                self._report(position, "differs on the chain")
            self._next = next(self._export_lines, None)

    def skip_to(self, position: tuple[float, int]) -> None:
        """Report the export's next logs that come before a position: the chain lacks them."""
        while self._next is not None and self._next[0] < position:
            self._report(self._next[0], "is not on the chain")
            self._next = next(self._export_lines, None)

    def _report(self, position: tuple[int, int], problem: str) -> None:
        if len(self.findings) < _MAX_FINDINGS:
            block, index = position
            message = f"log {index} of block {block} {problem}"
            self.findings.append(AuditFinding("chain", message, block))


async def compare_with_chain(
    contracts: Contracts, path: Path, *, progress: Progress | None = None
) -> list[AuditFinding]:
    """Compare an export's logs, block times and last block with a chain.

    Raises:
        EndpointError: The node does not answer, or does not have the export's last block.
    """
    folder, manifest = read_manifest(path)
    findings = _other_grid(manifest, contracts.deployment)
    if findings:
        return findings
    comparer = _Comparer(folder / LOGS)
    history = await read_history(
        contracts.w3,
        contracts.deployment,
        to_block=manifest.last_block,
        progress=progress,
        sink=comparer,
    )
    comparer.skip_to((inf, 0))
    findings = comparer.findings
    last_block = (history.block_hash, history.time)
    if last_block != (manifest.block_hash, manifest.block_time):
        message = f"block {manifest.last_block} differs on the chain: {history.block_hash}"
        findings.append(AuditFinding("chain", message, manifest.last_block))
    times = {number: time for number, (_, time) in _Check(folder, manifest).blocks().items()}
    for number, time in history.block_times.items():
        if times.get(number) != time:
            message = f"the time of block {number} is {time} on the chain"
            findings.append(AuditFinding("chain", message, number))
    return findings


def _other_grid(manifest: Manifest, deployment: Deployment) -> list[AuditFinding]:
    """Return a finding for each difference between the export's deployment and the given one."""
    exported, deployed = asdict(manifest.deployment), asdict(audit_deployment(deployment))
    names = (
        *("chain_id", "credit", "registry", "scheduler", "treasury", "forwarder", "block"),
        "constructor_args",
    )
    return [
        AuditFinding(
            "manifest",
            f"the export says {name} {exported[name]}, the deployment record {deployed[name]}",
            block=0,
        )
        for name in names
        if exported[name] != deployed[name]
    ]
