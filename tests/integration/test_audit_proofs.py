"""An altered log of a node is detected by block headers, by a second node, and by storage."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deepsquare_chain.audit.anomalies import Code
from deepsquare_chain.audit.proofs import ProofError, check_header, header_hash
from deepsquare_chain.audit.reader import read_history
from deepsquare_chain.audit.runner import (
    AuditOptions,
    LogDigests,
    audit_grid,
    compare_endpoints,
    job_bill,
    prove,
)
from deepsquare_chain.errors import EndpointError
from tests.support.livegrid import LiveGrid
from tests.support.lyingnode import FALSIFICATIONS, Falsification, other_block

Change = Callable[[str, list[Any], Any], Any]


class FalsifyingW3:
    """A `w3` with the methods that the audit uses, whose responses are altered."""

    def __init__(self, w3: Any, change: Change) -> None:
        self._w3 = w3
        self._change = change
        self.provider = self
        self.eth = w3.eth

    async def make_batch_request(self, batch: list[Any]) -> Any:
        answers = await self._w3.provider.make_batch_request(batch)
        for (method, params), answer in zip(batch, answers, strict=True):
            if "result" in answer:
                answer["result"] = self._change(method, params, copy.deepcopy(answer["result"]))
        return answers


def altering_logs(falsify: Falsification) -> Change:
    """Alter only the responses of `eth_getLogs`."""
    return lambda method, _, result: falsify(result) if method == "eth_getLogs" else result


def altering_logs_and_receipts(falsify: Falsification) -> Change:
    """Alter the logs, and in the same way the receipts of the last block with events of the grid."""
    target: list[str] = []

    def change(method: str, params: list[Any], result: Any) -> Any:
        if method == "eth_getLogs":
            target[:] = [result[-1]["blockNumber"]]
            return falsify(result)
        if method == "eth_getBlockReceipts" and params == target:
            result[-1]["logs"] = falsify(result[-1]["logs"])
        return result

    return change


async def proven(grid: LiveGrid, change: Change) -> list[str]:
    """Return the messages of the findings at an altered node."""
    dishonest_node: Any = FalsifyingW3(grid.w3, change)
    node_logs = LogDigests()
    last = int(await grid.w3.eth.block_number)
    await read_history(dishonest_node, grid.deployment, to_block=last, sink=node_logs)
    return [f.message for f in await prove(dishonest_node, grid.deployment, node_logs, last)]


@pytest.fixture
async def busy_grid(grid: LiveGrid) -> LiveGrid:
    """The shared grid with events in its last blocks, once per node."""
    if grid.node.url in lived:
        return grid
    lived.add(grid.node.url)
    ids = await grid.end_some_jobs()
    job = await grid.contracts.scheduler.get_job(ids[2])
    assert job.status.is_final
    count = await grid.contracts.scheduler.job_count()
    await grid.send(grid.customers[0], grid.contracts.scheduler.cancel([ids[3], count]))
    return grid


#: Nodes that have a history already.
lived: set[str] = set()


async def test_honest_nodes_prove_all_their_logs(busy_grid: LiveGrid) -> None:
    progress: list[tuple[int, int]] = []
    digests = LogDigests()
    history = await read_history(busy_grid.w3, busy_grid.deployment, sink=digests)
    findings = await prove(
        busy_grid.w3,
        busy_grid.deployment,
        digests,
        history.to_block,
        progress=lambda at, last: progress.append((at, last)),
    )
    assert findings == []
    assert progress[-1] == (history.to_block, history.to_block)
    assert len(digests.digests) > 10


async def test_places_of_logs_follow_from_the_trie(busy_grid: LiveGrid) -> None:
    """EthereumJS numbers the logs of eth_getBlockReceipts wrongly; a wrong eth_getLogs is a lie."""

    def misnumber(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**log, "logIndex": hex(int(log["logIndex"], 16) + 3)} for log in logs]

    def receipts(method: str, _: list[Any], result: Any) -> Any:
        if method == "eth_getBlockReceipts":
            return [{**item, "logs": misnumber(item["logs"])} for item in result]
        return result

    assert await proven(busy_grid, receipts) == []
    assert await proven(busy_grid, altering_logs(misnumber))


@pytest.mark.parametrize("falsify", FALSIFICATIONS.values(), ids=list(FALSIFICATIONS))
async def test_a_falsified_log_is_proven(busy_grid: LiveGrid, falsify: Falsification) -> None:
    [message] = await proven(busy_grid, altering_logs(falsify))
    assert "not those that the node returned" in message


@pytest.mark.parametrize("falsify", FALSIFICATIONS.values(), ids=list(FALSIFICATIONS))
async def test_a_log_falsified_in_its_receipt_as_well_is_proven(
    busy_grid: LiveGrid, falsify: Falsification
) -> None:
    [message] = await proven(busy_grid, altering_logs_and_receipts(falsify))
    assert "its receipts have the root" in message


async def test_a_log_of_another_block_is_rejected(busy_grid: LiveGrid) -> None:
    with pytest.raises(EndpointError, match="was reorganised while it was read"):
        await proven(busy_grid, altering_logs(other_block))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("receiptsRoot", "0x" + "ab" * 32),
        ("logsBloom", "0x" + "00" * 256),
        ("timestamp", "0x1"),
        ("parentHash", "0x" + "ab" * 32),
        ("stateRoot", "0x" + "ab" * 32),
        ("gasUsed", "zz"),
        ("hash", None),
    ],
)
async def test_a_changed_header_has_another_hash(
    busy_grid: LiveGrid, field: str, value: str | None
) -> None:
    last = hex(int(await busy_grid.w3.eth.block_number))

    def change(method: str, params: list[Any], result: Any) -> Any:
        if method == "eth_getBlockByNumber" and params[0] == last:
            result[field] = value
            if value is None:
                del result[field]
        return result

    dishonest_node: Any = FalsifyingW3(busy_grid.w3, change)
    node_logs = LogDigests()
    history = await read_history(
        busy_grid.w3, busy_grid.deployment, to_block=int(last, 16), sink=node_logs
    )
    [finding] = await prove(dishonest_node, busy_grid.deployment, node_logs, history.to_block)
    assert "its header" in finding.message


async def test_a_forged_block_does_not_fit_its_child(busy_grid: LiveGrid) -> None:
    """A replaced header with a valid hash is detected: the next one names another parent."""
    last = int(await busy_grid.w3.eth.block_number)

    def change(method: str, params: list[Any], result: Any) -> Any:
        if method == "eth_getBlockByNumber" and params[0] == hex(last - 1):
            result["extraData"] = "0x01"
            result["hash"] = header_hash(result)
        return result

    dishonest_node: Any = FalsifyingW3(busy_grid.w3, change)
    node_logs = LogDigests()
    await read_history(busy_grid.w3, busy_grid.deployment, to_block=last, sink=node_logs)
    findings = await prove(dishonest_node, busy_grid.deployment, node_logs, last)
    assert any(f.block == last and "its parent is" in f.message for f in findings)


async def test_a_hidden_block_without_a_trace(busy_grid: LiveGrid) -> None:
    def nothing(method: str, params: list[Any], result: Any) -> Any:
        return [] if method == "eth_getBlockReceipts" else result

    assert "does not return its receipts" in (await proven(busy_grid, nothing))[0]


async def test_receipts_are_read_singly_if_a_node_has_no_batch_method(busy_grid: LiveGrid) -> None:
    methods: list[str] = []
    ask = busy_grid.w3.provider.make_batch_request

    async def old(batch: list[Any]) -> Any:
        methods.extend(method for method, _ in batch)
        if batch[0][0] == "eth_getBlockReceipts":
            error = {"code": -32601, "message": "the method does not exist"}
            return [{"jsonrpc": "2.0", "id": 1, "error": error}]
        return await ask(batch)

    node: Any = SimpleNamespace(
        provider=SimpleNamespace(make_batch_request=old), eth=busy_grid.w3.eth
    )
    node_logs = LogDigests()
    history = await read_history(node, busy_grid.deployment, sink=node_logs)
    assert await prove(node, busy_grid.deployment, node_logs, history.to_block) == []
    assert "eth_getTransactionReceipt" in methods


@pytest.mark.parametrize("falsify", FALSIFICATIONS.values(), ids=list(FALSIFICATIONS))
async def test_a_second_endpoint_reveals_the_difference(
    busy_grid: LiveGrid, falsify: Falsification
) -> None:
    node_logs = LogDigests()
    history = await read_history(busy_grid.w3, busy_grid.deployment, sink=node_logs)
    prover_arguments = (busy_grid.deployment, node_logs, history.to_block, history.block_hash)
    assert await compare_endpoints(busy_grid.w3, *prover_arguments) == []
    dishonest_node: Any = FalsifyingW3(busy_grid.w3, altering_logs(falsify))
    [finding] = await compare_endpoints(dishonest_node, *prover_arguments)
    assert finding.code == "endpoint"
    [other] = await compare_endpoints(busy_grid.w3, *prover_arguments[:3], "0x" + "ab" * 32)
    assert "there" in other.message


@pytest.mark.parametrize("at", [-7, -4, -2, -1])
async def test_storage_finds_a_log_that_is_left_out(
    busy_grid: LiveGrid, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The default audit, without proofs."""
    falsify: Falsification = lambda logs: [*logs[:at], *logs[len(logs) + at + 1 :]]  # noqa: E731
    dishonest_node = FalsifyingW3(busy_grid.w3, altering_logs(falsify))
    ask = busy_grid.w3.provider.make_batch_request
    dishonest_node._w3 = SimpleNamespace(provider=SimpleNamespace(make_batch_request=ask), eth=None)
    monkeypatch.setattr(
        busy_grid.w3.provider, "make_batch_request", dishonest_node.make_batch_request
    )
    report = await audit_grid(busy_grid.contracts)
    assert not report.ok


