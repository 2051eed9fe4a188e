// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {
    Assignment,
    Job,
    JobRequest,
    JobStatus,
    JobTerms,
    Permit,
    ProviderClock,
    ProviderLoad,
    Report,
    Timeouts
} from "../types/JobTypes.sol";
import {IProviderRegistry} from "./IProviderRegistry.sol";

/// @title Jobs, their state machine and their escrow
/// @notice Amounts are in credit-wei, times in seconds, memory in MB.
///
/// Batches: an item that fails a per-item condition is skipped with `TransitionSkipped`; only a missing role
/// reverts at once. If no item can be applied, the call reverts with the first item's reason, so that a call
/// with one item is strict. An empty batch reverts too. Errors that can be such a reason are marked "per item"
/// below, and their first argument is the job id.
///
/// Customers may also call through the trusted forwarder (ERC-2771): "the caller" of `submitJobs`,
/// `submitJobsWithPermit`, `cancel`, `topUp`, `topUpWithPermit` and `withdraw` is then the signer of the
/// forwarded request. For every other function it is the sender.
///
/// Warning: fee-on-transfer and rebasing tokens are unsupported; wrap them.
interface IMetaScheduler {
    // ------------------------------------------------------------------ events

    /// @notice A customer submitted a job and paid `terms.amount` into escrow.
    event JobSubmitted(
        uint256 indexed jobId, address indexed customer, bytes32 indexed definition, JobTerms terms
    );
    /// @notice A job changed its status. This is the only event of status changes, from NONE at the creation on.
    /// @dev `provider` is zero while none is assigned; in a return to PENDING it is the former provider.
    event JobTransition(
        uint256 indexed jobId,
        address indexed customer,
        address indexed provider,
        JobStatus from,
        JobStatus to
    );
    /// @notice Rate (credit-wei per second) and fee of a job were fixed at its assignment.
    event JobPriced(uint256 indexed jobId, address indexed provider, uint256 rate, uint256 feeBps);
    /// @notice An account increased a job's escrow; escrow and time limit are the new values.
    event JobToppedUp(
        uint256 indexed jobId,
        address indexed payer,
        uint256 amount,
        uint256 escrow,
        uint256 timeLimit
    );
    /// @notice A final job was settled: `paid` to the provider, `fee` to the treasury, `refunded` to the customer.
    event JobSettled(
        uint256 indexed jobId,
        address indexed provider,
        address indexed customer,
        uint256 billedSeconds,
        uint256 paid,
        uint256 fee,
        uint256 refunded
    );
    /// @notice Interim payment of a running job: `paid` to the provider, `fee` to the treasury. Escrow and time
    /// limit are the remaining ones.
    event JobCollected(
        uint256 indexed jobId,
        address indexed provider,
        address indexed customer,
        uint256 billedSeconds,
        uint256 paid,
        uint256 fee,
        uint256 escrow,
        uint256 timeLimit
    );
    /// @notice A job that its provider lost or gave up is continued by a successor, which takes over the escrow.
    /// Nothing is paid or refunded.
    event JobRetried(uint256 indexed jobId, uint256 indexed successor, uint256 escrow);
    /// @notice A provider's report of a job's end; `reason` is UTF-8 padded with zeros.
    event JobResult(uint256 indexed jobId, int32 exitCode, bytes32 result, bytes32 reason);
    /// @notice A job returned to PENDING; `reason` is empty unless `by` is its provider or customer.
    event JobRequeued(uint256 indexed jobId, address indexed by, string reason);
    /// @notice A job was given up; `reason` is empty unless `by` is its provider or customer.
    event JobPanicked(uint256 indexed jobId, address indexed by, string reason);
    /// @notice An item of a batch was skipped; `reason` is the selector of the error with which a call for this
    /// item alone would have reverted.
    event TransitionSkipped(uint256 indexed jobId, JobStatus status, bytes4 reason);
    /// @notice A provider was challenged, and must answer by the given time.
    event ProviderChallenged(
        uint256 indexed jobId, address indexed provider, address indexed by, uint256 answerBy
    );
    /// @notice A challenge was answered: by `answer`, or because the provider changed the status of one of its jobs.
    event ProviderAnswered(address indexed provider);
    /// @notice A payment to a recipient failed; the recipient can `withdraw` the amount.
    event PaymentParked(address indexed recipient, uint256 amount);
    /// @notice Parked credits were withdrawn.
    event PaymentWithdrawn(address indexed recipient, address indexed to, uint256 amount);
    /// @notice The fee of later assignments changed.
    event FeeChanged(uint256 feeBps);
    /// @notice New submissions were opened or closed.
    event SubmissionsChanged(bool open);

