"""What every devnet node offers: an address, funded keys, and a little control over time."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import httpx
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address

from deepsquare_chain.errors import EndpointError, GridError

# The phrase every Ethereum tool ships for tests: its keys are public, and worth nothing.
DEV_MNEMONIC = "test test test test test test test test test test test junk"
DEV_ACCOUNTS = 10
DEV_BALANCE = 1_000_000 * 10**18  # wei of each, and of the bank
DEFAULT_CHAIN_ID = 1337


@lru_cache(maxsize=1)
def dev_accounts() -> tuple[LocalAccount, ...]:
    """The funded accounts, and as the last one the bank that ``Node.fund`` pays from."""
    Account.enable_unaudited_hdwallet_features()
    return tuple(
        Account.from_mnemonic(DEV_MNEMONIC, account_path=f"m/44'/60'/0'/0/{index}")
        for index in range(DEV_ACCOUNTS + 1)
    )


class Node(ABC):
    """A chain for development, used as an async context manager.

    ``url`` and ``chain_id`` say where it is; ``accounts`` are funded; ``pid`` is its process.
    """

    def __init__(self, chain_id: int = DEFAULT_CHAIN_ID) -> None:
        self.chain_id = chain_id
        self.url = ""
        self.pid = 0
        self._client: httpx.AsyncClient | None = None
        self._bank = asyncio.Lock()
        self._requests = 0

    @property
    def accounts(self) -> tuple[LocalAccount, ...]:
        """Ten accounts with ``DEV_BALANCE`` wei each."""
        return dev_accounts()[:DEV_ACCOUNTS]

    @property
    def dev_keys(self) -> tuple[str, ...]:
        """Private keys of ``accounts``, as 0x-hex."""
        return tuple("0x" + bytes(account.key).hex() for account in self.accounts)

    @abstractmethod
    async def start(self) -> None:
        """Run the node; returns when it answers. ``url`` and ``pid`` are set then."""

    @abstractmethod
    async def stop(self) -> None:
        """End the node; harmless a second time."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the node and drop the connections to it."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        await self.stop()

    async def rpc(self, method: str, *params: Any) -> Any:
        """One JSON-RPC call; ``EndpointError`` where there is no result."""
        if self._client is None:
            self._client = httpx.AsyncClient(base_url=self.url, timeout=30, trust_env=False)
        self._requests += 1
        body = {"jsonrpc": "2.0", "id": self._requests, "method": method, "params": params}
        try:
            answer = (await self._client.post("/", json=body)).json()
        except (httpx.HTTPError, ValueError) as error:
            raise EndpointError(f"The devnet node at {self.url} doesn't answer: {error}") from error
        if "error" in answer:
            raise EndpointError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    async def fund(self, address: str, wei: int, *, timeout: float = 30.0) -> None:
        """Pay ``wei`` to an address from the bank; returns once mined (``timeout`` in seconds)."""
        bank = dev_accounts()[-1]
        async with self._bank:  # one nonce owner
            nonce = int(await self.rpc("eth_getTransactionCount", bank.address, "pending"), 16)
            payment: dict[str, Any] = {
                "chainId": self.chain_id,
                "nonce": nonce,
                "to": to_checksum_address(address),
                "value": wei,
                "gas": 100_000,
                "maxFeePerGas": 100 * 10**9,
                "maxPriorityFeePerGas": 10**9,
            }
            signed = bank.sign_transaction(payment)
            tx_hash = await self.rpc(
                "eth_sendRawTransaction", "0x" + bytes(signed.raw_transaction).hex()
            )
        await self._mined(tx_hash, timeout)

    async def mine(self, blocks: int = 1) -> None:
        """Make blocks now."""
        for _ in range(blocks):
            await self.rpc("evm_mine")

    async def increase_time(self, seconds: int) -> None:
        """Move chain time forward and make a block that shows it."""
        await self.rpc("evm_increaseTime", seconds)
        await self.mine()

    async def set_time(self, timestamp: int) -> None:
        """Make a block at ``timestamp`` seconds, later than the head's; time goes on from there."""
        await self.rpc("evm_setNextBlockTimestamp", timestamp)
        await self.mine()

    async def _mined(self, tx_hash: str, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while loop.time() < deadline:
            receipt = await self.rpc("eth_getTransactionReceipt", tx_hash)
            if receipt is not None:
                if receipt["status"] != "0x1":
                    raise GridError(f"The funding transaction {tx_hash} failed.")
                return
            await asyncio.sleep(0.05)
        raise EndpointError(
            f"The funding transaction {tx_hash} was not mined within {timeout:.0f} seconds."
        )
