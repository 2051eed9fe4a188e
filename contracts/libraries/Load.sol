// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @notice Resources that a provider's live assigned jobs use, in one word:
/// cpus 32 | memory in MB 48 | gpus 32, from the lowest bit.
type Load is uint256;

using LoadWord for Load global;

/// @title Reads, adds and subtracts loads
/// @dev A load never exceeds the offer into which its last job was assigned, and its fields are as wide as
/// those of an offer. Fields therefore never overflow, and whole words can be added and subtracted.
library LoadWord {
    uint256 private constant MEM_AT = 32;
    uint256 private constant GPUS_AT = 80;

    function pack(uint256 cpus_, uint256 mem_, uint256 gpus_) internal pure returns (Load) {
        return Load.wrap(cpus_ | (mem_ << MEM_AT) | (gpus_ << GPUS_AT));
    }

    function cpus(Load l) internal pure returns (uint256) {
        return uint32(Load.unwrap(l));
    }

    function mem(Load l) internal pure returns (uint256) {
        return uint48(Load.unwrap(l) >> MEM_AT);
    }

    function gpus(Load l) internal pure returns (uint256) {
        return Load.unwrap(l) >> GPUS_AT;
    }

    function plus(Load l, Load other) internal pure returns (Load) {
        unchecked {
            return Load.wrap(Load.unwrap(l) + Load.unwrap(other));
        }
    }

    /// @dev Checked: an underflow would be a defect of the contract.
    function minus(Load l, Load other) internal pure returns (Load) {
        return Load.wrap(Load.unwrap(l) - Load.unwrap(other));
    }
}
