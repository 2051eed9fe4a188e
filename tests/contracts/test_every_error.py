"""Every custom error of every ABI occurs in a test, or is listed here with the reason why it can't occur."""

# ruff: noqa: ARG005 - the entries of a table have one signature

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from eth_utils import keccak

from tests.support.evm import ZERO, Reverted, load_artifact, person, signature
from tests.support.grid import (
    HARDWARE,
    INTERIM_PAYMENTS,
    NO_SELF_SCHEDULING,
    PRICES,
    RATE,
    TIMES,
    Grid,
    Host,
    assignment,
)

pytestmark = pytest.mark.contracts
CONTRACTS = ("Credit", "ProviderRegistry", "MetaScheduler", "ERC2771Forwarder")
Provocation = Callable[[Grid, Host], Any]

# Errors of OpenZeppelin that no call of our contracts can cause.
UNREACHABLE = {
    ("Credit", "ECDSAInvalidSignatureLength"): "permit takes v, r and s, not bytes",
    ("Credit", "InvalidAccountNonce"): "only a checked nonce of a caller's choice can be wrong",
    ("Credit", "InvalidShortString"): "name and version are fixed and short",
    ("Credit", "StringTooLong"): "name and version are fixed and short",
    ("ERC2771Forwarder", "InsufficientBalance"): "it refunds no more than it was just sent",
    ("ERC2771Forwarder", "InvalidAccountNonce"): "nonces are its own, in the signed text",
    ("ERC2771Forwarder", "InvalidShortString"): "name and version are fixed and short",
    ("ERC2771Forwarder", "StringTooLong"): "name and version are fixed and short",
}
# After the year 8,900,000 a time does not fit the admin rules' 48 bits.
FAR = 2**48


def permit(**changes: Any) -> Provocation:
    def provoke(grid: Grid, _: Host) -> Any:
        signed = grid.permit(grid.alice, 5) | changes
        return grid.credit.permit(
            grid.alice, grid.scheduler.address, *signed.values(), sender=grid.bob
        )

    return provoke


def far(contract: str) -> Provocation:
    def provoke(grid: Grid, _: Host) -> Any:
        grid.chain.advance(FAR)
        return getattr(grid, contract).beginDefaultAdminTransfer(grid.bob, sender=grid.admin)

    return provoke


def admin_errors(attribute: str, role: str) -> dict[str, Provocation]:
    """The errors of AccessControlDefaultAdminRules, which all three contracts have."""
    return {
        "AccessControlBadConfirmation": lambda g, h: getattr(g, attribute).renounceRole(
            getattr(getattr(g, attribute), role)(), g.alice, sender=g.bob
        ),
        "AccessControlEnforcedDefaultAdminDelay": lambda g, h: getattr(g, attribute).renounceRole(
            b"\0" * 32, g.admin, sender=g.admin
        ),
        "AccessControlEnforcedDefaultAdminRules": lambda g, h: getattr(g, attribute).grantRole(
            b"\0" * 32, g.bob, sender=g.admin
        ),
        "AccessControlInvalidDefaultAdmin": lambda g, h: getattr(
            g, attribute
        ).acceptDefaultAdminTransfer(sender=g.bob),
        "AccessControlUnauthorizedAccount": lambda g, h: getattr(g, attribute).grantRole(
            b"\1" * 32, g.bob, sender=g.bob
        ),
        "SafeCastOverflowedUintDowncast": far(attribute),
    }


def late(grid: Grid, host: Host) -> Any:
    job_id = grid.running(host)
    grid.chain.advance(570)
    return grid.scheduler.topUp(job_id, grid.alice, 60 * RATE, sender=grid.alice)


def silent(grid: Grid, host: Host) -> Any:
    grid.silence(host, grid.assigned(host))
    return grid.assigned(host)


def excluded(grid: Grid, host: Host) -> Any:
    job_id = grid.running(host)
    grid.scheduler.panic([job_id], "", sender=host.account)
    return grid.assign(host, job_id + 1)


