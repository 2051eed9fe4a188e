"""Powers of an administrator, their limits, and the two steps of a handover."""

from __future__ import annotations

from typing import Any

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import ZERO, Contract, reverts
from tests.support.grid import ADMIN_DELAY, FEE_BPS, RATE, TERMS, WEALTH, Grid, Host, fee_of

pytestmark = pytest.mark.contracts
ADMIN_ROLE = b"\0" * 32


@pytest.fixture(params=["credit", "registry", "scheduler"])
def contract(request: pytest.FixtureRequest, grid: Grid) -> Contract:
    return getattr(grid, request.param)


def test_the_fee_is_for_jobs_assigned_from_now_on(grid: Grid, host: Host) -> None:
    before = grid.running(host)
    receipt = grid.scheduler.setFee(2_000, sender=grid.admin)
    assert receipt.one("FeeChanged").feeBps == 2_000
    assert grid.scheduler.feeBps() == 2_000
    after = grid.running(host)
    grid.chain.advance(10)
    assert grid.finish(host, before, 10).one("JobSettled").fee == fee_of(10 * RATE)
    assert grid.finish(host, after, 10).one("JobSettled").fee == fee_of(10 * RATE, 2_000)


def test_the_fee_is_capped(grid: Grid) -> None:
    with reverts("OutOfBounds", b"feeBps".ljust(32, b"\0"), 2_001, 0, 2_000):
        grid.scheduler.setFee(2_001, sender=grid.admin)
    grid.scheduler.setFee(0, sender=grid.admin)
    assert grid.scheduler.feeBps() == 0


@pytest.mark.parametrize(("name", "value"), [("setFee", 1), ("setSubmissionsOpen", False)])
def test_only_the_administrator_changes_parameters(grid: Grid, name: str, value: Any) -> None:
    for caller in (grid.meta, grid.alice, grid.treasury, grid.stranger):
        with reverts("AccessControlUnauthorizedAccount", caller, ADMIN_ROLE):
            getattr(grid.scheduler, name)(value, sender=caller)
    assert (grid.scheduler.feeBps(), grid.scheduler.submissionsOpen()) == (FEE_BPS, True)


def test_closing_lets_live_jobs_continue_to_their_end(grid: Grid, host: Host, other: Host) -> None:
    """Migration to a new version: close, drain, deploy."""
    pending, assigned = grid.submit(), grid.assigned(host)
    claimed, running = grid.claimed(host), grid.running(host)
    receipt = grid.scheduler.setSubmissionsOpen(False, sender=grid.admin)
    assert receipt.one("SubmissionsChanged").open is False
    with reverts("SubmissionsClosed"):
        grid.submit()
    with reverts("SubmissionsClosed"):
        grid.scheduler.submitJobsWithPermit(
            [grid.request()], grid.permit(grid.alice, 1), sender=grid.alice
        )
    grid.assign(other, pending)
    grid.scheduler.claim([pending], sender=other.account)
    grid.scheduler.claim([assigned], sender=host.account)
    grid.scheduler.start([assigned, claimed], sender=host.account)
    grid.scheduler.start([pending], sender=other.account)
    grid.scheduler.topUp(running, grid.alice, 60 * RATE, sender=grid.alice)
    grid.scheduler.panic([running], "", sender=host.account)
    grid.chain.advance(10)
    for caller, job_id in ((other, pending), (host, assigned), (host, claimed)):
        grid.finish(caller, job_id, 10)
    grid.scheduler.cancel([grid.scheduler.jobCount()], sender=grid.alice)
    assert grid.balance(grid.scheduler.address) == 0
    assert grid.balance(grid.alice) == WEALTH - 30 * RATE


def test_no_function_of_an_administrator_moves_escrow(grid: Grid, host: Host) -> None:
    """An account with all roles can neither end jobs nor take credits."""
    for role in ("METASCHEDULER_ROLE",):
        grid.scheduler.grantRole(getattr(grid.scheduler, role)(), grid.admin, sender=grid.admin)
    ids = [grid.in_status(s, host) for s in JobStatus if s.is_live]
    escrow = grid.balance(grid.scheduler.address)
    assert escrow == 4 * TERMS["amount"]
    grid.chain.advance(50)
    for job_id in ids:
        for attempt in (
            lambda i: grid.scheduler.cancel([i], sender=grid.admin),
            lambda i: grid.scheduler.panic([i], "", sender=grid.admin),
            lambda i: grid.finish(Host(host.id, grid.admin), i, 50),
            lambda i: grid.scheduler.requeue([i], "", sender=grid.admin),
            lambda i: grid.scheduler.claim([i], sender=grid.admin),
            lambda i: grid.scheduler.start([i], sender=grid.admin),
            lambda i: grid.scheduler.claimAndStart([i], sender=grid.admin),
            lambda i: grid.scheduler.collect([i], sender=grid.admin),
        ):
            with pytest.raises(Exception, match=r"Not|Invalid|TooEarly"):
                attempt(job_id)
    with reverts("NothingParked"):
        grid.scheduler.withdraw(grid.admin, sender=grid.admin)
    with reverts("ERC20InsufficientAllowance"):
        grid.credit.burnFrom(grid.scheduler.address, 1, sender=grid.admin)
    assert grid.balance(grid.scheduler.address) == escrow


