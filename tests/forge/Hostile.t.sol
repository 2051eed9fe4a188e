// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Credit} from "../../contracts/Credit.sol";
import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {MetaScheduler} from "../../contracts/MetaScheduler.sol";
import {
    BlockingCredit,
    FalseCredit,
    HookedCredit,
    MuteCredit,
    Reenterer
} from "../../contracts/test/HostileCredits.sol";
import {
    Assignment,
    JobRequest,
    JobStatus,
    Permit,
    Report
} from "../../contracts/types/JobTypes.sol";
import {Hardware} from "../../contracts/types/ProviderTypes.sol";
import {GridTest} from "./GridTest.sol";

interface IBlocking {
    function setBlocked(address account, bool value) external;
}

/// @notice A recipient that can't be paid does not block others; `withdraw`.
abstract contract ParkingTest is GridTest {
    function _block(address account, bool value) internal {
        IBlocking(address(credit)).setBlocked(account, value);
    }

    /// @dev Whichever of the three is blocked, the job ends, the others are paid, and the sum is parked.
    function testFuzz_the_blocked_are_parked_and_the_others_paid(uint8 who, uint8 elapsed) public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        elapsed = uint8(bound(elapsed, 0, LIMIT));
        skip(elapsed);
        address[3] memory all = [provider(0), TREASURY, customer(0)];
        uint256 cost = RATE * elapsed;
        uint256[3] memory due = [cost - cost / 20, cost / 20, AMOUNT - cost];
        uint256[3] memory before = [uint256(0), 0, FUNDS - AMOUNT];
        for (uint256 i = 0; i < 3; ++i) {
            _block(all[i], (who >> i) & 1 == 1);
        }
        finish(jobId, elapsed, 0);
        uint256 parked;
        for (uint256 i = 0; i < 3; ++i) {
            bool blocked = (who >> i) & 1 == 1;
            assertEq(grid.parkedOf(all[i]), blocked ? due[i] : 0);
            assertEq(credit.balanceOf(all[i]), before[i] + (blocked ? 0 : due[i]));
            parked += grid.parkedOf(all[i]);
        }
        assertEq(credit.balanceOf(address(grid)), parked);
        assertFalse(isLive(statusOf(jobId)));
    }

    /// @dev An interim payment that can't be made is parked like any other; the run continues.
    function testFuzz_a_blocked_interim_payment_is_parked(uint8 who, uint8 elapsed) public {
        uint256 jobId = jobIn(JobStatus.RUNNING, terms(AMOUNT, LIMIT, 2, 0, INTERIM_PAYMENTS));
        elapsed = uint8(bound(elapsed, COLLECT_INTERVAL, LIMIT - 1));
        skip(elapsed);
        address[2] memory all = [provider(0), TREASURY];
        uint256 cost = RATE * elapsed;
        uint256[2] memory due = [cost - cost / 20, cost / 20];
        for (uint256 i = 0; i < 2; ++i) {
            _block(all[i], (who >> i) & 1 == 1);
        }
        vm.prank(provider(0));
        grid.collect(one(jobId));
        uint256 parked;
        for (uint256 i = 0; i < 2; ++i) {
            bool blocked = (who >> i) & 1 == 1;
            assertEq(grid.parkedOf(all[i]), blocked ? due[i] : 0);
            assertEq(credit.balanceOf(all[i]), blocked ? 0 : due[i]);
            parked += grid.parkedOf(all[i]);
        }
        assertEq(grid.getJob(jobId).escrow, AMOUNT - cost);
        assertEq(credit.balanceOf(address(grid)), AMOUNT - cost + parked);
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.RUNNING));
    }

    /// @dev The whole test is one transaction: positions of recipients must not persist after their batch.
    /// forge-config: default.fuzz.runs = 200
    function testFuzz_batches_of_one_transaction_pay_each_recipient_its_own(
        uint256 order,
        uint8 blocked
    ) public {
        uint256[3] memory due;
        for (uint256 i = 0; i < 3; ++i) {
            _block(provider(i), (blocked >> i) & 1 == 1);
        }
        for (uint256 batch = 0; batch < 3; ++batch) {
            uint256[] memory jobIds = new uint256[](5);
            for (uint256 i = 0; i < 5; ++i) {
                uint256 who = uint256(keccak256(abi.encode(order, batch, i))) % 3;
                jobIds[i] = submit(customer(0), terms(3 * AMOUNT, LIMIT, 2, 0, 0));
                assign(jobIds[i], uint16(who + 1));
                vm.prank(provider(who));
                grid.claimAndStart(one(jobIds[i]));
                due[who] += _paid((who + 1) * 10 * RATE);
            }
            skip(10);
            vm.prank(customer(0));
            grid.cancel(jobIds);
        }
        for (uint256 i = 0; i < 3; ++i) {
            assertEq(credit.balanceOf(provider(i)) + grid.parkedOf(provider(i)), due[i]);
        }
    }

    function _paid(uint256 cost) private pure returns (uint256) {
        return cost - cost / 20;
    }

    function test_parked_credits_add_up_and_are_withdrawn_once() public {
        uint256 first = jobIn(JobStatus.RUNNING, plain());
        uint256 second = jobIn(JobStatus.RUNNING, plain());
        skip(10);
        uint256 due = 2 * (10 * RATE - 10 * RATE / 20);
        _block(provider(0), true);
        vm.expectEmit(address(grid));
        emit IMetaScheduler.PaymentParked(provider(0), due / 2);
        finish(first, 10, 0);
        finish(second, 10, 0);
        vm.expectEmit(address(grid));
        emit IMetaScheduler.PaymentWithdrawn(provider(0), STRANGER, due);
        vm.prank(provider(0));
        assertEq(grid.withdraw(STRANGER), due);
        assertEq(credit.balanceOf(STRANGER), FUNDS + due);
        vm.prank(provider(0));
        vm.expectRevert(IMetaScheduler.NothingParked.selector);
        grid.withdraw(STRANGER);
    }

    function test_nobody_withdraws_what_is_not_theirs() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        _block(customer(0), true);
        vm.prank(customer(0));
        grid.cancel(one(jobId));
        address[4] memory others = [STRANGER, ADMIN, TREASURY, provider(0)];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.prank(others[i]);
            vm.expectRevert(IMetaScheduler.NothingParked.selector);
            grid.withdraw(others[i]);
        }
        assertEq(grid.parkedOf(customer(0)), AMOUNT);
    }

    function test_a_withdrawal_that_fails_keeps_the_sum() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        _block(customer(0), true);
        vm.startPrank(customer(0));
        grid.cancel(one(jobId));
        vm.expectRevert();
        grid.withdraw(customer(0));
        assertEq(grid.parkedOf(customer(0)), AMOUNT);
        _block(customer(0), false);
        grid.withdraw(customer(0));
        assertEq(credit.balanceOf(customer(0)), FUNDS);
    }

    function test_a_blocked_item_of_a_batch_moves_nobody_elses_money() public {
        uint256 first = jobIn(JobStatus.RUNNING, plain());
        uint256 second = submit(customer(1), plain());
        assign(second, 1);
        vm.startPrank(provider(0));
        grid.claim(one(second));
        grid.start(one(second));
        vm.stopPrank();
        _block(customer(0), true);
        Report[] memory reports = new Report[](2);
        reports[0] = Report(first, 0, 0, 0, "");
        reports[1] = Report(second, 0, 0, 0, "");
        vm.prank(provider(0));
        grid.finish(reports);
        assertEq(grid.parkedOf(customer(0)), AMOUNT);
        assertEq(credit.balanceOf(customer(1)), FUNDS);
        assertEq(credit.balanceOf(address(grid)), AMOUNT);
    }
}

