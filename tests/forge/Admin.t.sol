// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Credit} from "../../contracts/Credit.sol";
import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {MetaScheduler} from "../../contracts/MetaScheduler.sol";
import {ProviderRegistry} from "../../contracts/ProviderRegistry.sol";
import {CentCredit} from "../../contracts/test/HostileCredits.sol";
import {Assignment, Job, JobStatus, Timeouts} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice Constructor, administration, and views; no function of an administrator moves an escrow.
contract AdminTest is GridTest {
    function _times() private pure returns (Timeouts memory) {
        return Timeouts(300, 600, 30 days, 300, 10, 1800, 1 hours, 60, 6 hours);
    }

    function _deploy(Timeouts memory times, uint16 fee) private returns (MetaScheduler) {
        return this.make(ADMIN, credit, registry, TREASURY, address(0), fee, times);
    }

    /// @dev An external call, so that a revert ends this call and not the test, however the code is linked.
    function make(
        address admin,
        Credit token,
        ProviderRegistry providers,
        address treasury,
        address forwarder_,
        uint16 fee,
        Timeouts calldata times
    ) external returns (MetaScheduler) {
        return new MetaScheduler(admin, 1 days, token, providers, treasury, forwarder_, fee, times);
    }

    function _outOfBounds(bytes32 name, uint256 value, uint256 min, uint256 max) private {
        vm.expectRevert(
            abi.encodeWithSelector(IMetaScheduler.OutOfBounds.selector, name, value, min, max)
        );
    }

    function test_the_constructor_keeps_what_it_was_given() public {
        vm.expectEmit();
        emit IMetaScheduler.SubmissionsChanged(true);
        MetaScheduler made = _deploy(_times(), 2000);
        assertEq(address(made.credit()), address(credit));
        assertEq(address(made.registry()), address(registry));
        assertEq(made.treasury(), TREASURY);
        assertEq(made.feeBps(), 2000);
        assertTrue(made.submissionsOpen());
        assertEq(made.defaultAdmin(), ADMIN);
        assertEq(made.defaultAdminDelay(), 1 days);
        assertEq(abi.encode(made.timeouts()), abi.encode(_times()));
        Timeouts memory wide = Timeouts(
            2_000_000,
            2_100_000,
            31_500_000,
            2_200_000,
            100_000,
            2_250_000,
            2_300_000,
            3600,
            2_400_000
        );
        assertEq(abi.encode(_deploy(wide, 0).timeouts()), abi.encode(wide));
    }

    function test_each_bound_of_the_constructor_holds_on_both_sides() public {
        uint256[2][9] memory bounds = [
            [uint256(5), 30 days],
            [uint256(5), 30 days],
            [uint256(600), 365 days],
            [uint256(5), 30 days],
            [uint256(1), 100_000],
            [uint256(300), 30 days],
            [uint256(1 hours), 30 days],
            [uint256(10), 1 hours],
            [uint256(5), 30 days]
        ];
        bytes32[9] memory names = [
            bytes32("claimTimeout"),
            "pendingTimeout",
            "pendingExpiry",
            "responseTimeout",
            "responseBlocks",
            "lostTimeout",
            "reportGrace",
            "topUpNotice",
            "collectInterval"
        ];
        for (uint256 i = 0; i < 9; ++i) {
            (uint256 min, uint256 max) = (bounds[i][0], bounds[i][1]);
            Timeouts memory times = _with(i, min - 1);
            _outOfBounds(names[i], min - 1, min, max);
            _deploy(times, 0);
            times = _with(i, max + 1);
            _outOfBounds(names[i], max + 1, min, max);
            _deploy(times, 0);
            _deploy(_with(i, min), 0);
            _deploy(_with(i, max), 0);
        }
        _outOfBounds("feeBps", 2001, 0, 2000);
        _deploy(_times(), 2001);
    }

    function _with(uint256 field, uint256 value) private pure returns (Timeouts memory times) {
        times = _times();
        // The fields of a struct are consecutive in memory.
        assembly ("memory-safe") {
            mstore(add(times, mul(32, field)), value)
        }
        // A run can't be lost before its provider is silent.
        if (field == 3) times.lostTimeout = 30 days;
    }

    function test_addresses_that_can_not_be_are_refused() public {
        bytes4 invalid = IMetaScheduler.InvalidAddress.selector;
        Timeouts memory times = _times();
        vm.expectRevert(abi.encodeWithSelector(invalid, bytes32("credit")));
        this.make(ADMIN, Credit(STRANGER), registry, TREASURY, address(0), 0, times);
        Credit cents = new CentCredit(ADMIN, 0);
        vm.expectRevert(abi.encodeWithSelector(invalid, bytes32("credit")));
        this.make(ADMIN, cents, registry, TREASURY, address(0), 0, times);
        bytes memory decimals = abi.encodeCall(cents.decimals, ());
        vm.mockCall(address(credit), decimals, abi.encode(uint8(19)));
        vm.expectRevert(abi.encodeWithSelector(invalid, bytes32("credit")));
        this.make(ADMIN, credit, registry, TREASURY, address(0), 0, times);
        vm.clearMockedCalls();
        vm.expectRevert(abi.encodeWithSelector(invalid, bytes32("registry")));
        this.make(ADMIN, credit, ProviderRegistry(STRANGER), TREASURY, address(0), 0, times);
        vm.expectRevert(abi.encodeWithSelector(invalid, bytes32("treasury")));
        this.make(ADMIN, credit, registry, address(0), address(0), 0, times);
        address next = vm.computeCreateAddress(address(this), vm.getNonce(address(this)));
        vm.expectRevert(abi.encodeWithSelector(invalid, bytes32("treasury")));
        this.make(ADMIN, credit, registry, next, address(0), 0, times);
        vm.expectRevert();
        this.make(address(0), credit, registry, TREASURY, address(0), 0, times);
    }

    function test_a_forwarder_is_a_contract_or_none() public {
        Timeouts memory times = _times();
        vm.expectRevert(
            abi.encodeWithSelector(IMetaScheduler.InvalidAddress.selector, bytes32("forwarder"))
        );
        this.make(ADMIN, credit, registry, TREASURY, STRANGER, 0, times);
        MetaScheduler made =
            this.make(ADMIN, credit, registry, TREASURY, address(forwarder), 0, times);
        assertEq(made.trustedForwarder(), address(forwarder));
        assertTrue(made.isTrustedForwarder(address(forwarder)));
        made = _deploy(times, 0);
        assertEq(made.trustedForwarder(), address(0));
        assertFalse(made.isTrustedForwarder(address(forwarder)));
    }

    // ---------------------------------------------------------------------- fee

    function testFuzz_the_fee_stays_within_its_bound(uint16 fee) public {
        if (fee > 2000) {
            _outOfBounds("feeBps", fee, 0, 2000);
        } else {
            vm.expectEmit(address(grid));
            emit IMetaScheduler.FeeChanged(fee);
        }
        vm.prank(ADMIN);
        grid.setFee(fee);
        assertEq(grid.feeBps(), fee > 2000 ? 500 : fee);
    }

    function test_only_the_administrator_sets_fee_and_submissions() public {
        address[3] memory others = [STRANGER, SCHEDULER, customer(0)];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.startPrank(others[i]);
            vm.expectRevert();
            grid.setFee(0);
            vm.expectRevert();
            grid.setSubmissionsOpen(false);
            vm.stopPrank();
        }
    }

    function test_submissions_are_closed_and_opened() public {
        vm.startPrank(ADMIN);
        vm.expectEmit(address(grid));
        emit IMetaScheduler.SubmissionsChanged(false);
        grid.setSubmissionsOpen(false);
        assertFalse(grid.submissionsOpen());
        grid.setSubmissionsOpen(true);
        assertTrue(grid.submissionsOpen());
    }

    // ---------------------------------------------------------- two-step admin

    function test_administration_is_handed_over_in_two_steps_after_its_delay() public {
        MetaScheduler made = _deploy(_times(), 0);
        bytes32 adminRole = made.DEFAULT_ADMIN_ROLE();
        vm.startPrank(ADMIN);
        vm.expectRevert();
        made.grantRole(adminRole, STRANGER);
        made.beginDefaultAdminTransfer(STRANGER);
        vm.stopPrank();
        vm.startPrank(STRANGER);
        vm.expectRevert();
        made.acceptDefaultAdminTransfer();
        skip(1 days + 1);
        made.acceptDefaultAdminTransfer();
        made.setFee(1);
        vm.stopPrank();
        assertEq(made.defaultAdmin(), STRANGER);
        vm.prank(ADMIN);
        vm.expectRevert();
        made.setFee(0);
    }

    function test_a_revoked_scheduler_assigns_nothing() public {
        uint256 jobId = submit(customer(0), plain());
        bytes32 role = grid.METASCHEDULER_ROLE();
        vm.prank(ADMIN);
        grid.revokeRole(role, SCHEDULER);
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = assignment(1, one(jobId));
        vm.prank(SCHEDULER);
        vm.expectRevert();
        grid.metaSchedule(assignments);
    }

    // -------------------------------------------------------------------- views

    function test_views_of_jobs_agree() public {
        uint256 running = jobIn(JobStatus.RUNNING, plain());
        uint256 pending = submit(customer(1), plain());
        Job[] memory jobs = grid.getJobs(triple(running, pending, 99));
        assertEq(abi.encode(jobs[0]), abi.encode(grid.getJob(running)));
        assertEq(jobs[1].customer, customer(1));
        assertEq(uint8(jobs[2].status), uint8(JobStatus.NONE));
        assertEq(grid.deadline(running), vm.getBlockTimestamp() + LIMIT);
        assertEq(grid.deadline(pending), 0);
        assertEq(grid.deadline(99), 0);
        assertFalse(grid.isLost(99));
        assertFalse(grid.isLost(pending));
        assertEq(grid.getJobs(new uint256[](0)).length, 0);
    }

    /// @dev The table of the protocol, written independently of the contract.
    function test_the_transition_table_is_the_protocols() public view {
        uint256[10] memory rows = [
            bit(JobStatus.PENDING),
            bit(JobStatus.META_SCHEDULED) | bit(JobStatus.CANCELLED),
            bit(JobStatus.SCHEDULED) | bit(JobStatus.CANCELLED) | bit(JobStatus.PANICKED)
                | bit(JobStatus.PENDING),
            bit(JobStatus.RUNNING) | bit(JobStatus.CANCELLED) | bit(JobStatus.PANICKED)
                | bit(JobStatus.PENDING),
            bit(JobStatus.CANCELLED) | bit(JobStatus.FINISHED) | bit(JobStatus.FAILED)
                | bit(JobStatus.OUT_OF_CREDITS) | bit(JobStatus.PANICKED),
            0,
            0,
            0,
            0,
            0
        ];
        uint256 transitions;
        for (uint8 from = 0; from < 10; ++from) {
            for (uint8 to = 0; to < 10; ++to) {
                bool allowed = (rows[from] >> to) & 1 == 1;
                assertEq(grid.canTransition(JobStatus(from), JobStatus(to)), allowed);
                if (allowed) ++transitions;
            }
        }
        assertEq(transitions, 16);
    }
}
