"""Parses the YAML and JSON of job files, and records line numbers.

Anchors, aliases and merge keys are expanded up to a maximum number of values. Duplicate keys and
tags outside YAML's core schema are refused. Only `null`, `true`, `false` and decimal integers have
types: `yes`, `1.50` and `01:30:00` remain text, as `PlainText`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import yaml
from yaml.composer import Composer
from yaml.events import AliasEvent, StreamEndEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

MAX_DEPTH: Final = 64
MAX_NODES: Final = 20_000

#: The path of a value: keys and list indices from the root.
KeyPath = tuple[str | int, ...]
#: Line (from 1) of each value, and of each key under the path of its value.
Lines = dict[KeyPath, int]

_NULL: Final = "tag:yaml.org,2002:null"
_BOOL: Final = "tag:yaml.org,2002:bool"
_INT: Final = "tag:yaml.org,2002:int"
_STR: Final = "tag:yaml.org,2002:str"
_MERGE: Final = "tag:yaml.org,2002:merge"
_CORE: Final = frozenset(
    {_NULL, _BOOL, _INT, _STR, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
)
_PATTERNS: Final = {
    _NULL: re.compile(r"(?:null|Null|NULL|~|)\Z"),
    _BOOL: re.compile(r"(?:true|false)\Z"),
    _INT: re.compile(r"(?:-?[1-9][0-9]{0,29}|0)\Z"),
}


class PlainText(str):
    """Text that was not quoted in the file."""

    __slots__ = ()


class TreeError(ValueError):
    """Text that is not valid YAML, or uses YAML features that job files do not need.

    `line` is the number of the line, from 1; None if unknown.
    """

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


class _Resolver(BaseResolver):
    """Resolves the types of plain scalars; other scalars are text."""


for _tag, _first in (
    (_NULL, ["n", "N", "~", ""]),
    (_BOOL, ["t", "f"]),
    (_INT, list("-0123456789")),
):
    _Resolver.add_implicit_resolver(_tag, _PATTERNS[_tag], _first)
_Resolver.add_implicit_resolver(_MERGE, re.compile(r"<<\Z"), ["<"])


def _is_empty(node: Node | None) -> bool:
    return node is None or (isinstance(node, ScalarNode) and not node.value and node.style is None)


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    """Composes nodes, and stops at the first feature that is not accepted in job files."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)
        self.depth = 0
        self.count = 0

    def scan_to_next_token(self) -> None:
        """Skip white space, with tabs where they don't indent: JSON and other YAML readers accept them."""
        super().scan_to_next_token()
        while self.peek() == "\t" and (self.flow_level or not self.allow_simple_key):
            self.forward()
            super().scan_to_next_token()

    def read_document(self) -> Node | None:
        """Return the only document; empty documents after it are ignored."""
        self.get_event()  # type: ignore[no-untyped-call]
        document: Node | None = None
        while not self.check_event(StreamEndEvent):
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            node = self.compose_document()
            if document is not None and not _is_empty(node):
                raise TreeError("a second document (---); a job file has one job", line)
            document = document or node
        return document

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _CORE:
            raise TreeError(
                "tags (!) beyond !!str, !!int, !!bool and !!null are not accepted", line
            )
        anchor = getattr(event, "anchor", None)
        if anchor is not None and not isinstance(event, AliasEvent):
            self.anchors.pop(anchor, None)  # in YAML, a later anchor may reuse a name
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
    """Parse one YAML document to mappings, lists, texts, integers, booleans and None.

    Returns:
        The document, and the line numbers of its parts.

    Raises:
        TreeError: The text is invalid, or uses YAML features that job files do not need.
    """
    lines: Lines = {}
    try:
        node = _Loader(text).read_document()
        return (None if node is None else _Builder(lines).build(node, ())), lines
    except TreeError:
        raise
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise TreeError("a character that YAML does not allow", line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "can't be read"
        raise TreeError(_plain(problem), mark.line + 1 if mark else None) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise TreeError(f"not valid YAML: {error}") from None


def _plain(problem: str) -> str:
    """Return the message of a problem that the YAML parser reports."""
    if problem.startswith("found character '\\t'"):
        return "not valid YAML: a tab can't be used for indentation; use spaces"
    return f"not valid YAML: {problem}"


class _Builder:
    """Builds plain values from composed nodes, and fills `lines` with their line numbers.

    Nodes repeated by aliases count each time.
    """

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._count = 0
        self._open: set[int] = set()

    def build(self, node: Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self._count += 1
        if self._count > MAX_NODES:
            raise TreeError(f"more than {MAX_NODES:,} values", line)
        if id(node) in self._open:
            raise TreeError("an alias (*) inside of its own anchor (&)", line)
        if len(path) > MAX_DEPTH:
            raise TreeError(f"nested deeper than {MAX_DEPTH} levels", line)
        self._lines.setdefault(path, line)
        if isinstance(node, ScalarNode):
            return self._scalar(node, line)
        self._open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, path)
            return self._list(node, path)
        finally:
            self._open.discard(id(node))

    def _list(self, node: Node, path: KeyPath) -> list[Any]:
        items = [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        for index, item in enumerate(items):
            # A list of variables becomes a mapping: problems name the variable.
            if isinstance(item, dict) and isinstance(item.get("key"), str):
                self._lines.setdefault((*path, str(item["key"])), self._lines[*path, index])
        return items

    @staticmethod
    def _scalar(node: ScalarNode, line: int) -> Any:
        text = str(node.value)
        if node.tag in _PATTERNS and not _PATTERNS[node.tag].match(text):
            raise TreeError(f"{text[:60]!r} does not have the type of its tag", line)
        if node.tag == _NULL:
            return None
        if node.tag == _BOOL:
            return text == "true"
        if node.tag == _INT:
            return int(text)
        if any("\ud800" <= character <= "\udfff" for character in text):
            # JSON escapes a character outside the basic plane as a surrogate pair.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return PlainText(text) if node.style is None else text

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: list[tuple[Node, Node]] = []
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE and key_node.style is None:
                merged += self._merged(value_node)
                continue
            key, line = self._key(key_node)
            if key in result:
                raise TreeError(f"the key {key[:60]!r} occurs twice", line)
            self._lines[(*path, key)] = line
            result[key] = self.build(value_node, (*path, key))
        for key_node, value_node in merged:
            key, line = self._key(key_node)
            if key not in result:
                self._lines[(*path, key)] = line
                result[key] = self.build(value_node, (*path, key))
        return result

    @staticmethod
    def _key(node: Node) -> tuple[str, int]:
        line = node.start_mark.line + 1
        if not isinstance(node, ScalarNode):
            raise TreeError("a key must be plain text", line)
        return str(node.value), line

    def _merged(self, node: Node) -> Iterator[tuple[Node, Node]]:
        """Yield the keys and values that `<<` merges; the first value of a key takes precedence."""
        line = node.start_mark.line + 1
        for mapping in node.value if isinstance(node, SequenceNode) else [node]:
            if not isinstance(mapping, MappingNode):
                raise TreeError("<< must refer to a mapping, or a list of mappings", line)
            if id(mapping) in self._open:
                raise TreeError("an alias (*) inside of its own anchor (&)", line)
            self._open.add(id(mapping))
            inner: list[tuple[Node, Node]] = []
            for key_node, value_node in mapping.value:
                self._count += 1
                if self._count > MAX_NODES:
                    raise TreeError(f"more than {MAX_NODES:,} values", line)
                if key_node.tag == _MERGE:
                    inner += self._merged(value_node)
                else:
                    yield key_node, value_node
            self._open.discard(id(mapping))
            yield from inner
