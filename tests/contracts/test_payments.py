"""Failed payments, withdrawable credits, and misbehaving tokens."""

from __future__ import annotations

from typing import Any

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import ZERO, Contract, reverts
from tests.support.grid import RATE, TERMS, WEALTH, Grid, Host, fee_of

pytestmark = pytest.mark.contracts
ESCROW = TERMS["amount"]
COST = 10 * RATE
FEE = fee_of(COST)


@pytest.fixture(params=["BlockingCredit", "FalseCredit"])
def blocking_grid(request: pytest.FixtureRequest, hostile: dict[str, Any]) -> Grid:
    """A grid whose token can refuse a recipient, by reverting or by returning false."""
    return Grid(token=hostile[request.param])


def block(grid: Grid, *accounts: str, value: bool = True) -> None:
    for account in accounts:
        grid.credit.setBlocked(account, value, sender=grid.admin)


def ran(grid: Grid, host: Host, **terms: Any) -> int:
    job_id = grid.running(host, **terms)
    grid.chain.advance(10)
    return job_id


@pytest.mark.parametrize("customer", ["provider", "treasury", "alice"])
def test_a_recipient_that_cannot_be_paid_blocks_no_other(
    blocking_grid: Grid, customer: str
) -> None:
    grid = blocking_grid
    host = grid.provider()
    job_id = ran(grid, host)
    accounts = {"provider": host.account, "treasury": grid.treasury, "alice": grid.alice}
    due = {"provider": COST - FEE, "treasury": FEE, "alice": ESCROW - COST}
    before = {name: grid.balance(account) for name, account in accounts.items()}
    block(grid, accounts[customer])
    receipt = grid.finish(host, job_id, 10)

    assert grid.status(job_id) is JobStatus.FINISHED
    assert receipt.one("PaymentParked").parameters == {
        "recipient": accounts[customer],
        "amount": due[customer],
    }
    for name, account in accounts.items():
        expected = 0 if name == customer else due[name]
        assert grid.balance(account) == before[name] + expected
        assert grid.scheduler.parkedOf(account) == due[name] - expected
    assert grid.balance(grid.scheduler.address) == due[customer]


def test_all_recipients_blocked_still_ends_the_job(blocking_grid: Grid) -> None:
    grid = blocking_grid
    host = grid.provider()
    job_id = ran(grid, host)
    block(grid, host.account, grid.treasury, grid.alice)
    assert len(grid.finish(host, job_id, 10).named("PaymentParked")) == 3
    assert grid.balance(grid.scheduler.address) == ESCROW


def test_parked_amounts_add_up_and_are_taken_out_once(blocking_grid: Grid) -> None:
    grid = blocking_grid
    host = grid.provider()
    first, second = ran(grid, host), ran(grid, host)
    block(grid, host.account)
    grid.finish(host, first, 10)
    grid.finish(host, second, 10)
    assert grid.scheduler.parkedOf(host.account) == 2 * (COST - FEE)

    receipt = grid.scheduler.withdraw(grid.bob, sender=host.account)
    assert receipt.value == 2 * (COST - FEE)
    assert receipt.one("PaymentWithdrawn").parameters == {
        "recipient": host.account,
        "to": grid.bob,
        "amount": 2 * (COST - FEE),
    }
    assert grid.balance(grid.bob) == WEALTH + 2 * (COST - FEE)
    assert grid.balance(grid.scheduler.address) == 0
    with reverts("NothingParked"):
        grid.scheduler.withdraw(grid.bob, sender=host.account)


def test_a_withdrawal_that_fails_leaves_the_parked_amount(blocking_grid: Grid) -> None:
    grid = blocking_grid
    host = grid.provider()
    job_id = ran(grid, host)
    block(grid, host.account)
    grid.finish(host, job_id, 10)
    with pytest.raises(Exception, match=r"Blocked|SafeERC20FailedOperation"):
        grid.scheduler.withdraw(host.account, sender=host.account)
    assert grid.scheduler.parkedOf(host.account) == COST - FEE
    block(grid, host.account, value=False)
    grid.scheduler.withdraw(host.account, sender=host.account)
    assert grid.balance(host.account) == COST - FEE


