// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ERC2771Forwarder} from "@openzeppelin/contracts/metatx/ERC2771Forwarder.sol";
import {Test} from "forge-std/Test.sol";

import {IMetaScheduler} from "../../contracts/interfaces/IMetaScheduler.sol";
import {Credit} from "../../contracts/Credit.sol";
import {MetaScheduler} from "../../contracts/MetaScheduler.sol";
import {ProviderRegistry} from "../../contracts/ProviderRegistry.sol";
import {
    Assignment,
    Job,
    JobRequest,
    JobStatus,
    JobTerms,
    Objective,
    Permit,
    Report,
    Timeouts
} from "../../contracts/types/JobTypes.sol";
import {Hardware, Offer, Prices} from "../../contracts/types/ProviderTypes.sol";

/// @notice A deployed grid with its actors, for all forge tests.
abstract contract GridTest is Test {
    address internal constant ADMIN = address(0xA0);
    address internal constant SCHEDULER = address(0xA1);
    address internal constant TREASURY = address(0xA2);
    address internal constant STRANGER = address(0xA3);
    uint256 internal constant CUSTOMERS = 3;
    uint256 internal constant PROVIDERS = 3;
    uint32 internal constant CLAIM_TIMEOUT = 300;
    uint32 internal constant PENDING_TIMEOUT = 600;
    uint32 internal constant PENDING_EXPIRY = 7 days;
    uint32 internal constant RESPONSE_TIMEOUT = 120;
    uint32 internal constant RESPONSE_BLOCKS = 5;
    uint32 internal constant LOST_TIMEOUT = 900;
    uint32 internal constant REPORT_GRACE = 1 hours;
    uint32 internal constant TOP_UP_NOTICE = 60;
    uint32 internal constant COLLECT_INTERVAL = 30;
    uint8 internal constant UNTIL_SPENT = 1;
    uint8 internal constant NO_SELF_SCHEDULING = 2;
    uint8 internal constant INTERIM_PAYMENTS = 4;
    uint8 internal constant SUCCESSOR = 128;
    uint256 internal constant FUNDS = 1e30;
    // Rate of `plain` jobs at provider(0): 4 CPUs and 1,024 MB.
    uint96 internal constant AMOUNT = 1e15;
    uint24 internal constant LIMIT = 100;
    uint256 internal constant RATE = 5.024e12;

    /// @dev Terms as the fuzzer generates them: without the enum, because it does not know its range.
    struct Shape {
        uint96 amount;
        uint24 timeLimit;
        uint16 tasks;
        uint16 cpusPerTask;
        uint24 memPerCpu;
        uint16 gpus;
        uint8 retries;
        uint8 flags;
        uint8 objective;
    }

    // Customers, then providers; more providers than are registered at first.
    address[CUSTOMERS + 2 * PROVIDERS] private _accounts;
    Credit internal credit;
    ProviderRegistry internal registry;
    MetaScheduler internal grid;
    ERC2771Forwarder internal forwarder;

    function setUp() public virtual {
        for (uint256 i = 0; i < _accounts.length; ++i) {
            _accounts[i] = vm.addr(_key(i));
        }
        vm.warp(1_767_225_600);
        vm.roll(1000);
        vm.startPrank(ADMIN);
        credit = newCredit();
        registry = new ProviderRegistry(ADMIN, 0, 365 days);
        forwarder = new ERC2771Forwarder("DeepSquare");
        grid = deployGrid(address(credit));
        credit.grantRole(credit.MINTER_ROLE(), ADMIN);
        registry.grantRole(registry.APPROVER_ROLE(), ADMIN);
        grid.grantRole(grid.METASCHEDULER_ROLE(), SCHEDULER);
        for (uint256 i = 0; i < CUSTOMERS; ++i) {
            credit.mint(customer(i), FUNDS);
        }
        credit.mint(STRANGER, FUNDS);
        vm.stopPrank();
        for (uint256 i = 0; i < CUSTOMERS; ++i) {
            vm.prank(customer(i));
            credit.approve(address(grid), type(uint256).max);
        }
        vm.prank(STRANGER);
        credit.approve(address(grid), type(uint256).max);
        for (uint256 i = 0; i < PROVIDERS; ++i) {
            register(provider(i), prices(uint64(1e12 * (i + 1))));
        }
    }

    /// @dev Overridden by tests of hostile tokens.
    function newCredit() internal virtual returns (Credit) {
        return new Credit(ADMIN, 0);
    }

    function deployGrid(address token) internal returns (MetaScheduler) {
        return new MetaScheduler(
            ADMIN,
            0,
            Credit(token),
            registry,
            TREASURY,
            address(forwarder),
            500,
            Timeouts(
                CLAIM_TIMEOUT,
                PENDING_TIMEOUT,
                PENDING_EXPIRY,
                RESPONSE_TIMEOUT,
                RESPONSE_BLOCKS,
                LOST_TIMEOUT,
                REPORT_GRACE,
                TOP_UP_NOTICE,
                COLLECT_INTERVAL
            )
        );
    }

    function register(address who, Prices memory prices_) internal {
        register(who, prices_, Hardware(4, 16, 65_536, 2));
    }

    function register(address who, Prices memory prices_, Hardware memory hardware) internal {
        string[] memory labels = new string[](1);
        labels[0] = "region=eu";
        vm.prank(who);
        uint32 version = registry.register(hardware, prices_, labels);
        vm.prank(ADMIN);
        registry.approve(who, version);
    }

    function customer(uint256 i) internal view returns (address) {
        return _accounts[i];
    }

    /// @dev Ids follow registration: provider(i) has id i + 1.
    function provider(uint256 i) internal view returns (address) {
        return _accounts[CUSTOMERS + i];
    }

    /// @dev Key of an account that can sign: customers first, then providers.
    function _key(uint256 account) private pure returns (uint256) {
        return 0xC0FFEE + account;
    }

    function prices(uint64 cpu) internal pure returns (Prices memory) {
        return Prices(cpu, cpu * 50, cpu / 1000);
    }

    function terms(uint96 amount, uint24 limit, uint16 tasks, uint8 retries, uint8 flags)
        internal
        pure
        returns (JobTerms memory)
    {
        return JobTerms(
            amount, limit, tasks, 2, 256, 0, retries, flags, Objective.COST, "job", "region=eu"
        );
    }

    function spend(bool untilSpent) internal pure returns (uint8) {
        return untilSpent ? UNTIL_SPENT : 0;
    }

    /// @dev At the provider's current prices.
    function assignment(uint16 providerId, uint256[] memory jobIds)
        internal
        pure
        returns (Assignment memory)
    {
        uint64 any = type(uint64).max;
        return Assignment(providerId, Prices(any, any, any), jobIds);
    }

    function submit(address who, JobTerms memory terms_) internal returns (uint256) {
        JobRequest[] memory requests = new JobRequest[](1);
        requests[0] = JobRequest(terms_, new bytes32[](1));
        requests[0].definitions[0] = keccak256(abi.encode(who, grid.jobCount()));
        vm.prank(who);
        return grid.submitJobs(requests);
    }

    function assign(uint256 jobId, uint16 providerId) internal {
        Assignment[] memory assignments = new Assignment[](1);
        assignments[0] = assignment(providerId, one(jobId));
        vm.prank(SCHEDULER);
        grid.metaSchedule(assignments);
    }

    /// @dev A job of customer(0) at provider(0), brought to a live status.
    function jobIn(JobStatus status, JobTerms memory terms_) internal returns (uint256 jobId) {
        jobId = submit(customer(0), terms_);
        if (status == JobStatus.PENDING) return jobId;
        assign(jobId, 1);
        if (status == JobStatus.META_SCHEDULED) return jobId;
        vm.prank(provider(0));
        grid.claim(one(jobId));
        if (status == JobStatus.SCHEDULED) return jobId;
        vm.prank(provider(0));
        grid.start(one(jobId));
    }

    function plain() internal pure returns (JobTerms memory) {
        return terms(AMOUNT, LIMIT, 2, 0, 0);
    }

    function retried(uint8 retries) internal pure returns (JobTerms memory) {
        return terms(AMOUNT, LIMIT, 2, retries, 0);
    }

    function shaped(Shape memory s) internal pure returns (JobTerms memory) {
        return JobTerms(
            s.amount,
            s.timeLimit,
            s.tasks,
            s.cpusPerTask,
            s.memPerCpu,
            s.gpus,
            s.retries % 6,
            s.flags % 8,
            Objective(s.objective % 3),
            "name",
            "gpu.model=h100"
        );
    }

    /// @dev A plain job of any status; NONE gives an unused ID.
    function jobAt(JobStatus status) internal returns (uint256 jobId) {
        if (status == JobStatus.NONE) return grid.jobCount() + 1;
        if (isLive(status)) return jobIn(status, plain());
        jobId = jobIn(JobStatus.RUNNING, plain());
        if (status == JobStatus.CANCELLED) {
            vm.prank(customer(0));
            grid.cancel(one(jobId));
        } else if (status == JobStatus.PANICKED) {
            vm.prank(provider(0));
            grid.panic(one(jobId), "gone");
        } else {
            bool spent = status == JobStatus.OUT_OF_CREDITS;
            skip(spent ? LIMIT : 10);
            finish(jobId, spent ? LIMIT : 10, status == JobStatus.FAILED ? int32(1) : int32(0));
        }
    }

    /// @dev Challenges the provider of a live job, and advances past the response timeout.
    function silence(uint256 jobId) internal {
        _unanswered(jobId, RESPONSE_TIMEOUT);
    }

    /// @dev Challenges the provider of a live job until its runs are lost.
    function lose(uint256 jobId) internal {
        _unanswered(jobId, LOST_TIMEOUT);
    }

    function _unanswered(uint256 jobId, uint256 timeout) private {
        vm.prank(STRANGER);
        grid.challenge(jobId);
        skip(timeout + 1);
        vm.roll(vm.getBlockNumber() + RESPONSE_BLOCKS + 1);
    }

    /// @dev Advances until a run is overdue.
    function overdue() internal {
        skip(LIMIT + REPORT_GRACE + 1);
    }

    function finish(uint256 jobId, uint32 used, int32 code) internal {
        Report[] memory reports = new Report[](1);
        reports[0] = Report(jobId, used, code, 0, "exited");
        vm.prank(provider(0));
        grid.finish(reports);
    }

    /// @dev A customer without an allowance, and its permit for the grid.
    function signed(uint256 value) internal returns (address owner, Permit memory permit) {
        uint256 key;
        (owner, key) = makeAddrAndKey("signer");
        vm.prank(customer(2));
        credit.transfer(owner, FUNDS);
        permit = _permit(owner, key, value);
    }

    /// @dev A customer's permit for the grid.
    function permitOf(uint256 i, uint256 value) internal view returns (Permit memory) {
        return _permit(customer(i), _key(i), value);
    }

    function _permit(address owner, uint256 key, uint256 value)
        private
        view
        returns (Permit memory permit)
    {
        permit.value = value;
        permit.deadline = block.timestamp;
        bytes32 typehash = keccak256(
            "Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"
        );
        bytes32 content =
            keccak256(abi.encode(typehash, owner, address(grid), value, 0, permit.deadline));
        bytes32 digest = keccak256(abi.encodePacked("\x19\x01", credit.DOMAIN_SEPARATOR(), content));
        (permit.v, permit.r, permit.s) = vm.sign(key, digest);
    }

    /// @dev A call of the meta-scheduler that a customer signed for the forwarder.
    function signedByCustomer(uint256 i, bytes memory data)
        internal
        view
        returns (ERC2771Forwarder.ForwardRequestData memory)
    {
        return _signedRequest(i, data);
    }

    /// @dev A call of the meta-scheduler that a provider signed for the forwarder.
    function signedByProvider(uint256 i, bytes memory data)
        internal
        view
        returns (ERC2771Forwarder.ForwardRequestData memory)
    {
        return _signedRequest(CUSTOMERS + i, data);
    }

    function _signedRequest(uint256 account, bytes memory data)
        private
        view
        returns (ERC2771Forwarder.ForwardRequestData memory request)
    {
        request.from = _accounts[account];
        request.to = address(grid);
        request.gas = 10_000_000;
        request.deadline = uint48(vm.getBlockTimestamp());
        request.data = data;
        bytes32 content = keccak256(
            abi.encode(
                keccak256(
                    "ForwardRequest(address from,address to,uint256 value,uint256 gas,uint256 nonce,uint48 deadline,bytes data)"
                ),
                request.from,
                request.to,
                0,
                request.gas,
                forwarder.nonces(request.from),
                request.deadline,
                keccak256(data)
            )
        );
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(
            _key(account), keccak256(abi.encodePacked("\x19\x01", _forwarderDomain(), content))
        );
        request.signature = abi.encodePacked(r, s, v);
    }

    function _forwarderDomain() private view returns (bytes32) {
        return keccak256(
            abi.encode(
                keccak256(
                    "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
                ),
                keccak256("DeepSquare"),
                keccak256("1"),
                block.chainid,
                address(forwarder)
            )
        );
    }

    function one(uint256 jobId) internal pure returns (uint256[] memory ids) {
        ids = new uint256[](1);
        ids[0] = jobId;
    }

    function pair(uint256 a, uint256 b) internal pure returns (uint256[] memory list) {
        list = new uint256[](2);
        (list[0], list[1]) = (a, b);
    }

    function triple(uint256 a, uint256 b, uint256 c) internal pure returns (uint256[] memory list) {
        list = new uint256[](3);
        (list[0], list[1], list[2]) = (a, b, c);
    }

    function four(uint256 a, uint256 b, uint256 c, uint256 d)
        internal
        pure
        returns (uint256[] memory list)
    {
        list = new uint256[](4);
        (list[0], list[1], list[2], list[3]) = (a, b, c, d);
    }

    /// @dev A running job of customer(1) at provider(1), unrelated to provider(0).
    function foreignRun() internal returns (uint256) {
        return foreignRunOf(customer(1));
    }

    /// @dev A running job at provider(1), whose prices are twice those of provider(0).
    function foreignRunOf(address owner) internal returns (uint256 jobId) {
        jobId = submit(owner, terms(2 * AMOUNT, LIMIT, 2, 0, 0));
        assign(jobId, 2);
        vm.startPrank(provider(1));
        grid.claim(one(jobId));
        grid.start(one(jobId));
        vm.stopPrank();
    }

    /// @dev The next call must revert with a per-item error.
    function refuses(bytes4 reason, uint256 jobId) internal {
        vm.expectRevert(abi.encodeWithSelector(reason, jobId));
    }

    /// @dev The next call must skip an item and continue.
    function skips(uint256 jobId, JobStatus status, bytes4 reason) internal {
        vm.expectEmit(address(grid));
        emit IMetaScheduler.TransitionSkipped(jobId, status, reason);
    }

    /// @dev `who` is refused for a job of every status that is not in `allowed` (one bit per status).
    function refusedByTable(
        address who,
        function(uint256) view returns (bytes memory) encode,
        JobStatus to,
        uint256 allowed
    ) internal {
        for (uint8 i = 0; i <= uint8(JobStatus.PANICKED); ++i) {
            if ((allowed >> i) & 1 == 1) continue;
            uint256 jobId = jobAt(JobStatus(i));
            bytes memory data = encode(jobId);
            vm.prank(who);
            (bool done, bytes memory answer) = address(grid).call(data);
            assertFalse(done, "applied from a status outside the table");
            assertEq(
                answer,
                abi.encodeWithSelector(
                    IMetaScheduler.InvalidTransition.selector, jobId, JobStatus(i), to
                )
            );
        }
    }

    function bit(JobStatus status) internal pure returns (uint256) {
        return 1 << uint8(status);
    }

    function statusOf(uint256 jobId) internal view returns (JobStatus) {
        return grid.getJob(jobId).status;
    }

    function isLive(JobStatus status) internal pure returns (bool) {
        return status >= JobStatus.PENDING && status <= JobStatus.RUNNING;
    }
}
