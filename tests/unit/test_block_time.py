"""The time of the next block: learned from earlier blocks, without a clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deepsquare_chain.chain.rpc import heads as heads_module
from deepsquare_chain.chain.rpc.heads import (
    BlockTimeEstimate,
    HeadSource,
    OnDemandDetector,
    block_time,
    next_poll,
)


def headers(*times: int, empty: int = 0) -> list[tuple[int, int, bool]]:
    """Return blocks with these times; the block `empty` has no transaction."""
    return [(number, at, number == empty) for number, at in enumerate(times)]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0, 12, 24, 36, 48, 60], 12),
        ([0, 12, 24, 48, 60, 72, 84, 96], 12),  # a slot without a block
        ([0, 1, 2, 3, 4, 5], 1),
        ([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], 0),  # four blocks per second
        ([0, 1, 30, 31, 90, 200, 201], 0),  # without a regular interval
        ([0, 12, 24], 0),  # too few blocks
        ([0, 3_600, 7_200, 10_800, 14_400], 60),  # the maximum delay of a poll
    ],
)
def test_block_time_is_learned_from_chain_time(times: list[int], expected: float) -> None:
    assert block_time(headers(*times), []) == expected


def test_blocks_that_were_not_seen_count() -> None:
    assert block_time([(number, 2 * number, True) for number in (1, 2, 5, 6, 9, 10)], []) == 2


def test_blocks_that_are_never_empty_need_observed_times() -> None:
    """A development chain may date the block of each transaction one second after the last block."""
    full = headers(*range(8), empty=-1)
    assert block_time(full, []) == 0
    assert block_time(full, [(number, 1.1 * number) for number in range(8)]) == 1
    assert block_time(full, [(number, 5.0 * number) for number in range(8)]) == 0


def test_faster_observed_blocks_override_chain_time() -> None:
    result = headers(*(12 * number for number in range(8)))
    assert block_time(result, [(number, 3.0 * number) for number in range(8)]) == 3
    assert block_time(result, [(number, 40.0 * number) for number in range(8)]) == 12


def test_polls_that_come_too_early_are_delayed_increasingly() -> None:
    due, poll_times = next_poll(100.0, 90.0, 12.0), []
    for _ in range(8):
        poll_times.append(due)
        due = next_poll(100.0, due, 12.0)
    assert poll_times == [100.0, 100.5, 101.0, 102.0, 104.0, 108.0, 116.0, 128.0]
    assert next_poll(100.0, 90.0, 12.0, extra_delay=6.0) == 106.0


def watch(seconds: float, blocks: int, *, poll: float, listening: bool = False) -> list[float]:
    """Poll a chain with a fixed block time; return the times of the polls."""
    pace, now, poll_times, phase = BlockTimeEstimate(), 0.0, [], 0.37 * seconds
    pace.listening = listening
    while now < blocks * seconds:
        number = int((now + phase) // seconds)
        pace.record_header(number, round(number * seconds), empty=True)
        pace.record_head(number, now)
        poll_times.append(now)
        now = pace.due_at(poll)
    return poll_times


@pytest.mark.parametrize("seconds", [1.0, 2.0, 12.0])
def test_at_most_one_poll_per_block_finds_no_new_block(seconds: float) -> None:
    poll_times = watch(seconds, 100, poll=0.25)
    settled = [look for look in poll_times if look >= 20 * seconds]
    assert 80 <= len(settled) <= 160
    # Blocks are seen soon after they arrive, too.
    results: dict[int, float] = {}
    for item in settled:
        results.setdefault(int((item + 0.37 * seconds) // seconds), item)
    delays = [(item + 0.37 * seconds) % seconds for item in results.values()]
    assert max(delays[1:]) <= min(0.5, seconds / 10) + 0.01


def test_a_chain_of_unknown_block_time_is_polled() -> None:
    pace = BlockTimeEstimate()
    pace.record_head(5, 100.0)
    assert pace.due_at(0.25) == 100.25


def test_a_hint_makes_one_poll_due() -> None:
    pace = BlockTimeEstimate()
    pace.record_head(5, 100.0)
    pace.hint()
    assert pace.due_at(9.0) < 0
    pace.record_head(5, 101.0)
    assert pace.due_at(9.0) == 110.0


def test_a_hint_before_its_block_is_followed_by_quick_polls() -> None:
    """The websocket's node may have a block before the polled one."""
    pace = BlockTimeEstimate()
    pace.listening = True
    for number in range(8):
        pace.record_header(number, 12 * number, empty=True)
        pace.record_head(number, 12.0 * number)
    assert pace.due_at(0.25) > 84 + 12 + 1
    pace.hint()
    pace.record_head(7, 95.0)
    assert pace.due_at(0.25) <= 95.5


async def test_a_service_polls_when_due_and_uses_the_last_response_until_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_demand_detector = OnDemandDetector()
    moment = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(heads_module, "time", moment)
    monkeypatch.setattr(heads_module, "time", moment)
    now, requests, block = 100.0, 0, 5

    async def reconcile() -> dict[str, str]:
        nonlocal requests
        requests += 1
        header = {"number": hex(block), "timestamp": hex(block), "hash": "0x0" + str(block)}
        on_demand_detector.record_head(block, header)
        return header

    figures: Any = SimpleNamespace(
        record_head=lambda *_, **__: None, record_lag=lambda _blocks: None
    )
    w3: Any = SimpleNamespace(provider=SimpleNamespace(on_demand=on_demand_detector))
    heads = HeadSource(w3, reconcile, figures, poll=2.0)

    async def number() -> int | None:
        head = await heads.poll(lambda: 0)
        return None if head is None else head.number

    assert (await number(), await number(), requests) == (5, 5, 1)
    now = 102.0
    assert (await number(), await number(), requests) == (5, 5, 2)
    on_demand_detector.block_time.record_head(6, now)  # through another node of this endpoint
    assert heads.pause() == 0
    assert (await number(), await number(), requests) == (
        5,
        5,
        3,
    )  # only once, because the node lags
    block = 6
    heads.hint()
    assert (await number(), requests) == (6, 4)
    block, now = 4, 104.5
    assert (await number(), requests) == (None, 5)