    // ------------------------------------------------------------------ errors

    /// @notice Per item: the life cycle does not allow this transition.
    error InvalidTransition(uint256 jobId, JobStatus from, JobStatus to);
    /// @notice Per item: the caller is not the job's customer.
    error NotCustomer(uint256 jobId);
    /// @notice Per item: the caller is not the job's assigned provider.
    error NotAssignedProvider(uint256 jobId);
    /// @notice Per item: the caller may do this only after a timeout.
    error TooEarly(uint256 jobId);
    /// @notice Per item: the run is not lost, so only its provider may give it up.
    error NotLost(uint256 jobId);
    /// @notice Per item: the customer does not allow self-scheduling.
    error SelfSchedulingForbidden(uint256 jobId);
    /// @notice Per item: a price of the provider is now higher than in the assignment.
    error PriceRaised(uint256 jobId);
    /// @notice Per item: the customer did not allow interim payments.
    error InterimPaymentsForbidden(uint256 jobId);
    /// @notice Per item: the allotment of the run is used up, so that it can only be finished.
    error AllotmentUsedUp(uint256 jobId);
    /// @notice Per item: the run is lost, so nothing is collected from it.
    error RunLost(uint256 jobId);
    /// @notice Per item: the provider is not ACTIVE, or its approval has expired.
    error ProviderNotActive(uint256 jobId);
    /// @notice Per item: the provider has not answered a challenge.
    error ProviderSilent(uint256 jobId);
    /// @notice Per item: the provider lost this job before, or the job was requeued from it.
    error ProviderExcluded(uint256 jobId);
    /// @notice Per item: the job does not fit the provider's hardware, or its offer minus its load.
    error DoesNotFit(uint256 jobId);
    /// @notice Per item: the rate at the provider's prices is zero, or exceeds 72 bits.
    error RateOutOfRange(uint256 jobId);
    /// @notice Per item: the escrow does not cover the time limit at the provider's prices.
    error OverBudget(uint256 jobId);
    /// @notice Per item: the reason is longer than 256 bytes.
    error ReasonTooLong(uint256 jobId);

    /// @notice The batch has no items.
    error EmptyBatch();
    /// @notice New submissions are closed; live jobs continue.
    error SubmissionsClosed();
    /// @notice A term is out of bounds; `field` names the first one.
    error InvalidTerms(bytes32 field);
    /// @notice The job is not in a status that allows this.
    error WrongStatus(uint256 jobId, JobStatus status);
    /// @notice The top-up is zero, or buys less than a minute at the job's rate.
    error TopUpTooSmall(uint256 jobId, uint256 amount, uint256 min);
    /// @notice The new escrow would exceed the record's field.
    error TopUpTooLarge(uint256 jobId);
    /// @notice The last `topUpNotice` seconds of the allotment have begun, so that its end is fixed.
    error TopUpTooLate(uint256 jobId, uint256 end);
    /// @notice The provider already has an open challenge, or answered one less than `responseTimeout` ago.
    error ChallengeRefused(uint256 jobId);
    /// @notice The caller has no open challenge.
    error NothingToAnswer();
    /// @notice The caller has no parked credits.
    error NothingParked();
    /// @notice A constructor argument or parameter is out of bounds.
    error OutOfBounds(bytes32 parameter, uint256 value, uint256 min, uint256 max);
    /// @notice A constructor argument is not a usable address.
    error InvalidAddress(bytes32 parameter);

