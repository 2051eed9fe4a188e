"""Runs Slurm's commands: argument lists, a clean environment, a time limit, typed errors.

Also the checks of `provider doctor` that jobs can run as another Unix user than the daemon's.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import pwd
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from deepsquare_chain.errors import UsageError
from deepsquare_chain.executors.base import (
    ExecutorContext,
    ExecutorError,
    ExecutorUnavailableError,
    RunRefusedError,
)
from deepsquare_chain.executors.slurm import commands, parsing
from deepsquare_chain.executors.slurm.options import SlurmOptions
from deepsquare_chain.executors.slurm.parsing import SlurmNode
from deepsquare_chain.observability.metrics import Check
from deepsquare_chain.observability.redaction import plain

_OUTPUT_LIMIT: Final = 64 * 1024 * 1024
_ERROR_BYTES: Final = 400
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Slurm's messages for requests that it refuses permanently.
_REFUSALS: Final = (
    "requested node configuration is not available",
    "requested partition configuration not available",
    "node count specification invalid",
    "more processors requested than permitted",
    "memory specification can not be satisfied",
    "invalid generic resource",
    "invalid feature specification",
    "invalid partition name",
    "invalid account",
    "invalid qos",
    "invalid trackable resource",
    "invalid wckey",
    "invalid job array",
    "requested time limit is invalid",
    "requested reservation is invalid",
    "unrecognized option",
    "unable to open file",
    "user's group not permitted to use this partition",
    "user not found on host",
    "access/permission denied",
    "job violates accounting/qos policy",
    "pathname of a file, directory or other parameter too long",
    "cpu count per node can not be satisfied",
    "invalid numeric value",
    "invalid --",
)
_UNKNOWN_JOB: Final = ("invalid job id", "job/step already completing or completed")


class CommandRefusedError(RunRefusedError):
    """Slurm refused the request permanently; a retry would fail too."""


class UnknownJobError(ExecutorUnavailableError):
    """Slurm has no such job, or not any more."""


class SlurmClient:
    """Runs Slurm's commands on this machine.

    Attributes:
        user: Unix user of the jobs, as which the commands run.
        user_id: User ID of that user.
        group_id: ID of its primary group if it is not the daemon's user, else None.

    Raises:
        UsageError: There is no such user, or it is root.
    """

    def __init__(self, options: SlurmOptions) -> None:
        self._options = options
        self.user_id = os.geteuid()
        self.group_id: int | None = None
        try:
            self.user = pwd.getpwuid(self.user_id).pw_name
        except KeyError:
            self.user = str(self.user_id)
        if options.user:
            entry = _entry(options.user)
            self.user, self.user_id, self.group_id = options.user, entry.pw_uid, entry.pw_gid

    async def run(self, arguments: Sequence[str]) -> str:
        """Run a command and return its output.

        Raises:
            CommandRefusedError: Slurm refused the request.
            UnknownJobError: Slurm has no such job.
            ExecutorUnavailableError: Slurm did not answer in time; the request may have been
                carried out or not.
        """
        name, conf = arguments[0], self._options.conf
        if conf is not None and not conf.exists():
            # Slurm's commands would look for a server of configurations until the timeout.
            raise ExecutorUnavailableError(
                f"Slurm's configuration {conf} is missing",
                hint="Correct the option conf in executor_options.",
            )
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command(arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=self._environment(),
                cwd="/",
                start_new_session=True,
                **self._identity(),
            )
        except OSError as error:
            raise ExecutorUnavailableError(
                f"{name} can't be run: {error.strerror}",
                hint="Install Slurm's commands, or set the option bin_dir to their folder.",
            ) from error
        try:
            async with asyncio.timeout(self._options.command_timeout):
                output, errors = await process.communicate()
        except TimeoutError:
            raise ExecutorUnavailableError(
                f"{name} did not answer within {self._options.command_timeout:g} seconds",
                hint="Check that slurmctld is running; the command is retried.",
            ) from None
        finally:
            await _end(process)
        text = output[:_OUTPUT_LIMIT].decode(errors="replace")
        if process.returncode:
            raise failure(name, errors.decode(errors="replace") or text)
        return text

    def _command(self, arguments: Sequence[str]) -> list[str]:
        folder = self._options.bin_dir
        # bin_dir only has Slurm's commands.
        is_path = arguments[0].startswith("/")
        program = str(folder / arguments[0]) if folder and not is_path else arguments[0]
        if self.group_id is None or os.geteuid() == 0:
            return [program, *arguments[1:]]
        # sudo would reset the environment.
        env = [f"{name}={value}" for name, value in self._environment().items()]
        sudo = ["sudo", "--non-interactive", f"--user={self.user}", "--", "/usr/bin/env", "-i"]
        return [*sudo, *env, program, *arguments[1:]]

    def _identity(self) -> dict[str, Any]:
        """Return the user and groups to switch to as root, which needs no sudo."""
        if self.group_id is None or os.geteuid() != 0:
            return {}
        return {"user": self.user_id, "group": self.group_id, "extra_groups": []}

    def _environment(self) -> dict[str, str]:
        """Return a clean environment: SBATCH_* and SQUEUE_* variables would change commands."""
        env = {"PATH": _PATH, "LC_ALL": "C", "TZ": "UTC", "SLURM_TIME_FORMAT": "%s"}
        kept = ("PATH", "SLURM_CONF", "LD_LIBRARY_PATH", "HOME", "KRB5CCNAME")
        env |= {name: os.environ[name] for name in kept if name in os.environ}
        if self.group_id is not None:
            env["HOME"] = _entry(self.user).pw_dir
        if self._options.conf is not None:
            env["SLURM_CONF"] = str(self._options.conf)
        return env


def _entry(user: str) -> pwd.struct_passwd:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise UsageError(
            f"There is no Unix user {user}",
            hint="Correct the option user in executor_options, or add the user on every node.",
        ) from None
    if entry.pw_uid == 0:
        raise UsageError("The option user of the Slurm executor may not be root")
    return entry


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the process group if the wait was interrupted."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except PermissionError:
                return  # sudo runs as root: it ends with its command, and asyncio reaps it
        await process.wait()


def failure(command: str, text: str) -> Exception:
    """Return the error for a command's message on stderr."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = plain(" ".join(lines)[:_ERROR_BYTES]) or "no reason given"
    lower = text.lower()
    message = f"{command} failed: {reason}"
    if any(phrase in lower for phrase in _UNKNOWN_JOB):
        return UnknownJobError(message)
    if any(phrase in lower for phrase in _REFUSALS):
        return CommandRefusedError(message)
    return ExecutorUnavailableError(
        message, hint="Check that slurmctld is running; the command is retried."
    )


