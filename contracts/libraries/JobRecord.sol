// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {JobStatus, JobTerms} from "../types/JobTypes.sol";

/// @notice First word of a record: who, where it stands, and what moves with it.
/// customer 160 | status 8 | since 32 | providerId 16 | memPerCpu 24 | retriesLeft 8 | flags 8, from the lowest bit.
type Moves is uint256;

/// @notice Second word of a record: money and size.
/// escrow 96 | rate 72 | timeLimit 24 | tasks 16 | cpusPerTask 16 | gpus 16 | feeBps 16, from the lowest bit.
type Money is uint256;

using JobRecord for Moves global;
using JobRecord for Money global;

/// @title Reading and writing the packed words of a job record
/// @dev Whole words are read and written, so that a transition costs one storage access a word.
/// Narrowing casts below cut exactly the bits of the field that the shift put lowest.
library JobRecord {
    /// @dev The job runs until its credits are spent.
    uint256 internal constant UNTIL_SPENT = 1;
    /// @dev The job continues another one: `retryOf` holds its predecessor.
    uint256 internal constant SUCCESSOR = 2;

    uint256 private constant STATUS_AT = 160;
    uint256 private constant SINCE_AT = 168;
    uint256 private constant PROVIDER_AT = 200;
    uint256 private constant MEM_AT = 216;
    uint256 private constant RETRIES_AT = 240;
    uint256 private constant FLAGS_AT = 248;
    uint256 private constant STATUS_AND_SINCE = uint256(type(uint40).max) << STATUS_AT;
    uint256 private constant PROVIDER = uint256(type(uint16).max) << PROVIDER_AT;

    uint256 private constant RATE_AT = 96;
    uint256 private constant LIMIT_AT = 168;
    uint256 private constant TASKS_AT = 192;
    uint256 private constant CPUS_AT = 208;
    uint256 private constant GPUS_AT = 224;
    uint256 private constant FEE_AT = 240;
    uint256 private constant ESCROW = type(uint96).max;
    uint256 private constant RATE = uint256(type(uint72).max) << RATE_AT;
    uint256 private constant LIMIT = uint256(type(uint24).max) << LIMIT_AT;
    uint256 private constant FEE = uint256(type(uint16).max) << FEE_AT;

    /// @dev First word of a new PENDING job.
    function newMoves(address owner, JobTerms calldata terms) internal view returns (Moves) {
        return Moves.wrap(
            uint256(uint160(owner)) | (uint256(JobStatus.PENDING) << STATUS_AT)
                | (uint256(uint32(block.timestamp)) << SINCE_AT)
                | (uint256(terms.memPerCpu) << MEM_AT) | (uint256(terms.retries) << RETRIES_AT)
                | ((terms.untilSpent ? UNTIL_SPENT : 0) << FLAGS_AT)
        );
    }

    /// @dev Second word of a new PENDING job.
    function newMoney(JobTerms calldata terms) internal pure returns (Money) {
        return Money.wrap(
            uint256(terms.amount) | (uint256(terms.timeLimit) << LIMIT_AT)
                | (uint256(terms.tasks) << TASKS_AT) | (uint256(terms.cpusPerTask) << CPUS_AT)
                | (uint256(terms.gpus) << GPUS_AT)
        );
    }

    function customer(Moves m) internal pure returns (address) {
        return address(uint160(Moves.unwrap(m)));
    }

    /// @dev Without the range check of a conversion: only members of the enum are ever written.
    function status(Moves m) internal pure returns (JobStatus value) {
        uint256 offset = STATUS_AT;
        assembly ("memory-safe") {
            value := and(shr(offset, m), 0xff)
        }
    }

    function since(Moves m) internal pure returns (uint256) {
        return uint32(Moves.unwrap(m) >> SINCE_AT);
    }

    function providerId(Moves m) internal pure returns (uint16) {
        return uint16(Moves.unwrap(m) >> PROVIDER_AT);
    }

    function memPerCpu(Moves m) internal pure returns (uint256) {
        return uint24(Moves.unwrap(m) >> MEM_AT);
    }

    function retriesLeft(Moves m) internal pure returns (uint256) {
        return uint8(Moves.unwrap(m) >> RETRIES_AT);
    }

    function untilSpent(Moves m) internal pure returns (bool) {
        return (Moves.unwrap(m) >> FLAGS_AT) & UNTIL_SPENT != 0;
    }

    function isSuccessor(Moves m) internal pure returns (bool) {
        return (Moves.unwrap(m) >> FLAGS_AT) & SUCCESSOR != 0;
    }

    /// @dev The word after a transition at this block's time.
    function moved(Moves m, JobStatus to) internal view returns (Moves) {
        return Moves.wrap(
            (Moves.unwrap(m) & ~STATUS_AND_SINCE) | (uint256(to) << STATUS_AT)
                | (uint256(uint32(block.timestamp)) << SINCE_AT)
        );
    }

    function withProvider(Moves m, uint16 id) internal pure returns (Moves) {
        return Moves.wrap((Moves.unwrap(m) & ~PROVIDER) | (uint256(id) << PROVIDER_AT));
    }

    /// @dev The word of a successor: PENDING, without a provider, one retry less.
    /// The caller has checked that a retry is left, so the subtraction stays within its field.
    function succeeded(Moves m) internal view returns (Moves) {
        return Moves.wrap(
            (Moves.unwrap(moved(withProvider(m, 0), JobStatus.PENDING)) - (1 << RETRIES_AT))
                | (SUCCESSOR << FLAGS_AT)
        );
    }

    function escrow(Money m) internal pure returns (uint256) {
        return Money.unwrap(m) & ESCROW;
    }

    function rate(Money m) internal pure returns (uint256) {
        return uint72(Money.unwrap(m) >> RATE_AT);
    }

    function timeLimit(Money m) internal pure returns (uint256) {
        return uint24(Money.unwrap(m) >> LIMIT_AT);
    }

    function tasks(Money m) internal pure returns (uint256) {
        return uint16(Money.unwrap(m) >> TASKS_AT);
    }

    function cpusPerTask(Money m) internal pure returns (uint256) {
        return uint16(Money.unwrap(m) >> CPUS_AT);
    }

    function gpus(Money m) internal pure returns (uint256) {
        return uint16(Money.unwrap(m) >> GPUS_AT);
    }

    function feeBps(Money m) internal pure returns (uint256) {
        return Money.unwrap(m) >> FEE_AT;
    }

    /// @dev `amount` must be below 2^96.
    function withEscrow(Money m, uint256 amount) internal pure returns (Money) {
        return Money.wrap((Money.unwrap(m) & ~ESCROW) | amount);
    }

    /// @dev `limit` must be below 2^24.
    function withTimeLimit(Money m, uint256 limit) internal pure returns (Money) {
        return Money.wrap((Money.unwrap(m) & ~LIMIT) | (limit << LIMIT_AT));
    }

    /// @dev Fixes or, with zeros, clears the price; `rate_` must be below 2^72 and `feeBps_` below 2^16.
    function withPrice(Money m, uint256 rate_, uint256 feeBps_) internal pure returns (Money) {
        return
            Money.wrap((Money.unwrap(m) & ~(RATE | FEE)) | (rate_ << RATE_AT) | (feeBps_ << FEE_AT));
    }
}
