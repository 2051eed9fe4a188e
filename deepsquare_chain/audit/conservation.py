"""Verifies a ledger: against the contracts' storage, and by the sums that must agree. Pure.

The comparison with storage also proves that the events are complete. Each conservation check has
two sides, computed in different ways, and lists the node requests that reproduce its numbers, so
that they can be verified without this program.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Final

from deepsquare_chain.audit.entries import ZERO_ADDRESS, AuditFinding, JobEntry, Totals
from deepsquare_chain.audit.ledger import Ledger, Statement
from deepsquare_chain.chain.bindings.abi import interface
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import Transfer, event_topics, topic_of
from deepsquare_chain.job import Job, Load, Provider


@dataclass(frozen=True, slots=True)
class Storage:
    """The contracts' storage at one block, as fetched by `reader.read_storage`.

    `loads` are the loads of providers by account.
    """

    block: int
    jobs: Sequence[Job]
    providers: Sequence[Provider]
    balances: Mapping[str, int]
    parked: Mapping[str, int]
    supply: int
    loads: Mapping[str, Load]


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of verifying a ledger. `compared` tells whether storage was compared."""

    block: int
    totals: Totals
    findings: tuple[AuditFinding, ...]
    compared: bool

    @property
    def difference(self) -> int:
        """Credit-wei that the scheduler holds without an owner; must be zero."""
        return self.totals.difference

    @property
    def ok(self) -> bool:
        """Whether there are no findings and no difference."""
        return not self.findings and self.difference == 0


def verify(ledger: Ledger, storage: Storage | None = None) -> Audit:
    """Verify a ledger, and compare it with the contracts' storage if that is given."""
    findings = list(ledger.findings)
    if storage is not None:
        findings += compare(ledger, storage)
    return Audit(ledger.block, ledger.totals, tuple(findings), storage is not None)


def compare(ledger: Ledger, storage: Storage) -> list[AuditFinding]:
    """Return a finding for each difference between ledger and storage, both at the same block."""
    findings: list[AuditFinding] = []

    def compare_values(subject: str, from_events: object, stored: object, job_id: int = 0) -> None:
        if from_events != stored:
            message = f"{subject}: events say {from_events}, storage says {stored}"
            findings.append(AuditFinding("storage", message, storage.block, job_id=job_id))

    def compare_fields(subject: str, from_events: Any, stored: Any, job_id: int = 0) -> None:
        for field in fields(stored):
            values = getattr(from_events, field.name), getattr(stored, field.name)
            compare_values(f"{field.name} of {subject}", *values, job_id)

    ids = ledger.provider_ids
    compare_values("number of jobs", len(ledger.jobs), len(storage.jobs))
    for job in storage.jobs:
        if (entry := ledger.jobs.get(job.id)) is not None:
            compare_fields(f"job {job.id}", entry.record(ids), job, job.id)
    compare_values("number of providers", len(ids), len(storage.providers))
    for provider in storage.providers:
        if (provider_entry := ledger.providers.get(provider.account)) is not None:
            compare_fields(f"provider {provider.account}", provider_entry.record(), provider)
    for account, amount in sorted(storage.balances.items()):
        compare_values(f"balance of {account}", ledger.balances.get(account, 0), amount)
    for account, amount in sorted(storage.parked.items()):
        compare_values(f"parked credits of {account}", ledger.parked.get(account, 0), amount)
    for account, load in sorted(storage.loads.items()):
        if (provider_entry := ledger.providers.get(account)) is not None:
            compare_fields(f"the load of {account}", provider_entry.load, load)
    compare_values("supply of credits", ledger.totals.supply, storage.supply)
    return findings


# -- conservation: whether the totals of a grid agree, and how to reproduce each

#: Jobs per `getJobs` call: far below any node's gas limit for a call.
_JOBS_PER_CALL: Final = 100


