"""The demo: a grid of its own, seven jobs, every way in which a job can end, and the books."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console

from deepsquare_chain.daemon.signals import stopped_by_signals, until_stopped
from deepsquare_chain.demo.board import Board
from deepsquare_chain.demo.runner import DemoRunner, end_processes_of
from deepsquare_chain.demo.summary import DemoSummary, close_books
from deepsquare_chain.devnet.grid import ChainKind, LocalGrid
from deepsquare_chain.devnet.slurm import slurm_cluster
from deepsquare_chain.errors import GridError, NotFoundError, UsageError

_WIDTH: Final = 150  # of lines that go to no terminal


@dataclass(frozen=True, slots=True)
class DemoResult:
    """How the demo ended; `document` is what `-o json` prints."""

    ok: bool
    document: dict[str, Any]


async def run_demo(
    *,
    chain: ChainKind,
    folder: Path | None,
    stream: IO[str],
    executor: str = "local",
    serve: bool = False,
    explorer_port: int = 0,
) -> DemoResult:
    """Run the whole story; everything that was started is ended, whatever happens.

    Args:
        chain: The embedded chain, or anvil.
        folder: New folder for state and logs; `.deepsquare/demo-<time>` if None.
        stream: Where the demonstration is printed.
        executor: `slurm` runs the jobs on a Slurm cluster that the demo starts and ends.
        serve: Keep the finished grid and its explorer until a signal.
        explorer_port: Of the explorer's pages; 0 takes a free one.

    Raises:
        KeyboardInterrupt: A signal ended it.
        NotFoundError: The example job files, anvil, or Slurm, are not there.
        UsageError: The folder exists, or the demo does not know the executor.
    """
    if executor not in {"local", "slurm"}:
        raise UsageError(
            f"The demo can't run jobs with executor {executor}", hint="Use local or slurm."
        )
    began = time.monotonic()
    place = _new_folder(folder)
    examples = _examples()
    console = Console(file=stream, width=None if stream.isatty() else _WIDTH, highlight=False)
    found: list[DemoSummary] = []
    with stopped_by_signals() as stop:
        work = asyncio.create_task(
            _play(
                place,
                chain,
                examples,
                console,
                found,
                executor=executor,
                serve=serve,
                port=explorer_port,
            )
        )
        try:
            stopped = await until_stopped(stop, work)
        finally:
            # Runs outlive their daemons by design; nothing outlives the demo.
            left = await asyncio.to_thread(end_processes_of, place)
    if stopped and not (serve and found):
        console.print(f"Interrupted: everything is ended. Logs: {place / 'logs'}")
        raise KeyboardInterrupt
    closing = found[0]
    if left:
        closing.problems.append(f"processes {left} could not be ended")
    seconds = round(time.monotonic() - began, 1)
    for problem in closing.problems:
        console.print(f"NOT AS EXPECTED: {problem}", style="bold red", markup=False)
    verdict = "All jobs ended as expected" if closing.ok else "The demo failed"
    console.print(f"{verdict}, {seconds} seconds.", style="bold", markup=False)
    return DemoResult(closing.ok, {**closing.document, "seconds": seconds})


async def _play(
    place: Path,
    chain: ChainKind,
    examples: Path,
    console: Console,
    found: list[DemoSummary],
    *,
    executor: str,
    serve: bool,
    port: int,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        with Board(console, "DeepSquare grid") as board:
            settings: dict[str, str] = {}
            if executor == "slurm":
                cluster = await stack.enter_async_context(slurm_cluster(board.step))
                settings = cluster.environment
            grid = await stack.enter_async_context(
                LocalGrid(
                    place, chain=chain, relay_port=0, provider_settings=settings, tell=board.step
                )
            )
            board.step(f"watch it in a browser: {await grid.start_explorer(port)}")
            play = DemoRunner(grid, board, examples)
            await play.perform()
            board.step("closing the books")
            closing = await close_books(grid, play.scene, play.problems, play.signed)
            if not serve:
                await stack.aclose()
        console.print(board.table())
        closing.show(console)
        found.append(closing)
        if serve:
            console.print(f"Browse it all: {grid.explorer_url} (Ctrl-C ends it)", markup=False)
            await asyncio.Event().wait()
        console.print(
            "To browse jobs and credits at leisure: deepsquare demo --serve", markup=False
        )


def _new_folder(folder: Path | None) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    place = (folder or Path(".deepsquare") / f"demo-{stamp}").absolute()
    try:
        place.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        raise UsageError(f"{place} exists already", hint="Name a new folder.") from None
    except OSError as error:
        raise GridError(f"{place} can't be made: {error.strerror}") from None
    return place


def _examples() -> Path:
    """The job files: of the project, of the installed package, or here."""
    package = Path(__file__).parent
    places = (package.parents[1] / "examples", package / "examples", Path.cwd() / "examples")
    for place in places:
        if (place / "hello.yaml").is_file():
            return place
    raise NotFoundError(
        "The job files of examples/ are not there",
        hint="Install the package again, or run it from the project's folder.",
    )
