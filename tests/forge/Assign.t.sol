// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {Assignment, Job, JobStatus, JobTerms} from "../../contracts/types/JobTypes.sol";
import {Hardware, Offer, Prices} from "../../contracts/types/ProviderTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice `metaSchedule`, `selfSchedule` and `isEligible`.
contract AssignTest is GridTest {
    function _refused(uint256 jobId, uint16 providerId, bytes4 reason) private {
        (bool eligible, bytes4 told) = grid.isEligible(jobId, providerId);
        assertFalse(eligible);
        assertEq(told, reason);
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = assignment(providerId, one(jobId));
        vm.prank(SCHEDULER);
        refuses(reason, jobId);
        grid.metaSchedule(assignments);
    }

    function _accepted(uint256 jobId, uint16 providerId) private {
        (bool eligible, bytes4 told) = grid.isEligible(jobId, providerId);
        assertTrue(eligible);
        assertEq(told, bytes4(0));
        assign(jobId, providerId);
        assertEq(grid.getJob(jobId).providerId, providerId);
    }

    /// @dev Assigns a job and ends it, so that the provider's load is the same as before.
    function _acceptedAlone(uint256 jobId, uint16 providerId) private {
        _accepted(jobId, providerId);
        vm.prank(customer(0));
        grid.cancel(one(jobId));
    }

    function test_metaSchedule_fixes_provider_rate_and_fee() public {
        uint256 jobId = submit(customer(0), plain());
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobTransition(
            jobId, customer(0), provider(0), JobStatus.PENDING, JobStatus.META_SCHEDULED
        );
        vm.expectEmit(address(grid));
        emit IMetaScheduler.JobPriced(jobId, provider(0), RATE, 500);
        assign(jobId, 1);
        Job memory job = grid.getJob(jobId);
        assertEq(job.providerId, 1);
        assertEq(job.rate, RATE);
        assertEq(job.feeBps, 500);
        assertEq(grid.allotment(jobId), LIMIT);
    }

    function test_a_missing_role_reverts_at_once() public {
        uint256 jobId = submit(customer(0), plain());
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = assignment(1, one(jobId));
        address[4] memory others = [customer(0), provider(0), ADMIN, STRANGER];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.prank(others[i]);
            vm.expectRevert();
            grid.metaSchedule(assignments);
        }
        assertEq(uint8(statusOf(jobId)), uint8(JobStatus.PENDING));
    }

    function test_other_statuses_are_refused() public {
        refusedByTable(SCHEDULER, _meta, JobStatus.META_SCHEDULED, bit(JobStatus.PENDING));
        refusedByTable(provider(0), _self, JobStatus.META_SCHEDULED, bit(JobStatus.PENDING));
        (bool eligible, bytes4 reason) = grid.isEligible(jobAt(JobStatus.RUNNING), 1);
        assertFalse(eligible);
        assertEq(reason, IMetaScheduler.InvalidTransition.selector);
        (eligible, reason) = grid.isEligible(jobAt(JobStatus.NONE), 1);
        assertFalse(eligible);
        assertEq(reason, IMetaScheduler.InvalidTransition.selector);
    }

    // ----------------------------------------------------------------- standing

    function test_an_unknown_provider_is_refused() public {
        uint256 jobId = submit(customer(0), plain());
        _refused(jobId, 0, IMetaScheduler.ProviderNotActive.selector);
        _refused(jobId, 9, IMetaScheduler.ProviderNotActive.selector);
    }

    function test_a_draining_provider_is_refused() public {
        uint256 jobId = submit(customer(0), plain());
        vm.prank(provider(0));
        registry.setDraining(true);
        _refused(jobId, 1, IMetaScheduler.ProviderNotActive.selector);
        vm.prank(provider(0));
        registry.setDraining(false);
        _accepted(jobId, 1);
    }

    function test_a_banned_provider_is_refused() public {
        uint256 jobId = submit(customer(0), plain());
        vm.prank(ADMIN);
        registry.ban(provider(0), "test");
        _refused(jobId, 1, IMetaScheduler.ProviderNotActive.selector);
        vm.prank(ADMIN);
        registry.unban(provider(0));
        _accepted(jobId, 1);
    }

    function test_an_expired_approval_is_refused_and_its_last_second_is_not() public {
        uint256 first = submit(customer(0), plain());
        uint256 second = submit(customer(0), plain());
        vm.warp(registry.getProvider(provider(0)).approvedUntil);
        _accepted(first, 1);
        skip(1);
        _refused(second, 1, IMetaScheduler.ProviderNotActive.selector);
    }

    function test_a_silent_provider_is_refused_until_it_answers() public {
        silence(jobIn(JobStatus.META_SCHEDULED, plain()));
        uint256 jobId = submit(customer(0), plain());
        _refused(jobId, 1, IMetaScheduler.ProviderSilent.selector);
        vm.prank(provider(0));
        grid.answer();
        _accepted(jobId, 1);
    }

    function test_a_successor_goes_to_none_of_the_providers_that_lost_it() public {
        uint256 jobId = submit(customer(0), terms(3 * AMOUNT, LIMIT, 2, 2, 0));
        // From the higher ID to the lower one, then to a third: the order of the IDs does not matter.
        for (uint16 i = 2; i >= 1; --i) {
            _accepted(jobId, i);
            vm.startPrank(provider(i - 1));
            grid.claim(one(jobId));
            grid.start(one(jobId));
            grid.panic(one(jobId), "gone");
            vm.stopPrank();
            jobId = grid.jobCount();
            for (uint16 k = 2; k >= i; --k) {
                _refused(jobId, k, IMetaScheduler.ProviderExcluded.selector);
            }
        }
        _accepted(jobId, 3);
    }

    // ---------------------------------------------------------------------- fit

    /// @dev 4 nodes of 16 cpus, 65,536 MB and 2 gpus.
    function test_what_does_not_fit_a_node_is_refused() public {
        JobTerms memory big = terms(1e24, LIMIT, 1, 0, 0);
        big.cpusPerTask = 17;
        _refused(submit(customer(0), big), 1, IMetaScheduler.DoesNotFit.selector);
        big.cpusPerTask = 16;
        _acceptedAlone(submit(customer(0), big), 1);
        big.memPerCpu = 4097;
        _refused(submit(customer(0), big), 1, IMetaScheduler.DoesNotFit.selector);
        big.memPerCpu = 4096;
        _acceptedAlone(submit(customer(0), big), 1);
    }

    function test_more_tasks_than_the_nodes_take_are_refused() public {
        JobTerms memory many = terms(1e24, LIMIT, 32, 0, 0);
        _acceptedAlone(submit(customer(0), many), 1);
        many.tasks = 33;
        _refused(submit(customer(0), many), 1, IMetaScheduler.DoesNotFit.selector);
        // Three tasks of five CPUs per node; the sixteenth CPU remains unused.
        many.cpusPerTask = 5;
        many.tasks = 13;
        _refused(submit(customer(0), many), 1, IMetaScheduler.DoesNotFit.selector);
        many.tasks = 12;
        _acceptedAlone(submit(customer(0), many), 1);
        // Memory for two tasks per node.
        many.cpusPerTask = 1;
        many.memPerCpu = 32_768;
        many.tasks = 8;
        _acceptedAlone(submit(customer(0), many), 1);
        many.tasks = 9;
        _refused(submit(customer(0), many), 1, IMetaScheduler.DoesNotFit.selector);
    }

    function test_more_than_the_offer_is_refused() public {
        uint256 jobId = submit(customer(0), terms(1e24, LIMIT, 4, 0, 0));
        Offer[3] memory small = [Offer(7, 262_144, 8), Offer(64, 2047, 8), Offer(8, 2048, 0)];
        for (uint256 i = 0; i < 2; ++i) {
            vm.prank(provider(0));
            registry.setOffer(small[i]);
            _refused(jobId, 1, IMetaScheduler.DoesNotFit.selector);
        }
        vm.prank(provider(0));
        registry.setOffer(small[2]);
        _acceptedAlone(jobId, 1);
        JobTerms memory gpu = terms(1e24, LIMIT, 1, 0, 0);
        gpu.gpus = 1;
        uint256 second = submit(customer(0), gpu);
        _refused(second, 1, IMetaScheduler.DoesNotFit.selector);
        vm.prank(provider(0));
        registry.setOffer(Offer(8, 2048, 1));
        _acceptedAlone(second, 1);
        assertEq(grid.getJob(second).rate, 2e12 + 512e9 + 5e13);
        // An offer has more bits than the gpus of one node.
        address large = address(0xB9);
        vm.prank(large);
        registry.register(Hardware(65_536, 2, 512, 1), prices(1e12), new string[](0));
        vm.prank(ADMIN);
        registry.approve(large, 1);
        _acceptedAlone(submit(customer(0), gpu), 4);
    }

    function test_a_rate_of_zero_is_refused() public {
        vm.prank(provider(0));
        registry.setPrices(Prices(0, 1, 0));
        uint256 jobId = submit(customer(0), plain());
        _refused(jobId, 1, IMetaScheduler.RateOutOfRange.selector);
    }

    function test_a_rate_beyond_its_field_is_refused() public {
        address rich = address(0xB9);
        vm.prank(rich);
        registry.register(
            Hardware(1, 65_535, type(uint32).max, 0), Prices(0, 0, 1e19), new string[](0)
        );
        vm.prank(ADMIN);
        registry.approve(rich, 1);
        // 472 MB at 1e19 each give the last whole rate below 2^72.
        JobTerms memory terms_ = terms(uint96(1e28), 1, 1, 0, 0);
        terms_.cpusPerTask = 1;
        terms_.memPerCpu = 473;
        _refused(submit(customer(0), terms_), 4, IMetaScheduler.RateOutOfRange.selector);
        terms_.memPerCpu = 472;
        _accepted(submit(customer(0), terms_), 4);
        // 481 divides 2^72 - 1, so the largest possible rate can be reached.
        vm.prank(rich);
        registry.setPrices(Prices(uint64(type(uint72).max / 481), 0, 0));
        terms_.cpusPerTask = 481;
        terms_.memPerCpu = 1;
        uint256 jobId = submit(customer(0), terms_);
        _accepted(jobId, 4);
        assertEq(grid.getJob(jobId).rate, type(uint72).max);
    }

    function test_more_than_the_escrow_buys_is_refused() public {
        uint256 cost = RATE * LIMIT;
        uint256 jobId = submit(customer(0), terms(uint96(cost - 1), LIMIT, 2, 0, 0));
        _refused(jobId, 1, IMetaScheduler.OverBudget.selector);
        vm.prank(STRANGER);
        grid.topUp(jobId, customer(0), 1);
        _accepted(jobId, 1);
    }

    /// @dev Each group has its own maximum prices: risen prices refuse that group only.
    function test_a_tariff_that_has_risen_refuses_its_group_alone() public {
        uint256 jobId = submit(customer(0), terms(4 * AMOUNT, LIMIT, 2, 0, 0));
        uint256 second = submit(customer(0), plain());
        Assignment[] memory assignments = new Assignment[](3);
        assignments[0] = Assignment(2, prices(2e12 - 1000), one(jobId));
        assignments[1] = Assignment(3, prices(3e12), one(jobId));
        assignments[2] = Assignment(1, prices(1e12), one(second));
        skips(jobId, JobStatus.PENDING, IMetaScheduler.PriceRaised.selector);
        vm.prank(SCHEDULER);
        grid.metaSchedule(assignments);
        assertEq(grid.getJob(jobId).providerId, 3);
        assertEq(grid.getJob(jobId).rate, 3 * RATE);
        assertEq(grid.getJob(second).rate, RATE);
    }

    function test_a_missing_standing_is_told_before_a_risen_tariff() public {
        uint256 jobId = submit(customer(0), plain());
        vm.prank(provider(0));
        registry.setDraining(true);
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = Assignment(1, prices(0), one(jobId));
        vm.prank(SCHEDULER);
        refuses(IMetaScheduler.ProviderNotActive.selector, jobId);
        grid.metaSchedule(assignments);
    }

    function test_an_offer_cut_in_front_of_an_assignment_refuses_it() public {
        uint256 jobId = submit(customer(0), plain());
        vm.prank(provider(0));
        registry.setOffer(Offer(0, 0, 0));
        _refused(jobId, 1, IMetaScheduler.DoesNotFit.selector);
    }

    /// @dev `isEligible` agrees with `metaSchedule`, and the rate follows from the prices.
    function testFuzz_eligible_means_that_the_assignment_succeeds(
        Shape memory shape,
        Prices memory prices_,
        Offer memory offer
    ) public {
        JobTerms memory terms_ = shaped(shape);
        terms_.amount = uint96(bound(terms_.amount, 1, 1e28));
        terms_.timeLimit = uint24(bound(terms_.timeLimit, 1, 10_000));
        terms_.tasks = uint16(bound(terms_.tasks, 1, 70));
        terms_.cpusPerTask = uint16(bound(terms_.cpusPerTask, 1, 18));
        terms_.memPerCpu = uint24(bound(terms_.memPerCpu, 1, 70_000));
        terms_.gpus = terms_.gpus % 10;
        prices_ = Prices(
            uint64(bound(prices_.cpu, 0, 1e19)),
            uint64(bound(prices_.gpu, 0, 1e19)),
            uint64(bound(prices_.mem, 0, 1e16))
        );
        vm.startPrank(provider(0));
        registry.setPrices(prices_);
        registry.setOffer(
            Offer(
                uint32(bound(offer.cpus, 0, 64)),
                uint48(bound(offer.mem, 0, 262_144)),
                uint32(bound(offer.gpus, 0, 8))
            )
        );
        vm.stopPrank();
        uint256 jobId = submit(customer(0), terms_);
        (bool eligible, bytes4 reason) = grid.isEligible(jobId, 1);
        if (!eligible) return _refused(jobId, 1, reason);
        assign(jobId, 1);
        uint256 cpus = uint256(terms_.tasks) * terms_.cpusPerTask;
        uint256 rate = cpus * prices_.cpu + uint256(terms_.gpus) * prices_.gpu + cpus
            * terms_.memPerCpu * prices_.mem;
        assertEq(grid.getJob(jobId).rate, rate);
        assertLe(rate * terms_.timeLimit, terms_.amount);
        assertGt(rate, 0);
    }

    // ------------------------------------------------------------------ batches

    function test_an_empty_batch_is_refused() public {
        vm.prank(SCHEDULER);
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.metaSchedule(new Assignment[](0));
        vm.prank(SCHEDULER);
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.metaSchedule(new Assignment[](2));
        vm.expectRevert(IMetaScheduler.EmptyBatch.selector);
        grid.selfSchedule(new uint256[](0));
    }

    function test_refused_items_are_skipped_and_the_others_applied() public {
        uint256 first = submit(customer(0), plain());
        uint256 poor = submit(customer(0), terms(1, LIMIT, 2, 0, 0));
        uint256 second = submit(customer(1), terms(AMOUNT * 2, LIMIT, 2, 0, 0));
        vm.prank(provider(2));
        registry.setDraining(true);
        Assignment[] memory assignments = new Assignment[](4);
        assignments[0] = assignment(1, triple(first, poor, first));
        assignments[1] = assignment(9, one(second));
        assignments[2] = assignment(3, one(second));
        assignments[3] = assignment(2, one(second));
        skips(poor, JobStatus.PENDING, IMetaScheduler.OverBudget.selector);
        skips(first, JobStatus.META_SCHEDULED, IMetaScheduler.InvalidTransition.selector);
        skips(second, JobStatus.PENDING, IMetaScheduler.ProviderNotActive.selector);
        skips(second, JobStatus.PENDING, IMetaScheduler.ProviderNotActive.selector);
        vm.prank(SCHEDULER);
        grid.metaSchedule(assignments);
        assertEq(grid.getJob(first).providerId, 1);
        assertEq(grid.getJob(second).providerId, 2);
        assertEq(grid.getJob(second).rate, 2 * RATE);
        assertEq(uint8(statusOf(poor)), uint8(JobStatus.PENDING));
        // Only a successful assignment records its provider.
        assertEq(grid.clockOf(2).account, provider(1));
        assertEq(grid.clockOf(3).account, address(0));
    }

    // -------------------------------------------------------------- selfSchedule

    function test_selfSchedule_waits_for_the_pending_timeout() public {
        uint256 jobId = submit(customer(0), plain());
        uint256 later = submit(customer(0), plain());
        skip(PENDING_TIMEOUT - 1);
        vm.prank(provider(0));
        refuses(IMetaScheduler.TooEarly.selector, jobId);
        grid.selfSchedule(one(jobId));
        skip(1);
        vm.prank(provider(0));
        grid.selfSchedule(one(jobId));
        assertEq(grid.getJob(jobId).providerId, 1);
        assertEq(grid.getJob(jobId).rate, RATE);
        assertEq(grid.getJob(jobId).feeBps, 500);
        skip(1);
        vm.prank(provider(0));
        grid.selfSchedule(one(later));
        assertEq(grid.getJob(later).providerId, 1);
    }

    function test_selfSchedule_is_refused_where_the_customer_forbids_it() public {
        for (uint8 flags = 0; flags < 8; ++flags) {
            uint256 jobId = submit(customer(0), terms(AMOUNT, LIMIT, 2, 0, flags));
            skip(PENDING_TIMEOUT);
            vm.prank(provider(0));
            if (flags & NO_SELF_SCHEDULING != 0) {
                refuses(IMetaScheduler.SelfSchedulingForbidden.selector, jobId);
            }
            grid.selfSchedule(one(jobId));
        }
    }

    function test_selfSchedule_refuses_an_ineligible_provider() public {
        uint256 jobId = submit(customer(0), plain());
        skip(PENDING_TIMEOUT);
        vm.prank(STRANGER);
        refuses(IMetaScheduler.ProviderNotActive.selector, jobId);
        grid.selfSchedule(one(jobId));
        vm.prank(provider(1));
        refuses(IMetaScheduler.OverBudget.selector, jobId);
        grid.selfSchedule(one(jobId));
    }

    function test_selfSchedule_refuses_a_provider_that_the_job_was_requeued_from() public {
        uint256 jobId = jobIn(JobStatus.META_SCHEDULED, plain());
        vm.prank(provider(0));
        grid.requeue(one(jobId), "full");
        assertTrue(grid.isBarred(jobId, 1));
        skip(PENDING_TIMEOUT);
        vm.prank(provider(0));
        refuses(IMetaScheduler.ProviderExcluded.selector, jobId);
        grid.selfSchedule(one(jobId));
        _accepted(jobId, 1);
    }

    function _meta(uint256 jobId) private view returns (bytes memory) {
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = assignment(1, one(jobId));
        return abi.encodeCall(grid.metaSchedule, (assignments));
    }

    function _self(uint256 jobId) private view returns (bytes memory) {
        return abi.encodeCall(grid.selfSchedule, (one(jobId)));
    }
}
