"""Warnings before registrations and changes of prices or labels; pure except for `machine`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import psutil

from deepsquare_chain.credits import CREDIT, format_credits, hourly
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import HOUR, MEGABYTE, Hardware, Prices, Provider

#: Maximum price of a CPU, a GPU or a MB, in credit-wei per second: `MAX_PRICE` of the contract.
MAX_PRICE: Final = 10 * CREDIT
#: A price change by this factor needs a confirmation: it is usually a wrong unit.
_FACTOR: Final = 10
_NAMES: Final = (("cpu", "CPU"), ("gpu", "GPU"), ("mem", "MB of memory"))
#: Fields of `Hardware`, and their names for display.
_HARDWARE_FIELDS: Final = (
    ("nodes", "nodes"),
    ("cpus_per_node", "CPUs per node"),
    ("mem_per_node", "MB per node"),
    ("gpus_per_node", "GPUs per node"),
)


def price_per_second(credits_per_hour: int, text: str) -> int:
    """Convert a price in credit-wei per hour to credit-wei per second, rounded down.

    Raises:
        ValueError: The price is above the contract's maximum, or would be rounded to zero.
    """
    price = credits_per_hour // HOUR
    if price > MAX_PRICE:
        raise ValueError(
            f"{text[:80]} credits per hour is more than the maximum price, {hourly(MAX_PRICE)}; "
            "a price is for one CPU, GPU or MB, per hour"
        )
    if credits_per_hour and not price:
        raise ValueError(
            f"{text[:80]} credits per hour is less than the minimum price, {hourly(1)}, and "
            "would be free"
        )
    return price


def price_changes(now: Prices, wanted: Prices) -> Iterator[str]:
    """Yield warnings about prices that become zero, or change so much that it may be a mistake."""
    for name, word in _NAMES:
        before, after = getattr(now, name), getattr(wanted, name)
        if before == after or not before:
            continue
        words = f"The price per {word} goes from {_format_price(before)} to {_format_price(after)} credits per hour"
        if not after:
            yield f"{words}: it would be free."
        elif max(before, after) >= _FACTOR * min(before, after):
            yield f"{words}, {_ratio_text(before, after)}."


def price_warnings(wanted: Prices) -> Iterator[str]:
    """Yield warnings about prices that seem to be in a wrong unit."""
    if wanted.mem and wanted.mem >= wanted.cpu:
        yield (
            f"A MB of memory would cost {_format_price(wanted.mem)} credits per hour, and a CPU "
            f"{_format_price(wanted.cpu)}: check that it is not the price of a GB."
        )
    if not (wanted.cpu or wanted.gpu or wanted.mem):
        yield "All prices would be zero, and a provider without a price gets no jobs."


def free_gpus(hardware: Hardware, prices: Prices) -> Iterator[str]:
    """Yield a warning if GPUs have no price."""
    if hardware.gpus_per_node and not prices.gpu:
        yield "GPUs are registered without a price, and would be free: set --gpu-price."


def price_example(prices: Prices) -> str:
    """Return an example of the hourly price of typical jobs."""
    cpu_job = prices.cpu + 2_000 * prices.mem
    words = f"A job of 1 CPU and 2,000 MB pays {_format_price(cpu_job)} credits per hour"
    if prices.gpu:
        words += f", with a GPU {_format_price(cpu_job + prices.gpu)}"
    return f"{words}."


def label_changes(now: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    """Yield warnings about labels that are removed or changed."""
    for key, value in sorted(now.items()):
        if key not in wanted:
            yield f"The label {key}={value} is removed."
        elif wanted[key] != value:
            yield f"The label {key}={value} becomes {key}={wanted[key]}."


def hardware_changes(provider: Provider, wanted: Hardware) -> Iterator[str]:
    """Yield warnings about hardware that is reduced."""
    now = provider.hardware
    for name, word in _HARDWARE_FIELDS:
        before, after = getattr(now, name), getattr(wanted, name)
        if after < before:
            yield f"The {word} go from {before} to {after}."


def hardware_warnings(
    wanted: Hardware, detected_hardware: Hardware, machine_name: str
) -> Iterator[str]:
    """Yield warnings about hardware that would be registered but does not exist.

    Args:
        wanted: Hardware to register.
        detected_hardware: Detected hardware.
        machine_name: Name of the place of detection, such as "this machine".
    """
    for name, word in _HARDWARE_FIELDS:
        registered, detected = getattr(wanted, name), getattr(detected_hardware, name)
        if registered > detected:
            yield f"{registered} {word} would be registered, but {machine_name} has {detected}."


def machine() -> Hardware:
    """Return the hardware of this machine as one node; memory in MB."""
    return Hardware(
        nodes=1,
        cpus_per_node=os.cpu_count() or 1,
        mem_per_node=psutil.virtual_memory().total // MEGABYTE,
        gpus_per_node=_gpus(Path("/dev")),
    )


def check_labels(labels: list[tuple[str, str]]) -> dict[str, str]:
    """Return labels by key.

    Raises:
        UsageError: A key is given twice with different values.
    """
    value_by_key: dict[str, str] = {}
    for key, value in labels:
        if value_by_key.setdefault(key, value) != value:
            raise UsageError(
                f"The label {key} is given twice, as {value_by_key[key]} and {value}",
                hint="Give each key once.",
            )
    return value_by_key


def _gpus(devices: Path) -> int:
    """Return the number of GPUs with a device file; AMD GPUs count only if their driver is loaded."""
    nvidia = len([path for path in devices.glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    amd = len(list((devices / "dri").glob("renderD*"))) if (devices / "kfd").exists() else 0
    return nvidia + amd


def _ratio_text(before: int, after: int) -> str:
    larger, smaller = max(before, after), min(before, after)
    return f"{larger // smaller:,} times {'more' if after > before else 'less'}"


def _format_price(per_second: int) -> str:
    """Format credits per hour with six decimal places, or exactly if that would be zero."""
    exact = per_second * HOUR
    unit = CREDIT // 1_000_000
    rounded = round(exact / unit) * unit
    return format_credits(rounded or exact)
