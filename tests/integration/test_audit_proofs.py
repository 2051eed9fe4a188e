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
from tests.integration.test_audit_chain import live_a_little
from tests.support.livegrid import LiveGrid
from tests.support.lyingnode import LIES, Lie, other_block

Change = Callable[[str, list[Any], Any], Any]


class Liar:
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


def about_logs(lie: Lie) -> Change:
    """Alter only the responses of `eth_getLogs`."""
    return lambda method, _, result: lie(result) if method == "eth_getLogs" else result


def everywhere(lie: Lie) -> Change:
    """Alter the logs, and in the same way the receipts of the last block with events of the grid."""
    target: list[str] = []

    def change(method: str, params: list[Any], result: Any) -> Any:
        if method == "eth_getLogs":
            target[:] = [result[-1]["blockNumber"]]
            return lie(result)
        if method == "eth_getBlockReceipts" and params == target:
            result[-1]["logs"] = lie(result[-1]["logs"])
        return result

    return change


async def proven(grid: LiveGrid, change: Change) -> list[str]:
    """Return the messages of the findings at an altered node."""
    liar: Any = Liar(grid.w3, change)
    node_logs = LogDigests()
    last = int(await grid.w3.eth.block_number)
    await read_history(liar, grid.deployment, to_block=last, sink=node_logs)
    return [f.message for f in await prove(liar, grid.deployment, node_logs, last)]


@pytest.fixture
async def used(grid: LiveGrid) -> LiveGrid:
    """The shared grid with events in its last blocks, once per node."""
    if grid.node.url in lived:
        return grid
    lived.add(grid.node.url)
    ids = await live_a_little(grid)
    job = await grid.contracts.scheduler.get_job(ids[2])
    assert job.status.is_final
    count = await grid.contracts.scheduler.job_count()
    await grid.send(grid.customers[0], grid.contracts.scheduler.cancel([ids[3], count]))
    return grid


#: Nodes that have a history already.
lived: set[str] = set()


async def test_honest_nodes_prove_all_their_logs(used: LiveGrid) -> None:
    progress: list[tuple[int, int]] = []
    digests = LogDigests()
    history = await read_history(used.w3, used.deployment, sink=digests)
    findings = await prove(
        used.w3,
        used.deployment,
        digests,
        history.to_block,
        progress=lambda at, last: progress.append((at, last)),
    )
    assert findings == []
    assert progress[-1] == (history.to_block, history.to_block)
    assert len(digests.digests) > 10


async def test_places_of_logs_follow_from_the_trie(used: LiveGrid) -> None:
    """EthereumJS numbers the logs of eth_getBlockReceipts wrongly; a wrong eth_getLogs is a lie."""

    def misnumber(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**log, "logIndex": hex(int(log["logIndex"], 16) + 3)} for log in logs]

    def receipts(method: str, _: list[Any], result: Any) -> Any:
        if method == "eth_getBlockReceipts":
            return [{**item, "logs": misnumber(item["logs"])} for item in result]
        return result

    assert await proven(used, receipts) == []
    assert await proven(used, about_logs(misnumber))


@pytest.mark.parametrize("lie", LIES.values(), ids=list(LIES))
async def test_a_lie_about_one_log_is_proven(used: LiveGrid, lie: Lie) -> None:
    [message] = await proven(used, about_logs(lie))
    assert "not those that the node returned" in message


@pytest.mark.parametrize("lie", LIES.values(), ids=list(LIES))
async def test_a_lie_in_receipts_as_well_is_proven(used: LiveGrid, lie: Lie) -> None:
    [message] = await proven(used, everywhere(lie))
    assert "its receipts make the root" in message


async def test_a_log_of_another_block_is_no_log(used: LiveGrid) -> None:
    with pytest.raises(EndpointError, match="was reorganised while it was read"):
        await proven(used, about_logs(other_block))


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
    used: LiveGrid, field: str, value: str | None
) -> None:
    last = hex(int(await used.w3.eth.block_number))

    def change(method: str, params: list[Any], result: Any) -> Any:
        if method == "eth_getBlockByNumber" and params[0] == last:
            result[field] = value
            if value is None:
                del result[field]
        return result

    liar: Any = Liar(used.w3, change)
    node_logs = LogDigests()
    history = await read_history(used.w3, used.deployment, to_block=int(last, 16), sink=node_logs)
    [finding] = await prove(liar, used.deployment, node_logs, history.to_block)
    assert "its header" in finding.message


