// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Test, console} from "forge-std/Test.sol";

import {JobStatus} from "../../contracts/types/JobTypes.sol";
import {Handler} from "./Handler.sol";

/// @notice The numbered invariants of contracts/README.md in one combined check, draining included.
contract InvariantsTest is Test {
    Handler internal handler;

    function setUp() public {
        handler = new Handler();
        handler.setUp();
        bytes4[] memory verbs = new bytes4[](34);
        verbs[0] = Handler.submitJobs.selector;
        verbs[1] = Handler.metaSchedule.selector;
        verbs[2] = Handler.metaSchedule.selector;
        verbs[3] = Handler.selfSchedule.selector;
        verbs[4] = Handler.claim.selector;
        verbs[5] = Handler.claim.selector;
        verbs[6] = Handler.start.selector;
        verbs[7] = Handler.start.selector;
        verbs[8] = Handler.finish.selector;
        verbs[9] = Handler.cancel.selector;
        verbs[10] = Handler.requeue.selector;
        verbs[11] = Handler.panic.selector;
        verbs[12] = Handler.challenge.selector;
        verbs[13] = Handler.answer.selector;
        verbs[14] = Handler.topUp.selector;
        verbs[15] = Handler.pass.selector;
        verbs[16] = Handler.tick.selector;
        verbs[17] = Handler.changePrices.selector;
        verbs[18] = Handler.changeOffer.selector;
        verbs[19] = Handler.changeStanding.selector;
        verbs[20] = Handler.changeFee.selector;
        verbs[21] = Handler.intrude.selector;
        verbs[22] = Handler.renew.selector;
        verbs[23] = Handler.changeBlock.selector;
        verbs[24] = Handler.withdraw.selector;
        verbs[25] = Handler.claimAndStart.selector;
        verbs[26] = Handler.claimAndStart.selector;
        verbs[27] = Handler.collect.selector;
        verbs[28] = Handler.relayBatch.selector;
        verbs[29] = Handler.forwardAsProvider.selector;
        verbs[30] = Handler.metaSchedule.selector;
        verbs[31] = Handler.collect.selector;
        verbs[32] = Handler.tick.selector;
        verbs[33] = Handler.submitJobs.selector;
        targetSelector(FuzzSelector({addr: address(handler), selectors: verbs}));
        targetContract(address(handler));
    }

    function invariant_the_numbered_promises_hold() public view {
        handler.check();
    }

    function afterInvariant() public {
        handler.drain();
        if (!vm.envOr("REACHED", false)) return;
        for (uint8 i = uint8(JobStatus.META_SCHEDULED); i <= uint8(JobStatus.PANICKED); ++i) {
            console.log(i, handler.reached(JobStatus(i)));
        }
        console.log("interim payments", handler.collections());
        console.log("successors", handler.successors());
        console.log("answers by a move", handler.answersByMove());
        console.log("forwarded calls", handler.forwardedCalls());
    }
}
