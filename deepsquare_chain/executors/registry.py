"""Executors by name: entry points of the group `deepsquare.executors`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Final, cast

from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.executors.base import Executor, ExecutorContext
from deepsquare_chain.executors.isolation import refuse_root, user_check
from deepsquare_chain.observability.metrics import Check

GROUP: Final = "deepsquare.executors"


def executor_names() -> list[str]:
    """Return the names of the installed executors."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def create_executor(name: str, context: ExecutorContext) -> Executor:
    """Create an executor by name; its entry point is a function that takes the context.

    Raises:
        UsageError: The executor is not installed or can't be loaded; an option is invalid; jobs
            would run as root or without isolation, and the context does not allow it.
        ExecutorUnavailableError: The executor can't be used now.
    """
    refuse_root(context)
    return cast("Callable[[ExecutorContext], Executor]", _load(name))(context)


async def examine_executor(name: str, context: ExecutorContext) -> list[Check]:
    """Return an executor's checks of the machine or cluster; read-only.

    The module of an executor may define a coroutine function `examine(context)` that returns
    checks.
    """
    try:
        module = sys.modules[_load(name).__module__]
        examine = getattr(module, "examine", None)
        checks = [] if examine is None else list(await examine(context))
    except GridError as error:
        setting = "executor, executor_options"
        return [Check("executor", False, error.message, error.hint, setting)]
    if all(check.name != "executor" for check in checks):
        checks.insert(0, Check("executor", True, f"{name} is installed", "", "executor"))
    return [*checks, user_check()]


def _load(name: str) -> Any:
    points = list(entry_points(group=GROUP, name=name))
    if not points:
        installed = ", ".join(executor_names()) or "none"
        raise UsageError(
            f"There is no executor {name[:60]!r}",
            hint=f"Installed executors: {installed}. After an upgrade, install the package again.",
        )
    try:
        return points[0].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"The executor {name} can't be loaded from {points[0].value}: {error}",
            hint="Install the package that provides it again.",
        ) from error
