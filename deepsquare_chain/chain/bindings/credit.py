"""The Credit token: balances, allowances and permits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from web3.types import BlockIdentifier

from deepsquare_chain.chain.bindings.calls import LATEST, Call, ContractBase, checked_address
from deepsquare_chain.chain.signers import Signer, signed_by
from deepsquare_chain.credits import format_credits

UNLIMITED = 2**256 - 1


@dataclass(frozen=True, slots=True)
class Permit:
    """A signed EIP-2612 permit; `value` in credit-wei, `deadline` in chain time."""

    value: int
    deadline: int
    v: int
    r: bytes
    s: bytes

    def to_tuple(self) -> tuple[int, int, int, bytes, bytes]:
        """Return the tuple that the contracts take."""
        return (self.value, self.deadline, self.v, self.r, self.s)


class CreditContract(ContractBase):
    """The ERC-20 token that jobs are paid in. All amounts are credit-wei."""

    artifact = "Credit"

    async def balance_of(self, account: str, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Return the credits of an account."""
        account = checked_address(account)
        return int(await self._one("balanceOf", account, block=block_identifier))

    async def total_supply(self, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Return the total number of credits."""
        return int(await self._one("totalSupply", block=block_identifier))

    async def allowance(
        self, owner: str, spender: str, *, block_identifier: BlockIdentifier = LATEST
    ) -> int:
        """Return the amount that a spender may transfer from an owner."""
        accounts = (checked_address(owner), checked_address(spender))
        return int(await self._one("allowance", *accounts, block=block_identifier))

    async def permit_nonce(self, owner: str, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Return the nonce of the owner's next permit."""
        return int(await self._one("nonces", checked_address(owner), block=block_identifier))

    def approve(self, spender: str, amount: int) -> Call:
        """Allow a spender to transfer up to `amount`; `UNLIMITED` is not used up by transfers."""
        formatted = "unlimited" if amount == UNLIMITED else format_credits(amount)
        label = f"approve {formatted} credits for {spender}"
        return self._call("approve", checked_address(spender), amount, label=label)

    def transfer(self, to: str, amount: int) -> Call:
        """Transfer credits to an account."""
        label = f"transfer {format_credits(amount)} credits to {to}"
        return self._call("transfer", checked_address(to), amount, label=label)

    def mint(self, to: str, amount: int) -> Call:
        """Create credits; for a holder of MINTER_ROLE."""
        label = f"mint {format_credits(amount)} credits for {to}"
        return self._call("mint", checked_address(to), amount, label=label)

    def burn(self, amount: int) -> Call:
        """Destroy credits of the sender."""
        return self._call("burn", amount, label=f"burn {format_credits(amount)} credits")

    async def permit_data(
        self, owner: str, spender: str, value: int, deadline: int
    ) -> Mapping[str, Any]:
        """Return the EIP-712 data of a permit over `value` credit-wei until `deadline`.

        The owner signs it to allow the spender the transfer.
        """
        _, name, version, chain_id, contract, _, _ = await self._view("eip712Domain")
        return {
            "types": {
                "EIP712Domain": [
                    {"name": "name", "type": "string"},
                    {"name": "version", "type": "string"},
                    {"name": "chainId", "type": "uint256"},
                    {"name": "verifyingContract", "type": "address"},
                ],
                "Permit": [
                    {"name": "owner", "type": "address"},
                    {"name": "spender", "type": "address"},
                    {"name": "value", "type": "uint256"},
                    {"name": "nonce", "type": "uint256"},
                    {"name": "deadline", "type": "uint256"},
                ],
            },
            "primaryType": "Permit",
            "domain": {
                "name": name,
                "version": version,
                "chainId": chain_id,
                "verifyingContract": contract,
            },
            "message": {
                "owner": checked_address(owner),
                "spender": checked_address(spender),
                "value": value,
                "nonce": await self.permit_nonce(owner),
                "deadline": deadline,
            },
        }

    async def sign_permit(self, account: Signer, spender: str, value: int, deadline: int) -> Permit:
        """Sign a permit; `deadline` is chain time in seconds."""
        data = await self.permit_data(account.address, spender, value, deadline)
        signed = await signed_by(account, lambda: account.sign_typed_data(full_message=dict(data)))
        return Permit(
            value=value,
            deadline=deadline,
            v=signed.v,
            r=signed.r.to_bytes(32, "big"),
            s=signed.s.to_bytes(32, "big"),
        )