async def read_nodes(options: SlurmOptions) -> list[SlurmNode]:
    """Return the nodes of the partitions of jobs, in any state.

    Raises:
        ExecutorUnavailableError: Slurm does not answer.
        RunRefusedError: There is no such partition.
    """
    client = SlurmClient(options)
    names = options.all_partitions
    return parsing.nodes(await client.run(commands.nodes(names)), default_only=not names)


async def user_checks(
    options: SlurmOptions, context: ExecutorContext, wrapper: Path
) -> list[Check]:
    """Check that jobs can run as the user, with access to its folders, not to the daemon's files.

    `wrapper` is the script that sbatch reads as that user.

    Raises:
        UsageError: There is no such user.
    """
    client, user = SlurmClient(options), options.user
    group = await asyncio.to_thread(_missing_group, client)
    if group:
        text = f"the daemon's user is not in the group {group} of {user}"
        return [_failed(text, f"usermod --append --groups {group} USER, for the daemon's user")]
    if not await _can_access(client, "-r", wrapper):
        hint = f"Let the daemon's user become {user} by sudo without a password; {user} must read {wrapper}."
        return [_failed(f"commands can't be run as {user}", hint)]
    runs = await asyncio.to_thread(_nearest, options, context)
    if not await _can_access(client, "-x", runs):
        hint = f"Set run_dir, or permit {user} to search the folders above it (chmod o+x)."
        return [_failed(f"{user} can't reach {runs}", hint, "executor_options.run_dir")]
    for path in context.private:
        if await _can_access(client, "-r", path):
            return [_failed(f"{user} can read {path}", f"chmod g-r,o-r {path}")]
    return [Check("user of the jobs", True, f"jobs run as {user}", "", "executor_options.user")]


def _failed(text: str, hint: str, setting: str = "executor_options.user") -> Check:
    return Check("user of the jobs", False, text, hint, setting)


def _missing_group(client: SlurmClient) -> str:
    """Return the name of the user's primary group if this process is not in it."""
    number = client.group_id
    if number is None or os.geteuid() == 0 or number in {*os.getgroups(), os.getegid()}:
        return ""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _nearest(options: SlurmOptions, context: ExecutorContext) -> Path:
    """Return the folder of runs, or its closest existing parent."""
    path = Path(os.path.abspath(options.run_dir or context.state_dir / "runs"))
    while not path.exists():
        path = path.parent
    return path


async def _can_access(client: SlurmClient, access: str, path: Path) -> bool:
    """Return whether the user of the jobs may read (-r) or search (-x) a path."""
    try:
        await client.run(["/usr/bin/test", access, str(path)])
    except ExecutorError:
        return False
    return True
