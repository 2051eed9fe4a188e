"""Signers of an account: a key in this process, or an external signer over JSON-RPC.

Sources for the methods of external signers: `eth_signTransaction`, `eth_sign` and
`eth_signTypedData` of web3signer and of nodes
(https://docs.web3signer.consensys.io/reference/api/json-rpc); `account_signTransaction`,
`account_signData` and `account_signTypedData` of clef
(https://geth.ethereum.org/docs/tools/clef/apis).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import httpx2
from eth_account import Account
from eth_account.datastructures import SignedMessage, SignedTransaction
from eth_account.messages import SignableMessage, encode_typed_data
from eth_account.typed_transactions.typed_transaction import TypedTransaction
from eth_typing import ChecksumAddress
from eth_utils.address import is_address, to_checksum_address
from eth_utils.crypto import keccak
from hexbytes import HexBytes

from deepsquare_chain.chain.rpc.transport import Transport, proxy_for
from deepsquare_chain.errors import EndpointError, NotAuthorisedError, UsageError
from deepsquare_chain.settings import safe_url

#: Timeout of a request in seconds; clef waits for a person's confirmation.
_TIMEOUT: Final = 120.0
_CLEF: Final = "clef+"
_PERSONAL: Final = b"E"  # version byte of EIP-191 text messages
_QUANTITIES: Final = frozenset(
    {"chainId", "nonce", "value", "gas", "maxFeePerGas", "maxPriorityFeePerGas"}
)


S = TypeVar("S")
R = TypeVar("R")


class Signer(Protocol):
    """An account that signs; the methods are those of eth-account's `LocalAccount`.

    Raises (each method):
        NotAuthorisedError: The signer refused to sign.
        EndpointError: It does not answer, or does not return a signature of this account.
    """

    @property
    def address(self) -> ChecksumAddress:
        """Address of the account."""

    def sign_transaction(self, transaction_dict: Any, /) -> SignedTransaction:
        """Sign an EIP-1559 transaction."""

    def sign_typed_data(self, *, full_message: dict[str, Any]) -> SignedMessage:
        """Sign EIP-712 data."""

    def sign_message(self, signable_message: SignableMessage, /) -> SignedMessage:
        """Sign a text (EIP-191)."""


@dataclass(frozen=True, slots=True)
class SigningDomain:
    """An EIP-712 domain; signatures are valid for this domain only."""

    name: str
    version: str
    chain_id: int
    contract: str

    def typed_data(
        self, primary_type: str, fields: Mapping[str, str], message: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a document to sign; `fields` maps the fields of the message to their types."""
        types = {"EIP712Domain": _DOMAIN_FIELDS, primary_type: fields}
        return {
            "types": {
                name: [{"name": field, "type": kind} for field, kind in type_fields.items()]
                for name, type_fields in types.items()
            },
            "primaryType": primary_type,
            "domain": dict(zip(_DOMAIN_FIELDS, astuple(self), strict=True)),
            "message": message,
        }


_DOMAIN_FIELDS: Final = {
    "name": "string",
    "version": "string",
    "chainId": "uint256",
    "verifyingContract": "address",
}


def signed_hash(message: SignableMessage) -> bytes:
    """Return the hash that a signature of a message signs (EIP-191, 32 bytes)."""
    return keccak(b"\x19" + message.version + message.header + message.body)


