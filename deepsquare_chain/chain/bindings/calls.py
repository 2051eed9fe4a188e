"""Base of the contract classes: reads views and encodes calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from eth_typing import ChecksumAddress
from eth_utils.address import is_address, is_checksum_formatted_address, to_checksum_address
from hexbytes import HexBytes
from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, Web3RPCError
from web3.types import BlockIdentifier

from deepsquare_chain.chain.bindings.abi import AbiError, interface
from deepsquare_chain.chain.bindings.deployment import role_name
from deepsquare_chain.chain.bindings.reverts import decode_revert
from deepsquare_chain.chain.rpc.responses import node_message
from deepsquare_chain.chain.signers import SigningDomain
from deepsquare_chain.errors import EndpointError, UsageError

LATEST: Final[BlockIdentifier] = "latest"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """The body of a transaction: recipient, calldata, and a readable label.

    `value` is in wei of the chain's native coin. An empty `to` creates a contract from `data`.
    """

    to: str
    data: bytes
    label: str
    value: int = 0

    def __repr__(self) -> str:
        return f"Call({self.label!r} to {self.to}, {len(self.data)} bytes)"


def checked_address(text: str, name: str = "address") -> ChecksumAddress:
    """Return an address with its checksum.

    Raises:
        UsageError: The text is not an address, or its checksum is wrong.
    """
    if not is_address(text):
        raise UsageError(
            f"{str(text)[:80]!r} is not a valid {name}",
            hint="An address is 0x and 40 hexadecimal digits, such as "
            "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266.",
        )
    address = to_checksum_address(text)
    # Only an address in mixed case has a checksum.
    if is_checksum_formatted_address(text) and address[2:] != text[-40:]:
        raise UsageError(
            f"{text!r} is not a valid {name}: its checksum is wrong, so that a character is mistyped",
            hint="Copy it again from its source.",
        )
    return address


class ContractBase:
    """A contract at an address; subclasses add a method for each of its functions."""

    artifact = ""

    def __init__(self, w3: AsyncWeb3[Any], address: str) -> None:
        self.w3 = w3
        self.address = checked_address(address, "contract address")
        self._interface = interface(self.artifact)

    async def _view(
        self, name: str, *arguments: Any, block: BlockIdentifier = LATEST
    ) -> tuple[Any, ...]:
        """Call a view, and return its decoded values; raises the errors of `_decoded_view`."""
        decode = self._interface.function(name).decode
        return await self._decoded_view(name, *arguments, block=block, decode=decode)

    async def _decoded_view(
        self, name: str, *arguments: Any, block: BlockIdentifier, decode: Callable[[bytes], T]
    ) -> T:
        """Call a view, and decode its result with a function that may raise `AbiError`.

        Raises:
            RevertedError: The contract reverted; raised as the matching subclass.
            EndpointError: The node did not answer, or the response is not of this contract.
        """
        data = HexBytes(self._interface.function(name).encode(*arguments))
        try:
            result = await self.w3.eth.call({"to": self.address, "data": data}, block)
            return decode(bytes(result))
        except ContractLogicError as error:
            raise decode_revert(error) from None
        except Web3RPCError as error:
            raise EndpointError(
                f"The node could not read {name} of {self.artifact}: {node_message(error)}"
            ) from None
        except AbiError:
            raise EndpointError(
                f"There is no {self.artifact} at {self.address}: {name} returned an invalid result",
                hint="Check that the deployment record belongs to this chain.",
            ) from None

    async def _one(self, name: str, *arguments: Any, block: BlockIdentifier = LATEST) -> Any:
        return (await self._view(name, *arguments, block=block))[0]

    def _call(self, name: str, *arguments: Any, label: str = "") -> Call:
        data = self._interface.function(name).encode(*arguments)
        return Call(to=self.address, data=data, label=label or name)

    async def domain(self) -> SigningDomain:
        """Return the EIP-712 domain (ERC-5267); only Credit and the forwarder have one."""
        _, name, version, chain_id, contract, _, _ = await self._view("eip712Domain")
        return SigningDomain(name, version, chain_id, contract)

    # -- roles, the same for the three contracts

    async def has_role(self, role: bytes, account: str, *, block: BlockIdentifier = LATEST) -> bool:
        """Return whether an account has a role (32 bytes, see the module `deployment`)."""
        return bool(await self._one("hasRole", role, checked_address(account), block=block))

    def grant_role(self, role: bytes, account: str) -> Call:
        """Grant a role; for the administrator."""
        label = f"grant {role_name(role)} of {self.artifact} to {account}"
        return self._call("grantRole", role, checked_address(account), label=label)

    def revoke_role(self, role: bytes, account: str) -> Call:
        """Revoke a role; for the administrator."""
        label = f"revoke {role_name(role)} of {self.artifact} from {account}"
        return self._call("revokeRole", role, checked_address(account), label=label)

    async def pending_admin(self, *, block: BlockIdentifier = LATEST) -> tuple[str, int]:
        """Return the next administrator, or "", and the chain time from which it may accept."""
        account, schedule = await self._view("pendingDefaultAdmin", block=block)
        return (str(account) if int(account, 16) else "", int(schedule))

    def begin_handover(self, account: str) -> Call:
        """Start a handover: the next administrator must accept it after the contract's delay."""
        label = f"name {account} as the next administrator of {self.artifact}"
        return self._call("beginDefaultAdminTransfer", checked_address(account), label=label)

    def accept_handover(self) -> Call:
        """Accept the handover; for the next administrator."""
        label = f"become the administrator of {self.artifact}"
        return self._call("acceptDefaultAdminTransfer", label=label)

    def cancel_handover(self) -> Call:
        """Cancel the handover; for the administrator."""
        label = f"withdraw the handover of {self.artifact}"
        return self._call("cancelDefaultAdminTransfer", label=label)

    async def default_admin(self, *, block: BlockIdentifier = LATEST) -> str:
        """Return the administrator's account."""
        return str(await self._one("defaultAdmin", block=block))

    async def admin_delay(self, *, block: BlockIdentifier = LATEST) -> int:
        """Return the delay of a handover in seconds."""
        return int(await self._one("defaultAdminDelay", block=block))


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: `1 job`, `2 jobs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
