// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {
    Assignment,
    Job,
    JobRequest,
    JobStatus,
    JobTerms,
    Report
} from "../../contracts/types/JobTypes.sol";
import {Hardware, Offer, Prices} from "../../contracts/types/ProviderTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice Valid calls by which one party took value from another, each of which worked in protocol version 1.
contract AttacksTest is GridTest {
    uint256 internal constant MANY = 50;

    function _paid(uint256 cost) private pure returns (uint256) {
        return cost - cost / 20;
    }

    /// @dev Jobs of the same terms, one customer.
    function _submitMany(JobTerms memory terms_, uint256 count)
        private
        returns (uint256[] memory ids)
    {
        JobRequest[] memory requests = new JobRequest[](1);
        requests[0] = JobRequest(terms_, new bytes32[](count));
        ids = new uint256[](count);
        for (uint256 i = 0; i < count; ++i) {
            requests[0].definitions[i] = bytes32(i + 1);
            ids[i] = grid.jobCount() + 1 + i;
        }
        vm.prank(customer(0));
        grid.submitJobs(requests);
    }

    // --------------------------------------- one challenge, all revenue of a provider

    function test_one_unanswered_challenge_does_not_void_the_runs_of_a_provider() public {
        uint256[] memory ids = new uint256[](3);
        for (uint256 i = 0; i < 3; ++i) {
            ids[i] = jobIn(JobStatus.RUNNING, terms(20 * AMOUNT, 2000, 2, 0, 0));
        }
        skip(500);
        silence(ids[0]);
        uint256 elapsed = 500 + RESPONSE_TIMEOUT + 1;
        assertTrue(grid.isSilent(1));
        vm.prank(STRANGER);
        refuses(IMetaScheduler.NotLost.selector, ids[0]);
        grid.panic(ids, "");
        // Its customers still pay the time that they used.
        vm.prank(customer(0));
        grid.cancel(ids);
        assertEq(credit.balanceOf(provider(0)), 3 * _paid(elapsed * RATE));
    }

    function test_a_provider_that_works_answers_without_another_transaction() public {
        uint256 running = jobIn(JobStatus.RUNNING, terms(20 * AMOUNT, 2000, 2, 0, 0));
        uint256 next = jobIn(JobStatus.META_SCHEDULED, plain());
        lose(running);
        assertTrue(grid.isLost(running));
        vm.prank(provider(0));
        grid.claim(one(next));
        assertFalse(grid.isLost(running));
        assertFalse(grid.isSilent(1));
    }

    // ----------------------------------------------- one late report, days of revenue

    function test_a_late_report_of_a_long_run_costs_one_interval_and_not_all() public {
        uint24 limit = 10 days;
        uint256 jobId =
            jobIn(JobStatus.RUNNING, terms(uint96(limit * RATE), limit, 2, 0, INTERIM_PAYMENTS));
        uint256 collected;
        for (uint256 day = 1; day < 10; ++day) {
            skip(1 days);
            collected += _paid(1 days * RATE);
            vm.prank(provider(0));
            grid.collect(one(jobId));
        }
        skip(1 days + REPORT_GRACE + 1);
        assertTrue(grid.isLost(jobId));
        vm.prank(customer(0));
        grid.cancel(one(jobId));
        assertEq(credit.balanceOf(provider(0)), collected);
        assertEq(credit.balanceOf(customer(0)), FUNDS - 9 * 1 days * RATE);
    }

    // ------------------------------------------------- one cpu, fifty jobs billed at once

    function test_a_provider_of_one_cpu_is_assigned_one_job_at_a_time() public {
        vm.prank(provider(0));
        registry.setOffer(Offer(1, 256, 0));
        JobTerms memory terms_ = plain();
        (terms_.tasks, terms_.cpusPerTask) = (1, 1);
        uint256[] memory ids = _submitMany(terms_, MANY);
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = assignment(1, ids);
        vm.prank(SCHEDULER);
        grid.metaSchedule(assignments);
        _assertOneLive(ids);
        vm.prank(SCHEDULER);
        refuses(IMetaScheduler.DoesNotFit.selector, ids[1]);
        grid.metaSchedule(_one(ids[1]));
        // The next job can be assigned only after the end of the first.
        vm.prank(provider(0));
        grid.claimAndStart(one(ids[0]));
        skip(10);
        finish(ids[0], 10, 0);
        assign(ids[1], 1);
        _assertOneLive(ids);
    }

    function test_a_provider_of_one_cpu_takes_one_job_after_the_pending_timeout() public {
        vm.prank(provider(0));
        registry.setOffer(Offer(1, 256, 0));
        JobTerms memory terms_ = plain();
        (terms_.tasks, terms_.cpusPerTask) = (1, 1);
        uint256[] memory ids = _submitMany(terms_, MANY);
        skip(PENDING_TIMEOUT);
        vm.prank(provider(0));
        grid.selfSchedule(ids);
        _assertOneLive(ids);
    }

    function _assertOneLive(uint256[] memory ids) private view {
        uint256 live;
        for (uint256 i = 0; i < ids.length; ++i) {
            if (statusOf(ids[i]) == JobStatus.META_SCHEDULED) ++live;
        }
        assertEq(live, 1);
        assertEq(grid.loadOf(1).cpus, 1);
    }

    function _one(uint256 jobId) private pure returns (Assignment[] memory assignments) {
        assignments = new Assignment[](1);
        assignments[0] = assignment(1, one(jobId));
    }

    // --------------------------------------------------- requirements on labels passed by

    function test_a_job_with_requirements_on_labels_is_no_providers_own_choice() public {
        JobTerms memory terms_ = terms(AMOUNT, LIMIT, 2, 0, NO_SELF_SCHEDULING);
        terms_.uses = "gpu.model=h100";
        uint256 jobId = submit(customer(0), terms_);
        skip(PENDING_TIMEOUT);
        vm.prank(provider(0));
        refuses(IMetaScheduler.SelfSchedulingForbidden.selector, jobId);
        grid.selfSchedule(one(jobId));
        skip(365 days - PENDING_TIMEOUT);
        vm.prank(provider(0));
        refuses(IMetaScheduler.SelfSchedulingForbidden.selector, jobId);
        grid.selfSchedule(one(jobId));
        // The scheduler reads labels and may assign the job.
        assign(jobId, 1);
    }

    // ------------------------------------------------------- dust that stretches a limit

    function test_a_strangers_dust_does_not_stretch_a_job_out_of_reach() public {
        // Nearly free: the rate of one minute is a tiny amount.
        vm.prank(provider(0));
        registry.setPrices(Prices(1, 1, 0));
        uint256 jobId = jobIn(JobStatus.META_SCHEDULED, terms(2 * AMOUNT, LIMIT, 2, 0, 0));
        vm.prank(STRANGER);
        grid.topUp(jobId, customer(0), 60_000_000);
        assertEq(grid.getJob(jobId).timeLimit, LIMIT);
        vm.prank(provider(0));
        grid.requeue(one(jobId), "full");
        (bool eligible,) = grid.isEligible(jobId, 2);
        assertTrue(eligible);
        assign(jobId, 2);
    }

    // -------------------------------------- self-scheduled and given up, retries or not

    function test_a_provider_does_not_kill_a_job_that_has_retries() public {
        uint256 jobId = submit(customer(0), retried(1));
        skip(PENDING_TIMEOUT);
        vm.startPrank(provider(0));
        grid.selfSchedule(one(jobId));
        grid.panic(one(jobId), "");
        vm.stopPrank();
        Job memory next = grid.getJob(jobId + 1);
        assertEq(next.retryOf, jobId);
        assertEq(uint8(next.status), uint8(JobStatus.PENDING));
        assertEq(next.escrow, AMOUNT);
        (bool eligible, bytes4 reason) = grid.isEligible(jobId + 1, 1);
        assertFalse(eligible);
        assertEq(reason, IMetaScheduler.ProviderExcluded.selector);
    }

    // ---------------------------------------------- cost of a batch and its customers

    /// @dev Gas is deterministic; this is unoptimized code.
    function test_the_cost_of_a_settlement_grows_linearly_with_its_customers() public {
        register(provider(0), prices(1e12), Hardware(200, 16, 65_536, 0));
        // The first payment fills an empty balance, which costs extra and must not be measured.
        _finishGas(1);
        uint256 alone = _finishGas(1);
        uint256 few = (_finishGas(50) - alone) / 49;
        uint256 many = (_finishGas(200) - alone) / 199;
        assertApproxEqRel(many, few, 0.03e18);
        alone = _panicGas(1);
        few = (_panicGas(50) - alone) / 49;
        many = (_panicGas(200) - alone) / 199;
        assertApproxEqRel(many, few, 0.03e18);
    }

    /// @dev Running jobs, each of another customer.
    function _runs(uint256 count) private returns (uint256[] memory ids) {
        ids = new uint256[](count);
        for (uint256 i = 0; i < count; ++i) {
            address owner = makeAddr(string(abi.encode(grid.jobCount())));
            vm.prank(ADMIN);
            credit.mint(owner, 2 * AMOUNT);
            vm.prank(owner);
            credit.approve(address(grid), type(uint256).max);
            ids[i] = submit(owner, plain());
        }
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = assignment(1, ids);
        vm.prank(SCHEDULER);
        grid.metaSchedule(assignments);
        vm.prank(provider(0));
        grid.claimAndStart(ids);
        skip(10);
    }

    function _finishGas(uint256 count) private returns (uint256 spent) {
        uint256[] memory ids = _runs(count);
        Report[] memory reports = new Report[](count);
        for (uint256 i = 0; i < count; ++i) {
            reports[i] = Report(ids[i], 10, 0, 0, "");
        }
        vm.prank(provider(0));
        spent = gasleft();
        grid.finish(reports);
        spent -= gasleft();
        assertEq(uint8(statusOf(ids[count - 1])), uint8(JobStatus.FINISHED));
    }

    function _panicGas(uint256 count) private returns (uint256 spent) {
        uint256[] memory ids = _runs(count);
        vm.prank(provider(0));
        spent = gasleft();
        grid.panic(ids, "");
        spent -= gasleft();
        assertEq(uint8(statusOf(ids[count - 1])), uint8(JobStatus.PANICKED));
    }

    // --------------------------------------------- prices raised in front of an assignment

    function test_prices_raised_in_front_of_an_assignment_refuse_it() public {
        // Affordable at both prices: the maximum price of the escrow does not protect this customer.
        uint256 jobId = submit(customer(0), terms(50 * AMOUNT, LIMIT, 2, 0, 0));
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = Assignment(1, prices(1e12), one(jobId));
        Prices[3] memory raised = [prices(1e12), prices(1e12), prices(1e12)];
        ++raised[0].cpu;
        ++raised[1].gpu;
        ++raised[2].mem;
        for (uint256 i = 0; i < 3; ++i) {
            vm.prank(provider(0));
            registry.setPrices(raised[i]);
            vm.prank(SCHEDULER);
            refuses(IMetaScheduler.PriceRaised.selector, jobId);
            grid.metaSchedule(assignments);
        }
        // Lower prices are accepted.
        vm.prank(provider(0));
        registry.setPrices(prices(1e11));
        vm.prank(SCHEDULER);
        grid.metaSchedule(assignments);
        assertEq(grid.getJob(jobId).rate, RATE / 10);
    }

    // ------------------------------------------------------- a PENDING job of a lost key

    function test_a_job_that_nobody_takes_is_refunded_by_anyone_in_the_end() public {
        uint256 jobId = submit(customer(0), plain());
        skip(PENDING_EXPIRY - 1);
        vm.prank(STRANGER);
        refuses(IMetaScheduler.NotCustomer.selector, jobId);
        grid.cancel(one(jobId));
        skip(1);
        vm.prank(STRANGER);
        grid.cancel(one(jobId));
        assertEq(credit.balanceOf(customer(0)), FUNDS);
        assertEq(credit.balanceOf(STRANGER), FUNDS);
        assertEq(credit.balanceOf(address(grid)), 0);
    }
}
