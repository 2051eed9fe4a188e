"""Commands for the explorer: build its index, serve its pages."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command, require
from deepsquare_chain.cli.output import Column, Kind, progress, row_of
from deepsquare_chain.cli.types import HostOption, port_option

app = typer.Typer()

_INDEX: Final = (
    Column("block", "indexed block", Kind.NUMBER),
    Column("finalized", "finalized", Kind.NUMBER),
    Column("head", "head", Kind.NUMBER),
    Column("lag", "lag", Kind.NUMBER),
    Column("jobs", "jobs", Kind.NUMBER),
    Column("supply", "supply", Kind.CREDITS),
    Column("escrow", "in escrow", Kind.CREDITS),
    Column("database", "database"),
)


@command(app)
async def index(
    context: CommandContext,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Rebuild the index from the first block.")
    ] = False,
) -> None:
    """Read all confirmed events into the index, once."""
    require("explorer", "explorer index")
    import asyncio

    from deepsquare_chain.client.network import transport_of
    from deepsquare_chain.indexer.service import index_location, open_index

    settings = context.settings
    with progress("reading blocks") as update:
        async with open_index(
            settings.endpoint,
            context.deployment,
            index_location(settings),
            transport=transport_of(settings),
            max_lag_blocks=settings.max_lag_blocks,
            confirmations=settings.confirmations,
            rebuild=rebuild,
            progress=update,
        ) as service:
            await service.cycle()
            status = await asyncio.to_thread(service.index.status)
            overview = await asyncio.to_thread(service.index.overview)
            location = service.database.location
    row = row_of(
        _INDEX,
        status,
        jobs=overview.jobs_total,
        supply=overview.supply,
        escrow=overview.escrow,
        database=location,
    )
    context.printer.record(_INDEX, row)


@command(app, service=True)
async def serve(
    context: CommandContext,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, port_option("Port of the pages; 0 chooses a free one.")] = 8547,
    name: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Allowed host name; may be repeated.")
    ] = None,
    submissions: Annotated[
        bool,
        typer.Option(
            help="Allow job submissions from the browser; without a gateway into a folder."
        ),
    ] = True,
) -> None:
    """Serve the explorer's pages and update its index until Ctrl-C."""
    require("explorer", "explorer serve")
    from deepsquare_chain.cli.services import explore

    await explore(
        context.settings,
        host=host,
        port=port,
        names=tuple(name or ()),
        submissions=submissions,
        ready=lambda url: context.announce("explorer", url),
    )
