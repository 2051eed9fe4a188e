// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {Vm} from "forge-std/Vm.sol";

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {Job, JobStatus, JobTerms} from "../../contracts/types/JobTypes.sol";
import {GridTest} from "./GridTest.sol";

/// @notice [14] Rebuilds every record and every balance from the events alone.
abstract contract Replay is GridTest {
    mapping(uint256 jobId => Job) private _jobs;
    mapping(address account => uint256) private _balances;
    mapping(address account => uint256) private _parked;
    uint256 private _count;
    uint256 private _supply;

    function setUp() public virtual override {
        vm.recordLogs();
        super.setUp();
        replay();
    }

    /// @dev Applies the logs since `vm.recordLogs`, all with the time of this block.
    function replay() internal {
        Vm.Log[] memory logs = vm.getRecordedLogs();
        for (uint256 i = 0; i < logs.length; ++i) {
            if (logs[i].emitter == address(credit)) _ofCredit(logs[i]);
            else if (logs[i].emitter == address(grid)) _ofGrid(logs[i]);
        }
    }

    /// @param record Hash of the encoded record.
    function compareJob(uint256 id, bytes32 record) internal view {
        assertEq(record, keccak256(abi.encode(_jobs[id])), "[14] record by events");
    }

    function compareTotals() internal view {
        assertEq(grid.jobCount(), _count, "[14] jobs by events");
        assertEq(credit.totalSupply(), _supply, "[14] supply by events");
    }

    function compareAccount(address account) internal view {
        assertEq(credit.balanceOf(account), _balances[account], "[14] balance by events");
        assertEq(grid.parkedOf(account), _parked[account], "[14] parked by events");
    }

    function _ofCredit(Vm.Log memory log) private {
        if (log.topics[0] != IERC20.Transfer.selector) return;
        (address from, address to) = (_account(log, 1), _account(log, 2));
        uint256 amount = abi.decode(log.data, (uint256));
        if (from == address(0)) _supply += amount;
        else _balances[from] -= amount;
        if (to == address(0)) _supply -= amount;
        else _balances[to] += amount;
    }

    function _ofGrid(Vm.Log memory log) private {
        bytes32 topic = log.topics[0];
        if (topic == IMetaScheduler.PaymentParked.selector) {
            _parked[_account(log, 1)] += abi.decode(log.data, (uint256));
        } else if (topic == IMetaScheduler.PaymentWithdrawn.selector) {
            _parked[_account(log, 1)] -= abi.decode(log.data, (uint256));
        } else if (log.topics.length > 1) {
            _ofJob(topic, _jobs[uint256(log.topics[1])], log);
        }
    }

    function _ofJob(bytes32 topic, Job storage job, Vm.Log memory log) private {
        if (topic == IMetaScheduler.JobSubmitted.selector) {
            _submitted(job, abi.decode(log.data, (JobTerms)));
            (job.customer, job.definition) = (_account(log, 2), log.topics[3]);
        } else if (topic == IMetaScheduler.JobTransition.selector) {
            _moved(job, log);
        } else if (topic == IMetaScheduler.JobPriced.selector) {
            (uint256 rate, uint256 fee) = abi.decode(log.data, (uint256, uint256));
            (job.rate, job.feeBps) = (uint72(rate), uint16(fee));
        } else if (topic == IMetaScheduler.JobToppedUp.selector) {
            (, uint256 escrow, uint256 limit) = abi.decode(log.data, (uint256, uint256, uint256));
            (job.escrow, job.timeLimit) = (uint96(escrow), uint24(limit));
        } else if (topic == IMetaScheduler.JobCollected.selector) {
            (,,, uint256 escrow, uint256 limit) =
                abi.decode(log.data, (uint256, uint256, uint256, uint256, uint256));
            (job.escrow, job.timeLimit) = (uint96(escrow), uint24(limit));
            job.since = uint32(block.timestamp);
        } else if (topic == IMetaScheduler.JobSettled.selector) {
            (, uint256 paid, uint256 fee,) =
                abi.decode(log.data, (uint256, uint256, uint256, uint256));
            job.escrow = uint96(paid + fee);
        } else if (topic == IMetaScheduler.JobRetried.selector) {
            _retried(job, log);
        }
    }

    function _submitted(Job storage job, JobTerms memory terms_) private {
        job.memPerCpu = terms_.memPerCpu;
        job.retriesLeft = terms_.retries;
        job.flags = terms_.flags;
        job.escrow = terms_.amount;
        job.timeLimit = terms_.timeLimit;
        job.tasks = terms_.tasks;
        job.cpusPerTask = terms_.cpusPerTask;
        job.gpus = terms_.gpus;
    }

    function _moved(Job storage job, Vm.Log memory log) private {
        (JobStatus from, JobStatus to) = abi.decode(log.data, (JobStatus, JobStatus));
        assertEq(
            uint8(job.status), uint8(from), "[14] a transition begins where the last one ended"
        );
        if (from == JobStatus.NONE) {
            assertEq(uint256(log.topics[1]), ++_count, "[4] ids are dense");
            job.customer = _account(log, 2);
        }
        (job.status, job.since) = (to, uint32(block.timestamp));
        if (to == JobStatus.META_SCHEDULED) job.providerId = registry.idOf(_account(log, 3));
        if (to == JobStatus.PENDING) (job.providerId, job.rate, job.feeBps) = (0, 0, 0);
    }

    /// @dev A successor has the terms of its predecessor, one retry less, and the escrow.
    function _retried(Job storage job, Vm.Log memory log) private {
        Job storage next = _jobs[uint256(log.topics[2])];
        next.memPerCpu = job.memPerCpu;
        next.retriesLeft = job.retriesLeft - 1;
        next.flags = job.flags | SUCCESSOR;
        next.timeLimit = job.timeLimit;
        next.tasks = job.tasks;
        next.cpusPerTask = job.cpusPerTask;
        next.gpus = job.gpus;
        next.definition = job.definition;
        next.retryOf = uint256(log.topics[1]);
        next.escrow = uint96(abi.decode(log.data, (uint256)));
        job.escrow = 0;
    }

    function _account(Vm.Log memory log, uint256 topic) private pure returns (address) {
        return address(uint160(uint256(log.topics[topic])));
    }
}
