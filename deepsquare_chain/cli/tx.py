"""Commands for a wallet's transactions: list, show, and replace pending ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Format, Kind
from deepsquare_chain.cli.types import LimitOption

if TYPE_CHECKING:
    from deepsquare_chain.chain.transactions.outbox import Entry
    from deepsquare_chain.client.network import WalletConnection

app = typer.Typer(
    help="Show a wallet's transactions, and replace stuck ones.", no_args_is_help=True
)

_LIST: Final = (
    Column("id", "number", Kind.NUMBER),
    Column("nonce", "nonce", Kind.NUMBER, detail=True),
    Column("state", "state", Kind.WORD),
    Column("label", "does"),
    Column("created", "recorded (UTC)", Kind.TIME),
    Column("attempts", "attempts", Kind.NUMBER, detail=True),
    Column("max_fee_wei", "fee ceiling (wei per gas)", Kind.NUMBER, detail=True),
    Column("fee", "paid (coin)", Kind.COIN),
    Column("transaction", "transaction", Kind.HASH),
)
_SHOWN: Final = (
    Column("id", "number", Kind.NUMBER),
    Column("nonce", "nonce", Kind.NUMBER),
    Column("state", "state", Kind.WORD),
    Column("label", "does"),
    Column("key", "key"),
    Column("to", "to", Kind.HASH),
    Column("gas", "gas limit", Kind.NUMBER),
    Column("created", "recorded (UTC)", Kind.TIME),
    Column("block", "block", Kind.NUMBER),
    Column("succeeded", "succeeded", Kind.FLAG),
    Column("gas_used", "gas used", Kind.NUMBER),
    Column("fee", "paid (coin)", Kind.COIN),
    Column("transaction", "transaction", Kind.HASH),
    Column("note", "note"),
)
_ATTEMPTS: Final = (
    Column("number", "attempt", Kind.NUMBER),
    Column("max_fee_wei", "fee ceiling (wei per gas)", Kind.NUMBER),
    Column("priority_fee_wei", "tip (wei per gas)", Kind.NUMBER),
    Column("sent_block", "sent after block", Kind.NUMBER),
    Column("cancels", "cancels", Kind.FLAG),
    Column("transaction", "transaction", Kind.HASH),
)

Which = Annotated[
    str, typer.Argument(metavar="TRANSACTION", help="Number in `tx list`, or a hash.")
]


@app.callback()
def group() -> None:
    """Show a wallet's transactions, and replace stuck ones."""


@command(app, "list")
async def list_transactions(
    context: CommandContext,
    limit: LimitOption = 50,
) -> None:
    """List the transactions that this wallet sent from this state folder, newest first."""

    async with context.wallet() as wallet:
        await wallet.sender.reconcile()
        entries = wallet.store.recent_entries(limit)
    context.printer.rows(
        _LIST,
        map(_list_row, entries),
        empty="This state folder has no transactions of this wallet.",
    )


@command(app)
async def show(context: CommandContext, transaction: Which) -> None:
    """Show one transaction with all its attempts and its outcome."""
    from deepsquare_chain.client.transactions import find

    async with context.wallet() as wallet:
        await wallet.sender.reconcile()
        await _print(context, wallet, find(wallet, transaction))


@command(app, "speed-up")
async def speed_up(context: CommandContext, transaction: Which) -> None:
    """Replace a pending transaction with the same one with both fees at least 12.5 % higher."""
    from deepsquare_chain.client.transactions import pending

    async with context.wallet() as wallet:
        entry = pending(wallet, transaction)
        await wallet.sender.speed_up(entry)
        await _print(context, wallet, wallet.store.entry(entry.id))


@command(app)
async def cancel(context: CommandContext, transaction: Which) -> None:
    """Replace a pending transaction with an empty transfer to this wallet; only one of them is mined."""
    from deepsquare_chain.client.transactions import pending

    async with context.wallet() as wallet:
        entry = pending(wallet, transaction)
        await wallet.sender.cancel(entry)
        context.printer.note(
            f"The original of {entry.call.label!r} may still be mined first; "
            f"see `deepsquare tx show {entry.id}`."
        )
        await _print(context, wallet, wallet.store.entry(entry.id))


async def _print(context: CommandContext, wallet: WalletConnection, entry: Entry) -> None:
    from deepsquare_chain.client.transactions import inclusion

    mined = await inclusion(wallet, entry)
    row = (
        *(entry.id, entry.nonce, entry.state.value, entry.call.label, entry.key, entry.call.to),
        *(entry.gas, entry.created or None),
        *((mined.block, mined.ok, mined.gas_used, mined.fee) if mined else (None,) * 4),
        mined.tx_hash if mined else entry.latest.tx_hash,
        entry.note or None,
    )
    attempts = [
        (
            number,
            attempt.max_fee,
            attempt.priority_fee,
            attempt.sent_block,
            attempt.cancels,
            attempt.tx_hash,
        )
        for number, attempt in enumerate(entry.attempts, 1)
    ]
    if context.printer.style is Format.JSON:
        body = context.printer.as_object(_SHOWN, row)
        body["attempts"] = [context.printer.as_object(_ATTEMPTS, attempt) for attempt in attempts]
        context.printer.document(body)
        return
    context.printer.record(_SHOWN, row)
    if context.printer.style is Format.TABLE:
        context.printer.rows(_ATTEMPTS, attempts)


def _list_row(entry: Entry) -> tuple[Any, ...]:
    return (
        entry.id,
        entry.nonce,
        entry.state.value,
        entry.call.label,
        entry.created or None,
        len(entry.attempts),
        entry.latest.max_fee,
        entry.fee,
        entry.mined_hash or entry.latest.tx_hash,
    )
