"""The ERC-2771 forwarder: a customer signs a request (EIP-712), and a relay pays for its gas.

The forwarder calls the target with the signer's address appended, so that the target sees the
signer as the sender. A request is executed at most once, because it uses up its nonce.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from eth_account import Account
from eth_account.messages import SignableMessage, encode_typed_data
from eth_keys.constants import SECPK1_N
from eth_keys.exceptions import BadSignature
from eth_utils.address import to_canonical_address, to_checksum_address
from eth_utils.exceptions import ValidationError
from hexbytes import HexBytes
from web3.exceptions import ContractLogicError, Web3RPCError
from web3.types import BlockIdentifier

from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.calls import (
    LATEST,
    Call,
    ContractBase,
    checked_address,
    plural,
)
from deepsquare_chain.chain.bindings.reverts import decode_revert
from deepsquare_chain.chain.rpc.responses import NodeError, classify, node_message
from deepsquare_chain.chain.signers import Signer, SigningDomain, signed_hash
from deepsquare_chain.errors import EndpointError, NotAuthorisedError, RevertedError, UsageError

#: Base gas of a transaction, and maximum gas per byte of calldata.
TRANSACTION_GAS: Final = 21_000
CALLDATA_GAS: Final = 16
_REQUEST_FIELDS: Final = {
    "from": "address",
    "to": "address",
    "value": "uint256",
    "gas": "uint256",
    "nonce": "uint256",
    "deadline": "uint48",
    "data": "bytes",
}
_TOO_LITTLE_GAS: Final = (NodeError.OUT_OF_GAS, NodeError.INVALID)
_SIGNATURE_BYTES: Final = 65
_HEX: Final = re.compile(r"0x(?:[0-9a-fA-F]{2})*")
_MAX_DIGITS: Final = 78  # of 256 bits


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """A request that a customer signs.

    `value` is in wei of the chain's coin, `gas` is the limit of the inner call, `deadline` is the
    last chain time (seconds) at which the request can be executed.
    """

    sender: str
    to: str
    value: int
    gas: int
    nonce: int
    deadline: int
    data: bytes

    def typed_data(self, domain: SigningDomain) -> dict[str, Any]:
        """Return the EIP-712 message in the form that wallets take."""
        fields = asdict(self)
        message = {"from": fields.pop("sender"), **fields}
        return domain.typed_data("ForwardRequest", _REQUEST_FIELDS, message)

    def digest(self, domain: SigningDomain) -> bytes:
        """Return the signed hash (32 bytes), which is also the ID of the request."""
        return signed_hash(self._signable(domain))

    def sign(self, account: Signer, domain: SigningDomain) -> SignedRequest:
        """Sign the request with the customer's key."""
        signed = account.sign_typed_data(full_message=self.typed_data(domain))
        return SignedRequest(self, bytes(signed.signature))

    def _signable(self, domain: SigningDomain) -> SignableMessage:
        return encode_typed_data(full_message=self.typed_data(domain))


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request and its signature (r, s and v: 65 bytes)."""

    request: ForwardRequest
    signature: bytes

    def check_signer(self, domain: SigningDomain) -> None:
        """Check that the customer named in the request signed it.

        Raises:
            NotAuthorisedError: Another account signed it, or the forwarder would reject the
                signature.
        """
        signer = self._signer(domain)
        if signer != self.request.sender:
            raise NotAuthorisedError(
                f"The request is not signed by {self.request.sender}"
                + (f" but by {signer}" if signer else ": its signature is not valid"),
                hint="Sign it with the wallet of its sender, for this chain and forwarder.",
            )

    def _signer(self, domain: SigningDomain) -> str | None:
        # The forwarder also rejects the second, malleable form of a signature.
        s_value = int.from_bytes(self.signature[32:64], "big")
        if len(self.signature) != _SIGNATURE_BYTES or s_value > SECPK1_N // 2:
            return None
        if self.signature[64] not in (27, 28):
            return None
        try:
            message = self.request._signable(domain)  # noqa: SLF001 - of the same module
            return str(Account.recover_message(message, signature=self.signature))
        except (BadSignature, ValidationError, ValueError):
            return None

    def values(self) -> tuple[Any, ...]:
        """Return the tuple that the forwarder's functions take."""
        request = self.request
        return (
            request.sender,
            request.to,
            request.value,
            request.gas,
            request.deadline,
            request.data,
            self.signature,
        )

    def to_wire(self) -> dict[str, str]:
        """Return the JSON form: numbers as decimal strings, bytes as hexadecimal."""
        request = self.request
        return {
            "from": request.sender,
            "to": request.to,
            "value": str(request.value),
            "gas": str(request.gas),
            "nonce": str(request.nonce),
            "deadline": str(request.deadline),
            "data": "0x" + request.data.hex(),
            "signature": "0x" + self.signature.hex(),
        }

    @classmethod
    def from_wire(cls, body: Any) -> SignedRequest:
        """Parse the JSON form.

        Raises:
            UsageError: A field is missing, unknown or invalid; the message names it.
        """
        if not isinstance(body, Mapping):
            raise UsageError("The request is not a JSON object", hint=_WIRE_HINT)
        if unknown := set(body) - set(_WIRE_FIELDS):
            raise UsageError(
                f"The request has an unknown field {min(map(str, unknown))[:40]!r}", hint=_WIRE_HINT
            )
        request = ForwardRequest(
            sender=_address(body, "from"),
            to=_address(body, "to"),
            value=_number(body, "value", 256),
            gas=_number(body, "gas", 256),
            nonce=_number(body, "nonce", 256),
            deadline=_number(body, "deadline", 48),
            data=_bytes(body, "data"),
        )
        return cls(request, _bytes(body, "signature"))


