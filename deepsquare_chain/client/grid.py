"""The Python SDK: one class for all operations of a customer on a grid."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deepsquare_chain.audit.entries import StatementRow
from deepsquare_chain.audit.reader import read_ledger
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.transactions.sender import TxReceipt
from deepsquare_chain.client import accounts
from deepsquare_chain.client.accounts import Balances
from deepsquare_chain.client.gasless import GaslessWallet, RelayClient, gasless_wallet, relay_url
from deepsquare_chain.client.gateways import (
    Result,
    gateways_of,
    job_results,
    read_log,
    request_notifications,
)
from deepsquare_chain.client.job_file import load_job
from deepsquare_chain.client.jobs import watch
from deepsquare_chain.client.network import WalletConnection, open_grid, open_wallet, transport_of
from deepsquare_chain.client.offers import PricedOffer, offers
from deepsquare_chain.client.submission import (
    SubmissionQueue,
    parse_depends,
    refuse_relayed_key,
    request_of,
    submission_time,
    submit,
)
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.job import Job, JobStatus, Terms
from deepsquare_chain.provider.outputs import find_run, read_output
from deepsquare_chain.settings import Settings, load_settings
from deepsquare_chain.store.definitions import DefinitionStore, FolderDefinitionStore
from deepsquare_chain.store.encryption import ensure_result_key
from deepsquare_chain.store.gateway_client import GatewayClient, GatewayDefinitionStore
from deepsquare_chain.workflow import JobFile, digest, parse_job_file

_CHUNK = 1_048_576


@dataclass(frozen=True, slots=True)
class Submission:
    """IDs of submitted jobs, and the hash of their transaction."""

    job_ids: tuple[int, ...]
    transaction: str


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """The outcome of a job, or of the last successor in its chain of retries.

    `exit_code` is the exit code for a program: zero only for FINISHED. Amounts are in credit-wei;
    `billed_seconds` is None if nothing was settled.
    """

    job: Job
    status: JobStatus
    exit_code: int
    paid: int
    fee: int
    refunded: int
    billed_seconds: int | None
    reason: str


class Grid:
    """A client of a deployment for one customer; created by `Grid.open`.

    Example:
        async with Grid.open(context="test") as grid:
            made = await grid.submit("job.yaml")
            outcome = await grid.wait(made.job_ids[0])
            print((await grid.logs(made.job_ids[0])).decode(), outcome.paid)
    """

    def __init__(
        self, settings: Settings, contracts: Contracts, wallet: WalletConnection | None
    ) -> None:
        self.settings = settings
        self.contracts = contracts
        self._wallet = wallet
        self._queue: SubmissionQueue | None = None
        self._definitions: DefinitionStore = FolderDefinitionStore(settings.store)
        self._gateways: tuple[GatewayClient, ...] = ()

    @classmethod
    @asynccontextmanager
    async def open(cls, **settings: Any) -> AsyncIterator[Grid]:
        """Open the grid of the settings; arguments override configuration files and environment.

        Without a keystore in the settings, the grid is read-only.

        Args:
            **settings: Fields of `deepsquare_chain.settings.Settings`, such as `context`,
                `endpoint`, `deployment`, `keystore`, `password_file`.

        Raises:
            UsageError: A setting is unknown or invalid.
            NotFoundError: The deployment record or the keystore does not exist.
            NotAuthorisedError: The keystore's password is wrong.
            EndpointError: The endpoint is down, or serves another chain.
        """
        loaded = load_settings(settings)
        async with AsyncExitStack() as stack:
            if loaded.keystore is None:
                contracts = await stack.enter_async_context(open_grid(loaded))
                yield cls(loaded, contracts, None)
                return
            wallet = await stack.enter_async_context(open_wallet(loaded))
            grid = cls(loaded, wallet.contracts, wallet)
            grid._gateways = await stack.enter_async_context(
                gateways_of(loaded, wallet.contracts.deployment, wallet.account)
            )
            if grid._gateways:
                grid._definitions = GatewayDefinitionStore(grid._gateways)
            try:
                yield grid
            finally:
                if grid._queue is not None:
                    await grid._queue.close()

    @property
    def wallet(self) -> WalletConnection:
        """Return the customer's wallet.

        Raises:
            UsageError: The grid was opened without a wallet.
        """
        if self._wallet is None:
            raise UsageError(
                "This grid was opened without a wallet", hint="Give Grid.open(keystore=...)."
            )
        return self._wallet

    @property
    def _submissions(self) -> SubmissionQueue:
        if self._queue is None:
            self._queue = SubmissionQueue(
                self.contracts,
                self.wallet.sender,
                self._definitions,
                permit=self.wallet.account,
                timeout=self.settings.timeout,
            )
        return self._queue

    @asynccontextmanager
    async def _relayed(self) -> AsyncIterator[GaslessWallet]:
        """Open the wallet with the relay of the settings; signs without a confirmation."""
        url = relay_url(self.settings, self.contracts.deployment)
        async with RelayClient(url, transport_of(self.settings)) as relay:
            yield gasless_wallet(self.wallet, relay, lambda _: True)

    async def quote(self, job: str | Path | bytes, **terms: int | None) -> list[PricedOffer]:
        """Return the price of a job at each provider; eligible providers first, then by price.

        Args:
            job: Path of a job file, or its YAML as bytes.
            **terms: `credits` (credit-wei) and `time_limit` (seconds) override the file.

        Raises:
            JobFileError: The job file is invalid.
            EndpointError: The endpoint does not answer.
        """
        return await offers(self.contracts, (await _read_job_file(job)).terms(**terms))

    async def submit(
        self,
        job: str | Path | bytes,
        *,
        credits: int | None = None,
        time_limit: int | None = None,
        count: int = 1,
        permit: bool = False,
        key: str | None = None,
        gasless: bool = False,
        encrypt: bool = False,
    ) -> Submission:
        """Submit and pay for a job; returns once the transaction is in a block.

        Concurrent submissions, for example with `asyncio.gather`, are sent in one transaction if
        possible. Submissions of other programs from the same wallet are waited for.

        Args:
            job: Path of a job file, or its YAML as bytes.
            credits: Escrow of each job in credit-wei; overrides the file.
            time_limit: Time limit in seconds; overrides the file.
            count: Number of identical jobs to submit.
            permit: Sign a permit instead of sending an approval, which saves a transaction.
            key: Idempotency key: a repeated submission with the same key, after a crash or by
                mistake, returns the same jobs and pays nothing more.
            gasless: Sign a request and let the relay of the settings pay the gas.
            encrypt: Encrypt log and results to the key of the setting `result_key`, which is
                created if it is missing.

        Raises:
            JobFileError: The job file is invalid.
            InsufficientFundsError: Too few credits, or too little gas; nothing was paid.
            UsageError: The key was used for another submission.
            GridError: The store, the endpoint or a contract refused; nothing was paid.
            WaitTimeoutError: The transaction was sent and is not in a block yet; repeat with the
                same key.
        """
        wallet, file = self.wallet, await _read_job_file(job)
        terms: Terms = file.terms(credits=credits, time_limit=time_limit)
        after = await parse_depends(self.contracts, file.depends_on, lambda: wallet.address)
        definition = file.definition
        if encrypt:
            result_key, _ = await asyncio.to_thread(
                ensure_result_key, self.settings.result_key_file
            )
            definition = definition.encrypted_to([result_key.recipient])
        now = await submission_time(self.contracts)
        job_conditions = file.conditions(now, repeatable=key is not None)
        request = request_of(definition, terms, after=after, job_conditions=job_conditions)
        request = replace(request, definitions=request.definitions * count)
        digests = [digest(data).hex() for data in request.definitions]
        await request_notifications(
            self.settings, wallet.store, self._gateways, digests, file.notify
        )
        submit_with_key = partial(
            submit, self.contracts, timeout=self.settings.timeout, key=key, store=self._definitions
        )
        if gasless:
            async with self._relayed() as relayed:
                submitted = await submit_with_key(sender=relayed.sender, requests=[request])
        elif key is None:
            submitted = await self._submissions.submit(request, permit=permit)
        else:
            refuse_relayed_key(wallet.store, key)
            signer = wallet.account if permit else None
            submitted = await submit_with_key(
                sender=wallet.sender, requests=[request], permit=signer
            )
        return Submission(submitted.job_ids, submitted.receipts[-1].hash)

    async def job(self, job_id: int) -> Job:
        """Return a job's current record; raises NotFoundError if it does not exist."""
        return await self.contracts.scheduler.get_job(job_id)

    async def wait(
        self,
        job_id: int,
        *,
        timeout: float | None = None,
        on_change: Callable[[Job], None] | None = None,
    ) -> JobOutcome:
        """Wait until a job and all its successors have ended.

        Args:
            job_id: The job.
            timeout: Maximum seconds to wait; None for no limit.
            on_change: Called with the job at the start, and after every change of its status.

        Raises:
            NotFoundError: The job does not exist.
            WaitTimeoutError: The job has not ended in time.
        """
        ended = await watch(
            self.contracts,
            job_id,
            interval=self.settings.poll_interval,
            timeout=timeout,
            on_change=on_change,
        )
        history = ended.history
        return JobOutcome(
            *(ended.job, ended.job.status, ended.exit_code, history.paid, history.fee),
            *(history.refunded, history.billed_seconds, history.reason),
        )

    async def logs(self, job_id: int) -> bytes:
        """Return a job's log from a gateway, or else from a provider's folder on this machine.

        Raises:
            NotFoundError: No gateway has it, or no provider below `state_dir` has run the job.
            NotAuthorisedError: The wallet may not read it.
        """
        if self._gateways:
            log = read_log(
                self.contracts,
                self._gateways,
                job_id,
                follow=False,
                key_file=self.settings.result_key_file,
            )
            return b"".join([data async for data in log])
        root, chain_id = self.settings.state_dir, self.contracts.deployment.chain_id
        address = self.contracts.scheduler.address
        run = await asyncio.to_thread(find_run, root, chain_id, address, job_id)
        if run is None:
            raise NotFoundError(
                f"No run of job {job_id} is kept below {root}",
                hint="Output is read from a provider on this machine: give its state_dir.",
            )
        parts: list[bytes] = []
        position = 0
        while (part := await asyncio.to_thread(read_output, run, position, _CHUNK)).data:
            parts.append(part.data)
            position = part.position
        return b"".join(parts)

    async def results(self, job_id: int, to: Path | None = None) -> list[Result]:
        """Return the output and files of an ended job, and copy them into the new folder `to`.

        They are read from a gateway, or else from a provider's folder on this machine. The output
        is verified by the digest on chain.

        Raises:
            NotFoundError: The job does not exist, or no provider below `state_dir` has run it.
            UsageError: The job has not ended, or the folder exists.
            AuditError: The output does not match the reported digest; nothing is copied.
        """
        return await job_results(
            self.contracts,
            self.settings.state_dir,
            job_id,
            to,
            gateways=self._gateways,
            key_file=self.settings.result_key_file,
        )

    async def cancel(self, *job_ids: int, gasless: bool = False) -> TxReceipt:
        """Cancel jobs of this wallet: the time used is paid, the rest is refunded.

        Args:
            *job_ids: The jobs.
            gasless: Sign a request and let the relay of the settings pay the gas.

        Raises:
            RevertedError: None of the jobs can be cancelled.
        """
        if gasless:
            async with self._relayed() as relayed:
                return await relayed.send(self.contracts.scheduler.cancel(job_ids))
        return await self.wallet.send(self.contracts.scheduler.cancel(job_ids))

    async def top_up(self, job_id: int, credits: int, *, gasless: bool = False) -> TxReceipt:
        """Add credit-wei to a live job, with `gasless` through the relay.

        Errors as `client.accounts.top_up`.
        """
        if gasless:
            async with self._relayed() as relayed:
                return await accounts.top_up(relayed, job_id, credits)
        return await accounts.top_up(self.wallet, job_id, credits)

    async def balances(self, account: str | None = None) -> Balances:
        """Return credits, allowance, parked credits and gas of an account, or of the wallet."""
        return await accounts.balances(self.contracts, account or self.wallet.address)

    async def statement(self, account: str | None = None) -> list[StatementRow]:
        """Return all movements of an account's credits, oldest first, rebuilt from events alone.

        Raises:
            EndpointError: The endpoint does not answer.
        """
        ledger, _ = await read_ledger(self.contracts)
        return ledger.statement(account or self.wallet.address)


async def _read_job_file(job: str | Path | bytes) -> JobFile:
    if isinstance(job, bytes):
        return parse_job_file(job)
    return await asyncio.to_thread(load_job, job)