def draining(grid: Grid, host: Host) -> Any:
    grid.registry.setDraining(True, sender=host.account)
    return grid.assigned(host)


def free(grid: Grid, host: Host) -> Any:
    grid.registry.setPrices({"cpu": 0, "gpu": 0, "mem": 0}, sender=host.account)
    return grid.assigned(host)


def closed(grid: Grid, _: Host) -> Any:
    grid.scheduler.setSubmissionsOpen(False, sender=grid.admin)
    return grid.submit()


def twice_challenged(grid: Grid, host: Host) -> Any:
    job_id = grid.assigned(host)
    grid.scheduler.challenge(job_id, sender=grid.bob)
    return grid.scheduler.challenge(job_id, sender=grid.bob)


def full_registry(grid: Grid, _: Host) -> Any:
    grid.register(person("too late"))
    address = bytes.fromhex(grid.registry.address[2:])
    for slot in range(16):
        word = grid.chain.state.get_storage(address, slot)
        if word & 0xFFFF == 1:  # one provider is registered
            grid.chain.state.set_storage(address, slot, word | 0xFFFF)
    return grid.registry.approve(person("too late"), 1, sender=grid.admin)


def banned(grid: Grid, host: Host) -> Any:
    grid.registry.ban(host.account, "", sender=grid.admin)
    return grid.register(host.account)


def unapproved(grid: Grid, _: Host) -> Any:
    grid.register(grid.bob)
    return grid.registry.setOffer({"cpus": 0, "mem": 0, "gpus": 0}, sender=grid.bob)


def too_dear(grid: Grid, host: Host) -> Any:
    group = assignment(host.id, grid.submit(), prices=PRICES | {"mem": PRICES["mem"] - 1})
    return grid.scheduler.metaSchedule([group], sender=grid.meta)


def forbidden(grid: Grid, host: Host) -> Any:
    job_id = grid.submit(flags=NO_SELF_SCHEDULING)
    return grid.scheduler.selfSchedule([job_id], sender=host.account)


def collecting(grid: Grid, host: Host, seconds: int, **terms: Any) -> Any:
    job_id = grid.running(host, **({"flags": INTERIM_PAYMENTS} | terms))
    grid.chain.advance(seconds)
    return grid.scheduler.collect([job_id], sender=host.account)


def collect_when_lost(grid: Grid, host: Host) -> Any:
    job_id = grid.running(host, flags=INTERIM_PAYMENTS)
    grid.abandon(host, job_id)
    return grid.scheduler.collect([job_id], sender=host.account)


def relayed(**changes: Any) -> Provocation:
    """Forward a cancellation with changed fields."""

    def provoke(grid: Grid, _: Host) -> Any:
        request = grid.signed_request(grid.alice, "cancel", [grid.submit()], **changes)
        return grid.forwarder.execute(request, sender=grid.stranger)

    return provoke


def stranded_ether(grid: Grid, _: Host) -> Any:
    """Execute a batch whose only request has ether that the target refuses, and that names no refund receiver."""
    grid.chain.state.set_balance(bytes.fromhex(grid.stranger[2:]), 1)
    request = grid.signed_request(grid.alice, "cancel", [grid.submit()], value=1)
    return grid.forwarder.executeBatch([request], ZERO, sender=grid.stranger, ether=1)


