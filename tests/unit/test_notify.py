"""Notifications: job files and settings, their content, and delivery at most once."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from deepsquare_chain.errors import JobFileError, UsageError
from deepsquare_chain.job import JobStatus as S
from deepsquare_chain.notification import (
    DESKTOP,
    JobEvent,
    Notify,
    Occasion,
    parse_occasions,
    parse_target,
    parse_targets,
)
from deepsquare_chain.notify.delivery import Deliverer, DeliveryOutcome
from deepsquare_chain.notify.messages import email, event_id, payload, signature
from deepsquare_chain.notify.service import NotifyService, NotifySettings, own_recipients
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.settings import Settings, load_settings
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.notifications import (
    Delivery,
    DeliveryState,
    NotificationTables,
    remember_notify,
    requested_notify,
)
from deepsquare_chain.workflow import parse_job_file

JOB = """
name: train
timeLimit: 1m
credits: "1"
resources: {tasks: 1, cpusPerTask: 1, memPerCpu: 64}
steps: [{run: {command: "true"}}]
"""
EVENT = JobEvent("evt_1", 7, S.RUNNING, S.FAILED, 40, 1_000)


def body(**changes: Any) -> str:
    values: dict[str, Any] = {
        "customer": "0x" + "11" * 20,
        "provider_id": 2,
        "name": "train",
        "provider": "0x" + "22" * 20,
        "exit_code": 3,
        "reason": "exit code 3",
        "paid": 10**18,
        "refunded": 5 * 10**17,
        "chain_id": 1337,
        "contract": "0x" + "33" * 20,
    }
    return payload(EVENT, **(values | changes))


@pytest.fixture
def store() -> Any:
    with Store.open(None, chain_id=1, contract="0x1", account="0x2") as result:
        yield result


@pytest.mark.parametrize(
    ("occasion", "before", "after", "holds"),
    [
        (Occasion.BEGIN, S.SCHEDULED, S.RUNNING, True),
        (Occasion.BEGIN, S.RUNNING, S.FINISHED, False),
        (Occasion.END, S.RUNNING, S.FINISHED, True),
        (Occasion.END, S.PENDING, S.CANCELLED, True),
        (Occasion.FAIL, S.RUNNING, S.OUT_OF_CREDITS, True),
        (Occasion.FAIL, S.RUNNING, S.CANCELLED, False),
        (Occasion.REQUEUE, S.SCHEDULED, S.PENDING, True),
        (Occasion.REQUEUE, S.NONE, S.PENDING, False),
        (Occasion.ALL, S.SCHEDULED, S.RUNNING, True),
        (Occasion.ALL, S.PENDING, S.META_SCHEDULED, False),
    ],
)
def test_occasions(occasion: Occasion, before: S, after: S, holds: bool) -> None:
    assert Notify(on=(occasion,)).holds(before, after) is holds


def test_targets() -> None:
    assert parse_targets(
        "me@example.org, https://example.org/a,b?c=1,2,mailto:you@example.org"
    ) == (
        "me@example.org",
        "https://example.org/a,b?c=1,2",
        "you@example.org",
    )
    assert parse_targets("") == ()
    for wrong in ("me", "ftp://example.org", "a b@example.org", "me@example.org\nBcc: x@y.org",
                  "http://", "@example.org", "me@a..b"):  # fmt: skip
        with pytest.raises(ValueError, match="must be an e-mail address or the URL"):
            parse_target(wrong)
    with pytest.raises(ValueError, match="at most 10"):
        parse_targets(",".join(f"u{number}@example.org" for number in range(11)))
    with pytest.raises(ValueError, match="begin, end, fail, requeue, all"):
        parse_occasions(["never"])


def test_recipients_are_in_the_job_file_and_not_in_the_definition() -> None:
    text = JOB + "notify: {to: [me@example.org, 'https://example.org/hook'], on: [begin, fail]}\n"
    job_file = parse_job_file(text.encode())
    assert job_file.notify == Notify(
        ("me@example.org", "https://example.org/hook"), (Occasion.BEGIN, Occasion.FAIL)
    )
    assert b"example.org" not in job_file.definition.to_bytes()
    assert job_file.definition.digest == parse_job_file(JOB.encode()).definition.digest
    for wrong, message in (
        ("notify: {to: [nobody]}", "must be an e-mail address"),
        ("notify: {to: [desktop]}", "must be an e-mail address"),
        ("notify: {to: [me@example.org], on: [never]}", "must be begin, end"),
        ("notify: {to: []}", "notify.to"),
        ("notify: {on: [end]}", "notify.to"),
    ):
        with pytest.raises(JobFileError, match=message):
            parse_job_file((JOB + wrong + "\n").encode())


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = tmp_path / ".deepsquare.toml"
    file.write_text('notify_to = ["me@example.org"]\nsmtp = "smtp://me@mail.example.org"\n')
    settings = load_settings(project_dir=tmp_path)
    assert (settings.notify_to, settings.notify_on) == ("me@example.org", "end")
    for line, message in (
        ('smtp = "smtp://me:secret@mail.example.org"', "must not contain a password"),
        ('smtp = "mail.example.org"', "must be a mail server"),
        ('notify_to = "nobody"', "must be an e-mail address"),
        ('notify_on = "never"', "must be any of begin"),
    ):
        file.write_text(line + "\n")
        with pytest.raises(UsageError, match=message) as error_info:
            load_settings(project_dir=tmp_path)
        assert "secret" not in error_info.value.message


@pytest.mark.parametrize(
    ("code", "verdict"), [(0, DeliveryOutcome.ARRIVED), (1, DeliveryOutcome.REFUSED)]
)
async def test_a_notification_on_the_desktop_is_an_argument_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, verdict: DeliveryOutcome
) -> None:
    program, output_file = tmp_path / "notify-send", tmp_path / "seen"
    program.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {output_file}\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    name, reason = "--icon=$(touch x)", "<b>`id`</b>\x1b"
    delivery = Delivery("evt_1", DESKTOP, body(name=name, reason=reason))
    assert (await Deliverer().send(delivery)).verdict is verdict
    *options, separator, title, text, _ = output_file.read_text().split("\0")
    assert (options, separator) == (["--app-name=DeepSquare"], "--")
    assert title == "Job 7 (--icon=$(touch x)): FAILED"
    assert "Reason: &lt;b&gt;`id`&lt;/b&gt;\\x1b\n" in text


async def test_a_machine_without_a_desktop_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = await Deliverer().send(Delivery("evt_1", DESKTOP, body()))
    assert result.verdict is DeliveryOutcome.REFUSED_FOR_GOOD
    assert "notify-send can't be run" in result.note


def test_the_desktop_is_notified_by_setting_only() -> None:
    assert own_recipients(Settings()).to == ()
    settings = Settings(notify_to="me@example.org", notify_desktop=True, notify_on="fail,begin")
    assert own_recipients(settings) == Notify(
        ("me@example.org", DESKTOP), (Occasion.FAIL, Occasion.BEGIN)
    )


def test_the_json_of_a_webhook() -> None:
    assert json.loads(body()) == {
        "id": "evt_1",
        "type": "job.failed",
        "time": 1_000,
        "chain_id": 1337,
        "contract": "0x" + "33" * 20,
        "block": 40,
        "job": {
            "id": 7,
            "name": "train",
            "status": "FAILED",
            "previous_status": "RUNNING",
            "customer": "0x" + "11" * 20,
            "provider_id": 2,
            "provider": "0x" + "22" * 20,
            "exit_code": 3,
            "reason": "exit code 3",
            "paid": str(10**18),
            "refunded": str(5 * 10**17),
        },
    }
    digest = hmac.new(b"key", b"1700000000." + body().encode(), hashlib.sha256).hexdigest()
    assert signature(b"key", body().encode(), 1_700_000_000) == f"t=1700000000,v1={digest}"


def test_an_event_is_the_same_in_another_block() -> None:
    first = event_id(1, "0xAB", 7, S.FAILED, "0x01")
    assert first == event_id(1, "0xab", 7, S.FAILED, "0x01")
    assert first != event_id(1, "0xab", 7, S.FAILED, "0x02")
    assert first != event_id(1, "0xab", 8, S.FAILED, "0x01")


def test_an_email_is_plain_text_whatever_the_job_is_called() -> None:
    message = email(
        json.loads(body(name="a\r\nBcc: all@example.org")), "grid@example.org", "me@x.org"
    )
    assert message["Subject"] == r"Job 7 (a\r\nBcc: all@example.org): FAILED"
    assert message["Bcc"] is None
    assert (message["From"], message["To"]) == ("grid@example.org", "me@x.org")
    assert message["Message-ID"] == "<evt_1@example.org>"
    text = message.get_content()
    for line in ("Exit code: 3", "Paid: 1 credit", "Refunded: 0.5 credits",
                 "deepsquare job logs 7"):  # fmt: skip
        assert line in text.splitlines()


def test_requests_of_a_wallet_are_stored_by_definition(store: Store) -> None:
    expected = Notify(("me@example.org",), (Occasion.ALL,))
    remember_notify(store, ["aa", "bb", "aa"], expected)
    assert requested_notify(store, "aa") == requested_notify(store, "bb") == expected
    remember_notify(store, ["aa"], Notify())
    assert requested_notify(store, "aa") == Notify()
    assert requested_notify(store, "bb") == expected


def test_an_event_and_a_delivery_are_kept_once(store: Store) -> None:
    tables = NotificationTables(store)
    for _ in range(2):
        with store.begin() as transaction:
            tables.add(transaction, [EVENT])
    assert tables.open_events() == [EVENT]
    tables.plan(EVENT.id, [Delivery(EVENT.id, "me@example.org", "{}")])
    assert tables.open_events() == []
    with store.begin() as transaction:  # after a reorganisation
        tables.add(transaction, [EVENT])
    assert tables.open_events() == []
    [due] = tables.due(0, 10)
    tables.begin(due)
    assert tables.due(10**10, 10) == []
    assert tables.give_up_unclear() == 1
    assert tables.due(10**10, 10) == []
    [(event, delivery)] = tables.latest(5)
    assert (event, delivery.state, delivery.attempts) == (EVENT, DeliveryState.UNKNOWN, 1)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "::1", "fd00::1", "::ffff:10.0.0.1"],
)
async def test_customers_can_not_reach_private_addresses(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    requests = _resolving(monkeypatch, ["93.184.216.34", address])
    result = await Deliverer(public_only=True).send(
        Delivery("evt_1", "https://hooks.example.org:8443/a?b=c", body())
    )
    assert result.verdict is DeliveryOutcome.REFUSED_FOR_GOOD
    assert result.note == "its address is not public"
    assert requests == []


async def test_a_webhook_goes_to_the_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = _resolving(monkeypatch, ["93.184.216.34"])
    delivery = Delivery("evt_1", "https://hooks.example.org:8443/a?b=c", body())
    assert (await Deliverer(public_only=True).send(delivery)).verdict is DeliveryOutcome.ARRIVED
    [request] = requests
    assert str(request.url) == "https://93.184.216.34:8443/a?b=c"
    assert request.headers["host"] == "hooks.example.org:8443"
    assert request.extensions["sni_hostname"] == "hooks.example.org"
    # Without a gateway a person chooses the recipients, and the name is resolved as usual.
    assert (await Deliverer().send(delivery)).verdict is DeliveryOutcome.ARRIVED
    assert str(requests[1].url) == delivery.target


def _resolving(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> list[httpx2.Request]:
    """Resolve every name to these addresses; return the list of requests."""
    requests: list[httpx2.Request] = []

    def resolve(_host: str, port: int, **_: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, port)) for address in addresses]

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(204)

    monkeypatch.setattr("socket.getaddrinfo", lambda host, port, *_, **__: resolve(host, port))
    monkeypatch.setattr(
        "deepsquare_chain.notify.delivery.http_client",
        lambda *_, **__: httpx2.AsyncClient(transport=httpx2.MockTransport(answer)),
    )
    return requests


def test_notifications_beyond_a_customers_limit_are_recorded_and_not_sent(store: Any) -> None:
    contracts: Any = SimpleNamespace(
        w3=SimpleNamespace(provider=None), scheduler=SimpleNamespace(address="0x" + "33" * 20)
    )
    admitted = iter((True, False))
    service = NotifyService(
        contracts,
        None,
        store,
        requests=lambda _customer, _definition: (),
        deliverer=Deliverer(),
        settings=NotifySettings(state_dir=Path()),
        start_block=1,
        metrics=Metrics("notify"),
        take_quota=lambda _customer: next(admitted),
    )
    notifications = [
        service._planned(EVENT, "0x1", f"http://hook/{number}", "{}") for number in (1, 2)
    ]
    assert [action.state for action in notifications] == [DeliveryState.DUE, DeliveryState.FAILED]
    assert notifications[1].note == "too many notifications of this customer in a day"
    tables = NotificationTables(store)
    with store.begin() as transaction:
        tables.add(transaction, [EVENT])
    tables.plan(EVENT.id, notifications)
    assert [item.target for item in tables.due(2_000, 10)] == ["http://hook/1"]


def test_old_notifications_are_dropped_once_they_are_settled(store: Any) -> None:
    tables = NotificationTables(store)
    with store.begin() as transaction:
        tables.add(transaction, [EVENT])
    deliveries = [Delivery(EVENT.id, target, body()) for target in ("http://a/", "http://b/")]
    tables.plan(EVENT.id, deliveries)
    tables.end(deliveries[0], DeliveryState.SENT)
    assert len(tables.latest(10, customer="0x" + "11" * 20)) == 2
    assert tables.latest(10, customer="0x" + "12" * 20) == []
    tables.drop(EVENT.time)
    assert len(tables.latest(10)) == 2
    tables.drop(EVENT.time + 1)
    assert [delivery.target for _, delivery in tables.latest(10)] == ["http://b/"]
    tables.end(deliveries[1], DeliveryState.UNKNOWN)
    tables.drop(EVENT.time + 1)
    assert tables.latest(10) == []
