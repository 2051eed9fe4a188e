// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Prices, ProviderStatus} from "../types/ProviderTypes.sol";

/// @notice Approved hardware, offer and status of a provider in one word:
/// nodes 24 | cpusPerNode 16 | memPerNode 32 | gpusPerNode 16 | offered cpus 32 | offered memory 48 |
/// offered gpus 32 | approvedUntil 40 | draining 8 | banned 8, from the lowest bit.
type Capacity is uint256;

/// @notice Prices and versions of a provider in one word:
/// cpu 64 | gpu 64 | mem 64 | version 32 | pendingVersion 32, from the lowest bit.
type Tariff is uint256;

using CapacityReader for Capacity global;
using CapacityReader for Tariff global;

/// @title Reads the two words on which an assignment depends
/// @dev They are the first two slots of a provider's record, passed between contracts as they are stored.
/// A narrowing cast keeps the field that the shift moved to the lowest bits.
library CapacityReader {
    function nodes(Capacity c) internal pure returns (uint256) {
        return uint24(Capacity.unwrap(c));
    }

    function cpusPerNode(Capacity c) internal pure returns (uint256) {
        return uint16(Capacity.unwrap(c) >> 24);
    }

    function memPerNode(Capacity c) internal pure returns (uint256) {
        return uint32(Capacity.unwrap(c) >> 40);
    }

    function offeredCpus(Capacity c) internal pure returns (uint256) {
        return uint32(Capacity.unwrap(c) >> 88);
    }

    function offeredMem(Capacity c) internal pure returns (uint256) {
        return uint48(Capacity.unwrap(c) >> 120);
    }

    function offeredGpus(Capacity c) internal pure returns (uint256) {
        return uint32(Capacity.unwrap(c) >> 168);
    }

    function approvedUntil(Capacity c) internal pure returns (uint256) {
        return uint40(Capacity.unwrap(c) >> 200);
    }

    function isDraining(Capacity c) internal pure returns (bool) {
        return uint8(Capacity.unwrap(c) >> 240) != 0;
    }

    function isBanned(Capacity c) internal pure returns (bool) {
        return Capacity.unwrap(c) >> 248 != 0;
    }

    function cpuPrice(Tariff t) internal pure returns (uint256) {
        return uint64(Tariff.unwrap(t));
    }

    function gpuPrice(Tariff t) internal pure returns (uint256) {
        return uint64(Tariff.unwrap(t) >> 64);
    }

    function memPrice(Tariff t) internal pure returns (uint256) {
        return uint64(Tariff.unwrap(t) >> 128);
    }

    /// @notice Whether any of the three prices is higher than its counterpart.
    function exceeds(Tariff t, Prices calldata prices) internal pure returns (bool) {
        return t.cpuPrice() > prices.cpu || t.gpuPrice() > prices.gpu || t.memPrice() > prices.mem;
    }

    /// @dev Status from both words. The caller must check the end of the approval.
    function statusOf(Capacity c, Tariff t) internal pure returns (ProviderStatus) {
        uint256 versions = Tariff.unwrap(t) >> 192;
        if (versions == 0) return ProviderStatus.NONE;
        if (c.isBanned()) return ProviderStatus.BANNED;
        if (uint32(versions) == 0) return ProviderStatus.WAITING_APPROVAL;
        return c.isDraining() ? ProviderStatus.DRAINING : ProviderStatus.ACTIVE;
    }
}
