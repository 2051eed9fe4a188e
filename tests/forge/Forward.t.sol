// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ERC2771Forwarder} from "@openzeppelin/contracts/metatx/ERC2771Forwarder.sol";
import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {Errors} from "@openzeppelin/contracts/utils/Errors.sol";

import {Credit} from "../../contracts/Credit.sol";
import {MetaScheduler} from "../../contracts/MetaScheduler.sol";
import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {BlockingCredit} from "../../contracts/test/HostileCredits.sol";
import {
    Assignment,
    JobRequest,
    JobStatus,
    Permit,
    Report
} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @dev Exposes what the scheduler's contracts use as the data of a call.
contract DataOfCall is MetaScheduler {
    constructor(MetaScheduler grid, address forwarder)
        MetaScheduler(
            address(0xA0),
            0,
            grid.credit(),
            grid.registry(),
            grid.treasury(),
            forwarder,
            0,
            grid.timeouts()
        )
    {}

    function dataOfCall() external view returns (address, bytes memory, address) {
        return (_msgSender(), _msgData(), _customerSender());
    }
}

/// @notice [17] Customers' calls through the trusted forwarder have the effect of the signer's own call, once.
contract ForwardTest is GridTest {
    function newCredit() internal override returns (Credit) {
        return new BlockingCredit(ADMIN, 0);
    }

    function _relay(ERC2771Forwarder.ForwardRequestData memory request) private {
        vm.prank(STRANGER);
        forwarder.execute(request);
    }

    function _requests() private pure returns (JobRequest[] memory requests) {
        requests = new JobRequest[](1);
        requests[0] = JobRequest(plain(), new bytes32[](1));
        requests[0].definitions[0] = "x";
    }

    /// @dev Records, balances and parked sums after a customer's call.
    function _state() private view returns (bytes32) {
        uint256[] memory ids = new uint256[](grid.jobCount());
        for (uint256 i = 0; i < ids.length; ++i) {
            ids[i] = i + 1;
        }
        return keccak256(
            abi.encode(
                grid.getJobs(ids),
                credit.balanceOf(customer(0)),
                credit.balanceOf(STRANGER),
                credit.balanceOf(address(forwarder)),
                credit.balanceOf(address(grid)),
                grid.parkedOf(customer(0))
            )
        );
    }

    /// @dev The caller is then the signer, not the forwarder.
    function _assertSameAsDirect(bytes memory data) private {
        uint256 snapshot = vm.snapshotState();
        vm.prank(customer(0));
        (bool done,) = address(grid).call(data);
        assertTrue(done);
        bytes32 direct = _state();
        vm.revertToState(snapshot);
        bytes32 before = _state();
        ERC2771Forwarder.ForwardRequestData memory request = signedByCustomer(0, data);
        _relay(request);
        assertEq(_state(), direct);
        assertNotEq(direct, before);
        vm.prank(STRANGER);
        vm.expectPartialRevert(ERC2771Forwarder.ERC2771ForwarderInvalidSigner.selector);
        forwarder.execute(request);
        assertEq(_state(), direct);
    }

    function test_submitJobs_is_the_signers() public {
        _assertSameAsDirect(abi.encodeCall(grid.submitJobs, (_requests())));
        assertEq(grid.getJob(1).customer, customer(0));
    }

    function test_a_permit_and_a_submission_need_no_coin_and_no_allowance() public {
        Permit memory permit = permitOf(0, AMOUNT);
        vm.prank(customer(0));
        credit.approve(address(grid), 0);
        bytes memory data = abi.encodeCall(grid.submitJobsWithPermit, (_requests(), permit));
        assertEq(customer(0).balance, 0);
        _relay(signedByCustomer(0, data));
        assertEq(grid.getJob(1).customer, customer(0));
        assertEq(credit.balanceOf(customer(0)), FUNDS - AMOUNT);
    }

    function test_cancel_is_the_signers() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        skip(10);
        _assertSameAsDirect(abi.encodeCall(grid.cancel, (one(jobId))));
    }

    function test_cancel_of_another_customers_job_is_refused() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        ERC2771Forwarder.ForwardRequestData memory request =
            signedByCustomer(1, abi.encodeCall(grid.cancel, (one(jobId))));
        vm.prank(STRANGER);
        vm.expectRevert(Errors.FailedCall.selector);
        forwarder.execute(request);
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.RUNNING));
    }

    function test_topUp_is_the_signers_and_lengthens_a_limit() public {
        uint256 jobId = jobIn(JobStatus.RUNNING, plain());
        uint96 amount = uint96(60 * RATE);
        _assertSameAsDirect(abi.encodeCall(grid.topUp, (jobId, customer(0), amount)));
        assertEq(grid.getJob(jobId).timeLimit, LIMIT + 60);
    }

    function test_topUpWithPermit_is_the_signers() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        Permit memory permit = permitOf(0, 5);
        vm.prank(customer(0));
        credit.approve(address(grid), 0);
        _relay(
            signedByCustomer(
                0, abi.encodeCall(grid.topUpWithPermit, (jobId, customer(0), 5, permit))
            )
        );
        assertEq(grid.getJob(jobId).escrow, AMOUNT + 5);
        assertEq(credit.balanceOf(customer(0)), FUNDS - AMOUNT - 5);
    }

    function test_withdraw_is_the_signers() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        BlockingCredit(address(credit)).setBlocked(customer(0), true);
        vm.prank(customer(0));
        grid.cancel(one(jobId));
        assertEq(grid.parkedOf(customer(0)), AMOUNT);
        BlockingCredit(address(credit)).setBlocked(customer(0), false);
        _assertSameAsDirect(abi.encodeCall(grid.withdraw, (customer(0))));
        assertEq(credit.balanceOf(customer(0)), FUNDS);
    }

    function test_a_request_that_was_changed_or_is_late_is_refused() public {
        bytes memory data = abi.encodeCall(grid.submitJobs, (_requests()));
        ERC2771Forwarder.ForwardRequestData memory request = signedByCustomer(0, data);
        request.from = customer(1);
        vm.expectPartialRevert(ERC2771Forwarder.ERC2771ForwarderInvalidSigner.selector);
        forwarder.execute(request);
        request = signedByCustomer(0, data);
        request.data = abi.encodeCall(grid.withdraw, (STRANGER));
        vm.expectPartialRevert(ERC2771Forwarder.ERC2771ForwarderInvalidSigner.selector);
        forwarder.execute(request);
        request = signedByCustomer(0, data);
        skip(1);
        vm.expectPartialRevert(ERC2771Forwarder.ERC2771ForwarderExpiredRequest.selector);
        forwarder.execute(request);
        assertEq(grid.jobCount(), 0);
    }

    /// @dev Only from the trusted forwarder is the data after the arguments used.
    function test_nobody_else_names_a_signer() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        bytes memory data = abi.encodePacked(abi.encodeCall(grid.cancel, (one(jobId))), customer(0));
        ERC2771Forwarder other = new ERC2771Forwarder("DeepSquare");
        address[4] memory callers = [STRANGER, provider(0), ADMIN, address(other)];
        for (uint256 i = 0; i < callers.length; ++i) {
            vm.prank(callers[i]);
            (bool done, bytes memory answer) = address(grid).call(data);
            assertFalse(done);
            assertEq(answer, abi.encodeWithSelector(IMetaScheduler.NotCustomer.selector, jobId));
            assertFalse(grid.isTrustedForwarder(callers[i]));
        }
        assertTrue(grid.isTrustedForwarder(address(forwarder)));
        assertEq(grid.trustedForwarder(), address(forwarder));
    }

    function test_only_customers_functions_read_the_signer() public {
        DataOfCall shown = new DataOfCall(grid, address(forwarder));
        bytes memory data = abi.encodePacked(abi.encodeCall(shown.dataOfCall, ()), customer(0));
        vm.prank(address(forwarder));
        (bool done, bytes memory answer) = address(shown).call(data);
        assertTrue(done);
        assertEq(answer, abi.encode(address(forwarder), data, customer(0)));
        vm.prank(STRANGER);
        (done, answer) = address(shown).call(data);
        assertEq(answer, abi.encode(STRANGER, data, STRANGER));
    }

    function test_providers_functions_take_the_plain_sender() public {
        uint256 assigned = jobIn(JobStatus.META_SCHEDULED, plain());
        uint256 scheduled = jobIn(JobStatus.SCHEDULED, plain());
        uint256 running = jobIn(JobStatus.RUNNING, terms(AMOUNT, LIMIT, 2, 0, INTERIM_PAYMENTS));
        uint256 pending = jobIn(JobStatus.PENDING, plain());
        // Enough time for each of these calls to succeed as the provider's own.
        skip(LIMIT - 1);
        vm.prank(STRANGER);
        grid.challenge(running);
        Report[] memory reports = new Report[](1);
        reports[0] = Report(running, 1, 0, 0, "");
        _notForwarded(0, abi.encodeCall(grid.claim, (one(assigned))));
        _notForwarded(0, abi.encodeCall(grid.claimAndStart, (one(assigned))));
        _notForwarded(0, abi.encodeCall(grid.start, (one(scheduled))));
        _notForwarded(0, abi.encodeCall(grid.collect, (one(running))));
        _notForwarded(0, abi.encodeCall(grid.finish, (reports)));
        _notForwarded(0, abi.encodeCall(grid.requeue, (one(assigned), "")));
        _notForwarded(0, abi.encodeCall(grid.requeue, (one(scheduled), "")));
        _notForwarded(0, abi.encodeCall(grid.panic, (one(running), "")));
        _notForwarded(0, abi.encodeCall(grid.answer, ()));
        skip(PENDING_TIMEOUT);
        _notForwarded(1, abi.encodeCall(grid.selfSchedule, (one(pending))));
    }

    function test_roles_take_the_plain_sender() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        bytes32 scheduler = grid.METASCHEDULER_ROLE();
        vm.startPrank(ADMIN);
        grid.grantRole(scheduler, provider(0));
        grid.beginDefaultAdminTransfer(provider(0));
        vm.stopPrank();
        skip(1);
        vm.prank(provider(0));
        grid.acceptDefaultAdminTransfer();
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = assignment(1, one(jobId));
        _notForwarded(0, abi.encodeCall(grid.metaSchedule, (assignments)));
        _notForwarded(0, abi.encodeCall(grid.setFee, (0)));
        _notForwarded(0, abi.encodeCall(grid.setSubmissionsOpen, (false)));
        _notForwarded(0, abi.encodeCall(IAccessControl.grantRole, (scheduler, STRANGER)));
        _notForwarded(0, abi.encodeCall(IAccessControl.renounceRole, (scheduler, provider(0))));
    }

    function _notForwarded(uint256 who, bytes memory data) private {
        bytes32 before = _state();
        ERC2771Forwarder.ForwardRequestData memory request = signedByProvider(who, data);
        vm.prank(STRANGER);
        vm.expectRevert(Errors.FailedCall.selector);
        forwarder.execute(request);
        assertEq(_state(), before);
    }

    /// @dev Batches of one transaction are independent: each pays exactly its own recipients.
    function test_several_batches_of_one_transaction_pay_as_they_would_alone() public {
        uint256[][] memory mine = new uint256[][](2);
        for (uint256 c = 0; c < 2; ++c) {
            mine[c] = new uint256[](4);
            for (uint256 i = 0; i < 4; ++i) {
                mine[c][i] = _runOf(customer(c), i % 3);
            }
        }
        skip(10);
        ERC2771Forwarder.ForwardRequestData[] memory requests =
            new ERC2771Forwarder.ForwardRequestData[](3);
        requests[0] = signedByCustomer(0, abi.encodeCall(grid.cancel, (mine[0])));
        requests[1] = signedByCustomer(1, abi.encodeCall(grid.cancel, (mine[1])));
        // Nothing is left to cancel: the third call fails, and the effects of the others remain.
        requests[2] = signedByCustomer(2, abi.encodeCall(grid.cancel, (mine[0])));
        vm.prank(STRANGER);
        forwarder.executeBatch(requests, payable(STRANGER));
        uint256 cost = 10 * RATE;
        // Two customers, two runs each at the first provider, one each at the more expensive ones.
        assertEq(credit.balanceOf(provider(0)), 4 * (cost - cost / 20));
        assertEq(credit.balanceOf(provider(1)), 2 * (2 * cost - 2 * cost / 20));
        assertEq(credit.balanceOf(provider(2)), 2 * (3 * cost - 3 * cost / 20));
        assertEq(credit.balanceOf(TREASURY), 14 * (cost / 20));
        assertEq(credit.balanceOf(customer(0)), FUNDS - 7 * cost);
        assertEq(credit.balanceOf(customer(1)), FUNDS - 7 * cost);
        assertEq(credit.balanceOf(address(grid)), 0);
    }

    function _runOf(address owner, uint256 who) private returns (uint256 jobId) {
        jobId = submit(owner, terms(3 * AMOUNT, LIMIT, 2, 0, 0));
        assign(jobId, uint16(who + 1));
        vm.prank(provider(who));
        grid.claimAndStart(one(jobId));
    }

    /// @dev All of them or none, because no refund receiver is named.
    function test_many_customers_submit_in_one_transaction() public {
        ERC2771Forwarder.ForwardRequestData[] memory requests =
            new ERC2771Forwarder.ForwardRequestData[](CUSTOMERS);
        for (uint256 i = 0; i < CUSTOMERS; ++i) {
            requests[i] = signedByCustomer(i, abi.encodeCall(grid.submitJobs, (_requests())));
        }
        vm.prank(STRANGER);
        forwarder.executeBatch(requests, payable(address(0)));
        for (uint256 i = 0; i < CUSTOMERS; ++i) {
            assertEq(grid.getJob(i + 1).customer, customer(i));
            assertEq(credit.balanceOf(customer(i)), FUNDS - AMOUNT);
        }
    }

    function test_the_forwarder_itself_owns_nothing_and_calls_nothing_else() public {
        uint256 jobId = jobIn(JobStatus.PENDING, plain());
        ERC2771Forwarder.ForwardRequestData memory request =
            signedByCustomer(0, abi.encodeCall(grid.cancel, (one(jobId))));
        request.to = address(credit);
        vm.expectPartialRevert(ERC2771Forwarder.ERC2771UntrustfulTarget.selector);
        forwarder.execute(request);
        request.to = address(registry);
        vm.expectPartialRevert(ERC2771Forwarder.ERC2771UntrustfulTarget.selector);
        forwarder.execute(request);
        assertEq(credit.allowance(address(forwarder), address(grid)), 0);
    }
}
