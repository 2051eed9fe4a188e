"""How amounts, times, hashes and texts stand on pages. Pure; markup is made here and nowhere else."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from markupsafe import Markup, escape

from deepsquare_chain.observe.plain import plain
from deepsquare_chain.credits import format_credits, hourly
from deepsquare_chain.job import JobStatus

_SHOWN_DECIMALS: Final = 6
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def grouped(value: int) -> str:
    """An integer with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def credits_text(amount: int) -> str:
    """Exact credits of credit-wei, thousands apart."""
    whole, _, part = format_credits(abs(amount)).partition(".")
    sign = "\u2212" if amount < 0 else ""
    return f"{sign}{grouped(int(whole))}{'.' + part if part else ''}"


def credits(amount: int | None, *, signed: bool = False) -> Markup:
    """Credits rounded down to six decimals for reading; the exact amount is in the title."""
    if amount is None:
        return Markup('<span class="dim">\u2013</span>')
    whole, _, part = format_credits(abs(amount)).partition(".")
    sign = "\u2212" if amount < 0 else "+" if signed and amount > 0 else ""
    shown = part[:_SHOWN_DECIMALS]
    cut = "\u2026" if len(part) > _SHOWN_DECIMALS else ""
    kind = " neg" if signed and amount < 0 else " pos" if signed and amount > 0 else ""
    fraction = Markup('<span class="frac">.{}{}</span>').format(shown, cut) if part else Markup("")
    title = f"{credits_text(amount)} credits = {amount} credit-wei"
    return Markup('<span class="amount{}" title="{}">{}{}{}</span>').format(
        kind, title, sign, grouped(int(whole)), fraction
    )


def rate(wei_per_second: int) -> Markup:
    """A price a second as credits an hour."""
    if not wei_per_second:
        return Markup('<span class="dim">\u2013</span>')
    return Markup('<span class="amount" title="{} credit-wei a second">{}/h</span>').format(
        wei_per_second, hourly(wei_per_second)
    )


def duration(seconds: int | float) -> str:
    """Seconds as the two largest units that matter."""
    left, parts = int(seconds), []
    for size, unit in _UNITS:
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count}\u00a0{unit}")
    return " ".join(parts[:2])


def moment(time: int | None) -> Markup:
    """A chain time; scripts make it relative, the title keeps it exact."""
    if not time:
        return Markup('<span class="dim">\u2013</span>')
    at = datetime.fromtimestamp(time, UTC)
    return Markup('<time datetime="{}" title="{} UTC, chain time {}">{}</time>').format(
        at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        at.strftime("%Y-%m-%d %H:%M:%S"),
        time,
        at.strftime("%Y-%m-%d %H:%M:%S"),
    )


def short(text: str, head: int = 6, tail: int = 4) -> str:
    """The ends of a long hash or address."""
    return text if len(text) <= head + tail + 3 else f"{text[:head]}\u2026{text[-tail:]}"


def status(value: JobStatus | str) -> Markup:
    """A status as a coloured pill; its name says the same."""
    name = value.name if isinstance(value, JobStatus) else str(value)
    return Markup('<span class="status s-{}">{}</span>').format(name, name)


def stranger(text: Any) -> str:
    """Somebody's text with control and direction characters written out; escaping comes after."""
    return plain(str(text))


def percent(share: float | None) -> str:
    """A share as percent."""
    return "\u2013" if share is None else f"{100 * share:.1f}\u00a0%"


def memory(mb: int) -> str:
    """Megabytes as people read them."""
    return f"{mb / 1_000:,.4g}\u00a0GB" if mb >= 10_000 else f"{grouped(mb)}\u00a0MB"


def value(item: Any) -> Markup:
    """A value of an event or call, nested ones as text."""
    if isinstance(item, bool):
        return Markup("yes" if item else "no")
    if isinstance(item, int):
        return Markup('<span class="amount">{}</span>').format(item)
    if isinstance(item, dict):
        rows = Markup("").join(
            Markup("<dt>{}</dt><dd>{}</dd>").format(stranger(key), value(each))
            for key, each in item.items()
        )
        return Markup('<dl class="facts">{}</dl>').format(rows)
    if isinstance(item, list | tuple):
        return Markup(", ").join(value(each) for each in item) if item else Markup("none")
    return Markup("{}").format(escape(stranger(item)))
