"""Opens the wallet of a command, and asks for confirmation before it signs for a relay."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import typer

from deepsquare_chain.cli.frame import CommandContext
from deepsquare_chain.client.gasless import Confirm, GaslessWallet, open_gasless
from deepsquare_chain.client.network import WalletConnection
from deepsquare_chain.client.transactions import Preview
from deepsquare_chain.errors import UsageError
from deepsquare_chain.observability.redaction import plain


@asynccontextmanager
async def open_sending(
    context: CommandContext, *, gasless: bool, yes: bool
) -> AsyncIterator[WalletConnection | GaslessWallet]:
    """Open the wallet of a command; it sends transactions itself or through a relay.

    Args:
        context: The command's context.
        gasless: Whether to send through a relay, which pays the gas.
        yes: Whether to sign without confirmation.

    Raises:
        GridError: See `open_wallet` and `open_gasless`.
    """
    if gasless:
        async with open_gasless(context.settings, confirmation_prompt(context, yes=yes)) as relayed:
            try:
                yield relayed
            except asyncio.CancelledError:
                for request in relayed.store.open_requests():
                    context.print_sent(request.label, request.digest, "relay requests")
                raise
        return
    async with context.wallet() as wallet:
        yield wallet


def confirmation_prompt(context: CommandContext, *, yes: bool) -> Confirm:
    """Return a function that prints a request to stderr and asks whether to sign it, unless `yes`.

    Raises (when called):
        UsageError: Stdin is no terminal, and --yes was not given.
    """

    def ask(preview: Preview) -> bool:
        printer = context.printer
        printer.note("To be signed:")
        width = max(len(name) for name, _ in preview.rows)
        for name, value in preview.rows:
            printer.note(f"  {name:<{width}}  {plain(value)}")
        if yes:
            return True
        if not sys.stdin.isatty():
            raise UsageError(
                "There is no terminal to confirm the signature",
                hint="Give --yes to sign without a confirmation.",
            )
        return typer.confirm("Sign it?", err=True)

    return ask
