"""Job files: accepted input, its meaning, and the text of each error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import JobFileError
from deepsquare_chain.job import JobFlags, Objective, Resources, Terms
from deepsquare_chain.workflow import (
    Definition,
    JobFile,
    Step,
    load_job_file,
    parse_duration,
    parse_job_file,
)

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[2] / "examples").glob("*.yaml")
    if "\nsteps:" in path.read_text()
)

FULL = b"""\
name: hello
resources: {tasks: 2, cpusPerTask: 3, memPerCpu: 128, gpus: 4}
timeLimit: 1h30m
credits: "1.5"
objective: TIME
retries: 2
untilSpent: true
uses: ["gpu.model=h100", "compute.gflops >= 1000"]
env: {A: "b"}
steps:
  - name: greet
    run: {command: "echo hello", env: {X: "y"}}
  - run:
      command: |
        echo one
        echo two
"""

SMALL = b"resources: {memPerCpu: 64}\nsteps:\n  - run: {command: echo}\n"


def parse(text: bytes) -> JobFile:
    return parse_job_file(text, "job.yaml")


def refused(text: bytes) -> str:
    with pytest.raises(JobFileError) as error_info:
        parse(text)
    assert error_info.value.exit_code == 3
    assert error_info.value.hint
    return str(error_info.value)


def test_a_full_file() -> None:
    parsed = parse(FULL)
    assert parsed.terms() == Terms(
        amount=CREDIT * 3 // 2,
        time_limit=5_400,
        resources=Resources(tasks=2, cpus_per_task=3, mem_per_cpu=128, gpus=4),
        retries=2,
        flags=JobFlags.UNTIL_SPENT | JobFlags.NO_SELF_SCHEDULING,
        objective=Objective.TIME,
        name="hello",
        uses="gpu.model=h100,compute.gflops>=1000",
    )
    assert parsed.definition.env == {"A": "b"}
    first, second = parsed.definition.steps
    assert first == Step.simple("greet", "echo hello", {"X": "y"})
    assert second == Step.simple("", "echo one\necho two\n")


def test_a_small_file_has_defaults() -> None:
    parsed = parse(SMALL)
    assert parsed.definition.resources == Resources(1, 1, 64, 0)
    assert (parsed.name, parsed.retries, parsed.until_spent, parsed.uses) == ("", 0, False, "")
    assert parsed.objective is Objective.COST
    assert (parsed.credits, parsed.time_limit) == (None, None)


def test_arguments_win_over_the_file() -> None:
    terms = parse(FULL).terms(credits=7, time_limit=9)
    assert (terms.amount, terms.time_limit) == (7, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "credits and timeLimit are missing"),
        ({"time_limit": 5}, "credits is missing"),
        ({"credits": 5}, "timeLimit is missing"),
        ({"credits": 0, "time_limit": 5}, "the given credits must be more than 0"),
        ({"credits": -1, "time_limit": 5}, "credits must be more than 0"),
        ({"credits": 2**96, "time_limit": 5}, "credits must be more than 0 and at most"),
        ({"credits": 5, "time_limit": 0}, "timeLimit must be a whole number"),
        ({"credits": 5, "time_limit": 2**24}, "timeLimit must be a whole number"),
    ],
)
def test_terms_that_no_contract_holds(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(JobFileError, match=message):
        parse(SMALL).terms(**arguments)


def test_the_largest_terms_are_stored() -> None:
    terms = parse(SMALL).terms(credits=2**96 - 1, time_limit=2**24 - 1)
    assert (terms.amount, terms.time_limit) == (2**96 - 1, 2**24 - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "job.yaml: the file is empty"),
        (b"# only a comment\n", "job.yaml: the file is empty"),
        (b"[]", "job.yaml:1: the file must be a mapping with resources"),
        (b"just text", "job.yaml:1: the file must be a mapping"),
        (b"steps: [{run: {command: x}}]", "job.yaml:1: resources is missing"),
        (b"resources: {memPerCpu: 1}", "job.yaml:1: steps is missing"),
        (SMALL + b"timelimit: 3", "job.yaml:4: timelimit is an unknown key; did you mean timeLimit?"),
        (SMALL + b"time_limit: 3", "time_limit is an unknown key; did you mean timeLimit?"),
        (SMALL + b"CREDIT: 3", "CREDIT is an unknown key; did you mean credits?"),
        (SMALL + b"command: ls", "command is an unknown key here; it belongs under steps.run"),
        (SMALL + b"gpus: 1", "gpus is an unknown key here; it belongs under resources"),
        (SMALL + b"zzz: 1", "zzz is an unknown key; a job file has resources, env, input"),
        (SMALL + b"version: 1", "version is an unknown key"),
        (SMALL + b"'\\e[31m': 1", "is an unknown key"),
        (b"resources: {memPerCpu: 1, cpu: 1}\nsteps: []", "resources.cpu is an unknown key"),
        (b"resources: {memPerCpu: 1}\nsteps: []", "steps must have at least one entry"),
        (b"resources: {memPerCpu: 1}\nsteps: {a: b}", "steps must be a list, not a mapping"),
        (b"resources: {memPerCpu: 1}\nsteps:", "steps must be a list, not nothing"),
        (b"resources: {memPerCpu: 1}\nsteps: [ls]", "steps[0] must be a mapping with name, dependsOn, if, run"),
        (b"resources: 4\nsteps: [{run: {command: x}}]", "resources must be a mapping with tasks"),
        (b"resources: {tasks: 1}\nsteps: [{run: {command: x}}]", "resources.memPerCpu is missing"),
        (b"resources: {memPerCpu: 1}\nsteps:\n- name: a\n", "job.yaml:3: steps[0] has nothing to run; give it one of run, for"),
        (SMALL.replace(b"{command: echo}", b"{}"), "job.yaml:3: steps[0].run.command is missing"),
        (SMALL.replace(b"{command: echo}", b"ls"), "steps[0].run must be a mapping with command, shell"),
        (SMALL.replace(b"echo", b"''"), "steps[0].run.command must be a command, such as"),
        (SMALL.replace(b"echo", b"'  '"), "steps[0].run.command must be a command, such as"),
        (SMALL.replace(b"echo", b"~"), "steps[0].run.command must be text, not nothing"),
        (SMALL.replace(b"echo", b"[a]"), "steps[0].run.command must be text, not a list"),
        (SMALL.replace(b"echo", b'"a\\0b"'), "steps[0].run.command contains a NUL byte"),
        (SMALL.replace(b"echo", b'"\\ud800"'), "contains a character that is not Unicode text"),
        (SMALL.replace(b"echo", b"x" * 65_537), "steps[0].run.command is longer than 65,536 bytes"),
        (SMALL + b"name: " + b"x" * 65, "name is longer than 64 bytes"),
        (SMALL + b"name: " + "ü".encode() * 33, "name is longer than 64 bytes"),
        (SMALL + b'name: "a\\nb"', "name contains characters that can't be printed"),
        (SMALL + b'name: "\\e[2J"', "name contains characters that can't be printed"),
        (SMALL + b'name: "\\u202e"', "name contains characters that can't be printed"),
        (SMALL + b"name: {}", "name must be text, not a mapping"),
        (SMALL + b"retries: 6", "retries must be a whole number from 0 to 5, not 6"),
        (SMALL + b"retries: -1", "retries must be a whole number from 0 to 5, not -1"),
        (SMALL + b"retries: true", "retries must be a whole number from 0 to 5, not true"),
        (SMALL + b"untilSpent: yes", "untilSpent must be true or false, not 'yes'"),
        (SMALL + b"untilSpent: 1", "untilSpent must be true or false, not 1"),
        (SMALL + b"objective: FAST", "objective must be COST, TIME or ENERGY, not 'FAST'"),
        (SMALL + b"objective: 0", "objective must be COST, TIME or ENERGY, not 0"),
        (SMALL + b"objective: cost", "objective must be COST, TIME or ENERGY, not 'cost'"),
        (SMALL + b"credits: -1", "credits is not understood"),
        (SMALL + b"credits: 0", "credits must be more than 0"),
        (SMALL + b"credits: 1e3", "credits is not understood"),
        (SMALL + b"credits: 79228162515", "credits must be more than 0 and at most"),
        (SMALL + b"credits: 0.0000000000000000001", "more than 18 decimals"),
        (SMALL + b"credits: [1]", "credits must be text, not a list"),
        (SMALL + b"timeLimit: 0", "timeLimit must be a whole number from 1 to 16777215, not 0"),
        (SMALL + b"timeLimit: 16777216", "timeLimit must be a whole number from 1 to 16777215"),
        (SMALL + b"timeLimit: soon", "timeLimit must be seconds or a text such as 90s"),
        (SMALL + b"timeLimit: 0s", "timeLimit must be from 1 to 16777215 seconds, not '0s'"),
        (SMALL + b"timeLimit: 99999h", "timeLimit must be from 1 to 16777215 seconds"),
        (SMALL + b"timeLimit: false", "timeLimit must be seconds or a text such as 1h30m, not false"),
        (SMALL + b"uses: gpu=1", "uses must be a list, not 'gpu=1'"),
        (SMALL + b"uses: [gpu]", "uses[0] is not understood: 'gpu' is not an affinity"),
        (SMALL + b"uses: ['a=b,c=d']", "uses[0] must be one affinity"),
        (SMALL + b"uses: ['']", "uses[0] must be one affinity"),
        (SMALL + b"uses: [a=" + b"b" * 511 + b"]", "uses are longer than 512 bytes in total"),
        (SMALL + b"env: 5", "env must be a mapping, not 5"),
        (SMALL + b"env: [A=b]", "env[0] must be a mapping with key, value, not 'A=b'"),
        (SMALL + b"env: {1A: b}", "env.'1A' is not a name of a variable"),
        (SMALL + b"env: {'A B': b}", "env.'A B' is not a name of a variable"),
        (SMALL + b"env: {'A;rm': b}", "env.'A;rm' is not a name of a variable"),
        (SMALL + b"env: {'': b}", "env.'' is not a name of a variable"),
        (SMALL + "env: {é: b}".encode(), "is not a name of a variable"),
        (SMALL + b"env: {DEEPSQUARE_JOB_ID: '1'}", "names that begin with DEEPSQUARE_ are reserved"),
        (SMALL + b"env: {UID: '1'}", "env.UID can't be set: bash reserves this variable"),
        (SMALL + b"env: {A: {}}", "env.A must be text, not a mapping"),
        (SMALL + b"env: {A: ~}", "env.A must be text, not nothing"),
        (SMALL + b'env: {A: "\\0"}', "env.A contains a NUL byte"),
        (SMALL + b"env: {A: " + b"x" * 32_769 + b"}", "env.A is longer than 32,768 bytes"),
        (
            SMALL + b"env: {" + b",".join(b"A%d: x" % n for n in range(257)) + b"}",
            "env has more than 256 entries",
        ),
        (
            b"resources: {memPerCpu: 1}\nsteps:\n" + b"- run: {command: x}\n" * 1_001,
            "steps has more than 1000 entries",
        ),
    ],
)  # fmt: skip
def test_refusals_name_the_cause(text: bytes, message: str) -> None:
    assert message in refused(text)


@pytest.mark.parametrize("key", ["tasks", "cpusPerTask", "memPerCpu", "gpus"])
@pytest.mark.parametrize(
    "value",
    ["-1", "1.5", "'1'", "one", "true", "false", "[]", "{}", "1e3", "0x10", "010", "1_000",
     "+1", ".inf", ".nan", "16777216", "9" * 20, "9" * 5_000, "2024-01-01", "1:30"],
)  # fmt: skip
def test_resources_are_whole_numbers_of_the_contract(key: str, value: str) -> None:
    others = "" if key == "memPerCpu" else "memPerCpu: 1, "
    text = f"resources: {{{others}{key}: {value}}}\nsteps: [{{run: {{command: x}}}}]"
    assert f"resources.{key} must be a whole number from" in refused(text.encode())


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [
        ("tasks", 1, 65_535),
        ("cpusPerTask", 1, 65_535),
        ("memPerCpu", 1, 2**24 - 1),
        ("gpus", 0, 65_535),
    ],
)
def test_bounds_of_resources(key: str, low: int, high: int) -> None:
    def text(value: int) -> bytes:
        values = {"memPerCpu": 1, key: value}
        return yaml.safe_dump({"resources": values, "steps": [{"run": {"command": "x"}}]}).encode()

    for value in (low, high):
        parse(text(value))
    for value in (low - 1, high + 1):
        unit = " MB" if key == "memPerCpu" else ""
        assert f"from {low} to {high}{unit}, not {value}" in refused(text(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [", "not valid YAML"),
        (b"a: 'b", "not valid YAML"),
        (b"a:\n\t- b", "job.yaml:2: not valid YAML: a tab can't be used for indentation"),
        (b"a:\n  \tb: c", "job.yaml:2: not valid YAML: a tab can't be used for indentation"),
        (b"a: b: c", "job.yaml:1: not valid YAML"),
        (SMALL + b"\n  broken", "not valid YAML"),
        (SMALL + b"---\n" + SMALL, "job.yaml:4: a second document (---); a job file has one job"),
        (
            b"#!/bin/bash\n#SBATCH --ntasks=4\nsrun hostname\n",
            "job.yaml:1: is a script, not a job file",
        ),
        (b"#!/bin/bash\nfor i in a: b: c; do\n  x\n", "job.yaml:1: is a script, not a job file"),
        (b"%YAML 3.0\n---\na: b", "not valid YAML"),
        (b"%YAML " + b"9" * 5_000 + b".1\n---\na: b", "not valid YAML"),
        (b'a: "\\UFFFFFFFF"', "not valid YAML"),
        (b"a: b\n\x00", "job.yaml:2: a character that YAML does not allow"),
        (b"a: b\n\x1b[31m", "job.yaml:2: a character that YAML does not allow"),
        (b"a: b\nc: \xff", "job.yaml:2: not UTF-8 text"),
        ("a: b".encode("utf-16"), "not UTF-8 text"),
        (SMALL + b"steps: []", "job.yaml:4: the key 'steps' occurs twice"),
        (b"resources: {gpus: 1, gpus: 2}", "the key 'gpus' occurs twice"),
        (SMALL + b"env: {A: x, A: y}", "the key 'A' occurs twice"),
        (b"? [a]\n: b", "a key must be plain text"),
        (b"x: *a", "job.yaml:1: not valid YAML: found undefined alias"),
        (b"x: &a [*a]", "job.yaml:1: an alias (*) inside of its own anchor (&)"),
        (b"x: &a {<<: *a}", "job.yaml:1: an alias (*) inside of its own anchor (&)"),
        (b"x: {<<: 5}", "<< must refer to a mapping, or a list of mappings"),
        (b"x: !!python/object/apply:os.system [ls]", "tags (!) beyond !!str, !!int"),
        (b"x: !!int 'one'", "'one' does not have the type of its tag"),
        (b"x: ! y", "tags (!) beyond !!str, !!int"),
        (b"!!binary aGk=", "tags (!) beyond !!str, !!int"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b"- " * 100_000, "nested deeper than 64 levels"),
        (b"{a: " * 100_000, "nested deeper than 64 levels"),
        (b"? " * 100_000, "nested deeper than 64 levels"),
        (b"[" + b"a," * 400_000 + b"]", "more than 20,000 values"),
    ],
)
def test_yaml_that_is_broken_or_too_clever(text: bytes, message: str) -> None:
    assert message in refused(text)


def test_separators_that_other_readers_accept() -> None:
    tabs = SMALL.replace(b": ", b":\t").replace(b"echo}", b"echo}\t# comment")
    assert parse(tabs).definition == parse(SMALL).definition
    documents = b"#!/usr/bin/env dps\n---\n" + SMALL + b"...\n---\n# nothing\n"
    assert parse(documents).definition == parse(SMALL).definition


def test_a_file_may_be_large_but_not_too_large() -> None:
    padding = 1_000_000 - len(SMALL)
    assert parse(SMALL + b"#" * padding).definition == parse(SMALL).definition
    assert "job.yaml: larger than 1,000,000 bytes" in refused(SMALL + b"#" * (padding + 1))


def test_a_definition_may_not_grow_over_the_limit() -> None:
    # Each escaped control character takes four bytes in the file, and six in the definition.
    step = b'- run: {command: "x' + b"\\x01" * 16_000 + b'"}\n'
    text = b"resources: {memPerCpu: 1}\nsteps:\n" + step * 15
    assert len(text) < 1_000_000
    assert "defines more than 1,000,000 bytes" in refused(text)


def test_many_problems_are_reported_at_once_but_not_all() -> None:
    message = refused(SMALL + b"\n".join(b"zz%d: 1" % n for n in range(9)))
    assert message.count("is an unknown key") == 5
    assert message.endswith("... and 4 more")


def test_long_and_strange_values_are_cut_and_escaped() -> None:
    message = refused(SMALL + b'objective: "\\e[31m' + b"x" * 10_000 + b'"')
    assert "\x1b" not in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("written", "text"),
    [("5", "5"), ("-5", "-5"), ("0", "0"), ("007", "007"), ("true", "true"), ("yes", "yes"),
     ("1.50", "1.50"), ("01:30:00", "01:30:00"), ("2024-01-01", "2024-01-01"), ("0x1F", "0x1F"),
     ("True", "True"), ("'null'", "null"), ("1_000", "1_000"), ("a'b\"c", "a'b\"c")],
)  # fmt: skip
def test_plain_values_of_variables_stay_as_they_are_written(written: str, text: str) -> None:
    assert parse(SMALL + f"env: {{A: {written}}}".encode()).definition.env == {"A": text}


def test_a_plain_word_may_be_a_command() -> None:
    assert parse(SMALL.replace(b"echo", b"true")).definition.commands() == [("step 1", "true")]


def test_a_byte_order_mark_and_windows_lines_are_read() -> None:
    parsed = parse(b"\xef\xbb\xbf" + SMALL.replace(b"\n", b"\r\n"))
    assert parsed.definition == parse(SMALL).definition


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5_400), ("2h5s", 7_205), ("01:30:00", 5_400),
     ("10:00", 600), ("2d", 172_800), ("1d12h", 129_600), ("1-02:00:00", 93_600),
      ("90:00", 5_400), ("1h1m1s", 3_661), (" 5s ", 5), ("16777215", 2**24 - 1)],
)  # fmt: skip
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "0s", "00:00", "-5", "1.5h", "1h1d", "5 s", "s", "h", "1h30", "1:2:3", "10:60",
     "00:60:00", "1:00:00:00", ":30", "16777216", "9" * 30, "1m1h", "\u0665s", "5s\x00"],
)  # fmt: skip
def test_invalid_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("60", 60), ("01:30:00", 5_400), ("'90'", 90), ("2m", 120)]
)
def test_durations_in_a_file(text: str, seconds: int) -> None:
    assert parse(SMALL + f"timeLimit: {text}".encode()).time_limit == seconds


@pytest.mark.parametrize(
    ("text", "wei"), [("2", 2 * CREDIT), ("1.5", CREDIT * 3 // 2), ("'0.1'", CREDIT // 10)]
)
def test_credits_in_a_file_are_exact(text: str, wei: int) -> None:
    assert parse(SMALL + f"credits: {text}".encode()).credits == wei


def test_files_are_loaded_by_path(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(FULL)
    assert load_job_file(file).source == str(file)
    assert load_job_file(str(file)).definition == parse(FULL).definition


@pytest.mark.parametrize("name", ["missing.yaml", ".", "a\0b"])
def test_files_that_can_not_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(JobFileError, match="can't be read"):
        load_job_file(f"{tmp_path}/{name}")


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(JobFileError, match="larger than"):
        load_job_file("/dev/zero")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_valid_and_whole(path: Path) -> None:
    parsed = load_job_file(path)
    assert parsed.terms().name == path.stem
    assert Definition.from_bytes(parsed.definition.to_bytes()) == parsed.definition


def test_there_are_examples_of_each_final_status() -> None:
    names: set[Any] = {path.stem for path in EXAMPLES}
    assert names >= {"hello", "exits-3", "outlives", "cancelled", "survives", "pi"}
