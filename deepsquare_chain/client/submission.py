"""Submits jobs; everything is checked before anything is paid."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Final

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.events import JobSubmitted
from deepsquare_chain.chain.rpc.heads import mines_on_demand, next_block_time
from deepsquare_chain.chain.rpc.pool import chain_time
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.transactions.sender import Sender, TxReceipt
from deepsquare_chain.client.gasless import GaslessWallet, PermitPlan, RelayedSender
from deepsquare_chain.client.gateways import definitions_of
from deepsquare_chain.client.jobs import histories, select
from deepsquare_chain.client.network import WalletConnection
from deepsquare_chain.client.transactions import AddressOnly
from deepsquare_chain.credits import credit_count, format_credits
from deepsquare_chain.errors import InsufficientFundsError, RevertedError, StoreError, UsageError
from deepsquare_chain.job import Conditions, Dependency, JobFlags, Terms
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.definitions import DefinitionStore
from deepsquare_chain.store.gateway_client import gateway_urls
from deepsquare_chain.store.outbox import RequestTables
from deepsquare_chain.workflow import Definition, digest
from deepsquare_chain.workflow.checks import MAX_USES_BYTES

#: Maximum number of jobs per submission: fits into a block of 30 million gas with a margin.
MAX_JOBS: Final = 250
# Gas estimates for the check of the wallet's balance; higher than measured in the gas report.
_GAS_CALL: Final = 120_000
_GAS_JOB: Final = 90_000
_GAS_APPROVE: Final = 60_000
_PERMIT_SECONDS: Final = 900
#: Timeout for other submissions of the same wallet, as a multiple of the transaction timeout.
_QUEUE_TIMEOUT_FACTOR: Final = 10
#: Seconds for which submissions are collected into one transaction.
_GATHER_SECONDS: Final = 0.02
#: Tries, and seconds between them, until all nodes behind an endpoint see a mined approval.
_ALLOWANCE_RETRIES: Final = (12, 0.25)
#: Maximum number of approvals, if another folder or machine spends or replaces the allowance.
_MAX_APPROVALS: Final = 8
#: Maximum length of an idempotency key in characters.
MAX_KEY: Final = 120
_PREFIX: Final = "submit:"
_RANGE: Final = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?::([1-9][0-9]{0,8}))?)?")


@dataclass(frozen=True, slots=True)
class Request:
    """Jobs with the same terms, one for each definition (canonical bytes)."""

    terms: Terms
    definitions: tuple[bytes, ...]

    @property
    def total(self) -> int:
        """Return the escrow of all jobs in credit-wei."""
        return self.terms.amount * len(self.definitions)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Indices of a job array, and the limit of its jobs at providers at once (0: no limit)."""

    indices: tuple[int, ...]
    throttle: int = 0


def parse_array(text: str) -> ArraySpec:
    """Parse a job array in Slurm's syntax: `1-20%4`, `0-9:3`, `1,3,7`; a single N means `1-N`.

    Raises:
        UsageError: The text is invalid, or has more than `MAX_JOBS` indices.
    """
    body, _, limit = text.strip().partition("%")
    indices: list[int] = []
    valid = not limit or re.fullmatch(r"[1-9][0-9]{0,4}", limit) is not None
    valid = valid and ("%" not in text or bool(limit))
    for part in body.split(","):
        match = _RANGE.fullmatch(part.strip())
        valid = valid and match is not None
        if match is None:
            break
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if body.strip() == part.strip() and match[2] is None:
            first = 1
        valid = valid and last >= first
        indices += range(first, min(last, first + step * MAX_JOBS) + 1, step)
    if not valid or not indices or len(set(indices)) != len(indices):
        raise UsageError(
            f"{text[:60]!r} is not an array of jobs",
            hint="Write 20, 1-20, 1-20%4 (4 at once), 0-9:3 or 1,3,7.",
        )
    if len(indices) > MAX_JOBS:
        raise UsageError(
            f"{len(indices)} jobs or more are too many for one submission: at most {MAX_JOBS}",
            hint="Lower --array, and submit the rest separately.",
        )
    return ArraySpec(tuple(indices), int(limit or 0))


