"""Exact money: amounts, rates, settlements."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.credits import (
    CREDIT,
    Settlement,
    allotment,
    billed_seconds,
    cost,
    fee,
    fits,
    format_credits,
    hourly,
    job_rate,
    parse_credits,
    settle,
)
from deepsquare_chain.job import Hardware, Offer, Prices, Resources

AMOUNTS = st.integers(0, 2**96 - 1)
RATES = st.integers(0, 2**72 - 1)
LIMITS = st.integers(1, 2**24 - 1)
SECONDS = st.integers(0, 2**32 - 1)
BPS = st.integers(0, 2_000)


@pytest.mark.parametrize(
    ("text", "wei"),
    [
        ("0", 0),
        ("1", CREDIT),
        ("1.5", CREDIT * 3 // 2),
        (" 2 ", 2 * CREDIT),
        ("007", 7 * CREDIT),
        ("0.000000000000000001", 1),
        ("0.1000000000000000000000", CREDIT // 10),
        ("1.000", CREDIT),
        ("79228162514.264337593543950335", 2**96 - 1),
        ("9" * 60, (10**60 - 1) * CREDIT),
    ],
)
def test_amounts_are_read_to_the_wei(text: str, wei: int) -> None:
    assert parse_credits(text) == wei


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-1",
        "+1",
        "1e3",
        ".5",
        "5.",
        "1,5",
        "1_000",
        "0x10",
        "nan",
        "inf",
        "1 2",
        "\u0661",
        "1.5 credits",
        "9" * 61,
        "1." + "0" * 61,
        "1\x00",
    ],
)
def test_invalid_amounts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a valid amount"):
        parse_credits(text)


def test_finer_than_wei_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 18 decimals"):
        parse_credits("0.0000000000000000001")


@pytest.mark.parametrize(
    ("wei", "text"),
    [
        (0, "0"),
        (1, "0.000000000000000001"),
        (-1, "-0.000000000000000001"),
        (CREDIT, "1"),
        (10 * CREDIT, "10"),
        (CREDIT * 3 // 2, "1.5"),
        (-3 * CREDIT // 2, "-1.5"),
        (2**96 - 1, "79228162514.264337593543950335"),
    ],
)
def test_amounts_are_written_exactly(wei: int, text: str) -> None:
    assert format_credits(wei) == text


@given(st.integers(0, 2**256 - 1))
def test_formatted_amounts_are_parsed_again(wei: int) -> None:
    assert parse_credits(format_credits(wei)) == wei


@given(st.integers(-(2**256), 2**256))
def test_written_amounts_equal_decimal_arithmetic(wei: int) -> None:
    with localcontext() as context:
        context.prec = 120
        assert Decimal(format_credits(wei)) == Decimal(wei) / CREDIT


@given(st.text(max_size=100))
def test_any_text_is_an_amount_or_refused(text: str) -> None:
    try:
        assert parse_credits(text) >= 0
    except ValueError as error:
        assert len(str(error)) < 500  # noqa: PT017 - both endings are right


@pytest.mark.parametrize(
    "text", ["1", "2", "0.1", "0.0001", "1.5", "123.456", "0.000001", "7", "3600", "0.33333"]
)
def test_hourly_prices_are_shown_as_they_were_entered(text: str) -> None:
    """Rates are stored as whole wei per second, which 1 credit per hour is not."""
    per_second = parse_credits(text) // 3_600
    assert hourly(per_second) == text
    assert parse_credits(hourly(per_second)) // 3_600 == per_second


def test_a_rate_of_many_parts_is_shown_as_their_sum() -> None:
    prices = Prices(*(parse_credits(text) // 3_600 for text in ("1", "2.5", "0.0001")))
    assert hourly(job_rate(prices, Resources(16, 4, 2_000, 8))) == "96.8"


def test_hourly_prices() -> None:
    assert hourly(CREDIT) == "3600"
    assert hourly(1) == "0.0000000000000036"


def test_rate_counts_cpus_gpus_and_memory() -> None:
    resources = Resources(tasks=2, cpus_per_task=3, mem_per_cpu=10, gpus=4)
    assert job_rate(Prices(cpu=1, gpu=0, mem=0), resources) == 6
    assert job_rate(Prices(cpu=0, gpu=1, mem=0), resources) == 4
    assert job_rate(Prices(cpu=0, gpu=0, mem=1), resources) == 60
    assert job_rate(Prices(cpu=100, gpu=1_000, mem=7), resources) == 600 + 4_000 + 420


def test_cost_and_fee() -> None:
    assert cost(7, 11) == 77
    assert fee(10_000, 500) == 500
    assert fee(9_999, 1) == 0
    assert fee(10_000, 1) == 1
    assert fee(99_999, 1_000) == 9_999


def test_allotment() -> None:
    assert allotment(60, False, 10_000, 7) == 60
    assert allotment(60, True, 10_000, 7) == 1_428
    assert allotment(60, False, 10_000, 0) == 0
    assert allotment(60, True, 10_000, 0) == 0


@pytest.mark.parametrize(
    ("reported", "elapsed", "allotted", "billed"),
    [(5, 10, 20, 5), (15, 10, 20, 10), (50, 60, 20, 20), (0, 10, 20, 0), (7, 7, 7, 7)],
)
def test_billed_seconds_take_the_least(
    reported: int, elapsed: int, allotted: int, billed: int
) -> None:
    assert billed_seconds(reported, elapsed, allotted) == billed


def test_settlement_in_numbers() -> None:
    assert settle(
        escrow=10_000,
        rate=33,
        fee_bps=250,
        time_limit=100,
        until_spent=False,
        reported=40,
        elapsed=41,
    ) == Settlement(billed_seconds=40, paid=1_287, fee=33, refunded=8_680)


def test_a_bill_beyond_the_escrow_is_no_settlement() -> None:
    with pytest.raises(ValueError, match="costs more than the escrow"):
        settle(
            escrow=99,
            rate=1,
            fee_bps=0,
            time_limit=100,
            until_spent=False,
            reported=100,
            elapsed=100,
        )


@given(AMOUNTS, RATES, BPS, LIMITS, st.booleans(), SECONDS, SECONDS)
def test_a_settlement_splits_the_escrow(
    escrow: int, rate: int, bps: int, limit: int, spent: bool, reported: int, elapsed: int
) -> None:
    if not spent:
        # The contract assigns only where the escrow buys the limit.
        escrow = max(escrow, rate * limit)
    result = settle(
        escrow=escrow,
        rate=rate,
        fee_bps=bps,
        time_limit=limit,
        until_spent=spent,
        reported=reported,
        elapsed=elapsed,
    )
    assert result.paid + result.fee + result.refunded == escrow
    assert min(result.paid, result.fee, result.refunded) >= 0
    assert result.paid + result.fee == rate * result.billed_seconds
    assert result.billed_seconds <= min(reported, elapsed)
    exact = Fraction(rate * result.billed_seconds * bps, 10_000)
    assert exact - 1 < result.fee <= exact


SMALL_CLUSTER = Hardware(nodes=2, cpus_per_node=8, mem_per_node=1_000, gpus_per_node=2)
WHOLE_OFFER = Offer(cpus=16, memory=2_000, gpus=4)


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        (Resources(1, 1, 1, 0), True),
        (Resources(2, 8, 125, 4), True),
        (Resources(16, 1, 125, 0), True),
        (Resources(17, 1, 1, 0), False),
        (Resources(1, 9, 1, 0), False),
        (Resources(3, 5, 1, 0), False),
        (Resources(2, 5, 1, 0), True),
        (Resources(1, 8, 126, 0), False),
        (Resources(3, 1, 501, 0), False),
        (Resources(2, 1, 501, 0), True),
        (Resources(1, 1, 1, 5), False),
        (Resources(1, 1, 1, 4), True),
        (Resources(1, 0, 1, 0), False),
        (Resources(1, 1, 0, 0), False),
    ],
)
def test_jobs_fit_node_by_node(resources: Resources, expected: bool) -> None:
    assert fits(SMALL_CLUSTER, WHOLE_OFFER, resources) is expected


@pytest.mark.parametrize(
    "offer", [Offer(3, 2_000, 4), Offer(16, 399, 4), Offer(16, 2_000, 1), Offer(0, 0, 0)]
)
def test_a_smaller_offer_limits_eligibility(offer: Offer) -> None:
    resources = Resources(tasks=4, cpus_per_task=1, mem_per_cpu=100, gpus=2)
    assert fits(SMALL_CLUSTER, WHOLE_OFFER, resources)
    assert not fits(SMALL_CLUSTER, offer, resources)


@given(
    st.builds(Hardware, st.integers(0, 4), st.integers(0, 16), st.integers(0, 64), st.just(0)),
    st.builds(Resources, st.integers(1, 20), st.integers(1, 8), st.integers(1, 8), st.just(0)),
)
def test_fitting_equals_packing_tasks_one_by_one(hardware: Hardware, resources: Resources) -> None:
    free = [[hardware.cpus_per_node, hardware.mem_per_node] for _ in range(hardware.nodes)]
    placed = 0
    for node in free:
        while (
            node[0] >= resources.cpus_per_task
            and node[1] >= resources.cpus_per_task * resources.mem_per_cpu
        ):
            node[0] -= resources.cpus_per_task
            node[1] -= resources.cpus_per_task * resources.mem_per_cpu
            placed += 1
    unlimited = Offer(10**6, 10**9, 0)
    assert fits(hardware, unlimited, resources) == (placed >= resources.tasks)
