"""The gateway's rules over HTTP, without a network: access, sizes and times."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import httpx2
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from hypothesis import given, settings
from hypothesis import strategies as st

from deepsquare_chain.chain.sign_in import SignInMessage, rfc3339
from deepsquare_chain.errors import EndpointError, NotFoundError, StoreError, UsageError
from deepsquare_chain.gateway.access import Access, GatewayRules, Permission, Session
from deepsquare_chain.gateway.app import gateway_app
from deepsquare_chain.gateway.notifications import Recipients, Registration, read_registration
from deepsquare_chain.gateway.service import GatewayService
from deepsquare_chain.gateway.storage import GatewayRecords, Objects, open_object_store
from deepsquare_chain.job import Job, JobStatus, Resources
from deepsquare_chain.notification import Notify, Occasion
from deepsquare_chain.observability.metrics import Health, Metrics
from deepsquare_chain.observability.serving import RequestRefusedError
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import DefinitionMismatch
from deepsquare_chain.store.gateway_client import (
    GatewayClient,
    GatewayDefinitionStore,
    GatewayRefusedError,
    LogPart,
    NotDeliveredError,
    WrongAccountError,
    contract_resource,
    is_file_name,
)
from deepsquare_chain.workflow import Definition, Step
from tests.support.workloads import job

URL = "http://gateway.test"
CONTRACT = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
CHAIN = 1337
ALICE, BOB, HOST, FORMER, STRANGER = (Account.from_key(bytes([n]) * 32) for n in range(1, 6))
DATA = Definition(Resources(1, 1, 64, 0), {}, (Step.simple("only", "echo hello"),)).to_bytes()
JOB = job(
    7,
    customer=ALICE.address,
    status=JobStatus.RUNNING,
    since=1_000,
    provider_id=1,
    mem_per_cpu=64,
    rate=1,
    definition=hashlib.sha256(DATA).digest(),
)


class GatewayBench:
    """A gateway on a fake chain."""

    def __init__(self, folder: Path, **rules: Any) -> None:
        self.now = 1_100.0
        self.jobs = {7: JOB, 8: replace(JOB, id=8, customer=BOB.address)}
        self.accounts = {1: HOST.address, 2: FORMER.address}
        self.credits = {ALICE.address: 1}
        self.down = False
        store = Store.open(None, chain_id=CHAIN, contract=CONTRACT, account=ALICE.address)
        self.folder = folder
        contracts: Any = SimpleNamespace(
            w3=SimpleNamespace(eth=SimpleNamespace(get_code=self._nothing)),
            deployment=SimpleNamespace(chain_id=CHAIN, scheduler=CONTRACT),
            scheduler=SimpleNamespace(address=CONTRACT, get_job=self._job),
            registry=SimpleNamespace(account_of=self._account),
            credit=SimpleNamespace(balance_of=self._balance),
        )
        records = GatewayRecords(store)
        limits = GatewayRules(rate=0, sign_in_rate=0, **rules)
        self.access = Access(contracts, records, limits, clock=lambda: self.now)
        self.access.serve_under([URL], ["https://explorer.test"])
        self.objects = Objects(open_object_store(folder), records)
        self.service = GatewayService(
            contracts, self.access, records, self.objects, rules=limits, metrics=Metrics("gateway")
        )
        app = gateway_app(self.service, lambda: Health(live=True, ready=True, details={}))
        self.transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        self.clients: list[GatewayClient] = []

    async def _nothing(self, _address: str) -> bytes:
        return b""

    async def _job(self, job_id: int) -> Job:
        if self.down:
            raise EndpointError("down")
        if job_id not in self.jobs:
            raise NotFoundError("none")
        return self.jobs[job_id]

    async def _account(self, provider_id: int) -> str | None:
        return self.accounts.get(provider_id)

    async def _balance(self, account: str) -> int:
        return self.credits.get(account, 0)

    def client(self, account: LocalAccount | None, **options: Any) -> GatewayClient:
        """The gateway as an account reaches it."""
        fields = {"chain_id": CHAIN, "contract": CONTRACT, **options}
        gateway_client = GatewayClient(URL, account, transport=self.transport, **fields)
        self.clients.append(gateway_client)
        return gateway_client

    def change(self, job_id: int, **changes: Any) -> None:
        """Change the chain, and let the gateway read it again."""
        self.jobs[job_id] = replace(self.jobs[job_id], **changes)
        self.access._jobs.clear()


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., GatewayBench]]:
    benches: list[GatewayBench] = []

    def one(**rules: Any) -> GatewayBench:
        benches.append(GatewayBench(tmp_path / str(len(benches)), **rules))
        return benches[-1]

    yield one
    for bench in benches:
        for client in bench.clients:
            await client.close()


@pytest.fixture
async def bench(make: Callable[..., GatewayBench]) -> GatewayBench:
    result = make()
    await result.client(ALICE).put_definition(DATA)
    return result


def files_in(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


# -- permissions


async def test_the_customer_and_the_assigned_provider_read_the_definition(
    bench: GatewayBench,
) -> None:
    for account in (ALICE, HOST):
        assert await bench.client(account).definition(7, JOB.definition) == DATA
    for account in (BOB, FORMER, STRANGER):
        with pytest.raises(WrongAccountError, match="may not read the definition of job 7"):
            await bench.client(account).definition(7, JOB.definition)
    # The same definition is refused for another account's job, and without a job.
    with pytest.raises(WrongAccountError):
        await bench.client(ALICE).definition(8, JOB.definition)
    with pytest.raises(WrongAccountError):
        await bench.client(ALICE).definition(9, JOB.definition)


async def test_an_ended_job_accepts_late_output_for_a_while(
    make: Callable[..., GatewayBench],
) -> None:
    bench = make(catch_up_seconds=500)
    await bench.client(ALICE).put_definition(DATA)
    bench.change(7, status=JobStatus.FINISHED, since=1_050)
    host = bench.client(HOST)
    assert (await host.append(7, "log", 0, b"late\n", complete=True)).complete
    with pytest.raises(WrongAccountError):
        await host.definition(7, JOB.definition)
    bench.now = 1_551
    host = bench.client(HOST)
    with pytest.raises(WrongAccountError):
        await host.append(7, "work/x", 0, b"later")


async def test_a_new_assignment_is_seen_at_once(bench: GatewayBench) -> None:
    former = bench.client(FORMER)
    with pytest.raises(WrongAccountError):
        await former.definition(7, JOB.definition)
    bench.access._jobs[7] = (bench.access._jobs[7][0] - 0.5, bench.access._jobs[7][1])
    bench.jobs[7] = replace(JOB, provider_id=2)
    assert await former.definition(7, JOB.definition) == DATA


async def test_a_customer_shares_a_job_until_a_date(bench: GatewayBench) -> None:
    await bench.client(HOST).append(7, "log", 0, b"hello\n", complete=True)
    bob, alice = bench.client(BOB), bench.client(ALICE)
    with pytest.raises(WrongAccountError):
        await bob.size(7, "log")
    with pytest.raises(WrongAccountError):
        await bob.share(7, BOB.address, 2_000)
    await alice.share(7, BOB.address, 2_000)
    assert await bob.size(7, "log") is not None
    with pytest.raises(WrongAccountError):
        await bob.definition(7, JOB.definition)
    with pytest.raises(WrongAccountError):
        await bob.append(7, "log", 6, b"forged")
    bench.now = 2_001.0
    with pytest.raises(WrongAccountError):
        await bench.client(BOB).size(7, "log")


async def test_a_share_is_for_one_job_reader_and_time(bench: GatewayBench) -> None:
    bench.change(8, customer=ALICE.address)
    alice = bench.client(ALICE)
    nonces: list[dict[str, Any]] = []

    async def record(method: str, path: str, **request: Any) -> Any:
        nonces.append(request["json"])
        raise EndpointError("kept")

    ask, alice._request = alice._request, record  # type: ignore[method-assign]
    with pytest.raises(EndpointError):
        await alice.share(7, BOB.address, 2_000)
    [body] = nonces
    for job_id, changed in (
        (8, body),
        (7, body | {"reader": STRANGER.address}),
        (7, body | {"until": 2_001}),
    ):
        with pytest.raises(WrongAccountError, match="did not sign this share"):
            await ask("PUT", f"/v1/jobs/{job_id}/shares", json=changed)
    await ask("PUT", "/v1/jobs/7/shares", json=body)


async def test_definitions_are_accepted_from_accounts_with_credits(bench: GatewayBench) -> None:
    with pytest.raises(WrongAccountError, match="has no credits"):
        await bench.client(STRANGER).put_definition(DATA)
    bench.credits.clear()
    await bench.client(ALICE).put_definition(DATA)  # it keeps one already


# -- sign-in


def message(bench: GatewayBench, account: LocalAccount = ALICE, **changes: Any) -> SignInMessage:
    """Return a valid message; `changes` replace fields."""
    fields: dict[str, Any] = {
        "domain": "gateway.test",
        "address": account.address,
        "uri": f"{URL}/v1/sign-in",
        "chain_id": CHAIN,
        "nonce": bench.access.challenge()["nonce"],
        "issued_at": rfc3339(bench.now),
        "expiration_time": rfc3339(bench.now + 600),
        "resources": (contract_resource(CHAIN, CONTRACT), f"{URL}/v1/jobs"),
    }
    return SignInMessage(**(fields | changes))


async def sign_in(bench: GatewayBench, benches: SignInMessage, signer: LocalAccount = ALICE) -> Any:
    """Return the response to a sign-in."""
    async with httpx2.AsyncClient(transport=bench.transport, base_url=URL) as web:
        body = {"message": benches.text(), "signature": "0x" + benches.sign(signer).hex()}
        answer = await web.post("/v1/sign-in", json=body)
        return answer.status_code, answer.json()


async def test_a_good_message_gives_a_token(bench: GatewayBench) -> None:
    status, body = await sign_in(bench, message(bench))
    assert (status, body["account"], body["expires"]) == (200, ALICE.address, 1_700)
    status, _ = await sign_in(bench, message(bench, domain="explorer.test"))
    assert status == 200


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"domain": "evil.test"}, "wrong-domain"),
        ({"domain": "gateway.test.evil"}, "wrong-domain"),
        ({"domain": "127.0.0.1:80"}, "wrong-domain"),
        ({"uri": "http://other.test/v1/sign-in"}, "wrong-uri"),
        ({"uri": f"{URL}.evil/v1"}, "wrong-uri"),
        ({"resources": ()}, "wrong-contract"),
        ({"resources": (contract_resource(CHAIN, BOB.address),)}, "wrong-contract"),
        ({"resources": (contract_resource(1, CONTRACT),)}, "wrong-contract"),
        ({"expiration_time": ""}, "no-expiry"),
        ({"expiration_time": rfc3339(1_099)}, "wrong-time"),
        ({"issued_at": rfc3339(1_200)}, "wrong-time"),
        ({"issued_at": rfc3339(100)}, "wrong-time"),
        ({"not_before": rfc3339(1_500)}, "wrong-time"),
        ({"nonce": "0" * 56}, "unknown-nonce"),
        ({"nonce": "abcdefgh"}, "unknown-nonce"),
        ({"address": BOB.address}, "wrong-signature"),
    ],
)
async def test_every_wrong_message_is_refused(
    bench: GatewayBench, changes: dict[str, Any], code: str
) -> None:
    status, body = await sign_in(bench, message(bench, **changes))
    assert (status, body["code"]) == (401, code)


async def test_a_nonce_of_an_earlier_process_is_unknown(
    bench: GatewayBench, make: Callable[..., GatewayBench]
) -> None:
    status, body = await sign_in(make(), message(bench))
    assert (status, body["code"]) == (401, "unknown-nonce")


async def test_a_token_expires_and_the_client_signs_in_again(bench: GatewayBench) -> None:
    client = bench.client(ALICE)
    assert await client.definition(7, JOB.definition) == DATA
    old = client._token
    bench.now += 1_000
    assert await client.definition(7, JOB.definition) == DATA
    assert client._token != old
    for token in ("", "nonsense", old):
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx2.AsyncClient(transport=bench.transport, base_url=URL) as web:
            answer = await web.get("/v1/jobs/7/definition", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "signed-out")
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("field", ["nonce", "issued_at", "expiration_time"])
async def test_a_gateway_does_not_choose_the_signed_text(bench: GatewayBench, field: str) -> None:
    """A gateway whose nonce or times contain other text gets no signature."""
    signed: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("nonce"):
            body = bench.access.challenge()
            body[field] += "\nResources:\n- https://elsewhere.test"
            return httpx2.Response(200, json=body)
        signed.append(request.url.path)
        return httpx2.Response(500)

    client = GatewayClient(
        URL, ALICE, chain_id=CHAIN, contract=CONTRACT, transport=httpx2.MockTransport(answer)
    )
    with pytest.raises(EndpointError, match="not a working gateway"):
        await client.definition(7, JOB.definition)
    assert signed == []
    await client.close()


# -- definitions


async def test_bytes_with_another_digest_are_not_stored(bench: GatewayBench) -> None:
    client = bench.client(ALICE)
    for data in (DATA + b" ", b"{}", b""):
        with pytest.raises(GatewayRefusedError):
            await client._request("PUT", f"/v1/definitions/{JOB.definition.hex()}", content=data)
    with pytest.raises(GatewayRefusedError, match="not a definition"):
        await client.put_definition(b"{}")
    with pytest.raises(GatewayRefusedError, match="longer than"):
        await client._request("PUT", f"/v1/definitions/{'0' * 64}", content=b" " * 1_000_001)


async def test_a_lost_or_altered_definition_is_distinguished_from_a_gateway_that_is_down(
    bench: GatewayBench, make: Callable[..., GatewayBench]
) -> None:
    [path] = [path for path in bench.folder.rglob("*") if path.name == JOB.definition.hex()]
    host = bench.client(HOST)
    store = GatewayDefinitionStore([host])
    path.write_bytes(DATA.replace(b"hello", b"evil!"))
    with pytest.raises(NotFoundError, match="altered"):
        await store.get(JOB.definition, 7)
    path.unlink()
    with pytest.raises(NotFoundError):
        await store.get(JOB.definition, 7)
    # With several gateways, one that is down may have it, and one that has it is enough.
    other = make()
    await other.client(ALICE).put_definition(DATA)
    two_gateways = GatewayDefinitionStore([host, other.client(HOST)])
    assert await two_gateways.get(JOB.definition, 7) == DATA
    other.down = True
    other.access._jobs.clear()
    with pytest.raises(EndpointError):
        await two_gateways.get(JOB.definition, 7)
    gateway_store = GatewayDefinitionStore([bench.client(ALICE), other.client(ALICE)])
    assert await gateway_store.put(DATA) == JOB.definition  # one that is down does not prevent it


async def test_a_gateway_with_altered_data_is_detected() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.startswith("/v1/sign-in"):
            times = {"issued_at": rfc3339(1), "expiration_time": rfc3339(2)}
            return httpx2.Response(200, json={"nonce": "a" * 20, "token": "t", **times})
        return httpx2.Response(200, content=b"something else")

    client = GatewayClient(
        URL, HOST, chain_id=CHAIN, contract=CONTRACT, transport=httpx2.MockTransport(answer)
    )
    with pytest.raises(DefinitionMismatch):
        await client.definition(7, JOB.definition)
    await client.close()


# -- files


async def test_an_upload_continues_where_it_was_cut_off(bench: GatewayBench) -> None:
    host = bench.client(HOST)
    assert (await host.size(7, "work/a")).size == 0  # type: ignore[union-attr]
    assert (await host.append(7, "work/a", 0, b"0123")).size == 4
    assert (await host.append(7, "work/a", 0, b"0123")).size == 4  # sent twice, kept once
    assert (await host.append(7, "work/a", 2, b"2345")).size == 6
    with pytest.raises(GatewayRefusedError) as refusal:
        await host.append(7, "work/a", 7, b"8")
    assert (refusal.value.code, refusal.value.offset) == ("wrong-offset", 6)
    # A part that can't be repeated (`exact`) is accepted only at the end of the file.
    for offset in (4, 7):
        with pytest.raises(GatewayRefusedError) as refusal:
            await host.append(7, "work/a", offset, b"8", exact=True)
        assert (refusal.value.code, refusal.value.offset) == ("wrong-offset", 6)
    assert (await host.append(7, "work/a", 6, b"67", complete=True, exact=True)).complete
    with pytest.raises(GatewayRefusedError, match="complete"):
        await host.append(7, "work/a", 8, b"9")
    assert (await host.append(7, "work/a", 6, b"67", complete=True)).size == 8


# Each example creates a gateway.
@settings(max_examples=12)
@given(
    st.lists(st.binary(max_size=400_000 // 8), max_size=8),
    st.integers(0, 200_000),
    st.integers(0, 200_000),
)
def test_parts_and_ranges_give_the_bytes_back(parts: list[bytes], one: int, two: int) -> None:
    """For any parts, a range is that range of the whole file."""

    async def check() -> None:
        with tempfile.TemporaryDirectory() as folder:
            bench = GatewayBench(Path(folder))
            await bench.client(ALICE).put_definition(DATA)
            host, whole = bench.client(HOST), b""
            for part in parts:
                await host.append(7, "work/x", len(whole), part)
                whole += part
            await host.append(7, "work/x", len(whole), b"", complete=True)
            start, end = sorted((one, two))
            answer = None
            try:
                answer = await bench.client(ALICE)._request(
                    "GET", "/v1/jobs/7/files/work/x", headers={"Range": f"bytes={start}-{end}"}
                )
            except EndpointError:
                assert start >= len(whole)
            if answer is not None:
                assert answer.content == whole[start : end + 1]
                assert answer.headers["content-range"].endswith(f"/{len(whole)}")
            for client in bench.clients:
                await client.close()

    asyncio.run(check())


TRICKS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(["..", ".", "", "work", "log", "\\", "%2e%2e", "a\0b", "8", "files", "~"]),
        min_size=1,
        max_size=8,
    ).map("/".join),
    st.text(max_size=20).map(lambda text: f"work/{text}"),
)


@pytest.mark.parametrize(
    "name",
    [
        *("", "work", "work/", "/work/a", "../work/a", "work/..", "work/../log", "work/./a"),
        *(
            "work//a",
            "work/a/..",
            "work/a\\b",
            "work/a\n",
            "work/a\0",
            "log/a",
            "logs",
            "etc/passwd",
        ),
        "work/" + "a" * 1_024,
    ],
)
def test_invalid_file_names_are_refused(name: str) -> None:
    assert not is_file_name(name)


@given(TRICKS)
def test_no_file_name_leads_to_another_folder(name: str) -> None:
    if is_file_name(name):
        parts = name.split("/")
        assert parts[0] in {"log", "output", "work"}
        assert not {"", ".", ".."} & set(parts)
        assert not Path("/x", name).is_relative_to("/y")
        assert Path("/x", name).resolve().is_relative_to("/x")
        assert name.isprintable()


@settings(max_examples=25)
@given(TRICKS, st.booleans())
def test_no_path_reaches_another_job(trick: str, encoded: bool) -> None:
    """Raw paths of every kind: only files of the account's own job are ever created."""
    path = quote(trick, safe="" if encoded else "/.\\~")

    async def check() -> None:
        with tempfile.TemporaryDirectory() as folder:
            bench = GatewayBench(Path(folder) / "objects")
            await bench.client(ALICE).put_definition(DATA)
            host = bench.client(HOST)
            headers = {"Upload-Offset": "0", **await host._authorisation()}
            async with httpx2.AsyncClient(transport=bench.transport, base_url=URL) as web:
                request = web.build_request("PATCH", URL, headers=headers, content=b"x")
                raw = f"/v1/jobs/7/files/{path}".encode()
                request.url = request.url.copy_with(raw_path=raw)
                answer = await web.send(request)
            assert answer.status_code in {204, 307, 400, 404, 405}
            benches = files_in(Path(folder))
            inside = [item for item in benches if "jobs/7-" in str(item)]
            assert len(benches) == 1 + len(inside)  # the definition
            assert len(inside) == (answer.status_code == 204)
            for client in bench.clients:
                await client.close()

    asyncio.run(check())


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/jobs/-1/definition", "/v1/jobs/+7/definition", "/v1/jobs/7%0a/definition"),
        *("/v1/jobs/0x7/definition", "/v1/jobs/7/../8/definition", "/v1/jobs/ 7/definition"),
        *("/v1/jobs/99999999999999999999/definition", "/v1/definitions/../x", "/v1/jobs//log"),
    ],
)
async def test_invalid_paths_are_not_found(bench: GatewayBench, path: str) -> None:
    headers = await bench.client(ALICE)._authorisation()
    async with httpx2.AsyncClient(transport=bench.transport, base_url=URL) as web:
        answer = await web.get(path, headers=headers)
    assert answer.status_code in {403, 404, 405}


