"""For the holders of roles: approve and ban providers, open and close the scheduler."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind

app = typer.Typer(help="Approve and ban providers, open and close.", no_args_is_help=True)

_PARAMS: Final = (
    Column("claim_timeout", "claim timeout (s)", Kind.NUMBER),
    Column("pending_timeout", "pending timeout (s)", Kind.NUMBER),
    Column("response_timeout", "response timeout (s)", Kind.NUMBER),
    Column("response_blocks", "response blocks", Kind.NUMBER),
    Column("report_grace", "report grace (s)", Kind.NUMBER),
    Column("top_up_notice", "top-up notice (s)", Kind.NUMBER),
    Column("fee_bps", "fee (basis points)", Kind.NUMBER),
    Column("submissions_open", "takes new jobs", Kind.FLAG),
    Column("approval_period", "approval period (s)", Kind.NUMBER),
    Column("credit", "credit"),
    Column("registry", "registry"),
    Column("treasury", "treasury"),
)
ProviderArgument = Annotated[str, typer.Argument(metavar="PROVIDER", help="Its address.")]


@command(app)
async def approve(
    context: CommandContext,
    provider: ProviderArgument,
    version: Annotated[
        int | None, typer.Option(min=1, help="Proposed version; the latest by default.")
    ] = None,
) -> None:
    """Put a version of a provider's hardware in force."""
    from deepsquare_chain.client.network import open_wallet

    async with open_wallet(context.settings) as wallet:
        registry = wallet.contracts.registry
        found = await registry.provider_of(provider)
        call = registry.approve(provider, version or found.pending_version)
        context.receipt(await wallet.send(call))


@command(app)
async def ban(
    context: CommandContext,
    provider: ProviderArgument,
    reason: Annotated[str, typer.Option(help="For people; at most 256 bytes.")] = "",
) -> None:
    """Shut a provider out."""
    from deepsquare_chain.client.network import open_wallet

    async with open_wallet(context.settings) as wallet:
        registry = wallet.contracts.registry
        await registry.provider_of(provider)
        context.receipt(await wallet.send(registry.ban(provider, reason)))


@command(app)
async def unban(context: CommandContext, provider: ProviderArgument) -> None:
    """Let a provider in again."""
    from deepsquare_chain.client.network import open_wallet

    async with open_wallet(context.settings) as wallet:
        registry = wallet.contracts.registry
        await registry.provider_of(provider)
        context.receipt(await wallet.send(registry.unban(provider)))


@command(app, "open")
async def open_submissions(context: CommandContext) -> None:
    """Take new jobs."""
    await _set_open(context, is_open=True)


@command(app)
async def close(context: CommandContext) -> None:
    """Take no new jobs; live ones go on."""
    await _set_open(context, is_open=False)


@command(app)
async def params(context: CommandContext) -> None:
    """Show what rules all jobs of this deployment."""
    from deepsquare_chain.client.network import open_grid

    async with open_grid(context.settings) as contracts:
        found = await contracts.scheduler.parameters()
        period = await contracts.registry.approval_period()
    context.printer.record(
        _PARAMS,
        (
            found.claim_timeout,
            found.pending_timeout,
            found.response_timeout,
            found.response_blocks,
            found.report_grace,
            found.top_up_notice,
            found.fee_bps,
            found.submissions_open,
            period,
            found.credit,
            found.registry,
            found.treasury,
        ),
    )


async def _set_open(context: CommandContext, *, is_open: bool) -> None:
    from deepsquare_chain.client.network import open_wallet

    async with open_wallet(context.settings) as wallet:
        call = wallet.contracts.scheduler.set_submissions_open(is_open)
        context.receipt(await wallet.send(call))
