"""The Slurm executor with a real cluster of two nodes on this machine."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from structlog.testing import capture_logs

from deepsquare_chain.executors import launch
from deepsquare_chain.executors.base import (
    ExecutorContext,
    ExecutorUnavailableError,
    Exit,
    RunRefusedError,
    RunSpec,
    RunState,
)
from deepsquare_chain.executors.slurm import SlurmExecutor
from deepsquare_chain.executors.slurm import executor as module
from deepsquare_chain.executors.slurm.executor import WRAPPER, examine
from deepsquare_chain.executors.slurm.records import SlurmFolder
from deepsquare_chain.job import Offer, Resources
from tests.support.isolation import require_sandbox
from tests.support.slurm import LocalSlurm, require_slurm

ONE = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=50, gpus=0)
SOURCE = Path(module.__file__)
T = TypeVar("T")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalSlurm]:
    """A cluster that forgets ended jobs after two seconds."""
    require_slurm("slurmdbd", "mariadbd")
    local_slurm = LocalSlurm("--min-job-age", "2", "--jobcomp", "--accounting")
    yield local_slurm
    local_slurm.close()


@pytest.fixture
async def state(cluster: LocalSlurm, tmp_path: Path) -> AsyncIterator[Path]:
    """A state folder; runs that a failed test leaves are ended, so that the cluster is free."""
    yield tmp_path / "state"
    for job in cluster.run("squeue", "-h", "-o", "%i").split():
        # The run may end between the two calls.
        with suppress(AssertionError):
            cluster.run("scancel", "--signal=KILL", "--full", job)

    async def is_empty() -> bool:
        return not cluster.run("squeue", "-h", "-o", "%i")

    await until(is_empty)


@pytest.fixture
def executor(cluster: LocalSlurm, state: Path) -> SlurmExecutor:
    return cluster.executor(state)


def make(key: str, script: str, **changes: Any) -> RunSpec:
    values = {"resources": ONE, "walltime": 60, "env": {}, **changes}
    return RunSpec(key=key, script=script.encode(), **values)


async def until(look: Callable[[], Awaitable[T]], seconds: float = 420.0) -> T:
    deadline = time.monotonic() + seconds
    while not (outcome := await look()):
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.1)
    return outcome


async def state_of(executor: SlurmExecutor, key: str) -> RunState:
    return (await executor.poll([key]))[key].state


async def reached(executor: SlurmExecutor, key: str, state: RunState) -> None:
    async def look() -> bool:
        return await state_of(executor, key) is state

    await until(look)


async def running(executor: SlurmExecutor, key: str) -> None:
    """Wait until the script itself has printed something."""

    async def look() -> bool:
        return await state_of(executor, key) is RunState.RUNNING and bool(
            await executor.output(key)
        )

    await until(look)


async def ended(executor: SlurmExecutor, key: str) -> Exit:
    async def look() -> Exit | None:
        return (await executor.poll([key]))[key].exit

    result = await until(look)
    assert result is not None
    return result


def ids(cluster: LocalSlurm, key: str) -> list[str]:
    """Return the Slurm jobs of a run that the controller still has."""
    name = f"--name=deepsquare-{key}"
    return cluster.run("squeue", "-h", "--states=all", name, "-o", "%i").split()


async def forgotten(cluster: LocalSlurm, key: str) -> None:
    async def look() -> bool:
        return not ids(cluster, key)

    await until(look)


# -- the queue


async def test_queued_runs_wait_and_can_be_cancelled(
    cluster: LocalSlurm, executor: SlurmExecutor, state: Path, tmp_path: Path
) -> None:
    whole_cluster = Resources(tasks=2, cpus_per_task=4, mem_per_cpu=100, gpus=2)
    comment = "deepsquare chain=31337 contract=0x5fbd job=1"
    gpus = 'echo "$SLURM_GPUS $SLURM_JOB_NUM_NODES"; sleep 60'
    await executor.submit(make("all", gpus, resources=whole_cluster, comment=comment))
    await running(executor, "all")
    assert await executor.output("all") == b"2 2\n"
    assert await executor.capacity() == Offer(cpus=0, memory=2 * 2048 - 800, gpus=0)
    job_details = cluster.run("scontrol", "-o", "show", "job", *ids(cluster, "all"))
    assert "JobName=deepsquare-all " in job_details
    assert f"Comment={comment} " in job_details
    assert "Requeue=0" in job_details

    await executor.submit(make("next", f"touch {tmp_path}/ran"))
    assert await state_of(executor, "next") is RunState.QUEUED
    start = time.monotonic()
    await executor.cancel("next")
    assert time.monotonic() - start < 30, "it waited for the job that runs"
    end = await ended(executor, "next")
    assert (end.reason, end.seconds) == ("cancelled", 0)
    await executor.cancel("all")
    assert (await ended(executor, "all")).reason == "cancelled"
    assert not (tmp_path / "ran").exists()


async def test_what_slurm_can_not_run_is_refused_or_given_back(
    cluster: LocalSlurm, executor: SlurmExecutor, state: Path
) -> None:
    for key, resources in {
        "cpus": Resources(1, 5, 10, 0),
        "memory": Resources(1, 1, 4096, 0),
        "gpus": Resources(1, 1, 10, 9),
    }.items():
        with pytest.raises(RunRefusedError, match="Slurm rejected run"):
            await executor.submit(make(key, "true", resources=resources))
        assert await executor.find(key) is None
    with pytest.raises(RunRefusedError, match="nvalid partition"):
        await cluster.executor(state, partitions="none").submit(make("where", "true"))
    short = cluster.executor(state, partitions="short", extra="--nice=5")
    await short.submit(make("long", "true", walltime=3600))
    end = await ended(short, "long")
    assert (end.reason, end.seconds) == ("cancelled", 0)


async def test_providers_of_one_cluster_do_not_meet(
    cluster: LocalSlurm, state: Path, tmp_path: Path
) -> None:
    first = cluster.executor(tmp_path / "first", owner="0xAA")
    second = cluster.executor(tmp_path / "second", owner="0xBB")
    await first.submit(make("same", "echo first; sleep 60"))
    assert await second.find("same") is None
    await second.submit(make("same", "echo second; sleep 60"))
    await running(first, "same")
    await running(second, "same")
    await first.cancel("same")
    assert await state_of(second, "same") is RunState.RUNNING
    assert await second.output("same") == b"second\n"
    # The folder was lost; the job is identified by its name.
    (tmp_path / "second").rename(tmp_path / "lost")
    restarted = cluster.executor(tmp_path / "second", owner="0xbb")
    assert await restarted.find("same") == "same"
    assert await restarted.submit(make("same", "echo third")) == "same"
    assert len(ids(cluster, "same")) == 2
    await restarted.cancel("same")
    assert (await ended(restarted, "same")).reason == "cancelled"


# -- one run, whatever fails


async def test_controller_restarted_mid_job(
    cluster: LocalSlurm, executor: SlurmExecutor, state: Path, tmp_path: Path
) -> None:
    await executor.submit(make("steady", f"echo up; sleep 6; echo ran >> {tmp_path}/tally; exit 5"))
    await running(executor, "steady")
    cluster.script("stop", "slurmctld")
    try:
        short_timeout = cluster.executor(state, command_timeout=1)
        for call in (
            short_timeout.poll(["steady"]),
            short_timeout.submit(make("later", "true")),
            short_timeout.cancel("steady"),
            short_timeout.capacity(),
        ):
            with pytest.raises(ExecutorUnavailableError):
                await call
    finally:
        cluster.script("start", "slurmctld")
    end = await ended(executor, "steady")
    assert (end.code, end.reason) == (5, "exited")
    assert 6 <= end.seconds <= 9
    assert (tmp_path / "tally").read_text() == "ran\n"


def slurm_with(folder: Path, sbatch: str, **others: str) -> Path:
    """Return a folder with Slurm's commands, some of them replaced or extended by a script."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel", "sinfo", "sacct"):
        before = others.get(name, sbatch if name == "sbatch" else "")
        (folder / name).write_text(f'#!/bin/bash\n{before}\nexec /usr/bin/{name} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


async def test_unclear_sbatch_is_adopted_and_never_repeated(
    cluster: LocalSlurm, executor: SlurmExecutor, state: Path, tmp_path: Path
) -> None:
    script = f"echo ran >> {tmp_path}/tally"
    slow = slurm_with(tmp_path / "slow", '/usr/bin/sbatch "$@"; sleep 30')
    short_timeout = cluster.executor(state, bin_dir=str(slow), command_timeout=1)
    assert (
        await short_timeout.submit(make("late", script)) == "late"
    )  # it timed out after it had been carried out
    assert (await ended(executor, "late")).code == 0

    # sbatch dies, but its request arrives a moment later.
    request = (
        """setsid bash -c 'sleep 2; exec /usr/bin/sbatch "$@"' _ "$@" >/dev/null 2>&1 & exit 1"""
    )
    lost_response = slurm_with(tmp_path / "lost", request)
    unlucky = cluster.executor(state, bin_dir=str(lost_response))
    spec = make("lost", script)
    with pytest.raises(ExecutorUnavailableError):
        await unlucky.submit(spec)
    with pytest.raises(ExecutorUnavailableError, match="not clear yet"):
        await executor.submit(spec)

    async def is_found() -> bool:
        with suppress(ExecutorUnavailableError):
            return await executor.find("lost") == "lost"
        return False

    await until(is_found)
    assert await executor.submit(spec) == "lost"
    assert (await ended(executor, "lost")).code == 0

    # Nothing arrived: when that is settled, it is submitted again.
    vain = slurm_with(
        tmp_path / "vain", "echo 'Socket timed out on send/recv operation' >&2; exit 1"
    )
    spec = make("vain", script)
    with pytest.raises(ExecutorUnavailableError, match="Socket timed out"):
        await cluster.executor(state, bin_dir=str(vain)).submit(spec)
    restarted = cluster.executor(state, settle=0)
    assert await restarted.find("vain") is None
    await restarted.submit(spec)
    assert (await ended(executor, "vain")).code == 0
    assert (tmp_path / "tally").read_text() == "ran\n" * 3


KILLED = """
import asyncio, sys
from pathlib import Path
from deepsquare_chain.executors.base import RunSpec
from deepsquare_chain.executors.slurm import SlurmExecutor
from deepsquare_chain.executors.slurm.options import parse_options
from deepsquare_chain.job import Resources
state, conf, key, script = sys.argv[1:]
executor = SlurmExecutor(Path(state), parse_options({"conf": conf, "isolation": "none"}))
spec = RunSpec(key, script.encode(), Resources(1, 1, 50, 0), 60, {})
asyncio.run(executor.submit(spec))
"""
LABELS = sorted(set(re.findall(r'crash_point\("(executor\.slurm\.\w+)"\)', SOURCE.read_text())))


async def test_daemon_killed_at_every_label_of_a_submission(
    cluster: LocalSlurm, executor: SlurmExecutor, state: Path, tmp_path: Path
) -> None:
    script = f"echo ran >> {tmp_path}/$DEEPSQUARE_KEY"

    async def killed(label: str) -> None:
        key = label.replace(".", "-")
        env = {**os.environ, "DEEPSQUARE_CRASH_AT": label}
        text = f"DEEPSQUARE_KEY={key}\n{script}"
        arguments = [sys.executable, "-c", KILLED, str(state), str(cluster.conf), key, text]
        process = await asyncio.create_subprocess_exec(*arguments, env=env)
        assert await process.wait() == -signal.SIGKILL
        restarted = cluster.executor(state, settle=0)
        await restarted.submit(make(key, text))
        # Nothing has started: only the queue shows what was submitted.
        assert len(ids(cluster, key)) == 1
        assert await state_of(restarted, key) is RunState.QUEUED

    assert len(LABELS) >= 4
    # The whole cluster is occupied, so submitted jobs wait.
    wide = ("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    blocker = cluster.run("sbatch", "--parsable", *wide).strip()
    await asyncio.gather(*(killed(label) for label in LABELS))
    cluster.run("scancel", blocker)
    for label in LABELS:
        key = label.replace(".", "-")
        assert (await ended(executor, key)).code == 0
        assert (tmp_path / key).read_text() == "ran\n"


async def test_two_jobs_of_one_name_are_reported(
    cluster: LocalSlurm, executor: SlurmExecutor, state: Path, tmp_path: Path
) -> None:
    await executor.submit(make("twin", f"echo ran >> {tmp_path}/tally; echo up; sleep 60"))
    await running(executor, "twin")
    wrapper, folder = str(WRAPPER), str(state / "runs/twin")
    name = "--job-name=deepsquare-twin"
    duplicate_id = cluster.run(
        "sbatch", "--parsable", name, "--output=/dev/null", wrapper, folder
    ).strip()
    await asyncio.sleep(0.2)
    with capture_logs() as logs:
        assert await state_of(executor, "twin") is RunState.UNKNOWN
        assert await state_of(executor, "twin") is RunState.UNKNOWN
    alarms = [line for line in logs if line["log_level"] == "error"]
    assert [(line["run"], duplicate_id in line["slurm_jobs"]) for line in alarms] == [
        ("twin", True)
    ]
    fresh = cluster.executor(state)
    with capture_logs() as logs:
        assert await state_of(fresh, "twin") is RunState.UNKNOWN
    # The wrapper lets only the first job run the script; Slurm soon forgets the other.
    await reached(executor, "twin", RunState.RUNNING)
    assert (tmp_path / "tally").read_text() == "ran\n"
    await executor.cancel("twin")
    assert (await ended(executor, "twin")).reason == "cancelled"


# -- how runs end


async def test_ends_that_slurm_has_forgotten(
    cluster: LocalSlurm, executor: SlurmExecutor, state: Path
) -> None:
    await executor.submit(make("done", "echo said; sleep 1.2; exit 6"))
    for key in ("taken", "known", "booked"):
        await executor.submit(make(key, "echo up; sleep 60"))
    for key in ("taken", "known", "booked"):
        await running(executor, key)
        cluster.run("scancel", "--signal=KILL", "--full", *ids(cluster, key))
    for key in ("done", "taken", "known", "booked"):
        await forgotten(cluster, key)
    later = cluster.executor(state)
    [finished_run] = (await later.poll(["done"])).values()
    assert finished_run.exit is not None
    assert (finished_run.exit.code, finished_run.exit.reason, finished_run.exit.seconds) == (
        6,
        "exited",
        2,
    )
    # There is no record of its end. Unknown is not gone: it counts as lost only after a while.
    assert await state_of(later, "taken") is RunState.UNKNOWN
    assert (await ended(later, "taken")).reason == "lost"
    assert (await ended(cluster.executor(state), "taken")).reason == "lost"
    # The file of completed jobs has the end, as does slurmdbd, which this cluster uses.
    # It also shows that the job's own user ended it, which a job can do itself.
    for key, accounting, reason in (
        ("known", "completion", "cancelled"),
        ("booked", "auto", "signalled"),
    ):
        end = await ended(cluster.executor(state, accounting=accounting, missing=600), key)
        assert end.reason == reason
        assert end.seconds >= 1


async def test_node_failure_is_lost_and_not_repeated(
    cluster: LocalSlurm, executor: SlurmExecutor, state: Path, tmp_path: Path
) -> None:
    await executor.submit(make("node", f"echo up; echo ran >> {tmp_path}/tally; sleep 60"))
    await running(executor, "node")
    node = cluster.run("squeue", "-h", "-o", "%N", "--name=deepsquare-node").strip()
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        free = await executor.capacity()
        assert free.cpus == 4
        end = await ended(executor, "node")
    finally:
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert end.reason == "lost"
    assert (tmp_path / "tally").read_text() == "ran\n"


async def test_run_that_stops_its_wrapper_gains_no_time(
    cluster: LocalSlurm, executor: SlurmExecutor, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_OVERDUE", 2.0)
    stop = "kill -STOP $(ps -o ppid= $PPID); echo up; sleep 60"
    await executor.submit(make("stopper", stop, walltime=1))
    kill = "kill -KILL $(ps -o ppid= $PPID); echo up; sleep 60"
    await executor.submit(make("killer", kill))
    killer, stopper = await asyncio.gather(ended(executor, "killer"), ended(executor, "stopper"))
    assert stopper.reason == "walltime"
    assert (killer.code, killer.reason) == (137, "signalled")


async def test_top_up_where_the_daemon_may_not_raise_limits(
    cluster: LocalSlurm, state: Path, tmp_path: Path
) -> None:
    denied = """
    if [[ $1 == update ]]; then
        echo "slurm_update error: Access/permission denied" >&2
        exit 1
    fi
    """
    ordinary = str(slurm_with(tmp_path / "ordinary", "", scontrol=denied))
    modest = cluster.executor(state, bin_dir=ordinary, limit_headroom=600)
    await modest.submit(make("longer", "echo up; sleep 5; echo done", walltime=3))
    strict = cluster.executor(state, bin_dir=ordinary, limit_headroom=0)
    await strict.submit(make("tight", "echo up; sleep 60", walltime=3))
    await running(modest, "longer")
    limits = cluster.run("squeue", "-h", "--states=running", "-o", "%j %l").split()
    assert limits[limits.index("deepsquare-longer") + 1] == "13:00"
    await modest.extend("longer", 400)
    with pytest.raises(RunRefusedError, match="did not raise the limit"):
        await strict.extend("tight", 400)
    assert (await ended(modest, "longer")).reason == "exited"
    assert (await ended(strict, "tight")).reason == "walltime"
    # Headroom never exceeds the limit of a partition.
    short = cluster.executor(state, partitions="short", limit_headroom=86_400)
    await short.submit(make("short", "echo up"))
    assert cluster.run("squeue", "-h", "--states=all", "-o", "%l", "--name=deepsquare-short") == (
        "10:00\n"
    )
    await ended(short, "short")


async def test_second_cluster_which_has_no_cgroups(executor: SlurmExecutor, tmp_path: Path) -> None:
    second = LocalSlurm("--no-cgroup", "--nodes", "1", "--gpus", "0")
    try:
        # Two grids, each with a cluster, do not meet even where their jobs have the same names.
        await executor.submit(make("left", "echo first"))
        first_executor, executor = executor, second.executor(tmp_path / "second")
        assert await executor.find("left") is None
        leftover = tmp_path / "left"
        loop = f"while :; do echo >> {leftover}; sleep 0.2; done"
        await executor.submit(make("left", f"setsid bash -c '{loop}' & sleep 1"))
        memory_holder = "python3 -c 'b = bytearray(300 << 20); import time; time.sleep(20)'"
        await executor.submit(make("big", memory_holder))
        assert (await ended(executor, "left")).reason == "exited"
        size = leftover.stat().st_size
        # Slurm calls it a failed launch, and does not say that memory was the cause.
        assert (await ended(executor, "big")).reason == "signalled"
        await asyncio.sleep(0.6)
        assert leftover.stat().st_size == size > 0
        assert (await ended(first_executor, "left")).reason == "exited"
        assert await first_executor.output("left") == b"first\n"
    finally:
        second.close()


MPI = """
#include <mpi.h>
#include <stdio.h>
int main(int count, char **words) {
    int rank, size, sum;
    MPI_Init(&count, &words);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Allreduce(&rank, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    printf("rank %d of %d: %d\\n", rank, size, sum);
    return MPI_Finalize();
}
"""


def test_wrapper_ends_remaining_processes_but_none_of_another_cluster(tmp_path: Path) -> None:
    """Two clusters on one machine give their jobs the same numbers."""
    spec = make("left", "setsid sleep 61 & echo $!")
    folder = SlurmFolder(launch.make_run(tmp_path, spec).path)
    folder.set_environment(spec.env)
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    with subprocess.Popen(["/bin/bash", "-c", "sleep 62; true"], env=env) as neighbour:
        try:
            command = ["/bin/bash", str(WRAPPER), str(folder.path)]
            subprocess.run(command, check=True, env=env, timeout=30)
            remaining_pid = int((folder.path / "output").read_text())
            zombie = psutil.STATUS_ZOMBIE
            assert (
                not psutil.pid_exists(remaining_pid)
                or psutil.Process(remaining_pid).status() == zombie
            )
            with pytest.raises(subprocess.TimeoutExpired):
                neighbour.wait(0.3)  # it would end with its sleep
        finally:
            for process in psutil.Process(neighbour.pid).children():
                process.kill()


def compiled(compiler: str, folder: Path) -> Path:
    require_slurm(compiler)
    (folder / "sum.c").write_text(MPI)
    build = [compiler, "-o", str(folder / "sum"), str(folder / "sum.c")]
    subprocess.run(build, check=True, timeout=60)
    return folder / "sum"


@pytest.mark.parametrize(
    ("build", "interface", "attempts"), [("mpich", "pmi2", 10), ("openmpi", "pmix", 1)]
)
async def test_mpi_program_on_two_nodes(
    cluster: LocalSlurm, state: Path, tmp_path: Path, build: str, interface: str, attempts: int
) -> None:
    """Each task has its own sandbox, with a network to the other tasks.

    MPICH 4.0.2 over TCP hangs in MPI_Finalize in a quarter of all runs: a rank waits there for others
    that no longer answer. Such a step is ended, and tried again.
    """
    require_sandbox()
    (tmp_path / "programs").mkdir()
    program = compiled(f"mpicc.{build}", tmp_path / "programs")
    executor = cluster.executor(
        state, isolation="sandbox", network=True, readable=str(program.parent)
    )
    script = f"""
        export MINE=shared
        for attempt in {{1..{attempts}}}; do
            if timeout 30 srun --mpi={interface} {program} >ranks 2>ranks.err; then break; fi
        done
        cat ranks
        srun printenv MINE SLURMD_NODENAME
    """
    wide = Resources(tasks=4, cpus_per_task=2, mem_per_cpu=100, gpus=0)
    # Waiting ranks spin, which takes its time on a busy machine.
    await executor.submit(make(f"mpi-{build}", script, resources=wide, walltime=400))
    end = await ended(executor, f"mpi-{build}")
    lines = (await executor.output(f"mpi-{build}")).decode().splitlines()
    assert end.code == 0, lines
    assert sorted(lines[:4]) == [f"rank {rank} of 4: 6" for rank in range(4)]
    assert {line for line in lines[4:] if line != "shared"} == set(cluster.nodes)
    assert lines.count("shared") == 4


def test_concurrent_tasks_share_one_folder_of_shared_memory(tmp_path: Path) -> None:
    """A task that ends removes the folder only if no other has locked it."""
    source = WRAPPER.read_text()
    functions = [
        re.search(rf"^{name}\(\) \{{.*?^\}}.*?$", source, re.MULTILINE | re.DOTALL)
        for name in ("join_memory", "leave_memory")
    ]
    task = """
        task() {
            local memory=""
            join_memory
            [[ -n $memory && /proc/self/fd/8 -ef $memory ]] && echo locked || echo lost
            exec 8<&-
            leave_memory "$memory"
        }
        for round in {1..40}; do
            for number in 1 2 3 4; do task & done
            wait
        done
    """
    script = "\n".join([*(function[0] for function in functions if function), task])
    env = {"PATH": "/usr/bin:/bin", "folder": str(tmp_path), "JOB": str(os.getpid())}
    result = subprocess.run(
        ["/bin/bash", "-c", script],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert (result.stdout.split(), result.stderr) == (["locked"] * 160, "")


async def test_nodes_that_do_not_see_the_folder_stop_attracting_jobs(
    executor: SlurmExecutor, state: Path
) -> None:
    await executor.submit(make("gone", "true"))
    (state / "runs/gone/work").rename(state / "elsewhere")
    end = await ended(executor, "gone")
    assert (end.reason, end.seconds) == ("unstarted", 0)
    assert "could not start the last job" in await executor.fault()


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"constraint": "nope"}, "Invalid feature"), ({"extra": "--nonsense"}, "unrecognized option")],
    ids=["constraint", "extra"],
)
async def test_options_with_which_slurm_rejects_every_job_attract_none(
    cluster: LocalSlurm, tmp_path: Path, options: dict[str, str], reason: str
) -> None:
    executor = cluster.executor(tmp_path, **options)
    with capture_logs() as logs:
        fault = await executor.fault()
        assert await executor.fault() == fault
    assert "check executor_options" in fault
    assert reason in fault
    assert [entry["reason"] for entry in logs] == [fault]
    context = ExecutorContext(
        tmp_path, Offer(1, 1, 0), options={"conf": str(cluster.conf), **options}
    )
    [check] = [item for item in await examine(context) if item.name == "submission"]
    assert (check.ok, check.setting) == (False, "executor_options")
    assert reason in check.text


