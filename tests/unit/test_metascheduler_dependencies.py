"""Dependencies and array limits: pending jobs that the policy must not see."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepsquare_chain.job import (
    Conditions,
    Dependency,
    Job,
    JobStatus,
    Placement,
    matches,
    parse_conditions,
    parse_ids,
    parse_uses,
    spell_ids,
)
from deepsquare_chain.metascheduler import dependencies as holds
from deepsquare_chain.metascheduler.dependencies import Hold, dependencies
from tests.support import workloads

pytestmark = pytest.mark.unit

ALICE, BOB = "0x" + "a1" * 20, "0x" + "b0" * 20
JOB = workloads.job(20, customer=ALICE)
OK, BAD = JobStatus.FINISHED, JobStatus.FAILED
ENDS = [status for status in JobStatus if status.is_final]


def array_job(
    waiting: list[tuple[Job, str]],
    assigned: list[tuple[Job, str]],
    statuses: dict[int, JobStatus],
    now: int = 1_000,
) -> dict[int, Hold]:
    return holds.held(waiting, assigned, statuses, now)


def job(number: int, customer: str = ALICE) -> Job:
    return replace(JOB, id=number, customer=customer)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", Dependency)
def test_each_kind_by_each_end(kind: Dependency, end: JobStatus) -> None:
    """As Slurm has them: afternotok is every end but success."""
    satisfied = {
        Dependency.AFTER_OK: end is OK,
        Dependency.AFTER_ANY: True,
        Dependency.AFTER_NOT_OK: end is not OK,
    }[kind]
    result = array_job([(JOB, f"deepsquare.{kind}=7")], [], {7: end})
    assert (20 not in result) is satisfied
    if not satisfied:
        assert result[20].final
        assert f"{kind}:7, but job 7 ended {end.name}" in result[20].text


def test_a_job_waits_for_all_that_it_depends_on() -> None:
    uses = "gpu=yes,deepsquare.afterok=7:9-10,deepsquare.afterany=3"
    assert dependencies([uses, "gpu=yes"]) == {3, 7, 9, 10}
    dependency = array_job([(JOB, uses)], [], {7: OK, 3: BAD})[20]
    assert (dependency.final, dependency.text) == (False, "it waits for the end of jobs 9, 10")
    assert array_job([(JOB, uses)], [], {7: OK, 9: OK, 10: OK, 3: BAD}) == {}
    # One dependency that can't be met decides, even if others are still open.
    assert array_job([(JOB, uses)], [], {10: BAD})[20].final


@pytest.mark.parametrize("number", [20, 21, 10**9])
def test_a_job_can_t_wait_for_itself_or_a_later_one(number: int) -> None:
    assert array_job([(JOB, f"deepsquare.afterany={number}")], [], {number: OK})[20].final


def test_a_successor_keeps_the_dependencies_of_its_line() -> None:
    successor = replace(JOB, id=40, retry_of=20)
    assert array_job([(successor, "deepsquare.afterok=7")], [], {7: OK}) == {}
    assert array_job([(successor, "deepsquare.afterok=30")], [], {30: OK})[40].final


def test_an_array_goes_out_no_faster_than_its_throttle() -> None:
    uses = "deepsquare.array=sub-00000001%2"
    waiting = [(job(number), uses) for number in (9, 8, 7, 6)]
    assert set(array_job(waiting, [], {})) == {8, 9}
    assert set(array_job(waiting, [(job(5), uses)], {})) == {7, 8, 9}
    assert set(array_job(waiting, [(job(4), uses), (job(5), uses)], {})) == {6, 7, 8, 9}
    # Another customer's array of the same ID, and jobs without array, are separate.
    others = [(job(4, BOB), uses), (job(5), "")]
    assert set(array_job(waiting, others, {})) == {8, 9}
    assert array_job([(job(6), "deepsquare.array=sub-00000001")] * 3, [], {}) == {}


def test_jobs_with_unmet_dependencies_do_not_count_for_the_limit_of_their_array() -> None:
    uses = "deepsquare.array=sub-00000001%1"
    waiting = [(job(6), f"{uses},deepsquare.afterok=1"), (job(7), uses)]
    assert set(array_job(waiting, [], {})) == {6}


def test_a_job_starts_at_its_time() -> None:
    uses = "deepsquare.begin=2000"
    dependency = array_job([(JOB, uses)], [], {}, 1_999)[20]
    assert (dependency.final, dependency.text) == (
        False,
        "it starts at 1970-01-01 00:33:20 UTC at the earliest",
    )
    assert array_job([(JOB, uses)], [], {}, 2_000) == {}


def test_a_job_does_not_start_after_its_deadline() -> None:
    uses = "deepsquare.deadline=2000"
    assert array_job([(JOB, uses)], [], {}, 1_999) == {}
    dependency = array_job([(JOB, uses)], [], {}, 2_000)[20]
    assert (dependency.final, dependency.text) == (
        True,
        "it had to start before 1970-01-01 00:33:20 UTC",
    )
    # The first run met the deadline; a retry continues with the paid credits.
    assert array_job([(replace(JOB, id=40, retry_of=20), uses)], [], {}, 2_000) == {}


def test_a_job_that_may_not_start_does_not_count_for_the_limit_of_its_array() -> None:
    uses = "deepsquare.array=sub-00000001%1"
    waiting = [(job(6), f"{uses},deepsquare.begin=2000"), (job(7), uses)]
    assert set(array_job(waiting, [], {})) == {6}


@pytest.mark.parametrize(
    "uses",
    [
        "deepsquare.afterok=x",
        "deepsquare.afterok!=7",
        "deepsquare.afterok=7-",
        "deepsquare.afterok=9-7",
        "deepsquare.afterok=1-99999",
        "deepsquare.later=7",
        "deepsquare.begin=soon",
        "deepsquare.begin=0",
        "deepsquare.deadline>=7",
        "deepsquare.prefer=ch",
        "deepsquare.placement=apart",
        *(
            "deepsquare.prefer=a=1,deepsquare.prefer=b=1,deepsquare.prefer=c=1,deepsquare.prefer=d=1,deepsquare.prefer=e=1",
        ),
        "deepsquare.array=sub-1",
        "deepsquare.array=sub-00000001%0",
        "no affinity,deepsquare.afterok=7",
    ],
)
def test_conditions_that_can_t_be_read_never_hold(uses: str) -> None:
    assert array_job([(JOB, uses)], [], {7: OK})[20].final


def test_requirements_that_can_t_be_read_are_left_to_the_policy() -> None:
    assert array_job([(JOB, "no affinity")], [], {7: OK}) == {}


def test_conditions_read_as_they_were_written() -> None:
    expected = Conditions(
        after=(
            (Dependency.AFTER_OK, 7),
            (Dependency.AFTER_OK, 9),
            (Dependency.AFTER_OK, 10),
            (Dependency.AFTER_NOT_OK, 3),
        ),
        array="sub-1f3a9c04",
        throttle=4,
        start_after=1_800_000_000,
        start_before=1_800_003_600,
        patience=600,
        preferences=parse_uses("region=ch,compute.gflops>=10"),
        placement=Placement.PACK,
    )
    text = expected.to_uses()
    assert text == (
        "deepsquare.afterok=7:9-10,deepsquare.afternotok=3,deepsquare.array=sub-1f3a9c04%4,"
        "deepsquare.begin=1800000000,deepsquare.deadline=1800003600,deepsquare.patience=600,"
        "deepsquare.prefer=region=ch,deepsquare.prefer=compute.gflops>=10,"
        "deepsquare.placement=pack"
    )
    assert parse_conditions(f"gpu.model=h100,{text}") == expected
    assert Conditions().to_uses() == ""


def test_no_label_has_to_meet_a_condition() -> None:
    assert matches(parse_uses("gpu=yes,deepsquare.afterok=7"), {"gpu": "yes"})
    assert not matches(parse_uses("gpu=yes,deepsquare.afterok=7"), {"deepsquare.afterok": "7"})


@pytest.mark.parametrize(
    ("text", "numbers"), [("7", [7]), ("3-5", [3, 4, 5]), (" 3, 7-8", [3, 7, 8])]
)
def test_ids_and_ranges(text: str, numbers: list[int]) -> None:
    assert parse_ids(text) == numbers
    assert parse_ids(spell_ids(numbers), ":") == numbers


@pytest.mark.parametrize("text", ["", "3-", "5-3", "a", "1-10001", "1-10000,1", "-3"])
def test_invalid_ranges_of_ids(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number or a range"):
        parse_ids(text)