@pytest.mark.parametrize(
    "headers",
    [
        {"Upload-Offset": "-1"},
        {"Upload-Offset": "1e3"},
        {"Upload-Offset": "٣"},
        {},
        {"Upload-Offset": "9" * 40},
    ],
)
async def test_invalid_headers_are_refused(bench: GatewayBench, headers: dict[str, str]) -> None:
    host = bench.client(HOST)
    raw_headers = {
        key: text.encode() for key, text in (headers | await host._authorisation()).items()
    }
    async with httpx2.AsyncClient(transport=bench.transport, base_url=URL) as web:
        answer = await web.patch("/v1/jobs/7/files/log", headers=raw_headers, content=b"x")
    assert answer.status_code == 400


async def test_sizes_are_bounded_for_a_job_and_its_customer(
    make: Callable[..., GatewayBench],
) -> None:
    bench = make(max_part=8, max_log=10, max_job=20, max_account=25, max_files=3)
    bench.change(8, customer=ALICE.address)
    await bench.client(ALICE).put_definition(DATA)
    host = bench.client(HOST)

    async def refused(job_id: int, name: str, size: int, offset: int = 0) -> str:
        with pytest.raises(GatewayRefusedError) as refusal:
            await host.append(job_id, name, offset, b"x" * size)
        return refusal.value.code

    assert await refused(7, "work/a", 9) == "too-large"
    await host.append(7, "log", 0, b"x" * 8)
    assert await refused(7, "log", 3, 8) == "quota"
    await host.append(7, "work/a", 0, b"x" * 8)
    assert await refused(7, "work/b", 5) == "quota"
    await host.append(7, "work/b", 0, b"x")
    assert await refused(7, "work/c", 1) == "quota"
    assert await refused(8, "work/a", 8 + 1) == "too-large"
    await host.append(8, "work/a", 0, b"x" * 8)
    assert await refused(8, "work/b", 1) == "quota"
    # The running totals equal the sums over all files.
    space = await bench.access.job(Session(HOST.address, None, 9e9), 7, Permission.WRITE)
    records = bench.service._records
    anew = GatewayRecords(records._store)
    assert records.job_usage(space) == anew.job_usage(space) == (17, 3)
    assert records.customer_usage(ALICE.address) == anew.customer_usage(ALICE.address) == (25, 4)