    // --------------------------------------------------------------- customers

    /// @notice Submits one PENDING job for each definition and takes their escrow from the caller.
    /// @dev Requirements: submissions open; at least one definition; terms within their bounds (`InvalidTerms`);
    /// an allowance and a balance of the whole amount.
    /// @return firstJobId Id of the first job; the others have the following ids, in the given order.
    function submitJobs(JobRequest[] calldata requests) external returns (uint256 firstJobId);

    /// @notice Like `submitJobs`, with an EIP-2612 permit in the same transaction.
    /// @dev A failing permit is ignored: someone else may have used it first. The allowance decides.
    function submitJobsWithPermit(JobRequest[] calldata requests, Permit calldata permit)
        external
        returns (uint256 firstJobId);

    /// @notice Cancels jobs of the caller, and jobs of anyone that were PENDING for `pendingExpiry`. Before RUNNING,
    /// or if the job is lost, the whole escrow is refunded; while RUNNING, the time used so far is paid.
    function cancel(uint256[] calldata jobIds) external;

    /// @notice Increases the escrow of a live job. Its time limit increases too if its customer pays, it is
    /// assigned, and it does not run until its credits are spent.
    /// @dev Anyone may pay, but credits of others do not extend the limit. Requirements: live; `customer` is the
    /// job's; at least a minute at its rate; not in the last `topUpNotice` seconds of a running allotment.
    function topUp(uint256 jobId, address customer, uint96 amount) external;

    /// @notice Like `topUp`, with an EIP-2612 permit, which is ignored if it fails.
    function topUpWithPermit(uint256 jobId, address customer, uint96 amount, Permit calldata permit)
        external;

    /// @notice Withdraws the caller's parked credits.
    /// @param to The recipient.
    function withdraw(address to) external returns (uint256 amount);

    // --------------------------------------------------------------- scheduler

    /// @notice Assigns PENDING jobs to eligible providers; fixes rate and fee.
    /// @dev Requirements: METASCHEDULER_ROLE. Per item: PENDING and eligible, at prices not higher than given.
    function metaSchedule(Assignment[] calldata assignments) external;

    // --------------------------------------------------------------- providers

    /// @notice Assigns jobs that were PENDING for `pendingTimeout` to the caller.
    /// @dev Per item: eligible, not forbidden by the customer, and never requeued from the caller.
    function selfSchedule(uint256[] calldata jobIds) external;

    /// @notice META_SCHEDULED to SCHEDULED, by the assigned provider.
    function claim(uint256[] calldata jobIds) external;

    /// @notice SCHEDULED to RUNNING, by the assigned provider; the billed time starts at the block's time.
    function start(uint256[] calldata jobIds) external;

    /// @notice `claim` and `start` in one transaction, for executors without a queue:
    /// META_SCHEDULED to SCHEDULED to RUNNING, with both events.
    function claimAndStart(uint256[] calldata jobIds) external;

    /// @notice Bills RUNNING jobs up to now without ending them. The cost is subtracted from the escrow and the
    /// billed seconds from the time limit, so that the end of the allotment does not change. The limit of a job
    /// that runs until its credits are spent shrinks in proportion to its escrow instead.
    /// @dev By the assigned provider. Per item: allowed by the customer, `collectInterval` after the start or
    /// the last interim payment, allotment not used up, not lost.
    function collect(uint256[] calldata jobIds) external;

    /// @notice Ends RUNNING jobs and settles them. min(reported, elapsed, allotment) seconds are billed. If they
    /// equal the allotment, the status is OUT_OF_CREDITS; otherwise FINISHED or FAILED, by the exit code.
    function finish(Report[] calldata reports) external;

    /// @notice Answers the caller's open challenge. A status change of one of its jobs does so as well.
    function answer() external;

