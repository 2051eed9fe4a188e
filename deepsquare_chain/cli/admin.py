"""Commands for administrators: roles, handover, providers, fee, open and close submissions."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind
from deepsquare_chain.cli.types import AgreeOption, whole_number
from deepsquare_chain.job import ProviderStatus

if TYPE_CHECKING:
    from deepsquare_chain.chain.bindings.calls import ContractBase
    from deepsquare_chain.chain.bindings.contracts import Contracts

app = typer.Typer(help="Roles, providers, fee, handover, open and close.", no_args_is_help=True)

_PARAMS: Final = (
    Column("claim_timeout", "claim timeout (s)", Kind.NUMBER),
    Column("pending_timeout", "pending timeout (s)", Kind.NUMBER),
    Column("pending_expiry", "pending expiry (s)", Kind.NUMBER),
    Column("response_timeout", "response timeout (s)", Kind.NUMBER),
    Column("response_blocks", "response blocks", Kind.NUMBER),
    Column("lost_timeout", "lost timeout (s)", Kind.NUMBER),
    Column("report_grace", "report grace (s)", Kind.NUMBER),
    Column("top_up_notice", "top-up notice (s)", Kind.NUMBER),
    Column("collect_interval", "interim payment interval (s)", Kind.NUMBER),
    Column("fee_bps", "fee (basis points)", Kind.NUMBER),
    Column("submissions_open", "accepts new jobs", Kind.FLAG),
    Column("approval_period", "approval period (s)", Kind.NUMBER),
    Column("credit", "credit", Kind.HASH),
    Column("registry", "registry", Kind.HASH),
    Column("treasury", "treasury", Kind.HASH),
    Column("forwarder", "forwarder", Kind.HASH),
)
_ROLES: Final = (
    Column("contract", "contract", Kind.WORD),
    Column("role", "role", Kind.WORD),
    Column("holder", "holder", Kind.HASH),
)
_HANDOVER: Final = (
    Column("contract", "contract", Kind.WORD),
    Column("admin", "administrator", Kind.HASH),
    Column("next", "next", Kind.HASH),
    Column("from", "may accept after (UTC)", Kind.TIME),
)
ProviderArgument = Annotated[str, typer.Argument(metavar="PROVIDER", help="Its address.")]


@command(app, sends=True)
async def approve(
    context: CommandContext,
    provider: ProviderArgument,
    version: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1), metavar="N", help="Proposed version; the latest by default."
        ),
    ] = None,
) -> None:
    """Approve a version of a provider's hardware."""

    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        record = await registry.provider_of(provider)
        call = registry.approve(provider, version or record.pending_version)
        context.receipt(await wallet.send(call))


@command(app, sends=True)
async def ban(
    context: CommandContext,
    provider: ProviderArgument,
    reason: Annotated[str, typer.Option(help="Reason, for display; at most 256 bytes.")] = "",
    yes: AgreeOption = False,
) -> None:
    """Ban a provider: it gets no new jobs."""

    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        record = await registry.provider_of(provider)
        if record.status is ProviderStatus.BANNED:
            context.unchanged(f"Provider {record.id} is already banned.")
            return
        load = await wallet.contracts.scheduler.load_of(record.id)
        doubt = f"Provider {record.id} ({record.account}) gets no new jobs from now on"
        doubt += f"; jobs on {load.cpus} CPUs are assigned to it now." if load.cpus else "."
        if context.confirm_all([doubt], yes=yes):
            context.receipt(await wallet.send(registry.ban(provider, reason)))


@command(app, sends=True)
async def unban(context: CommandContext, provider: ProviderArgument) -> None:
    """Lift a provider's ban."""

    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        record = await registry.provider_of(provider)
        if record.status is not ProviderStatus.BANNED:
            context.unchanged(f"Provider {record.id} is not banned.")
            return
        context.receipt(await wallet.send(registry.unban(provider)))


@command(app, "open", sends=True)
async def open_submissions(context: CommandContext) -> None:
    """Open the scheduler for new jobs."""
    await _set_open(context, is_open=True)


@command(app, sends=True)
async def close(context: CommandContext) -> None:
    """Close the scheduler for new jobs; live jobs continue."""
    await _set_open(context, is_open=False)


@command(app)
async def params(context: CommandContext) -> None:
    """Show the parameters of this deployment, which apply to all jobs."""
    from deepsquare_chain.client.network import open_grid

    async with open_grid(context.settings) as contracts:
        parameters = await contracts.scheduler.parameters()
        period = await contracts.registry.approval_period()
    context.printer.record(
        _PARAMS,
        (
            parameters.claim_timeout,
            parameters.pending_timeout,
            parameters.pending_expiry,
            parameters.response_timeout,
            parameters.response_blocks,
            parameters.lost_timeout,
            parameters.report_grace,
            parameters.top_up_notice,
            parameters.collect_interval,
            parameters.fee_bps,
            parameters.submissions_open,
            period,
            parameters.credit,
            parameters.registry,
            parameters.treasury,
            parameters.forwarder,
        ),
    )


async def _set_open(context: CommandContext, *, is_open: bool) -> None:

    async with context.wallet() as wallet:
        scheduler = wallet.contracts.scheduler
        if await scheduler.submissions_open() is is_open:
            context.unchanged(f"Submissions are already {'open' if is_open else 'closed'}.")
            return
        context.receipt(await wallet.send(scheduler.set_submissions_open(is_open)))


class Role(StrEnum):
    """Roles that the administrator can grant."""

    SCHEDULER = "scheduler"
    APPROVER = "approver"
    MINTER = "minter"


