// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ProviderRegistry} from "../../contracts/ProviderRegistry.sol";
import {IProviderRegistry} from "../../contracts/interfaces/IProviderRegistry.sol";
import {Capacity, Tariff} from "../../contracts/libraries/Capacity.sol";
import {
    Hardware,
    Offer,
    Prices,
    Provider,
    ProviderStatus
} from "../../contracts/types/ProviderTypes.sol";
import {GridTest} from "./GridTest.sol";

contract RegistryTest is GridTest {
    address internal constant NEW = address(0xD0);
    string[] internal none;

    function _register(Hardware memory hardware, Prices memory prices_) private returns (uint32) {
        vm.prank(NEW);
        return registry.register(hardware, prices_, none);
    }

    function _approve(uint32 version) private {
        vm.prank(ADMIN);
        registry.approve(NEW, version);
    }

    function _fresh() private {
        _approve(_register(Hardware(4, 16, 65_536, 2), prices(1e12)));
    }

    function _valid(Hardware memory h) private pure returns (Hardware memory) {
        h.nodes = uint24(bound(h.nodes, 1, type(uint24).max));
        h.cpusPerNode = uint16(bound(h.cpusPerNode, 1, _least(65_535, 0xffffffff / h.nodes)));
        h.memPerNode = uint32(bound(h.memPerNode, 1, _least(0xffffffff, 0xffffffffffff / h.nodes)));
        h.gpusPerNode = uint16(bound(h.gpusPerNode, 0, _least(65_535, 0xffffffff / h.nodes)));
        return h;
    }

    function _least(uint256 a, uint256 b) private pure returns (uint256) {
        return a < b ? a : b;
    }

    // ----------------------------------------------------------------- register

    function test_register_proposes_and_puts_nothing_in_force() public {
        vm.expectEmit(address(registry));
        emit IProviderRegistry.HardwareProposed(NEW, 1, Hardware(1, 2, 3, 4));
        vm.expectEmit(address(registry));
        emit IProviderRegistry.PricesChanged(NEW, prices(7000));
        vm.expectEmit(address(registry));
        emit IProviderRegistry.LabelsChanged(NEW, none);
        assertEq(_register(Hardware(1, 2, 3, 4), prices(7000)), 1);
        Provider memory p = registry.getProvider(NEW);
        assertEq(uint8(p.status), uint8(ProviderStatus.WAITING_APPROVAL));
        assertEq(p.id, 0);
        assertEq(p.version, 0);
        assertEq(p.pendingVersion, 1);
        assertEq(p.hardware.nodes, 0);
        assertEq(p.pendingHardware.memPerNode, 3);
        assertEq(registry.providerCount(), PROVIDERS);
    }

    function test_register_again_leaves_the_version_in_force() public {
        _fresh();
        assertEq(_register(Hardware(9, 9, 9, 9), prices(1)), 2);
        Provider memory p = registry.getProvider(NEW);
        assertEq(uint8(p.status), uint8(ProviderStatus.ACTIVE));
        assertEq(p.version, 1);
        assertEq(p.hardware.nodes, 4);
        assertEq(p.offer.cpus, 64);
        assertEq(p.prices.cpu, 1);
    }

    function test_register_refuses_impossible_hardware() public {
        Hardware[6] memory bad = [
            Hardware(0, 1, 1, 0),
            Hardware(1, 0, 1, 0),
            Hardware(1, 1, 0, 0),
            Hardware(65_538, 65_535, 1, 0),
            Hardware(65_537, 1, type(uint32).max, 0),
            Hardware(65_538, 1, 1, 65_535)
        ];
        for (uint256 i = 0; i < bad.length; ++i) {
            vm.prank(NEW);
            vm.expectRevert(IProviderRegistry.InvalidHardware.selector);
            registry.register(bad[i], prices(1), none);
        }
    }

    function test_register_refuses_the_banned() public {
        vm.prank(ADMIN);
        registry.ban(provider(0), "test");
        vm.prank(provider(0));
        vm.expectRevert(
            abi.encodeWithSelector(IProviderRegistry.ProviderBanned.selector, provider(0))
        );
        registry.register(Hardware(1, 1, 1, 1), prices(1), none);
    }

    /// @dev Hardware, offer, prices and times of any legal value are read back unchanged.
    function testFuzz_the_packed_record_holds_any_legal_value(
        Hardware memory hardware,
        Prices memory prices_,
        Offer memory offer,
        bool draining,
        bool banned
    ) public {
        hardware = _valid(hardware);
        prices_.cpu = uint64(bound(prices_.cpu, 0, 10 ether));
        prices_.gpu = uint64(bound(prices_.gpu, 0, 10 ether));
        prices_.mem = uint64(bound(prices_.mem, 0, 10 ether));
        offer.cpus = uint32(bound(offer.cpus, 0, uint256(hardware.nodes) * hardware.cpusPerNode));
        offer.mem = uint48(bound(offer.mem, 0, uint256(hardware.nodes) * hardware.memPerNode));
        offer.gpus = uint32(bound(offer.gpus, 0, uint256(hardware.nodes) * hardware.gpusPerNode));
        _approve(_register(hardware, prices_));
        vm.startPrank(NEW);
        registry.setOffer(offer);
        registry.setDraining(draining);
        vm.stopPrank();
        if (banned) {
            vm.prank(ADMIN);
            registry.ban(NEW, "test");
        }
        Provider memory p = registry.getProvider(NEW);
        assertEq(abi.encode(p.hardware), abi.encode(hardware));
        assertEq(abi.encode(p.prices), abi.encode(prices_));
        assertEq(abi.encode(p.offer), abi.encode(offer));
        assertEq(p.approvedUntil, block.timestamp + 365 days);
        assertEq(
            uint8(p.status),
            uint8(
                banned
                    ? ProviderStatus.BANNED
                    : draining ? ProviderStatus.DRAINING : ProviderStatus.ACTIVE
            )
        );
        (Capacity c, Tariff t) = registry.capacityOf(NEW);
        assertEq(c.nodes(), hardware.nodes);
        assertEq(c.cpusPerNode(), hardware.cpusPerNode);
        assertEq(c.memPerNode(), hardware.memPerNode);
        assertEq(c.offeredCpus(), offer.cpus);
        assertEq(c.offeredMem(), offer.mem);
        assertEq(c.offeredGpus(), offer.gpus);
        assertEq(c.approvedUntil(), p.approvedUntil);
        assertEq(c.isDraining(), draining);
        assertEq(c.isBanned(), banned);
        assertEq(t.cpuPrice(), prices_.cpu);
        assertEq(t.gpuPrice(), prices_.gpu);
        assertEq(t.memPrice(), prices_.mem);
    }

    // ------------------------------------------------------------------- prices

    function test_prices_beyond_the_cap_are_refused() public {
        Prices[3] memory bad =
            [Prices(10 ether + 1, 0, 0), Prices(0, 10 ether + 1, 0), Prices(0, 0, 10 ether + 1)];
        for (uint256 i = 0; i < 3; ++i) {
            vm.prank(provider(0));
            vm.expectRevert(
                abi.encodeWithSelector(
                    IProviderRegistry.PriceTooHigh.selector, 10 ether + 1, 10 ether
                )
            );
            registry.setPrices(bad[i]);
        }
        vm.prank(provider(0));
        registry.setPrices(Prices(10 ether, 10 ether, 10 ether));
    }

    // ------------------------------------------------------------------- labels

    function test_labels_need_a_key_and_a_value() public {
        string[7] memory bad = ["", "=", "key=", "=value", "key", "=a=b", "gpus 8x"];
        string[] memory labels = new string[](2);
        labels[0] = "a=b";
        for (uint256 i = 0; i < bad.length; ++i) {
            labels[1] = bad[i];
            vm.prank(provider(0));
            vm.expectRevert(abi.encodeWithSelector(IProviderRegistry.InvalidLabel.selector, 1));
            registry.setLabels(labels);
        }
        labels[1] = "a=b=c";
        vm.prank(provider(0));
        registry.setLabels(labels);
        assertEq(abi.encode(registry.getProvider(provider(0)).labels), abi.encode(labels));
        vm.prank(provider(0));
        registry.setLabels(none);
        assertEq(registry.getProvider(provider(0)).labels.length, 0);
    }

    function test_labels_are_bounded_in_size_and_number() public {
        string[] memory labels = new string[](1);
        labels[0] = string(abi.encodePacked("k=", new bytes(127)));
        vm.prank(provider(0));
        vm.expectRevert(abi.encodeWithSelector(IProviderRegistry.InvalidLabel.selector, 0));
        registry.setLabels(labels);
        labels[0] = string(abi.encodePacked("k=", new bytes(126)));
        vm.prank(provider(0));
        registry.setLabels(labels);
        labels = new string[](33);
        vm.prank(provider(0));
        vm.expectRevert(abi.encodeWithSelector(IProviderRegistry.TooManyLabels.selector, 33, 32));
        registry.setLabels(labels);
        labels = new string[](32);
        for (uint256 i = 0; i < 32; ++i) {
            labels[i] = "k=v";
        }
        vm.prank(provider(0));
        registry.setLabels(labels);
        assertEq(registry.getProvider(provider(0)).labels.length, 32);
    }

    // -------------------------------------------------------------------- offer

    function test_an_offer_beyond_the_hardware_is_refused() public {
        Offer[3] memory bad = [Offer(65, 262_144, 8), Offer(64, 262_145, 8), Offer(64, 262_144, 9)];
        for (uint256 i = 0; i < 3; ++i) {
            vm.prank(provider(0));
            vm.expectRevert(
                abi.encodeWithSelector(
                    IProviderRegistry.OfferTooLarge.selector, bad[i].cpus, bad[i].mem, bad[i].gpus
                )
            );
            registry.setOffer(bad[i]);
        }
        vm.prank(provider(0));
        vm.expectEmit(address(registry));
        emit IProviderRegistry.OfferChanged(provider(0), Offer(64, 262_144, 8));
        registry.setOffer(Offer(64, 262_144, 8));
    }

    function test_an_offer_before_the_first_approval_is_refused() public {
        _register(Hardware(1, 1, 1, 1), prices(1));
        vm.prank(NEW);
        vm.expectRevert(abi.encodeWithSelector(IProviderRegistry.NotApproved.selector, NEW));
        registry.setOffer(Offer(0, 0, 0));
    }

    function test_who_is_not_registered_sets_nothing() public {
        bytes memory refusal =
            abi.encodeWithSelector(IProviderRegistry.NotRegistered.selector, STRANGER);
        vm.startPrank(STRANGER);
        vm.expectRevert(refusal);
        registry.setOffer(Offer(0, 0, 0));
        vm.expectRevert(refusal);
        registry.setPrices(prices(1));
        vm.expectRevert(refusal);
        registry.setLabels(none);
        vm.expectRevert(refusal);
        registry.setDraining(true);
        vm.stopPrank();
        vm.startPrank(ADMIN);
        vm.expectRevert(refusal);
        registry.approve(STRANGER, 1);
        vm.expectRevert(refusal);
        registry.ban(STRANGER, "");
        vm.expectRevert(refusal);
        registry.unban(STRANGER);
        vm.stopPrank();
        assertEq(uint8(registry.statusOf(STRANGER)), uint8(ProviderStatus.NONE));
    }

    // ----------------------------------------------------------------- approval

    function test_the_first_approval_gives_an_id_and_offers_everything() public {
        _register(Hardware(4, 16, 65_536, 2), prices(1));
        vm.expectEmit(address(registry));
        emit IProviderRegistry.ProviderRegistered(4, NEW);
        vm.expectEmit(address(registry));
        emit IProviderRegistry.OfferChanged(NEW, Offer(64, 262_144, 8));
        vm.expectEmit(address(registry));
        emit IProviderRegistry.ProviderApproved(
            NEW, 1, Hardware(4, 16, 65_536, 2), uint40(block.timestamp + 365 days)
        );
        _approve(1);
        assertEq(registry.idOf(NEW), 4);
        assertEq(registry.accountOf(4), NEW);
        assertEq(registry.providerCount(), 4);
        _approve(_register(Hardware(1, 1, 1, 1), prices(1)));
        assertEq(registry.idOf(NEW), 4);
        assertEq(registry.providerCount(), 4);
    }

    function test_another_version_than_named_is_refused() public {
        _fresh();
        _register(Hardware(5, 5, 5, 5), prices(1));
        // The approver has read version 2; a third one was registered before the approval.
        _register(Hardware(500, 5, 5, 5), prices(1));
        uint32[3] memory bad = [uint32(0), 2, 4];
        for (uint256 i = 0; i < 3; ++i) {
            vm.prank(ADMIN);
            vm.expectRevert(
                abi.encodeWithSelector(
                    IProviderRegistry.VersionMismatch.selector, NEW, bad[i], uint32(3)
                )
            );
            registry.approve(NEW, bad[i]);
        }
        _approve(3);
        assertEq(registry.getProvider(NEW).hardware.nodes, 500);
    }

    function test_a_version_of_zero_is_refused_before_the_first_approval() public {
        _register(Hardware(5, 5, 5, 5), prices(1));
        vm.prank(ADMIN);
        vm.expectRevert(
            abi.encodeWithSelector(
                IProviderRegistry.VersionMismatch.selector, NEW, uint32(0), uint32(1)
            )
        );
        registry.approve(NEW, 0);
    }

    function test_the_version_in_force_is_renewed_as_it_stands() public {
        _fresh();
        vm.prank(NEW);
        registry.setOffer(Offer(1, 2, 3));
        _register(Hardware(500, 5, 5, 5), prices(1));
        skip(364 days);
        Hardware memory inForce = registry.getProvider(NEW).hardware;
        vm.expectEmit(address(registry));
        emit IProviderRegistry.ProviderApproved(
            NEW, 1, inForce, uint40(vm.getBlockTimestamp() + 365 days)
        );
        vm.recordLogs();
        _approve(1);
        assertEq(vm.getRecordedLogs().length, 1, "nothing else changes");
        Provider memory p = registry.getProvider(NEW);
        assertEq(p.hardware.nodes, 4);
        assertEq(p.offer.cpus, 1);
        assertEq(p.pendingVersion, 2);
        assertEq(p.approvedUntil, vm.getBlockTimestamp() + 365 days);
    }

    /// @dev A full offer stays full, a smaller one is unchanged, one that no longer fits is reduced; for each resource.
    function testFuzz_the_offer_follows_new_hardware(
        Hardware memory a,
        Hardware memory b,
        Offer memory offer,
        uint8 full
    ) public {
        (a, b) = (_valid(a), _valid(b));
        uint256[3] memory before = _totals(a);
        uint256[3] memory all = _totals(b);
        uint256[3] memory offered = [uint256(offer.cpus), offer.mem, offer.gpus];
        for (uint256 i = 0; i < 3; ++i) {
            offered[i] = (full >> i) & 1 == 1 ? before[i] : bound(offered[i], 0, before[i]);
        }
        _approve(_register(a, prices(1)));
        vm.prank(NEW);
        registry.setOffer(Offer(uint32(offered[0]), uint48(offered[1]), uint32(offered[2])));
        _approve(_register(b, prices(1)));
        Offer memory got = registry.getProvider(NEW).offer;
        uint256[3] memory now_ = [uint256(got.cpus), got.mem, got.gpus];
        for (uint256 i = 0; i < 3; ++i) {
            bool whole = offered[i] == before[i] || offered[i] > all[i];
            assertEq(now_[i], whole ? all[i] : offered[i]);
        }
    }

    function test_each_part_of_an_offer_that_no_longer_fits_is_cut() public {
        _approve(_register(Hardware(10, 10, 10, 10), prices(1)));
        vm.prank(NEW);
        registry.setOffer(Offer(50, 51, 52));
        _approve(_register(Hardware(1, 40, 41, 42), prices(1)));
        assertEq(abi.encode(registry.getProvider(NEW).offer), abi.encode(Offer(40, 41, 42)));
    }

    function _totals(Hardware memory h) private pure returns (uint256[3] memory) {
        uint256 n = h.nodes;
        return [n * h.cpusPerNode, n * h.memPerNode, n * h.gpusPerNode];
    }

    function test_a_full_registry_approves_no_new_one_and_renews_the_old() public {
        // The counter has its own slot, after the two of the administration.
        bytes32 place = _slotOfCount();
        vm.store(address(registry), place, bytes32(uint256(65_534)));
        _fresh();
        assertEq(registry.idOf(NEW), 65_535);
        vm.prank(STRANGER);
        registry.register(Hardware(1, 1, 1, 1), prices(1), none);
        vm.prank(ADMIN);
        vm.expectRevert(IProviderRegistry.RegistryFull.selector);
        registry.approve(STRANGER, 1);
        _approve(1);
    }

    function _slotOfCount() private returns (bytes32) {
        vm.record();
        registry.providerCount();
        (bytes32[] memory reads,) = vm.accesses(address(registry));
        assertEq(reads.length, 1);
        assertEq(uint256(vm.load(address(registry), reads[0])), PROVIDERS);
        return reads[0];
    }

    // ------------------------------------------------------------------- standing

    function test_a_ban_stands_above_everything_and_is_lifted() public {
        _fresh();
        vm.startPrank(ADMIN);
        vm.expectEmit(address(registry));
        emit IProviderRegistry.BanChanged(NEW, true, "fraud");
        registry.ban(NEW, "fraud");
        assertEq(uint8(registry.statusOf(NEW)), uint8(ProviderStatus.BANNED));
        vm.expectRevert(abi.encodeWithSelector(IProviderRegistry.ProviderBanned.selector, NEW));
        registry.approve(NEW, 1);
        registry.unban(NEW);
        assertEq(uint8(registry.statusOf(NEW)), uint8(ProviderStatus.ACTIVE));
    }

    function test_a_ban_before_the_first_approval_is_a_ban() public {
        _register(Hardware(1, 1, 1, 1), prices(1));
        vm.prank(ADMIN);
        registry.ban(NEW, "");
        assertEq(uint8(registry.statusOf(NEW)), uint8(ProviderStatus.BANNED));
    }

    function test_a_too_long_reason_is_refused() public {
        vm.startPrank(ADMIN);
        vm.expectRevert(abi.encodeWithSelector(IProviderRegistry.ReasonTooLong.selector, 257, 256));
        registry.ban(provider(0), string(new bytes(257)));
        registry.ban(provider(0), string(new bytes(256)));
    }

    function test_draining_is_the_providers_own() public {
        vm.expectEmit(address(registry));
        emit IProviderRegistry.DrainingChanged(provider(0), true);
        vm.prank(provider(0));
        registry.setDraining(true);
        assertEq(uint8(registry.statusOf(provider(0))), uint8(ProviderStatus.DRAINING));
        assertEq(uint8(registry.statusOf(provider(1))), uint8(ProviderStatus.ACTIVE));
        vm.prank(provider(0));
        registry.setDraining(false);
        assertEq(uint8(registry.statusOf(provider(0))), uint8(ProviderStatus.ACTIVE));
    }

    function test_only_the_approver_approves_bans_and_unbans() public {
        address[3] memory others = [STRANGER, provider(0), SCHEDULER];
        for (uint256 i = 0; i < others.length; ++i) {
            vm.startPrank(others[i]);
            vm.expectRevert();
            registry.approve(provider(0), 1);
            vm.expectRevert();
            registry.ban(provider(0), "");
            vm.expectRevert();
            registry.unban(provider(0));
            vm.stopPrank();
        }
    }

    function test_the_constructor_bounds_the_approval_period() public {
        uint256[2] memory bad = [uint256(1 hours - 1), 730 days + 1];
        for (uint256 i = 0; i < 2; ++i) {
            vm.expectRevert(
                abi.encodeWithSelector(
                    IProviderRegistry.OutOfBounds.selector,
                    bytes32("approvalPeriod"),
                    bad[i],
                    1 hours,
                    730 days
                )
            );
            this.make(bad[i]);
        }
        assertEq(this.make(1 hours).approvalPeriod(), 1 hours);
        assertEq(this.make(730 days).approvalPeriod(), 730 days);
    }

    /// @dev An external call, so that a revert ends this call and not the test, however the code is linked.
    function make(uint256 period) external returns (ProviderRegistry) {
        return new ProviderRegistry(ADMIN, 0, period);
    }
}