async def test_small_definitions_count_for_a_block(make: Callable[..., GatewayBench]) -> None:
    bench = make(max_definitions=2 * 4_096)
    alice = bench.client(ALICE)
    benches = [DATA.replace(b"hello", b"hello%d" % number) for number in range(3)]
    for data in (benches[0], benches[1], benches[0]):
        await alice.put_definition(data)
    with pytest.raises(GatewayRefusedError, match="quota of definitions"):
        await alice.put_definition(benches[2])


async def test_refused_requests_are_bounded(make: Callable[..., GatewayBench]) -> None:
    """Refusals need chain requests and accounts are free: refusals are limited, readers are not slowed."""
    bench = make(refusals=0.001, refusal_burst=3)
    await bench.client(ALICE).put_definition(DATA)
    stranger, alice = (Session(value.address, None, 9e9) for value in (STRANGER, ALICE))
    codes = []
    for number in range(5):
        with pytest.raises(RequestRefusedError) as error_info:
            await bench.access.job(stranger, 7 + number % 2, Permission.READ)
        codes.append(error_info.value.code)
    assert codes == ["not-authorised"] * 3 + ["too-many-refused"] * 2
    for _ in range(5):
        with pytest.raises(RequestRefusedError, match="no file of this name"):
            await bench.service.readable_file(alice, 7, "log")  # first checks that it may write