RoleArgument = Annotated[
    Role,
    typer.Argument(
        metavar="ROLE",
        help="scheduler (assigns jobs), approver (of providers), minter (of credits).",
    ),
]
HolderArgument = Annotated[str, typer.Argument(metavar="ACCOUNT", help="Address of the holder.")]


@command(app)
async def roles(context: CommandContext) -> None:
    """List the holders of each role of the contracts."""
    from deepsquare_chain.chain.deploying import named_holders
    from deepsquare_chain.client.network import open_grid

    async with open_grid(context.settings) as contracts:
        holders = await named_holders(contracts.w3, contracts.deployment)
    context.printer.rows(_ROLES, holders)


@command(app, sends=True)
async def grant(context: CommandContext, role: RoleArgument, account: HolderArgument) -> None:
    """Grant a role to an account; for the administrator."""
    async with context.wallet() as wallet:
        contract, identifier = _role(wallet.contracts, role)
        if await contract.has_role(identifier, account):
            context.unchanged(f"{account} already is {role}.")
            return
        context.receipt(await wallet.send(contract.grant_role(identifier, account)))


@command(app, sends=True)
async def revoke(
    context: CommandContext,
    role: RoleArgument,
    account: HolderArgument,
    yes: AgreeOption = False,
) -> None:
    """Revoke a role from an account; for the administrator."""
    from deepsquare_chain.chain.deploying import role_holders

    async with context.wallet() as wallet:
        contract, identifier = _role(wallet.contracts, role)
        if not await contract.has_role(identifier, account):
            context.unchanged(f"{account} is not {role}.")
            return
        holders = (await role_holders(wallet.contracts.w3, wallet.contracts.deployment)).get(
            contract.address, {}
        )
        remaining = len(holders.get(identifier, set())) - 1
        doubt = f"{account} will no longer be {role}"
        doubt += (
            f"; {remaining} other{'s have' if remaining > 1 else ' has'} the role."
            if remaining > 0
            else (", and no other account has the role.")
        )
        if context.confirm_all([doubt], yes=yes):
            context.receipt(await wallet.send(contract.revoke_role(identifier, account)))


@command(app, sends=True)
async def fee(
    context: CommandContext,
    basis_points: Annotated[
        int,
        typer.Argument(
            parser=whole_number(0, 2_000, 250),
            metavar="BASIS_POINTS",
            help="250 are 2.5 %; at most 2000.",
        ),
    ],
) -> None:
    """Set the treasury's share of jobs that are assigned from now on; for the administrator."""
    async with context.wallet() as wallet:
        scheduler = wallet.contracts.scheduler
        if (await scheduler.parameters()).fee_bps == basis_points:
            context.unchanged(f"The fee is already {basis_points} basis points.")
            return
        context.receipt(await wallet.send(scheduler.set_fee(basis_points)))


@command(app, sends=True)
async def handover(
    context: CommandContext,
    account: Annotated[
        str | None,
        typer.Argument(metavar="ACCOUNT", help="The next administrator, who must accept."),
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Accept the handovers to this wallet.")
    ] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel a pending handover.")] = False,
    yes: AgreeOption = False,
) -> None:
    """Hand over the administration of all three contracts in two steps; without options show its state.

    The administrator names the next one, and that account accepts after the delay of the contracts.
    """
    from deepsquare_chain.chain.bindings.calls import checked_address
    from deepsquare_chain.chain.rpc.pool import chain_time
    from deepsquare_chain.client.network import open_grid
    from deepsquare_chain.errors import UsageError

    if (account is not None) + accept + cancel > 1:
        raise UsageError("Give exactly one of an account, --accept and --cancel")
    if account is None and not accept and not cancel:
        async with open_grid(context.settings) as contracts:
            await _print_handover(context, contracts)
        return
    async with context.wallet() as wallet:
        contracts = wallet.contracts
        now = await chain_time(contracts.w3)
        calls = []
        for contract in (contracts.credit, contracts.registry, contracts.scheduler):
            named, schedule = await contract.pending_admin()
            if cancel and named:
                calls.append(contract.cancel_handover())
            elif accept and named == wallet.address and schedule < now:
                calls.append(contract.accept_handover())
            elif account is not None and named != checked_address(account):
                calls.append(contract.begin_handover(account))
        if not calls:
            context.unchanged("There is nothing to do, or the delay has not passed yet.")
        elif context.confirm_all(
            [f"{account} is going to be administrator of all contracts."] if account else [],
            yes=yes,
        ):
            for call in calls:
                await wallet.send(call)
        if not context.unsigned:
            await _print_handover(context, contracts)


async def _print_handover(context: CommandContext, contracts: Contracts) -> None:
    rows = []
    for contract in (contracts.credit, contracts.registry, contracts.scheduler):
        named, schedule = await contract.pending_admin()
        admin = await contract.default_admin()
        rows.append((contract.artifact, admin, named or None, schedule or None))
    context.printer.rows(_HANDOVER, rows)


def _role(contracts: Contracts, role: Role) -> tuple[ContractBase, bytes]:
    """Return the contract of a role, and the identifier of the role in it."""
    from deepsquare_chain.chain.bindings.deployment import (
        APPROVER_ROLE,
        METASCHEDULER_ROLE,
        MINTER_ROLE,
    )

    match role:
        case Role.SCHEDULER:
            return contracts.scheduler, METASCHEDULER_ROLE
        case Role.APPROVER:
            return contracts.registry, APPROVER_ROLE
        case Role.MINTER:
            return contracts.credit, MINTER_ROLE
