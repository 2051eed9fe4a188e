"""Rules of a relay, previews for customers, and invalid messages; without a network."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import httpx2
import pytest
from eth_account import Account

from deepsquare_chain.chain.bindings.abi import interface
from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.forwarder import ForwardRequest, SignedRequest
from deepsquare_chain.chain.bindings.records import request_values
from deepsquare_chain.chain.signers import SigningDomain
from deepsquare_chain.cli.frame import CommandContext, confirmation_prompt
from deepsquare_chain.cli.output import Format, Printer
from deepsquare_chain.client.gasless import RelayClient, RelayRefusedError, relay_url
from deepsquare_chain.client.transactions import Preview, describe_call
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import EndpointError, NotFoundError, UsageError
from deepsquare_chain.job import JobFlags, Objective, Resources, Terms
from deepsquare_chain.observability.serving import RequestRefusedError
from deepsquare_chain.relay.requests import (
    RelayRules,
    Requests,
    State,
    check,
    check_deadline,
    gas_of,
)
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.outbox import RequestState

ACCOUNT = Account.from_key(b"\x22" * 32)
SCHEDULER = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
DOMAIN = SigningDomain("DeepSquare", "1", 1337, SCHEDULER)
TERMS = Terms(
    amount=CREDIT,
    time_limit=90,
    resources=Resources(2, 3, 100, 1),
    retries=1,
    flags=JobFlags.UNTIL_SPENT | JobFlags.INTERIM_PAYMENTS,
    objective=Objective.TIME,
    name="night run",
    uses="gpu.model=h100",
)


def data(function: str, *values: Any) -> bytes:
    return interface("MetaScheduler").function(function).encode(*values)


def submission(*amounts: int) -> bytes:
    rows = [(dataclasses.replace(TERMS, amount=amount), [bytes(32)]) for amount in amounts]
    return data("submitJobs", request_values(rows))


def signed(content: bytes, **changes: Any) -> SignedRequest:
    values = {
        "sender": ACCOUNT.address,
        "to": SCHEDULER,
        "value": 0,
        "gas": 400_000,
        "nonce": 0,
        "deadline": 1_000,
        "data": content,
    }
    return ForwardRequest(**(values | changes)).sign(ACCOUNT, DOMAIN)


# -- rules


@pytest.mark.parametrize(
    ("content", "function", "amount"),
    [
        (submission(3 * CREDIT, CREDIT), "submitJobs", CREDIT),
        (data("topUp", 1, ACCOUNT.address, CREDIT), "topUp", CREDIT),
        (data("cancel", [1, 2]), "cancel", 0),
        (data("withdraw", ACCOUNT.address), "withdraw", 0),
    ],
)
def test_functions_of_customers_are_allowed(content: bytes, function: str, amount: int) -> None:
    result = check(signed(content), SCHEDULER, RelayRules())
    assert (result.function, result.amount) == (function, amount)


@pytest.mark.parametrize(
    ("content", "changes", "code"),
    [
        (data("cancel", [1]), {"to": ACCOUNT.address}, "wrong-contract"),
        (data("cancel", [1]), {"value": 1}, "value"),
        (data("cancel", [1]), {"gas": 3_000_001}, "too-much-gas"),
        (data("finish", []), {}, "function-not-allowed"),
        (data("setFee", 1), {}, "function-not-allowed"),
        (data("cancel", [1])[:20], {}, "not-a-call"),
        (b"", {}, "not-a-call"),
        (submission(CREDIT, RelayRules().min_amount - 1), {}, "amount-too-small"),
        (data("submitJobs", []), {}, "amount-too-small"),
        (data("topUp", 1, ACCOUNT.address, 1), {}, "amount-too-small"),
    ],
)
def test_everything_else_is_refused(content: bytes, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(RequestRefusedError) as refusal:
        check(signed(content, **changes), SCHEDULER, RelayRules())
    assert refusal.value.code == code
    assert refusal.value.hint


def test_the_minimum_amount_may_be_zero() -> None:
    assert check(signed(submission(1)), SCHEDULER, RelayRules(min_amount=0)).amount == 1


def test_deadlines_have_bounds_in_chain_time() -> None:
    request, rules = signed(b"", deadline=1_000).request, RelayRules(min_lead=15, max_lead=600)
    for now in (400, 985):
        check_deadline(request, now, rules)
    for now, code in ((399, "deadline-too-far"), (986, "expired"), (1_001, "expired")):
        with pytest.raises(RequestRefusedError) as refusal:
            check_deadline(request, now, rules)
        assert refusal.value.code == code


def test_gas_of_a_request_covers_its_call_and_its_calldata() -> None:
    small, large = signed(data("cancel", [1])), signed(data("cancel", list(range(100))))
    grown = len(large.request.data) - len(small.request.data)
    assert gas_of(small) > 400_000 * 64 // 63
    assert gas_of(large) - gas_of(small) == 20 * grown


# -- JSON


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"from": "0x1"}, "address in 'from'"),
        ({"to": None}, "address in 'to'"),
        ({"gas": -1}, "'gas'"),
        ({"gas": 1.5}, "'gas'"),
        ({"gas": True}, "'gas'"),
        ({"nonce": "9" * 100}, "'nonce'"),
        ({"nonce": "²"}, "'nonce'"),
        ({"deadline": 2**48}, "'deadline'"),
        ({"data": "00"}, "'data'"),
        ({"data": "0x0"}, "'data'"),
        ({"signature": 5}, "'signature'"),
        ({"more": 1}, "'more'"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    body = {**signed(b"\1").to_wire(), **changes}
    with pytest.raises(UsageError) as refusal:
        SignedRequest.from_wire(body)
    assert message in refusal.value.message
    with pytest.raises(UsageError):
        SignedRequest.from_wire("text")


# -- previews before a signature


def test_a_submission_is_shown_with_its_terms() -> None:
    rows = dict(describe_call(Call(SCHEDULER, submission(2 * CREDIT), "submit")))
    assert rows["function"] == "submitJobs"
    assert rows["contract"] == f"MetaScheduler at {SCHEDULER}"
    assert rows["jobs"] == "1 job named 'night run'"
    assert rows["resources"] == "2 tasks, 3 CPUs per task, 100 MB per CPU, 1 GPU per job"
    assert (rows["time limit"], rows["escrow"]) == ("90 s", "2 credits per job")
    assert rows["options"] == (
        "runs until its credits are spent; its provider may collect interim payments while it runs"
    )
    assert (rows["requirements"], rows["amount"]) == (
        "gpu.model=h100",
        "2 credits into escrow",
    )
    several = describe_call(Call(SCHEDULER, submission(CREDIT, 2 * CREDIT), "submit"))
    assert several[-1] == ("amount", "3 credits into escrow")


def test_other_calls_are_described_by_their_effect() -> None:
    topped = dict(describe_call(Call(SCHEDULER, data("topUp", 7, SCHEDULER, CREDIT), "")))
    assert topped["job"] == f"7, of customer {SCHEDULER}"
    assert topped["amount"] == "1 credit into its escrow"
    assert dict(describe_call(Call(SCHEDULER, data("cancel", [3, 4]), "")))["jobs"] == "3, 4"
    assert SCHEDULER in dict(describe_call(Call(SCHEDULER, data("withdraw", SCHEDULER), "")))["to"]
    for other in (data("claim", [1]), b"\1\2\3\4"):
        with pytest.raises(UsageError):
            describe_call(Call(SCHEDULER, other, "other"))


def test_nothing_is_signed_without_confirmation(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    context = CommandContext(Printer(Format.TABLE, out=io.StringIO(), err=output))
    preview = Preview((("function", "cancel\nforged\x1b[31m"),), (("gas", "paid by the relay"),))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UsageError, match="no terminal"):
        confirmation_prompt(context, yes=False)(preview)
    assert confirmation_prompt(context, yes=True)(preview)
    refusal = output.getvalue()
    assert "function  cancel\\nforged\\x1b[31m" in refusal
    assert "gas       paid by the relay" in refusal


# -- the customer's client


async def lookup(answer: httpx2.Response | Exception) -> Any:
    def handle(_: httpx2.Request) -> httpx2.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    transport = httpx2.MockTransport(handle)
    async with RelayClient("http://user:secret@relay.test/x", transport=transport) as client:
        return await client.submit_request(signed(b"\1"), "0xaa")


async def test_answers_of_relays_are_checked() -> None:
    good = {"digest": "0xaa", "state": "sent", "transaction": "0x\x1b1", "detail": None}
    result = await lookup(httpx2.Response(202, json=good))
    assert (result.state, result.transaction) == ("sent", "0x\\x1b1")
    for wrong in (
        httpx2.Response(200, json={**good, "digest": "0xbb"}),
        httpx2.Response(200, json=[1]),
        httpx2.Response(200, text="no JSON"),
        httpx2.Response(302, headers={"location": "http://elsewhere.test"}),
        httpx2.Response(500, text="oops"),
        httpx2.Response(200, content=b" " * 100_000),
    ):
        with pytest.raises(EndpointError, match="not a working relay"):
            await lookup(wrong)


async def test_terms_with_an_infinite_number_are_refused() -> None:
    numbers = "min_amount", "max_gas", "max_lead_seconds", "requests_per_hour"
    terms = {"forwarder": "", "scheduler": "", "wallet": "", "open": True, "functions": []}
    terms |= dict.fromkeys((*numbers, "requests_per_customer_per_hour"), 1)
    for number, is_valid in (("1", True), ("1e999", False)):
        content = json.dumps(terms | {"chain_id": 0}).replace(
            '"chain_id": 0', f'"chain_id": {number}'
        )
        transport = httpx2.MockTransport(lambda _, text=content: httpx2.Response(200, text=text))
        async with RelayClient("http://relay.test", transport=transport) as client:
            if is_valid:
                assert (await client.terms()).chain_id == 1
                continue
            with pytest.raises(EndpointError, match="not a working relay"):
                await client.terms()


async def test_a_relay_that_is_down_is_named_without_its_secrets() -> None:
    for error, reason in (
        (httpx2.ConnectError("x"), "no connection"),
        (httpx2.ReadTimeout("x"), "no answer in time"),
        (httpx2.RemoteProtocolError("x"), "RemoteProtocolError"),
    ):
        with pytest.raises(EndpointError, match=reason) as refusal:
            await lookup(error)
        assert "secret" not in refusal.value.message
        assert "--relay" in refusal.value.hint


async def test_a_refusal_keeps_code_nonce_and_message() -> None:
    problem = {"detail": "no", "hint": "sign again", "code": "nonce", "next_nonce": 4}
    with pytest.raises(RelayRefusedError) as refusal:
        await lookup(httpx2.Response(409, json=problem))
    assert (refusal.value.code, refusal.value.next_nonce, refusal.value.temporary) == (
        "nonce",
        4,
        False,
    )
    assert refusal.value.hint == "sign again"
    with pytest.raises(RelayRefusedError) as refusal:
        await lookup(httpx2.Response(503, json={"detail": "later", "next_nonce": -1, "code": 7}))
    assert (refusal.value.code, refusal.value.next_nonce, refusal.value.temporary) == (
        "",
        None,
        True,
    )


def test_the_relay_is_the_settings_or_the_records(deployment: Any) -> None:
    recorded = dataclasses.replace(deployment, extra={"relay": "http://127.0.0.1:9/"})
    assert relay_url(Settings(), recorded) == "http://127.0.0.1:9"
    own_settings = Settings(relay="https://relay.test/")
    assert relay_url(own_settings, recorded) == "https://relay.test"
    for extra in ({}, {"relay": 5}, {"relay": "file:///etc/passwd"}):
        with pytest.raises(NotFoundError, match="No relay is configured"):
            relay_url(Settings(), dataclasses.replace(deployment, extra=extra))


@pytest.fixture
def deployment() -> Any:
    return Deployment(1337, *[SCHEDULER] * 5, block=0)


# -- recorded requests


@pytest.fixture
def store() -> Any:
    with Store.open(None, chain_id=1, contract=SCHEDULER, account=ACCOUNT.address) as result:
        yield result


def append(store: Store, floor: int, key: str | None = None) -> Any:
    def sign(nonce: int) -> tuple[str, SignedRequest]:
        result = signed(b"\1", nonce=nonce)
        return result.request.digest(DOMAIN).hex(), result

    return store.append_request(floor, sign, label="a call", block=5, key=key)


def test_a_nonce_is_used_once_and_is_free_again_after_a_refusal(store: Store) -> None:
    first, second, third = (append(store, 4) for _ in range(3))
    assert [value.signed.request.nonce for value in (first, second, third)] == [4, 5, 6]
    store.settle_request(second.digest, RequestState.REFUSED, note="no")
    assert append(store, 4).signed.request.nonce == 5
    store.settle_request(first.digest, RequestState.EXECUTED, tx_hash="0x1")
    assert append(store, 5).signed.request.nonce == 7
    assert [request.signed.request.nonce for request in store.open_requests()] == [5, 6, 7]


def test_a_key_identifies_one_request_with_effect(store: Store) -> None:
    first = append(store, 0, "night")
    assert store.request_by_key("night") == first
    with pytest.raises(Exception, match="UNIQUE"):
        append(store, 0, "night")
    store.settle_request(first.digest, RequestState.EXPIRED)
    assert store.request_by_key("night") is None
    second = append(store, 0, "night")
    store.settle_request(second.digest, RequestState.EXECUTED, tx_hash="0x2")
    assert store.request_by_key("night").tx_hash == "0x2"


def test_a_relay_counts_and_records_accepted_requests(store: Store) -> None:
    requests = Requests(store)
    first = requests.add("0xaa", signed(b"\1"), "cancel")
    second = requests.add("0xbb", signed(b"\2", nonce=1), "cancel")
    assert requests.get("0xAA") == first
    assert requests.queued() == [first, second]
    since = first.received - 1
    assert (requests.count_since(since), requests.count_since(since, ACCOUNT.address)) == (2, 2)
    assert requests.count_since(since, SCHEDULER) == requests.count_since(first.received + 1) == 0
    requests.assign([first.number, second.number], "relay:1")
    assert (requests.batches(), requests.queued()) == (["relay:1"], [])
    requests.settle(first.number, State.EXECUTED, tx_hash="0x1")
    requests.requeue([second.number])
    (queued,) = requests.queued()
    assert (queued.digest, queued.tries, queued.batch, requests.batches()) == ("0xbb", 1, "", [])
    requests.settle(queued.number, State.DROPPED, detail="late")
    # A dropped request may be accepted again; any other is recorded once.
    assert requests.add("0xbb", signed(b"\2", nonce=1), "cancel").state is State.QUEUED
    with pytest.raises(Exception, match="UNIQUE"):
        requests.add("0xaa", signed(b"\1"), "cancel")
