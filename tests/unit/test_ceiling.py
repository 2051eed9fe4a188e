"""The largest batch of an endpoint: learned from refusals, remembered, probed rarely."""

from __future__ import annotations

from deepsquare_chain.chain.rpc.endpoint import Ceiling


def ask(ceiling: Ceiling, takes: int, times: int = 1) -> int:
    """Send batches of the ceiling's size; return how many were refused."""
    refusals = 0
    for _ in range(times):
        while ceiling.size > takes:
            ceiling.refused(ceiling.size)
            refusals += 1
        ceiling.worked(ceiling.size)
    return refusals


def test_it_grows_until_it_is_refused() -> None:
    ceiling = Ceiling(100, 1_000)
    assert ask(ceiling, 10_000, times=8) == 0
    assert ceiling.size == 1_000


def test_an_accepted_size_is_remembered_and_probed_rarely() -> None:
    ceiling = Ceiling(1_000, 50_000)
    assert ask(ceiling, 500) == 1
    assert ceiling.size == 1_000, "that may have been chance"
    assert ask(ceiling, 500) == 1
    assert ceiling.size == 500
    assert ask(ceiling, 500, times=60) == 0
    assert ask(ceiling, 500, times=10) == 1, "one probe in 64 answers"
    assert ask(ceiling, 500, times=100) == 0, "and fewer after each that failed"
    assert ask(ceiling, 500, times=100) == 1
    # A limit that was raised is detected.
    ask(ceiling, 10_000, times=2_000)
    assert ceiling.size > 5_000


def test_a_batch_below_the_ceiling_does_not_raise_it() -> None:
    ceiling = Ceiling(8, 64)
    ask(ceiling, 4, times=2)
    for _ in range(1_000):
        ceiling.worked(2)
    assert ceiling.size == 4


def test_an_endpoint_that_refuses_everything_does_not_change_the_ceiling() -> None:
    ceiling = Ceiling(100, 1_000)
    while ceiling.size > 1:
        ceiling.refused(ceiling.size)
    ceiling.refused(1)
    assert ceiling.size == 100


def test_errors_now_and_then_are_no_refusals() -> None:
    ceiling = Ceiling(64, 64)
    for size in (6, 64, 6, 12) * 5:
        ceiling.refused(size)
        ceiling.worked(size // 2)
        assert ceiling.size == 64
        ceiling.worked(size)


def test_failures_count_once_there_are_several() -> None:
    ceiling = Ceiling(100, 1_000)
    ceiling.failed(100)
    ceiling.failed(100)
    ceiling.worked(50)
    ceiling.failed(100)
    ceiling.failed(100)
    assert ceiling.size == 100
    ceiling.failed(100)
    assert ceiling.size == 50
    for _ in range(9):
        ceiling.failed(1)
    assert ceiling.size == 50
