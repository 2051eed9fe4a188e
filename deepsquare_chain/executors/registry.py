"""Executors by name: entry points of the group `deepsquare.executors`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Final, cast

from deepsquare_chain.errors import UsageError
from deepsquare_chain.executors.base import Executor, ExecutorContext

GROUP: Final = "deepsquare.executors"


def executor_names() -> list[str]:
    """Names of the executors that are installed."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def create_executor(name: str, context: ExecutorContext) -> Executor:
    """Make the executor of a name; its entry point is a function of the context.

    Raises:
        UsageError: No such executor is installed, it can't be loaded, or an option is wrong.
        ExecutorUnavailableError: It can't be used now.
    """
    points = list(entry_points(group=GROUP, name=name))
    if not points:
        known = ", ".join(executor_names()) or "none"
        raise UsageError(
            f"There is no executor {name[:60]!r}",
            hint=f"Installed are: {known}. After an upgrade, install the package again.",
        )
    try:
        create = cast("Callable[[ExecutorContext], Executor]", points[0].load())
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"The executor {name} can't be loaded from {points[0].value}: {error}",
            hint="Install the package that provides it again.",
        ) from error
    return create(context)
