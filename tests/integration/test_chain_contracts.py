"""Views, calls and typed refusals of the contracts, on both nodes."""

from __future__ import annotations

import pytest

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.contracts import UNLIMITED
from deepsquare_chain.chain.bindings.events import (
    Approval,
    JobPriced,
    JobResult,
    JobSettled,
    JobToppedUp,
    JobTransition,
    Transfer,
    TransitionSkipped,
)
from deepsquare_chain.chain.bindings.records import Report
from deepsquare_chain.chain.deploying import role_holders, verify_deployment
from deepsquare_chain.chain.rpc.pool import chain_time
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import (
    InsufficientFundsError,
    NotAuthorisedError,
    NotFoundError,
    RevertedError,
)
from deepsquare_chain.job import JobStatus, Offer, ProviderStatus
from tests.support.livegrid import CHEAP, HARDWARE, LiveGrid, digest, terms


async def test_a_whole_life(grid: LiveGrid) -> None:
    scheduler, credit = grid.contracts.scheduler, grid.contracts.credit
    customer, provider = grid.customers[0], grid.providers[0]
    before = await credit.balance_of(customer.address)
    (job_id,) = await grid.submit(name="life", uses="place=p0")
    assert await credit.balance_of(customer.address) == before - CREDIT
    job = await scheduler.get_job(job_id)
    assert (job.status, job.customer, job.escrow) == (JobStatus.PENDING, customer.address, CREDIT)
    assert job.definition == digest("{'name': 'life', 'uses': 'place=p0'} 0")
    assert await scheduler.is_eligible(job_id, 1) == (True, "")
    await grid.run([job_id])
    job = await scheduler.get_job(job_id)
    assert job.rate == CHEAP.cpu + 100 * CHEAP.mem
    assert await scheduler.allotment(job_id) == 60
    assert await scheduler.deadline(job_id) == job.since + 60
    assert not await scheduler.is_lost(job_id)
    receipt = await grid.send(
        provider, scheduler.finish([Report(job_id, 5, 3, digest("out"), "exited with é")])
    )
    kinds = {type(event): event for event in receipt.events}
    assert kinds[JobTransition].after is JobStatus.FAILED
    assert (kinds[JobResult].exit_code, kinds[JobResult].reason) == (3, "exited with é")
    settled = kinds[JobSettled]
    assert settled.paid + settled.fee + settled.refunded == CREDIT
    assert sum(e.amount for e in receipt.events if isinstance(e, Transfer)) == CREDIT
    assert (await scheduler.get_job(job_id)).escrow == settled.paid + settled.fee


async def test_records_are_returned_in_order_with_none_for_unknown_jobs(grid: LiveGrid) -> None:
    ids = await grid.submit(count=3)
    jobs = await grid.contracts.scheduler.get_jobs([*reversed(ids), 10**9])
    assert [job.id for job in jobs] == [*reversed(ids), 10**9]
    assert [job.status for job in jobs] == [JobStatus.PENDING] * 3 + [JobStatus.NONE]
    assert await grid.contracts.scheduler.job_count() >= ids[-1]
    with pytest.raises(NotFoundError, match="Job 1000000000 does not exist"):
        await grid.contracts.scheduler.get_job(10**9)


async def test_providers(grid: LiveGrid) -> None:
    registry = grid.contracts.registry
    first, second = (await registry.providers())[:2]
    assert (first.id, first.account, first.labels) == (
        1,
        grid.providers[0].address,
        {"place": "p0"},
    )
    assert (first.hardware, first.prices) == (HARDWARE, CHEAP)
    assert first.status is ProviderStatus.ACTIVE
    assert first.approved_until > await chain_time(grid.w3)
    assert first.offer == Offer(cpus=64, memory=256_000, gpus=8)
    assert await registry.provider_of(grid.providers[1].address) == second
    assert await registry.get_provider(60_000) is None
    assert await registry.find(grid.stranger.address) is None
    with pytest.raises(NotFoundError, match="not registered"):
        await registry.provider_of(grid.stranger.address)


async def test_a_view_of_the_past(grid: LiveGrid) -> None:
    before = await grid.w3.eth.block_number
    count = await grid.contracts.scheduler.job_count()
    await grid.submit()
    assert await grid.contracts.scheduler.job_count() == count + 1
    assert await grid.contracts.scheduler.job_count(block=before) == count


async def test_permit_instead_of_an_allowance(grid: LiveGrid) -> None:
    credit, scheduler = grid.contracts.credit, grid.contracts.scheduler
    owner = grid.stranger
    await grid.send(grid.admin, credit.mint(owner.address, 3 * CREDIT))
    deadline = await chain_time(grid.w3) + 3_600
    permit = await credit.sign_permit(owner, scheduler.address, CREDIT, deadline)
    call = scheduler.submit_jobs_with_permit([(terms(), [digest("permit")])], permit)
    receipt = await grid.send(owner, call)
    assert any(isinstance(event, Approval) for event in receipt.events)
    (job_id,) = {event.job_id for event in receipt.events if isinstance(event, JobTransition)}
    permit = await credit.sign_permit(owner, scheduler.address, CREDIT, deadline)
    call = scheduler.top_up_with_permit(job_id, owner.address, CREDIT, permit)
    receipt = await grid.send(owner, call)
    (topped,) = (event for event in receipt.events if isinstance(event, JobToppedUp))
    assert (topped.payer, topped.escrow) == (owner.address, 2 * CREDIT)
    await grid.send(owner, scheduler.cancel([job_id]))
    await grid.send(owner, credit.transfer(grid.admin.address, 3 * CREDIT))