async def test_a_forged_block_does_not_fit_its_child(used: LiveGrid) -> None:
    """A replaced header with a valid hash is detected: the next one names another parent."""
    last = int(await used.w3.eth.block_number)

    def change(method: str, params: list[Any], result: Any) -> Any:
        if method == "eth_getBlockByNumber" and params[0] == hex(last - 1):
            result["extraData"] = "0x01"
            result["hash"] = header_hash(result)
        return result

    liar: Any = Liar(used.w3, change)
    node_logs = LogDigests()
    await read_history(used.w3, used.deployment, to_block=last, sink=node_logs)
    findings = await prove(liar, used.deployment, node_logs, last)
    assert any(f.block == last and "its parent is" in f.message for f in findings)


async def test_a_hidden_block_without_a_trace(used: LiveGrid) -> None:
    def nothing(method: str, params: list[Any], result: Any) -> Any:
        return [] if method == "eth_getBlockReceipts" else result

    assert "does not return its receipts" in (await proven(used, nothing))[0]


async def test_receipts_are_read_singly_if_a_node_has_no_batch_method(used: LiveGrid) -> None:
    methods: list[str] = []
    ask = used.w3.provider.make_batch_request

    async def old(batch: list[Any]) -> Any:
        methods.extend(method for method, _ in batch)
        if batch[0][0] == "eth_getBlockReceipts":
            error = {"code": -32601, "message": "the method does not exist"}
            return [{"jsonrpc": "2.0", "id": 1, "error": error}]
        return await ask(batch)

    node: Any = SimpleNamespace(provider=SimpleNamespace(make_batch_request=old), eth=used.w3.eth)
    node_logs = LogDigests()
    history = await read_history(node, used.deployment, sink=node_logs)
    assert await prove(node, used.deployment, node_logs, history.to_block) == []
    assert "eth_getTransactionReceipt" in methods


@pytest.mark.parametrize("lie", LIES.values(), ids=list(LIES))
async def test_a_second_endpoint_reveals_the_difference(used: LiveGrid, lie: Lie) -> None:
    node_logs = LogDigests()
    history = await read_history(used.w3, used.deployment, sink=node_logs)
    prover_arguments = (used.deployment, node_logs, history.to_block, history.block_hash)
    assert await compare_endpoints(used.w3, *prover_arguments) == []
    liar: Any = Liar(used.w3, about_logs(lie))
    [finding] = await compare_endpoints(liar, *prover_arguments)
    assert finding.code == "endpoint"
    [other] = await compare_endpoints(used.w3, *prover_arguments[:3], "0x" + "ab" * 32)
    assert "there" in other.message


@pytest.mark.parametrize("at", [-7, -4, -2, -1])
async def test_storage_finds_a_log_that_is_left_out(
    used: LiveGrid, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The default audit, without proofs."""
    lie: Lie = lambda logs: [*logs[:at], *logs[len(logs) + at + 1 :]]  # noqa: E731
    liar = Liar(used.w3, about_logs(lie))
    ask = used.w3.provider.make_batch_request
    liar._w3 = SimpleNamespace(provider=SimpleNamespace(make_batch_request=ask), eth=None)
    monkeypatch.setattr(used.w3.provider, "make_batch_request", liar.make_batch_request)
    report = await audit_grid(used.contracts)
    assert not report.ok


async def test_an_audit_of_everything(used: LiveGrid) -> None:
    options = AuditOptions(proofs=True, other=used.w3)
    report = await audit_grid(used.contracts, options=options)
    assert report.ok
    assert report.proven
    assert report.audit.compared
    assert [check.difference for check in report.checks] == [0, 0, 0, 0]
    assert Code.PANIC in {row.code for row in report.anomalies}
    assert len(report.block_hash) == 66
    same = AuditOptions(storage=False, block_hash=report.block_hash)
    last = report.audit.block
    assert (await audit_grid(used.contracts, to_block=last, options=same)).ok
    wrong = AuditOptions(storage=False, block_hash="0x" + "ab" * 32)
    assert not (await audit_grid(used.contracts, to_block=last, options=wrong)).ok


async def test_a_bill_names_the_report_of_the_provider(used: LiveGrid) -> None:
    report = await audit_grid(used.contracts, options=AuditOptions(storage=False))
    finished = [job for job in report.ledger.jobs.values() if job.exit_code is not None]
    bills = [await job_bill(used.contracts, report.ledger, job.id) for job in finished]
    assert all(bill.ok and bill.reported is not None for bill in bills)
    # One second by `live_a_little`; other tests may have reported runs on the same node.
    assert 1 in {bill.reported for bill in bills}
    [other, *_] = [job for job in report.ledger.jobs.values() if job.exit_code is None]
    assert (await job_bill(used.contracts, report.ledger, other.id)).reported is None


def test_a_header_without_its_parts() -> None:
    for header in ({}, {"hash": "0x"}, {"parentHash": 5}):
        with pytest.raises(ProofError):
            check_header(header)
