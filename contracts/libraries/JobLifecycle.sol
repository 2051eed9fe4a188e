// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {JobStatus} from "../types/JobTypes.sol";

/// @title The only transition table
/// @notice Ten rows of ten bits: bit `to` of row `from` is set if the transition is allowed.
library JobLifecycle {
    uint256 private constant ROW = 10;

    // Twelve transitions of the life cycle, three of redistribution, and the creation of a job.
    uint256 private constant TABLE =
    // NONE -> PENDING
        ((1 << uint8(JobStatus.PENDING)) << (ROW * uint8(JobStatus.NONE)))
            // PENDING -> META_SCHEDULED | CANCELLED
            | (((1 << uint8(JobStatus.META_SCHEDULED)) | (1 << uint8(JobStatus.CANCELLED)))
                << (ROW * uint8(JobStatus.PENDING)))
            // META_SCHEDULED -> SCHEDULED | CANCELLED | PANICKED | PENDING
            | (((1 << uint8(JobStatus.SCHEDULED))
                    | (1 << uint8(JobStatus.CANCELLED))
                    | (1 << uint8(JobStatus.PANICKED))
                    | (1 << uint8(JobStatus.PENDING)))
                << (ROW * uint8(JobStatus.META_SCHEDULED)))
            // SCHEDULED -> RUNNING | CANCELLED | PANICKED | PENDING
            | (((1 << uint8(JobStatus.RUNNING))
                    | (1 << uint8(JobStatus.CANCELLED))
                    | (1 << uint8(JobStatus.PANICKED))
                    | (1 << uint8(JobStatus.PENDING)))
                << (ROW * uint8(JobStatus.SCHEDULED)))
            // RUNNING -> CANCELLED | FINISHED | FAILED | OUT_OF_CREDITS | PANICKED
            | (((1 << uint8(JobStatus.CANCELLED))
                    | (1 << uint8(JobStatus.FINISHED))
                    | (1 << uint8(JobStatus.FAILED))
                    | (1 << uint8(JobStatus.OUT_OF_CREDITS))
                    | (1 << uint8(JobStatus.PANICKED)))
                << (ROW * uint8(JobStatus.RUNNING)));

    // PENDING, META_SCHEDULED, SCHEDULED, RUNNING
    uint256 private constant LIVE = 0x1e;

    /// @notice Whether a transition is allowed. NONE to PENDING is the creation of a job.
    function canTransition(JobStatus from, JobStatus to) internal pure returns (bool) {
        // A status is at most nine, so the offset is at most 99.
        unchecked {
            return (TABLE >> (ROW * number(from) + number(to))) & 1 == 1;
        }
    }

    /// @notice Whether a job of this status holds escrow and can still change its status.
    function isLive(JobStatus status) internal pure returns (bool) {
        return (LIVE >> number(status)) & 1 == 1;
    }

    /// @notice Number of a status.
    /// @dev Without the range check of a conversion: a variable of the enum always holds one of its members.
    function number(JobStatus status) internal pure returns (uint256 value) {
        assembly ("memory-safe") {
            value := status
        }
    }
}
