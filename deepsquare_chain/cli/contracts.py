"""Commands for the contracts: deploy, record, verify, show addresses, and administer them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind, iso_time, row_of
from deepsquare_chain.cli.types import AgreeOption, number_option, whole_number
from deepsquare_chain.errors import AuditError, UsageError
from deepsquare_chain.job import ProviderStatus

if TYPE_CHECKING:
    from deepsquare_chain.chain.bindings.calls import Call, ContractBase
    from deepsquare_chain.chain.bindings.contracts import Contracts
    from deepsquare_chain.chain.bindings.deployment import Deployment
    from deepsquare_chain.chain.deploying import GridParams

app = typer.Typer()

_ADDRESSES: Final = (
    Column("chain_id", "chain", Kind.NUMBER),
    Column("credit", "Credit", Kind.HASH),
    Column("registry", "ProviderRegistry", Kind.HASH),
    Column("scheduler", "MetaScheduler", Kind.HASH),
    Column("treasury", "treasury", Kind.HASH),
    Column("block", "deployed in block", Kind.NUMBER),
)
_VERIFIED: Final = (
    Column("what", "checked"),
    Column("ok", "matches the record", Kind.FLAG),
    Column("detail", "detail"),
)

admin_app = typer.Typer()

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


@command(app)
async def addresses(context: CommandContext) -> None:
    """Show the deployment record."""

    _print_addresses(context, context.deployment)


@command(app)
async def verify(
    context: CommandContext,
    write: Annotated[
        Path | None,
        typer.Option(
            help="Folder for compiler input and sources, as read by Sourcify and Otterscan."
        ),
    ] = None,
    sourcify: Annotated[str, typer.Option(help="Sourcify server to submit the sources to.")] = "",
    blockscout: Annotated[
        str, typer.Option(help="Blockscout explorer to submit the sources to.")
    ] = "",
) -> int:
    """Compare code and parameters on chain with this build, list roles; exit 10 if they differ."""
    from deepsquare_chain.chain.deploying import named_holders, verify_deployment
    from deepsquare_chain.client.deploy import submit_blockscout, submit_sourcify, write_tree
    from deepsquare_chain.client.network import transport_of

    async with context.grid() as contracts:
        checks = await verify_deployment(contracts.w3, contracts.deployment)
        holders = await named_holders(contracts.w3, contracts.deployment)
    rows = [(check.subject, check.ok, check.detail) for check in checks]
    rows += [(f"{holder} has {role} of {name}", True, "") for name, role, holder in holders]
    is_verified = all(check.ok for check in checks)
    if is_verified and write is not None:
        files = write_tree(contracts.deployment, write)
        context.printer.note(f"Wrote {len(files)} files to {write}.")
    # Sources are submitted only if they match the deployed code.
    for url, submit in ((sourcify, submit_sourcify), (blockscout, submit_blockscout)):
        if is_verified and url:
            submissions = await submit(
                url, contracts.deployment, transport=transport_of(context.settings)
            )
            rows += [
                (f"{submission.name} at {submission.verifier}", submission.ok, submission.detail)
                for submission in submissions
            ]
    context.printer.rows(_VERIFIED, rows)
    return 0 if all(ok for _, ok, _ in rows) else AuditError.exit_code


@command(app, sends=True)
async def deploy(
    context: CommandContext,
    fee_bps: Annotated[int, number_option("Fee in basis points.", 0, 2_000)] = 500,
    treasury: Annotated[
        str, typer.Option(help="Account that receives the fees; this wallet by default.")
    ] = "",
    scheduler: Annotated[
        list[str] | None, typer.Option(help="Account that may assign jobs; may be repeated.")
    ] = None,
    credit: Annotated[
        str, typer.Option(help="Address of an existing Credit, to deploy a new version around it.")
    ] = "",
    registry: Annotated[str, typer.Option(help="Address of an existing ProviderRegistry.")] = "",
    since_block: Annotated[
        int | None,
        number_option(
            "Block in which the older of these two was deployed; looked up by default.", 0
        ),
    ] = None,
    demo_timeouts: Annotated[
        bool, typer.Option("--demo-timeouts", help="Use timeouts of seconds, for tests.")
    ] = False,
    salt: Annotated[
        int | None,
        number_option(
            "With --unsigned: another number gives another grid of the same parameters; 0 by default.",
            0,
            2**256 - 1,
        ),
    ] = None,
) -> None:
    """Deploy new contracts from this wallet and write the deployment record.

    With --unsigned the contracts are created with CREATE2, so that their addresses are known before
    anything is sent. Afterwards `deepsquare contracts record` writes the deployment record.
    """
    from dataclasses import replace

    from deepsquare_chain.chain.deploying import DEMO_PARAMS, GridParams
    from deepsquare_chain.client.deploy import deploy as run

    params = replace(
        DEMO_PARAMS if demo_timeouts else GridParams(),
        fee_bps=fee_bps,
        treasury=treasury,
        schedulers=tuple(scheduler or ()),
        credit=credit,
        registry=registry,
        since_block=since_block,
    )
    if context.unsigned is not None:
        await _print_plan(context, params, context.unsigned, salt or 0)
        return
    if salt is not None:
        raise UsageError(
            "--salt has no effect without --unsigned",
            hint="A wallet's own deployments get a new address each time.",
        )
    deployment = await run(context.settings, params)
    _print_written(context, deployment)
    if not treasury:
        _note_treasury(context, deployment)


@command(app)
async def record(
    context: CommandContext,
    scheduler: Annotated[
        str, typer.Argument(metavar="METASCHEDULER", help="Address of the MetaScheduler.")
    ],
    since_block: Annotated[
        int | None,
        number_option("Block of the first deployment, or an earlier one; looked up by default.", 0),
    ] = None,
) -> None:
    """Write the deployment record of contracts that exist, such as those that a Safe deployed."""
    from deepsquare_chain.client.deploy import record as run

    _print_written(context, await run(context.settings, scheduler, since_block))


async def _print_plan(context: CommandContext, params: GridParams, account: str, salt: int) -> None:
    """Print the calls of a deployment, and notes with the addresses and the next step."""
    from deepsquare_chain.client.deploy import plan

    made = await plan(context.settings, params, account, salt)
    note = context.printer.note
    for name, address in made.deployment.contracts.items():
        note(f"{name} has the address {address}.")
    if not params.schedulers:
        note(f"No --scheduler was given: {made.account} gets the role of the scheduler.")
    if not params.treasury:
        _note_treasury(context, made.deployment)
    context.print_unsigned(made.deployment.chain_id, made.account, made.calls)
    if not made.calls:
        context.unchanged("All of this is already deployed.")
    note(
        "After its execution: `deepsquare contracts record "
        f"{made.deployment.scheduler}`, then `deepsquare contracts verify`."
    )


def _note_treasury(context: CommandContext, deployment: Deployment) -> None:
    context.printer.note(
        f"No --treasury was given: {deployment.treasury} receives the fees. This can't be changed."
    )


def _print_written(context: CommandContext, deployment: Deployment) -> None:
    context.printer.note(f"The record is {context.settings.deployment}.")
    _print_addresses(context, deployment)


def _print_addresses(context: CommandContext, deployment: Deployment) -> None:
    context.printer.record(_ADDRESSES, row_of(_ADDRESSES, deployment))


@command(admin_app, sends=True)
async def approve(
    context: CommandContext,
    provider: ProviderArgument,
    version: Annotated[
        int | None, number_option("Proposed version; the latest by default.", 1)
    ] = None,
) -> None:
    """Approve a version of a provider's hardware."""
    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        record = await registry.provider_of(provider)
        call = registry.approve(provider, version or record.pending_version)
        context.receipt(await wallet.send(call))


