"""Do the sums of a grid agree, and how does one count each of them by hand? Pure.

Each check has two sides, counted in different ways. Beside every number stand the requests to a
node that give it again, so that nobody has to believe this program.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from deepsquare_chain.audit.entries import ZERO_ADDRESS, JobEntry, Totals
from deepsquare_chain.chain.bindings.abi import interface
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.event_types import Transfer
from deepsquare_chain.chain.bindings.events import event_topics, topic_of

#: Records in one `getJobs` by hand: far below any node's limit of gas for a call.
_JOBS_A_CALL: Final = 100


@dataclass(frozen=True, slots=True)
class Repeat:
    """A request to a node that gives a number again.

    `shown` says it in words, `method` and `params` are JSON-RPC; `cast` is the same as a command
    of foundry's `cast`.
    """

    shown: str
    method: str
    params: tuple[Any, ...]
    cast: str

    @property
    def body(self) -> str:
        """The JSON-RPC request, as `curl --data` takes it."""
        request = {"jsonrpc": "2.0", "id": 1, "method": self.method, "params": list(self.params)}
        return json.dumps(request)


@dataclass(frozen=True, slots=True)
class Side:
    """One way to count a sum: its terms in credit-wei, by name."""

    title: str
    terms: tuple[tuple[str, int], ...]

    @property
    def amount(self) -> int:
        """The sum, in credit-wei."""
        return sum(amount for _, amount in self.terms)


@dataclass(frozen=True, slots=True)
class ConservationCheck:
    """Two sides that must be equal, and how to count them by hand; zero is no job."""

    name: str
    left: Side
    right: Side
    how_to_repeat: tuple[Repeat, ...]
    job_id: int = 0

    @property
    def difference(self) -> int:
        """Left minus right, in credit-wei: zero, or the books do not add up."""
        return self.left.amount - self.right.amount

    @property
    def ok(self) -> bool:
        """Whether both sides are equal."""
        return self.difference == 0


def call(
    deployment: Deployment, contract: str, block: int, function: str, *arguments: Any
) -> Repeat:
    """A view of a contract (Credit, ProviderRegistry, MetaScheduler) at a block.

    Raises:
        UsageError: An argument does not fit its type.
    """
    address = dict(zip(_NAMES, deployment.addresses, strict=True))[contract]
    data = "0x" + interface(contract).function(function).encode(*arguments).hex()
    words = ", ".join(_word(each) for each in arguments)
    return Repeat(
        f"{contract}.{function}({words}) at block {block}",
        "eth_call",
        ({"to": address, "data": data}, hex(block)),
        f"cast call {address} --data {data} --block {block}",
    )


_NAMES: Final = ("Credit", "ProviderRegistry", "MetaScheduler")


def _word(argument: Any) -> str:
    return f"[{', '.join(map(str, argument))}]" if isinstance(argument, list) else str(argument)


def transfers(
    deployment: Deployment, block: int, *, sender: str = "", recipient: str = ""
) -> Repeat:
    """All transfers of the credit up to a block, of one sender or recipient where given."""
    topics: list[str | None] = [event_topics(Transfer)[0], _topic(sender), _topic(recipient)]
    while topics[-1] is None:
        topics.pop()
    query = {
        "fromBlock": hex(deployment.block),
        "toBlock": hex(block),
        "address": deployment.credit,
        "topics": topics,
    }
    names = (("from", sender), ("to", recipient))
    whose = "".join(f" {word} {who}" for word, who in names if who)
    shown = " ".join("null" if each is None else each for each in topics)
    return Repeat(
        f"Transfer events of the credit{whose}, blocks {deployment.block} to {block}",
        "eth_getLogs",
        (query,),
        f"cast logs --address {deployment.credit} --from-block {deployment.block} "
        f"--to-block {block} {shown}",
    )


def _topic(account: str) -> str | None:
    return topic_of(account) if account else None


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
    """The sums of the whole grid at a block.

    Args:
        totals: Of the events up to the block.
        deployment: Where the contracts are.
        block: Of totals and of the node's answers.
        supply: What `totalSupply` answers there, credit-wei; None if nobody asked.
        scheduler_balance: What `balanceOf` the MetaScheduler answers there; None likewise.
        live: Ids of live jobs, to repeat the sum of escrows by hand.
        parked: Accounts with parked credits, likewise.
    """
    mints = transfers(deployment, block, sender=ZERO_ADDRESS)
    burns = transfers(deployment, block, recipient=ZERO_ADDRESS)
    everything = transfers(deployment, block)
    ours = deployment.scheduler
    into = transfers(deployment, block, recipient=ours)
    out_of = transfers(deployment, block, sender=ours)
    created = Side("mints - burns", (("minted", totals.minted), ("burned", -totals.burned)))
    owed = _owed(totals)
    held = Side("transfers to - transfers from", (("balance", totals.scheduler_balance),))
    slices = [list(live[at : at + _JOBS_A_CALL]) for at in range(0, len(live), _JOBS_A_CALL)]
    records = [call(deployment, "MetaScheduler", block, "getJobs", each) for each in slices]
    records += [call(deployment, "MetaScheduler", block, "parkedOf", each) for each in parked]
    found = [
        ConservationCheck(
            "supply = mints - burns = sum of balances",
            created,
            Side("sum of balances", (("balances", totals.balances),)),
            (mints, burns, everything),
        ),
        ConservationCheck(
            "scheduler's balance = live escrows + withdrawable",
            held,
            owed,
            (into, out_of, *records),
        ),
    ]
    if supply is not None:
        asked = call(deployment, "Credit", block, "totalSupply")
        reported = Side("totalSupply()", (("supply", supply),))
        found.append(ConservationCheck("supply on chain", created, reported, (mints, burns, asked)))
    if scheduler_balance is not None:
        asked = call(deployment, "Credit", block, "balanceOf", ours)
        reported = Side("balanceOf(MetaScheduler)", (("balance", scheduler_balance),))
        found.append(
            ConservationCheck("scheduler's balance on chain", owed, reported, (*records, asked))
        )
    return found


def _owed(totals: Totals) -> Side:
    terms = [("escrow of live jobs", totals.escrow), ("withdrawable", totals.parked)]
    if totals.donated:
        terms.append(("given to it by mistake", totals.donated))
    return Side("escrows + withdrawable", tuple(terms))


def job_conservation(job: JobEntry, deployment: Deployment, block: int) -> ConservationCheck:
    """What came into a job is what it holds and what left it (invariant 2 of the protocol)."""
    came = Side("funded + carried in", (("funded", job.funded), ("carried in", job.carried_in)))
    if job.status.is_final:
        names = ("paid", "fee", "refunded", "carried_out")
        terms = tuple((name.replace("_", " "), getattr(job, name)) for name in names)
        went = Side("paid + fee + refunded + carried out", (*terms, ("escrow", job.escrow)))
        name = "once final: funded + carried in = paid + fee + refunded + carried out"
    else:
        held = (("escrow", job.escrow), ("paid", job.paid), ("fee", job.fee))
        went = Side("escrow + paid + fee", held)
        name = "while live: funded + carried in = escrow + paid + fee"
    record = call(deployment, "MetaScheduler", block, "getJob", job.id)
    return ConservationCheck(
        name, came, went, (record, job_logs(deployment, block, job.id)), job.id
    )


def job_logs(deployment: Deployment, block: int, job_id: int) -> Repeat:
    """All events of the MetaScheduler about a job: its id is their first indexed field."""
    topic = f"0x{job_id:064x}"
    query = {
        "fromBlock": hex(deployment.block),
        "toBlock": hex(block),
        "address": deployment.scheduler,
        "topics": [None, topic],
    }
    return Repeat(
        f"events of job {job_id}, blocks {deployment.block} to {block}",
        "eth_getLogs",
        (query,),
        # cast filters by the event first: without one it can't ask for a second topic alone.
        f"cast rpc eth_getLogs '{json.dumps(query)}'",
    )
