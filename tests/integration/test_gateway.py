"""Customers and providers that share only a chain and a gateway."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from eth_account.signers.local import LocalAccount

from deepsquare_chain.chain.bindings.events import JobSubmitted
from deepsquare_chain.chain.sign_in import SignInMessage
from deepsquare_chain.chain.wallet import import_key
from deepsquare_chain.cli.services import serve_gateway_and_relay
from deepsquare_chain.client.gateways import job_results, read_log
from deepsquare_chain.client.submission import Request
from deepsquare_chain.client.submission import submit as submit_jobs
from deepsquare_chain.errors import NotAuthorisedError, StoreError
from deepsquare_chain.gateway import access
from deepsquare_chain.gateway.access import GatewayRules
from deepsquare_chain.job import JobStatus as S
from deepsquare_chain.relay.requests import RelayRules
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.encryption import encrypt_secrets, ensure_result_key
from deepsquare_chain.store.gateway_client import (
    GatewayClient,
    GatewayDefinitionStore,
    NotDeliveredError,
    WrongAccountError,
    contract_resource,
    open_gateways,
)
from tests.support.gateway import client, served, started
from tests.support.images import free_port, serving
from tests.support.livegrid import LiveGrid, terms
from tests.support.provider import Bench, bench, definition
from tests.support.relay import account_without_coin, relayed

pytestmark = pytest.mark.parametrize("shared_node", ["embedded"], indirect=True)


async def submit(host: Bench, url: str, customer: int, command: str, **more: Any) -> int:
    """Upload a definition as a customer, and submit it to a provider."""
    new_definition = definition(command, **more)
    async with client(host.grid, url, host.grid.customers[customer]) as gateway:
        assert await gateway.put_definition(new_definition.to_bytes()) == new_definition.digest
    [job_id] = await host.submit_digests([new_definition.digest], customer=customer)
    return job_id


async def delivered(gateway: GatewayClient, job_id: int) -> bool:
    """Return whether the gateway has the results of a job."""
    try:
        await gateway.results(job_id)
    except NotDeliveredError:
        return False
    return True


async def test_two_customers_and_two_providers(grid: LiveGrid, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(grid, tmp_path / "gateway"))
        hosts = [
            await stack.enter_async_context(
                bench(grid, tmp_path / f"provider-{number}", number, gateways=[url])
            )
            for number in (0, 1)
        ]
        program = "for i in 1 2 3; do echo line $i of %s; sleep 0.4; done; echo %s > kept.txt"
        jobs = [
            await submit(hosts[number], url, number, program % (name, name))
            for number, name in enumerate(("alice", "bob"))
        ]
        own_jobs = [
            await stack.enter_async_context(client(grid, url, customer))
            for customer in grid.customers
        ]
        log_chunks: list[bytes] = []

        async def follow() -> None:
            log_chunks.extend(
                [x async for x in read_log(grid.contracts, own_jobs[:1], jobs[0], follow=True)]
            )

        log_task = asyncio.create_task(follow())
        await asyncio.gather(*(host.until([job]) for host, job in zip(hosts, jobs, strict=True)))
        await asyncio.wait_for(log_task, 120)
        printed = b"line 1 of alice\nline 2 of alice\nline 3 of alice\n"
        assert b"".join(log_chunks) == printed
        assert len(log_chunks) > 1  # it came while the job ran

        for number, (host, job_id) in enumerate(zip(hosts, jobs, strict=True)):
            assert (await host.job(job_id)).status is S.FINISHED
            to = tmp_path / f"got-{number}"
            results = await job_results(
                grid.contracts, tmp_path, job_id, to, gateways=[own_jobs[number]]
            )
            assert [(file.name, file.on_chain, file.problem) for file in results] == [
                ("output", True, ""),
                ("work/kept.txt", None, ""),
            ]
            assert results[0].digest == hashlib.sha256((to / "output").read_bytes()).hexdigest()
            assert (to / "work" / "kept.txt").read_text() == ("alice\n", "bob\n")[number]
            # No other account can read any of it.
            others = [own_jobs[1 - number], hosts[1 - number].service._uploader._gateways[0]]
            for other in others:
                with pytest.raises(WrongAccountError):
                    await other.results(job_id)
                with pytest.raises(WrongAccountError):
                    await other.definition(job_id, (await host.job(job_id)).definition)


async def test_runs_continue_without_the_gateway_and_catch_up(
    grid: LiveGrid, tmp_path: Path
) -> None:
    """A gateway killed while a job runs, and restarted after its end, loses nothing of the job."""
    async with AsyncExitStack() as stack:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        gateway = await started(grid, tmp_path / "gateway", port)
        stack.callback(lambda: gateway.end(signal.SIGKILL))
        host = await stack.enter_async_context(bench(grid, tmp_path / "p", gateways=[url]))
        job_id = await submit(host, url, 0, "for i in 1 2 3 4; do echo line $i; sleep 0.5; done")
        alice = await stack.enter_async_context(client(grid, url, grid.customers[0]))
        log_chunks: list[bytes] = []
        troubles: list[bool] = []

        async def follow() -> None:
            log = read_log(
                grid.contracts,
                [alice],
                job_id,
                follow=True,
                on_outage=lambda error: troubles.append(error is not None),
            )
            async for data in log:
                log_chunks.append(data)  # noqa: PERF401 - each is seen as it comes

        log_task = asyncio.create_task(follow())
        await host.drive(lambda: bool(log_chunks))
        gateway.end(signal.SIGKILL)
        await host.until([job_id])
        assert (await host.job(job_id)).status is S.FINISHED
        restarted = await started(grid, tmp_path / "gateway", port)
        stack.callback(restarted.end)
        await asyncio.wait_for(log_task, 120)
        assert b"".join(log_chunks) == b"".join(b"line %d\n" % n for n in (1, 2, 3, 4))
        assert troubles == [True, False]
        [output] = await job_results(grid.contracts, tmp_path, job_id, gateways=[alice])
        assert output.on_chain


async def retry_until_allowed(ask: Callable[[], Awaitable[Any]], *, allowed: bool = True) -> None:
    """Retry until the gateway has read the latest state of the chain, which it does every second."""
    async with asyncio.timeout(30):
        while True:
            try:
                await ask()
                result = True
            except WrongAccountError:
                result = False
            if result is allowed:
                return
            await asyncio.sleep(0.1)


async def test_former_providers_and_wrong_sign_ins_are_refused(
    grid: LiveGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain decides who may access a job; a signature is valid once, for the resources it names."""
    alice, bob = grid.customers[:2]
    hello = definition("echo hello")
    scheduler = grid.contracts.scheduler
    registry = grid.contracts.registry
    first, second = [
        (await registry.provider_of(provider.address)).id for provider in grid.providers[:2]
    ]
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(grid, tmp_path / "gateway"))

        async def opened(account: LocalAccount, **options: Any) -> GatewayClient:
            return await stack.enter_async_context(client(grid, url, account, **options))

        owner, first_provider, second_provider = [
            await opened(value) for value in (alice, *grid.providers[:2])
        ]
        await owner.put_definition(hello.to_bytes())
        requests = [(terms(resources=hello.resources), [hello.digest] * 2)]
        receipt = await grid.send(alice, scheduler.submit_jobs(requests))
        job_id, other = [e.job_id for e in receipt.events if isinstance(e, JobSubmitted)]

        await grid.assign({first: [job_id, other]})
        assert await first_provider.definition(job_id, hello.digest) == hello.to_bytes()
        assert (await first_provider.append(job_id, "log", 0, b"one\n")).size == 4
        for request in (
            second_provider.definition(job_id, hello.digest),
            second_provider.append(job_id, "log", 4, b"x"),
        ):
            with pytest.raises(WrongAccountError, match=f"job {job_id}"):
                await request
        await grid.send(grid.providers[0], scheduler.requeue([job_id]))
        await retry_until_allowed(
            lambda: first_provider.definition(job_id, hello.digest), allowed=False
        )
        await grid.assign({second: [job_id]})
        await retry_until_allowed(lambda: second_provider.append(job_id, "log", 0, b"two\n"))
        for request in (
            first_provider.definition(job_id, hello.digest),
            first_provider.append(job_id, "log", 4, b"more\n"),
            first_provider.append(job_id, "work/late", 0, b"x"),
            first_provider.put_results(job_id, []),
            first_provider.results(job_id),
        ):
            with pytest.raises(WrongAccountError, match=f"job {job_id}"):
                await request
        async with owner.download(job_id, "log") as pieces:
            assert await _joined(pieces) == b"two\n"  # of the provider that holds it now

        narrow = await opened(alice, job_id=job_id)
        assert await narrow.definition(job_id, hello.digest)
        with pytest.raises(WrongAccountError, match=f"not for job {other}"):
            await narrow.definition(other, hello.digest)
        with pytest.raises(WrongAccountError, match="for one job only"):
            await narrow.put_definition(hello.to_bytes())

        web = await stack.enter_async_context(httpx2.AsyncClient(base_url=url, trust_env=False))

        async def message(**changes: Any) -> SignInMessage:
            nonce = (await web.post("/v1/sign-in/nonce", json={})).json()
            chain, contract = grid.deployment.chain_id, grid.deployment.scheduler
            fields = {
                "domain": url.partition("://")[2],
                "address": alice.address,
                "uri": f"{url}/v1/sign-in",
                "chain_id": chain,
                "nonce": nonce["nonce"],
                "issued_at": nonce["issued_at"],
                "expiration_time": nonce["expiration_time"],
                "resources": (contract_resource(chain, contract), f"{url}/v1/jobs"),
            }
            return SignInMessage(**(fields | changes))

        async def sign_in(hello: SignInMessage, signer: LocalAccount = alice) -> tuple[int, str]:
            body = {"message": hello.text(), "signature": "0x" + hello.sign(signer).hex()}
            answer = await web.post("/v1/sign-in", json=body)
            return answer.status_code, answer.json().get("code", "")

        good = await message()
        assert await sign_in(good, bob) == (401, "wrong-signature")  # and the nonce is not used up
        assert await sign_in(good) == (200, "")
        assert await sign_in(good) == (401, "used-nonce")
        assert await sign_in(await message(chain_id=1)) == (401, "wrong-chain")
        wrong = contract_resource(grid.deployment.chain_id, grid.deployment.registry)
        assert await sign_in(await message(resources=(wrong,))) == (401, "wrong-contract")
        monkeypatch.setattr(access, "_NONCE_SECONDS", -2)
        expired = await message()
        monkeypatch.undo()
        assert await sign_in(expired) == (401, "expired-nonce")


