"""What commands print: data on stdout as table, JSON or CSV; everything else on stderr."""

from __future__ import annotations

import csv
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
    NUMBER = "number"
    FLAG = "flag"
    CREDITS = "credits"  # credit-wei
    COIN = "coin"  # wei of the chain's coin, which pays for gas
    RATE = "rate"  # credit-wei a second, shown to people per hour
    TIME = "time"  # seconds since 1970 on the chain's clock


#: Kinds that stand for an amount of wei: name and form of the decimal beside it.
_DECIMALS: Final[Mapping[Kind, tuple[str, Callable[[int], str]]]] = {
    Kind.CREDITS: ("credits", format_credits),
    Kind.COIN: ("coin", format_credits),
    Kind.RATE: ("credits_per_hour", hourly),
}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table, or one field of a record.

    A `detail` is left out of tables, which have only so much room; JSON, CSV and records have it.
    """

    key: str
    title: str
    kind: Kind = Kind.TEXT
    detail: bool = False


class Printer:
    """Prints what commands find, in the format that was asked for."""

    def __init__(
        self, style: Format, *, out: IO[str] | None = None, err: IO[str] | None = None
    ) -> None:
        self.style = style
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
        """Say something beside the data."""
        self.err.write(f"{plain(text, keep=chr(10))}\n")
        self.err.flush()

    def text(self, text: str) -> None:
        """Print a line of data that has no columns."""
        self.out.write(f"{text}\n")
        self.out.flush()

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
        texts = {column.key for column in columns if column.kind is Kind.TEXT}
        for row in rows:
            found = _object(columns, row)
            writer.writerow([_csv_cell(cell, key in texts) for key, cell in found.items()])
        self.out.flush()

    def _table(self, columns: Sequence[Column], rows: Sequence[Sequence[Any]], title: str) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
        listed = [column for column in columns if not column.detail]
        for column in listed:
            right = column.kind in {Kind.NUMBER, *_DECIMALS}
            # A shortened address or hash is of no use to anybody: cells wrap instead.
            justify: Literal["left", "right"] = "right" if right else "left"
            table.add_column(Text(column.title), justify=justify, overflow="fold")
        for row in rows:
            cells = zip(columns, row, strict=True)
            shown = [for_people(column, value) for column, value in cells if not column.detail]
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

        # A pipe has no width: lines are then as long as they are, so that grep finds whole rows.
        width = None if self.out.isatty() else 240
        Console(file=self.out, width=width, highlight=False).print(table)
        self.out.flush()


def for_people(column: Column, value: Any) -> str:
    """A cell as a table shows it."""
    if value is None or value == "":
        return "-"
    match column.kind:
        case Kind.CREDITS | Kind.COIN:
            return format_credits(value)
        case Kind.RATE:
            return f"{hourly(value)}/h"
        case Kind.TIME:
            return iso_time(value)
        case Kind.FLAG:
            return "yes" if value else "no"
        case _:
            return plain(str(value))


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
            # Wei do not fit a JSON number; the decimal beside it is for people.
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
    """A function that is told how far the work is, and how far it goes."""
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
