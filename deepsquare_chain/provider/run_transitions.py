"""Run transitions: how each step changes a run record; pure, so that the planner's
model in the tests uses the same functions.
"""

from __future__ import annotations

from dataclasses import replace

from deepsquare_chain.executors.base import Exit
from deepsquare_chain.provider.model import Phase, Run, Submit


def starting(run: Run) -> Run:
    """Record the intent to start on chain.

    A RUNNING job without it was started without this database, so that its record was lost.
    """
    return replace(run, phase=Phase.STARTING) if run.phase is Phase.WATCHED else run


def submitting(run: Run, action: Submit) -> Run:
    """Record the intent to submit, before the executor is called."""
    return replace(run, phase=Phase.SUBMITTING, allotment=action.allotment, lead=action.lead)


def submitted(run: Run, handle: str) -> Run:
    """Record that the executor has the run."""
    return replace(run, phase=Phase.SUBMITTED, handle=handle)


def refused(run: Run, reason: str) -> Run:
    """Record that the executor can never execute the run."""
    return replace(run, phase=Phase.REFUSED, note=reason)


def extended(run: Run, allotment: int) -> Run:
    """Record the new allotment that was sent to the run, in seconds."""
    return replace(run, allotment=allotment)


def ended(run: Run, exit: Exit, result: bytes) -> Run:  # noqa: A002 - the executor's term
    """Record the end of the run; `result` is the SHA-256 of the kept output."""
    return replace(run, phase=Phase.ENDED, exit=exit, result=result)


def released(run: Run, key: str) -> Run:
    """Return a new record for later assignments, with another key; the earlier run is over."""
    return Run(job_id=run.job_id, key=key, attempt=run.attempt + 1)


def closed(run: Run) -> Run:
    """Close the record; the data of the run is kept."""
    return replace(run, phase=Phase.CLOSED)


def reopened(run: Run) -> Run:
    """Reopen a record after a reorg removed the job's end; the phase follows from its fields."""
    if run.phase is not Phase.CLOSED:
        return run
    if run.exit is not None:
        return replace(run, phase=Phase.ENDED)
    return replace(run, phase=Phase.SUBMITTED if run.handle else Phase.WATCHED)