async def test_an_encrypted_job_is_read_with_its_key_alone(grid: LiveGrid, tmp_path: Path) -> None:
    """An encrypted log is followed through a restart; the gateway sees neither output nor file names."""
    key, _ = ensure_result_key(tmp_path / "alice.age-key")
    stranger, _ = ensure_result_key(tmp_path / "stranger.age-key")
    async with AsyncExitStack() as stack:
        gateway_stack = await stack.enter_async_context(AsyncExitStack())
        url = await gateway_stack.enter_async_context(served(grid, tmp_path / "gateway"))
        host = await stack.enter_async_context(bench(grid, tmp_path / "p", gateways=[url]))
        provider_key, _ = ensure_result_key(host.service._settings.state_dir / "secrets.age-key")
        encrypted_secrets = encrypt_secrets(
            {"WORD": "secret"}, grid.customers[0].address, [provider_key.recipient]
        )
        program = (
            "for i in 1 2 3 4; do echo $WORD $i; sleep 0.5; done; mkdir private; "
            "head -c 3000000 /dev/zero > private/model.bin; : > private/empty"
        )
        job_id = await submit(
            host, url, 0, program, recipients=(key.recipient,), secrets=encrypted_secrets
        )
        alice = await stack.enter_async_context(client(grid, url, grid.customers[0]))
        log_chunks: list[bytes] = []

        async def follow() -> None:
            log = read_log(grid.contracts, [alice], job_id, follow=True, key_file=key.path)
            async for data in log:
                log_chunks.append(data)  # noqa: PERF401 - each is seen as it comes

        log_task = asyncio.create_task(follow())
        await host.drive(lambda: bool(log_chunks))
        await gateway_stack.aclose()
        port = int(url.rpartition(":")[2])
        await stack.enter_async_context(served(grid, tmp_path / "gateway", port=port))
        await host.until([job_id])
        await asyncio.wait_for(log_task, 60)
        printed = b"".join(b"secret %d\n" % n for n in (1, 2, 3, 4))
        assert b"".join(log_chunks) == printed

        to, messages = tmp_path / "got", list[str]()
        results = await job_results(
            *(grid.contracts, tmp_path, job_id, to),
            gateways=[alice],
            key_file=key.path,
            report=messages.append,
        )
        assert [(file.name, file.on_chain, file.problem) for file in results] == [
            ("output", True, ""),
            ("work/private/empty", None, ""),
            ("work/private/model.bin", None, ""),
        ]
        assert any(str(key.path) in message for message in messages)
        assert (to / "output").read_bytes() == printed
        assert (to / "work/private/model.bin").read_bytes() == bytes(3_000_000)
        for wrong in (None, stranger.path):
            log = read_log(grid.contracts, [alice], job_id, follow=False, key_file=wrong)
            with pytest.raises(NotAuthorisedError, match="encrypted"):
                await _joined(log)
            with pytest.raises(NotAuthorisedError, match="encrypted"):
                await job_results(
                    *(grid.contracts, tmp_path, job_id), gateways=[alice], key_file=wrong
                )
        # The commands in the definition are all that the gateway can read.
        files = [x for x in (tmp_path / "gateway").rglob("*") if x.is_file()]
        assert any("jobs" in x.parts for x in files)
        assert not any(b"secret " in x.read_bytes() or b'"secret"' in x.read_bytes() for x in files)
        others = [x for x in files if "definitions" not in x.parts]
        assert not any(b"model.bin" in x.read_bytes() for x in others)
        assert not list((tmp_path / "p").rglob("encrypted"))

        # A job of another account with the copied secrets is refunded and gets no secret.
        stolen = await submit(host, url, 1, "echo $WORD", secrets=encrypted_secrets)
        await host.until([stolen])
        job = await host.job(stolen)
        assert (job.status, job.escrow) == (S.PANICKED, 0)


