"""Definitions: the steps of a job as canonical bytes, identified by their SHA-256."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import from_json

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.job import Resources
from deepsquare_chain.workflow.schema import (
    ArraySection,
    DefinitionDocument,
    Runnable,
    Section,
    StepSection,
    TransferSection,
    VirtualNetworkSection,
)
from deepsquare_chain.workflow.validation import (
    Problem,
    broken_rules,
    job_file_error,
    problems_of,
    walk,
    with_line,
)
from deepsquare_chain.workflow.yamltree import KeyPath

Step = StepSection

VERSION: Final = 1
MAX_BYTES: Final = 1_000_000
_RESUBMIT_HINT: Final = "Only its customer can correct it: submit the job again with this version."
_REDACTED: Final = "(hidden)"
_SECRET_KEYS: Final = frozenset(
    {
        *("accessKeyId", "password", "preSharedKey", "privateKey", "secret", "secretAccessKey"),
        *("secrets", "username"),
    }
)
_SECRET_NAME: Final = re.compile(
    r"PASS|SECRET|TOKEN|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|(?:^|_)(?:PW|PWD|KEY|AUTH)(?:_|$)|DATABASE_URL",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Definition:
    """The steps of a job and the resources they run on, without terms such as credits."""

    resources: Resources
    env: Mapping[str, str] = field(hash=False)
    steps: tuple[Step, ...] = field(hash=False)
    input: TransferSection | None = None
    input_mode: int | None = None
    output: TransferSection | None = field(default=None)
    continuous_output_sync: bool = False
    virtual_networks: tuple[VirtualNetworkSection, ...] = ()
    array: ArraySection | None = None
    recipients: tuple[str, ...] = ()
    secrets: str | None = None

    def to_bytes(self) -> bytes:
        """Serialise to canonical JSON: sorted keys, no spaces, UTF-8.

        Equal definitions give equal bytes. Keys with their default value are left out, except
        those of the first version of the format.
        """
        return json.dumps(
            self.document(), ensure_ascii=False, sort_keys=True, separators=(",", ":")
        ).encode()

    def document(self) -> dict[str, Any]:
        """Return the definition as plain values, with the keys of the file."""
        document: dict[str, Any] = {
            "version": VERSION,
            "resources": {
                "tasks": self.resources.tasks,
                "cpusPerTask": self.resources.cpus_per_task,
                "memPerCpu": self.resources.mem_per_cpu,
                "gpus": self.resources.gpus,
            },
            "env": dict(self.env),
            "steps": [_step(_plain(step)) for step in self.steps],
        }
        optional: dict[str, Any] = {
            "input": self.input and _plain(self.input),
            "inputMode": self.input_mode,
            "output": self.output and _plain(self.output),
            "continuousOutputSync": self.continuous_output_sync or None,
            "virtualNetworks": [_plain(network) for network in self.virtual_networks] or None,
            "recipients": list(self.recipients) or None,
            "secrets": self.secrets,
            "array": self.array and _plain(self.array),
        }
        return document | {key: value for key, value in optional.items() if value is not None}

    def redacted(self) -> dict[str, Any]:
        """Return the document without secrets, for pages and other readers than the provider.

        Hides keys and logins of storage, registries and networks, variables with names such as
        DB_PASSWORD, and the part of a URL before @ or after ?.
        """
        hidden: dict[str, Any] = _redact(self.document())
        return hidden

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes; the field `definition` on chain."""
        return digest(self.to_bytes())

    def commands(self) -> list[tuple[str, str]]:
        """Return name or position, and command, of all steps with a command, in file order."""
        return [
            (step.name or f"step {_spell(path)}", step.run.command)
            for path, step in walk(self.steps)
            if step.run
        ]

    def with_env(self, env: Mapping[str, str]) -> Definition:
        """Return a copy with more variables of the whole job, which override those of the file.

        Raises:
            JobFileError: A name or value is not allowed.
        """
        document = self.document()
        document["env"] = {**document["env"], **env}
        return definition_of(document, "the given variables")

    def encrypted_to(self, recipients: Sequence[str]) -> Definition:
        """Return a copy with more age public keys to which log and results are encrypted.

        Raises:
            JobFileError: A key is invalid, or there are too many.
        """
        document = self.document()
        document["recipients"] = list(dict.fromkeys([*self.recipients, *recipients]))
        return definition_of(document, "the given recipients")

    def in_array(self, index: int, size: int) -> Definition:
        """Return a copy for one job of an array.

        It sets DEEPSQUARE_ARRAY_INDEX and DEEPSQUARE_ARRAY_SIZE.
        """
        return replace(self, array=ArraySection(index=index, size=size))

    @classmethod
    def from_bytes(cls, data: bytes) -> Definition:
        """Parse canonical bytes from an untrusted source.

        Raises:
            JobFileError: The bytes are not a canonical definition of this version.
        """
        source = f"definition {digest(data).hex()[:16]}"
        if len(data) > MAX_BYTES:
            raise JobFileError(f"{source}: larger than {MAX_BYTES:,} bytes", hint=_RESUBMIT_HINT)
        try:
            # This parser limits the depth itself. The standard parser uses Python's recursion limit,
            # which cryptographic packages raise far above what the C stack can hold.
            tree = from_json(data, allow_inf_nan=False)
        except ValueError:
            raise JobFileError(f"{source}: not valid JSON", hint=_RESUBMIT_HINT) from None
        definition = definition_of(tree, source)
        # Each definition has one digest: other encodings of the same content are refused.
        if definition.to_bytes() != data:
            raise JobFileError(f"{source}: not in canonical form", hint=_RESUBMIT_HINT)
        return definition