_WIRE_FIELDS: Final = (*_REQUEST_FIELDS, "signature")
_WIRE_HINT: Final = f"Send {', '.join(_WIRE_FIELDS)}."


def _address(body: Mapping[str, Any], name: str) -> str:
    return checked_address(str(body.get(name, "")), f"address in {name!r}")


def _number(body: Mapping[str, Any], name: str, bits: int) -> int:
    value = body.get(name)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS:
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**bits:
        raise UsageError(
            f"The request's {name!r} is not a whole number of at most {bits} bits",
            hint="Write it in decimal.",
        )
    return value


def _bytes(body: Mapping[str, Any], name: str) -> bytes:
    value = body.get(name)
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise UsageError(
            f"The request's {name!r} is not hexadecimal", hint="Write bytes as 0x1234."
        )
    return bytes.fromhex(value[2:])


@dataclass(frozen=True, slots=True)
class ForwardedCall:
    """One inner call of a transaction to the forwarder; fields as in `ForwardRequest`."""

    sender: str
    to: str
    value: int
    gas: int
    deadline: int
    data: bytes


def forwarded_calls(data: bytes) -> list[ForwardedCall]:
    """Return the inner calls of a transaction's input (`execute` or `executeBatch`).

    Raises:
        AbiError: The input calls neither function.
    """
    function, values = interface("ERC2771Forwarder").read_call(data)
    if function.name not in ("execute", "executeBatch"):
        raise AbiError(f"{function.name} contains no call")
    requests = values[0] if function.name == "executeBatch" else (values[0],)
    return [ForwardedCall(*request[:6]) for request in requests]


class ForwarderContract(ContractBase):
    """OpenZeppelin's ERC2771Forwarder."""

    artifact = "ERC2771Forwarder"

    async def nonce_of(self, account: str, *, block: BlockIdentifier = LATEST) -> int:
        """Return the nonce of the account's next request."""
        return int(await self._one("nonces", checked_address(account), block=block))

    async def verify(self, signed: SignedRequest) -> bool:
        """Return whether it would execute the request now: signer, nonce, deadline and target."""
        return bool(await self._one("verify", signed.values()))

    def execute(self, signed: SignedRequest) -> Call:
        """Execute one request; reverts if the request is invalid or its inner call fails."""
        return self._call("execute", signed.values(), label="relay 1 request")

    def execute_batch(self, requests: Sequence[SignedRequest], refund_to: str) -> Call:
        """Execute several requests; invalid ones are skipped, since `refund_to` is given."""
        label = f"relay {plural(len(requests), 'request')}"
        values = [request.values() for request in requests]
        return self._call("executeBatch", values, checked_address(refund_to), label=label)

    async def simulate(
        self, sender: str, call: Call, *, gas: int | None = None, block: BlockIdentifier = LATEST
    ) -> None:
        """Simulate an inner call of at most `gas` for a signer, without a signature.

        Raises:
            RevertedError: The target would revert; raised as the matching subclass.
            EndpointError: The node did not answer, or rejected it for another reason.
        """
        body = self._forwarded(sender, call)
        if gas is not None:
            body["gas"] = gas + TRANSACTION_GAS + CALLDATA_GAS * len(body["data"])
        try:
            await self.w3.eth.call(body, block)
        except ContractLogicError as error:
            raise decode_revert(error) from None
        except Web3RPCError as error:
            if gas is not None and classify(error) in _TOO_LITTLE_GAS:
                raise RevertedError(
                    f"{gas:,} gas are too little for {call.label!r}", hint="Sign more gas."
                ) from None
            raise EndpointError(
                f"The node could not simulate {call.label!r}: {node_message(error)}"
            ) from None

    async def estimate_gas(self, sender: str, call: Call) -> int:
        """Return the gas limit of an inner call, with a margin; raises the errors of `simulate`."""
        await self.simulate(sender, call)
        try:
            estimate = int(await self.w3.eth.estimate_gas(self._forwarded(sender, call)))
        except ContractLogicError as error:
            raise decode_revert(error) from None
        except Web3RPCError as error:
            raise EndpointError(
                f"The node could not estimate {call.label!r}: {node_message(error)}"
            ) from None
        # The state may change before the execution, and unused gas costs nothing.
        return estimate * 3 // 2 + 50_000

    def _forwarded(self, sender: str, call: Call) -> Any:
        data = call.data + to_canonical_address(sender)
        return {"from": self.address, "to": to_checksum_address(call.to), "data": HexBytes(data)}