def test_parked_credits_are_for_their_recipient_alone(blocking_grid: Grid) -> None:
    grid = blocking_grid
    job_id = grid.submit()
    block(grid, grid.alice)
    grid.scheduler.cancel([job_id], sender=grid.alice)
    for caller in (grid.bob, grid.admin, grid.treasury, grid.stranger):
        with reverts("NothingParked"):
            grid.scheduler.withdraw(caller, sender=caller)
    assert grid.scheduler.withdraw(grid.bob, sender=grid.alice).value == ESCROW


def test_withdrawing_to_the_zero_address_is_refused_by_the_token(blocking_grid: Grid) -> None:
    grid = blocking_grid
    job_id = grid.submit()
    block(grid, grid.alice)
    grid.scheduler.cancel([job_id], sender=grid.alice)
    with reverts("ERC20InvalidReceiver", ZERO):
        grid.scheduler.withdraw(ZERO, sender=grid.alice)
    assert grid.scheduler.parkedOf(grid.alice) == ESCROW


def test_one_blocked_customer_in_a_batch_parks_its_share_only(blocking_grid: Grid) -> None:
    grid = blocking_grid
    host = grid.provider()
    ids = [
        grid.running(host, customer=customer, retries=0)
        for customer in (grid.alice, grid.bob, grid.alice)
    ]
    block(grid, grid.alice)
    before = grid.balance(grid.bob)
    receipt = grid.scheduler.panic(ids, "", sender=host.account)
    assert receipt.one("PaymentParked").amount == 2 * ESCROW
    assert grid.balance(grid.bob) == before + ESCROW


def test_no_job_is_submitted_if_the_token_returns_false(hostile: dict[str, Any]) -> None:
    grid = Grid(token=hostile["FalseCredit"])
    job_id = grid.submit()
    block(grid, grid.alice)
    with reverts("SafeERC20FailedOperation", grid.credit.address):
        grid.submit()
    with reverts("SafeERC20FailedOperation", grid.credit.address):
        grid.scheduler.topUp(job_id, grid.alice, 1, sender=grid.alice)
    assert grid.scheduler.jobCount() == job_id
    assert grid.job(job_id).escrow == ESCROW


def test_a_token_without_return_value_works(hostile: dict[str, Any]) -> None:
    grid = Grid(token=hostile["MuteCredit"])
    host = grid.provider()
    job_id = ran(grid, host)
    grid.scheduler.topUp(job_id, grid.alice, 60 * RATE, sender=grid.alice)
    assert not grid.finish(host, job_id, 10).named("PaymentParked")
    assert grid.balance(host.account) == COST - FEE
    assert grid.balance(grid.alice) == WEALTH - COST


def test_two_batches_of_one_transaction_pay_their_recipients(
    grid: Grid, host: Host, other: Host
) -> None:
    """Cached recipients of the first batch must not be used for the second one."""
    batches = (
        (grid.alice, [grid.running(host), grid.running(other, timeLimit=500)]),
        # The same providers in the other order, with other sums.
        (grid.bob, [grid.running(p, customer=grid.bob, tasks=1) for p in (other, host, other)]),
    )
    grid.chain.advance(10)
    requests = [grid.signed_request(customer, "cancel", ids) for customer, ids in batches]
    receipt = grid.forwarder.executeBatch(requests, ZERO, sender=grid.stranger)
    settled = receipt.named("JobSettled")
    assert len(settled) == 5
    for account in (host.account, other.account):
        assert grid.balance(account) == sum(e.paid for e in settled if e.provider == account)


# ---------------------------------------------------------------- re-entrance


