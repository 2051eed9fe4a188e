"""Executors by name: entry points of the group `deepsquare.executors`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Final, cast

from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.executors.base import Executor, ExecutorContext
from deepsquare_chain.executors.isolation import refuse_root, user_check
from deepsquare_chain.observability.probe import Check

GROUP: Final = "deepsquare.executors"


def executor_names() -> list[str]:
    """Names of the executors that are installed."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def create_executor(name: str, context: ExecutorContext) -> Executor:
    """Make the executor of a name; its entry point is a function of the context.

    Raises:
        UsageError: No such executor is installed, it can't be loaded, or an option is wrong; jobs
            would run as root, or not be isolated, and the context does not allow it.
        ExecutorUnavailableError: It can't be used now.
    """
    refuse_root(context)
    return cast("Callable[[ExecutorContext], Executor]", _load(name))(context)


async def examine_executor(name: str, context: ExecutorContext) -> list[Check]:
    """What an executor finds about the machine or cluster; nothing is changed.

    A module that provides an executor may have a coroutine function `examine` of the context, which
    returns the checks.
    """
    try:
        module = sys.modules[_load(name).__module__]
        examine = getattr(module, "examine", None)
        found = [] if examine is None else list(await examine(context))
    except GridError as error:
        setting = "executor, executor_options"
        return [Check("executor", False, error.message, error.hint, setting)]
    if all(check.name != "executor" for check in found):
        found.insert(0, Check("executor", True, f"{name} is installed", "", "executor"))
    return [*found, user_check()]


def _load(name: str) -> Any:
    points = list(entry_points(group=GROUP, name=name))
    if not points:
        known = ", ".join(executor_names()) or "none"
        raise UsageError(
            f"There is no executor {name[:60]!r}",
            hint=f"Installed are: {known}. After an upgrade, install the package again.",
        )
    try:
        return points[0].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"The executor {name} can't be loaded from {points[0].value}: {error}",
            hint="Install the package that provides it again.",
        ) from error
