"""The command demo: runs a whole grid on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepsquare_chain.cli.frame import CommandContext, command, require
from deepsquare_chain.cli.output import Format
from deepsquare_chain.cli.types import ChainKind, port

app = typer.Typer()


@command(app)
async def demo(
    context: CommandContext,
    chain: Annotated[
        ChainKind, typer.Option("--chain", help="The embedded chain, or anvil.")
    ] = ChainKind.EMBEDDED,
    folder: Annotated[
        Path | None,
        typer.Option(help="New folder for its state and logs; .deepsquare/demo-... by default."),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Keep the finished grid and its explorer until Ctrl-C.")
    ] = False,
    explorer_port: Annotated[
        int,
        typer.Option(
            parser=port, metavar="PORT", help="Port of the explorer; 0 chooses a free one."
        ),
    ] = 0,
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
