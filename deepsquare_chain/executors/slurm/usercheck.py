"""Checks of `provider doctor` that jobs can run as another Unix user than the daemon's."""

from __future__ import annotations

import asyncio
import grp
import os
from pathlib import Path

from deepsquare_chain.executors.base import ExecutorContext, ExecutorError
from deepsquare_chain.executors.slurm.client import SlurmClient
from deepsquare_chain.executors.slurm.options import SlurmOptions
from deepsquare_chain.observability.probe import Check


async def user_checks(
    options: SlurmOptions, context: ExecutorContext, wrapper: Path
) -> list[Check]:
    """Check that jobs can run as the user, with access to its folders, not to the daemon's files.

    Args:
        options: Options of the executor, with a user.
        context: Context of the executor.
        wrapper: Script that sbatch reads as that user.

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
        hint = f"Set run_dir, or let {user} pass through the folders above (chmod o+x)."
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