def submission_id(customer: str, key: str | None) -> str:
    """Return the ID of a submission: random, or derived from customer and key."""
    seed = secrets.token_bytes(16) if key is None else f"{customer}:{key}".encode()
    return f"sub-{hashlib.sha256(seed).hexdigest()[:8]}"


def request_of(
    definition: Definition,
    terms: Terms,
    *,
    array: ArraySpec | None = None,
    submission: str = "",
    after: Sequence[tuple[Dependency, int]] = (),
    job_conditions: Conditions | None = None,
) -> Request:
    """Return the jobs of a submission: a single job, or a job array.

    `array` is None for a single job, `submission` the ID of the submission of an array, and
    `job_conditions` are the further conditions of the job file.

    Raises:
        UsageError: The conditions are too long to be stored on chain.
    """
    definitions: tuple[Definition, ...] = (definition,)
    conditions = replace(job_conditions or Conditions(), after=tuple(after))
    if array is not None:
        size = len(array.indices)
        definitions = tuple(definition.in_array(index, size) for index in array.indices)
        throttle = array.throttle if array.throttle < size else 0
        conditions = replace(conditions, array=submission, throttle=throttle)
    if uses := conditions.to_uses():
        # The contract does not check conditions, so providers must not schedule the job themselves.
        flags = terms.flags | JobFlags.NO_SELF_SCHEDULING
        joined = ",".join(filter(None, [terms.uses, uses]))
        terms = replace(terms, uses=joined, flags=flags)
    if len(terms.uses.encode()) > MAX_USES_BYTES:
        raise UsageError(
            f"Requirements, preferences and dependencies take more than {MAX_USES_BYTES} bytes in total",
            hint="Depend on ranges (afterok:10-60), or on the last job of a chain.",
        )
    return Request(terms, tuple(item.to_bytes() for item in definitions))


async def submission_time(contracts: Contracts) -> int:
    """Return the approximate chain time of a submission that is sent now.

    On a chain that mines on demand the latest block may be old, so its age is added.
    """
    age = await mines_on_demand(contracts.w3)
    return await chain_time(contracts.w3) + (age or 0)


async def parse_depends(
    contracts: Contracts, words: Sequence[str], customer: Callable[[], str]
) -> list[tuple[Dependency, int]]:
    """Parse dependencies in Slurm's syntax: `afterok:12:15-20,afterany:sub-1f3a9c04`.

    The default kind is afterok.

    Raises:
        UsageError: The text is invalid, or a dependency can never be satisfied.
        NotFoundError: A named job does not exist.
    """
    dependencies: list[tuple[Dependency, int]] = []
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
            never_satisfied = job.status.is_final and not Dependency(kind).holds(job.status)
            if never_satisfied and (await histories(contracts, [job.id]))[job.id].successor is None:
                raise UsageError(
                    f"Job {job.id} ended {job.status.name}, so {kind}:{job.id} can never be met",
                    hint="Remove the dependency, or `deepsquare job retry` that job first.",
                )
            dependencies.append((Dependency(kind), job.id))
    return dependencies