def definition_of(tree: Any, source: str) -> Definition:
    """Validate plain values and convert them to a definition.

    Raises:
        JobFileError: The values are invalid; the message names each problem.
    """
    try:
        document = DefinitionDocument.model_validate(tree, by_name=False, by_alias=True)
    except ValidationError as error:
        problems: list[Problem] = list(problems_of(error, DefinitionDocument, tree))
    else:
        problems = list(broken_rules(document, is_definition=True))
    if problems:
        raise job_file_error(source, (with_line(problem, {}) for problem in problems))
    return from_document(document, array=document.array, secrets=document.secrets)


def digest(data: bytes) -> bytes:
    """Return the SHA-256 of a definition's bytes."""
    return hashlib.sha256(data).digest()


def from_document(
    document: Runnable, array: ArraySection | None = None, secrets: str | None = None
) -> Definition:
    """Convert a validated document to a definition."""
    return Definition(
        resources=Resources(**dict(document.resources)),
        env=dict(document.env),
        steps=tuple(document.steps),
        input=document.input,
        input_mode=document.input_mode,
        output=document.output,
        continuous_output_sync=document.continuous_output_sync,
        virtual_networks=tuple(document.virtual_networks),
        recipients=tuple(document.recipients),
        secrets=secrets,
        array=array,
    )


def _plain(section: Section) -> dict[str, Any]:
    """Return a section as plain values, without those that are the default."""
    return section.model_dump(by_alias=True, exclude_defaults=True)


def _step(step: dict[str, Any]) -> dict[str, Any]:
    """Add the keys of the first version of the format, which are always written."""
    step.setdefault("name", "")
    if "run" in step:
        step["run"].setdefault("env", {})
    use = step.get("use", {})
    for holder in (step, step.get("for", {}), step.get("launch", {}), use, use.get("module", {})):
        for key in ("steps", "catch", "finally"):
            for inner in holder.get(key, []):
                _step(inner)
    return step


def _redact(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        is_env = key in {"env", "args"}

        def is_secret(name: str) -> bool:
            return name in _SECRET_KEYS or bool(is_env and _SECRET_NAME.search(name))

        return {n: _REDACTED if is_secret(n) else _redact(item, n) for n, item in value.items()}
    if isinstance(value, list):
        return [_redact(item, key) for item in value]
    if isinstance(value, str) and "://" in value and key != "command":
        without_query = re.sub(r"\?.*", f"?{_REDACTED}", value)
        return re.sub(r"(://)[^/@\s]*@", rf"\1{_REDACTED}@", without_query)
    return value


def _spell(path: KeyPath) -> str:
    return ".".join(str(part + 1) for part in path if isinstance(part, int))
