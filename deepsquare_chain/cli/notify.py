"""Commands for notifications: run the service, send a test, list sent notifications."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind
from deepsquare_chain.cli.types import LimitOption
from deepsquare_chain.errors import UsageError

app = typer.Typer()

_SENT: Final = (
    Column("event", "event", detail=True),
    Column("job_id", "job", Kind.NUMBER),
    Column("status", "status", Kind.WORD),
    Column("time", "at (UTC)", Kind.TIME),
    Column("target", "recipient"),
    Column("state", "state", Kind.WORD),
    Column("attempts", "attempts", Kind.NUMBER),
    Column("note", "note"),
)
_TESTED: Final = (
    Column("target", "recipient"),
    Column("ok", "arrived", Kind.FLAG),
    Column("note", "note"),
)
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        help="Customer whose jobs are followed; this wallet by default.",
    ),
]


@command(app, service=True)
async def run(context: CommandContext, address: AddressOption = None) -> None:
    """Send notifications of a wallet's jobs until Ctrl-C, to recipients in notify_to and in job files."""
    from deepsquare_chain.cli.services import notify

    await notify(context.settings, address=address)


@command(app)
async def test(context: CommandContext) -> int:
    """Send one test notification to each recipient in the settings; exit 1 if one fails."""
    from deepsquare_chain.notify.service import try_targets

    if context.settings.notify_by == "gateway":
        raise UsageError(
            "The gateway sends the notifications, by the setting notify_by",
            hint="Submit a job; `deepsquare notify list` shows what was sent.",
        )
    results = await try_targets(context.settings, context.deployment)
    context.printer.rows(_TESTED, results)
    return 0 if all(ok for _, ok, _ in results) else 1


@command(app, name="list")
async def list_(
    context: CommandContext, address: AddressOption = None, limit: LimitOption = 50
) -> None:
    """List sent and pending notifications, newest first: of `notify run`, or of the gateway."""
    context.printer.rows(
        _SENT,
        await _from_gateway(context, limit)
        if context.settings.notify_by == "gateway"
        else _from_service(context, address, limit),
        empty="Nothing was sent for this wallet.",
    )


def _from_service(
    context: CommandContext, address: str | None, limit: int
) -> list[tuple[object, ...]]:
    """Return rows of the notifications that `notify run` sent from here."""
    from deepsquare_chain.client.network import own_address
    from deepsquare_chain.daemon.loop import service_folder
    from deepsquare_chain.notify.service import NAME, latest_notifications

    deployment = context.deployment
    customer = own_address(context.settings, address)
    folder = service_folder(context.settings.state_dir, NAME, customer, deployment.scheduler)
    return [
        (
            *(event.id, event.job_id, event.after.name, event.time, delivery.target),
            *(delivery.state.value, delivery.attempts, delivery.note or None),
        )
        for event, delivery in latest_notifications(folder, deployment, customer, limit)
    ]


async def _from_gateway(context: CommandContext, limit: int) -> list[tuple[object, ...]]:
    """Return rows of the notifications that the first gateway sent for the wallet."""
    from deepsquare_chain.client.gateways import gateways_of, no_gateway
    from deepsquare_chain.client.network import open_account

    deployment = context.deployment
    account = await open_account(context.settings)
    async with gateways_of(context.settings, deployment, account) as gateways:
        if not gateways:
            raise no_gateway()
        rows = await gateways[0].notifications(limit)
    return [tuple(row.get(column.key) or None for column in _SENT) for row in rows]