@dataclass(frozen=True, slots=True)
class Bill:
    """Cost of a submission and balances of its wallet, in credit-wei, and in wei for gas."""

    customer: str
    jobs: int
    total: int
    balance: int
    allowance: int
    gas_wei: int
    gas_balance: int

    @property
    def approval(self) -> bool:
        """Return whether the scheduler's allowance is too small."""
        return self.allowance < self.total

    def check(self) -> None:
        """Check that the wallet can pay.

        Raises:
            InsufficientFundsError: Too few credits, or too little gas.
        """
        if self.balance < self.total:
            raise InsufficientFundsError(
                f"{self.customer} has {credit_count(self.balance)}, the submission "
                f"needs {format_credits(self.total)}",
                hint="Lower --credits, or get credits: on a devnet with `deepsquare credit faucet`.",
            )
        if self.gas_balance < self.gas_wei:
            raise InsufficientFundsError(
                f"{self.customer} has {format_credits(self.gas_balance)} of the chain's coin, "
                f"the gas may cost {format_credits(self.gas_wei)}",
                hint="Send coin to it; on a devnet use `deepsquare credit faucet`.",
            )


async def bill(
    contracts: Contracts, customer: str, requests: Sequence[Request], *, gasless: bool = False
) -> Bill:
    """Return the cost of a submission; nothing is sent.

    Raises:
        UsageError: There are no jobs or too many.
        RevertedError: The deployment accepts no new jobs.
    """
    jobs = sum(len(request.definitions) for request in requests)
    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError(
            f"{jobs} jobs can't be one submission: 1 to {MAX_JOBS} are allowed",
            hint="Lower --array, and submit the rest separately.",
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
            "This deployment does not accept new jobs",
            hint="Use the record of the deployment that replaced it.",
        )
    total = sum(request.total for request in requests)
    gas = _GAS_CALL + _GAS_JOB * jobs + (_GAS_APPROVE if allowance < total else 0)
    gas_wei = 0 if gasless else gas * gas_price
    return Bill(address, jobs, total, balance, allowance, gas_wei, gas_balance)


@dataclass(frozen=True, slots=True)
class Submitted:
    """IDs of new jobs in the order of the requests, and the receipts of all transactions."""

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
    """Store the definitions, approve exactly the cost, and submit in one transaction.

    Args:
        contracts: Contracts of the deployment.
        sender: Sender of the customer's wallet, directly or through a relay.
        store: Store of the definitions, from which providers read them.
        requests: Jobs to submit.
        permit: The customer's account, to sign a permit instead of sending an approval; a relayed
            submission always uses a permit if the allowance is too small.
        timeout: Seconds to wait for each transaction.
        key: Idempotency key, kept in the wallet's outbox: a second submission with the same key
            waits for the first and returns its jobs.

    Raises:
        InsufficientFundsError: Too few credits, or too little gas; nothing was paid.
        UsageError: The key was used for another submission, or is invalid.
        WaitTimeoutError: Another submission of this wallet holds the lock for too long, and nothing
            was paid; or the transaction was sent and is not in a block yet. The message says which.
        GridError: The store, the endpoint or a contract refused; nothing was paid.
    """
    earlier = await earlier_submission(contracts, sender, requests, key, timeout)
    if earlier is not None:
        return earlier
    try:
        async with sender.spending(_QUEUE_TIMEOUT_FACTOR * timeout):
            # The same command may have held the lock before.
            earlier = await earlier_submission(contracts, sender, requests, key, timeout)
            return earlier or await _pay(
                contracts, sender, store, requests, permit=permit, timeout=timeout, key=key
            )
    except (StoreError, InsufficientFundsError, RevertedError):
        # A race: the same command, run concurrently, may have used the key, credits or permit.
        earlier = await earlier_submission(contracts, sender, requests, key, timeout)
        if earlier is None:
            raise
        return earlier


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
    """Submit jobs that were not submitted before; see `submit`."""
    cost = await bill(contracts, sender.address, requests, gasless=not sender.pays_gas)
    cost.check()
    rows = [
        (request.terms, [await store.put(data) for data in request.definitions])
        for request in requests
    ]
    scheduler = contracts.scheduler
    outbox_key = None if key is None else _PREFIX + key
    if isinstance(sender, RelayedSender):
        plan = None
        if cost.approval:
            plan = PermitPlan(
                cost.total, lambda signed: scheduler.submit_jobs_with_permit(rows, signed)
            )
        receipt = await sender.send(
            scheduler.submit_jobs(rows), timeout=timeout, key=outbox_key, permit=plan
        )
        return _new_job_ids([receipt])
    credit = contracts.credit
    receipts: list[TxReceipt] = []
    call = scheduler.submit_jobs(rows)

    async def allow() -> None:
        nonlocal call
        if permit is None:
            approval = credit.approve(scheduler.address, cost.total)
            receipts.append(await sender.send(approval, timeout=timeout))
            return
        deadline = await next_block_time(contracts.w3) + _PERMIT_SECONDS
        signed = await credit.sign_permit(permit, scheduler.address, cost.total, deadline)
        call = scheduler.submit_jobs_with_permit(rows, signed)

    if cost.approval:
        await allow()
    submit_receipt = await pay_with_allowance(
        lambda: sender.send(call, timeout=timeout, key=outbox_key), allow
    )
    return _new_job_ids([*receipts, submit_receipt])


