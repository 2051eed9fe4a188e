"""Parsing of addresses and amounts, and decoded records of jobs."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from deepsquare_chain.chain.bindings.abi import AbiError, encode_values, interface
from deepsquare_chain.chain.bindings.calls import checked_address
from deepsquare_chain.chain.bindings.records import JobDecoder, read_job
from deepsquare_chain.cli.types import positive_credits
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import JobStatus

pytestmark = pytest.mark.unit

BOB = "0x976EA74026E726554dB657fA54763abd0C3a0aa9"


@pytest.mark.parametrize(
    "text", [BOB, BOB.lower(), "0x" + BOB[2:].upper(), BOB[2:], "0X" + BOB[2:]]
)
def test_an_address_gets_its_checksum(text: str) -> None:
    assert checked_address(text) == BOB


@pytest.mark.parametrize("text", [BOB[:-1] + "A", BOB.replace("B", "b"), (BOB[:-2] + "A9")[2:]])
def test_a_mistyped_address_is_refused_before_anything_is_paid_to_it(text: str) -> None:
    with pytest.raises(UsageError) as error_info:
        checked_address(text, "recipient")
    assert f"{text!r} is not a valid recipient: its checksum is wrong" in error_info.value.message
    assert error_info.value.hint


@pytest.mark.parametrize("text", ["", "0x12", "alice", BOB + "0"])
def test_invalid_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid address"):
        checked_address(text)


def test_zero_is_not_a_valid_amount() -> None:
    assert positive_credits("0.5") == 5 * 10**17
    for text in ("0", "0.0"):
        with pytest.raises(typer.BadParameter):
            positive_credits(text)


# -- records of jobs, decoded once


def record(**changes: Any) -> tuple[Any, ...]:
    fields = {
        "customer": "0x" + "11" * 20,
        "status": 1,
        "since": 1_700_000_000,
        "providerId": 7,
        "memPerCpu": 512,
        "retriesLeft": 2,
        "flags": 1,
        "escrow": 10**20,
        "rate": 10**15,
        "timeLimit": 3_600,
        "tasks": 2,
        "cpusPerTask": 4,
        "gpus": 1,
        "feeBps": 50,
        "definition": b"\x33" * 32,
        "retryOf": 0,
    }
    return tuple((fields | changes).values())


def encoded(*records: tuple[Any, ...]) -> bytes:
    return encode_values(interface("MetaScheduler").function("getJobs").outputs, [list(records)])


def test_decoded_records_are_those_of_the_abi() -> None:
    records = [record(), record(status=4, escrow=2**96 - 1, definition=bytes(32), retryOf=2**255)]
    jobs = JobDecoder().decode([3, 9], encoded(*records))
    assert jobs == [read_job(3, records[0]), read_job(9, records[1])]


def test_an_unchanged_record_is_decoded_once_and_a_changed_one_again() -> None:
    decoder = JobDecoder()
    [first, second] = decoder.decode([1, 2], encoded(record(), record()))
    [repeated, changed] = decoder.decode([1, 2], encoded(record(), record(status=4)))
    assert repeated is first
    assert second.status is JobStatus.PENDING
    assert changed.status is JobStatus(4)


def test_the_least_recently_used_records_are_dropped() -> None:
    decoder = JobDecoder()
    [kept_record, dropped_record] = decoder.decode([1, 2], encoded(record(), record()))
    for number in range(3, 1_003):
        decoder.decode([1], encoded(record()))
        decoder.decode([number], encoded(record()))
    assert decoder.decode([1], encoded(record()))[0] is kept_record
    assert decoder.decode([2], encoded(record()))[0] is not dropped_record


def test_a_large_read_is_kept_for_two_blocks() -> None:
    decoder = JobDecoder()
    ids = range(1, 1_501)
    decoder.reserve(len(ids))
    before = decoder.decode(ids, encoded(*[record()] * len(ids)))
    decoder.decode(ids, encoded(*[record(since=1)] * len(ids)))
    after = decoder.decode(ids, encoded(*[record()] * len(ids)))
    assert all(job is earlier for job, earlier in zip(after, before, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(encoded(record()), id="fewer records"),
        pytest.param(encoded(record(), record())[:-1], id="cut"),
        pytest.param(encoded(record(), record()) + bytes(32), id="longer"),
        pytest.param(bytes(32) + encoded(record(), record())[32:], id="other offset"),
        pytest.param(encoded(record(), record(status=0))[:-96] + b"\xff" * 96, id="too large"),
    ],
)
def test_other_data_than_the_requested_records_is_refused(data: bytes) -> None:
    with pytest.raises(AbiError):
        JobDecoder().decode([1, 2], data)