contract RevertingTokenTest is ParkingTest {
    function newCredit() internal override returns (Credit) {
        return new BlockingCredit(ADMIN, 0);
    }
}

contract FalseTokenTest is ParkingTest {
    function newCredit() internal override returns (Credit) {
        return new FalseCredit(ADMIN, 0);
    }

    function test_a_submission_that_the_token_denies_is_refused() public {
        _block(customer(0), true);
        JobRequest[] memory requests = new JobRequest[](1);
        requests[0] = JobRequest(plain(), new bytes32[](1));
        requests[0].definitions[0] = "x";
        vm.prank(customer(0));
        vm.expectRevert();
        grid.submitJobs(requests);
        assertEq(grid.jobCount(), 0);
    }
}

contract MuteTokenTest is GridTest {
    function newCredit() internal override returns (Credit) {
        return new MuteCredit(ADMIN, 0);
    }

    function test_a_token_that_returns_nothing_is_good_enough() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        vm.prank(STRANGER);
        grid.topUp(jobId, customer(0), AMOUNT);
        skip(10);
        finish(jobId, 10, 0);
        assertEq(credit.balanceOf(provider(0)), 10 * RATE - 10 * RATE / 20);
        assertEq(credit.balanceOf(address(grid)), 0);
    }
}

/// @dev Keeps one percent of each transfer: unsupported; the test shows the effect.
contract TollCredit is Credit {
    constructor() Credit(address(0xA0), 0) {}

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if (from != address(0) && to != address(0)) super._update(to, address(0), value / 100);
    }
}

