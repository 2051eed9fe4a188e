// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Prices} from "./ProviderTypes.sol";

/// @notice Status of a job. Value 0 means that the job does not exist.
enum JobStatus {
    /// @dev No record.
    NONE,
    /// @dev Submitted and paid into escrow; waits for a provider.
    PENDING,
    /// @dev Assigned to a provider at a fixed rate; waits for the provider's claim.
    META_SCHEDULED,
    /// @dev Claimed; queued in the provider's cluster.
    SCHEDULED,
    /// @dev Being executed and billed.
    RUNNING,
    /// @dev Final: cancelled by its customer, or by anyone after `pendingExpiry`.
    CANCELLED,
    /// @dev Final: ended with exit code zero.
    FINISHED,
    /// @dev Final: ended with another exit code.
    FAILED,
    /// @dev Final: used up its allotment.
    OUT_OF_CREDITS,
    /// @dev Final: lost or given up by its provider; refunded, or continued by a successor.
    PANICKED
}

/// @notice Objective by which the meta-scheduler chooses among the eligible providers.
enum Objective {
    /// @dev The cheapest provider.
    COST,
    /// @dev The fastest provider according to its labels.
    TIME,
    /// @dev The provider with the lowest energy use according to its labels.
    ENERGY
}

/// @notice Terms that a customer sets for all jobs of one request.
/// @param amount Escrow of each job, in credit-wei.
/// @param timeLimit Walltime that the escrow must cover, in seconds; more than zero.
/// @param tasks Number of tasks. A task runs on one node.
/// @param cpusPerTask CPUs per task.
/// @param memPerCpu Memory per CPU, in MB.
/// @param gpus GPUs of the whole job.
/// @param retries How many times a lost run may be repeated at another provider; at most 5.
/// @param flags Sum of 1: run until the credits are spent instead of stopping at the time limit; 2: no provider
/// may assign the job to itself; 4: the provider may collect interim payments. Other bits are rejected.
/// @param objective Objective for the choice of a provider.
/// @param name Human-readable; at most 64 bytes.
/// @param uses Affinities on provider labels, joined by commas; at most 512 bytes.
struct JobTerms {
    uint96 amount;
    uint24 timeLimit;
    uint16 tasks;
    uint16 cpusPerTask;
    uint24 memPerCpu;
    uint16 gpus;
    uint8 retries;
    uint8 flags;
    Objective objective;
    string name;
    string uses;
}

/// @notice Requests one job for each definition, all with the same terms.
/// @param terms Terms of every job of the request.
/// @param definitions SHA-256 of each job's definition bytes.
struct JobRequest {
    JobTerms terms;
    bytes32[] definitions;
}

/// @notice Jobs to assign to one provider.
/// @param providerId The provider.
/// @param prices Prices on which the scheduler based its decision; if one is higher now, the job is skipped.
/// @param jobIds The jobs.
struct Assignment {
    uint16 providerId;
    Prices prices;
    uint256[] jobIds;
}

/// @notice How a run ended, as its provider reports it.
/// @param jobId The job.
/// @param secondsUsed Seconds to bill; the contract bills at most the elapsed chain time and the allotment.
/// @param exitCode Exit code of the job; zero is success.
/// @param result SHA-256 of the result, or zero.
/// @param reason Short description of the end, as UTF-8 padded with zeros.
struct Report {
    uint256 jobId;
    uint32 secondsUsed;
    int32 exitCode;
    bytes32 result;
    bytes32 reason;
}

/// @notice An EIP-2612 permit by which the caller lets the MetaScheduler take credits.
struct Permit {
    uint256 value;
    uint256 deadline;
    uint8 v;
    bytes32 r;
    bytes32 s;
}

/// @notice An unpacked job record.
/// @param customer Account that submitted it and gets the refund.
/// @param status Its status.
/// @param since Time of the last transition, in seconds; while RUNNING, the time up to which the run was billed:
/// its start, or its last interim payment.
/// @param providerId Assigned provider, zero if there is none.
/// @param memPerCpu Memory per CPU, in MB.
/// @param retriesLeft Number of successors that may still follow.
/// @param flags The flags of its terms, and 128 if it continues another job.
/// @param escrow Credit-wei held while live; once final, the amount that its settlement consumed (paid + fee,
/// without earlier interim payments).
/// @param rate Credit-wei per second, zero until assigned.
/// @param timeLimit Walltime in seconds, minus the seconds that interim payments billed.
/// @param tasks Number of tasks.
/// @param cpusPerTask CPUs per task.
/// @param gpus GPUs of the whole job.
/// @param feeBps Fee in basis points, fixed at assignment.
/// @param definition SHA-256 of the definition.
/// @param retryOf The predecessor that this job continues, or zero.
struct Job {
    address customer;
    JobStatus status;
    uint32 since;
    uint16 providerId;
    uint24 memPerCpu;
    uint8 retriesLeft;
    uint8 flags;
    uint96 escrow;
    uint72 rate;
    uint24 timeLimit;
    uint16 tasks;
    uint16 cpusPerTask;
    uint16 gpus;
    uint16 feeBps;
    bytes32 definition;
    uint256 retryOf;
}

/// @notice The challenge state of a provider.
/// @param account Address of the provider, zero before its first job.
/// @param challengedAt Time of the open challenge in seconds, zero if there is none.
/// @param challengedBlock Block of the open challenge.
/// @param answeredAt Time of the last answer in seconds.
struct ProviderClock {
    address account;
    uint32 challengedAt;
    uint32 challengedBlock;
    uint32 answeredAt;
}

/// @notice Resources that a provider's live assigned jobs use.
/// @param cpus Total CPUs.
/// @param mem Total memory, in MB.
/// @param gpus Total GPUs.
struct ProviderLoad {
    uint32 cpus;
    uint48 mem;
    uint32 gpus;
}

/// @notice Timeouts of the life cycle, in seconds except for `responseBlocks`.
/// @param claimTimeout How long a provider may keep a job without claiming it, or without starting it.
/// @param pendingTimeout How long a job must be PENDING before a provider may assign it to itself.
/// @param pendingExpiry How long a job must be PENDING before anyone may cancel it.
/// @param responseTimeout How long a provider may leave a challenge unanswered before it gets no new jobs.
/// @param responseBlocks Number of blocks that must pass as well.
/// @param lostTimeout How long a provider may leave a challenge unanswered before its runs count as lost.
/// @param reportGrace How long after the end of its allotment a run may stay unreported.
/// @param topUpNotice Last seconds of a running allotment, in which its end can't change.
/// @param collectInterval Minimum time between two interim payments of a run.
struct Timeouts {
    uint32 claimTimeout;
    uint32 pendingTimeout;
    uint32 pendingExpiry;
    uint32 responseTimeout;
    uint32 responseBlocks;
    uint32 lostTimeout;
    uint32 reportGrace;
    uint32 topUpNotice;
    uint32 collectInterval;
}
