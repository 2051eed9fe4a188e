"""External signers: a signature of anything but the requested data is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data

from deepsquare_chain.chain import signers
from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import CreditContract
from deepsquare_chain.chain.signers import ExternalSigner, sign_and_record, signed_by
from deepsquare_chain.cli import services
from deepsquare_chain.client import doctor, transactions
from deepsquare_chain.daemon import service
from deepsquare_chain.errors import EndpointError, NotAuthorisedError, UsageError
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.gateway_client import GatewayClient, share_data
from tests.support.signer import ReferenceSigner

pytestmark = pytest.mark.unit

OWN = Account.from_key(b"\x11" * 32)
OTHER = Account.from_key(b"\x22" * 32)
TRANSACTION = {
    "type": 2,
    "chainId": 1337,
    "nonce": 7,
    "to": OTHER.address,
    "value": 0,
    "data": b"\x01\x02",
    "gas": 100_000,
    "maxFeePerGas": 3 * 10**9,
    "maxPriorityFeePerGas": 10**9,
}
TYPED: dict[str, Any] = {
    "types": {
        "EIP712Domain": [{"name": "name", "type": "string"}],
        "Permit": [{"name": "owner", "type": "address"}, {"name": "value", "type": "uint256"}],
    },
    "primaryType": "Permit",
    "domain": {"name": "test"},
    "message": {"owner": OWN.address, "value": 2**200 + 1},
}


@pytest.fixture(params=["", "clef+"])
def reference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A reference signer, called without a socket, and its URL."""
    signer = ReferenceSigner(OWN, clef=bool(request.param))

    def client(**_: Any) -> httpx2.Client:
        def handle(request: httpx2.Request) -> httpx2.Response:
            return httpx2.Response(200, json=signer.answer(json.loads(request.content)))

        return httpx2.Client(transport=httpx2.MockTransport(handle))

    real = httpx2.Client
    monkeypatch.setattr(signers.httpx2, "Client", lambda **_: real(transport=_transport(signer)))
    return signer, f"{request.param}http://127.0.0.1:1"


def _transport(signer: ReferenceSigner) -> httpx2.MockTransport:
    def handle(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json=signer.answer(json.loads(request.content)))

    return httpx2.MockTransport(handle)


def test_signatures_are_those_of_the_key(reference: Any) -> None:
    _, url = reference
    external_signer = ExternalSigner(url)
    assert external_signer.address == OWN.address
    signed, expected = (
        external_signer.sign_transaction(TRANSACTION),
        OWN.sign_transaction(TRANSACTION),
    )
    assert (signed.raw_transaction, signed.hash) == (expected.raw_transaction, expected.hash)
    creation = {**TRANSACTION, "to": b""}
    assert external_signer.sign_transaction(creation).hash == OWN.sign_transaction(creation).hash
    typed, own_typed = (
        value.sign_typed_data(full_message=TYPED) for value in (external_signer, OWN)
    )
    assert typed == own_typed
    text = encode_defunct(text="sign in")
    assert external_signer.sign_message(text) == OWN.sign_message(text)


@pytest.mark.parametrize(
    "change",
    [
        {"to": OWN.address},
        {"value": 1},
        {"nonce": 8},
        {"data": b"\x01"},
        {"maxFeePerGas": 4 * 10**9},
    ],
)
def test_another_transaction_than_requested_is_refused(
    reference: Any, change: dict[str, Any]
) -> None:
    signer, url = reference
    other = "0x" + bytes(OWN.sign_transaction({**TRANSACTION, **change}).raw_transaction).hex()
    signer.bend = lambda method, answer: other if "Transaction" in method else answer
    with pytest.raises(EndpointError, match="requested transaction"):
        ExternalSigner(url).sign_transaction(TRANSACTION)


@pytest.mark.parametrize("altered", ["0x", "nonsense", None, 5, "0x" + "11" * 65])
def test_signatures_of_other_accounts_are_refused(reference: Any, altered: Any) -> None:
    signer, url = reference
    signer.bend = lambda method, answer: altered if "sign" in method else answer
    external_signer = ExternalSigner(url)
    with pytest.raises(EndpointError):
        external_signer.sign_typed_data(full_message=TYPED)
    with pytest.raises(EndpointError):
        external_signer.sign_transaction(TRANSACTION)


def test_another_account_s_signature_is_refused(reference: Any) -> None:
    signer, url = reference
    other_signature = "0x" + bytes(OTHER.sign_message(encode_defunct(text="a")).signature).hex()
    signer.bend = lambda method, answer: other_signature if "sign" in method else answer
    with pytest.raises(EndpointError, match="a signature of"):
        ExternalSigner(url).sign_message(encode_defunct(text="a"))


def test_a_signer_of_several_accounts_needs_a_name(reference: Any) -> None:
    signer, url = reference
    signer.bend = lambda _method, _answer: [OWN.address, OTHER.address.lower()]
    with pytest.raises(UsageError, match="has 2 accounts"):
        ExternalSigner(url)
    assert ExternalSigner(url, OTHER.address).address == OTHER.address
    signer.bend = lambda _method, _answer: [OWN.address]
    with pytest.raises(UsageError, match="has 1 accounts"):
        ExternalSigner(url, OTHER.address)


