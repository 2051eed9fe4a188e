"""What commands print: data on stdout as table, JSON or CSV; everything else on stderr."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import IO, Any, Final, Literal

from deepsquare_chain.credits import format_credits, hourly
from deepsquare_chain.observability.redaction import plain


class Format(StrEnum):
    """How data is printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class Kind(StrEnum):
    """What a column holds, which decides how each format shows it."""

    TEXT = "text"
    WORD = "word"  # a status or another single word, which never wraps
    NUMBER = "number"
    FLAG = "flag"
    CREDITS = "credits"  # credit-wei
    COIN = "coin"  # wei of the chain's coin, which pays for gas
    RATE = "rate"  # credit-wei a second, shown to people per hour
    TIME = "time"  # seconds since 1970 on the chain's clock
    SECONDS = "seconds"  # a duration
    HASH = "hash"  # an address, a digest or a transaction, in hexadecimal


#: Kinds that stand for an amount of wei: name and form of the accompanying decimal.
_DECIMALS: Final[Mapping[Kind, tuple[str, Callable[[int], str]]]] = {
    Kind.CREDITS: ("credits", format_credits),
    Kind.COIN: ("coin", format_credits),
    Kind.RATE: ("credits_per_hour", hourly),
}


#: Characters of a shortened hash before and after the gap.
_HEAD, _TAIL = 6, 4
#: What amounts in tables are rounded to, in wei: six decimals.
_SHOWN: Final = 10**12
#: Width of a pipe, which has none: lines are as long as they are, so that grep finds whole rows.
_NO_LIMIT: Final = 1_000


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table, or one field of a record.

    A `detail` is left out of tables that are not `--wide`; JSON, CSV and records have it.
    """

    key: str
    title: str
    kind: Kind = Kind.TEXT
    detail: bool = False


class Printer:
    """Prints what commands find, in the format that was asked for."""

    def __init__(
        self,
        style: Format,
        *,
        wide: bool = False,
        out: IO[str] | None = None,
        err: IO[str] | None = None,
    ) -> None:
        self.style = style
        self.wide = wide
        self._out = out
        self._err = err

    @property
    def out(self) -> IO[str]:
        """Where data goes."""
        return self._out or sys.stdout

    @property
    def err(self) -> IO[str]:
        """Where everything else goes."""
        return self._err or sys.stderr

    def note(self, text: str) -> None:
        """Print a message to people, apart from the data."""
        self.err.write(f"{plain(text, keep=chr(10))}\n")
        self.err.flush()

    def text(self, text: str) -> None:
        """Print a line of data that has no columns."""
        self.out.write(f"{text}\n")
        self.out.flush()

    def clear(self) -> None:
        """Empty a terminal before the same table is shown again; a pipe gets one after the other."""
        if self.out.isatty():
            self.out.write("\x1b[2J\x1b[H")

    def raw(self, data: bytes) -> None:
        """Pass bytes through; on a terminal without control codes, since they are a stranger's."""
        text = data.decode("utf-8", "replace")
        if self.out.isatty():
            self.out.write(plain(text, keep="\n\t"))
        elif (buffer := getattr(self.out, "buffer", None)) is not None:
            buffer.write(data)
        else:
            self.out.write(text)
        self.out.flush()

    def document(self, value: Any) -> None:
        """Print a JSON document, whatever the format."""
        self.text(json.dumps(value, indent=2, ensure_ascii=True))

    @staticmethod
    def as_object(columns: Sequence[Column], row: Sequence[Any]) -> dict[str, Any]:
        """A row as JSON shows it."""
        return _object(columns, row)

    def rows(
        self,
        columns: Sequence[Column],
        rows: Iterable[Sequence[Any]],
        *,
        title: str = "",
        empty: str = "Nothing found.",
    ) -> None:
        """Print a list of rows; a value of None is an empty cell."""
        found = list(rows)
        if self.style is Format.JSON:
            self.document([_object(columns, row) for row in found])
        elif self.style is Format.CSV:
            self._csv(columns, found)
        elif found:
            self._table(columns, found, title)
        else:
            self.note(empty)

    def record(self, columns: Sequence[Column], row: Sequence[Any], *, title: str = "") -> None:
        """Print one thing: a line for each field, or one JSON object."""
        if self.style is Format.JSON:
            self.document(_object(columns, row))
        elif self.style is Format.CSV:
            self._csv(columns, [row])
        else:
            self._vertical(columns, row, title)

    def _csv(self, columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
        writer = csv.writer(self.out, lineterminator="\n")
        writer.writerow(_object(columns, [None] * len(columns)))
        texts = {
            column.key for column in columns if column.kind in {Kind.TEXT, Kind.WORD, Kind.HASH}
        }
        for row in rows:
            found = _object(columns, row)
            writer.writerow([_csv_cell(cell, key in texts) for key, cell in found.items()])
        self.out.flush()

    def _table(self, columns: Sequence[Column], rows: Sequence[Sequence[Any]], title: str) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=SIMPLE_HEAD,
            title=title or None,
            title_justify="left",
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        # Programs that read the pipe, and people who ask for it, get whole hashes.
        short = self.out.isatty() and not self.wide
        listed = [self.wide or not column.detail for column in columns]
        for column in itertools.compress(columns, listed):
            right = column.kind in {Kind.NUMBER, Kind.SECONDS, *_DECIMALS}
            justify: Literal["left", "right"] = "right" if right else "left"
            # Free text may wrap; a number, a date or a hash in two lines can't be read.
            table.add_column(
                Text(column.title),
                justify=justify,
                overflow="fold",
                no_wrap=column.kind is not Kind.TEXT,
            )
        for row in rows:
            cells = itertools.compress(zip(columns, row, strict=True), listed)
            shown = [for_people(column, value, short=short) for column, value in cells]
            table.add_row(*(Text(text) for text in shown))
        self._render(table)

    def _vertical(self, columns: Sequence[Column], row: Sequence[Any], title: str) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=None, show_header=False, title=title or None, title_justify="left", pad_edge=False
        )
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for column, value in zip(columns, row, strict=True):
            table.add_row(Text(column.title), Text(for_people(column, value)))
        self._render(table)

    def _render(self, table: Any) -> None:
        from rich.console import Console

        width = None if self.out.isatty() and not self.wide else _NO_LIMIT
        Console(file=self.out, width=width, highlight=False).print(table)
        self.out.flush()


