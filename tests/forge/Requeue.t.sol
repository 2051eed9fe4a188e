// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {Job, JobStatus} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

contract RequeueTest is GridTest {
    function _requeue(address who, uint256 jobId) private {
        vm.prank(who);
        grid.requeue(one(jobId), "full");
    }

    function _assertPending(uint256 jobId) private view {
        Job memory job = grid.getJob(jobId);
        assertEq(uint8(job.status), uint8(JobStatus.PENDING));
        assertEq(job.providerId, 0);
        assertEq(job.rate, 0);
        assertEq(job.feeBps, 0);
        assertEq(job.escrow, AMOUNT);
        assertEq(job.since, vm.getBlockTimestamp());
        assertTrue(grid.isBarred(jobId, 1));
        assertEq(grid.allotment(jobId), 0);
    }

    function _told(address by, uint256 jobId, string memory reason) private {
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobRequeued(jobId, by, reason);
        _requeue(by, jobId);
        _assertPending(jobId);
    }

    function test_the_provider_refuses_at_any_time() public {
        _told(provider(0), jobIn(JobStatus.META_SCHEDULED, plain()), "full");
        _told(provider(0), jobIn(JobStatus.SCHEDULED, plain()), "full");
    }

    function test_META_SCHEDULED_anyone_after_the_claim_timeout() public {
        uint256 jobId = jobIn(JobStatus.META_SCHEDULED, plain());
        address[3] memory all = [STRANGER, customer(0), SCHEDULER];
        skip(CLAIM_TIMEOUT);
        for (uint256 i = 0; i < all.length; ++i) {
            vm.prank(all[i]);
            refuses(IMetaScheduler.TooEarly.selector, jobId);
            grid.requeue(one(jobId), "full");
        }
        skip(1);
        _told(STRANGER, jobId, "");
    }

    function test_META_SCHEDULED_silence_or_a_ban_is_no_reason_by_itself() public {
        uint256 jobId = jobIn(JobStatus.META_SCHEDULED, plain());
        silence(jobId);
        vm.prank(ADMIN);
        registry.ban(provider(0), "test");
        vm.prank(SCHEDULER);
        refuses(IMetaScheduler.TooEarly.selector, jobId);
        grid.requeue(one(jobId), "");
    }

    function test_SCHEDULED_customer_and_scheduler_after_the_claim_timeout() public {
        address[2] memory parties = [customer(0), SCHEDULER];
        for (uint256 i = 0; i < parties.length; ++i) {
            uint256 jobId = jobIn(JobStatus.SCHEDULED, plain());
            skip(CLAIM_TIMEOUT);
            vm.prank(parties[i]);
            refuses(IMetaScheduler.TooEarly.selector, jobId);
            grid.requeue(one(jobId), "");
            skip(1);
            _told(parties[i], jobId, i == 0 ? "full" : "");
        }
    }

    function test_SCHEDULED_strangers_never_while_the_provider_lives() public {
        uint256 jobId = jobIn(JobStatus.SCHEDULED, plain());
        skip(100 days);
        address[3] memory others = [STRANGER, customer(1), provider(1)];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.prank(others[i]);
            refuses(IMetaScheduler.TooEarly.selector, jobId);
            grid.requeue(one(jobId), "");
        }
    }

    function test_SCHEDULED_anyone_once_the_provider_is_silent() public {
        uint256 jobId = jobIn(JobStatus.SCHEDULED, plain());
        silence(jobId);
        _told(STRANGER, jobId, "");
    }

    function test_SCHEDULED_anyone_once_the_provider_is_banned() public {
        uint256 jobId = jobIn(JobStatus.SCHEDULED, plain());
        vm.prank(ADMIN);
        registry.ban(provider(0), "test");
        _told(STRANGER, jobId, "");
    }

    function test_a_too_long_reason_is_refused() public {
        uint256 jobId = jobIn(JobStatus.SCHEDULED, plain());
        vm.prank(provider(0));
        refuses(IMetaScheduler.ReasonTooLong.selector, jobId);
        grid.requeue(one(jobId), string(new bytes(257)));
        vm.prank(provider(0));
        grid.requeue(one(jobId), string(new bytes(256)));
    }

    function test_other_statuses_are_refused() public {
        refusedByTable(
            provider(0),
            _encode,
            JobStatus.PENDING,
            bit(JobStatus.META_SCHEDULED) | bit(JobStatus.SCHEDULED)
        );
    }

    function test_an_empty_batch_is_refused() public {
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.requeue(new uint256[](0), "");
    }

    function test_refused_items_are_skipped_and_the_others_applied() public {
        uint256 first = jobIn(JobStatus.SCHEDULED, plain());
        uint256 running = jobIn(JobStatus.RUNNING, plain());
        uint256 foreign = submit(customer(1), terms(2 * AMOUNT, LIMIT, 2, 0, 0));
        assign(foreign, 2);
        skips(running, JobStatus.RUNNING, IMetaScheduler.InvalidTransition.selector);
        skips(foreign, JobStatus.META_SCHEDULED, IMetaScheduler.TooEarly.selector);
        skips(first, JobStatus.PENDING, IMetaScheduler.InvalidTransition.selector);
        vm.prank(provider(0));
        grid.requeue(four(running, foreign, first, first), "full");
        _assertPending(first);
        // The table allows NONE to PENDING, so an unknown job must be refused before the table is used.
        uint256 second = jobIn(JobStatus.SCHEDULED, plain());
        uint256 unknown = jobAt(JobStatus.NONE);
        skips(unknown, JobStatus.NONE, IMetaScheduler.InvalidTransition.selector);
        vm.prank(provider(0));
        grid.requeue(pair(unknown, second), "full");
        _assertPending(second);
        assertEq(uint8(statusOf(unknown)), uint8(JobStatus.NONE));
        assertEq(uint8(statusOf(foreign)), uint8(JobStatus.META_SCHEDULED));
    }

    function _encode(uint256 jobId) private view returns (bytes memory) {
        return abi.encodeCall(grid.requeue, (one(jobId), ""));
    }
}
