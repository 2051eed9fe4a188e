"""A reference server for the protocols of external signers: web3signer and clef."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from eth_account.messages import encode_defunct, encode_typed_data
from eth_account.signers.local import LocalAccount

_TRANSACTION = (
    "to",
    "data",
    "nonce",
    "value",
    "gas",
    "maxFeePerGas",
    "maxPriorityFeePerGas",
    "chainId",
)


class ReferenceSigner:
    """Answers JSON-RPC requests with one key; `methods` lists the called methods."""

    def __init__(self, account: LocalAccount, *, clef: bool = False) -> None:
        self.account = account
        self.methods: list[str] = []
        #: Modifies results, to simulate a broken or malicious signer.
        self.bend: Callable[[str, Any], Any] = lambda _method, answer: answer
        web3signer_methods: dict[str, Callable[..., Any]] = {
            "eth_accounts": lambda: [account.address.lower()],
            "eth_signTransaction": lambda tx: self._transaction(tx)[0],
            "eth_sign": lambda _address, data: self._text(data),
            "eth_signTypedData": lambda _address, data: self._typed(data),
        }
        clef_methods: dict[str, Callable[..., Any]] = {
            "account_list": lambda: [account.address],
            "account_signTransaction": lambda tx: dict(
                zip(("raw", "tx"), self._transaction(tx), strict=True)
            ),
            "account_signData": lambda _kind, _address, data: self._text(data),
            "account_signTypedData": lambda _address, data: self._typed(data),
        }
        self._methods = clef_methods if clef else web3signer_methods

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the response to one JSON-RPC request."""
        method = request["method"]
        self.methods.append(method)
        body = {"jsonrpc": "2.0", "id": request["id"]}
        if method not in self._methods:
            return {**body, "error": {"code": -32601, "message": f"no method {method}"}}
        return {**body, "result": self.bend(method, self._methods[method](*request["params"]))}

    def _transaction(self, tx: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        assert tx["from"] == self.account.address
        fields = {name: tx[name] for name in _TRANSACTION if name in tx}
        signed = self.account.sign_transaction({"type": 2, **fields})
        return "0x" + bytes(signed.raw_transaction).hex(), tx

    def _text(self, data: str) -> str:
        signed = self.account.sign_message(encode_defunct(hexstr=data))
        return "0x" + bytes(signed.signature).hex()

    def _typed(self, data: dict[str, Any]) -> str:
        signed = self.account.sign_message(encode_typed_data(full_message=data))
        return "0x" + bytes(signed.signature).hex()


@contextmanager
def serving(signer: ReferenceSigner) -> Iterator[str]:
    """Serve the signer on a free loopback port, and yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            body = json.dumps(signer.answer(json.loads(self.rfile.read(length)))).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