async def test_one_account_does_not_take_all_places_for_uploads(bench: GatewayBench) -> None:
    """Slow uploads of one account occupy only some of the places."""
    release = asyncio.Event()

    async def slow() -> None:
        async with bench.service.uploads.slot(HOST.address):
            await release.wait()

    holding = [asyncio.create_task(slow()) for _ in range(100)]
    await asyncio.sleep(0)
    async with asyncio.timeout(60), bench.service.uploads.slot(FORMER.address):
        pass
    release.set()
    await asyncio.gather(*holding)


async def test_a_customer_shares_a_bounded_number_of_jobs(
    make: Callable[..., GatewayBench],
) -> None:
    bench = make(max_shares=1)
    alice = bench.client(ALICE)
    await alice.share(7, BOB.address, 2_000)
    with pytest.raises(GatewayRefusedError, match="limit of shares"):
        await alice.share(7, STRANGER.address, 2_000)
    await alice.share(7, BOB.address, 3_000)  # the same one for longer
    await alice.share(7, BOB.address, 0)  # ending a share is always possible
    await alice.share(7, STRANGER.address, 2_000)


async def test_results_are_reported_once_all_of_them_are_there(bench: GatewayBench) -> None:
    host, alice = bench.client(HOST), bench.client(ALICE)
    file_entry = {"name": "work/a", "size": 3, "digest": "d", "problem": ""}
    with pytest.raises(NotDeliveredError) as pending:
        await alice.results(7)
    assert pending.value.received == 0
    with pytest.raises(GatewayRefusedError, match="not uploaded completely"):
        await host.put_results(7, [file_entry])
    await host.append(7, "work/a", 0, b"abc", complete=True)
    with pytest.raises(NotDeliveredError) as pending:
        await alice.results(7)
    assert pending.value.received == 3
    for wrong in ({"size": 4}, {"name": "work/../a"}, {"name": 1}, {"size": True}):
        with pytest.raises(GatewayRefusedError):
            await host.put_results(7, [file_entry | wrong])
    await host.put_results(7, [file_entry, {"name": "work/p", "size": 0, "problem": "a pipe"}])
    assert [item["name"] for item in await alice.results(7)] == ["work/a", "work/p"]


