"""Output of commands: data on stdout as a table, JSON or CSV; all messages on stderr."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import IO, Any, Final, Literal

from deepsquare_chain.credits import format_credits, hourly
from deepsquare_chain.observability.redaction import csv_text, plain


class Format(StrEnum):
    """Output format of data."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class Kind(StrEnum):
    """Type of a column's values; determines how each format shows them."""

    TEXT = "text"
    WORD = "word"  # a status or another single word; never wraps
    NUMBER = "number"
    FLAG = "flag"
    CREDITS = "credits"  # credit-wei
    COIN = "coin"  # wei of the chain's native coin, which pays for gas
    RATE = "rate"  # credit-wei per second, shown per hour in tables
    TIME = "time"  # Unix time in seconds, from block timestamps
    SECONDS = "seconds"  # a duration
    HASH = "hash"  # an address, a digest or a transaction hash, in hexadecimal


#: Kinds that hold wei: suffix of the additional decimal field in JSON and CSV, and its formatter.
_DECIMALS: Final[Mapping[Kind, tuple[str, Callable[[int], str]]]] = {
    Kind.CREDITS: ("credits", format_credits),
    Kind.COIN: ("coin", format_credits),
    Kind.RATE: ("credits_per_hour", hourly),
}


#: Characters of a shortened hash before and after the ellipsis.
_HEAD, _TAIL = 6, 4
#: Precision of amounts in tables on a terminal, in wei: six decimals.
_SHOWN: Final = 10**12
#: Characters below which a column of free text is not narrowed.
_MIN_TEXT: Final = 16
#: Line width for pipes and `--wide`, in characters: rows do not wrap, so that grep finds whole rows.
_NO_LIMIT: Final = 1_000


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table, or one field of a record.

    A `detail` column appears in tables only with `--wide`, and always in JSON, CSV and records.
    """

    key: str
    title: str
    kind: Kind = Kind.TEXT
    detail: bool = False


def row_of(columns: Sequence[Column], source: object, **values: Any) -> tuple[Any, ...]:
    """Return a row: for each column the given value, or else the attribute of `source` with its key."""
    return tuple(
        values[column.key] if column.key in values else getattr(source, column.key)
        for column in columns
    )


class Printer:
    """Prints the results of commands in the requested format."""

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
        self.out = out or sys.stdout
        self.err = err or sys.stderr

    def note(self, text: str) -> None:
        """Print a message to stderr."""
        self.err.write(f"{plain(text, keep=chr(10))}\n")
        self.err.flush()

    def text(self, text: str) -> None:
        """Print one line of text as data."""
        self.out.write(f"{text}\n")
        self.out.flush()

    def clear(self) -> None:
        """Clear the terminal before a table is redrawn; does nothing on a pipe."""
        if self.out.isatty():
            self.out.write("\x1b[2J\x1b[H")

    def raw(self, data: bytes) -> None:
        """Write bytes unchanged to a pipe; on a terminal remove control codes, since the data is untrusted."""
        text = data.decode("utf-8", "replace")
        if self.out.isatty():
            self.out.write(plain(text, keep="\n\t"))
        elif (buffer := getattr(self.out, "buffer", None)) is not None:
            buffer.write(data)
        else:
            self.out.write(text)
        self.out.flush()

    def document(self, value: Any) -> None:
        """Print a JSON document, whatever format is set."""
        self.text(json.dumps(value, indent=2, ensure_ascii=True))

    def rows(
        self,
        columns: Sequence[Column],
        rows: Iterable[Sequence[Any]],
        *,
        title: str = "",
        empty: str = "Nothing found.",
    ) -> None:
        """Print a list of rows; a value of None is an empty cell."""
        row_list = list(rows)
        if self.style is Format.JSON:
            self.document([as_object(columns, row) for row in row_list])
        elif self.style is Format.CSV:
            self._csv(columns, row_list)
        elif row_list:
            self._table(columns, row_list, title)
        else:
            self.note(empty)

    def record(self, columns: Sequence[Column], row: Sequence[Any], *, title: str = "") -> None:
        """Print one record: a line per field, one JSON object, or CSV with one row."""
        if self.style is Format.JSON:
            self.document(as_object(columns, row))
        elif self.style is Format.CSV:
            self._csv(columns, [row])
        else:
            self._vertical(columns, row, title)

    def _csv(self, columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
        writer = csv.writer(self.out, lineterminator="\n")
        writer.writerow(as_object(columns, [None] * len(columns)))
        text_keys = {
            column.key for column in columns if column.kind in {Kind.TEXT, Kind.WORD, Kind.HASH}
        }
        for row in rows:
            fields = as_object(columns, row)
            writer.writerow([_csv_cell(cell, key in text_keys) for key, cell in fields.items()])
        self.out.flush()

    def _table(self, columns: Sequence[Column], rows: Sequence[Sequence[Any]], title: str) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        # Pipes and `--wide` get whole hashes.
        short = self.out.isatty() and not self.wide
        visible = [self.wide or not column.detail for column in columns]
        shown = list(itertools.compress(columns, visible))
        lines = [
            [
                format_cell(column, value, short=short)
                for column, value in itertools.compress(zip(columns, row, strict=True), visible)
            ]
            for row in rows
        ]
        titles = [column.title for column in shown]
        if short:
            width = shutil.get_terminal_size().columns
            titles = _fitting_titles(shown, lines, width)
            if _width(shown, titles, lines) > width:
                for number, row in enumerate(rows):
                    self._vertical(columns, row, "" if number else title)
                    self.out.write("\n" * (number + 1 < len(rows)))
                return
        table = Table(
            box=SIMPLE_HEAD,
            title=title or None,
            title_justify="left",
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        for column, heading in zip(shown, titles, strict=True):
            right = column.kind in {Kind.NUMBER, Kind.SECONDS, *_DECIMALS}
            justify: Literal["left", "right"] = "right" if right else "left"
            # Only free text may wrap: a wrapped number, date or hash is unreadable.
            table.add_column(
                Text(heading),
                justify=justify,
                overflow="fold",
                no_wrap=column.kind is not Kind.TEXT,
            )
        for line in lines:
            table.add_row(*(Text(text) for text in line))
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
            table.add_row(Text(column.title), Text(format_cell(column, value)))
        self._render(table)

    def _render(self, table: Any) -> None:
        from rich.console import Console

        class PipeConsole(Console):
            """A console that raises BrokenPipeError; rich would end the program with SystemExit."""

            def on_broken_pipe(self) -> None:
                raise  # noqa: PLE0704 - rich calls this while it handles the error

        width = None if self.out.isatty() and not self.wide else _NO_LIMIT
        PipeConsole(file=self.out, width=width, highlight=False).print(table)
        self.out.flush()


def _fitting_titles(
    columns: Sequence[Column], lines: Sequence[Sequence[str]], width: int
) -> list[str]:
    """Return the titles of a table, wrapped between words if it is too wide for the terminal."""
    titles = [column.title for column in columns]
    if _width(columns, titles, lines) <= width:
        return titles
    return [
        "\n".join(textwrap.wrap(title, max(_longest(cells), *map(len, title.split()))))
        for title, cells in zip(titles, zip(*lines, strict=True), strict=True)
    ]


def _width(columns: Sequence[Column], titles: Sequence[str], lines: Sequence[Sequence[str]]) -> int:
    """Return the characters of a table's line if only cells with free text are wrapped."""
    widths = []
    for column, title, cells in zip(columns, titles, zip(*lines, strict=True), strict=True):
        widest = _longest(cells)
        if column.kind is Kind.TEXT:
            widest = min(widest, _MIN_TEXT)
        widths.append(max(widest, _longest(title.split("\n"))))
    # Padding and the edge of the cell separate columns by two characters.
    return sum(widths) + 2 * (len(widths) - 1)


