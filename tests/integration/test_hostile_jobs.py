"""Hostile jobs: each attack is stopped, by the local executor and on a Slurm cluster."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import platform
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from deepsquare_chain.executors.base import Executor, Exit, RunSpec, RunState
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.executors.rundir import RunFolder
from deepsquare_chain.job import Offer, Resources
from tests.support.isolation import require, require_sandbox
from tests.support.slurm import LocalSlurm

ONE = Resources(tasks=1, cpus_per_task=1, mem_per_cpu=256, gpus=0)
LIMITS = {"disk": 40, "processes": 40}
SECRET = "the-secret-of-somebody-else"


@dataclass(frozen=True)
class IsolatedExecutor:
    """An executor with isolation, and its state folder."""

    name: str
    executor: Executor
    state: Path
    #: Limits that the kernel enforces for local jobs of this user.
    controllers: tuple[str, ...] = ()

    async def run(
        self, script: str, key: str = "attack", resources: Resources = ONE
    ) -> tuple[Exit, str]:
        """How a job ends, and what it prints."""
        await self.start(script, key, resources)
        deadline = time.monotonic() + 120
        while True:
            end = (await self.executor.poll([key]))[key].exit
            if end is not None:
                return end, (await self.executor.output(key)).decode(errors="replace")
            assert time.monotonic() < deadline, "it did not end"
            await asyncio.sleep(0.1)

    async def start(self, script: str, key: str, resources: Resources = ONE, **env: str) -> None:
        await self.executor.submit(RunSpec(key, script.encode(), resources, 90, env))

    async def printed(self, key: str) -> None:
        """Wait until a job that runs has printed something."""
        deadline = time.monotonic() + 120
        while not await self.executor.output(key):
            assert time.monotonic() < deadline, "it did not start"
            await asyncio.sleep(0.1)
        assert (await self.executor.poll([key]))[key].state is RunState.RUNNING


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalSlurm]:
    local_slurm = LocalSlurm("--nodes", "1", "--constrain-cores")
    yield local_slurm
    local_slurm.close()


@pytest.fixture(params=["local", "slurm"])
async def isolated(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[IsolatedExecutor]:
    isolation = require_sandbox(**LIMITS)
    state = tmp_path / "state"
    if request.param == "local":
        offer = Offer(4, 4096, 0)
        executor: Executor = LocalExecutor(state, offer, isolation=isolation)
    else:
        cluster = request.getfixturevalue("cluster")
        options = {"isolation": "sandbox", **LIMITS}
        executor = cluster.executor(state, owner=tmp_path.name, **options)
    yield IsolatedExecutor(request.param, executor, state, isolation.cgroups.controllers)
    for key in await executor.keys():
        await executor.cancel(key)


async def test_a_wallet_can_not_be_read(isolated: IsolatedExecutor, tmp_path: Path) -> None:
    """The sandbox shows only folders of a list: neither the state folder nor a keystore is there."""
    paths = [tmp_path / "wallet.json", isolated.state / "wallet.json"]
    for path in paths:
        path.write_text(SECRET)
    script = (
        f"cat {paths[0]} {paths[1]}; grep -rs {SECRET} /home /root /tmp /etc /run /var; echo end"
    )
    end, output = await isolated.run(script)
    assert (end.code, SECRET in output.replace(script, "")) == (0, False)
    assert output.count("No such file or directory") == 2


KEYRING = """
import ctypes
syscall = ctypes.CDLL(None).syscall
key = syscall(250, 10, -3, b"user", b"wallet", 0)
print("found" if key > 0 else "no key", flush=True)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of the system call")
@pytest.mark.parametrize("isolated", ["local"], indirect=True)
async def test_the_keyring_of_the_daemons_session_can_not_be_read(
    isolated: IsolatedExecutor,
) -> None:
    """A process inherits its session keyring, so the supervisor joins a new one."""
    syscall = ctypes.CDLL(None).syscall
    assert syscall(250, 1, None) > 0  # a keyring of this test
    assert syscall(250, 10, -3, b"user", b"wallet", 0) < 0
    assert syscall(248, b"user", b"wallet", SECRET.encode(), len(SECRET), -3) > 0
    assert (await isolated.run(f"python3 -c '{KEYRING}'"))[1] == "no key\n"


async def test_another_job_can_not_be_seen(isolated: IsolatedExecutor) -> None:
    """Other run folders are not mounted, and /proc has only the job's own processes."""
    await isolated.start(f"echo {SECRET} > mine; echo up; sleep 25", "victim", WORD=SECRET)
    await isolated.printed("victim")
    script = f"""
        ls {isolated.state}/runs
        find / -name mine 2>/dev/null
        cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep ^WORD=
        echo $(ls -d /proc/[0-9]* | wc -l) processes
    """
    _, output = await isolated.run(script)
    assert SECRET not in output
    assert "/mine" not in output
    assert "No such file or directory" in output
    assert (await isolated.executor.poll(["victim"]))["victim"].state is RunState.RUNNING


