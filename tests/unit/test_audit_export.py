"""Exports: reproducible bytes, and detection of changes from the files or from the chain."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from deepsquare_chain.audit.entries import AuditFinding
from deepsquare_chain.audit.export import (
    BLOCKS,
    LOGS,
    MANIFEST,
    TABLES,
    FileEntry,
    Manifest,
    TableFormat,
    _Writer,
    compare_with_chain,
    digest_of,
    export,
    file_names,
    read_manifest,
    replay_export,
)
from deepsquare_chain.audit.runner import audit_export
from deepsquare_chain.cli.audit import EXCEPTIONS, STATEMENT
from deepsquare_chain.cli.output import Format, Printer
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import AuditError, EndpointError, NotFoundError, UsageError
from tests.support.lyingnode import FALSIFICATIONS, Falsification, RecordedNode
from tests.support.recorded import RecordedGrid, record_history, recorded_grid


@pytest.fixture(scope="module")
def grid() -> RecordedGrid:
    grid = recorded_grid()
    record_history(grid)
    return grid


@pytest.fixture(scope="module")
def node(grid: RecordedGrid) -> Any:
    return RecordedNode(grid)


@pytest.fixture(scope="module")
def original(node: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import asyncio  # noqa: PLC0415 - a module's fixture has no loop

    folder = tmp_path_factory.mktemp("exports") / "one"
    asyncio.run(export(node, folder))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "export"))


def seal(folder: Path, **changes: Any) -> None:
    """Write a manifest that matches changed files, as a careful forger would."""
    manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
    files = {}
    for name in manifest.files:
        raw = (folder / name).read_bytes()
        files[name] = FileEntry(raw.count(b"\n"), hashlib.sha256(raw).hexdigest())
    forged = dataclasses.replace(manifest, files=files, **changes)
    (folder / MANIFEST).write_bytes(forged.to_json())


def rewrite(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def codes(findings: Any) -> set[str]:
    return {finding.code for finding in findings}


async def compare(node: Any, folder: Path) -> list[AuditFinding]:
    return await compare_with_chain(node, folder)


async def test_an_honest_export_holds(node: Any, original: Path) -> None:
    replayed = replay_export(original)
    assert replayed.findings == ()
    assert replayed.ledger is not None
    assert len(replayed.ledger.jobs) == 13
    assert await compare(node, original) == []
    # The path of the manifest is accepted as well as that of the folder.
    assert replay_export(original / MANIFEST).findings == ()
    report = await audit_export(None, original)
    assert report.ok
    assert not report.audit.compared


@pytest.mark.parametrize("style", list(TableFormat))
async def test_the_same_history_gives_the_same_bytes(
    node: Any, tmp_path: Path, style: TableFormat
) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    await export(node, first, style=style)
    await export(node, second, style=style)
    assert {path.name for path in first.iterdir()} == {*file_names(style), MANIFEST}
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert replay_export(first).findings == ()


async def test_a_past_block_is_exported(node: Any, grid: RecordedGrid, tmp_path: Path) -> None:
    block = sorted(grid.chain.block_times)[len(grid.chain.block_times) // 2]
    manifest, ledger = await export(node, tmp_path / "past", to_block=block)
    assert manifest.last_block == ledger.block == block
    assert replay_export(tmp_path / "past").findings == ()
    assert await compare(node, tmp_path / "past") == []


async def test_an_export_with_a_handover_holds(tmp_path: Path) -> None:
    """The audit has no use for the events of a handover, but their logs and blocks are exported."""
    grid = recorded_grid()
    grid.chain.advance(1)  # in a new block
    grid.credit.beginDefaultAdminTransfer(grid.treasury, sender=grid.admin)
    node: Any = RecordedNode(grid)
    manifest, _ = await export(node, tmp_path / "handover")
    assert manifest.last_block == int(node.logs[-1]["blockNumber"], 16)
    assert replay_export(tmp_path / "handover").findings == ()
    assert await compare(node, tmp_path / "handover") == []


def test_the_manifest_names_range_rows_and_hashes(node: Any, original: Path) -> None:
    body = json.loads((original / MANIFEST).read_text())
    assert body["schema"] == "deepsquare-audit/4"
    assert body["last_block"] == node.last
    assert body["block_hash"] == "0x" + node.last.to_bytes(32, "big").hex()
    assert body["deployment"]["chain_id"] == node.deployment.chain_id
    for name, entry in body["files"].items():
        raw = (original / name).read_bytes()
        assert entry == {"rows": raw.count(b"\n"), "sha256": hashlib.sha256(raw).hexdigest()}


def test_statements_are_in_the_table(original: Path, grid: RecordedGrid) -> None:
    with (original / "statements.csv").open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    # The layout is that of `audit statement -o csv`, after the account.
    output = io.StringIO()
    Printer(Format.CSV, out=output).rows(STATEMENT, [])
    assert reader.fieldnames == ["account", *output.getvalue().strip().split(",")]
    with (original / "jobs.csv").open() as file:
        names = {row["job_id"]: row["job_name"] for row in csv.DictReader(file)}
    assert any(names.values())
    assert all(row["job_name"] == names.get(row["job_id"], "") for row in rows)
    assert not any("0" in (row["debit"], row["credit"]) for row in rows)
    balances: dict[str, int] = {}
    for row in rows:
        before = balances.get(row["account"], 0)
        balances[row["account"]] = before + int(row["credit"] or 0) - int(row["debit"] or 0)
        assert row["balance_credits"] == format_credits(int(row["balance"]))
        assert int(row["balance"]) == balances[row["account"]]
    assert all(amount == grid.balance(account) for account, amount in balances.items())


def altered(value: Any) -> Any:
    """Return another value of the same format."""
    if isinstance(value, list):
        return [altered(value[0]), *value[1:]]
    last = value[-1]
    return value[:-1] + ("0" if last != "0" else "1") if value != "0x" else "0x01"


FIELDS = (
    *("blockNumber", "logIndex", "blockHash", "transactionHash", "address", "topics", "data"),
)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("at", [3, -9])
async def test_each_changed_field_of_a_log_is_found(
    node: Any, folder: Path, field: str, at: int
) -> None:
    def change(lines: list[bytes]) -> list[bytes]:
        body = json.loads(lines[at])
        body[field] = altered(body[field])
        lines[at] = json.dumps(body, separators=(",", ":")).encode() + b"\n"
        return lines

    rewrite(folder / LOGS, change)
    assert "file" in codes(replay_export(folder).findings)
    seal(folder)
    assert "file" not in codes(replay_export(folder).findings)
    assert "chain" in codes(await compare(node, folder))


def one_more(lines: list[bytes]) -> list[bytes]:
    """Repeat the last log right after itself."""
    body = json.loads(lines[-1])
    body["logIndex"] = hex(int(body["logIndex"], 16) + 1)
    return [*lines, json.dumps(body, separators=(",", ":")).encode() + b"\n"]


async def test_a_log_beyond_the_chains_last_is_found(node: Any, folder: Path) -> None:
    rewrite(folder / LOGS, one_more)
    seal(folder)
    assert "table" in codes(replay_export(folder).findings)
    [finding] = await compare(node, folder)
    assert "is not on the chain" in finding.message


ROWS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "removed": lambda lines: [*lines[:5], *lines[6:]],
    "last removed": lambda lines: lines[:-1],
    "duplicated": lambda lines: [*lines[:6], lines[5], *lines[6:]],
    "reordered": lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]],
    "emptied": lambda _: [],
}


@pytest.mark.parametrize("alteration", ROWS)
async def test_rows_of_logs_are_found(node: Any, folder: Path, alteration: str) -> None:
    rewrite(folder / LOGS, ROWS[alteration])
    assert "file" in codes(replay_export(folder).findings)
    seal(folder)
    assert codes(replay_export(folder).findings)
    assert "chain" in codes(await compare(node, folder))


@pytest.mark.parametrize("alteration", ROWS)
@pytest.mark.parametrize("name", ["jobs.csv", "statements.csv", "exceptions.csv", BLOCKS])
async def test_rows_of_later_blocks_are_detected(folder: Path, alteration: str, name: str) -> None:
    rewrite(folder / name, ROWS[alteration])
    assert "file" in codes(replay_export(folder).findings)
    seal(folder)
    findings = codes(replay_export(folder).findings)
    assert findings & {"table", "block", "order"}
    if name == BLOCKS and alteration == "emptied":
        with pytest.raises(AuditError, match="can't be replayed"):
            await audit_export(None, folder)


def test_a_block_with_an_infinite_number_is_found(folder: Path) -> None:
    rewrite(folder / BLOCKS, lambda lines: [b'{"hash":"","number":1e999,"time":1}\n', *lines[1:]])
    findings = replay_export(folder).findings
    assert any("is not a block" in finding.message for finding in findings)


@pytest.mark.parametrize("name", ["jobs", "statements", "exceptions"])
def test_each_changed_cell_is_found(folder: Path, name: str) -> None:
    path = folder / f"{name}.csv"
    honest = path.read_bytes()
    with path.open() as file:
        head, *rows = list(csv.reader(file))
    for column in range(len(head)):
        changed = [list(row) for row in rows]
        changed[1][column] += "1"
        with path.open("w") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *changed])
        seal(folder)
        [finding] = replay_export(folder).findings
        assert (finding.code, finding.message.split(" of ")[0]) == ("table", "line 3")
    path.write_bytes(honest)
    seal(folder)
    assert replay_export(folder).findings == ()


async def test_time_and_hash_of_a_block_are_compared_with_the_chain(
    node: Any, folder: Path
) -> None:
    def later(lines: list[bytes]) -> list[bytes]:
        body = json.loads(lines[4])
        body["time"] += 1
        return [*lines[:4], json.dumps(body, separators=(",", ":")).encode() + b"\n", *lines[5:]]

    rewrite(folder / BLOCKS, later)
    seal(folder)
    assert "chain" in codes(await compare(node, folder))


@pytest.mark.parametrize(
    "field",
    [
        *("schema", "program", "deployment", "first_block", "last_block", "block_hash"),
        *("block_time", "format", "files", "sha256"),
    ],
)
def test_a_changed_manifest_is_not_trusted(folder: Path, field: str) -> None:
    body = json.loads((folder / MANIFEST).read_text())
    value = body[field]
    if isinstance(value, dict):
        body[field] = {**value, "more": 1}
    else:
        body[field] = value + 1 if isinstance(value, int) else altered(value)
    (folder / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(AuditError, match="is invalid"):
        replay_export(folder)
    body = json.loads((folder / MANIFEST).read_text())
    del body[field]
    (folder / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(AuditError, match="is invalid"):
        replay_export(folder)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"block_hash": "0x" + "ab" * 32}, "chain"),
        ({"block_time": 1}, "chain"),
        ({"chain_id": 5}, "manifest"),
        ({"block": 1}, "manifest"),
        ({"treasury": "0x" + "42" * 20}, "manifest"),
        ({"scheduler": "0x" + "42" * 20}, "manifest"),
        ({"constructor_args": {"MetaScheduler": {"timeouts": [1, 1]}}}, "manifest"),
    ],
)
async def test_a_forged_manifest_is_found_by_the_chain(
    node: Any, folder: Path, changes: dict[str, Any], code: str
) -> None:
    manifest = read_manifest(folder)[1]
    block_changes = {key: value for key, value in changes.items() if key.startswith("block_")}
    others = {key: value for key, value in changes.items() if key not in block_changes}
    seal(folder, deployment=dataclasses.replace(manifest.deployment, **others), **block_changes)
    assert code in codes(await compare(node, folder))


async def test_a_longer_range_than_the_chain_is_reported(node: Any, folder: Path) -> None:
    seal(folder, last_block=node.last + 5)
    with pytest.raises(EndpointError, match="does not have block"):
        await compare(node, folder)


async def test_a_shorter_range_is_found(node: Any, folder: Path) -> None:
    seal(folder, last_block=node.last - 20)
    assert "range" in codes(replay_export(folder).findings)
    assert "chain" in codes(await compare(node, folder))


@pytest.mark.parametrize("falsify", FALSIFICATIONS.values(), ids=list(FALSIFICATIONS))
async def test_a_dishonest_node_is_found_by_an_honest_export(
    grid: RecordedGrid, original: Path, falsify: Falsification
) -> None:
    dishonest_node: Any = RecordedNode(grid)
    dishonest_node.logs = falsify(dishonest_node.logs[:90]) + dishonest_node.logs[90:]
    assert "chain" in codes(await compare(dishonest_node, original))


async def test_another_deployment_is_found(grid: RecordedGrid, original: Path) -> None:
    other = dataclasses.replace(grid.deployment, credit="0x" + "42" * 20)
    findings = await compare(RecordedNode(grid, other), original)
    assert codes(findings) == {"manifest"}
    assert "says credit" in findings[0].message


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b"null", b'{"schema": 1}', b"[" * 10**5, b"\xff", b'{"sha256": 1}']
)
def test_strange_manifests_are_refused(folder: Path, raw: bytes) -> None:
    (folder / MANIFEST).write_bytes(raw)
    with pytest.raises(AuditError, match="is invalid"):
        replay_export(folder)


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b"{}\n", b'"x"\n', b'{"blockNumber": "zz"}\n', b"\xff\n", b"7"]
)
@pytest.mark.parametrize("name", [LOGS, BLOCKS])
async def test_strange_lines_are_findings(folder: Path, name: str, line: bytes) -> None:
    rewrite(folder / name, lambda lines: [*lines[:4], line, *lines[4:]])
    seal(folder)
    assert "file" in codes(replay_export(folder).findings)
    for chain in (None, object()):  # which is not read
        with pytest.raises(AuditError, match="can't be replayed"):
            await audit_export(cast("Any", chain), folder)


@pytest.mark.parametrize("name", [LOGS, BLOCKS, "jobs.csv", "statements.csv"])
def test_a_missing_file_is_found(folder: Path, name: str) -> None:
    (folder / name).unlink()
    messages = [finding.message for finding in replay_export(folder).findings]
    assert f"{name} is missing" in messages


def test_files_elsewhere_are_never_read(folder: Path) -> None:
    body = json.loads((folder / MANIFEST).read_text())
    del body["sha256"]
    body["files"]["../secret"] = body["files"].pop(LOGS)
    (folder / MANIFEST).write_text(json.dumps(body | {"sha256": digest_of(body)}))
    with pytest.raises(AuditError, match="other files than an export has"):
        replay_export(folder)


async def test_unwritable_and_unreadable_folders(node: Any, original: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not empty"):
        await export(node, original)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be written"):
        await export(node, tmp_path / "file")
    with pytest.raises(NotFoundError, match="There is no export"):
        replay_export(tmp_path / "nothing")


@pytest.mark.parametrize("name", [MANIFEST, LOGS, BLOCKS, "jobs.csv"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_special_files_are_not_read_endlessly(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=f"{name} is not a regular file"):
        replay_export(folder)


@pytest.mark.parametrize("full", [0, 3])
async def test_a_full_disk_leaves_no_export(
    node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: int
) -> None:
    """On a full disk, whichever file fails: the error names the folder, and no manifest is written."""
    open_files = []

    def close(self: Any) -> None:
        open_files.append(self)
        if len(open_files) > full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return close_file(self)

    close_file = _Writer.close
    monkeypatch.setattr(_Writer, "close", close)
    with pytest.raises(UsageError, match="No space left on device; the export is not complete"):
        await export(node, tmp_path / "new")
    with pytest.raises(NotFoundError, match="There is no export"):
        replay_export(tmp_path / "new")


def test_tables_are_named_as_the_commands_name_them() -> None:
    """One layout for accountants: the same column names, and nothing where there is no value."""
    printed = {"statements": STATEMENT, "exceptions": EXCEPTIONS}
    for table in TABLES:
        if table.name in printed:
            columns = {column.key for column in printed[table.name]}
            assert set(table.columns) - columns <= {"account"}
        assert table.columns.count("job") == 0
