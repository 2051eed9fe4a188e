"""How pages write amounts, times, hashes and resources. Pure; amounts are credit-wei.

Every function takes what the index or a stranger's text gives, and never fails on a value.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from markupsafe import Markup, escape

from deepsquare_chain.credits import CREDIT, SECONDS_PER_HOUR, format_credits, hourly, parse_credits
from deepsquare_chain.job import Hardware, Offer, Resources

_MINUTE: Final = 60
_DAY: Final = 86_400
#: Shown digits after the point where a whole column must be of one width.
_PLACES: Final = 6
_SPANS: Final = ((_DAY, "d"), (SECONDS_PER_HOUR, "h"), (_MINUTE, "min"), (1, "s"))
_GWEI: Final = 10**9
_GIGABYTE: Final = 1_024


def grouped(number: int) -> str:
    """A whole number with thin spaces between thousands: `12 345`."""
    return f"{number:,}".replace(",", "\u2009")


def amount(wei: int) -> tuple[str, str]:
    """An amount of credits as whole part with its sign, and decimals with their point.

    At least two decimals, and at most six, cut and never rounded up: pages show the exact amount on
    demand. An amount too small for them has all of its decimals.
    """
    whole, part = divmod(abs(wei), CREDIT)
    digits = f"{part:018d}".rstrip("0")
    shown = digits[:_PLACES] if whole or digits[:_PLACES].strip("0") else digits
    shown = shown.rstrip("0").ljust(2, "0")
    return ("\u2212" if wei < 0 else "") + grouped(whole), f".{shown}"


def exact(wei: int) -> str:
    """The exact decimal of an amount, for titles and copies."""
    return format_credits(wei)


def plain_amount(wei: int) -> str:
    """An amount in one piece, for sentences and titles."""
    return "".join(amount(wei))


def per_hour(rate: int) -> int:
    """Credit-wei per hour of a rate in credit-wei per second, as the price was entered."""
    return parse_credits(hourly(rate))


def gwei(wei: int) -> str:
    """A gas price in gwei: three decimals, or all of them where it is below one."""
    whole, part = divmod(wei, _GWEI)
    digits = f"{part:09d}"[: 3 if whole else 9].rstrip("0")
    return f"{grouped(whole)}.{digits}" if digits else grouped(whole)


def coin(wei: int) -> str:
    """An amount of the chain's own coin, in eight decimals at most."""
    text = format_credits(wei)
    whole, _, part = text.partition(".")
    short = part[:8].rstrip("0")
    if not short:
        return f"<{whole}.00000001" if part else whole
    return f"{whole}.{short}"


def short(text: str, front: int = 6, back: int = 4) -> str:
    """A hash or address with its middle left out; anything else as it is."""
    if text.startswith("0x"):
        front += 2
    if len(text) <= front + back + 1:
        return text
    return f"{text[:front]}\u2026{text[-back:]}"


def iso(seconds: int) -> str:
    """A time for `datetime` attributes; empty where the calendar does not reach it."""
    found = _moment(seconds)
    return found.strftime("%Y-%m-%dT%H:%M:%SZ") if found else ""


def clock(seconds: int) -> str:
    """Date and time in UTC as people read it."""
    found = _moment(seconds)
    return found.strftime("%Y-%m-%d %H:%M:%S") if found else str(seconds)


def axis_time(seconds: int, span: int) -> str:
    """A time under a chart that is `span` seconds wide."""
    found = _moment(seconds)
    if found is None:
        return str(seconds)
    if span < 3 * _MINUTE:
        return found.strftime("%H:%M:%S")
    return found.strftime("%H:%M" if span < 2 * _DAY else "%d %b")


def ago(seconds: int, now: int) -> str:
    """How long before `now`, in one unit; `in 5 min` for what is to come."""
    passed = now - seconds
    if abs(passed) < 2:
        return "now"
    text = _one_unit(abs(passed))
    return f"{text} ago" if passed > 0 else f"in {text}"


