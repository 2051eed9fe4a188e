"""Submitting: everything is checked before anything is paid."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.event_types import JobSubmitted
from deepsquare_chain.chain.rpc.connection import chain_time
from deepsquare_chain.chain.rpc.on_demand import mines_on_demand, next_block_time
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.transactions.sender import Sender, TxReceipt
from deepsquare_chain.client.gasless import GaslessWallet, PermitPlan, RelayedSender
from deepsquare_chain.client.gateways import definitions_of
from deepsquare_chain.client.history import histories
from deepsquare_chain.client.job_list import select
from deepsquare_chain.client.network import WalletConnection
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import InsufficientFundsError, RevertedError, StoreError, UsageError
from deepsquare_chain.job import Conditions, Dependency, JobFlags, Terms
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.definitions import DefinitionStore
from deepsquare_chain.store.requests import RequestTables
from deepsquare_chain.workflow import Definition, digest
from deepsquare_chain.workflow.checks import MAX_USES_BYTES

#: Most jobs of one submission: what a block of 30 million gas holds with a margin.
MAX_JOBS: Final = 250
# Gas by which a wallet is judged before it pays: above what the gas report measures.
_GAS_CALL: Final = 120_000
_GAS_JOB: Final = 90_000
_GAS_APPROVE: Final = 60_000
_PERMIT_SECONDS: Final = 900
#: How many receipts' worth of time a submission waits for others of its wallet.
_TURN_TIMEOUTS: Final = 10
#: Seconds in which submissions count as made at the same time.
_GATHER_SECONDS: Final = 0.02
#: Tries, and the seconds between them, until every node knows of an approval that was mined.
_ALLOWED: Final = (12, 0.25)
#: How often an allowance is given that another folder or machine may use up or replace.
_ALLOWANCES: Final = 8
#: Characters of a submission's key.
MAX_KEY: Final = 120
_PREFIX: Final = "submit:"
_RANGE: Final = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?::([1-9][0-9]{0,8}))?)?")


@dataclass(frozen=True, slots=True)
class Request:
    """Jobs of the same terms, one for each definition (canonical bytes)."""

    terms: Terms
    definitions: tuple[bytes, ...]

    @property
    def total(self) -> int:
        """Credit-wei that its jobs take."""
        return self.terms.amount * len(self.definitions)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Indices of an array, and how many of its jobs may be at providers at once (0: any number)."""

    indices: tuple[int, ...]
    throttle: int = 0


def parse_array(text: str) -> ArraySpec:
    """An array as Slurm writes it: `1-20%4`, `0-9:3`, `1,3,7`; a single number N is short for `1-N`.

    Raises:
        UsageError: It is none, or has more than `MAX_JOBS` indices.
    """
    body, _, limit = text.strip().partition("%")
    indices: list[int] = []
    right = not limit or re.fullmatch(r"[1-9][0-9]{0,4}", limit) is not None
    right = right and ("%" not in text or bool(limit))
    for part in body.split(","):
        found = _RANGE.fullmatch(part.strip())
        right = right and found is not None
        if found is None:
            break
        first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
        if body.strip() == part.strip() and found[2] is None:
            first = 1
        right = right and last >= first
        indices += range(first, min(last, first + step * MAX_JOBS) + 1, step)
    if not right or not indices or len(set(indices)) != len(indices):
        raise UsageError(
            f"{text[:60]!r} is not an array of jobs",
            hint="Write 20, 1-20, 1-20%4 (4 at once), 0-9:3 or 1,3,7.",
        )
    if len(indices) > MAX_JOBS:
        raise UsageError(
            f"{len(indices)} jobs or more can't go into one submission: 1 to {MAX_JOBS} can",
            hint="Lower --array, and submit the rest in further submissions.",
        )
    return ArraySpec(tuple(indices), int(limit or 0))


def submission_id(customer: str, key: str | None) -> str:
    """A new id of a submission; with a key always the same one."""
    seed = secrets.token_bytes(16) if key is None else f"{customer}:{key}".encode()
    return f"sub-{hashlib.sha256(seed).hexdigest()[:8]}"


