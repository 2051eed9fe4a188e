"""The keys of job files and definitions, and errors in words of the file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.job import Objective
from deepsquare_chain.workflow import checks
from deepsquare_chain.workflow.yamltree import Path

MAX_SHOWN_PROBLEMS: Final = 5

Count = Annotated[int, BeforeValidator(checks.whole(1, checks.UINT16_MAX))]
Name = Annotated[str, BeforeValidator(checks.name)]
Env = Annotated[
    dict[
        Annotated[str, BeforeValidator(checks.env_name)],
        Annotated[str, BeforeValidator(checks.env_value)],
    ],
    Field(max_length=checks.MAX_ENV),
]
Uses = Annotated[
    list[Annotated[str, BeforeValidator(checks.affinity)]], AfterValidator(checks.total_uses)
]


class _Section(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, alias_generator=to_camel, validate_default=False
    )


class ResourcesSection(_Section):
    tasks: Count = 1
    cpus_per_task: Count = 1
    mem_per_cpu: Annotated[int, BeforeValidator(checks.whole(1, checks.UINT24_MAX))]
    gpus: Annotated[int, BeforeValidator(checks.whole(0, checks.UINT16_MAX))] = 0


class RunSection(_Section):
    command: Annotated[str, BeforeValidator(checks.command)]
    env: Env = {}


class StepSection(_Section):
    name: Name = ""
    run: RunSection


class Runnable(_Section):
    """What runs, in job files and in definitions."""

    resources: ResourcesSection
    env: Env = {}
    steps: Annotated[list[StepSection], Field(min_length=1, max_length=checks.MAX_STEPS)]


class DefinitionDocument(Runnable):
    version: Literal[1]


class JobFileDocument(Runnable):
    name: Name = ""
    time_limit: Annotated[int | None, BeforeValidator(checks.duration)] = None
    credits: Annotated[int | None, BeforeValidator(checks.amount)] = None
    objective: Annotated[Objective, BeforeValidator(checks.objective)] = Objective.COST
    retries: Annotated[int, BeforeValidator(checks.whole(0, checks.MAX_RETRIES))] = 0
    until_spent: bool = False
    interim_payments: bool = False
    uses: Uses = []


def _keys(section: type[BaseModel]) -> tuple[str, ...]:
    return tuple(field.alias or name for name, field in section.model_fields.items())


#: Keys of each section by the names that lead to it.
KEYS: Final[Mapping[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        (): _keys(JobFileDocument),
        ("resources",): _keys(ResourcesSection),
        ("steps",): _keys(StepSection),
        ("steps", "run"): _keys(RunSection),
    }
)


def locate(error: ErrorDetails) -> Path:
    """Path of the value that an error is about."""
    return tuple(part for part in error["loc"] if part != "[key]")


def spell(path: Path) -> str:
    """A path as people write it: `steps[0].run.command`."""
    spelled = ""
    for part in path:
        if isinstance(part, int):
            spelled += f"[{part}]"
        else:
            shown = part if part.isidentifier() and len(part) <= 60 else checks.show(part)
            spelled += f".{shown}" if spelled else shown
    return spelled or "the file"


def explain(error: ErrorDetails) -> str:
    """One problem in words of the file."""
    path = locate(error)
    match error["type"]:
        case "extra_forbidden":
            return _explain_unknown(path)
        case "missing":
            text = "is missing"
        case "model_type" | "model_attributes_type" | "dict_type":
            wanted = _expected_keys(path)
            text = f"must be a mapping{wanted}, not {checks.show(error['input'])}"
        case "list_type":
            text = f"must be a list, not {checks.show(error['input'])}"
        case "bool_type":
            text = f"must be true or false, not {checks.show(error['input'])}"
        case "too_short":
            text = "must have at least one entry"
        case "too_long":
            text = f"has more than {error['ctx']['max_length']} entries"
        case _:
            text = error["msg"]
    return f"{spell(path)} {text}"


def _names(path: Path) -> tuple[str, ...]:
    return tuple(part for part in path if isinstance(part, str))


def _expected_keys(path: Path) -> str:
    keys = KEYS.get(_names(path))
    return f" with {', '.join(keys)}" if keys else ""


def _explain_unknown(path: Path) -> str:
    key, section = str(path[-1]), _names(path[:-1])
    known = KEYS.get(section, ())
    by_lower = {name.lower().replace("_", ""): name for name in known}
    close = difflib.get_close_matches(key.lower().replace("_", "")[:60], by_lower, n=1)
    if close:
        return f"{spell(path)} is an unknown key; did you mean {by_lower[close[0]]}?"
    home = next((spell(names) for names, keys in KEYS.items() if names and key in keys), "")
    if home:
        return f"{spell(path)} is an unknown key here; it belongs under {home}"
    where = spell(path[:-1]) if section else "a job file"
    return f"{spell(path)} is an unknown key; {where} has {', '.join(known)}"


def refusal(source: str, problems: Iterable[tuple[int | None, str]], hint: str) -> JobFileError:
    """The error for a file: one line a problem, the first few of them."""
    texts = [f"{source}:{line}: {text}" if line else f"{source}: {text}" for line, text in problems]
    more = len(texts) - MAX_SHOWN_PROBLEMS
    shown = texts[:MAX_SHOWN_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
    return JobFileError("\n".join(shown), hint=hint)


def problems_of(error: ValidationError, lines: Mapping[Path, int]) -> list[tuple[int | None, str]]:
    """Line and words of each problem; a missing key is reported where its section stands."""
    found = []
    for details in error.errors(include_url=False):
        path = locate(details)
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in lines), None)
        found.append((lines[known] if known is not None else None, explain(details)))
    return found


def check_document(document: type[Any], tree: Any, lines: Mapping[Path, int], source: str) -> Any:
    """Validate a tree.

    Raises:
        JobFileError: Naming each problem with its line.
    """
    try:
        return document.model_validate(tree)
    except ValidationError as error:
        raise refusal(
            source, problems_of(error, lines), "Correct the file; examples/ shows working ones."
        ) from None
