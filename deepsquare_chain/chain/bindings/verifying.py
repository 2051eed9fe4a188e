"""Compares a deployment record with what stands on the chain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eth_utils.address import to_checksum_address
from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.artifacts import load_artifact
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import TIMES, Deployment
from deepsquare_chain.chain.bindings.events import (
    RoleGranted,
    RoleRevoked,
    decode_logs,
    event_topics,
)
from deepsquare_chain.chain.bindings.metadata import ipfs_hash, metadata_hash
from deepsquare_chain.chain.bindings.roles import role_name
from deepsquare_chain.chain.rpc.connection import TransientEndpointError
from deepsquare_chain.chain.rpc.log_reader import read_logs
from deepsquare_chain.errors import GridError


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `detail` says what was found where it is not as it should."""

    what: str
    ok: bool
    detail: str = ""


async def verify_deployment(w3: AsyncWeb3[Any], deployment: Deployment) -> list[Finding]:
    """Look at chain id, code, wiring, parameters and administrators of a deployment.

    Code is compared with this package's artifacts, the immutables apart, whose values are compared
    with the constructor arguments of the record.

    Raises:
        EndpointError: The node does not answer.
    """
    chain_id = await w3.eth.chain_id
    findings = [
        _equal("chain id", chain_id, deployment.chain_id),
        _equal(
            "compiler input",
            deployment.compiler_digest,
            load_artifact("MetaScheduler").input_digest,
        ),
    ]
    contracts = Contracts(w3, deployment)
    for name, address in deployment.contracts.items():
        code = bytes(await w3.eth.get_code(to_checksum_address(address)))
        findings += [_code(name, address, code), _metadata(name, code)]
    try:
        findings.extend(await _wiring(contracts, deployment))
    except TransientEndpointError:
        raise
    except GridError as error:
        # Other code answers otherwise, or not at all.
        findings.append(Finding("wiring and parameters", ok=False, detail=error.message))
    return findings


def _code(name: str, address: str, code: bytes) -> Finding:
    what = f"code of {name} at {address}"
    if not code:
        return Finding(what, ok=False, detail="there is no contract")
    same = load_artifact(name).matches(code)
    return Finding(what, same, "" if same else "it is other code than this package's")


def _metadata(name: str, code: bytes) -> Finding:
    """Whether the code names the metadata, and so the sources, that this package carries."""
    ours = ipfs_hash(load_artifact(name).metadata.encode())
    return _equal(f"metadata of {name} (IPFS {ours})", metadata_hash(code), ours)


async def _wiring(contracts: Contracts, deployment: Deployment) -> list[Finding]:
    found = await contracts.scheduler.parameters()
    findings = [
        _equal("credit of the scheduler", found.credit, deployment.credit),
        _equal("registry of the scheduler", found.registry, deployment.registry),
        _equal("treasury", found.treasury, deployment.treasury),
        _equal("forwarder of the scheduler", found.forwarder, deployment.forwarder),
    ]
    recorded = deployment.constructor_args
    times = _arguments(recorded, "MetaScheduler").get("timeouts")
    if isinstance(times, list):
        actual = [getattr(found, name) for name in TIMES]
        findings.extend(
            _equal(name, each, wanted)
            for name, each, wanted in zip(TIMES, actual, times, strict=False)
        )
    period = _arguments(recorded, "ProviderRegistry").get("approvalPeriod")
    if period is not None:
        actual_period = await contracts.registry.approval_period()
        findings.append(_equal("approval_period", actual_period, period))
    for contract in (contracts.credit, contracts.registry, contracts.scheduler):
        admin = await contract.default_admin()
        wanted = _arguments(recorded, contract.artifact).get("admin")
        # A hand-over is lawful; only the absence of an administrator is worth a look.
        detail = "" if wanted in (None, admin) else f"handed over from {wanted}"
        what = f"administrator of {contract.artifact} is {admin}"
        findings.append(Finding(what, int(admin, 16) != 0, detail))
    return findings


def _arguments(recorded: Mapping[str, Any], contract: str) -> Mapping[str, Any]:
    found = recorded.get(contract)
    return found if isinstance(found, Mapping) else {}


def _equal(what: str, found: object, wanted: object) -> Finding:
    same = found == wanted
    return Finding(what, same, "" if same else f"it is {found}, the record says {wanted}")


async def named_holders(w3: AsyncWeb3[Any], deployment: Deployment) -> list[tuple[str, str, str]]:
    """Contract, role and holder of every role that is held, by name.

    Raises:
        EndpointError: The node does not answer.
    """
    found = await role_holders(w3, deployment)
    names = {str(to_checksum_address(each)): name for name, each in deployment.contracts.items()}
    return sorted(
        (names.get(address, address), role_name(role), holder)
        for address, held in found.items()
        for role, holders in held.items()
        for holder in holders
    )


async def role_holders(
    w3: AsyncWeb3[Any], deployment: Deployment
) -> dict[str, dict[bytes, set[str]]]:
    """Who holds which role, by contract address, from the events since the deployment."""
    holders: dict[str, dict[bytes, set[str]]] = {}
    addresses = [to_checksum_address(each) for each in deployment.addresses]
    topics = [event_topics(RoleGranted, RoleRevoked)]
    for event in decode_logs(await read_logs(w3, addresses, topics, deployment.block)):
        if isinstance(event, RoleGranted | RoleRevoked):
            of_role = holders.setdefault(event.address, {}).setdefault(event.role, set())
            if isinstance(event, RoleGranted):
                of_role.add(event.account)
            else:
                of_role.discard(event.account)
    return holders
