"""Definitions: canonical bytes, digests, and untrusted bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.job import Resources
from deepsquare_chain.workflow import Definition, Step, digest, parse_job_file

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
NAMES = st.from_regex(r"[A-Z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: name not in {"UID", "EUID", "PPID"} and not name.startswith("DEEPSQUARE_")
)
ENVS = st.dictionaries(NAMES, TEXT, max_size=3)
DEFINITIONS = st.builds(
    Definition,
    resources=st.builds(
        Resources,
        st.integers(1, 65_535),
        st.integers(1, 65_535),
        st.integers(1, 2**24 - 1),
        st.integers(0, 65_535),
    ),
    env=ENVS,
    steps=st.lists(
        st.builds(
            Step.simple,
            name=TEXT.filter(lambda text: text.isprintable() and len(text.encode()) <= 64),
            command=TEXT.filter(lambda text: bool(text.strip())),
            env=ENVS,
        ),
        min_size=1,
        max_size=4,
    ).map(tuple),
)

SIMPLE = Definition(Resources(1, 2, 3, 4), {"B": "2", "A": "1"}, (Step.simple("say", "echo ü"),))
SIMPLE_BYTES = (
    '{"env":{"A":"1","B":"2"},'
    '"resources":{"cpusPerTask":2,"gpus":4,"memPerCpu":3,"tasks":1},'
    '"steps":[{"name":"say","run":{"command":"echo ü","env":{}}}],"version":1}'
).encode()


def test_the_bytes_are_fixed_for_ever() -> None:
    assert SIMPLE.to_bytes() == SIMPLE_BYTES
    assert SIMPLE.digest == digest(SIMPLE_BYTES) == hashlib.sha256(SIMPLE_BYTES).digest()


def test_terms_are_no_part_of_the_definition() -> None:
    base = b"resources: {memPerCpu: 64}\nsteps: [{run: {command: echo}}]\n"
    more = base + b"name: x\ncredits: 5\ntimeLimit: 9\nretries: 1\nuses: [a=b]\nobjective: TIME\n"
    assert parse_job_file(base).definition.digest == parse_job_file(more).definition.digest


@given(DEFINITIONS)
def test_definitions_survive_their_bytes(definition: Definition) -> None:
    data = definition.to_bytes()
    parsed = Definition.from_bytes(data)
    assert parsed == definition
    assert parsed.to_bytes() == data


def changed(**values: Any) -> bytes:
    document = json.loads(SIMPLE_BYTES) | values
    return json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"NaN", "not valid JSON"),
        (b"9" * 5_000, "not valid JSON"),
        (b"[" * 999_999, "not valid JSON"),
        (b'{"env":' * 100_000, "not valid JSON"),
        (b"null", "must be a mapping"),
        (b"[]", "must be a mapping"),
        (b" " * 1_000_001, "larger than"),
        (SIMPLE_BYTES + b"\n", "not in canonical form"),
        (SIMPLE_BYTES.replace(b":", b": "), "not in canonical form"),
        (SIMPLE_BYTES.replace("ü".encode(), b"\\u00fc"), "not in canonical form"),
        (SIMPLE_BYTES.replace(b'"gpus":4', b'"gpus":4,"gpus":4'), "not in canonical form"),
        (SIMPLE_BYTES.replace(b'"env":{"A":"1","B":"2"},', b""), "not in canonical form"),
        (SIMPLE_BYTES.replace(b'"A":"1"', b'"A":1'), "not in canonical form"),
        (SIMPLE_BYTES.replace("ü".encode(), b"\\ud800"), "not valid JSON"),
        (SIMPLE_BYTES.replace("ü".encode(), b"\\u0000"), "NUL byte"),
        (SIMPLE_BYTES.replace(b'"gpus":4', b'"gpus":4.0'), "gpus must be a whole number"),
        (SIMPLE_BYTES.replace(b'"gpus":4', b'"gpus":1e999'), "gpus must be a whole number"),
        (changed(version=2), "version"),
        (changed(version=True), "not in canonical form"),
        (changed(version=None), "version"),
        (changed(name="x"), "name is an unknown key"),
        (changed(steps=[]), "at least one entry"),
        (changed(env={"PPID": "1"}), "bash reserves this variable"),
    ],
)
def test_invalid_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(JobFileError) as error_info:
        Definition.from_bytes(data)
    assert message in str(error_info.value)
    assert str(error_info.value).startswith(f"definition {digest(data).hex()[:16]}: ")


@settings(max_examples=500)
@given(
    st.binary(max_size=100)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["version", "env", "steps", "run", "resources", "tasks", "name"])
                | st.text(max_size=3),
                inner,
                max_size=4,
            )
        ),
    ).map(lambda tree: json.dumps(tree).encode())
)
def test_any_bytes_are_a_definition_or_refused(data: bytes) -> None:
    with pytest.raises(JobFileError):
        Definition.from_bytes(data)
