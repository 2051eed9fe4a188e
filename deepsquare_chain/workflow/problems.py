"""Error messages for job files: the path, the line, and where an unknown key belongs."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.workflow import checks
from deepsquare_chain.workflow.schema import JobFileDocument
from deepsquare_chain.workflow.yamltree import Path

MAX_SHOWN_PROBLEMS: Final = 5
HINT: Final = "Correct the file; docs/jobs.md explains every key, examples/ shows working files."

#: A problem: the path of the value, and the reason.
Problem = tuple[Path, str]

#: Keys of older versions of the format, by section and name.
_REPLACED: Final[Mapping[tuple[str, str], str]] = {
    ("ResourcesSection", "gpusPerTask"): (
        "is a key from before November 2023, and resources.gpus is missing: gpus counts the GPUs "
        "of the whole job; `deepsquare convert` rewrites it"
    ),
    ("ResourcesSection", "ntasks"): "is not a key of the format; use resources.tasks",
    ("RunSection", "mapRoot"): "was replaced by mapUid: 0; `deepsquare convert` rewrites it",
    ("ContainerSection", "pyxis"): "is an option of an older version; enroot is the default",
}

#: The message for `resources.gpusPerTask` next to the current key.
_GPUS_TWICE: Final = (
    "is a key from before November 2023; remove it: resources.gpus counts the GPUs of the whole job"
)
_WORDS: Final = {"missing": "is missing", "too_short": "must have at least one entry"}


def spell(path: Path) -> str:
    """Format a path, such as `steps[0].run.command`."""
    spelled = ""
    for part in path:
        if isinstance(part, int):
            spelled += f"[{part}]"
        else:
            shown = part if part.isidentifier() and len(part) <= 60 else checks.show(part)
            spelled += f".{shown}" if spelled else shown
    return spelled or "the file"


def locate(error: ErrorDetails) -> Path:
    """Return the path of the invalid value."""
    below = error.get("ctx", {}).get("below", ())
    return (*(part for part in error["loc"] if part != "[key]"), *below)


def keys_of(section: type[BaseModel]) -> tuple[str, ...]:
    """Return the allowed keys of a section of a job file."""
    return tuple(children_by_key(section))


@cache
def children_by_key(section: type[BaseModel]) -> Mapping[str, type[BaseModel] | None]:
    """Map the keys of a section to the nested section of each key, or to None."""
    hidden = {"commit", "module"} if section.__name__ == "UseSection" else set()
    return {
        field.alias or name: _section_in(field.annotation)
        for name, field in section.model_fields.items()
        if name not in hidden
    }


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        section = _section_in(part)
        if section is not None:
            return section
    return None


def _section_at(root: type[BaseModel], path: Path) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    for part in path:
        if section is None:
            return None
        if isinstance(part, str):
            section = children_by_key(section).get(part)
    return section


def _home(section: type[BaseModel], key: str) -> tuple[str, ...] | None:
    """Return the keys from a section to the nearest nested section that has the key."""
    queue: deque[tuple[type[BaseModel], tuple[str, ...]]] = deque([(section, ())])
    seen = {section}
    while queue:
        current, names = queue.popleft()
        for name, child in children_by_key(current).items():
            if child is None or child in seen:
                continue
            seen.add(child)
            if key in children_by_key(child):
                return (*names, name)
            queue.append((child, (*names, name)))
    return None


def explain(error: ErrorDetails, root: type[BaseModel], tree: Any) -> str:
    """Return the message of one problem in a tree of plain values, without its path."""
    path = locate(error)
    match error["type"]:
        case "extra_forbidden":
            return _explain_unknown(path, root, tree)
        case "model_type" | "model_attributes_type" | "dict_type":
            section = _section_at(root, path)
            keys = f" with {', '.join(keys_of(section))}" if section else ""
            return f"must be a mapping{keys}, not {checks.show(error['input'])}"
        case "list_type":
            return f"must be a list, not {checks.show(error['input'])}"
        case "too_long":
            return f"has more than {error['ctx']['max_length']} entries"
        case kind:
            return _WORDS.get(kind, error["msg"])


def _explain_unknown(path: Path, root: type[BaseModel], tree: Any) -> str:
    key, section = str(path[-1]), _section_at(root, path[:-1])
    if section is None:
        return "is an unknown key"
    replaced = _REPLACED.get((section.__name__, key))
    if replaced:
        is_twice = key == "gpusPerTask" and "gpus" in _value_at(tree, path[:-1])
        return _GPUS_TWICE if is_twice else replaced
    below = _home(section, key)
    if below:
        return f"is an unknown key here; it belongs under {spell((*path[:-1], *below))}"
    known = keys_of(section)
    by_lower = {name.lower().replace("_", ""): name for name in known}
    close = difflib.get_close_matches(key.lower().replace("_", "")[:60], by_lower, n=1)
    if close:
        return f"is an unknown key; did you mean {by_lower[close[0]]}?"
    elsewhere = _nearest(path, root)
    if elsewhere:
        return f"is an unknown key here; it belongs under {elsewhere}"
    section_name = spell(path[:-1]) if len(path) > 1 else "a job file"
    return f"is an unknown key; {section_name} has {', '.join(known)}"


def _nearest(path: Path, root: type[BaseModel]) -> str | None:
    """Return the section for the key at the end of a path: the nearest around it, or below those."""
    key = str(path[-1])
    for length in range(len(path) - 2, -1, -1):
        section = _section_at(root, path[:length])
        if section is None or isinstance(path[length], int):
            continue  # a list
        if key in children_by_key(section):
            return spell(path[:length]) if length else "the top level"
        below = _home(section, key)
        if below:
            return spell((*path[:length], *below))
    return None


def _value_at(tree: Any, path: Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def problems_of(error: ValidationError, root: type[BaseModel], tree: Any) -> Iterator[Problem]:
    """Yield path and message of each problem in a tree of plain values."""
    for details in error.errors(include_url=False):
        yield locate(details), explain(details, root, tree)


def refusal(
    source: str, problems: Iterable[tuple[int | None, str]], hint: str = HINT
) -> JobFileError:
    """Return the error for a file: one line per problem, at most `MAX_SHOWN_PROBLEMS`."""
    texts = [f"{source}:{line}: {text}" if line else f"{source}: {text}" for line, text in problems]
    more = len(texts) - MAX_SHOWN_PROBLEMS
    shown = texts[:MAX_SHOWN_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
    return JobFileError("\n".join(shown), hint=hint)


def place(problem: Problem, lines: Mapping[Path, int]) -> tuple[int | None, str]:
    """Return line and message of a problem; a missing key has the line of its section."""
    path, text = problem
    known_path = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in lines), None)
    return (lines[known_path] if known_path is not None else None), f"{spell(path)} {text}"


def drop_unknown(tree: Any, root: type[BaseModel] = JobFileDocument) -> list[Problem]:
    """Remove unknown keys from a tree in place, and return them as problems."""
    dropped: list[Problem] = []
    while True:
        try:
            root.model_validate(tree, by_name=False, by_alias=True)
        except ValidationError as error:
            unknown = [
                details
                for details in error.errors(include_url=False)
                if details["type"] == "extra_forbidden"
            ]
            if not unknown:
                return dropped
            for details in unknown:
                path = locate(details)
                dropped.append((path, explain(details, root, tree)))
                _remove(tree, path)
        else:
            return dropped


def _remove(tree: Any, path: Path) -> None:
    del _value_at(tree, path[:-1])[path[-1]]
