// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IMetaScheduler} from "../interfaces/IMetaScheduler.sol";
import {JobLifecycle} from "../libraries/JobLifecycle.sol";
import {StateWord, TermsWord} from "../libraries/JobRecord.sol";
import {JobStatus, ProviderClock} from "../types/JobTypes.sol";
import {SchedulerBase} from "./SchedulerBase.sol";

/// @title Challenges, silent providers and lost runs
abstract contract Liveness is SchedulerBase {
    /// @inheritdoc IMetaScheduler
    function challenge(uint256 jobId) external {
        StateWord state = _records[jobId].state;
        JobStatus status = state.status();
        // A status can only take the values of the enum, so a comparison for equality is safe.
        // slither-disable-next-line incorrect-equality
        if (!JobLifecycle.isLive(status) || status == JobStatus.PENDING) {
            revert WrongStatus(jobId, status);
        }
        ProviderClock storage clock = _clocks[state.providerId()];
        if (clock.challengedAt != 0 || block.timestamp < clock.answeredAt + _responseTimeout) {
            revert ChallengeRefused(jobId);
        }
        // Block numbers stay below 2^32 for more than a century at one block per second.
        clock.challengedAt = uint32(block.timestamp);
        clock.challengedBlock = uint32(block.number);
        emit ProviderChallenged(
            jobId, clock.account, msg.sender, block.timestamp + _responseTimeout
        );
    }

    /// @inheritdoc IMetaScheduler
    function answer() external {
        ProviderClock storage clock = _clocks[registry.idOf(msg.sender)];
        if (clock.challengedAt == 0) revert NothingToAnswer();
        _answer(clock);
    }

    /// @inheritdoc IMetaScheduler
    function isSilent(uint16 providerId) external view returns (bool) {
        return _isSilent(_clocks[providerId]);
    }

    /// @inheritdoc IMetaScheduler
    function clockOf(uint16 providerId) external view returns (ProviderClock memory) {
        return _clocks[providerId];
    }

    /// @dev A silent provider gets no new jobs, and its queued jobs may be requeued.
    function _isSilent(ProviderClock storage clock) internal view returns (bool) {
        return _unanswered(clock, _responseTimeout);
    }

    /// @dev Whether a RUNNING job is lost: its provider is gone, or it is overdue.
    function _isLost(StateWord state, TermsWord terms) internal view returns (bool) {
        return block.timestamp > state.since() + _allotment(state, terms) + _reportGrace
            || _unanswered(_clocks[state.providerId()], _lostTimeout);
    }

    /// @dev Blocks count as well as seconds, so that an outage of the chain makes no provider silent.
    function _unanswered(ProviderClock storage clock, uint256 timeout) private view returns (bool) {
        uint256 challengedAt = clock.challengedAt;
        return challengedAt != 0 && block.timestamp > challengedAt + timeout
            && block.number > clock.challengedBlock + _responseBlocks;
    }
}