async def test_one_process_is_gateway_and_relay(grid: LiveGrid, tmp_path: Path) -> None:
    """A wallet without coin uploads and submits at one URL; gateway and relay stop together."""
    password, record = tmp_path / "password", tmp_path / "deployment.json"
    password.touch(0o600)
    password.write_text("relay")
    grid.deployment.save(record)
    import_key(tmp_path / "relay.json", bytes(grid.stranger.key).hex(), "relay", light=True)
    settings = Settings(
        endpoint=grid.node.url,
        deployment=record,
        keystore=tmp_path / "relay.json",
        password_file=password,
        state_dir=tmp_path / "state",
        confirmations=0,
        poll_interval=0.1,
    )
    stop, relaying = asyncio.Event(), asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    gateway = {
        "rules": GatewayRules(),
        "objects": "",
        "urls": (),
        "sites": (),
        "host": "127.0.0.1",
        "port": 0,
        "ready": url.set_result,
    }
    serving = asyncio.create_task(
        serve_gateway_and_relay(
            *(settings, gateway, RelayRules()),
            min_balance=0,
            health_port=None,
            ready=relaying.set,
            stop=stop,
        )
    )
    try:
        ready = asyncio.ensure_future(asyncio.gather(url, relaying.wait()))
        await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
        account = await account_without_coin(grid)
        async with relayed(grid, url.result(), account) as wallet:
            async with open_gateways([url.result()], account, grid.deployment) as gateways:
                store = GatewayDefinitionStore(gateways)
                request = Request(terms(), (definition("echo hello").to_bytes(),))
                submission = await submit_jobs(wallet.contracts, wallet.sender, store, [request])
            [job] = await grid.contracts.scheduler.get_jobs(submission.job_ids)
            assert job.customer == account.address
        async with client(grid, url.result(), account) as owner:
            assert await owner.definition(job.id, job.definition)
    finally:
        stop.set()
        await asyncio.wait_for(serving, 60)


