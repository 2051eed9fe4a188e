"""The screen of `deepsquare top`: three tables, and keys for the job under the cursor."""

from __future__ import annotations

import codecs
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Label, RichLog, Static

from deepsquare_chain.cli.output import duration
from deepsquare_chain.client.offers import GridSnapshot, JobLine, ProviderLine
from deepsquare_chain.credits import credit_count, format_credits, hourly, parse_credits
from deepsquare_chain.errors import GridError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.observability.redaction import plain

_COLOURS: Final = {
    JobStatus.RUNNING: "green",
    JobStatus.FINISHED: "cyan",
    JobStatus.FAILED: "red",
    JobStatus.OUT_OF_CREDITS: "red",
    JobStatus.PANICKED: "red",
}
#: Seconds without a response after which the status line says so.
_SLOW_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Actions:
    """Actions on a job; None if an action is not available, such as sending without a wallet."""

    logs: Callable[[int], AsyncIterator[bytes]] | None = None
    cancel: Callable[[int], Awaitable[None]] | None = None
    top_up: Callable[[int, int], Awaitable[None]] | None = None


class LogScreen(ModalScreen[None]):
    """Screen that follows the output of one job."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss", "Back")]

    def __init__(self, job_id: int, read: Callable[[int], AsyncIterator[bytes]]) -> None:
        super().__init__()
        self._job_id = job_id
        self._read = read

    def compose(self) -> ComposeResult:
        """Create the title and the log."""
        yield Label(f"Output of job {self._job_id} (escape: back)", id="log-title")
        yield RichLog(id="log", wrap=True, max_lines=10_000)

    def on_mount(self) -> None:
        """Start following the output."""
        self.run_worker(self._follow(), exclusive=True)

    async def _follow(self) -> None:
        log = self.query_one(RichLog)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        rest = ""
        try:
            async for data in self._read(self._job_id):
                *lines, rest = (rest + decoder.decode(data)).split("\n")
                for line in lines:
                    log.write(Text(plain(line, keep="\t")))
            if rest:
                log.write(Text(plain(rest, keep="\t")))
            log.write(Text("(the end)", style="dim"))
        except GridError as error:
            log.write(Text(f"{error.message}. {error.hint}", style="red"))


class AskScreen(ModalScreen[str | None]):
    """Dialog with a question and an input field; its result is None after escape."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Back")]

    def __init__(self, question: str, value: str = "") -> None:
        super().__init__()
        self._question = question
        self._value = value

    def compose(self) -> ComposeResult:
        """Create the question and the input field."""
        with Vertical(id="ask"):
            yield Label(Text(self._question))
            yield Input(value=self._value, id="answer")

    def on_mount(self) -> None:
        """Focus the input field."""
        self.query_one(Input).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Close the dialog with the entered text."""
        self.dismiss(event.value.strip())


class TopApp(App[None]):
    """Application that shows a grid and refreshes it at an interval.

    `read` returns the current state of the grid, `interval` is in seconds between refreshes, and
    `customer` is empty without a wallet.
    """

    TITLE = "deepsquare top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #status { height: 1; background: $primary; color: $text; padding: 0 1; }
    .title { height: 1; text-style: bold; padding: 0 1; }
    DataTable { height: 1fr; }
    #jobs { height: 2fr; }
    LogScreen { background: $surface; }
    #log-title { height: 1; background: $primary; color: $text; padding: 0 1; width: 100%; }
    AskScreen { align: center middle; }
    #ask { width: 60; height: auto; border: round $primary; padding: 0 1; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l,enter", "logs", "Logs", key_display="l"),
        Binding("c", "cancel", "Cancel"),
        Binding("t", "top_up", "Top up"),
        Binding("r", "refresh", "Refresh"),
        Binding("tab", "focus_next", "Next table"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(
        self,
        read: Callable[[], Awaitable[GridSnapshot]],
        actions: Actions,
        *,
        interval: float = 2.0,
        chain_id: int = 0,
        customer: str = "",
    ) -> None:
        super().__init__()
        self._read = read
        self._actions = actions
        self._interval = interval
        self._chain_id = chain_id
        self._customer = customer
        self._requested_at = 0.0

    def compose(self) -> ComposeResult:
        """Create the status line, the tables, and the footer with keys."""
        yield Static("reading the chain ...", id="status")
        for name, title in (("jobs", "Jobs"), ("queue", "Queue"), ("providers", "Providers")):
            yield Label(title, classes="title", id=f"{name}-title")
            yield DataTable(id=name, cursor_type="row", zebra_stripes=True)
        yield Footer()

    def on_mount(self) -> None:
        """Add the columns and start the refresh timer."""
        self._table("jobs").add_columns(
            "job", "name", "status", "prov", "elapsed", "left", "escrow", "cpus"
        )
        self._table("queue").add_columns("job", "name", "status", "waits", "cpus", "MB", "gpus")
        self._table("providers").add_columns("id", "status", "jobs", "cpus", "MB", "gpus", "cpu/h")
        self._table("jobs").focus()
        self.set_interval(self._interval, self.action_refresh)
        self.action_refresh()

    def action_refresh(self) -> None:
        """Refresh the view, unless a refresh is in progress; tell how long that takes."""
        if not any(worker.name == "poll" and worker.is_running for worker in self.workers):
            self._requested_at = time.monotonic()
            self.run_worker(self._poll(), name="poll")
        elif (waited := time.monotonic() - self._requested_at) >= _SLOW_SECONDS:
            text = f"no response from the endpoint for {waited:.0f} s; the tables may be old"
            self.query_one("#status", Static).update(Text(text, style="bold red"))

    async def _poll(self) -> None:
        status = self.query_one("#status", Static)
        try:
            overview = await self._read()
        except GridError as error:
            status.update(Text(f"{error.message}; retrying", style="bold red"))
            return
        counts = [job.job.status for job in overview.jobs]
        parts = [f"chain {self._chain_id}", f"block {overview.block}"]
        if overview.balance is not None:
            parts.append(f"{format_credits(overview.balance)[:14]} credits")
        parts.append(f"{counts.count(JobStatus.RUNNING)} running")
        parts.append(f"{len(overview.queue)} in the queue")
        status.update(Text("  ".join(parts)))
        self._fill("jobs", [(str(line.job.id), _job_cells(line)) for line in overview.jobs])
        self._fill("queue", [(str(line.job.id), _queue_cells(line)) for line in overview.queue])
        self._fill(
            "providers",
            [(str(line.provider.id), _provider_cells(line)) for line in overview.providers],
        )

    def _table(self, name: str) -> DataTable[Text]:
        return self.query_one(f"#{name}", DataTable)

    def _fill(self, name: str, rows: list[tuple[str, list[Text]]]) -> None:
        """Replace the rows of a table; the cursor moves to the row with the key it had before."""
        table = self._table(name)
        selected_key, scroll_position = self._selected_key(name), table.scroll_y
        table.clear()
        for key, cells in rows:
            table.add_row(*cells, key=key)
        keys = [key for key, _ in rows]
        if selected_key in keys:
            table.move_cursor(row=keys.index(selected_key), animate=False, scroll=False)
        table.scroll_to(y=scroll_position, animate=False)

    def _selected_key(self, name: str) -> str | None:
        table = self._table(name)
        if not table.row_count:
            return None
        return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value

    def _job(self) -> int | None:
        """Return the job under the cursor of the focused table."""
        name = "queue" if self._table("queue").has_focus else "jobs"
        key = self._selected_key(name)
        if key is None:
            self.notify("There is no job here.", severity="warning")
        return None if key is None else int(key)

    def on_data_table_row_selected(self) -> None:
        """Show the output on Enter, like the key l."""
        self.action_logs()

    def action_logs(self) -> None:
        """Show the output of the job under the cursor."""
        if self._actions.logs is None or (job_id := self._job()) is None:
            return
        self.push_screen(LogScreen(job_id, self._actions.logs))

    @work
    async def action_cancel(self) -> None:
        """Ask for confirmation, then cancel the job under the cursor."""
        cancel = self._require_wallet(self._actions.cancel)
        if cancel is None or (job_id := self._job()) is None:
            return
        answer = await self.push_screen_wait(AskScreen(f"Cancel job {job_id}? (yes)"))
        if answer is not None and answer.lower() in {"y", "yes"}:
            await self._send(f"cancel job {job_id}", cancel(job_id))

    @work
    async def action_top_up(self) -> None:
        """Ask for an amount, then add it to the job under the cursor."""
        pay = self._require_wallet(self._actions.top_up)
        if pay is None or (job_id := self._job()) is None:
            return
        answer = await self.push_screen_wait(AskScreen(f"Credits to add to job {job_id}:"))
        if not answer:
            return
        try:
            amount = parse_credits(answer)
        except (ValueError, GridError) as error:
            self.notify(str(error), severity="error")
            return
        await self._send(f"add {credit_count(amount)} to job {job_id}", pay(job_id, amount))

    def _require_wallet(
        self, action: Callable[..., Awaitable[None]] | None
    ) -> Callable[..., Awaitable[None]] | None:
        if action is None:
            self.notify("No wallet is open, so nothing can be sent.", severity="warning")
        return action

    async def _send(self, action: str, work: Awaitable[None]) -> None:
        self.notify(f"Sent: {action}; waiting for a block.")
        try:
            await work
        except GridError as error:
            self.notify(f"{error.message} {error.hint}", severity="error", timeout=10)
        else:
            self.notify(f"Done: {action}.")
        self.action_refresh()


def _job_cells(line: JobLine) -> list[Text]:
    job = line.job
    return [
        _number(job.id),
        _name(line.name),
        Text(job.status.name, style=_COLOURS.get(job.status, "yellow")),
        _number(job.provider_id or "-"),
        # The time in a final status is no run time.
        _number("-" if job.status.is_final else duration(line.elapsed)),
        _number("-" if line.left is None else duration(line.left)),
        _number(format_credits(0 if job.status.is_final else job.escrow)[:8]),
        _number(job.resources.cpus),
    ]


def _queue_cells(line: JobLine) -> list[Text]:
    job = line.job
    return [
        _number(job.id),
        _name(line.name),
        Text(job.status.name),
        _number(duration(line.elapsed)),
        _number(job.resources.cpus),
        _number(job.resources.memory),
        _number(job.resources.gpus),
    ]


def _provider_cells(line: ProviderLine) -> list[Text]:
    offer, used = line.provider.offer, line.used
    return [
        _number(line.provider.id),
        Text(line.provider.status.name),
        _number(line.jobs),
        _number(f"{used.cpus}/{offer.cpus}"),
        _number(f"{used.memory}/{offer.memory}"),
        _number(f"{used.gpus}/{offer.gpus}"),
        _number(hourly(line.provider.prices.cpu)[:10]),
    ]


def _name(name: str) -> Text:
    """Format a job name, which is untrusted: no markup, no control characters, at most 18 characters."""
    text = plain(name)
    return Text(text if len(text) <= 18 else f"{text[:17]}…")


def _number(value: object) -> Text:
    return Text(str(value), justify="right")
