// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {
    AccessControlDefaultAdminRules
} from "@openzeppelin/contracts/access/extensions/AccessControlDefaultAdminRules.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {ERC2771Context} from "@openzeppelin/contracts/metatx/ERC2771Context.sol";
import {Context} from "@openzeppelin/contracts/utils/Context.sol";

import {IMetaScheduler} from "../interfaces/IMetaScheduler.sol";
import {IProviderRegistry} from "../interfaces/IProviderRegistry.sol";
import {Billing} from "../libraries/Billing.sol";
import {JobLifecycle} from "../libraries/JobLifecycle.sol";
import {StateWord, TermsWord} from "../libraries/JobRecord.sol";
import {Load} from "../libraries/Load.sol";
import {JobStatus, ProviderClock, Timeouts} from "../types/JobTypes.sol";

/// @title What all concerns of the meta-scheduler share
/// @notice Storage, the one guard and the one writer of a status, the outcome of a batch, and who is calling.
/// @dev The concerns stand in contracts of their own: `Liveness`, `Assignments`, `Settlement`, `Submission`.
abstract contract SchedulerBase is IMetaScheduler, AccessControlDefaultAdminRules, ERC2771Context {
    // --------------------------------------------------------------- constants

    /// @notice Longest reason, in bytes.
    uint256 internal constant MAX_REASON_LENGTH = 256;

    // -------------------------------------------------------------- immutables

    /// @inheritdoc IMetaScheduler
    IERC20 public immutable credit;
    /// @inheritdoc IMetaScheduler
    IProviderRegistry public immutable registry;
    /// @inheritdoc IMetaScheduler
    address public immutable treasury;
    uint256 internal immutable _claimTimeout;
    uint256 internal immutable _pendingTimeout;
    uint256 internal immutable _pendingExpiry;
    uint256 internal immutable _responseTimeout;
    uint256 internal immutable _responseBlocks;
    uint256 internal immutable _lostTimeout;
    uint256 internal immutable _reportGrace;
    uint256 internal immutable _topUpNotice;
    uint256 internal immutable _collectInterval;

    // ----------------------------------------------------------------- storage

    struct Record {
        StateWord state;
        TermsWord terms;
        bytes32 definition;
    }

    // One slot: read by a submission for the id, by an assignment for the fee.
    uint64 internal _jobCount;
    /// @inheritdoc IMetaScheduler
    uint16 public feeBps;
    /// @inheritdoc IMetaScheduler
    bool public submissionsOpen;

    mapping(uint256 jobId => Record) internal _records;
    mapping(uint16 providerId => ProviderClock) internal _clocks;
    mapping(uint16 providerId => Load) internal _loads;
    mapping(uint256 jobId => uint256) internal _retryOf;
    /// @inheritdoc IMetaScheduler
    mapping(uint256 jobId => mapping(uint16 providerId => bool)) public isBarred;
    /// @inheritdoc IMetaScheduler
    mapping(address recipient => uint256) public parkedOf;

    // ------------------------------------------------------------------ memory

    /// @dev Outcome of a batch: how many items were refused and why the first one was; the id of the caller, if
    /// it is the provider of a job that the batch moves; and the load that jobs leave free at one provider, not
    /// yet written.
    struct Batch {
        uint256 refused;
        bytes4 reason;
        uint256 jobId;
        JobStatus from;
        JobStatus to;
        uint16 mover;
        uint16 releasedBy;
        Load released;
    }

    // ------------------------------------------------------------- constructor

    constructor(
        address admin,
        uint48 adminDelay,
        IERC20 credit_,
        IProviderRegistry registry_,
        address treasury_,
        address forwarder,
        Timeouts memory timeouts_
    ) AccessControlDefaultAdminRules(adminDelay, admin) ERC2771Context(forwarder) {
        credit = credit_;
        registry = registry_;
        treasury = treasury_;
        _claimTimeout = timeouts_.claimTimeout;
        _pendingTimeout = timeouts_.pendingTimeout;
        _pendingExpiry = timeouts_.pendingExpiry;
        _responseTimeout = timeouts_.responseTimeout;
        _responseBlocks = timeouts_.responseBlocks;
        _lostTimeout = timeouts_.lostTimeout;
        _reportGrace = timeouts_.reportGrace;
        _topUpNotice = timeouts_.topUpNotice;
        _collectInterval = timeouts_.collectInterval;
    }

    // ------------------------------------------------------ who is calling

    /// @dev The caller of a customer's function: the signer, if the call comes through the trusted forwarder.
    function _customerSender() internal view returns (address) {
        return ERC2771Context._msgSender();
    }

    /// @dev Everyone else is the plain sender: roles and providers' calls can't be forwarded.
    function _msgSender() internal view override(Context, ERC2771Context) returns (address) {
        return msg.sender;
    }

    function _msgData() internal pure override(Context, ERC2771Context) returns (bytes calldata) {
        return msg.data;
    }

    function _contextSuffixLength()
        internal
        view
        override(Context, ERC2771Context)
        returns (uint256)
    {
        return ERC2771Context._contextSuffixLength();
    }

    /// @dev Whether the caller is a job's provider. It is looked up once for the jobs of one provider.
    function _isByProvider(StateWord state, Batch memory batch) internal view returns (bool) {
        uint16 providerId = state.providerId();
        if (providerId == batch.mover) return true;
        if (_clocks[providerId].account != msg.sender) return false;
        batch.mover = providerId;
        return true;
    }

    // ----------------------------------------------------------- status changes

    /// @dev The one guard: whether the table has the arrow. Refuses the item if it does not.
    function _canMove(uint256 jobId, StateWord state, JobStatus to, Batch memory batch)
        internal
        returns (bool)
    {
        if (JobLifecycle.canTransition(state.status(), to)) return true;
        _refuse(batch, jobId, state, to, InvalidTransition.selector);
        return false;
    }

    /// @dev The one writer of a status, once `_canMove` let it pass: writes the record and emits the event.
    /// @return moved The state word as it was written.
    function _move(
        uint256 jobId,
        Record storage record,
        StateWord state,
        address provider,
        JobStatus to
    ) internal returns (StateWord moved) {
        moved = state.moved(to);
        record.state = moved;
        _emitTransition(jobId, state.customer(), provider, state.status(), to);
    }

    /// @dev `JobTransition`, the most frequent event by far. It is encoded in the two words of scratch memory
    /// instead of newly allocated memory.
    function _emitTransition(
        uint256 jobId,
        address customer,
        address provider,
        JobStatus from,
        JobStatus to
    ) internal {
        bytes32 topic = JobTransition.selector;
        assembly ("memory-safe") {
            mstore(0, from)
            mstore(32, to)
            // The upper bits of a narrow value are not guaranteed to be zero.
            log4(0, 64, topic, jobId, shr(96, shl(96, customer)), shr(96, shl(96, provider)))
        }
    }

    // ------------------------------------------------------------------ batches

    /// @dev Skips an item; the first reason is kept for the case that nothing is applied.
    function _refuse(
        Batch memory batch,
        uint256 jobId,
        StateWord state,
        JobStatus to,
        bytes4 reason
    ) internal {
        if (batch.refused++ == 0) {
            batch.reason = reason;
            batch.jobId = jobId;
            batch.from = state.status();
            batch.to = to;
        }
        emit TransitionSkipped(jobId, state.status(), reason);
    }

    /// @dev Ends a batch: reverts with the first item's reason if nothing was applied, writes the load that is
    /// left, and answers an open challenge of the provider that moved its jobs.
    function _close(Batch memory batch, uint256 items) internal {
        if (items == batch.refused) _revert(batch, items);
        if (batch.releasedBy != 0) _writeReleased(batch);
        if (batch.mover != 0) {
            ProviderClock storage clock = _clocks[batch.mover];
            if (clock.challengedAt != 0) _answer(clock);
        }
    }

    function _revert(Batch memory batch, uint256 items) private pure {
        if (items == 0) revert EmptyBatch();
        bytes4 reason = batch.reason;
        uint256 jobId = batch.jobId;
        if (reason == InvalidTransition.selector) {
            revert InvalidTransition(jobId, batch.from, batch.to);
        }
        // Every other per-item error takes the job id alone. Solidity can't revert with a selector that is
        // only known at run time, so the encoded error is handed to the EVM as it is.
        bytes memory data = abi.encodeWithSelector(reason, jobId);
        assembly ("memory-safe") {
            revert(add(data, 32), mload(data))
        }
    }

    /// @dev Stops a challenge clock that runs.
    function _answer(ProviderClock storage clock) internal {
        clock.challengedAt = 0;
        clock.challengedBlock = 0;
        clock.answeredAt = uint32(block.timestamp);
        emit ProviderAnswered(clock.account);
    }

    // --------------------------------------------------------------------- load

    /// @dev A job leaves its provider. The sum of one provider is kept in memory and written once.
    function _release(Batch memory batch, StateWord state, TermsWord terms) internal {
        uint16 providerId = state.providerId();
        if (batch.releasedBy != providerId) {
            if (batch.releasedBy != 0) _writeReleased(batch);
            batch.releasedBy = providerId;
            batch.released = Load.wrap(0);
        }
        batch.released = batch.released.plus(terms.load(state));
    }

    function _writeReleased(Batch memory batch) private {
        uint16 providerId = batch.releasedBy;
        _loads[providerId] = _loads[providerId].minus(batch.released);
    }

    // ---------------------------------------------------------------- short reads

    /// @dev Zero for the id zero, so for a job without a provider.
    function _accountOf(StateWord state) internal view returns (address) {
        return _clocks[state.providerId()].account;
    }

    function _allotment(StateWord state, TermsWord terms) internal pure returns (uint256) {
        return
            Billing.allotment(state.untilSpent(), terms.timeLimit(), terms.escrow(), terms.rate());
    }

    /// @dev Reasons of strangers are dropped.
    function _heard(StateWord state, address provider, string calldata reason)
        internal
        view
        returns (string memory)
    {
        return msg.sender == provider || msg.sender == state.customer() ? reason : "";
    }
}
