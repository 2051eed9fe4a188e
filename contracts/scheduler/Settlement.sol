// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {TransientSlot} from "@openzeppelin/contracts/utils/TransientSlot.sol";

import {IMetaScheduler} from "../interfaces/IMetaScheduler.sol";
import {Billing} from "../libraries/Billing.sol";
import {CalldataArray} from "../libraries/CalldataArray.sol";
import {StateWord, TermsWord} from "../libraries/JobRecord.sol";
import {JobStatus, Report} from "../types/JobTypes.sol";
import {Liveness} from "./Liveness.sol";

/// @title Ends jobs, makes interim payments, and pays out of the escrow
abstract contract Settlement is Liveness, ReentrancyGuardTransient {
    using CalldataArray for uint256[];
    using SafeERC20 for IERC20;
    using TransientSlot for *;

    /// @dev Amounts that a batch must pay: one to the caller, one to the treasury, and one to each other recipient.
    /// No amount overflows: each is a sum of escrows of 96 bits.
    struct Payments {
        address payee;
        uint256 toPayee;
        uint256 toTreasury;
        address latest;
        uint256 count;
        address[] others;
        uint256[] amounts;
    }

    // Counters, sums and the outcome of a batch start at zero, the initial value of a local variable.
    // slither-disable-start uninitialized-local

    // --------------------------------------------------------------- customers

    /// @inheritdoc IMetaScheduler
    function cancel(uint256[] calldata jobIds) external nonReentrant {
        Batch memory batch;
        Payments memory due = _newPayments(_customerSender(), jobIds.length);
        for (uint256 i = 0; i < jobIds.length; ++i) {
            _cancel(jobIds.itemAt(i), batch, due);
        }
        _close(batch, jobIds.length);
        _pay(due);
    }

    /// @inheritdoc IMetaScheduler
    function withdraw(address to) external nonReentrant returns (uint256 amount) {
        address recipient = _customerSender();
        amount = parkedOf[recipient];
        if (amount == 0) revert NothingParked();
        parkedOf[recipient] = 0;
        emit PaymentWithdrawn(recipient, to, amount);
        credit.safeTransfer(to, amount);
    }

    // --------------------------------------------------------------- providers

    /// @inheritdoc IMetaScheduler
    function finish(Report[] calldata reports) external nonReentrant {
        Batch memory batch;
        Payments memory due = _newPayments(msg.sender, reports.length);
        for (uint256 i = 0; i < reports.length; ++i) {
            _finish(reports[i], batch, due);
        }
        _close(batch, reports.length);
        _pay(due);
    }

    /// @inheritdoc IMetaScheduler
    function collect(uint256[] calldata jobIds) external nonReentrant {
        Batch memory batch;
        Payments memory due = _newPayments(msg.sender, 0);
        for (uint256 i = 0; i < jobIds.length; ++i) {
            _collect(jobIds.itemAt(i), batch, due);
        }
        _close(batch, jobIds.length);
        _pay(due);
    }

    // ------------------------------------------------------ parties and anyone

    /// @inheritdoc IMetaScheduler
    function panic(uint256[] calldata jobIds, string calldata reason) external nonReentrant {
        Batch memory batch;
        Payments memory due = _newPayments(msg.sender, jobIds.length);
        for (uint256 i = 0; i < jobIds.length; ++i) {
            _panic(jobIds.itemAt(i), reason, batch, due);
        }
        _close(batch, jobIds.length);
        _pay(due);
    }

    // ------------------------------------------------------- internal: one item

    function _finish(Report calldata report, Batch memory batch, Payments memory due) private {
        uint256 jobId = report.jobId;
        Record storage record = _records[jobId];
        StateWord state = record.state;
        JobStatus to = report.exitCode == 0 ? JobStatus.FINISHED : JobStatus.FAILED;
        if (!_canMove(jobId, state, to, batch)) return;
        if (!_isByProvider(state, batch)) {
            _refuse(batch, jobId, state, to, NotAssignedProvider.selector);
            return;
        }
        TermsWord terms = record.terms;
        uint256 billed;
        {
            // In its own scope: otherwise the stack is too deep without via-IR.
            bool usedUp;
            (billed, usedUp) = _billed(state, terms, report.secondsUsed);
            if (usedUp) to = JobStatus.OUT_OF_CREDITS;
        }
        _release(batch, state, terms);
        _move(jobId, record, state, msg.sender, to);
        emit JobResult(jobId, report.exitCode, report.result, report.reason);
        (uint256 paid, uint256 refund) =
            _settle(jobId, record, state, terms, msg.sender, billed, due);
        unchecked {
            due.toPayee += paid;
        }
        _owe(due, state.customer(), refund);
    }

    function _collect(uint256 jobId, Batch memory batch, Payments memory due) private {
        Record storage record = _records[jobId];
        StateWord state = record.state;
        TermsWord terms = record.terms;
        uint256 elapsed = block.timestamp - state.since();
        bytes4 refusal = _collectRefusal(state, terms, elapsed);
        if (refusal != 0) {
            _refuse(batch, jobId, state, JobStatus.RUNNING, refusal);
            return;
        }
        batch.mover = state.providerId();
        uint256 cost = terms.rate() * elapsed;
        uint256 fee = Billing.feeOf(cost, terms.feeBps());
        uint256 escrow = terms.escrow() - cost;
        uint256 limit = _limitLeft(state, terms, elapsed, escrow);
        record.state = state.billedUntilNow();
        record.terms = terms.withEscrow(escrow).withTimeLimit(limit);
        due.toPayee += cost - fee;
        due.toTreasury += fee;
        emit JobCollected(
            jobId, msg.sender, state.customer(), elapsed, cost - fee, fee, escrow, limit
        );
    }

    /// @dev Time limit after an interim payment: the billed seconds are subtracted. A job that runs until its
    /// credits are spent does not stop at its limit, which only sets its price ceiling, escrow / limit. Its limit
    /// shrinks in proportion to the escrow, so that the ceiling of a successor does not change. The limit is
    /// rounded down, so that the escrow still covers it at the same rate, but is never zero.
    function _limitLeft(StateWord state, TermsWord terms, uint256 elapsed, uint256 escrow)
        private
        pure
        returns (uint256)
    {
        uint256 limit = terms.timeLimit();
        if (!state.untilSpent()) return limit - elapsed;
        return Math.max(1, limit * escrow / terms.escrow());
    }

    function _collectRefusal(StateWord state, TermsWord terms, uint256 elapsed)
        private
        view
        returns (bytes4)
    {
        if (state.status() != JobStatus.RUNNING) return InvalidTransition.selector;
        if (_accountOf(state) != msg.sender) return NotAssignedProvider.selector;
        if (!state.allowsInterimPayments()) return InterimPaymentsForbidden.selector;
        if (elapsed < _collectInterval) return TooEarly.selector;
        // An overdue run has also used up its allotment; then only its end can be billed.
        if (elapsed >= _allotment(state, terms)) return AllotmentUsedUp.selector;
        return _isLost(state, terms) ? RunLost.selector : bytes4(0);
    }

    function _cancel(uint256 jobId, Batch memory batch, Payments memory due) private {
        Record storage record = _records[jobId];
        StateWord state = record.state;
        if (!_canMove(jobId, state, JobStatus.CANCELLED, batch)) return;
        address customer = state.customer();
        if (customer != due.payee && !_isExpired(state)) {
            _refuse(batch, jobId, state, JobStatus.CANCELLED, NotCustomer.selector);
            return;
        }
        TermsWord terms = record.terms;
        address provider = _accountOf(state);
        uint256 billed;
        if (state.status() == JobStatus.RUNNING && !_isLost(state, terms)) {
            (billed,) = _billed(state, terms, type(uint256).max);
        }
        if (state.status() != JobStatus.PENDING) _release(batch, state, terms);
        _move(jobId, record, state, provider, JobStatus.CANCELLED);
        (uint256 paid, uint256 refund) = _settle(jobId, record, state, terms, provider, billed, due);
        if (customer == due.payee) due.toPayee += refund;
        else _owe(due, customer, refund);
        _owe(due, provider, paid);
    }

    /// @dev Whether a PENDING job waited for so long that anyone may cancel it.
    function _isExpired(StateWord state) private view returns (bool) {
        return
            state.status() == JobStatus.PENDING && block.timestamp >= state.since() + _pendingExpiry;
    }

    function _panic(uint256 jobId, string calldata reason, Batch memory batch, Payments memory due)
        private
    {
        Record storage record = _records[jobId];
        StateWord state = record.state;
        if (!_canMove(jobId, state, JobStatus.PANICKED, batch)) return;
        TermsWord terms = record.terms;
        address provider = _accountOf(state);
        bytes4 refusal = _panicRefusal(state, terms, provider, bytes(reason).length);
        if (refusal != 0) {
            _refuse(batch, jobId, state, JobStatus.PANICKED, refusal);
            return;
        }
        if (msg.sender == provider) batch.mover = state.providerId();
        _release(batch, state, terms);
        _move(jobId, record, state, provider, JobStatus.PANICKED);
        emit JobPanicked(jobId, msg.sender, _heard(state, provider, reason));
        if (state.retriesLeft() > 0) {
            _succeed(jobId, record, state, terms);
        } else {
            (, uint256 refund) = _settle(jobId, record, state, terms, provider, 0, due);
            _owe(due, state.customer(), refund);
        }
    }

    function _panicRefusal(StateWord state, TermsWord terms, address provider, uint256 reasonLength)
        private
        view
        returns (bytes4)
    {
        if (reasonLength > MAX_REASON_LENGTH) return ReasonTooLong.selector;
        if (msg.sender == provider) return 0;
        if (state.status() != JobStatus.RUNNING) return NotAssignedProvider.selector;
        return _isLost(state, terms) ? bytes4(0) : NotLost.selector;
    }

    /// @dev Creates the successor of a job that was lost or given up, and moves the whole escrow to it.
    function _succeed(uint256 jobId, Record storage record, StateWord state, TermsWord terms)
        private
    {
        uint256 successor = ++_jobCount;
        record.terms = terms.withEscrow(0);
        Record storage next = _records[successor];
        next.state = state.succeeded();
        next.terms = terms.withPrice(0, 0);
        next.definition = record.definition;
        _retryOf[successor] = jobId;
        emit JobRetried(jobId, successor, terms.escrow());
        _emitTransition(successor, state.customer(), address(0), JobStatus.NONE, JobStatus.PENDING);
    }

    // ----------------------------------------------------------- internal: bills

    /// @dev Seconds to bill, min(reported, elapsed, allotment), and whether they equal the allotment.
    function _billed(StateWord state, TermsWord terms, uint256 reported)
        private
        view
        returns (uint256 billed, bool usedUp)
    {
        unchecked {
            // No underflow: a start is never later than now.
            billed = block.timestamp - state.since();
        }
        if (reported < billed) billed = reported;
        uint256 allotted = _allotment(state, terms);
        usedUp = billed >= allotted;
        if (usedUp) billed = allotted;
    }

    /// @dev Divides the escrow of an ended job: the cost goes to provider and treasury, the rest to the customer.
    /// The billed seconds are within the allotment, so the escrow covers the cost, which includes the fee.
    function _settle(
        uint256 jobId,
        Record storage record,
        StateWord state,
        TermsWord terms,
        address provider,
        uint256 billed,
        Payments memory due
    ) private returns (uint256 paid, uint256 refund) {
        uint256 cost;
        uint256 fee;
        unchecked {
            cost = terms.rate() * billed;
            fee = Billing.feeOf(cost, terms.feeBps());
            paid = cost - fee;
            refund = terms.escrow() - cost;
            due.toTreasury += fee;
        }
        record.terms = terms.withEscrow(cost);
        emit JobSettled(jobId, provider, state.customer(), billed, paid, fee, refund);
    }

    // -------------------------------------------------------- internal: payments

    function _newPayments(address payee, uint256 length)
        private
        pure
        returns (Payments memory due)
    {
        due.payee = payee;
        due.others = new address[](length);
        due.amounts = new uint256[](length);
    }

    /// @dev Adds to the amount of a recipient. There is one entry per recipient, so never more entries than items.
    /// The latest entry is compared first. The positions (from one) of the others are in transient storage, with
    /// the recipient's address as slot, so that the cost of a batch grows linearly with its recipients.
    function _owe(Payments memory due, address to, uint256 amount) private {
        // Safe: the amount comes from the record, not from a balance that others can change.
        // slither-disable-next-line incorrect-equality
        if (amount == 0) return;
        unchecked {
            uint256 count = due.count;
            if (count != 0) {
                uint256 position = to == due.latest ? count : _positionOf(to).tload();
                // The position may be from an earlier batch of the same transaction, so the entry is compared.
                if (position != 0 && position <= count && due.others[position - 1] == to) {
                    due.amounts[position - 1] += amount;
                    return;
                }
                _positionOf(due.latest).tstore(count);
            }
            due.others[count] = to;
            due.amounts[count] = amount;
            due.latest = to;
            due.count = count + 1;
        }
    }

    /// @dev Addresses are below 2^160, so these slots don't collide with the hashed slots of other libraries.
    function _positionOf(address to) private pure returns (TransientSlot.Uint256Slot) {
        return bytes32(uint256(uint160(to))).asUint256();
    }

    function _pay(Payments memory due) private {
        _transfer(due.payee, due.toPayee);
        _transfer(treasury, due.toTreasury);
        address[] memory others = due.others;
        uint256[] memory amounts = due.amounts;
        uint256 count = due.count;
        for (uint256 i = 0; i < count; ++i) {
            _transfer(others[i], amounts[i]);
        }
    }

    /// @dev A failing payment is parked, so that no recipient can block the others.
    function _transfer(address to, uint256 amount) private {
        if (amount == 0 || credit.trySafeTransfer(to, amount)) return;
        parkedOf[to] += amount;
        emit PaymentParked(to, amount);
    }

    // slither-disable-end uninitialized-local
}
