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

/// @title Jobs, their status machine and their escrow
/// @notice Amounts are in credit-wei, times in seconds, memory in MB.
///
/// Batches: every per-item condition skips its item with `TransitionSkipped`; only a missing role reverts at
/// once. A call in which nothing could be applied, an empty one included, reverts with the first item's reason,
/// so that a call of one item is strict. Errors that can be such a reason are marked "per item" below and
/// take the job id first.
///
/// Customers may also call through the trusted forwarder (ERC-2771): "the caller" of `submitJobs`,
/// `submitJobsWithPermit`, `cancel`, `topUp`, `topUpWithPermit` and `withdraw` is then the signer of the
/// forwarded request. Every other function takes the plain sender.
///
/// Warning: fee-on-transfer and rebasing tokens are unsupported; wrap them.
interface IMetaScheduler {
    // ------------------------------------------------------------------ events

    /// @notice A customer submitted a job and paid `terms.amount` into escrow.
    event JobSubmitted(
        uint256 indexed jobId, address indexed customer, bytes32 indexed definition, JobTerms terms
    );
    /// @notice The one event of every status change, birth (from NONE) included.
    /// @dev `provider` is zero while none is assigned; on a way back to PENDING it is the provider that had it.
    event JobTransition(
        uint256 indexed jobId,
        address indexed customer,
        address indexed provider,
        JobStatus from,
        JobStatus to
    );
    /// @notice Rate (credit-wei a second) and fee of a job were fixed at its assignment.
    event JobPriced(uint256 indexed jobId, address indexed provider, uint256 rate, uint256 feeBps);
    /// @notice Somebody raised a job's escrow; both values are the new ones.
    event JobToppedUp(
        uint256 indexed jobId,
        address indexed payer,
        uint256 amount,
        uint256 escrow,
        uint256 timeLimit
    );
    /// @notice A final job's escrow was divided: `paid` to the provider, `fee` to the treasury, `refunded` back.
    event JobSettled(
        uint256 indexed jobId,
        address indexed provider,
        address indexed customer,
        uint256 billedSeconds,
        uint256 paid,
        uint256 fee,
        uint256 refunded
    );
    /// @notice A run was billed while it goes on: `paid` to the provider, `fee` to the treasury. Escrow and
    /// time limit are what is left.
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
    /// @notice A job that its provider lost or gave up is continued by a successor that carries the escrow;
    /// neither payment nor refund.
    event JobRetried(uint256 indexed jobId, uint256 indexed successor, uint256 escrow);
    /// @notice What a provider says of a job's end; `reason` is UTF-8 padded with zeros.
    event JobResult(uint256 indexed jobId, int32 exitCode, bytes32 result, bytes32 reason);
    /// @notice A job went back to PENDING; `reason` is empty from anyone but its provider or customer.
    event JobRequeued(uint256 indexed jobId, address indexed by, string reason);
    /// @notice A job was given up; `reason` is empty from anyone but its provider or customer.
    event JobPanicked(uint256 indexed jobId, address indexed by, string reason);
    /// @notice An item of a batch was left out; `reason` is the selector of the error that a call of its own
    /// would have met.
    event TransitionSkipped(uint256 indexed jobId, JobStatus status, bytes4 reason);
    /// @notice The clock of a provider was started.
    event ProviderChallenged(
        uint256 indexed jobId, address indexed provider, address indexed by, uint256 answerBy
    );
    /// @notice A challenge was answered: by `answer`, or by the provider's moving one of its jobs.
    event ProviderAnswered(address indexed provider);
    /// @notice A recipient could not be paid; the amount waits for its `withdraw`.
    event PaymentParked(address indexed recipient, uint256 amount);
    /// @notice Parked credits were taken out.
    event PaymentWithdrawn(address indexed recipient, address indexed to, uint256 amount);
    /// @notice The fee for jobs assigned from now on changed.
    event FeeChanged(uint256 feeBps);
    /// @notice New submissions were opened or closed.
    event SubmissionsChanged(bool open);

    // ------------------------------------------------------------------ errors

