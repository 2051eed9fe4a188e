"""The provider's service with real contracts and real processes, on blocks of one second."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import (
    JobCollected,
    JobPanicked,
    JobRequeued,
    JobRetried,
)
from deepsquare_chain.chain.transactions.sender import TxReceipt
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.devnet.node.base import Node
from deepsquare_chain.executors.rundir import RunFolder
from deepsquare_chain.job import JobFlags, JobStatus, ProviderStatus, Resources
from deepsquare_chain.provider.model import Phase
from deepsquare_chain.provider.outputs import find_run, read_output
from deepsquare_chain.provider.service import KINDS
from deepsquare_chain.workflow import load_job_file
from tests.support.anvil import start_ticking
from tests.support.livegrid import BorrowedNode, LiveGrid, deploy, live_grid
from tests.support.provider import Bench, bench, definition
from tests.support.rpccount import counted_requests
from tests.support.rundaemon import DaemonProcess, until

S = JobStatus


@pytest.fixture(scope="module")
def ticking(background) -> Iterator[Node]:
    """A chain that mines every second by the wall clock."""
    node = start_ticking()
    background.run(node.__aenter__())
    yield node
    background.run(node.close())


@pytest.fixture(scope="module")
def grid_record(ticking: Node, background) -> Deployment:
    return background.run(deploy(BorrowedNode(ticking.url, ticking.chain_id)))


@pytest.fixture
async def grid(ticking: Node, grid_record: Deployment) -> AsyncIterator[LiveGrid]:
    node = BorrowedNode(ticking.url, ticking.chain_id)
    async with node, live_grid(node, grid_record) as result:
        yield result


@pytest.fixture
async def host(grid: LiveGrid, tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(grid, tmp_path) as result:
        yield result


async def test_a_job_from_assignment_to_settlement(grid: LiveGrid, tmp_path: Path):
    """From assignment to settlement, with a challenge on the way."""
    async with bench(grid, tmp_path, confirmations=1) as host:
        await _run_one_job(host)


async def _run_one_job(host: Bench) -> None:
    scheduler = host.grid.contracts.scheduler
    [job_id] = await host.submit("echo hello $DEEPSQUARE_JOB_ID; sleep 1")
    await host.grid.send(host.grid.stranger, scheduler.challenge(job_id))
    await _challenge_is_read_with_every_block(host)
    # claimAndStart answers a challenge too.
    await host.until([job_id], S.RUNNING)
    clock = await scheduler.clock_of(host.service.provider_id)
    assert clock.challenged_at == 0
    assert clock.answered_at > 0

    await host.until([job_id])
    job = await host.job(job_id)
    assert job.status is S.FINISHED
    result, settled = await host.result(job_id), await host.settled(job_id)
    output = f"hello {job_id}\n".encode()
    assert result.result == hashlib.sha256(output).digest()
    assert (result.exit_code, result.reason) == (0, "")
    assert 1 <= settled.billed_seconds <= 3
    await host.drive(lambda: host.row(job_id).phase is Phase.CLOSED)
    [earning] = host.service.table.earned()
    assert (earning.paid, earning.fee) == (settled.paid, settled.fee)
    deployment = host.grid.deployment
    folder = find_run(host.folder, deployment.chain_id, deployment.scheduler, job_id)
    assert folder is not None
    assert read_output(folder).data == output
    metrics = host.service.metrics.metrics
    assert metrics.value("follower_lag_blocks") == 0
    age = metrics.value("head_age_seconds")
    assert age is not None
    assert abs(age) < 3600
    counts = {kind: metrics.value("provider_jobs_total", kind=kind) for kind in KINDS}
    assert counts == dict.fromkeys(KINDS, 0) | {"claim_and_start": 1, "finish": 1}


async def _challenge_is_read_with_every_block(host: Bench) -> None:
    service = host.service
    head = await service.heads.poll(lambda: 0, again=True)
    assert head is not None
    for _ in range(2):
        await service._follow(head)
        assert (service._followed_hash, service._challenged_at > 0) == (b"", True)


async def test_every_final_status_and_its_bill(host: Bench):
    """Each job has the right final status, bill and explanation."""
    memory_hog = "python3 -c 'b = bytearray(300 << 20); import time; time.sleep(30)'"
    exit_3_job, killed_job, memory_job = await host.submit(
        "sleep 1; exit 3", "kill -9 $$; sleep 9", memory_hog
    )
    [overtime_job] = await host.submit("sleep 60", time_limit=5)
    [stopped] = await host.submit("sleep 61", customer=1)
    [lost_job] = await host.submit("sleep 62", retries=1)
    ids = [exit_3_job, killed_job, memory_job, overtime_job, stopped, lost_job]
    await host.drive(lambda: {host.phase(lost_job), host.phase(stopped)} == {Phase.SUBMITTED})
    await host.drive(lambda: _has_run_for_a_second(host, stopped))
    cancel = host.grid.contracts.scheduler.cancel
    await host.grid.send(host.grid.customers[1], cancel([stopped]))
    claim = RunFolder(host.folder / "runs" / host.row(lost_job).key).taken()
    assert claim is not None
    os.kill(claim.owner.pid, signal.SIGKILL)
    await host.drive(lambda: all(host.phase(job_id) is Phase.CLOSED for job_id in ids))

    statuses = {job_id: (await host.job(job_id)).status for job_id in ids}
    assert statuses == {
        exit_3_job: S.FAILED,
        killed_job: S.FAILED,
        memory_job: S.FAILED,
        overtime_job: S.OUT_OF_CREDITS,
        stopped: S.CANCELLED,
        lost_job: S.PANICKED,
    }
    results = {job_id: await host.result(job_id) for job_id in ids[:4]}
    assert (results[exit_3_job].exit_code, results[exit_3_job].reason) == (3, "exited with code 3")
    assert results[killed_job].reason == "exited with code 137"
    assert results[memory_job].reason == "memory limit of 64 MB exceeded"
    assert results[overtime_job].reason == "time limit reached"
    assert (await host.settled(overtime_job)).billed_seconds == 5
    assert (await host.settled(exit_3_job)).billed_seconds <= 3
    assert 1 <= (await host.settled(stopped)).billed_seconds < 60
    for job_id in ids:
        assert host.row(job_id).exit is not None or await _is_over(host, job_id)
    [retried] = await host.events(JobRetried, lost_job)
    successor = await host.job(retried.successor)
    assert (successor.status, successor.escrow) == (S.PENDING, CREDIT)
    await host.grid.send(host.grid.customers[0], cancel([retried.successor]))


async def _has_run_for_a_second(host: Bench, job_id: int) -> bool:
    head, job = await host.grid.w3.eth.get_block("latest"), await host.job(job_id)
    return job.status is S.RUNNING and head["timestamp"] > job.since


async def test_a_slow_transaction_does_not_delay_others(
    grid: LiveGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A transaction that is delayed does not delay the others, and is not sent again."""
    sends: list[str] = []
    release = asyncio.Event()
    async with bench(grid, tmp_path, batch_size=1) as host:
        slow, quick = await host.submit("true", "true")
        sender = host.service._sender
        plain = sender.send

        async def send(call: Call, **options: object) -> TxReceipt:
            assert call.label not in sends
            sends.append(call.label)
            if call.label == f"claimAndStart job {slow}":
                await release.wait()
            return await plain(call, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(sender, "send", send)
        try:
            await host.until([quick])
            assert (await host.job(slow)).status is S.META_SCHEDULED
        finally:
            release.set()
        await host.until([slow])
        assert sorted(sends) == sorted(
            f"{method} job {value}"
            for method in ("claimAndStart", "finish")
            for value in (slow, quick)
        )


async def test_invalid_and_missing_definitions_are_refunded(host: Bench):
    """The customer is refunded: at once if no provider could run the job, else after some time."""
    other = Resources(tasks=1, cpus_per_task=2, mem_per_cpu=64, gpus=0)
    wrong = await host.definitions.put(definition("echo", other).to_bytes())
    junk = await host.definitions.put(b"{}")
    swapped = definition("echo swapped").digest
    file = host.definitions.path / f"{swapped.hex()}.json"
    file.write_bytes(definition("echo something else").to_bytes())
    missing, late_definition = definition("echo never kept").digest, definition("echo tardy")
    *ids, late_id = await host.submit_digests(
        [wrong, junk, swapped, missing, late_definition.digest], retries=0
    )
    await host.until(ids[:2])
    await host.definitions.put(late_definition.to_bytes())
    await host.until([*ids, late_id])
    reasons = ["requires 1 x 2 CPUs", "missing", "does not match its digest", "is not in the store"]
    blocks = []
    for job_id, reason in zip(ids, reasons, strict=True):
        job = await host.job(job_id)
        assert job.status is S.PANICKED
        [panicked] = await host.events(JobPanicked, job_id)
        blocks.append(panicked.block_number)
        assert reason in panicked.reason
        assert (await host.settled(job_id)).refunded == CREDIT
    assert max(blocks[:2]) < min(blocks[2:])
    assert (await host.job(late_id)).status is S.FINISHED
    assert await host.executor.keys() == [host.row(late_id).key]


async def test_top_up_and_shortage(grid: LiveGrid, tmp_path: Path):
    """A top-up extends a live run; a job that exceeds the machine's capacity is requeued."""
    large = Resources(tasks=1, cpus_per_task=6, mem_per_cpu=64, gpus=0)
    scheduler = grid.contracts.scheduler
    async with bench(grid, tmp_path, assignment_timeout=3) as host:
        [first] = await host.submit("sleep 30", resources=large, time_limit=20)
        await host.drive(lambda: host.phase(first) is Phase.SUBMITTED)
        job = await host.job(first)
        await grid.send(grid.customers[0], scheduler.top_up(first, job.customer, job.rate * 60))
        await host.drive(lambda: host.row(first).allotment == 80)
        control = RunFolder(host.folder / "runs" / host.row(first).key).control()
        assert 40 < control["walltime"] <= 80
        [second] = await host.submit("echo", resources=large)
        [small] = await host.submit("echo")
        await host.until([second], S.PENDING)
        [requeued] = await host.events(JobRequeued, second)
        assert "no free capacity" in requeued.reason
        await grid.send(grid.customers[0], scheduler.cancel([first, second]))
        await host.until([small, first])


async def test_a_backup_continues_in_another_folder(grid: LiveGrid, tmp_path: Path):
    """As in docs/operations.md: stop, `tar`, restore elsewhere and start; the original is gone."""
    first, second = tmp_path / "first", tmp_path / "second"
    async with bench(grid, first) as host:
        [before] = await host.submit("echo before")
        await host.until([before])
        await host.drive(lambda: host.row(before).phase is Phase.CLOSED)
        earned = host.service.table.earned()
    archive = tmp_path / "backup.tar"
    with tarfile.open(archive, "w") as packed:
        packed.add(first, arcname=".")
    shutil.rmtree(first)
    with tarfile.open(archive) as packed:
        packed.extractall(second, filter="data")
    async with bench(grid, second) as host:
        assert host.service.table.earned() == earned
        assert host.row(before).phase is Phase.CLOSED
        deployment = host.grid.deployment
        folder = find_run(second, deployment.chain_id, deployment.scheduler, before)
        assert folder is not None
        assert read_output(folder).data == b"before\n"
        [after] = await host.submit("echo after")
        await host.until([after])
        await host.drive(lambda: host.row(after).phase is Phase.CLOSED)
        # The grid is shared: earnings may include jobs of other tests.
        later = host.service.table.earned()
        assert later[: len(earned)] == earned
        assert later[-1].paid > 0
        assert len(later) == len(earned) + 1


async def test_maintenance_finishes_live_runs_and_requeues_the_rest(grid: LiveGrid, tmp_path: Path):
    """Maintenance is started by a signal and stored on chain, where a starting daemon reads it."""
    registry = grid.contracts.registry
    async with bench(grid, tmp_path) as host:
        [running] = await host.submit("sleep 1.5")
        await host.drive(lambda: host.phase(running) is Phase.SUBMITTED)
        [late_job] = await host.submit("echo")
        host.service.drain(True)
        assert host.service.details()["draining"]
        await host.until([late_job], S.PENDING)
        [requeued] = await host.events(JobRequeued, late_job)
        assert "draining" in requeued.reason
        await host.until([running])
        assert (await host.job(running)).status is S.FINISHED
        await host.drive(
            lambda: not host.service.table.open() or host.service.details()["jobs"] < 2
        )
        assert host.service.metrics.metrics.value("provider_draining") == 1
        provider = await registry.provider_of(host.account.address)
        assert provider.status is ProviderStatus.DRAINING
    async with bench(grid, tmp_path) as host:
        host.service.heads.hint()
        await host.service.cycle()
        assert host.service.details()["draining"]
        host.service.drain(False)

        async def active() -> bool:
            provider = await registry.provider_of(host.account.address)
            return provider.status is ProviderStatus.ACTIVE

        await host.drive(active)
        assert not host.service.details()["draining"]
    await grid.send(grid.customers[0], grid.contracts.scheduler.cancel([late_job]))


async def test_a_panic_before_the_start_lets_a_successor_run_elsewhere(
    grid: LiveGrid, tmp_path: Path
):
    """A job with retries whose provider can't read the definition continues at another provider."""
    async with (
        bench(grid, tmp_path / "p0", assignment_timeout=1) as failing_host,
        bench(grid, tmp_path / "p1", 1) as rich,
    ):
        await rich.definitions.put(definition("echo elsewhere").to_bytes())
        [job_id] = await failing_host.submit("echo elsewhere", keep=False, retries=1)
        await failing_host.until([job_id], S.PANICKED)
        [retried] = await failing_host.events(JobRetried, job_id)
        assert retried.escrow == CREDIT
        scheduler = grid.contracts.scheduler
        assert await scheduler.is_eligible(retried.successor, 1) == (False, "ProviderExcluded")
        await grid.assign({2: [retried.successor]})
        await rich.until([retried.successor], S.FINISHED)
        assert (await rich.settled(retried.successor)).paid > 0


async def test_interim_payments_and_challenges_of_a_run(grid: LiveGrid, tmp_path: Path):
    """Collected time is not billed again; an interim payment also answers a challenge."""
    scheduler = grid.contracts.scheduler
    async with bench(grid, tmp_path, coin_value=0) as host:  # the gas of a payment does not matter
        [job_id] = await host.submit(
            "sleep 7", time_limit=600, flags=JobFlags.INTERIM_PAYMENTS, retries=0
        )
        await host.drive(lambda: host.phase(job_id) is Phase.SUBMITTED)
        metric = host.service.metrics.metrics.value
        # There is nothing else to send, so an `answer` is sent.
        await grid.send(grid.stranger, scheduler.challenge(job_id))
        await host.drive(lambda: metric("provider_jobs_total", kind="answer") == 1)
        await grid.node.increase_time(20)
        await grid.send(grid.stranger, scheduler.challenge(job_id))
        await host.drive(lambda: metric("provider_jobs_total", kind="collect") == 1)
        assert (await scheduler.clock_of(1)).challenged_at == 0
        [collected] = await host.events(JobCollected, job_id)
        assert collected.billed_seconds >= 20
        host.service.heads.hint()
        await host.service.cycle()
        assert (metric("revenue_accrued_credits") or 0) * CREDIT < collected.paid
        await host.until([job_id], S.FINISHED)
        settled = await host.settled(job_id)
        # The chain's clock went ahead of the run, all of which is paid for already.
        assert settled.billed_seconds == 0
        assert metric("provider_jobs_total", kind="answer") == 1
        await host.drive(lambda: host.phase(job_id) is Phase.CLOSED)
        earned = {earning.job_id: earning for earning in host.service.table.earned()}[job_id]
        assert (earned.paid, earned.billed_seconds) == (collected.paid, collected.billed_seconds)
        assert collected.paid + collected.fee + settled.refunded == CREDIT


async def test_a_run_is_billed_although_its_provider_was_away(grid: LiveGrid, tmp_path: Path):
    """A provider that was away for longer than the response timeout bills its run all the same."""
    scheduler = grid.contracts.scheduler
    async with bench(grid, tmp_path) as host:
        [job_id] = await host.submit("sleep 1", time_limit=600)
        await host.drive(lambda: host.phase(job_id) is Phase.SUBMITTED)
        await grid.node.increase_time(7)  # since the last answer
        await grid.send(grid.stranger, scheduler.challenge(job_id))
        await grid.node.increase_time(10)
        await until(lambda: scheduler.is_silent(1))
        with pytest.raises(reverts.NotLost):
            await grid.send(grid.stranger, scheduler.panic([job_id]))
        await host.until([job_id], S.FINISHED)
        assert (await host.settled(job_id)).billed_seconds >= 1


async def test_an_orphaned_run_without_a_record_is_ended(grid: LiveGrid, tmp_path: Path):
    """The database is lost and the job cancelled meanwhile: the orphaned run is found and ended."""
    async with bench(grid, tmp_path / "p") as host:
        [job_id] = await host.submit("sleep 50")
        await host.drive(lambda: host.phase(job_id) is Phase.SUBMITTED)
        key = host.row(job_id).key
        (tmp_path / "p" / "provider.db").rename(tmp_path / "lost.db")
        await grid.send(grid.customers[0], grid.contracts.scheduler.cancel([job_id]))
        async with bench(grid, tmp_path / "p", definitions=host.definitions.path) as restarted:
            await restarted.drive(lambda: restarted.phase(job_id) is Phase.CLOSED)
            status = (await restarted.executor.poll([key]))[key]
            assert status.exit is not None
            assert status.exit.reason == "cancelled"


async def test_a_restarted_daemon_adopts_its_run(grid: LiveGrid, tmp_path: Path):
    """After a SIGKILL the daemon adopts the RUNNING job: it runs once and is billed exactly."""
    tally = tmp_path / "tally" / "ran"
    tally.parent.mkdir()
    async with bench(grid, tmp_path / "p") as host:
        [job_id] = await host.submit(f"echo ran >> {tally}; sleep 6")
    daemon = DaemonProcess(grid, tmp_path / "p", definitions=str(host.definitions.path))
    async with daemon:
        await until(tally.exists)
        daemon.kill()
        assert (await host.job(job_id)).status is S.RUNNING
        daemon.start()
        await until(lambda: _reached(host, job_id))
    assert (await host.job(job_id)).status is S.FINISHED
    assert tally.read_text() == "ran\n"
    assert (await host.settled(job_id)).billed_seconds in {6, 7}


async def _reached(host: Bench, job_id: int) -> bool:
    return (await host.job(job_id)).status.is_final


async def _is_over(host: Bench, job_id: int) -> bool:
    key = host.row(job_id).key
    return (await host.executor.poll([key]))[key].exit is not None


async def test_an_idle_provider_sends_two_requests_per_block(
    host: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request for head and nonce, one for everything else of the block."""

    def idle() -> bool:
        """Whether jobs and challenges of earlier tests are settled and their events read."""
        return not host.service.table.open() and bool(host.service._followed_hash)

    await host.drive(idle)
    requests = counted_requests(monkeypatch)
    in_vain = 0
    while in_vain < 3:
        host.service._checked_account_at = (
            None  # include the reads that are not made in every cycle
        )
        await host.grid.node.mine()
        host.service.heads.hint()
        requests.clear()
        assert await host.service.cycle() is False
        assert 0 < len(requests) <= 2, requests
        assert "eth_getLogs" in requests[-1]
        followed_hash = host.service._followed_hash
        requests.clear()
        host.service.heads.hint()
        await host.service.cycle()
        # The chain makes a block by itself every second.
        if host.service._followed_hash == followed_hash:
            assert len(requests) <= 1, requests
            in_vain += 1


async def test_abilities_are_published_and_a_job_in_a_container_runs(
    grid: LiveGrid, tmp_path: Path
) -> None:
    if shutil.which("podman") is None and not os.environ.get("DEEPSQUARE_REQUIRE_REAL"):
        pytest.skip("podman is not installed")
    job = load_job_file(Path(__file__).parents[2] / "examples" / "workflows" / "container.yaml")
    assert job.uses == "ability.container=yes"
    async with bench(grid, tmp_path, publish_abilities=True) as host:
        registry, account = grid.contracts.registry, grid.providers[0].address
        before = await registry.provider_of(account)

        async def is_published() -> bool:
            labels = (await registry.provider_of(account)).labels
            return "ability.container" in labels

        # The job is there before the test of abilities has ended, and waits for it.
        digest = await host.definitions.put(job.definition.to_bytes())
        [job_id] = await host.submit_digests([digest], job.definition.resources)
        await host.drive(is_published, timeout=90)
        labels = (await registry.provider_of(account)).labels
        assert labels["ability.podman"] == "yes"
        assert set(before.labels) <= set(labels)
        assert host.service.details()["abilities"]["enroot"] != ""
        await host.until([job_id])
        assert (await host.job(job_id)).status is S.FINISHED
        assert (await host.result(job_id)).exit_code == 0
