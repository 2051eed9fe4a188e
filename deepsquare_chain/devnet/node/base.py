"""The interface of devnet nodes: a URL, funded accounts, and control over chain time."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import httpx2
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address

from deepsquare_chain.errors import EndpointError, GridError

# The standard test mnemonic of Ethereum tools: its keys are public and must never hold value.
DEV_MNEMONIC = "test test test test test test test test test test test junk"
DEV_ACCOUNTS = 10
DEV_BALANCE = 1_000_000 * 10**18  # wei per account, including the bank
DEFAULT_CHAIN_ID = 1337


@lru_cache(maxsize=1)
def dev_accounts() -> tuple[LocalAccount, ...]:
    """Return the funded accounts; the last one is the bank that ``Node.fund`` pays from."""
    Account.enable_unaudited_hdwallet_features()
    return tuple(
        Account.from_mnemonic(DEV_MNEMONIC, account_path=f"m/44'/60'/0'/0/{index}")
        for index in range(DEV_ACCOUNTS + 1)
    )


class Node(ABC):
    """A chain for development, used as an async context manager.

    ``url`` is its JSON-RPC endpoint, ``accounts`` are funded, and ``pid`` is its process ID.
    """

    def __init__(self, chain_id: int = DEFAULT_CHAIN_ID) -> None:
        self.chain_id = chain_id
        self.url = ""
        self.pid = 0
        self._client: httpx2.AsyncClient | None = None
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
        """Start the node; return when it accepts requests and ``url`` and ``pid`` are set."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop the node; idempotent."""

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
        """Stop the node and close the connections to it."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        await self.stop()

    async def rpc(self, method: str, *params: Any) -> Any:
        """Send one JSON-RPC request and return the result; raises ``EndpointError`` on failure."""
        if self._client is None:
            self._client = httpx2.AsyncClient(base_url=self.url, timeout=30, trust_env=False)
        self._requests += 1
        body = {"jsonrpc": "2.0", "id": self._requests, "method": method, "params": params}
        try:
            response = (await self._client.post("/", json=body)).json()
        except (httpx2.HTTPError, ValueError) as error:
            raise EndpointError(f"The devnet node at {self.url} doesn't answer: {error}") from error
        if "error" in response:
            raise EndpointError(f"{method}: {response['error'].get('message')}")
        return response["result"]

    async def fund(self, address: str, wei: int, *, timeout: float = 30.0) -> None:
        """Send ``wei`` from the bank to an address; return when mined (``timeout`` in seconds)."""
        bank = dev_accounts()[-1]
        async with self._bank:  # serialises the use of nonces
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
        """Mine blocks immediately."""
        for _ in range(blocks):
            await self.rpc("evm_mine")

    async def increase_time(self, seconds: int) -> None:
        """Advance chain time, and mine a block with the new time."""
        await self.rpc("evm_increaseTime", seconds)
        await self.mine()

    async def set_time(self, timestamp: int) -> None:
        """Mine a block at ``timestamp`` seconds, later than the head's; time continues from it."""
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
