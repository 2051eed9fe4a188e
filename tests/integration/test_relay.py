"""Wallets with credits but without coin, and the relay that pays their gas, on real nodes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from eth_account.signers.local import LocalAccount

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.events import JobSubmitted, JobToppedUp, JobTransition
from deepsquare_chain.chain.rpc.log_reader import LogRange
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.chain.transactions.sender import TxReceipt
from deepsquare_chain.client.accounts import top_up
from deepsquare_chain.client.gasless import (
    GaslessWallet,
    NotConfirmedError,
    RefusedButExecutedError,
    RelayClient,
    RelayRefusedError,
    RequestReplacedError,
)
from deepsquare_chain.client.submission import Request, submit
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.devnet.node.base import Node
from deepsquare_chain.errors import EndpointError, StoreError, WaitTimeoutError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.relay.requests import RelayRules
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import FolderDefinitionStore
from deepsquare_chain.store.outbox import RecordedRequest, RequestState
from tests.support.livegrid import LiveGrid, digest, terms
from tests.support.proxy import RANGE_REFUSALS, Proxy, few_blocks
from tests.support.relay import PreviewRecorder, account_without_coin, relay_on, relayed, sign


@pytest.fixture(scope="module")
def shared_node(shared_nodes: Any) -> Node:
    """The demo and the gasless commands use the relay on the embedded chain."""
    node: Node = shared_nodes.node("anvil")
    return node


@pytest.fixture
async def relay(grid: LiveGrid, tmp_path: Path) -> AsyncIterator[str]:
    async with relay_on(grid, tmp_path) as url:
        yield url


@pytest.fixture
async def web(relay: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=relay, trust_env=False, timeout=20) as client:
        yield client


async def settled(web: httpx2.AsyncClient, path: str) -> dict[str, Any]:
    """Return the relay's response about a request once the request has ended."""
    while (document := (await web.get(path)).json())["state"] in {"queued", "sent"}:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return dict(document)


async def wait_until_accepted(store: Store, web: httpx2.AsyncClient) -> RecordedRequest:
    """Return a wallet's pending request as soon as the relay has accepted it."""
    while True:
        for request in store.open_requests():
            if (await web.get(f"/v1/requests/{request.digest}")).is_success:
                return request
        await asyncio.sleep(0.02)


async def submit_hello(
    wallet: GaslessWallet, folder: Path, count: int = 1, key: str | None = None
) -> tuple[int, ...]:
    store = FolderDefinitionStore(folder / "definitions")
    request = Request(terms(), (b"{}",) * count)
    submission = await submit(
        wallet.contracts, wallet.sender, store, [request], timeout=wallet.timeout, key=key
    )
    return submission.job_ids


async def test_wallets_without_coin_can_act_as_customers(
    grid: LiveGrid, relay: str, tmp_path: Path
) -> None:
    accounts = [await account_without_coin(grid), await account_without_coin(grid)]
    scheduler, credit = grid.contracts.scheduler, grid.contracts.credit
    shown = PreviewRecorder()

    async def life(account: LocalAccount) -> tuple[int, ...]:
        async with relayed(grid, relay, account, confirm=shown) as wallet:
            ids = await submit_hello(wallet, tmp_path, 2)
            receipt = await top_up(wallet, ids[0], CREDIT)
            topped = [e for e in receipt.events if isinstance(e, JobToppedUp)]
            assert [(e.job_id, e.payer, e.escrow) for e in topped] == [
                (ids[0], account.address, 2 * CREDIT)
            ]
            await wallet.send(scheduler.cancel(ids))
            with pytest.raises(reverts.NothingParked):
                await wallet.send(scheduler.withdraw(account.address))
            return ids

    ids = await asyncio.gather(*(life(account) for account in accounts))
    for account, own_ids in zip(accounts, ids, strict=True):
        jobs = await scheduler.get_jobs(own_ids)
        assert {job.customer for job in jobs} == {account.address}
        assert {job.status for job in jobs} == {JobStatus.CANCELLED}
        assert await credit.balance_of(account.address) == 100 * CREDIT
        assert await credit.allowance(account.address, scheduler.address) == 0
        assert await grid.w3.eth.get_balance(account.address) == 0
        assert await grid.w3.eth.get_transaction_count(account.address) == 0
    refusal = dict(shown.previews[0].rows)
    assert refusal["function"] == "submitJobs"
    assert refusal["amount"] == "2 credits into escrow"
    assert "permit for 2 credits" in refusal["allowance"]
    assert grid.stranger.address in refusal["gas"]
    assert "UTC" in refusal["valid until"]


