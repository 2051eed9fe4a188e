"""Verifies a deployment record against the chain."""

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
    """Result of one check; `detail` describes the difference if it failed."""

    what: str
    ok: bool
    detail: str = ""


async def verify_deployment(w3: AsyncWeb3[Any], deployment: Deployment) -> list[Finding]:
    """Check chain ID, code, wiring, parameters and administrators of a deployment.

    Code is compared with this package's artifacts except for the immutables. Their values are
    compared with the record's constructor arguments.

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
        # Code of another contract fails, or gives invalid responses.
        findings.append(Finding("wiring and parameters", ok=False, detail=error.message))
    return findings


def _code(name: str, address: str, code: bytes) -> Finding:
    check = f"code of {name} at {address}"
    if not code:
        return Finding(check, ok=False, detail="there is no contract")
    matches = load_artifact(name).matches(code)
    return Finding(check, matches, "" if matches else "its code differs from this package's")


def _metadata(name: str, code: bytes) -> Finding:
    """Check that the code contains the hash of this package's metadata, and so of its sources."""
    expected = ipfs_hash(load_artifact(name).metadata.encode())
    return _equal(f"metadata of {name} (IPFS {expected})", metadata_hash(code), expected)


async def _wiring(contracts: Contracts, deployment: Deployment) -> list[Finding]:
    parameters = await contracts.scheduler.parameters()
    findings = [
        _equal("credit of the scheduler", parameters.credit, deployment.credit),
        _equal("registry of the scheduler", parameters.registry, deployment.registry),
        _equal("treasury", parameters.treasury, deployment.treasury),
        _equal("forwarder of the scheduler", parameters.forwarder, deployment.forwarder),
    ]
    recorded = deployment.constructor_args
    times = _arguments(recorded, "MetaScheduler").get("timeouts")
    if isinstance(times, list):
        actual = [getattr(parameters, name) for name in TIMES]
        findings.extend(
            _equal(name, value, expected)
            for name, value, expected in zip(TIMES, actual, times, strict=False)
        )
    period = _arguments(recorded, "ProviderRegistry").get("approvalPeriod")
    if period is not None:
        actual_period = await contracts.registry.approval_period()
        findings.append(_equal("approval_period", actual_period, period))
    for contract in (contracts.credit, contracts.registry, contracts.scheduler):
        admin = await contract.default_admin()
        expected = _arguments(recorded, contract.artifact).get("admin")
        # A handover is legitimate; only a missing administrator is a failure.
        detail = "" if expected in (None, admin) else f"handed over from {expected}"
        check = f"administrator of {contract.artifact} is {admin}"
        findings.append(Finding(check, int(admin, 16) != 0, detail))
    return findings


def _arguments(recorded: Mapping[str, Any], contract: str) -> Mapping[str, Any]:
    arguments = recorded.get(contract)
    return arguments if isinstance(arguments, Mapping) else {}


def _equal(what: str, found: object, wanted: object) -> Finding:
    equal = found == wanted
    return Finding(what, equal, "" if equal else f"it is {found}, the record says {wanted}")


async def named_holders(w3: AsyncWeb3[Any], deployment: Deployment) -> list[tuple[str, str, str]]:
    """Return contract name, role name and holder of every granted role, sorted.

    Raises:
        EndpointError: The node does not answer.
    """
    holders_by_contract = await role_holders(w3, deployment)
    names = {
        str(to_checksum_address(contract)): name for name, contract in deployment.contracts.items()
    }
    return sorted(
        (names.get(address, address), role_name(role), holder)
        for address, holders_by_role in holders_by_contract.items()
        for role, holders in holders_by_role.items()
        for holder in holders
    )


async def role_holders(
    w3: AsyncWeb3[Any], deployment: Deployment
) -> dict[str, dict[bytes, set[str]]]:
    """Return the holders by contract address and role, from the events since the deployment."""
    holders: dict[str, dict[bytes, set[str]]] = {}
    addresses = [to_checksum_address(address) for address in deployment.addresses]
    topics = [event_topics(RoleGranted, RoleRevoked)]
    for event in decode_logs(await read_logs(w3, addresses, topics, deployment.block)):
        if isinstance(event, RoleGranted | RoleRevoked):
            role_accounts = holders.setdefault(event.address, {}).setdefault(event.role, set())
            if isinstance(event, RoleGranted):
                role_accounts.add(event.account)
            else:
                role_accounts.discard(event.account)
    return holders
