"""Formatting of amounts, times, hashes and resources for pages. Pure; amounts are credit-wei.

The functions accept any value of the index and any untrusted text, without raising.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final

from markupsafe import Markup, escape

from deepsquare_chain.credits import CREDIT, format_credits, hourly, parse_credits
from deepsquare_chain.job import DAY, HOUR, Hardware, Offer, Resources

_MINUTE: Final = 60
#: Most decimals that are shown of an amount.
_DECIMALS: Final = 6
_UNITS: Final = ((DAY, "d"), (HOUR, "h"), (_MINUTE, "min"), (1, "s"))
_GWEI: Final = 10**9
_GIGABYTE: Final = 1_024
#: Control, zero-width and bidirectional characters, line separators, byte order marks, surrogates.
_INVISIBLE: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def grouped(number: int) -> str:
    """Format a whole number with thin spaces between thousands: `12 345`."""
    return f"{number:,}".replace(",", "\u2009")


def amount(wei: int) -> tuple[str, str]:
    """Format an amount of credits: the signed whole part, and the decimals with their point.

    There are two to six decimals, truncated and not rounded; pages show the exact amount on demand.
    An amount below 0.000001 credits has all its decimals.
    """
    whole, part = divmod(abs(wei), CREDIT)
    digits = f"{part:018d}".rstrip("0")
    decimals = digits[:_DECIMALS] if whole or digits[:_DECIMALS].strip("0") else digits
    decimals = decimals.rstrip("0").ljust(2, "0")
    return ("\u2212" if wei < 0 else "") + grouped(whole), f".{decimals}"


def plain_amount(wei: int) -> str:
    """Format an amount as one string, for sentences and titles."""
    return "".join(amount(wei))


def per_hour(rate: int) -> int:
    """Convert credit-wei per second to credit-wei per hour, as the price was entered."""
    return parse_credits(hourly(rate))


def gwei(wei: int) -> str:
    """Format a gas price in gwei, with three decimals, or all of them below one gwei."""
    whole, part = divmod(wei, _GWEI)
    digits = f"{part:09d}"[: 3 if whole else 9].rstrip("0")
    return f"{grouped(whole)}.{digits}" if digits else grouped(whole)


def coin(wei: int) -> str:
    """Format an amount of the chain's native coin, with at most eight decimals."""
    text = format_credits(wei)
    whole, _, part = text.partition(".")
    short = part[:8].rstrip("0")
    if not short:
        return f"<{whole}.00000001" if part else whole
    return f"{whole}.{short}"


def short(text: str, front: int = 6, back: int = 4) -> str:
    """Shorten a long text, such as a hash or address, by leaving out its middle."""
    if text.startswith("0x"):
        front += 2
    if len(text) <= front + back + 1:
        return text
    return f"{text[:front]}\u2026{text[-back:]}"


def iso(seconds: int) -> str:
    """Format a time for `datetime` attributes; empty if it is out of range."""
    return _utc(seconds, "%Y-%m-%dT%H:%M:%SZ") or ""


def clock(seconds: int) -> str:
    """Format date and time in UTC for people."""
    return _utc(seconds, "%Y-%m-%d %H:%M:%S") or str(seconds)


def axis_time(seconds: int, span: int) -> str:
    """Format a time for the axis of a chart that covers `span` seconds."""
    if span < 3 * _MINUTE:
        return _utc(seconds, "%H:%M:%S") or str(seconds)
    return _utc(seconds, "%H:%M" if span < 2 * DAY else "%d %b") or str(seconds)


def ago(seconds: int, now: int) -> str:
    """Format the time before `now` in one unit: `5 min ago`, or `in 5 min` for the future."""
    elapsed = now - seconds
    if abs(elapsed) < 2:
        return "now"
    text = duration(abs(elapsed), units=1)
    return f"{text} ago" if elapsed > 0 else f"in {text}"


