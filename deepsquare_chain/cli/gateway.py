"""Commands for gateways: run one, show the configured ones."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command, require
from deepsquare_chain.cli.output import Column, Kind
from deepsquare_chain.cli.relay import MaxGas, MinCoin, MinCredits, PerCustomer, PerHour
from deepsquare_chain.cli.types import HostOption, number_option, port_option
from deepsquare_chain.errors import UsageError

app = typer.Typer()

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


@command(app, service=True, table="gateway_options")
async def serve(
    context: CommandContext,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, port_option("Port to listen on; 0 chooses a free one.")] = PORT,
    url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Public URL, such as that of a reverse proxy; may be repeated; its own by default.",
        ),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="URL of an explorer whose visitors may sign in; may be repeated."
        ),
    ] = None,
    objects: Annotated[
        str,
        typer.Option(
            metavar="PLACE",
            help="Folder, or s3://BUCKET/PREFIX; a subfolder of the state folder by default.",
        ),
    ] = "",
    keep_days: Annotated[
        float, typer.Option(min=0.01, help="Days for which files are kept.")
    ] = 30.0,
    late_days: Annotated[
        float, typer.Option(min=0, help="Days after a job's end for late delivery.")
    ] = 7.0,
    max_job_mb: Annotated[int, number_option("Maximum MB of the files of one job.", 1)] = 16_384,
    max_customer_mb: Annotated[
        int, number_option("Maximum MB of all jobs of one customer.", 1)
    ] = 65_536,
    max_definitions_mb: Annotated[
        int, number_option("Maximum MB of one customer's definitions.", 1)
    ] = 256,
    max_log_mb: Annotated[int, number_option("Maximum MB of the log of one job.", 1)] = 64,
    max_files: Annotated[int, number_option("Maximum number of files of one job.", 1)] = 10_000,
    max_streams: Annotated[
        int, number_option("Maximum concurrent log streams of one account.", 1)
    ] = 200,
    max_shares: Annotated[
        int, number_option("Maximum number of one customer's shares.", 1)
    ] = 10_000,
    per_account: Annotated[
        float, typer.Option(min=0, help="Requests per second of one account; 0 for no limit.")
    ] = 100.0,
    burst: Annotated[int, number_option("Burst size of one account's requests.", 1)] = 2_000,
    refusals: Annotated[
        float,
        typer.Option(min=0, help="Refused requests per second of one account; 0 for no limit."),
    ] = 2.0,
    refusal_burst: Annotated[
        int, number_option("Burst size of one account's refused requests.", 1)
    ] = 100,
    sign_ins: Annotated[
        float,
        typer.Option(min=0, help="Sign-ins per second of one network address; 0 for no limit."),
    ] = 5.0,
    sign_in_burst: Annotated[
        int, number_option("Burst size of one network address's sign-ins.", 1)
    ] = 300,
    session_minutes: Annotated[
        int, number_option("Lifetime of a sign-in in minutes; at most 1440.", 1, 1_440)
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
        int, number_option("Notifications per customer and day.", 1)
    ] = 1_000,
    with_relay: Annotated[
        bool,
        typer.Option("--with-relay", help="Relay gasless requests too; the wallet pays their gas."),
    ] = False,
    relay_min_credits: MinCredits = None,
    relay_max_gas: MaxGas = 3_000_000,
    relay_per_customer: PerCustomer = 60,
    relay_per_hour: PerHour = 2_000,
    relay_min_coin: MinCoin = None,
    relay_health_port: Annotated[
        int | None, port_option("Port on 127.0.0.1 of the relay's own health and metrics.")
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
    from deepsquare_chain.client.gateways import gateways_of

    rows = []
    async with gateways_of(context.settings, context.deployment, None) as gateways:
        for gateway in gateways:
            terms = await gateway.terms()
            rows.append((gateway.display_url, *(terms.get(column.key) for column in _TERMS[1:])))
    context.printer.rows(_TERMS, rows, empty="No gateway is configured, and the record names none.")
