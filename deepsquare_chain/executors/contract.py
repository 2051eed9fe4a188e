"""Conformance tests of the executor protocol, for any executor.

Derive a class whose name begins with `Test` and give it a pytest fixture `harness`; see
docs/executors.md for an example. The tests only use the interface in `executors.base`, and the
output of jobs.
"""

from __future__ import annotations

import asyncio
import re
import time
import unittest
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.executors.base import Executor, Exit, RunRefusedError, RunSpec, RunState
from deepsquare_chain.executors.rundir import OUTPUT_LIMIT
from deepsquare_chain.job import Resources

_POLL_INTERVAL: Final = 0.1
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Harness:
    """Properties of an executor under test.

    Attributes:
        make: Creates an executor with the same state, as after a restart of the daemon.
        scratch: Empty folder that is writable for jobs under the same path.
        timeout: Seconds after which an expected state counts as not reached.
        enforces_memory: Whether memory limits are enforced.
    """

    make: Callable[[], Executor]
    scratch: Path
    timeout: float = 30.0
    enforces_memory: bool = True

    def spec(self, key: str, script: str, **changes: Any) -> RunSpec:
        """Return the specification of a small run."""
        memory = changes.pop("memory", 128)
        values: dict[str, Any] = {
            "resources": Resources(1, 1, memory, 0),
            "walltime": 60,
            "env": {},
            **changes,
        }
        return RunSpec(key=key, script=script.encode(), **values)

    async def until(self, condition: Callable[[], Awaitable[T]]) -> T:
        """Poll until the result is true; returns the result."""
        deadline = time.monotonic() + self.timeout
        while not (result := await condition()):
            assert time.monotonic() < deadline, "the expected state was not reached in time"
            await asyncio.sleep(_POLL_INTERVAL)
        return result

    async def end(self, executor: Executor, key: str) -> Exit:
        """Wait for the end of a run; returns its exit status."""

        async def condition() -> Exit | None:
            return (await executor.poll([key]))[key].exit

        ended = await self.until(condition)
        assert ended is not None
        return ended

    async def running(self, executor: Executor, *keys: str) -> None:
        """Wait until all runs are RUNNING and have printed something."""

        async def condition() -> bool:
            statuses = await executor.poll(list(keys))
            outputs = [await executor.output(key) for key in keys]
            return all(outputs) and all(s.state is RunState.RUNNING for s in statuses.values())

        await self.until(condition)


async def _assert_raises(error: type[Exception], request: Awaitable[object]) -> None:
    try:
        result = await request
    except error:
        return
    raise AssertionError(f"{error.__name__} was not raised; the result is {result!r}")


