// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";

import {IMetaScheduler} from "../interfaces/IMetaScheduler.sol";
import {CalldataArray} from "../libraries/CalldataArray.sol";
import {JobLifecycle} from "../libraries/JobLifecycle.sol";
import {JobRecord, StateWord, TermsWord} from "../libraries/JobRecord.sol";
import {JobRequest, JobStatus, JobTerms, Permit} from "../types/JobTypes.sol";
import {SchedulerBase} from "./SchedulerBase.sol";

/// @title Submits and tops up jobs: all payments into the escrow
abstract contract Submission is SchedulerBase, ReentrancyGuardTransient {
    using CalldataArray for bytes32[];
    using SafeERC20 for IERC20;

    /// @notice Maximum number of successors of a submitted job.
    uint256 internal constant MAX_RETRIES = 5;
    /// @notice Maximum length of a name, in bytes.
    uint256 internal constant MAX_NAME_LENGTH = 64;
    /// @notice Maximum length of `uses`, in bytes.
    uint256 internal constant MAX_USES_LENGTH = 512;
    /// @notice Smallest top-up of an assigned job, in seconds at its rate.
    uint256 internal constant MIN_TOP_UP_SECONDS = 60;

    /// @inheritdoc IMetaScheduler
    function submitJobs(JobRequest[] calldata requests)
        external
        nonReentrant
        returns (uint256 firstJobId)
    {
        return _submit(_customerSender(), requests);
    }

    /// @inheritdoc IMetaScheduler
    function submitJobsWithPermit(JobRequest[] calldata requests, Permit calldata permit)
        external
        nonReentrant
        returns (uint256 firstJobId)
    {
        address customer = _customerSender();
        _permit(customer, permit);
        return _submit(customer, requests);
    }

    /// @inheritdoc IMetaScheduler
    function topUp(uint256 jobId, address customer, uint96 amount) external nonReentrant {
        _topUp(_customerSender(), jobId, customer, amount);
    }

    /// @inheritdoc IMetaScheduler
    function topUpWithPermit(uint256 jobId, address customer, uint96 amount, Permit calldata permit)
        external
        nonReentrant
    {
        address payer = _customerSender();
        _permit(payer, permit);
        _topUp(payer, jobId, customer, amount);
    }

    function _submit(address customer, JobRequest[] calldata requests)
        private
        returns (uint256 firstJobId)
    {
        if (!submissionsOpen) revert SubmissionsClosed();
        uint256 jobId = _jobCount;
        firstJobId = jobId + 1;
        // Starts at zero, the initial value of a local variable.
        // slither-disable-next-line uninitialized-local
        uint256 total;
        for (uint256 i = 0; i < requests.length; ++i) {
            JobRequest calldata request = requests[i];
            uint256 count = request.definitions.length;
            uint256 amount = _open(customer, jobId, request.terms, request.definitions);
            // No overflow: an amount has 96 bits, and 2^64 jobs don't fit into a transaction.
            unchecked {
                total += amount * count;
                jobId += count;
            }
        }
        if (jobId < firstJobId) revert EmptyBatch();
        // No overflow: nobody can pay for 2^64 jobs.
        _jobCount = uint64(jobId);
        credit.safeTransferFrom(customer, address(this), total);
    }

    /// @dev Writes one PENDING record per definition; the ids follow `jobId`.
    /// @return amount Escrow of each job.
    function _open(
        address customer,
        uint256 jobId,
        JobTerms memory terms,
        bytes32[] calldata definitions
    ) private returns (uint256 amount) {
        _checkTerms(terms);
        amount = terms.amount;
        StateWord stateWord = JobRecord.newState(customer, terms);
        TermsWord termsWord = JobRecord.newTerms(terms);
        bytes memory data = _encode(terms);
        for (uint256 i = 0; i < definitions.length; ++i) {
            bytes32 definition = definitions.itemAt(i);
            if (definition == 0) revert InvalidTerms("definition");
            Record storage record = _records[++jobId];
            record.state = stateWord;
            record.terms = termsWord;
            record.definition = definition;
            _emitSubmitted(jobId, customer, definition, data);
            _emitTransition(jobId, customer, address(0), JobStatus.NONE, JobStatus.PENDING);
        }
    }

    function _topUp(address payer, uint256 jobId, address customer, uint256 amount) private {
        Record storage record = _records[jobId];
        StateWord state = record.state;
        TermsWord terms = record.terms;
        if (!JobLifecycle.isLive(state.status())) revert WrongStatus(jobId, state.status());
        if (state.customer() != customer) revert NotCustomer(jobId);
        uint256 rate = terms.rate();
        uint256 min = rate == 0 ? 1 : rate * MIN_TOP_UP_SECONDS;
        if (amount < min) revert TopUpTooSmall(jobId, amount, min);
        if (state.status() == JobStatus.RUNNING) {
            uint256 end = state.since() + _allotment(state, terms);
            if (block.timestamp + _topUpNotice >= end) revert TopUpTooLate(jobId, end);
        }
        uint256 escrow = terms.escrow() + amount;
        uint256 limit = terms.timeLimit();
        // Credits of others don't extend the limit: at another provider's price the escrow might not cover it.
        if (payer == customer && rate != 0 && !state.untilSpent()) limit += amount / rate;
        if (escrow > type(uint96).max || limit > type(uint24).max) revert TopUpTooLarge(jobId);
        record.terms = terms.withEscrow(escrow).withTimeLimit(limit);
        emit JobToppedUp(jobId, payer, amount, escrow, limit);
        credit.safeTransferFrom(payer, address(this), amount);
    }

    function _checkTerms(JobTerms memory terms) private pure {
        if (terms.amount == 0) revert InvalidTerms("amount");
        if (terms.timeLimit == 0) revert InvalidTerms("timeLimit");
        if (terms.tasks == 0) revert InvalidTerms("tasks");
        if (terms.cpusPerTask == 0) revert InvalidTerms("cpusPerTask");
        if (terms.memPerCpu == 0) revert InvalidTerms("memPerCpu");
        if (terms.retries > MAX_RETRIES) revert InvalidTerms("retries");
        if (terms.flags > JobRecord.CUSTOMER_FLAGS) revert InvalidTerms("flags");
        if (bytes(terms.name).length > MAX_NAME_LENGTH) revert InvalidTerms("name");
        if (bytes(terms.uses).length > MAX_USES_LENGTH) revert InvalidTerms("uses");
    }

    /// @dev Returns the same as `abi.encode(terms)`, for a third of its gas. A struct in memory is a sequence of
    /// words: nine numbers, which are copied at once, and pointers to two strings, which become offsets.
    function _encode(JobTerms memory terms) private pure returns (bytes memory data) {
        string memory name = terms.name;
        string memory uses = terms.uses;
        assembly ("memory-safe") {
            data := mload(64)
            // Layout: the offset of the struct, its eleven words, then each string as length and padded text.
            let head := add(data, 64)
            mstore(add(data, 32), 32)
            mcopy(head, terms, 288)
            let nameSize := and(add(mload(name), 63), not(31))
            let usesSize := and(add(mload(uses), 63), not(31))
            mstore(add(head, 288), 352)
            mstore(add(head, 320), add(352, nameSize))
            // Zeros pad the end of a string; they are written before the next part overwrites the remainder.
            let tail := add(head, 352)
            mcopy(tail, name, add(mload(name), 32))
            mstore(add(tail, add(mload(name), 32)), 0)
            tail := add(tail, nameSize)
            mcopy(tail, uses, add(mload(uses), 32))
            mstore(add(tail, add(mload(uses), 32)), 0)
            let end := add(tail, usesSize)
            mstore(data, sub(end, add(data, 32)))
            mstore(64, end)
        }
    }

    /// @dev Emits `JobSubmitted`. Solidity would encode the terms again for each job of a request; here the terms
    /// are encoded once, and the same bytes are logged for each job.
    function _emitSubmitted(uint256 jobId, address customer, bytes32 definition, bytes memory data)
        private
    {
        bytes32 topic = JobSubmitted.selector;
        assembly ("memory-safe") {
            // The upper bits of a narrow value are not guaranteed to be zero.
            log4(add(data, 32), mload(data), topic, jobId, shr(96, shl(96, customer)), definition)
        }
    }

    /// @dev A failing permit is ignored: someone else may have used it first. The allowance decides.
    function _permit(address owner, Permit calldata permit) private {
        try IERC20Permit(address(credit))
            .permit(
                owner, address(this), permit.value, permit.deadline, permit.v, permit.r, permit.s
            ) {}
            catch {}
    }
}
