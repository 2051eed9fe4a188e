"""The screen of `deepsquare top`: three tables, and keys for the job under the cursor."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Label, RichLog, Static

from deepsquare_chain.cli.output import duration
from deepsquare_chain.client.overview import JobLine, Overview, ProviderLine
from deepsquare_chain.credits import format_credits, hourly, parse_credits
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


@dataclass(frozen=True, slots=True)
class Actions:
    """What keys do for a job; None where it is not possible, without a wallet for instance."""

    logs: Callable[[int], AsyncIterator[bytes]] | None = None
    cancel: Callable[[int], Awaitable[None]] | None = None
    top_up: Callable[[int, int], Awaitable[None]] | None = None


class LogScreen(ModalScreen[None]):
    """The output of one job as it grows."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss", "Back")]

    def __init__(self, job_id: int, read: Callable[[int], AsyncIterator[bytes]]) -> None:
        super().__init__()
        self._job_id = job_id
        self._read = read

    def compose(self) -> ComposeResult:
        """A title and the text."""
        yield Label(f"Output of job {self._job_id} (escape: back)", id="log-title")
        yield RichLog(id="log", wrap=True, max_lines=10_000)

    def on_mount(self) -> None:
        """Begin to read."""
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
    """One question with a line to answer it; None after escape."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Back")]

    def __init__(self, question: str, value: str = "") -> None:
        super().__init__()
        self._question = question
        self._value = value

    def compose(self) -> ComposeResult:
        """The question and the line."""
        with Vertical(id="ask"):
            yield Label(Text(self._question))
            yield Input(value=self._value, id="answer")

    def on_mount(self) -> None:
        """Type into the line at once."""
        self.query_one(Input).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Answer."""
        self.dismiss(event.value.strip())


class TopApp(App[None]):
    """Shows a grid again and again.

    Args:
        read: Gives the grid as it is now.
        actions: What keys do.
        interval: Seconds between two looks.
        chain_id: For the first line.
        customer: Address for the first line; empty without a wallet.
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
        read: Callable[[], Awaitable[Overview]],
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

    def compose(self) -> ComposeResult:
        """A line of figures, the tables, and the keys."""
        yield Static("reading the chain ...", id="status")
        for name, title in (("jobs", "Jobs"), ("queue", "Queue"), ("providers", "Providers")):
            yield Label(title, classes="title", id=f"{name}-title")
            yield DataTable(id=name, cursor_type="row", zebra_stripes=True)
        yield Footer()

    def on_mount(self) -> None:
        """Name the columns and begin to look."""
        self._table("jobs").add_columns(
            "job", "name", "status", "prov", "elapsed", "left", "escrow", "cpus"
        )
        self._table("queue").add_columns("job", "name", "status", "waits", "cpus", "MB", "gpus")
        self._table("providers").add_columns("id", "status", "jobs", "cpus", "MB", "gpus", "cpu/h")
        self._table("jobs").focus()
        self.set_interval(self._interval, self.action_refresh)
        self.action_refresh()

    def action_refresh(self) -> None:
        """Look at the grid, unless a look is under way."""
        if not any(each.name == "look" and each.is_running for each in self.workers):
            self.run_worker(self._look(), name="look")

    async def _look(self) -> None:
        status = self.query_one("#status", Static)
        try:
            found = await self._read()
        except GridError as error:
            status.update(Text(f"{error.message}; trying again", style="bold red"))
            return
        counts = [job.job.status for job in found.jobs]
        figures = [f"chain {self._chain_id}", f"block {found.block}"]
        if found.balance is not None:
            figures.append(f"{format_credits(found.balance)[:14]} credits")
        figures.append(f"{counts.count(JobStatus.RUNNING)} running")
        figures.append(f"{len(found.queue)} in the queue")
        status.update(Text("  ".join(figures)))
        self._fill("jobs", [(str(each.job.id), _job_cells(each)) for each in found.jobs])
        self._fill("queue", [(str(each.job.id), _queue_cells(each)) for each in found.queue])
        self._fill(
            "providers",
            [(str(each.provider.id), _provider_cells(each)) for each in found.providers],
        )

    def _table(self, name: str) -> DataTable[Text]:
        return self.query_one(f"#{name}", DataTable)

    def _fill(self, name: str, rows: list[tuple[str, list[Text]]]) -> None:
        """New rows; the cursor stays at its row's key, wherever that is now."""
        table = self._table(name)
        chosen, scroll = self._chosen(name), table.scroll_y
        table.clear()
        for key, cells in rows:
            table.add_row(*cells, key=key)
        keys = [key for key, _ in rows]
        if chosen in keys:
            table.move_cursor(row=keys.index(chosen), animate=False, scroll=False)
        table.scroll_to(y=scroll, animate=False)

    def _chosen(self, name: str) -> str | None:
        table = self._table(name)
        if not table.row_count:
            return None
        return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value

    def _job(self) -> int | None:
        """The job under the cursor of the table in use."""
        name = "queue" if self._table("queue").has_focus else "jobs"
        chosen = self._chosen(name)
        if chosen is None:
            self.notify("There is no job here.", severity="warning")
        return None if chosen is None else int(chosen)

    def on_data_table_row_selected(self) -> None:
        """Enter shows the output, as l does."""
        self.action_logs()

    def action_logs(self) -> None:
        """Show the output of the job under the cursor."""
        if self._actions.logs is None or (job_id := self._job()) is None:
            return
        self.push_screen(LogScreen(job_id, self._actions.logs))

    def action_cancel(self) -> None:
        """Ask, then cancel the job under the cursor."""
        self.run_worker(self._cancel(), name="cancel")

    async def _cancel(self) -> None:
        cancel = self._sending(self._actions.cancel)
        if cancel is None or (job_id := self._job()) is None:
            return
        answer = await self.push_screen_wait(AskScreen(f"Cancel job {job_id}? (yes)"))
        if answer is not None and answer.lower() in {"y", "yes"}:
            await self._try(f"cancel job {job_id}", cancel(job_id))

    def action_top_up(self) -> None:
        """Ask for an amount, then add it to the job under the cursor."""
        self.run_worker(self._top_up(), name="top up")

    async def _top_up(self) -> None:
        pay = self._sending(self._actions.top_up)
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
        await self._try(
            f"add {format_credits(amount)} credits to job {job_id}", pay(job_id, amount)
        )

    def _sending(
        self, action: Callable[..., Awaitable[None]] | None
    ) -> Callable[..., Awaitable[None]] | None:
        if action is None:
            self.notify("No wallet is open: nothing can be sent.", severity="warning")
        return action

    async def _try(self, what: str, work: Awaitable[None]) -> None:
        self.notify(f"Sent: {what}; waiting for a block.")
        try:
            await work
        except GridError as error:
            self.notify(f"{error.message} {error.hint}", severity="error", timeout=10)
        else:
            self.notify(f"Done: {what}.")
        self.action_refresh()


def _job_cells(line: JobLine) -> list[Text]:
    job = line.job
    return [
        _number(job.id),
        _name(line.name),
        Text(job.status.name, style=_COLOURS.get(job.status, "yellow")),
        _number(job.provider_id or "-"),
        _number(duration(line.elapsed)),
        _number("-" if line.left is None else duration(line.left)),
        _number(format_credits(job.escrow)[:8]),
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
    """A name is a customer's text: no markup, no control characters, no more than fits."""
    text = plain(name)
    return Text(text if len(text) <= 18 else f"{text[:17]}…")


def _number(value: object) -> Text:
    return Text(str(value), justify="right")
