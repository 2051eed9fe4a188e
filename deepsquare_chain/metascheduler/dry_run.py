"""A meta-scheduler without a wallet, which only reads: for explanations and forecasts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, Self

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.rpc.batching import merged
from deepsquare_chain.job import Terms
from deepsquare_chain.metascheduler.forecast import Prospect, StartAccuracy, prospect, prospect_of
from deepsquare_chain.metascheduler.past_starts import PastStarts
from deepsquare_chain.metascheduler.policy import Rules
from deepsquare_chain.metascheduler.service import SchedulerService, SchedulerSettings
from deepsquare_chain.store.database import Store

_NO_ACCOUNT: Final = "0x" + "00" * 20
_MAX_READS: Final = 3


class DryRunScheduler:
    """A meta-scheduler without a wallet; keeps its state in memory between reads."""

    def __init__(self, contracts: Contracts, rules: Rules | None = None) -> None:
        deployment = contracts.deployment
        self._w3 = contracts.w3
        self._store = Store.open(
            None, chain_id=deployment.chain_id, contract=deployment.scheduler, account=_NO_ACCOUNT
        )
        self._settings = SchedulerSettings(
            state_dir=Path(), confirmations=0, rules=rules or Rules()
        )
        self._service = SchedulerService(contracts, None, self._store, settings=self._settings)
        self._past_starts = self._service.state.past_starts = PastStarts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    async def read(self) -> SchedulerService:
        """Read the current state of the grid, and return the scheduler service.

        Raises:
            EndpointError: The node does not answer.
        """
        self._forget()
        for _ in range(_MAX_READS):
            await self._service.cycle()
            if self._service.cluster is not None:
                break
            await asyncio.sleep(self._settings.poll_interval)
        return self._service

    @property
    def start_accuracy(self) -> StartAccuracy | None:
        """The accuracy of forecasts of the starts that were judged; None without one."""
        return self._past_starts.accuracy

    async def judge_starts(self) -> None:
        """Compare the latest starts with forecasts, for `Prospect.starts`; after `read`.

        Reads the headers of at most two blocks for each start that was not judged before.

        Raises:
            EndpointError: The node does not answer.
        """
        cluster, past_starts = self._service.cluster, self._past_starts
        if cluster is None:
            return
        blocks = past_starts.undated()
        with merged(self._w3):
            headers = await asyncio.gather(*(self._w3.eth.get_block(n) for n in blocks))
        past_starts.date(
            {n: int(header["timestamp"]) for n, header in zip(blocks, headers, strict=True)}
        )
        history = self._service.state.history()
        await asyncio.to_thread(past_starts.judge, cluster.views, self._service.rules, history)

    async def prospect(self, terms: Terms) -> Prospect | None:
        """Forecast a job that is submitted now: its place and start; None if the grid can't be read.

        Raises:
            EndpointError: The node does not answer.
        """
        service = await self.read()
        cluster = service.cluster
        if cluster is None:
            return None
        await self.judge_starts()
        history = service.state.history()
        return prospect(cluster.snapshot, service.rules, history, terms, starts=self.start_accuracy)

    async def prospect_of(self, job_id: int) -> Prospect | None:
        """Forecast a PENDING job; None if it is not in the queue, or the grid can't be read.

        Raises:
            EndpointError: The node does not answer.
        """
        await self.read()
        await self.judge_starts()
        return self.known_prospect(job_id)

    def known_prospect(self, job_id: int) -> Prospect | None:
        """Forecast a PENDING job from what was read; None if it is not in the queue."""
        service = self._service
        if service.cluster is None:
            return None
        snapshot, history = service.cluster.snapshot, service.state.history()
        if all(waiting.job.id != job_id for waiting in snapshot.waiting):
            return None
        return prospect_of(snapshot, service.rules, history, job_id, starts=self.start_accuracy)

    def _forget(self) -> None:
        """Discard the cluster of an earlier read, so that it is not mistaken for the current one."""
        self._service.cluster = None