class CallbackAccount:
    """An account with code that calls back when it receives or sends credits."""

    def __init__(self, grid: Grid, hostile: dict[str, Any]) -> None:
        self.grid = grid
        self.contract = grid.chain.deploy(hostile["Reenterer"], sender=grid.admin)
        self.address = self.contract.address
        grid.credit.mint(self.address, WEALTH, sender=grid.admin)
        self.act(grid.credit, "approve", grid.scheduler.address, 2**256 - 1)

    def act(self, target: Contract, name: str, *values: Any) -> Any:
        data = getattr(target, name).encode(*values)
        return self.contract.act(target.address, data, sender=self.grid.stranger)

    def plan(self, name: str, *values: Any) -> None:
        scheduler = self.grid.scheduler
        data = getattr(scheduler, name).encode(*values)
        self.contract.plan(scheduler.address, data, sender=self.grid.stranger)

    @property
    def outcomes(self) -> list[str]:
        """Return the name of each step's error; empty for a success."""
        names = []
        for index in range(self.contract.count()):
            if self.contract.successes(index):
                names.append("")
            else:
                data = self.contract.answers(index)
                names.append(self.grid.chain.error(data, Exception()).name)
        return names


@pytest.fixture
def hooked(hostile: dict[str, Any]) -> tuple[Grid, CallbackAccount]:
    grid = Grid(token=hostile["HookedCredit"])
    return grid, CallbackAccount(grid, hostile)


def test_a_customer_is_refunded_once(hooked: tuple[Grid, CallbackAccount]) -> None:
    """Everything that moves money is locked while money moves."""
    grid, robot = hooked
    host = grid.provider()
    for _ in range(2):
        robot.act(grid.scheduler, "submitJobs", [grid.request()])
    grid.assign(host, 1)
    grid.submit()  # somebody else's escrow to steal
    report = grid.report(1)
    robot.plan("cancel", [1])
    robot.plan("cancel", [2])
    robot.plan("withdraw", robot.address)
    robot.plan("topUp", 2, robot.address, ESCROW)
    robot.plan("submitJobs", [grid.request()])
    robot.plan("submitJobsWithPermit", [grid.request()], grid.permit(grid.alice, 1))
    robot.plan("topUpWithPermit", 2, robot.address, ESCROW, grid.permit(grid.alice, 1))
    robot.plan("panic", [2], "")
    robot.plan("finish", [report])
    robot.plan("collect", [2])
    robot.act(grid.scheduler, "cancel", [1])

    assert robot.outcomes == ["ReentrancyGuardReentrantCall"] * 10
    assert grid.balance(robot.address) == WEALTH - ESCROW
    assert grid.balance(grid.scheduler.address) == 2 * ESCROW
    assert [grid.status(i) for i in (1, 2, 3)] == [
        JobStatus.CANCELLED,
        JobStatus.PENDING,
        JobStatus.PENDING,
    ]


def test_a_callback_during_a_payment_sees_the_final_state(
    hooked: tuple[Grid, CallbackAccount],
) -> None:
    """A provider that calls back while it is paid finds its job final and its other jobs unchanged."""
    grid, robot = hooked
    robot.act(
        grid.registry,
        "register",
        {"nodes": 9, "cpusPerNode": 9, "memPerNode": 9_000, "gpusPerNode": 9},
        {"cpu": 1_000_003, "gpu": 5_000_011, "mem": 101},
        [],
    )
    grid.registry.approve(robot.address, 1, sender=grid.admin)
    host = Host(grid.registry.idOf(robot.address), robot.address)
    first, second = grid.submit(), grid.submit()
    grid.assign(host, first, second)
    robot.act(grid.scheduler, "claim", [first, second])
    robot.act(grid.scheduler, "start", [first])
    robot.plan("start", [first])
    robot.plan("start", [second])
    robot.plan("requeue", [first], "")
    robot.plan("claim", [first])
    grid.chain.advance(10)
    robot.act(grid.scheduler, "finish", [grid.report(first, 10)])

    assert robot.outcomes == ["InvalidTransition", "", "InvalidTransition", "InvalidTransition"]
    assert grid.balance(robot.address) == WEALTH + COST - FEE
    assert grid.status(first) is JobStatus.FINISHED
    assert grid.status(second) is JobStatus.RUNNING
    assert grid.balance(grid.scheduler.address) == ESCROW


def test_credits_sent_by_mistake_change_no_job(grid: Grid, host: Host) -> None:
    grid.credit.transfer(grid.scheduler.address, 12_345, sender=grid.bob)
    job_id = ran(grid, host)
    grid.finish(host, job_id, 10)
    assert grid.balance(grid.scheduler.address) == 12_345
    assert grid.scheduler.parkedOf(grid.bob) == 0