async def test_several_at_once_from_one_wallet(grid: LiveGrid, relay: str, tmp_path: Path) -> None:
    """Each nonce and permit is used once, in any order of arrival on chain."""
    account = await account_without_coin(grid)
    store = grid.store(account)
    async with relayed(grid, relay, account, store=store) as wallet:
        ids = await asyncio.gather(*(submit_hello(wallet, tmp_path) for _ in range(4)))
    assert len({job_id for (job_id,) in ids}) == 4
    assert await grid.contracts.credit.balance_of(account.address) == 96 * CREDIT
    assert store.open_requests() == []


async def test_concurrent_requests_share_a_transaction(grid: LiveGrid, tmp_path: Path) -> None:
    """Three requests that were signed before arrive in the relay's collection window."""
    accounts = [*grid.customers, await account_without_coin(grid)]
    forwarder, scheduler = grid.contracts.forwarder, grid.contracts.scheduler
    await grid.node.fund(accounts[2].address, 10**18)
    await grid.send(accounts[2], grid.contracts.credit.approve(scheduler.address, CREDIT))
    domain, block = await forwarder.domain(), await grid.w3.eth.block_number
    stores = []
    for account in accounts:
        call = scheduler.submit_jobs([(terms(), [digest(account.address)])])
        signed = await sign(grid, account, call)
        name = "0x" + signed.request.digest(domain).hex()
        store = grid.store(account)
        store.append_request(
            signed.request.nonce,
            lambda _, name=name, signed=signed: (name, signed),
            label="submit",
            block=block,
            key="one",
        )
        stores.append(store)

    async def one(url: str, account: LocalAccount, store: Store) -> TxReceipt:
        async with relayed(grid, url, account, store=store) as wallet:
            return await wallet.sender.send(store.open_requests()[0].call, key="one")

    async with relay_on(grid, tmp_path / "relay", collect_seconds=3.0) as url:
        receipts = await asyncio.gather(
            *(one(url, *item) for item in zip(accounts, stores, strict=True))
        )
    assert len({receipt.hash for receipt in receipts}) == 1
    for account, receipt in zip(accounts, receipts, strict=True):
        # Each customer gets only the events of its own request.
        for kind in (JobSubmitted, JobTransition):
            customers = [event.customer for event in receipt.events if isinstance(event, kind)]
            assert customers == [account.address]


async def test_a_key_pays_once(grid: LiveGrid, relay: str, tmp_path: Path) -> None:
    account = await account_without_coin(grid)
    async with relayed(grid, relay, account, store=grid.store(account)) as wallet:
        first = await submit_hello(wallet, tmp_path, key="night")
        assert await submit_hello(wallet, tmp_path, key="night") == first
    assert await grid.contracts.credit.balance_of(account.address) == 99 * CREDIT


async def test_nothing_is_signed_after_a_declined_confirmation(
    grid: LiveGrid, relay: str, tmp_path: Path
) -> None:
    account = await account_without_coin(grid)
    store = grid.store(account)
    async with relayed(grid, relay, account, store=store, confirm=lambda _: False) as wallet:
        with pytest.raises(NotConfirmedError):
            await submit_hello(wallet, tmp_path)
    assert store.recent_requests() == []


# -- what the relay refuses


async def refused(web: httpx2.AsyncClient, signed: Any, status: int, code: str) -> dict[str, Any]:
    answer = await web.post("/v1/requests", json=signed.to_wire())
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code), body
    assert body["detail"]
    return body


