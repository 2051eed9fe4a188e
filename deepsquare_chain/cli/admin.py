"""For the holders of roles: approve and ban providers, open and close the scheduler."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from deepsquare_chain.cli.frame import Desk, command
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
    desk: Desk,
    provider: ProviderArgument,
    version: Annotated[
        int | None, typer.Option(min=1, help="Proposed version; the latest by default.")
    ] = None,
) -> None:
    """Put a version of a provider's hardware in force."""
    from deepsquare_chain.client.network import open_wallet

    async with open_wallet(desk.settings) as wallet:
        registry = wallet.contracts.registry
        found = await registry.provider_of(provider)
        call = registry.approve(provider, version or found.pending_version)
        desk.receipt(await wallet.send(call))


@command(app)
async def ban(
    desk: Desk,
    provider: ProviderArgument,
    reason: Annotated[str, typer.Option(help="For people; at most 256 bytes.")] = "",
) -> None:
    """Shut a provider out."""
    from deepsquare_chain.client.network import open_wallet

    async with open_wallet(desk.settings) as wallet:
        registry = wallet.contracts.registry
        await registry.provider_of(provider)
        desk.receipt(await wallet.send(registry.ban(provider, reason)))


@command(app)
async def unban(desk: Desk, provider: ProviderArgument) -> None:
    """Let a provider in again."""
    from deepsquare_chain.client.network import open_wallet

    async with open_wallet(desk.settings) as wallet:
        registry = wallet.contracts.registry
        await registry.provider_of(provider)
        desk.receipt(await wallet.send(registry.unban(provider)))


@command(app, "open")
async def open_submissions(desk: Desk) -> None:
    """Take new jobs."""
    await _set_open(desk, is_open=True)


@command(app)
async def close(desk: Desk) -> None:
    """Take no new jobs; live ones go on."""
    await _set_open(desk, is_open=False)


@command(app)
async def params(desk: Desk) -> None:
    """Show what rules all jobs of this deployment."""
    from deepsquare_chain.client.network import open_grid

    async with open_grid(desk.settings) as contracts:
        found = await contracts.scheduler.parameters()
        period = await contracts.registry.approval_period()
    desk.printer.record(
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


async def _set_open(desk: Desk, *, is_open: bool) -> None:
    from deepsquare_chain.client.network import open_wallet

    async with open_wallet(desk.settings) as wallet:
        call = wallet.contracts.scheduler.set_submissions_open(is_open)
        desk.receipt(await wallet.send(call))
