"""The generated history of benchmarks is valid."""

from __future__ import annotations

from collections import Counter

import pytest

from deepsquare_chain.audit.conservation import verify
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.errors import UsageError
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.job import JobStatus
from tests.support.history import DEPLOYMENT, GeneratedBlock, History
from tests.support.index import Indexed, dump


def ledger_of(blocks: list[GeneratedBlock]) -> Ledger:
    """Its ledgers."""
    events = [event for block in blocks for event in block.events]
    return Ledger.replay(
        events, DEPLOYMENT, {block.header.number: block.header.time for block in blocks}
    )


def test_the_audit_finds_nothing_wrong_in_it() -> None:
    blocks = list(History(300, seed=3).blocks())
    ledger = ledger_of(blocks)
    assert verify(ledger).ok
    final_statuses = Counter(job.status for job in ledger.jobs.values())
    assert set(final_statuses) == {status for status in JobStatus if status.is_final}
    assert any(job.successor for job in ledger.jobs.values())
    assert any(job.time_limit > job.terms.time_limit for job in ledger.jobs.values())
    assert any(job.collected_seconds > 0 for job in ledger.jobs.values())


def test_series_add_up() -> None:
    blocks = list(History(200, providers=3, customers=5, seed=5).blocks())
    times = {block.header.number: block.header.time for block in blocks}
    indexed = Indexed(DEPLOYMENT, [event for block in blocks for event in block.events], times)
    indexed.read_all(11)
    ledger = ledger_of(blocks)
    check_series(indexed.index, ledger)
    finished = {
        job.id: (job.provider, job.billed_seconds)
        for job in ledger.jobs.values()
        if job.status is JobStatus.FINISHED
    }
    runs = indexed.index.measured_runs()
    assert sorted((run.provider, run.seconds) for run in runs) == sorted(finished.values())
    assert len({run.kind for run in runs}) > 1
    halfway = blocks[len(blocks) // 2].header.number
    indexed.roll_back(halfway)
    part = Indexed(DEPLOYMENT, indexed.events, times)
    part.read(0, halfway)
    assert dump(indexed.database) == dump(part.database)
    indexed.close()
    part.close()


def check_series(index: Index, ledger: Ledger) -> None:
    """Counts, sums and use over time match the jobs."""
    overview = index.overview()
    for series in (index.jobs_by_status_over_time, index.utilisation):
        for count in (0, 501):
            with pytest.raises(UsageError, match=f"1 to 500 points, not {count}"):
                series(count)
    assert len(index.jobs_by_status_over_time(500)) == 500
    points = index.jobs_by_status_over_time(13)
    assert points[-1].jobs == overview.jobs
    for point in points:
        expected = Counter(
            status
            for job in ledger.jobs.values()
            for status in [[s for t, s, _ in job.transitions if t <= point.time][-1:]]
            for status in status
        )
        assert {job_status: count for job_status, count in point.jobs.items() if count} == expected
    escrow = index.escrow_over_time(7)
    assert (escrow[-1].paid, escrow[-1].fees) == (ledger.totals.paid, ledger.totals.fees)
    assert escrow[-1].escrow == 0 < max(point.escrow for point in escrow)
    for utilisation in index.utilisation(9):
        provider_jobs = [job for job in ledger.jobs.values() if job.provider == utilisation.account]
        seconds = sum(
            (job.ended_at - job.started_at) * job.terms.resources.cpus
            for job in provider_jobs
            if job.started_at
        )
        assert sum(point.cpu_seconds for point in utilisation.points) == seconds > 0
        assert index.provider(utilisation.account).row.figures.cpu_seconds == seconds
        # A range that is read in other steps has the same content.
        assert sum(
            p.cpu_seconds for p in index.utilisation(2, account=utilisation.account)[0].points
        ) == (seconds)
        assert all(0 <= point.share <= 1 for point in utilisation.points)