class CuttableProxy:
    """A TCP proxy whose connection can be cut and restored."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self._to = port
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._open:
            connection.transport.abort()

    async def _carry(
        self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter
    ) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._to)
        self._open |= {client_writer, upstream_writer}
        try:
            await asyncio.gather(
                _pump(client_reader, upstream_writer), _pump(upstream_reader, client_writer)
            )
        finally:
            self._open -= {client_writer, upstream_writer}


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            target.write(data)
            await target.drain()
    target.close()


async def test_objects_in_s3_survive_an_outage(
    grid: LiveGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object store fails while a job runs: nothing is lost, and all is removed after retention."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1"]
    async with AsyncExitStack() as stack:
        stack.enter_context(serving([*command, "-p", str(port)], port, tmp_path / "s3.log"))
        line = CuttableProxy(port)
        await line.mend()
        stack.push_async_callback(line.cut)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "AK",
            "AWS_SECRET_ACCESS_KEY": "SK",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT": f"http://127.0.0.1:{line.port}",
        }.items():
            monkeypatch.setenv(name, value)
        s3 = f"http://127.0.0.1:{port}/grid"
        web = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False, timeout=30))
        with pytest.raises(StoreError, match="object store"):
            async with served(grid, tmp_path / "none", objects="s3://grid/deep"):
                pass  # there is no such bucket yet
        assert (await web.put(s3)).is_success

        gateway_stack = await stack.enter_async_context(AsyncExitStack())
        settings: dict[str, Any] = {"objects": "s3://grid/deep"}
        url = await gateway_stack.enter_async_context(
            served(grid, tmp_path / "gateway", **settings)
        )
        host = await stack.enter_async_context(bench(grid, tmp_path / "p", gateways=[url]))
        program = "for i in 1 2 3; do echo line $i; sleep 0.5; done; seq 1000000 > numbers"
        job_id = await submit(host, url, 0, program)
        alice = await stack.enter_async_context(client(grid, url, grid.customers[0]))

        async def begun() -> bool:
            return bool(await alice.size(job_id, "log"))

        await host.drive(begun)
        await line.cut()
        await host.until([job_id])
        assert (await host.job(job_id)).status is S.FINISHED
        await line.mend()
        async with asyncio.timeout(120):  # the provider retries within half a minute
            while not await delivered(alice, job_id):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        log = read_log(grid.contracts, [alice], job_id, follow=False)
        assert await _joined(log) == b"line 1\nline 2\nline 3\n"
        to = tmp_path / "got"
        results = await job_results(grid.contracts, tmp_path, job_id, to, gateways=[alice])
        assert [(file.name, file.on_chain, file.problem) for file in results] == [
            ("output", True, ""),
            ("work/numbers", None, ""),
        ]
        whole = b"".join(b"%d\n" % n for n in range(1, 1_000_001))
        assert (to / "work/numbers").read_bytes() == whole
        middle = 4 * 1024 * 1024  # of two parts
        part = await alice._request(
            *("GET", f"/v1/jobs/{job_id}/files/work/numbers"),
            headers={"Range": f"bytes={middle - 10}-{middle + 9}"},
        )
        assert part.content == whole[middle - 10 : middle + 10]

        async def keys() -> set[str]:
            text = (await web.get(s3, params={"list-type": "2"})).text
            return set(re.findall("<Key>(.*?)</Key>", text))

        assert len(await keys()) >= 5
        assert all(item.startswith("deep/") for item in await keys())
        await gateway_stack.aclose()
        settings["rules"] = GatewayRules(keep_seconds=-1)
        await stack.enter_async_context(served(grid, tmp_path / "gateway", **settings))
        while await keys() != {"deep/check"}:  # noqa: ASYNC110 - the server tells nothing by itself
            await asyncio.sleep(0.1)


async def _joined(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])


async def test_a_definition_that_no_gateway_has_costs_nothing(
    grid: LiveGrid, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        urls = [
            await stack.enter_async_context(served(grid, tmp_path / name)) for name in ("a", "b")
        ]
        host = await stack.enter_async_context(
            bench(grid, tmp_path / "p", gateways=urls, assignment_timeout=2)
        )
        lost_definition, altered_definition = definition("echo lost"), definition("echo altered")
        async with client(grid, urls[1], grid.customers[0]) as gateway:
            await gateway.put_definition(altered_definition.to_bytes())
        [path] = [
            x for x in (tmp_path / "b").rglob("*") if x.name == altered_definition.digest.hex()
        ]
        path.write_bytes(altered_definition.to_bytes().replace(b"altered", b"changed"))
        ids = await host.submit_digests(
            [lost_definition.digest, altered_definition.digest], retries=0
        )
        kept_id = await submit(host, urls[1], 0, "echo kept")  # in the second gateway alone
        await host.until([*ids, kept_id])
        jobs = await grid.contracts.scheduler.get_jobs([*ids, kept_id])
        assert [job.status for job in jobs] == [S.PANICKED, S.PANICKED, S.FINISHED]
        assert [job.escrow for job in jobs[:2]] == [0, 0]