@command(admin_app, sends=True)
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
        risk = f"Provider {record.id} ({record.account}) gets no new jobs from now on"
        risk += f"; jobs on {load.cpus} CPUs are assigned to it now." if load.cpus else "."
        if context.confirm_all([risk], yes=yes):
            context.receipt(await wallet.send(registry.ban(provider, reason)))


@command(admin_app, sends=True)
async def unban(context: CommandContext, provider: ProviderArgument) -> None:
    """Lift a provider's ban."""
    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        record = await registry.provider_of(provider)
        if record.status is not ProviderStatus.BANNED:
            context.unchanged(f"Provider {record.id} is not banned.")
            return
        context.receipt(await wallet.send(registry.unban(provider)))


@command(admin_app, "open", sends=True)
async def open_submissions(context: CommandContext) -> None:
    """Open the scheduler for new jobs."""
    await _set_open(context, is_open=True)


@command(admin_app, sends=True)
async def close(context: CommandContext) -> None:
    """Close the scheduler for new jobs; live jobs continue."""
    await _set_open(context, is_open=False)


@command(admin_app)
async def params(context: CommandContext) -> None:
    """Show the parameters of this deployment, which apply to all jobs."""

    async with context.grid() as contracts:
        parameters = await contracts.scheduler.parameters()
        period = await contracts.registry.approval_period()
    context.printer.record(_PARAMS, row_of(_PARAMS, parameters, approval_period=period))


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


