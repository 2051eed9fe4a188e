"""Notifications of a real chain's jobs to a real web server and a real mail server."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword

from deepsquare_chain.notification import Notify, Occasion
from deepsquare_chain.notify.delivery import Deliverer, DeliveryResult, MailServer
from deepsquare_chain.notify.messages import EVENT_ID, SIGNATURE
from deepsquare_chain.notify.service import NAME, NotifySettings, latest_notifications, run_notify
from deepsquare_chain.store.database import open_wallet_store
from deepsquare_chain.store.notifications import Delivery, DeliveryState, remember_notify
from tests.support.gateway import client, served
from tests.support.livegrid import LiveGrid
from tests.support.rundaemon import until

pytestmark = [
    pytest.mark.parametrize("shared_node", ["embedded"], indirect=True),
    pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS"),
]

SECRET = b"key of the hooks"
PASSWORD = "mail's password"


class Hooks:
    """A web server that stores POST requests. `answers` are used first: a status, or None to hang up."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []
        self.answers: list[int | None] = []
        self.url = ""

    async def take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        stamp, _, digest = request.headers[SIGNATURE].partition(",v1=")
        signed = stamp.removeprefix("t=").encode() + b"." + body
        assert digest == hmac.new(SECRET, signed, hashlib.sha256).hexdigest()
        event = json.loads(body)
        assert request.headers[EVENT_ID] == event["id"]
        answer = self.answers.pop(0) if self.answers else 204
        self.posted.append({**event, "answer": answer})
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=answer or 500)

    def seen(self, job_id: int) -> list[tuple[str, int | None]]:
        return [(e["type"], e["answer"]) for e in self.posted if e["job"]["id"] == job_id]


class FakeMailServer:
    """A mail server that stores messages and refuses unknown recipients."""

    def __init__(self) -> None:
        self.taken: list[Message] = []
        self.url = ""

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        if address.startswith("nobody"):
            return "550 no such mailbox"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - the same
        self.taken.append(message_from_bytes(envelope.content))
        return "250 taken"

    def authenticate(
        self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, auth: Any
    ) -> AuthResult:
        right = isinstance(auth, LoginPassword) and auth.password == PASSWORD.encode()
        return AuthResult(success=right)


