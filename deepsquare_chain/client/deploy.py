"""Deploys a grid or plans it for another account, records it, and publishes its sources."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import httpx2
import pydantic_core
from eth_utils.address import to_checksum_address
from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.abi import (
    interface,
    load_artifact,
    metadata_of,
    sources_of,
    standard_input,
)
from deepsquare_chain.chain.bindings.calls import Call, checked_address
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.deploying import GridParams, deploy_grid, plan_grid, read_deployment
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.chain.rpc.transport import Transport, failure_reason, http_client
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.transactions.fees import GWEI
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.client.network import check_wallet_settings, open_account, transport_of
from deepsquare_chain.client.transactions import AddressOnly, UnsignedSender
from deepsquare_chain.errors import EndpointError, UsageError
from deepsquare_chain.settings import Settings, safe_url
from deepsquare_chain.store.database import Store

_ATTEMPTS: Final = 2


@dataclass(frozen=True, slots=True)
class DeploymentPlan:
    """Calls that deploy a grid when `account` sends them in this order, and the contracts' addresses."""

    account: str
    deployment: Deployment
    calls: Sequence[Call]


async def deploy(settings: Settings, params: GridParams) -> Deployment:
    """Deploy new contracts and write the deployment record; an interrupted deployment is resumed.

    Raises:
        UsageError: The record exists already, or no wallet is set.
        GridError: As `deploy_grid`.
    """
    _check_no_record(settings)
    check_wallet_settings(settings)
    progress = settings.deployment.with_name(f".{settings.deployment.name}.progress.db")
    async with connect(settings) as w3:
        account = await open_account(settings)
        deployment = await _deploy(w3, account, settings, params, progress)
    deployment.save(settings.deployment)
    for leftover in progress.parent.glob(f"{progress.name}*"):
        leftover.unlink(missing_ok=True)
    return deployment


async def plan(settings: Settings, params: GridParams, account: str, salt: int) -> DeploymentPlan:
    """Plan a deployment by an account whose key is not here; nothing is sent or written.

    Raises:
        GridError: As `plan_grid`.
    """
    address = checked_address(account)
    async with connect(settings) as w3:
        chain_id = int(await w3.eth.chain_id)
        with Store.open(None, chain_id=chain_id, contract="deploying", account=address) as store:
            sender = UnsignedSender(w3, AddressOnly(address), store, chain_id=chain_id)
            deployment = await plan_grid(w3, sender, params, salt=salt)
    return DeploymentPlan(address, deployment, sender.calls)


async def record(settings: Settings, scheduler: str, since_block: int | None) -> Deployment:
    """Write the deployment record of contracts that exist, from the address of their MetaScheduler.

    Raises:
        UsageError: The record exists already, or see `read_deployment`.
        EndpointError: The endpoint does not answer.
    """
    _check_no_record(settings)
    async with connect(settings) as w3:
        deployment = await read_deployment(w3, scheduler, since_block)
    extra = {**deployment.extra, "endpoint": safe_url(settings.endpoint)}
    deployment = replace(deployment, extra=extra)
    deployment.save(settings.deployment)
    return deployment


def connect(settings: Settings) -> AbstractAsyncContextManager[AsyncWeb3[Any]]:
    """Connect to the endpoint of the settings, without a deployment; errors as `connected`."""
    return connected(
        settings.endpoint,
        chain_id=settings.chain_id,
        attempts=_ATTEMPTS,
        transport=transport_of(settings),
    )


def _check_no_record(settings: Settings) -> None:
    if settings.deployment.exists():
        raise UsageError(
            f"{settings.deployment} already exists, and a record is never overwritten",
            hint="Verify it, move it, or give another path for the new record.",
        )


async def _deploy(
    w3: AsyncWeb3[Any], account: Signer, settings: Settings, params: GridParams, progress: Path
) -> Deployment:
    chain_id = int(await w3.eth.chain_id)
    genesis = bytes((await w3.eth.get_block(0))["hash"]).hex()
    with Store.open(
        progress,
        chain_id=chain_id,
        contract="deploying",
        account=account.address,
        genesis=genesis,
        exclusive=True,
    ) as store:
        ceiling = int(settings.max_fee_gwei * GWEI)
        sender = Sender(w3, account, store, chain_id=chain_id, max_fee_per_gas=ceiling)
        await sender.recover(timeout=settings.timeout)
        return await deploy_grid(
            w3,
            sender,
            params,
            extra={"endpoint": safe_url(settings.endpoint)},
            timeout=settings.timeout,
            resumable=True,
        )