class ExternalSigner:
    """An account whose key is held by another program; every signature is verified.

    Args:
        url: `http://HOST:PORT` of web3signer or a signer with the same methods; with the prefix
            `clef+` for clef.
        address: Address of the account; "" for the only account of the signer.

    Raises:
        UsageError: The address is invalid, or the signer does not have the account.
        EndpointError: The signer does not answer.
    """

    def __init__(self, url: str, address: str = "", transport: Transport | None = None) -> None:
        self._clef = url.startswith(_CLEF)
        self._url = url.removeprefix(_CLEF)
        transport_settings = transport or Transport()
        self._client = httpx2.Client(
            timeout=_TIMEOUT,
            trust_env=False,
            proxy=proxy_for(self._url),
            verify=transport_settings.context() or True,
            headers=transport_settings.headers_for(self._url),
        )
        self.address = self._own_address(address)

    def sign_transaction(self, transaction_dict: Any, /) -> SignedTransaction:
        """See `Signer`."""
        request = {**transaction_dict, "from": self.address}
        method = "account_signTransaction" if self._clef else "eth_signTransaction"
        result = self._request(method, [_as_json(request)])
        raw = result.get("raw", "") if isinstance(result, dict) else result
        try:
            data = HexBytes(raw)
            signed = TypedTransaction.from_bytes(data).as_dict()
            sender = Account.recover_transaction(data)
        except Exception:  # noqa: BLE001 - any error means that the bytes are not a transaction
            raise self._invalid_response("a transaction") from None
        if sender != self.address or not _same_fields(signed, transaction_dict):
            raise self._invalid_response("the requested transaction")
        return SignedTransaction(
            raw_transaction=data,
            hash=HexBytes(keccak(data)),
            r=int(signed["r"]),
            s=int(signed["s"]),
            v=int(signed["v"]),
        )

    def sign_typed_data(self, *, full_message: dict[str, Any]) -> SignedMessage:
        """See `Signer`."""
        method = "account_signTypedData" if self._clef else "eth_signTypedData"
        result = self._request(method, [self.address, _plain(full_message)])
        return self._signature(result, encode_typed_data(full_message=full_message))

    def sign_message(self, signable_message: SignableMessage, /) -> SignedMessage:
        """See `Signer`."""
        if signable_message.version != _PERSONAL:
            raise UsageError("An external signer signs typed data from the whole document only")
        text = "0x" + bytes(signable_message.body).hex()
        if self._clef:
            result = self._request("account_signData", ["text/plain", self.address, text])
        else:
            result = self._request("eth_sign", [self.address, text])
        return self._signature(result, signable_message)

    def _own_address(self, wanted: str) -> ChecksumAddress:
        """Return the account to use, after checking that the signer has it."""
        if wanted and not is_address(wanted):
            raise UsageError(f"{wanted[:80]!r} is not a valid address", hint="Set signer_account.")
        result = self._request("account_list" if self._clef else "eth_accounts", [])
        addresses = result if isinstance(result, list) else []
        accounts = [to_checksum_address(address) for address in addresses if is_address(address)]
        if wanted and to_checksum_address(wanted) in accounts:
            return to_checksum_address(wanted)
        if wanted or len(accounts) != 1:
            listed = ", ".join(accounts[:5]) or "none"
            raise UsageError(
                f"The signer at {safe_url(self._url)} has {len(accounts)} accounts: {listed}",
                hint="Choose one of them with --signer-account.",
            )
        return accounts[0]

    def _signature(self, answer: Any, message: SignableMessage) -> SignedMessage:
        try:
            data = bytearray(HexBytes(answer))
            if len(data) == 65 and data[64] < 27:
                data[64] += 27  # some signers return v as 0 or 1
            signer = Account.recover_message(message, signature=bytes(data))
        except Exception:  # noqa: BLE001 - any error means that the bytes are not a signature
            raise self._invalid_response("a signature") from None
        if signer != self.address:
            raise self._invalid_response(f"a signature of {self.address}")
        return SignedMessage(
            message_hash=HexBytes(signed_hash(message)),
            r=int.from_bytes(data[:32], "big"),
            s=int.from_bytes(data[32:64], "big"),
            v=data[64],
            signature=HexBytes(bytes(data)),
        )

    def _request(self, method: str, params: list[Any]) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        try:
            response = self._client.post(self._url, json=body).json()
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise EndpointError(
                f"The signer at {safe_url(self._url)} does not answer {method}: {type(error).__name__}",
                hint="Check that it is running, and the setting signer.",
            ) from None
        if not isinstance(response, dict) or ("error" not in response and "result" not in response):
            raise self._invalid_response("JSON-RPC")
        if response.get("error"):
            error_object = response["error"]
            message = (
                error_object.get("message") if isinstance(error_object, dict) else error_object
            )
            raise NotAuthorisedError(
                f"The signer at {safe_url(self._url)} refused {method}: {str(message)[:200]}",
                hint="The signer's rules or its user rejected the request.",
            )
        return response["result"]

    def _invalid_response(self, wanted: str) -> EndpointError:
        return EndpointError(
            f"The signer at {safe_url(self._url)} did not answer with {wanted}",
            hint="Nothing was sent. Check that the URL is that of a signer for this account.",
        )


