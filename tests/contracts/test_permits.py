"""Permits: one transaction instead of two; use of a permit by another account does not block it."""

from __future__ import annotations

import pytest

from tests.support.evm import reverts
from tests.support.grid import RATE, TERMS, Grid, Host

pytestmark = pytest.mark.contracts
ESCROW = TERMS["amount"]


@pytest.fixture(autouse=True)
def no_allowance(grid: Grid) -> None:
    grid.credit.approve(grid.scheduler.address, 0, sender=grid.alice)


def submit(grid: Grid, permit: dict[str, object], sender: str) -> int:
    receipt = grid.scheduler.submitJobsWithPermit([grid.request()], permit, sender=sender)
    job_id: int = receipt.value
    return job_id


def test_a_permit_pays_a_submission(grid: Grid) -> None:
    job_id = submit(grid, grid.permit(grid.alice, ESCROW), grid.alice)
    assert grid.job(job_id).customer == grid.alice
    assert grid.credit.allowance(grid.alice, grid.scheduler.address) == 0
    assert grid.credit.nonces(grid.alice) == 1


def test_a_permit_pays_a_top_up(grid: Grid, host: Host) -> None:
    job_id = grid.running(host, customer=grid.bob)
    permit = grid.permit(grid.alice, 60 * RATE)
    grid.scheduler.topUpWithPermit(job_id, grid.bob, 60 * RATE, permit, sender=grid.alice)
    assert grid.job(job_id).escrow == ESCROW + 60 * RATE


def test_another_account_used_it_first_and_it_still_works(grid: Grid) -> None:
    permit = grid.permit(grid.alice, ESCROW)
    grid.credit.permit(grid.alice, grid.scheduler.address, *permit.values(), sender=grid.stranger)
    assert submit(grid, permit, grid.alice) == 1


def test_a_top_up_with_a_used_permit_still_works(grid: Grid) -> None:
    job_id = grid.submit(grid.bob)
    permit = grid.permit(grid.alice, 5)
    grid.credit.permit(grid.alice, grid.scheduler.address, *permit.values(), sender=grid.stranger)
    grid.scheduler.topUpWithPermit(job_id, grid.bob, 5, permit, sender=grid.alice)
    assert grid.job(job_id).escrow == ESCROW + 5


def test_an_allowance_makes_a_bad_permit_harmless(grid: Grid) -> None:
    grid.credit.approve(grid.scheduler.address, ESCROW, sender=grid.alice)
    nonsense = {"value": 1, "deadline": 0, "v": 0, "r": b"\0" * 32, "s": b"\0" * 32}
    assert submit(grid, nonsense, grid.alice) == 1


@pytest.mark.parametrize("flaw", ["expired", "other owner", "too little", "replayed", "garbled"])
def test_a_bad_permit_gives_no_allowance(grid: Grid, flaw: str) -> None:
    permit = grid.permit(grid.alice, ESCROW - 1 if flaw == "too little" else ESCROW)
    sender = grid.alice
    if flaw == "expired":
        grid.chain.advance(61)
    elif flaw == "other owner":
        # somebody who saw it in the mempool
        sender = grid.stranger
    elif flaw == "replayed":
        submit(grid, permit, grid.alice)
    elif flaw == "garbled":
        permit["s"] = b"\xff" * 32
    with reverts("ERC20InsufficientAllowance"):
        submit(grid, permit, sender)
    assert grid.credit.allowance(grid.stranger, grid.scheduler.address) == 0


def test_a_permit_of_another_chain_or_token_is_worthless(grid: Grid) -> None:
    permit = grid.permit(grid.alice, ESCROW, nonce=5)
    with reverts("ERC20InsufficientAllowance"):
        submit(grid, permit, grid.alice)


def test_terms_are_checked_with_a_permit_as_without(grid: Grid) -> None:
    permit = grid.permit(grid.alice, ESCROW)
    with reverts("InvalidTerms"):
        grid.scheduler.submitJobsWithPermit([grid.request(tasks=0)], permit, sender=grid.alice)
    with reverts("WrongStatus", 9, 0):
        grid.scheduler.topUpWithPermit(9, grid.alice, 5, permit, sender=grid.alice)
    # a reverted call has no effect, so the permit is still valid
    assert submit(grid, permit, grid.alice) == 1
