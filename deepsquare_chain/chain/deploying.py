"""Deploys a grid's contracts, grants their roles, and makes and verifies the deployment record.

An account without a key at hand, such as a Safe, can't create contracts by a plain transaction. Its
contracts are created with CREATE2 (EIP-1014) by the deterministic deployment proxy.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, Final

from eth_typing import ChecksumAddress
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak
from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, Web3RPCError

from deepsquare_chain.chain.bindings.abi import interface, ipfs_hash, load_artifact, metadata_hash
from deepsquare_chain.chain.bindings.calls import Call, ContractBase, checked_address
from deepsquare_chain.chain.bindings.contracts import Contracts, MetaSchedulerContract
from deepsquare_chain.chain.bindings.deployment import (
    ADMIN_ROLE,
    APPROVER_ROLE,
    METASCHEDULER_ROLE,
    MINTER_ROLE,
    TIMES,
    Deployment,
    Timeouts,
    role_name,
)
from deepsquare_chain.chain.bindings.events import (
    FeeChanged,
    RoleGranted,
    RoleRevoked,
    decode_logs,
    event_topics,
)
from deepsquare_chain.chain.rpc.endpoint import TransientEndpointError
from deepsquare_chain.chain.rpc.log_reader import read_logs
from deepsquare_chain.chain.rpc.responses import error_body, is_execution_error, node_message
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.errors import EndpointError, GridError, UsageError
from deepsquare_chain.job import DAY


@dataclass(frozen=True, slots=True)
class GridParams:
    """Parameters of a deployment.

    `fee_bps` is in basis points; `admin_delay` and `approval_period` are in seconds; role holders
    are addresses. Empty lists and an empty `treasury` mean the deploying account. `credit` and
    `registry` are existing contracts that are reused, with unchanged roles; `since_block` is the
    first block with their events, None to search for it.
    """

    fee_bps: int = 500
    admin_delay: int = DAY
    approval_period: int = 365 * DAY
    timeouts: Timeouts = field(default_factory=Timeouts)
    treasury: str = ""
    schedulers: Sequence[str] = ()
    approvers: Sequence[str] = ()
    minters: Sequence[str] = ()
    credit: str = ""
    registry: str = ""
    since_block: int | None = None


#: The bounds that the contracts enforce, checked before the first deployment costs gas.
_BOUNDS: Final = {
    "fee_bps": (0, 2_000),
    "approval_period": (3_600, 730 * DAY),
    "admin_delay": (0, 2**48 - 1),
    "claim_timeout": (5, 30 * DAY),
    "pending_timeout": (5, 30 * DAY),
    "pending_expiry": (5, 365 * DAY),
    "response_timeout": (5, 30 * DAY),
    "response_blocks": (1, 100_000),
    "lost_timeout": (5, 30 * DAY),
    "report_grace": (3_600, 30 * DAY),
    "top_up_notice": (10, 3_600),
    "collect_interval": (5, 30 * DAY),
}

_AT_LEAST: Final = (("pending_expiry", "pending_timeout"), ("lost_timeout", "response_timeout"))

#: Creation code that copies memory (MCOPY), reads transient storage (TLOAD) and returns nothing.
_CANCUN_PROBE: Final = "0x5f5f5f5e5f5c505f5ff3"
#: EIP-712 name of the forwarder, which signed requests carry.
FORWARDER_NAME: Final = "DeepSquare"

#: Deterministic deployment proxy: it creates a contract from calldata of 32 bytes of salt and
#: creation code. It has the same address on every chain. Source of address and code:
#: https://github.com/Arachnid/deterministic-deployment-proxy
CREATE2_PROXY: Final = "0x4e59b44847b379578588920cA78FbF26c0B4956C"
CREATE2_PROXY_CODE: Final = bytes.fromhex(
    "7fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffe0"
    "3601600081602082378035828234f58015156039578182fd5b8082525050506014600cf3"
)

#: Short timeouts for demos, so that each passes within seconds.
DEMO_PARAMS: Final = GridParams(
    admin_delay=0,
    timeouts=Timeouts(
        claim_timeout=10,
        pending_timeout=30,
        response_timeout=6,
        response_blocks=3,
        lost_timeout=8,
        report_grace=3_600,
        top_up_notice=10,
        collect_interval=10,
    ),
)


async def deploy_grid(
    w3: AsyncWeb3[Any],
    sender: Sender,
    params: GridParams | None = None,
    *,
    extra: dict[str, Any] | None = None,
    timeout: float = 120.0,
    resumable: bool = False,
) -> Deployment:
    """Deploy Credit, ProviderRegistry, ERC2771Forwarder and MetaScheduler and grant their roles.

    The sender's account becomes the administrator of all of them but the forwarder, which has none.

    Args:
        extra: Additional values of the record (faucet, endpoint, ...).
        resumable: Use idempotency keys: with the same parameters and a durable outbox, a second
            call resumes an interrupted deployment instead of starting another one.

    Raises:
        UsageError: A parameter is out of bounds, or a role holder is not an address.
        RevertedError: A contract reverted; the grid is not usable then.
        InsufficientFundsError: The account can't pay the gas.
    """
    params = params or GridParams()
    run = _DeploymentRun(w3, sender, params, timeout, resumable=resumable)
    await run.check()
    first_blocks = [
        await first_block(w3, checked_address(address), params.since_block)
        for address in (params.credit, params.registry)
        if address
    ]
    deployment = await run.deploy()
    return replace(
        deployment,
        block=min([*run.blocks, *first_blocks]),
        transactions=run.transactions,
        extra={"admin": sender.address, **(extra or {})},
    )


async def plan_grid(
    w3: AsyncWeb3[Any], sender: Sender, params: GridParams, *, salt: int = 0
) -> Deployment:
    """Give the sender the calls that deploy a grid with CREATE2, and return the contracts' addresses.

    The addresses depend on the account, the parameters and the salt (below 2^256) only. Contracts
    that exist there already are not created again, and roles that were granted are not granted
    again, so a plan that was carried out in part can be made again. The first block of the result
    is 0.

    Raises:
        UsageError: As `deploy_grid`, or the chain lacks the deterministic deployment proxy.
        RevertedError: The chain refuses the first call.
    """
    run = _DeploymentRun(w3, sender, params, 0.0, resumable=False, salt=salt)
    await run.check()
    return await run.deploy()


async def read_deployment(
    w3: AsyncWeb3[Any], scheduler: str, since_block: int | None = None
) -> Deployment:
    """Make the deployment record of a MetaScheduler from the chain.

    The administrators, the fee and the transactions come from the contracts' first events. The
    transaction of the forwarder, which has no events, is not recorded. The administrator's delay is
    the one in force now.

    Args:
        since_block: The block of the first deployment, or an earlier one; None to search for it,
            which requires an archive node.

    Raises:
        UsageError: A contract is not this package's, or its first block can't be found.
        EndpointError: The node does not answer.
    """
    address = checked_address(scheduler, "address of a MetaScheduler")
    chain_id = int(await w3.eth.chain_id)
    await _check_code(w3, "MetaScheduler", address)
    parameters = await MetaSchedulerContract(w3, address).parameters()
    deployment = Deployment(
        chain_id=chain_id,
        credit=parameters.credit,
        registry=parameters.registry,
        scheduler=address,
        treasury=parameters.treasury,
        forwarder=parameters.forwarder,
        block=0,
        compiler_digest=load_artifact("MetaScheduler").input_digest,
    )
    for name, contract in deployment.contracts.items():
        await _check_code(w3, name, checked_address(contract))
    blocks = [
        await first_block(w3, checked_address(contract), since_block)
        for contract in deployment.addresses
    ]
    last = max(blocks) if since_block is None else None
    granted, fees = await _first_events(w3, deployment, min(blocks), last)
    contracts = Contracts(w3, deployment)
    arguments: dict[str, dict[str, Any]] = {"ERC2771Forwarder": {"name": FORWARDER_NAME}}
    transactions: dict[str, str] = {}
    for role_contract in (contracts.credit, contracts.registry, contracts.scheduler):
        first = granted.get(role_contract.address)
        if first is None or (role_contract is contracts.scheduler and first.tx_hash not in fees):
            raise UsageError(
                f"There is no first event of {role_contract.artifact} at {role_contract.address} "
                f"since block {min(blocks)}",
                hint="Give --since-block: the block of the deployment, or an earlier one.",
            )
        transactions[role_contract.artifact] = first.tx_hash
        delay = await role_contract.admin_delay()
        arguments[role_contract.artifact] = {"admin": first.account, "adminDelay": delay}
    arguments["ProviderRegistry"]["approvalPeriod"] = await contracts.registry.approval_period()
    arguments["MetaScheduler"] |= {
        "credit": deployment.credit,
        "registry": deployment.registry,
        "treasury": deployment.treasury,
        "forwarder": deployment.forwarder,
        "feeBps": fees[transactions["MetaScheduler"]],
        "timeouts": [getattr(parameters, name) for name in TIMES],
    }
    return replace(
        deployment,
        block=min(blocks),
        transactions=transactions,
        constructor_args=arguments,
        extra={"admin": arguments["MetaScheduler"]["admin"]},
    )


async def _first_events(
    w3: AsyncWeb3[Any], deployment: Deployment, first: int, last: int | None
) -> tuple[dict[str, RoleGranted], dict[str, int]]:
    """Return the first grant of ADMIN_ROLE by contract, and the fees by transaction."""
    granted: dict[str, RoleGranted] = {}
    fees: dict[str, int] = {}
    topics = [event_topics(RoleGranted, FeeChanged)]
    for event in decode_logs(await read_logs(w3, deployment.addresses, topics, first, last)):
        if isinstance(event, RoleGranted) and event.role == ADMIN_ROLE:
            granted.setdefault(event.address, event)
        elif isinstance(event, FeeChanged) and event.address == deployment.scheduler:
            fees.setdefault(event.tx_hash, event.fee_bps)
    return granted, fees


class _DeploymentRun:
    """One deployment run, and its results for the record.

    With a salt, contracts are created by the deterministic deployment proxy, and what exists is
    left out.
    """

    def __init__(
        self,
        w3: AsyncWeb3[Any],
        sender: Sender,
        params: GridParams,
        timeout: float,
        *,
        resumable: bool,
        salt: int | None = None,
    ) -> None:
        self.transactions: dict[str, str] = {}
        self.blocks: list[int] = []
        self._w3 = w3
        self._sender = sender
        self._params = params
        self._timeout = timeout
        self._resumable = resumable
        self._salt = salt
        self._arguments: dict[str, dict[str, Any]] = {}
        self._existing: set[str] = set()
        # Keeps the calls of a plan in the order in which they were requested.
        self._turn = asyncio.Lock()

    async def check(self) -> None:
        """Check everything that can be checked before a transaction is sent.

        Raises:
            UsageError: A parameter, a reused contract or the chain does not fit.
        """
        _check(self._params)
        self._roles()
        await check_rules(self._w3)
        reused = {"Credit": self._params.credit, "ProviderRegistry": self._params.registry}
        for name, address in reused.items():
            if address:
                await _check_code(self._w3, name, checked_address(address))
        if self._salt is not None:
            code = bytes(await self._w3.eth.get_code(checked_address(CREATE2_PROXY)))
            if code != CREATE2_PROXY_CODE:
                raise UsageError(
                    "This chain has no deterministic deployment proxy at "
                    f"{CREATE2_PROXY}, and only through it can a Safe create contracts",
                    hint="Deploy with a wallet (`deepsquare contracts deploy --keystore FILE`) and "
                    "hand the contracts over (`deepsquare admin handover ACCOUNT`), or put the "
                    "proxy on this chain first.",
                )

    async def deploy(self) -> Deployment:
        """Create the contracts and grant their roles; return the record without block and transactions."""
        params, admin = self._params, self._sender.address
        delay, timeouts = params.admin_delay, astuple(params.timeouts)
        treasury = checked_address(params.treasury or admin, "treasury")
        credit, registry, forwarder = await asyncio.gather(
            self._create_unless(params.credit, "Credit", admin, delay),
            self._create_unless(
                params.registry, "ProviderRegistry", admin, delay, params.approval_period
            ),
            self._create("ERC2771Forwarder", FORWARDER_NAME),
        )
        wiring = (credit, registry, treasury, forwarder)
        scheduler = await self._create(
            "MetaScheduler", admin, delay, *wiring, params.fee_bps, timeouts
        )
        deployment = Deployment(
            chain_id=self._sender.chain_id,
            credit=credit,
            registry=registry,
            scheduler=scheduler,
            treasury=treasury,
            forwarder=forwarder,
            block=0,
            constructor_args=self._arguments,
            compiler_digest=load_artifact("MetaScheduler").input_digest,
        )
        contracts = Contracts(self._w3, deployment)
        await asyncio.gather(*(self._grant(contracts, *grant) for grant in self._roles()))
        return deployment

    def _roles(self) -> list[tuple[str, bytes, str]]:
        """Return contract, role and holder of all grants."""
        params, deployer = self._params, (self._sender.address,)
        groups = [("scheduler", METASCHEDULER_ROLE, params.schedulers or deployer)]
        if not params.registry:
            groups.append(("registry", APPROVER_ROLE, params.approvers or deployer))
        if not params.credit:
            groups.append(("credit", MINTER_ROLE, params.minters or deployer))
        return [
            (contract, role, checked_address(account, "address of a role holder"))
            for contract, role, accounts in groups
            for account in dict.fromkeys(accounts)
        ]

    async def _create_unless(self, existing: str, name: str, *arguments: Any) -> str:
        """Return the address of an existing contract, or deploy a new one."""
        return checked_address(existing) if existing else await self._create(name, *arguments)

    async def _create(self, name: str, *arguments: Any) -> str:
        """Deploy one contract and return its address."""
        code = interface(name).creation_code(*arguments)
        label = f"deploy {name}"
        constructor = interface(name).entries("constructor")[0]
        names = [part["name"].rstrip("_") for part in constructor["inputs"]]
        values = [list(value) if isinstance(value, tuple) else value for value in arguments]
        self._arguments[name] = dict(zip(names, values, strict=True))
        if self._salt is None:
            return checked_address(await self._send(name, Call(to="", data=code, label=label)))
        salt = self._salt.to_bytes(32, "big")
        address = create2_address(salt, code)
        async with self._turn:
            if await self._w3.eth.get_code(address):
                self._existing.add(address)
            else:
                await self._send(name, Call(to=CREATE2_PROXY, data=salt + code, label=label))
        return address

    async def _grant(self, contracts: Contracts, name: str, role: bytes, holder: str) -> None:
        """Grant one role, unless the holder of a planned deployment has it."""
        contract: ContractBase = getattr(contracts, name)
        key = f"grant {name} {holder}"
        call = contract.grant_role(role, holder)
        async with self._turn if self._salt is not None else nullcontext():
            if contract.address in self._existing and await contract.has_role(role, holder):
                return
            await self._send(key, call)

    async def _send(self, name: str, call: Call) -> str:
        digest = hashlib.sha256(call.to.encode() + call.data).hexdigest()
        key = f"{name} {digest}" if self._resumable else None
        receipt = await self._sender.send(call, timeout=self._timeout, key=key)
        self.transactions[name] = receipt.hash
        self.blocks.append(receipt.block_number)
        return receipt.contract


def create2_address(salt: bytes, code: bytes) -> ChecksumAddress:
    """Return where the deterministic deployment proxy creates a contract; source: EIP-1014."""
    proxy = bytes.fromhex(CREATE2_PROXY[2:])
    return checked_address("0x" + keccak(b"\xff" + proxy + salt + keccak(code))[12:].hex())


async def check_rules(w3: AsyncWeb3[Any]) -> None:
    """Check that the chain supports the Cancun instructions that the contracts are compiled for.

    Raises:
        UsageError: The chain does not support them.
        EndpointError: The node does not answer.
    """
    try:
        await w3.eth.call({"data": HexBytes(_CANCUN_PROBE)})
    except (ContractLogicError, Web3RPCError) as error:
        body = error_body(error) if isinstance(error, Web3RPCError) else {"code": 3}
        if not is_execution_error("eth_call", body):
            raise EndpointError(
                f"The node could not test the chain's rules: {node_message(error)}",  # type: ignore[arg-type]
                hint="Use another endpoint: it must serve eth_call without a recipient.",
            ) from None
        raise UsageError(
            "This chain does not have the Cancun rules that the contracts need: it refused the "
            "instructions MCOPY and TLOAD",
            hint="Use a chain or node with Cancun (March 2024) or later; for anvil: --hardfork cancun.",
        ) from None


async def _check_code(w3: AsyncWeb3[Any], name: str, address: ChecksumAddress) -> None:
    """Check that the code at an address is a contract of this package.

    Raises:
        UsageError: It is another contract, or none.
    """
    code = bytes(await w3.eth.get_code(address))
    if not load_artifact(name).matches(code):
        problem = "other code" if code else "no code"
        raise UsageError(
            f"The address {address} is not this package's {name}: there is {problem}",
            hint="Check the address, and that the package has the version of the deployment.",
        )


async def first_block(
    w3: AsyncWeb3[Any], address: ChecksumAddress, given: int | None = None
) -> int:
    """Find the first block with code at an address by binary search, unless it is given.

    Raises:
        UsageError: The node has no historical state: it is not an archive node.
    """
    if given is not None:
        return given
    low, high = 0, int(await w3.eth.block_number)
    try:
        while low < high:
            middle = (low + high) // 2
            if await w3.eth.get_code(address, middle):
                high = middle
            else:
                low = middle + 1
    except Web3RPCError as error:
        raise UsageError(
            f"The node could not read when {address} was deployed: {node_message(error)}",
            hint="Give --since-block: the field block of the earlier deployment's record.",
        ) from None
    return low


def _check(params: GridParams) -> None:
    values = {**asdict(params), **asdict(params.timeouts)}
    for name, (minimum, maximum) in _BOUNDS.items():
        if not minimum <= values[name] <= maximum:
            raise UsageError(f"{name} is {values[name]}, allowed are {minimum} to {maximum}")
    times = params.timeouts
    for name, least_name in _AT_LEAST:
        value, minimum = getattr(times, name), getattr(times, least_name)
        if value < minimum:
            raise UsageError(f"{name} is {value}, allowed is {minimum} ({least_name}) or more")


# -- verification of a deployment record against the chain


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check; `detail` describes the difference if it failed."""

    subject: str
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


def _equal(subject: str, actual: object, wanted: object) -> Finding:
    equal = actual == wanted
    return Finding(subject, equal, "" if equal else f"it is {actual}, the record says {wanted}")


async def named_holders(w3: AsyncWeb3[Any], deployment: Deployment) -> list[tuple[str, str, str]]:
    """Return contract name, role name and holder of every granted role, sorted.

    Raises:
        EndpointError: The node does not answer.
    """
    holders_by_contract = await role_holders(w3, deployment)
    names = deployment.contract_names
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
    topics = [event_topics(RoleGranted, RoleRevoked)]
    for event in decode_logs(await read_logs(w3, deployment.addresses, topics, deployment.block)):
        if isinstance(event, RoleGranted | RoleRevoked):
            role_accounts = holders.setdefault(event.address, {}).setdefault(event.role, set())
            if isinstance(event, RoleGranted):
                role_accounts.add(event.account)
            else:
                role_accounts.discard(event.account)
    return holders
