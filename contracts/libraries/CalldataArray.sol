// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title Access to items of calldata arrays without a second bounds check
/// @dev Solidity compares each index with the length. The loops over a batch have already done so, and only such
/// loops may call these functions. Solidity checks the length itself when it decodes the array.
library CalldataArray {
    function itemAt(uint256[] calldata items, uint256 index) internal pure returns (uint256 item) {
        assembly ("memory-safe") {
            // Items are words, stored one after another from the array's offset in calldata.
            item := calldataload(add(items.offset, shl(5, index)))
        }
    }

    function itemAt(bytes32[] calldata items, uint256 index) internal pure returns (bytes32 item) {
        assembly ("memory-safe") {
            // As above.
            item := calldataload(add(items.offset, shl(5, index)))
        }
    }
}
