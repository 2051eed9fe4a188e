"""EIP-4361 messages: examples of the EIP, invalid messages, and signatures of contracts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct
from hypothesis import given
from hypothesis import strategies as st
from web3.exceptions import ContractLogicError

from deepsquare_chain.chain.sign_in import (
    SignInMessage,
    is_signed_by,
    rfc3339,
    seconds_of,
    signer_of,
)
from deepsquare_chain.errors import UsageError

OWNER = Account.from_key(b"\x31" * 32)
# The example of EIP-4361, and the same without its optional parts.
EXAMPLE = """\
example.com wants you to sign in with your Ethereum account:
0xC02aaA39b223FE8D0A0e5C4F27eAD9083C756Cc2

I accept the ExampleOrg Terms of Service: https://example.com/tos

URI: https://example.com/login
Version: 1
Chain ID: 1
Nonce: 32891756
Issued At: 2021-09-30T16:25:24Z
Resources:
- ipfs://bafybeiemxf5abjwjbikoz4mc3a3dla6ual3jsgpdr4cjr3oz3evfyavhwq/
- https://example.com/my-web2-claim.json"""
BARE = """\
https://example.com:3388 wants you to sign in with your Ethereum account:
0xC02aaA39b223FE8D0A0e5C4F27eAD9083C756Cc2


URI: https://example.com/login
Version: 1
Chain ID: 1
Nonce: 32891756
Issued At: 2021-09-30T16:25:24Z"""


def test_the_example_of_the_eip_is_read_and_written() -> None:
    result = SignInMessage.parse(EXAMPLE)
    assert result.text() == EXAMPLE
    assert (result.domain, result.chain_id, result.nonce) == ("example.com", 1, "32891756")
    assert result.statement.endswith("https://example.com/tos")
    assert result.resources[1] == "https://example.com/my-web2-claim.json"
    assert (result.expiration_time, result.request_id) == ("", None)


def test_a_message_without_optional_parts() -> None:
    result = SignInMessage.parse(BARE)
    assert (result.scheme, result.domain, result.statement) == ("https", "example.com:3388", "")
    assert result.text() == BARE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Version: 1", "Version: 2"),
        ("Chain ID: 1", "Chain ID: 01"),
        ("Chain ID: 1", "Chain ID: one"),
        ("Nonce: 32891756", "Nonce: 3289175"),
        ("Nonce: 32891756", "Nonce: 3289 1756"),
        ("0xC02aaA39", "0xc02aaa39"),
        ("09-30T", "13-30T"),
        ("16:25:24Z", "16:25:24"),
        ("example.com wants", "exam ple.com wants"),
        ("sign in with", "sign  in with"),
        ("URI: https://example.com/login", "URI: nowhere"),
        ("\nVersion", "\n\nVersion"),
        ("Terms of", "Terms\nof"),
        ("Terms of", "Terms ö of"),
        ("\n", "\r\n"),
        ("my-web2-claim.json", "my-web2-claim.json\n"),
        ("- ipfs://", "ipfs://"),
        ("Issued At: 2021-09-30T16:25:24Z", "Expiration Time: 2021-09-30T16:25:24Z"),
    ],
)
def test_other_formats_are_refused(old: str, new: str) -> None:
    assert old in EXAMPLE
    with pytest.raises(UsageError):
        SignInMessage.parse(EXAMPLE.replace(old, new))


@given(st.text(max_size=300))
def test_no_text_makes_it_crash(text: str) -> None:
    for candidate in (text, EXAMPLE + text, EXAMPLE.replace("Terms", text)):
        try:
            result = SignInMessage.parse(candidate)
        except UsageError:
            continue
        assert result.text() == candidate  # what is checked is what was signed


def test_times_are_read_with_their_zone() -> None:
    assert rfc3339(seconds_of("2021-09-30T18:25:24.250+02:00")) == "2021-09-30T16:25:24Z"


def test_the_signer_is_found_by_the_signature() -> None:
    message = SignInMessage.parse(EXAMPLE)
    signature = message.sign(OWNER)
    signable = encode_defunct(text=EXAMPLE)
    assert signer_of(signable, signature) == OWNER.address
    assert signer_of(encode_defunct(text=EXAMPLE + " "), signature) != OWNER.address
    for broken in (b"", signature[:64], signature + b"\0", bytes(65), b"\xff" * 65):
        assert signer_of(signable, broken) == ""


class ContractWallet:
    """A node with a contract that has signed one message, as ERC-1271 says."""

    def __init__(self, code: bytes, answer: bytes | Exception) -> None:
        self.calls: list[dict[str, Any]] = []
        self._code, self._answer = code, answer
        self.eth = SimpleNamespace(get_code=self._get_code, call=self._call)

    async def _get_code(self, _address: str) -> bytes:
        return self._code

    async def _call(self, call: dict[str, Any]) -> bytes:
        self.calls.append(call)
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


MAGIC = bytes.fromhex("1626ba7e")


@pytest.mark.parametrize(
    ("code", "answer", "good"),
    [
        (b"\x60", MAGIC.ljust(32, b"\0"), True),
        (b"\x60", bytes(32), False),
        (b"\x60", MAGIC.rjust(32, b"\0"), False),
        (b"\x60", b"", False),
        (b"\x60", ContractLogicError("no"), False),
        (b"", MAGIC.ljust(32, b"\0"), False),
    ],
)
async def test_a_contract_answers_for_its_wallet(code: bytes, answer: Any, good: bool) -> None:
    signable = encode_defunct(text=EXAMPLE)
    node: Any = ContractWallet(code, answer)
    wallet = "0x" + "12" * 20
    assert await is_signed_by(node, signable, b"any proof", wallet) is good
    if code:
        [call] = node.calls
        assert call["to"].lower() == wallet
        assert bytes(call["data"])[:4] == MAGIC
    # The signature of a key needs no node.
    owner_signature = SignInMessage.parse(EXAMPLE).sign(OWNER)
    assert await is_signed_by(SimpleNamespace(), signable, owner_signature, OWNER.address.lower())  # type: ignore[arg-type]
