"""submitJobs: accepted terms, the escrow, and the stored record."""

from __future__ import annotations

import pytest
from eth_abi import encode

from deepsquare_chain.job import JobStatus
from tests.support.evm import ZERO, Reverted, reverts
from tests.support.grid import (
    INTERIM_PAYMENTS,
    NO_SELF_SCHEDULING,
    TERMS,
    UNTIL_SPENT,
    WEALTH,
    Grid,
    digest,
)

pytestmark = pytest.mark.contracts
ALL_FLAGS = UNTIL_SPENT | NO_SELF_SCHEDULING | INTERIM_PAYMENTS


def test_a_new_record_has_the_terms_and_no_provider(grid: Grid) -> None:
    job = grid.job(grid.submit(retries=5, flags=UNTIL_SPENT))

    assert job.customer == grid.alice
    assert job.status == JobStatus.PENDING
    assert job.since == grid.chain.now
    assert (job.escrow, job.timeLimit) == (TERMS["amount"], TERMS["timeLimit"])
    assert (job.tasks, job.cpusPerTask, job.memPerCpu, job.gpus) == (2, 3, 100, 1)
    assert (job.retriesLeft, job.flags) == (5, UNTIL_SPENT)
    assert (job.providerId, job.rate, job.feeBps, job.retryOf) == (0, 0, 0, 0)
    assert job.definition == digest(0)


def test_every_field_at_its_maximum_keeps_within_its_bits(grid: Grid) -> None:
    grid.credit.mint(grid.alice, 2**96, sender=grid.admin)
    largest = {
        "amount": 2**96 - 1,
        "timeLimit": 2**24 - 1,
        "tasks": 2**16 - 1,
        "cpusPerTask": 2**16 - 1,
        "memPerCpu": 2**24 - 1,
        "gpus": 2**16 - 1,
        "retries": 5,
        "flags": ALL_FLAGS,
    }
    job = grid.job(grid.submit(**largest))

    assert (job.escrow, job.timeLimit, job.tasks) == (2**96 - 1, 2**24 - 1, 2**16 - 1)
    assert (job.cpusPerTask, job.memPerCpu, job.gpus) == (2**16 - 1, 2**24 - 1, 2**16 - 1)
    assert (job.rate, job.feeBps, job.providerId, job.flags) == (0, 0, 0, ALL_FLAGS)
    assert (job.status, job.since, job.customer) == (JobStatus.PENDING, grid.chain.now, grid.alice)


def test_smallest_terms_are_taken(grid: Grid) -> None:
    least = dict.fromkeys(("amount", "timeLimit", "tasks", "cpusPerTask", "memPerCpu"), 1)
    job = grid.job(grid.submit(**least, gpus=0, retries=0, name="", uses=""))
    assert (job.escrow, job.timeLimit, job.memPerCpu, job.gpus, job.retriesLeft) == (1, 1, 1, 0, 0)


def test_ids_are_dense_over_requests_and_calls(grid: Grid) -> None:
    first = grid.submit()
    receipt = grid.scheduler.submitJobs(
        [grid.request(2), grid.request(0), grid.request(3, amount=7)], sender=grid.bob
    )
    assert receipt.value == first + 1
    assert [e.jobId for e in receipt.named("JobSubmitted")] == list(range(first + 1, first + 6))
    assert grid.scheduler.jobCount() == first + 5
    assert [job.escrow for job in grid.scheduler.getJobs([first + 2, first + 3])] == [10**10, 7]
    assert grid.job(first + 2).definition == digest(1)


def test_escrow_is_taken_in_one_transfer(grid: Grid) -> None:
    receipt = grid.scheduler.submitJobs(
        [grid.request(2), grid.request(3, amount=7)], sender=grid.alice
    )
    transfer = receipt.one("Transfer")
    assert transfer.parameters == {
        "from": grid.alice,
        "to": grid.scheduler.address,
        "value": 2 * 10**10 + 21,
    }
    assert grid.balance(grid.scheduler.address) == 2 * 10**10 + 21
    assert grid.balance(grid.alice) == WEALTH - 2 * 10**10 - 21


def test_events_contain_the_terms_and_the_creation(grid: Grid) -> None:
    receipt = grid.scheduler.submitJobs([grid.request(objective=2)], sender=grid.alice)
    submitted = receipt.one("JobSubmitted")
    assert (submitted.customer, submitted.definition) == (grid.alice, digest(0))
    assert submitted.terms._asdict() == TERMS | {"objective": 2}
    assert receipt.one("JobTransition").parameters == {
        "jobId": submitted.jobId,
        "customer": grid.alice,
        "provider": ZERO,
        "from": JobStatus.NONE,
        "to": JobStatus.PENDING,
    }


