// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Metadata} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Metadata.sol";

import {IMetaScheduler} from "./interfaces/IMetaScheduler.sol";
import {IProviderRegistry} from "./interfaces/IProviderRegistry.sol";
import {JobLifecycle} from "./libraries/JobLifecycle.sol";
import {StateWord, TermsWord} from "./libraries/JobRecord.sol";
import {Assignments} from "./scheduler/Assignments.sol";
import {SchedulerBase} from "./scheduler/SchedulerBase.sol";
import {Settlement} from "./scheduler/Settlement.sol";
import {Submission} from "./scheduler/Submission.sol";
import {Job, JobStatus, Timeouts} from "./types/JobTypes.sol";

/// @title Meta-scheduler: jobs, their state machine and their escrow
/// @notice See `IMetaScheduler`. The contracts in `scheduler/` implement the operations on jobs. This contract
/// has the constructor, the administrator's functions and the views of a record.
contract MetaScheduler is Assignments, Settlement, Submission {
    // --------------------------------------------------------------- constants

    /// @notice Highest fee, in basis points.
    uint256 internal constant MAX_FEE_BPS = 2000;
    /// @notice Bounds of claim, pending, response and lost timeouts, in seconds.
    uint256 internal constant MIN_TIMEOUT = 5;
    /// @notice Bounds of claim, pending, response and lost timeouts, in seconds.
    uint256 internal constant MAX_TIMEOUT = 30 days;
    /// @notice Longest `pendingExpiry`, in seconds; the shortest is `pendingTimeout`.
    uint256 internal constant MAX_PENDING_EXPIRY = 365 days;
    /// @notice Largest `responseBlocks`.
    uint256 internal constant MAX_RESPONSE_BLOCKS = 100_000;
    /// @notice Shortest `reportGrace`, in seconds.
    uint256 internal constant MIN_REPORT_GRACE = 1 hours;
    /// @notice Bounds of the top-up notice, in seconds.
    uint256 internal constant MIN_TOP_UP_NOTICE = 10;
    /// @notice Bounds of the top-up notice, in seconds.
    uint256 internal constant MAX_TOP_UP_NOTICE = 1 hours;

    // ------------------------------------------------------------- constructor

    /// @param admin First administrator; a transfer takes two steps.
    /// @param adminDelay Delay of a transfer of the administrator, in seconds.
    /// @param credit_ Token of the escrow; must have 18 decimals.
    /// @param registry_ Registry of providers.
    /// @param treasury_ Recipient of the fees.
    /// @param forwarder Trusted ERC-2771 forwarder for customers' calls; zero for none.
    /// @param feeBps_ Initial fee, in basis points.
    /// @param timeouts_ Timeouts of the life cycle; they can't be changed later.
    constructor(
        address admin,
        uint48 adminDelay,
        IERC20 credit_,
        IProviderRegistry registry_,
        address treasury_,
        address forwarder,
        uint16 feeBps_,
        Timeouts memory timeouts_
    ) SchedulerBase(admin, adminDelay, credit_, registry_, treasury_, forwarder, timeouts_) {
        if (address(credit_).code.length == 0 || IERC20Metadata(address(credit_)).decimals() != 18)
        {
            revert InvalidAddress("credit");
        }
        if (address(registry_).code.length == 0) revert InvalidAddress("registry");
        if (treasury_ == address(0) || treasury_ == address(this)) {
            revert InvalidAddress("treasury");
        }
        if (forwarder != address(0) && forwarder.code.length == 0) {
            revert InvalidAddress("forwarder");
        }
        _checkTimeouts(timeouts_);
        _setFee(feeBps_);
        submissionsOpen = true;
        emit SubmissionsChanged(true);
    }

    // ------------------------------------------------------------------- admin

    /// @inheritdoc IMetaScheduler
    function setFee(uint16 feeBps_) external onlyRole(DEFAULT_ADMIN_ROLE) {
        _setFee(feeBps_);
    }

    /// @inheritdoc IMetaScheduler
    function setSubmissionsOpen(bool open) external onlyRole(DEFAULT_ADMIN_ROLE) {
        submissionsOpen = open;
        emit SubmissionsChanged(open);
    }

    // ------------------------------------------------------------------- views

    /// @inheritdoc IMetaScheduler
    function getJob(uint256 jobId) public view returns (Job memory) {
        Record storage record = _records[jobId];
        StateWord state = record.state;
        TermsWord terms = record.terms;
        // The narrowing casts below lose nothing: the packed fields are not wider than these types.
        return Job({
            customer: state.customer(),
            status: state.status(),
            since: uint32(state.since()),
            providerId: state.providerId(),
            memPerCpu: uint24(state.memPerCpu()),
            retriesLeft: uint8(state.retriesLeft()),
            flags: uint8(state.flags()),
            escrow: uint96(terms.escrow()),
            rate: uint72(terms.rate()),
            timeLimit: uint24(terms.timeLimit()),
            tasks: uint16(terms.tasks()),
            cpusPerTask: uint16(terms.cpusPerTask()),
            gpus: uint16(terms.gpus()),
            feeBps: uint16(terms.feeBps()),
            definition: record.definition,
            retryOf: _retryOf[jobId]
        });
    }

    /// @inheritdoc IMetaScheduler
    function getJobs(uint256[] calldata jobIds) external view returns (Job[] memory jobs) {
        jobs = new Job[](jobIds.length);
        for (uint256 i = 0; i < jobIds.length; ++i) {
            jobs[i] = getJob(jobIds[i]);
        }
    }

    /// @inheritdoc IMetaScheduler
    function jobCount() external view returns (uint256) {
        return _jobCount;
    }

    /// @inheritdoc IMetaScheduler
    function allotment(uint256 jobId) external view returns (uint256) {
        Record storage record = _records[jobId];
        return _allotment(record.state, record.terms);
    }

    /// @inheritdoc IMetaScheduler
    function deadline(uint256 jobId) external view returns (uint256) {
        Record storage record = _records[jobId];
        StateWord state = record.state;
        if (state.status() != JobStatus.RUNNING) return 0;
        return state.since() + _allotment(state, record.terms);
    }

    /// @inheritdoc IMetaScheduler
    function isLost(uint256 jobId) external view returns (bool) {
        Record storage record = _records[jobId];
        StateWord state = record.state;
        return state.status() == JobStatus.RUNNING && _isLost(state, record.terms);
    }

    /// @inheritdoc IMetaScheduler
    function canTransition(JobStatus from, JobStatus to) external pure returns (bool) {
        return JobLifecycle.canTransition(from, to);
    }

    /// @inheritdoc IMetaScheduler
    function timeouts() external view returns (Timeouts memory) {
        // Cast without loss: the constructor read each value from a field of the same width.
        return Timeouts({
            claimTimeout: uint32(_claimTimeout),
            pendingTimeout: uint32(_pendingTimeout),
            pendingExpiry: uint32(_pendingExpiry),
            responseTimeout: uint32(_responseTimeout),
            responseBlocks: uint32(_responseBlocks),
            lostTimeout: uint32(_lostTimeout),
            reportGrace: uint32(_reportGrace),
            topUpNotice: uint32(_topUpNotice),
            collectInterval: uint32(_collectInterval)
        });
    }

    // ---------------------------------------------------------------- internal

    function _setFee(uint16 feeBps_) private {
        _bounded("feeBps", feeBps_, 0, MAX_FEE_BPS);
        feeBps = feeBps_;
        emit FeeChanged(feeBps_);
    }

    function _checkTimeouts(Timeouts memory t) private pure {
        _bounded("claimTimeout", t.claimTimeout, MIN_TIMEOUT, MAX_TIMEOUT);
        _bounded("pendingTimeout", t.pendingTimeout, MIN_TIMEOUT, MAX_TIMEOUT);
        _bounded("pendingExpiry", t.pendingExpiry, t.pendingTimeout, MAX_PENDING_EXPIRY);
        _bounded("responseTimeout", t.responseTimeout, MIN_TIMEOUT, MAX_TIMEOUT);
        _bounded("responseBlocks", t.responseBlocks, 1, MAX_RESPONSE_BLOCKS);
        _bounded("lostTimeout", t.lostTimeout, t.responseTimeout, MAX_TIMEOUT);
        _bounded("reportGrace", t.reportGrace, MIN_REPORT_GRACE, MAX_TIMEOUT);
        _bounded("topUpNotice", t.topUpNotice, MIN_TOP_UP_NOTICE, MAX_TOP_UP_NOTICE);
        _bounded("collectInterval", t.collectInterval, MIN_TIMEOUT, MAX_TIMEOUT);
    }

    function _bounded(bytes32 parameter, uint256 value, uint256 min, uint256 max) private pure {
        if (value < min || value > max) revert OutOfBounds(parameter, value, min, max);
    }
}