class ExecutorContract:
    """The tests; `harness` is a fixture of the derived class."""

    async def test_code_reason_duration_and_output_of_every_end(self, harness: Harness) -> None:
        executor = harness.make()
        runs = {
            "good": ("echo out; echo err >&2", 0, "exited"),
            "three": ("exit 3", 3, "exited"),
            "high": ("exit 255", 255, "exited"),
            "missing": ("no-such-command-anywhere", 127, "exited"),
            "killed": ("kill -KILL $$", 137, "signalled"),
            "slow": ("sleep 1.2", 0, "exited"),
            "late": ("echo late; sleep 60", 143, "walltime"),
            "trap": ("trap 'echo trapped; exit 0' TERM; sleep 60 & wait", 143, "walltime"),
            "deaf": ("trap '' TERM; while :; do sleep 1; done", 137, "walltime"),
        }
        started_at = time.time()
        for key, (script, _, reason) in runs.items():
            walltime = 2 if reason == "walltime" else 60
            assert await executor.submit(harness.spec(key, script, walltime=walltime)) == key
        for key, (_, code, reason) in runs.items():
            ended = await harness.end(executor, key)
            assert (key, ended.code, ended.reason) == (key, code, reason)
            assert started_at - 1 <= ended.started_at <= ended.ended_at <= time.time() + 1
            assert ended.ended_at - ended.started_at - 0.1 <= ended.seconds <= harness.timeout
        assert (await harness.end(executor, "slow")).seconds >= 2
        assert 2 <= (await harness.end(executor, "late")).seconds <= 4
        assert await executor.output("good") == b"out\nerr\n"
        assert await executor.output("good", 1, 2) == b"ut"
        assert await executor.output("good", 99) == b""
        assert b"trapped" in await executor.output("trap")
        assert set(runs) <= set(await executor.keys())

    async def test_a_key_runs_once(self, harness: Harness) -> None:
        spec = harness.spec("once", f"echo ran >> {harness.scratch}/once; sleep 1")
        first, second = harness.make(), harness.make()
        await asyncio.gather(first.submit(spec), first.submit(spec))
        assert await second.find("once") == await second.submit(spec)
        end = await harness.end(first, "once")
        assert await second.submit(spec) == "once"
        assert await harness.end(harness.make(), "once") == end
        assert (harness.scratch / "once").read_text() == "ran\n"

    async def test_a_run_that_ends_without_the_daemon_is_reported_with_its_duration(
        self, harness: Harness
    ) -> None:
        done_file = harness.scratch / "done"
        spec = harness.spec("away", f"sleep 1.2; echo said; echo > {done_file}; exit 7")
        handle = await harness.make().submit(spec)

        async def is_done() -> bool:
            return done_file.exists()

        await harness.until(is_done)
        restarted = harness.make()
        assert await restarted.find("away") == handle
        ended = await harness.end(restarted, handle)
        assert (ended.code, ended.reason) == (7, "exited")
        assert 2 <= ended.seconds <= 5
        assert await restarted.output(handle) == b"said\n"
        await restarted.forget(handle)
        assert handle not in await restarted.keys()
        assert await restarted.stored(handle) is None
        await restarted.forget(handle)  # idempotent

    async def test_cancel_returns_when_all_processes_have_ended(self, harness: Harness) -> None:
        executor = harness.make()
        alive = harness.scratch / "alive"
        script = (
            f"trap '' TERM; setsid bash -c 'while :; do echo >> {alive}; sleep 0.2; done' & wait"
        )
        await executor.submit(harness.spec("stop", f"echo up; {script}"))
        await harness.running(executor, "stop")
        started_at = time.monotonic()
        await executor.cancel("stop")
        assert time.monotonic() - started_at < harness.timeout / 2
        size = alive.stat().st_size
        end = await harness.end(executor, "stop")
        assert (end.reason, end.code) in {("cancelled", 137), ("cancelled", 143)}
        await asyncio.sleep(0.5)
        assert alive.stat().st_size == size
        await executor.cancel("stop")
        assert await harness.end(executor, "stop") == end

    async def test_all_processes_end_with_the_script(self, harness: Harness) -> None:
        executor = harness.make()
        alive = harness.scratch / "left"
        loop = f"while :; do echo >> {alive}; sleep 0.2; done"
        script = (
            f"setsid bash -c '{loop}' & (setsid bash -c '{loop}' &); sleep 1; echo over; exit 4"
        )
        await executor.submit(harness.spec("left", script))
        end = await harness.end(executor, "left")
        assert (end.code, end.reason) == (4, "exited")
        assert await executor.output("left") == b"over\n"
        size = alive.stat().st_size
        await asyncio.sleep(0.5)
        assert alive.stat().st_size == size > 0

    async def test_walltime_of_a_live_run_can_be_changed(self, harness: Harness) -> None:
        executor = harness.make()
        await executor.submit(harness.spec("more", "echo up; sleep 4; echo done", walltime=3))
        await executor.submit(harness.spec("less", "echo up; sleep 60"))
        await executor.extend("more", 300)
        await executor.extend("less", 1)
        assert (await harness.end(executor, "more")).reason == "exited"
        assert await executor.output("more") == b"up\ndone\n"
        assert (await harness.end(executor, "less")).reason == "walltime"
        await executor.extend("more", 400)  # too late, but no error
        for walltime in (0, 2**31 + 1):
            await _assert_raises(RunRefusedError, executor.extend("more", walltime))

    async def test_memory_limit_ends_a_run(self, harness: Harness) -> None:
        if not harness.enforces_memory:
            raise unittest.SkipTest("this executor enforces no memory limit here")
        executor = harness.make()
        hold = "python3 -c 'b = bytearray({} << 20); import time; time.sleep(2)'"
        await executor.submit(harness.spec("big", hold.format(300)))
        await executor.submit(harness.spec("fits", hold.format(10)))
        end = await harness.end(executor, "big")
        assert end.reason == "memory"
        assert end.code != 0
        assert (await harness.end(executor, "fits")).reason == "exited"

    async def test_environment_has_only_the_variables_of_the_run(self, harness: Harness) -> None:
        executor = harness.make()
        nasty = "$(touch pwned) `touch pwned` '; touch pwned; \" %s \\ ../ \n second line"
        env = {"NASTY": nasty, "PLAIN": "x"}
        script = 'printf "%s|" "$PLAIN" "$NASTY" "$HOME" "$PWD"; cat; ls'
        await executor.submit(harness.spec("env", script, env=env))
        assert (await harness.end(executor, "env")).code == 0
        plain_value, nasty_value, home, folder, rest = (
            (await executor.output("env")).decode().split("|")
        )
        assert (plain_value, nasty_value, home, rest) == ("x", nasty, folder, "")

    async def test_directives_of_batch_systems_have_no_effect(self, harness: Harness) -> None:
        executor = harness.make()
        script = "#!/bin/bash\n#SBATCH --array=0-3\n#SBATCH --output=/dev/null\n#PBS -t 0-3\n"
        script += f"echo ran >> {harness.scratch}/array; echo said"
        await executor.submit(harness.spec("array", script))
        assert (await harness.end(executor, "array")).code == 0
        assert await executor.output("array") == b"said\n"
        assert (harness.scratch / "array").read_text() == "ran\n"

    async def test_output_is_bounded_and_keeps_both_ends(self, harness: Harness) -> None:
        executor = harness.make()
        script = "echo first; yes middle | head -c 3000000; echo last"
        await executor.submit(harness.spec("long", script))
        assert (await harness.end(executor, "long")).code == 0
        output = await executor.output("long", 0, OUTPUT_LIMIT)
        assert output.startswith(b"first\nmiddle\n")
        assert output.endswith(b"last\n")
        note = re.search(rb"\n\[\.\.\. (\d+) bytes left out \.\.\.\]\n", output)
        assert note is not None
        assert len(output) - len(note[0]) + int(note[1]) == 3_000_000 + len("first\nlast\n")

    async def test_capacity_follows_live_runs(self, harness: Harness) -> None:
        executor = harness.make()
        idle = await executor.capacity()
        assert await executor.fault() == ""
        await executor.submit(harness.spec("busy", "echo up; sleep 60", memory=200))
        await harness.running(executor, "busy")
        busy = await executor.capacity()
        assert (idle.cpus - busy.cpus, idle.memory - busy.memory) == (1, 200)
        await executor.cancel("busy")

        async def is_free() -> bool:
            return await executor.capacity() == idle

        await harness.until(is_free)

    async def test_unknown_keys_and_bad_specifications(self, harness: Harness) -> None:
        executor = harness.make()
        assert await executor.find("nobody") is None
        assert (await executor.poll(["nobody"]))["nobody"].state is RunState.UNKNOWN
        await executor.cancel("nobody")
        for request in (executor.output("nobody"), executor.extend("nobody", 10)):
            await _assert_raises(NotFoundError, request)
        bad_keys = ("", "..", "../up", "a/b", "-x", "k" * 121)
        bad_environments = ({"A=B": "x"}, {"A": "x\0y"}, {"PATH": "/job"})
        bad_specs = [harness.spec(key, "true") for key in bad_keys]
        bad_specs += [harness.spec("bad", "true", env=env) for env in bad_environments]
        bad_specs += [harness.spec("bad", "true", comment="two\nlines")]
        bad_specs += [harness.spec("bad", "true", walltime=0)]
        for spec in bad_specs:
            await _assert_raises(RunRefusedError, executor.submit(spec))
        assert await executor.find("bad") is None