async def test_a_job_that_slurm_rejects_is_no_fault_of_the_options(
    cluster: LocalSlurm, tmp_path: Path
) -> None:
    executor = cluster.executor(tmp_path)
    with pytest.raises(RunRefusedError):
        await executor.submit(make("huge", "true", resources=Resources(1, 5, 10, 0)))
    assert await executor.fault() == ""


async def test_partition_that_does_not_exist_is_named(cluster: LocalSlurm, tmp_path: Path) -> None:
    options = {"conf": str(cluster.conf), "partitions": "nope"}
    checks = await examine(ExecutorContext(tmp_path, Offer(1, 1, 0), options=options))
    assert (checks[0].ok, checks[0].setting) == (False, "executor_options.partitions")
    assert "no nodes in nope" in checks[0].text
    assert "nope" in await cluster.executor(tmp_path, partitions="nope").fault()


async def test_cluster_without_a_node_in_service_attracts_no_jobs(
    cluster: LocalSlurm, state: Path
) -> None:
    executor = cluster.executor(state, partitions="short")
    assert await executor.fault() == ""
    node = f"NodeName={cluster.nodes[0]}"
    cluster.run("scontrol", "update", node, "State=DRAIN", "Reason=test")
    try:
        await asyncio.sleep(0.2)
        assert await executor.fault() == "no node of partition short is in service"
        assert (await executor.capacity()).cpus == 0
    finally:
        cluster.run("scontrol", "update", node, "State=RESUME")


