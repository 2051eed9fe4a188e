"""Transport to remote addresses: proxies of the environment, headers, messages for TLS errors."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from deepsquare_chain.chain.rpc.endpoint import CheckedProvider
from deepsquare_chain.chain.rpc.transport import Transport, proxy_for, tls_problem
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.observability.redaction import redact_text

PROXY = "http://proxy.example:3128"
REMOTE = "http://node.example:8545"


@pytest.fixture(autouse=True)
def _no_proxy_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "request_method"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("variable", "url", "proxied"),
    [
        ("HTTP_PROXY", REMOTE, True),
        ("http_proxy", REMOTE, True),
        ("HTTPS_PROXY", REMOTE, False),
        ("HTTPS_PROXY", "https://node.example/key", True),
        ("https_proxy", "wss://node.example", True),
        ("HTTP_PROXY", "ws://10.1.2.3:8546", True),
        ("ALL_PROXY", "https://node.example", True),
        ("ALL_PROXY", REMOTE, True),
    ],
)
def test_remote_addresses_go_through_the_proxy(
    variable: str, url: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, PROXY)
    assert proxy_for(url) == (PROXY if proxied else None)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.9.9.9", "localhost", "LOCALHOST", "localhost.", "a.localhost", "[::1]",
     "[::]", "[::ffff:127.0.0.1]"],
)  # fmt: skip
def test_loopback_never_does(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", PROXY)
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    assert proxy_for(f"http://{host}:8545") is None
    assert proxy_for(f"ws://{host}:8546") is None


@pytest.mark.parametrize(
    ("exceptions", "excepted"),
    [
        ("node.example", True),
        (".example", True),
        ("*.example", True),
        ("other.example, node.example", True),
        ("NODE.EXAMPLE", True),
        ("node.example:8545", True),
        ("node.example:9", False),
        ("node.example.", True),
        ("[fd00::5]:8545", False),
        ("*", True),
        ("ode.example", False),
        ("10.0.0.0/8", False),
        ("", False),
        (" , ", False),
    ],
)
def test_exempt_hosts_are_reached_without_the_proxy(
    exceptions: str, excepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", exceptions)
    assert (proxy_for(REMOTE) is None) is excepted


@pytest.mark.parametrize(
    ("exceptions", "url"),
    [("10.0.0.0/8", "http://10.1.2.3"), ("10.1.2.3", "http://10.1.2.3"),
     ("fd00::/8", "http://[fd00::5]"), ("[fd00::5]", "http://[fd00::5]"),
     ("[fd00::5]:8545", "http://[fd00::5]:8545"), ("fd00:0::5", "http://[fd00::5]"),
     ("10.1.2.3:80", "http://10.1.2.3")],
)  # fmt: skip
def test_exceptions_may_be_networks(
    exceptions: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    assert proxy_for(url) == PROXY
    monkeypatch.setenv("NO_PROXY", exceptions)
    assert proxy_for(url) is None


def test_a_proxy_without_a_scheme_is_an_http_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "proxy.example:3128")
    assert proxy_for(REMOTE) == PROXY


@pytest.mark.parametrize("proxy", ["socks5://user:secret@proxy:1080", "http://", "http://x:99999"])
def test_a_proxy_that_can_not_be_used_is_named_without_its_password(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(UsageError, match="of the environment is not valid") as error:
        CheckedProvider(REMOTE)
    assert "secret" not in error.value.message + error.value.hint
    CheckedProvider("http://127.0.0.1:1")  # which needs none


def headers_file(tmp_path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "headers.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


KEYS = (
    '\ufeff["node.example"]\nAuthorization = "Bearer abcdef0123"\n["node.example:9000"]\nx = "y"\n'
)


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("https://node.example/v1", {"Authorization"}),
        ("https://NODE.example", {"Authorization"}),
        ("wss://node.example:9000", {"Authorization", "x"}),
        ("https://node.example.org", set()),
        ("https://other.example", set()),
    ],
)
def test_headers_go_to_their_own_host_alone(tmp_path: Path, url: str, names: set[str]) -> None:
    transport = Transport.read(None, headers_file(tmp_path, KEYS))
    assert set(transport.headers_for(url)) == names
    assert "abcdef0123" not in repr(transport)
    assert "abcdef0123" not in redact_text("sent abcdef0123 to it")


@pytest.mark.parametrize(
    "text",
    ["x = 5", '["h"]\nx = 5', '["h"]\n"a b" = "x"', '["h"]\nx = "a\\nb"', '["h"]\nHost = "x"', "[",
     b"\xff"],
)  # fmt: skip
def test_invalid_headers_are_refused_without_quoting_them(
    tmp_path: Path, text: str | bytes
) -> None:
    with pytest.raises(UsageError, match=r"headers.toml is not a headers file") as error:
        Transport.read(None, headers_file(tmp_path, text))
    assert "node.example" in error.value.hint


def test_headers_that_others_can_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is readable by other users"):
        Transport.read(None, headers_file(tmp_path, KEYS, 0o644))
    with pytest.raises(NotFoundError):
        Transport.read(None, tmp_path / "none")


@pytest.mark.parametrize("text", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nx"])
def test_a_file_without_certificates_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "ca.pem").write_text(text)
    with pytest.raises(UsageError, match=r"ca.pem does not contain certificates"):
        Transport.read(tmp_path / "ca.pem", None)
    with pytest.raises(NotFoundError):
        Transport.read(tmp_path / "none", None)


def refused(message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = message
    return error


def test_reasons_are_described_in_words_at_any_depth() -> None:
    for message in ("self-signed certificate", "certificate has expired"):
        outer = OSError(1, "operation not permitted")
        outer.__cause__ = refused(message)
        assert tls_problem(outer) == f"its certificate was not accepted: {message}"
    plain = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
    plain.reason = "WRONG_VERSION_NUMBER"
    assert "it does not use TLS" in tls_problem(plain)
    assert tls_problem(ConnectionRefusedError(111, "refused")) == ""
