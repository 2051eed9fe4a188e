"""Remote endpoints in practice: TLS with several kinds of certificates, proxies, API keys."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.chain.rpc.transport import Transport
from deepsquare_chain.client.gasless import RelayClient
from deepsquare_chain.errors import EndpointError

pytestmark = pytest.mark.integration

Serve = Callable[..., "Node"]


class Node:
    """Answers each request with chain ID 5, and stores request lines and headers."""

    def __init__(self, server: ThreadingHTTPServer, scheme: str) -> None:
        self.port = server.server_port
        self.url = f"{scheme}://localhost:{self.port}"
        self.seen: list[tuple[str, dict[str, str]]] = []


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[ThreadingHTTPServer] = []

    def start(certificate: Path | None = None, status: int = 200) -> Node:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_CONNECT(self) -> None:
                self.send_error(status)

            def do_POST(self) -> None:
                node.seen.append((self.path, dict(self.headers)))
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body = json.dumps(_answers(question)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, certificate.with_suffix(".key"))
            server.socket = context.wrap_socket(server.socket, server_side=True)
        node = Node(server, "http" if certificate is None else "https")
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return node

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _answers(question: Any) -> Any:
    if isinstance(question, list):
        return [_answers(request) for request in question]
    block = {"number": "0x1", "hash": "0x" + "11" * 32, "timestamp": "0x1"}
    result: Any = "0x5" if question["method"] == "eth_chainId" else block
    if question["method"] == "eth_blockNumber":
        result = "0x1"
    return {"jsonrpc": "2.0", "id": question["id"], "result": result}


@pytest.fixture
def certificate(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "localhost", *, days: str = "2") -> Path:
        if shutil.which("openssl") is None:
            pytest.fail("openssl makes the certificates of this test: install it")
        path = tmp_path / f"{name}{days}.pem"
        more = ["-not_before", "20200101000000Z", "-not_after", "20200102000000Z"]
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            f"/CN={name}",
        ]
        command += ["-addext", f"subjectAltName=DNS:{name}", "-out", str(path)]
        command += ["-keyout", str(path.with_suffix(".key"))]
        command += ["-days", days] if days != "past" else more
        subprocess.run(command, capture_output=True, check=True)
        return path

    return make


async def chain_of(url: str, **options: Any) -> int:
    async with connected(url, attempts=1, **options) as w3:
        return int(await w3.eth.chain_id)


async def test_an_untrusted_certificate_is_reported_and_accepted_once_configured(
    serve: Serve, certificate: Callable[..., Path]
) -> None:
    path = certificate()
    node = serve(path)
    with pytest.raises(EndpointError, match="certificate was not accepted: self-signed") as error:
        await chain_of(node.url)
    assert "--ca-file" in error.value.hint
    assert await chain_of(node.url, transport=Transport(path)) == 5


async def test_a_certificate_of_another_host_is_refused_although_it_is_known(
    serve: Serve, certificate: Callable[..., Path]
) -> None:
    path = certificate("other.example")
    with pytest.raises(EndpointError, match="certificate was not accepted: Hostname mismatch"):
        await chain_of(serve(path).url, transport=Transport(path))


async def test_https_to_a_port_of_http_is_reported(serve: Serve) -> None:
    with pytest.raises(EndpointError, match="does not use TLS: is it an http:// URL"):
        await chain_of(serve().url.replace("http:", "https:"))


async def test_a_remote_endpoint_is_reached_through_the_proxy(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve()
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("http_proxy", proxy.url)
    assert await chain_of("http://node.example:8545/") == 5
    assert {path for path, _ in proxy.seen} == {"http://node.example:8545/"}


async def test_a_relay_is_reached_as_an_endpoint_is(
    serve: Serve, certificate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request through the proxy with the settings' certificates and headers."""

    async def ask(url: str, transport: Transport) -> None:
        async with RelayClient(url, transport) as relay:
            await relay._request("POST", "/v1/requests", {"id": 1, "method": "eth_chainId"})

    path = certificate()
    node = serve(path)
    with pytest.raises(EndpointError, match="certificate was not accepted: self-signed") as error:
        await ask(node.url, Transport())
    assert "--ca-file" in error.value.hint
    await ask(node.url, Transport(path, {"localhost": {"X-Key": "of the relay"}}))
    assert node.seen[-1][1]["X-Key"] == "of the relay"
    proxy = serve()
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("http_proxy", proxy.url)
    await ask("http://relay.example:8546", Transport())
    assert proxy.seen[-1][0] == "http://relay.example:8546/v1/requests"


@pytest.mark.parametrize("status", [403, 407, 502])
async def test_a_proxy_that_refuses_is_named_without_its_password(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    proxy = serve(status=status)
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://me:secret@localhost:{proxy.port}")
    with pytest.raises(EndpointError, match=rf"The proxy http://localhost:{proxy.port}") as error:
        await chain_of("https://node.example")
    assert str(status) in error.value.message
    assert "secret" not in error.value.message + error.value.hint


async def test_keys_go_in_headers_to_their_endpoint_alone(serve: Serve) -> None:
    node, other = serve(), serve()
    headers = {f"localhost:{node.port}": {"X-Api-Key": "abc"}}
    for value in (node, other):
        assert await chain_of(value.url, transport=Transport(headers=headers)) == 5
    assert {value.get("X-Api-Key") for _, value in node.seen} == {"abc"}
    assert {value.get("X-Api-Key") for _, value in other.seen} == {None}
    assert {value["Content-Type"] for _, value in node.seen} == {"application/json"}