@pytest.fixture
def reachable(cluster: LocalSlurm) -> Path:
    """A state folder that every user may pass through."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user without sudo")
    path = Path(tempfile.mkdtemp(prefix="state-", dir=cluster.folder))
    path.chmod(0o711)
    return path


@pytest.mark.parametrize("isolation", ["sandbox", "none"])
async def test_jobs_run_as_another_user(
    cluster: LocalSlurm, reachable: Path, isolation: str
) -> None:
    """A user who owns neither the daemon's nor the run's files, and can close files to the daemon."""
    require_sandbox()
    state, mapped, endless = reachable, f"mapped-{isolation}", f"endless-{isolation}"
    wallet = state / "wallet.json"
    wallet.write_text("secret")
    wallet.chmod(0o600)
    executor = cluster.executor(state, user="nobody", isolation=isolation)
    script = f"id -un; cat {wallet}; mkdir -m 700 closed; touch closed/x; srun -n1 id -un; exit 4"
    await executor.submit(make(mapped, script))
    end = await ended(executor, mapped)
    output = (await executor.output(mapped)).decode()
    assert (end.code, end.reason) == (4, "exited"), output
    assert output.split().count("nobody") == 2
    assert "secret" not in output
    await executor.submit(make(endless, "echo up; sleep 60"))
    await running(executor, endless)
    await executor.extend(endless, 120)
    await executor.cancel(endless)
    assert (await ended(executor, endless)).reason == "cancelled"
    await executor.forget(mapped)
    assert not list((state / "runs").glob(f"*{mapped}*"))
    if isolation == "sandbox":
        limited = cluster.executor(state, user="nobody", isolation=isolation, disk=20)
        script = "mkdir -m 300 hidden; head -c 16M /dev/zero > hidden/a; "
        script += "head -c 16M /dev/zero > hidden/c; sleep 55"
        await limited.submit(make("hidden", script))
        assert (await ended(limited, "hidden")).reason == "disk"

    options = {"conf": str(cluster.conf), "user": "nobody"}
    context = ExecutorContext(state, Offer(1, 1, 0), options=options, private=(wallet,))
    assert {check.ok for check in await examine(context) if check.name == "user of the jobs"} == {
        True
    }
    wallet.chmod(0o644)
    [check] = [item for item in await examine(context) if item.name == "user of the jobs"]
    assert (check.ok, check.text) == (False, f"nobody can read {wallet}")
    os.chmod(state, 0o700)
    [check] = [item for item in await examine(context) if item.name == "user of the jobs"]
    assert (check.ok, check.setting) == (False, "executor_options.run_dir")


def test_an_ended_cluster_leaves_no_cgroups() -> None:
    with closing(LocalSlurm("--nodes", "1")) as cluster:
        cluster.run("srun", "true")
    for node in cluster.nodes:
        assert not list(Path("/sys/fs/cgroup").glob(f"*/slurm_{node}"))
