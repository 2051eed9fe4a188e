"""What a wallet has sent, for the one who wants to know or to change it."""

from __future__ import annotations

from dataclasses import dataclass

from web3.exceptions import TransactionNotFound

from deepsquare_chain.chain.transactions.outbox import Entry, TxState
from deepsquare_chain.chain.transactions.receipts import fee_of
from deepsquare_chain.client.network import WalletConnection
from deepsquare_chain.errors import UsageError


@dataclass(frozen=True, slots=True)
class Inclusion:
    """The block that holds a transaction; `gas_used` in gas, `fee` in wei."""

    tx_hash: str
    block: int
    ok: bool
    gas_used: int
    fee: int


def find(wallet: WalletConnection, which: str) -> Entry:
    """A transaction by its number in the outbox, or by the hash of any of its attempts.

    Raises:
        UsageError: The text is neither.
        NotFoundError: The wallet has sent no such transaction from this state folder.
    """
    text = which.strip()
    if text.isascii() and text.isdigit() and len(text) < 16:
        return wallet.store.entry(int(text))
    digits = text.lower().removeprefix("0x")
    if len(digits) != 64 or any(each not in "0123456789abcdef" for each in digits):
        raise UsageError(
            f"{which[:80]!r} is neither a transaction's number nor its hash",
            hint="See `deepsquare tx list`.",
        )
    return wallet.store.by_hash(f"0x{digits}")


async def inclusion(wallet: WalletConnection, entry: Entry) -> Inclusion | None:
    """Where a transaction was mined, whichever of its attempts it was; None while it is not.

    Raises:
        EndpointError: The node does not answer.
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
    """The same as `find`, of a transaction that may still be replaced.

    Raises:
        UsageError: It is settled, or the text names none.
        NotFoundError: There is no such transaction.
    """
    entry = find(wallet, which)
    if entry.state is not TxState.OPEN:
        raise UsageError(
            f"{entry.call.label!r} (nonce {entry.nonce}) is {entry.state.value}: there is nothing "
            "to replace",
            hint=f"See `deepsquare tx show {entry.id}`.",
        )
    return entry
