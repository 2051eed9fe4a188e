"""A grid that records its logs in the format of a chain, with one transaction per call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from eth_utils import to_checksum_address

from deepsquare_chain.audit.conservation import Storage
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.chain.bindings.contracts import _provider
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import Event, decode_log
from deepsquare_chain.chain.bindings.records import read_job
from deepsquare_chain.job import Load
from tests.support import grid as grids
from tests.support.evm import Chain


class RecordingChain(Chain):
    """Records all logs with block, transaction and log index."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        #: Sender, recipient and input of the transactions, by hash.
        self.sent: dict[str, tuple[str, str, bytes]] = {}
        self.block_times: dict[int, int] = {}
        self._calls = 0
        super().__init__()

    def _finish(self, apply: Any, message: Any, origin: bytes) -> Any:
        computation = super()._finish(apply, message, origin)
        self._calls += 1
        tx_hash = "0x" + self._calls.to_bytes(32, "big").hex()
        self.sent[tx_hash] = ("0x" + origin.hex(), "0x" + message.to.hex(), message.data)
        for address, topics, data in computation.get_log_entries():
            self.logs.append(
                {
                    "address": "0x" + address.hex(),
                    "topics": [topic.to_bytes(32, "big") for topic in topics],
                    "data": data,
                    "blockNumber": self.block,
                    "blockHash": self.block.to_bytes(32, "big"),
                    "transactionHash": self._calls.to_bytes(32, "big"),
                    # Unique in the whole chain, and so in each block.
                    "logIndex": len(self.logs),
                }
            )
            self.block_times[self.block] = self.now
        return computation


class RecordedGrid(grids.Grid):
    """The contracts with all their recorded logs."""

    chain: RecordingChain

    @property
    def deployment(self) -> Deployment:
        return Deployment(
            chain_id=31_337,
            credit=self.credit.address,
            registry=self.registry.address,
            scheduler=self.scheduler.address,
            treasury=self.treasury,
            forwarder=self.forwarder.address,
            block=0,
            constructor_args={"MetaScheduler": {"timeouts": list(grids.TIMES.values())}},
        )

    @property
    def events(self) -> list[Event]:
        """Decoded events of the deployment's contracts."""
        addresses = {address.lower() for address in self.deployment.addresses}
        events = [decode_log(log) for log in self.chain.logs if log["address"] in addresses]
        return [event for event in events if event is not None]

    def ledger(self, events: list[Event] | None = None) -> Ledger:
        recorded_events = self.events if events is None else events
        return Ledger.replay(recorded_events, self.deployment, self.chain.block_times)

    def storage(self, ledger: Ledger) -> Storage:
        """Read the contracts' storage, with the balances of all accounts in the ledger."""
        count = self.scheduler.jobCount()
        records = self.scheduler.getJobs(list(range(1, count + 1)))
        jobs = [read_job(number, tuple(record)) for number, record in enumerate(records, start=1)]
        ids = range(1, self.registry.providerCount() + 1)
        accounts = [self.registry.accountOf(number) for number in ids]
        return Storage(
            block=self.chain.block,
            jobs=[replace(job, customer=to_checksum_address(job.customer)) for job in jobs],
            providers=[
                replace(
                    _provider(tuple(self.registry.getProvider(account))),
                    account=to_checksum_address(account),
                )
                for account in accounts
            ],
            balances={account: self.balance(account) for account in ledger.accounts},
            parked={account: self.scheduler.parkedOf(account) for account in ledger.accounts},
            supply=self.credit.totalSupply(),
            loads={
                to_checksum_address(account): Load(*self.scheduler.loadOf(number))
                for number, account in zip(ids, accounts, strict=True)
            },
        )


