// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Prices} from "./ProviderTypes.sol";

/// @notice Where a job stands in its life. Value 0 means that no such job exists.
enum JobStatus {
    /// @dev No record.
    NONE,
    /// @dev Submitted and paid into escrow; awaits a provider.
    PENDING,
    /// @dev Assigned to a provider at a fixed rate; awaits the provider's claim.
    META_SCHEDULED,
    /// @dev Claimed; queued inside the provider's cluster.
    SCHEDULED,
    /// @dev Being executed; the meter runs.
    RUNNING,
    /// @dev Final: ended by its customer, or by anyone after `pendingExpiry`.
    CANCELLED,
    /// @dev Final: ended with exit code zero.
    FINISHED,
    /// @dev Final: ended with another exit code.
    FAILED,
    /// @dev Final: used up its allotment.
    OUT_OF_CREDITS,
    /// @dev Final: lost or given up by its provider; refunded, or carried on by a successor.
    PANICKED
}

/// @notice What the meta-scheduler should favour among the providers that fit.
enum Objective {
    /// @dev The cheapest provider.
    COST,
    /// @dev The fastest provider, by its labels.
    TIME,
    /// @dev The most frugal provider, by its labels.
    ENERGY
}

/// @notice What a customer asks for, shared by all jobs of one request.
/// @param amount Escrow of each job, in credit-wei.
/// @param timeLimit Walltime that the escrow must be able to buy, in seconds; more than zero.
/// @param tasks Number of tasks; each runs on one node.
/// @param cpusPerTask Cpus of each task.
/// @param memPerCpu Memory per cpu, in MB.
/// @param gpus Gpus of the whole job.
/// @param retries How often a lost run may be continued elsewhere; at most 5.
/// @param flags Sum of 1: run until the credits are spent instead of stopping at the time limit; 2: no provider
/// may assign the job to itself; 4: the provider may collect interim payments. Other bits are refused.
/// @param objective What the scheduler should favour.
/// @param name For people; at most 64 bytes.
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

/// @notice One job for each definition, all of the same terms.
/// @param terms What every job of the request asks for.
/// @param definitions SHA-256 of each job's definition bytes.
struct JobRequest {
    JobTerms terms;
    bytes32[] definitions;
}

/// @notice Jobs to assign to one provider.
/// @param providerId The provider.
/// @param prices The tariff that the scheduler decided by; a provider that asks more now is refused.
/// @param jobIds The jobs.
struct Assignment {
    uint16 providerId;
    Prices prices;
    uint256[] jobIds;
}

/// @notice How a run ended, as its provider reports it.
/// @param jobId The job.
/// @param secondsUsed Time to bill, in seconds; the contract bills no more than chain time and allotment.
/// @param exitCode Exit code of the job; zero is success.
/// @param result SHA-256 of the result, or zero.
/// @param reason A few words about the end, as UTF-8 padded with zeros.
struct Report {
    uint256 jobId;
    uint32 secondsUsed;
    int32 exitCode;
    bytes32 result;
    bytes32 reason;
}

/// @notice An EIP-2612 permit of the caller for the MetaScheduler.
struct Permit {
    uint256 value;
    uint256 deadline;
    uint8 v;
    bytes32 r;
    bytes32 s;
}

/// @notice A job record, unpacked for readers.
/// @param customer Who submitted it and gets the refund.
/// @param status Where it stands.
/// @param since Time of the last transition, in seconds; while RUNNING the time from which the run is still
/// to be billed: its start, or its last interim payment.
/// @param providerId Assigned provider, zero when there is none.
/// @param memPerCpu Memory per cpu, in MB.
/// @param retriesLeft How many successors may still follow.
/// @param flags The flags of its terms, and 128 if it continues another job.
/// @param escrow Credit-wei held while live; once final, what its settlement consumed (paid + fee, without
/// earlier interim payments).
/// @param rate Credit-wei a second, zero until assigned.
/// @param timeLimit Walltime in seconds, less what interim payments have billed.
/// @param tasks Number of tasks.
/// @param cpusPerTask Cpus of each task.
/// @param gpus Gpus of the whole job.
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

/// @notice A provider's challenge clock.
/// @param account Address of the provider, zero before its first job.
/// @param challengedAt Time of the unanswered challenge in seconds, zero when none runs.
/// @param challengedBlock Block of the unanswered challenge.
/// @param answeredAt Time of the last answer in seconds.
struct ProviderClock {
    address account;
    uint32 challengedAt;
    uint32 challengedBlock;
    uint32 answeredAt;
}

/// @notice What a provider's live assigned jobs occupy.
/// @param cpus Cpus in all.
/// @param mem Memory in all, in MB.
/// @param gpus Gpus in all.
struct ProviderLoad {
    uint32 cpus;
    uint48 mem;
    uint32 gpus;
}

/// @notice Times that rule the life of a job, in seconds but for `responseBlocks`.
/// @param claimTimeout How long a provider may hold a job that it has not claimed, or not started.
/// @param pendingTimeout How long a job stays PENDING before a provider may take it by itself.
/// @param pendingExpiry How long a job stays PENDING before anyone may cancel it.
/// @param responseTimeout How long a provider may leave a challenge unanswered before it gets no new jobs.
/// @param responseBlocks How many blocks must pass as well.
/// @param lostTimeout How long a provider may leave a challenge unanswered before its runs are lost.
/// @param reportGrace How long after its allotment a run may stay unreported.
/// @param topUpNotice The last seconds of a running allotment, in which it can't be moved.
/// @param collectInterval Least time between two interim payments of a run.
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