@dataclass(frozen=True, slots=True)
class NodeRequest:
    """A node request that reproduces a number.

    `description` is for people, `method` and `params` are the JSON-RPC request, and `cast` is the
    same request as a command of Foundry's `cast`.
    """

    description: str
    method: str
    params: tuple[Any, ...]
    cast: str

    @property
    def body(self) -> str:
        """The JSON-RPC request body, for `curl --data`."""
        request = {"jsonrpc": "2.0", "id": 1, "method": self.method, "params": list(self.params)}
        return json.dumps(request)


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a check: named terms in credit-wei."""

    title: str
    terms: tuple[tuple[str, int], ...]

    @property
    def amount(self) -> int:
        """Sum of the terms, in credit-wei."""
        return sum(amount for _, amount in self.terms)


@dataclass(frozen=True, slots=True)
class ConservationCheck:
    """Two sides that must be equal, and how to reproduce them. `job_id` is zero if none applies."""

    name: str
    left: Side
    right: Side
    requests: tuple[NodeRequest, ...]
    job_id: int = 0

    @property
    def difference(self) -> int:
        """Left minus right, in credit-wei; must be zero."""
        return self.left.amount - self.right.amount

    @property
    def ok(self) -> bool:
        """Whether both sides are equal."""
        return self.difference == 0


def call(
    deployment: Deployment, contract: str, block: int, function: str, *arguments: Any
) -> NodeRequest:
    """Return the request for a view function at a block.

    `contract` is a name of `Deployment.contracts`.

    Raises:
        UsageError: An argument does not fit its type.
    """
    address = deployment.contracts[contract]
    data = "0x" + interface(contract).function(function).encode(*arguments).hex()
    arguments_text = ", ".join(_argument_text(argument) for argument in arguments)
    return NodeRequest(
        f"{contract}.{function}({arguments_text}) at block {block}",
        "eth_call",
        ({"to": address, "data": data}, hex(block)),
        f"cast call {address} --data {data} --block {block}",
    )


def _argument_text(argument: Any) -> str:
    return f"[{', '.join(map(str, argument))}]" if isinstance(argument, list) else str(argument)


def transfers(
    deployment: Deployment, block: int, *, sender: str = "", recipient: str = ""
) -> NodeRequest:
    """Return the request for credit transfers up to a block, filtered by sender or recipient."""
    accounts = (("from", sender), ("to", recipient))
    topics = [topic_of(account) if account else None for _, account in accounts]
    topics.insert(0, event_topics(Transfer)[0])
    while topics[-1] is None:
        topics.pop()
    filters = "".join(f" {word} {account}" for word, account in accounts if account)
    topics_text = " ".join("null" if topic is None else topic for topic in topics)
    return NodeRequest(
        f"Transfer events of the credit{filters}, blocks {deployment.block} to {block}",
        "eth_getLogs",
        (_log_query(deployment, deployment.credit, block, topics),),
        f"cast logs --address {deployment.credit} --from-block {deployment.block} "
        f"--to-block {block} {topics_text}",
    )


def _log_query(
    deployment: Deployment, address: str, block: int, topics: list[str | None]
) -> dict[str, Any]:
    blocks = {"fromBlock": hex(deployment.block), "toBlock": hex(block)}
    return {**blocks, "address": address, "topics": topics}


def conservation(
    totals: Totals,
    deployment: Deployment,
    block: int,
    *,
    supply: int | None = None,
    scheduler_balance: int | None = None,
    live: Sequence[int] = (),
    parked: Iterable[str] = (),
) -> list[ConservationCheck]:
    """Return the conservation checks of the whole grid, given the totals of events up to a block.

    Args:
        totals: Totals of the events up to the block.
        deployment: Addresses of the contracts.
        block: Block of the totals and of the results of the node.
        supply: Result of `totalSupply` in credit-wei; None if it was not read.
        scheduler_balance: Result of `balanceOf` the MetaScheduler; None if it was not read.
        live: IDs of live jobs, for the requests that reproduce the sum of escrows.
        parked: Accounts with parked credits, for the same purpose.
    """
    scheduler = deployment.scheduler
    mints = transfers(deployment, block, sender=ZERO_ADDRESS)
    burns = transfers(deployment, block, recipient=ZERO_ADDRESS)
    incoming = transfers(deployment, block, recipient=scheduler)
    outgoing = transfers(deployment, block, sender=scheduler)
    scheduler_call = partial(call, deployment, "MetaScheduler", block)
    starts = range(0, len(live), _JOBS_PER_CALL)
    records = [
        *(
            scheduler_call("getJobs", list(live[start : start + _JOBS_PER_CALL]))
            for start in starts
        ),
        *(scheduler_call("parkedOf", account) for account in parked),
    ]
    created = Side("mints - burns", (("minted", totals.minted), ("burned", -totals.burned)))
    owned = Side("sum of balances", (("balances", totals.balances),))
    owed = Side("escrows + withdrawable", owed_terms(totals.escrow, totals.parked, totals.donated))
    balance = Side("transfers to - transfers from", (("balance", totals.scheduler_balance),))
    requests = (mints, burns, transfers(deployment, block))
    checks = [
        ConservationCheck("supply = mints - burns = sum of balances", created, owned, requests),
        ConservationCheck(
            "scheduler's balance = live escrows + withdrawable",
            balance,
            owed,
            (incoming, outgoing, *records),
        ),
    ]
    if supply is not None:
        requests = (mints, burns, call(deployment, "Credit", block, "totalSupply"))
        reported = Side("totalSupply()", (("supply", supply),))
        checks.append(ConservationCheck("supply on chain", created, reported, requests))
    if scheduler_balance is not None:
        request = call(deployment, "Credit", block, "balanceOf", scheduler)
        reported = Side("balanceOf(MetaScheduler)", (("balance", scheduler_balance),))
        checks.append(
            ConservationCheck("scheduler's balance on chain", owed, reported, (*records, request))
        )
    return checks


def owed_terms(escrow: int, parked: int, donated: int) -> tuple[tuple[str, int], ...]:
    """Return what the MetaScheduler must hold, by reason, in credit-wei."""
    terms = (("escrow of live jobs", escrow), ("withdrawable", parked))
    return (*terms, ("sent to it by mistake", donated)) if donated else terms


def job_conservation(job: JobEntry, deployment: Deployment, block: int) -> ConservationCheck:
    """Return the check that a job's inflow equals escrow plus outflow (protocol invariant 2)."""
    inflow = Side("funded + carried in", (("funded", job.funded), ("carried in", job.carried_in)))
    if job.status.is_final:
        names = ("paid", "fee", "refunded", "carried_out")
        terms = tuple((name.replace("_", " "), getattr(job, name)) for name in names)
        outflow = Side("paid + fee + refunded + carried out", (*terms, ("escrow", job.escrow)))
        name = "once final: funded + carried in = paid + fee + refunded + carried out"
    else:
        outflow_terms = (("escrow", job.escrow), ("paid", job.paid), ("fee", job.fee))
        outflow = Side("escrow + paid + fee", outflow_terms)
        name = "while live: funded + carried in = escrow + paid + fee"
    record = call(deployment, "MetaScheduler", block, "getJob", job.id)
    requests = (record, job_logs(deployment, block, job.id))
    return ConservationCheck(name, inflow, outflow, requests, job.id)


def closing_check(ledger: Ledger, statement: Statement, balance: int) -> ConservationCheck:
    """Return the check of the closing balance against `balance`, its `balanceOf` in credit-wei."""
    terms = (("opening", statement.opening), ("credits", statement.credits))
    computed = Side("opening + credits - debits", (*terms, ("debits", -statement.debits)))
    reported = Side("balanceOf", (("balance", balance),))
    request = call(ledger.deployment, "Credit", statement.last, "balanceOf", statement.account)
    return ConservationCheck("closing balance", computed, reported, (request,))


def job_logs(deployment: Deployment, block: int, job_id: int) -> NodeRequest:
    """Return the request for the MetaScheduler's events of a job, whose first topic is its ID."""
    query = _log_query(deployment, deployment.scheduler, block, [None, f"0x{job_id:064x}"])
    return NodeRequest(
        f"events of job {job_id}, blocks {deployment.block} to {block}",
        "eth_getLogs",
        (query,),
        # `cast logs` requires the event as first topic; it can't filter by the second one only.
        f"cast rpc eth_getLogs '{json.dumps(query)}'",
    )