def request_of(
    definition: Definition,
    terms: Terms,
    *,
    array: ArraySpec | None = None,
    submission: str = "",
    after: Sequence[tuple[Dependency, int]] = (),
    wishes: Conditions | None = None,
) -> Request:
    """The jobs of a submission: one, or an array.

    Args:
        definition: What each of them runs.
        terms: Of each of them.
        array: Its indices, None for a single job.
        submission: Id of the submission, for an array.
        after: Jobs that they depend on.
        wishes: Further conditions, as the job file has them.

    Raises:
        UsageError: The dependencies do not fit on chain.
    """
    definitions: tuple[Definition, ...] = (definition,)
    conditions = replace(wishes or Conditions(), after=tuple(after))
    if array is not None:
        size = len(array.indices)
        definitions = tuple(definition.in_array(index, size) for index in array.indices)
        throttle = array.throttle if array.throttle < size else 0
        conditions = replace(conditions, array=submission, throttle=throttle)
    if uses := conditions.to_uses():
        # The contract knows nothing of conditions, so no provider may take the job by itself.
        flags = terms.flags | JobFlags.NO_SELF_SCHEDULING
        joined = ",".join(filter(None, [terms.uses, uses]))
        terms = replace(terms, uses=joined, flags=flags)
    if len(terms.uses.encode()) > MAX_USES_BYTES:
        raise UsageError(
            f"Requirements, preferences and dependencies take more than {MAX_USES_BYTES} bytes in all",
            hint="Depend on ranges (afterok:10-60), or on the last job of a chain.",
        )
    return Request(terms, tuple(each.to_bytes() for each in definitions))


async def submission_time(contracts: Contracts) -> int:
    """Return about the chain time of a submission that is made now.

    The latest block of a chain that mines on demand may be old, and the next one is not.
    """
    age = await mines_on_demand(contracts.w3)
    return await chain_time(contracts.w3) + (age or 0)


async def parse_depends(
    contracts: Contracts, words: Sequence[str], customer: Callable[[], str]
) -> list[tuple[Dependency, int]]:
    """Dependencies as Slurm writes them: `afterok:12:15-20,afterany:sub-1f3a9c04`; afterok by default.

    Raises:
        UsageError: The text is none, or a job has ended so that it can never hold.
        NotFoundError: A named job does not exist.
    """
    found: list[tuple[Dependency, int]] = []
    for part in ",".join(words).split(",") if words else ():
        kind, *names = part.strip().split(":")
        if kind not in set(Dependency):
            kind, names = Dependency.AFTER_OK, [kind, *names]
        if not all(names) or not names:
            raise UsageError(
                f"{part[:60]!r} is not a dependency",
                hint="Write afterok:12, afterany:12:15-20 or afternotok:NAME.",
            )
        ids = await select(contracts, names, customer)
        for job in await asyncio.gather(*map(contracts.scheduler.get_job, ids)):
            lost = job.status.is_final and not Dependency(kind).holds(job.status)
            if lost and (await histories(contracts, [job.id]))[job.id].successor is None:
                raise UsageError(
                    f"Job {job.id} ended {job.status.name}, so {kind}:{job.id} can never hold",
                    hint="Leave that dependency out, or `deepsquare job retry` that job first.",
                )
            found.append((Dependency(kind), job.id))
    return found


@dataclass(frozen=True, slots=True)
class Bill:
    """What a submission takes, and what its wallet has: credit-wei, and wei for gas."""

    customer: str
    jobs: int
    total: int
    balance: int
    allowance: int
    gas_wei: int
    gas_balance: int

    @property
    def approval(self) -> bool:
        """Whether the scheduler's allowance is too small."""
        return self.allowance < self.total

    def check(self) -> None:
        """Refuse what the wallet can't pay.

        Raises:
            InsufficientFundsError: Too few credits, or no gas.
        """
        if self.balance < self.total:
            raise InsufficientFundsError(
                f"{self.customer} has {format_credits(self.balance)} credits, the submission "
                f"takes {format_credits(self.total)}",
                hint="Lower --credits, or get some: `deepsquare credit faucet` on a devnet.",
            )
        if self.gas_balance < self.gas_wei:
            raise InsufficientFundsError(
                f"{self.customer} has {format_credits(self.gas_balance)} of the chain's own coin, "
                f"the gas of this may take {format_credits(self.gas_wei)}",
                hint="Send it some for gas; `deepsquare credit faucet` does on a devnet.",
            )


