"""The vocabulary of jobs: statuses, the transition table, affinities."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.job import (
    TRANSITIONS,
    Affinity,
    Hardware,
    JobStatus,
    Objective,
    Offer,
    Prices,
    Provider,
    ProviderStatus,
    Resources,
    can_transition,
    matches,
    parse_uses,
)

NONE, PENDING, META_SCHEDULED, SCHEDULED, RUNNING = list(JobStatus)[:5]
CANCELLED, FINISHED, FAILED, OUT_OF_CREDITS, PANICKED = list(JobStatus)[5:]

# The table of the protocol, written out once more and apart from the code.
ARROWS = {
    (NONE, PENDING),
    (PENDING, META_SCHEDULED),
    (META_SCHEDULED, SCHEDULED),
    (SCHEDULED, RUNNING),
    (META_SCHEDULED, CANCELLED),
    (SCHEDULED, CANCELLED),
    (RUNNING, CANCELLED),
    (RUNNING, FINISHED),
    (RUNNING, FAILED),
    (RUNNING, OUT_OF_CREDITS),
    (META_SCHEDULED, PANICKED),
    (SCHEDULED, PANICKED),
    (RUNNING, PANICKED),
    (PENDING, CANCELLED),
    (META_SCHEDULED, PENDING),
    (SCHEDULED, PENDING),
}


def test_names_and_numbers_are_those_of_the_contracts() -> None:
    assert [status.name for status in JobStatus] == [
        "NONE",
        "PENDING",
        "META_SCHEDULED",
        "SCHEDULED",
        "RUNNING",
        "CANCELLED",
        "FINISHED",
        "FAILED",
        "OUT_OF_CREDITS",
        "PANICKED",
    ]
    assert [int(status) for status in JobStatus] == list(range(10))
    assert [objective.name for objective in Objective] == ["COST", "TIME", "ENERGY"]
    assert [status.name for status in ProviderStatus] == [
        "NONE",
        "WAITING_APPROVAL",
        "ACTIVE",
        "DRAINING",
        "BANNED",
    ]


@pytest.mark.parametrize(("before", "after"), list(product(JobStatus, JobStatus)))
def test_each_pair_of_statuses(before: JobStatus, after: JobStatus) -> None:
    assert can_transition(before, after) == ((before, after) in ARROWS)


def test_there_are_fifteen_transitions_and_the_creation() -> None:
    assert sum(len(targets) for targets in TRANSITIONS.values()) == 16
    assert set(TRANSITIONS) == set(JobStatus)


@pytest.mark.parametrize("status", list(JobStatus))
def test_families_of_statuses(status: JobStatus) -> None:
    assert status.is_live == (status in {PENDING, META_SCHEDULED, SCHEDULED, RUNNING})
    assert status.is_assigned == (status in {META_SCHEDULED, SCHEDULED, RUNNING})
    assert status.is_final == (status in {CANCELLED, FINISHED, FAILED, OUT_OF_CREDITS, PANICKED})
    assert not (status.is_final and TRANSITIONS[status])


def test_the_table_can_not_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[FINISHED] = frozenset({RUNNING})  # type: ignore[index]


def test_resources_of_the_whole_job() -> None:
    resources = Resources(tasks=3, cpus_per_task=4, mem_per_cpu=100, gpus=2)
    assert (resources.cpus, resources.memory) == (12, 1_200)
    with pytest.raises(dataclasses.FrozenInstanceError):
        resources.tasks = 1  # type: ignore[misc]


def test_a_provider_with_labels_can_be_put_into_a_set() -> None:
    provider = Provider(
        id=1,
        account="0x01",
        status=ProviderStatus.ACTIVE,
        approved_until=0,
        version=1,
        pending_version=0,
        hardware=Hardware(1, 1, 1, 0),
        offer=Offer(1, 1, 0),
        prices=Prices(1, 1, 1),
        labels={"gpu.model": "h100"},
    )
    assert len({provider, provider}) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("   ", []),
        ("gpu.model=h100", [("gpu.model", "=", "h100")]),
        ("a!=b", [("a", "!=", "b")]),
        (
            "a<1,b<=2,c>3,d>=4",
            [("a", "<", "1"), ("b", "<=", "2"), ("c", ">", "3"), ("d", ">=", "4")],
        ),
        ("region:in:eu|ch", [("region", ":in:", "eu|ch")]),
        (" gpu.model = h100 , a > 1 ", [("gpu.model", "=", "h100"), ("a", ">", "1")]),
        ("os=debian 12", [("os", "=", "debian 12")]),
        ("a=x=y", [("a", "=", "x=y")]),
    ],
)
def test_uses_are_read(text: str, expected: list[tuple[str, str, str]]) -> None:
    assert parse_uses(text) == tuple(Affinity(*parts) for parts in expected)


@pytest.mark.parametrize(
    "text",
    [
        "gpu",
        "=h100",
        "gpu=",
        "gpu= ",
        "a==b",
        "a=<b",
        "a=>b",
        "a=!b",
        "a:in:",
        ":in:a",
        "a~b",
        "a=b,",
        ",",
        "a=b,,c=d",
        "a b=c",
        "a=b\nc=d",
        "a=\x1b[31m",
        "-a=b",
        "ä=b",
    ],
)
def test_invalid_affinities_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an affinity"):
        parse_uses(text)


@pytest.mark.parametrize(
    ("uses", "labels", "expected"),
    [
        ("", {}, True),
        ("a=b", {"a": "b"}, True),
        ("a=b", {"a": "B"}, False),
        ("a=b", {}, False),
        ("a=1", {"a": "1.0"}, False),
        ("a!=b", {"a": "b"}, False),
        ("a!=b", {"a": "c"}, True),
        ("a!=b", {}, True),
        ("a<10", {"a": "9"}, True),
        ("a<10", {"a": "10"}, False),
        ("a<=10", {"a": "10.0"}, True),
        ("a<=10", {"a": "11"}, False),
        ("a>9", {"a": "10"}, True),
        ("a>10", {"a": "10"}, False),
        ("a>=1e3", {"a": "1000"}, True),
        ("a>=1001", {"a": "1000"}, False),
        ("a>=0.1", {"a": "0.10"}, True),
        ("a>=-5", {"a": "-4"}, True),
        ("a>=1", {}, False),
        ("a>=1", {"a": "many"}, False),
        ("a>=many", {"a": "1"}, False),
        ("a>=1", {"a": "nan"}, False),
        ("a>=1", {"a": "inf"}, False),
        ("a>=1", {"a": "1_000"}, False),
        ("a>=1", {"a": "1e9999"}, False),
        ("a:in:x|y", {"a": "y"}, True),
        ("a:in:x|y", {"a": "z"}, False),
        ("a:in:x|y", {"a": "x|y"}, False),
        ("a:in:x|y", {}, False),
        ("a=1,b=2", {"a": "1", "b": "2"}, True),
        ("a=1,b=2", {"a": "1", "b": "3"}, False),
    ],
)
def test_labels_meet_affinities(uses: str, labels: dict[str, str], expected: bool) -> None:
    assert matches(parse_uses(uses), labels) is expected


def test_an_unknown_operator_matches_nothing() -> None:
    assert not matches([Affinity("a", "~", "1")], {"a": "1"})


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        affinities = parse_uses(text)
    except ValueError:
        return
    # Formatting the parsed value gives an equivalent text.
    assert parse_uses(",".join(map(str, affinities))) == affinities


@given(
    st.text(max_size=20), st.text(min_size=1, max_size=20), st.sampled_from(["<", ">", "<=", ">="])
)
def test_order_never_fails_on_strange_labels(label: str, value: str, op: str) -> None:
    assert matches([Affinity("a", op, value)], {"a": label}) in {True, False}


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_order_is_that_of_the_numbers(label: int, value: int) -> None:
    labels = {"a": str(label)}
    assert matches([Affinity("a", "<", str(value))], labels) == (label < value)
    assert matches([Affinity("a", ">=", str(value))], labels) == (label >= value)