contract TollTokenTest is GridTest {
    function newCredit() internal override returns (Credit) {
        return new TollCredit();
    }

    function test_a_fee_on_transfer_leaves_the_last_one_parked_and_blocks_nobody() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        skip(10);
        finish(jobId, 10, 0);
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.FINISHED));
        assertEq(grid.parkedOf(customer(0)), AMOUNT - 10 * RATE);
    }
}

contract ReentranceTest is GridTest {
    Reenterer internal actor;

    function newCredit() internal override returns (Credit) {
        return new HookedCredit(ADMIN, 0);
    }

    function setUp() public override {
        super.setUp();
        actor = new Reenterer();
        vm.prank(customer(2));
        credit.transfer(address(actor), FUNDS);
        actor.act(address(credit), abi.encodeCall(credit.approve, (address(grid), FUNDS)));
    }

    function _submitted() private returns (uint256 jobId) {
        JobRequest[] memory requests = new JobRequest[](1);
        requests[0] = JobRequest(plain(), new bytes32[](1));
        requests[0].definitions[0] = "x";
        actor.act(address(grid), abi.encodeCall(grid.submitJobs, (requests)));
        return grid.jobCount();
    }

    function _everyGuardedCall(uint256 jobId) private {
        JobRequest[] memory requests = new JobRequest[](1);
        requests[0] = JobRequest(plain(), new bytes32[](1));
        requests[0].definitions[0] = "y";
        Permit memory none;
        bytes[9] memory calls = [
            abi.encodeCall(grid.submitJobs, (requests)),
            abi.encodeCall(grid.submitJobsWithPermit, (requests, none)),
            abi.encodeCall(grid.cancel, (one(jobId))),
            abi.encodeCall(grid.topUp, (jobId, address(actor), AMOUNT)),
            abi.encodeCall(grid.topUpWithPermit, (jobId, address(actor), AMOUNT, none)),
            abi.encodeCall(grid.withdraw, (address(actor))),
            abi.encodeCall(grid.finish, (new Report[](0))),
            abi.encodeCall(grid.collect, (one(jobId))),
            abi.encodeCall(grid.panic, (one(jobId), ""))
        ];
        for (uint256 i = 0; i < calls.length; ++i) {
            actor.plan(address(grid), calls[i]);
        }
    }

    function _assertAllRefused() private view {
        assertEq(actor.count(), 9);
        for (uint256 i = 0; i < 9; ++i) {
            assertFalse(actor.successes(i));
            assertEq(bytes4(actor.answers(i)), bytes4(keccak256("ReentrancyGuardReentrantCall()")));
        }
    }

    function test_while_an_escrow_comes_in_nothing_that_moves_money_can_be_called() public {
        _everyGuardedCall(1);
        _submitted();
        _assertAllRefused();
        assertEq(grid.jobCount(), 1);
        assertEq(credit.balanceOf(address(grid)), AMOUNT);
    }

    function test_while_a_refund_goes_out_nothing_that_moves_money_can_be_called() public {
        uint256 jobId = _submitted();
        _everyGuardedCall(jobId);
        actor.act(address(grid), abi.encodeCall(grid.cancel, (one(jobId))));
        _assertAllRefused();
        assertEq(credit.balanceOf(address(actor)), FUNDS);
        assertEq(credit.balanceOf(address(grid)), 0);
    }

    function test_while_an_interim_payment_goes_out_nothing_that_moves_money_can_be_called()
        public
    {
        actor.act(
            address(registry),
            abi.encodeCall(
                registry.register, (Hardware(1, 16, 65_536, 0), prices(1e12), new string[](0))
            )
        );
        vm.prank(ADMIN);
        registry.approve(address(actor), 1);
        uint256 jobId = submit(customer(0), terms(AMOUNT, LIMIT, 2, 0, INTERIM_PAYMENTS));
        assign(jobId, 4);
        actor.act(address(grid), abi.encodeCall(grid.claimAndStart, (one(jobId))));
        skip(40);
        uint256 before = credit.balanceOf(address(actor));
        _everyGuardedCall(jobId);
        actor.act(address(grid), abi.encodeCall(grid.collect, (one(jobId))));
        _assertAllRefused();
        assertEq(credit.balanceOf(address(actor)), before + 40 * RATE - 40 * RATE / 20);
        assertEq(credit.balanceOf(address(grid)), AMOUNT - 40 * RATE);
    }

    function test_while_a_refund_goes_out_the_job_has_already_ended() public {
        uint256 jobId = _submitted();
        actor.plan(address(grid), abi.encodeCall(grid.getJob, (jobId)));
        actor.act(address(grid), abi.encodeCall(grid.cancel, (one(jobId))));
        assertEq(keccak256(actor.answers(0)), keccak256(abi.encode(grid.getJob(jobId))));
    }
}