def for_people(column: Column, value: Any, *, short: bool = False) -> str:  # noqa: PLR0911
    """A cell as a table shows it; `short` rounds amounts and leaves out the middle of hashes."""
    if value is None or value == "":
        return "-"
    match column.kind:
        case Kind.CREDITS | Kind.COIN:
            return format_credits(round(value / _SHOWN) * _SHOWN if short else value)
        case Kind.RATE:
            return f"{hourly(value)}/h"
        case Kind.TIME:
            return iso_time(value)
        case Kind.FLAG:
            return "yes" if value else "no"
        case Kind.SECONDS:
            return duration(value)
        case Kind.HASH:
            return _without_middle(plain(str(value))) if short else plain(str(value))
        case _:
            return plain(str(value))


def _without_middle(text: str) -> str:
    start = len(text) - len(text.removeprefix("0x")) + _HEAD
    return f"{text[:start]}…{text[-_TAIL:]}" if len(text) > start + _TAIL else text


def duration(seconds: int) -> str:
    """Seconds as Slurm writes them: [days-]hours:minutes:seconds."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}-' if days else ''}{hours:02}:{minutes:02}:{rest:02}"


def iso_time(seconds: int) -> str:
    """Chain time as people read it, in UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return str(seconds)


def _object(columns: Sequence[Column], row: Sequence[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column, value in zip(columns, row, strict=True):
        if column.kind in _DECIMALS:
            # Wei do not fit a JSON number; the accompanying decimal is for people.
            suffix, show = _DECIMALS[column.kind]
            found[column.key] = None if value is None else str(value)
            found[f"{column.key}_{suffix}"] = None if value is None else show(value)
        else:
            found[column.key] = value
    return found


def _csv_cell(value: Any, is_text: bool) -> Any:
    if not (is_text and isinstance(value, str)):
        return "" if value is None else value
    # Spreadsheets run a cell that begins like a formula; customers choose names and reasons.
    text = plain(value)
    return f"'{text}" if text[:1] in {"=", "+", "-", "@"} else text


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with the progress and the total of the work."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as shown:
        task = shown.add_task(title, total=None)

        def tell(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total)

        yield tell
