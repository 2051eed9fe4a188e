// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {
    AccessControlDefaultAdminRules
} from "@openzeppelin/contracts/access/extensions/AccessControlDefaultAdminRules.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Metadata} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Metadata.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";

import {IMetaScheduler} from "./interfaces/IMetaScheduler.sol";
import {IProviderRegistry} from "./interfaces/IProviderRegistry.sol";
import {Billing} from "./libraries/Billing.sol";
import {Capacity, Tariff} from "./libraries/Capacity.sol";
import {JobLifecycle} from "./libraries/JobLifecycle.sol";
import {JobRecord, Money, Moves} from "./libraries/JobRecord.sol";
import {
    Assignment,
    Job,
    JobRequest,
    JobStatus,
    JobTerms,
    Permit,
    ProviderClock,
    Report,
    Timeouts
} from "./types/JobTypes.sol";
import {ProviderStatus} from "./types/ProviderTypes.sol";

/// @title Meta-scheduler: jobs, status machine and escrow in one place
/// @notice See `IMetaScheduler`.
contract MetaScheduler is IMetaScheduler, AccessControlDefaultAdminRules, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    // --------------------------------------------------------------- constants

    /// @notice May assign jobs, and requeue what was not started in time.
    bytes32 public constant METASCHEDULER_ROLE = keccak256("METASCHEDULER_ROLE");

    /// @notice Highest fee, in basis points.
    uint256 public constant MAX_FEE_BPS = 2000;
    /// @notice Most successors of one submitted job.
    uint256 public constant MAX_RETRIES = 5;
    /// @notice Longest name, in bytes.
    uint256 public constant MAX_NAME_LENGTH = 64;
    /// @notice Longest affinities, in bytes.
    uint256 public constant MAX_USES_LENGTH = 512;
    /// @notice Longest reason, in bytes.
    uint256 public constant MAX_REASON_LENGTH = 256;
    /// @notice Least top-up of an assigned job, in seconds of its rate.
    uint256 public constant MIN_TOP_UP_SECONDS = 60;
    /// @notice Bounds of claim, pending and response timeouts, in seconds.
    uint256 public constant MIN_TIMEOUT = 5;
    /// @notice Bounds of claim, pending and response timeouts, in seconds.
    uint256 public constant MAX_TIMEOUT = 30 days;
    /// @notice Most blocks that a challenge may demand.
    uint256 public constant MAX_RESPONSE_BLOCKS = 100_000;
    /// @notice Least time to report an ended run, in seconds.
    uint256 public constant MIN_REPORT_GRACE = 1 hours;
    /// @notice Bounds of the top-up notice, in seconds.
    uint256 public constant MIN_TOP_UP_NOTICE = 10;
    /// @notice Bounds of the top-up notice, in seconds.
    uint256 public constant MAX_TOP_UP_NOTICE = 1 hours;

    // -------------------------------------------------------------- immutables

    /// @inheritdoc IMetaScheduler
    IERC20 public immutable credit;
    /// @inheritdoc IMetaScheduler
    IProviderRegistry public immutable registry;
    /// @inheritdoc IMetaScheduler
    address public immutable treasury;
    uint256 private immutable _claimTimeout;
    uint256 private immutable _pendingTimeout;
    uint256 private immutable _responseTimeout;
    uint256 private immutable _responseBlocks;
    uint256 private immutable _reportGrace;
    uint256 private immutable _topUpNotice;

    // ----------------------------------------------------------------- storage

    struct Record {
        Moves moves;
        Money money;
        bytes32 definition;
    }

    // One slot: read by a submission for the id, by an assignment for the fee.
    uint64 private _jobCount;
    /// @inheritdoc IMetaScheduler
    uint16 public feeBps;
    /// @inheritdoc IMetaScheduler
    bool public submissionsOpen;

    mapping(uint256 jobId => Record) private _records;
    mapping(uint16 providerId => ProviderClock) private _clocks;
    mapping(uint256 jobId => uint256) private _retryOf;
    /// @inheritdoc IMetaScheduler
    mapping(uint256 jobId => mapping(uint16 providerId => bool)) public isBarred;
    /// @inheritdoc IMetaScheduler
    mapping(address recipient => uint256) public parkedOf;

    // ------------------------------------------------------------------ memory

    /// @dev How many items of a batch were refused, and why the first one was.
    struct Batch {
        uint256 refused;
        bytes4 reason;
        uint256 jobId;
        JobStatus from;
        JobStatus to;
    }

    /// @dev What a batch owes: one sum to the caller, one to the treasury, and one to each other recipient.
    struct Payments {
        uint256 caller;
        uint256 treasury;
        uint256 count;
        address[] others;
        uint256[] amounts;
    }

    /// @dev A provider as the assignments of one call see it.
    struct Candidate {
        uint16 id;
        address account;
        bytes4 refusal;
        Capacity capacity;
        Tariff tariff;
    }

    // ------------------------------------------------------------- constructor

    /// @param admin First administrator; handed over in two steps.
    /// @param adminDelay Seconds that a hand-over waits.
    /// @param credit_ Token of the escrow; must have 18 decimals.
    /// @param registry_ Registry of providers.
    /// @param treasury_ Who gets the fees.
    /// @param feeBps_ First fee, in basis points.
    /// @param timeouts_ Times that rule a job's life, fixed for ever.
    constructor(
        address admin,
        uint48 adminDelay,
        IERC20 credit_,
        IProviderRegistry registry_,
        address treasury_,
        uint16 feeBps_,
        Timeouts memory timeouts_
    ) AccessControlDefaultAdminRules(adminDelay, admin) {
        if (address(credit_).code.length == 0 || IERC20Metadata(address(credit_)).decimals() != 18)
        {
            revert InvalidAddress("credit");
        }
        if (address(registry_).code.length == 0) revert InvalidAddress("registry");
        if (treasury_ == address(0) || treasury_ == address(this)) {
            revert InvalidAddress("treasury");
        }
        _bounded("claimTimeout", timeouts_.claimTimeout, MIN_TIMEOUT, MAX_TIMEOUT);
        _bounded("pendingTimeout", timeouts_.pendingTimeout, MIN_TIMEOUT, MAX_TIMEOUT);
        _bounded("responseTimeout", timeouts_.responseTimeout, MIN_TIMEOUT, MAX_TIMEOUT);
        _bounded("responseBlocks", timeouts_.responseBlocks, 1, MAX_RESPONSE_BLOCKS);
        _bounded("reportGrace", timeouts_.reportGrace, MIN_REPORT_GRACE, MAX_TIMEOUT);
        _bounded("topUpNotice", timeouts_.topUpNotice, MIN_TOP_UP_NOTICE, MAX_TOP_UP_NOTICE);
        credit = credit_;
        registry = registry_;
        treasury = treasury_;
        _claimTimeout = timeouts_.claimTimeout;
        _pendingTimeout = timeouts_.pendingTimeout;
        _responseTimeout = timeouts_.responseTimeout;
        _responseBlocks = timeouts_.responseBlocks;
        _reportGrace = timeouts_.reportGrace;
        _topUpNotice = timeouts_.topUpNotice;
        _setFee(feeBps_);
        submissionsOpen = true;
        emit SubmissionsChanged(true);
    }

    // Counters, sums and the notes of a batch begin at zero, which is what an unwritten local is.
    // slither-disable-start uninitialized-local

    // --------------------------------------------------------------- customers

    /// @inheritdoc IMetaScheduler
    function submitJobs(JobRequest[] calldata requests)
        external
        nonReentrant
        returns (uint256 firstJobId)
    {
        return _submit(requests);
    }

    /// @inheritdoc IMetaScheduler
    function submitJobsWithPermit(JobRequest[] calldata requests, Permit calldata permit)
        external
        nonReentrant
        returns (uint256 firstJobId)
    {
        _permit(permit);
        return _submit(requests);
    }

    /// @inheritdoc IMetaScheduler
    function cancel(uint256[] calldata jobIds) external nonReentrant {
        Batch memory batch;
        Payments memory due = _newPayments(jobIds.length);
        for (uint256 i = 0; i < jobIds.length; ++i) {
            _cancel(jobIds[i], batch, due);
        }
        _requireApplied(batch, jobIds.length);
        _pay(due);
    }

    /// @inheritdoc IMetaScheduler
    function topUp(uint256 jobId, address customer, uint96 amount) external nonReentrant {
        _topUp(jobId, customer, amount);
    }

    /// @inheritdoc IMetaScheduler
    function topUpWithPermit(uint256 jobId, address customer, uint96 amount, Permit calldata permit)
        external
        nonReentrant
    {
        _permit(permit);
        _topUp(jobId, customer, amount);
    }

    /// @inheritdoc IMetaScheduler
    function withdraw(address to) external nonReentrant returns (uint256 amount) {
        amount = parkedOf[msg.sender];
        if (amount == 0) revert NothingParked();
        parkedOf[msg.sender] = 0;
        emit PaymentWithdrawn(msg.sender, to, amount);
        credit.safeTransfer(to, amount);
    }

    // --------------------------------------------------------------- scheduler

    /// @inheritdoc IMetaScheduler
    function metaSchedule(Assignment[] calldata assignments) external onlyRole(METASCHEDULER_ROLE) {
        Batch memory batch;
        uint256 fee = feeBps;
        uint256 items;
        for (uint256 i = 0; i < assignments.length; ++i) {
            Candidate memory candidate = _candidate(assignments[i].providerId);
            uint256[] calldata jobIds = assignments[i].jobIds;
            items += jobIds.length;
            for (uint256 k = 0; k < jobIds.length; ++k) {
                _assign(jobIds[k], candidate, fee, false, batch);
            }
        }
        _requireApplied(batch, items);
    }

    // --------------------------------------------------------------- providers

    /// @inheritdoc IMetaScheduler
    function selfSchedule(uint256[] calldata jobIds) external {
        Batch memory batch;
        uint256 fee = feeBps;
        Candidate memory candidate = _candidate(registry.idOf(msg.sender));
        for (uint256 i = 0; i < jobIds.length; ++i) {
            _assign(jobIds[i], candidate, fee, true, batch);
        }
        _requireApplied(batch, jobIds.length);
    }

    /// @inheritdoc IMetaScheduler
    function claim(uint256[] calldata jobIds) external {
        _advance(jobIds, JobStatus.SCHEDULED);
    }

    /// @inheritdoc IMetaScheduler
    function start(uint256[] calldata jobIds) external {
        _advance(jobIds, JobStatus.RUNNING);
    }

    /// @inheritdoc IMetaScheduler
    function finish(Report[] calldata reports) external nonReentrant {
        Batch memory batch;
        Payments memory due = _newPayments(reports.length);
        for (uint256 i = 0; i < reports.length; ++i) {
            _finish(reports[i], batch, due);
        }
        _requireApplied(batch, reports.length);
        _pay(due);
    }

    /// @inheritdoc IMetaScheduler
    function answer() external {
        ProviderClock storage clock = _clocks[registry.idOf(msg.sender)];
        if (clock.challengedAt == 0) revert NothingToAnswer();
        clock.challengedAt = 0;
        clock.challengedBlock = 0;
        clock.answeredAt = uint32(block.timestamp);
        emit ProviderAnswered(msg.sender);
    }

    // ------------------------------------------------------ parties and anyone

    /// @inheritdoc IMetaScheduler
    function requeue(uint256[] calldata jobIds, string calldata reason) external {
        Batch memory batch;
        for (uint256 i = 0; i < jobIds.length; ++i) {
            _requeue(jobIds[i], reason, batch);
        }
        _requireApplied(batch, jobIds.length);
    }

    /// @inheritdoc IMetaScheduler
    function panic(uint256[] calldata jobIds, string calldata reason) external nonReentrant {
        Batch memory batch;
        Payments memory due = _newPayments(jobIds.length);
        for (uint256 i = 0; i < jobIds.length; ++i) {
            _panic(jobIds[i], reason, batch, due);
        }
        _requireApplied(batch, jobIds.length);
        _pay(due);
    }

    /// @inheritdoc IMetaScheduler
    function challenge(uint256 jobId) external {
        Moves moves = _records[jobId].moves;
        JobStatus status = moves.status();
        if (!JobLifecycle.isLive(status) || status == JobStatus.PENDING) {
            revert WrongStatus(jobId, status);
        }
        ProviderClock storage clock = _clocks[moves.providerId()];
        if (clock.challengedAt != 0 || block.timestamp < clock.answeredAt + _responseTimeout) {
            revert ChallengeRefused(jobId);
        }
        // Block numbers stay below 2^32 for centuries at one block a second.
        clock.challengedAt = uint32(block.timestamp);
        clock.challengedBlock = uint32(block.number);
        emit ProviderChallenged(
            jobId, clock.account, msg.sender, block.timestamp + _responseTimeout
        );
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
        Moves moves = record.moves;
        Money money = record.money;
        // Narrowing below only cuts bits that the packed fields do not have.
        return Job({
            customer: moves.customer(),
            status: moves.status(),
            since: uint32(moves.since()),
            providerId: moves.providerId(),
            memPerCpu: uint24(moves.memPerCpu()),
            retriesLeft: uint8(moves.retriesLeft()),
            untilSpent: moves.untilSpent(),
            escrow: uint96(money.escrow()),
            rate: uint72(money.rate()),
            timeLimit: uint24(money.timeLimit()),
            tasks: uint16(money.tasks()),
            cpusPerTask: uint16(money.cpusPerTask()),
            gpus: uint16(money.gpus()),
            feeBps: uint16(money.feeBps()),
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
        return _allotment(record.moves, record.money);
    }

    /// @inheritdoc IMetaScheduler
    function deadline(uint256 jobId) external view returns (uint256) {
        Record storage record = _records[jobId];
        Moves moves = record.moves;
        if (moves.status() != JobStatus.RUNNING) return 0;
        return moves.since() + _allotment(moves, record.money);
    }

    /// @inheritdoc IMetaScheduler
    function isLost(uint256 jobId) external view returns (bool) {
        Record storage record = _records[jobId];
        Moves moves = record.moves;
        return moves.status() == JobStatus.RUNNING && _isLost(moves, record.money);
    }

    /// @inheritdoc IMetaScheduler
    function isEligible(uint256 jobId, uint16 providerId)
        external
        view
        returns (bool eligible, bytes4 reason)
    {
        Record storage record = _records[jobId];
        Moves moves = record.moves;
        if (moves.status() != JobStatus.PENDING) return (false, InvalidTransition.selector);
        Candidate memory candidate = _standing(providerId);
        if (candidate.refusal != 0) return (false, candidate.refusal);
        (, reason) = _offerFor(jobId, moves, record.money, candidate);
        eligible = reason == 0;
    }

    /// @inheritdoc IMetaScheduler
    function isSilent(uint16 providerId) external view returns (bool) {
        return _isSilent(_clocks[providerId]);
    }

    /// @inheritdoc IMetaScheduler
    function clockOf(uint16 providerId) external view returns (ProviderClock memory) {
        return _clocks[providerId];
    }

    /// @inheritdoc IMetaScheduler
    function canTransition(JobStatus from, JobStatus to) external pure returns (bool) {
        return JobLifecycle.canTransition(from, to);
    }

    /// @inheritdoc IMetaScheduler
    function timeouts() external view returns (Timeouts memory) {
        // The constructor took each of these from a field of the same width.
        return Timeouts({
            claimTimeout: uint32(_claimTimeout),
            pendingTimeout: uint32(_pendingTimeout),
            responseTimeout: uint32(_responseTimeout),
            responseBlocks: uint32(_responseBlocks),
            reportGrace: uint32(_reportGrace),
            topUpNotice: uint32(_topUpNotice)
        });
    }

    // ----------------------------------------------------- internal: one item

    function _submit(JobRequest[] calldata requests) private returns (uint256 firstJobId) {
        if (!submissionsOpen) revert SubmissionsClosed();
        uint256 jobId = _jobCount;
        firstJobId = jobId + 1;
        uint256 total;
        for (uint256 i = 0; i < requests.length; ++i) {
            JobTerms calldata terms = requests[i].terms;
            bytes32[] calldata definitions = requests[i].definitions;
            _checkTerms(terms);
            Moves moves = JobRecord.newMoves(msg.sender, terms);
            Money money = JobRecord.newMoney(terms);
            bytes memory data = abi.encode(terms);
            for (uint256 k = 0; k < definitions.length; ++k) {
                if (definitions[k] == 0) revert InvalidTerms("definition");
                Record storage record = _records[++jobId];
                record.moves = moves;
                record.money = money;
                record.definition = definitions[k];
                _emitSubmitted(jobId, definitions[k], data);
                _emitTransition(jobId, msg.sender, address(0), JobStatus.NONE, JobStatus.PENDING);
            }
            total += terms.amount * definitions.length;
        }
        if (jobId < firstJobId) revert EmptyBatch();
        // 2^64 jobs can't be paid for.
        _jobCount = uint64(jobId);
        credit.safeTransferFrom(msg.sender, address(this), total);
    }

    function _topUp(uint256 jobId, address customer, uint256 amount) private {
        Record storage record = _records[jobId];
        Moves moves = record.moves;
        Money money = record.money;
        if (!JobLifecycle.isLive(moves.status())) revert WrongStatus(jobId, moves.status());
        if (moves.customer() != customer) revert NotCustomer(jobId);
        uint256 rate = money.rate();
        uint256 min = rate == 0 ? 1 : rate * MIN_TOP_UP_SECONDS;
        if (amount < min) revert TopUpTooSmall(jobId, amount, min);
        if (moves.status() == JobStatus.RUNNING) {
            uint256 end = moves.since() + _allotment(moves, money);
            if (block.timestamp + _topUpNotice >= end) revert TopUpTooLate(jobId, end);
        }
        uint256 escrow = money.escrow() + amount;
        uint256 limit = money.timeLimit();
        if (rate != 0 && !moves.untilSpent()) limit += amount / rate;
        if (escrow > type(uint96).max || limit > type(uint24).max) revert TopUpTooLarge(jobId);
        record.money = money.withEscrow(escrow).withTimeLimit(limit);
        emit JobToppedUp(jobId, msg.sender, amount, escrow, limit);
        credit.safeTransferFrom(msg.sender, address(this), amount);
    }

    function _assign(
        uint256 jobId,
        Candidate memory candidate,
        uint256 fee,
        bool bySelf,
        Batch memory batch
    ) private {
        Record storage record = _records[jobId];
        Moves moves = record.moves;
        if (!_canMove(jobId, moves, JobStatus.META_SCHEDULED, batch)) return;
        Money money = record.money;
        bytes4 refusal = candidate.refusal;
        uint256 rate;
        if (refusal == 0 && bySelf) refusal = _selfRefusal(jobId, candidate.id, moves);
        if (refusal == 0) {
            (rate, refusal) = _offerFor(jobId, moves, money, candidate);
        }
        if (refusal != 0) {
            _refuse(batch, jobId, moves, JobStatus.META_SCHEDULED, refusal);
            return;
        }
        record.money = money.withPrice(rate, fee);
        _move(
            jobId,
            record,
            moves.withProvider(candidate.id),
            candidate.account,
            JobStatus.META_SCHEDULED
        );
        emit JobPriced(jobId, candidate.account, rate, fee);
    }

    /// @dev `claim` and `start`: the same but for the status they lead to.
    function _advance(uint256[] calldata jobIds, JobStatus to) private {
        Batch memory batch;
        for (uint256 i = 0; i < jobIds.length; ++i) {
            uint256 jobId = jobIds[i];
            Record storage record = _records[jobId];
            Moves moves = record.moves;
            if (!_canMove(jobId, moves, to, batch)) continue;
            if (_accountOf(moves) == msg.sender) {
                _move(jobId, record, moves, msg.sender, to);
            } else {
                _refuse(batch, jobId, moves, to, NotAssignedProvider.selector);
            }
        }
        _requireApplied(batch, jobIds.length);
    }

    function _finish(Report calldata report, Batch memory batch, Payments memory due) private {
        uint256 jobId = report.jobId;
        Record storage record = _records[jobId];
        Moves moves = record.moves;
        JobStatus to = report.exitCode == 0 ? JobStatus.FINISHED : JobStatus.FAILED;
        if (!_canMove(jobId, moves, to, batch)) return;
        if (_accountOf(moves) != msg.sender) {
            _refuse(batch, jobId, moves, to, NotAssignedProvider.selector);
            return;
        }
        (uint256 billed, bool spent) = _billed(moves, record.money, report.secondsUsed);
        if (spent) to = JobStatus.OUT_OF_CREDITS;
        _move(jobId, record, moves, msg.sender, to);
        emit JobResult(jobId, report.exitCode, report.result, report.reason);
        (uint256 paid, uint256 refund) = _settle(jobId, record, moves, msg.sender, billed, due);
        due.caller += paid;
        _owe(due, moves.customer(), refund);
    }

    function _cancel(uint256 jobId, Batch memory batch, Payments memory due) private {
        Record storage record = _records[jobId];
        Moves moves = record.moves;
        if (!_canMove(jobId, moves, JobStatus.CANCELLED, batch)) return;
        if (moves.customer() != msg.sender) {
            _refuse(batch, jobId, moves, JobStatus.CANCELLED, NotCustomer.selector);
            return;
        }
        address provider = _accountOf(moves);
        uint256 billed;
        if (moves.status() == JobStatus.RUNNING && !_isLost(moves, record.money)) {
            (billed,) = _billed(moves, record.money, type(uint256).max);
        }
        _move(jobId, record, moves, provider, JobStatus.CANCELLED);
        (uint256 paid, uint256 refund) = _settle(jobId, record, moves, provider, billed, due);
        due.caller += refund;
        _owe(due, provider, paid);
    }

    function _requeue(uint256 jobId, string calldata reason, Batch memory batch) private {
        Record storage record = _records[jobId];
        Moves moves = record.moves;
        if (moves.status() == JobStatus.NONE) {
            // The table has NONE to PENDING as well, which is birth and nobody's requeue.
            _refuse(batch, jobId, moves, JobStatus.PENDING, InvalidTransition.selector);
            return;
        }
        if (!_canMove(jobId, moves, JobStatus.PENDING, batch)) return;
        address provider = _accountOf(moves);
        bytes4 refusal;
        if (bytes(reason).length > MAX_REASON_LENGTH) {
            refusal = ReasonTooLong.selector;
        } else if (msg.sender != provider && !_mayRequeue(moves)) {
            refusal = TooEarly.selector;
        }
        if (refusal != 0) {
            _refuse(batch, jobId, moves, JobStatus.PENDING, refusal);
            return;
        }
        // Also after an own requeue: otherwise it could hold a job by taking and returning it for ever.
        isBarred[jobId][moves.providerId()] = true;
        record.money = record.money.withPrice(0, 0);
        _move(jobId, record, moves.withProvider(0), provider, JobStatus.PENDING);
        emit JobRequeued(jobId, msg.sender, _spoken(moves, provider, reason));
    }

    function _panic(uint256 jobId, string calldata reason, Batch memory batch, Payments memory due)
        private
    {
        Record storage record = _records[jobId];
        Moves moves = record.moves;
        if (!_canMove(jobId, moves, JobStatus.PANICKED, batch)) return;
        address provider = _accountOf(moves);
        bytes4 refusal = _panicRefusal(moves, record.money, provider, bytes(reason).length);
        if (refusal != 0) {
            _refuse(batch, jobId, moves, JobStatus.PANICKED, refusal);
            return;
        }
        bool carriedOn = moves.status() == JobStatus.RUNNING && moves.retriesLeft() > 0;
        _move(jobId, record, moves, provider, JobStatus.PANICKED);
        emit JobPanicked(jobId, msg.sender, _spoken(moves, provider, reason));
        if (carriedOn) {
            _succeed(jobId, record, moves);
        } else {
            (, uint256 refund) = _settle(jobId, record, moves, provider, 0, due);
            _owe(due, moves.customer(), refund);
        }
    }

    function _panicRefusal(Moves moves, Money money, address provider, uint256 reasonLength)
        private
        view
        returns (bytes4)
    {
        if (reasonLength > MAX_REASON_LENGTH) return ReasonTooLong.selector;
        if (msg.sender == provider) return 0;
        if (moves.status() != JobStatus.RUNNING) return NotAssignedProvider.selector;
        return _isLost(moves, money) ? bytes4(0) : NotLost.selector;
    }

    /// @dev Opens the successor of a lost run; the whole escrow moves to it.
    function _succeed(uint256 jobId, Record storage record, Moves moves) private {
        uint256 successor = ++_jobCount;
        Money money = record.money;
        record.money = money.withEscrow(0);
        Record storage next = _records[successor];
        next.moves = moves.succeeded();
        next.money = money.withPrice(0, 0);
        next.definition = record.definition;
        _retryOf[successor] = jobId;
        emit JobRetried(jobId, successor, money.escrow());
        _emitTransition(successor, moves.customer(), address(0), JobStatus.NONE, JobStatus.PENDING);
    }

    // ------------------------------------------------- internal: what is shared

    /// @dev The one guard: whether the table has the arrow. Refuses the item where it has not.
    function _canMove(uint256 jobId, Moves moves, JobStatus to, Batch memory batch)
        private
        returns (bool)
    {
        if (JobLifecycle.canTransition(moves.status(), to)) return true;
        _refuse(batch, jobId, moves, to, InvalidTransition.selector);
        return false;
    }

    /// @dev The one place where a status changes, once `_canMove` has let it pass: writes, and tells.
    function _move(
        uint256 jobId,
        Record storage record,
        Moves moves,
        address provider,
        JobStatus to
    ) private {
        record.moves = moves.moved(to);
        _emitTransition(jobId, moves.customer(), provider, moves.status(), to);
    }

    /// @dev Divides an escrow: cost to provider and treasury, the rest back. Billed seconds are within the
    /// allotment, so the cost is within the escrow.
    function _settle(
        uint256 jobId,
        Record storage record,
        Moves moves,
        address provider,
        uint256 billed,
        Payments memory due
    ) private returns (uint256 paid, uint256 refund) {
        Money money = record.money;
        uint256 cost = money.rate() * billed;
        uint256 fee = Billing.feeOf(cost, money.feeBps());
        paid = cost - fee;
        refund = money.escrow() - cost;
        due.treasury += fee;
        record.money = money.withEscrow(cost);
        emit JobSettled(jobId, provider, moves.customer(), billed, paid, fee, refund);
    }

    /// @dev Seconds to bill, min(reported, elapsed, allotment), and whether they are the whole allotment.
    function _billed(Moves moves, Money money, uint256 reported)
        private
        view
        returns (uint256 billed, bool spent)
    {
        billed = block.timestamp - moves.since();
        if (reported < billed) billed = reported;
        uint256 allotted = _allotment(moves, money);
        spent = billed >= allotted;
        if (spent) billed = allotted;
    }

    /// @dev Rate of a job at a provider in good standing, or why it can't go there.
    function _offerFor(uint256 jobId, Moves moves, Money money, Candidate memory candidate)
        private
        view
        returns (uint256 rate, bytes4 refusal)
    {
        if (moves.isSuccessor() && _isExcluded(jobId, candidate.id)) {
            return (0, ProviderExcluded.selector);
        }
        uint256 tasks = money.tasks();
        uint256 cpusPerTask = money.cpusPerTask();
        uint256 memPerCpu = moves.memPerCpu();
        uint256 gpus = money.gpus();
        if (!Billing.fits(candidate.capacity, tasks, cpusPerTask, memPerCpu, gpus)) {
            return (0, DoesNotFit.selector);
        }
        rate = Billing.rateOf(candidate.tariff, tasks, cpusPerTask, memPerCpu, gpus);
        if (rate == 0 || rate > type(uint72).max) return (0, RateOutOfRange.selector);
        if (rate * money.timeLimit() > money.escrow()) return (0, OverBudget.selector);
    }

    /// @dev Records of predecessors are final, so the providers that lost the line stand in them.
    function _isExcluded(uint256 jobId, uint16 providerId) private view returns (bool) {
        for (uint256 id = _retryOf[jobId]; id != 0; id = _retryOf[id]) {
            if (_records[id].moves.providerId() == providerId) return true;
        }
        return false;
    }

    function _selfRefusal(uint256 jobId, uint16 providerId, Moves moves)
        private
        view
        returns (bytes4)
    {
        if (block.timestamp < moves.since() + _pendingTimeout) return TooEarly.selector;
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
        if (
            capacity.statusOf(tariff) != ProviderStatus.ACTIVE
                || capacity.approvedUntil() < block.timestamp
        ) {
            candidate.refusal = ProviderNotActive.selector;
        } else if (_isSilent(clock)) {
            candidate.refusal = ProviderSilent.selector;
        }
    }

    /// @dev Remembers a provider's address at its first assignment, so that its later calls need no registry.
    function _candidate(uint16 providerId) private returns (Candidate memory candidate) {
        candidate = _standing(providerId);
        ProviderClock storage clock = _clocks[providerId];
        if (clock.account == address(0) && candidate.refusal == 0) {
            clock.account = candidate.account;
        }
    }

    function _accountOf(Moves moves) private view returns (address) {
        return _clocks[moves.providerId()].account;
    }

    function _allotment(Moves moves, Money money) private pure returns (uint256) {
        return
            Billing.allotment(moves.untilSpent(), money.timeLimit(), money.escrow(), money.rate());
    }

    function _isSilent(ProviderClock storage clock) private view returns (bool) {
        uint256 challengedAt = clock.challengedAt;
        return challengedAt != 0 && block.timestamp > challengedAt + _responseTimeout
            && block.number > clock.challengedBlock + _responseBlocks;
    }

    /// @dev Of a RUNNING job: its provider is silent, or it is overdue.
    function _isLost(Moves moves, Money money) private view returns (bool) {
        return block.timestamp > moves.since() + _allotment(moves, money) + _reportGrace
            || _isSilent(_clocks[moves.providerId()]);
    }

    /// @dev Whether a caller other than the provider may requeue now.
    function _mayRequeue(Moves moves) private view returns (bool) {
        bool inTime = block.timestamp <= moves.since() + _claimTimeout;
        if (moves.status() == JobStatus.META_SCHEDULED) return !inTime;
        if (!inTime && (msg.sender == moves.customer() || hasRole(METASCHEDULER_ROLE, msg.sender))) return true;
        ProviderClock storage clock = _clocks[moves.providerId()];
        return _isSilent(clock) || registry.statusOf(clock.account) == ProviderStatus.BANNED;
    }

    /// @dev Strangers act, but do not speak.
    function _spoken(Moves moves, address provider, string calldata reason)
        private
        view
        returns (string memory)
    {
        return msg.sender == provider || msg.sender == moves.customer() ? reason : "";
    }

    // -------------------------------------------------------- internal: batches

    function _refuse(Batch memory batch, uint256 jobId, Moves moves, JobStatus to, bytes4 reason)
        private
    {
        if (batch.refused++ == 0) {
            batch.reason = reason;
            batch.jobId = jobId;
            batch.from = moves.status();
            batch.to = to;
        }
        emit TransitionSkipped(jobId, moves.status(), reason);
    }

    /// @dev Reverts with the first item's reason where nothing was applied.
    function _requireApplied(Batch memory batch, uint256 items) private pure {
        if (items > batch.refused) return;
        if (items == 0) revert EmptyBatch();
        bytes4 reason = batch.reason;
        uint256 jobId = batch.jobId;
        if (reason == InvalidTransition.selector) {
            revert InvalidTransition(jobId, batch.from, batch.to);
        }
        // Every other per-item error takes the job id alone.
        bytes memory data = abi.encodeWithSelector(reason, jobId);
        assembly ("memory-safe") {
            revert(add(data, 32), mload(data))
        }
    }

    // ---------------------------------------------------------- internal: money

    function _newPayments(uint256 length) private pure returns (Payments memory due) {
        due.others = new address[](length);
        due.amounts = new uint256[](length);
    }

    /// @dev One entry for each recipient, so never more than items. The latest is the likeliest match.
    function _owe(Payments memory due, address to, uint256 amount) private pure {
        // Computed from the record, never from a balance that somebody can raise.
        // slither-disable-next-line incorrect-equality
        if (amount == 0) return;
        uint256 count = due.count;
        for (uint256 i = count; i > 0; --i) {
            if (due.others[i - 1] == to) {
                due.amounts[i - 1] += amount;
                return;
            }
        }
        due.others[count] = to;
        due.amounts[count] = amount;
        due.count = count + 1;
    }

    function _pay(Payments memory due) private {
        _transfer(msg.sender, due.caller);
        _transfer(treasury, due.treasury);
        for (uint256 i = 0; i < due.count; ++i) {
            _transfer(due.others[i], due.amounts[i]);
        }
    }

    /// @dev A recipient that can't be paid blocks nobody.
    function _transfer(address to, uint256 amount) private {
        if (amount == 0 || credit.trySafeTransfer(to, amount)) return;
        parkedOf[to] += amount;
        emit PaymentParked(to, amount);
    }

    function _permit(Permit calldata permit) private {
        try IERC20Permit(address(credit))
            .permit(
                msg.sender,
                address(this),
                permit.value,
                permit.deadline,
                permit.v,
                permit.r,
                permit.s
            ) {}
            catch {}
    }

    // ---------------------------------------------------------- internal: rest

    function _checkTerms(JobTerms calldata terms) private pure {
        if (terms.amount == 0) revert InvalidTerms("amount");
        if (terms.timeLimit == 0) revert InvalidTerms("timeLimit");
        if (terms.tasks == 0) revert InvalidTerms("tasks");
        if (terms.cpusPerTask == 0) revert InvalidTerms("cpusPerTask");
        if (terms.memPerCpu == 0) revert InvalidTerms("memPerCpu");
        if (terms.retries > MAX_RETRIES) revert InvalidTerms("retries");
        if (bytes(terms.name).length > MAX_NAME_LENGTH) revert InvalidTerms("name");
        if (bytes(terms.uses).length > MAX_USES_LENGTH) revert InvalidTerms("uses");
    }

    /// @dev `JobSubmitted` with terms encoded once for all jobs of a request.
    function _emitSubmitted(uint256 jobId, bytes32 definition, bytes memory data) private {
        bytes32 topic = JobSubmitted.selector;
        assembly ("memory-safe") {
            log4(add(data, 32), mload(data), topic, jobId, caller(), definition)
        }
    }

    /// @dev `JobTransition` from scratch memory: it is the most frequent event by far.
    function _emitTransition(
        uint256 jobId,
        address customer,
        address provider,
        JobStatus from,
        JobStatus to
    ) private {
        bytes32 topic = JobTransition.selector;
        assembly ("memory-safe") {
            mstore(0, from)
            mstore(32, to)
            // Upper bits of a narrow value are not promised to be clean.
            log4(0, 64, topic, jobId, shr(96, shl(96, customer)), shr(96, shl(96, provider)))
        }
    }

    function _setFee(uint16 feeBps_) private {
        _bounded("feeBps", feeBps_, 0, MAX_FEE_BPS);
        feeBps = feeBps_;
        emit FeeChanged(feeBps_);
    }

    function _bounded(bytes32 parameter, uint256 value, uint256 min, uint256 max) private pure {
        if (value < min || value > max) revert OutOfBounds(parameter, value, min, max);
    }

    // slither-disable-end uninitialized-local
}