/// @notice The largest batches that a transaction of 2^24 gas takes, in plain unoptimized code: deployed code takes more.
contract LargestBatchTest is GridTest {
    uint256 internal constant GAS = 16_777_216;
    uint256 internal constant COUNT = 100;

    function _many() private returns (uint256[] memory jobIds) {
        JobRequest[] memory requests = new JobRequest[](1);
        requests[0] = JobRequest(terms(AMOUNT, LIMIT, 2, 5, INTERIM_PAYMENTS), new bytes32[](COUNT));
        jobIds = new uint256[](COUNT);
        for (uint256 i = 0; i < COUNT; ++i) {
            requests[0].definitions[i] = bytes32(i + 1);
            jobIds[i] = i + 1;
        }
        vm.prank(customer(0));
        grid.submitJobs{gas: GAS}(requests);
    }

    function setUp() public override {
        super.setUp();
        register(provider(0), prices(1e12), Hardware(100, 16, 65_536, 0));
    }

    function test_a_hundred_jobs_go_through_each_step_in_one_transaction() public {
        uint256[] memory jobIds = _many();
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = assignment(1, jobIds);
        vm.prank(SCHEDULER);
        grid.metaSchedule{gas: GAS}(assignments);
        vm.prank(provider(0));
        grid.requeue{gas: GAS}(jobIds, "full");
        vm.prank(SCHEDULER);
        grid.metaSchedule(assignments);
        vm.startPrank(provider(0));
        grid.claim{gas: GAS}(jobIds);
        uint256 snapshot = vm.snapshotState();
        grid.start{gas: GAS}(jobIds);
        vm.revertToState(snapshot);
        grid.requeue(jobIds, "full");
        vm.stopPrank();
        vm.prank(SCHEDULER);
        grid.metaSchedule(assignments);
        vm.prank(provider(0));
        grid.claimAndStart{gas: GAS}(jobIds);
        skip(COLLECT_INTERVAL);
        vm.prank(provider(0));
        grid.collect{gas: GAS}(jobIds);
        assertEq(grid.getJob(COUNT).timeLimit, LIMIT - COLLECT_INTERVAL);
        snapshot = vm.snapshotState();
        Report[] memory reports = new Report[](COUNT);
        for (uint256 i = 0; i < COUNT; ++i) {
            reports[i] = Report(jobIds[i], 10, 0, "result", "exited");
        }
        vm.prank(provider(0));
        grid.finish{gas: GAS}(reports);
        assertEq(uint8(statusOf(COUNT)), uint8(JobStatus.FINISHED));
        vm.revertToState(snapshot);
        vm.prank(customer(0));
        grid.cancel{gas: GAS}(jobIds);
        assertEq(uint8(statusOf(COUNT)), uint8(JobStatus.CANCELLED));
        vm.revertToState(snapshot);
        vm.prank(provider(0));
        grid.panic{gas: GAS}(jobIds, "gone");
        assertEq(grid.jobCount(), 2 * COUNT);
    }
}
