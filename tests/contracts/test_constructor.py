"""Values that a deployment fixes permanently, and their bounds."""

from __future__ import annotations

from typing import Any

import pytest
from eth_utils import keccak
from rlp import encode as rlp_encode

from tests.support.evm import ZERO, Reverted, load_artifact, reverts
from tests.support.grid import FEE_BPS, TIMES, Grid

pytestmark = pytest.mark.contracts
DAYS_30 = 30 * 86_400
BOUNDS = {
    "claimTimeout": (5, DAYS_30),
    "pendingTimeout": (5, DAYS_30),
    "pendingExpiry": (TIMES["pendingTimeout"], 365 * 86_400),
    "responseTimeout": (5, DAYS_30),
    "responseBlocks": (1, 100_000),
    "lostTimeout": (TIMES["responseTimeout"], DAYS_30),
    "reportGrace": (3_600, DAYS_30),
    "topUpNotice": (10, 3_600),
    "collectInterval": (5, DAYS_30),
}
# Times with another time as lower bound, with their largest value.
LONGEST = TIMES | {name: BOUNDS[name][1] for name in ("pendingExpiry", "lostTimeout")}


def word(name: str) -> bytes:
    return name.encode().ljust(32, b"\0")


def test_given_values_are_used(grid: Grid) -> None:
    scheduler = grid.scheduler
    assert scheduler.timeouts()._asdict() == TIMES
    assert scheduler.credit() == grid.credit.address
    assert scheduler.registry() == grid.registry.address
    assert scheduler.treasury() == grid.treasury
    assert scheduler.trustedForwarder() == grid.forwarder.address
    assert scheduler.isTrustedForwarder(grid.forwarder.address) is True
    assert scheduler.feeBps() == FEE_BPS
    assert scheduler.submissionsOpen() is True
    assert scheduler.jobCount() == 0


@pytest.mark.parametrize("name", BOUNDS)
def test_times_keep_within_their_bounds(grid: Grid, name: str) -> None:
    low, high = BOUNDS[name]
    for value in (low, high):
        scheduler = grid.deploy_scheduler(times=LONGEST | {name: value})
        assert getattr(scheduler.timeouts(), name) == value
    for value in (0, low - 1, high + 1, 2**32 - 1):
        with reverts("OutOfBounds", word(name), value, low, high):
            grid.deploy_scheduler(times=LONGEST | {name: value})


def test_the_fee_keeps_within_its_bounds(grid: Grid) -> None:
    assert grid.deploy_scheduler(fee_bps=0).feeBps() == 0
    assert grid.deploy_scheduler(fee_bps=2_000).feeBps() == 2_000
    with reverts("OutOfBounds", word("feeBps"), 2_001, 0, 2_000):
        grid.deploy_scheduler(fee_bps=2_001)


def test_the_credit_must_be_a_token_of_18_decimals(grid: Grid, hostile: dict[str, Any]) -> None:
    cents = grid.chain.deploy(hostile["CentCredit"], grid.admin, 0, sender=grid.admin)
    with reverts("InvalidAddress", word("credit")):
        grid.deploy_scheduler(credit=cents.address)


def test_the_credit_must_have_code(grid: Grid) -> None:
    for address in (ZERO, grid.alice):
        with reverts("InvalidAddress", word("credit")):
            grid.deploy_scheduler(credit=address)
    with pytest.raises(Reverted):
        grid.deploy_scheduler(credit=grid.registry.address)  # no decimals()


def test_the_registry_must_have_code(grid: Grid) -> None:
    for address in (ZERO, grid.alice):
        with reverts("InvalidAddress", word("registry")):
            grid.deploy_scheduler(registry=address)


def test_the_treasury_must_be_able_to_hold_fees(grid: Grid) -> None:
    with reverts("InvalidAddress", word("treasury")):
        grid.deploy_scheduler(treasury=ZERO)
    nonce = grid.chain.state.get_nonce(bytes.fromhex(grid.admin[2:]))
    scheduler_address = keccak(rlp_encode([bytes.fromhex(grid.admin[2:]), nonce]))[-20:]
    with reverts("InvalidAddress", word("treasury")):
        grid.deploy_scheduler(treasury="0x" + scheduler_address.hex())


def test_a_forwarder_must_have_code_or_be_zero(grid: Grid) -> None:
    with reverts("InvalidAddress", word("forwarder")):
        grid.deploy_scheduler(forwarder=grid.alice)
    assert grid.deploy_scheduler(forwarder=ZERO).trustedForwarder() == ZERO


def test_an_administrator_is_required(grid: Grid) -> None:
    with reverts("AccessControlInvalidDefaultAdmin", ZERO):
        grid.deploy_scheduler(admin=ZERO)
    with reverts("AccessControlInvalidDefaultAdmin", ZERO):
        grid.chain.deploy(load_artifact("Credit"), ZERO, 0, sender=grid.admin)
    with reverts("AccessControlInvalidDefaultAdmin", ZERO):
        grid.chain.deploy(load_artifact("ProviderRegistry"), ZERO, 0, 3_600, sender=grid.admin)


def test_the_approval_period_keeps_within_its_bounds(grid: Grid) -> None:
    low, high = 3_600, 730 * 86_400
    artifact = load_artifact("ProviderRegistry")
    for value in (low, high):
        registry = grid.chain.deploy(artifact, grid.admin, 0, value, sender=grid.admin)
        assert registry.approvalPeriod() == value
    for value in (0, low - 1, high + 1, 2**256 - 1):
        with reverts("OutOfBounds", word("approvalPeriod"), value, low, high):
            grid.chain.deploy(artifact, grid.admin, 0, value, sender=grid.admin)


def test_a_deployment_without_delay_hands_over_in_the_next_second(grid: Grid) -> None:
    scheduler = grid.deploy_scheduler(delay=0)
    scheduler.beginDefaultAdminTransfer(grid.bob, sender=grid.admin)
    grid.chain.advance(1)
    scheduler.acceptDefaultAdminTransfer(sender=grid.bob)
    assert scheduler.owner() == grid.bob
