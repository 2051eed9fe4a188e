"""Every event of the ABIs is decoded to its dataclass; undecodable logs give None, never an error."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from eth_abi import encode
from eth_utils import keccak
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.chain.bindings import events
from deepsquare_chain.chain.bindings.abi import interfaces, signature_of, type_of
from deepsquare_chain.chain.bindings.events import (
    EVENT_CLASSES,
    Event,
    decode_log,
    decode_logs,
    event_filter,
    event_topics,
)
from deepsquare_chain.job import (
    Hardware,
    JobFlags,
    JobStatus,
    Objective,
    Offer,
    Prices,
    Resources,
    Terms,
)

A, B = "0x" + "11" * 20, "0x" + "22" * 20
WORD = b"\x33" * 32
TERMS = (10**18, 60, 2, 3, 100, 1, 5, 1, 2, "a job", "gpu.model=h100,place=eu")

#: Event: values as the contract emits them, and the dataclass that they must become.
CASES: dict[str, tuple[tuple[Any, ...], Event]] = {
    "JobSubmitted": (
        (7, A, WORD, TERMS),
        events.JobSubmitted(
            7,
            A,
            WORD,
            Terms(
                10**18,
                60,
                Resources(2, 3, 100, 1),
                5,
                JobFlags.UNTIL_SPENT,
                Objective.ENERGY,
                "a job",
                TERMS[-1],
            ),
        ),
    ),
    "JobTransition": (
        (7, A, B, 3, 4),
        events.JobTransition(7, A, B, JobStatus.SCHEDULED, JobStatus.RUNNING),
    ),
    "JobPriced": ((7, A, 2**72 - 1, 500), events.JobPriced(7, A, 2**72 - 1, 500)),
    "JobToppedUp": ((7, A, 1, 2, 3), events.JobToppedUp(7, A, 1, 2, 3)),
    "JobSettled": ((7, A, B, 1, 2, 3, 4), events.JobSettled(7, A, B, 1, 2, 3, 4)),
    "JobCollected": ((7, A, B, 1, 2, 3, 4, 5), events.JobCollected(7, A, B, 1, 2, 3, 4, 5)),
    "JobRetried": ((7, 8, 9), events.JobRetried(7, 8, 9)),
    "JobResult": (
        (7, -9, WORD, "exité".encode().ljust(32, b"\0")),
        events.JobResult(7, -9, WORD, "exité"),
    ),
    "JobRequeued": ((7, A, "full"), events.JobRequeued(7, A, "full")),
    "JobPanicked": ((7, A, ""), events.JobPanicked(7, A, "")),
    "TransitionSkipped": (
        (7, 9, b"\x01\x02\x03\x04"),
        events.TransitionSkipped(7, JobStatus.PANICKED, b"\x01\x02\x03\x04"),
    ),
    "ProviderChallenged": ((7, A, B, 99), events.ProviderChallenged(7, A, B, 99)),
    "ProviderAnswered": ((A,), events.ProviderAnswered(A)),
    "PaymentParked": ((A, 5), events.PaymentParked(A, 5)),
    "PaymentWithdrawn": ((A, B, 5), events.PaymentWithdrawn(A, B, 5)),
    "ExecutedForwardRequest": ((A, 4, True), events.ExecutedForwardRequest(A, 4, True)),
    "FeeChanged": ((500,), events.FeeChanged(500)),
    "SubmissionsChanged": ((False,), events.SubmissionsChanged(False)),
    "ProviderRegistered": ((3, A), events.ProviderRegistered(3, A)),
    "HardwareProposed": (
        (A, 2, (1, 2, 3, 4)),
        events.HardwareProposed(A, 2, Hardware(1, 2, 3, 4)),
    ),
    "ProviderApproved": (
        (A, 2, (1, 2, 3, 4), 99),
        events.ProviderApproved(A, 2, Hardware(1, 2, 3, 4), 99),
    ),
    "OfferChanged": ((A, (1, 2, 3)), events.OfferChanged(A, Offer(1, 2, 3))),
    "PricesChanged": ((A, (1, 2, 3)), events.PricesChanged(A, Prices(1, 2, 3))),
    "LabelsChanged": (
        (A, ["a=b", "c=d=e"]),
        events.LabelsChanged(A, {"a": "b", "c": "d=e"}),
    ),
    "DrainingChanged": ((A, True), events.DrainingChanged(A, True)),
    "BanChanged": ((A, True, "no"), events.BanChanged(A, True, "no")),
    "Transfer": ((A, B, 5), events.Transfer(A, B, 5)),
    "Approval": ((A, B, 2**256 - 1), events.Approval(A, B, 2**256 - 1)),
    "RoleGranted": ((WORD, A, B), events.RoleGranted(WORD, A, B)),
    "RoleRevoked": ((WORD, A, B), events.RoleRevoked(WORD, A, B)),
}
#: Events of OpenZeppelin contracts that have no dataclass.
UNREAD = {
    "DefaultAdminDelayChangeCanceled",
    "DefaultAdminDelayChangeScheduled",
    "DefaultAdminTransferCanceled",
    "DefaultAdminTransferScheduled",
    "EIP712DomainChanged",
    "RoleAdminChanged",
}


def abi_events() -> dict[str, Any]:
    return {
        entry["name"]: entry for interface in interfaces() for entry in interface.entries("event")
    }


def raw_log(name: str, values: tuple[Any, ...], **position: Any) -> dict[str, Any]:
    """A log as JSON-RPC gives it."""
    entry = abi_events()[name]
    indexed = [i["indexed"] for i in entry["inputs"]]
    kinds = [type_of(part) for part in entry["inputs"]]
    topics = [keccak(text=signature_of(entry))]
    pairs = list(zip(indexed, kinds, values, strict=True))
    topics += [encode([kind], [value]) for is_indexed, kind, value in pairs if is_indexed]
    data_fields = [(kind, value) for is_indexed, kind, value in pairs if not is_indexed]
    data = encode([kind for kind, _ in data_fields], [value for _, value in data_fields])
    return {
        "address": A,
        "topics": ["0x" + topic.hex() for topic in topics],
        "data": "0x" + data.hex(),
        "blockNumber": "0x10",
        "blockHash": "0x" + "aa" * 32,
        "transactionHash": "0x" + "bb" * 32,
        "logIndex": "0x2",
        **position,
    }


def test_every_event_of_the_contracts_is_known() -> None:
    assert set(CASES) | UNREAD == set(abi_events())
    assert {event_class.__name__ for event_class in EVENT_CLASSES.values()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_event(name: str) -> None:
    values, expected = CASES[name]
    log = decode_log(raw_log(name, values))
    assert log is not None
    position = {"block_number": 16, "log_index": 2, "address": A}
    hashes = {"block_hash": "0x" + "aa" * 32, "tx_hash": "0x" + "bb" * 32}
    assert log == dataclasses.replace(expected, **position, **hashes)
    assert log.position == (16, 2)


def test_logs_of_web3_and_of_json_are_equal() -> None:
    raw = raw_log("ProviderRegistered", (3, A))
    web3 = raw | {
        "topics": [bytes.fromhex(topic[2:]) for topic in raw["topics"]],
        "data": bytes.fromhex(raw["data"][2:]),
        "blockNumber": 16,
        "logIndex": 2,
        "blockHash": b"\xaa" * 32,
        "transactionHash": b"\xbb" * 32,
    }
    assert decode_log(web3) == decode_log(raw) is not None


def test_text_that_is_not_utf8_is_read_anyway() -> None:
    raw = raw_log("LabelsChanged", (A, ["a=bc"]))
    raw["data"] = raw["data"].replace(b"a=bc".hex(), b"a=\xff\xfe".hex())
    log = decode_log(raw)
    assert isinstance(log, events.LabelsChanged)
    assert log.labels == {"a": "\ufffd\ufffd"}
    event = decode_log(raw_log("JobResult", (1, 0, WORD, b"\xff" * 32)))
    assert isinstance(event, events.JobResult)
    assert event.reason == "\ufffd" * 32


@pytest.mark.parametrize(
    "change",
    [
        {"topics": []},
        {"topics": ["0x" + "00" * 32]},
        {"topics": None},
        {"data": "0x"},
        {"data": "0x12"},
        {"data": "zz"},
        {"blockNumber": None},
        {"address": "0x12"},
        {"removed": True},
    ],
)
def test_other_logs_are_no_events(change: dict[str, Any]) -> None:
    raw = raw_log("JobPriced", (7, A, 1, 2))
    assert decode_log(raw) is not None
    assert decode_log(raw | change) is None


def test_a_missing_topic_or_field_is_none() -> None:
    raw = raw_log("JobPriced", (7, A, 1, 2))
    assert decode_log(raw | {"topics": raw["topics"][:-1]}) is None
    assert decode_log(raw | {"topics": [*raw["topics"], raw["topics"][1]]}) is None
    for key in ("topics", "data", "blockNumber", "logIndex", "address"):
        assert decode_log({name: value for name, value in raw.items() if name != key}) is None


def test_an_unknown_status_is_none() -> None:
    assert decode_log(raw_log("JobTransition", (7, A, B, 3, 200))) is None


@given(
    topics=st.lists(st.binary(max_size=40), max_size=5),
    data=st.binary(max_size=400),
    known=st.sampled_from(sorted(EVENT_CLASSES)),
)
def test_no_bytes_crash_it(topics: list[bytes], data: bytes, known: bytes) -> None:
    for first in (topics, [known, *topics]):
        log = raw_log("FeeChanged", (1,)) | {"topics": first, "data": data}
        result = decode_log(log)
        assert result is None or isinstance(result, Event)


def test_logs_come_in_the_order_of_the_chain() -> None:
    logs = [
        raw_log("FeeChanged", (1,), blockNumber="0x2", logIndex="0x0"),
        raw_log("FeeChanged", (2,), blockNumber="0x1", logIndex="0x9"),
        raw_log("FeeChanged", (3,), blockNumber="0x1", logIndex="0xa"),
        raw_log("FeeChanged", (4,)) | {"topics": []},
    ]
    assert [log.fee_bps for log in decode_logs(logs)] == [2, 3, 1]  # type: ignore[attr-defined]


def test_topics_for_a_filter() -> None:
    assert len(event_topics()) == len(CASES)
    (topic,) = event_topics(events.FeeChanged)
    assert topic == "0x" + keccak(text="FeeChanged(uint256)").hex()


def test_a_skipped_item_names_its_reason() -> None:
    skipped = events.TransitionSkipped(1, JobStatus.PENDING, keccak(text="TooEarly(uint256)")[:4])
    assert skipped.reason_name == "TooEarly"
    unknown = events.TransitionSkipped(1, JobStatus.PENDING, b"\x01\x02\x03\x04")
    assert unknown.reason_name == "0x01020304"


def test_a_filter_names_the_class_and_its_indexed_fields() -> None:
    account = "0x" + "aB" * 20
    word = "0x" + "00" * 12 + "ab" * 20
    [transition] = event_topics(events.JobTransition)
    [settled] = event_topics(events.JobSettled)
    assert event_filter(events.JobTransition, provider=account) == [
        transition,
        None,
        None,
        word,
    ]
    assert event_filter(events.JobSettled, provider=account) == [settled, None, word]
    assert event_filter(events.JobSettled) == [settled]
    event_filters = event_filter(events.JobSettled, events.JobCollected, provider=account)
    assert event_filters == [event_topics(events.JobSettled, events.JobCollected), None, word]
    with pytest.raises(AssertionError, match="at different places"):
        event_filter(events.JobSettled, events.JobTransition, provider=account)
    with pytest.raises(AssertionError, match="no indexed paid"):
        event_filter(events.JobSettled, paid=account)
