"""How a row changes with each step of a run; pure, so that the planner's model uses the same."""

from __future__ import annotations

from dataclasses import replace

from deepsquare_chain.executors.base import Exit
from deepsquare_chain.provider.model import Phase, Run, Submit


def starting(run: Run) -> Run:
    """The intent to start on chain: proof that no earlier life of this database ran the job."""
    return replace(run, phase=Phase.STARTING) if run.phase is Phase.WATCHED else run


def submitting(run: Run, action: Submit) -> Run:
    """The intent, written before the executor is asked."""
    return replace(run, phase=Phase.SUBMITTING, allotment=action.allotment, lead=action.lead)


def submitted(run: Run, handle: str) -> Run:
    """The executor has the run."""
    return replace(run, phase=Phase.SUBMITTED, handle=handle)


def refused(run: Run, reason: str) -> Run:
    """The executor can never run it."""
    return replace(run, phase=Phase.REFUSED, note=reason)


def extended(run: Run, allotment: int) -> Run:
    """The run knows of its new allotment, in seconds."""
    return replace(run, allotment=allotment)


def ended(run: Run, exit: Exit, result: bytes) -> Run:  # noqa: A002 - the executor's word
    """The run is over; `result` is the SHA-256 of the output that was kept."""
    return replace(run, phase=Phase.ENDED, exit=exit, result=result)


def released(run: Run, key: str) -> Run:
    """The run of an earlier assignment is over; a later one has another key."""
    return Run(job_id=run.job_id, key=key, attempt=run.attempt + 1)


def closed(run: Run) -> Run:
    """Nothing is left to do; what is known of the run is kept."""
    return replace(run, phase=Phase.CLOSED)


def reopened(run: Run) -> Run:
    """A block that ended the job was replaced: back to what the row still knows."""
    if run.phase is not Phase.CLOSED:
        return run
    if run.exit is not None:
        return replace(run, phase=Phase.ENDED)
    return replace(run, phase=Phase.SUBMITTED if run.handle else Phase.WATCHED)