    /// @notice Per item: the table has no such arrow.
    error InvalidTransition(uint256 jobId, JobStatus from, JobStatus to);
    /// @notice Per item: the caller is not the job's customer.
    error NotCustomer(uint256 jobId);
    /// @notice Per item: the caller is not the job's assigned provider.
    error NotAssignedProvider(uint256 jobId);
    /// @notice Per item: the caller may do this only after a timeout.
    error TooEarly(uint256 jobId);
    /// @notice Per item: the run is not lost, so only its provider may give it up.
    error NotLost(uint256 jobId);
    /// @notice Per item: the customer forbids providers to assign the job to themselves.
    error SelfSchedulingForbidden(uint256 jobId);
    /// @notice Per item: the provider asks more than the prices that the assignment names.
    error PriceRaised(uint256 jobId);
    /// @notice Per item: the customer did not allow interim payments.
    error InterimPaymentsForbidden(uint256 jobId);
    /// @notice Per item: the allotment of the run is used up; `finish` it.
    error AllotmentUsedUp(uint256 jobId);
    /// @notice Per item: the run is lost, so nothing is collected from it.
    error RunLost(uint256 jobId);
    /// @notice Per item: the provider is not ACTIVE, or its approval has run out.
    error ProviderNotActive(uint256 jobId);
    /// @notice Per item: the provider has not answered a challenge.
    error ProviderSilent(uint256 jobId);
    /// @notice Per item: the provider lost this job before, or it went back from its hands to PENDING.
    error ProviderExcluded(uint256 jobId);
    /// @notice Per item: the job does not fit the provider's hardware, or its offer less its load.
    error DoesNotFit(uint256 jobId);
    /// @notice Per item: the provider's prices make a rate of zero, or of more than 72 bits.
    error RateOutOfRange(uint256 jobId);
    /// @notice Per item: the escrow can't buy the time limit at the provider's prices.
    error OverBudget(uint256 jobId);
    /// @notice Per item: a reason of more than 256 bytes.
    error ReasonTooLong(uint256 jobId);

    /// @notice A batch without items.
    error EmptyBatch();
    /// @notice The scheduler takes no new jobs; live ones go on.
    error SubmissionsClosed();
    /// @notice Terms out of their bounds; `field` names the first one.
    error InvalidTerms(bytes32 field);
    /// @notice The job is not in a status that allows this.
    error WrongStatus(uint256 jobId, JobStatus status);
    /// @notice A top-up of less than a minute of the job's rate, or of nothing.
    error TopUpTooSmall(uint256 jobId, uint256 amount, uint256 min);
    /// @notice A top-up beyond what a record can hold.
    error TopUpTooLarge(uint256 jobId);
    /// @notice The last seconds of the allotment have begun; its end can't move any more.
    error TopUpTooLate(uint256 jobId, uint256 end);
    /// @notice The provider's clock runs already, or it answered a moment ago.
    error ChallengeRefused(uint256 jobId);
    /// @notice No challenge awaits an answer of the caller.
    error NothingToAnswer();
    /// @notice Nothing is parked for the caller.
    error NothingParked();
    /// @notice A constructor argument or parameter out of bounds.
    error OutOfBounds(bytes32 parameter, uint256 value, uint256 min, uint256 max);
    /// @notice A constructor argument is no usable address.
    error InvalidAddress(bytes32 parameter);

    // --------------------------------------------------------------- customers

    /// @notice Submits one PENDING job for each definition and takes their escrow from the caller.
    /// @dev Requirements: submissions open; at least one definition; terms within their bounds (`InvalidTerms`);
    /// an allowance for, and a balance of, the whole amount.
    /// @return firstJobId Id of the first job; the others follow densely in the order given.
    function submitJobs(JobRequest[] calldata requests) external returns (uint256 firstJobId);

    /// @notice The same with an EIP-2612 permit, in one transaction.
    /// @dev A failing permit is ignored: it may have been used by someone else first. The allowance decides.
    function submitJobsWithPermit(JobRequest[] calldata requests, Permit calldata permit)
        external
        returns (uint256 firstJobId);

    /// @notice Ends jobs of the caller, and jobs of anyone that were PENDING for `pendingExpiry`. Before RUNNING,
    /// or when the job is lost, the customer gets the whole escrow back; while RUNNING the time used so far is
    /// paid.
    function cancel(uint256[] calldata jobIds) external;

    /// @notice Raises the escrow of a live job and, if its customer pays and it is assigned and has a limit, its
    /// limit.
    /// @dev Anyone may pay; a stranger's gift does not lengthen a limit. Requirements: live; `customer` is the job's; at least a minute of its rate; not in
    /// the last `topUpNotice` seconds of a running allotment.
    function topUp(uint256 jobId, address customer, uint96 amount) external;

    /// @notice The same with an EIP-2612 permit, which is ignored if it fails.
    function topUpWithPermit(uint256 jobId, address customer, uint96 amount, Permit calldata permit)
        external;

    /// @notice Takes out what could not be paid to the caller.
    /// @param to Who gets it.
    function withdraw(address to) external returns (uint256 amount);

    // --------------------------------------------------------------- scheduler

    /// @notice Assigns PENDING jobs to eligible providers; fixes rate and fee.
    /// @dev Requirements: METASCHEDULER_ROLE. Per item: PENDING and eligible, at prices no higher than named.
    function metaSchedule(Assignment[] calldata assignments) external;

    // --------------------------------------------------------------- providers

    /// @notice Takes jobs that were PENDING for `pendingTimeout`, for the caller itself.
    /// @dev Per item: eligible, not forbidden by the customer, and never requeued from the caller's hands.
    function selfSchedule(uint256[] calldata jobIds) external;

    /// @notice META_SCHEDULED to SCHEDULED, by the assigned provider.
    function claim(uint256[] calldata jobIds) external;