def recorded_grid(**options: Any) -> RecordedGrid:
    """Return a new grid on a recording chain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "Chain", RecordingChain)
        return RecordedGrid(**options)


def recorded_grid_with_all() -> RecordedGrid:
    """Return a grid with the events of `record_history`, then of `record_payments`."""
    grid = recorded_grid()
    record_history(grid)
    record_payments(grid)
    return grid


def record_history(grid: RecordedGrid) -> Mapping[str, int]:
    """Run jobs with all final statuses and most kinds of events; return job IDs by name."""
    chain, scheduler = grid.chain, grid.scheduler
    # Twice the usual size, for all the jobs that it runs at once.
    large = {**grids.HARDWARE, "nodes": 2 * grids.HARDWARE["nodes"]}
    host = grid.provider("provider", hardware=large, labels=["gpu.model=h100"])
    other = grid.provider("other", labels=["region=eu", "gpu.model=h100"])
    names = ("finished", "failed", "spent", "cancelled", "lost", "rescued", "queued")
    # "queued" panics before it runs, and has no retries.
    jobs = {name: grid.submit(retries=0 if name == "queued" else 2) for name in names}
    chain.advance(3)
    grid.assign(host, *jobs.values())
    jobs["failed at once"] = grid.running(other)
    scheduler.finish([grid.report(jobs["failed at once"], 0, 1)], sender=other.account)
    chain.advance(2)
    first_jobs = [*jobs.values()][:7]
    scheduler.claim(first_jobs, sender=host.account)
    scheduler.requeue([jobs["queued"]], "no room", sender=host.account)
    running = first_jobs[:-1]
    scheduler.start(running, sender=host.account)
    chain.advance(20)
    scheduler.topUp(jobs["finished"], grid.alice, 10**9, sender=grid.bob)
    chain.advance(17)
    reports = [
        grid.report(jobs["finished"], 30),
        grid.report(jobs["failed"], 36, 3),
        grid.report(999),
    ]
    scheduler.finish(reports, sender=host.account)
    scheduler.cancel([jobs["cancelled"]], sender=grid.alice)
    chain.advance(grids.TERMS["timeLimit"])
    scheduler.finish([grid.report(jobs["spent"], 10**6, reason=b"spent")], sender=host.account)
    # The provider is lost: one customer cancels with a full refund, one job is retried elsewhere.
    grid.abandon(host, jobs["lost"])
    scheduler.cancel([jobs["rescued"]], sender=grid.alice)
    scheduler.panic([jobs["lost"]], "", sender=grid.stranger)
    jobs["successor"] = scheduler.jobCount()
    scheduler.answer(sender=host.account)
    scheduler.setFee(700, sender=grid.admin)
    prices = {"cpu": 7, "gpu": 5, "mem": 3}
    grid.registry.setPrices(prices, sender=other.account)
    grid.assign(other, jobs["successor"], jobs["queued"])
    scheduler.claim([jobs["successor"]], sender=other.account)
    scheduler.panic([jobs["queued"]], "broken", sender=other.account)
    scheduler.start([jobs["successor"]], sender=other.account)
    chain.advance(5)
    scheduler.finish([grid.report(jobs["successor"], 5)], sender=other.account)
    # Jobs that stay live, a job that runs until its credits are spent, and other transfers.
    jobs["until_spent"] = grid.running(other, flags=grids.UNTIL_SPENT, amount=10**11)
    scheduler.topUp(jobs["until_spent"], grid.alice, 10**9, sender=grid.alice)
    jobs["early"] = grid.submit(grid.bob)
    scheduler.topUp(jobs["early"], grid.bob, 5, sender=grid.bob)
    jobs["withdrawn"] = grid.submit(grid.bob)
    scheduler.cancel([jobs["withdrawn"]], sender=grid.bob)
    jobs["pending"] = grid.submit()
    chain.advance(grids.TIMES["pendingTimeout"])
    scheduler.selfSchedule([jobs["early"]], sender=host.account)
    grid.credit.transfer(grid.stranger, 77, sender=grid.alice)
    grid.credit.burn(7, sender=grid.stranger)
    grid.credit.transfer(scheduler.address, 11, sender=grid.stranger)
    grid.registry.setDraining(True, sender=host.account)
    grid.registry.ban(other.account, "enough", sender=grid.admin)
    return jobs


def record_payments(grid: RecordedGrid) -> Mapping[str, int]:
    """Add interim payments, load, signed requests and expiry; return job IDs by name.

    Independent of `record_history`; can follow it on the same grid.
    """
    chain, scheduler, alice, bob = grid.chain, grid.scheduler, grid.alice, grid.bob
    third = grid.provider("third", labels=["gpu.model=h100"])
    interim = grids.INTERIM_PAYMENTS
    signed = grid.request(flags=interim | grids.NO_SELF_SCHEDULING)
    grid.forward(bob, "submitJobs", [signed])
    jobs = {
        "signed": scheduler.jobCount(),
        "until spent": grid.submit(flags=interim | grids.UNTIL_SPENT, amount=10**11),
        "stopped": grid.submit(flags=interim),
        "given up": grid.submit(),
    }
    grid.assign(third, *jobs.values())
    running = [jobs["signed"], jobs["until spent"], jobs["stopped"]]
    scheduler.claimAndStart(running, sender=third.account)
    scheduler.claim([jobs["given up"]], sender=third.account)
    scheduler.panic([jobs["given up"]], "full", sender=third.account)
    jobs["heir"] = scheduler.jobCount()
    chain.advance(grids.TIMES["collectInterval"])
    scheduler.collect(running, sender=third.account)
    # A top-up by the customer extends the job, one by another account does not.
    grid.forward(bob, "topUp", jobs["signed"], bob, 10**9)
    scheduler.topUp(jobs["signed"], bob, 10**9, sender=alice)
    chain.advance(grids.TIMES["collectInterval"] + 3)
    # The provider is silent, but not yet lost; its next payment answers the challenge.
    grid.silence(third, jobs["signed"])
    scheduler.collect(running[:2], sender=third.account)
    chain.advance(7)
    scheduler.finish([grid.report(jobs["signed"], 5)], sender=third.account)
    grid.forward(alice, "cancel", [jobs["stopped"]])
    scheduler.panic([jobs["until spent"]], "node lost", sender=third.account)
    jobs["carried on"] = scheduler.jobCount()
    jobs["paid on"] = grid.submit(flags=interim)
    jobs["expired"] = grid.submit(bob)
    grid.assign(third, jobs["paid on"])
    scheduler.claimAndStart([jobs["paid on"]], sender=third.account)
    chain.advance(grids.TIMES["collectInterval"])
    scheduler.collect([jobs["paid on"]], sender=third.account)
    chain.advance(grids.TIMES["pendingExpiry"] - grids.TIMES["collectInterval"])
    scheduler.cancel([jobs["expired"]], sender=grid.stranger)
    return jobs
