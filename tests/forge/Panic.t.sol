// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {Vm} from "forge-std/Vm.sol";

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {Job, JobStatus, JobTerms} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

contract PanicTest is GridTest {
    function _panic(address who, uint256 jobId) private {
        vm.prank(who);
        grid.panic(one(jobId), "disk broke");
    }

    function _assertRefundedWhole(uint256 jobId) private view {
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.PANICKED));
        assertEq(grid.getJob(jobId).escrow, 0);
        assertEq(credit.balanceOf(customer(0)), FUNDS);
        assertEq(credit.balanceOf(provider(0)), 0);
        assertEq(credit.balanceOf(address(grid)), 0);
    }

    function test_before_the_run_the_provider_gives_up_and_all_is_refunded() public {
        for (uint8 i = uint8(JobStatus.META_SCHEDULED); i <= uint8(JobStatus.SCHEDULED); ++i) {
            uint256 jobId = jobIn(JobStatus(i), plain());
            uint256 count = grid.jobCount();
            _panic(provider(0), jobId);
            _assertRefundedWhole(jobId);
            assertEq(grid.jobCount(), count);
        }
    }

    function test_before_the_run_anybody_else_is_refused() public {
        uint256 jobId = jobIn(JobStatus.SCHEDULED, plain());
        silence(jobId);
        address[4] memory others = [customer(0), SCHEDULER, STRANGER, ADMIN];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.prank(others[i]);
            refuses(IMetaScheduler.NotAssignedProvider.selector, jobId);
            grid.panic(one(jobId), "");
        }
    }

    function test_a_run_without_retries_is_refunded_whole() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        skip(50);
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobPanicked(jobId, provider(0), "disk broke");
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobSettled(jobId, provider(0), customer(0), 0, 0, 0, AMOUNT);
        _panic(provider(0), jobId);
        _assertRefundedWhole(jobId);
    }

    function test_a_run_that_is_not_lost_belongs_to_its_provider() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        skip(LIMIT + REPORT_GRACE);
        assertFalse(grid.isLost(jobId));
        address[4] memory others = [customer(0), SCHEDULER, STRANGER, ADMIN];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.prank(others[i]);
            refuses(IMetaScheduler.NotLost.selector, jobId);
            grid.panic(one(jobId), "");
        }
    }

    function test_an_overdue_run_is_ended_by_anyone_without_words() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        overdue();
        assertTrue(grid.isLost(jobId));
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobPanicked(jobId, STRANGER, "");
        _panic(STRANGER, jobId);
        _assertRefundedWhole(jobId);
    }

    function test_a_run_of_a_provider_that_is_gone_is_ended_by_anyone_and_the_customer_may_speak()
        public
    {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        lose(jobId);
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobPanicked(jobId, customer(0), "disk broke");
        _panic(customer(0), jobId);
        _assertRefundedWhole(jobId);
    }

    function test_overdue_touches_that_job_alone() public {
        uint256 first = jobIn(JobStatus.RUNNING, plain());
        overdue();
        uint256 second = jobIn(JobStatus.RUNNING, plain());
        assertTrue(grid.isLost(first));
        assertFalse(grid.isLost(second));
        skips(second, JobStatus.RUNNING, IMetaScheduler.NotLost.selector);
        vm.prank(STRANGER);
        grid.panic(pair(second, first), "");
    }

    /// @dev Terms and escrow of any value are carried to the successor.
    function testFuzz_a_job_with_retries_opens_its_successor(
        uint8 retries,
        uint96 extra,
        uint96 added,
        uint8 flags,
        uint8 status,
        bool lost
    ) public {
        retries = uint8(bound(retries, 1, 5));
        extra = uint96(bound(extra, 0, 1e24));
        added = uint96(bound(added, RATE * 60, RATE * 10_000));
        lost = lost && status % 3 == 2;
        uint256 jobId =
            jobIn(JobStatus(2 + status % 3), terms(AMOUNT + extra, LIMIT, 2, retries, flags % 8));
        vm.prank(customer(0));
        grid.topUp(jobId, customer(0), added);
        Job memory before = grid.getJob(jobId);
        if (lost) lose(jobId);
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobRetried(jobId, jobId + 1, before.escrow);
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobTransition(
            jobId + 1, customer(0), address(0), JobStatus.NONE, JobStatus.PENDING
        );
        _panic(lost ? STRANGER : provider(0), jobId);

        Job memory next = grid.getJob(jobId + 1);
        Job memory expected = before;
        expected.status = JobStatus.PENDING;
        expected.since = uint32(vm.getBlockTimestamp());
        expected.providerId = 0;
        expected.retriesLeft = retries - 1;
        expected.rate = 0;
        expected.feeBps = 0;
        expected.flags = flags % 8 | SUCCESSOR;
        expected.retryOf = jobId;
        assertEq(abi.encode(next), abi.encode(expected));
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.PANICKED));
        assertEq(grid.getJob(jobId).escrow, 0);
        assertEq(grid.getJob(jobId).providerId, 1);
        assertEq(credit.balanceOf(address(grid)), next.escrow);
        assertEq(credit.balanceOf(provider(0)), 0);
    }

    function test_a_line_ends_after_its_retries() public {
        for (uint256 i = 3; i < 6; ++i) {
            register(provider(i), prices(1e12));
        }
        uint256 jobId = submit(customer(0), terms(3 * AMOUNT, LIMIT, 2, 5, 0));
        for (uint16 i = 1; i <= 6; ++i) {
            assertEq(grid.getJob(jobId).retriesLeft, 6 - i);
            assign(jobId, i);
            vm.startPrank(provider(i - 1));
            grid.claim(one(jobId));
            grid.start(one(jobId));
            grid.panic(one(jobId), "gone");
            vm.stopPrank();
            if (i < 6) ++jobId;
            assertEq(grid.jobCount(), jobId);
        }
        assertEq(credit.balanceOf(customer(0)), FUNDS);
    }

    function test_closed_submissions_do_not_stop_a_successor() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, retried(1));
        vm.prank(ADMIN);
        grid.setSubmissionsOpen(false);
        _panic(provider(0), jobId);
        assertEq(grid.getJob(jobId + 1).escrow, AMOUNT);
    }

    function test_a_too_long_reason_is_refused() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        vm.prank(provider(0));
        refuses(IMetaScheduler.ReasonTooLong.selector, jobId);
        grid.panic(one(jobId), string(new bytes(257)));
        vm.prank(provider(0));
        grid.panic(one(jobId), string(new bytes(256)));
    }

    function test_other_statuses_are_refused() public {
        refusedByTable(
            provider(0),
            _encode,
            JobStatus.PANICKED,
            bit(JobStatus.META_SCHEDULED) | bit(JobStatus.SCHEDULED) | bit(JobStatus.RUNNING)
        );
    }

    function test_an_empty_batch_is_refused() public {
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.panic(new uint256[](0), "");
    }

    function test_refused_items_are_skipped_and_the_others_applied() public {
        uint256 first = jobIn(JobStatus.RUNNING, retried(1));
        uint256 pending = submit(customer(1), plain());
        uint256 foreign = foreignRun();
        skips(pending, JobStatus.PENDING, IMetaScheduler.InvalidTransition.selector);
        skips(foreign, JobStatus.RUNNING, IMetaScheduler.NotLost.selector);
        skips(first, JobStatus.PANICKED, IMetaScheduler.InvalidTransition.selector);
        vm.prank(provider(0));
        grid.panic(four(pending, foreign, first, first), "gone");
        assertEq(grid.jobCount(), 4);
        assertEq(grid.getJob(4).retryOf, first);
        assertEq(uint8(statusOf(foreign)), uint8(JobStatus.RUNNING));
    }

    function _encode(uint256 jobId) private view returns (bytes memory) {
        return abi.encodeCall(grid.panic, (one(jobId), ""));
    }

    /// @dev Jobs of three customers alternate.
    function test_each_customer_of_a_batch_is_paid_once() public {
        uint256[] memory jobIds = new uint256[](6);
        for (uint256 i = 0; i < 6; ++i) {
            jobIds[i] = submit(customer(i % 3), retried(0));
            assign(jobIds[i], 1);
        }
        vm.recordLogs();
        vm.prank(provider(0));
        grid.panic(jobIds, "gone");
        Vm.Log[] memory logs = vm.getRecordedLogs();
        uint256 transfers;
        for (uint256 i = 0; i < logs.length; ++i) {
            if (logs[i].topics[0] == IERC20.Transfer.selector) ++transfers;
        }
        assertEq(transfers, 3);
        assertEq(credit.balanceOf(customer(0)), FUNDS);
        assertEq(credit.balanceOf(customer(1)), FUNDS);
        assertEq(credit.balanceOf(customer(2)), FUNDS);
    }
}
