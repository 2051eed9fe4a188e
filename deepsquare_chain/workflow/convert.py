"""Converts job files from older versions of the format, and moves keys to the right section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import yaml

from deepsquare_chain.workflow.problems import keys_of, spell
from deepsquare_chain.workflow.schema import RunSection, StepSection
from deepsquare_chain.workflow.yamltree import Path, PlainText

_OF_RUN: Final = frozenset(keys_of(RunSection)) - frozenset(keys_of(StepSection))


def convert(tree: Any) -> list[str]:
    """Rewrite the plain values of a job file in place; return one line per change.

    Old keys are replaced by the current ones, and keys of `run` that are set on the step are moved
    into `run`. Ambiguous cases are left unchanged.
    """
    if not isinstance(tree, dict):
        return []
    changes = list(_resources(tree))
    for path, step in _steps(tree.get("steps"), ("steps",)):
        changes += _step(path, step)
    return changes


def dump(tree: Any, text: str) -> str:
    """Format plain values as a job file, below the leading comments of the original text."""
    head = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    body = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join([*head, body])


def _resources(tree: dict[str, Any]) -> Iterator[str]:
    resources = tree.get("resources")
    if not isinstance(resources, dict):
        return
    if "ntasks" in resources and "tasks" not in resources:
        resources["tasks"] = resources.pop("ntasks")
        yield "resources.ntasks is now resources.tasks"
    per_task, tasks = resources.get("gpusPerTask"), resources.get("tasks", 1)
    if type(per_task) is int and type(tasks) is int and "gpus" not in resources:
        del resources["gpusPerTask"]
        resources["gpus"] = per_task * tasks
        yield f"resources.gpusPerTask is now resources.gpus: {per_task * tasks}, of the whole job"
    elif type(per_task) is int and resources.get("gpus") == per_task * tasks:
        del resources["gpusPerTask"]
        yield "resources.gpusPerTask is removed; resources.gpus says the same"


def _steps(steps: Any, path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    if not isinstance(steps, list):
        return
    for index, step in enumerate(steps):
        if not isinstance(step, dict):
            continue
        step_path = (*path, index)
        yield step_path, step
        for key in ("steps", "catch", "finally"):
            yield from _steps(step.get(key), (*step_path, key))
        for key in ("for", "launch", "use"):
            inner = step.get(key)
            if isinstance(inner, dict):
                yield from _steps(inner.get("steps"), (*step_path, key, "steps"))


def _step(path: Path, step: dict[str, Any]) -> Iterator[str]:
    moved = [key for key in step if key in _OF_RUN]
    run = step.setdefault("run", {}) if moved and "command" in moved else step.get("run")
    if not isinstance(run, dict):
        return
    for key in moved:
        if key not in run:
            run[key] = step.pop(key)
            yield f"{spell((*path, key))} is now {spell((*path, 'run', key))}"
    if run.get("mapRoot") is True and "mapUid" not in run:
        del run["mapRoot"]
        run["mapUid"] = run["mapGid"] = 0
        yield f"{spell((*path, 'run', 'mapRoot'))} is now mapUid: 0 and mapGid: 0"
    interfaces = run.get("customNetworkInterfaces")
    for index, interface in enumerate(interfaces if isinstance(interfaces, list) else []):
        yield from _bore((*path, "run", "customNetworkInterfaces", index, "bore"), interface)


def _bore(path: Path, interface: Any) -> Iterator[str]:
    bore = interface.get("bore") if isinstance(interface, dict) else None
    if (
        isinstance(bore, dict)
        and "address" in bore
        and "port" in bore
        and "boreAddress" not in bore
    ):
        bore["boreAddress"] = f"{bore.pop('address')}:{bore.pop('port')}"
        yield f"{spell(path)}: address and port are now boreAddress"


class _Dumper(yaml.SafeDumper):
    """Writes text without quotes if the original had none, and commands as block scalars."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _represent_plain(dumper: yaml.SafeDumper, value: PlainText) -> yaml.ScalarNode:
    if "\n" in value:
        return _represent_text(dumper, value)
    tag = dumper.resolve(yaml.ScalarNode, str(value), (True, False))  # type: ignore[no-untyped-call]
    return dumper.represent_scalar(tag, str(value))


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(PlainText, _represent_plain)
