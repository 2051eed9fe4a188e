"""Jobs through a real node to a real Slurm cluster and back: assignment, queue, run, settlement."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import JobRetried
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.devnet.node.base import Node
from deepsquare_chain.job import JobStatus, Resources
from deepsquare_chain.provider.model import Phase
from deepsquare_chain.provider.outputs import find_run, read_output
from tests.support.anvil import start_ticking
from tests.support.livegrid import BorrowedNode, LiveGrid, deploy, live_grid
from tests.support.provider import Bench, bench, definition
from tests.support.slurm import LocalSlurm

S = JobStatus


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalSlurm]:
    local_slurm = LocalSlurm("--min-job-age", "2")
    yield local_slurm
    local_slurm.close()


@pytest.fixture(scope="module")
def ticking(cluster: LocalSlurm, background) -> Iterator[Node]:
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
async def host(grid: LiveGrid, cluster: LocalSlurm, tmp_path: Path) -> AsyncIterator[Bench]:
    executor = cluster.executor(tmp_path, owner=grid.providers[0].address)
    async with bench(grid, tmp_path, executor=executor) as result:
        yield result


async def test_finished_job_of_two_nodes(host: Bench, cluster: LocalSlurm):
    """The job is queued first: billing starts with the run, by the second."""
    blocker = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 60"
    ).strip()
    wide = Resources(tasks=8, cpus_per_task=1, mem_per_cpu=64, gpus=0)
    command = "echo hello $DEEPSQUARE_JOB_ID; srun printenv SLURMD_NODENAME | sort -u; sleep 1"
    [job_id] = await host.submit(command, resources=wide)
    [unwanted] = await host.submit("true", customer=1)
    await host.drive(
        lambda: {host.phase(value) for value in (job_id, unwanted)} == {Phase.SUBMITTED}
    )
    host.service.heads.hint()
    await host.service.cycle()
    assert (await host.job(job_id)).status is S.SCHEDULED
    # A customer's cancel takes a job out of Slurm's queue, and costs it nothing.
    cancel = host.grid.contracts.scheduler.cancel([unwanted])
    await host.grid.send(host.grid.customers[1], cancel)
    await host.drive(lambda: host.phase(unwanted) is Phase.CLOSED)
    assert (await host.job(unwanted)).status is S.CANCELLED
    name = f"--name=deepsquare-{host.row(unwanted).key}"
    assert cluster.run("squeue", "-h", "-o", "%i", name) == ""
    deployment = host.grid.deployment
    comment = cluster.run("squeue", "-h", "-o", "%k", f"--name=deepsquare-{host.row(job_id).key}")
    assert comment.split() == [
        "deepsquare",
        f"chain={deployment.chain_id}",
        f"contract={deployment.scheduler}",
        f"job={job_id}",
        f"provider={host.account.address.lower()}",
    ]
    cluster.run("scancel", blocker)

    await host.until([job_id])
    assert (await host.job(job_id)).status is S.FINISHED
    output = "\n".join([f"hello {job_id}", *cluster.nodes, ""]).encode()
    result = await host.result(job_id)
    assert (result.exit_code, result.reason) == (0, "")
    assert result.result == hashlib.sha256(output).digest()
    assert 1 <= (await host.settled(job_id)).billed_seconds <= 5
    folder = find_run(host.folder, deployment.chain_id, deployment.scheduler, job_id)
    assert folder is not None
    assert read_output(folder).data == output


async def test_every_final_status_and_its_bill(host: Bench, cluster: LocalSlurm):
    """Each end of a Slurm job gives the right final status, reason and bill.

    What Slurm refuses goes back to the queue of the grid, and can still be cancelled there.
    """
    # More CPUs on one node than a node has.
    [refused_job] = await host.submit("true", resources=Resources(1, 5, 64, 0))
    await host.until([refused_job], S.PENDING)
    assert "rejected run" in host.row(refused_job).note
    memory_hog = "python3 -c 'b = bytearray(300 << 20); import time; time.sleep(9)'"
    exit_3_job, memory_job = await host.submit("sleep 1; exit 3", memory_hog)
    [overtime_job] = await host.submit("sleep 60", time_limit=5)
    [longer] = await host.submit("sleep 63", time_limit=20)
    [stopped] = await host.submit("sleep 61", customer=1)
    [lost_job] = await host.submit("sleep 62", retries=1)
    ids = [exit_3_job, memory_job, overtime_job, longer, stopped, lost_job]
    scheduler = host.grid.contracts.scheduler

    async def are_running() -> bool:
        jobs = await scheduler.get_jobs([longer, stopped, lost_job])
        return all(job.status is S.RUNNING for job in jobs)

    await host.drive(are_running)
    job = await host.job(longer)
    paid = scheduler.top_up(longer, job.customer, job.rate * 60)
    await host.grid.send(host.grid.customers[0], paid)
    await host.drive(lambda: host.row(longer).allotment == 80)
    limit = ["squeue", "-h", "-o", "%l", f"--name=deepsquare-{host.row(longer).key}"]
    assert cluster.run(*limit).strip() == "4:00"  # 80 seconds, and the margin of Slurm's own limit
    await host.grid.send(host.grid.customers[0], scheduler.cancel([longer]))
    await host.grid.send(host.grid.customers[1], scheduler.cancel([stopped]))
    # An administrator ends a job: the provider's loss.
    name = f"--name=deepsquare-{host.row(lost_job).key}"
    cluster.run("scancel", *cluster.run("squeue", "-h", "-o", "%i", name).split())
    await host.drive(lambda: all(host.phase(job_id) is Phase.CLOSED for job_id in ids), timeout=60)

    statuses = {job_id: (await host.job(job_id)).status for job_id in ids}
    assert statuses == {
        exit_3_job: S.FAILED,
        memory_job: S.FAILED,
        overtime_job: S.OUT_OF_CREDITS,
        longer: S.CANCELLED,
        stopped: S.CANCELLED,
        lost_job: S.PANICKED,
    }
    results = {value: await host.result(value) for value in (exit_3_job, memory_job, overtime_job)}
    assert (results[exit_3_job].exit_code, results[exit_3_job].reason) == (3, "exited with code 3")
    if cluster.has_cgroups:
        assert results[memory_job].reason == "memory limit of 64 MB exceeded"
    assert results[overtime_job].reason == "time limit reached"
    assert (await host.settled(overtime_job)).billed_seconds == 5
    [retried] = await host.events(JobRetried, lost_job)
    successor = await host.job(retried.successor)
    assert (successor.status, successor.escrow) == (S.PENDING, CREDIT)
    await host.grid.send(host.grid.customers[0], scheduler.cancel([retried.successor]))


async def test_offer_follows_the_capacity_left_free_by_the_clusters_own_users(
    grid: LiveGrid, cluster: LocalSlurm, tmp_path: Path
):
    account = grid.providers[0]
    executor = cluster.executor(tmp_path, owner=account.address)
    registry = grid.contracts.registry
    before = (await registry.provider_of(account.address)).offer
    async with bench(grid, tmp_path, executor=executor, follow_offer=True) as host:
        host.service._offer._interval = 0.5

        def offers(cpus: int) -> Callable[[], Awaitable[bool]]:
            async def check() -> bool:
                return (await registry.provider_of(account.address)).offer.cpus == cpus

            return check

        await host.drive(offers(8))
        local = cluster.run(
            "sbatch", "--parsable", "--ntasks=4", "--output=/dev/null", "--wrap=sleep 60"
        ).strip()
        await host.drive(offers(4))
        # Capacity used by the grid's own jobs counts as offered.
        [job_id] = await host.submit("sleep 60", resources=Resources(2, 1, 64, 0))
        await host.until([job_id], S.RUNNING)
        cluster.run("scancel", local)
        await host.drive(offers(8))
        await grid.send(grid.customers[0], grid.contracts.scheduler.cancel([job_id]))
        await host.until([job_id])
    await grid.send(account, registry.set_offer(before))


async def test_cluster_that_loses_a_node_and_its_controller(
    grid: LiveGrid, cluster: LocalSlurm, tmp_path: Path
):
    """A failed node costs the provider; a failed controller is retried, and a forgotten end is recovered.

    Meanwhile the provider is drained: what runs and what waits in Slurm's queue goes on.
    """
    first, second = (
        cluster.executor(
            tmp_path / f"p{number}", owner=grid.providers[number].address, command_timeout=3
        )
        for number in range(2)
    )
    async with (
        bench(grid, tmp_path / "p0", executor=first) as host,
        bench(grid, tmp_path / "p1", 1, executor=second) as other,
    ):
        whole = Resources(tasks=1, cpus_per_task=4, mem_per_cpu=64, gpus=0)
        await other.definitions.put(definition("hostname; sleep 20", whole).to_bytes())
        [lost_job] = await host.submit("hostname; sleep 20", resources=whole, retries=1)
        await host.until([lost_job], S.RUNNING)
        [steady] = await host.submit("sleep 13")
        await host.until([steady], S.RUNNING)
        whole_cluster = Resources(tasks=2, cpus_per_task=4, mem_per_cpu=64, gpus=0)
        [queued] = await host.submit("echo late", resources=whole_cluster)
        await host.drive(lambda: host.phase(queued) is Phase.SUBMITTED)
        [untouched] = await host.submit("true")
        host.service.drain(True)
        await host.until([untouched], S.PENDING)

        name = f"--name=deepsquare-{host.row(lost_job).key}"
        node = cluster.run("squeue", "-h", "-o", "%N", name).strip()
        cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        try:
            await host.until([lost_job], S.PANICKED)
            [retried] = await host.events(JobRetried, lost_job)
            assert retried.escrow == CREDIT
        finally:
            cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        await other.assign([retried.successor])
        await other.until([retried.successor], S.RUNNING)
        cancel = grid.contracts.scheduler.cancel([retried.successor])
        await grid.send(grid.customers[0], cancel)
        await other.until([retried.successor], S.CANCELLED)

        cluster.script("stop", "slurmctld")
        try:
            host.service.heads.hint()
            await host.service.cycle()
            assert (await host.job(steady)).status is S.RUNNING
        finally:
            cluster.script("start", "slurmctld")
        forget = [f"--name=deepsquare-{host.row(steady).key}", "--states=all"]
        deadline = time.monotonic() + 120
        while cluster.run("squeue", "-h", "-o", "%i", *forget):
            assert time.monotonic() < deadline, "Slurm still knows the job"
            await asyncio.sleep(0.2)
        await host.until([steady, queued], timeout=60)
        assert {(await host.job(value)).status for value in (steady, queued)} == {S.FINISHED}
        assert 13 <= (await host.settled(steady)).billed_seconds <= 15
        host.service.drain(False)
        await host.drive(lambda: not host.service.details()["draining"])
    await grid.send(grid.customers[0], grid.contracts.scheduler.cancel([untouched]))


async def test_two_grids_of_two_clusters_do_not_meet(
    ticking: Node, host: Bench, tmp_path: Path, cluster: LocalSlurm
):
    """Two grids share accounts, job ids and cluster users; only the contract in a job's name differs."""
    node = BorrowedNode(ticking.url, ticking.chain_id)
    async with node, live_grid(node, await deploy(node)) as grid:
        second = LocalSlurm("--nodes", "1", "--gpus", "0")
        try:
            executor = second.executor(tmp_path / "second", owner=grid.providers[0].address)
            async with bench(grid, tmp_path / "second", executor=executor) as other:
                [first_job] = await host.submit("cat /proc/sys/kernel/random/uuid; sleep 2")
                [second_job] = await other.submit("cat /proc/sys/kernel/random/uuid; sleep 2")
                # Neither daemon finds jobs of the other grid in the cluster.
                await host.until([first_job], S.RUNNING)
                await other.until([second_job], S.RUNNING)
                assert host.row(first_job).key != other.row(second_job).key
                assert f"deepsquare-{other.row(second_job).key}" not in cluster.run(
                    "squeue", "-h", "-o", "%j"
                )
                assert f"deepsquare-{host.row(first_job).key}" not in second.run(
                    "squeue", "-h", "-o", "%j"
                )
                await host.until([first_job], S.FINISHED)
                await other.until([second_job], S.FINISHED)
                assert (await host.result(first_job)).result != (
                    await other.result(second_job)
                ).result
        finally:
            second.close()
