"""Commands for a local grid: the devnet, and the demo that runs on a grid of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command, require
from deepsquare_chain.cli.output import Format
from deepsquare_chain.cli.types import ChainKind, port_option

app = typer.Typer()
#: The command `deepsquare demo`, which belongs to no group.
root_app = typer.Typer()

_PORT: Final = 8545
_RELAY_PORT: Final = 8548
_GATEWAY_PORT: Final = 8549
_FREE_PORT: Final = "a free one if --port is given or if it is 0"
ExplorerPort = Annotated[int, port_option("Port of the explorer; 0 chooses a free one.")]
ChainOption = Annotated[ChainKind, typer.Option(help="The embedded chain, or anvil.")]


@command(app)
async def up(
    context: CommandContext,
    chain: ChainOption = ChainKind.EMBEDDED,
    port: Annotated[int, port_option("Port of the chain; 0 chooses a free one.")] = _PORT,
    faucet_port: Annotated[int, port_option("Port of the faucet; 0 chooses a free one.")] = 8546,
    explorer_port: ExplorerPort = 8547,
    relay_port: Annotated[
        int | None, port_option(f"Port of the relay; {_RELAY_PORT} by default, {_FREE_PORT}.")
    ] = None,
    gateway_port: Annotated[
        int | None, port_option(f"Port of the gateway; {_GATEWAY_PORT} by default, {_FREE_PORT}.")
    ] = None,
    no_relay: Annotated[bool, typer.Option("--no-relay", help="Do not run a relay.")] = False,
    explorer: Annotated[bool, typer.Option(help="Run the explorer.")] = True,
    folder: Annotated[Path, typer.Option(help="Folder of its state.")] = Path(".deepsquare"),
) -> None:
    """Run a chain, contracts, wallets, faucet, gateway, relay and explorer until Ctrl-C."""
    require("devnet", "devnet up")
    from deepsquare_chain.devnet.grid import run_devnet

    context.quiet_libraries()
    # --port may start a second devnet, whose other ports must not conflict with the first.
    is_first = port == _PORT
    if relay_port is None:
        relay_port = _RELAY_PORT if is_first else 0
    if gateway_port is None:
        gateway_port = _GATEWAY_PORT if is_first else 0
    await run_devnet(
        folder,
        chain=chain.value,
        port=port,
        faucet_port=faucet_port,
        explorer_port=explorer_port if explorer else None,
        relay_port=None if no_relay else relay_port,
        gateway_port=gateway_port,
        report=context.printer.note,
    )


@command(root_app)
async def demo(
    context: CommandContext,
    chain: ChainOption = ChainKind.EMBEDDED,
    folder: Annotated[
        Path | None,
        typer.Option(help="New folder for its state and logs; .deepsquare/demo-... by default."),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Keep the finished grid and its explorer until Ctrl-C.")
    ] = False,
    explorer_port: ExplorerPort = 0,
) -> int:
    """Run a whole grid on this machine, from submission to audit; under 90 seconds.

    `--executor slurm` runs the jobs on a Slurm cluster that the demo starts and stops.
    """
    require("devnet", "demo")
    from deepsquare_chain.demo.main import run_demo

    context.quiet_libraries()
    as_json = context.printer.style is Format.JSON
    result = await run_demo(
        chain=chain.value,
        folder=folder,
        executor=context.settings.executor,
        stream=context.printer.err if as_json else context.printer.out,
        serve=serve,
        explorer_port=explorer_port,
    )
    if as_json:
        context.printer.document(result.document)
    return 0 if result.ok else 1