async def test_an_audit_of_everything(busy_grid: LiveGrid) -> None:
    options = AuditOptions(proofs=True, other=busy_grid.w3)
    report = await audit_grid(busy_grid.contracts, options=options)
    assert report.ok
    assert report.proven
    assert report.audit.compared
    assert [check.difference for check in report.checks] == [0, 0, 0, 0]
    assert Code.PANIC in {row.code for row in report.anomalies}
    assert len(report.block_hash) == 66
    same = AuditOptions(storage=False, block_hash=report.block_hash)
    last = report.audit.block
    assert (await audit_grid(busy_grid.contracts, to_block=last, options=same)).ok
    wrong = AuditOptions(storage=False, block_hash="0x" + "ab" * 32)
    assert not (await audit_grid(busy_grid.contracts, to_block=last, options=wrong)).ok


async def test_a_bill_names_the_report_of_the_provider(busy_grid: LiveGrid) -> None:
    report = await audit_grid(busy_grid.contracts, options=AuditOptions(storage=False))
    finished = [job for job in report.ledger.jobs.values() if job.exit_code is not None]
    bills = [await job_bill(busy_grid.contracts, report.ledger, job.id) for job in finished]
    assert all(bill.ok and bill.reported is not None for bill in bills)
    # One second by `end_some_jobs`; other tests may have reported runs on the same node.
    assert 1 in {bill.reported for bill in bills}
    [other, *_] = [job for job in report.ledger.jobs.values() if job.exit_code is None]
    assert (await job_bill(busy_grid.contracts, report.ledger, other.id)).reported is None


def test_a_header_without_its_parts() -> None:
    for header in ({}, {"hash": "0x"}, {"parentHash": 5}):
        with pytest.raises(ProofError):
            check_header(header)
