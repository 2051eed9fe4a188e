// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Capacity, Tariff} from "./Capacity.sol";
import {Load} from "./Load.sol";

/// @title Rate, cost, fee, allotment and fit
/// @notice Units: credit-wei, seconds, MB. Nothing is divided on the way to a bill but the fee, which is floored.
library Billing {
    uint256 internal constant BASIS_POINTS = 10_000;

    /// @notice Price of a job in credit-wei a second:
    /// cpus x cpu price + gpus x gpu price + cpus x memory per cpu x memory price.
    /// @dev Can't overflow: 2^32 x (2^64 + 2^24 x 2^64) + 2^16 x 2^64 < 2^256.
    function rateOf(
        Tariff tariff,
        uint256 tasks,
        uint256 cpusPerTask,
        uint256 memPerCpu,
        uint256 gpus
    ) internal pure returns (uint256) {
        unchecked {
            uint256 cpus = tasks * cpusPerTask;
            return
                cpus * (tariff.cpuPrice() + memPerCpu * tariff.memPrice()) + gpus
                    * tariff.gpuPrice();
        }
    }

    /// @notice Fee that goes to the treasury, in credit-wei, of a cost in credit-wei.
    /// @dev Can't overflow: a cost is at most an escrow of 96 bits, basis points have 16.
    function feeOf(uint256 cost, uint256 feeBps) internal pure returns (uint256) {
        unchecked {
            return cost * feeBps / BASIS_POINTS;
        }
    }

    /// @notice Seconds that a run may last: its limit, or until the escrow is spent. Zero without a rate.
    function allotment(bool untilSpent, uint256 timeLimit, uint256 escrow, uint256 rate)
        internal
        pure
        returns (uint256)
    {
        if (rate == 0) return 0;
        return untilSpent ? escrow / rate : timeLimit;
    }

    /// @notice Whether tasks fit node by node, and the whole fits the offer less the load.
    /// @dev `cpusPerTask` and `memPerCpu` are never zero in a record. Can't overflow: products of at most 56 bits.
    function fits(
        Capacity capacity,
        Load load,
        uint256 tasks,
        uint256 cpusPerTask,
        uint256 memPerCpu,
        uint256 gpus
    ) internal pure returns (bool) {
        unchecked {
            uint256 memPerTask = cpusPerTask * memPerCpu;
            // Whole tasks a node: the division must lose its rest before the nodes are counted.
            // slither-disable-next-line divide-before-multiply
            uint256 perNode = capacity.cpusPerNode() / cpusPerTask;
            uint256 perNodeByMemory = capacity.memPerNode() / memPerTask;
            if (perNodeByMemory < perNode) perNode = perNodeByMemory;
            return tasks <= capacity.nodes() * perNode
                && load.cpus() + tasks * cpusPerTask <= capacity.offeredCpus()
                && load.mem() + tasks * memPerTask <= capacity.offeredMem()
                && load.gpus() + gpus <= capacity.offeredGpus();
        }
    }
}
