// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../interfaces/IMetaScheduler.sol";
import {Billing} from "../libraries/Billing.sol";
import {CalldataArray} from "../libraries/CalldataArray.sol";
import {Capacity, Tariff} from "../libraries/Capacity.sol";
import {StateWord, TermsWord} from "../libraries/JobRecord.sol";
import {Load} from "../libraries/Load.sol";
import {Assignment, JobStatus, ProviderClock, ProviderLoad} from "../types/JobTypes.sol";
import {Prices, ProviderStatus} from "../types/ProviderTypes.sol";
import {Liveness} from "./Liveness.sol";

/// @title Assigns jobs to providers, and moves them on to RUNNING or back to PENDING
abstract contract Assignments is Liveness {
    using CalldataArray for uint256[];

    /// @notice Role that may assign jobs, and requeue jobs that were not started in time.
    bytes32 public constant METASCHEDULER_ROLE = keccak256("METASCHEDULER_ROLE");

    /// @dev A provider during the assignments of one call; each assignment adds to its load.
    struct Candidate {
        uint16 id;
        address account;
        bytes4 refusal;
        Capacity capacity;
        Tariff tariff;
        Load load;
    }

    // Counters and the outcome of a batch start at zero, the initial value of a local variable.
    // slither-disable-start uninitialized-local

    // --------------------------------------------------------------- scheduler

    /// @inheritdoc IMetaScheduler
    function metaSchedule(Assignment[] calldata assignments) external onlyRole(METASCHEDULER_ROLE) {
        Batch memory batch;
        uint256 fee = feeBps;
        uint256 items;
        for (uint256 i = 0; i < assignments.length; ++i) {
            Candidate memory candidate = _candidate(assignments[i].providerId);
            if (candidate.refusal == 0 && candidate.tariff.exceeds(assignments[i].prices)) {
                candidate.refusal = PriceRaised.selector;
            }
            uint256[] calldata jobIds = assignments[i].jobIds;
            items += jobIds.length;
            for (uint256 k = 0; k < jobIds.length; ++k) {
                _assign(jobIds.itemAt(k), candidate, fee, false, batch);
            }
            _loads[candidate.id] = candidate.load;
        }
        _close(batch, items);
    }

    // --------------------------------------------------------------- providers

    /// @inheritdoc IMetaScheduler
    function selfSchedule(uint256[] calldata jobIds) external {
        Batch memory batch;
        uint256 fee = feeBps;
        Candidate memory candidate = _candidate(registry.idOf(msg.sender));
        for (uint256 i = 0; i < jobIds.length; ++i) {
            _assign(jobIds.itemAt(i), candidate, fee, true, batch);
        }
        _loads[candidate.id] = candidate.load;
        batch.mover = candidate.id;
        _close(batch, jobIds.length);
    }

    /// @inheritdoc IMetaScheduler
    function claim(uint256[] calldata jobIds) external {
        _advance(jobIds, JobStatus.SCHEDULED, false);
    }

    /// @inheritdoc IMetaScheduler
    function start(uint256[] calldata jobIds) external {
        _advance(jobIds, JobStatus.RUNNING, false);
    }

    /// @inheritdoc IMetaScheduler
    function claimAndStart(uint256[] calldata jobIds) external {
        _advance(jobIds, JobStatus.SCHEDULED, true);
    }

    // ------------------------------------------------------ parties and anyone

    /// @inheritdoc IMetaScheduler
    function requeue(uint256[] calldata jobIds, string calldata reason) external {
        Batch memory batch;
        for (uint256 i = 0; i < jobIds.length; ++i) {
            _requeue(jobIds.itemAt(i), reason, batch);
        }
        _close(batch, jobIds.length);
    }

    // ------------------------------------------------------------------- views

    /// @inheritdoc IMetaScheduler
    function isEligible(uint256 jobId, uint16 providerId)
        external
        view
        returns (bool eligible, bytes4 reason)
    {
        Record storage record = _records[jobId];
        StateWord state = record.state;
        if (state.status() != JobStatus.PENDING) return (false, InvalidTransition.selector);
        Candidate memory candidate = _standing(providerId);
        if (candidate.refusal != 0) return (false, candidate.refusal);
        (, reason) = _offerFor(jobId, state, record.terms, candidate);
        eligible = reason == 0;
    }

    /// @inheritdoc IMetaScheduler
    function loadOf(uint16 providerId) external view returns (ProviderLoad memory) {
        Load load = _loads[providerId];
        // Cast without loss: the fields of a load have the same widths.
        return ProviderLoad(uint32(load.cpus()), uint48(load.mem()), uint32(load.gpus()));
    }

    // ------------------------------------------------------- internal: one item

    function _assign(
        uint256 jobId,
        Candidate memory candidate,
        uint256 fee,
        bool bySelf,
        Batch memory batch
    ) private {
        Record storage record = _records[jobId];
        StateWord state = record.state;
        if (!_canMove(jobId, state, JobStatus.META_SCHEDULED, batch)) return;
        TermsWord terms = record.terms;
        bytes4 refusal = candidate.refusal;
        uint256 rate;
        if (refusal == 0 && bySelf) refusal = _selfRefusal(jobId, candidate.id, state);
        if (refusal == 0) {
            (rate, refusal) = _offerFor(jobId, state, terms, candidate);
        }
        if (refusal != 0) {
            _refuse(batch, jobId, state, JobStatus.META_SCHEDULED, refusal);
            return;
        }
        candidate.load = candidate.load.plus(terms.load(state));
        record.terms = terms.withPrice(rate, fee);
        _move(
            jobId,
            record,
            state.withProvider(candidate.id),
            candidate.account,
            JobStatus.META_SCHEDULED
        );
        emit JobPriced(jobId, candidate.account, rate, fee);
    }

    /// @dev `claim` and `start` differ in the new status; `claimAndStart` does both, one after the other.
    function _advance(uint256[] calldata jobIds, JobStatus to, bool alsoStart) private {
        Batch memory batch;
        for (uint256 i = 0; i < jobIds.length; ++i) {
            uint256 jobId = jobIds.itemAt(i);
            Record storage record = _records[jobId];
            StateWord state = record.state;
            if (!_canMove(jobId, state, to, batch)) continue;
            if (!_isByProvider(state, batch)) {
                _refuse(batch, jobId, state, to, NotAssignedProvider.selector);
                continue;
            }
            state = _move(jobId, record, state, msg.sender, to);
            if (alsoStart) _move(jobId, record, state, msg.sender, JobStatus.RUNNING);
        }
        _close(batch, jobIds.length);
    }

    function _requeue(uint256 jobId, string calldata reason, Batch memory batch) private {
        Record storage record = _records[jobId];
        StateWord state = record.state;
        if (state.status() == JobStatus.NONE) {
            // The table also allows NONE to PENDING, which is the creation of a job, not a requeue.
            _refuse(batch, jobId, state, JobStatus.PENDING, InvalidTransition.selector);
            return;
        }
        if (!_canMove(jobId, state, JobStatus.PENDING, batch)) return;
        address provider = _accountOf(state);
        bytes4 refusal;
        if (bytes(reason).length > MAX_REASON_LENGTH) {
            refusal = ReasonTooLong.selector;
        } else if (msg.sender != provider && !_mayRequeue(state)) {
            refusal = TooEarly.selector;
        }
        if (refusal != 0) {
            _refuse(batch, jobId, state, JobStatus.PENDING, refusal);
            return;
        }
        uint16 providerId = state.providerId();
        if (msg.sender == provider) batch.mover = providerId;
        // Also if the provider itself requeued it: otherwise it could block a job by taking and returning it for ever.
        isBarred[jobId][providerId] = true;
        TermsWord terms = record.terms;
        _release(batch, state, terms);
        record.terms = terms.withPrice(0, 0);
        _move(jobId, record, state.withProvider(0), provider, JobStatus.PENDING);
        emit JobRequeued(jobId, msg.sender, _heard(state, provider, reason));
    }

    // ---------------------------------------------------- internal: eligibility

    /// @dev Rate of a job at an eligible provider, or the reason why the provider is not eligible.
    function _offerFor(uint256 jobId, StateWord state, TermsWord terms, Candidate memory candidate)
        private
        view
        returns (uint256 rate, bytes4 refusal)
    {
        if (state.isSuccessor() && _isExcluded(jobId, candidate.id)) {
            return (0, ProviderExcluded.selector);
        }
        uint256 tasks = terms.tasks();
        uint256 cpusPerTask = terms.cpusPerTask();
        uint256 memPerCpu = state.memPerCpu();
        uint256 gpus = terms.gpus();
        if (!Billing.fits(candidate.capacity, candidate.load, tasks, cpusPerTask, memPerCpu, gpus))
        {
            return (0, DoesNotFit.selector);
        }
        rate = Billing.rateOf(candidate.tariff, tasks, cpusPerTask, memPerCpu, gpus);
        if (rate == 0 || rate > type(uint72).max) return (0, RateOutOfRange.selector);
        unchecked {
            // No overflow: a rate has 72 bits, a limit has 24.
            if (rate * terms.timeLimit() > terms.escrow()) return (0, OverBudget.selector);
        }
    }

    /// @dev Records of predecessors are final, so they name the providers that lost the job before. Ids are
    /// compared, because no provider can choose its id.
    function _isExcluded(uint256 jobId, uint16 providerId) private view returns (bool) {
        for (uint256 id = _retryOf[jobId]; id != 0; id = _retryOf[id]) {
            // slither-disable-next-line incorrect-equality
            if (_records[id].state.providerId() == providerId) return true;
        }
        return false;
    }

    function _selfRefusal(uint256 jobId, uint16 providerId, StateWord state)
        private
        view
        returns (bytes4)
    {
        if (state.forbidsSelfScheduling()) return SelfSchedulingForbidden.selector;
        if (block.timestamp < state.since() + _pendingTimeout) return TooEarly.selector;
        return isBarred[jobId][providerId] ? ProviderExcluded.selector : bytes4(0);
    }

    function _standing(uint16 providerId) private view returns (Candidate memory candidate) {
        ProviderClock storage clock = _clocks[providerId];
        address account = clock.account;
        if (account == address(0)) account = registry.accountOf(providerId);
        (Capacity capacity, Tariff tariff) = registry.capacityOf(account);
        candidate.id = providerId;
        candidate.account = account;
        candidate.capacity = capacity;
        candidate.tariff = tariff;
        candidate.load = _loads[providerId];
        if (
            capacity.statusOf(tariff) != ProviderStatus.ACTIVE
                || capacity.approvedUntil() < block.timestamp
        ) {
            candidate.refusal = ProviderNotActive.selector;
        } else if (_isSilent(clock)) {
            candidate.refusal = ProviderSilent.selector;
        }
    }

    /// @dev Stores a provider's address at its first assignment, so that its later calls need not read the registry.
    function _candidate(uint16 providerId) private returns (Candidate memory candidate) {
        candidate = _standing(providerId);
        ProviderClock storage clock = _clocks[providerId];
        if (clock.account == address(0) && candidate.refusal == 0) {
            clock.account = candidate.account;
        }
    }

    /// @dev Whether a caller other than the provider may requeue now.
    function _mayRequeue(StateWord state) private view returns (bool) {
        bool inTime = block.timestamp <= state.since() + _claimTimeout;
        if (state.status() == JobStatus.META_SCHEDULED) return !inTime;
        if (!inTime && (msg.sender == state.customer() || hasRole(METASCHEDULER_ROLE, msg.sender))) return true;
        ProviderClock storage clock = _clocks[state.providerId()];
        return _isSilent(clock) || registry.statusOf(clock.account) == ProviderStatus.BANNED;
    }

    // slither-disable-end uninitialized-local
}
