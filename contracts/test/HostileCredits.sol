// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Credit} from "../Credit.sol";

/// @title Credits that misbehave, for tests only
/// @notice Refuses to pay those that the test has blocked.
contract BlockingCredit is Credit {
    error Blocked(address account);

    mapping(address account => bool) public blocked;

    constructor(address admin, uint48 adminDelay) Credit(admin, adminDelay) {}

    function setBlocked(address account, bool value) external {
        blocked[account] = value;
    }

    function _update(address from, address to, uint256 value) internal override {
        if (blocked[to]) revert Blocked(to);
        super._update(from, to, value);
    }
}

/// @notice Says false instead of reverting, and moves nothing, for those that the test has blocked.
contract FalseCredit is Credit {
    mapping(address account => bool) public blocked;

    constructor(address admin, uint48 adminDelay) Credit(admin, adminDelay) {}

    function setBlocked(address account, bool value) external {
        blocked[account] = value;
    }

    function transfer(address to, uint256 value) public override returns (bool) {
        return blocked[to] ? false : super.transfer(to, value);
    }

    function transferFrom(address from, address to, uint256 value) public override returns (bool) {
        return blocked[from] ? false : super.transferFrom(from, to, value);
    }
}

/// @notice Moves as it should, and returns no value.
contract MuteCredit is Credit {
    constructor(address admin, uint48 adminDelay) Credit(admin, adminDelay) {}

    function transfer(address to, uint256 value) public override returns (bool) {
        super.transfer(to, value);
        assembly ("memory-safe") {
            return(0, 0)
        }
    }

    function transferFrom(address from, address to, uint256 value) public override returns (bool) {
        super.transferFrom(from, to, value);
        assembly ("memory-safe") {
            return(0, 0)
        }
    }
}

/// @notice Another number of decimals.
contract CentCredit is Credit {
    constructor(address admin, uint48 adminDelay) Credit(admin, adminDelay) {}

    function decimals() public pure override returns (uint8) {
        return 6;
    }
}

interface IHook {
    function moved() external;
}

/// @notice Calls those it moves credits from or to, as some token standards do.
contract HookedCredit is Credit {
    constructor(address admin, uint48 adminDelay) Credit(admin, adminDelay) {}

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        _tell(from);
        _tell(to);
    }

    function _tell(address account) private {
        if (account.code.length == 0) return;
        // Who does not listen is left alone.
        try IHook(account).moved() {} catch {}
    }
}

/// @notice An account with code: does what it is told, and acts again when credits reach or leave it.
contract Reenterer is IHook {
    struct Step {
        address target;
        bytes data;
    }

    Step[] private _steps;
    bool private _busy;
    bytes[] public answers;
    bool[] public successes;

    function plan(address target, bytes calldata data) external {
        _steps.push(Step(target, data));
    }

    function act(address target, bytes calldata data) external returns (bytes memory answer) {
        bool done;
        (done, answer) = target.call(data);
        if (!done) {
            assembly ("memory-safe") {
                revert(add(answer, 32), mload(answer))
            }
        }
    }

    function moved() external {
        if (_busy) return;
        _busy = true;
        for (uint256 i = 0; i < _steps.length; ++i) {
            (bool done, bytes memory answer) = _steps[i].target.call(_steps[i].data);
            successes.push(done);
            answers.push(answer);
        }
        _busy = false;
    }

    function count() external view returns (uint256) {
        return answers.length;
    }
}
