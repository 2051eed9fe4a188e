// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {
    Assignment,
    JobStatus,
    JobTerms,
    ProviderLoad,
    Report
} from "../../contracts/types/JobTypes.sol";
import {Hardware, Offer} from "../../contracts/types/ProviderTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice [16] Resources of live assigned jobs: `loadOf`, and the remaining capacity.
contract LoadTest is GridTest {
    /// @dev 2 tasks of 3 CPUs with 100 MB per CPU, 1 GPU.
    function _sized() private pure returns (JobTerms memory terms_) {
        terms_ = terms(1e18, LIMIT, 2, 1, INTERIM_PAYMENTS);
        (terms_.cpusPerTask, terms_.memPerCpu, terms_.gpus) = (3, 100, 1);
    }

    function _assertLoad(uint16 providerId, uint256 jobs) private view {
        ProviderLoad memory load = grid.loadOf(providerId);
        assertEq(load.cpus, 6 * jobs);
        assertEq(load.mem, 600 * jobs);
        assertEq(load.gpus, jobs);
    }

    function _assigned(uint16 providerId) private returns (uint256 jobId) {
        jobId = submit(customer(0), _sized());
        assign(jobId, providerId);
    }

    function test_an_assignment_adds_and_claim_start_and_collect_leave_it() public {
        _assertLoad(1, 0);
        uint256 first = jobIn(JobStatus.META_SCHEDULED, _sized());
        _assertLoad(1, 1);
        uint256 second = submit(customer(0), _sized());
        skip(PENDING_TIMEOUT);
        vm.prank(provider(0));
        grid.selfSchedule(one(second));
        _assertLoad(1, 2);
        vm.startPrank(provider(0));
        grid.claim(one(first));
        grid.start(one(first));
        grid.claimAndStart(one(second));
        skip(COLLECT_INTERVAL);
        grid.collect(pair(first, second));
        vm.stopPrank();
        _assertLoad(1, 2);
        _assertLoad(2, 0);
    }

    function test_every_end_and_every_requeue_subtracts() public {
        for (uint8 status = 2; status <= 4; ++status) {
            jobIn(JobStatus(status), _sized());
            uint256 jobId = jobIn(JobStatus(status), _sized());
            uint256 snapshot = vm.snapshotState();
            uint256 before = grid.loadOf(1).gpus;
            vm.prank(customer(0));
            grid.cancel(one(jobId));
            _assertLoad(1, before - 1);
            vm.revertToState(snapshot);
            vm.prank(provider(0));
            grid.panic(one(jobId), "");
            _assertLoad(1, before - 1);
            vm.revertToState(snapshot);
            if (status == 4) {
                skip(LIMIT);
                uint256 late = vm.snapshotState();
                for (uint32 used = 0; used < 2; ++used) {
                    finish(jobId, used * LIMIT, 0);
                    _assertLoad(1, before - 1);
                    vm.revertToState(late);
                }
            } else {
                vm.prank(provider(0));
                grid.requeue(one(jobId), "");
                _assertLoad(1, before - 1);
                vm.revertToState(snapshot);
            }
            vm.prank(customer(0));
            grid.cancel(one(jobId));
        }
    }

    function test_a_batch_frees_what_each_of_its_jobs_held_at_each_provider() public {
        uint256[] memory jobIds = new uint256[](7);
        for (uint16 i = 0; i < 6; ++i) {
            jobIds[i] = _assigned(1 + i % 3);
        }
        jobIds[6] = submit(customer(0), _sized());
        uint256 stays = _assigned(2);
        _assertLoad(1, 2);
        _assertLoad(2, 3);
        _assertLoad(3, 2);
        uint256 snapshot = vm.snapshotState();
        vm.prank(customer(0));
        grid.cancel(jobIds);
        _assertLoad(1, 0);
        _assertLoad(2, 1);
        _assertLoad(3, 0);
        assertEq(uint8(statusOf(stays)), uint8(JobStatus.META_SCHEDULED));
        vm.revertToState(snapshot);
        skip(CLAIM_TIMEOUT + 1);
        vm.prank(STRANGER);
        grid.requeue(jobIds, "");
        _assertLoad(1, 0);
        _assertLoad(2, 1);
        _assertLoad(3, 0);
    }

    function test_each_part_of_the_offer_less_the_load_bounds_an_assignment() public {
        _assigned(1);
        uint256 jobId = submit(customer(0), _sized());
        Offer[3] memory tight = [Offer(11, 1200, 2), Offer(12, 1199, 2), Offer(12, 1200, 1)];
        for (uint256 i = 0; i < 3; ++i) {
            vm.prank(provider(0));
            registry.setOffer(tight[i]);
            (bool eligible, bytes4 reason) = grid.isEligible(jobId, 1);
            assertFalse(eligible);
            assertEq(reason, IMetaScheduler.DoesNotFit.selector);
        }
        vm.prank(provider(0));
        registry.setOffer(Offer(12, 1200, 2));
        (bool fits,) = grid.isEligible(jobId, 1);
        assertTrue(fits);
        assign(jobId, 1);
        _assertLoad(1, 2);
    }

    function test_items_of_one_call_meet_the_load_of_those_before_them() public {
        vm.prank(provider(0));
        registry.setOffer(Offer(13, 10_000, 8));
        uint256[] memory ids = new uint256[](4);
        for (uint256 i = 0; i < 4; ++i) {
            ids[i] = submit(customer(0), _sized());
        }
        uint256 snapshot = vm.snapshotState();
        // In one group, in two groups of one provider, and by the provider itself.
        Assignment[] memory groups = new Assignment[](1);
        groups[0] = assignment(1, triple(ids[0], ids[1], ids[2]));
        skips(ids[2], JobStatus.PENDING, IMetaScheduler.DoesNotFit.selector);
        vm.prank(SCHEDULER);
        grid.metaSchedule(groups);
        _assertLoad(1, 2);
        vm.revertToState(snapshot);
        groups = new Assignment[](3);
        groups[0] = assignment(1, one(ids[0]));
        groups[1] = assignment(2, one(ids[1]));
        groups[2] = assignment(1, pair(ids[2], ids[3]));
        skips(ids[3], JobStatus.PENDING, IMetaScheduler.DoesNotFit.selector);
        vm.prank(SCHEDULER);
        grid.metaSchedule(groups);
        _assertLoad(1, 2);
        _assertLoad(2, 1);
        vm.revertToState(snapshot);
        skip(PENDING_TIMEOUT);
        skips(ids[2], JobStatus.PENDING, IMetaScheduler.DoesNotFit.selector);
        vm.prank(provider(0));
        grid.selfSchedule(triple(ids[0], ids[1], ids[2]));
        _assertLoad(1, 2);
    }

    function test_an_offer_below_the_load_stops_new_jobs_and_touches_none_that_it_has() public {
        uint256 first = jobIn(JobStatus.RUNNING, _sized());
        uint256 second = jobIn(JobStatus.RUNNING, _sized());
        vm.prank(provider(0));
        registry.setOffer(Offer(6, 600, 1));
        uint256 third = submit(customer(0), _sized());
        (, bytes4 reason) = grid.isEligible(third, 1);
        assertEq(reason, IMetaScheduler.DoesNotFit.selector);
        finish(first, 0, 0);
        (, reason) = grid.isEligible(third, 1);
        assertEq(reason, IMetaScheduler.DoesNotFit.selector);
        finish(second, 0, 0);
        _assertLoad(1, 0);
        assign(third, 1);
    }

    function test_refused_items_add_and_subtract_nothing() public {
        uint256 mine = _assigned(1);
        uint256 foreign = _assigned(2);
        uint256 poor = submit(customer(0), terms(1, LIMIT, 2, 0, 0));
        uint256 good = submit(customer(0), _sized());
        Assignment[] memory groups = new Assignment[](2);
        groups[0] = assignment(1, triple(poor, mine, good));
        groups[1] = assignment(9, one(poor));
        vm.prank(SCHEDULER);
        grid.metaSchedule(groups);
        _assertLoad(1, 2);
        _assertLoad(9, 0);
        vm.prank(provider(0));
        grid.panic(triple(foreign, mine, mine), "");
        _assertLoad(1, 1);
        _assertLoad(2, 1);
    }

    /// @dev More than 16 bits of each part.
    function test_a_load_of_a_large_provider_is_told_whole() public {
        register(provider(3), prices(1), Hardware(100, 1000, 10_000_000, 1000));
        JobTerms memory terms_ = terms(1e18, LIMIT, 40_000, 0, 0);
        (terms_.cpusPerTask, terms_.memPerCpu, terms_.gpus) = (1, 2, 40_000);
        for (uint256 i = 0; i < 2; ++i) {
            assign(submit(customer(0), terms_), 4);
        }
        ProviderLoad memory load = grid.loadOf(4);
        assertEq(load.cpus, 80_000);
        assertEq(load.mem, 160_000);
        assertEq(load.gpus, 80_000);
    }
}
