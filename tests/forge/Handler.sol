// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Credit} from "../../contracts/Credit.sol";
import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {BlockingCredit} from "../../contracts/test/HostileCredits.sol";
import {
    Assignment,
    Job,
    JobRequest,
    JobStatus,
    JobTerms,
    ProviderClock,
    Report
} from "../../contracts/types/JobTypes.sol";
import {
    Hardware,
    Offer,
    Prices,
    Provider,
    ProviderStatus
} from "../../contracts/types/ProviderTypes.sol";
import {Replay} from "./Replay.sol";

/// @notice Drives the grid as customers, providers, scheduler, strangers, administrators and time.
/// @dev Before each call it says by rules of its own which items must move and to where; after it, every
/// record is compared with that. No rule reads the contract's table, and none expects a revert by accident.
contract Handler is Replay {
    uint256 internal constant MAX_JOBS = 48;

    struct Ghost {
        JobStatus status;
        uint256 funded;
        uint256 carriedIn;
        uint256 carriedOut;
        uint256 paid;
        uint256 fee;
        uint256 refunded;
        uint256 rate;
        uint256 feeBps;
        uint256 startedAt;
        uint256 generation;
        bytes32 finalRecord;
    }

    mapping(uint256 jobId => Ghost) internal ghosts;
    mapping(address account => int256) internal moved;
    mapping(uint256 jobId => mapping(uint16 providerId => bool)) internal barred;
    /// @notice Transitions that happened, by the status they led to.
    mapping(JobStatus to => uint256) public reached;
    // What the present call may do: items that must move, and where to.
    mapping(uint256 jobId => JobStatus) internal expected;
    address internal caller;
    uint256 internal time;
    uint256 internal height;

    // ------------------------------------------------------------------- verbs

    function submitJobs(uint256 who, uint256 amount, uint256 limit, uint256 shape) external {
        uint256 count = 1 + shape % 3;
        if (grid.jobCount() + count > MAX_JOBS) return;
        JobTerms memory terms_ = terms(
            uint96(bound(amount, amount % 4 == 0 ? 1e12 : 1e17, 1e22)),
            uint24(limit % 3 == 0 ? bound(limit, 1, 100_000) : bound(limit, 1, 1000)),
            uint16(1 + (shape >> 8) % ((shape >> 12) % 4 == 0 ? 40 : 6)),
            uint8((shape >> 16) % 6),
            (shape >> 24) % 2 == 0
        );
        JobRequest[] memory requests = new JobRequest[](1);
        requests[0] = JobRequest(terms_, new bytes32[](count));
        for (uint256 i = 0; i < count; ++i) {
            requests[0].definitions[i] = keccak256(abi.encode(shape, i));
        }
        _begin(customer(who % CUSTOMERS));
        vm.prank(caller);
        uint256 first = grid.submitJobs(requests);
        for (uint256 i = 0; i < count; ++i) {
            Ghost storage ghost = ghosts[first + i];
            ghost.status = JobStatus.PENDING;
            ghost.funded = terms_.amount;
        }
        moved[caller] -= int256(count * terms_.amount);
        _end();
    }

    function metaSchedule(uint256 seed, uint256 who) external {
        uint256[] memory ids = _pick(seed, JobStatus.PENDING);
        uint16 providerId = uint16(1 + who % PROVIDERS);
        _begin(SCHEDULER);
        uint256 movable;
        for (uint256 i = 0; i < ids.length; ++i) {
            if (!_fresh(ids, i) || ghosts[ids[i]].status != JobStatus.PENDING) continue;
            if (!_mayReceive(ids[i], providerId)) continue;
            expected[ids[i]] = JobStatus.META_SCHEDULED;
            ++movable;
        }
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = Assignment(providerId, ids);
        vm.prank(SCHEDULER);
        try grid.metaSchedule(assignments) {
            assertGt(movable, 0, "metaSchedule applied nothing that it should");
        } catch {
            assertEq(movable, 0, "metaSchedule refused what it should do");
        }
        _end();
    }

    function selfSchedule(uint256 seed, uint256 who) external {
        uint256[] memory ids = _pick(seed, JobStatus.PENDING);
        uint16 providerId = uint16(1 + who % PROVIDERS);
        _begin(provider(who % PROVIDERS));
        uint256 movable;
        for (uint256 i = 0; i < ids.length; ++i) {
            if (!_fresh(ids, i) || ghosts[ids[i]].status != JobStatus.PENDING) continue;
            if (block.timestamp < grid.getJob(ids[i]).since + PENDING_TIMEOUT) continue;
            if (barred[ids[i]][providerId] || !_mayReceive(ids[i], providerId)) continue;
            expected[ids[i]] = JobStatus.META_SCHEDULED;
            ++movable;
        }
        vm.prank(caller);
        try grid.selfSchedule(ids) {
            assertGt(movable, 0, "selfSchedule applied nothing that it should");
        } catch {
            assertEq(movable, 0, "selfSchedule refused what it should do");
        }
        _end();
    }

    function claim(uint256 seed, uint256 who) external {
        _advance(seed, who, JobStatus.META_SCHEDULED, JobStatus.SCHEDULED);
    }

    function start(uint256 seed, uint256 who) external {
        _advance(seed, who, JobStatus.SCHEDULED, JobStatus.RUNNING);
    }

    function finish(uint256 seed, uint256 who, uint256 used, int32 code) external {
        uint256[] memory ids = _pick(seed, JobStatus.RUNNING);
        _begin(_actor(who, ids));
        uint32 reported = uint32(bound(used, 0, 200_000));
        Report[] memory reports = new Report[](ids.length);
        uint256 movable;
        for (uint256 i = 0; i < ids.length; ++i) {
            reports[i] = Report(ids[i], reported, code, bytes32(seed), "exited");
            Ghost storage ghost = ghosts[ids[i]];
            if (!_fresh(ids, i) || ghost.status != JobStatus.RUNNING) continue;
            if (_providerOf(ids[i]) != caller) continue;
            uint256 allotted = _allotment(ids[i]);
            uint256 billed = _min(_min(reported, block.timestamp - ghost.startedAt), allotted);
            expected[ids[i]] = billed == allotted
                ? JobStatus.OUT_OF_CREDITS
                : code == 0 ? JobStatus.FINISHED : JobStatus.FAILED;
            _settle(ids[i], billed, caller);
            ++movable;
        }
        vm.prank(caller);
        try grid.finish(reports) {
            assertGt(movable, 0, "finish applied nothing that it should");
        } catch {
            assertEq(movable, 0, "finish refused what it should do");
        }
        _end();
    }

    function cancel(uint256 seed, uint256 who) external {
        if (seed % 3 != 0) return;
        uint256[] memory ids = _pick(seed, JobStatus.RUNNING);
        _begin(customer(who % CUSTOMERS));
        uint256 movable;
        for (uint256 i = 0; i < ids.length; ++i) {
            Ghost storage ghost = ghosts[ids[i]];
            if (!_fresh(ids, i) || !isLive(ghost.status)) continue;
            if (grid.getJob(ids[i]).customer != caller) continue;
            expected[ids[i]] = JobStatus.CANCELLED;
            uint256 billed;
            if (ghost.status == JobStatus.RUNNING && !_lost(ids[i])) {
                billed = _min(block.timestamp - ghost.startedAt, _allotment(ids[i]));
            }
            _settle(ids[i], billed, _providerOf(ids[i]));
            ++movable;
        }
        vm.prank(caller);
        try grid.cancel(ids) {
            assertGt(movable, 0, "cancel applied nothing that it should");
        } catch {
            assertEq(movable, 0, "cancel refused what it should do");
        }
        _end();
    }

    function requeue(uint256 seed, uint256 who) external {
        uint256[] memory ids = _pick(seed, JobStatus.SCHEDULED);
        _begin(_anyone(who));
        uint256 movable;
        for (uint256 i = 0; i < ids.length; ++i) {
            if (!_fresh(ids, i) || !_mayRequeue(ids[i])) continue;
            expected[ids[i]] = JobStatus.PENDING;
            barred[ids[i]][grid.getJob(ids[i]).providerId] = true;
            ghosts[ids[i]].rate = 0;
            ghosts[ids[i]].feeBps = 0;
            ++movable;
        }
        vm.prank(caller);
        try grid.requeue(ids, "full") {
            assertGt(movable, 0, "requeue applied nothing that it should");
        } catch {
            assertEq(movable, 0, "requeue refused what it should do");
        }
        _end();
    }

    function panic(uint256 seed, uint256 who) external {
        uint256[] memory ids = _pick(seed, JobStatus.RUNNING);
        _begin(_anyone(who));
        uint256 movable;
        uint256 next = grid.jobCount();
        for (uint256 i = 0; i < ids.length; ++i) {
            Ghost storage ghost = ghosts[ids[i]];
            if (!_fresh(ids, i) || !isLive(ghost.status) || ghost.status == JobStatus.PENDING) {
                continue;
            }
            bool running = ghost.status == JobStatus.RUNNING;
            if (caller != _providerOf(ids[i]) && !(running && _lost(ids[i]))) continue;
            expected[ids[i]] = JobStatus.PANICKED;
            Job memory job = grid.getJob(ids[i]);
            if (running && job.retriesLeft > 0) {
                Ghost storage successor = ghosts[++next];
                successor.status = JobStatus.PENDING;
                successor.carriedIn = job.escrow;
                successor.generation = ghost.generation + 1;
                ghost.carriedOut = job.escrow;
            } else {
                _settle(ids[i], 0, caller);
            }
            ++movable;
        }
        vm.prank(caller);
        try grid.panic(ids, "gone") {
            assertGt(movable, 0, "panic applied nothing that it should");
        } catch {
            assertEq(movable, 0, "panic refused what it should do");
        }
        assertEq(grid.jobCount(), next, "successors");
        _end();
    }

    function challenge(uint256 seed) external {
        _restoreTime();
        uint256 count = grid.jobCount();
        if (count == 0) return;
        uint256 jobId = 1 + seed % count;
        JobStatus status = ghosts[jobId].status;
        ProviderClock memory clock = grid.clockOf(grid.getJob(jobId).providerId);
        bool allowed = isLive(status) && status != JobStatus.PENDING && clock.challengedAt == 0
            && block.timestamp >= clock.answeredAt + RESPONSE_TIMEOUT;
        _begin(STRANGER);
        vm.prank(STRANGER);
        try grid.challenge(jobId) {
            assertTrue(allowed, "challenge accepted");
        } catch {
            assertFalse(allowed, "challenge refused");
        }
        _end();
    }

    function answer(uint256 who) external {
        _begin(provider(who % PROVIDERS));
        bool due = grid.clockOf(uint16(1 + who % PROVIDERS)).challengedAt != 0;
        vm.prank(caller);
        try grid.answer() {
            assertTrue(due, "answered nothing");
        } catch {
            assertFalse(due, "answer refused");
        }
        assertFalse(grid.isSilent(uint16(1 + who % PROVIDERS)), "silent after an answer");
        _end();
    }

    function topUp(uint256 seed, uint256 amount, uint256 who) external {
        _restoreTime();
        uint256 count = grid.jobCount();
        if (count == 0) return;
        uint256 jobId = 1 + seed % count;
        uint96 paid = uint96(bound(amount, 1, 1e21));
        Job memory job = grid.getJob(jobId);
        bool allowed = isLive(job.status) && paid >= uint256(job.rate) * 60;
        if (job.status == JobStatus.RUNNING) {
            allowed = allowed && block.timestamp + TOP_UP_NOTICE < job.since + _allotment(jobId);
        }
        uint256 limit = job.timeLimit;
        if (job.rate > 0 && !job.untilSpent) limit += paid / job.rate;
        allowed = allowed && limit <= type(uint24).max;
        _begin(who % 2 == 0 ? STRANGER : customer(who % CUSTOMERS));
        vm.prank(caller);
        try grid.topUp(jobId, job.customer, paid) {
            assertTrue(allowed, "top-up accepted");
            ghosts[jobId].funded += paid;
            moved[caller] -= int256(uint256(paid));
            assertEq(grid.getJob(jobId).timeLimit, limit, "limit after a top-up");
        } catch {
            assertFalse(allowed, "top-up refused");
        }
        _end();
    }

    function pass(uint256 seconds_, uint256 blocks) external {
        // Once in a while an approval runs out.
        if (seconds_ % 40 == 1) return _pass(366 days, 20);
        _pass(
            seconds_ % 4 == 0 ? bound(seconds_, 1, 2 hours) : bound(seconds_, 1, 700),
            bound(blocks, 0, 20)
        );
    }

    function tick(uint256 seconds_) external {
        _pass(bound(seconds_, 1, 30), 1);
    }

    function changePrices(uint256 who, uint256 price) external {
        _begin(provider(who % PROVIDERS));
        vm.prank(caller);
        registry.setPrices(prices(uint64(bound(price, 1000, 1e15))));
        _end();
    }

    function changeOffer(uint256 who, uint256 cpus, uint256 mem) external {
        _begin(provider(who % PROVIDERS));
        vm.prank(caller);
        registry.setOffer(
            Offer(
                uint32(cpus % 8 == 0 ? 0 : bound(cpus, 16, 64)),
                uint48(bound(mem, 4096, 262_144)),
                8
            )
        );
        _end();
    }

    /// @dev Standing is restored more often than lost: otherwise nobody gets work for long.
    function changeStanding(uint256 who, uint256 what) external {
        address target = provider(who % PROVIDERS);
        uint256 choice = what % 8;
        _begin(choice < 4 ? target : ADMIN);
        vm.prank(caller);
        if (choice < 4) registry.setDraining(choice == 0);
        else if (choice == 4) registry.ban(target, "test");
        else registry.unban(target);
        _end();
    }

    function renew(uint256 who) external {
        address target = provider(who % PROVIDERS);
        Provider memory record = registry.getProvider(target);
        if (record.status == ProviderStatus.BANNED) return;
        _begin(ADMIN);
        vm.prank(ADMIN);
        registry.approve(target, record.version);
        _end();
    }

    function changeFee(uint256 bps, bool open) external {
        _begin(ADMIN);
        vm.startPrank(ADMIN);
        grid.setFee(uint16(bound(bps, 0, 2000)));
        grid.setSubmissionsOpen(open || true);
        vm.stopPrank();
        _end();
    }

    /// @dev Most are unblocked again: parked sums must not stop the play.
    function changeBlock(uint256 who, uint256 what) external {
        _begin(ADMIN);
        BlockingCredit(address(credit)).setBlocked(_recipient(who), what % 3 == 0);
        _end();
    }

    function withdraw(uint256 who) external {
        address account = _recipient(who);
        uint256 parked = grid.parkedOf(account);
        bool allowed = parked > 0 && !BlockingCredit(address(credit)).blocked(account);
        _begin(account);
        vm.prank(account);
        try grid.withdraw(account) returns (uint256 amount) {
            assertTrue(allowed, "withdrawal accepted");
            assertEq(amount, parked, "withdrawn");
            assertEq(grid.parkedOf(account), 0, "parked after a withdrawal");
        } catch {
            assertFalse(allowed, "withdrawal refused");
            // What a refused call said before it was undone is recorded too.
            vm.recordLogs();
        }
        _end();
    }

    /// @dev Everything that a stranger may try on somebody else's jobs is refused.
    function intrude(uint256 seed) external {
        uint256[] memory ids = _pick(seed, JobStatus.RUNNING);
        Report[] memory reports = new Report[](ids.length);
        for (uint256 i = 0; i < ids.length; ++i) {
            reports[i] = Report(ids[i], 1, 0, 0, "");
        }
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = Assignment(1, ids);
        _begin(STRANGER);
        bytes[8] memory attempts = [
            abi.encodeCall(grid.cancel, (ids)),
            abi.encodeCall(grid.claim, (ids)),
            abi.encodeCall(grid.start, (ids)),
            abi.encodeCall(grid.finish, (reports)),
            abi.encodeCall(grid.selfSchedule, (ids)),
            abi.encodeCall(grid.metaSchedule, (assignments)),
            abi.encodeCall(grid.setFee, (0)),
            abi.encodeCall(grid.withdraw, (STRANGER))
        ];
        vm.prank(STRANGER);
        (bool done,) = address(grid).call(attempts[seed % 8]);
        assertFalse(done, "a stranger did something");
        _end();
    }

    // -------------------------------------------------------------- invariants

    /// @notice All numbered invariants that hold between calls.
    function check() external view {
        uint256 escrows;
        uint256 count = grid.jobCount();
        for (uint256 id = 1; id <= count; ++id) {
            Ghost storage ghost = ghosts[id];
            Job memory job = grid.getJob(id);
            assertEq(uint8(job.status), uint8(ghost.status), "[4] status");
            uint256 funds = ghost.funded + ghost.carriedIn;
            if (isLive(job.status)) {
                escrows += job.escrow;
                assertEq(job.escrow, funds, "[2] live escrow");
            } else {
                assertEq(job.escrow, ghost.paid + ghost.fee, "[2] consumed");
                assertEq(
                    ghost.paid + ghost.fee + ghost.refunded + ghost.carriedOut, funds, "[2] divided"
                );
                assertEq(keccak256(abi.encode(job)), ghost.finalRecord, "[4] final is frozen");
            }
            assertEq(job.rate, ghost.rate, "[7] rate");
            assertEq(job.feeBps, ghost.feeBps, "[7] fee");
            assertLe(ghost.generation, 5, "[13] retries");
        }
        assertEq(grid.getJob(count + 1).customer, address(0), "[4] ids are dense");
        uint256 parked;
        for (uint256 i = 0; i < 2 * CUSTOMERS + 1; ++i) {
            parked += grid.parkedOf(_recipient(i));
        }
        assertEq(credit.balanceOf(address(grid)), escrows + parked, "[1] escrow and parked");
        assertEq(credit.totalSupply(), (CUSTOMERS + 1) * FUNDS, "[3] supply");
        for (uint256 i = 0; i < CUSTOMERS; ++i) {
            _checkBalance(customer(i), FUNDS);
            _checkBalance(provider(i), 0);
        }
        _checkBalance(STRANGER, FUNDS);
        _checkBalance(TREASURY, 0);
        compareJobs();
    }

    /// @notice [9] Customers alone end everything; nothing is left in escrow.
    function drain() external {
        _begin(address(0));
        uint256 count = grid.jobCount();
        for (uint256 id = 1; id <= count; ++id) {
            Job memory job = grid.getJob(id);
            if (!isLive(job.status)) continue;
            vm.prank(job.customer);
            grid.cancel(one(id));
        }
        for (uint256 i = 0; i < 2 * CUSTOMERS + 1; ++i) {
            address account = _recipient(i);
            BlockingCredit(address(credit)).setBlocked(account, false);
            if (grid.parkedOf(account) == 0) continue;
            vm.prank(account);
            grid.withdraw(account);
        }
        assertEq(credit.balanceOf(address(grid)), 0, "[9] escrow after draining");
        replay();
        compareJobs();
        for (uint256 i = 0; i < 2 * CUSTOMERS + 1; ++i) {
            compareAccount(_recipient(i));
        }
    }

    // ------------------------------------------------------------ own judgement

    function _advance(uint256 seed, uint256 who, JobStatus from, JobStatus to) private {
        uint256[] memory ids = _pick(seed, from);
        _begin(_actor(who, ids));
        uint256 movable;
        for (uint256 i = 0; i < ids.length; ++i) {
            if (!_fresh(ids, i) || ghosts[ids[i]].status != from) continue;
            if (_providerOf(ids[i]) != caller) continue;
            expected[ids[i]] = to;
            ++movable;
        }
        bytes memory data = from == JobStatus.SCHEDULED
            ? abi.encodeCall(grid.start, (ids))
            : abi.encodeCall(grid.claim, (ids));
        vm.prank(caller);
        (bool done,) = address(grid).call(data);
        assertEq(done, movable > 0, "claim or start");
        _end();
    }

    /// @dev [10] and [11], by the text of the protocol.
    function _mayReceive(uint256 jobId, uint16 providerId) private view returns (bool) {
        Provider memory p = registry.getProvider(provider(providerId - 1));
        if (p.status != ProviderStatus.ACTIVE || p.approvedUntil < block.timestamp) return false;
        if (_silent(providerId)) return false;
        Job memory job = grid.getJob(jobId);
        for (uint256 id = job.retryOf; id != 0; id = grid.getJob(id).retryOf) {
            if (grid.getJob(id).providerId == providerId) return false;
        }
        uint256 cpus = uint256(job.tasks) * job.cpusPerTask;
        uint256 mem = cpus * job.memPerCpu;
        uint256 byCpu = p.hardware.cpusPerNode / job.cpusPerTask;
        uint256 byMem = p.hardware.memPerNode / (uint256(job.cpusPerTask) * job.memPerCpu);
        if (job.tasks > p.hardware.nodes * _min(byCpu, byMem)) return false;
        if (cpus > p.offer.cpus || mem > p.offer.mem || job.gpus > p.offer.gpus) return false;
        uint256 rate = cpus * p.prices.cpu + job.gpus * p.prices.gpu + mem * p.prices.mem;
        return rate > 0 && rate < 2 ** 72 && rate * job.timeLimit <= job.escrow;
    }

    function _mayRequeue(uint256 jobId) private view returns (bool) {
        JobStatus status = ghosts[jobId].status;
        if (status != JobStatus.META_SCHEDULED && status != JobStatus.SCHEDULED) return false;
        Job memory job = grid.getJob(jobId);
        address assigned = _providerOf(jobId);
        if (caller == assigned) return true;
        bool late = block.timestamp > job.since + CLAIM_TIMEOUT;
        if (status == JobStatus.META_SCHEDULED) return late;
        if (late && (caller == job.customer || caller == SCHEDULER)) return true;
        return _silent(job.providerId) || registry.statusOf(assigned) == ProviderStatus.BANNED;
    }

    function _silent(uint16 providerId) private view returns (bool) {
        ProviderClock memory clock = grid.clockOf(providerId);
        return clock.challengedAt != 0 && block.timestamp > clock.challengedAt + RESPONSE_TIMEOUT
            && block.number > clock.challengedBlock + RESPONSE_BLOCKS;
    }

    function _lost(uint256 jobId) private view returns (bool) {
        return _silent(grid.getJob(jobId).providerId)
            || block.timestamp > ghosts[jobId].startedAt + _allotment(jobId) + REPORT_GRACE;
    }

    function _allotment(uint256 jobId) private view returns (uint256) {
        Job memory job = grid.getJob(jobId);
        return job.untilSpent ? job.escrow / job.rate : job.timeLimit;
    }

    /// @dev What a settlement of so many seconds must do to the ledger.
    function _settle(uint256 jobId, uint256 billed, address payee) private {
        Ghost storage ghost = ghosts[jobId];
        Job memory job = grid.getJob(jobId);
        uint256 cost = ghost.rate * billed;
        assertLe(cost, job.escrow, "[6] cost beyond the escrow");
        ghost.fee = cost * ghost.feeBps / 10_000;
        ghost.paid = cost - ghost.fee;
        ghost.refunded = ghost.funded + ghost.carriedIn - cost;
        if (cost > 0) moved[payee] += int256(ghost.paid);
        moved[TREASURY] += int256(ghost.fee);
        moved[job.customer] += int256(ghost.refunded);
    }

    // ------------------------------------------------------------------ helpers

    function _pass(uint256 seconds_, uint256 blocks) private {
        time = (time == 0 ? block.timestamp : time) + seconds_;
        height = (height == 0 ? block.number : height) + blocks;
        _restoreTime();
    }

    /// @dev The fuzzer does not promise to carry a warp from one call to the next.
    function _restoreTime() private {
        if (time == 0) return;
        vm.warp(time);
        vm.roll(height);
    }

    function _begin(address who) private {
        _restoreTime();
        caller = who;
        vm.recordLogs();
    }

    /// @dev Every record must be where the rules said, and nothing else may have moved ([4], [5], [12], [15]).
    function _end() private {
        uint256 count = grid.jobCount();
        for (uint256 id = 1; id <= count; ++id) {
            Ghost storage ghost = ghosts[id];
            JobStatus to = expected[id];
            if (to != JobStatus.NONE) {
                delete expected[id];
                ghost.status = to;
                ++reached[to];
                Job memory job = grid.getJob(id);
                assertEq(job.since, block.timestamp, "time of the transition");
                if (to == JobStatus.META_SCHEDULED) {
                    ghost.rate = job.rate;
                    ghost.feeBps = job.feeBps;
                    assertEq(job.feeBps, grid.feeBps(), "fee at assignment");
                }
                if (to == JobStatus.RUNNING) ghost.startedAt = block.timestamp;
            }
            if (!isLive(ghost.status) && ghost.finalRecord == 0) {
                ghost.finalRecord = keccak256(abi.encode(grid.getJob(id)));
            }
            assertEq(uint8(statusOf(id)), uint8(ghost.status), "status after a call");
        }
        replay();
    }

    function _checkBalance(address account, uint256 initial) private view {
        assertEq(
            int256(credit.balanceOf(account) + grid.parkedOf(account)),
            int256(initial) + moved[account],
            "[2] balance and parked"
        );
        compareAccount(account);
    }

    /// @dev One to four ids, mostly of a status that the verb is for; others, repeated and unknown ones included.
    function _pick(uint256 seed, JobStatus wanted) private view returns (uint256[] memory ids) {
        uint256 count = grid.jobCount();
        ids = new uint256[](1 + seed % 4);
        for (uint256 i = 0; i < ids.length; ++i) {
            uint256 random = uint256(keccak256(abi.encode(seed, i)));
            ids[i] = random % 32 == 0 ? count + 1 + random % 7 : 1 + random % (count + 1);
            if ((random >> 64) % 4 == 0) continue;
            for (uint256 k = 0; k < count && ghosts[ids[i]].status != wanted; ++k) {
                ids[i] = 1 + (ids[i] + k) % count;
            }
        }
    }

    /// @dev The first mention of an id in a batch; a second one finds it moved.
    function _fresh(uint256[] memory ids, uint256 index) private pure returns (bool) {
        for (uint256 i = 0; i < index; ++i) {
            if (ids[i] == ids[index]) return false;
        }
        return true;
    }

    function _providerOf(uint256 jobId) private view returns (address) {
        return registry.accountOf(grid.getJob(jobId).providerId);
    }

    /// @dev Mostly the provider of the first item, so that its call has something to do.
    function _actor(uint256 who, uint256[] memory ids) private view returns (address) {
        address assigned = _providerOf(ids[0]);
        return assigned == address(0) || who % 5 == 0 ? provider(who % PROVIDERS) : assigned;
    }

    function _anyone(uint256 who) private pure returns (address) {
        address[5] memory all = [
            provider(who % PROVIDERS),
            provider(who % PROVIDERS),
            customer(who % CUSTOMERS),
            SCHEDULER,
            STRANGER
        ];
        return all[(who >> 8) % 5];
    }

    /// @dev Customers, providers, treasury: all that settlements pay.
    function _recipient(uint256 who) private pure returns (address) {
        uint256 i = who % (2 * CUSTOMERS + 1);
        if (i < CUSTOMERS) return customer(i);
        return i < 2 * CUSTOMERS ? provider(i - CUSTOMERS) : TREASURY;
    }

    function newCredit() internal override returns (Credit) {
        return new BlockingCredit(ADMIN, 0);
    }

    function _min(uint256 a, uint256 b) private pure returns (uint256) {
        return a < b ? a : b;
    }
}
