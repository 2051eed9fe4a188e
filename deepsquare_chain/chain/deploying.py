"""Deploys a grid's contracts, grants their roles, and returns the deployment record."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from eth_typing import ChecksumAddress
from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, Web3RPCError

from deepsquare_chain.chain.bindings.abi import interface
from deepsquare_chain.chain.bindings.artifacts import load_artifact
from deepsquare_chain.chain.bindings.calls import Call, checked_address
from deepsquare_chain.chain.bindings.contracts import (
    APPROVER_ROLE,
    METASCHEDULER_ROLE,
    MINTER_ROLE,
    Contracts,
)
from deepsquare_chain.chain.bindings.deployment import DAY, Deployment, Timeouts
from deepsquare_chain.chain.rpc.node_errors import error_body, is_verdict, node_message
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.errors import EndpointError, UsageError


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
        w3: Connection made by `connect`.
        sender: Sends the transactions and pays the gas.
        params: Parameters of the grid; the defaults if None.
        extra: Additional values of the record (faucet, endpoint, ...).
        timeout: Seconds for each transaction.
        resumable: Use idempotency keys: with the same parameters and a durable outbox, a second
            call resumes an interrupted deployment instead of starting another one.

    Raises:
        UsageError: A parameter is out of bounds, or a role holder is not an address.
        RevertedError: A contract reverted; the grid is not usable then.
        InsufficientFundsError: The account can't pay the gas.
    """
    params = params or GridParams()
    _check(params)
    run = _Deploying(sender, params, timeout, resumable=resumable)
    roles = run.roles()  # validated before any transaction is sent
    await check_rules(w3)
    first_blocks = await _reused(w3, params)
    admin = sender.address
    treasury = checked_address(params.treasury or admin, "treasury")
    credit, registry, forwarder = await asyncio.gather(
        run.create_unless(params.credit, "Credit", admin, params.admin_delay),
        run.create_unless(
            params.registry, "ProviderRegistry", admin, params.admin_delay, params.approval_period
        ),
        run.create("ERC2771Forwarder", FORWARDER_NAME),
    )
    timeouts = tuple(asdict(params.timeouts).values())
    scheduler = await run.create(
        *("MetaScheduler", admin, params.admin_delay, credit, registry),
        *(treasury, forwarder, params.fee_bps, timeouts),
    )
    deployment = Deployment(
        chain_id=sender.chain_id,
        credit=credit,
        registry=registry,
        scheduler=scheduler,
        treasury=treasury,
        forwarder=forwarder,
        block=min([*run.blocks, *first_blocks]),
        transactions=run.transactions,
        constructor_args=run.arguments,
        compiler_digest=load_artifact("MetaScheduler").input_digest,
        extra={"admin": admin, **(extra or {})},
    )
    await run.grant(Contracts(w3, deployment), roles)
    return deployment


class _Deploying:
    """One deployment run, and its results for the record."""

    def __init__(
        self, sender: Sender, params: GridParams, timeout: float, *, resumable: bool
    ) -> None:
        self.transactions: dict[str, str] = {}
        self.arguments: dict[str, dict[str, Any]] = {}
        self.blocks: list[int] = []
        self._sender = sender
        self._params = params
        self._timeout = timeout
        self._resumable = resumable

    def roles(self) -> list[tuple[str, bytes, str]]:
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

    async def create_unless(self, there: str, name: str, *arguments: Any) -> str:
        """Return the address of an existing contract, or deploy a new one."""
        return checked_address(there) if there else await self.create(name, *arguments)

    async def create(self, name: str, *arguments: Any) -> str:
        """Deploy one contract and return its address."""
        code = interface(name).creation_code(*arguments)
        receipt = await self._send(name, Call(to="", data=code, label=f"deploy {name}"))
        constructor = interface(name).entries("constructor")[0]
        names = [part["name"].rstrip("_") for part in constructor["inputs"]]
        self.arguments[name] = dict(zip(names, map(_plain, arguments), strict=True))
        return checked_address(receipt)

    async def grant(self, contracts: Contracts, roles: list[tuple[str, bytes, str]]) -> None:
        """Grant all roles concurrently."""
        by_name = {
            "credit": contracts.credit,
            "registry": contracts.registry,
            "scheduler": contracts.scheduler,
        }
        await asyncio.gather(
            *(
                self._send(f"grant {contract} {holder}", by_name[contract].grant_role(role, holder))
                for contract, role, holder in roles
            )
        )

    async def _send(self, name: str, call: Call) -> str:
        digest = hashlib.sha256(call.to.encode() + call.data).hexdigest()
        key = f"{name} {digest}" if self._resumable else None
        receipt = await self._sender.send(call, timeout=self._timeout, key=key)
        self.transactions[name] = receipt.hash
        self.blocks.append(receipt.block_number)
        return receipt.contract


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
        if not is_verdict("eth_call", body):
            raise EndpointError(
                f"The node does not try the chain's rules: {node_message(error)}",  # type: ignore[arg-type]
                hint="Use another endpoint: it must serve eth_call without a recipient.",
            ) from None
        raise UsageError(
            "This chain does not have the Cancun rules that the contracts need: it refused the "
            "instructions MCOPY and TLOAD",
            hint="Use a chain or node with Cancun (March 2024) or later; for anvil: --hardfork cancun.",
        ) from None


async def _reused(w3: AsyncWeb3[Any], params: GridParams) -> list[int]:
    """Verify the reused contracts and return their first blocks.

    Raises:
        UsageError: The code at an address is another contract, or its first block can't be found.
    """
    reused = {"Credit": params.credit, "ProviderRegistry": params.registry}
    blocks = []
    for name, text in reused.items():
        if not text:
            continue
        address = checked_address(text)
        code = bytes(await w3.eth.get_code(address))
        if not load_artifact(name).matches(code):
            raise UsageError(
                f"The code at {address} is not this package's {name}",
                hint="Name the contract of the earlier deployment's record.",
            )
        blocks.append(await _first_block(w3, address, params.since_block))
    return blocks


async def _first_block(w3: AsyncWeb3[Any], address: ChecksumAddress, given: int | None) -> int:
    """Find the first block with code at an address by binary search; needs an archive node."""
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
            f"The node does not tell when {address} was deployed: {node_message(error)}",
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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