# -- contract sources of a deployment: as files, and submitted to Sourcify and Blockscout

_TIMEOUT: Final = 30.0
#: Polling while a verifier compiles: interval in seconds, and number of polls.
_PAUSE: Final = 2.0
_MAX_POLLS: Final = 60


@dataclass(frozen=True, slots=True)
class Source:
    """One deployed contract, with the data that a verifier requires.

    `identifier` is `path:name`, as compilers write it. `arguments` are the encoded constructor
    arguments. `arguments` and `transaction` are empty if the deployment record lacks them.
    """

    name: str
    address: str
    identifier: str
    compiler: str
    arguments: bytes
    transaction: str


@dataclass(frozen=True, slots=True)
class SourceSubmission:
    """The result of submitting one contract. `ok` is also true if it was already verified."""

    verifier: str
    name: str
    address: str
    ok: bool
    detail: str


def sources(deployment: Deployment) -> list[Source]:
    """Return the contracts of a deployment. The forwarder is left out if there is none."""
    return [
        _source(deployment, name, address)
        for name, address in deployment.contracts.items()
        if int(address, 16)
    ]


def _source(deployment: Deployment, name: str, address: str) -> Source:
    metadata = metadata_of(name)
    ((path, contract),) = metadata["settings"]["compilationTarget"].items()
    return Source(
        name,
        to_checksum_address(address),
        f"{path}:{contract}",
        metadata["compiler"]["version"],
        _arguments(deployment, name),
        deployment.transactions.get(name, ""),
    )


def _arguments(deployment: Deployment, name: str) -> bytes:
    """Return the encoded constructor arguments; empty if the deployment record lacks them."""
    recorded = deployment.constructor_args.get(name)
    if not isinstance(recorded, Mapping):
        return b""
    inputs = interface(name).entries("constructor")[0]["inputs"]
    try:
        values = [recorded[part["name"].rstrip("_")] for part in inputs]
    except KeyError:
        return b""
    arguments = [tuple(value) if isinstance(value, list) else value for value in values]
    code = interface(name).creation_code(*arguments)
    return code[len(load_artifact(name).bytecode) :]


def write_tree(deployment: Deployment, folder: Path) -> list[Path]:
    """Write the standard input of each contract and a Sourcify repository.

    `NAME.input.json` is for forms that accept standard JSON. `contracts/full_match/` is for
    Sourcify and Otterscan: the exact metadata.json, with its sources in the same folder.

    Returns:
        All files, sorted.

    Raises:
        UsageError: The folder can't be written.
    """
    files: dict[Path, str] = {}
    for source in sources(deployment):
        files[Path(f"{source.name}.input.json")] = json.dumps(standard_input(), indent=1) + "\n"
        match_folder = Path("contracts", "full_match", str(deployment.chain_id), source.address)
        files[match_folder / "metadata.json"] = load_artifact(source.name).metadata
        for name, content in sources_of(source.name).items():
            files[match_folder / "sources" / name] = content
        if source.arguments:
            files[match_folder / "constructor-args.txt"] = "0x" + source.arguments.hex()
        if source.transaction:
            files[match_folder / "creator-tx-hash.txt"] = source.transaction
    try:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"{folder} can't be written: {error.strerror}") from None
    return sorted(folder / path for path in files)


async def submit_sourcify(
    url: str, deployment: Deployment, *, pause: float = _PAUSE, transport: Transport | None = None
) -> list[SourceSubmission]:
    """Submit all contracts to a Sourcify server (API v2) and wait for the results.

    `url` is that of the server, without `/v2`; the server must support the deployment's chain.
    `pause` is the time in seconds between two polls of a verification.

    Raises:
        EndpointError: The server can't be reached, or is not a Sourcify server.
    """
    async with _client(url, transport) as client:
        return [
            await _sourcify(client, url, deployment, source, pause)
            for source in sources(deployment)
        ]


