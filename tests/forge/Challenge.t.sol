// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {JobStatus, ProviderClock, Report} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice `challenge`, `answer` and the challenge clock.
contract ChallengeTest is GridTest {
    function _challenge(uint256 jobId) private {
        vm.prank(STRANGER);
        grid.challenge(jobId);
    }

    function test_anyone_starts_the_clock_of_an_assigned_job() public {
        for (uint8 i = uint8(JobStatus.META_SCHEDULED); i <= uint8(JobStatus.RUNNING); ++i) {
            uint256 jobId = jobIn(JobStatus(i), plain());
            uint256 time = vm.getBlockTimestamp();
            vm.expectEmit(address(grid));
            emit IMetaScheduler.ProviderChallenged(
                jobId, provider(0), STRANGER, time + RESPONSE_TIMEOUT
            );
            _challenge(jobId);
            ProviderClock memory clock = grid.clockOf(1);
            assertEq(clock.account, provider(0));
            assertEq(clock.challengedAt, time);
            assertEq(clock.challengedBlock, vm.getBlockNumber());
            vm.prank(provider(0));
            grid.answer();
            skip(RESPONSE_TIMEOUT);
        }
    }

    function test_the_block_of_a_challenge_is_kept_whole() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        vm.roll(type(uint32).max - RESPONSE_BLOCKS - 1);
        silence(jobId);
        assertEq(grid.clockOf(1).challengedBlock, type(uint32).max - RESPONSE_BLOCKS - 1);
        assertTrue(grid.isSilent(1));
    }

    function test_jobs_without_a_provider_are_refused() public {
        for (uint8 i = 0; i <= uint8(JobStatus.PANICKED); ++i) {
            if (i >= uint8(JobStatus.META_SCHEDULED) && i <= uint8(JobStatus.RUNNING)) continue;
            uint256 jobId = jobAt(JobStatus(i));
            vm.expectRevert(
                abi.encodeWithSelector(IMetaScheduler.WrongStatus.selector, jobId, JobStatus(i))
            );
            _challenge(jobId);
        }
    }

    function test_a_clock_that_runs_is_not_started_again() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        _challenge(jobId);
        skip(RESPONSE_TIMEOUT * 3);
        refuses(IMetaScheduler.ChallengeRefused.selector, jobId);
        _challenge(jobId);
    }

    function test_after_an_answer_there_is_rest_for_a_response_timeout() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        _challenge(jobId);
        vm.expectEmit(address(grid));
        emit IMetaScheduler.ProviderAnswered(provider(0));
        vm.prank(provider(0));
        grid.answer();
        ProviderClock memory clock = grid.clockOf(1);
        assertEq(clock.challengedAt, 0);
        assertEq(clock.challengedBlock, 0);
        assertEq(clock.answeredAt, vm.getBlockTimestamp());
        skip(RESPONSE_TIMEOUT - 1);
        refuses(IMetaScheduler.ChallengeRefused.selector, jobId);
        _challenge(jobId);
        skip(1);
        _challenge(jobId);
    }

    function test_an_answer_without_a_challenge_is_refused() public {
        jobIn(JobStatus.RUNNING, plain());
        vm.prank(provider(0));
        vm.expectRevert(IMetaScheduler.NothingToAnswer.selector);
        grid.answer();
        vm.prank(STRANGER);
        vm.expectRevert(IMetaScheduler.NothingToAnswer.selector);
        grid.answer();
    }

    function test_nobody_answers_for_another() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        silence(jobId);
        vm.prank(provider(1));
        vm.expectRevert(IMetaScheduler.NothingToAnswer.selector);
        grid.answer();
        assertTrue(grid.isSilent(1));
        assertFalse(grid.isSilent(2));
    }

    function test_silence_needs_more_than_both_seconds_and_blocks() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        uint256 time = vm.getBlockTimestamp();
        uint256 height = vm.getBlockNumber();
        _challenge(jobId);
        // Seconds without blocks, then blocks without seconds.
        vm.warp(time + 365 days);
        vm.roll(height + RESPONSE_BLOCKS);
        assertFalse(grid.isSilent(1));
        vm.warp(time + RESPONSE_TIMEOUT);
        vm.roll(height + 1_000_000);
        assertFalse(grid.isSilent(1));
        vm.warp(time + RESPONSE_TIMEOUT + 1);
        vm.roll(height + RESPONSE_BLOCKS + 1);
        assertTrue(grid.isSilent(1));
    }

    function testFuzz_a_halted_chain_accuses_nobody(uint32 halt, uint32 blocks) public {
        halt = uint32(bound(halt, 0, 2 ** 30));
        blocks = uint32(bound(blocks, 0, 2 ** 20));
        uint256 jobId = jobIn(JobStatus.SCHEDULED, plain());
        _challenge(jobId);
        skip(halt);
        vm.roll(vm.getBlockNumber() + blocks);
        assertEq(grid.isSilent(1), halt > RESPONSE_TIMEOUT && blocks > RESPONSE_BLOCKS);
    }

    function test_runs_are_lost_after_more_than_the_lost_timeout_and_blocks() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, terms(1e18, 100_000, 2, 0, 0));
        uint256 time = vm.getBlockTimestamp();
        uint256 height = vm.getBlockNumber();
        _challenge(jobId);
        vm.warp(time + LOST_TIMEOUT);
        vm.roll(height + 1_000_000);
        assertTrue(grid.isSilent(1));
        assertFalse(grid.isLost(jobId));
        vm.warp(time + LOST_TIMEOUT + 1);
        vm.roll(height + RESPONSE_BLOCKS);
        assertFalse(grid.isLost(jobId));
        vm.roll(height + RESPONSE_BLOCKS + 1);
        assertTrue(grid.isLost(jobId));
    }

    /// @dev Each function of the provider on one of its jobs; the challenge named another one.
    function test_any_move_by_the_provider_answers() public {
        uint256 running = jobIn(JobStatus.RUNNING, terms(1e18, 100_000, 2, 0, INTERIM_PAYMENTS));
        uint256 scheduled = jobIn(JobStatus.SCHEDULED, plain());
        uint256 assigned = jobIn(JobStatus.META_SCHEDULED, plain());
        uint256 pending = jobIn(JobStatus.PENDING, plain());
        skip(PENDING_TIMEOUT);
        _challenge(running);
        Report[] memory reports = new Report[](1);
        reports[0] = Report(running, 1, 0, 0, "");
        bytes[11] memory moves = [
            abi.encodeCall(grid.claim, (one(assigned))),
            abi.encodeCall(grid.claimAndStart, (one(assigned))),
            abi.encodeCall(grid.start, (one(scheduled))),
            abi.encodeCall(grid.collect, (one(running))),
            abi.encodeCall(grid.finish, (reports)),
            abi.encodeCall(grid.requeue, (one(scheduled), "")),
            abi.encodeCall(grid.requeue, (one(assigned), "")),
            abi.encodeCall(grid.panic, (one(assigned), "")),
            abi.encodeCall(grid.panic, (one(running), "")),
            abi.encodeCall(grid.selfSchedule, (one(pending))),
            // A refused item next to an applied one.
            abi.encodeCall(grid.claim, (pair(running, assigned)))
        ];
        uint256 snapshot = vm.snapshotState();
        for (uint256 i = 0; i < moves.length; ++i) {
            // Silent providers answer by a transition as well; they only get no new jobs.
            if (i != 9) {
                skip(RESPONSE_TIMEOUT + 1);
                vm.roll(vm.getBlockNumber() + RESPONSE_BLOCKS + 1);
                assertTrue(grid.isSilent(1));
            }
            vm.expectEmit(address(grid));
            emit IMetaScheduler.ProviderAnswered(provider(0));
            vm.prank(provider(0));
            (bool done,) = address(grid).call(moves[i]);
            assertTrue(done);
            ProviderClock memory clock = grid.clockOf(1);
            assertEq(clock.challengedAt, 0);
            assertEq(clock.challengedBlock, 0);
            assertEq(clock.answeredAt, vm.getBlockTimestamp());
            vm.revertToState(snapshot);
        }
    }

    function test_what_others_do_to_its_jobs_answers_for_nobody() public {
        uint256 assigned = jobIn(JobStatus.META_SCHEDULED, plain());
        uint256 running = jobIn(JobStatus.RUNNING, plain());
        uint256 foreign = foreignRun();
        uint256 fresh = submit(customer(0), plain());
        _challenge(running);
        _challenge(foreign);
        assign(fresh, 1);
        vm.prank(customer(0));
        grid.cancel(one(fresh));
        skip(CLAIM_TIMEOUT + 1);
        vm.prank(provider(1));
        grid.requeue(one(assigned), "");
        skip(LOST_TIMEOUT);
        vm.roll(vm.getBlockNumber() + RESPONSE_BLOCKS + 1);
        // A provider ends a lost run of another provider, as anyone may: this is no transition of its own jobs.
        vm.prank(provider(1));
        grid.panic(one(running), "");
        assertTrue(grid.isSilent(1));
        assertTrue(grid.isSilent(2));
    }

    function test_a_refused_move_answers_nothing() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        silence(jobId);
        uint256 lost = foreignRun();
        silence(lost);
        skip(LOST_TIMEOUT);
        // Its own job is refused, and the other job belongs to another provider.
        skips(99, JobStatus.NONE, IMetaScheduler.InvalidTransition.selector);
        vm.prank(provider(0));
        grid.panic(pair(99, lost), "");
        assertTrue(grid.isSilent(1));
    }

    function test_without_a_challenge_a_move_says_nothing_of_an_answer() public {
        uint256 jobId = jobIn(JobStatus.META_SCHEDULED, plain());
        vm.prank(provider(0));
        grid.claim(one(jobId));
        assertEq(grid.clockOf(1).answeredAt, 0);
    }

    function test_a_late_answer_makes_good_what_nobody_acted_on() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        lose(jobId);
        assertTrue(grid.isLost(jobId));
        vm.prank(provider(0));
        grid.answer();
        assertFalse(grid.isSilent(1));
        assertFalse(grid.isLost(jobId));
        vm.prank(STRANGER);
        refuses(IMetaScheduler.NotLost.selector, jobId);
        grid.panic(one(jobId), "");
    }
}