def test_a_refusal_of_the_signer_is_reported() -> None:
    signer = ReferenceSigner(OWN, clef=True)
    with pytest.MonkeyPatch.context() as patch:
        real = httpx2.Client
        patch.setattr(signers.httpx2, "Client", lambda **_: real(transport=_transport(signer)))
        with pytest.raises(NotAuthorisedError, match="no method eth_accounts"):
            ExternalSigner("http://127.0.0.1:1")


class WaitingSigner(ExternalSigner):
    """Signs once the event loop has set `go`, like a person who confirms in clef."""

    def __init__(self) -> None:
        self.address = OWN.address
        self.go = threading.Event()
        self.requests = 0

    def sign_typed_data(self, *, full_message: dict[str, Any]) -> Any:
        self.requests += 1
        assert self.go.wait(30), "the event loop waits for the signer"
        return OWN.sign_typed_data(full_message=full_message)


async def test_the_event_loop_runs_while_a_permit_is_signed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    credit = CreditContract(None, OTHER.address)  # type: ignore[arg-type]

    async def permit_data(*_: Any) -> dict[str, Any]:
        return TYPED

    monkeypatch.setattr(credit, "permit_data", permit_data)
    signer = WaitingSigner()
    signing = asyncio.create_task(credit.sign_permit(signer, OTHER.address, 5, 9))
    asyncio.get_running_loop().call_later(0.01, signer.go.set)
    permit = await signing
    expected = OWN.sign_typed_data(full_message=TYPED)
    assert (permit.v, permit.r, permit.s) == (
        expected.v,
        expected.r.to_bytes(32, "big"),
        expected.s.to_bytes(32, "big"),
    )


async def test_a_nonce_that_is_used_while_a_request_is_signed_is_signed_again() -> None:
    """The signature of a gasless request is made before the database transaction begins."""
    signer = WaitingSigner()
    free = iter((4, 5, 5))
    asyncio.get_running_loop().call_later(0.01, signer.go.set)

    def sign(nonce: int) -> tuple[int, Any]:
        return nonce, signer.sign_typed_data(full_message=TYPED)

    nonce, _ = await sign_and_record(signer, sign, lambda allocate: allocate(next(free)))
    assert (nonce, signer.requests) == (5, 2)


async def test_a_share_of_a_job_is_signed_by_an_external_signer(
    reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = reference
    client = GatewayClient(
        "http://127.0.0.1:1", account=ExternalSigner(url), chain_id=1, contract=OTHER.address
    )
    bodies: list[dict[str, Any]] = []

    async def send(*_: Any, json: dict[str, Any]) -> None:
        bodies.append(json)

    monkeypatch.setattr(client, "_request", send)
    await client.share(7, OTHER.address, 2_000)
    message = encode_typed_data(full_message=share_data(1, OTHER.address, 7, OTHER.address, 2_000))
    assert Account.recover_message(message, signature=bodies[0]["signature"]) == OWN.address
    await client.close()


async def test_a_service_waits_for_its_signer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [EndpointError("The signer does not answer"), OWN]

    async def open_account(_: Settings) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(services, "open_account", open_account)
    monkeypatch.setattr(services, "configure_logging", lambda *_, **__: None)
    monkeypatch.setattr(service, "_PAUSES", (0.001, 0.001))
    settings = Settings(signer="http://127.0.0.1:1")
    assert await services._account_of(settings, "provider") == OWN
    assert not answers


async def test_a_doctor_checks_the_account_of_the_signer(reference: Any) -> None:
    _, url = reference
    settings = Settings(signer=url, password_file="/nowhere")  # type: ignore[arg-type]
    assert await doctor._wallet(settings) == f"{OWN.address} at the signer {url}"
    assert "not needed" in await doctor._password_file(settings)


def test_a_safe_batch_has_the_checksum_of_the_transaction_builder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The checksum was computed by the Transaction Builder's own function (checksum.ts).
    monkeypatch.setattr(transactions.time, "time", lambda: 1_761_326_849.944)
    call = Call(OTHER.address, b"\x01\x02", "approve 'é'")
    batch = transactions.safe_batch(1, OWN.address, [call, call])
    assert (
        batch["meta"]["checksum"]
        == "0x22e37d9fb90fa9e58964202f09f9db13193b407c91a8100da447ceab737e43c4"
    )
    renamed = transactions.safe_batch(1, OWN.address, [replace(call, label="other"), call])
    assert renamed["meta"]["checksum"] == batch["meta"]["checksum"]
    other = transactions.safe_batch(1, OWN.address, [call])
    assert other["meta"]["checksum"] != batch["meta"]["checksum"]


def test_a_signer_that_does_not_answer_is_not_waited_for_after_an_interruption(
    reference: Any,
) -> None:
    _, url = reference
    go, started = threading.Event(), threading.Event()

    def sign() -> None:
        started.set()
        go.wait(60)

    async def interrupted() -> None:
        signing = asyncio.create_task(signed_by(ExternalSigner(url), sign))
        assert await asyncio.to_thread(started.wait, 30)
        signing.cancel()
        await asyncio.wait({signing})
        assert signing.cancelled()

    try:
        asyncio.run(interrupted())  # would wait for a thread of asyncio
        assert not go.is_set()
        [thread] = [
            candidate for candidate in threading.enumerate() if candidate.name == "external signer"
        ]
        assert thread.daemon
    finally:
        go.set()
