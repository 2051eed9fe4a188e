"""Output of the demo: a live table on a terminal, plain lines otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deepsquare_chain.credits import format_credits
from deepsquare_chain.job import JobStatus
from deepsquare_chain.observability.redaction import plain

_STYLES: Final[Mapping[JobStatus, str]] = {
    JobStatus.PENDING: "dim",
    JobStatus.RUNNING: "bold cyan",
    JobStatus.FINISHED: "green",
    JobStatus.CANCELLED: "yellow",
    JobStatus.FAILED: "red",
    JobStatus.OUT_OF_CREDITS: "magenta",
    JobStatus.PANICKED: "bold red",
}
_GWEI: Final = 10**9


@dataclass(frozen=True, slots=True)
class Row:
    """A job in the table; amounts are in credit-wei, `gas_wei` is the cost of its transactions.

    `used` is the amount that a final job consumed, None while it is live.
    """

    job_id: int
    name: str
    customer: str
    status: JobStatus
    provider: str
    escrow: int
    used: int | None
    gas_wei: int
    retry_of: int | None = None


class Board:
    """Shows a table of jobs, and prints lines; used as a context manager."""

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self._title = title
        self._rows: tuple[Row, ...] = ()
        self._note = ""
        self._seen: dict[int, tuple[JobStatus, str]] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(
                self._render(), console=self.console, refresh_per_second=4, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str, style: str = "") -> None:
        """Print a line above the table."""
        self.console.print(Text(plain(text), style=style), soft_wrap=True)

    def step(self, text: str) -> None:
        """Print the current step of the demo."""
        self._note = text
        self.say(f"* {text}", "bold")
        self._refresh()

    def job_says(self, name: str, job_id: int, line: str) -> None:
        """Print an output line of a job; control characters are escaped."""
        text = Text(f"  {name}#{job_id} | ", style="dim")
        text.append(plain(line), style="default")
        self.console.print(text, soft_wrap=True)

    def show(self, rows: Iterable[Row]) -> None:
        """Show these rows; without a terminal, print only changes."""
        self._rows = tuple(rows)
        if self._live is not None:
            self._refresh()
            return
        for row in self._rows:
            state = row.status, row.provider
            if self._seen.get(row.job_id) != state:
                self._seen[row.job_id] = state
                self.say(f"  job {row.job_id} {row.name}: {_sentence(row)}")

    def table(self) -> Table:
        """Return the rows as a table."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("job", justify="right")
        for title in ("name", "customer", "status", "provider"):
            table.add_column(title)
        for title in ("credits", "used", "gas (gwei)"):
            table.add_column(title, justify="right")
        for row in self._rows:
            table.add_row(*_cells(row))
        return table

    def _render(self) -> RenderableType:
        return Group(Text(self._title, style="bold"), self.table(), Text(self._note, style="dim"))

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)


def _cells(row: Row) -> list[Text]:
    name = row.name if row.retry_of is None else f"{row.name} (continues {row.retry_of})"
    used = "" if row.used is None else format_credits(row.used)
    return [
        Text(str(row.job_id)),
        Text(plain(name)),
        Text(row.customer),
        Text(row.status.name, style=_STYLES.get(row.status, "")),
        Text(row.provider),
        Text(format_credits(row.escrow)),
        Text(used),
        Text(f"{row.gas_wei // _GWEI:,}"),
    ]


def _sentence(row: Row) -> str:
    location = f" at {row.provider}" if row.provider else ""
    used = "" if row.used is None else f", used {format_credits(row.used)} credits"
    again = "" if row.retry_of is None else f" (continues job {row.retry_of})"
    return f"{row.status.name}{location}{used}{again}"
