// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {Job, JobStatus} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice `claim`, `start` and `claimAndStart`.
contract AdvanceTest is GridTest {
    function test_claim_moves_META_SCHEDULED_to_SCHEDULED() public {
        uint256 jobId = jobIn(JobStatus.META_SCHEDULED, plain());
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobTransition(
            jobId, customer(0), provider(0), JobStatus.META_SCHEDULED, JobStatus.SCHEDULED
        );
        vm.prank(provider(0));
        grid.claim(one(jobId));
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.SCHEDULED));
        assertEq(grid.deadline(jobId), 0);
    }

    function test_start_moves_SCHEDULED_to_RUNNING_and_starts_the_meter() public {
        uint256 jobId = jobIn(JobStatus.SCHEDULED, plain());
        skip(50);
        vm.prank(provider(0));
        grid.start(one(jobId));
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.RUNNING));
        assertEq(grid.getJob(jobId).since, vm.getBlockTimestamp());
        assertEq(grid.deadline(jobId), vm.getBlockTimestamp() + LIMIT);
    }

    function test_claimAndStart_moves_META_SCHEDULED_to_RUNNING_with_both_events() public {
        uint256 first = jobIn(JobStatus.META_SCHEDULED, plain());
        uint256 second = jobIn(JobStatus.META_SCHEDULED, plain());
        skip(50);
        uint256[] memory jobIds = pair(first, second);
        for (uint256 i = 0; i < 2; ++i) {
            vm.expectEmit(address(grid));
            emit IMetaScheduler.JobTransition(
                jobIds[i], customer(0), provider(0), JobStatus.META_SCHEDULED, JobStatus.SCHEDULED
            );
            vm.expectEmit(address(grid));
            emit IMetaScheduler.JobTransition(
                jobIds[i], customer(0), provider(0), JobStatus.SCHEDULED, JobStatus.RUNNING
            );
        }
        Job memory expected = grid.getJob(first);
        expected.status = JobStatus.RUNNING;
        expected.since = uint32(vm.getBlockTimestamp());
        vm.prank(provider(0));
        grid.claimAndStart(jobIds);
        assertEq(abi.encode(grid.getJob(first)), abi.encode(expected));
        assertEq(grid.deadline(first), vm.getBlockTimestamp() + LIMIT);
        assertEq(uint8(statusOf(second)), uint8(JobStatus.RUNNING));
    }

    function test_claimAndStart_refuses_other_statuses() public {
        refusedByTable(
            provider(0), _claimAndStart, JobStatus.SCHEDULED, bit(JobStatus.META_SCHEDULED)
        );
    }

    function test_claimAndStart_refuses_somebody_else() public {
        _refusesOthers(jobIn(JobStatus.META_SCHEDULED, plain()), _claimAndStart);
    }

    function test_late_claims_and_starts_are_valid_until_somebody_requeues() public {
        uint256 jobId = jobIn(JobStatus.META_SCHEDULED, plain());
        skip(CLAIM_TIMEOUT * 2);
        vm.startPrank(provider(0));
        grid.claim(one(jobId));
        skip(CLAIM_TIMEOUT * 2);
        grid.start(one(jobId));
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.RUNNING));
    }

    function test_claim_refuses_other_statuses() public {
        refusedByTable(provider(0), _claim, JobStatus.SCHEDULED, bit(JobStatus.META_SCHEDULED));
    }

    function test_start_refuses_other_statuses() public {
        refusedByTable(provider(0), _start, JobStatus.RUNNING, bit(JobStatus.SCHEDULED));
    }

    function test_claim_refuses_somebody_else() public {
        _refusesOthers(jobIn(JobStatus.META_SCHEDULED, plain()), _claim);
    }

    function test_start_refuses_somebody_else() public {
        _refusesOthers(jobIn(JobStatus.SCHEDULED, plain()), _start);
    }

    function test_empty_batches_are_refused() public {
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.claim(new uint256[](0));
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.start(new uint256[](0));
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.claimAndStart(new uint256[](0));
    }

    function test_refused_items_are_skipped_and_the_others_applied() public {
        uint256 mine = jobIn(JobStatus.META_SCHEDULED, plain());
        uint256 other = submit(customer(1), terms(AMOUNT * 2, LIMIT, 2, 0, 0));
        assign(other, 2);
        skips(other, JobStatus.META_SCHEDULED, IMetaScheduler.NotAssignedProvider.selector);
        skips(mine, JobStatus.SCHEDULED, IMetaScheduler.InvalidTransition.selector);
        skips(99, JobStatus.NONE, IMetaScheduler.InvalidTransition.selector);
        uint256[] memory jobIds = new uint256[](4);
        (jobIds[0], jobIds[1], jobIds[2], jobIds[3]) = (other, mine, mine, 99);
        vm.prank(provider(0));
        grid.claim(jobIds);
        assertEq(uint8(statusOf(mine)), uint8(JobStatus.SCHEDULED));
        assertEq(uint8(statusOf(other)), uint8(JobStatus.META_SCHEDULED));
    }

    function _refusesOthers(uint256 jobId, function(uint256) view returns (bytes memory) encode)
        private
    {
        bytes memory data = encode(jobId);
        address[5] memory others = [customer(0), provider(1), SCHEDULER, ADMIN, STRANGER];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.prank(others[i]);
            (bool done, bytes memory answer) = address(grid).call(data);
            assertFalse(done);
            assertEq(
                answer, abi.encodeWithSelector(IMetaScheduler.NotAssignedProvider.selector, jobId)
            );
        }
    }

    function _claim(uint256 jobId) private view returns (bytes memory) {
        return abi.encodeCall(grid.claim, (one(jobId)));
    }

    function _claimAndStart(uint256 jobId) private view returns (bytes memory) {
        return abi.encodeCall(grid.claimAndStart, (one(jobId)));
    }

    function _start(uint256 jobId) private view returns (bytes memory) {
        return abi.encodeCall(grid.start, (one(jobId)));
    }
}
