"""Source verification: the Sourcify format, and requests to Sourcify and Blockscout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any

import httpx2
import pytest
from eth_utils import keccak, to_checksum_address

from deepsquare_chain.chain.bindings.abi import (
    CONTRACTS,
    base58,
    interface,
    ipfs_hash,
    load_artifact,
    metadata_hash,
    sources_of,
    standard_input,
)
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.client import deploy
from deepsquare_chain.client.deploy import (
    SourceSubmission,
    sources,
    submit_blockscout,
    submit_sourcify,
    write_tree,
)
from deepsquare_chain.errors import EndpointError, UsageError

CLIENT: Callable[..., httpx2.AsyncClient] = httpx2.AsyncClient
ADMIN, CREDIT, REGISTRY, SCHEDULER = ("0x" + digit * 40 for digit in "abcd")
TREASURY = "0x" + "e" * 40
FORWARDER = "0x" + "f" * 40
TIMES = [300, 600, 86_400, 300, 10, 1_800, 3_600, 60, 21_600]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "Credit": {"admin": ADMIN, "adminDelay": 5},
    "ProviderRegistry": {"admin": ADMIN, "adminDelay": 5, "approvalPeriod": 9_000},
    "MetaScheduler": {
        "timeouts": TIMES,
        "admin": ADMIN,
        "adminDelay": 5,
        "credit": CREDIT,
        "registry": REGISTRY,
        "treasury": TREASURY,
        "forwarder": FORWARDER,
        "feeBps": 500,
    },
    "ERC2771Forwarder": {"name": "DeepSquare"},
}
GRID = Deployment(
    *(31_337, CREDIT, REGISTRY, SCHEDULER, TREASURY, FORWARDER, 1),
    transactions={name: "0x" + f"{at:064x}" for at, name in enumerate(CONTRACTS)},
    constructor_args=ARGUMENTS,
)


def source_of(name: str) -> str:
    """Return the source file of a contract."""
    path = f"contracts/{name}.sol"
    return f"@openzeppelin/contracts/metatx/{name}.sol" if name == "ERC2771Forwarder" else path


class TestMetadata:
    @pytest.mark.parametrize("name", CONTRACTS)
    def test_the_code_ends_with_the_hash_of_the_metadata(self, name: str) -> None:
        artifact = load_artifact(name)
        result = ipfs_hash(artifact.metadata.encode())
        assert metadata_hash(artifact.deployed_bytecode) == result
        assert result.startswith("Qm")
        assert ipfs_hash(artifact.metadata.encode() + b" ") != result

    def test_hashes_that_ipfs_itself_gives(self) -> None:
        # Well-known hashes: `ipfs add` of an empty file and of "hello world\n".
        assert ipfs_hash(b"") == "QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH"
        assert ipfs_hash(b"hello world\n") == "QmT78zSuBmuS4z925WZfrqQ1qHaJ56DQaTfyMUF7F8ff5o"
        with pytest.raises(ValueError, match="more than one block"):
            ipfs_hash(bytes(262_145))

    def test_base58(self) -> None:
        assert base58(b"\0\0a") == "112g"

    @pytest.mark.parametrize("code", [b"", b"\0", b"\xff\xff", bytes(100), b"\x60\x80\x00\x01"])
    def test_code_without_a_trailer(self, code: bytes) -> None:
        assert metadata_hash(code) == ""

    @pytest.mark.parametrize("name", CONTRACTS)
    def test_every_source_is_the_one_that_was_compiled(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = sources_of(name)
        source = source_of(name)
        assert source in result
        changed = json.loads(json.dumps(standard_input()))
        changed["sources"][source]["content"] += " "
        monkeypatch.setattr("deepsquare_chain.chain.bindings.abi.standard_input", lambda: changed)
        with pytest.raises(ValueError, match=f"the source {source} is not the source"):
            sources_of(name)

    def test_the_input_is_the_one_that_artifacts_name(self) -> None:
        raw = json.dumps(standard_input(), sort_keys=True).encode()
        assert hashlib.sha256(raw).hexdigest() == load_artifact("Credit").input_digest


class TestTree:
    def test_it_has_the_format_of_sourcify(self, tmp_path: Path) -> None:
        files = write_tree(GRID, tmp_path)
        assert files == sorted(path for path in tmp_path.rglob("*") if path.is_file())
        for name, address in GRID.contracts.items():
            root = tmp_path / "contracts/full_match/31337" / to_checksum_address(address)
            raw = (root / "metadata.json").read_bytes()
            assert ipfs_hash(raw) == metadata_hash(load_artifact(name).deployed_bytecode)
            stated = json.loads(raw)["sources"]
            for path, entry in stated.items():
                content = (root / "sources" / path).read_bytes()
                assert "0x" + keccak(content).hex() == entry["keccak256"]
            written = [p for p in (root / "sources").rglob("*") if p.is_file()]
            assert len(written) == len(stated)
            compiler_input = json.loads((tmp_path / f"{name}.input.json").read_text())
            assert compiler_input == standard_input()
            assert (root / "creator-tx-hash.txt").read_text() == GRID.transactions[name]

    def test_arguments_are_those_of_the_constructor(self, tmp_path: Path) -> None:
        for source in sources(GRID):
            recorded = ARGUMENTS[source.name]
            inputs = interface(source.name).entries("constructor")[0]["inputs"]
            values = [recorded[part["name"].rstrip("_")] for part in inputs]
            decoded = [tuple(item) if isinstance(item, list) else item for item in values]
            code = interface(source.name).creation_code(*decoded)
            assert load_artifact(source.name).bytecode + source.arguments == code
            assert len(source.arguments) >= 64

    def test_a_record_without_arguments(self, tmp_path: Path) -> None:
        bare = dataclasses.replace(GRID, constructor_args={"Credit": {}}, transactions={})
        assert {source.arguments for source in sources(bare)} == {b""}
        write_tree(bare, tmp_path)
        assert not list(tmp_path.rglob("constructor-args.txt"))
        assert not list(tmp_path.rglob("creator-tx-hash.txt"))

    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="can't be written"):
            write_tree(GRID, tmp_path / "file")


class Stub:
    """A verifier that checks the schema of each request; `outcome` selects its responses."""

    def __init__(self, outcome: str = "ok") -> None:
        self.outcome = outcome
        self.asked: list[httpx2.Request] = []
        self.looks = 0
        self.accepted: set[str] = set()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        if self.outcome == "down":
            raise httpx2.ConnectError("refused")
        if self.outcome == "broken":
            return httpx2.Response(502, text="<html>")
        path = request.url.path
        handler = self.sourcify if path.startswith("/server/v2/") else self.blockscout
        return handler(request, path)

    def sourcify(self, request: httpx2.Request, path: str) -> httpx2.Response:
        if request.method == "GET":
            assert path == "/server/v2/verify/3c90c3cc-0d44-4b50-8888-8dd25736052a"
            self.looks += 1
            if self.looks % 2:
                return httpx2.Response(200, json={"isJobCompleted": False})
            if self.outcome == "mismatch":
                error = {"customCode": "no_match", "message": "The bytecodes do not match"}
                body = {"isJobCompleted": True, "contract": {"match": None}, "error": error}
                return httpx2.Response(200, json=body)
            body = {"isJobCompleted": True, "contract": {"match": "exact_match"}}
            return httpx2.Response(200, json=body)
        assert request.headers["content-type"] == "application/json"
        *_, chain, address = path.split("/")
        assert (path.split("/")[3], chain) == ("verify", "31337")
        assert address == to_checksum_address(address)
        body = json.loads(request.content)
        assert set(body) == {
            *("stdJsonInput", "compilerVersion", "contractIdentifier", "creationTransactionHash"),
        }
        name = body["contractIdentifier"].partition(":")[2]
        assert body["contractIdentifier"] == f"{source_of(name)}:{name}"
        assert body["compilerVersion"] == "0.8.37+commit.f401782d"
        assert body["stdJsonInput"]["language"] == "Solidity"
        assert all(
            set(source) == {"content"} for source in body["stdJsonInput"]["sources"].values()
        )
        assert body["creationTransactionHash"] == GRID.transactions[name]
        if self.outcome == "known":
            return httpx2.Response(409, json={"customCode": "already_verified", "message": "known"})
        if self.outcome == "strange":
            return httpx2.Response(200, json=["what"])
        if self.outcome == "path":
            return httpx2.Response(202, json={"verificationId": "../../admin"})
        return httpx2.Response(202, json={"verificationId": "3c90c3cc-0d44-4b50-8888-8dd25736052a"})

    def blockscout(self, request: httpx2.Request, path: str) -> httpx2.Response:
        address = path.split("/")[4]
        assert path.startswith(f"/api/v2/smart-contracts/{to_checksum_address(address)}")
        if request.method == "GET":
            self.looks += 1
            is_verified = self.outcome == "known" or (
                address in self.accepted and self.looks % 2 == 0
            )
            body = {"is_verified": is_verified} if self.outcome != "strange" else [1]
            return httpx2.Response(200 if is_verified else 404, json=body)
        assert path.endswith("/verification/via/standard-input")
        form = parts(request)
        name = form["contract_name"].decode()
        assert set(form) == {
            *("compiler_version", "contract_name", "license_type", "constructor_args"),
            *("autodetect_constructor_args", "files[0]"),
        }
        assert form["compiler_version"] == b"v0.8.37+commit.f401782d"
        assert form["autodetect_constructor_args"] == b"false"
        [source] = [source for source in sources(GRID) if source.name == name]
        assert bytes.fromhex(form["constructor_args"].decode()) == source.arguments
        assert json.loads(form["files[0]"]) == standard_input()
        if self.outcome == "mismatch":
            return httpx2.Response(422, json={"message": "Invalid params"})
        self.accepted.add(address)
        return httpx2.Response(200, json={"message": "Smart-contract verification started"})


def parts(request: httpx2.Request) -> dict[str, bytes]:
    """Return the fields of a multipart form."""
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + request.content)
    return {
        part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
        for part in message.iter_parts()
    }


async def submitted(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, kind: str
) -> list[SourceSubmission]:
    monkeypatch.setattr(
        deploy.httpx2,
        "AsyncClient",
        lambda **options: CLIENT(**options | {"transport": httpx2.MockTransport(stub)}),
    )
    if kind == "sourcify":
        return await submit_sourcify("http://127.0.0.1:5555/server/", GRID, pause=0)
    return await submit_blockscout("http://127.0.0.1:4000", GRID, pause=0)


@pytest.mark.parametrize("kind", ["sourcify", "blockscout"])
@pytest.mark.parametrize(
    ("outcome", "ok", "detail"),
    [
        ("ok", True, "exact_match verified"),
        ("known", True, "it is verified already"),
        ("mismatch", False, "HTTP status 200: The bytecodes do not match 422: Invalid params"),
    ],
)
async def test_results_of_a_submission(
    monkeypatch: pytest.MonkeyPatch, kind: str, outcome: str, ok: bool, detail: str
) -> None:
    result = await submitted(Stub(outcome), monkeypatch, kind)
    assert [(item.name, item.address, item.ok) for item in result] == [
        (name, to_checksum_address(address), ok) for name, address in GRID.contracts.items()
    ]
    for item in result:
        assert item.verifier == kind
        assert set(item.detail.split()) <= set(detail.split())


@pytest.mark.parametrize("kind", ["sourcify", "blockscout"])
@pytest.mark.parametrize("outcome", ["down", "broken"])
async def test_a_verifier_that_fails_is_reported(
    monkeypatch: pytest.MonkeyPatch, kind: str, outcome: str
) -> None:
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1"):
        await submitted(Stub(outcome), monkeypatch, kind)


async def test_answers_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    result = await submitted(Stub("strange"), monkeypatch, "sourcify")
    assert {(item.ok, item.detail) for item in result} == {(False, "HTTP status 200")}
    with pytest.raises(EndpointError, match="invalid verification ID"):
        await submitted(Stub("path"), monkeypatch, "sourcify")


async def test_a_verifier_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "_MAX_POLLS", 1)
    result = await submitted(Stub(), monkeypatch, "sourcify")
    assert (result[0].ok, result[0].detail) == (False, "it is still being verified")
    result = await submitted(Stub("strange"), monkeypatch, "blockscout")
    assert (result[0].ok, result[0].detail) == (False, "it is not shown as verified")


async def test_an_invalid_address() -> None:
    with pytest.raises(UsageError, match="not an http:// or https:// URL"):
        await submit_sourcify("ftp://example.org", GRID)
