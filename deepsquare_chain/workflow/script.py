"""A definition as the bash script that an executor runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Final

from deepsquare_chain.workflow.definition import Definition, Step

_HEADER: Final = """\
#!/usr/bin/env bash
# Made from a job definition. Steps run in order, each in a shell of its own; the first that
# fails ends the job with its exit code.
set -- "$BASH"
"""


def render_script(definition: Definition, job_env: Mapping[str, str]) -> bytes:
    """The script of a job.

    Everything a customer wrote is quoted data, and never begins a line: a batch system that looks
    for directives in the script finds none of theirs.

    Args:
        definition: What runs.
        job_env: Variables that the grid sets for the job, such as `DEEPSQUARE_JOB_ID`. They stand
            beside `DEEPSQUARE_TASKS`, `_CPUS_PER_TASK`, `_MEM_PER_CPU` (MB) and `_GPUS`.

    Raises:
        ValueError: A name in `job_env` is no identifier, or a value holds a NUL.
    """
    resources = definition.resources
    grid_env = {
        "DEEPSQUARE_TASKS": str(resources.tasks),
        "DEEPSQUARE_CPUS_PER_TASK": str(resources.cpus_per_task),
        "DEEPSQUARE_MEM_PER_CPU": str(resources.mem_per_cpu),
        "DEEPSQUARE_GPUS": str(resources.gpus),
        **job_env,
    }
    blocks = [_HEADER, _exports({**definition.env, **grid_env})]
    blocks += [_step(step) for step in definition.steps]
    return "".join(blocks).encode()


def _step(step: Step) -> str:
    # exec leaves one process a step, so a signal to the job reaches the customer's shell itself.
    return f'(\n{_exports(step.run.env if step.run else {})}exec "$1" -c {_quote(step.run.command if step.run else "")}\n) || exit "$?"\n'


def _exports(env: Mapping[str, str]) -> str:
    return "".join(f"export {_identifier(key)}={_quote(value)}\n" for key, value in env.items())


def _identifier(name: str) -> str:
    if not (name.isascii() and name.isidentifier()):
        raise ValueError(f"{name[:60]!r} is no name of a variable")
    return name


def _quote(text: str) -> str:
    if "\0" in text:
        raise ValueError("a NUL byte can't be passed to a program")
    # A newline in quoted text would let that text begin a line of the script.
    return shlex.quote(text).replace("\n", "'$'\\n''")