async def test_refusals_are_typed(grid: LiveGrid) -> None:
    scheduler, registry = grid.contracts.scheduler, grid.contracts.registry
    (job_id,) = await grid.submit()
    with pytest.raises(reverts.InvalidTransition) as error_info:
        await grid.send(grid.providers[0], scheduler.start([job_id]))
    assert error_info.value.job_id == job_id
    assert error_info.value.exit_code == 6
    with pytest.raises(reverts.NotCustomer, match=f"Job {job_id} belongs to another"):
        await grid.send(grid.customers[1], scheduler.cancel([job_id]))
    with pytest.raises(NotAuthorisedError) as role:
        await grid.send(grid.stranger, scheduler.meta_schedule({(1, CHEAP): [job_id]}))
    assert isinstance(role.value, RevertedError)
    assert role.value.exit_code == 8
    with pytest.raises(InsufficientFundsError, match="has 0 credits"):
        await grid.send(grid.stranger, grid.contracts.credit.transfer(grid.admin.address, 1))
    with pytest.raises(reverts.InvalidTerms, match="timeLimit"):
        await grid.submit(time_limit=0)
    with pytest.raises(reverts.EmptyBatch):
        await grid.send(grid.customers[0], scheduler.cancel([]))
    with pytest.raises(reverts.NotRegistered):
        await grid.send(grid.stranger, registry.set_offer(Offer(1, 1, 1)))
    await grid.assign({1: [job_id]})
    with pytest.raises(reverts.ReasonTooLong):
        await grid.send(grid.providers[0], scheduler._call("panic", [job_id], "x" * 257))


async def test_a_batch_skips_jobs_that_have_changed(grid: LiveGrid) -> None:
    scheduler = grid.contracts.scheduler
    ids = await grid.submit(count=3)
    await grid.send(grid.customers[0], scheduler.cancel([ids[1]]))
    receipt = await grid.assign({1: ids})
    (skipped,) = (event for event in receipt.events if isinstance(event, TransitionSkipped))
    assert (skipped.job_id, skipped.status) == (ids[1], JobStatus.CANCELLED)
    assert skipped.reason_name == "InvalidTransition"
    assert len([event for event in receipt.events if isinstance(event, JobPriced)]) == 2


async def test_why_a_provider_is_not_eligible(grid: LiveGrid) -> None:
    (underfunded,) = await grid.submit(amount=1)
    assert await grid.contracts.scheduler.is_eligible(underfunded, 1) == (False, "OverBudget")
    assert await grid.contracts.scheduler.is_eligible(underfunded, 9) == (
        False,
        "ProviderNotActive",
    )


async def test_parameters_and_clocks(grid: LiveGrid) -> None:
    scheduler = grid.contracts.scheduler
    parameters = await scheduler.parameters()
    assert (parameters.claim_timeout, parameters.report_grace, parameters.fee_bps) == (
        10,
        3_600,
        500,
    )
    assert parameters.submissions_open
    assert (parameters.credit, parameters.registry) == grid.deployment.addresses[:2]
    assert parameters.treasury == grid.deployment.treasury
    assert (await scheduler.clock_of(9)).challenged_at == 0
    assert not await scheduler.is_silent(1)
    assert await scheduler.parked_of(grid.stranger.address) == 0


async def test_the_administrator(grid: LiveGrid) -> None:
    scheduler = grid.contracts.scheduler
    await grid.send(grid.admin, scheduler.set_submissions_open(False))
    with pytest.raises(reverts.SubmissionsClosed, match="does not accept new jobs"):
        await grid.submit()
    await grid.send(grid.admin, scheduler.set_submissions_open(True))
    with pytest.raises(reverts.OutOfBounds, match="feeBps is 2001, allowed are 0 to 2000"):
        await grid.send(grid.admin, scheduler.set_fee(2_001))
    assert (await scheduler.parameters()).submissions_open


async def test_a_deployment_verifies(grid: LiveGrid) -> None:
    findings = await verify_deployment(grid.w3, grid.deployment)
    assert [finding for finding in findings if not finding.ok] == []
    assert len(findings) >= 15
    holders = await role_holders(grid.w3, grid.deployment)
    granted = {
        (address, account)
        for address, roles in holders.items()
        for accounts in roles.values()
        for account in accounts
    }
    assert (grid.deployment.scheduler, grid.scheduler.address) in granted
    assert (grid.deployment.scheduler, grid.stranger.address) not in granted


async def test_an_allowance(grid: LiveGrid) -> None:
    credit, scheduler = grid.contracts.credit, grid.contracts.scheduler
    granted = await credit.allowance(grid.customers[0].address, scheduler.address)
    assert granted == UNLIMITED
    assert await credit.total_supply() >= 20_000 * CREDIT
