"""Commands for credits: balances, transfers, allowances, statements, and the devnet's faucet."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from deepsquare_chain.cli.audit import statement
from deepsquare_chain.cli.frame import CommandContext, command, open_sending
from deepsquare_chain.cli.output import Column, Kind, row_of
from deepsquare_chain.cli.types import (
    AccountArgument,
    AgreeOption,
    CreditsArgument,
    GaslessOption,
    YesOption,
    positive_credits,
)
from deepsquare_chain.credits import credit_count

app = typer.Typer()

_BALANCE: Final = (
    Column("account", "account", Kind.HASH),
    Column("balance", "credits", Kind.CREDITS),
    Column("allowance", "allowance", Kind.CREDITS),
    Column("parked", "withdrawable", Kind.CREDITS),
    Column("gas", "gas balance", Kind.COIN),
)


@command(app)
async def balance(context: CommandContext, account: AccountArgument = None) -> None:
    """Show credits, allowance and gas balance of an account."""
    from deepsquare_chain.client.accounts import balances
    from deepsquare_chain.client.network import own_address

    address = own_address(context.settings, account)
    async with context.grid() as contracts:
        account_balances = await balances(contracts, address)
    row = row_of(_BALANCE, account_balances, balance=account_balances.credits)
    context.printer.record(_BALANCE, row)


RecipientArgument = Annotated[str, typer.Argument(metavar="TO", help="Address of the recipient.")]
PositiveCredits = Annotated[int, typer.Argument(parser=positive_credits, metavar="CREDITS")]


@command(app, sends=True)
async def transfer(
    context: CommandContext, to: RecipientArgument, credits: PositiveCredits
) -> None:
    """Transfer credits to another account."""
    async with context.wallet() as wallet:
        context.receipt(await wallet.send(wallet.contracts.credit.transfer(to, credits)))


@command(app, sends=True)
async def mint(context: CommandContext, to: RecipientArgument, credits: PositiveCredits) -> None:
    """Create credits for an account; for a holder of MINTER_ROLE."""
    async with context.wallet() as wallet:
        context.receipt(await wallet.send(wallet.contracts.credit.mint(to, credits)))


@command(app, sends=True)
async def burn(context: CommandContext, credits: PositiveCredits, yes: AgreeOption = False) -> None:
    """Destroy credits of this wallet."""
    async with context.wallet() as wallet:
        risk = f"{credit_count(credits)} of {wallet.address} will be destroyed permanently."
        if context.confirm_all([risk], yes=yes):
            context.receipt(await wallet.send(wallet.contracts.credit.burn(credits)))


@command(app, sends=True)
async def approve(
    context: CommandContext, credits: CreditsArgument, yes: AgreeOption = False
) -> None:
    """Allow the scheduler to take up to this many credits for jobs; 0 revokes the allowance."""
    async with context.wallet() as wallet:
        spender = wallet.contracts.scheduler.address
        credit = wallet.contracts.credit
        allowed = await credit.allowance(wallet.address, spender)
        balance = await credit.balance_of(wallet.address)
        if credits == allowed:
            context.unchanged(f"The allowance is already {credit_count(allowed)}.")
            return
        risks = []
        if credits >= balance > 0:
            risks.append(f"The scheduler could take all of the wallet's {credit_count(balance)}.")
        if not context.confirm_all(risks, yes=yes):
            return
        async with wallet.sender.spending(10 * wallet.timeout):
            receipt = await wallet.send(wallet.contracts.credit.approve(spender, credits))
        context.receipt(receipt)


@command(app, sends=True)
async def withdraw(
    context: CommandContext,
    to: Annotated[
        str | None, typer.Argument(metavar="TO", help="Recipient; the wallet itself by default.")
    ] = None,
    gasless: GaslessOption = False,
    yes: YesOption = False,
) -> None:
    """Withdraw credits that the scheduler holds for this wallet because a payment to it failed."""
    async with open_sending(context, gasless=gasless, yes=yes) as wallet:
        call = wallet.contracts.scheduler.withdraw(to or wallet.address)
        context.receipt(await wallet.send(call))


command(app)(statement)


@command(app)
async def faucet(context: CommandContext, account: AccountArgument = None) -> None:
    """Request credits and gas from the devnet's faucet."""
    from deepsquare_chain.client.accounts import ask_faucet
    from deepsquare_chain.client.network import own_address

    address = own_address(context.settings, account)
    await ask_faucet(context.settings, address)
    context.printer.note(f"The faucet paid credits and gas to {address}.")
