// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @notice What a provider's live assigned jobs occupy, in one word:
/// cpus 32 | memory in MB 48 | gpus 32, from the lowest bit.
type Load is uint256;

using LoadWord for Load global;

/// @title Reading, adding and subtracting loads
/// @dev A load never exceeds the offer that its last job was assigned within, and the fields are as wide as
/// those of an offer. So fields never run into each other, and whole words are added and subtracted.
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

    /// @dev Checked: a load that is not there would be a defect of the contract.
    function minus(Load l, Load other) internal pure returns (Load) {
        return Load.wrap(Load.unwrap(l) - Load.unwrap(other));
    }
}