PROVOCATIONS: dict[str, dict[str, Provocation]] = {
    "Credit": admin_errors("credit", "MINTER_ROLE")
    | {
        "ECDSAInvalidSignature": permit(v=0),
        "ECDSAInvalidSignatureS": permit(s=b"\xff" * 32),
        "ERC2612ExpiredSignature": permit(deadline=0),
        "ERC2612InvalidSigner": permit(value=6),
        "ERC20InsufficientAllowance": lambda g, h: g.credit.transferFrom(
            g.alice, g.bob, 1, sender=g.bob
        ),
        "ERC20InsufficientBalance": lambda g, h: g.credit.transfer(g.bob, 1, sender=g.stranger),
        "ERC20InvalidReceiver": lambda g, h: g.credit.transfer(ZERO, 1, sender=g.alice),
        "ERC20InvalidSpender": lambda g, h: g.credit.approve(ZERO, 1, sender=g.alice),
        # nobody has the key of the zero address, but a simulated call can use it as sender
        "ERC20InvalidSender": lambda g, h: g.credit.transfer(g.bob, 0, sender=ZERO),
        "ERC20InvalidApprover": lambda g, h: g.credit.approve(g.bob, 0, sender=ZERO),
    },
    "ProviderRegistry": admin_errors("registry", "APPROVER_ROLE")
    | {
        "InvalidHardware": lambda g, h: g.register(g.bob, hardware=HARDWARE | {"nodes": 0}),
        "InvalidLabel": lambda g, h: g.registry.setLabels(["?"], sender=h.account),
        "NotApproved": unapproved,
        "NotRegistered": lambda g, h: g.registry.setPrices(PRICES, sender=g.bob),
        "OfferTooLarge": lambda g, h: g.registry.setOffer(
            {"cpus": 33, "mem": 0, "gpus": 0}, sender=h.account
        ),
        "OutOfBounds": lambda g, h: g.chain.deploy(
            load_artifact("ProviderRegistry"), g.admin, 0, 0, sender=g.admin
        ),
        "PriceTooHigh": lambda g, h: g.registry.setPrices(
            PRICES | {"cpu": 2**64 - 1}, sender=h.account
        ),
        "ProviderBanned": banned,
        "ReasonTooLong": lambda g, h: g.registry.ban(h.account, "r" * 257, sender=g.admin),
        "RegistryFull": full_registry,
        "TooManyLabels": lambda g, h: g.registry.setLabels(["a=b"] * 33, sender=h.account),
        "VersionMismatch": lambda g, h: g.registry.approve(h.account, 2, sender=g.admin),
    },
    "MetaScheduler": admin_errors("scheduler", "METASCHEDULER_ROLE")
    | {
        "AllotmentUsedUp": lambda g, h: collecting(g, h, 600),
        "ChallengeRefused": twice_challenged,
        "DoesNotFit": lambda g, h: g.assigned(h, tasks=99),
        "EmptyBatch": lambda g, h: g.scheduler.claim([], sender=h.account),
        "InterimPaymentsForbidden": lambda g, h: collecting(g, h, 300, flags=0),
        "InvalidAddress": lambda g, h: g.deploy_scheduler(treasury=ZERO),
        "InvalidTerms": lambda g, h: g.submit(tasks=0),
        "InvalidTransition": lambda g, h: g.scheduler.claim([1], sender=h.account),
        "NotAssignedProvider": lambda g, h: g.scheduler.claim([g.assigned(h)], sender=g.bob),
        "NotCustomer": lambda g, h: g.scheduler.cancel([g.submit()], sender=g.bob),
        "NotLost": lambda g, h: g.scheduler.panic([g.running(h)], "", sender=g.bob),
        "NothingParked": lambda g, h: g.scheduler.withdraw(g.bob, sender=g.bob),
        "NothingToAnswer": lambda g, h: g.scheduler.answer(sender=h.account),
        "OutOfBounds": lambda g, h: g.deploy_scheduler(times=TIMES | {"claimTimeout": 0}),
        "OverBudget": lambda g, h: g.assigned(h, amount=1),
        "PriceRaised": too_dear,
        "ProviderExcluded": excluded,
        "ProviderNotActive": draining,
        "ProviderSilent": silent,
        "RateOutOfRange": free,
        "ReasonTooLong": lambda g, h: g.scheduler.panic(
            [g.running(h)], "r" * 257, sender=h.account
        ),
        "RunLost": collect_when_lost,
        "SelfSchedulingForbidden": forbidden,
        "SubmissionsClosed": closed,
        "TooEarly": lambda g, h: g.scheduler.requeue([g.assigned(h)], "", sender=g.bob),
        "TopUpTooLarge": lambda g, h: g.scheduler.topUp(
            g.submit(amount=10**20), g.alice, 2**96 - 1, sender=g.alice
        ),
        "TopUpTooLate": late,
        "TopUpTooSmall": lambda g, h: g.scheduler.topUp(g.submit(), g.alice, 0, sender=g.alice),
        "WrongStatus": lambda g, h: g.scheduler.challenge(1, sender=g.bob),
    },
    "ERC2771Forwarder": {
        "ERC2771ForwarderExpiredRequest": relayed(deadline=0),
        "ERC2771ForwarderInvalidSigner": relayed(signed_by=person("bob")),
        "ERC2771ForwarderMismatchedValue": relayed(value=1),
        "ERC2771ForwarderNoRefundReceiver": stranded_ether,
        "ERC2771UntrustfulTarget": relayed(to=person("bob")),
        "FailedCall": relayed(data=b""),
    },
}
# These need a token that misbehaves.
WITH_TOKEN = {"ReentrancyGuardReentrantCall", "SafeERC20FailedOperation"}