@pytest.mark.parametrize("name", [0, 1, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("uses", [0, 1, 32, 511, 512])
def test_terms_are_encoded_as_the_abi_has_it(grid: Grid, name: int, uses: int) -> None:
    """Texts of about 32 bytes next to jobs with longer texts: no bytes are mixed up."""
    texts = {"name": "n" * name, "uses": "u" * uses}
    changes = {**texts, "retries": 5, "flags": ALL_FLAGS, "objective": 2, "gpus": 2**16 - 1}
    longest = grid.request(name="x" * 64, uses="y" * 512)
    call = grid.scheduler.submitJobs.encode([longest, grid.request(**changes), longest])
    logs = grid.chain.run(grid.scheduler.address, call, grid.alice).get_log_entries()
    terms = tuple((TERMS | changes).values())
    kinds = "(uint96,uint24,uint16,uint16,uint24,uint16,uint8,uint8,uint8,string,string)"
    # Each job has two logs: the submission and its first transition.
    assert logs[2][2] == encode([kinds], [terms])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("amount", 0),
        ("timeLimit", 0),
        ("tasks", 0),
        ("cpusPerTask", 0),
        ("memPerCpu", 0),
        ("retries", 6),
        ("flags", 8),
        ("flags", 128),
        ("name", "n" * 65),
        ("uses", "u" * 513),
    ],
)
def test_terms_out_of_bounds_are_named(grid: Grid, field: str, value: object) -> None:
    with reverts("InvalidTerms", field.encode().ljust(32, b"\0")):
        grid.submit(**{field: value})


def test_longest_name_and_uses_are_taken(grid: Grid) -> None:
    request = grid.request(name="n" * 64, uses="u" * 512)
    receipt = grid.scheduler.submitJobs([request], sender=grid.alice)
    assert receipt.one("JobSubmitted").terms.uses == "u" * 512


def test_definition_is_required(grid: Grid) -> None:
    request = grid.request() | {"definitions": [digest(1), b"\0" * 32]}
    with reverts("InvalidTerms", b"definition".ljust(32, b"\0")):
        grid.scheduler.submitJobs([request], sender=grid.alice)


def test_one_bad_request_refuses_all(grid: Grid) -> None:
    with reverts("InvalidTerms"):
        grid.scheduler.submitJobs([grid.request(), grid.request(tasks=0)], sender=grid.alice)
    assert grid.scheduler.jobCount() == 0
    assert grid.balance(grid.alice) == WEALTH


@pytest.mark.parametrize("requests", [0, 1, 2])
def test_without_definitions_it_is_an_empty_batch(grid: Grid, requests: int) -> None:
    with reverts("EmptyBatch"):
        grid.scheduler.submitJobs([grid.request(0)] * requests, sender=grid.alice)


def test_without_an_allowance_nothing_happens(grid: Grid) -> None:
    grid.credit.approve(grid.scheduler.address, 10**10 - 1, sender=grid.alice)
    with reverts("ERC20InsufficientAllowance", grid.scheduler.address, 10**10 - 1, 10**10):
        grid.submit()
    assert grid.scheduler.jobCount() == 0


def test_without_the_credits_nothing_happens(grid: Grid) -> None:
    with reverts("ERC20InsufficientBalance", grid.alice, WEALTH, WEALTH + 1):
        grid.submit(amount=WEALTH + 1)


def test_closed_to_new_submissions(grid: Grid) -> None:
    grid.scheduler.setSubmissionsOpen(False, sender=grid.admin)
    with reverts("SubmissionsClosed"):
        grid.submit()
    grid.scheduler.setSubmissionsOpen(True, sender=grid.admin)
    assert grid.submit() == 1


@pytest.mark.parametrize(("position", "value"), [(7, 256), (8, 3)])
def test_values_outside_their_type_are_refused(grid: Grid, position: int, value: int) -> None:
    """Flags of 256 and an objective of 3, which encoders refuse but an attacker can send."""
    data = bytearray(grid.scheduler.submitJobs.encode([grid.request()]))
    # selector, array offset, length, request offset, terms and definitions offsets
    start = 4 + 32 * 5 + 32 * position
    data[start : start + 32] = value.to_bytes(32, "big")
    with pytest.raises(Reverted):
        grid.chain.run(grid.scheduler.address, bytes(data), grid.alice)
    assert grid.scheduler.jobCount() == 0


def test_the_same_calldata_with_values_in_range_is_accepted(grid: Grid) -> None:
    """Control of the test above: it is the value that is refused, not the position."""
    data = bytearray(grid.scheduler.submitJobs.encode([grid.request()]))
    for position, value in ((7, 1), (8, 2)):
        start = 4 + 32 * 5 + 32 * position
        data[start : start + 32] = value.to_bytes(32, "big")
    grid.chain.run(grid.scheduler.address, bytes(data), grid.alice)
    assert grid.job(1).flags == 1
