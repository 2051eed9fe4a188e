"""The MetaScheduler: job records, their status machine and their escrow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from web3.types import BlockIdentifier

from deepsquare_chain.chain.bindings.abi import decode_values
from deepsquare_chain.chain.bindings.calls import (
    LATEST,
    Call,
    ContractBase,
    checked_address,
    chunks,
    plural,
)
from deepsquare_chain.chain.bindings.credit import Permit
from deepsquare_chain.chain.bindings.records import (
    Clock,
    Parameters,
    Report,
    read_job,
    request_values,
    short,
    to_word,
)
from deepsquare_chain.chain.bindings.reverts import selector_name
from deepsquare_chain.credits import format_credits
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.job import Job, JobStatus, Load, Prices, Terms

#: Records read in one call: far below any node's limit of gas for a call.
READ_CHUNK: Final = 500


class MetaSchedulerContract(ContractBase):
    """Jobs. Ids run from one to `job_count`; amounts are credit-wei, times seconds."""

    artifact = "MetaScheduler"

    async def job_count(self, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Number of jobs ever."""
        return int(await self._one("jobCount", block=block_identifier))

    async def get_job(self, job_id: int, *, block_identifier: BlockIdentifier = LATEST) -> Job:
        """One record.

        Raises:
            NotFoundError: There is no such job.
        """
        job = (await self.get_jobs([job_id], block_identifier=block_identifier))[0]
        if job.status is JobStatus.NONE:
            raise NotFoundError(
                f"Job {job_id} does not exist", hint="List jobs with `deepsquare job list`."
            )
        return job

    async def get_jobs(
        self, job_ids: Sequence[int], *, block_identifier: BlockIdentifier = LATEST
    ) -> list[Job]:
        """Records in the order of the ids; unknown ones have the status NONE."""
        runs = chunks(list(job_ids), READ_CHUNK)
        found = await asyncio.gather(
            *(self._one("getJobs", list(run), block=block_identifier) for run in runs)
        )
        return [
            read_job(number, record)
            for run, records in zip(runs, found, strict=True)
            for number, record in zip(run, records, strict=True)
        ]

    async def allotment(self, job_id: int, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Seconds that a job may run from its start; zero until it is assigned."""
        return int(await self._one("allotment", job_id, block=block_identifier))

    async def deadline(self, job_id: int, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Chain time at which a RUNNING job has used its allotment, else zero."""
        return int(await self._one("deadline", job_id, block=block_identifier))

    async def is_lost(self, job_id: int, *, block_identifier: BlockIdentifier = LATEST) -> bool:
        """Whether the provider of a RUNNING job is gone (lost timeout), or the job is overdue."""
        return bool(await self._one("isLost", job_id, block=block_identifier))

    async def is_eligible(
        self, job_id: int, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> tuple[bool, str]:
        """Whether a PENDING job could be assigned to a provider now, and else the error's name."""
        eligible, reason = await self._view(
            "isEligible", job_id, provider_id, block=block_identifier
        )
        return bool(eligible), "" if eligible else selector_name(reason)

    async def is_silent(
        self, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> bool:
        """Whether a provider left a challenge unanswered for too long."""
        return bool(await self._one("isSilent", provider_id, block=block_identifier))

    async def clock_of(
        self, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> Clock:
        """A provider's challenge clock."""
        return Clock(*await self._one("clockOf", provider_id, block=block_identifier))

    async def load_of(
        self, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> Load:
        """What the live assigned jobs of a provider occupy."""
        return Load(*await self._one("loadOf", provider_id, block=block_identifier))

    async def parked_of(self, account: str, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Credit-wei that wait for the account's `withdraw`."""
        return int(await self._one("parkedOf", checked_address(account), block=block_identifier))

    async def submissions_open(self, *, block_identifier: BlockIdentifier = LATEST) -> bool:
        """Whether new jobs are taken."""
        return bool(await self._one("submissionsOpen", block=block_identifier))

    async def parameters(self, *, block_identifier: BlockIdentifier = LATEST) -> Parameters:
        """All times, the fee and the addresses in one."""
        names = (
            *("timeouts", "feeBps", "submissionsOpen"),
            *("credit", "registry", "treasury", "trustedForwarder"),
        )
        times, *others = await asyncio.gather(
            *(self._one(name, block=block_identifier) for name in names)
        )
        return Parameters(*times, *others)

    # -- customers

    def submit_jobs(self, requests: Sequence[tuple[Terms, Sequence[bytes]]]) -> Call:
        """One PENDING job for each definition digest, escrow from the sender's allowance."""
        return self._call("submitJobs", request_values(requests), label=_submit_label(requests))

    def submit_jobs_with_permit(
        self, requests: Sequence[tuple[Terms, Sequence[bytes]]], permit: Permit
    ) -> Call:
        """The same with a permit, in one transaction."""
        arguments = (request_values(requests), permit.to_tuple())
        return self._call("submitJobsWithPermit", *arguments, label=_submit_label(requests))

    def submitted(self, call: Call) -> Any:
        """What a call of `submitJobs`, with or without a permit, asks for; to be compared."""
        for name in ("submitJobs", "submitJobsWithPermit"):
            function = self._interface.function(name)
            if call.data[:4] == function.selector:
                return decode_values(function.inputs, call.data[4:])[0]
        raise UsageError(f"{call.label!r} submits no jobs")

    def cancel(self, job_ids: Sequence[int]) -> Call:
        """End jobs of the sender."""
        return self._batch("cancel", job_ids)

    def top_up(self, job_id: int, customer: str, amount: int) -> Call:
        """Raise the escrow of a live job; `customer` is the job's."""
        label = f"top up job {job_id} by {format_credits(amount)} credits"
        return self._call("topUp", job_id, checked_address(customer), amount, label=label)

    def top_up_with_permit(self, job_id: int, customer: str, amount: int, permit: Permit) -> Call:
        """The same with a permit, in one transaction."""
        arguments = (job_id, checked_address(customer), amount, permit.to_tuple())
        label = f"top up job {job_id} by {format_credits(amount)} credits"
        return self._call("topUpWithPermit", *arguments, label=label)

    def withdraw(self, to: str) -> Call:
        """Take out what could not be paid to the sender."""
        return self._call("withdraw", checked_address(to), label="withdraw parked credits")

    # -- scheduler and providers

    def meta_schedule(self, assignments: Mapping[tuple[int, Prices], Sequence[int]]) -> Call:
        """Assign PENDING jobs, for a holder of METASCHEDULER_ROLE.

        Args:
            assignments: Job ids by provider id and the prices that the decision was made by; jobs
                of a provider that asks more by now are refused.
        """
        groups = [
            (provider, (prices.cpu, prices.gpu, prices.mem), list(ids))
            for (provider, prices), ids in assignments.items()
        ]
        label = f"assign {plural(sum(len(ids) for *_, ids in groups), 'job')}"
        return self._call("metaSchedule", groups, label=label)

    def self_schedule(self, job_ids: Sequence[int]) -> Call:
        """Take jobs for the sender that were PENDING for the pending timeout."""
        return self._batch("selfSchedule", job_ids)

    def claim(self, job_ids: Sequence[int]) -> Call:
        """META_SCHEDULED to SCHEDULED, by the assigned provider."""
        return self._batch("claim", job_ids)

    def start(self, job_ids: Sequence[int]) -> Call:
        """SCHEDULED to RUNNING, by the assigned provider; the meter starts."""
        return self._batch("start", job_ids)

    def claim_and_start(self, job_ids: Sequence[int]) -> Call:
        """META_SCHEDULED to RUNNING in one transaction, by the assigned provider."""
        return self._batch("claimAndStart", job_ids)

    def collect(self, job_ids: Sequence[int]) -> Call:
        """Bill RUNNING jobs up to now, by the assigned provider; the jobs must allow it."""
        return self._batch("collect", job_ids)

    def finish(self, reports: Sequence[Report]) -> Call:
        """End RUNNING jobs and settle them, by the assigned provider."""
        rows = [
            (each.job_id, each.seconds_used, each.exit_code, each.result, to_word(each.reason))
            for each in reports
        ]
        return self._call("finish", rows, label=_label("finish", [row[0] for row in rows]))

    def answer(self) -> Call:
        """Stop the sender's challenge clock."""
        return self._call("answer", label="answer a challenge")

    # -- parties and anyone

    def requeue(self, job_ids: Sequence[int], reason: str = "") -> Call:
        """META_SCHEDULED or SCHEDULED back to PENDING."""
        return self._batch("requeue", job_ids, short(reason))

    def panic(self, job_ids: Sequence[int], reason: str = "") -> Call:
        """Give jobs up: by their provider, or by anyone once they are lost."""
        return self._batch("panic", job_ids, short(reason))

    def challenge(self, job_id: int) -> Call:
        """Start the clock of the provider of an assigned job."""
        return self._call("challenge", job_id, label=f"challenge the provider of job {job_id}")

    # -- administrator

    def set_fee(self, fee_bps: int) -> Call:
        """Fee in basis points for jobs assigned from now on; at most 2,000."""
        return self._call("setFee", fee_bps, label=f"set the fee to {fee_bps} basis points")

    def set_submissions_open(self, is_open: bool) -> Call:
        """Open or close new submissions."""
        label = "open submissions" if is_open else "close submissions"
        return self._call("setSubmissionsOpen", is_open, label=label)

    def _batch(self, name: str, job_ids: Sequence[int], *more: Any) -> Call:
        return self._call(name, list(job_ids), *more, label=_label(name, job_ids))


def _label(verb: str, job_ids: Sequence[int]) -> str:
    return f"{verb} job {job_ids[0]}" if len(job_ids) == 1 else f"{verb} {len(job_ids)} jobs"


def _submit_label(requests: Sequence[tuple[Terms, Sequence[bytes]]]) -> str:
    return f"submit {plural(sum(len(digests) for _, digests in requests), 'job')}"
