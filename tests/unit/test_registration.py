"""Confirmations before prices, labels or hardware change, and refused prices."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from deepsquare_chain.client import registration
from deepsquare_chain.client.registration import (
    MAX_PRICE,
    free_gpus,
    hardware_changes,
    hardware_warnings,
    label_changes,
    price_changes,
    price_example,
    price_per_second,
    price_warnings,
)
from deepsquare_chain.credits import CREDIT, parse_credits
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import Hardware, Prices
from tests.unit.test_client import PROVIDER

pytestmark = pytest.mark.unit

CENT = CREDIT // 100 // 3_600  # a cent per hour, in credit-wei per second
NOW = Prices(cpu=5 * CENT, gpu=100 * CENT, mem=CENT // 1000)


def test_the_highest_price_is_the_contracts() -> None:
    source = Path(__file__).parents[2] / "contracts" / "ProviderRegistry.sol"
    [limit] = re.findall(r"MAX_PRICE = (\d+) ether", source.read_text())
    assert int(limit) * CREDIT == MAX_PRICE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("36000.000000000000003600", "more than the maximum price, 36000;"),
        ("1000000", "one CPU, GPU or MB, per hour"),
        ("0.000000000000003599", "less than the minimum price, 0.0000000000000036"),
    ],
)
def test_prices_out_of_bounds_are_refused_with_a_clear_message(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        price_per_second(parse_credits(text), text)


def test_prices_within_bounds_are_rounded_down_to_the_wei() -> None:
    assert price_per_second(parse_credits("36000"), "") == MAX_PRICE
    assert price_per_second(parse_credits("0.000000000000007199"), "") == 1
    assert price_per_second(0, "0") == 0


@pytest.mark.parametrize(
    ("new_prices", "arguments"),
    [
        (NOW, []),
        (replace(NOW, cpu=9 * NOW.cpu), []),
        (replace(NOW, cpu=10 * NOW.cpu), ["per CPU goes from .* credits per hour, 10 times more"]),
        (replace(NOW, mem=NOW.mem // 10), ["per MB of memory goes from .*, 10 times less"]),
        (replace(NOW, gpu=0), ["per GPU goes from .* to 0 credits per hour: it would be free"]),
        (Prices(0, 0, 0), ["CPU", "GPU", "MB"]),
    ],
)
def test_a_price_that_becomes_zero_or_changes_tenfold_is_reported(
    new_prices: Prices, arguments: list[str]
) -> None:
    changes = list(price_changes(NOW, new_prices, large=True))
    assert len(changes) == len(arguments)
    for text, pattern in zip(changes, arguments, strict=True):
        assert re.search(pattern, text), text
    assert list(price_changes(Prices(0, 0, 0), NOW, large=False)) == []  # no price before
    raised_changes = list(price_changes(NOW, replace(NOW, cpu=9 * NOW.cpu), large=False))
    assert [text[:24] for text in raised_changes] == ["The price per CPU goes f"]


def test_prices_that_look_like_another_unit() -> None:
    assert list(price_warnings(NOW)) == []
    [warning] = price_warnings(replace(NOW, mem=NOW.cpu))
    assert "check that it is not the price of a GB." in warning
    gpus = Hardware(1, 4, 1_000, 2)
    [warning] = free_gpus(gpus, replace(NOW, gpu=0))
    assert "--gpu-price" in warning
    assert list(free_gpus(gpus, replace(NOW, gpu=1))) == []
    assert list(free_gpus(replace(gpus, gpus_per_node=0), replace(NOW, gpu=0))) == []
    [warning] = price_warnings(Prices(0, 0, 0))
    assert "All prices would be zero" in warning
    assert price_example(NOW) == (
        "A job of 1 CPU and 2,000 MB pays 0.07 credits per hour, with a GPU 1.07."
    )
    assert "pays 0.0000000000000036 credits" in price_example(Prices(1, 0, 0))


def test_labels_that_are_lost_are_reported_one_by_one() -> None:
    now = {"site": "here", "gpu.model": "a", "kept": "yes"}
    assert list(label_changes(now, {"site": "there", "kept": "yes", "new": "1"})) == [
        "The label gpu.model=a is removed.",
        "The label site=here becomes site=there.",
    ]
    with pytest.raises(UsageError, match="The label a is given twice, as 1 and 2"):
        registration.check_labels([("a", "1"), ("a", "2")])


def test_hardware_that_is_less_than_before_or_is_not_there() -> None:
    large = Hardware(4, 8, 16_000, 1)
    before = replace(PROVIDER, hardware=large)
    assert list(hardware_changes(before, replace(large, nodes=5))) == []
    assert list(hardware_changes(before, replace(large, nodes=1, gpus_per_node=0))) == [
        "The nodes go from 4 to 1.",
        "The GPUs per node go from 1 to 0.",
    ]
    assert list(hardware_warnings(large, large, "this machine")) == []
    assert list(hardware_warnings(large, replace(large, mem_per_node=15_999), "this machine")) == [
        "16000 MB per node would be registered, but this machine has 15999."
    ]


def test_gpus_are_counted_by_their_device_files(tmp_path: Path) -> None:
    assert registration._gpus(tmp_path) == 0
    (tmp_path / "dri").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "dri/renderD128", "dri/card0"):
        (tmp_path / name).touch()
    assert registration._gpus(tmp_path) == 2
    (tmp_path / "kfd").touch()
    assert registration._gpus(tmp_path) == 3
