"""Commands for gateways: run one, show the configured ones."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command, require
from deepsquare_chain.cli.output import Column, Kind
from deepsquare_chain.cli.types import amount

app = typer.Typer(
    help="Run or show a gateway of definitions, logs and results.",
    no_args_is_help=True,
)

PORT: Final = 8549
_TERMS: Final = (
    Column("url", "gateway"),
    Column("chain_id", "chain", Kind.NUMBER),
    Column("contract", "MetaScheduler"),
    Column("max_definition", "maximum definition (bytes)", Kind.NUMBER),
    Column("max_log", "maximum log (bytes)", Kind.NUMBER),
    Column("max_job", "maximum files per job (bytes)", Kind.NUMBER),
    Column("max_account", "maximum files per customer (bytes)", Kind.NUMBER),
    Column("keep_seconds", "kept for (s)", Kind.NUMBER),
    Column("catch_up_seconds", "late delivery within (s)", Kind.NUMBER),
    Column("notifications", "sends notifications", Kind.FLAG),
)


@app.callback()
def group() -> None:
    """Run or show a gateway of definitions, logs and results."""


@command(app, service=True, table="gateway_options")
async def serve(
    context: CommandContext,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 chooses a free one.")
    ] = PORT,
    url: Annotated[
        list[str] | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="Public URL, such as that of a reverse proxy; may be repeated; its own by default.",
        ),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site",
            metavar="URL",
            help="URL of an explorer whose visitors may sign in; may be repeated.",
        ),
    ] = None,
    objects: Annotated[
        str,
        typer.Option(
            "--objects",
            metavar="PLACE",
            help="Folder, or s3://BUCKET/PREFIX; a subfolder of the state folder by default.",
        ),
    ] = "",
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0.01, help="Days for which files are kept.")
    ] = 30.0,
    late_days: Annotated[
        float,
        typer.Option("--late-days", min=0, help="Days after a job's end for late delivery."),
    ] = 7.0,
    max_job_mb: Annotated[
        int, typer.Option("--max-job-mb", min=1, help="Maximum MB of the files of one job.")
    ] = 16_384,
    max_customer_mb: Annotated[
        int,
        typer.Option("--max-customer-mb", min=1, help="Maximum MB of all jobs of one customer."),
    ] = 65_536,
    max_definitions_mb: Annotated[
        int,
        typer.Option(
            "--max-definitions-mb", min=1, help="Maximum MB of one customer's definitions."
        ),
    ] = 256,
    max_log_mb: Annotated[
        int, typer.Option("--max-log-mb", min=1, help="Maximum MB of the log of one job.")
    ] = 64,
    max_files: Annotated[
        int, typer.Option("--max-files", min=1, help="Maximum number of files of one job.")
    ] = 10_000,
    max_streams: Annotated[
        int,
        typer.Option("--max-streams", min=1, help="Maximum concurrent log streams of one account."),
    ] = 200,
    max_shares: Annotated[
        int, typer.Option("--max-shares", min=1, help="Maximum number of one customer's shares.")
    ] = 10_000,
    per_account: Annotated[
        float,
        typer.Option(
            "--per-account", min=0, help="Requests per second of one account; 0 for no limit."
        ),
    ] = 100.0,
    burst: Annotated[
        int, typer.Option("--burst", min=1, help="Burst size of one account's requests.")
    ] = 2_000,
    refusals: Annotated[
        float,
        typer.Option(
            "--refusals", min=0, help="Refused requests per second of one account; 0 for no limit."
        ),
    ] = 2.0,
    refusal_burst: Annotated[
        int,
        typer.Option(
            "--refusal-burst", min=1, help="Burst size of one account's refused requests."
        ),
    ] = 100,
    sign_ins: Annotated[
        float,
        typer.Option(
            "--sign-ins", min=0, help="Sign-ins per second of one network address; 0 for no limit."
        ),
    ] = 5.0,
    sign_in_burst: Annotated[
        int,
        typer.Option(
            "--sign-in-burst", min=1, help="Burst size of one network address's sign-ins."
        ),
    ] = 300,
    session_minutes: Annotated[
        int,
        typer.Option(
            "--session-minutes", min=1, max=1_440, help="Lifetime of a sign-in in minutes."
        ),
    ] = 15,
    notify: Annotated[
        bool,
        typer.Option("--notify", help="Send customers' notifications; e-mail by the setting smtp."),
    ] = False,
    notify_private: Annotated[
        bool,
        typer.Option(
            "--notify-private", help="Allow webhooks in private networks and on loopback."
        ),
    ] = False,
    max_notifications: Annotated[
        int, typer.Option("--max-notifications", min=1, help="Notifications per customer and day.")
    ] = 1_000,
    with_relay: Annotated[
        bool,
        typer.Option("--with-relay", help="Relay gasless requests too; the wallet pays their gas."),
    ] = False,
    relay_min_credits: Annotated[
        int | None,
        typer.Option(
            "--relay-min-credits",
            parser=amount,
            metavar="CREDITS",
            help="Minimum escrow of a relayed job, and minimum top-up; 0.01 by default.",
        ),
    ] = None,
    relay_max_gas: Annotated[
        int,
        typer.Option("--relay-max-gas", min=100_000, help="Maximum gas of one relayed request."),
    ] = 3_000_000,
    relay_per_customer: Annotated[
        int,
        typer.Option("--relay-per-customer", min=1, help="Relayed requests per customer and hour."),
    ] = 60,
    relay_per_hour: Annotated[
        int, typer.Option("--relay-per-hour", min=1, help="Relayed requests per hour.")
    ] = 2_000,
    relay_min_coin: Annotated[
        int | None,
        typer.Option(
            "--relay-min-coin",
            parser=amount,
            metavar="COIN",
            help="Relay nothing while the wallet has less; by default the cost of one request.",
        ),
    ] = None,
    relay_health_port: Annotated[
        int | None,
        typer.Option(
            "--relay-health-port",
            min=0,
            max=65_535,
            help="Port on 127.0.0.1 of the relay's own health and metrics.",
        ),
    ] = None,
) -> None:
    """Serve definitions, logs and results to accounts that the chain authorises, until Ctrl-C."""
    require("gateway", "gateway serve")
    from deepsquare_chain.cli.services import serve_gateway, serve_gateway_and_relay
    from deepsquare_chain.gateway.access import GatewayRules
    from deepsquare_chain.job import DAY, MEGABYTE
    from deepsquare_chain.relay.requests import MIN_AMOUNT, RelayRules

    rules = GatewayRules(
        max_log=max_log_mb * MEGABYTE,
        max_job=max_job_mb * MEGABYTE,
        max_files=max_files,
        max_account=max_customer_mb * MEGABYTE,
        max_definitions=max_definitions_mb * MEGABYTE,
        max_streams=max_streams,
        rate=per_account,
        burst=burst,
        max_shares=max_shares,
        refusals=refusals,
        refusal_burst=refusal_burst,
        sign_in_rate=sign_ins,
        sign_in_burst=sign_in_burst,
        session_seconds=60 * session_minutes,
        keep_seconds=int(keep_days * DAY),
        catch_up_seconds=int(late_days * DAY),
        notifications=max_notifications,
    )

    def report(name: str, text: str) -> None:
        context.announce("gateway" if name == "url" else name, text, key=name)

    options: dict[str, Any] = {
        "rules": rules,
        "objects": objects,
        "notify": notify,
        "notify_private": notify_private,
        "urls": tuple(map(web_url, url or ())),
        "sites": tuple(map(web_url, site or ())),
        "host": host,
        "port": port,
        "ready": lambda address: report("url", address),
    }
    if not with_relay:
        await serve_gateway(context.settings, **options)
        return
    await serve_gateway_and_relay(
        context.settings,
        options,
        RelayRules(
            min_amount=MIN_AMOUNT if relay_min_credits is None else relay_min_credits,
            max_gas=relay_max_gas,
            per_customer=relay_per_customer,
            per_hour=relay_per_hour,
        ),
        min_balance=relay_min_coin or 0,
        health_port=relay_health_port,
        ready=lambda: report("relay", "accepts requests at the same address"),
    )


def web_url(text: str) -> str:
    """Reduce the URL of a gateway or site to scheme, host and port.

    Raises:
        UsageError: It is no http(s) URL, or it has a path.
    """
    from urllib.parse import urlsplit

    from deepsquare_chain.errors import UsageError

    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.netloc or parts.path.strip("/"):
        raise UsageError(
            f"{text[:80]!r} is not an address of a gateway or a site",
            hint="Write it as https://gateway.example.org, without a path.",
        )
    return f"{parts.scheme}://{parts.netloc}"


@command(app)
async def show(context: CommandContext) -> None:
    """Show the chain, the contract and the limits of the gateways in the settings."""
    from deepsquare_chain.chain.bindings.deployment import Deployment
    from deepsquare_chain.client.gateways import gateways_of

    deployment = Deployment.load(context.settings.deployment)
    rows = []
    async with gateways_of(context.settings, deployment, None) as gateways:
        for gateway in gateways:
            terms = await gateway.terms()
            rows.append((gateway.display_url, *(terms.get(column.key) for column in _TERMS[1:])))
    context.printer.rows(_TERMS, rows, empty="No gateway is configured, and the record names none.")
