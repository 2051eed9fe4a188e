"""What the chain's events tell about jobs: names, ends, successors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.event_types import (
    Event,
    JobCollected,
    JobPanicked,
    JobResult,
    JobRetried,
    JobSettled,
    JobSubmitted,
    JobToppedUp,
    JobTransition,
)
from deepsquare_chain.chain.bindings.events import decode_logs, event_topics
from deepsquare_chain.chain.rpc.log_reader import read_logs
from deepsquare_chain.job import Objective

_KINDS = (
    *(JobSubmitted, JobToppedUp, JobCollected, JobSettled, JobRetried),
    *(JobResult, JobPanicked, JobTransition),
)


@dataclass(slots=True)
class History:
    """A job as its events tell it; amounts are credit-wei.

    `funded` was paid in for this job, `carried_in` came from its predecessor. `paid`, `fee` and
    `billed_seconds` count interim payments as well, `collected` those alone (with their fees).
    `billed_seconds` is None until something is billed, `exit_code` until its provider reported.
    """

    job_id: int
    name: str = ""
    uses: str = ""
    objective: Objective = Objective.COST
    funded: int = 0
    carried_in: int = 0
    paid: int = 0
    fee: int = 0
    refunded: int = 0
    collected: int = 0
    billed_seconds: int | None = None
    exit_code: int | None = None
    reason: str = ""
    successor: int | None = None
    retry_of: int | None = None
    provider: str = ""
    events: list[Event] = field(default_factory=list)


async def histories(contracts: Contracts, job_ids: Sequence[int]) -> dict[int, History]:
    """Histories of jobs. A successor shares name and uses with the first of its line.

    Raises:
        EndpointError: The node did not answer.
    """
    found: dict[int, History] = {}
    wanted = set(job_ids)
    while wanted:
        for number in wanted:
            found[number] = History(number)
        replay(found, await _events(contracts, sorted(wanted)))
        older = {each.retry_of for each in found.values() if each.retry_of is not None}
        wanted = older - set(found)
    inherit(found)
    return {number: found[number] for number in job_ids}


async def reported_digest(contracts: Contracts, job_id: int) -> str:
    """SHA-256 (hexadecimal) of the output that a job's provider reported, empty if none did."""
    history = (await histories(contracts, [job_id]))[job_id]
    results = [event for event in history.events if isinstance(event, JobResult)]
    return results[-1].result.hex() if results and any(results[-1].result) else ""


def replay(found: dict[int, History], events: Iterable[Event]) -> None:
    """Let events happen to the histories; jobs that are not among them are passed over."""
    for event in events:
        job_id = getattr(event, "job_id", None)
        if job_id in found:
            found[job_id].events.append(event)
            _apply(found[job_id], event)
        if isinstance(event, JobRetried) and event.successor in found:
            successor = found[event.successor]
            successor.carried_in, successor.retry_of = event.escrow, event.job_id


def _apply(history: History, event: Event) -> None:
    match event:
        case JobSubmitted():
            history.name, history.uses = event.terms.name, event.terms.uses
            history.objective = event.terms.objective
            history.funded += event.terms.amount
        case JobToppedUp():
            history.funded += event.amount
        case JobCollected() | JobSettled():
            history.paid += event.paid
            history.fee += event.fee
            history.billed_seconds = (history.billed_seconds or 0) + event.billed_seconds
            if isinstance(event, JobSettled):
                history.refunded = event.refunded
            else:
                history.collected += event.paid + event.fee
        case JobRetried():
            history.successor = event.successor
        case JobResult():
            history.exit_code, history.reason = event.exit_code, event.reason
        case JobPanicked():
            history.reason = event.reason
        case JobTransition():
            if event.after.is_assigned:
                history.provider = event.provider
        case _:
            pass


def inherit(found: dict[int, History]) -> None:
    """Give every successor what only the first of its line was submitted with."""
    for number in sorted(found):
        history = found[number]
        older = found.get(history.retry_of) if history.retry_of is not None else None
        if older is not None:
            history.name, history.uses, history.objective = older.name, older.uses, older.objective


async def _events(contracts: Contracts, job_ids: list[int]) -> list[Event]:
    """Events of these jobs, and of their predecessors as far as those name them."""
    kinds = event_topics(*_KINDS)
    numbers = [f"0x{number:064x}" for number in job_ids]
    address = contracts.scheduler.address
    start = contracts.deployment.block
    own = await read_logs(contracts.w3, [address], [kinds, numbers], start)
    # A carry is in the predecessor's event, whose second topic is the successor.
    carried = await read_logs(
        contracts.w3, [address], [event_topics(JobRetried), None, numbers], start
    )
    # Where predecessor and successor are both asked for, the same event comes twice.
    return list({event.place: event for event in decode_logs([*own, *carried])}.values())
