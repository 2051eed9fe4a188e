// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {Job, JobStatus, JobTerms, Report} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice `collect`: interim payments of running jobs.
contract CollectTest is GridTest {
    function _flagged(uint96 amount, uint8 flags) private pure returns (JobTerms memory) {
        return terms(amount, LIMIT, 2, 0, INTERIM_PAYMENTS | flags);
    }

    function _run() private returns (uint256) {
        return jobIn(JobStatus.RUNNING, _flagged(AMOUNT, 0));
    }

    function _collect(uint256 jobId) private {
        vm.prank(provider(0));
        grid.collect(one(jobId));
    }

    function _refused(uint256 jobId, bytes4 reason) private {
        vm.prank(provider(0));
        refuses(reason, jobId);
        grid.collect(one(jobId));
    }

    function _paid(uint256 cost) private pure returns (uint256) {
        return cost - cost / 20;
    }

    function test_it_bills_the_elapsed_seconds_and_the_run_goes_on() public {
        uint256 jobId = _run();
        uint256 end = grid.deadline(jobId);
        skip(40);
        uint256 cost = 40 * RATE;
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobCollected(
            jobId, provider(0), customer(0), 40, _paid(cost), cost / 20, AMOUNT - cost, LIMIT - 40
        );
        _collect(jobId);
        Job memory job = grid.getJob(jobId);
        assertEq(uint8(job.status), uint8(JobStatus.RUNNING));
        assertEq(job.since, vm.getBlockTimestamp());
        assertEq(job.escrow, AMOUNT - cost);
        assertEq(job.timeLimit, LIMIT - 40);
        assertEq(job.rate, RATE);
        assertEq(job.feeBps, 500);
        assertEq(job.providerId, 1);
        assertEq(grid.deadline(jobId), end);
        assertEq(credit.balanceOf(provider(0)), _paid(cost));
        assertEq(credit.balanceOf(TREASURY), cost / 20);
        assertEq(credit.balanceOf(customer(0)), FUNDS - AMOUNT);
        assertEq(credit.balanceOf(address(grid)), AMOUNT - cost);
        assertEq(grid.loadOf(1).cpus, 4);
    }

    struct Case {
        uint96 extra;
        uint24 limit;
        uint32 first;
        uint32 second;
        uint32 rest;
        uint16 fee;
        bool untilSpent;
        bool cancelled;
    }

    /// @dev Interim payments and the settlement together bill the same as one settlement.
    function testFuzz_payments_on_the_way_add_up_to_the_bill_of_the_whole_run(Case memory c)
        public
    {
        c.limit = uint24(bound(c.limit, 4 * COLLECT_INTERVAL, 1_000_000));
        c.extra = uint96(bound(c.extra, 0, 1e22));
        c.fee = uint16(bound(c.fee, 0, 2000));
        vm.prank(ADMIN);
        grid.setFee(c.fee);
        uint256 funded = RATE * c.limit + c.extra;
        JobTerms memory terms_ = _flagged(uint96(funded), spend(c.untilSpent));
        terms_.timeLimit = c.limit;
        uint256 jobId = jobIn(JobStatus.RUNNING, terms_);
        uint256 began = vm.getBlockTimestamp();
        uint256 allotted = grid.allotment(jobId);
        uint256 end = grid.deadline(jobId);
        c.first = uint32(bound(c.first, COLLECT_INTERVAL, allotted / 2 - 1));
        c.second = uint32(bound(c.second, COLLECT_INTERVAL, allotted / 2 - 1));
        skip(c.first);
        _collect(jobId);
        skip(c.second);
        _collect(jobId);
        assertEq(grid.deadline(jobId), end);
        c.rest = uint32(bound(c.rest, 0, end - vm.getBlockTimestamp() + REPORT_GRACE));
        skip(c.rest);
        if (c.cancelled) {
            vm.prank(customer(0));
            grid.cancel(one(jobId));
        } else {
            finish(jobId, type(uint32).max, 0);
        }
        uint256 elapsed = vm.getBlockTimestamp() - began;
        uint256 cost = RATE * (elapsed < allotted ? elapsed : allotted);
        assertEq(credit.balanceOf(customer(0)), FUNDS - cost);
        assertEq(credit.balanceOf(provider(0)) + credit.balanceOf(TREASURY), cost);
        // Each of three bills rounds its fee down.
        uint256 fee = cost * c.fee / 10_000;
        assertLe(credit.balanceOf(TREASURY), fee);
        assertLe(fee, credit.balanceOf(TREASURY) + 2);
        assertEq(credit.balanceOf(address(grid)), 0);
        if (!c.cancelled && elapsed >= allotted) {
            assertEq(uint8(statusOf(jobId)), uint8(JobStatus.OUT_OF_CREDITS));
        }
    }

    function test_the_limit_of_a_job_until_spent_keeps_the_price_ceiling() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, _flagged(4 * AMOUNT, UNTIL_SPENT));
        uint256 end = grid.deadline(jobId);
        // Beyond its limit: such a job continues.
        skip(300);
        _collect(jobId);
        Job memory job = grid.getJob(jobId);
        uint256 left = 4 * uint256(AMOUNT) - 300 * RATE;
        assertEq(job.escrow, left);
        assertEq(job.timeLimit, LIMIT * left / (4 * uint256(AMOUNT)));
        assertEq(grid.deadline(jobId), end);
        // The same maximum price per second as before; rounding loses at most the price of one second.
        assertGe(left / job.timeLimit, 4 * uint256(AMOUNT) / LIMIT);
        assertLt(left / (job.timeLimit + 1), 4 * uint256(AMOUNT) / LIMIT);
    }

    function test_the_limit_of_a_job_until_spent_never_becomes_zero() public {
        JobTerms memory terms_ = _flagged(AMOUNT, UNTIL_SPENT);
        terms_.timeLimit = 1;
        uint256 jobId = jobIn(JobStatus.RUNNING, terms_);
        skip(100);
        _collect(jobId);
        assertEq(grid.getJob(jobId).timeLimit, 1);
    }

    function test_without_the_flag_it_is_refused() public {
        for (uint8 flags = 0; flags < 4; ++flags) {
            uint256 jobId = jobIn(JobStatus.RUNNING, terms(AMOUNT, LIMIT, 2, 0, flags));
            skip(COLLECT_INTERVAL);
            _refused(jobId, IMetaScheduler.InterimPaymentsForbidden.selector);
        }
    }

    function test_within_the_interval_it_is_refused() public {
        uint256 jobId = _run();
        skip(COLLECT_INTERVAL - 1);
        _refused(jobId, IMetaScheduler.TooEarly.selector);
        skip(1);
        _collect(jobId);
        skip(COLLECT_INTERVAL - 1);
        _refused(jobId, IMetaScheduler.TooEarly.selector);
        skip(1);
        _collect(jobId);
        assertEq(credit.balanceOf(provider(0)), _paid(2 * COLLECT_INTERVAL * RATE));
    }

    function test_once_the_allotment_is_used_up_only_the_end_is_billed() public {
        uint256 jobId = _run();
        skip(LIMIT);
        _refused(jobId, IMetaScheduler.AllotmentUsedUp.selector);
        skip(REPORT_GRACE + 1);
        _refused(jobId, IMetaScheduler.AllotmentUsedUp.selector);
        uint256 second = _run();
        skip(LIMIT - 1);
        _collect(second);
        assertEq(grid.getJob(second).timeLimit, 1);
        skip(1);
        finish(second, type(uint32).max, 0);
        assertEq(uint8(statusOf(second)), uint8(JobStatus.OUT_OF_CREDITS));
    }

    function test_a_lost_run_is_refused_and_a_silent_providers_is_not() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, _flagged(100 * AMOUNT, UNTIL_SPENT));
        silence(jobId);
        assertTrue(grid.isSilent(1));
        _collect(jobId);
        skip(RESPONSE_TIMEOUT);
        lose(jobId);
        assertTrue(grid.isLost(jobId));
        _refused(jobId, IMetaScheduler.RunLost.selector);
        vm.prank(provider(0));
        grid.answer();
        _collect(jobId);
    }

    function test_other_statuses_are_refused() public {
        refusedByTable(provider(0), _encode, JobStatus.RUNNING, bit(JobStatus.RUNNING));
    }

    function test_somebody_else_is_refused() public {
        uint256 jobId = _run();
        skip(COLLECT_INTERVAL);
        address[5] memory others = [customer(0), provider(1), SCHEDULER, ADMIN, STRANGER];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.prank(others[i]);
            refuses(IMetaScheduler.NotAssignedProvider.selector, jobId);
            grid.collect(one(jobId));
        }
    }

    /// @dev The provider keeps collected payments; the rest is refunded or carried to the successor.
    function test_a_lost_run_keeps_its_interim_payments_and_nothing_more() public {
        uint256 plainRun = _run();
        uint256 retriedRun = jobIn(JobStatus.RUNNING, terms(AMOUNT, LIMIT, 2, 1, INTERIM_PAYMENTS));
        skip(40);
        vm.prank(provider(0));
        grid.collect(pair(plainRun, retriedRun));
        uint256 cost = 40 * RATE;
        skip(20);
        vm.prank(provider(0));
        grid.panic(pair(plainRun, retriedRun), "gone");
        assertEq(credit.balanceOf(provider(0)), 2 * _paid(cost));
        assertEq(credit.balanceOf(customer(0)), FUNDS - AMOUNT - cost);
        Job memory next = grid.getJob(retriedRun + 1);
        assertEq(next.escrow, AMOUNT - cost);
        assertEq(next.timeLimit, LIMIT - 40);
        assertEq(next.flags, INTERIM_PAYMENTS | SUCCESSOR);
        assertEq(credit.balanceOf(address(grid)), AMOUNT - cost);
        assertEq(grid.getJob(plainRun).escrow, 0);
    }

    function test_an_empty_batch_is_refused() public {
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.collect(new uint256[](0));
    }

    function test_refused_items_are_skipped_and_the_others_are_paid_in_one_sum() public {
        uint256 first = _run();
        uint256 unflagged = jobIn(JobStatus.RUNNING, plain());
        uint256 second = _run();
        uint256 foreign = foreignRun();
        skip(40);
        skips(unflagged, JobStatus.RUNNING, IMetaScheduler.InterimPaymentsForbidden.selector);
        skips(foreign, JobStatus.RUNNING, IMetaScheduler.NotAssignedProvider.selector);
        skips(first, JobStatus.RUNNING, IMetaScheduler.TooEarly.selector);
        skips(99, JobStatus.NONE, IMetaScheduler.InvalidTransition.selector);
        uint256 cost = 80 * RATE;
        vm.expectCall(
            address(credit), abi.encodeCall(credit.transfer, (provider(0), _paid(cost))), 1
        );
        vm.expectCall(address(credit), abi.encodeCall(credit.transfer, (TREASURY, cost / 20)), 1);
        vm.expectCall(address(credit), abi.encodePacked(credit.transfer.selector), 2);
        uint256[] memory jobIds = new uint256[](6);
        (jobIds[0], jobIds[1], jobIds[2]) = (first, unflagged, second);
        (jobIds[3], jobIds[4], jobIds[5]) = (foreign, first, 99);
        vm.prank(provider(0));
        grid.collect(jobIds);
        assertEq(grid.getJob(first).escrow, AMOUNT - 40 * RATE);
        assertEq(grid.getJob(second).escrow, AMOUNT - 40 * RATE);
        assertEq(grid.getJob(unflagged).escrow, AMOUNT);
        assertEq(grid.getJob(foreign).escrow, 2 * AMOUNT);
    }

    function _encode(uint256 jobId) private view returns (bytes memory) {
        return abi.encodeCall(grid.collect, (one(jobId)));
    }
}
