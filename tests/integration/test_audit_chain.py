"""The audit of a live chain, on the embedded and on a real node."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest

from deepsquare_chain.audit.conservation import verify
from deepsquare_chain.audit.entries import MovementKind
from deepsquare_chain.audit.reader import read_history, read_ledger, read_storage
from deepsquare_chain.audit.runner import AuditOptions, audit_grid
from deepsquare_chain.chain.rpc import batching
from deepsquare_chain.chain.rpc.endpoint import Ceiling
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.job import JobStatus
from tests.support.livegrid import LiveGrid


async def test_events_and_storage_agree(grid: LiveGrid) -> None:
    ids = await grid.end_some_jobs()
    progress: list[tuple[int, int]] = []
    bar = nullcontext(lambda at, last: progress.append((at, last)))
    report = await audit_grid(grid.contracts, bars=lambda _: bar)
    ledger, audit = report.ledger, report.audit
    assert audit.findings == ()
    assert audit.ok
    assert audit.compared
    assert audit.difference == 0
    assert progress[-1][0] == progress[-1][1] > 0
    statuses = [ledger.jobs[job_id].status for job_id in ids]
    assert statuses == [
        *(JobStatus.FINISHED, JobStatus.CANCELLED, JobStatus.PANICKED, JobStatus.PENDING),
    ]
    successor = ledger.jobs[ids[2]].successor
    await grid.send(grid.customers[0], grid.contracts.scheduler.cancel([ids[3], successor]))


async def test_statement_of_a_customer(grid: LiveGrid) -> None:
    ids = await grid.end_some_jobs()
    ledger, _ = await read_ledger(grid.contracts)
    customer = grid.customers[0].address
    rows = [row for row in ledger.statement(customer) if row.job_id == ids[0]]
    job = ledger.jobs[ids[0]]
    assert [row.kind for row in rows] == [MovementKind.ESCROW, MovementKind.REFUND]
    assert sum(row.amount for row in rows) == -(job.paid + job.fee)
    assert ledger.statement(customer)[-1].balance == await grid.contracts.credit.balance_of(
        customer
    )
    await grid.send(
        grid.customers[0],
        grid.contracts.scheduler.cancel([ids[3], ledger.jobs[ids[2]].successor]),
    )


async def test_a_past_block(grid: LiveGrid) -> None:
    [job_id] = await grid.submit()
    block = int(await grid.w3.eth.block_number)
    await grid.send(grid.customers[0], grid.contracts.scheduler.cancel([job_id]))
    options = AuditOptions(storage=False)
    report = await audit_grid(grid.contracts, to_block=block, options=options)
    ledger, audit = report.ledger, report.audit
    assert audit.ok
    assert not audit.compared
    assert ledger.jobs[job_id].status is JobStatus.PENDING


async def test_small_ranges_return_the_same(
    grid: LiveGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await read_history(grid.w3, grid.deployment)
    (member,) = grid.w3.provider.members
    monkeypatch.setattr(member.provider, "log_range", Ceiling(3, 7))
    monkeypatch.setattr(batching, "BATCH", 2)
    assert await read_history(grid.w3, grid.deployment, to_block=whole.to_block) == whole


async def test_refused_ranges_are_halved(grid: LiveGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = await read_history(grid.w3, grid.deployment)
    ask, widest = grid.w3.provider.make_batch_request, 4
    spans: list[int] = []

    async def narrow(batch: list[Any]) -> Any:
        for method, params in batch:
            if method == "eth_getLogs":
                width = int(params[0]["toBlock"], 16) - int(params[0]["fromBlock"], 16) + 1
                spans.append(width)
                if width > widest:
                    error = {"code": -32005, "message": "block range is too wide"}
                    return [{"id": 1, "jsonrpc": "2.0", "error": error}]
        return await ask(batch)

    monkeypatch.setattr(grid.w3.provider, "make_batch_request", narrow)
    assert await read_history(grid.w3, grid.deployment, to_block=whole.to_block) == whole
    assert max(spans) > widest >= min(spans)
    widest = 0
    with pytest.raises(EndpointError, match="rejected a request for logs"):
        await read_history(grid.w3, grid.deployment)


async def test_a_chain_that_is_replaced_is_read_again(
    grid: LiveGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, wrong = grid.w3.provider.make_batch_request, 2

    async def replaced(batch: list[Any]) -> Any:
        nonlocal wrong
        answers = await ask(batch)
        headers = [method for method, _ in batch if method == "eth_getBlockByNumber"]
        if wrong and len(headers) == len(batch):
            wrong -= 1
            for answer in answers:
                answer["result"]["hash"] = "0x" + f"{wrong:064x}"
        return answers

    monkeypatch.setattr(grid.w3.provider, "make_batch_request", replaced)
    history = await read_history(grid.w3, grid.deployment)
    assert wrong == 0
    assert history.events
    wrong = 10**6
    with pytest.raises(EndpointError, match="was reorganised while it was read"):
        await read_history(grid.w3, grid.deployment)


async def test_an_unknown_block_is_reported(grid: LiveGrid) -> None:
    head = int(await grid.w3.eth.block_number)
    with pytest.raises(EndpointError, match="does not have block"):
        await read_history(grid.w3, grid.deployment, to_block=head + 1_000)


async def test_a_false_storage_value_is_found(grid: LiveGrid) -> None:
    ledger, block = await read_ledger(grid.contracts)
    storage = await read_storage(grid.contracts, ledger, block)
    assert verify(ledger, storage).ok
    lie = dataclasses.replace(storage, supply=storage.supply - 1)
    assert not verify(ledger, lie).ok
