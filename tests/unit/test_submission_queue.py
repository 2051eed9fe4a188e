"""Concurrent submissions: one transaction where possible, and a result for each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from deepsquare_chain.client import submission
from deepsquare_chain.client.submission import MAX_JOBS, Request, SubmissionQueue, Submitted
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    InsufficientFundsError,
    RevertedError,
    WaitTimeoutError,
)
from tests.support.livegrid import terms


class Chain:
    """A fake of `submit`: `errors` are raised first; jobs in `poor` are refused."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], bool]] = []
        self.errors: list[GridError] = []
        self.poor: set[int] = set()
        self._next = 1

    async def submit(
        self, _contracts: Any, _sender: Any, _store: Any, requests: Sequence[Request], **more: Any
    ) -> Submitted:
        amounts = [item.terms.amount for item in requests]
        self.calls.append((amounts, more["permit"] is not None))
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors.pop(0)
        if self.poor & set(amounts):
            raise InsufficientFundsError("too few credits")
        count = sum(len(item.definitions) for item in requests)
        first, self._next = self._next, self._next + count
        return Submitted(tuple(range(first, first + count)), ())


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Chain:
    result = Chain()
    monkeypatch.setattr(submission, "submit", result.submit)
    monkeypatch.setattr(submission, "_GATHER_SECONDS", 0.001)
    return result


@pytest.fixture
def queue(chain: Chain) -> SubmissionQueue:
    anything: Any = object()
    return SubmissionQueue(anything, anything, anything, permit=anything, timeout=1)


def request(amount: int, jobs: int = 1) -> Request:
    return Request(terms(amount=amount), (b"definition",) * jobs)


async def test_gathered_jobs_are_one_transaction(chain: Chain, queue: SubmissionQueue) -> None:
    result = await asyncio.gather(*(queue.submit(request(n, jobs=n)) for n in (1, 2, 3)))
    assert [item.job_ids for item in result] == [(1,), (2, 3), (4, 5, 6)]
    assert chain.calls == [([1, 2, 3], False)]
    assert (await queue.submit(request(9))).job_ids == (7,)


async def test_permits_and_approvals_do_not_mix(chain: Chain, queue: SubmissionQueue) -> None:
    await asyncio.gather(*(queue.submit(request(n), permit=n % 2 == 0) for n in range(4)))
    assert chain.calls == [([0, 2], True), ([1, 3], False)]


async def test_no_more_jobs_than_a_block_holds(chain: Chain, queue: SubmissionQueue) -> None:
    limit = MAX_JOBS // 2
    result = await asyncio.gather(*(queue.submit(request(n, jobs=limit)) for n in range(3)))
    assert [len(calls) for calls, _ in chain.calls] == [2, 1]
    assert len({job_id for item in result for job_id in item.job_ids}) == 3 * limit


@pytest.mark.parametrize("error", [InsufficientFundsError("x"), RevertedError("y")])
async def test_a_failing_submission_affects_no_other(
    chain: Chain, queue: SubmissionQueue, error: GridError
) -> None:
    chain.errors, chain.poor = [error], {2}
    result = await asyncio.gather(
        *(queue.submit(request(n)) for n in (1, 2, 3)), return_exceptions=True
    )
    assert [isinstance(item, InsufficientFundsError) for item in result] == [False, True, False]
    assert chain.calls == [([1, 2, 3], False), ([1], False), ([2], False), ([3], False)]


@pytest.mark.parametrize("error", [WaitTimeoutError("sent"), EndpointError("down")])
async def test_a_submission_that_may_be_paid_is_not_retried(
    chain: Chain, queue: SubmissionQueue, error: GridError
) -> None:
    chain.errors = [error]
    result = await asyncio.gather(
        *(queue.submit(request(n)) for n in (1, 2)), return_exceptions=True
    )
    assert result == [error, error]
    assert len(chain.calls) == 1


async def test_a_submission_cancelled_before_it_was_sent_costs_nothing(
    chain: Chain, queue: SubmissionQueue
) -> None:
    cancelled = asyncio.create_task(queue.submit(request(1)))
    stays = asyncio.create_task(queue.submit(request(2)))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert (await stays).job_ids == (1,)
    assert chain.calls == [([2], False)]
    await queue.close()
