"""Reads the small, unambiguous part of YAML that a job file needs, and remembers lines.

Anchors, aliases, tags, merge keys and duplicate keys are refused, so a file means what it shows
and can't grow while it is read. Only `null`, `true`, `false` and decimal integers are more than
text: `yes`, `1.50` and `01:30:00` stay the text that was written.
"""

from __future__ import annotations

import re
from typing import Any, Final

import yaml
from yaml.composer import Composer
from yaml.events import AliasEvent, NodeEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

MAX_DEPTH: Final = 12
MAX_NODES: Final = 20_000

#: Where something stands: keys and positions from the root.
Path = tuple[str | int, ...]
#: Line (from 1) of each value, and of each key under the path of its value.
Lines = dict[Path, int]

_NULL: Final = "tag:yaml.org,2002:null"
_BOOL: Final = "tag:yaml.org,2002:bool"
_INT: Final = "tag:yaml.org,2002:int"


class TreeError(ValueError):
    """Text that is no YAML, or more YAML than a job file needs.

    Args:
        problem: What is wrong.
        line: Where, from 1; None when it can't be told.
    """

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


class _Resolver(BaseResolver):
    """Types of plain scalars; everything else is text."""


for _tag, _pattern, _first in (
    (_NULL, r"null|~|", ["n", "~", ""]),
    (_BOOL, r"true|false", ["t", "f"]),
    (_INT, r"-?[1-9][0-9]{0,29}|0", list("-0123456789")),
):
    _Resolver.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    """Composes nodes lazily, and stops at the first thing that a job file does not need."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)
        self.depth = 0
        self.count = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
            raise TreeError("anchors (&) and aliases (*) are not accepted", line)
        if getattr(event, "tag", None) is not None:
            raise TreeError("tags (!) are not accepted", line)
        self.count += 1
        if self.count > MAX_NODES:
            raise TreeError(f"more than {MAX_NODES:,} values", line)
        if self.depth >= MAX_DEPTH:
            raise TreeError(f"nested deeper than {MAX_DEPTH} levels", line)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read_tree(text: str) -> tuple[Any, Lines]:
    """Plain mappings, lists, texts, integers, booleans and None of one YAML document.

    Returns:
        The document, and the lines where its parts stand.

    Raises:
        TreeError: The text is broken, or uses what a job file does not need.
    """
    lines: Lines = {}
    try:
        node = _Loader(text).get_single_node()
        return (None if node is None else _build(node, (), lines)), lines
    except TreeError:
        raise
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise TreeError("a character that YAML does not allow", line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "can't be read"
        raise TreeError(f"not valid YAML: {problem}", mark.line + 1 if mark else None) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise TreeError(f"not valid YAML: {error}") from None


def _build(node: Node, path: Path, lines: Lines) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, MappingNode):
        return _build_mapping(node, path, lines)
    if isinstance(node, SequenceNode):
        return [_build(item, (*path, at), lines) for at, item in enumerate(node.value)]
    assert isinstance(node, ScalarNode)  # noqa: S101 - YAML has no fourth kind of node
    text = str(node.value)
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text == "true"
    return int(text) if node.tag == _INT else text


def _build_mapping(node: MappingNode, path: Path, lines: Lines) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode):
            raise TreeError("a key must be plain text", line)
        key = str(key_node.value)
        if key in result:
            raise TreeError(f"the key {key[:60]!r} stands twice", line)
        lines[(*path, key)] = line
        result[key] = _build(value_node, (*path, key), lines)
    return result
