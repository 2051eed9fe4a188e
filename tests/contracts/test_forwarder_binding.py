"""The binding of the forwarder signs and reads the contract's own format."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_utils import to_checksum_address

from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.forwarder import (
    ForwardRequest,
    SignedRequest,
    forwarded_calls,
)
from deepsquare_chain.chain.signers import SigningDomain
from deepsquare_chain.errors import NotAuthorisedError
from tests.support.evm import private_key
from tests.support.grid import Grid

SECP256K1_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


@pytest.fixture
def account() -> LocalAccount:
    result: LocalAccount = Account.from_key(private_key("alice").to_bytes())
    return result


@pytest.fixture
def domain(grid: Grid) -> SigningDomain:
    _, name, version, chain_id, contract, _, _ = grid.forwarder.eip712Domain()
    return SigningDomain(name, version, chain_id, to_checksum_address(contract))


@pytest.fixture
def request_(grid: Grid, account: LocalAccount) -> ForwardRequest:
    return ForwardRequest(
        sender=account.address,
        to=to_checksum_address(grid.scheduler.address),
        value=0,
        gas=1_000_000,
        nonce=grid.forwarder.nonces(grid.alice),
        deadline=grid.chain.now + 60,
        data=grid.scheduler.cancel.encode([grid.submit(grid.alice)]),
    )


def test_the_contract_accepts_signed_requests(
    grid: Grid, domain: SigningDomain, account: LocalAccount, request_: ForwardRequest
) -> None:
    assert domain.name == "DeepSquare"
    signed = request_.sign(account, domain)
    signed.check_signer(domain)
    assert grid.forwarder.verify(signed.values())
    receipt = grid.forwarder.execute(signed.values(), sender=grid.stranger)
    assert receipt.one("ExecutedForwardRequest").success
    # Its nonce is used: the same request is invalid now.
    assert not grid.forwarder.verify(signed.values())


@pytest.mark.parametrize(
    "change",
    [
        {"gas": 2_000_000},
        {"nonce": 7},
        {"deadline": 2**48 - 1},
        {"data": b"\1\2\3\4"},
        {"value": 1},
        {"to": "0x" + "11" * 20},
    ],
)
def test_every_field_is_part_of_the_signature(
    grid: Grid,
    domain: SigningDomain,
    account: LocalAccount,
    request_: ForwardRequest,
    change: dict[str, Any],
) -> None:
    other = dataclasses.replace(request_, **change)
    assert other.digest(domain) != request_.digest(domain)
    forged = SignedRequest(request_, other.sign(account, domain).signature)
    assert not grid.forwarder.verify(forged.values())
    with pytest.raises(NotAuthorisedError, match="is not signed by"):
        forged.check_signer(domain)


@pytest.mark.parametrize(
    "change", [{"chain_id": 1}, {"name": "Other"}, {"version": "2"}, {"contract": "0x" + "22" * 20}]
)
def test_a_signature_for_another_chain_or_forwarder_is_invalid(
    grid: Grid,
    domain: SigningDomain,
    account: LocalAccount,
    request_: ForwardRequest,
    change: dict[str, Any],
) -> None:
    signed = request_.sign(account, dataclasses.replace(domain, **change))
    assert not grid.forwarder.verify(signed.values())
    with pytest.raises(NotAuthorisedError):
        signed.check_signer(domain)


def test_signatures_that_the_contract_refuses_are_refused_here(
    grid: Grid, domain: SigningDomain, account: LocalAccount, request_: ForwardRequest
) -> None:
    good = request_.sign(account, domain).signature
    high = SECP256K1_ORDER - int.from_bytes(good[32:64], "big")
    malleable = good[:32] + high.to_bytes(32, "big") + bytes([55 - good[64]])
    for bad in (b"", good[:64], good + b"\0", malleable, good[:64] + b"\0", bytes(64) + b"\x1b"):
        forged = SignedRequest(request_, bad)
        assert not grid.forwarder.verify(forged.values())
        with pytest.raises(NotAuthorisedError, match="signature is not valid"):
            forged.check_signer(domain)
    stranger: LocalAccount = Account.from_key(private_key("stranger").to_bytes())
    with pytest.raises(NotAuthorisedError, match=f"but by {stranger.address}"):
        request_.sign(stranger, domain).check_signer(domain)


def test_calls_are_read_back_from_a_transaction(
    domain: SigningDomain, account: LocalAccount, request_: ForwardRequest
) -> None:
    forwarder = interface("ERC2771Forwarder")
    signed = [
        dataclasses.replace(request_, nonce=nonce, gas=nonce + 1).sign(account, domain)
        for nonce in range(3)
    ]
    batch = forwarder.function("executeBatch").encode(
        [request.values() for request in signed], account.address
    )
    calls = forwarded_calls(batch)
    assert [(call.sender, call.gas, call.data) for call in calls] == [
        (account.address, nonce + 1, request_.data) for nonce in range(3)
    ]
    (single,) = forwarded_calls(forwarder.function("execute").encode(signed[0].values()))
    assert single == calls[0]
    for other in (forwarder.function("verify").encode(signed[0].values()), batch[:100], b""):
        with pytest.raises(AbiError):
            forwarded_calls(other)


def test_the_json_form_is_read_back(
    domain: SigningDomain, account: LocalAccount, request_: ForwardRequest
) -> None:
    signed = request_.sign(account, domain)
    assert SignedRequest.from_wire(signed.to_wire()) == signed