async def test_files_are_removed_after_their_time(make: Callable[..., GatewayBench]) -> None:
    bench = make(keep_seconds=-1)
    await bench.client(ALICE).put_definition(DATA)
    await bench.client(HOST).append(7, "log", 0, b"hello\n")
    assert len(files_in(bench.folder)) == 2
    with pytest.MonkeyPatch.context() as broken:

        async def fail(_digest: str) -> None:
            raise StoreError("the object store is down")

        broken.setattr(bench.service.objects, "drop_definition", fail)
        with pytest.raises(StoreError):
            await bench.service.clean()
    assert len(files_in(bench.folder)) == 1
    await bench.service.clean()  # which uses the remaining size
    assert files_in(bench.folder) == []
    with pytest.raises(NotFoundError):
        await bench.client(ALICE).definition(7, JOB.definition)


# -- the log as it grows


async def test_a_log_is_followed_by_byte_offsets(bench: GatewayBench) -> None:
    """Pieces have no gap and no repeat, from any offset, whatever bytes are in them."""
    host, alice = bench.client(HOST), bench.client(ALICE)
    text = bytes(range(256)) * 3 + "zwölf\r\n\n: data: x\n".encode()
    await host.append(7, "log", 0, text[:300])
    await host.append(7, "log", 300, text[300:], complete=True)
    for start in (0, 1, 299, 300, len(text)):
        parts = [part async for part in alice.follow(7, start)]
        assert b"".join(part.data for part in parts) == text[start:]
        assert parts[-1] == LogPart(b"", len(text), end=True)


