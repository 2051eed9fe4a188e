"""A definition: what a job runs, as canonical bytes under their SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pydantic_core import from_json

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.job import Resources
from deepsquare_chain.workflow.schema import DefinitionDocument, Runnable, check_document

VERSION: Final = 1
MAX_BYTES: Final = 1_000_000
_AGAIN: Final = "Only its customer can mend that: submit the job again with this version."


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a job, with variables of its own."""

    name: str
    command: str
    env: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Definition:
    """What runs, and on which resources; terms such as credits and time limit are not part."""

    resources: Resources
    env: Mapping[str, str] = field(hash=False)
    steps: tuple[Step, ...]

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8. The same definition, the same bytes."""
        document = {
            "version": VERSION,
            "resources": {
                "tasks": self.resources.tasks,
                "cpusPerTask": self.resources.cpus_per_task,
                "memPerCpu": self.resources.mem_per_cpu,
                "gpus": self.resources.gpus,
            },
            "env": dict(self.env),
            "steps": [
                {"name": step.name, "run": {"command": step.command, "env": dict(step.env)}}
                for step in self.steps
            ],
        }
        return json.dumps(
            document, ensure_ascii=False, sort_keys=True, separators=(",", ":")
        ).encode()

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes: `definition` on chain."""
        return digest(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Definition:
        """Read canonical bytes; whoever made them is not trusted.

        Raises:
            JobFileError: The bytes are no canonical definition of this version.
        """
        source = f"definition {digest(data).hex()[:16]}"
        if len(data) > MAX_BYTES:
            raise JobFileError(f"{source}: larger than {MAX_BYTES:,} bytes", hint=_AGAIN)
        try:
            # Bounded in depth by itself: the standard parser follows Python's recursion limit,
            # which cryptographic packages raise far above what the C stack holds.
            tree = from_json(data, allow_inf_nan=False)
        except ValueError:
            raise JobFileError(f"{source}: not valid JSON", hint=_AGAIN) from None
        found = from_document(check_document(DefinitionDocument, tree, {}, source))
        # One definition, one digest: no second spelling of the same content is accepted.
        if found.to_bytes() != data:
            raise JobFileError(f"{source}: not in canonical form", hint=_AGAIN)
        return found


def digest(data: bytes) -> bytes:
    """SHA-256 of a definition's bytes."""
    return hashlib.sha256(data).digest()


def from_document(document: Runnable) -> Definition:
    """The definition in a validated document."""
    wanted = document.resources
    return Definition(
        resources=Resources(
            tasks=wanted.tasks,
            cpus_per_task=wanted.cpus_per_task,
            mem_per_cpu=wanted.mem_per_cpu,
            gpus=wanted.gpus,
        ),
        env=dict(document.env),
        steps=tuple(
            Step(name=step.name, command=step.run.command, env=dict(step.run.env))
            for step in document.steps
        ),
    )