async def test_requests_with_a_wrong_nonce_are_refused_with_the_reason(
    grid: LiveGrid, web: httpx2.AsyncClient
) -> None:
    account, other = await account_without_coin(grid), await account_without_coin(grid)
    scheduler, credit = grid.contracts.scheduler, grid.contracts.credit
    await grid.node.fund(account.address, 10**18)
    await grid.send(account, credit.approve(scheduler.address, 50 * CREDIT))
    call = scheduler.submit_jobs([(terms(), [digest("x")])])
    before = await grid.w3.eth.get_transaction_count(grid.stranger.address)

    await refused(web, await sign(grid, account, call, signer=other), 403, "wrong-signer")
    wrong_chain = await sign(
        grid, account, call, domain=lambda d: dataclasses.replace(d, chain_id=1)
    )
    await refused(web, wrong_chain, 403, "wrong-signer")
    wrong_contract = await sign(grid, account, credit.transfer(other.address, 1))
    await refused(web, wrong_contract, 403, "wrong-contract")
    await refused(web, await sign(grid, account, scheduler.claim([1])), 403, "function-not-allowed")
    await refused(web, await sign(grid, account, call, data=b"\1\2\3\4"), 400, "not-a-call")
    await refused(web, await sign(grid, account, call, value=1), 403, "value")
    await refused(web, await sign(grid, account, call, gas=10**8), 403, "too-much-gas")
    await refused(web, await sign(grid, account, call, lead=-1), 400, "expired")
    await refused(web, await sign(grid, account, call, lead=5), 400, "expired")
    await refused(web, await sign(grid, account, call, lead=90_000), 400, "deadline-too-far")
    dust = scheduler.submit_jobs([(terms(), [digest("a")]), (terms(amount=1), [digest("b")])])
    await refused(web, await sign(grid, account, dust), 403, "amount-too-small")
    body = await refused(web, await sign(grid, account, call, nonce=3), 409, "nonce")
    assert body["next_nonce"] == 0
    unaffordable = await refused(web, await sign(grid, other, call), 422, "reverted")
    assert "credits" in unaffordable["detail"]
    starved = await refused(web, await sign(grid, account, call, gas=50_000), 422, "reverted")
    assert "gas" in starved["detail"]
    # Nothing of all that cost the relay anything.
    assert await grid.w3.eth.get_transaction_count(grid.stranger.address) == before


async def test_invalid_requests_are_refused_with_the_reason(web: httpx2.AsyncClient) -> None:
    async def status(**fields: Any) -> int:
        answer = await web.post("/v1/requests", **fields)
        assert answer.headers["content-type"] == "application/problem+json"
        return answer.status_code

    assert await status(content=b"{}", headers={"content-type": "text/plain"}) == 400
    assert await status(content=b"{", headers={"content-type": "application/json"}) == 400
    assert await status(json={"from": "0x"}) == 400
    assert await status(json=[]) == 400
    assert await status(json={"data": "0x" + "00" * 200_000}) == 413
    assert (await web.get("/v1/requests/0x00")).status_code == 404
    assert (await web.get("/nothing")).json()["status"] == 404
    assert (await web.get("/ready")).json() == {"ok": True}


async def test_a_repeated_request_is_answered_and_a_replayed_one_refused(
    grid: LiveGrid, web: httpx2.AsyncClient
) -> None:
    account = grid.customers[0]
    forwarder = grid.contracts.forwarder
    # A second time the contract would refuse this call.
    call = grid.contracts.scheduler.cancel(await grid.submit())
    signed = await sign(grid, account, call)
    answers = await asyncio.gather(
        *(web.post("/v1/requests", json=signed.to_wire()) for _ in range(3))
    )
    assert {answer.status_code for answer in answers} <= {200, 202}
    assert len({answer.json()["digest"] for answer in answers}) == 1
    path = answers[0].headers["location"]
    result = await settled(web, path)
    assert result["state"] == "executed"
    repeated = await web.post("/v1/requests", json=signed.to_wire())
    assert (repeated.status_code, repeated.json()) == (200, result)
    assert await forwarder.nonce_of(account.address) == signed.request.nonce + 1
    # Whatever is signed for the used nonce comes too late.
    other = grid.contracts.scheduler.submit_jobs([(terms(), [digest("once more")])])
    replay = await sign(grid, account, other, nonce=signed.request.nonce)
    await refused(web, replay, 409, "nonce")


