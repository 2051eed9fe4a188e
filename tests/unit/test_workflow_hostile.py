"""Thousands of hostile job files: each is accepted or refused, quickly and with a short error."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.job import matches, parse_uses
from deepsquare_chain.workflow import Definition, JobFile, parse_job_file, render_script

VALID = b"""\
name: hello
resources: {tasks: 2, cpusPerTask: 3, memPerCpu: 128, gpus: 4}
timeLimit: 1h30m
credits: "1.5"
objective: TIME
retries: 2
untilSpent: true
uses: ["gpu.model=h100", "compute.gflops>=1000"]
env: {A: "b", C: 5}
steps:
  - name: greet
    run: {command: "echo hello", env: {X: "y"}}
  - run:
      command: |
        echo one
        echo two
"""

WORDS = [
    b"name", b"resources", b"tasks", b"cpusPerTask", b"memPerCpu", b"gpus", b"timeLimit", b"credits",
    b"objective", b"retries", b"untilSpent", b"uses", b"env", b"steps", b"run", b"command", b"COST",
    b": ", b":", b"- ", b"\n", b"\n  ", b"\n    ", b"\t", b" ", b"{", b"}", b"[", b"]", b",", b"? ",
    b"&a ", b"*a", b"!!int ", b"! ", b"<<: ", b"|", b">", b"|+9", b"'", b'"', b"#", b"%YAML 1.1\n",
    b"%TAG ! tag:\n", b"---\n", b"...\n", b"\\x", b'"\\u', b'"\\U00110000"', b"~", b"null", b"true",
    b"1", b"-1", b"0", b"1.5", b"1e999", b".inf", b"0x", b"9" * 40, b"a", b"echo", b"\xc3\xa9",
    b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\r", b"\x85", b"$(rm -rf /)", b"@", b"`",
]  # fmt: skip

KEYS = st.sampled_from(
    ["name", "resources", "tasks", "cpusPerTask", "memPerCpu", "gpus", "timeLimit", "credits",
     "objective", "retries", "untilSpent", "uses", "env", "steps", "run", "command", "A", ""]
)  # fmt: skip
LEAVES: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70_000)
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["echo hi", "10m", "1.5", "COST", "a=b", "01:30:00"])
    | st.dates()
    | st.binary(max_size=4)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            KEYS | st.text(max_size=4) | st.integers() | st.booleans(), inner, max_size=6
        )
    ),
    max_leaves=20,
)


def mostly(valid: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly valid values with an occasional invalid one, so that whole files are often valid."""
    return st.one_of(*[valid] * 7, LEAVES)


RESOURCES = st.dictionaries(
    st.sampled_from(["tasks", "cpusPerTask", "memPerCpu", "gpus"]),
    mostly(st.integers(1, 9)),
    max_size=4,
).map(lambda parsed: {"memPerCpu": 1, **parsed})
ENVS = st.dictionaries(
    st.sampled_from(["A", "B_1", "PATH"]) | st.text(max_size=3),
    mostly(st.text(max_size=5)),
    max_size=2,
)
STEPS = st.lists(
    st.fixed_dictionaries(
        {
            "run": st.fixed_dictionaries(
                {"command": mostly(st.just("echo ") | st.text(min_size=1, max_size=20))}
            )
        },
        optional={"name": mostly(st.text("ab ", max_size=10)), "env": mostly(ENVS)},
    ),
    min_size=1,
    max_size=3,
)
NEARLY = st.fixed_dictionaries(
    {"resources": RESOURCES, "steps": STEPS},
    optional={
        "name": mostly(st.text("abc ", max_size=70)),
        "timeLimit": mostly(st.sampled_from(["5s", "1h", 7])),
        "credits": mostly(st.sampled_from(["1.5", "0.000001", 3])),
        "objective": mostly(st.sampled_from(["COST", "TIME", "ENERGY"])),
        "retries": mostly(st.integers(0, 5)),
        "untilSpent": mostly(st.booleans()),
        "uses": st.lists(mostly(st.sampled_from(["a=b", "c>=1", "d:in:x|y"])), max_size=2),
        "env": mostly(ENVS),
    },
)