@command(admin_app)
async def roles(context: CommandContext) -> None:
    """List the holders of each role of the contracts."""
    from deepsquare_chain.chain.deploying import named_holders

    async with context.grid() as contracts:
        holders = await named_holders(contracts.w3, contracts.deployment)
    context.printer.rows(_ROLES, holders)


@command(admin_app, sends=True)
async def grant(context: CommandContext, role: RoleArgument, account: HolderArgument) -> None:
    """Grant a role to an account; for the administrator."""
    async with context.wallet() as wallet:
        contract, identifier = _role(wallet.contracts, role)
        if await contract.has_role(identifier, account):
            context.unchanged(f"{account} already has the role {role}.")
            return
        context.receipt(await wallet.send(contract.grant_role(identifier, account)))


@command(admin_app, sends=True)
async def revoke(
    context: CommandContext, role: RoleArgument, account: HolderArgument, yes: AgreeOption = False
) -> None:
    """Revoke a role from an account; for the administrator."""
    from deepsquare_chain.chain.deploying import role_holders

    async with context.wallet() as wallet:
        contract, identifier = _role(wallet.contracts, role)
        if not await contract.has_role(identifier, account):
            context.unchanged(f"{account} does not have the role {role}.")
            return
        holders = (await role_holders(wallet.contracts.w3, wallet.contracts.deployment)).get(
            contract.address, {}
        )
        remaining = len(holders.get(identifier, set())) - 1
        risk = f"{account} will no longer have the role {role}"
        risk += (
            f"; {remaining} other{'s have' if remaining > 1 else ' has'} it."
            if remaining > 0
            else ", and no other account has it."
        )
        if context.confirm_all([risk], yes=yes):
            context.receipt(await wallet.send(contract.revoke_role(identifier, account)))


@command(admin_app, sends=True)
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


@command(admin_app, sends=True)
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

    if (account is not None) + accept + cancel > 1:
        raise UsageError("Give exactly one of an account, --accept and --cancel")
    if account is None and not accept and not cancel:
        async with context.grid() as contracts:
            await _print_handover(context, contracts)
        return
    async with context.wallet() as wallet:
        contracts = wallet.contracts
        now = await chain_time(contracts.w3)
        following = None if account is None else checked_address(account)
        calls = []
        for contract in (contracts.credit, contracts.registry, contracts.scheduler):
            if following is not None:
                step = await _begin(contract, following)
            elif accept:
                step = await _accept(contract, wallet.address, now)
            else:
                step = await _cancel(contract)
            if isinstance(step, str):
                context.printer.note(step)
            else:
                calls.append(step)
        if not calls:
            context.printer.note("Nothing was sent.")
        elif context.confirm_all(
            [f"{account} is going to be administrator of all contracts."] if account else [],
            yes=yes,
        ):
            for call in calls:
                await wallet.send(call)
        if not context.unsigned:
            await _print_handover(context, contracts)


async def _begin(contract: ContractBase, following: str) -> Call | str:
    """Return the call that names the next administrator of a contract, or why there is none."""
    named, _ = await contract.pending_admin()
    if following == named:
        return f"The handover of {contract.artifact} to {following} is pending."
    if following == await contract.default_admin():
        return f"{following} is the administrator of {contract.artifact} already."
    return contract.begin_handover(following)


async def _accept(contract: ContractBase, account: str, now: int) -> Call | str:
    """Return the call that accepts the handover of a contract, or why there is none."""
    named, schedule = await contract.pending_admin()
    if named != account:
        return f"No handover of {contract.artifact} to {account} is pending."
    if schedule >= now:
        return f"{contract.artifact} can be accepted after {iso_time(schedule)} UTC."
    return contract.accept_handover()


async def _cancel(contract: ContractBase) -> Call | str:
    """Return the call that cancels the handover of a contract, or why there is none."""
    named, _ = await contract.pending_admin()
    if not named:
        return f"No handover of {contract.artifact} is pending."
    return contract.cancel_handover()


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