def test_a_revoked_scheduler_assigns_nothing(grid: Grid, host: Host) -> None:
    job_id = grid.submit()
    role = grid.scheduler.METASCHEDULER_ROLE()
    grid.scheduler.revokeRole(role, grid.meta, sender=grid.admin)
    with reverts("AccessControlUnauthorizedAccount", grid.meta, role):
        grid.assign(host, job_id)


def test_a_hand_over_takes_two_steps_and_the_delay(grid: Grid, contract: Contract) -> None:
    assert contract.defaultAdmin() == contract.owner() == grid.admin
    assert contract.defaultAdminDelay() == ADMIN_DELAY
    contract.beginDefaultAdminTransfer(grid.bob, sender=grid.admin)
    due = grid.chain.now + ADMIN_DELAY
    assert contract.pendingDefaultAdmin() == (grid.bob, due)
    grid.chain.advance(ADMIN_DELAY)
    with reverts("AccessControlEnforcedDefaultAdminDelay", due):
        contract.acceptDefaultAdminTransfer(sender=grid.bob)
    grid.chain.advance(1)
    with reverts("AccessControlInvalidDefaultAdmin", grid.stranger):
        contract.acceptDefaultAdminTransfer(sender=grid.stranger)
    contract.acceptDefaultAdminTransfer(sender=grid.bob)
    assert contract.defaultAdmin() == grid.bob
    assert not contract.hasRole(ADMIN_ROLE, grid.admin)


def test_a_hand_over_can_be_called_off(grid: Grid, contract: Contract) -> None:
    contract.beginDefaultAdminTransfer(grid.bob, sender=grid.admin)
    contract.cancelDefaultAdminTransfer(sender=grid.admin)
    grid.chain.advance(ADMIN_DELAY + 1)
    with reverts("AccessControlInvalidDefaultAdmin", grid.bob):
        contract.acceptDefaultAdminTransfer(sender=grid.bob)
    assert contract.defaultAdmin() == grid.admin


def test_there_is_one_administrator(grid: Grid, contract: Contract) -> None:
    with reverts("AccessControlEnforcedDefaultAdminRules"):
        contract.grantRole(ADMIN_ROLE, grid.bob, sender=grid.admin)
    with reverts("AccessControlEnforcedDefaultAdminRules"):
        contract.revokeRole(ADMIN_ROLE, grid.admin, sender=grid.admin)
    with reverts("AccessControlEnforcedDefaultAdminDelay", 0):
        contract.renounceRole(ADMIN_ROLE, grid.admin, sender=grid.admin)
    with reverts("AccessControlUnauthorizedAccount", grid.stranger, ADMIN_ROLE):
        contract.beginDefaultAdminTransfer(grid.stranger, sender=grid.stranger)


def test_giving_up_administration_takes_two_steps_too(grid: Grid, contract: Contract) -> None:
    contract.beginDefaultAdminTransfer(ZERO, sender=grid.admin)
    grid.chain.advance(ADMIN_DELAY + 1)
    contract.renounceRole(ADMIN_ROLE, grid.admin, sender=grid.admin)
    assert contract.defaultAdmin() == ZERO
    with reverts("AccessControlUnauthorizedAccount"):
        contract.beginDefaultAdminTransfer(grid.bob, sender=grid.admin)


def test_roles_are_given_up_only_by_their_holder(grid: Grid) -> None:
    role = grid.scheduler.METASCHEDULER_ROLE()
    with reverts("AccessControlBadConfirmation"):
        grid.scheduler.renounceRole(role, grid.meta, sender=grid.alice)
    grid.scheduler.renounceRole(role, grid.meta, sender=grid.meta)
    assert not grid.scheduler.hasRole(role, grid.meta)


def test_a_longer_delay_of_hand_overs_waits_its_turn(grid: Grid, contract: Contract) -> None:
    contract.changeDefaultAdminDelay(2 * ADMIN_DELAY, sender=grid.admin)
    assert contract.defaultAdminDelay() == ADMIN_DELAY
    assert contract.pendingDefaultAdminDelay()[0] == 2 * ADMIN_DELAY
    grid.chain.advance(contract.defaultAdminDelayIncreaseWait() + 1)
    assert contract.defaultAdminDelay() == 2 * ADMIN_DELAY
