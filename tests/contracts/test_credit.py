"""Credit: a plain token with permit, whose supply changes only by mint and burn."""

from __future__ import annotations

import pytest
from eth_abi import encode
from eth_utils import keccak

from tests.support.evm import CHAIN_ID, ZERO, reverts
from tests.support.grid import WEALTH, Grid

pytestmark = pytest.mark.contracts


def test_names_and_decimals(grid: Grid) -> None:
    assert grid.credit.name() == "DeepSquare Credit"
    assert grid.credit.symbol() == "CREDIT"
    assert grid.credit.decimals() == 18


def test_only_a_minter_mints(grid: Grid) -> None:
    supply = grid.credit.totalSupply()
    receipt = grid.credit.mint(grid.bob, 5, sender=grid.admin)
    assert receipt.one("Transfer").parameters == {"from": ZERO, "to": grid.bob, "value": 5}
    assert grid.credit.totalSupply() == supply + 5
    role = grid.credit.MINTER_ROLE()
    for caller in (grid.alice, grid.meta, grid.treasury):
        with reverts("AccessControlUnauthorizedAccount", caller, role):
            grid.credit.mint(caller, 5, sender=caller)
    # the administrator of the token has no minter role by default
    grid.credit.revokeRole(role, grid.admin, sender=grid.admin)
    with reverts("AccessControlUnauthorizedAccount", grid.admin, role):
        grid.credit.mint(grid.admin, 5, sender=grid.admin)


def test_burning_takes_from_the_supply(grid: Grid) -> None:
    supply = grid.credit.totalSupply()
    grid.credit.burn(7, sender=grid.alice)
    assert (grid.credit.totalSupply(), grid.balance(grid.alice)) == (supply - 7, WEALTH - 7)
    grid.credit.approve(grid.bob, 3, sender=grid.alice)
    grid.credit.burnFrom(grid.alice, 3, sender=grid.bob)
    assert grid.credit.totalSupply() == supply - 10
    with reverts("ERC20InsufficientAllowance", grid.bob, 0, 1):
        grid.credit.burnFrom(grid.alice, 1, sender=grid.bob)


def test_transfers_and_allowances(grid: Grid) -> None:
    supply = grid.credit.totalSupply()
    grid.credit.transfer(grid.bob, 10, sender=grid.alice)
    grid.credit.approve(grid.stranger, 4, sender=grid.bob)
    grid.credit.transferFrom(grid.bob, grid.stranger, 3, sender=grid.stranger)
    assert grid.credit.allowance(grid.bob, grid.stranger) == 1
    assert [grid.balance(w) for w in (grid.alice, grid.bob, grid.stranger)] == [
        WEALTH - 10,
        WEALTH + 7,
        3,
    ]
    assert grid.credit.totalSupply() == supply


def test_the_domain_of_permits_names_chain_and_contract(grid: Grid) -> None:
    kinds = ["bytes32", "bytes32", "bytes32", "uint256", "address"]
    typehash = keccak(
        text="EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
    )
    domain = [
        typehash,
        keccak(text="DeepSquare Credit"),
        keccak(text="1"),
        CHAIN_ID,
        grid.credit.address,
    ]
    assert grid.credit.DOMAIN_SEPARATOR() == keccak(encode(kinds, domain))


def test_a_permit_is_used_once(grid: Grid) -> None:
    permit = grid.permit(grid.alice, 5)
    grid.credit.permit(grid.alice, grid.scheduler.address, *permit.values(), sender=grid.bob)
    assert grid.credit.nonces(grid.alice) == 1
    with reverts("ERC2612InvalidSigner"):
        grid.credit.permit(grid.alice, grid.scheduler.address, *permit.values(), sender=grid.bob)
