"""Sources of a deployment for other explorers: as files that they read, and sent to their APIs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pydantic_core
from eth_utils.address import to_checksum_address

from deepsquare_chain.chain.bindings.abi import interface
from deepsquare_chain.chain.bindings.artifacts import load_artifact, standard_input
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.metadata import metadata_of, sources_of
from deepsquare_chain.chain.rpc.transport import Transport, proxy_for, tls_problem
from deepsquare_chain.errors import EndpointError, UsageError
from deepsquare_chain.settings import safe_url

_TIMEOUT: Final = 30.0
#: How long a verifier may compile: pauses in seconds between looks, and how many looks.
_PAUSE: Final = 2.0
_LOOKS: Final = 60


@dataclass(frozen=True, slots=True)
class Source:
    """One deployed contract with all that a verifier asks for.

    `identifier` is source and name as compilers write them, `arguments` are the constructor's,
    encoded; both they and `transaction` are empty where the deployment record lacks them.
    """

    name: str
    address: str
    identifier: str
    compiler: str
    arguments: bytes
    transaction: str


@dataclass(frozen=True, slots=True)
class SourceSubmission:
    """What became of one contract at a verifier; `ok` also where it was verified before."""

    verifier: str
    name: str
    address: str
    ok: bool
    detail: str


def sources(deployment: Deployment) -> list[Source]:
    """The contracts of a deployment; there may be no forwarder."""
    found = []
    for name, address in deployment.contracts.items():
        if not int(address, 16):
            continue
        metadata = metadata_of(name)
        ((path, contract),) = metadata["settings"]["compilationTarget"].items()
        found.append(
            Source(
                name,
                to_checksum_address(address),
                f"{path}:{contract}",
                metadata["compiler"]["version"],
                _arguments(deployment, name),
                deployment.transactions.get(name, ""),
            )
        )
    return found


def _arguments(deployment: Deployment, name: str) -> bytes:
    """The constructor's arguments as the chain got them; empty where nobody wrote them down."""
    recorded = deployment.constructor_args.get(name)
    if not isinstance(recorded, Mapping):
        return b""
    inputs = interface(name).entries("constructor")[0]["inputs"]
    try:
        values = [recorded[part["name"].rstrip("_")] for part in inputs]
    except KeyError:
        return b""
    given = [tuple(each) if isinstance(each, list) else each for each in values]
    code = interface(name).creation_code(*given)
    return code[len(load_artifact(name).bytecode) :]


def write_tree(deployment: Deployment, folder: Path) -> list[Path]:
    """Write the standard input of each contract and a Sourcify repository.

    `NAME.input.json` is for forms that take standard JSON; below `contracts/full_match/` stands
    what Sourcify and Otterscan read: metadata.json byte for byte, and its sources in the same folder.

    Returns:
        All files, sorted.

    Raises:
        UsageError: The folder can't be written.
    """
    files: dict[Path, str] = {}
    for each in sources(deployment):
        files[Path(f"{each.name}.input.json")] = json.dumps(standard_input(), indent=1) + "\n"
        match = Path("contracts", "full_match", str(deployment.chain_id), each.address)
        files[match / "metadata.json"] = load_artifact(each.name).metadata
        for name, content in sources_of(each.name).items():
            files[match / "sources" / name] = content
        if each.arguments:
            files[match / "constructor-args.txt"] = "0x" + each.arguments.hex()
        if each.transaction:
            files[match / "creator-tx-hash.txt"] = each.transaction
    try:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"{folder} can't be written: {error.strerror}") from None
    return sorted(folder / path for path in files)


async def submit_sourcify(
    url: str, deployment: Deployment, *, pause: float = _PAUSE, way: Transport | None = None
) -> list[SourceSubmission]:
    """Send all contracts to a Sourcify server (API v2) and wait for what it says.

    Args:
        url: Of the server, without `/v2`.
        deployment: Whose contracts; the server must follow their chain.
        pause: Seconds between two looks at a verification.
        way: Certificates and headers for remote addresses.

    Raises:
        EndpointError: The server can't be reached or is none.
    """
    async with _client(url, way) as client:
        return [
            await _sourcify(client, url, deployment, each, pause) for each in sources(deployment)
        ]