def _longest(texts: Sequence[str]) -> int:
    return max(map(len, texts))


def format_cell(column: Column, value: Any, *, short: bool = False) -> str:  # noqa: PLR0911
    """Format a cell for tables; `short` rounds amounts and elides the middle of hashes."""
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
    """Format seconds as Slurm does: [days-]hours:minutes:seconds."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}-' if days else ''}{hours:02}:{minutes:02}:{rest:02}"


def iso_time(seconds: int) -> str:
    """Format Unix time in UTC; numbers outside the range of dates are returned as digits."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return str(seconds)


def as_object(columns: Sequence[Column], row: Sequence[Any]) -> dict[str, Any]:
    """Return a row as a JSON object."""
    fields: dict[str, Any] = {}
    for column, value in zip(columns, row, strict=True):
        if column.kind in _DECIMALS:
            # JSON numbers lose precision on wei, so amounts are strings; the decimal field is for people.
            suffix, format_amount = _DECIMALS[column.kind]
            fields[column.key] = None if value is None else str(value)
            fields[f"{column.key}_{suffix}"] = None if value is None else format_amount(value)
        else:
            fields[column.key] = value
    return fields


def _csv_cell(value: Any, is_text: bool) -> Any:
    if is_text and isinstance(value, str):
        return csv_text(value)  # names and reasons are chosen by users
    return "" if value is None else value


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr; yields a function that takes the done and the total count."""
    from rich import progress as rich_progress
    from rich.console import Console

    with rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