def duration(seconds: int) -> str:
    """A length of time in its two largest units: `2 h 5 min`."""
    if seconds < 0:
        return "\u2212" + duration(-seconds)
    for at, (size, unit) in enumerate(_SPANS):
        if seconds >= size:
            count, rest = divmod(seconds, size)
            text = f"{grouped(count)}\u00a0{unit}"
            if at + 1 < len(_SPANS) and (more := rest // _SPANS[at + 1][0]):
                text += f" {more}\u00a0{_SPANS[at + 1][1]}"
            return text
    return "0\u00a0s"


def memory(megabytes: int) -> str:
    """Memory in MB, or from one GB (1,024 MB) on in GB."""
    if megabytes < _GIGABYTE:
        return f"{megabytes}\u00a0MB"
    return f"{megabytes / _GIGABYTE:.4g}\u00a0GB"


def size_of(resources: Resources) -> str:
    """What a job asks for, in a few words."""
    words = [f"{grouped(resources.cpus)}\u00a0CPU", memory(resources.memory)]
    if resources.gpus:
        words.append(f"{grouped(resources.gpus)}\u00a0GPU")
    return " \u00b7 ".join(words)


def hardware(found: Hardware) -> str:
    """What a cluster consists of, in a few words."""
    each = f"{grouped(found.cpus_per_node)}\u00a0CPU, {memory(found.mem_per_node)}"
    if found.gpus_per_node:
        each += f", {found.gpus_per_node}\u00a0GPU"
    nodes = "1 node" if found.nodes == 1 else f"{grouped(found.nodes)} nodes"
    return f"{nodes} of {each}"


def capacity(offer: Offer) -> str:
    """What a provider offers, in a few words."""
    text = f"{grouped(offer.cpus)}\u00a0CPU, {memory(offer.memory)}"
    return text + (f", {grouped(offer.gpus)}\u00a0GPU" if offer.gpus else "")


def percent(share: float) -> str:
    """A share between zero and one."""
    return f"{share * 100:.0f}\u2009%" if share in (0, 1) else f"{share * 100:.1f}\u2009%"


def count(number: int, noun: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{grouped(number)} {noun}" + ("" if number == 1 else "s")


def page_numbers(here: int, last: int) -> list[int | None]:
    """Numbers of pages to link to: the ends, and those around `here`; None for those between."""
    near = {1, last, *range(max(1, here - 2), min(last, here + 2) + 1)}
    shown: list[int | None] = []
    for number in sorted(near):
        if shown and shown[-1] is not None and number > shown[-1] + 1:
            shown.append(None)
        shown.append(number)
    return shown


def words(name: str) -> str:
    """An identifier as words: `answer_by` and `answerBy` become `answer by`."""
    found = "".join(f" {c.lower()}" if c.isupper() else c for c in name if name.upper() != name)
    return (found or name).replace("_", " ").strip()


def visible(text: str, keep: str = "") -> str:
    """A stranger's text with control characters and direction marks written out, but for some.

    Markup is the templates' matter; this keeps a name from rearranging the line it stands in.
    """
    shown = (c if c in keep or _is_harmless(c) else f"\\u{ord(c):04x}" for c in text)
    return "".join(shown)


def code(text: str) -> str:
    """A stranger's script: the same with its lines and tabs."""
    return visible(text, "\n\t")


def with_code(text: str) -> Markup:
    """A hint, whose commands stand between backticks, with those as code; all of it escaped."""
    parts = visible(text).split("`")
    if len(parts) % 2 == 0:
        return escape(visible(text))
    return Markup("").join(
        Markup("<code>{}</code>").format(each) if at % 2 else escape(each)
        for at, each in enumerate(parts)
    )


def _is_harmless(char: str) -> bool:
    code = ord(char)
    control = code < 0x20 or 0x7F <= code < 0xA0
    turns = 0x200B <= code <= 0x200F or 0x2028 <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return not (control or turns or code == 0xFEFF or 0xD800 <= code <= 0xDFFF)


def _one_unit(seconds: int) -> str:
    for size, unit in _SPANS:
        if seconds >= size:
            return f"{grouped(seconds // size)}\u00a0{unit}"
    return "0\u00a0s"


def _moment(seconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):
        return None


FILTERS: Final[dict[str, Any]] = {
    "grouped": grouped,
    "amount": amount,
    "exact": exact,
    "plain_amount": plain_amount,
    "per_hour": per_hour,
    "gwei": gwei,
    "coin": coin,
    "short": short,
    "iso": iso,
    "clock": clock,
    "duration": duration,
    "memory": memory,
    "size_of": size_of,
    "hardware": hardware,
    "capacity": capacity,
    "percent": percent,
    "words": words,
    "visible": visible,
    "code": code,
    "with_code": with_code,
}