async def test_a_stream_follows_new_output_and_ends_with_its_session(bench: GatewayBench) -> None:
    host, alice = bench.client(HOST), bench.client(ALICE)
    token = (await alice._authorisation())["Authorization"].removeprefix("Bearer ")
    session = bench.access.session(token)
    stream = bench.service.open_stream(session, 7, 0)
    coming = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await host.append(7, "log", 0, b"first")
    assert await asyncio.wait_for(coming, 5) == (b"first", 5)
    coming = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.01)
    await host.append(7, "log", 5, b"second")
    assert await asyncio.wait_for(coming, 5) == (b"second", 11)
    bench.now = 2_001.0
    assert [item async for item in stream] == []  # without an end: the reader comes back
    await host.append(7, "log", 11, b"", complete=True)


async def test_open_streams_of_an_account_are_bounded(make: Callable[..., GatewayBench]) -> None:
    """Also for concurrent requests: the excess stream ends, and its client reconnects."""
    bench = make(max_streams=2)
    await bench.client(ALICE).put_definition(DATA)
    await bench.client(HOST).append(7, "log", 0, b"one")
    alice, bob = (Session(account.address, None, 9e9) for account in (ALICE, BOB))
    streams = [bench.service.open_stream(alice, 7, 0) for _ in range(3)]
    assert [await anext(stream) for stream in streams[:2]] == [(b"one", 3)] * 2
    assert [part async for part in streams[2]] == []
    with pytest.raises(RequestRefusedError, match="Too many log streams"):
        bench.service.open_stream(alice, 7, 0)
    bench.service.open_stream(bob, 8, 0)
    for stream in streams[:2]:
        await cast("AsyncGenerator[Any]", stream).aclose()
    assert await anext(bench.service.open_stream(alice, 7, 0)) == (b"one", 3)


