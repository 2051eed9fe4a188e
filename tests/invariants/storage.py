"""Reads records, loads and balances from contract storage, which is faster than calls."""

from __future__ import annotations

from collections.abc import Callable

from eth_utils import keccak

from deepsquare_chain.job import Load
from tests.support.grid import WEALTH, Grid


def _packed(load: Load) -> int:
    """A provider's load as in storage."""
    return load.cpus | load.memory << 32 | load.gpus << 80


class Storage:
    """Reads records, loads and balances from storage slots, which is faster than calls."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        scheduler, credit, alice = grid.scheduler.address, grid.credit.address, int(grid.alice, 16)
        before = grid.chain.snapshot()
        job_id, count = grid.submit(), grid.submit()
        self._records = self._find(scheduler, job_id, lambda word: word % 2**160 == alice)
        self._count = next(s for s in range(32) if self._word(scheduler, s) % 2**64 == count)
        host = grid.provider("probe")
        grid.assign(host, count)
        packed = _packed(Load(*grid.scheduler.loadOf(host.id)))
        self._loads = self._find(scheduler, host.id, lambda word: word == packed)
        self._parked = 0  # if the token blocks nobody, nothing is ever parked
        if hasattr(grid.credit, "setBlocked"):
            grid.credit.setBlocked(grid.alice, True, sender=grid.admin)
            grid.scheduler.cancel([job_id], sender=grid.alice)
            amount = grid.scheduler.parkedOf(grid.alice)
            self._parked = self._find(scheduler, alice, lambda word: word == amount)
        grid.chain.revert(before)
        self._balances = self._find(credit, alice, lambda word: word == WEALTH)
        supply = grid.credit.totalSupply()
        self._supply = next(s for s in range(32) if self._word(credit, s) == supply)

    def _word(self, address: str, slot: int) -> int:
        return self.grid.chain.state.get_storage(bytes.fromhex(address[2:]), slot)

    @staticmethod
    def _mapping_slot(key: int, slot: int) -> int:
        return int.from_bytes(keccak(key.to_bytes(32, "big") + slot.to_bytes(32, "big")), "big")

    def _find(self, address: str, key: int, is_it: Callable[[int], bool]) -> int:
        return next(s for s in range(32) if is_it(self._word(address, self._mapping_slot(key, s))))

    def record(self, job_id: int) -> tuple[int, int, int]:
        first_slot = self._mapping_slot(job_id, self._records)
        first, second, third = (
            self._word(self.grid.scheduler.address, first_slot + offset) for offset in range(3)
        )
        return first, second, third

    def job_count(self) -> int:
        return self._word(self.grid.scheduler.address, self._count) % 2**64

    def load(self, provider_id: int) -> Load:
        word = self._word(self.grid.scheduler.address, self._mapping_slot(provider_id, self._loads))
        return Load(word % 2**32, (word >> 32) % 2**48, word >> 80)

    def parked(self, account: str) -> int:
        return self._word(
            self.grid.scheduler.address, self._mapping_slot(int(account, 16), self._parked)
        )

    def supply(self) -> int:
        return self._word(self.grid.credit.address, self._supply)

    def balance(self, account: str) -> int:
        return self._word(
            self.grid.credit.address, self._mapping_slot(int(account, 16), self._balances)
        )
