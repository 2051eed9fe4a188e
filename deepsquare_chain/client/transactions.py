"""Finds transactions of a wallet, to show or replace them."""

from __future__ import annotations

from dataclasses import dataclass

from web3.exceptions import TransactionNotFound

from deepsquare_chain.chain.transactions.outbox import Entry, TxState
from deepsquare_chain.chain.transactions.receipts import fee_of
from deepsquare_chain.client.network import WalletConnection
from deepsquare_chain.errors import UsageError


@dataclass(frozen=True, slots=True)
class Inclusion:
    """The inclusion of a transaction in a block; `gas_used` in gas, `fee` in wei."""

    tx_hash: str
    block: int
    ok: bool
    gas_used: int
    fee: int


def find(wallet: WalletConnection, which: str) -> Entry:
    """Return a transaction by its number in the outbox, or by the hash of any of its attempts.

    Raises:
        UsageError: The text is not a number or hash.
        NotFoundError: The wallet has not sent such a transaction from this state folder.
    """
    text = which.strip()
    if text.isascii() and text.isdigit() and len(text) < 16:
        return wallet.store.entry(int(text))
    digits = text.lower().removeprefix("0x")
    if len(digits) != 64 or any(digit not in "0123456789abcdef" for digit in digits):
        raise UsageError(
            f"{which[:80]!r} is neither a transaction's number nor its hash",
            hint="See `deepsquare tx list`.",
        )
    return wallet.store.by_hash(f"0x{digits}")


async def inclusion(wallet: WalletConnection, entry: Entry) -> Inclusion | None:
    """Return the block of a transaction, for any of its attempts; None if it is not mined.

    Raises:
        EndpointError: The endpoint does not answer.
    """
    w3 = wallet.contracts.w3
    for attempt in reversed(entry.attempts):
        try:
            receipt = await w3.eth.get_transaction_receipt(attempt.tx_hash)  # type: ignore[arg-type]
        except TransactionNotFound:
            continue
        return Inclusion(
            attempt.tx_hash,
            int(receipt["blockNumber"]),
            receipt["status"] == 1,
            int(receipt["gasUsed"]),
            fee_of(receipt),
        )
    return None


def pending(wallet: WalletConnection, which: str) -> Entry:
    """Return a transaction that may still be replaced; see `find`.

    Raises:
        UsageError: The transaction is settled, or the text is not a number or hash.
        NotFoundError: The transaction does not exist.
    """
    entry = find(wallet, which)
    if entry.state is not TxState.OPEN:
        raise UsageError(
            f"{entry.call.label!r} (nonce {entry.nonce}) is {entry.state.value}: there is nothing "
            "to replace",
            hint=f"See `deepsquare tx show {entry.id}`.",
        )
    return entry
