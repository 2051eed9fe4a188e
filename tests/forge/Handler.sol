// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ERC2771Forwarder} from "@openzeppelin/contracts/metatx/ERC2771Forwarder.sol";

import {Credit} from "../../contracts/Credit.sol";
import {BlockingCredit} from "../../contracts/test/HostileCredits.sol";
import {
    Assignment,
    Job,
    JobRequest,
    JobStatus,
    JobTerms,
    ProviderClock,
    ProviderLoad,
    Report
} from "../../contracts/types/JobTypes.sol";
import {Offer, Prices, Provider, ProviderStatus} from "../../contracts/types/ProviderTypes.sol";
import {Replay} from "./Replay.sol";

/// @notice Calls the grid as customers (directly and through the forwarder), providers, scheduler, strangers,
/// administrators and time.
/// @dev Before each call, independent rules predict which items change and to which status; afterwards every
/// record is compared with the prediction. No rule reads the contract's table, loads or clocks, and no revert
/// is expected without a rule.
contract Handler is Replay {
    uint256 internal constant MAX_JOBS = 48;

    struct Ghost {
        JobStatus status;
        address customer;
        uint16 providerId;
        uint8 flags;
        uint256 cpus;
        uint256 mem;
        uint256 gpus;
        uint256 limit;
        uint256 funded;
        uint256 carriedIn;
        uint256 carriedOut;
        uint256 collected;
        uint256 paid;
        uint256 fee;
        uint256 refunded;
        uint256 rate;
        uint256 feeBps;
        uint256 startedAt;
        uint256 billedUntil;
        uint256 generation;
        bytes32 finalRecord;
    }

    struct Clock {
        uint256 challengedAt;
        uint256 challengedBlock;
        uint256 answeredAt;
    }

    mapping(uint256 jobId => Ghost) internal ghosts;
    mapping(uint16 providerId => Clock) internal clocks;
    mapping(address account => int256) internal moved;
    mapping(uint256 jobId => mapping(uint16 providerId => bool)) internal barred;
    /// @notice Transitions that happened, by the new status.
    mapping(JobStatus to => uint256) public reached;
    /// @notice Interim payments, successors, answers by a transition, and forwarded calls that happened.
    uint256 public collections;
    uint256 public successors;
    uint256 public answersByMove;
    uint256 public forwardedCalls;
    // Prediction for the current call: items that must change, their new status, and for an assignment the provider.
    mapping(uint256 jobId => JobStatus) internal expected;
    mapping(uint256 jobId => uint16) internal expectedProvider;
    address internal caller;
    uint256 internal time;
    uint256 internal height;

    // ------------------------------------------------------------------- verbs

    function submitJobs(uint256 who, uint256 amount, uint256 limit, uint256 shape) external {
        shape = _mixed(shape);
        uint256 count = 1 + shape % 3;
        if (grid.jobCount() + count > MAX_JOBS) return;
        JobTerms memory terms_ = terms(
            uint96(bound(amount, amount % 4 == 0 ? 1e12 : 1e19, 1e22)),
            uint24(limit % 3 == 0 ? bound(limit, 1, 100_000) : bound(limit, 1, 1000)),
            uint16(1 + (shape >> 8) % ((shape >> 12) % 4 == 0 ? 40 : 6)),
            uint8((shape >> 16) % 6),
            uint8((shape >> 24) % 8)
        );
        terms_.gpus = uint16((shape >> 32) % 4);
        JobRequest[] memory requests = new JobRequest[](1);
        requests[0] = JobRequest(terms_, new bytes32[](count));
        for (uint256 i = 0; i < count; ++i) {
            requests[0].definitions[i] = keccak256(abi.encode(shape, i));
        }
        uint256 first = grid.jobCount() + 1;
        _begin(customer(who % CUSTOMERS));
        assertTrue(
            _byCustomer(who, abi.encodeCall(grid.submitJobs, (requests)), shape >> 40), "submission"
        );
        for (uint256 i = 0; i < count; ++i) {
            _born(ghosts[first + i], terms_);
        }
        moved[caller] -= int256(count * terms_.amount);
        _end();
    }

    function metaSchedule(uint256 seed, uint256 who) external {
        seed = _mixed(seed);
        who = _mixed(who);
        uint256[] memory ids = _pick(seed, JobStatus.PENDING);
        _begin(SCHEDULER);
        // Two groups of one provider or of two; sometimes the prices have risen since they were read.
        uint16[2] memory to = [uint16(1 + who % PROVIDERS), uint16(1 + (who >> 8) % PROVIDERS)];
        Assignment[] memory assignments = new Assignment[](2);
        uint256 movable;
        for (uint256 group = 0; group < 2; ++group) {
            uint256[] memory part = group == 0 ? ids : _pick(seed >> 32, JobStatus.PENDING);
            Prices memory seen = registry.getProvider(provider(to[group] - 1)).prices;
            uint256 lowered = (seed >> (64 + 8 * group)) % 24;
            if (lowered == 0) --seen.cpu;
            if (lowered == 1) --seen.gpu;
            if (lowered == 2) --seen.mem;
            assignments[group] = Assignment(to[group], seen, part);
            if (lowered > 2) movable += _expectAssigned(part, to[group], false);
        }
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
        uint256 movable = _expectAssigned(ids, providerId, true);
        vm.prank(caller);
        try grid.selfSchedule(ids) {
            assertGt(movable, 0, "selfSchedule applied nothing that it should");
            _answered(providerId);
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

    function claimAndStart(uint256 seed, uint256 who) external {
        _advance(seed, who, JobStatus.META_SCHEDULED, JobStatus.RUNNING);
    }

    function collect(uint256 seed, uint256 who) external {
        uint256[] memory ids = _pick(seed, JobStatus.RUNNING);
        _begin(_actor(who, ids));
        uint256 movable;
        uint256[] memory ends = new uint256[](ids.length);
        for (uint256 i = 0; i < ids.length; ++i) {
            ends[i] = grid.deadline(ids[i]);
            if (!_fresh(ids, i) || !_mayCollect(ids[i])) continue;
            _collected(ids[i]);
            ++movable;
        }
        vm.prank(caller);
        try grid.collect(ids) {
            assertGt(movable, 0, "collect applied nothing that it should");
            _answered(registry.idOf(caller));
            collections += movable;
        } catch {
            assertEq(movable, 0, "collect refused what it should do");
        }
        for (uint256 i = 0; i < ids.length; ++i) {
            assertEq(grid.deadline(ids[i]), ends[i], "an interim payment moved the end");
        }
        _end();
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
            uint256 billed = _min(_min(reported, block.timestamp - ghost.billedUntil), allotted);
            expected[ids[i]] = billed == allotted
                ? JobStatus.OUT_OF_CREDITS
                : code == 0 ? JobStatus.FINISHED : JobStatus.FAILED;
            _settle(ids[i], billed, caller);
            ++movable;
        }
        vm.prank(caller);
        try grid.finish(reports) {
            assertGt(movable, 0, "finish applied nothing that it should");
            _answered(registry.idOf(caller));
        } catch {
            assertEq(movable, 0, "finish refused what it should do");
        }
        _end();
    }

    function cancel(uint256 seed, uint256 who) external {
        seed = _mixed(seed);
        who = _mixed(who);
        if (seed % 3 != 0) return;
        uint256[] memory ids = _pick(seed, seed % 2 == 0 ? JobStatus.RUNNING : JobStatus.PENDING);
        if (who % 4 == 0) {
            _begin(_anyone(who));
            uint256 movable = _expectCancelled(ids, caller);
            vm.prank(caller);
            (bool done,) = address(grid).call(abi.encodeCall(grid.cancel, (ids)));
            assertEq(done, movable > 0, "cancel by anyone");
        } else {
            _begin(customer(who % CUSTOMERS));
            uint256 movable = _expectCancelled(ids, caller);
            bool done = _byCustomer(who, abi.encodeCall(grid.cancel, (ids)), seed >> 8);
            assertEq(done, movable > 0, "cancel by a customer");
        }
        _end();
    }

    /// @dev [17] All customers cancel through the forwarder in one transaction, except those that may not.
    function relayBatch(uint256 seed) external {
        seed = _mixed(seed);
        if (seed % 4 != 0) return;
        _begin(STRANGER);
        ERC2771Forwarder.ForwardRequestData[] memory requests =
            new ERC2771Forwarder.ForwardRequestData[](CUSTOMERS);
        for (uint256 i = 0; i < CUSTOMERS; ++i) {
            uint256[] memory ids = _pick(seed >> (8 * (i + 1)), JobStatus.RUNNING);
            requests[i] = signedByCustomer(i, abi.encodeCall(grid.cancel, (ids)));
            _expectCancelled(ids, customer(i));
        }
        vm.prank(STRANGER);
        forwarder.executeBatch(requests, payable(STRANGER));
        forwardedCalls += CUSTOMERS;
        for (uint256 i = 0; i < CUSTOMERS; ++i) {
            _assertNotReplayed(requests[i]);
        }
        _end();
    }

    function requeue(uint256 seed, uint256 who) external {
        who = _mixed(who);
        uint256[] memory ids = _pick(seed, JobStatus.SCHEDULED);
        _begin(_anyone(who));
        uint256 movable;
        bool own;
        for (uint256 i = 0; i < ids.length; ++i) {
            if (!_fresh(ids, i) || !_mayRequeue(ids[i])) continue;
            Ghost storage ghost = ghosts[ids[i]];
            expected[ids[i]] = JobStatus.PENDING;
            barred[ids[i]][ghost.providerId] = true;
            own = own || caller == _providerOf(ids[i]);
            ++movable;
        }
        vm.prank(caller);
        try grid.requeue(ids, "full") {
            assertGt(movable, 0, "requeue applied nothing that it should");
            if (own) _answered(registry.idOf(caller));
        } catch {
            assertEq(movable, 0, "requeue refused what it should do");
        }
        _end();
    }

    function panic(uint256 seed, uint256 who) external {
        seed = _mixed(seed);
        who = _mixed(who);
        uint256[] memory ids = _pick(
            seed,
            seed % 4 == 0
                ? JobStatus.SCHEDULED
                : seed % 4 == 1 ? JobStatus.META_SCHEDULED : JobStatus.RUNNING
        );
        _begin(_anyone(who));
        uint256 movable;
        bool own;
        uint256 next = grid.jobCount();
        for (uint256 i = 0; i < ids.length; ++i) {
            if (!_fresh(ids, i) || !_mayPanic(ids[i])) continue;
            expected[ids[i]] = JobStatus.PANICKED;
            own = own || caller == _providerOf(ids[i]);
            if (grid.getJob(ids[i]).retriesLeft > 0) _succeeded(ids[i], ++next);
            else _settle(ids[i], 0, caller);
            ++movable;
        }
        vm.prank(caller);
        try grid.panic(ids, "gone") {
            assertGt(movable, 0, "panic applied nothing that it should");
            if (own) _answered(registry.idOf(caller));
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
        Ghost storage ghost = ghosts[jobId];
        Clock storage clock = clocks[ghost.providerId];
        bool allowed = _isAssigned(ghost.status) && clock.challengedAt == 0
            && block.timestamp >= clock.answeredAt + RESPONSE_TIMEOUT;
        _begin(STRANGER);
        vm.prank(STRANGER);
        try grid.challenge(jobId) {
            assertTrue(allowed, "challenge accepted");
            clock.challengedAt = block.timestamp;
            clock.challengedBlock = block.number;
        } catch {
            assertFalse(allowed, "challenge refused");
        }
        _end();
    }

    function answer(uint256 who) external {
        _begin(provider(who % PROVIDERS));
        uint16 providerId = uint16(1 + who % PROVIDERS);
        bool due = clocks[providerId].challengedAt != 0;
        vm.prank(caller);
        try grid.answer() {
            assertTrue(due, "answered nothing");
            clocks[providerId] = Clock(0, 0, block.timestamp);
        } catch {
            assertFalse(due, "answer refused");
        }
        assertFalse(grid.isSilent(providerId), "silent after an answer");
        _end();
    }

    function topUp(uint256 seed, uint256 amount, uint256 who) external {
        seed = _mixed(seed);
        who = _mixed(who);
        _restoreTime();
        uint256 count = grid.jobCount();
        if (count == 0) return;
        uint256 jobId = 1 + seed % count;
        uint96 paid = uint96(bound(amount, 1, 1e21));
        address owner = grid.getJob(jobId).customer;
        address payer = who % 2 == 0 ? STRANGER : customer(who % CUSTOMERS);
        (bool allowed, uint256 limit) = _mayTopUp(jobId, paid, payer == owner);
        bytes memory data = abi.encodeCall(grid.topUp, (jobId, owner, paid));
        _begin(payer);
        bool done;
        if (payer == STRANGER) {
            vm.prank(STRANGER);
            (done,) = address(grid).call(data);
        } else {
            done = _byCustomer(who, data, seed >> 8);
        }
        assertEq(done, allowed, "top-up");
        if (done) {
            ghosts[jobId].funded += paid;
            ghosts[jobId].limit = limit;
            moved[payer] -= int256(uint256(paid));
        }
        _end();
    }

    function pass(uint256 seconds_, uint256 blocks) external {
        // Sometimes an approval runs out, or a PENDING job expires.
        if (seconds_ % 40 == 1) return _pass(366 days, 20);
        if (seconds_ % 40 == 2) return _pass(PENDING_EXPIRY, 20);
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

    /// @dev Providers become eligible more often than ineligible; otherwise jobs would soon no longer be assigned.
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

    /// @dev Most are unblocked again, so that parked sums do not stop the sequence.
    function changeBlock(uint256 who, uint256 what) external {
        _begin(ADMIN);
        BlockingCredit(address(credit)).setBlocked(_recipient(who), what % 3 == 0);
        _end();
    }

    function withdraw(uint256 who, uint256 relayed) external {
        address account = _recipient(who);
        uint256 parked = grid.parkedOf(account);
        bool allowed = parked > 0 && !BlockingCredit(address(credit)).blocked(account);
        bytes memory data = abi.encodeCall(grid.withdraw, (account));
        _begin(account);
        bool done;
        if (who % (2 * CUSTOMERS + 1) < CUSTOMERS) {
            done = _byCustomer(who % (2 * CUSTOMERS + 1), data, relayed);
        } else {
            vm.prank(account);
            (done,) = address(grid).call(data);
        }
        assertEq(done, allowed, "withdrawal");
        if (done) {
            assertEq(grid.parkedOf(account), 0, "parked after a withdrawal");
        } else {
            // Events of a reverted call are recorded too.
            vm.recordLogs();
        }
        _end();
    }

    /// @dev Every call of a stranger on jobs of others is refused.
    function intrude(uint256 seed) external {
        seed = _mixed(seed);
        uint256[] memory ids = _pick(seed, JobStatus.RUNNING);
        _begin(STRANGER);
        for (uint256 i = 0; i < ids.length; ++i) {
            // Anyone may cancel it.
            if (_isExpired(ids[i])) ids[i] = grid.jobCount() + 1;
        }
        bytes memory attempt = _attempts(ids)[seed % 10];
        vm.prank(STRANGER);
        (bool done,) = address(grid).call(attempt);
        assertFalse(done, "a stranger did something");
        _end();
    }

    /// @dev [17] A call that a provider signs for the forwarder is not the provider's own call.
    function forwardAsProvider(uint256 seed, uint256 who) external {
        seed = _mixed(seed);
        uint256[] memory ids = _pick(
            seed,
            seed % 3 == 0
                ? JobStatus.META_SCHEDULED
                : seed % 3 == 1 ? JobStatus.SCHEDULED : JobStatus.RUNNING
        );
        _begin(STRANGER);
        // A provider's `cancel` through the forwarder is that of a customer without jobs; it is left out.
        bytes memory attempt = _attempts(ids)[1 + seed % 9];
        ERC2771Forwarder.ForwardRequestData memory request =
            signedByProvider(who % PROVIDERS, attempt);
        vm.prank(STRANGER);
        try forwarder.execute(request) {
            assertTrue(false, "a provider's call was forwarded");
        } catch {}
        _end();
    }

    function _attempts(uint256[] memory ids) private view returns (bytes[10] memory) {
        Report[] memory reports = new Report[](ids.length);
        for (uint256 i = 0; i < ids.length; ++i) {
            reports[i] = Report(ids[i], 1, 0, 0, "");
        }
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = assignment(1, ids);
        return [
            abi.encodeCall(grid.cancel, (ids)),
            abi.encodeCall(grid.claim, (ids)),
            abi.encodeCall(grid.start, (ids)),
            abi.encodeCall(grid.claimAndStart, (ids)),
            abi.encodeCall(grid.collect, (ids)),
            abi.encodeCall(grid.finish, (reports)),
            abi.encodeCall(grid.selfSchedule, (ids)),
            abi.encodeCall(grid.metaSchedule, (assignments)),
            abi.encodeCall(grid.setFee, (0)),
            abi.encodeCall(grid.answer, ())
        ];
    }

    // -------------------------------------------------------------- invariants

    /// @notice All numbered invariants that hold between calls.
    function check() external view {
        uint256 escrows;
        uint256 count = grid.jobCount();
        for (uint256 id = 1; id <= count; ++id) {
            escrows += _checkJob(id);
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
        for (uint16 id = 1; id <= PROVIDERS; ++id) {
            _checkProvider(id);
        }
        compareTotals();
    }

    /// @return The escrow that the job holds.
    function _checkJob(uint256 id) private view returns (uint256) {
        Ghost storage ghost = ghosts[id];
        Job memory job = grid.getJob(id);
        bytes32 record = keccak256(abi.encode(job));
        compareJob(id, record);
        assertEq(uint8(job.status), uint8(ghost.status), "[4] status");
        assertEq(job.providerId, ghost.providerId, "[4] provider");
        assertEq(job.rate, ghost.rate, "[7] rate");
        assertEq(job.feeBps, ghost.feeBps, "[7] fee");
        assertEq(job.timeLimit, ghost.limit, "[15] limit");
        assertLe(ghost.generation, 5, "[13] retries");
        uint256 funds = ghost.funded + ghost.carriedIn;
        if (isLive(job.status)) {
            assertEq(job.escrow, funds - ghost.collected, "[2] live escrow");
            return job.escrow;
        }
        assertEq(job.escrow, ghost.paid + ghost.fee, "[2] consumed");
        assertEq(
            ghost.collected + ghost.paid + ghost.fee + ghost.refunded + ghost.carriedOut,
            funds,
            "[2] divided"
        );
        assertEq(record, ghost.finalRecord, "[4] final is frozen");
        return 0;
    }

    /// @dev Loads and clocks equal those that follow from the previous calls.
    function _checkProvider(uint16 id) private view {
        ProviderLoad memory load = grid.loadOf(id);
        (uint256 cpus, uint256 mem, uint256 gpus) = _loadOf(id);
        assertEq(load.cpus, cpus, "[16] cpus");
        assertEq(load.mem, mem, "[16] memory");
        assertEq(load.gpus, gpus, "[16] gpus");
        ProviderClock memory clock = grid.clockOf(id);
        assertEq(clock.challengedAt, clocks[id].challengedAt, "clock: challenge");
        assertEq(clock.challengedBlock, clocks[id].challengedBlock, "clock: block");
        assertEq(clock.answeredAt, clocks[id].answeredAt, "clock: answer");
    }

    /// @notice [9] Customers alone end all jobs; then no escrow and no load remains.
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
        for (uint16 id = 1; id <= PROVIDERS; ++id) {
            assertEq(
                abi.encode(grid.loadOf(id)), abi.encode(ProviderLoad(0, 0, 0)), "[16] load at last"
            );
        }
        replay();
        compareTotals();
        for (uint256 id = 1; id <= count; ++id) {
            compareJob(id, keccak256(abi.encode(grid.getJob(id))));
        }
        for (uint256 i = 0; i < 2 * CUSTOMERS + 1; ++i) {
            compareAccount(_recipient(i));
        }
    }

    // ------------------------------------------------- what calls do to the ledger

    function _born(Ghost storage ghost, JobTerms memory terms_) private {
        ghost.status = JobStatus.PENDING;
        ghost.customer = caller;
        ghost.flags = terms_.flags;
        ghost.cpus = uint256(terms_.tasks) * terms_.cpusPerTask;
        ghost.mem = ghost.cpus * terms_.memPerCpu;
        ghost.gpus = terms_.gpus;
        ghost.limit = terms_.timeLimit;
        ghost.funded = terms_.amount;
    }

    /// @dev [13] The successor of a job: its size, flags and limit, and the whole escrow.
    function _succeeded(uint256 jobId, uint256 next) private {
        Ghost storage ghost = ghosts[jobId];
        Ghost storage successor = ghosts[next];
        uint256 escrow = ghost.funded + ghost.carriedIn - ghost.collected;
        successor.status = JobStatus.PENDING;
        successor.customer = ghost.customer;
        successor.flags = ghost.flags;
        (successor.cpus, successor.mem, successor.gpus) = (ghost.cpus, ghost.mem, ghost.gpus);
        successor.limit = ghost.limit;
        successor.carriedIn = escrow;
        successor.generation = ghost.generation + 1;
        ghost.carriedOut = escrow;
        ++successors;
    }

    /// @dev Any transition of one of its jobs by the provider answers an open challenge.
    function _answered(uint16 providerId) private {
        if (clocks[providerId].challengedAt == 0) return;
        clocks[providerId] = Clock(0, 0, block.timestamp);
        ++answersByMove;
    }

    /// @dev Applies a settlement of this many seconds to the ledger.
    function _settle(uint256 jobId, uint256 billed, address payee) private {
        Ghost storage ghost = ghosts[jobId];
        uint256 escrow = ghost.funded + ghost.carriedIn - ghost.collected;
        uint256 cost = ghost.rate * billed;
        assertLe(cost, escrow, "[6] cost beyond the escrow");
        ghost.fee = cost * ghost.feeBps / 10_000;
        ghost.paid = cost - ghost.fee;
        ghost.refunded = escrow - cost;
        if (cost > 0) moved[payee] += int256(ghost.paid);
        moved[TREASURY] += int256(ghost.fee);
        moved[ghost.customer] += int256(ghost.refunded);
        _assertWithinTime(ghost, ghost.collected + cost);
    }

    function _collected(uint256 jobId) private {
        Ghost storage ghost = ghosts[jobId];
        uint256 elapsed = block.timestamp - ghost.billedUntil;
        uint256 cost = ghost.rate * elapsed;
        uint256 fee = cost * ghost.feeBps / 10_000;
        uint256 escrow = ghost.funded + ghost.carriedIn - ghost.collected;
        ghost.collected += cost;
        ghost.billedUntil = block.timestamp;
        // The seconds are subtracted; a job that runs until its credits are spent keeps its maximum price.
        if (ghost.flags & UNTIL_SPENT == 0) ghost.limit -= elapsed;
        else if (ghost.limit * (escrow - cost) < escrow) ghost.limit = 1;
        else ghost.limit = ghost.limit * (escrow - cost) / escrow;
        moved[caller] += int256(cost - fee);
        moved[TREASURY] += int256(fee);
        _assertWithinTime(ghost, ghost.collected);
    }

    /// @dev Interim payments and the settlement together.
    function _assertWithinTime(Ghost storage ghost, uint256 consumed) private view {
        assertLe(consumed, ghost.funded + ghost.carriedIn, "[6] beyond what was funded");
        if (consumed == 0) return;
        assertLe(
            consumed, ghost.rate * (block.timestamp - ghost.startedAt), "[6] beyond elapsed time"
        );
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
            : to == JobStatus.SCHEDULED
                ? abi.encodeCall(grid.claim, (ids))
                : abi.encodeCall(grid.claimAndStart, (ids));
        vm.prank(caller);
        (bool done,) = address(grid).call(data);
        assertEq(done, movable > 0, "claim or start");
        if (done) _answered(registry.idOf(caller));
        _end();
    }

    /// @dev Items of an assignment, one after the other: each adds to the load for the next one.
    function _expectAssigned(uint256[] memory ids, uint16 providerId, bool bySelf)
        private
        returns (uint256 movable)
    {
        for (uint256 i = 0; i < ids.length; ++i) {
            Ghost storage ghost = ghosts[ids[i]];
            if (expected[ids[i]] != JobStatus.NONE || ghost.status != JobStatus.PENDING) continue;
            if (bySelf) {
                if (ghost.flags & NO_SELF_SCHEDULING != 0 || barred[ids[i]][providerId]) continue;
                if (block.timestamp < grid.getJob(ids[i]).since + PENDING_TIMEOUT) continue;
            }
            if (!_mayReceive(ids[i], providerId)) continue;
            expected[ids[i]] = JobStatus.META_SCHEDULED;
            expectedProvider[ids[i]] = providerId;
            ++movable;
        }
    }

    function _expectCancelled(uint256[] memory ids, address by) private returns (uint256 movable) {
        for (uint256 i = 0; i < ids.length; ++i) {
            Ghost storage ghost = ghosts[ids[i]];
            if (expected[ids[i]] != JobStatus.NONE || !isLive(ghost.status)) continue;
            if (ghost.customer != by && !_isExpired(ids[i])) continue;
            expected[ids[i]] = JobStatus.CANCELLED;
            uint256 billed;
            if (ghost.status == JobStatus.RUNNING && !_lost(ids[i])) {
                billed = _min(block.timestamp - ghost.billedUntil, _allotment(ids[i]));
            }
            _settle(ids[i], billed, _providerOf(ids[i]));
            ++movable;
        }
    }

    /// @dev [10], [11] and [16], by the text of the protocol.
    function _mayReceive(uint256 jobId, uint16 providerId) private view returns (bool) {
        Provider memory p = registry.getProvider(provider(providerId - 1));
        if (p.status != ProviderStatus.ACTIVE || p.approvedUntil < block.timestamp) return false;
        if (_unansweredFor(providerId, RESPONSE_TIMEOUT)) return false;
        Job memory job = grid.getJob(jobId);
        for (uint256 id = job.retryOf; id != 0; id = grid.getJob(id).retryOf) {
            if (grid.getJob(id).providerId == providerId) return false;
        }
        uint256 byCpu = p.hardware.cpusPerNode / job.cpusPerTask;
        uint256 byMem = p.hardware.memPerNode / (uint256(job.cpusPerTask) * job.memPerCpu);
        if (job.tasks > p.hardware.nodes * _min(byCpu, byMem)) return false;
        if (!_fitsBesideTheLoad(ghosts[jobId], providerId, p.offer)) return false;
        return _affordable(ghosts[jobId], job, p.prices);
    }

    function _fitsBesideTheLoad(Ghost storage ghost, uint16 providerId, Offer memory offer)
        private
        view
        returns (bool)
    {
        (uint256 cpus, uint256 mem, uint256 gpus) = _loadOf(providerId);
        return cpus + ghost.cpus <= offer.cpus && mem + ghost.mem <= offer.mem
            && gpus + ghost.gpus <= offer.gpus;
    }

    function _affordable(Ghost storage ghost, Job memory job, Prices memory prices_)
        private
        view
        returns (bool)
    {
        uint256 rate =
            ghost.cpus * prices_.cpu + ghost.gpus * prices_.gpu + ghost.mem * prices_.mem;
        return rate > 0 && rate < 2 ** 72 && rate * ghost.limit <= job.escrow;
    }

    /// @dev [16] The sum over a provider's live assigned jobs, including those that the current call assigns.
    function _loadOf(uint16 providerId)
        private
        view
        returns (uint256 cpus, uint256 mem, uint256 gpus)
    {
        uint256 count = grid.jobCount();
        for (uint256 id = 1; id <= count; ++id) {
            Ghost storage ghost = ghosts[id];
            bool has = _isAssigned(ghost.status) && ghost.providerId == providerId;
            if (!has && expectedProvider[id] != providerId) continue;
            cpus += ghost.cpus;
            mem += ghost.mem;
            gpus += ghost.gpus;
        }
    }

    function _mayCollect(uint256 jobId) private view returns (bool) {
        Ghost storage ghost = ghosts[jobId];
        if (ghost.status != JobStatus.RUNNING || _providerOf(jobId) != caller) return false;
        if (ghost.flags & INTERIM_PAYMENTS == 0) return false;
        uint256 elapsed = block.timestamp - ghost.billedUntil;
        return elapsed >= COLLECT_INTERVAL && elapsed < _allotment(jobId) && !_lost(jobId);
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
        return _unansweredFor(job.providerId, RESPONSE_TIMEOUT)
            || registry.statusOf(assigned) == ProviderStatus.BANNED;
    }

    function _mayPanic(uint256 jobId) private view returns (bool) {
        JobStatus status = ghosts[jobId].status;
        if (!_isAssigned(status)) return false;
        return caller == _providerOf(jobId) || (status == JobStatus.RUNNING && _lost(jobId));
    }

    /// @return allowed Whether the amount is accepted.
    /// @return limit The limit afterwards: only the customer's own payment extends it.
    function _mayTopUp(uint256 jobId, uint256 amount, bool own)
        private
        view
        returns (bool allowed, uint256 limit)
    {
        Ghost storage ghost = ghosts[jobId];
        allowed = isLive(ghost.status) && amount >= ghost.rate * 60;
        if (ghost.status == JobStatus.RUNNING) {
            allowed =
                allowed && block.timestamp + TOP_UP_NOTICE < ghost.billedUntil + _allotment(jobId);
        }
        limit = ghost.limit;
        if (own && ghost.rate > 0 && ghost.flags & UNTIL_SPENT == 0) limit += amount / ghost.rate;
        allowed = allowed && limit <= type(uint24).max;
    }

    function _isExpired(uint256 jobId) private view returns (bool) {
        return ghosts[jobId].status == JobStatus.PENDING
            && block.timestamp >= grid.getJob(jobId).since + PENDING_EXPIRY;
    }

    function _isAssigned(JobStatus status) private pure returns (bool) {
        return isLive(status) && status != JobStatus.PENDING;
    }

    function _unansweredFor(uint16 providerId, uint256 timeout) private view returns (bool) {
        Clock storage clock = clocks[providerId];
        return clock.challengedAt != 0 && block.timestamp > clock.challengedAt + timeout
            && block.number > clock.challengedBlock + RESPONSE_BLOCKS;
    }

    function _lost(uint256 jobId) private view returns (bool) {
        Ghost storage ghost = ghosts[jobId];
        return _unansweredFor(ghost.providerId, LOST_TIMEOUT)
            || block.timestamp > ghost.billedUntil + _allotment(jobId) + REPORT_GRACE;
    }

    function _allotment(uint256 jobId) private view returns (uint256) {
        Ghost storage ghost = ghosts[jobId];
        uint256 escrow = ghost.funded + ghost.carriedIn - ghost.collected;
        return ghost.flags & UNTIL_SPENT != 0 ? escrow / ghost.rate : ghost.limit;
    }

    // ------------------------------------------------------------------ helpers

    function _pass(uint256 seconds_, uint256 blocks) private {
        time = (time == 0 ? block.timestamp : time) + seconds_;
        height = (height == 0 ? block.number : height) + blocks;
        _restoreTime();
    }

    /// @dev The fuzzer may not keep a warp from one call to the next.
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

    /// @dev The ledger now has the predicted state; `check` compares it with every record, so that
    /// nothing else may have changed ([4], [5], [12], [15]).
    function _end() private {
        uint256 count = grid.jobCount();
        for (uint256 id = 1; id <= count; ++id) {
            JobStatus to = expected[id];
            if (to != JobStatus.NONE) _follow(id, to);
        }
        replay();
    }

    function _follow(uint256 id, JobStatus to) private {
        Ghost storage ghost = ghosts[id];
        Job memory job = grid.getJob(id);
        ghost.status = to;
        ++reached[to];
        assertEq(job.since, block.timestamp, "time of the transition");
        if (to == JobStatus.META_SCHEDULED) {
            ghost.providerId = expectedProvider[id];
            ghost.rate = job.rate;
            ghost.feeBps = job.feeBps;
            assertEq(job.feeBps, grid.feeBps(), "fee at assignment");
        } else if (to == JobStatus.PENDING) {
            (ghost.providerId, ghost.rate, ghost.feeBps) = (0, 0, 0);
        } else if (to == JobStatus.RUNNING) {
            ghost.startedAt = block.timestamp;
            ghost.billedUntil = block.timestamp;
        } else if (!isLive(to)) {
            ghost.finalRecord = keccak256(abi.encode(job));
        }
        delete expected[id];
        delete expectedProvider[id];
    }

    function _checkBalance(address account, uint256 initial) private view {
        assertEq(
            int256(credit.balanceOf(account) + grid.parkedOf(account)),
            int256(initial) + moved[account],
            "[2] balance and parked"
        );
        compareAccount(account);
    }

    /// @dev One to four ids, mostly of a suitable status, but also others, repeated and unknown ones.
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

    /// @dev The fuzzer prefers small numbers, whose higher bits are zero.
    function _mixed(uint256 seed) private pure returns (uint256) {
        return uint256(keccak256(abi.encode(seed)));
    }

    /// @dev The first occurrence of an ID in a batch; at the second one the job has already changed.
    function _fresh(uint256[] memory ids, uint256 index) private pure returns (bool) {
        for (uint256 i = 0; i < index; ++i) {
            if (ids[i] == ids[index]) return false;
        }
        return true;
    }

    function _providerOf(uint256 jobId) private view returns (address) {
        return registry.accountOf(grid.getJob(jobId).providerId);
    }

    /// @dev Mostly the provider of the first item, so that its call has an effect.
    function _actor(uint256 who, uint256[] memory ids) private view returns (address) {
        address assigned = _providerOf(ids[0]);
        return assigned == address(0) || who % 5 == 0 ? provider(who % PROVIDERS) : assigned;
    }

    /// @dev A customer's call, directly or through the forwarder, which must have the same effect, once ([17]).
    function _byCustomer(uint256 who, bytes memory data, uint256 relayed)
        private
        returns (bool done)
    {
        if (relayed % 2 == 0) {
            vm.prank(customer(who % CUSTOMERS));
            (done,) = address(grid).call(data);
            return done;
        }
        ERC2771Forwarder.ForwardRequestData memory request = signedByCustomer(who % CUSTOMERS, data);
        vm.prank(STRANGER);
        try forwarder.execute(request) {
            done = true;
            ++forwardedCalls;
            _assertNotReplayed(request);
        } catch {}
    }

    function _assertNotReplayed(ERC2771Forwarder.ForwardRequestData memory request) private {
        vm.prank(STRANGER);
        try forwarder.execute(request) {
            assertTrue(false, "[17] a request was executed twice");
        } catch {}
    }

    function _anyone(uint256 who) private view returns (address) {
        address[5] memory all = [
            provider(who % PROVIDERS),
            provider(who % PROVIDERS),
            customer(who % CUSTOMERS),
            SCHEDULER,
            STRANGER
        ];
        return all[(who >> 8) % 5];
    }

    /// @dev Customers, providers, treasury: all recipients of settlements.
    function _recipient(uint256 who) private view returns (address) {
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