async def bill(
    contracts: Contracts, customer: str, requests: Sequence[Request], *, gasless: bool = False
) -> Bill:
    """Look at the wallet, the gas price and the deployment; nothing is sent.

    Args:
        contracts: The deployment.
        customer: Whose wallet pays.
        requests: What it submits.
        gasless: Whether a relay pays the gas.

    Raises:
        UsageError: The number of jobs is out of bounds.
        RevertedError: The deployment takes no new jobs.
    """
    jobs = sum(len(request.definitions) for request in requests)
    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError(
            f"{jobs} jobs can't go into one submission: 1 to {MAX_JOBS} can",
            hint="Lower --array, and submit the rest in further submissions.",
        )
    w3, credit, scheduler = contracts.w3, contracts.credit, contracts.scheduler
    address = checked_address(customer)
    is_open, balance, allowance, gas_price, gas_balance = await asyncio.gather(
        scheduler.submissions_open(),
        credit.balance_of(address),
        credit.allowance(address, scheduler.address),
        w3.eth.gas_price,
        w3.eth.get_balance(address),
    )
    if not is_open:
        raise RevertedError(
            "This deployment takes no new jobs",
            hint="Use the record of the deployment that follows it.",
        )
    total = sum(request.total for request in requests)
    gas = _GAS_CALL + _GAS_JOB * jobs + (_GAS_APPROVE if allowance < total else 0)
    gas_wei = 0 if gasless else gas * gas_price
    return Bill(address, jobs, total, balance, allowance, gas_wei, gas_balance)


@dataclass(frozen=True, slots=True)
class Submitted:
    """Ids of new jobs in the order asked for, and the receipts of what was sent for them."""

    job_ids: tuple[int, ...]
    receipts: tuple[TxReceipt, ...]


async def submit(
    contracts: Contracts,
    sender: Sender | RelayedSender,
    store: DefinitionStore,
    requests: Sequence[Request],
    *,
    permit: Signer | None = None,
    timeout: float = 60.0,
    key: str | None = None,
) -> Submitted:
    """Keep the definitions, allow exactly what is needed, and submit in one transaction.

    Args:
        contracts: The deployment.
        sender: Of the customer's wallet, or the one that sends through a relay.
        store: Where the definitions are kept; providers read them there.
        requests: What to submit.
        permit: The customer's account, to sign a permit instead of sending an approval; through
            a relay, an allowance that is too small always comes by permit.
        timeout: Seconds to wait for each transaction.
        key: The caller's own name of this submission, kept in the wallet's outbox: a second one
            of that name waits for the first and gives its jobs.

    Raises:
        InsufficientFundsError: Too few credits, or no gas; nothing was paid.
        UsageError: The key stands for another submission, or is no key.
        WaitTimeoutError: Others of this wallet are under way for long, and nothing was paid; or
            this one was sent and is in no block yet, as the message says.
        GridError: The store, the endpoint or a contract refused; nothing was paid.
    """
    found = await repeated(contracts, sender, requests, key, timeout)
    if found is not None:
        return found
    try:
        async with sender.spending(_TURN_TIMEOUTS * timeout):
            # Whoever had the lock may have been the same command.
            found = await repeated(contracts, sender, requests, key, timeout)
            return found or await _pay(
                contracts, sender, store, requests, permit=permit, timeout=timeout, key=key
            )
    except (StoreError, InsufficientFundsError, RevertedError):
        # The same command running at the same time may have been quicker with its key, credits or permit.
        found = await repeated(contracts, sender, requests, key, timeout)
        if found is None:
            raise
        return found


