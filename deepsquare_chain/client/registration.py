"""What a registration, a change of prices or of labels would undo, in words; pure but for `machine`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import psutil

from deepsquare_chain.credits import CREDIT, SECONDS_PER_HOUR, format_credits, hourly
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import MEGABYTE, Hardware, Prices, Provider

#: Highest price of a CPU, a GPU or a MB, in credit-wei per second: `MAX_PRICE` of the contract.
MAX_PRICE: Final = 10 * CREDIT
#: A price that changes by this factor is asked about: more often a wrong unit than a decision.
_FACTOR: Final = 10
_NAMES: Final = (("cpu", "CPU"), ("gpu", "GPU"), ("mem", "MB of memory"))
#: Fields of `Hardware`, and what people call them.
_PARTS: Final = (
    ("nodes", "nodes"),
    ("cpus_per_node", "CPUs per node"),
    ("mem_per_node", "MB per node"),
    ("gpus_per_node", "GPUs per node"),
)


def price_per_second(credits_per_hour: int, text: str) -> int:
    """Credit-wei per second of a price in credit-wei per hour, rounded down.

    Raises:
        ValueError: It is more than the contract takes, or so little that it would be free.
    """
    found = credits_per_hour // SECONDS_PER_HOUR
    if found > MAX_PRICE:
        raise ValueError(
            f"{text[:80]} credits per hour is more than the highest price, {hourly(MAX_PRICE)}; "
            "a price is for one CPU, GPU or MB, per hour"
        )
    if credits_per_hour and not found:
        raise ValueError(
            f"{text[:80]} credits per hour is less than the smallest price, {hourly(1)}, and "
            "would be free"
        )
    return found


def price_changes(now: Prices, wanted: Prices) -> Iterator[str]:
    """What is zeroed, or changed so much that it may be a mistake."""
    for name, word in _NAMES:
        before, after = getattr(now, name), getattr(wanted, name)
        if before == after or not before:
            continue
        words = f"The price per {word} goes from {_rounded(before)} to {_rounded(after)} credits per hour"
        if not after:
            yield f"{words}: it would be free."
        elif max(before, after) >= _FACTOR * min(before, after):
            yield f"{words}, {_times(before, after)}."


def price_doubts(wanted: Prices) -> Iterator[str]:
    """Prices that look like a wrong unit."""
    if wanted.mem and wanted.mem >= wanted.cpu:
        yield (
            f"A MB of memory would cost {_rounded(wanted.mem)} credits per hour, and a CPU "
            f"{_rounded(wanted.cpu)}: is the price of a GB meant?"
        )
    if not (wanted.cpu or wanted.gpu or wanted.mem):
        yield "All prices would be zero, and no job goes to a provider for nothing."


def free_gpus(hardware: Hardware, prices: Prices) -> Iterator[str]:
    """Whether GPUs would be given away."""
    if hardware.gpus_per_node and not prices.gpu:
        yield "GPUs are registered without a price, and would be free: set --gpu-price."


def price_example(prices: Prices) -> str:
    """What typical jobs would pay, per hour."""
    small = prices.cpu + 2_000 * prices.mem
    words = f"A job of 1 CPU and 2,000 MB pays {_rounded(small)} credits per hour"
    if prices.gpu:
        words += f", with a GPU {_rounded(small + prices.gpu)}"
    return f"{words}."


def label_changes(now: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    """Labels that are removed or get another value."""
    for key, value in sorted(now.items()):
        if key not in wanted:
            yield f"The label {key}={value} is removed."
        elif wanted[key] != value:
            yield f"The label {key}={value} becomes {key}={wanted[key]}."


def hardware_changes(provider: Provider, wanted: Hardware) -> Iterator[str]:
    """What there is less of than in the hardware that is in force."""
    now = provider.hardware
    for name, word in _PARTS:
        before, after = getattr(now, name), getattr(wanted, name)
        if after < before:
            yield f"The {word} go from {before} to {after}."


def hardware_doubts(wanted: Hardware, found: Hardware, place: str) -> Iterator[str]:
    """What would be registered and is not there.

    Args:
        wanted: What would be registered.
        found: What there is.
        place: Where that was looked at, such as "this machine".
    """
    for name, word in _PARTS:
        asked, there = getattr(wanted, name), getattr(found, name)
        if asked > there:
            yield f"{asked} {word} would be registered, and {place} has {there}."


def machine() -> Hardware:
    """This machine as one node; memory in MB."""
    return Hardware(
        nodes=1,
        cpus_per_node=os.cpu_count() or 1,
        mem_per_node=psutil.virtual_memory().total // MEGABYTE,
        gpus_per_node=_gpus(Path("/dev")),
    )


def check_labels(labels: list[tuple[str, str]]) -> dict[str, str]:
    """Labels by key.

    Raises:
        UsageError: A key is given twice.
    """
    found: dict[str, str] = {}
    for key, value in labels:
        if found.setdefault(key, value) != value:
            raise UsageError(
                f"The label {key} is given twice, as {found[key]} and {value}",
                hint="Give each key once.",
            )
    return found


def _gpus(devices: Path) -> int:
    """GPUs that have a device file; those of AMD only where their driver is loaded."""
    nvidia = len([path for path in devices.glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    amd = len(list((devices / "dri").glob("renderD*"))) if (devices / "kfd").exists() else 0
    return nvidia + amd


def _times(before: int, after: int) -> str:
    larger, smaller = max(before, after), min(before, after)
    return f"{larger // smaller:,} times {'more' if after > before else 'less'}"


def _rounded(per_second: int) -> str:
    """Credits per hour to six digits after the point, or exactly where that would be zero."""
    exact = per_second * SECONDS_PER_HOUR
    unit = CREDIT // 1_000_000
    rounded = round(exact / unit) * unit
    return format_credits(rounded or exact)
