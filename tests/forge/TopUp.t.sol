// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {Job, JobStatus, Permit} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice `topUp` and `topUpWithPermit`.
contract TopUpTest is GridTest {
    function _topUp(uint256 jobId, uint96 amount) private {
        vm.prank(customer(0));
        grid.topUp(jobId, customer(0), amount);
    }

    function _gift(uint256 jobId, uint96 amount) private {
        vm.prank(STRANGER);
        grid.topUp(jobId, customer(0), amount);
    }

    function testFuzz_a_PENDING_job_gets_escrow_and_no_time(uint96 amount) public {
        amount = uint96(bound(amount, 1, type(uint96).max - AMOUNT));
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobToppedUp(jobId, STRANGER, amount, AMOUNT + amount, LIMIT);
        _gift(jobId, amount);
        assertEq(grid.getJob(jobId).escrow, AMOUNT + amount);
        assertEq(grid.getJob(jobId).timeLimit, LIMIT);
        assertEq(credit.balanceOf(STRANGER), FUNDS - amount);
        assertEq(credit.balanceOf(address(grid)), AMOUNT + amount);
    }

    function testFuzz_an_assigned_job_gets_the_time_that_it_buys(uint96 amount, uint8 status)
        public
    {
        JobStatus assigned = JobStatus(bound(status, 2, 4));
        amount = uint96(bound(amount, RATE * 60, RATE * (type(uint24).max - LIMIT)));
        uint256 jobId = jobIn(assigned, plain());
        _topUp(jobId, amount);
        Job memory job = grid.getJob(jobId);
        assertEq(job.escrow, AMOUNT + amount);
        assertEq(job.timeLimit, LIMIT + amount / RATE);
        assertGe(job.escrow, RATE * job.timeLimit);
    }

    function testFuzz_a_gift_of_a_stranger_buys_an_assigned_job_no_time(uint96 amount, uint8 status)
        public
    {
        JobStatus assigned = JobStatus(bound(status, 2, 4));
        amount = uint96(bound(amount, RATE * 60, type(uint96).max - AMOUNT));
        uint256 jobId = jobIn(assigned, plain());
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobToppedUp(jobId, STRANGER, amount, AMOUNT + amount, LIMIT);
        _gift(jobId, amount);
        assertEq(grid.getJob(jobId).escrow, AMOUNT + amount);
        assertEq(grid.getJob(jobId).timeLimit, LIMIT);
        assertEq(grid.allotment(jobId), LIMIT);
        assertEq(credit.balanceOf(STRANGER), FUNDS - amount);
    }

    function testFuzz_until_spent_the_allotment_grows_by_itself(uint96 amount) public {
        amount = uint96(bound(amount, RATE * 60, type(uint96).max - AMOUNT));
        uint256 jobId = jobIn(JobStatus.RUNNING, terms(AMOUNT, LIMIT, 2, 0, UNTIL_SPENT));
        _gift(jobId, amount);
        assertEq(grid.getJob(jobId).timeLimit, LIMIT);
        assertEq(grid.allotment(jobId), (uint256(AMOUNT) + amount) / RATE);
    }

    function test_less_than_a_minute_of_the_rate_is_refused() public {
        uint256 jobId = jobIn(JobStatus.META_SCHEDULED, plain());
        vm.expectRevert(
            abi.encodeWithSelector(
                IMetaScheduler.TopUpTooSmall.selector, jobId, RATE * 60 - 1, RATE * 60
            )
        );
        _topUp(jobId, uint96(RATE * 60 - 1));
        _topUp(jobId, uint96(RATE * 60));
    }

    function test_nothing_for_a_PENDING_job_is_refused() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        vm.expectRevert(abi.encodeWithSelector(IMetaScheduler.TopUpTooSmall.selector, jobId, 0, 1));
        _topUp(jobId, 0);
    }

    function test_more_than_the_record_holds_is_refused() public {
        uint256 pending = jobIn(JobStatus.PENDING, plain());
        refuses(IMetaScheduler.TopUpTooLarge.selector, pending);
        _gift(pending, type(uint96).max - AMOUNT + 1);
        uint256 assigned = jobIn(JobStatus.META_SCHEDULED, plain());
        uint96 most = uint96(RATE * (type(uint24).max - LIMIT));
        refuses(IMetaScheduler.TopUpTooLarge.selector, assigned);
        _topUp(assigned, most + uint96(RATE));
        _topUp(assigned, most);
        assertEq(grid.getJob(assigned).timeLimit, type(uint24).max);
    }

    function test_in_the_last_seconds_of_a_run_it_is_refused() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        uint256 end = grid.deadline(jobId);
        vm.warp(end - TOP_UP_NOTICE);
        vm.expectRevert(abi.encodeWithSelector(IMetaScheduler.TopUpTooLate.selector, jobId, end));
        _topUp(jobId, uint96(RATE * 60));
        vm.warp(end + 1);
        vm.expectRevert(abi.encodeWithSelector(IMetaScheduler.TopUpTooLate.selector, jobId, end));
        _topUp(jobId, uint96(RATE * 60));
        vm.warp(end - TOP_UP_NOTICE - 1);
        _topUp(jobId, uint96(RATE * 60));
        assertEq(grid.deadline(jobId), end + 60);
    }

    function test_another_customer_than_named_is_refused() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        vm.prank(STRANGER);
        refuses(IMetaScheduler.NotCustomer.selector, jobId);
        grid.topUp(jobId, customer(1), 1);
    }

    function test_final_or_unknown_jobs_are_refused() public {
        for (uint8 i = 0; i <= uint8(JobStatus.PANICKED); ++i) {
            if (isLive(JobStatus(i))) continue;
            uint256 jobId = jobAt(JobStatus(i));
            vm.expectRevert(
                abi.encodeWithSelector(IMetaScheduler.WrongStatus.selector, jobId, JobStatus(i))
            );
            _topUp(jobId, AMOUNT);
        }
    }

    function test_closed_submissions_do_not_stop_it() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        vm.prank(ADMIN);
        grid.setSubmissionsOpen(false);
        _topUp(jobId, 1);
        assertEq(grid.getJob(jobId).escrow, AMOUNT + 1);
    }

    function test_a_failing_permit_leaves_the_allowance_to_decide() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        vm.prank(STRANGER);
        grid.topUpWithPermit(jobId, customer(0), 5, Permit(5, 0, 27, 0, 0));
        assertEq(grid.getJob(jobId).escrow, AMOUNT + 5);
        vm.prank(address(0xBAD));
        vm.expectRevert();
        grid.topUpWithPermit(jobId, customer(0), 5, Permit(5, 0, 27, 0, 0));
    }

    function test_a_permit_replaces_the_allowance() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        (address owner, Permit memory permit) = signed(5);
        vm.prank(owner);
        grid.topUpWithPermit(jobId, customer(0), 5, permit);
        assertEq(grid.getJob(jobId).escrow, AMOUNT + 5);
    }
}