async def _pay(
    contracts: Contracts,
    sender: Sender | RelayedSender,
    store: DefinitionStore,
    requests: Sequence[Request],
    *,
    permit: Signer | None,
    timeout: float,
    key: str | None,
) -> Submitted:
    """See `submit`, for what was not submitted before."""
    due = await bill(contracts, sender.address, requests, gasless=not sender.pays_gas)
    due.check()
    rows = [
        (request.terms, [await store.put(data) for data in request.definitions])
        for request in requests
    ]
    scheduler = contracts.scheduler
    outbox_key = None if key is None else _PREFIX + key
    if isinstance(sender, RelayedSender):
        plan = None
        if due.approval:
            plan = PermitPlan(
                due.total, lambda signed: scheduler.submit_jobs_with_permit(rows, signed)
            )
        receipt = await sender.send(
            scheduler.submit_jobs(rows), timeout=timeout, key=outbox_key, permit=plan
        )
        return _born([receipt])
    credit = contracts.credit
    receipts: list[TxReceipt] = []
    call = scheduler.submit_jobs(rows)

    async def allow() -> None:
        nonlocal call
        if permit is None:
            approval = credit.approve(scheduler.address, due.total)
            receipts.append(await sender.send(approval, timeout=timeout))
            return
        deadline = await next_block_time(contracts.w3) + _PERMIT_SECONDS
        signed = await credit.sign_permit(permit, scheduler.address, due.total, deadline)
        call = scheduler.submit_jobs_with_permit(rows, signed)

    if due.approval:
        await allow()
    done = await allowed(lambda: sender.send(call, timeout=timeout, key=outbox_key), allow)
    return _born([*receipts, done])


async def allowed(
    pay: Callable[[], Awaitable[TxReceipt]], allow: Callable[[], Awaitable[object]]
) -> TxReceipt:
    """Pay with the allowance that is there, and give it again where it is gone.

    Behind one address may stand a node that has not seen the approval yet. Another folder or
    machine may spend from the same wallet, where nobody sees the other's lock.

    Args:
        pay: Sends what uses the allowance.
        allow: Gives the allowance again.

    Raises:
        ERC20InsufficientAllowance: It is gone each time; nothing was paid.
    """
    tries, pause = _ALLOWED
    for left in range(_ALLOWANCES * tries - 1, -1, -1):
        try:
            return await pay()
        except reverts.ERC20InsufficientAllowance:
            if not left:
                raise
        await asyncio.sleep(pause)
        if left % tries == 0:
            await allow()
    raise AssertionError("unreachable")


class SubmissionQueue:
    """Submissions of one wallet: those that are made at the same time go out as one transaction.

    Args:
        contracts: The deployment.
        sender: Of the customer's wallet.
        store: Where the definitions are kept.
        permit: The customer's account, for submissions that sign a permit.
        timeout: Seconds to wait for each transaction.
    """

    def __init__(
        self,
        contracts: Contracts,
        sender: Sender,
        store: DefinitionStore,
        *,
        permit: Signer,
        timeout: float,
    ) -> None:
        self._contracts = contracts
        self._sender = sender
        self._store = store
        self._permit = permit
        self._timeout = timeout
        self._waiting: list[_Queued] = []
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, request: Request, *, permit: bool = False) -> Submitted:
        """Submit, with others that are made at the same time; errors as the function `submit`."""
        queued = _Queued(request, permit, asyncio.get_running_loop().create_future())
        self._waiting.append(queued)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="submissions")
        return await queued.result

    async def close(self) -> None:
        """Wait for what is under way; what nobody waits for any more and was not sent is dropped."""
        if self._worker is not None:
            await asyncio.wait([self._worker])

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER_SECONDS)
            some = self._take()
            if some:
                await self._pay(some)

    def _take(self) -> list[_Queued]:
        """The first in the queue and all that can go with it."""
        waiting = [each for each in self._waiting if not each.result.done()]
        some: list[_Queued] = []
        for each in waiting:
            jobs = sum(len(one.request.definitions) for one in [*some, each])
            if not some or (each.permit == some[0].permit and jobs <= MAX_JOBS):
                some.append(each)
        self._waiting = [each for each in waiting if each not in some]
        return some

    async def _pay(self, some: Sequence[_Queued]) -> None:
        try:
            done = await submit(
                self._contracts,
                self._sender,
                self._store,
                [each.request for each in some],
                permit=self._permit if some[0].permit else None,
                timeout=self._timeout,
            )
        except (StoreError, InsufficientFundsError, RevertedError, UsageError) as error:
            # Nothing was paid. One of them may be at fault, and the others are not.
            if len(some) == 1:
                some[0].fail(error)
            for each in some if len(some) > 1 else ():
                await self._pay([each])
        except BaseException as error:
            for each in some:
                each.fail(error)
            if not isinstance(error, Exception):
                raise
        else:
            ids = iter(done.job_ids)
            for each in some:
                own = tuple(itertools.islice(ids, len(each.request.definitions)))
                if not each.result.done():
                    each.result.set_result(Submitted(own, done.receipts))


