"""Compare our parser of sign-in messages (EIP-4361) with siwe-py, which has a separate environment.

    python scripts/siwe_oracle.py --oracle .venv-siwe/bin/python [--count 200] [--seed 1] [--json]

Random messages are tested, valid ones and ones with one change. Both parsers must accept all valid
messages, and ours must not accept any that siwe-py refuses. Messages that only ours refuses are
counted, because it may be stricter. Exits with 1 if a message violates these rules.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from eth_account import Account
from eth_account.messages import encode_defunct

_WORDS = ("a.test", "gateway.test:8549", "127.0.0.1:8549", "x-y.example.org", "localhost")
_STATEMENT = "Sign in to the gateway. This moves no credits and costs no gas."


def main() -> int:
    """Generate messages, verify them with both parsers, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--oracle", type=Path, help="Python in which siwe is installed.")
    parser.add_argument(
        "--verify", action="store_true", help="Verify messages of standard input with siwe."
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.verify:
        print(json.dumps([_siwe(*case) for case in json.load(sys.stdin)]))
        return 0
    if options.oracle is None:
        parser.error("--oracle is required; `make siwe` passes it")
    cases = _cases(random.Random(options.seed), options.count)  # noqa: S311 - no secrets
    result = subprocess.run(
        [str(options.oracle), __file__, "--verify"],
        input=json.dumps([case[:2] for case in cases]),
        capture_output=True,
        text=True,
        check=True,
    )
    return _report(cases, json.loads(result.stdout), as_json=options.json)


def _report(cases: list[tuple[str, str, bool]], siwe_verdicts: list[bool], *, as_json: bool) -> int:
    own_verdicts = [_own(text, signature) for text, signature, _ in cases]
    verdicts = list(zip(cases, own_verdicts, siwe_verdicts, strict=True))
    wrong = [
        {"text": text, "valid": valid, "ours": own_verdict, "siwe": siwe_verdict}
        for (text, _, valid), own_verdict, siwe_verdict in verdicts
        if (own_verdict and not siwe_verdict) or (valid and not (own_verdict and siwe_verdict))
    ]
    results = {
        "messages": len(cases),
        "accepted_by_both": sum(
            1 for _, own_verdict, siwe_verdict in verdicts if own_verdict and siwe_verdict
        ),
        "refused_by_both": sum(
            1 for _, own_verdict, siwe_verdict in verdicts if not own_verdict and not siwe_verdict
        ),
        "refused_here_only": sum(
            1 for _, own_verdict, siwe_verdict in verdicts if siwe_verdict and not own_verdict
        ),
        "disagreements": wrong,
    }
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        for name, value in results.items():
            print(f"{name:<20}{value if name != 'disagreements' else len(value)}")
        for disagreement in wrong[:5]:
            print(json.dumps(disagreement))
    return 1 if wrong else 0


def _cases(chance: random.Random, count: int) -> list[tuple[str, str, bool]]:
    """Return messages with their signatures, and whether they are valid."""
    cases = []
    for number in range(count):
        account = Account.from_key(chance.randbytes(32))
        text, valid = _message(chance, account.address, number), True
        if chance.random() < 0.6:
            changed = _changed(chance, text)
            text, valid = changed, changed == text
        signature = bytes(account.sign_message(encode_defunct(text=text)).signature)
        if chance.random() < 0.15:
            at = chance.randrange(64)
            signature = signature[:at] + bytes([signature[at] ^ 1]) + signature[at + 1 :]
            valid = False
        cases.append((text, "0x" + signature.hex(), valid))
    return cases


def _message(chance: random.Random, address: str, number: int) -> str:
    lines = [
        f"{chance.choice(_WORDS)} wants you to sign in with your Ethereum account:",
        address,
        "",
    ]
    if chance.random() < 0.7:
        lines.append(_STATEMENT)
    lines += [
        "",
        f"URI: http://{chance.choice(_WORDS)}/v1/sign-in",
        "Version: 1",
        f"Chain ID: {chance.choice((1, 1337, 84532))}",
        f"Nonce: n{number:08d}{chance.randrange(10**9)}",
        "Issued At: 2026-11-27T12:00:00Z",
    ]
    if chance.random() < 0.7:
        lines.append("Expiration Time: 2099-01-01T00:00:00Z")
    if chance.random() < 0.3:
        lines.append("Not Before: 2020-01-01T00:00:00Z")
    if chance.random() < 0.3:
        lines.append(f"Request ID: r{number}")
    if chance.random() < 0.7:
        lines.append("Resources:")
        lines += [f"- https://{chance.choice(_WORDS)}/v1/jobs/{n}" for n in range(number % 3 + 1)]
    return "\n".join(lines)


def _changed(chance: random.Random, text: str) -> str:
    """Return the text with one change."""
    lines = text.split("\n")
    at = chance.randrange(len(lines))
    place = chance.randrange(len(text))
    match chance.randrange(7):
        case 0:
            lines.pop(at)
        case 1:
            lines.insert(at, chance.choice(["", " ", "x", "Version: 2", lines[at]]))
        case 2:
            other = chance.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            return text[:place] + chance.choice("\n \t-é\x00aZ0:/") + text[place + 1 :]
        case 4:
            return text[:place] + text[place + 1 :]
        case 5:
            lines[at] = lines[at].swapcase()
        case _:
            return text + chance.choice(["\n", " ", "\n- ", "\nResources:", "\n\n"])
    return "\n".join(lines)


def _own(text: str, signature: str) -> bool:
    # The environment of siwe-py does not have these modules.
    from deepsquare_chain.chain.sign_in import SignInMessage, signer_of  # noqa: PLC0415
    from deepsquare_chain.errors import UsageError  # noqa: PLC0415

    try:
        message = SignInMessage.parse(text)
    except UsageError:
        return False
    return signer_of(encode_defunct(text=text), bytes.fromhex(signature[2:])) == message.address


def _siwe(text: str, signature: str) -> bool:
    siwe: Any = __import__("siwe")
    try:
        siwe.SiweMessage.from_message(message=text).verify(signature)
    except Exception:  # noqa: BLE001 - it raises errors of several libraries
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