async def test_limits_per_customer_and_per_hour(grid: LiveGrid, tmp_path: Path) -> None:
    call = grid.contracts.scheduler.submit_jobs([(terms(), [digest("limit")])])
    first, second = grid.customers
    async with (
        relay_on(grid, tmp_path, rules=RelayRules(per_customer=1, per_hour=2)) as url,
        httpx2.AsyncClient(base_url=url, trust_env=False) as web,
    ):
        for account in (first, second):
            signed = await sign(grid, account, call)
            assert (await web.post("/v1/requests", json=signed.to_wire())).is_success
            later = await sign(grid, account, call, nonce=signed.request.nonce + 1)
            body = await refused(web, later, 429, "too-many-requests")
            assert "of this wallet" in body["detail"]
        third = await sign(grid, grid.providers[0], call)
        body = await refused(web, third, 429, "too-many-requests")
        assert "all customers" in body["detail"]


async def test_a_relay_without_coin_reports_it_and_continues_when_funded(
    grid: LiveGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepsquare_chain.relay.service._POLL_SECONDS", 0.0)
    wallet = await account_without_coin(grid)
    await grid.node.fund(wallet.address, 10**12)
    call = grid.contracts.scheduler.submit_jobs([(terms(), [digest("poor relay")])])
    signed = await sign(grid, grid.customers[0], call)
    async with (
        relay_on(grid, tmp_path, account=wallet) as url,
        httpx2.AsyncClient(base_url=url, trust_env=False) as web,
    ):
        await refused(web, signed, 503, "relay-out-of-coin")
        async with RelayClient(url) as client:
            assert not (await client.terms()).is_open
        async with relayed(grid, url, grid.customers[0]) as customer:
            with pytest.raises(RelayRefusedError, match="too little coin"):
                await customer.send(call)
        await grid.node.fund(wallet.address, 10**18)
        async with RelayClient(url) as client:
            while not (await client.terms()).is_open:  # noqa: ASYNC110 - over the network
                await asyncio.sleep(0.05)
        assert (await web.post("/v1/requests", json=signed.to_wire())).is_success


# -- batches


async def test_a_bad_request_in_a_batch_does_not_affect_the_others(
    grid: LiveGrid, tmp_path: Path
) -> None:
    """One customer has no credits left when its request is executed; the other is served."""
    good, bad = await account_without_coin(grid), await account_without_coin(grid)
    credit = grid.contracts.credit
    await grid.node.fund(bad.address, 10**18)
    bad_store = grid.store(bad)
    async with (
        relay_on(grid, tmp_path / "relay", collect_seconds=1.5) as url,
        relayed(grid, url, good) as first,
        relayed(grid, url, bad, store=bad_store) as second,
        httpx2.AsyncClient(base_url=url, trust_env=False) as web,
    ):
        failing = asyncio.create_task(submit_hello(second, tmp_path))
        serving = asyncio.create_task(submit_hello(first, tmp_path))
        await wait_until_accepted(bad_store, web)
        await grid.send(bad, credit.transfer(good.address, 100 * CREDIT))
        with pytest.raises(reverts.ERC20InsufficientBalance):
            await failing
        assert len(await serving) == 1
    (failed,) = bad_store.recent_requests()
    assert failed.state is RequestState.FAILED
    assert await credit.balance_of(good.address) == 199 * CREDIT


async def test_another_relay_may_be_first(grid: LiveGrid, tmp_path: Path) -> None:
    """A request that another relayer executed counts as done; the batch skips it."""
    account = grid.customers[1]
    store = grid.store(account)
    call = grid.contracts.scheduler.submit_jobs([(terms(), [digest("front")])])
    async with (
        relay_on(grid, tmp_path, collect_seconds=1.5) as url,
        relayed(grid, url, account, store=store) as wallet,
        httpx2.AsyncClient(base_url=url, trust_env=False) as web,
    ):
        send_task = asyncio.create_task(wallet.send(call))
        recorded = await wait_until_accepted(store, web)
        first = await grid.send(grid.admin, grid.contracts.forwarder.execute(recorded.signed))
        receipt = await send_task
        assert receipt.hash == first.hash
        assert len([e for e in receipt.events if isinstance(e, JobSubmitted)]) == 1
        result = await settled(web, f"/v1/requests/{recorded.digest}")
        assert result["state"] == "dropped"
        assert "nonce" in result["detail"]


# -- relays that fail their customers


class Between(httpx2.AsyncBaseTransport):
    """A proxy between client and relay; `respond` may answer a request instead of the relay."""

    def __init__(self, respond: Any) -> None:
        self._real = httpx2.AsyncHTTPTransport()
        self._respond = respond

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._respond(request, self._real)
        return response or await self._real.handle_async_request(request)

    async def aclose(self) -> None:
        await self._real.aclose()


async def test_a_lost_response_is_requested_again(
    grid: LiveGrid, relay: str, tmp_path: Path
) -> None:
    account = await account_without_coin(grid)
    posts = []

    async def drop_response(request: httpx2.Request, real: httpx2.AsyncHTTPTransport) -> None:
        if request.method == "POST":
            posts.append(request.content)
            if len(posts) == 1:
                await (await real.handle_async_request(request)).aread()
                raise httpx2.ReadError("the answer is lost")

    async with relayed(grid, relay, account, transport=Between(drop_response)) as wallet:
        await submit_hello(wallet, tmp_path)
    assert len(set(posts)) == 1
    assert await grid.contracts.credit.balance_of(account.address) == 99 * CREDIT


async def test_a_relay_that_dies_is_left_and_the_same_request_goes_to_another(
    grid: LiveGrid, relay: str, tmp_path: Path
) -> None:
    account = await account_without_coin(grid)
    store = grid.store(account)

    async def down(request: httpx2.Request, _: Any) -> None:
        if request.method == "POST":
            raise httpx2.ConnectError("gone")

    transport = Between(down)
    async with relayed(
        grid, relay, account, store=store, transport=transport, timeout=0.5
    ) as wallet:
        with pytest.raises(WaitTimeoutError, match="no connection") as refusal:
            await submit_hello(wallet, tmp_path, key="the one")
        assert "may still be executed until" in refusal.value.hint
    (recorded,) = store.open_requests()
    async with relayed(grid, relay, account, store=store) as wallet:
        first = await submit_hello(wallet, tmp_path, key="the one")
        assert await submit_hello(wallet, tmp_path, key="the one") == first
    assert [recent_request.digest for recent_request in store.recent_requests()] == [
        recorded.digest
    ]
    assert await grid.contracts.credit.balance_of(account.address) == 99 * CREDIT


async def test_open_requests_are_sent_again_before_the_next(grid: LiveGrid, relay: str) -> None:
    """A process that died after signing left a nonce, which must be used before later ones."""
    account = grid.customers[0]
    store = grid.store(account)
    scheduler, forwarder = grid.contracts.scheduler, grid.contracts.forwarder
    domain = await forwarder.domain()
    open_request = await sign(grid, account, scheduler.submit_jobs([(terms(), [digest("left")])]))
    name = "0x" + open_request.request.digest(domain).hex()
    block = await grid.w3.eth.block_number
    store.append_request(
        open_request.request.nonce,
        lambda _: (name, open_request),
        label="submit 1 job",
        block=block,
        key=None,
    )
    async with relayed(grid, relay, account, store=store) as wallet:
        await wallet.send(scheduler.submit_jobs([(terms(), [digest("next")])]))
        await wallet.sender.reconcile()
    assert {recent_request.state for recent_request in store.recent_requests()} == {
        RequestState.EXECUTED
    }
    assert await forwarder.nonce_of(account.address) == open_request.request.nonce + 2


async def test_a_false_response_of_a_relay_is_detected(grid: LiveGrid, relay: str) -> None:
    account = grid.customers[0]
    call = grid.contracts.scheduler.submit_jobs([(terms(), [digest("lie")])])
    store = grid.store(account)

    async def claim_execution(request: httpx2.Request, _: Any) -> httpx2.Response | None:
        if request.url.path == "/v1/relay":
            return None
        name = store.open_requests()[0].digest
        body = {"digest": name, "state": "executed", "transaction": "0x" + "11" * 32}
        return httpx2.Response(200, json=body)

    async with relayed(
        grid, relay, account, store=store, transport=Between(claim_execution)
    ) as wallet:
        with pytest.raises(WaitTimeoutError, match="this endpoint does not have it"):
            await wallet.sender.send(call, key="lie", timeout=2.5)

    # Another request takes the nonce before the first is carried out: only one has an effect.
    (recorded,) = store.open_requests()
    other_request = await sign(grid, account, call, lead=1_000)
    await grid.send(grid.admin, grid.contracts.forwarder.execute(other_request))
    other = grid.contracts.scheduler.submit_jobs([(terms(), [digest("other")])])
    async with relayed(grid, relay, account, store=store) as wallet:
        with pytest.raises(RequestReplacedError, match="another request"):
            await wallet.sender.send(call, key="lie")
        assert store.recent_requests()[0].state is RequestState.REPLACED
        assert store.recent_requests()[0].tx_hash
        await wallet.send(other)
    assert (
        recorded.digest
        != "0x" + other_request.request.digest(await grid.contracts.forwarder.domain()).hex()
    )


async def test_a_refused_request_gives_its_nonce_back(grid: LiveGrid, relay: str) -> None:
    account = grid.customers[0]
    store = grid.store(account)
    call = grid.contracts.scheduler.submit_jobs([(terms(), [digest("again")])])

    async def reject(request: httpx2.Request, _: Any) -> httpx2.Response | None:
        if request.method != "POST":
            return None
        problem = {"detail": "no \x1b[31mtoday", "code": "whim", "status": 403}
        return httpx2.Response(403, json=problem)

    async with relayed(grid, relay, account, store=store, transport=Between(reject)) as wallet:
        with pytest.raises(RelayRefusedError, match=r"no .*today") as refusal:
            await wallet.send(call)
        assert "\x1b" not in refusal.value.message
        assert "--relay" in refusal.value.hint
    async with relayed(grid, relay, account, store=store) as wallet:
        await wallet.send(call)
    # Signed within the same second it is the same request, recorded once.
    last, *earlier = store.recent_requests()
    states = {value.state for value in (last, *earlier)}
    assert RequestState.EXECUTED in states <= {RequestState.EXECUTED, RequestState.REFUSED}
    assert len({value.signed.request.nonce for value in (last, *earlier)}) == 1


async def test_an_expired_request_is_reported_to_have_no_effect(grid: LiveGrid, relay: str) -> None:
    account = grid.customers[1]
    store = grid.store(account)
    call = grid.contracts.scheduler.submit_jobs([(terms(), [digest("late")])])
    old = await sign(grid, account, call, lead=-1)
    domain = await grid.contracts.forwarder.domain()
    name = "0x" + old.request.digest(domain).hex()
    store.append_request(
        old.request.nonce, lambda _: (name, old), label="late", block=0, key="submit:late"
    )
    async with relayed(grid, relay, account, store=store) as wallet:
        with pytest.raises(RelayRefusedError, match="deadline passed"):
            await wallet.sender.send(call, key="submit:late")
    assert store.recent_requests()[0].state is RequestState.EXPIRED


def problem(status: int, message: str) -> httpx2.Response:
    return httpx2.Response(status, json={"status": status, "code": "elsewhere", "detail": message})


@pytest.mark.parametrize("status", [404, 429, 500])
async def test_a_refused_lookup_does_not_settle_the_request(
    grid: LiveGrid, relay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The relay accepted the request; gateways then limit or fail status requests."""
    monkeypatch.setattr("deepsquare_chain.client.gasless._POLL_SECONDS", 0.0)
    account, requests = await account_without_coin(grid), []

    async def refuse(request: httpx2.Request, real: httpx2.AsyncHTTPTransport) -> Any:
        if request.method == "GET" and request.url.path != "/v1/relay":
            requests.append(request)
            return problem(status, "not now")
        return None

    store = grid.store(account)
    async with (
        relay_on(grid, tmp_path / "slow", account=grid.admin, collect_seconds=1.0) as slow,
        relayed(grid, slow, account, store=store, transport=Between(refuse)) as wallet,
    ):
        assert len(await submit_hello(wallet, tmp_path)) == 1
    assert requests
    assert [recent_request.state for recent_request in store.recent_requests()] == [
        RequestState.EXECUTED
    ]


async def test_a_busy_answer_after_a_lost_one_is_no_refusal(
    grid: LiveGrid, relay: str, tmp_path: Path
) -> None:
    """The relay has the request; a gateway answers the repeated submission in its place."""
    account, posts = await account_without_coin(grid), []

    async def drop_response(request: httpx2.Request, real: httpx2.AsyncHTTPTransport) -> Any:
        if request.method != "POST":
            return None
        posts.append(request)
        if len(posts) == 1:
            raise httpx2.ReadError("the answer is lost")
        return problem(429, "too many requests") if len(posts) < 4 else None

    async with relayed(grid, relay, account, transport=Between(drop_response)) as wallet:
        assert len(await submit_hello(wallet, tmp_path)) == 1
    assert len(posts) >= 4


@pytest.mark.parametrize("key", ["mine", None])
async def test_a_request_refused_but_executed_is_not_paid_again(
    grid: LiveGrid, relay: str, tmp_path: Path, key: str | None
) -> None:
    account = await account_without_coin(grid)
    store = grid.store(account)

    async def reject(request: httpx2.Request, _: Any) -> httpx2.Response | None:
        return problem(403, "no") if request.method == "POST" else None

    async with relayed(grid, relay, account, store=store, transport=Between(reject)) as wallet:
        with pytest.raises(RelayRefusedError):
            await submit_hello(wallet, tmp_path, key=key)
    (entry,) = store.recent_requests()
    assert entry.state is RequestState.REFUSED
    await grid.send(grid.admin, grid.contracts.forwarder.execute(entry.signed))
    async with relayed(grid, relay, account, store=store) as wallet:
        if key is None:
            with pytest.raises(RefusedButExecutedError, match="'submit 1 job' but executed it"):
                await submit_hello(wallet, tmp_path)
        else:
            assert len(await submit_hello(wallet, tmp_path, key=key)) == 1
        assert await grid.contracts.credit.balance_of(account.address) == 99 * CREDIT
        assert [recent_request.state for recent_request in store.recent_requests()] == [
            RequestState.EXECUTED
        ]
        assert len(await submit_hello(wallet, tmp_path, key="another")) == 1


async def test_a_request_is_found_where_ranges_of_logs_are_refused(
    grid: LiveGrid, relay: str
) -> None:
    account = grid.customers[0]
    store = grid.store(account)
    async with (
        Proxy(grid.node.url) as proxy,
        connected(proxy.url) as w3,
        relayed(
            grid, relay, account, store=store, contracts=Contracts(w3, grid.deployment)
        ) as wallet,
    ):
        proxy.profile = few_blocks(2, *RANGE_REFUSALS["besu"])
        call = grid.contracts.scheduler.submit_jobs([(terms(), [digest("ranges")])])
        signed = await sign(grid, account, call)
        name = "0x" + signed.request.digest(await grid.contracts.forwarder.domain()).hex()
        store.append_request(
            signed.request.nonce, lambda _: (name, signed), label="old", block=0, key=None
        )
        await grid.send(grid.admin, grid.contracts.forwarder.execute(signed))
        await wallet.sender.reconcile()
        assert proxy.counts["refused"] > 0
    assert [recent_request.state for recent_request in store.recent_requests()] == [
        RequestState.EXECUTED
    ]


async def test_a_full_disk_hides_no_payment(
    grid: LiveGrid, relay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request was executed and the full disk can't record it: the customer gets its job."""
    account = await account_without_coin(grid)
    store = grid.store(account)

    def refuse(*_: Any, **__: Any) -> None:
        raise StoreError("The database failed: database or disk is full")

    async with relayed(grid, relay, account, store=store) as wallet:
        with monkeypatch.context() as patch:
            patch.setattr(store, "settle_request", refuse)
            ids = await submit_hello(wallet, tmp_path, key="full")
        assert len(ids) == 1
        assert [recent_request.state for recent_request in store.recent_requests()] == [
            RequestState.OPEN
        ]
        assert await submit_hello(wallet, tmp_path, key="full") == ids
    assert [recent_request.state for recent_request in store.recent_requests()] == [
        RequestState.EXECUTED
    ]


async def test_a_used_nonce_without_its_event_is_no_expiry(
    grid: LiveGrid, relay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline has passed and the endpoint shows no log: the request may have been executed."""
    account = grid.customers[0]
    store = grid.store(account)
    call = grid.contracts.scheduler.submit_jobs([(terms(), [digest("unseen")])])
    signed = await sign(grid, account, call, lead=30)
    name = "0x" + signed.request.digest(await grid.contracts.forwarder.domain()).hex()
    recorded = store.append_request(
        signed.request.nonce, lambda _: (name, signed), label="unseen", block=0, key="unseen"
    )
    await grid.send(grid.admin, grid.contracts.forwarder.execute(signed))

    async def empty_range(_: Any, __: Any, ___: Any, first: int, last: int) -> LogRange:
        return LogRange(first, last, [], {}, {})

    monkeypatch.setattr("deepsquare_chain.client.gasless.read_range", empty_range)
    head = {"timestamp": signed.request.deadline + 1, "number": await grid.w3.eth.block_number}

    async def latest(_: str) -> Any:
        return head

    async with relayed(grid, relay, account, store=store) as wallet:
        monkeypatch.setattr(grid.w3.eth, "get_block", latest)
        with pytest.raises(WaitTimeoutError, match="does not show by which transaction"):
            await wallet.sender.send(recorded.call, key="unseen", timeout=0.3)
    assert store.recent_requests()[0].state is RequestState.OPEN


async def test_a_url_that_is_not_a_relay_is_reported(grid: LiveGrid) -> None:
    async def page(_: httpx2.Request, __: Any) -> httpx2.Response:
        return httpx2.Response(200, text="<html>" + "x" * 100_000)

    async def other_grid(_: httpx2.Request, __: Any) -> httpx2.Response:
        terms_of = {
            "chain_id": 1,
            "forwarder": "0x" + "11" * 20,
            "scheduler": "0x" + "11" * 20,
            "wallet": "0x" + "11" * 20,
            "open": True,
            "functions": [],
            "min_amount": "0",
            "max_gas": 1,
            "max_lead_seconds": 600,
            "requests_per_hour": 1,
            "requests_per_customer_per_hour": 1,
        }
        return httpx2.Response(200, json=terms_of)

    call = grid.contracts.scheduler.cancel([1])
    for respond, message in ((page, "is not a working relay"), (other_grid, "serves another grid")):
        async with relayed(
            grid, "http://127.0.0.1:1", grid.customers[0], transport=Between(respond)
        ) as wallet:
            with pytest.raises(EndpointError, match=message):
                await wallet.send(call)
    async with relayed(grid, "http://127.0.0.1:1", grid.customers[0]) as wallet:
        with pytest.raises(EndpointError, match="can't be reached: no connection"):
            await wallet.send(call)