async def test_neither_the_node_nor_the_metadata_service_is_reached(
    isolated: IsolatedExecutor,
) -> None:
    """The job has a network namespace with nothing but a loopback interface of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        script = f"""
            for target in 127.0.0.1/{port} 169.254.169.254/80; do
                timeout 5 bash -c "echo hi > /dev/tcp/$target" && echo reached
            done
            true
        """
        _, output = await isolated.run(script)
        with pytest.raises(TimeoutError):
            server.accept()
    assert "reached" not in output
    assert "refused" in output
    assert "unreachable" in output


DEEP = """
import os
for _ in range(60):
    os.mkdir("d" * 99)
    os.chdir("d" * 99)
for number in range(6):
    open(str(number), "wb").write(bytes(10**7))
"""
#: Not by the module mmap, which keeps a descriptor of the file.
MAPPED = """
import ctypes, os, time
mmap = ctypes.CDLL(None).mmap
for length in SIZES:
    with open("mapped", "wb+") as file:
        file.write(bytes(10**7))
        time.sleep(1.2)
        mmap(None, ctypes.c_size_t(length), 1, 1, file.fileno(), ctypes.c_long(0))
        os.remove("mapped")
time.sleep(80)
"""
EMPTY = """
import itertools
for number in itertools.count():
    open(str(number), "x").close()
"""


@pytest.mark.parametrize(
    "method",
    ["many files", "one file", "deleted file", "mapped file", "deep folder", "empty files"],
)
async def test_a_disk_quota_ends_a_job(isolated: IsolatedExecutor, method: str) -> None:
    """Folders are measured; the kernel's limit on file size stops a single large file."""
    scripts = {
        "many files": "for i in $(seq 99); do head -c 3M /dev/zero > $i; sleep 0.1; done; sleep 80",
        "one file": "exec head -c 500M /dev/zero > /tmp/one",
        "deleted file": "exec 3> a; rm a; exec 4> b; rm b; for i in 1 2 3 4 5 6 7 8 9; do "
        "head -c 4M /dev/zero >&3; head -c 4M /dev/zero >&4; sleep 0.2; done; sleep 80",
        "mapped file": f"python3 -c '{MAPPED.replace('SIZES', '8 * [10**7]')}'",
        "deep folder": f"python3 -c '{DEEP}'; sleep 80",
        "empty files": f"python3 -c '{EMPTY}'",
    }
    end, _ = await isolated.run(scripts[method])
    assert end.reason == "disk"
    assert end.code != 0
    assert end.seconds < 75
    await isolated.executor.forget("attack")
    assert not list((isolated.state / "runs").iterdir())


@pytest.mark.parametrize("isolated", ["local"], indirect=True)
async def test_a_deleted_file_counts_whole_if_one_page_of_it_is_mapped(
    isolated: IsolatedExecutor,
) -> None:
    """The supervisor keeps the sizes of large files; Slurm's wrapper counts the mapped part."""
    end, _ = await isolated.run(f"python3 -c '{MAPPED.replace('SIZES', '8 * [1]')}'")
    assert end.reason == "disk"


FORKS = """
import os, time
made = 0
for _ in range(400):
    try:
        if os.fork() == 0:
            time.sleep(25)
            os._exit(0)
        made += 1
    except OSError:
        break
print("made", made, flush=True)
time.sleep(2)
"""


async def test_forks_without_end_are_stopped(isolated: IsolatedExecutor) -> None:
    """The local executor's pids controller refuses processes; elsewhere they are counted and the job ends."""
    end, output = await isolated.run(f"python3 -c '{FORKS}'")
    if isolated.name == "local" and "pids" in isolated.controllers:
        assert (end.reason, end.code) == ("exited", 0)
        assert 10 < int(output.split()[1]) < LIMITS["processes"]
    else:
        assert end.reason in {"processes", "memory"}


THREADS = """
import threading, time
for _ in range(100):
    threading.Thread(target=time.sleep, args=(80,), daemon=True).start()
print("made", flush=True)
time.sleep(80)
"""


async def test_threads_without_end_are_stopped(isolated: IsolatedExecutor) -> None:
    """Threads count as processes: the pids controller refuses them, or they are counted."""
    end, output = await isolated.run(f"python3 -c '{THREADS}'")
    assert "made" not in output or end.reason == "processes"
    assert end.code != 0


async def test_processes_that_detach_end_with_the_job(isolated: IsolatedExecutor) -> None:
    """The sandbox has a PID namespace: its first process is killed, and the kernel kills the rest."""
    nap = f"{random.randrange(10**5, 10**6)}.{random.randrange(10**6)}"
    script = (
        f"setsid sleep {nap} & (setsid env -i sleep {nap} & ) ; trap '' TERM; sleep 1; echo end"
    )
    end, output = await isolated.run(script)
    assert (end.code, output) == (0, "end\n")
    remaining = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if nap in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                remaining.append(process)
    assert remaining == []


SPIN = """
import os, time
end = time.monotonic() + 1.5
for _ in range(4):
    if os.fork() == 0:
        while time.monotonic() < end:
            pass
        os._exit(0)
for _ in range(4):
    os.wait()
times = os.times()
print((times.children_user + times.children_system) / 1.5, len(os.sched_getaffinity(0)))
"""


