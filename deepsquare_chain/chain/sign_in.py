"""Sign-in with an Ethereum account (EIP-4361): parses messages and verifies signatures.

Sources: https://eips.ethereum.org/EIPS/eip-4361 for the format, ERC-1271 for contract wallets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from eth_abi.abi import encode
from eth_account import Account
from eth_account.messages import SignableMessage, encode_defunct
from eth_keys.exceptions import BadSignature
from eth_utils.address import is_checksum_address, to_checksum_address
from eth_utils.exceptions import ValidationError
from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, Web3RPCError

from deepsquare_chain.chain.signers import Signer, signed_hash
from deepsquare_chain.errors import UsageError

MAX_MESSAGE: Final = 4_096
#: Maximum bytes of a signature; contract wallets may use more than the 65 bytes of a key's.
MAX_SIGNATURE: Final = 4_096
_HEADER: Final = " wants you to sign in with your Ethereum account:"
_URI: Final = r"[A-Za-z][A-Za-z0-9+.-]*:[!#-;=?-Z_a-z~%@\[\]]*"
_TIME: Final = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(?:\.[0-9]{1,9})?(?:Z|[+-][0-9]{2}:[0-9]{2})"
_FORMAT: Final = re.compile(
    rf"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://)?(?P<domain>[A-Za-z0-9.\-_~%:\[\]]{{1,255}}){_HEADER}\n"
    r"(?P<address>0x[0-9A-Fa-f]{40})\n"
    r"\n"
    r"(?:(?P<statement>[\x20-\x7e]+)\n)?"
    r"\n"
    rf"URI: (?P<uri>{_URI})\n"
    r"Version: 1\n"
    r"Chain ID: (?P<chain_id>[1-9][0-9]{0,19})\n"
    r"Nonce: (?P<nonce>[A-Za-z0-9]{8,128})\n"
    rf"Issued At: (?P<issued_at>{_TIME})"
    rf"(?:\nExpiration Time: (?P<expiration_time>{_TIME}))?"
    rf"(?:\nNot Before: (?P<not_before>{_TIME}))?"
    r"(?:\nRequest ID: (?P<request_id>[!$&'()*+,;=:@A-Za-z0-9\-._~%]*))?"
    rf"(?:\nResources:(?P<resources>(?:\n- {_URI})*))?"
)
#: Selector of isValidSignature(bytes32,bytes), which is also its return value if valid.
_MAGIC: Final = bytes.fromhex("1626ba7e")


@dataclass(frozen=True, slots=True)
class SignInMessage:
    """An EIP-4361 message; times are RFC 3339 strings, empty if the message has none."""

    domain: str
    address: str
    uri: str
    chain_id: int
    nonce: str
    issued_at: str
    expiration_time: str = ""
    not_before: str = ""
    statement: str = ""
    resources: tuple[str, ...] = ()
    request_id: str | None = None
    scheme: str = ""

    @classmethod
    def parse(cls, text: str) -> SignInMessage:
        """Parse a message.

        Raises:
            UsageError: It is not a valid message, a date does not exist, or the address lacks its
                checksum.
        """
        match = _FORMAT.fullmatch(text) if len(text) <= MAX_MESSAGE else None
        if match is None:
            raise UsageError(
                "The text is not a sign-in message", hint="It must follow EIP-4361, version 1."
            )
        fields: dict[str, Any] = match.groupdict("")
        if not is_checksum_address(fields["address"]):
            raise UsageError(
                "The address of the sign-in message lacks its checksum",
                hint="Write it with the checksum of EIP-55, as wallets show it.",
            )
        fields |= {
            "chain_id": int(fields["chain_id"]),
            "resources": tuple(fields["resources"].split("\n- ")[1:]),
            "request_id": match["request_id"],  # None if it is missing; it may be empty
        }
        message = cls(**fields)
        for value in (message.issued_at, message.expiration_time, message.not_before):
            if value:
                seconds_of(value)
        return message

    def text(self) -> str:
        """Return the text that the wallet signs."""
        scheme = f"{self.scheme}://" if self.scheme else ""
        lines = [f"{scheme}{self.domain}{_HEADER}", self.address, ""]
        if self.statement:
            lines.append(self.statement)
        lines += [
            "",
            f"URI: {self.uri}",
            "Version: 1",
            f"Chain ID: {self.chain_id}",
            f"Nonce: {self.nonce}",
            f"Issued At: {self.issued_at}",
        ]
        times = {"Expiration Time": self.expiration_time, "Not Before": self.not_before}
        lines += [f"{name}: {time}" for name, time in times.items() if time]
        if self.request_id is not None:
            lines.append(f"Request ID: {self.request_id}")
        if self.resources:
            lines.append("Resources:")
            lines += [f"- {resource}" for resource in self.resources]
        return "\n".join(lines)

    def sign(self, account: Signer) -> bytes:
        """Sign the text with an account (EIP-191, 65 bytes)."""
        return bytes(account.sign_message(encode_defunct(text=self.text())).signature)


def seconds_of(time: str) -> float:
    """Convert an RFC 3339 time to seconds since the epoch.

    Raises:
        UsageError: The date does not exist.
    """
    try:
        return datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(f"{time!r} is not a date") from None


def rfc3339(seconds: float) -> str:
    """Convert seconds since the epoch to an RFC 3339 time in UTC, truncated to the second."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def signer_of(message: SignableMessage, signature: bytes) -> str:
    """Return the account whose key made a signature; empty if the signature is invalid."""
    if len(signature) != 65:
        return ""
    try:
        return str(Account.recover_message(message, signature=signature))
    except (BadSignature, ValidationError, ValueError):
        return ""


async def is_signed_by(
    w3: AsyncWeb3[Any], message: SignableMessage, signature: bytes, address: str
) -> bool:
    """Return whether an account signed a message, with its key or as a contract (ERC-1271).

    The node is called only if the signature is not by the account's key.

    Raises:
        EndpointError: The node does not answer.
    """
    if signer_of(message, signature).lower() == address.lower():
        return True
    account = to_checksum_address(address)
    if len(signature) > MAX_SIGNATURE or not await w3.eth.get_code(account):
        return False
    data = _MAGIC + encode(["bytes32", "bytes"], [signed_hash(message), signature])
    try:
        result = await w3.eth.call({"to": account, "data": HexBytes(data)})
    except (ContractLogicError, Web3RPCError):
        return False
    return bytes(result[:32]) == _MAGIC.ljust(32, b"\0")