async def _sourcify(
    client: httpx.AsyncClient, url: str, deployment: Deployment, source: Source, pause: float
) -> SourceSubmission:
    body: dict[str, Any] = {
        "stdJsonInput": standard_input(),
        "compilerVersion": source.compiler,
        "contractIdentifier": source.identifier,
    }
    if source.transaction:
        body["creationTransactionHash"] = source.transaction
    path = f"v2/verify/{deployment.chain_id}/{source.address}"
    status, answer = await _asked(client, url, "POST", path, json=body)
    if status == httpx.codes.CONFLICT:
        return _outcome("sourcify", source, True, "it is verified already")
    if status != httpx.codes.ACCEPTED or not isinstance(answer.get("verificationId"), str):
        return _outcome("sourcify", source, False, _reason(status, answer))
    job = answer["verificationId"]
    if not job.replace("-", "").isalnum():
        raise EndpointError(f"{safe_url(url)} gives a verification without a usable id")
    for _ in range(_LOOKS):
        status, answer = await _asked(client, url, "GET", f"v2/verify/{job}")
        if answer.get("isJobCompleted"):
            contract = answer.get("contract")
            match = contract.get("match") if isinstance(contract, Mapping) else None
            if match:
                return _outcome("sourcify", source, True, str(match))
            return _outcome("sourcify", source, False, _reason(status, answer))
        await asyncio.sleep(pause)
    return _outcome("sourcify", source, False, "it is still being verified")


async def submit_blockscout(
    url: str, deployment: Deployment, *, pause: float = _PAUSE, way: Transport | None = None
) -> list[SourceSubmission]:
    """Send all contracts to a Blockscout explorer (API v2) and wait until it shows them.

    Args and errors as `submit_sourcify`; `url` is the explorer's, without `/api`.
    """
    async with _client(url, way) as client:
        return [await _blockscout(client, url, each, pause) for each in sources(deployment)]


async def _blockscout(
    client: httpx.AsyncClient, url: str, source: Source, pause: float
) -> SourceSubmission:
    contract = f"api/v2/smart-contracts/{source.address}"
    form = {
        "compiler_version": f"v{source.compiler}",
        "contract_name": source.name,
        "license_type": "mit",
        "autodetect_constructor_args": "false" if source.arguments else "true",
        "constructor_args": source.arguments.hex(),
    }
    content = json.dumps(standard_input()).encode()
    files = {"files[0]": (f"{source.name}.json", content, "application/json")}
    if await _is_verified(client, url, contract):
        return _outcome("blockscout", source, True, "it is verified already")
    path = f"{contract}/verification/via/standard-input"
    status, answer = await _asked(client, url, "POST", path, data=form, files=files)
    if status != httpx.codes.OK:
        return _outcome("blockscout", source, False, _reason(status, answer))
    for _ in range(_LOOKS):
        if await _is_verified(client, url, contract):
            return _outcome("blockscout", source, True, "verified")
        await asyncio.sleep(pause)
    return _outcome("blockscout", source, False, "it is not shown as verified")


async def _is_verified(client: httpx.AsyncClient, url: str, path: str) -> bool:
    _, answer = await _asked(client, url, "GET", path)
    return answer.get("is_verified") is True


def _client(url: str, way: Transport | None) -> httpx.AsyncClient:
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{safe_url(url)} is no http:// or https:// address")
    way = way or Transport()
    return httpx.AsyncClient(
        timeout=_TIMEOUT,
        trust_env=False,
        proxy=proxy_for(url),
        verify=way.context() or True,
        headers=way.headers_for(url),
    )


async def _asked(
    client: httpx.AsyncClient, url: str, method: str, path: str, **content: Any
) -> tuple[int, Mapping[str, Any]]:
    """Status and JSON object of an answer; an empty one where it is none.

    Raises:
        EndpointError: There is no answer, or the server failed.
    """
    place = safe_url(url)
    try:
        found = await client.request(method, f"{url.rstrip('/')}/{path}", **content)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EndpointError(
            f"{place} can't be reached: {tls_problem(error) or type(error).__name__}"
        ) from None
    if found.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        raise EndpointError(f"{place} answered with HTTP status {found.status_code}")
    try:
        body = pydantic_core.from_json(found.content, allow_inf_nan=False)
    except ValueError:
        body = None
    return found.status_code, body if isinstance(body, Mapping) else {}


def _outcome(verifier: str, source: Source, ok: bool, detail: str) -> SourceSubmission:
    return SourceSubmission(verifier, source.name, source.address, ok, detail)


def _reason(status: int, answer: Mapping[str, Any]) -> str:
    error = answer.get("error")
    inner = error if isinstance(error, Mapping) else {}
    words = inner.get("message") or answer.get("message") or error or answer.get("errors")
    return f"HTTP status {status}: {str(words)[:300]}" if words else f"HTTP status {status}"
