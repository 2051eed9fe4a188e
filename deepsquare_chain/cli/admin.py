"""For the holders of roles: approve and ban providers, open and close the scheduler."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind
from deepsquare_chain.cli.types import AgreeOption, whole
from deepsquare_chain.job import ProviderStatus

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
    Column("credit", "credit", Kind.HASH),
    Column("registry", "registry", Kind.HASH),
    Column("treasury", "treasury", Kind.HASH),
)
ProviderArgument = Annotated[str, typer.Argument(metavar="PROVIDER", help="Its address.")]


@command(app)
async def approve(
    context: CommandContext,
    provider: ProviderArgument,
    version: Annotated[
        int | None,
        typer.Option(parser=whole(1), metavar="N", help="Proposed version; the latest by default."),
    ] = None,
) -> None:
    """Put a version of a provider's hardware in force."""

    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        found = await registry.provider_of(provider)
        call = registry.approve(provider, version or found.pending_version)
        context.receipt(await wallet.send(call))


@command(app)
async def ban(
    context: CommandContext,
    provider: ProviderArgument,
    reason: Annotated[str, typer.Option(help="For people; at most 256 bytes.")] = "",
    yes: AgreeOption = False,
) -> None:
    """Ban a provider: it gets no new jobs."""

    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        found = await registry.provider_of(provider)
        if found.status is ProviderStatus.BANNED:
            context.unchanged(f"Provider {found.id} is banned already.")
            return
        load = await wallet.contracts.scheduler.load_of(found.id)
        doubt = f"Provider {found.id} ({found.account}) gets no new jobs from now on"
        doubt += f"; jobs on {load.cpus} CPUs are with it now." if load.cpus else "."
        if context.agrees([doubt], yes=yes):
            context.receipt(await wallet.send(registry.ban(provider, reason)))


@command(app)
async def unban(context: CommandContext, provider: ProviderArgument) -> None:
    """Lift a provider's ban."""

    async with context.wallet() as wallet:
        registry = wallet.contracts.registry
        found = await registry.provider_of(provider)
        if found.status is not ProviderStatus.BANNED:
            context.unchanged(f"Provider {found.id} is not banned.")
            return
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

    async with context.wallet() as wallet:
        scheduler = wallet.contracts.scheduler
        if await scheduler.submissions_open() is is_open:
            context.unchanged(f"Submissions are {'open' if is_open else 'closed'} already.")
            return
        context.receipt(await wallet.send(scheduler.set_submissions_open(is_open)))
