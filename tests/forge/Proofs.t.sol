// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Test} from "forge-std/Test.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {MetaScheduler} from "../../contracts/MetaScheduler.sol";
import {IProviderRegistry} from "../../contracts/interfaces/IProviderRegistry.sol";
import {Billing} from "../../contracts/libraries/Billing.sol";
import {Capacity, Tariff} from "../../contracts/libraries/Capacity.sol";
import {JobLifecycle} from "../../contracts/libraries/JobLifecycle.sol";
import {JobRecord, TermsWord, StateWord} from "../../contracts/libraries/JobRecord.sol";
import {
    Assignment,
    Job,
    JobStatus,
    ProviderLoad,
    Report,
    Timeouts
} from "../../contracts/types/JobTypes.sol";
import {Prices, ProviderStatus} from "../../contracts/types/ProviderTypes.sol";

/// @dev halmos's own cheat codes.
interface Symbolic {
    function enableSymbolicStorage(address account) external;
}

/// @dev Pays like an honest token, and records the sums.
contract TokenStub {
    uint256 public sent;
    mapping(address to => uint256) public received;

    function decimals() external pure returns (uint8) {
        return 18;
    }

    function transfer(address to, uint256 amount) external returns (bool) {
        sent += amount;
        received[to] += amount;
        return true;
    }

    function transferFrom(address, address, uint256) external pure returns (bool) {
        return true;
    }
}

/// @dev Returns any value about a provider.
contract RegistryStub {
    ProviderStatus public status;
    Capacity public capacity;
    Tariff public tariff;
    address public account;
    uint16 public id;

    function accountOf(uint16) external view returns (address) {
        return account;
    }

    function idOf(address) external view returns (uint16) {
        return id;
    }

    function statusOf(address) external view returns (ProviderStatus) {
        return status;
    }

    function capacityOf(address) external view returns (Capacity, Tariff) {
        return (capacity, tariff);
    }
}

/// @dev Has code, as a forwarder must; the proofs call in its name.
contract ForwarderStub {}

