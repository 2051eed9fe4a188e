// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Credit} from "../../contracts/Credit.sol";
import {GridTest} from "./GridTest.sol";

contract CreditTest is GridTest {
    function testFuzz_the_minter_creates_and_nobody_else(address to, uint128 amount) public {
        vm.assume(to != address(0));
        uint256 before = credit.balanceOf(to);
        uint256 supply = credit.totalSupply();
        vm.prank(STRANGER);
        vm.expectRevert();
        credit.mint(to, amount);
        vm.prank(ADMIN);
        credit.mint(to, amount);
        assertEq(credit.balanceOf(to), before + amount);
        assertEq(credit.totalSupply(), supply + amount);
    }

    function testFuzz_burning_lowers_the_supply(uint128 amount) public {
        amount = uint128(bound(amount, 0, FUNDS));
        uint256 supply = credit.totalSupply();
        vm.prank(customer(0));
        credit.burn(amount);
        assertEq(credit.balanceOf(customer(0)), FUNDS - amount);
        assertEq(credit.totalSupply(), supply - amount);
        vm.prank(STRANGER);
        vm.expectRevert();
        credit.burnFrom(customer(1), 1);
    }

    function test_it_has_a_name_a_symbol_and_18_decimals() public view {
        assertEq(credit.name(), "DeepSquare Credit");
        assertEq(credit.symbol(), "CREDIT");
        assertEq(credit.decimals(), 18);
    }

    function test_a_signature_of_another_token_or_chain_is_worth_nothing() public {
        (address owner, uint256 key) = makeAddrAndKey("signer");
        Credit other = new Credit(ADMIN, 0);
        bytes32 typehash = keccak256(
            "Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"
        );
        bytes32 content =
            keccak256(abi.encode(typehash, owner, address(grid), 1, 0, block.timestamp));
        (uint8 v, bytes32 r, bytes32 s) =
            vm.sign(key, keccak256(abi.encodePacked("\x19\x01", other.DOMAIN_SEPARATOR(), content)));
        vm.expectRevert();
        credit.permit(owner, address(grid), 1, block.timestamp, v, r, s);
        vm.chainId(99);
        vm.expectRevert();
        other.permit(owner, address(grid), 1, block.timestamp, v, r, s);
        vm.chainId(31_337);
        other.permit(owner, address(grid), 1, block.timestamp, v, r, s);
        assertEq(other.allowance(owner, address(grid)), 1);
    }
}
