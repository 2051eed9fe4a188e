"""Estimates of how long a wallet's coin for gas lasts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.chain.transactions.fees import GasBudget, gas_budget
from deepsquare_chain.job import DAY

NOW = 1_800_000_000


def test_nothing_sent_yet() -> None:
    budget = gas_budget(10**18, [], NOW)
    assert (budget.transactions, budget.days, budget.low) == (None, None, False)
    assert budget.describe() == "1 coin for gas"
    assert gas_budget(0, [], NOW).low


def test_one_after_the_other_through_half_a_day() -> None:
    spent = [(NOW - hours * 3_600, 10) for hours in range(13)]
    budget = gas_budget(1_000, spent, NOW)
    assert (budget.per_transaction, budget.transactions) == (10, 100)
    assert budget.per_day == 260
    assert budget.days == pytest.approx(1_000 / 260)
    assert not budget.low
    assert "about 100 transactions, or 3.8 days" in budget.describe()


def test_older_transactions_do_not_count_for_a_day() -> None:
    budget = gas_budget(1_000, [(NOW - 2 * DAY, 1), (NOW - 3 * DAY, 3)], NOW)
    assert (budget.per_transaction, budget.days) == (2, None)
    # A burst of one minute does not determine the rate of a day.
    assert gas_budget(1_000, [(NOW - 60, 1)] * 30, NOW).days is None


@pytest.mark.parametrize(
    ("budget", "low"),
    [
        (GasBudget(499, 10), True),
        (GasBudget(500, 10), False),
        (GasBudget(5_000, 10, 2_501), True),
        (GasBudget(5_000, 10, 2_500), False),
        (GasBudget(0), True),
        (GasBudget(0, free=True), False),
        (GasBudget(499, 10, 2_501, free=True), False),
    ],
)
def test_when_it_is_low(budget: GasBudget, low: bool) -> None:
    assert budget.low is low


@given(
    balance=st.integers(0, 2**100),
    spent=st.lists(st.tuples(st.integers(0, NOW), st.integers(0, 2**80)), max_size=20),
)
def test_any_history_has_an_answer(balance: int, spent: list[tuple[int, int]]) -> None:
    budget = gas_budget(balance, spent, NOW)
    assert budget.describe()
    if budget.transactions is not None and budget.per_transaction:
        assert budget.transactions * budget.per_transaction <= balance