async def test_the_gateway_survives_a_failing_object_store(
    bench: GatewayBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = bench.client(HOST)
    await host.append(7, "log", 0, b"one")

    async def fail(_path: str, _data: bytes) -> None:
        raise StoreError("gone")

    monkeypatch.setattr(bench.objects, "_put", fail)
    with pytest.raises(GatewayRefusedError, match="its store") as refusal:
        await host.append(7, "log", 3, b"two")
    assert refusal.value.code == "unavailable"
    monkeypatch.undo()
    assert (await host.append(7, "log", 3, b"two")).size == 6


async def test_internal_errors_are_not_disclosed(bench: GatewayBench) -> None:
    """Internal errors are one sentence; a file is never displayed as a page."""
    bench.down = True
    bench.access._jobs.clear()
    with pytest.raises(GatewayRefusedError, match="can't reach the chain"):
        await bench.client(ALICE).definition(7, JOB.definition)
    bench.down = False
    await bench.client(HOST).append(7, "output", 0, b"<script>", complete=True)
    answer = await bench.client(ALICE)._request("GET", "/v1/jobs/7/files/output")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == "attachment"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]


async def test_notifications_are_off_unless_the_operator_allows_them(bench: GatewayBench) -> None:
    alice = bench.client(ALICE)
    with pytest.raises(NotFoundError, match="sends no notifications"):
        await alice.register_notifications(["ab" * 32], [Notify(("me@example.org",))], "")
    with pytest.raises(NotFoundError, match="sends no notifications"):
        await alice.notifications(5)
    assert (await alice.terms())["notifications"] is False