/// @notice Proofs of halmos for every value (`make prove`): one function each, from arbitrary storage.
/// @dev forge compiles these and runs none of them. Reverting paths are excluded; halmos reports
/// an error if no other path remains.
contract ProofsTest is Test {
    Symbolic internal constant SYMBOLIC = Symbolic(0xF3993A62377BCd56AE39D773740A5390411E8BC9);
    address internal constant ADMIN = address(0xA0);
    address internal constant TREASURY = address(0xA2);
    uint256 internal constant JOB = 7;
    uint256 internal constant CLAIM_TIMEOUT = 300;
    uint256 internal constant PENDING_TIMEOUT = 600;
    uint256 internal constant PENDING_EXPIRY = 7 days;
    uint256 internal constant COLLECT_INTERVAL = 30;

    MetaScheduler internal grid;
    TokenStub internal token;
    RegistryStub internal registry;
    address internal forwarder;

    function setUp() public {
        vm.warp(1_767_225_600);
        vm.roll(1000);
        token = new TokenStub();
        registry = new RegistryStub();
        forwarder = address(new ForwarderStub());
        grid = new MetaScheduler(
            ADMIN,
            0,
            IERC20(address(token)),
            IProviderRegistry(address(registry)),
            TREASURY,
            forwarder,
            500,
            Timeouts(300, 600, 7 days, 120, 5, 900, 1 hours, 60, 30)
        );
    }

    // --------------------------------------------------------------- the table

    function check_the_table_is_the_protocols(uint8 from, uint8 to) public pure {
        vm.assume(from < 10 && to < 10);
        assert(JobLifecycle.canTransition(JobStatus(from), JobStatus(to)) == _isAllowed(from, to));
    }

    function check_nothing_leads_out_of_a_final_status(uint8 from, uint8 to) public pure {
        vm.assume(from > 4 && from < 10 && to < 10);
        assert(!JobLifecycle.canTransition(JobStatus(from), JobStatus(to)));
        assert(!JobLifecycle.isLive(JobStatus(from)));
    }

    /// @dev The protocol's transitions again, by comparison instead of a bitmap.
    function _isAllowed(uint256 from, uint256 to) private pure returns (bool) {
        if (from == 0) return to == 1;
        if (from == 1) return to == 2 || to == 5;
        if (from == 2) return to == 3 || to == 5 || to == 9 || to == 1;
        if (from == 3) return to == 4 || to == 5 || to == 9 || to == 1;
        if (from == 4) return to > 4;
        return false;
    }

    // -------------------------------------------------------------- the record

    function check_a_transition_changes_status_and_time_alone(uint256 word, uint8 to) public view {
        vm.assume(to < 10);
        uint256 got = StateWord.unwrap(StateWord.wrap(word).moved(JobStatus(to)));
        uint256 mask = uint256(type(uint40).max) << 160;
        assert(got & ~mask == word & ~mask);
        assert(uint8(got >> 160) == to && uint32(got >> 168) == uint32(block.timestamp));
    }

    function check_a_provider_changes_its_id_alone(uint256 word, uint16 id) public pure {
        uint256 got = StateWord.unwrap(StateWord.wrap(word).withProvider(id));
        uint256 mask = uint256(type(uint16).max) << 200;
        assert(got & ~mask == word & ~mask && uint16(got >> 200) == id);
    }

    function check_a_successor_is_PENDING_with_one_retry_less(uint256 word) public view {
        StateWord before = StateWord.wrap(word);
        vm.assume(before.retriesLeft() > 0);
        StateWord got = before.succeeded();
        assert(got.status() == JobStatus.PENDING && got.providerId() == 0);
        assert(got.retriesLeft() == before.retriesLeft() - 1 && got.isSuccessor());
        assert(got.customer() == before.customer() && got.memPerCpu() == before.memPerCpu());
        assert(got.flags() == before.flags() | 128 && got.since() == block.timestamp);
    }

    function check_an_escrow_changes_itself_alone(uint256 word, uint96 amount) public pure {
        uint256 got = TermsWord.unwrap(TermsWord.wrap(word).withEscrow(amount));
        assert(got >> 96 == word >> 96 && uint96(got) == amount);
    }

    function check_a_limit_changes_itself_alone(uint256 word, uint24 limit) public pure {
        uint256 got = TermsWord.unwrap(TermsWord.wrap(word).withTimeLimit(limit));
        uint256 mask = uint256(type(uint24).max) << 168;
        assert(got & ~mask == word & ~mask && uint24(got >> 168) == limit);
    }

    function check_a_price_changes_rate_and_fee_alone(uint256 word, uint72 rate, uint16 fee)
        public
        pure
    {
        uint256 got = TermsWord.unwrap(TermsWord.wrap(word).withPrice(rate, fee));
        uint256 mask = (uint256(type(uint72).max) << 96) | (uint256(type(uint16).max) << 240);
        assert(got & ~mask == word & ~mask);
        assert(uint72(got >> 96) == rate && uint16(got >> 240) == fee);
    }

    // ----------------------------------------------------------------- billing

    function check_a_fee_is_within_its_share(uint96 cost, uint16 bps) public pure {
        vm.assume(bps <= 2000);
        uint256 fee = Billing.feeOf(cost, bps);
        assert(fee <= cost);
    }

    function check_an_allotment_without_a_rate_is_zero(bool spent, uint24 limit, uint96 escrow)
        public
        pure
    {
        assert(Billing.allotment(spent, limit, escrow, 0) == 0);
    }

    // -------------------------------------------------- one verb on any storage

    /// @dev Any storage whose record has a status of the enum and a time that has passed.
    function _any() private returns (Job memory job) {
        SYMBOLIC.enableSymbolicStorage(address(grid));
        SYMBOLIC.enableSymbolicStorage(address(registry));
        job = grid.getJob(JOB);
        vm.assume(job.since <= block.timestamp);
        vm.assume(job.retriesLeft <= 5 && job.feeBps <= 2000);
        // Ids begin at one, and an assigned job has a provider.
        vm.assume(job.providerId != 0 || job.status < JobStatus.META_SCHEDULED);
    }

    /// @dev Arithmetic that only the fuzzer tests: the cost of an allotment is within the escrow, because the limit
    /// was affordable at the assignment, and top-ups and interim payments preserve that.
    /// Assumed after the call, so that the solver does not multiply at each branch within it.
    function _affordable(Job memory job, uint256 reported, uint256 allotted) private view {
        uint256 billed = block.timestamp - job.since;
        if (reported < billed) billed = reported;
        if (billed >= allotted) billed = allotted;
        uint256 cost = uint256(job.rate) * billed;
        vm.assume(cost <= job.escrow);
        // As `check_a_fee_is_within_its_share` proves.
        vm.assume(Billing.feeOf(cost, job.feeBps) <= cost);
    }

    function _ids() private pure returns (uint256[] memory ids) {
        ids = new uint256[](1);
        ids[0] = JOB;
    }

    /// @dev Any caller except the forwarder, whose calls name their signer.
    function _call(address caller, bytes memory data) private returns (bool done) {
        vm.assume(caller != forwarder);
        vm.prank(caller);
        (done,) = address(grid).call(data);
    }

    /// @dev Size, owner, definition and limits of the record are unchanged.
    function _sameTerms(Job memory a, Job memory b) private pure {
        assert(a.customer == b.customer && a.definition == b.definition);
        assert(a.tasks == b.tasks && a.cpusPerTask == b.cpusPerTask && a.gpus == b.gpus);
        assert(a.memPerCpu == b.memPerCpu && a.timeLimit == b.timeLimit);
        assert(a.flags == b.flags && a.retriesLeft == b.retriesLeft);
    }

    function _samePrice(Job memory a, Job memory b) private pure {
        assert(a.rate == b.rate && a.feeBps == b.feeBps && a.providerId == b.providerId);
    }

    function _forward(address signer, bytes memory data) private returns (bool done) {
        vm.prank(forwarder);
        (done,) = address(grid).call(abi.encodePacked(data, signer));
    }

    /// @dev The resources of a job, which are within the load of its provider: invariant 16.
    function _withinLoad(Job memory job) private view returns (uint256 cpus, uint256 mem) {
        cpus = uint256(job.tasks) * job.cpusPerTask;
        mem = cpus * job.memPerCpu;
        ProviderLoad memory load = grid.loadOf(job.providerId);
        vm.assume(cpus <= load.cpus && mem <= load.mem && job.gpus <= load.gpus);
    }

    function check_claim_is_the_providers_step_from_META_SCHEDULED(address caller) public {
        Job memory a = _any();
        vm.assume(_call(caller, abi.encodeCall(grid.claim, (_ids()))));
        Job memory b = grid.getJob(JOB);
        assert(a.status == JobStatus.META_SCHEDULED && b.status == JobStatus.SCHEDULED);
        assert(grid.clockOf(a.providerId).account == caller);
        assert(grid.clockOf(a.providerId).challengedAt == 0);
        _sameTerms(a, b);
        _samePrice(a, b);
        assert(a.escrow == b.escrow && token.sent() == 0);
    }

    function check_claimAndStart_is_both_steps_from_META_SCHEDULED(address caller) public {
        Job memory a = _any();
        vm.assume(_call(caller, abi.encodeCall(grid.claimAndStart, (_ids()))));
        Job memory b = grid.getJob(JOB);
        assert(a.status == JobStatus.META_SCHEDULED && b.status == JobStatus.RUNNING);
        assert(grid.clockOf(a.providerId).account == caller && b.since == block.timestamp);
        assert(grid.clockOf(a.providerId).challengedAt == 0);
        _sameTerms(a, b);
        _samePrice(a, b);
        assert(a.escrow == b.escrow && token.sent() == 0);
    }

    function check_collect_bills_the_elapsed_time_of_a_run_that_allows_it(address caller) public {
        Job memory a = _any();
        // The limit of a job that runs until its credits are spent is a quotient, which only the fuzzer tests.
        vm.assume(a.flags & 1 == 0);
        bool lost = grid.isLost(JOB);
        ProviderLoad memory load = grid.loadOf(a.providerId);
        vm.assume(_call(caller, abi.encodeCall(grid.collect, (_ids()))));
        Job memory b = grid.getJob(JOB);
        assert(a.status == JobStatus.RUNNING && b.status == JobStatus.RUNNING && !lost);
        assert(grid.clockOf(a.providerId).account == caller && a.flags & 4 != 0);
        uint256 elapsed = block.timestamp - a.since;
        unchecked {
            // As `check_a_fee_is_within_its_share` proves.
            uint256 cost = uint256(a.rate) * elapsed;
            vm.assume(Billing.feeOf(cost, a.feeBps) <= cost);
        }
        assert(elapsed >= COLLECT_INTERVAL && b.since == block.timestamp);
        assert(token.sent() == uint256(a.rate) * elapsed);
        assert(a.escrow == token.sent() + b.escrow);
        assert(token.received(caller) + token.received(TREASURY) >= token.sent());
        assert(b.timeLimit > 0 && a.timeLimit == elapsed + b.timeLimit);
        a.timeLimit = b.timeLimit;
        _sameTerms(a, b);
        _samePrice(a, b);
        ProviderLoad memory same = grid.loadOf(a.providerId);
        assert(same.cpus == load.cpus && same.mem == load.mem && same.gpus == load.gpus);
    }

    function check_start_is_the_providers_step_from_SCHEDULED(address caller) public {
        Job memory a = _any();
        vm.assume(_call(caller, abi.encodeCall(grid.start, (_ids()))));
        Job memory b = grid.getJob(JOB);
        assert(a.status == JobStatus.SCHEDULED && b.status == JobStatus.RUNNING);
        assert(grid.clockOf(a.providerId).account == caller && b.since == block.timestamp);
        _sameTerms(a, b);
        _samePrice(a, b);
        assert(a.escrow == b.escrow && token.sent() == 0);
    }

    function check_requeue_moves_no_money_and_clears_the_price(address caller) public {
        Job memory a = _any();
        bool silent = grid.isSilent(a.providerId);
        bool role = grid.hasRole(grid.METASCHEDULER_ROLE(), caller);
        vm.assume(_call(caller, abi.encodeCall(grid.requeue, (_ids(), ""))));
        Job memory b = grid.getJob(JOB);
        assert(a.status == JobStatus.META_SCHEDULED || a.status == JobStatus.SCHEDULED);
        assert(b.status == JobStatus.PENDING && b.providerId == 0);
        assert(b.rate == 0 && b.feeBps == 0 && a.escrow == b.escrow && token.sent() == 0);
        _sameTerms(a, b);
        bool late = block.timestamp > uint256(a.since) + CLAIM_TIMEOUT;
        bool party = caller == grid.clockOf(a.providerId).account;
        if (a.status == JobStatus.META_SCHEDULED) assert(party || late);
        if (a.status == JobStatus.SCHEDULED) {
            assert(
                party || (late && (caller == a.customer || role)) || silent
                    || registry.status() == ProviderStatus.BANNED
            );
        }
    }

    function check_metaSchedule_is_the_schedulers_and_within_the_budget(
        address caller,
        uint16 providerId,
        Prices memory prices
    ) public {
        Job memory a = _any();
        // The chain of predecessors is a loop, which only the fuzzer tests.
        vm.assume(a.retryOf == 0);
        vm.assume(a.tasks > 0 && a.cpusPerTask > 0 && a.memPerCpu > 0);
        bool role = grid.hasRole(grid.METASCHEDULER_ROLE(), caller);
        bool silent = grid.isSilent(providerId);
        uint16 fee = grid.feeBps();
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = Assignment(providerId, prices, _ids());
        vm.assume(_call(caller, abi.encodeCall(grid.metaSchedule, (assignments))));
        Job memory b = grid.getJob(JOB);
        assert(role && !silent && a.status == JobStatus.PENDING);
        assert(b.status == JobStatus.META_SCHEDULED && b.providerId == providerId);
        assert(uint256(b.rate) * b.timeLimit <= b.escrow);
        assert(b.feeBps == fee && b.rate > 0 && a.escrow == b.escrow && token.sent() == 0);
        (, Tariff tariff) = registry.capacityOf(address(0));
        Capacity capacity = registry.capacity();
        assert(capacity.statusOf(tariff) == ProviderStatus.ACTIVE);
        assert(capacity.approvedUntil() >= block.timestamp);
        assert(tariff.cpuPrice() <= prices.cpu && tariff.gpuPrice() <= prices.gpu);
        assert(tariff.memPrice() <= prices.mem);
        _sameTerms(a, b);
    }

    function check_selfSchedule_is_not_of_a_job_that_forbids_it(address caller) public {
        Job memory a = _any();
        vm.assume(a.retryOf == 0 && a.tasks > 0 && a.cpusPerTask > 0 && a.memPerCpu > 0);
        vm.assume(_call(caller, abi.encodeCall(grid.selfSchedule, (_ids()))));
        Job memory b = grid.getJob(JOB);
        assert(a.status == JobStatus.PENDING && b.status == JobStatus.META_SCHEDULED);
        assert(a.flags & 2 == 0 && block.timestamp >= uint256(a.since) + PENDING_TIMEOUT);
        assert(b.providerId == registry.id() && !grid.isBarred(JOB, b.providerId));
        _sameTerms(a, b);
    }

    // ------------------------------------------------------- load conservation

    function check_an_assignment_adds_its_size_within_the_offer(uint16 providerId) public {
        Job memory a = _any();
        vm.assume(a.retryOf == 0 && a.tasks > 0 && a.cpusPerTask > 0 && a.memPerCpu > 0);
        ProviderLoad memory load = grid.loadOf(providerId);
        Assignment[] memory assignments = new Assignment[](1);
        uint64 any = type(uint64).max;
        assignments[0] = Assignment(providerId, Prices(any, any, any), _ids());
        vm.assume(_call(address(0xA1), abi.encodeCall(grid.metaSchedule, (assignments))));
        ProviderLoad memory got = grid.loadOf(providerId);
        Capacity capacity = registry.capacity();
        uint256 cpus;
        unchecked {
            cpus = uint256(a.tasks) * a.cpusPerTask;
            uint256 memPerTask = uint256(a.cpusPerTask) * a.memPerCpu;
            // True for any three factors; stated here because the solvers do not find it.
            vm.assume(uint256(a.tasks) * memPerTask == cpus * a.memPerCpu);
        }
        assert(got.cpus == load.cpus + cpus && got.cpus <= capacity.offeredCpus());
        assert(got.mem == load.mem + cpus * a.memPerCpu && got.mem <= capacity.offeredMem());
        assert(got.gpus == uint256(load.gpus) + a.gpus && got.gpus <= capacity.offeredGpus());
    }

    function _frees(address caller, bytes memory data) private {
        Job memory a = _any();
        vm.assume(a.providerId != 0);
        (uint256 cpus, uint256 mem) = _withinLoad(a);
        ProviderLoad memory load = grid.loadOf(a.providerId);
        bool assigned = a.status != JobStatus.PENDING;
        vm.assume(_call(caller, data));
        ProviderLoad memory got = grid.loadOf(a.providerId);
        if (assigned) {
            assert(got.cpus == load.cpus - cpus && got.mem == load.mem - mem);
            assert(got.gpus == load.gpus - a.gpus);
        } else {
            assert(got.cpus == load.cpus && got.mem == load.mem && got.gpus == load.gpus);
        }
    }

    function check_a_requeue_frees_what_the_job_held(address caller) public {
        _frees(caller, abi.encodeCall(grid.requeue, (_ids(), "")));
    }

    function check_a_panic_frees_what_the_job_held(address caller) public {
        _frees(caller, abi.encodeCall(grid.panic, (_ids(), "")));
    }

    function check_a_cancel_frees_what_the_job_held(address caller) public {
        _frees(caller, abi.encodeCall(grid.cancel, (_ids())));
    }

    function check_a_finish_frees_what_the_job_held(address caller, uint32 used) public {
        Report[] memory reports = new Report[](1);
        reports[0] = Report(JOB, used, 0, 0, 0);
        _frees(caller, abi.encodeCall(grid.finish, (reports)));
    }

    function check_panic_is_the_providers_or_of_a_lost_run(address caller) public {
        Job memory a = _any();
        bool lost = grid.isLost(JOB);
        uint256 count = grid.jobCount();
        vm.assume(_call(caller, abi.encodeCall(grid.panic, (_ids(), ""))));
        Job memory b = grid.getJob(JOB);
        assert(b.status == JobStatus.PANICKED && b.escrow == 0);
        assert(
            a.status == JobStatus.META_SCHEDULED || a.status == JobStatus.SCHEDULED
                || a.status == JobStatus.RUNNING
        );
        assert(caller == grid.clockOf(a.providerId).account || lost);
        _sameTerms(a, b);
        _samePrice(a, b);
        if (a.retriesLeft > 0) {
            Job memory next = grid.getJob(count + 1);
            assert(next.escrow == a.escrow && next.status == JobStatus.PENDING);
            assert(next.retriesLeft == a.retriesLeft - 1 && next.customer == a.customer);
            assert(next.retryOf == JOB && next.rate == 0 && token.sent() == 0);
        } else {
            assert(token.sent() == a.escrow && token.received(a.customer) == a.escrow);
            assert(grid.jobCount() == count);
        }
    }

    function check_finish_is_the_providers_and_divides_the_escrow(
        address caller,
        uint32 used,
        int32 code
    ) public {
        Job memory a = _any();
        uint256 allotted = grid.allotment(JOB);
        Report[] memory reports = new Report[](1);
        reports[0] = Report(JOB, used, code, 0, 0);
        vm.assume(_call(caller, abi.encodeCall(grid.finish, (reports))));
        _affordable(a, used, allotted);
        Job memory b = grid.getJob(JOB);
        assert(a.status == JobStatus.RUNNING);
        assert(grid.clockOf(a.providerId).account == caller);
        assert(
            b.status == JobStatus.FINISHED || b.status == JobStatus.FAILED
                || b.status == JobStatus.OUT_OF_CREDITS
        );
        if (b.status == JobStatus.FINISHED) assert(code == 0);
        if (b.status == JobStatus.FAILED) assert(code != 0);
        assert(token.sent() == a.escrow && b.escrow <= a.escrow);
        _sameTerms(a, b);
        _samePrice(a, b);
    }

    function check_cancel_is_the_customers_and_divides_the_escrow(address caller) public {
        Job memory a = _any();
        uint256 allotted = grid.allotment(JOB);
        bool lost = grid.isLost(JOB);
        vm.assume(_call(caller, abi.encodeCall(grid.cancel, (_ids()))));
        if (a.status == JobStatus.RUNNING && !lost) _affordable(a, type(uint256).max, allotted);
        Job memory b = grid.getJob(JOB);
        bool expired =
            a.status == JobStatus.PENDING && block.timestamp >= uint256(a.since) + PENDING_EXPIRY;
        assert((caller == a.customer || expired) && b.status == JobStatus.CANCELLED);
        assert(JobLifecycle.isLive(a.status));
        assert(token.sent() == a.escrow && b.escrow <= a.escrow);
        if (a.status != JobStatus.RUNNING || lost) assert(token.received(a.customer) == a.escrow);
        _sameTerms(a, b);
        _samePrice(a, b);
    }

    function check_a_forwarded_cancel_is_the_signers(address signer) public {
        Job memory a = _any();
        // The bill of a run is that of the direct call.
        vm.assume(a.status != JobStatus.RUNNING);
        vm.assume(_forward(signer, abi.encodeCall(grid.cancel, (_ids()))));
        bool expired =
            a.status == JobStatus.PENDING && block.timestamp >= uint256(a.since) + PENDING_EXPIRY;
        assert(signer == a.customer || expired);
        assert(grid.getJob(JOB).status == JobStatus.CANCELLED && token.sent() == a.escrow);
    }

    /// @dev The forwarder's own address is the caller then, which has neither provider nor role.
    function check_a_forwarded_providers_call_is_not_the_signers(address signer, uint8 verb)
        public
    {
        Job memory a = _any();
        vm.assume(verb < 6 && grid.clockOf(a.providerId).account != forwarder);
        bytes memory data;
        Report[] memory reports = new Report[](1);
        reports[0] = Report(JOB, 1, 0, 0, 0);
        if (verb == 0) data = abi.encodeCall(grid.claim, (_ids()));
        else if (verb == 1) data = abi.encodeCall(grid.start, (_ids()));
        else if (verb == 2) data = abi.encodeCall(grid.claimAndStart, (_ids()));
        else if (verb == 3) data = abi.encodeCall(grid.collect, (_ids()));
        else if (verb == 4) data = abi.encodeCall(grid.finish, (reports));
        else data = abi.encodeCall(grid.setFee, (1));
        vm.assume(!grid.hasRole(0, forwarder));
        assert(!_forward(signer, data));
    }

    function check_topUp_raises_the_escrow_by_the_amount(address caller, uint96 amount) public {
        Job memory a = _any();
        vm.assume(_call(caller, abi.encodeCall(grid.topUp, (JOB, a.customer, amount))));
        Job memory b = grid.getJob(JOB);
        assert(JobLifecycle.isLive(a.status) && b.status == a.status && b.since == a.since);
        assert(b.escrow == uint256(a.escrow) + amount && b.timeLimit >= a.timeLimit);
        if (caller != a.customer || a.flags & 1 != 0) assert(b.timeLimit == a.timeLimit);
        assert(a.customer == b.customer && token.sent() == 0);
        _samePrice(a, b);
    }

    function check_a_final_record_stands_whatever_is_called(address caller, uint8 verb) public {
        Job memory a = _any();
        vm.assume(a.status > JobStatus.RUNNING && verb < 9);
        Report[] memory reports = new Report[](1);
        reports[0] = Report(JOB, 1, 0, 0, 0);
        bytes memory data;
        if (verb == 0) data = abi.encodeCall(grid.claim, (_ids()));
        else if (verb == 1) data = abi.encodeCall(grid.start, (_ids()));
        else if (verb == 2) data = abi.encodeCall(grid.cancel, (_ids()));
        else if (verb == 3) data = abi.encodeCall(grid.requeue, (_ids(), ""));
        else if (verb == 4) data = abi.encodeCall(grid.panic, (_ids(), ""));
        else if (verb == 5) data = abi.encodeCall(grid.selfSchedule, (_ids()));
        else if (verb == 6) data = abi.encodeCall(grid.claimAndStart, (_ids()));
        else if (verb == 7) data = abi.encodeCall(grid.collect, (_ids()));
        else data = abi.encodeCall(grid.finish, (reports));
        assert(!_call(caller, data));
    }
}
