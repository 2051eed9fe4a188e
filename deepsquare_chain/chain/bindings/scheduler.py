"""The MetaScheduler contract: job records, their state machine and their escrow."""

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

#: Number of records read in one call, far below any node's gas limit for eth_call.
READ_CHUNK: Final = 500


class MetaSchedulerContract(ContractBase):
    """The contract of the jobs. Job IDs are 1 to `job_count`; amounts in credit-wei, times in s."""

    artifact = "MetaScheduler"

    async def job_count(self, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Return the number of jobs ever submitted."""
        return int(await self._one("jobCount", block=block_identifier))

    async def get_job(self, job_id: int, *, block_identifier: BlockIdentifier = LATEST) -> Job:
        """Return one job record.

        Raises:
            NotFoundError: The job does not exist.
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
        """Return job records in the order of the IDs; unknown jobs have the status NONE."""
        id_chunks = chunks(list(job_ids), READ_CHUNK)
        record_chunks = await asyncio.gather(
            *(
                self._one("getJobs", list(id_chunk), block=block_identifier)
                for id_chunk in id_chunks
            )
        )
        return [
            read_job(number, record)
            for id_chunk, records in zip(id_chunks, record_chunks, strict=True)
            for number, record in zip(id_chunk, records, strict=True)
        ]

    async def allotment(self, job_id: int, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Return the seconds that a job may run from its start; 0 until it is assigned."""
        return int(await self._one("allotment", job_id, block=block_identifier))

    async def deadline(self, job_id: int, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Return the chain time at which a RUNNING job has used up its allotment, else 0."""
        return int(await self._one("deadline", job_id, block=block_identifier))

    async def is_lost(self, job_id: int, *, block_identifier: BlockIdentifier = LATEST) -> bool:
        """Return whether a RUNNING job is lost: provider silent (lost timeout), or job overdue."""
        return bool(await self._one("isLost", job_id, block=block_identifier))

    async def is_eligible(
        self, job_id: int, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> tuple[bool, str]:
        """Return whether a PENDING job can be assigned to a provider now, or the error's name."""
        eligible, reason = await self._view(
            "isEligible", job_id, provider_id, block=block_identifier
        )
        return bool(eligible), "" if eligible else selector_name(reason)

    async def is_silent(
        self, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> bool:
        """Return whether a provider has an unanswered challenge within the response timeout."""
        return bool(await self._one("isSilent", provider_id, block=block_identifier))

    async def clock_of(
        self, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> Clock:
        """Return a provider's challenge clock."""
        return Clock(*await self._one("clockOf", provider_id, block=block_identifier))

    async def load_of(
        self, provider_id: int, *, block_identifier: BlockIdentifier = LATEST
    ) -> Load:
        """Return the resources that the assigned live jobs of a provider occupy."""
        return Load(*await self._one("loadOf", provider_id, block=block_identifier))

    async def parked_of(self, account: str, *, block_identifier: BlockIdentifier = LATEST) -> int:
        """Return the parked payments of an account in credit-wei, which it can `withdraw`."""
        return int(await self._one("parkedOf", checked_address(account), block=block_identifier))

    async def submissions_open(self, *, block_identifier: BlockIdentifier = LATEST) -> bool:
        """Return whether new jobs are accepted."""
        return bool(await self._one("submissionsOpen", block=block_identifier))

    async def parameters(self, *, block_identifier: BlockIdentifier = LATEST) -> Parameters:
        """Return the timeouts, the fee and the addresses of the deployment."""
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
        """Submit one job per definition digest; the escrow comes from the sender's allowance."""
        return self._call("submitJobs", request_values(requests), label=_submit_label(requests))

    def submit_jobs_with_permit(
        self, requests: Sequence[tuple[Terms, Sequence[bytes]]], permit: Permit
    ) -> Call:
        """Submit jobs as `submit_jobs` does, with a permit in the same transaction."""
        arguments = (request_values(requests), permit.to_tuple())
        return self._call("submitJobsWithPermit", *arguments, label=_submit_label(requests))

    def submitted(self, call: Call) -> Any:
        """Decode the requests of a `submitJobs` call, with or without a permit, for comparison.

        Raises:
            UsageError: The call submits no jobs.
        """
        for name in ("submitJobs", "submitJobsWithPermit"):
            function = self._interface.function(name)
            if call.data[:4] == function.selector:
                return decode_values(function.inputs, call.data[4:])[0]
        raise UsageError(f"{call.label!r} does not submit jobs")

    def cancel(self, job_ids: Sequence[int]) -> Call:
        """Cancel jobs of the sender."""
        return self._batch("cancel", job_ids)

    def top_up(self, job_id: int, customer: str, amount: int) -> Call:
        """Raise the escrow of a live job; `customer` is the job's."""
        label = f"top up job {job_id} by {format_credits(amount)} credits"
        return self._call("topUp", job_id, checked_address(customer), amount, label=label)

    def top_up_with_permit(self, job_id: int, customer: str, amount: int, permit: Permit) -> Call:
        """Top up a job as `top_up` does, with a permit in the same transaction."""
        arguments = (job_id, checked_address(customer), amount, permit.to_tuple())
        label = f"top up job {job_id} by {format_credits(amount)} credits"
        return self._call("topUpWithPermit", *arguments, label=label)

    def withdraw(self, to: str) -> Call:
        """Withdraw the sender's parked payments, which could not be paid out before."""
        return self._call("withdraw", checked_address(to), label="withdraw parked credits")

    # -- scheduler and providers

    def meta_schedule(self, assignments: Mapping[tuple[int, Prices], Sequence[int]]) -> Call:
        """Assign PENDING jobs; for a holder of METASCHEDULER_ROLE.

        Args:
            assignments: Job IDs by provider ID and the prices that the decision was based on; jobs
                are rejected if the provider's prices are higher by now.
        """
        groups = [
            (provider, (prices.cpu, prices.gpu, prices.mem), list(ids))
            for (provider, prices), ids in assignments.items()
        ]
        label = f"assign {plural(sum(len(ids) for *_, ids in groups), 'job')}"
        return self._call("metaSchedule", groups, label=label)

    def self_schedule(self, job_ids: Sequence[int]) -> Call:
        """Assign jobs to the sender that were PENDING for the pending timeout."""
        return self._batch("selfSchedule", job_ids)

    def claim(self, job_ids: Sequence[int]) -> Call:
        """Move jobs from META_SCHEDULED to SCHEDULED; for the assigned provider."""
        return self._batch("claim", job_ids)

    def start(self, job_ids: Sequence[int]) -> Call:
        """Move jobs from SCHEDULED to RUNNING, which starts billing; for the assigned provider."""
        return self._batch("start", job_ids)

    def claim_and_start(self, job_ids: Sequence[int]) -> Call:
        """Move jobs from META_SCHEDULED to RUNNING in one call; for the assigned provider."""
        return self._batch("claimAndStart", job_ids)

    def collect(self, job_ids: Sequence[int]) -> Call:
        """Bill RUNNING jobs up to now; for the assigned provider, if the jobs allow it."""
        return self._batch("collect", job_ids)

    def finish(self, reports: Sequence[Report]) -> Call:
        """End RUNNING jobs and settle them; for the assigned provider."""
        report_values = [
            (
                report.job_id,
                report.seconds_used,
                report.exit_code,
                report.result,
                to_word(report.reason),
            )
            for report in reports
        ]
        return self._call(
            "finish", report_values, label=_label("finish", [values[0] for values in report_values])
        )

    def answer(self) -> Call:
        """Answer a challenge, which stops the sender's challenge clock."""
        return self._call("answer", label="answer a challenge")

    # -- customers, providers and others

    def requeue(self, job_ids: Sequence[int], reason: str = "") -> Call:
        """Move jobs from META_SCHEDULED or SCHEDULED back to PENDING."""
        return self._batch("requeue", job_ids, short(reason))

    def panic(self, job_ids: Sequence[int], reason: str = "") -> Call:
        """Move jobs to PANICKED; for their provider, or for anyone once they are lost."""
        return self._batch("panic", job_ids, short(reason))

    def challenge(self, job_id: int) -> Call:
        """Challenge the provider of an assigned job, which starts its challenge clock."""
        return self._call("challenge", job_id, label=f"challenge the provider of job {job_id}")

    # -- administrator

    def set_fee(self, fee_bps: int) -> Call:
        """Set the fee in basis points for jobs assigned from now on; at most 2,000."""
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
