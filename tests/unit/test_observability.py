"""Logs without secrets; metrics exist from the start."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.errors import UsageError
from deepsquare_chain.observability import (
    configure_logging,
    get_logger,
    hide_secret,
    redact_text,
    redaction,
)
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.observability.redaction import HIDDEN, MAX_TEXT, redact

KEY = "59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", set())


def logged(fmt: str, *, level: str = "debug", **fields: Any) -> str:
    stream = io.StringIO()
    configure_logging(level, fmt, stream, service="test")
    get_logger("deepsquare_chain.test").info("something happened", **fields)
    return stream.getvalue()


@pytest.mark.parametrize("fmt", ["json", "console"])
@pytest.mark.parametrize(
    "name",
    [
        "password",
        "Password",
        "keystore_password",
        "passphrase",
        "private_key",
        "privateKey",
        "PRIVATE-KEY",
        "secret",
        "client_secret",
        "mnemonic",
        "seed_phrase",
        "api_key",
        "x-api-key",
        "Authorization",
        "auth_token",
        "pwd",
        "cookies",
    ],
)
def test_secret_fields_are_hidden(fmt: str, name: str) -> None:
    text = logged(fmt, **{name: "hunter2-value"})
    assert "hunter2" not in text
    assert HIDDEN in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key", "31337-5fbdb231-42"),
        ("run_key", "31337-5fbdb231-42"),
        ("password_file", "/home/me/.password"),
        ("keystore", "/home/me/wallet.json"),
        ("passed", "yes"),
        ("tx_hash", "0x" + KEY),
        ("digest", KEY),
    ],
)
def test_useful_fields_stay(name: str, value: object) -> None:
    assert json.loads(logged("json", **{name: value}))[name] == value


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("POST http://alice:hunter2@node:8545/ failed", "hunter2"),
        ("wss://hunter2@node/ws", "hunter2"),
        ("https://:hunter2@[::1]:1/", "hunter2"),
        ("https://mainnet.infura.io/v3/9aa3d95b3bc440fa88ea12eaa4456161", "9aa3d95b"),
        ("https://eth.example/v2/abcDEF123-abcDEF123_xy?x=1", "abcDEF123"),
        ("https://node/?apikey=hunter2&b=2", "hunter2"),
        ("https://node/?b=2&access_token=hunter2", "hunter2"),
        ("password=hunter2 and more", "hunter2"),
        ("{'password': 'hunter2 with blanks', 'a': 1}", "hunter2"),
        ('{"private_key": "hunter2"}', "hunter2"),
        ("PRIVATE KEY: 0xhunter2", "hunter2"),
        ("DEEPSQUARE_PASSWORD=hunter2", "hunter2"),
        ("Authorization: Bearer abcdefhunter2", "hunter2"),
        ("mnemonic: 'test test hunter2'", "hunter2"),
    ],
)
def test_secrets_in_texts_are_hidden(text: str, secret: str) -> None:
    assert secret not in redact_text(text)
    assert HIDDEN in redact_text(text)
    assert secret not in logged("json", error=text)
    assert secret not in logged("console", nested={"list": [RuntimeError(text)]})


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8545/",
        "https://explorer.example/tx/0x" + KEY,
        "wrong password for /home/me/wallet.json",
        "Give DEEPSQUARE_PASSWORD_FILE=/home/me/password",
        "job 42 FINISHED, paid 1.5 credits to 0x70997970C51812dc3A010C7d01b50e0d17dc79C8",
        "mail me@example.org",
    ],
)
def test_harmless_texts_stay(text: str) -> None:
    assert redact_text(text) == text


def test_loaded_secrets_are_hidden_wherever_they_appear() -> None:
    hide_secret("correct horse\n")
    hide_secret(bytes.fromhex(KEY))
    hide_secret("abc")  # too short to be told from ordinary text
    text = logged("json", note=f"x correct horse y 0x{KEY} abc", raw=bytes.fromhex(KEY))
    assert "correct horse" not in text
    assert KEY not in text
    assert "abc" in text


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_tracebacks_show_neither_secrets_nor_local_variables(fmt: str) -> None:
    local_value = "local" + "-treasure"

    def ask() -> None:
        treasure = local_value
        raise RuntimeError(f"no answer from http://u:hunter2@node {len(treasure)}")

    stream = io.StringIO()
    configure_logging("info", fmt, stream)
    try:
        ask()
    except RuntimeError:
        get_logger("x").exception("failed")
    text = stream.getvalue()
    assert "RuntimeError" in text
    assert "hunter2" not in text
    assert local_value not in text


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_standard_logging_uses_the_same_format(fmt: str) -> None:
    stream = io.StringIO()
    configure_logging("info", fmt, stream, service="test")
    logging.getLogger("some.library").warning("GET %s", "http://u:hunter2@node/")
    logging.getLogger("some.library").debug("chatter")
    logging.getLogger("web3.providers").info("chatter")
    text = stream.getvalue()
    assert "some.library" in text
    assert "hunter2" not in text
    assert "chatter" not in text


def test_untrusted_text_can_not_forge_lines_or_control_a_terminal() -> None:
    hostile = "ok\n2026-01-01 [error] forged\r\x1b[2J\x1b]0;title\x07\u202egnp.exe\x9b"
    for fmt in ("json", "console"):
        text = logged(fmt, label=hostile)
        assert text.count("\n") == 1
        assert text.endswith("\n")
        for character in "\r\x1b\x07\u202e\x9b":
            assert character not in text


@given(
    st.text(max_size=200), st.sampled_from(["\n", "\r", "\x1b", "\0", "\x85", "\u2028", "\u202e"])
)
def test_any_text_becomes_one_harmless_line(text: str, character: str) -> None:
    hostile = text[:50] + character + text[50:]
    cleaned = redact(None, "", {"a": hostile, "b": [hostile], "c": {hostile: ValueError(hostile)}})
    cleaned_texts = [cleaned["a"], *cleaned["b"], *cleaned["c"], *cleaned["c"].values()]
    for part in cleaned_texts:
        assert character not in part
        assert "\x1b" not in part


def test_long_and_deep_values_are_bounded() -> None:
    deep: Any = "end"
    for _ in range(50):
        deep = [deep]
    event = redact(None, "", {"long": "x" * 10**6, "deep": deep, "many": list(range(10**5))})
    assert len(event["long"]) < MAX_TEXT + 100
    assert "end" not in str(event["deep"])
    assert len(event["many"]) == 100
    redacted = redact(
        None, "", {"long": "x" * (MAX_TEXT - 4) + " http://u:hunter2@node/" + "y" * 99}
    )
    assert "hunter2" not in redacted["long"]


def test_json_lines_carry_time_level_logger_and_service() -> None:
    line = json.loads(logged("json", job=42, amount=10**30, none=None))
    assert line["event"] == "something happened"
    assert (line["level"], line["service"], line["job"]) == ("info", "test", 42)
    assert (line["logger"], line["amount"]) == ("deepsquare_chain.test", 10**30)
    assert line["timestamp"].endswith("Z")


def test_level_and_format_are_obeyed() -> None:
    assert logged("json", level="warning") == ""
    assert json.loads(logged("auto"))  # no terminal: for machines
    assert "something happened" in logged("console")
    with pytest.raises(UsageError, match="loud"):
        configure_logging("loud")
    with pytest.raises(UsageError, match="xml"):
        configure_logging("info", "xml")


def test_configuring_twice_logs_once() -> None:
    stream = io.StringIO()
    for _ in range(2):
        configure_logging("info", "json", stream)
    get_logger("x").info("once")
    assert stream.getvalue().count("once") == 1


# -- metrics


def test_metrics_exist_from_the_start() -> None:
    metrics = Metrics("provider")
    jobs = metrics.counter("jobs", "Jobs by result.", end=("finished", "failed"))
    running = metrics.gauge("running", "Running jobs.")
    took = metrics.histogram("claim_seconds", "Event to claim.")
    assert metrics.value("jobs_total", end="failed") == 0
    metrics.add(jobs, "finished")
    metrics.add(jobs, "finished", amount=2)
    running.set(4)
    took.observe(0.3)
    assert metrics.value("jobs_total", end="finished") == 3
    assert metrics.value("running") == 4
    assert metrics.value("claim_seconds_count") == 1
    assert metrics.value("nothing") is None
    text = metrics.render().decode()
    assert 'deepsquare_jobs_total{end="failed",service="provider"} 0.0' in text


def test_two_services_in_one_process_have_separate_metrics() -> None:
    first, second = Metrics("a"), Metrics("b")
    first.gauge("x", "X.").set(1)
    second.gauge("x", "X.").set(2)
    assert (first.value("x"), second.value("x")) == (1, 2)
