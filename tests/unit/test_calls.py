"""Addresses as people type them, and amounts that they give."""

from __future__ import annotations

import pytest
import typer

from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.cli.types import positive_credits
from deepsquare_chain.errors import UsageError

pytestmark = pytest.mark.unit

BOB = "0x976EA74026E726554dB657fA54763abd0C3a0aa9"


@pytest.mark.parametrize(
    "text", [BOB, BOB.lower(), "0x" + BOB[2:].upper(), BOB[2:], "0X" + BOB[2:]]
)
def test_an_address_gets_its_checksum(text: str) -> None:
    assert checked_address(text) == BOB


@pytest.mark.parametrize("text", [BOB[:-1] + "A", BOB.replace("B", "b"), (BOB[:-2] + "A9")[2:]])
def test_a_mistyped_address_is_refused_before_anything_is_paid_to_it(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        checked_address(text, "recipient")
    assert f"{text!r} is not a valid recipient: its checksum is wrong" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "0x12", "alice", BOB + "0"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid address"):
        checked_address(text)


def test_nothing_is_no_gift() -> None:
    assert positive_credits("0.5") == 5 * 10**17
    for text in ("0", "0.0"):
        with pytest.raises(typer.BadParameter):
            positive_credits(text)
