"""Transactions of a wallet: previews before signing, to show or replace them, and unsigned calls."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from eth_account.datastructures import SignedMessage, SignedTransaction
from eth_account.messages import SignableMessage
from eth_typing import ChecksumAddress
from eth_utils.crypto import keccak
from web3.exceptions import TransactionNotFound

from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.calls import Call, checked_address, plural
from deepsquare_chain.chain.bindings.records import read_terms
from deepsquare_chain.chain.transactions.outbox import Entry, TxState, fee_of
from deepsquare_chain.chain.transactions.sender import Sender, TxReceipt
from deepsquare_chain.client.network import WalletConnection, open_grid
from deepsquare_chain.credits import credit_count
from deepsquare_chain.errors import NotAuthorisedError, UsageError
from deepsquare_chain.job import JobFlags, Terms
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.database import Store

#: Descriptions of the flags that a customer can set.
FLAG_TEXTS: Final[Mapping[JobFlags, str]] = {
    JobFlags.UNTIL_SPENT: "runs until its credits are spent",
    JobFlags.NO_SELF_SCHEDULING: "providers can't assign it to themselves",
    JobFlags.INTERIM_PAYMENTS: "its provider may collect interim payments while it runs",
}

Rows = tuple[tuple[str, str], ...]


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


# -- unsigned calls: those of a command without a key, for another account to send


@dataclass(frozen=True, slots=True)
class AddressOnly:
    """An account without a key: every signature is refused."""

    address: ChecksumAddress

    def sign_transaction(self, transaction_dict: Any, /) -> SignedTransaction:  # noqa: ARG002
        """Raise NotAuthorisedError."""
        raise self._refusal()

    def sign_typed_data(self, *, full_message: dict[str, Any]) -> SignedMessage:  # noqa: ARG002
        """Raise NotAuthorisedError."""
        raise self._refusal()

    def sign_message(self, signable_message: SignableMessage, /) -> SignedMessage:  # noqa: ARG002
        """Raise NotAuthorisedError."""
        raise self._refusal()

    def _refusal(self) -> NotAuthorisedError:
        return NotAuthorisedError(
            f"This needs a signature of {self.address}, whose key is not available",
            hint="Leave out --permit, --gasless and gateways with --unsigned.",
        )


class UnsignedSender(Sender):
    """A sender that collects calls instead of sending them."""

    pays_gas = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls: list[Call] = []

    async def send(self, call: Call, **_: Any) -> TxReceipt:
        """Collect a call. Only the first is simulated, because later calls depend on it.

        Raises:
            RevertedError: The contract would refuse the call.
            EndpointError: The endpoint does not answer.
        """
        if not self.calls:
            await self.simulate(call)
        self.calls.append(call)
        return TxReceipt("", 0, "", 0, 0, (), call.label)


@asynccontextmanager
async def open_unsigned(settings: Settings, account: str) -> AsyncIterator[WalletConnection]:
    """Open an account whose calls are collected; errors as `open_grid`."""
    address = checked_address(account)
    async with open_grid(settings) as contracts:
        deployment = contracts.deployment
        with Store.open(
            None, chain_id=deployment.chain_id, contract=deployment.scheduler, account=address
        ) as store:
            signer = AddressOnly(address)
            sender = UnsignedSender(contracts.w3, signer, store, chain_id=deployment.chain_id)
            yield WalletConnection(contracts, signer, sender, store, settings.timeout)


def safe_batch(chain_id: int, account: str, calls: Sequence[Call]) -> dict[str, Any]:
    """Return the content of a file with the calls for Safe's Transaction Builder.

    Sources of the format: https://help.safe.global/en/articles/40841-transaction-builder, and
    `apps/tx-builder/src/lib/checksum.ts` of safe-react-apps for the checksum.
    """
    batch: dict[str, Any] = {
        "version": "1.0",
        "chainId": str(chain_id),
        "createdAt": int(time.time() * 1000),
        "meta": {
            "name": "deepsquare: " + ", ".join(call.label for call in calls)[:200],
            "description": "",
            "createdFromSafeAddress": account,
        },
        "transactions": [
            {
                "to": call.to,
                "value": str(call.value),
                "data": "0x" + call.data.hex(),
                "contractMethod": None,
                "contractInputsValues": None,
            }
            for call in calls
        ],
    }
    # Without it the Transaction Builder warns that the file was changed. The name is not covered.
    covered = {**batch, "meta": {**batch["meta"], "name": None}}
    batch["meta"]["checksum"] = "0x" + keccak(text=_serialized(covered)).hex()
    return batch


def _serialized(value: Any) -> str:
    """Return the text of a JSON value over which the Transaction Builder's checksum is computed."""
    if isinstance(value, list):
        return f"[{','.join(map(_serialized, value))}]"
    if isinstance(value, dict):
        keys = sorted(value)
        return f"{{{_compact(keys)}{''.join(f'{_serialized(value[key])},' for key in keys)}}}"
    return _compact(value)


