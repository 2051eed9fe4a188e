"""The demo: runs seven jobs on a local grid, shows every final status, and audits the ledgers."""

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

_WIDTH: Final = 150  # line width of output that is not a terminal


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The result of the demo; `document` is the output of `-o json`."""

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
    """Run the scenario; always stop everything that was started.

    Args:
        chain: The embedded chain, or anvil.
        folder: New folder for state and logs; `.deepsquare/demo-<time>` if None.
        stream: Output stream of the demo.
        executor: `slurm` runs the jobs on a Slurm cluster that the demo starts and stops.
        serve: Keep the finished grid and its explorer running until a signal.
        explorer_port: Port of the explorer; 0 chooses a free one.

    Raises:
        KeyboardInterrupt: A signal interrupted the demo.
        NotFoundError: The example job files, anvil or Slurm were not found.
        UsageError: The folder exists, or the executor is not supported.
    """
    if executor not in {"local", "slurm"}:
        raise UsageError(
            f"The demo can't run jobs with executor {executor}", hint="Use local or slurm."
        )
    began = time.monotonic()
    path = _new_folder(folder)
    examples = _examples()
    console = Console(file=stream, width=None if stream.isatty() else _WIDTH, highlight=False)
    summaries: list[DemoSummary] = []
    with stopped_by_signals() as stop:
        work = asyncio.create_task(
            _play(
                path,
                chain,
                examples,
                console,
                summaries,
                executor=executor,
                serve=serve,
                port=explorer_port,
            )
        )
        try:
            stopped = await until_stopped(stop, work)
        finally:
            # Runs survive their daemons by design; the demo must leave no process behind.
            survivors = await asyncio.to_thread(end_processes_of, path)
    if stopped and not (serve and summaries):
        console.print(f"Interrupted: everything is ended. Logs: {path / 'logs'}")
        raise KeyboardInterrupt
    summary = summaries[0]
    if survivors:
        summary.problems.append(f"processes {survivors} could not be ended")
    seconds = round(time.monotonic() - began, 1)
    for problem in summary.problems:
        console.print(f"NOT AS EXPECTED: {problem}", style="bold red", markup=False)
    verdict = "All jobs ended as expected" if summary.ok else "The demo failed"
    console.print(f"{verdict}, {seconds} seconds.", style="bold", markup=False)
    return DemoResult(summary.ok, {**summary.document, "seconds": seconds})


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
            runner = DemoRunner(grid, board, examples)
            await runner.perform()
            board.step("closing the books")
            summary = await close_books(grid, runner.scene, runner.problems, runner.signed)
            if not serve:
                await stack.aclose()
        console.print(board.table())
        summary.show(console)
        found.append(summary)
        if serve:
            console.print(f"Browse it all: {grid.explorer_url} (Ctrl-C ends it)", markup=False)
            await asyncio.Event().wait()
        console.print(
            "To browse jobs and credits at leisure: deepsquare demo --serve", markup=False
        )


def _new_folder(folder: Path | None) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = (folder or Path(".deepsquare") / f"demo-{stamp}").absolute()
    try:
        path.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        raise UsageError(f"{path} exists already", hint="Name a new folder.") from None
    except OSError as error:
        raise GridError(f"{path} can't be made: {error.strerror}") from None
    return path


def _examples() -> Path:
    """Find the example job files: in the project, the installed package or the working folder."""
    package = Path(__file__).parent
    candidates = (package.parents[1] / "examples", package / "examples", Path.cwd() / "examples")
    for candidate in candidates:
        if (candidate / "hello.yaml").is_file():
            return candidate
    raise NotFoundError(
        "The job files of examples/ are not there",
        hint="Install the package again, or run it from the project's folder.",
    )
