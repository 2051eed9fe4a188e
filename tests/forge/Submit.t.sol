// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {
    Job,
    JobRequest,
    JobStatus,
    JobTerms,
    Objective,
    Permit
} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice `submitJobs` and `submitJobsWithPermit`.
contract SubmitTest is GridTest {
    function _requests(JobTerms memory terms_, uint256 count)
        private
        pure
        returns (JobRequest[] memory requests)
    {
        requests = new JobRequest[](1);
        requests[0] = JobRequest(terms_, new bytes32[](count));
        for (uint256 i = 0; i < count; ++i) {
            requests[0].definitions[i] = keccak256(abi.encode(i));
        }
    }

    function _refused(JobTerms memory terms_, bytes32 field) private {
        JobRequest[] memory requests = _requests(terms_, 1);
        vm.prank(customer(0));
        vm.expectRevert(abi.encodeWithSelector(IMetaScheduler.InvalidTerms.selector, field));
        grid.submitJobs(requests);
    }

    /// @dev Every packed field is read back unchanged, at any value.
    function testFuzz_the_record_holds_the_terms(Shape memory shape, uint8 count) public {
        JobTerms memory terms_ = shaped(shape);
        count = uint8(bound(count, 1, 4));
        terms_.amount = uint96(bound(terms_.amount, 1, FUNDS / 8));
        if (terms_.timeLimit == 0) terms_.timeLimit = type(uint24).max;
        if (terms_.tasks == 0) terms_.tasks = type(uint16).max;
        if (terms_.cpusPerTask == 0) terms_.cpusPerTask = type(uint16).max;
        if (terms_.memPerCpu == 0) terms_.memPerCpu = type(uint24).max;
        JobRequest[] memory requests = _requests(terms_, count);
        vm.prank(customer(0));
        assertEq(grid.submitJobs(requests), 1);
        assertEq(grid.jobCount(), count);
        for (uint256 id = 1; id <= count; ++id) {
            Job memory expected = Job({
                customer: customer(0),
                status: JobStatus.PENDING,
                since: uint32(block.timestamp),
                providerId: 0,
                memPerCpu: terms_.memPerCpu,
                retriesLeft: terms_.retries,
                flags: terms_.flags,
                escrow: terms_.amount,
                rate: 0,
                timeLimit: terms_.timeLimit,
                tasks: terms_.tasks,
                cpusPerTask: terms_.cpusPerTask,
                gpus: terms_.gpus,
                feeBps: 0,
                definition: keccak256(abi.encode(id - 1)),
                retryOf: 0
            });
            assertEq(abi.encode(grid.getJob(id)), abi.encode(expected));
        }
        assertEq(credit.balanceOf(address(grid)), uint256(terms_.amount) * count);
        assertEq(credit.balanceOf(customer(0)), FUNDS - uint256(terms_.amount) * count);
    }

    function test_the_terms_are_told_with_the_id() public {
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobSubmitted(1, customer(0), keccak256(abi.encode(0)), plain());
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobTransition(
            1, customer(0), address(0), JobStatus.NONE, JobStatus.PENDING
        );
        vm.prank(customer(0));
        grid.submitJobs(_requests(plain(), 1));
    }

    function test_ids_are_dense_over_requests() public {
        JobRequest[] memory requests = new JobRequest[](2);
        requests[0] = _requests(plain(), 2)[0];
        requests[1] = _requests(retried(3), 1)[0];
        vm.prank(customer(0));
        assertEq(grid.submitJobs(requests), 1);
        vm.prank(customer(1));
        assertEq(grid.submitJobs(requests), 4);
        assertEq(grid.getJob(3).retriesLeft, 3);
        assertEq(grid.getJob(6).customer, customer(1));
        assertEq(credit.balanceOf(address(grid)), 6 * uint256(AMOUNT));
    }

    /// @dev The counter shares its slot with fee and switch; the test finds the slot by its content.
    function test_ids_have_64_bits() public {
        submit(customer(0), plain());
        uint256 slot;
        uint256 rest = (500 << 64) | (1 << 80);
        while (uint256(vm.load(address(grid), bytes32(slot))) != rest | 1) ++slot;
        uint256 last = type(uint64).max - 1;
        vm.store(address(grid), bytes32(slot), bytes32(rest | last));
        assertEq(submit(customer(0), plain()), last + 1);
        assertEq(grid.jobCount(), last + 1);
        assertEq(grid.feeBps(), 500);
    }

    function test_zero_or_too_long_terms_are_refused() public {
        JobTerms memory bad = plain();
        bad.amount = 0;
        _refused(bad, "amount");
        bad = plain();
        bad.timeLimit = 0;
        _refused(bad, "timeLimit");
        bad = plain();
        bad.tasks = 0;
        _refused(bad, "tasks");
        bad = plain();
        bad.cpusPerTask = 0;
        _refused(bad, "cpusPerTask");
        bad = plain();
        bad.memPerCpu = 0;
        _refused(bad, "memPerCpu");
        bad = plain();
        bad.retries = 6;
        _refused(bad, "retries");
        for (uint256 flag = 8; flag < 256; flag *= 2) {
            bad = plain();
            bad.flags = uint8(flag);
            _refused(bad, "flags");
            bad.flags = uint8(flag) | 7;
            _refused(bad, "flags");
        }
        bad = plain();
        bad.name = string(new bytes(65));
        _refused(bad, "name");
        bad = plain();
        bad.uses = string(new bytes(513));
        _refused(bad, "uses");
    }

    function test_terms_at_their_bounds_are_accepted() public {
        JobTerms memory terms_ = JobTerms(
            1,
            type(uint24).max,
            type(uint16).max,
            type(uint16).max,
            type(uint24).max,
            type(uint16).max,
            5,
            7,
            Objective.ENERGY,
            string(new bytes(64)),
            string(new bytes(512))
        );
        uint256 jobId = submit(customer(0), terms_);
        assertEq(grid.getJob(jobId).escrow, 1);
        (bool eligible, bytes4 reason) = grid.isEligible(jobId, 1);
        assertFalse(eligible);
        assertEq(reason, IMetaScheduler.DoesNotFit.selector);
    }

    function test_a_zero_definition_is_refused() public {
        JobRequest[] memory requests = _requests(plain(), 2);
        requests[0].definitions[1] = 0;
        vm.prank(customer(0));
        vm.expectRevert(
            abi.encodeWithSelector(IMetaScheduler.InvalidTerms.selector, bytes32("definition"))
        );
        grid.submitJobs(requests);
    }

    function test_an_empty_batch_is_refused() public {
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.submitJobs(new JobRequest[](0));
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.submitJobs(_requests(plain(), 0));
    }

    function test_closed_submissions_are_refused() public {
        vm.prank(ADMIN);
        grid.setSubmissionsOpen(false);
        vm.prank(customer(0));
        vm.expectRevert(IMetaScheduler.SubmissionsClosed.selector);
        grid.submitJobs(_requests(plain(), 1));
    }

    function test_without_credits_nothing_is_kept() public {
        vm.prank(customer(0));
        credit.approve(address(grid), AMOUNT - 1);
        vm.prank(customer(0));
        vm.expectRevert();
        grid.submitJobs(_requests(plain(), 1));
        assertEq(grid.jobCount(), 0);
        assertEq(grid.getJob(1).customer, address(0));
    }

    // ------------------------------------------------------------------ permits

    function test_a_permit_replaces_the_allowance() public {
        (address owner, Permit memory permit) = signed(AMOUNT);
        vm.prank(owner);
        grid.submitJobsWithPermit(_requests(plain(), 1), permit);
        assertEq(grid.getJob(1).customer, owner);
        assertEq(credit.nonces(owner), 1);
    }

    function test_a_permit_that_somebody_else_used_first_stops_nobody() public {
        (address owner, Permit memory permit) = signed(AMOUNT);
        vm.prank(STRANGER);
        credit.permit(
            owner, address(grid), permit.value, permit.deadline, permit.v, permit.r, permit.s
        );
        vm.prank(owner);
        grid.submitJobsWithPermit(_requests(plain(), 1), permit);
        assertEq(grid.getJob(1).customer, owner);
    }

    function test_a_permit_is_used_once() public {
        (address owner, Permit memory permit) = signed(AMOUNT);
        vm.startPrank(owner);
        grid.submitJobsWithPermit(_requests(plain(), 1), permit);
        vm.expectRevert();
        grid.submitJobsWithPermit(_requests(plain(), 1), permit);
        vm.stopPrank();
        assertEq(grid.jobCount(), 1);
    }

    function test_a_permit_of_somebody_else_spends_nothing_of_theirs() public {
        (address owner, Permit memory permit) = signed(AMOUNT);
        address thief = address(0xBAD);
        vm.prank(thief);
        vm.expectRevert();
        grid.submitJobsWithPermit(_requests(plain(), 1), permit);
        assertEq(credit.balanceOf(owner), FUNDS);
    }
}
