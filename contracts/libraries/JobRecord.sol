// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {JobStatus, JobTerms} from "../types/JobTypes.sol";
import {JobLifecycle} from "./JobLifecycle.sol";
import {Load, LoadWord} from "./Load.sol";

/// @notice First word of a record, the state: customer, status, and the fields that change with the status.
/// customer 160 | status 8 | since 32 | providerId 16 | memPerCpu 24 | retriesLeft 8 | flags 8, from the lowest bit.
type StateWord is uint256;

/// @notice Second word of a record, the terms: escrow, price and size.
/// escrow 96 | rate 72 | timeLimit 24 | tasks 16 | cpusPerTask 16 | gpus 16 | feeBps 16, from the lowest bit.
type TermsWord is uint256;

using JobRecord for StateWord global;
using JobRecord for TermsWord global;

/// @title Reading and writing the packed words of a job record
/// @dev Whole words are read and written, so that a transition costs one storage access per word.
/// A narrowing cast keeps the field that the shift moved to the lowest bits.
library JobRecord {
    /// @dev The job runs until its credits are spent.
    uint256 internal constant UNTIL_SPENT = 1;
    /// @dev No provider may assign the job to itself.
    uint256 internal constant NO_SELF_SCHEDULING = 2;
    /// @dev The provider may collect interim payments.
    uint256 internal constant INTERIM_PAYMENTS = 4;
    /// @dev All flags that a customer may set.
    uint256 internal constant CUSTOMER_FLAGS = UNTIL_SPENT | NO_SELF_SCHEDULING | INTERIM_PAYMENTS;
    /// @dev The job continues another one: `retryOf` holds its predecessor.
    uint256 internal constant SUCCESSOR = 128;

    uint256 private constant STATUS_AT = 160;
    uint256 private constant SINCE_AT = 168;
    uint256 private constant PROVIDER_AT = 200;
    uint256 private constant MEM_AT = 216;
    uint256 private constant RETRIES_AT = 240;
    uint256 private constant FLAGS_AT = 248;
    uint256 private constant SINCE = uint256(type(uint32).max) << SINCE_AT;
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
    function newState(address owner, JobTerms memory terms) internal view returns (StateWord) {
        return StateWord.wrap(
            uint256(uint160(owner)) | (uint256(JobStatus.PENDING) << STATUS_AT)
                | (uint256(uint32(block.timestamp)) << SINCE_AT)
                | (uint256(terms.memPerCpu) << MEM_AT) | (uint256(terms.retries) << RETRIES_AT)
                | (uint256(terms.flags) << FLAGS_AT)
        );
    }

    /// @dev Second word of a new PENDING job.
    function newTerms(JobTerms memory terms) internal pure returns (TermsWord) {
        return TermsWord.wrap(
            uint256(terms.amount) | (uint256(terms.timeLimit) << LIMIT_AT)
                | (uint256(terms.tasks) << TASKS_AT) | (uint256(terms.cpusPerTask) << CPUS_AT)
                | (uint256(terms.gpus) << GPUS_AT)
        );
    }

    function customer(StateWord s) internal pure returns (address) {
        return address(uint160(StateWord.unwrap(s)));
    }

    /// @dev Without the range check of a conversion: only members of the enum are ever written.
    function status(StateWord s) internal pure returns (JobStatus value) {
        uint256 offset = STATUS_AT;
        assembly ("memory-safe") {
            value := and(shr(offset, s), 0xff)
        }
    }

    function since(StateWord s) internal pure returns (uint256) {
        return uint32(StateWord.unwrap(s) >> SINCE_AT);
    }

    function providerId(StateWord s) internal pure returns (uint16) {
        return uint16(StateWord.unwrap(s) >> PROVIDER_AT);
    }

    function memPerCpu(StateWord s) internal pure returns (uint256) {
        return uint24(StateWord.unwrap(s) >> MEM_AT);
    }

    function retriesLeft(StateWord s) internal pure returns (uint256) {
        return uint8(StateWord.unwrap(s) >> RETRIES_AT);
    }

    function flags(StateWord s) internal pure returns (uint256) {
        return StateWord.unwrap(s) >> FLAGS_AT;
    }

    function untilSpent(StateWord s) internal pure returns (bool) {
        return flags(s) & UNTIL_SPENT != 0;
    }

    function forbidsSelfScheduling(StateWord s) internal pure returns (bool) {
        return flags(s) & NO_SELF_SCHEDULING != 0;
    }

    function allowsInterimPayments(StateWord s) internal pure returns (bool) {
        return flags(s) & INTERIM_PAYMENTS != 0;
    }

    function isSuccessor(StateWord s) internal pure returns (bool) {
        return flags(s) & SUCCESSOR != 0;
    }

    /// @dev The word after a transition at this block's time.
    function moved(StateWord s, JobStatus to) internal view returns (StateWord) {
        return StateWord.wrap(
            (StateWord.unwrap(s) & ~STATUS_AND_SINCE) | (JobLifecycle.number(to) << STATUS_AT)
                | (uint256(uint32(block.timestamp)) << SINCE_AT)
        );
    }

    /// @dev The word of a run that was billed up to this block's time; the status does not change.
    function billedUntilNow(StateWord s) internal view returns (StateWord) {
        return StateWord.wrap(
            (StateWord.unwrap(s) & ~SINCE) | (uint256(uint32(block.timestamp)) << SINCE_AT)
        );
    }

    function withProvider(StateWord s, uint16 id) internal pure returns (StateWord) {
        return StateWord.wrap((StateWord.unwrap(s) & ~PROVIDER) | (uint256(id) << PROVIDER_AT));
    }

    /// @dev The word of a successor: PENDING, without a provider, with one retry less.
    /// The caller has checked that a retry is left, so the subtraction can't underflow.
    function succeeded(StateWord s) internal view returns (StateWord) {
        return StateWord.wrap(
            (StateWord.unwrap(moved(withProvider(s, 0), JobStatus.PENDING)) - (1 << RETRIES_AT))
                | (SUCCESSOR << FLAGS_AT)
        );
    }

    function escrow(TermsWord t) internal pure returns (uint256) {
        return TermsWord.unwrap(t) & ESCROW;
    }

    function rate(TermsWord t) internal pure returns (uint256) {
        return uint72(TermsWord.unwrap(t) >> RATE_AT);
    }

    function timeLimit(TermsWord t) internal pure returns (uint256) {
        return uint24(TermsWord.unwrap(t) >> LIMIT_AT);
    }

    function tasks(TermsWord t) internal pure returns (uint256) {
        return uint16(TermsWord.unwrap(t) >> TASKS_AT);
    }

    function cpusPerTask(TermsWord t) internal pure returns (uint256) {
        return uint16(TermsWord.unwrap(t) >> CPUS_AT);
    }

    function gpus(TermsWord t) internal pure returns (uint256) {
        return uint16(TermsWord.unwrap(t) >> GPUS_AT);
    }

    function feeBps(TermsWord t) internal pure returns (uint256) {
        return TermsWord.unwrap(t) >> FEE_AT;
    }

    /// @dev Resources that the job uses at its provider. They fit the fields: the job fitted into an offer, whose
    /// fields have the same widths.
    function load(TermsWord t, StateWord s) internal pure returns (Load) {
        unchecked {
            uint256 cpus = tasks(t) * cpusPerTask(t);
            return LoadWord.pack(cpus, cpus * memPerCpu(s), gpus(t));
        }
    }

    /// @dev `amount` must be below 2^96.
    function withEscrow(TermsWord t, uint256 amount) internal pure returns (TermsWord) {
        return TermsWord.wrap((TermsWord.unwrap(t) & ~ESCROW) | amount);
    }

    /// @dev `limit` must be below 2^24.
    function withTimeLimit(TermsWord t, uint256 limit) internal pure returns (TermsWord) {
        return TermsWord.wrap((TermsWord.unwrap(t) & ~LIMIT) | (limit << LIMIT_AT));
    }

    /// @dev Sets the price, or clears it with zeros; `rate_` must be below 2^72 and `feeBps_` below 2^16.
    function withPrice(TermsWord t, uint256 rate_, uint256 feeBps_)
        internal
        pure
        returns (TermsWord)
    {
        return TermsWord.wrap(
            (TermsWord.unwrap(t) & ~(RATE | FEE)) | (rate_ << RATE_AT) | (feeBps_ << FEE_AT)
        );
    }
}
