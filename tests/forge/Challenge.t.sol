// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {JobStatus, ProviderClock} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice `challenge`, `answer` and the clock behind them.
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
        // A chain that stood still, then one that ran ahead.
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