    // ----------------------------------------------------- parties and anyone

    /// @notice META_SCHEDULED or SCHEDULED back to PENDING.
    /// @dev The provider may call it at any time. META_SCHEDULED: anyone after `claimTimeout`. SCHEDULED: customer
    /// and scheduler after `claimTimeout`; anyone once the provider is silent or BANNED. The former provider
    /// can't take the job by `selfSchedule` again.
    /// @param reason At most 256 bytes; dropped unless it comes from the provider or the customer.
    function requeue(uint256[] calldata jobIds, string calldata reason) external;

    /// @notice Gives jobs up: the provider in any assigned status, anyone if a RUNNING job is lost. Refunds the
    /// whole escrow, or creates a successor if the job has retries left.
    /// @param reason At most 256 bytes; dropped unless it comes from the provider or the customer.
    function panic(uint256[] calldata jobIds, string calldata reason) external;

    /// @notice Challenges the provider of an assigned job to answer.
    /// @dev Requirements: no open challenge; the last answer is at least `responseTimeout` old.
    function challenge(uint256 jobId) external;

    // ------------------------------------------------------------------- admin

    /// @notice Sets the fee of later assignments, in basis points; at most 2,000.
    function setFee(uint16 feeBps) external;

    /// @notice Opens or closes new submissions; live jobs continue in either case.
    function setSubmissionsOpen(bool open) external;

    // ------------------------------------------------------------------- views

    /// @notice The record of a job; all zero (status NONE) for an unknown id.
    function getJob(uint256 jobId) external view returns (Job memory);

    /// @notice The records of several jobs.
    function getJobs(uint256[] calldata jobIds) external view returns (Job[] memory);

    /// @notice Number of jobs ever submitted or created as successors; ids run from one to this number.
    function jobCount() external view returns (uint256);

    /// @notice Maximum duration of a run in seconds, after its start or last interim payment; zero until assigned.
    function allotment(uint256 jobId) external view returns (uint256);

    /// @notice Time at which a RUNNING job will have used its allotment; zero in every other status.
    function deadline(uint256 jobId) external view returns (uint256);

    /// @notice Whether a RUNNING job's provider left a challenge unanswered for `lostTimeout`, or the job is
    /// overdue.
    function isLost(uint256 jobId) external view returns (bool);

    /// @notice Whether a PENDING job could be assigned to a provider now; otherwise the selector of the error.
    function isEligible(uint256 jobId, uint16 providerId)
        external
        view
        returns (bool eligible, bytes4 reason);

    /// @notice Whether a provider left a challenge unanswered for `responseTimeout` and `responseBlocks`.
    function isSilent(uint16 providerId) external view returns (bool);

    /// @notice The challenge state of a provider.
    function clockOf(uint16 providerId) external view returns (ProviderClock memory);

    /// @notice Resources that a provider's live assigned jobs use.
    function loadOf(uint16 providerId) external view returns (ProviderLoad memory);

    /// @notice Whether a job was requeued from a provider, which therefore can't take it by `selfSchedule`.
    function isBarred(uint256 jobId, uint16 providerId) external view returns (bool);

    /// @notice Whether the life cycle allows a transition, including NONE to PENDING.
    function canTransition(JobStatus from, JobStatus to) external pure returns (bool);

    /// @notice Parked credits that a recipient can withdraw, in credit-wei.
    function parkedOf(address recipient) external view returns (uint256);

    /// @notice All timeouts of the life cycle.
    function timeouts() external view returns (Timeouts memory);

    /// @notice Fee of later assignments, in basis points.
    function feeBps() external view returns (uint16);

    /// @notice Whether new submissions are open.
    function submissionsOpen() external view returns (bool);

    /// @notice The token of the escrow.
    function credit() external view returns (IERC20);

    /// @notice The registry of providers.
    function registry() external view returns (IProviderRegistry);

    /// @notice Recipient of the fees.
    function treasury() external view returns (address);
}