@pytest.fixture
async def hooks() -> AsyncIterator[Hooks]:
    result, app = Hooks(), web.Application()
    app.router.add_post("/hook", result.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    result.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    yield result
    await runner.cleanup()


@pytest.fixture
async def mails() -> AsyncIterator[FakeMailServer]:
    result = FakeMailServer()

    def make() -> SMTP:
        return SMTP(
            result,
            hostname="localhost",
            auth_require_tls=False,
            auth_required=True,
            authenticator=result.authenticate,
        )

    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    result.url = f"smtp://grid@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield result
    server.close()


class NotifyBench:
    """The notification service of one customer."""

    def __init__(self, grid: LiveGrid, folder: Path, deliverer: Deliverer, always: Notify) -> None:
        self.grid, self.folder, self.deliverer, self.always = grid, folder, deliverer, always
        self.customer = grid.customers[0].address

    @asynccontextmanager
    async def running(self, *, crashes: bool = False) -> AsyncIterator[None]:
        """Run the service during a block; a crash leaves it no time to finish anything."""
        stop = asyncio.Event()
        settings = NotifySettings(
            state_dir=self.folder,
            wallets_dir=self.folder,
            confirmations=0,
            poll_interval=0.05,
            always=self.always,
            pauses=(0.1, 0.1),
        )
        (self.folder / f"{NAME}.json").unlink(missing_ok=True)
        task = asyncio.create_task(
            run_notify(
                self.grid.node.url,
                self.grid.deployment,
                self.customer,
                self.deliverer,
                settings,
                stop=stop,
            )
        )
        try:
            await until((self.folder / f"{NAME}.json").exists)
            yield
        finally:
            task.cancel() if crashes else stop.set()
            await asyncio.wait([task], timeout=60)
            assert task.done()
            assert task.cancelled() is crashes
            assert crashes or task.exception() is None

    def states(self, job_id: int) -> Counter[tuple[str, str]]:
        result = latest_notifications(self.folder, self.grid.deployment, self.customer, 1_000)
        return Counter(
            (state.target.partition(":")[0], state.state.value)
            for event, state in result
            if event.job_id == job_id
        )

    async def cancel(self) -> int:
        """Submit and cancel a job, which causes one event with a final status."""
        [job_id] = await self.grid.submit(name=f"job {self.folder.name}")
        await self.grid.send(self.grid.customers[0], self.grid.contracts.scheduler.cancel([job_id]))
        return job_id


async def test_each_event_arrives_once_whatever_happens(
    grid: LiveGrid, hooks: Hooks, mails: FakeMailServer, tmp_path: Path
) -> None:
    mail = MailServer(mails.url, "grid@example.org", PASSWORD)
    always = Notify((hooks.url, "me@example.org", "nobody@example.org"))
    bench = NotifyBench(grid, tmp_path, Deliverer(secret=SECRET, mail=mail), always)
    old = await bench.cancel()
    async with bench.running():
        first = await bench.cancel()
        await until(lambda: len(bench.states(first)) == 3)
        await until(lambda: DeliveryState.DUE.value not in dict(bench.states(first)))
        await until(lambda: bool(mails.taken))

        # A refusal is tried again; a connection that is lost after the request never is.
        hooks.answers = [503, 429]
        second = await bench.cancel()
        await until(lambda: len(hooks.seen(second)) == 3)
        await until(lambda: bench.states(second)["http", "sent"] == 1)
        hooks.answers = [None]
        third = await bench.cancel()
        await until(lambda: bench.states(third)["http", "unknown"] == 1)
        hooks.answers = [502]  # of a proxy, which may have reached the recipient
        proxied = await bench.cancel()
        await until(lambda: bench.states(proxied)["http", "unknown"] == 1)
    # Only events of the meantime are sent by the next process.
    fourth = await bench.cancel()
    async with bench.running():
        await until(lambda: bench.states(fourth)["http", "sent"] == 1)
        await until(lambda: len(mails.taken) == 5)

    assert hooks.seen(old) == [], "before its first start"
    assert hooks.seen(first) == hooks.seen(fourth) == [("job.cancelled", 204)]
    assert [answer for _, answer in hooks.seen(second)] == [503, 429, 204]
    assert len({e["id"] for e in hooks.posted if e["job"]["id"] == second}) == 1
    assert hooks.seen(third) == [("job.cancelled", None)]
    assert hooks.seen(proxied) == [("job.cancelled", 502)]
    assert bench.states(first) == Counter(
        {("http", "sent"): 1, ("me@example.org", "sent"): 1, ("nobody@example.org", "failed"): 1}
    )
    name = f"job {tmp_path.name}"
    expected = [
        f"Job {number} ({name}): CANCELLED" for number in (first, second, third, proxied, fourth)
    ]
    assert [str(item["Subject"]) for item in mails.taken] == expected
    assert {str(item["To"]) for item in mails.taken} == {"me@example.org"}


async def test_job_files_choose_their_own_occasions(
    grid: LiveGrid, hooks: Hooks, tmp_path: Path
) -> None:
    bench = NotifyBench(grid, tmp_path, Deliverer(secret=SECRET), Notify())
    notify = Notify((hooks.url,), (Occasion.BEGIN, Occasion.END))
    async with bench.running():
        [loud, silent] = await grid.submit(2, name=f"two {tmp_path.name}")
        definition = bytes((await grid.contracts.scheduler.get_job(loud)).definition).hex()
        with await open_wallet_store(grid.w3, grid.deployment, bench.customer, tmp_path) as wallet:
            remember_notify(wallet, [definition], notify)
        await grid.run([loud, silent])
        await until(lambda: bool(hooks.posted))
        await grid.send(grid.customers[0], grid.contracts.scheduler.cancel([loud, silent]))
        await until(lambda: len(hooks.posted) == 2)
    assert [(e["type"], e["job"]["id"]) for e in hooks.posted] == [
        ("job.running", loud),
        ("job.cancelled", loud),
    ]


class HangingDeliverer(Deliverer):
    """A deliverer whose deliveries never end."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = 0

    async def send(self, delivery: Delivery) -> DeliveryResult:
        self.begun += 1
        return await asyncio.get_running_loop().create_future()


async def test_a_delivery_interrupted_by_a_crash_is_not_sent_again(
    grid: LiveGrid, hooks: Hooks, tmp_path: Path
) -> None:
    stuck = HangingDeliverer()
    bench = NotifyBench(grid, tmp_path, stuck, Notify((hooks.url,)))
    async with bench.running(crashes=True):
        job_id = await bench.cancel()
        await until(lambda: stuck.begun == 1)
        assert bench.states(job_id) == Counter({("http", "sending"): 1})

    bench.deliverer = Deliverer(secret=SECRET)
    async with bench.running():
        other = await bench.cancel()
        await until(lambda: bench.states(other)["http", "sent"] == 1)
    assert bench.states(job_id) == Counter({("http", "unknown"): 1})
    assert hooks.seen(job_id) == []


async def test_a_gateway_notifies_its_customers_once(
    grid: LiveGrid, hooks: Hooks, tmp_path: Path
) -> None:
    alice, bob = grid.customers[:2]

    async def cancelled() -> int:
        [job_id] = await grid.submit(name=f"watched {tmp_path.name}")
        await grid.send(alice, grid.contracts.scheduler.cancel([job_id]))
        return job_id

    definition = (await grid.contracts.scheduler.get_job(await cancelled())).definition.hex()
    requests = (Notify((hooks.url,), (Occasion.FAIL,)), Notify((hooks.url,), (Occasion.END,)))
    settings = {"notify": True, "notify_private": True, "poll_interval": 0.05}
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(grid, tmp_path, **settings))
        alices_client = await stack.enter_async_context(client(grid, url, alice))
        await alices_client.register_notifications([definition], requests, SECRET.decode())
        # Another customer's recipients of the same definition are not those of alice's jobs.
        bobs_client = await stack.enter_async_context(client(grid, url, bob))
        other = Notify((f"{hooks.url}?bob",), (Occasion.ALL,))
        await bobs_client.register_notifications([definition], [other], "")
        first = await cancelled()
        await until(lambda: len(hooks.posted) == 1)

        async def is_listed() -> bool:
            rows = await alices_client.notifications(10)
            return [(row["job_id"], row["state"]) for row in rows] == [(first, "sent")]

        await until(is_listed)
        assert await bobs_client.notifications(10) == []
    # Events while the gateway is down are sent later, and nothing is sent twice.
    second = await cancelled()
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(grid, tmp_path, **settings))
        alices_client = await stack.enter_async_context(client(grid, url, alice))
        await until(lambda: len(hooks.posted) == 2)
    assert [event["job"]["id"] for event in hooks.posted] == [first, second]
