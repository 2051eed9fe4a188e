// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Capacity, Tariff} from "./Capacity.sol";
import {Load} from "./Load.sol";

/// @title Rate, cost, fee, allotment and fit
/// @notice Units: credit-wei, seconds, MB. The only division of a bill is that of the fee, which is rounded down.
library Billing {
    uint256 internal constant BASIS_POINTS = 10_000;

    /// @notice Rate of a job in credit-wei per second:
    /// CPUs x CPU price + GPUs x GPU price + CPUs x memory per CPU x memory price.
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

    /// @notice The treasury's fee on a cost, both in credit-wei.
    /// @dev Can't overflow: a cost is at most an escrow of 96 bits, basis points have 16.
    function feeOf(uint256 cost, uint256 feeBps) internal pure returns (uint256) {
        unchecked {
            return cost * feeBps / BASIS_POINTS;
        }
    }

    /// @notice Maximum duration of a run in seconds: its limit, or until its escrow is spent. Zero without a rate.
    function allotment(bool untilSpent, uint256 timeLimit, uint256 escrow, uint256 rate)
        internal
        pure
        returns (uint256)
    {
        if (rate == 0) return 0;
        return untilSpent ? escrow / rate : timeLimit;
    }

    /// @notice Whether the tasks fit on the nodes, and the whole job fits the offer minus the load.
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
            // Tasks per node: rounded down first, because a task can't be split between nodes.
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
