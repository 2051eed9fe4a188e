// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {MetaScheduler} from "../../contracts/MetaScheduler.sol";
import {Assignment, Job, JobStatus, Report} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice [12] A batch equals the sequence of its items without the refused ones; no item changes another's payments.
contract BatchTest is GridTest {
    uint256 internal constant JOBS = 12;

    /// @dev Jobs of several customers at several providers, in every status.
    function setUp() public override {
        super.setUp();
        for (uint256 i = 0; i < JOBS; ++i) {
            uint256 jobId = submit(
                customer(i % CUSTOMERS), terms(AMOUNT * 4, LIMIT, 2, uint8(i % 3), uint8(i * 5) % 8)
            );
            uint256 stage = i % 6;
            if (stage == 0) continue;
            uint256 who = (i / 2) % PROVIDERS;
            assign(jobId, uint16(who + 1));
            vm.startPrank(provider(who));
            if (stage > 1) grid.claim(one(jobId));
            if (stage > 2) grid.start(one(jobId));
            vm.stopPrank();
            skip(7);
        }
    }

    /// @dev All state that a batch may change.
    function _state() private view returns (bytes32) {
        uint256 count = grid.jobCount();
        Job[] memory jobs = new Job[](count);
        for (uint256 i = 0; i < count; ++i) {
            jobs[i] = grid.getJob(i + 1);
        }
        bytes[PROVIDERS] memory loads;
        uint256[8] memory balances;
        for (uint256 i = 0; i < 3; ++i) {
            balances[i] = credit.balanceOf(customer(i));
            balances[3 + i] = credit.balanceOf(provider(i));
            loads[i] = abi.encode(grid.loadOf(uint16(i + 1)), grid.clockOf(uint16(i + 1)));
        }
        balances[6] = credit.balanceOf(TREASURY);
        balances[7] = credit.balanceOf(address(grid));
        return keccak256(abi.encode(jobs, balances, loads));
    }

    function _list(uint256 seed) private pure returns (uint256[] memory list) {
        list = new uint256[](1 + seed % 6);
        for (uint256 i = 0; i < list.length; ++i) {
            list[i] = 1 + uint256(keccak256(abi.encode(seed, i))) % (JOBS + 1);
        }
    }

    function _encode(uint256 verb, uint256[] memory list, uint256 seed)
        private
        view
        returns (bytes memory)
    {
        if (verb == 0) return abi.encodeCall(grid.cancel, (list));
        if (verb == 1) return abi.encodeCall(grid.claim, (list));
        if (verb == 2) return abi.encodeCall(grid.start, (list));
        if (verb == 3) return abi.encodeCall(grid.requeue, (list, "full"));
        if (verb == 4) return abi.encodeCall(grid.panic, (list, "gone"));
        if (verb == 5) return abi.encodeCall(grid.selfSchedule, (list));
        if (verb == 6) {
            Assignment[] memory assignments = new Assignment[](1);
            assignments[0] = assignment(uint16(1 + (seed >> 9) % PROVIDERS), list);
            return abi.encodeCall(grid.metaSchedule, (assignments));
        }
        if (verb == 7) return abi.encodeCall(grid.claimAndStart, (list));
        if (verb == 8) return abi.encodeCall(grid.collect, (list));
        Report[] memory reports = new Report[](list.length);
        for (uint256 i = 0; i < list.length; ++i) {
            // Derived from the job, so that it is the same in the batch and alone.
            reports[i] = Report(list[i], uint32(list[i] * 9), int32(uint32(list[i] % 2)), 0, "");
        }
        return abi.encodeCall(grid.finish, (reports));
    }

    function testFuzz_a_batch_equals_the_sequence_of_its_items(
        uint256 seed,
        uint8 verb,
        uint8 who,
        uint16 later,
        bool silent
    ) public {
        verb = verb % 10;
        address caller = [
            customer(0),
            customer(1),
            provider(0),
            provider(1),
            provider(2),
            SCHEDULER,
            STRANGER,
            customer(2)
        ][who % 8];
        if (verb == 6) caller = SCHEDULER;
        if (silent) silence(3);
        skip(later);
        uint256[] memory list = _list(seed);
        uint256 snapshot = vm.snapshotState();
        bool any;
        for (uint256 i = 0; i < list.length; ++i) {
            bytes memory single = _encode(verb, one(list[i]), seed);
            vm.prank(caller);
            (bool applied,) = address(grid).call(single);
            any = any || applied;
        }
        bytes32 sequence = _state();
        vm.revertToState(snapshot);
        bytes memory batch = _encode(verb, list, seed);
        vm.prank(caller);
        (bool done,) = address(grid).call(batch);
        assertEq(done, any, "a batch applies where one of its items does");
        assertEq(_state(), sequence, "batch and sequence");
    }
}

/// @notice Migration to a new version: close, drain, redeploy; live jobs continue and end as before.
contract NewVersionTest is GridTest {
    function test_live_jobs_go_on_while_a_new_version_takes_over() public {
        uint256 pending = submit(customer(0), plain());
        uint256 scheduled = jobIn(JobStatus.SCHEDULED, plain());
        uint256 running = jobIn(JobStatus.RUNNING, plain());
        uint256 doomed = jobIn(JobStatus.RUNNING, terms(3 * AMOUNT, LIMIT, 2, 1, 0));
        vm.prank(ADMIN);
        grid.setSubmissionsOpen(false);

        // The new version accepts new jobs at the same providers, with the same credit and registry.
        (address old, address next) = (address(grid), address(deployGrid(address(credit))));
        grid = _at(next);
        bytes32 role = grid.METASCHEDULER_ROLE();
        vm.prank(ADMIN);
        grid.grantRole(role, SCHEDULER);
        vm.prank(customer(1));
        credit.approve(next, type(uint256).max);
        uint256 fresh = submit(customer(1), plain());
        assign(fresh, 1);

        // The old one refuses submissions; everything else continues.
        grid = _at(old);
        vm.prank(STRANGER);
        grid.topUp(running, customer(0), AMOUNT);
        assign(pending, 1);
        vm.startPrank(provider(0));
        grid.claim(one(pending));
        grid.start(pair(pending, scheduled));
        grid.panic(one(doomed), "leaving");
        vm.stopPrank();
        uint256 successor = grid.jobCount();
        assign(successor, 2);
        skip(30);
        finish(pending, 30, 0);
        finish(scheduled, 30, 1);
        finish(running, 30, 0);
        vm.prank(customer(0));
        grid.cancel(one(successor));
        for (uint256 id = 1; id <= grid.jobCount(); ++id) {
            assertFalse(isLive(statusOf(id)));
        }
        assertEq(credit.balanceOf(old), 0);
        assertEq(credit.balanceOf(next), AMOUNT);
    }

    function _at(address where) private pure returns (MetaScheduler) {
        return MetaScheduler(where);
    }
}