    /// @notice SCHEDULED to RUNNING, by the assigned provider; the meter starts at the block's time.
    function start(uint256[] calldata jobIds) external;

    /// @notice `claim` and `start` in one transaction, for executors without a queue of their own:
    /// META_SCHEDULED to SCHEDULED to RUNNING, with both events.
    function claimAndStart(uint256[] calldata jobIds) external;

    /// @notice Bills RUNNING jobs up to now without ending them; cost leaves the escrow and the billed seconds
    /// leave the time limit, so that the end of the allotment stays where it is. The limit of a job that runs
    /// until its credits are spent shrinks in proportion to its escrow instead.
    /// @dev By the assigned provider. Per item: allowed by the customer, `collectInterval` after the start or
    /// the last interim payment, allotment not used up, not lost.
    function collect(uint256[] calldata jobIds) external;

    /// @notice Ends RUNNING jobs and settles them. Billed are min(reported, elapsed, allotment) seconds; they
    /// decide between OUT_OF_CREDITS (the whole allotment) and, by exit code, FINISHED and FAILED.
    function finish(Report[] calldata reports) external;

    /// @notice Stops the caller's challenge clock. Moving one of its jobs does so as well.
    function answer() external;

    // ----------------------------------------------------- parties and anyone

    /// @notice META_SCHEDULED or SCHEDULED back to PENDING.
    /// @dev The provider may at any time. META_SCHEDULED: anyone after `claimTimeout`. SCHEDULED: customer and
    /// scheduler after `claimTimeout`; anyone once the provider is silent or BANNED. The provider that had the
    /// job can't take it by `selfSchedule` again.
    /// @param reason At most 256 bytes; dropped unless from the provider or customer.
    function requeue(uint256[] calldata jobIds, string calldata reason) external;

    /// @notice Gives jobs up: by the provider from any assigned status, by anyone once a RUNNING job is lost.
    /// Refunds everything, or opens a successor for a job with retries left.
    /// @param reason At most 256 bytes; dropped unless from the provider or customer.
    function panic(uint256[] calldata jobIds, string calldata reason) external;

    /// @notice Starts the challenge clock of the provider of an assigned job.
    /// @dev Requirements: no clock runs; the last answer is not younger than `responseTimeout`.
    function challenge(uint256 jobId) external;

    // ------------------------------------------------------------------- admin

    /// @notice Sets the fee for jobs assigned from now on, in basis points; at most 2,000.
    function setFee(uint16 feeBps) external;

    /// @notice Opens or closes new submissions; live jobs go on in either case.
    function setSubmissionsOpen(bool open) external;

    // ------------------------------------------------------------------- views

    /// @notice One record; all zero (status NONE) for an unknown id.
    function getJob(uint256 jobId) external view returns (Job memory);

    /// @notice Several records.
    function getJobs(uint256[] calldata jobIds) external view returns (Job[] memory);

    /// @notice Number of jobs ever; ids run from one to this.
    function jobCount() external view returns (uint256);

    /// @notice Seconds that a job may run from its start; zero until it is assigned.
    function allotment(uint256 jobId) external view returns (uint256);

    /// @notice Time at which a RUNNING job has used its allotment; zero in every other status.
    function deadline(uint256 jobId) external view returns (uint256);

    /// @notice Whether a RUNNING job's provider left a challenge unanswered for `lostTimeout`, or the job is
    /// overdue.
    function isLost(uint256 jobId) external view returns (bool);

    /// @notice Whether a PENDING job could be assigned to a provider now, and if not, the error's selector.
    function isEligible(uint256 jobId, uint16 providerId)
        external
        view
        returns (bool eligible, bytes4 reason);

    /// @notice Whether a provider left a challenge unanswered for too long.
    function isSilent(uint16 providerId) external view returns (bool);

    /// @notice A provider's challenge clock.
    function clockOf(uint16 providerId) external view returns (ProviderClock memory);

    /// @notice What a provider's live assigned jobs occupy.
    function loadOf(uint16 providerId) external view returns (ProviderLoad memory);

    /// @notice Whether a job was requeued from a provider, which therefore can't take it by itself.
    function isBarred(uint256 jobId, uint16 providerId) external view returns (bool);

    /// @notice The one transition table, birth included.
    function canTransition(JobStatus from, JobStatus to) external pure returns (bool);

    /// @notice Credits that wait for `withdraw` of a recipient.
    function parkedOf(address recipient) external view returns (uint256);

    /// @notice All times that rule a job's life.
    function timeouts() external view returns (Timeouts memory);

    /// @notice Fee for jobs assigned from now on, in basis points.
    function feeBps() external view returns (uint16);

    /// @notice Whether new jobs are taken.
    function submissionsOpen() external view returns (bool);

    /// @notice The token of the escrow.
    function credit() external view returns (IERC20);

    /// @notice The registry that is asked about providers.
    function registry() external view returns (IProviderRegistry);

    /// @notice Who gets the fees.
    function treasury() external view returns (address);
}