async def pay_with_allowance(
    pay: Callable[[], Awaitable[TxReceipt]], allow: Callable[[], Awaitable[object]]
) -> TxReceipt:
    """Pay with the existing allowance; retry, and approve again if it stays insufficient.

    A node behind a load balancer may lag and not see the approval yet. Another folder or machine
    may spend from the same wallet, and the wallet's lock does not cover it.

    `pay` sends the transaction that uses the allowance, `allow` approves the allowance again.

    Raises:
        ERC20InsufficientAllowance: The allowance was insufficient each time; nothing was paid.
    """
    tries, pause = _ALLOWANCE_RETRIES
    for retries_left in range(_MAX_APPROVALS * tries - 1, -1, -1):
        try:
            return await pay()
        except reverts.ERC20InsufficientAllowance:
            if not retries_left:
                raise
        await asyncio.sleep(pause)
        if retries_left % tries == 0:
            await allow()
    raise AssertionError("unreachable")


class SubmissionQueue:
    """A queue of submissions of one wallet that sends concurrent submissions in one transaction.

    `permit` is the customer's account, for submissions that sign a permit; `timeout` is the time in
    seconds to wait for each transaction.
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
        """Submit together with concurrent submissions; errors as the function `submit`."""
        queued = _Queued(request, permit, asyncio.get_running_loop().create_future())
        self._waiting.append(queued)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="submissions")
        return await queued.result

    async def close(self) -> None:
        """Wait for the queue; submissions that were cancelled before they were sent are dropped."""
        if self._worker is not None:
            await asyncio.wait([self._worker])

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER_SECONDS)
            batch = self._next_batch()
            if batch:
                await self._pay(batch)

    def _next_batch(self) -> list[_Queued]:
        """Remove and return the first submission and all that fit into its transaction."""
        waiting = [queued for queued in self._waiting if not queued.result.done()]
        batch: list[_Queued] = []
        for queued in waiting:
            jobs = sum(len(item.request.definitions) for item in [*batch, queued])
            if not batch or (queued.permit == batch[0].permit and jobs <= MAX_JOBS):
                batch.append(queued)
        self._waiting = [queued for queued in waiting if queued not in batch]
        return batch

    async def _pay(self, submissions: Sequence[_Queued]) -> None:
        try:
            submitted = await submit(
                self._contracts,
                self._sender,
                self._store,
                [queued.request for queued in submissions],
                permit=self._permit if submissions[0].permit else None,
                timeout=self._timeout,
            )
        except (StoreError, InsufficientFundsError, RevertedError, UsageError) as error:
            # Nothing was paid. Retry each on its own, because one may have failed the others.
            if len(submissions) == 1:
                submissions[0].fail(error)
            for queued in submissions if len(submissions) > 1 else ():
                await self._pay([queued])
        except BaseException as error:
            for queued in submissions:
                queued.fail(error)
            if not isinstance(error, Exception):
                raise
        else:
            ids = iter(submitted.job_ids)
            for queued in submissions:
                job_ids = tuple(itertools.islice(ids, len(queued.request.definitions)))
                if not queued.result.done():
                    queued.result.set_result(Submitted(job_ids, submitted.receipts))


@dataclass(frozen=True, slots=True, eq=False)
class _Queued:
    """A submission in the queue."""

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


def _new_job_ids(receipts: Sequence[TxReceipt]) -> Submitted:
    submitted = [event for event in receipts[-1].events if isinstance(event, JobSubmitted)]
    return Submitted(tuple(event.job_id for event in submitted), tuple(receipts))


async def earlier_submission(
    contracts: Contracts,
    sender: Sender | RelayedSender,
    requests: Sequence[Request],
    key: str | None,
    timeout: float,
) -> Submitted | None:
    """Return the jobs of an earlier submission with this key; None if there is none.

    A submission that was refused or never reached a block paid nothing and does not count.

    Raises:
        UsageError: The key was used for another submission, or is invalid.
        WaitTimeoutError: The earlier submission is not in a block yet.
    """
    if key is None:
        return None
    entry = sender.sent(_PREFIX + _checked(key))
    if entry is None:
        return None
    scheduler = contracts.scheduler
    rows = [(request.terms, [digest(data) for data in request.definitions]) for request in requests]
    wanted = scheduler.submit_jobs(rows)
    is_same = entry.call.to.lower() == wanted.to.lower() and scheduler.submitted(
        entry.call
    ) == scheduler.submitted(wanted)
    if not is_same:
        raise UsageError(
            f"The key {key!r} was used for another submission",
            hint="Give each submission its own key; the same key means the same jobs.",
        )
    return _new_job_ids([await sender.send(entry.call, timeout=timeout, key=_PREFIX + key)])


def refuse_relayed_key(store: RequestTables, key: str | None) -> None:
    """Refuse a direct submission with a key that was used through a relay.

    Raises:
        UsageError: The key was used through a relay, so the jobs could be paid twice.
    """
    if key is not None and store.request_by_key(_PREFIX + key) is not None:
        raise UsageError(
            f"The key {key!r} was used for a submission through a relay",
            hint="Repeat it with --gasless: it is paid only once.",
        )


def _checked(key: str) -> str:
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise UsageError(f"A key has 1 to {MAX_KEY} printable characters, not {key[:40]!r}")
    return key


async def resubmit(
    wallet: WalletConnection | GaslessWallet, settings: Settings, job_id: int, amount: int | None
) -> Submitted:
    """Submit an ended job again.

    `amount` is the escrow in credit-wei; None for the job's total funding, carry included. The
    wallet may be that of another customer.

    Raises:
        NotFoundError: The job does not exist, or the store does not have its definition.
        RevertedError: The job has not ended.
        InsufficientFundsError: Too few credits, or too little gas.
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
    async with AsyncExitStack() as stack:
        deployment = wallet.contracts.deployment
        store: DefinitionStore
        if isinstance(wallet.account, AddressOnly) and gateway_urls(settings, deployment):
            # No key can sign in to read the definition, and the gateway has it already.
            store = _StoredDefinition(job.definition)
        else:
            store = await stack.enter_async_context(
                definitions_of(settings, deployment, wallet.account)
            )
        data = await store.get(job.definition, job_id)
        return await submit(
            wallet.contracts,
            wallet.sender,
            store,
            [Request(terms, (data,))],
            timeout=settings.timeout,
        )


class _StoredDefinition:
    """A definition that a gateway has from an earlier job; its content is not read."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    async def put(self, data: bytes) -> bytes:  # noqa: ARG002
        """Return the digest without an upload."""
        return self._key

    async def get(self, digest: bytes, job_id: int | None = None) -> bytes:  # noqa: ARG002
        """Return no bytes: a submission needs only the digest."""
        return b""