async def _sourcify(
    client: httpx2.AsyncClient, url: str, deployment: Deployment, source: Source, pause: float
) -> SourceSubmission:
    body: dict[str, Any] = {
        "stdJsonInput": standard_input(),
        "compilerVersion": source.compiler,
        "contractIdentifier": source.identifier,
    }
    if source.transaction:
        body["creationTransactionHash"] = source.transaction
    path = f"v2/verify/{deployment.chain_id}/{source.address}"
    status, answer = await _request(client, url, "POST", path, json=body)
    if status == httpx2.codes.CONFLICT:
        return _outcome("sourcify", source, True, "it is verified already")
    if status != httpx2.codes.ACCEPTED or not isinstance(answer.get("verificationId"), str):
        return _outcome("sourcify", source, False, _reason(status, answer))
    job = answer["verificationId"]
    if not job.replace("-", "").isalnum():
        raise EndpointError(f"{safe_url(url)} returned an invalid verification ID")
    for _ in range(_MAX_POLLS):
        status, answer = await _request(client, url, "GET", f"v2/verify/{job}")
        if answer.get("isJobCompleted"):
            contract = answer.get("contract")
            match = contract.get("match") if isinstance(contract, Mapping) else None
            if match:
                return _outcome("sourcify", source, True, str(match))
            return _outcome("sourcify", source, False, _reason(status, answer))
        await asyncio.sleep(pause)
    return _outcome("sourcify", source, False, "it is still being verified")


async def submit_blockscout(
    url: str, deployment: Deployment, *, pause: float = _PAUSE, transport: Transport | None = None
) -> list[SourceSubmission]:
    """Submit all contracts to a Blockscout explorer (API v2) and wait until they are verified.

    Arguments and errors are those of `submit_sourcify`; `url` is the explorer's, without `/api`.
    """
    async with _client(url, transport) as client:
        return [await _blockscout(client, url, source, pause) for source in sources(deployment)]


async def _blockscout(
    client: httpx2.AsyncClient, url: str, source: Source, pause: float
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
    status, answer = await _request(client, url, "POST", path, data=form, files=files)
    if status != httpx2.codes.OK:
        return _outcome("blockscout", source, False, _reason(status, answer))
    for _ in range(_MAX_POLLS):
        if await _is_verified(client, url, contract):
            return _outcome("blockscout", source, True, "verified")
        await asyncio.sleep(pause)
    return _outcome("blockscout", source, False, "it is not shown as verified")


async def _is_verified(client: httpx2.AsyncClient, url: str, path: str) -> bool:
    _, answer = await _request(client, url, "GET", path)
    return answer.get("is_verified") is True


def _client(url: str, transport: Transport | None) -> httpx2.AsyncClient:
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{safe_url(url)} is not an http:// or https:// URL")
    return http_client(url, transport, timeout=_TIMEOUT)


async def _request(
    client: httpx2.AsyncClient, url: str, method: str, path: str, **content: Any
) -> tuple[int, Mapping[str, Any]]:
    """Send a request. Return the status and the JSON object, empty if the body is not an object.

    Raises:
        EndpointError: The server can't be reached, or returned a 5xx status.
    """
    server = safe_url(url)
    try:
        response = await client.request(method, f"{url.rstrip('/')}/{path}", **content)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise EndpointError(f"{server} can't be reached: {failure_reason(error)}") from None
    if response.status_code >= httpx2.codes.INTERNAL_SERVER_ERROR:
        raise EndpointError(f"{server} answered with HTTP status {response.status_code}")
    try:
        body = pydantic_core.from_json(response.content, allow_inf_nan=False)
    except ValueError:
        body = None
    return response.status_code, body if isinstance(body, Mapping) else {}


def _outcome(verifier: str, source: Source, ok: bool, detail: str) -> SourceSubmission:
    return SourceSubmission(verifier, source.name, source.address, ok, detail)


def _reason(status: int, answer: Mapping[str, Any]) -> str:
    error = answer.get("error")
    details = error if isinstance(error, Mapping) else {}
    message = details.get("message") or answer.get("message") or error or answer.get("errors")
    return f"HTTP status {status}: {str(message)[:300]}" if message else f"HTTP status {status}"
