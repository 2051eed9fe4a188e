// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {Job, JobStatus, JobTerms, Report} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

contract FinishTest is GridTest {
    function _report(uint256 jobId, uint32 used, int32 code) private pure returns (Report memory) {
        return Report(jobId, used, code, keccak256("result"), "exited");
    }

    function test_exit_code_zero_is_FINISHED() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        skip(10);
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobTransition(
            jobId, customer(0), provider(0), JobStatus.RUNNING, JobStatus.FINISHED
        );
        finish(jobId, 10, 0);
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.FINISHED));
        assertEq(grid.getJob(jobId).escrow, 10 * RATE);
    }

    function testFuzz_another_exit_code_is_FAILED(int32 code) public {
        vm.assume(code != 0);
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        skip(10);
        finish(jobId, 10, code);
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.FAILED));
    }

    function testFuzz_the_whole_allotment_is_OUT_OF_CREDITS(int32 code, bool untilSpent) public {
        uint256 jobId = jobIn(JobStatus.RUNNING, terms(AMOUNT, LIMIT, 2, 0, spend(untilSpent)));
        skip(AMOUNT / RATE);
        finish(jobId, type(uint32).max, code);
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.OUT_OF_CREDITS));
        assertEq(grid.getJob(jobId).escrow, RATE * (untilSpent ? AMOUNT / RATE : LIMIT));
    }

    function test_a_second_less_than_the_allotment_is_not_out_of_credits() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        skip(LIMIT);
        finish(jobId, LIMIT - 1, 0);
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.FINISHED));
    }

    struct Case {
        uint96 amount;
        uint24 limit;
        uint16 tasks;
        uint16 fee;
        uint32 used;
        uint32 elapsed;
        int32 code;
        bool untilSpent;
    }

    function testFuzz_the_least_of_reported_elapsed_and_allotted_is_split(Case memory c) public {
        c.tasks = uint16(bound(c.tasks, 1, 32));
        c.limit = uint24(bound(c.limit, 1, type(uint24).max));
        uint256 rate = RATE / 2 * c.tasks;
        c.amount = uint96(bound(c.amount, rate * c.limit, rate * c.limit + 1e24));
        c.fee = uint16(bound(c.fee, 0, 2000));
        c.elapsed = uint32(bound(c.elapsed, 0, 2 ** 30));
        vm.prank(ADMIN);
        grid.setFee(c.fee);
        uint256 jobId =
            jobIn(JobStatus.RUNNING, terms(c.amount, c.limit, c.tasks, 0, spend(c.untilSpent)));
        skip(c.elapsed);
        uint256 billed = _min(_min(c.used, c.elapsed), c.untilSpent ? c.amount / rate : c.limit);
        uint256 cost = rate * billed;
        uint256 toTreasury = cost * c.fee / 10_000;
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobResult(jobId, c.code, 0, "exited");
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobSettled(
            jobId, provider(0), customer(0), billed, cost - toTreasury, toTreasury, c.amount - cost
        );
        finish(jobId, c.used, c.code);
        assertEq(grid.getJob(jobId).escrow, cost);
        assertEq(credit.balanceOf(provider(0)), cost - toTreasury);
        assertEq(credit.balanceOf(TREASURY), toTreasury);
        assertEq(credit.balanceOf(customer(0)), FUNDS - cost);
        assertEq(credit.balanceOf(address(grid)), 0);
        assertEq(grid.deadline(jobId), 0);
    }

    function test_in_the_block_of_the_start_nothing_is_billed() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        finish(jobId, type(uint32).max, 0);
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.FINISHED));
        assertEq(credit.balanceOf(customer(0)), FUNDS);
        assertEq(credit.balanceOf(provider(0)), 0);
    }

    function test_an_overdue_or_silent_run_may_still_be_finished() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        silence(jobId);
        overdue();
        assertTrue(grid.isLost(jobId));
        finish(jobId, 50, 0);
        assertEq(grid.getJob(jobId).escrow, 50 * RATE);
    }

    function test_a_banned_draining_or_expired_provider_may_still_finish() public {
        uint256[] memory jobIds = triple(0, 0, 0);
        for (uint256 i = 0; i < 3; ++i) {
            jobIds[i] = jobIn(JobStatus.RUNNING, plain());
        }
        vm.prank(provider(0));
        registry.setDraining(true);
        finish(jobIds[0], 1, 0);
        vm.prank(ADMIN);
        registry.ban(provider(0), "test");
        finish(jobIds[1], 1, 0);
        skip(366 days);
        finish(jobIds[2], 1, 0);
        assertEq(uint8(statusOf(jobIds[2])), uint8(JobStatus.FINISHED));
    }

    function test_other_statuses_are_refused() public {
        refusedByTable(provider(0), _encode, JobStatus.FINISHED, bit(JobStatus.RUNNING));
        refusedByTable(provider(0), _encodeFailed, JobStatus.FAILED, bit(JobStatus.RUNNING));
    }

    function test_somebody_else_is_refused() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        address[4] memory others = [customer(0), provider(1), SCHEDULER, ADMIN];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.prank(others[i]);
            (bool done, bytes memory answer) = address(grid).call(_encode(jobId));
            assertFalse(done);
            assertEq(
                answer, abi.encodeWithSelector(IMetaScheduler.NotAssignedProvider.selector, jobId)
            );
        }
    }

    function test_an_empty_batch_is_refused() public {
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.finish(new Report[](0));
    }

    function test_refused_items_are_skipped_and_the_others_applied() public {
        uint256 mine = jobIn(JobStatus.RUNNING, plain());
        uint256 early = jobIn(JobStatus.SCHEDULED, plain());
        uint256 foreign = foreignRun();
        skip(10);
        Report[] memory reports = new Report[](4);
        reports[0] = _report(early, 10, 0);
        reports[1] = _report(foreign, 10, 0);
        reports[2] = _report(mine, 10, 0);
        reports[3] = _report(mine, 5, 1);
        skips(early, JobStatus.SCHEDULED, IMetaScheduler.InvalidTransition.selector);
        skips(foreign, JobStatus.RUNNING, IMetaScheduler.NotAssignedProvider.selector);
        skips(mine, JobStatus.FINISHED, IMetaScheduler.InvalidTransition.selector);
        vm.prank(provider(0));
        grid.finish(reports);
        assertEq(grid.getJob(mine).escrow, 10 * RATE);
        assertEq(uint8(statusOf(early)), uint8(JobStatus.SCHEDULED));
        assertEq(uint8(statusOf(foreign)), uint8(JobStatus.RUNNING));
        assertEq(grid.getJob(foreign).escrow, 2 * AMOUNT);
    }

    function test_a_batch_pays_the_sum_of_its_items() public {
        Report[] memory reports = new Report[](3);
        for (uint256 i = 0; i < 3; ++i) {
            reports[i] = _report(jobIn(JobStatus.RUNNING, plain()), 10, 0);
        }
        skip(10);
        vm.prank(provider(0));
        grid.finish(reports);
        uint256 cost = 10 * RATE;
        assertEq(credit.balanceOf(provider(0)), 3 * (cost - cost / 20));
        assertEq(credit.balanceOf(TREASURY), 3 * (cost / 20));
        assertEq(credit.balanceOf(customer(0)), FUNDS - 3 * cost);
    }

    /// @dev The clock of a new chain may start at any time.
    function test_the_time_of_a_run_does_not_depend_on_the_clocks_beginning() public {
        vm.warp(20);
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        skip(50);
        finish(jobId, type(uint32).max, 0);
        assertEq(grid.getJob(jobId).escrow, 50 * RATE);
    }

    function testFuzz_a_later_price_or_fee_does_not_reach_back(uint64 price, uint16 fee) public {
        uint256 jobId = jobIn(JobStatus.META_SCHEDULED, plain());
        vm.prank(provider(0));
        registry.setPrices(prices(uint64(bound(price, 0, 10 ether / 50))));
        vm.prank(ADMIN);
        grid.setFee(uint16(bound(fee, 0, 2000)));
        register(provider(0), prices(uint64(bound(price, 0, 10 ether / 50))));
        vm.startPrank(provider(0));
        grid.claim(one(jobId));
        grid.start(one(jobId));
        vm.stopPrank();
        skip(10);
        finish(jobId, 10, 0);
        Job memory job = grid.getJob(jobId);
        assertEq(job.rate, RATE);
        assertEq(job.feeBps, 500);
        assertEq(credit.balanceOf(TREASURY), 10 * RATE / 20);
    }

    function _encode(uint256 jobId) private view returns (bytes memory) {
        Report[] memory reports = new Report[](1);
        reports[0] = _report(jobId, 1, 0);
        return abi.encodeCall(grid.finish, (reports));
    }

    function _encodeFailed(uint256 jobId) private view returns (bytes memory) {
        Report[] memory reports = new Report[](1);
        reports[0] = _report(jobId, 1, 1);
        return abi.encodeCall(grid.finish, (reports));
    }

    function _min(uint256 a, uint256 b) private pure returns (uint256) {
        return a < b ? a : b;
    }
}