def accept_or_refuse(text: bytes) -> bool:
    """Return whether a file is valid; checks that a valid one can be used."""
    try:
        parsed = parse_job_file(text, "job.yaml")
    except JobFileError as error:
        message = str(error)
    else:
        accept(parsed)
        return True
    assert message.startswith("job.yaml:")
    assert len(message) < 5_000
    assert message.replace("\n", "").isprintable()
    return False


def accept(parsed: JobFile) -> None:
    terms = parsed.terms(credits=parsed.credits or 1, time_limit=parsed.time_limit or 1)
    assert len(terms.name.encode()) <= 64
    assert len(terms.uses.encode()) <= 512
    matches(parse_uses(terms.uses), {"a": "b"})
    assert Definition.from_bytes(parsed.definition.to_bytes()) == parsed.definition
    render_script(parsed.definition, {"DEEPSQUARE_JOB_ID": "1"}).decode()


def test_the_valid_file_is_valid() -> None:
    assert accept_or_refuse(VALID)


@settings(max_examples=2_000)
@given(st.binary(max_size=300))
def test_random_bytes(text: bytes) -> None:
    assert not accept_or_refuse(text)


@settings(max_examples=3_000)
@given(st.lists(st.sampled_from(WORDS), max_size=40).map(b"".join))
def test_random_pieces_of_yaml(text: bytes) -> None:
    accept_or_refuse(text)


@settings(max_examples=2_500)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(VALID)),
            st.integers(0, 12),
            st.sampled_from(WORDS) | st.binary(max_size=3),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_small_changes_of_a_valid_file(changes: list[tuple[int, int, bytes]]) -> None:
    text = VALID
    for at, length, piece in changes:
        text = text[:at] + piece + text[at + length :]
    accept_or_refuse(text)


@settings(max_examples=300)
@given(st.dictionaries(KEYS, TREES, max_size=8), st.booleans())
def test_random_trees(tree: dict[str, Any], flow: bool) -> None:
    accept_or_refuse(yaml.safe_dump(tree, default_flow_style=flow).encode())


@settings(max_examples=700)
@given(NEARLY, st.booleans())
def test_nearly_valid_trees(tree: dict[str, Any], unicode: bool) -> None:
    accept_or_refuse(yaml.safe_dump(tree, allow_unicode=unicode).encode())


LAUGHS = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (name, name, b",".join([b"*%c" % (name - 1)] * 9))
    for name in range(ord("b"), ord("z"))
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(LAUGHS, id="billion laughs"),
        pytest.param(b"a: &a\n  b: *a\n", id="a loop"),
        pytest.param(b"[" * 999_999, id="brackets"),
        pytest.param(b"- " * 499_999, id="dashes"),
        pytest.param(b"".join(b" " * n + b"a:\n" for n in range(1_000)), id="stairs"),
        pytest.param(b"".join(b"k%d: 1\n" % n for n in range(90_000)), id="keys"),
        pytest.param(b"steps:\n" + b"- run: {command: x}\n" * 49_000, id="steps"),
        pytest.param(b"#\n" * 499_999, id="comments"),
        pytest.param(b"a " * 499_999, id="words"),
        pytest.param(b"a\n" * 499_999, id="folded words"),
        pytest.param(b"'" + b"''" * 499_000 + b"'", id="quotes"),
        pytest.param(b"%A b\n" * 199_999, id="directives"),
        pytest.param(b"---\n" * 249_999, id="documents"),
        pytest.param(b"1" * 999_999, id="digits"),
        pytest.param(b"!" * 999_999, id="tags"),
        pytest.param(b"!%41" * 249_999, id="escaped tag"),
        pytest.param(b"&" + b"a" * 999_998, id="anchor"),
        pytest.param(b"a: |\n" + b" \n" * 490_000, id="block"),
    ],
)
def test_a_megabyte_of_hostile_yaml_is_refused_in_seconds(text: bytes) -> None:
    started = time.process_time()
    assert not accept_or_refuse(text)
    assert time.process_time() - started < 10
