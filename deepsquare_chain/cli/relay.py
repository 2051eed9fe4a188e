"""Commands for relays: run one, show the configured one, list signed requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind, row_of
from deepsquare_chain.cli.types import HostOption, LimitOption, amount, number_option, port_option

if TYPE_CHECKING:
    from deepsquare_chain.store.outbox import RecordedRequest

app = typer.Typer()

_TERMS: Final = (
    Column("url", "relay"),
    Column("wallet", "wallet that pays the gas"),
    Column("open", "accepts requests", Kind.FLAG),
    Column("functions", "functions"),
    Column("min_amount", "minimum credits per job or top-up", Kind.CREDITS),
    Column("max_gas", "maximum gas per request", Kind.NUMBER),
    Column("per_customer", "requests per customer and hour", Kind.NUMBER),
    Column("per_hour", "requests per hour", Kind.NUMBER),
)
_REQUESTS: Final = (
    Column("digest", "request", Kind.HASH, detail=True),
    Column("nonce", "nonce", Kind.NUMBER),
    Column("state", "state", Kind.WORD),
    Column("label", "does"),
    Column("created", "signed (UTC)", Kind.TIME),
    Column("deadline", "valid until (UTC)", Kind.TIME),
    Column("key", "key", detail=True),
    Column("transaction", "transaction", Kind.HASH),
    Column("note", "note"),
)


# Terms of a relay, also of one that runs with a gateway; the flag has the name of the parameter.
MinCredits = Annotated[
    int | None,
    typer.Option(
        parser=amount,
        metavar="CREDITS",
        help="Minimum escrow of a relayed job, and minimum top-up; 0.01 by default.",
    ),
]
MaxGas = Annotated[
    int, number_option("Maximum gas of one relayed request; at least 100000.", 100_000)
]
PerCustomer = Annotated[int, number_option("Relayed requests per customer and hour.", 1)]
PerHour = Annotated[int, number_option("Relayed requests per hour.", 1)]
MinCoin = Annotated[
    int | None,
    typer.Option(
        parser=amount,
        metavar="COIN",
        help="Relay nothing while the wallet has less; by default the cost of one request.",
    ),
]


@command(app, service=True, table="relay_options")
async def serve(
    context: CommandContext,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, port_option("Port to listen on; 0 chooses a free one.")] = 8548,
    min_credits: MinCredits = None,
    max_gas: MaxGas = 3_000_000,
    per_customer: PerCustomer = 60,
    per_hour: PerHour = 2_000,
    collect: Annotated[
        float,
        typer.Option(
            min=0,
            max=5,
            metavar="SECONDS",
            help="Time that a request waits for others to share its transaction.",
        ),
    ] = 0.3,
    min_coin: MinCoin = None,
) -> None:
    """Relay customers' signed requests from this wallet, which pays the gas; until Ctrl-C."""
    from deepsquare_chain.cli.services import relay
    from deepsquare_chain.relay.requests import MIN_AMOUNT, RelayRules

    rules = RelayRules(
        min_amount=min_credits if min_credits is not None else MIN_AMOUNT,
        max_gas=max_gas,
        per_customer=per_customer,
        per_hour=per_hour,
    )

    await relay(
        context.settings,
        rules=rules,
        collect_seconds=collect,
        min_balance=min_coin or 0,
        host=host,
        port=port,
        ready=lambda url: context.announce("relay", url),
    )


@command(app)
async def show(context: CommandContext) -> None:
    """Show the terms of the relay in the settings, and whether it accepts requests now."""
    from deepsquare_chain.client.gasless import RelayClient, relay_url
    from deepsquare_chain.client.network import transport_of

    url = relay_url(context.settings, context.deployment)
    async with RelayClient(url, transport_of(context.settings)) as relay:
        terms = await relay.terms()
    functions = ", ".join(terms.functions)
    row = row_of(_TERMS, terms, url=relay.display_url, open=terms.is_open, functions=functions)
    context.printer.record(_TERMS, row)


@command(app)
async def requests(context: CommandContext, limit: LimitOption = 50) -> None:
    """List the requests that this wallet signed for relays from this state folder, newest first.

    Requests that are still open are looked up on the chain and sent to the relay again.
    """
    from deepsquare_chain.client.gasless import open_gasless

    async with open_gasless(context.settings, lambda _: False) as wallet:
        await wallet.sender.reconcile()
        recent_requests = wallet.store.recent_requests(limit)
    context.printer.rows(
        _REQUESTS,
        map(_row, recent_requests),
        empty="This state folder has no signed requests of this wallet.",
    )


def _row(request: RecordedRequest) -> tuple[Any, ...]:
    return row_of(
        _REQUESTS,
        request,
        nonce=request.signed.request.nonce,
        state=request.state.value,
        deadline=request.signed.request.deadline,
        transaction=request.tx_hash or None,
        note=request.note or None,
    )