@dataclass(frozen=True, slots=True, eq=False)
class _Queued:
    """A submission that waits for its turn."""

    request: Request
    permit: bool
    result: asyncio.Future[Submitted]

    def fail(self, error: BaseException) -> None:
        if self.result.done():
            return
        if isinstance(error, Exception):
            self.result.set_exception(error)
        else:
            self.result.cancel()


def _born(receipts: Sequence[TxReceipt]) -> Submitted:
    born = [event for event in receipts[-1].events if isinstance(event, JobSubmitted)]
    return Submitted(tuple(event.job_id for event in born), tuple(receipts))


async def repeated(
    contracts: Contracts,
    sender: Sender | RelayedSender,
    requests: Sequence[Request],
    key: str | None,
    timeout: float,
) -> Submitted | None:
    """The jobs of an earlier submission of this name, None where there was none.

    One that was refused or never reached a block has paid nothing and is none.

    Raises:
        UsageError: The key stands for another submission, or is no key.
        WaitTimeoutError: The earlier one is not in a block yet.
    """
    if key is None:
        return None
    entry = sender.sent(_PREFIX + _checked(key))
    if entry is None:
        return None
    scheduler = contracts.scheduler
    rows = [(request.terms, [digest(data) for data in request.definitions]) for request in requests]
    if scheduler.submitted(entry.call) != scheduler.submitted(scheduler.submit_jobs(rows)):
        raise UsageError(
            f"The key {key!r} was used for another submission",
            hint="Give each submission a key of its own; the same key means the same jobs.",
        )
    return _born([await sender.send(entry.call, timeout=timeout, key=_PREFIX + key)])


def refuse_relayed_key(store: RequestTables, key: str | None) -> None:
    """Refuse to send without a relay what was signed for one under the same key.

    Raises:
        UsageError: It was, so that it would be paid twice.
    """
    if key is not None and store.request_by_key(_PREFIX + key) is not None:
        raise UsageError(
            f"The key {key!r} was used for a submission through a relay",
            hint="Repeat it with --gasless: it is paid once.",
        )


def _checked(key: str) -> str:
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise UsageError(f"A key has 1 to {MAX_KEY} printable characters, not {key[:40]!r}")
    return key


async def resubmit(
    wallet: WalletConnection | GaslessWallet, settings: Settings, job_id: int, amount: int | None
) -> Submitted:
    """Pay for an ended job again.

    Args:
        wallet: The customer that pays, not necessarily the one that paid before.
        settings: Name the store that holds the definition.
        job_id: The ended job.
        amount: Escrow in credit-wei; what its line was funded with if None.

    Raises:
        NotFoundError: There is no such job, or the store has not got its definition.
        RevertedError: The job is live.
        InsufficientFundsError: Too few credits, or no gas.
    """
    job = await wallet.contracts.scheduler.get_job(job_id)
    if job.status.is_live:
        raise RevertedError(
            f"Job {job_id} is {job.status.name} and has not ended",
            hint=f"Cancel it first: `deepsquare job cancel {job_id}`.",
        )
    history = (await histories(wallet.contracts, [job_id]))[job_id]
    terms = Terms(
        amount=history.funded + history.carried_in if amount is None else amount,
        time_limit=job.time_limit,
        resources=job.resources,
        retries=job.retries_left,
        flags=job.flags & ~JobFlags.SUCCESSOR,
        objective=history.objective,
        name=history.name,
        uses=history.uses,
    )
    async with definitions_of(settings, wallet.contracts.deployment, wallet.account) as store:
        data = await store.get(job.definition, job_id)
        return await submit(
            wallet.contracts,
            wallet.sender,
            store,
            [Request(terms, (data,))],
            timeout=settings.timeout,
        )
