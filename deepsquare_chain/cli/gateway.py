"""Gateways: run one, and look at one."""

from __future__ import annotations

import json
from typing import Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Format, Kind

app = typer.Typer(
    help="Run a gateway of definitions, logs and results, and look at one.",
    no_args_is_help=True,
)

PORT: Final = 8549
_TERMS: Final = (
    Column("url", "gateway"),
    Column("chain_id", "chain", Kind.NUMBER),
    Column("contract", "MetaScheduler"),
    Column("max_definition", "definition at most (bytes)", Kind.NUMBER),
    Column("max_log", "log at most (bytes)", Kind.NUMBER),
    Column("max_job", "files per job at most (bytes)", Kind.NUMBER),
    Column("max_account", "files per customer at most (bytes)", Kind.NUMBER),
    Column("keep_seconds", "kept for (s)", Kind.NUMBER),
    Column("catch_up_seconds", "late delivery within (s)", Kind.NUMBER),
)


@app.callback()
def group() -> None:
    """Run a gateway of definitions, logs and results, and look at one."""


@command(app, service=True)
async def serve(
    context: CommandContext,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 takes a free one.")
    ] = PORT,
    url: Annotated[
        list[str] | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="Address under which others reach it, as behind a proxy; its own by default.",
        ),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site",
            metavar="URL",
            help="Address of an explorer whose visitors may sign in here; again for more.",
        ),
    ] = None,
    objects: Annotated[
        str,
        typer.Option(
            "--objects",
            metavar="PLACE",
            help="Folder, or s3://BUCKET/PREFIX; a folder of the state by default.",
        ),
    ] = "",
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0.01, help="Days for which files are kept.")
    ] = 30.0,
    max_job_mb: Annotated[
        int, typer.Option("--max-job-mb", min=1, help="MB that the files of one job may take.")
    ] = 16_384,
    max_customer_mb: Annotated[
        int,
        typer.Option("--max-customer-mb", min=1, help="MB of all jobs of one customer."),
    ] = 65_536,
    max_log_mb: Annotated[
        int, typer.Option("--max-log-mb", min=1, help="MB that the log of one job may take.")
    ] = 64,
    per_account: Annotated[
        float,
        typer.Option("--per-account", min=0, help="Requests per second of one account; 0 for any."),
    ] = 100.0,
) -> None:
    """Keep definitions, logs and results for those whom the chain names; until Ctrl-C."""
    from deepsquare_chain.cli.services import serve_gateway
    from deepsquare_chain.gateway.rules import DAY, GatewayRules
    from deepsquare_chain.job import MEGABYTE

    rules = GatewayRules(
        max_log=max_log_mb * MEGABYTE,
        max_job=max_job_mb * MEGABYTE,
        max_account=max_customer_mb * MEGABYTE,
        rate=per_account,
        keep_seconds=int(keep_days * DAY),
    )

    def ready(url: str) -> None:
        if context.printer.style is Format.JSON:
            context.printer.text(json.dumps({"url": url}))
        else:
            context.printer.note(f"gateway     {url}")

    await serve_gateway(
        context.settings,
        rules=rules,
        objects=objects,
        urls=tuple(map(web_url, url or ())),
        sites=tuple(map(web_url, site or ())),
        host=host,
        port=port,
        ready=ready,
    )


def web_url(text: str) -> str:
    """A URL of http or https without anything after the port.

    Raises:
        UsageError: It is none.
    """
    from urllib.parse import urlsplit

    from deepsquare_chain.errors import UsageError

    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.netloc or parts.path.strip("/"):
        raise UsageError(
            f"{text[:80]!r} is no address of a gateway or a site",
            hint="Write it as https://gateway.example.org, without a path.",
        )
    return f"{parts.scheme}://{parts.netloc}"


@command(app)
async def show(context: CommandContext) -> None:
    """Show what the gateways of the settings are for, and their limits."""
    from deepsquare_chain.chain.bindings.deployment import Deployment
    from deepsquare_chain.client.gateways import gateways_of

    deployment = Deployment.load(context.settings.deployment)
    rows = []
    async with gateways_of(context.settings, deployment, None) as gateways:
        for each in gateways:
            found = await each.terms()
            rows.append((each.place, *(found.get(column.key) for column in _TERMS[1:])))
    context.printer.rows(_TERMS, rows, empty="No gateway is set, and the record names none.")
