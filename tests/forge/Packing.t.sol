// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Test} from "forge-std/Test.sol";

import {Capacity, Tariff} from "../../contracts/libraries/Capacity.sol";
import {JobRecord, TermsWord, StateWord} from "../../contracts/libraries/JobRecord.sol";
import {Load, LoadWord} from "../../contracts/libraries/Load.sol";
import {JobStatus, JobTerms} from "../../contracts/types/JobTypes.sol";
import {ProviderStatus} from "../../contracts/types/ProviderTypes.sol";

/// @notice The packed words of a record: each writer changes its own fields to any value, and no other bit.
contract PackingTest is Test {
    function _moves(StateWord m) private pure returns (uint256[8] memory) {
        return [
            uint256(uint160(m.customer())),
            uint256(m.status()),
            m.since(),
            m.providerId(),
            m.memPerCpu(),
            m.retriesLeft(),
            m.flags() & 127,
            m.isSuccessor() ? 1 : 0
        ];
    }

    function _money(TermsWord m) private pure returns (uint256[7] memory) {
        return
            [m.escrow(), m.rate(), m.timeLimit(), m.tasks(), m.cpusPerTask(), m.gpus(), m.feeBps()];
    }

    /// @dev A word with a status of the enum, as every stored one has.
    function _clean(uint256 word) private pure returns (StateWord) {
        uint256 status = (word >> 160) % 10;
        return StateWord.wrap((word & ~(uint256(0xff) << 160)) | (status << 160));
    }

    function newState(address owner, JobTerms calldata terms) external view returns (StateWord) {
        return JobRecord.newState(owner, terms);
    }

    function newTerms(JobTerms calldata terms) external pure returns (TermsWord) {
        return JobRecord.newTerms(terms);
    }

    function testFuzz_a_transition_changes_status_and_time(uint256 word, uint8 to, uint32 time)
        public
    {
        to = to % 10;
        vm.warp(time);
        StateWord before = _clean(word);
        uint256[8] memory expected = _moves(before);
        (expected[1], expected[2]) = (to, time);
        StateWord got = before.moved(JobStatus(to));
        assertEq(abi.encode(_moves(got)), abi.encode(expected));
        assertEq(StateWord.unwrap(got) >> 200, StateWord.unwrap(before) >> 200);
    }

    function testFuzz_a_provider_changes_its_id_alone(uint256 word, uint16 id) public pure {
        StateWord before = _clean(word);
        uint256[8] memory expected = _moves(before);
        expected[3] = id;
        assertEq(abi.encode(_moves(before.withProvider(id))), abi.encode(expected));
    }

    function testFuzz_a_successor_is_PENDING_with_one_retry_less(uint256 word, uint8 retries)
        public
    {
        vm.assume(retries > 0);
        vm.warp(5);
        StateWord before = _clean((word & ~(uint256(0xff) << 240)) | (uint256(retries) << 240));
        uint256[8] memory expected = _moves(before);
        (expected[1], expected[2], expected[3]) = (1, 5, 0);
        (expected[5], expected[7]) = (retries - 1, 1);
        assertEq(abi.encode(_moves(before.succeeded())), abi.encode(expected));
    }

    function testFuzz_an_interim_payment_changes_the_time_alone(uint256 word, uint32 time) public {
        vm.warp(time);
        StateWord before = _clean(word);
        uint256[8] memory expected = _moves(before);
        expected[2] = time;
        assertEq(abi.encode(_moves(before.billedUntilNow())), abi.encode(expected));
    }

    function testFuzz_flags_are_told_apart(uint256 word) public pure {
        StateWord s = StateWord.wrap(word);
        uint256 flags = word >> 248;
        assertEq(s.flags(), flags);
        assertEq(s.untilSpent(), flags & 1 == 1);
        assertEq(s.forbidsSelfScheduling(), flags & 2 == 2);
        assertEq(s.allowsInterimPayments(), flags & 4 == 4);
        assertEq(s.isSuccessor(), flags & 128 == 128);
    }

    function testFuzz_loads_add_and_subtract_field_by_field(
        uint32[2] memory cpus,
        uint48[2] memory mem,
        uint32[2] memory gpus
    ) public pure {
        // The sum of all assigned jobs, which fits an offer.
        (cpus[0], cpus[1]) = (cpus[0] / 2, cpus[1] / 2);
        (mem[0], mem[1]) = (mem[0] / 2, mem[1] / 2);
        (gpus[0], gpus[1]) = (gpus[0] / 2, gpus[1] / 2);
        Load a = LoadWord.pack(cpus[0], mem[0], gpus[0]);
        Load b = LoadWord.pack(cpus[1], mem[1], gpus[1]);
        assertEq(a.plus(b).cpus(), uint256(cpus[0]) + cpus[1]);
        assertEq(a.plus(b).mem(), uint256(mem[0]) + mem[1]);
        assertEq(a.plus(b).gpus(), uint256(gpus[0]) + gpus[1]);
        assertEq(Load.unwrap(a.plus(b).minus(b)), Load.unwrap(a));
    }

    function testFuzz_the_load_of_a_record_is_its_size(uint256 state, uint256 terms) public pure {
        Load l = TermsWord.wrap(terms).load(StateWord.wrap(state));
        uint256 cpus = TermsWord.wrap(terms).tasks() * TermsWord.wrap(terms).cpusPerTask();
        assertEq(l.cpus(), cpus);
        // An assigned job was within an offer of 48 bits.
        vm.assume(cpus * StateWord.wrap(state).memPerCpu() < 2 ** 48);
        assertEq(l.mem(), cpus * StateWord.wrap(state).memPerCpu());
        assertEq(l.gpus(), TermsWord.wrap(terms).gpus());
    }

    function testFuzz_an_escrow_changes_itself_alone(uint256 word, uint96 amount) public pure {
        uint256[7] memory expected = _money(TermsWord.wrap(word));
        expected[0] = amount;
        assertEq(abi.encode(_money(TermsWord.wrap(word).withEscrow(amount))), abi.encode(expected));
    }

    function testFuzz_a_limit_changes_itself_alone(uint256 word, uint24 limit) public pure {
        uint256[7] memory expected = _money(TermsWord.wrap(word));
        expected[2] = limit;
        assertEq(
            abi.encode(_money(TermsWord.wrap(word).withTimeLimit(limit))), abi.encode(expected)
        );
    }

    function testFuzz_a_price_changes_rate_and_fee_alone(uint256 word, uint72 rate, uint16 fee)
        public
        pure
    {
        uint256[7] memory expected = _money(TermsWord.wrap(word));
        (expected[1], expected[6]) = (rate, fee);
        assertEq(
            abi.encode(_money(TermsWord.wrap(word).withPrice(rate, fee))), abi.encode(expected)
        );
    }

    function test_every_field_at_its_bounds() public view {
        _checkNew(0);
        _checkNew(type(uint256).max);
    }

    function testFuzz_a_provider_stands_by_its_versions(uint32 version, uint32 pending, uint8 flags)
        public
        pure
    {
        Tariff t = Tariff.wrap((uint256(version) << 192) | (uint256(pending) << 224));
        Capacity c = Capacity.wrap(uint256(flags & 1) << 240);
        ProviderStatus expected = flags & 1 == 1 ? ProviderStatus.DRAINING : ProviderStatus.ACTIVE;
        if (version == 0) expected = ProviderStatus.WAITING_APPROVAL;
        if (version == 0 && pending == 0) expected = ProviderStatus.NONE;
        assertEq(uint8(c.statusOf(t)), uint8(expected));
    }

    function test_a_version_of_any_width_is_one() public pure {
        for (uint256 i = 0; i < 32; ++i) {
            Tariff t = Tariff.wrap(1 << (192 + i));
            assertEq(uint8(Capacity.wrap(0).statusOf(t)), uint8(ProviderStatus.ACTIVE));
        }
    }

    function _checkNew(uint256 bits) private view {
        JobTerms memory t;
        t.amount = uint96(bits);
        t.timeLimit = uint24(bits);
        t.tasks = uint16(bits);
        t.cpusPerTask = uint16(bits);
        t.memPerCpu = uint24(bits);
        t.gpus = uint16(bits);
        t.retries = uint8(bits);
        t.flags = uint8(bits) & 7;
        address owner = address(uint160(bits));
        uint256[8] memory moves =
            [uint160(bits), 1, block.timestamp, 0, uint24(bits), uint8(bits), uint8(bits) & 7, 0];
        assertEq(abi.encode(_moves(this.newState(owner, t))), abi.encode(moves));
        uint256[7] memory money =
            [uint256(uint96(bits)), 0, uint24(bits), uint16(bits), uint16(bits), uint16(bits), 0];
        assertEq(abi.encode(_money(this.newTerms(t))), abi.encode(money));
    }
}