class _UnsignedError(Exception):
    """The signature for a nonce is not there yet."""

    def __init__(self, nonce: int) -> None:
        super().__init__(nonce)
        self.nonce = nonce


async def signed_by(account: Signer, sign: Callable[[], S]) -> S:
    """Return the result of a signing function; an external signer signs in a thread.

    An external signer may take minutes, in which the event loop does its other work.
    """
    if isinstance(account, ExternalSigner):
        return await in_daemon_thread(sign)
    return sign()


async def in_daemon_thread(function: Callable[[], R]) -> R:
    """Return the result of a function that waits for an external signer.

    Unlike a thread of asyncio, this one is not waited for after Ctrl-C or at the end of the program.
    """
    future: Future[R] = Future()
    future.set_running_or_notify_cancel()  # the thread can't be cancelled, only no longer awaited

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - raised by the awaiting task
            future.set_exception(error)

    threading.Thread(target=run, name="external signer", daemon=True).start()
    return await asyncio.wrap_future(future)


async def sign_and_record(
    account: Signer, sign: Callable[[int], S], record: Callable[[Callable[[int], S]], R]
) -> R:
    """Sign for the next free nonce and record the result.

    A key of this process signs within the database transaction that allocates the nonce. An
    external signer signs before it, and again if the nonce was used meanwhile.

    Args:
        sign: Signs for a nonce.
        record: Allocates a nonce, calls its argument with it, and records the result.
    """
    signed: dict[int, S] = {}

    def sign_within(nonce: int) -> S:
        if nonce in signed:
            return signed[nonce]
        if isinstance(account, ExternalSigner):
            raise _UnsignedError(nonce)
        return sign(nonce)

    while True:
        try:
            return record(sign_within)
        except _UnsignedError as error:
            signed[error.nonce] = await in_daemon_thread(partial(sign, error.nonce))


def _as_json(transaction: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a transaction to its JSON-RPC form."""
    fields: dict[str, Any] = {}
    for name, value in transaction.items():
        if name == "type":
            fields["type"] = hex(value)
        elif name in _QUANTITIES:
            fields[name] = hex(value)
        elif name == "data":
            fields["data"] = fields["input"] = "0x" + bytes(value).hex()
        elif value:  # `to` is omitted for a contract creation
            fields[name] = value
    return fields


def _plain(value: Any) -> Any:
    """Convert typed data to JSON values: bytes to hex, and integers from 2**53 to strings."""
    if isinstance(value, bytes | bytearray):
        return "0x" + bytes(value).hex()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2**53:
        return str(value)
    return json.loads(json.dumps(value))


def _same_fields(signed: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a signed transaction equals the requested one, field by field."""
    numbers = all(int(signed[name]) == int(wanted[name]) for name in _QUANTITIES)
    return (
        numbers
        and bytes(HexBytes(signed["to"])) == bytes(HexBytes(wanted["to"]))
        and bytes(HexBytes(signed["data"])) == bytes(HexBytes(wanted["data"]))
        and not signed.get("accessList")
    )
