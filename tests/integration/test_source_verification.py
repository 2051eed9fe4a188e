"""Sources of a live deployment match its code, and a verifier receives all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from eth_typing import HexStr

from deepsquare_chain.chain.bindings.abi import CONTRACTS, ipfs_hash, metadata_hash
from deepsquare_chain.chain.deploying import verify_deployment
from deepsquare_chain.client.deploy import submit_blockscout, submit_sourcify, write_tree
from tests.support.livegrid import LiveGrid
from tests.unit.test_source_verification import GRID, Stub


@contextmanager
def served(stub: Stub) -> Iterator[str]:
    """A stub of a verifier, on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            size = int(self.headers.get("content-length", 0))
            url = f"http://127.0.0.1{self.path}"
            content = self.rfile.read(size)
            request = httpx2.Request(
                self.command, url, headers=dict(self.headers.items()), content=content
            )
            try:
                response = stub(request)
            except AssertionError as error:
                response = httpx2.Response(400, json={"message": f"schema: {error}"})
            self.send_response(response.status_code)
            self.send_header("content-length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)

        do_GET = do_POST = answer  # noqa: N815 - names of the standard library

        def log_message(self, *_: object) -> None:
            """Suppress the log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.mark.parametrize("kind", ["sourcify", "blockscout"])
async def test_a_verifier_on_loopback_gets_the_fields_of_its_schema(kind: str) -> None:
    stub = Stub()
    with served(stub) as url:
        if kind == "sourcify":
            result = await submit_sourcify(f"{url}/server", GRID, pause=0.01)
        else:
            result = await submit_blockscout(url, GRID, pause=0.01)
    assert [(item.name, item.ok, item.detail) for item in result if not item.ok] == []
    assert len(result) == len(CONTRACTS)
    assert sum(request.method == "POST" for request in stub.asked) == len(CONTRACTS)


async def test_the_deployed_code_names_the_metadata(grid: LiveGrid, tmp_path: Path) -> None:
    await asyncio.to_thread(write_tree, grid.deployment, tmp_path)
    root = tmp_path / "contracts" / "full_match" / str(grid.deployment.chain_id)
    result = set()
    for folder in root.iterdir():
        code = bytes(await grid.w3.eth.get_code(folder.name))  # type: ignore[arg-type]
        metadata = (folder / "metadata.json").read_bytes()
        assert ipfs_hash(metadata) == metadata_hash(code)
        # What a verifier compiles and runs is the transaction that made the contract.
        tx_hash = HexStr((folder / "creator-tx-hash.txt").read_text())
        transaction = await grid.w3.eth.get_transaction(tx_hash)
        arguments = (folder / "constructor-args.txt").read_text().removeprefix("0x")
        assert bytes(transaction["input"]).hex().endswith(arguments)
        result.add(folder.name)
    assert result == set(grid.deployment.contracts.values())
    looked_at = await verify_deployment(grid.w3, grid.deployment)
    assert [item for item in looked_at if item.subject.startswith("metadata of") and item.ok] != []
    assert all(item.ok for item in looked_at)
