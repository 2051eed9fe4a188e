"""Reads every block of a local chain once: what happened, and who paid which gas for it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from web3 import AsyncWeb3

from deepsquare_chain.chain.bindings.events import decode_logs
from deepsquare_chain.chain.bindings.eventtypes import Event


@dataclass(slots=True)
class Gas:
    """What an account paid: transactions, gas units and wei."""

    transactions: int = 0
    used: int = 0
    wei: int = 0


class BlockReader:
    """Follows a chain that never reorganises, from its first block.

    `by_account` holds every transaction there was; `by_job` shares each transaction's wei equally
    among the jobs that its events name. `events` are all so far.
    """

    def __init__(self, w3: AsyncWeb3[Any]) -> None:
        self._w3 = w3
        self._next = 0
        self.by_account: dict[str, Gas] = defaultdict(Gas)
        self.by_job: dict[int, int] = defaultdict(int)
        self.events: list[Event] = []

    async def poll(self) -> list[Event]:
        """Events of all blocks that are new, in their order."""
        head = await self._w3.eth.block_number
        found: list[Event] = []
        while self._next <= head:
            block = await self._w3.eth.get_block(self._next)
            hashes = block.get("transactions", [])
            receipts = await asyncio.gather(
                *(self._w3.eth.get_transaction_receipt(each) for each in hashes)  # type: ignore[arg-type]
            )
            for receipt in receipts:
                found += self._read(dict(receipt))
            self._next += 1
        self.events += found
        return found

    def _read(self, receipt: dict[str, Any]) -> list[Event]:
        wei = int(receipt["gasUsed"]) * int(receipt["effectiveGasPrice"])
        paid = self.by_account[str(receipt["from"])]
        paid.transactions += 1
        paid.used += int(receipt["gasUsed"])
        paid.wei += wei
        events = decode_logs(receipt["logs"])
        jobs = {event.job_id for event in events if hasattr(event, "job_id")}
        for job_id in jobs:
            self.by_job[job_id] += wei // len(jobs)
        return events
