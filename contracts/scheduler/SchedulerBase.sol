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

/// @title Common base of the meta-scheduler's parts
/// @notice Storage, the only guard and the only writer of a status, the outcome of a batch, and the caller.
/// @dev The parts are `Liveness`, `Assignments`, `Settlement` and `Submission`.
abstract contract SchedulerBase is IMetaScheduler, AccessControlDefaultAdminRules, ERC2771Context {
    // --------------------------------------------------------------- constants

    /// @notice Maximum length of a reason, in bytes.
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

    // One slot: a submission reads the id, an assignment reads the fee.
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

    /// @dev Outcome of a batch: the number of skipped items and the reason of the first one; the provider id of the
    /// caller, if the batch changes a job of it; and the load that ended jobs release at one provider, which is not
    /// written yet.
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

    // ---------------------------------------------------------- the caller

    /// @dev The caller of a customer's function: the signer, if the trusted forwarder made the call.
    function _customerSender() internal view returns (address) {
        return ERC2771Context._msgSender();
    }

    /// @dev For all other functions: the sender. Calls of roles and providers can't be forwarded.
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

    /// @dev The only guard of transitions: skips the item if the table does not allow it.
    function _canMove(uint256 jobId, StateWord state, JobStatus to, Batch memory batch)
        internal
        returns (bool)
    {
        if (JobLifecycle.canTransition(state.status(), to)) return true;
        _refuse(batch, jobId, state, to, InvalidTransition.selector);
        return false;
    }

    /// @dev The only writer of a status, called after `_canMove`: writes the record and emits the event.
    /// @return moved The new state word.
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

    /// @dev Emits `JobTransition`, by far the most frequent event. It is encoded in the two words of scratch space
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

    /// @dev Skips an item, and keeps the first reason in case that no item is applied.
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

    /// @dev Ends a batch: reverts with the first item's reason if nothing was applied, writes the released load,
    /// and answers an open challenge of the provider whose jobs changed.
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
        // only known at run time, so the error is encoded by hand.
        bytes memory data = abi.encodeWithSelector(reason, jobId);
        assembly ("memory-safe") {
            revert(add(data, 32), mload(data))
        }
    }

    /// @dev Ends an open challenge.
    function _answer(ProviderClock storage clock) internal {
        clock.challengedAt = 0;
        clock.challengedBlock = 0;
        clock.answeredAt = uint32(block.timestamp);
        emit ProviderAnswered(clock.account);
    }

    // --------------------------------------------------------------------- load

    /// @dev Releases the load of a job. The sum of one provider is kept in memory and written once.
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

    // ------------------------------------------------------------------- helpers

    /// @dev Zero for the id zero, which means that a job has no provider.
    function _accountOf(StateWord state) internal view returns (address) {
        return _clocks[state.providerId()].account;
    }

    function _allotment(StateWord state, TermsWord terms) internal pure returns (uint256) {
        return
            Billing.allotment(state.untilSpent(), terms.timeLimit(), terms.escrow(), terms.rate());
    }

    /// @dev A reason is dropped unless it comes from the provider or the customer.
    function _heard(StateWord state, address provider, string calldata reason)
        internal
        view
        returns (string memory)
    {
        return msg.sender == provider || msg.sender == state.customer() ? reason : "";
    }
}
