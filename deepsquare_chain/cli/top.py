"""The command top: a live view of jobs, the queue and providers in the terminal."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated

import typer

from deepsquare_chain.cli.frame import CommandContext, command, require

app = typer.Typer()


@command(app)
async def top(
    context: CommandContext,
    everybody: Annotated[bool, typer.Option("--all", help="List jobs of all customers.")] = False,
    read_only: Annotated[
        bool,
        typer.Option(
            "--read-only", help="Do not open a wallet: jobs can't be cancelled or topped up."
        ),
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.5, max=3_600, metavar="SECONDS", help="Poll interval.")
    ] = 2.0,
) -> None:
    """Show your jobs, the queue and providers live; keys: logs, cancel, top up, quit."""
    require("top", "top")
    from deepsquare_chain.cli.job_output import log_of
    from deepsquare_chain.cli.top_screen import Actions, TopApp
    from deepsquare_chain.client.accounts import top_up
    from deepsquare_chain.client.network import open_grid, open_wallet, own_address
    from deepsquare_chain.client.offers import OverviewReader

    settings = context.settings
    has_wallet = settings.keystore is not None or bool(settings.signer)
    async with AsyncExitStack() as stack:
        if has_wallet and not read_only:
            # Opened before the full-screen view starts, since it may prompt for the password.
            wallet = await stack.enter_async_context(open_wallet(settings))
            contracts, customer = wallet.contracts, wallet.address
        else:
            wallet = None
            contracts = await stack.enter_async_context(open_grid(settings))
            customer = own_address(settings, None) if has_wallet else ""

        def logs(job_id: int) -> AsyncIterator[bytes]:
            return log_of(settings, contracts, job_id, follow=True)

        async def cancel(job_id: int) -> None:
            assert wallet is not None  # noqa: S101 - offered with a wallet only
            await wallet.send(contracts.scheduler.cancel([job_id]))

        async def pay(job_id: int, amount: int) -> None:
            assert wallet is not None  # noqa: S101 - offered with a wallet only
            await top_up(wallet, job_id, amount)

        can_send = wallet is not None
        actions = Actions(logs, cancel if can_send else None, pay if can_send else None)
        reader = OverviewReader(contracts, None if everybody or not customer else customer)
        await TopApp(
            reader.read,
            actions,
            interval=interval,
            chain_id=contracts.deployment.chain_id,
            customer=customer,
        ).run_async()