def abi_errors() -> list[tuple[str, dict[str, Any]]]:
    return [
        (contract, entry)
        for contract in CONTRACTS
        for entry in load_artifact(contract)["abi"]
        if entry["type"] == "error"
    ]


def test_the_list_is_that_of_the_abi() -> None:
    in_abis = {(contract, entry["name"]) for contract, entry in abi_errors()}
    listed_errors = {(c, name) for c, names in PROVOCATIONS.items() for name in names}
    listed_errors |= {("MetaScheduler", name) for name in WITH_TOKEN} | set(UNREACHABLE)
    assert listed_errors == in_abis


@pytest.mark.parametrize(
    ("contract", "entry"), abi_errors(), ids=lambda v: v if isinstance(v, str) else v["name"]
)
def test_each_error_can_be_caused(
    grid: Grid, host: Host, contract: str, entry: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    name = entry["name"]
    if (contract, name) in UNREACHABLE:
        return
    if name in WITH_TOKEN:
        hostile = request.getfixturevalue("hostile")
        error = _reentered(hostile) if name.startswith("Reentrancy") else _failed(hostile)
    else:
        with pytest.raises(Reverted) as error_info:
            PROVOCATIONS[contract][name](grid, host)
        error = error_info.value
    assert error.data[:4] == keccak(text=signature(entry))[:4]
    assert error.name == name


def _failed(hostile: dict[str, Any]) -> Reverted:
    """Return the error at a token that returns false."""
    grid = Grid(token=hostile["FalseCredit"])
    grid.credit.setBlocked(grid.alice, True, sender=grid.admin)
    with pytest.raises(Reverted) as error_info:
        grid.submit()
    return error_info.value


def _reentered(hostile: dict[str, Any]) -> Reverted:
    """Return the error of a nested call."""
    grid = Grid(token=hostile["HookedCredit"])
    robot = grid.chain.deploy(hostile["Reenterer"], sender=grid.admin)
    inner = grid.scheduler.withdraw.encode(robot.address)
    robot.plan(grid.scheduler.address, inner, sender=grid.admin)
    grid.fund(robot.address, 0)
    grid.credit.mint(robot.address, 10**12, sender=grid.admin)
    approve = grid.credit.approve.encode(grid.scheduler.address, 2**255)
    robot.act(grid.credit.address, approve, sender=grid.admin)
    already = robot.count()
    submit = grid.scheduler.submitJobs.encode([grid.request()])
    robot.act(grid.scheduler.address, submit, sender=grid.admin)
    return grid.chain.error(robot.answers(already), Exception("nothing was met"))
