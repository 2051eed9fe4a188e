"""Commands for the contracts: deploy, record, verify, show addresses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind
from deepsquare_chain.cli.types import whole_number

if TYPE_CHECKING:
    from deepsquare_chain.chain.bindings.deployment import Deployment
    from deepsquare_chain.chain.deploying import GridParams

app = typer.Typer(help="Deploy, record, verify, show addresses.", no_args_is_help=True)

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


@command(app)
async def addresses(context: CommandContext) -> None:
    """Show the deployment record."""
    from deepsquare_chain.chain.bindings.deployment import Deployment

    _print_addresses(context, Deployment.load(context.settings.deployment))


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
    from deepsquare_chain.client.deploy import (
        submit_blockscout,
        submit_sourcify,
        write_tree,
    )
    from deepsquare_chain.client.network import open_grid, transport_of
    from deepsquare_chain.errors import AuditError

    async with open_grid(context.settings) as contracts:
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
    fee_bps: Annotated[
        int, typer.Option(parser=whole_number(0, 2_000), metavar="N", help="Fee in basis points.")
    ] = 500,
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
        typer.Option(
            parser=whole_number(0),
            metavar="N",
            help="Block in which the older of these two was deployed; looked up by default.",
        ),
    ] = None,
    demo_timeouts: Annotated[
        bool, typer.Option("--demo-timeouts", help="Use timeouts of seconds, for tests.")
    ] = False,
    salt: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(0, 2**256 - 1),
            metavar="N",
            help="With --unsigned: another number gives another grid of the same parameters; 0 by default.",
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
    from deepsquare_chain.errors import UsageError

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


@command(app)
async def record(
    context: CommandContext,
    scheduler: Annotated[
        str, typer.Argument(metavar="METASCHEDULER", help="Address of the MetaScheduler.")
    ],
    since_block: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(0),
            metavar="N",
            help="Block of the first deployment, or an earlier one; looked up by default.",
        ),
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
    context.print_unsigned(made.deployment.chain_id, made.account, made.calls)
    if not made.calls:
        context.unchanged("All of this is already deployed.")
    note(
        "After its execution: `deepsquare contracts record "
        f"{made.deployment.scheduler}`, then `deepsquare contracts verify`."
    )


def _print_written(context: CommandContext, deployment: Deployment) -> None:
    context.printer.note(f"The record is {context.settings.deployment}.")
    _print_addresses(context, deployment)


def _print_addresses(context: CommandContext, deployment: Deployment) -> None:
    context.printer.record(
        _ADDRESSES,
        (
            deployment.chain_id,
            deployment.credit,
            deployment.registry,
            deployment.scheduler,
            deployment.treasury,
            deployment.block,
        ),
    )