async def test_a_job_gets_no_more_cpus_than_it_requested(isolated: IsolatedExecutor) -> None:
    """Locally the cpu controller throttles it; on Slurm ConstrainCores pins it to its core.

    A busy machine gives it less in any case, so the limit itself is looked at too.
    """
    if isolated.name == "local":
        require("cpu" in isolated.controllers, "no control groups for CPUs that this user may make")
    script = f"echo up; python3 -c '{SPIN}'"
    await isolated.start(script, "attack")
    if isolated.name == "local":
        await isolated.printed("attack")
        record = RunFolder(isolated.state / "runs" / "attack").spec()["isolation"]["cgroup"]
        group = Path(record["folders"]["cpu"])
        assert (group / "cgroup.procs").read_text()
        if record["version"] == 1:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        else:
            quota, period = (group / "cpu.max").read_text().split()
        assert int(quota) == int(period)
    end, output = await isolated.run(script)
    assert end.code == 0
    cpu_seconds, cores = output.split()[1:]
    assert 0 < float(cpu_seconds) < 1.3
    assert isolated.name == "local" or int(cores) == 1


async def test_srun_does_not_leave_the_sandbox(cluster: LocalSlurm, tmp_path: Path) -> None:
    """Each task of the job's `srun` runs in a sandbox; options that would leave it are refused."""
    require_sandbox(**LIMITS)
    wallet = tmp_path / "wallet.json"
    wallet.write_text(SECRET)
    state, options = tmp_path / "state", {"isolation": "sandbox", **LIMITS}
    isolated = IsolatedExecutor(
        "slurm", cluster.executor(state, owner=tmp_path.name, **options), state
    )
    two = Resources(tasks=2, cpus_per_task=1, mem_per_cpu=128, gpus=0)
    script = f"""
        srun -l cat {wallet} {state}/runs/attack/script
        for option in --prolog=/home/job/x --jobid=1 -o/home/job/x -i{wallet} --nodelist={wallet} --export=A --overcommit; do
            srun -n1 $option cat {wallet} 2>/dev/null; echo $option $?
        done
        export LD_PRELOAD=/home/job/x BASH_ENV=/home/job/y
        echo "touch {tmp_path}/escaped" > y
        srun -n1 cat {wallet}
        unset LD_PRELOAD BASH_ENV
        echo $SLURM_JOB_ID > id; printf 'read\nwritten\n' | srun -n1 tail -n1 | tee copy
        srun -n1 bash -c 'exit 5'; echo "code $?"
        timeout 1 srun sleep 25; echo "code $?"
        srun -n1 bash -c 'exit 6'; echo "next $?"
    """
    end, output = await isolated.run(script, resources=two)
    assert (end.code, SECRET in output) == (0, False), output
    refused_options = ["--prolog=/home/job/x", "--jobid=1", "-o/home/job/x", f"-i{wallet}"]
    refused_options += [f"--nodelist={wallet}", "--export=A", "--overcommit"]
    assert [line for line in output.splitlines() if line.endswith(" 2")] == [
        f"{option} 2" for option in refused_options
    ]
    assert not (tmp_path / "escaped").exists()
    for line in ("0: cat: ", "1: cat: ", "\nwritten\n", "code 5", "code 124", "next 6"):
        assert line in output
    # Each task is counted, on whatever node.
    forks = f"srun -n1 python3 -c '{FORKS}'"
    end, _ = await isolated.run(forks, "forks", resources=two)
    assert end.reason in {"processes", "memory"}


CALLS = """
import os, time, uuid
steps = "/run/job/steps"

def begin():
    call = str(uuid.uuid4())
    with open(f"{steps}/calls", "w") as calls:
        calls.write(call + "\\n")
    return f"{steps}/{call}"

endless = begin()
while not os.path.exists(f"{endless}.code"):
    time.sleep(0.05)
try:
    with open(f"{endless}.call", "wb", buffering=0) as call:
        call.write(b"1\\0true\\0/\\0")
        while True:
            call.write(b"x=1\\0" * 1000)
except BrokenPipeError:
    print("refused", flush=True)
for _ in range(100):
    begin()

def waiting():
    return sum(name.endswith(".code") for name in os.listdir(steps))

while waiting() < 16:
    time.sleep(0.05)
time.sleep(1)
print("waiting", waiting(), flush=True)
"""


async def test_calls_of_srun_use_bounded_resources(cluster: LocalSlurm, tmp_path: Path) -> None:
    """The wrapper runs outside of the sandbox; it limits the processes and files that calls cause."""
    require_sandbox(**LIMITS)
    state, options = tmp_path / "state", {"isolation": "sandbox", **LIMITS}
    executor = cluster.executor(state, owner=tmp_path.name, **options)
    end, output = await IsolatedExecutor("slurm", executor, state).run(f"python3 -c '{CALLS}'")
    assert (end.code, output) == (0, "refused\nwaiting 16\n")
