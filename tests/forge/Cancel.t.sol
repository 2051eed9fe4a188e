// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {Job, JobStatus} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

contract CancelTest is GridTest {
    function _cancel(uint256[] memory jobIds) private {
        vm.prank(customer(0));
        grid.cancel(jobIds);
    }

    function _assertRefundedWhole(uint256 jobId) private view {
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.CANCELLED));
        assertEq(grid.getJob(jobId).escrow, 0);
        assertEq(credit.balanceOf(customer(0)), FUNDS);
        assertEq(credit.balanceOf(address(grid)), 0);
        assertEq(credit.balanceOf(provider(0)), 0);
    }

    function test_before_the_run_everything_is_refunded() public {
        for (uint8 i = uint8(JobStatus.PENDING); i <= uint8(JobStatus.SCHEDULED); ++i) {
            uint256 jobId = jobAt(JobStatus(i));
            skip(10);
            _cancel(one(jobId));
            _assertRefundedWhole(jobId);
        }
    }

    function testFuzz_a_run_pays_the_time_that_passed(uint32 elapsed, uint16 fee, bool untilSpent)
        public
    {
        elapsed = uint32(bound(elapsed, 0, LIMIT + REPORT_GRACE));
        fee = uint16(bound(fee, 0, 2000));
        vm.prank(ADMIN);
        grid.setFee(fee);
        uint256 jobId = jobIn(JobStatus.RUNNING, terms(AMOUNT, LIMIT, 2, 0, spend(untilSpent)));
        skip(elapsed);
        _cancel(one(jobId));
        uint256 allotted = untilSpent ? AMOUNT / RATE : LIMIT;
        uint256 cost = RATE * (elapsed < allotted ? elapsed : allotted);
        uint256 toTreasury = cost * fee / 10_000;
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.CANCELLED));
        assertEq(grid.getJob(jobId).escrow, cost);
        assertEq(credit.balanceOf(provider(0)), cost - toTreasury);
        assertEq(credit.balanceOf(TREASURY), toTreasury);
        assertEq(credit.balanceOf(customer(0)), FUNDS - cost);
        assertEq(credit.balanceOf(address(grid)), 0);
    }

    function test_a_run_whose_provider_is_gone_is_refunded_whole() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        lose(jobId);
        _cancel(one(jobId));
        _assertRefundedWhole(jobId);
    }

    function test_an_overdue_run_is_refunded_whole() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        overdue();
        _cancel(one(jobId));
        _assertRefundedWhole(jobId);
    }

    function test_a_run_in_its_last_second_of_grace_is_paid() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        skip(LIMIT + REPORT_GRACE);
        _cancel(one(jobId));
        assertEq(grid.getJob(jobId).escrow, RATE * LIMIT);
    }

    function test_final_or_unknown_jobs_are_refused() public {
        refusedByTable(customer(0), _encode, JobStatus.CANCELLED, 0x1e);
    }

    function test_somebody_else_is_refused() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        address[4] memory others = [customer(1), provider(0), SCHEDULER, ADMIN];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.prank(others[i]);
            refuses(IMetaScheduler.NotCustomer.selector, jobId);
            grid.cancel(one(jobId));
        }
    }

    /// @dev Only PENDING jobs expire, and a requeue restarts the time.
    function test_before_the_expiry_or_in_another_status_a_stranger_is_refused() public {
        uint256[] memory jobIds = new uint256[](4);
        for (uint8 i = 0; i < 4; ++i) {
            jobIds[i] = jobIn(JobStatus(1 + i), plain());
        }
        skip(PENDING_EXPIRY);
        vm.prank(provider(0));
        grid.requeue(one(jobIds[1]), "");
        for (uint256 i = 1; i < 4; ++i) {
            vm.prank(STRANGER);
            refuses(IMetaScheduler.NotCustomer.selector, jobIds[i]);
            grid.cancel(one(jobIds[i]));
        }
        skip(PENDING_EXPIRY);
        vm.prank(STRANGER);
        grid.cancel(jobIds);
        assertEq(uint8(statusOf(jobIds[0])), uint8(JobStatus.CANCELLED));
        assertEq(uint8(statusOf(jobIds[1])), uint8(JobStatus.CANCELLED));
        assertEq(uint8(statusOf(jobIds[2])), uint8(JobStatus.SCHEDULED));
        assertEq(uint8(statusOf(jobIds[3])), uint8(JobStatus.RUNNING));
    }

    function test_expired_jobs_of_several_customers_are_each_refunded_once() public {
        uint256[] memory jobIds = new uint256[](6);
        for (uint256 i = 0; i < 6; ++i) {
            jobIds[i] = submit(customer(i % 3), plain());
        }
        skip(PENDING_EXPIRY);
        for (uint256 i = 0; i < 3; ++i) {
            vm.expectCall(
                address(credit), abi.encodeCall(credit.transfer, (customer(i), 2 * AMOUNT)), 1
            );
        }
        // One of the customers calls: its own refund and the others'.
        vm.prank(customer(1));
        grid.cancel(jobIds);
        for (uint256 i = 0; i < 3; ++i) {
            assertEq(credit.balanceOf(customer(i)), FUNDS);
        }
    }

    function test_an_empty_batch_is_refused() public {
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        _cancel(new uint256[](0));
    }

    function test_refused_items_are_skipped_and_the_others_applied() public {
        uint256 mine = jobIn(JobStatus.SCHEDULED, plain());
        uint256 other = submit(customer(1), plain());
        skips(other, JobStatus.PENDING, IMetaScheduler.NotCustomer.selector);
        skips(mine, JobStatus.CANCELLED, IMetaScheduler.InvalidTransition.selector);
        _cancel(triple(other, mine, mine));
        assertEq(uint8(statusOf(mine)), uint8(JobStatus.CANCELLED));
        assertEq(uint8(statusOf(other)), uint8(JobStatus.PENDING));
        assertEq(credit.balanceOf(customer(0)), FUNDS);
    }

    function test_nothing_applied_reverts_with_the_first_reason() public {
        uint256 other = submit(customer(1), plain());
        refuses(IMetaScheduler.NotCustomer.selector, other);
        _cancel(pair(other, 99));
    }

    function test_each_recipient_is_paid_once() public {
        uint256 first = jobIn(JobStatus.RUNNING, plain());
        uint256 second = foreignRunOf(customer(0));
        uint256 third = jobIn(JobStatus.RUNNING, plain());
        uint256 fourth = foreignRunOf(customer(0));
        skip(10);
        uint256 cost = 10 * RATE;
        vm.expectCall(
            address(credit),
            abi.encodeCall(credit.transfer, (provider(0), 2 * (cost - cost / 20))),
            1
        );
        vm.expectCall(
            address(credit),
            abi.encodeCall(credit.transfer, (provider(1), 4 * (cost - cost / 20))),
            1
        );
        vm.expectCall(
            address(credit), abi.encodeCall(credit.transfer, (TREASURY, 6 * (cost / 20))), 1
        );
        _cancel(four(first, second, third, fourth));
    }

    function test_nobody_is_sent_nothing() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        vm.expectCall(address(credit), abi.encodePacked(credit.transfer.selector), 1);
        _cancel(one(jobId));
        _assertRefundedWhole(jobId);
    }

    function _encode(uint256 jobId) private view returns (bytes memory) {
        return abi.encodeCall(grid.cancel, (one(jobId)));
    }
}