def test_registered_recipients_are_replaced_and_kept_apart() -> None:
    with Store.open(None, chain_id=CHAIN, contract=CONTRACT, account=ALICE.address) as store:
        recipients = Recipients(store)
        own_request, other_request = (
            Notify(("me@example.org",), (Occasion.FAIL,)),
            Notify(("http://a/b",)),
        )
        recipients.register(
            ALICE.address, Registration(("aa" * 32, "bb" * 32), (own_request, other_request), "k")
        )
        recipients.register(BOB.address, Registration(("aa" * 32,), (other_request,)))
        assert recipients.requests(ALICE.address.lower(), "aa" * 32) == (own_request, other_request)
        assert recipients.requests(BOB.address, "aa" * 32) == (other_request,)
        assert (recipients.key(ALICE.address), recipients.key(BOB.address)) == (b"k", b"")
        recipients.register(ALICE.address, Registration(("aa" * 32,), ()))
        assert recipients.requests(ALICE.address, "aa" * 32) == ()
        assert recipients.requests(ALICE.address, "bb" * 32) == (own_request, other_request)
        # A key belongs to recipients that may still be notified.
        assert recipients.key(ALICE.address) == b"k"
        assert Recipients(store).has(ALICE.address)
        assert not Recipients(store).has(STRANGER.address)
        digests = [f"{number:064x}" for number in range(10_001)]
        with pytest.raises(RequestRefusedError, match="as many definitions"):
            recipients.register(BOB.address, Registration(tuple(digests), (other_request,)))
        assert recipients.requests(BOB.address, "aa" * 32) == (other_request,)
        recipients.drop(int(time.time()) + 1)
        assert recipients.requests(ALICE.address, "bb" * 32) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"definitions": []}, "list of 1 to 50"),
        ({"definitions": ["aa" * 32] * 51}, "list of 1 to 50"),
        ({"definitions": ["AA" * 32]}, "64 hexadecimal digits"),
        ({"requests": {}}, "list of at most two"),
        ({"requests": [{"to": [], "on": ["end"]}]}, "1 to 10 recipients"),
        ({"requests": [{"to": ["a@b.org"] * 11, "on": ["end"]}]}, "1 to 10 recipients"),
        ({"requests": [{"to": ["desktop"], "on": ["end"]}]}, "must be an e-mail address"),
        ({"requests": [{"to": ["a@b.org"], "on": ["never"]}]}, "must be any of begin"),
        ({"key": "a\nb"}, "at most 200 characters"),
    ],
)
def test_a_registration_that_is_invalid_is_refused(changes: dict[str, Any], message: str) -> None:
    body = {"definitions": ["aa" * 32], "requests": [{"to": ["a@b.org"], "on": ["end"]}]}
    assert read_registration(body).requests == (Notify(("a@b.org",)),)
    with pytest.raises(UsageError, match=message):
        read_registration(body | changes)