def duration(seconds: int, units: int = 2) -> str:
    """Format a duration in its largest unit and the next ones: `2 h 5 min`."""
    if seconds < 0:
        return "\u2212" + duration(-seconds, units)
    first = next((index for index, (size, _) in enumerate(_UNITS) if seconds >= size), -1)
    parts: list[str] = []
    for size, unit in _UNITS[first:][:units]:
        count, seconds = divmod(seconds, size)
        if count or not parts:
            parts.append(f"{grouped(count)}\u00a0{unit}")
    return " ".join(parts)


def memory(megabytes: int) -> str:
    """Format memory in MB, or in GB from one GB (1,024 MB)."""
    if megabytes < _GIGABYTE:
        return f"{megabytes}\u00a0MB"
    return f"{megabytes / _GIGABYTE:.4g}\u00a0GB"


def _hardware(cpus: int, megabytes: int, gpus: int, separator: str = ", ") -> str:
    parts = [f"{grouped(cpus)}\u00a0CPU", memory(megabytes)]
    if gpus:
        parts.append(f"{grouped(gpus)}\u00a0GPU")
    return separator.join(parts)


def size_of(resources: Resources) -> str:
    """Format the resources of a job."""
    return _hardware(resources.cpus, resources.memory, resources.gpus, " \u00b7 ")


def hardware(cluster: Hardware) -> str:
    """Format the hardware of a cluster."""
    node = _hardware(cluster.cpus_per_node, cluster.mem_per_node, cluster.gpus_per_node)
    return f"{count(cluster.nodes, 'node')} of {node}"


def capacity(offer: Offer) -> str:
    """Format the capacity that a provider offers."""
    return _hardware(offer.cpus, offer.memory, offer.gpus)


def percent(share: float) -> str:
    """Format a share between zero and one as a percentage."""
    return f"{share * 100:.0f}\u2009%" if share in (0, 1) else f"{share * 100:.1f}\u2009%"


def count(number: int, noun: str) -> str:
    """Format a number with its noun: `1 job`, `2 jobs`."""
    return f"{grouped(number)} {noun}" + ("" if number == 1 else "s")


def page_numbers(current: int, last: int) -> list[int | None]:
    """Return the pages to link to: first, last, and those around `current`; None marks a gap."""
    numbers: list[int | None] = []
    previous = 0
    for number in sorted({1, last, *range(max(1, current - 2), min(last, current + 2) + 1)}):
        if number > previous + 1:
            numbers.append(None)
        numbers.append(number)
        previous = number
    return numbers


def words(name: str) -> str:
    """Split an identifier into words: `answer_by` and `answerBy` become `answer by`."""
    result = "".join(f" {c.lower()}" if c.isupper() else c for c in name if name.upper() != name)
    return (result or name).replace("_", " ").strip()


def visible(text: str, keep: str = "") -> str:
    """Escape control and bidirectional characters of an untrusted text, except those in `keep`.

    Templates escape markup; this function prevents a name from reordering the line around it.
    """
    return _INVISIBLE.sub(lambda c: c[0] if c[0] in keep else f"\\u{ord(c[0]):04x}", text)


def code(text: str) -> str:
    """Escape an untrusted script as `visible` does, but keep line breaks and tabs."""
    return visible(text, "\n\t")


def with_code(text: str) -> Markup:
    """Convert a hint to HTML, with text between backticks as code; everything is escaped."""
    parts = visible(text).split("`")
    if len(parts) % 2 == 0:
        return escape(visible(text))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part)
        for index, part in enumerate(parts)
    )


def _utc(seconds: int, pattern: str) -> str | None:
    """Format a time in UTC; None if it is beyond the calendar."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(pattern)
    except (OverflowError, OSError, ValueError):
        return None


#: Filters of the templates, by the names of their functions.
FILTERS: Final[dict[str, Any]] = {
    function.__name__: function
    for function in (
        *(grouped, amount, plain_amount, per_hour, gwei, coin, short, iso),
        *(clock, duration, memory, size_of, hardware, capacity, percent, words),
        *(visible, code, with_code),
    )
} | {"exact": format_credits}
