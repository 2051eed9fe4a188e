// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {
    AccessControlDefaultAdminRules
} from "@openzeppelin/contracts/access/extensions/AccessControlDefaultAdminRules.sol";
import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Burnable} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Burnable.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";

/// @title The credit of the grid
/// @notice ERC-20 with EIP-2612 permit and 18 decimals. Supply changes only by mint and burn.
contract Credit is ERC20, ERC20Burnable, ERC20Permit, AccessControlDefaultAdminRules {
    /// @notice Role that may mint.
    bytes32 public constant MINTER_ROLE = keccak256("MINTER_ROLE");

    /// @param admin First administrator; a transfer takes two steps.
    /// @param adminDelay Delay of a transfer of the administrator, in seconds.
    constructor(address admin, uint48 adminDelay)
        ERC20("DeepSquare Credit", "CREDIT")
        ERC20Permit("DeepSquare Credit")
        AccessControlDefaultAdminRules(adminDelay, admin)
    {}

    /// @notice Creates credits.
    /// @param to The recipient.
    /// @param amount In credit-wei.
    function mint(address to, uint256 amount) external onlyRole(MINTER_ROLE) {
        _mint(to, amount);
    }
}