def _compact(value: Any) -> str:
    """Return a JSON value as JavaScript's JSON.stringify writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Preview:
    """A request before its signature, as names and values for display.

    `call` describes the calldata; `request` the signer, the deadline and who pays the gas.
    """

    call: Rows
    request: Rows

    @property
    def rows(self) -> Rows:
        """Return all rows in order."""
        return (*self.call, *self.request)


def describe_call(call: Call) -> Rows:
    """Return function, terms and amounts of a customer's call to the MetaScheduler.

    Raises:
        UsageError: The call is to another contract, or to a function that is not for customers.
    """
    try:
        function, values = interface("MetaScheduler").read_call(call.data)
    except AbiError:
        raise UsageError(f"{call.label!r} is not a call of the MetaScheduler") from None
    header = (("function", function.name), ("contract", f"MetaScheduler at {call.to}"))
    match function.name:
        case "submitJobs" | "submitJobsWithPermit":
            return (*header, *_submission(values[0]))
        case "topUp" | "topUpWithPermit":
            job_id, customer, amount = values[:3]
            return (
                *header,
                ("job", f"{job_id}, of customer {customer}"),
                ("amount", f"{credit_count(amount)} into its escrow"),
            )
        case "cancel":
            return (*header, ("jobs", ", ".join(map(str, values[0]))))
        case "withdraw":
            return (*header, ("to", f"{values[0]} receives all credits that are parked"))
        case _:
            raise UsageError(f"{function.name} is not a function for customers")


def _submission(requests: tuple[Any, ...]) -> Rows:
    rows: list[tuple[str, str]] = []
    total = 0
    for values, definitions in requests:
        terms = read_terms(values)
        total += terms.amount * len(definitions)
        rows += _terms(terms, len(definitions))
        rows += [("definition", definition.hex()) for definition in dict.fromkeys(definitions)]
    return (*rows, ("amount", f"{credit_count(total)} into escrow"))


def _terms(terms: Terms, count: int) -> Rows:
    requested = terms.resources
    options = [words for flag, words in FLAG_TEXTS.items() if flag in terms.flags]
    resources = (
        f"{plural(requested.tasks, 'task')}, {plural(requested.cpus_per_task, 'CPU')} per task, "
        f"{requested.mem_per_cpu} MB per CPU, {plural(requested.gpus, 'GPU')} per job"
    )
    rows = (
        ("jobs", f"{plural(count, 'job')} named {terms.name!r}"),
        ("resources", resources),
        ("time limit", f"{terms.time_limit} s"),
        ("escrow", f"{credit_count(terms.amount)} per job"),
        ("retries", str(terms.retries)),
        ("objective", terms.objective.name.lower()),
        ("options", "; ".join(options)),
        ("requirements", terms.uses),
    )
    return tuple(row for row in rows if row[1])
