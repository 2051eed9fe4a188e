"""Job arrays, dependencies and selections of jobs, before anything is sent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepsquare_chain.client import jobs, submission
from deepsquare_chain.client.jobs import History, select
from deepsquare_chain.client.submission import (
    MAX_JOBS,
    ArraySpec,
    parse_array,
    parse_depends,
    request_of,
    submission_id,
)
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.job import Dependency, Job, JobFlags, JobStatus
from deepsquare_chain.workflow import Definition, load_job_file
from tests.unit.test_metascheduler_dependencies import ALICE, BOB, JOB

pytestmark = pytest.mark.unit

FILE = load_job_file(Path(__file__).parents[2] / "examples" / "hello.yaml")


@pytest.mark.parametrize(
    ("text", "indices", "throttle"),
    [
        ("3", (1, 2, 3), 0),
        ("1-4%2", (1, 2, 3, 4), 2),
        ("0-9:3", (0, 3, 6, 9), 0),
        ("1,3,7-8", (1, 3, 7, 8), 0),
        ("5-5", (5,), 0),
        (f"1-{MAX_JOBS}", tuple(range(1, MAX_JOBS + 1)), 0),
    ],
)
def test_arrays_as_slurm_writes_them(text: str, indices: tuple[int, ...], throttle: int) -> None:
    assert parse_array(text) == ArraySpec(indices, throttle)


@pytest.mark.parametrize(
    "text", ["", "0", "x", "5-1", "1-", "1,1", "1-3%0", "1-3%", "1-3:0", "-1", "1-999999999", "251"]
)
def test_invalid_arrays_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as error_info:
        parse_array(text)
    assert error_info.value.hint


def test_the_jobs_of_an_array_share_terms_and_differ_in_their_index() -> None:
    terms = FILE.terms()
    request = request_of(
        FILE.definition, terms, array=ArraySpec((2, 5), 1), submission="sub-1f3a9c04"
    )
    assert request.terms == replace(
        terms, uses="deepsquare.array=sub-1f3a9c04%1", flags=JobFlags.NO_SELF_SCHEDULING
    )
    read = [Definition.from_bytes(data).array for data in request.definitions]
    assert [(item.index, item.size) for item in read if item] == [(2, 2), (5, 2)]
    # A throttle without effect is omitted; a single job is unchanged.
    loose = request_of(
        FILE.definition, terms, array=ArraySpec((1, 2), 2), submission="sub-1f3a9c04"
    )
    assert loose.terms.uses == "deepsquare.array=sub-1f3a9c04"
    assert request_of(FILE.definition, terms).terms == terms


def test_more_dependencies_than_fit_on_chain_are_refused() -> None:
    after = [(Dependency.AFTER_OK, number) for number in range(1, 400, 2)]
    with pytest.raises(UsageError, match="512 bytes"):
        request_of(FILE.definition, FILE.terms(), after=after)


def test_a_key_gives_the_same_submission_id_to_its_wallet_alone() -> None:
    assert submission_id(ALICE, "night") == submission_id(ALICE, "night")
    ids = {submission_id(ALICE, "night"), submission_id(BOB, "night"), submission_id(ALICE, None)}
    assert len(ids | {submission_id(ALICE, None)}) == 4


def grid(*jobs: tuple[Job, str, str], successors: dict[int, int] | None = None) -> Any:
    records = {job.id: job for job, _, _ in jobs}
    terms = {job.id: (name, uses) for job, name, uses in jobs}

    async def get_job(number: int) -> Job:
        if number not in records:
            raise NotFoundError(f"Job {number} does not exist")
        return records[number]

    async def get_jobs(numbers: range) -> list[Job]:
        return [records[number] for number in numbers]

    async def job_count() -> int:
        return len(records)

    async def histories(_: object, ids: list[int]) -> dict[int, History]:
        return {
            number: History(
                number,
                name=terms[number][0],
                uses=terms[number][1],
                successor=(successors or {}).get(number),
            )
            for number in ids
        }

    scheduler = SimpleNamespace(get_job=get_job, get_jobs=get_jobs, job_count=job_count)
    return SimpleNamespace(scheduler=scheduler), histories


SUB = "deepsquare.array=sub-1f3a9c04%2"
JOBS = (
    (replace(JOB, id=1, status=JobStatus.FINISHED), "train-a", SUB),
    (replace(JOB, id=2, status=JobStatus.FAILED), "train-b", SUB),
    (replace(JOB, id=3, customer=BOB), "train-c", SUB),
    (replace(JOB, id=4, status=JobStatus.PANICKED), "eval", "gpu=yes"),
    (replace(JOB, id=5), "eval", ""),
)


@pytest.fixture
def contracts(monkeypatch: pytest.MonkeyPatch) -> Any:
    result, histories = grid(*JOBS, successors={4: 5})
    monkeypatch.setattr(jobs, "histories", histories)
    monkeypatch.setattr(submission, "histories", histories)
    return result


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (["3"], [3]),
        (["2-4", "3"], [2, 3, 4]),
        (["1,4-5"], [1, 4, 5]),
        (["sub-1f3a9c04"], [1, 2]),
        (["train-*"], [1, 2]),
        (["eval", "1"], [4, 5, 1]),
    ],
)
async def test_jobs_by_ids_ranges_submissions_and_names(
    contracts: Any, arguments: list[str], ids: list[int]
) -> None:
    """Names and submissions never select another customer's jobs."""
    assert await select(contracts, arguments, lambda: ALICE) == ids


@pytest.mark.parametrize("text", ["nothing", "sub-00000000", "", "5-3"])
async def test_invalid_names_of_jobs(contracts: Any, text: str) -> None:
    with pytest.raises((NotFoundError, UsageError)) as error_info:
        await select(contracts, [text], lambda: ALICE)
    assert error_info.value.hint


@pytest.mark.parametrize(
    ("arguments", "after"),
    [
        (["afterok:1"], [(Dependency.AFTER_OK, 1)]),
        (["5"], [(Dependency.AFTER_OK, 5)]),
        (["afterany:1:2", "afternotok:2"], [("afterany", 1), ("afterany", 2), ("afternotok", 2)]),
        (["afterok:4"], [("afterok", 4)]),  # its successor is job 5
        (["afterok:1,afterany:train-b"], [("afterok", 1), ("afterany", 2)]),
    ],
)
async def test_dependencies_as_slurm_writes_them(
    contracts: Any, arguments: list[str], after: list[Any]
) -> None:
    assert await parse_depends(contracts, arguments, lambda: ALICE) == after


@pytest.mark.parametrize(
    "arguments", [["afterok:2"], ["afternotok:1"], ["afterok:"], ["afterok:99"]]
)
async def test_impossible_dependencies_are_refused_before_payment(
    contracts: Any, arguments: list[str]
) -> None:
    with pytest.raises((NotFoundError, UsageError)):
        await parse_depends(contracts, arguments, lambda: ALICE)
