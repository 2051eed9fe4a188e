"""The demo: runs seven jobs on a local grid, shows every final status, and audits the ledgers.

With the Slurm executor each demo has its own cluster: the grids of two demos have the same chain ID
and accounts, so that their jobs would have the same names in a shared cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepsquare_chain.audit.conservation import Audit
from deepsquare_chain.audit.entries import MovementKind, StatementRow
from deepsquare_chain.audit.runner import audit_grid
from deepsquare_chain.chain.transactions.fees import GWEI
from deepsquare_chain.credits import credit_count, format_credits
from deepsquare_chain.daemon.loop import stopped_by_signals, until_stopped
from deepsquare_chain.demo.runner import DemoDisplay, DemoRunner, DemoTracker, Gas, end_processes_of
from deepsquare_chain.devnet.grid import CUSTOMER_WITHOUT_COIN, ChainKind, LocalGrid
from deepsquare_chain.errors import GridError, NotFoundError, UsageError
from deepsquare_chain.executors.isolation import machine_isolation
from deepsquare_chain.observability.redaction import plain

_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAMS: Final = ("munged", "slurmctld", "slurmd", "sbatch")
#: Nodes of the cluster, with 4 CPUs each: as many CPUs as both providers offer together.
_NODES: Final = 3


@dataclass(frozen=True, slots=True)
class SlurmCluster:
    """A cluster that jobs can be submitted to.

    Attributes:
        conf: Path of its `slurm.conf`.
        sandboxed: Whether its nodes (this machine) can run jobs in a sandbox.
    """

    conf: Path
    sandboxed: bool

    @property
    def environment(self) -> dict[str, str]:
        """Settings of a provider that runs its jobs on this cluster."""
        isolation = "sandbox" if self.sandboxed else "none"
        settings = {
            "DEEPSQUARE_EXECUTOR": "slurm",
            "DEEPSQUARE_EXECUTOR_OPTIONS": (
                f"conf={self.conf} query_interval=0.5 isolation={isolation}"
            ),
        }
        return settings if self.sandboxed else settings | {"DEEPSQUARE_ALLOW_UNISOLATED": "1"}


@contextlib.asynccontextmanager
async def slurm_cluster(report: Callable[[str], None]) -> AsyncIterator[SlurmCluster]:
    """Run a cluster of three nodes within an `async with` block.

    Raises:
        NotFoundError: Slurm is not installed.
        GridError: It did not start.
    """
    script = _script()
    # The length of a socket path is limited, so that the demo's folder may be too deep.
    folder = Path(tempfile.mkdtemp(prefix="deepsquare-slurm-"))
    try:
        allowances = await asyncio.to_thread(lambda: machine_isolation().allowances)
        sandboxed = "allow_unisolated" not in allowances
        report(
            f"starting a Slurm cluster of {_NODES} nodes on this machine; its jobs are "
            f"{'isolated by bubblewrap' if sandboxed else 'not isolated'}"
        )
        await _run_script(script, "up", folder, "--nodes", str(_NODES), "--gpus", "0")
        yield SlurmCluster(folder / "slurm.conf", sandboxed)
    finally:
        await _run_script(script, "down", folder)
        shutil.rmtree(folder, ignore_errors=True)


def _script() -> Path:
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_SYSTEM_PATH) is None]
    if missing:
        raise NotFoundError(
            f"Slurm is not installed: {', '.join(missing)} is missing",
            hint="Debian, Ubuntu: apt-get install slurm-wlm munge.",
        )
    for folder in (Path(__file__).parents[2], Path.cwd()):
        script = folder / "scripts" / "local_slurm.sh"
        if script.is_file():
            return script
    raise NotFoundError(
        "scripts/local_slurm.sh was not found", hint="Run the demo from the project's folder."
    )


async def _run_script(script: Path, command: str, folder: Path, *options: str) -> None:
    # A separate session: Ctrl-C reaches only the demo, which then stops the cluster gracefully.
    process = await asyncio.create_subprocess_exec(
        str(script),
        command,
        str(folder),
        *options,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, errors = await process.communicate()
    except asyncio.CancelledError:
        await process.wait()
        raise
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise GridError(
            f"The local Slurm cluster: {lines[-1] if lines else 'the script failed'}",
            hint="Run the script by hand: scripts/local_slurm.sh up DIR, and see the logs in DIR.",
        )


# -- the summary of the demo: statements, conservation of credits, gas costs, and paths

#: Columns of a statement, in this order; the other kinds are summed as "other".
_COLUMNS: Final = (
    *(MovementKind.MINT, MovementKind.ESCROW, MovementKind.REFUND),
    *(MovementKind.INTERIM, MovementKind.PAYMENT, MovementKind.FEE),
)


@dataclass(slots=True)
class DemoSummary:
    """The ledgers at the end; `gas` is keyed by role, `statements` by role and kind, in credit-wei.

    `signed` is the number of requests signed by the customer without coins.
    """

    document: dict[str, Any]
    audit: Audit
    statements: dict[str, dict[MovementKind, int]]
    balances: dict[str, int]
    gas: dict[str, Gas]
    folder: Path
    signed: int
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the scenario ended as expected and the audit found no problem."""
        return self.audit.ok and not self.problems

    def show(self, console: Console) -> None:
        """Print statements, conservation of credits, gas costs and paths."""
        console.print(self._statement_table())
        totals = self.audit.totals
        console.print(
            f"Conservation: the scheduler holds {credit_count(totals.scheduler_balance)} "
            f"for escrows of {format_credits(totals.escrow)}; difference {self.audit.difference}. "
            f"Supply {format_credits(totals.supply)}, paid {format_credits(totals.paid)}, "
            f"fees {format_credits(totals.fees)}, refunded {format_credits(totals.refunded)}.",
            markup=False,
        )
        for finding in self.audit.findings:
            console.print(f"AUDIT: {plain(str(finding))}", style="bold red", markup=False)
        console.print(self._gas_table())
        relay = self.gas["relay"]
        console.print(
            f"{CUSTOMER_WITHOUT_COIN} had no coin and sent no transaction: the relay executed "
            f"{CUSTOMER_WITHOUT_COIN}'s {self.signed} signed requests and paid {relay.wei // GWEI:,} gwei for "
            f"their gas.",
            markup=False,
        )
        console.print(f"Deployment record: {self.folder / 'deployment.json'}", markup=False)
        console.print(f"Logs:              {self.folder / 'logs'}", markup=False)

    def _statement_table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title="Statements (credits)")
        table.title_justify = "left"
        table.add_column("account")
        for kind in _COLUMNS:
            table.add_column(kind.value, justify="right")
        table.add_column("other", justify="right")
        table.add_column("balance", justify="right")
        for role, sums in self.statements.items():
            other = sum(amount for kind, amount in sums.items() if kind not in _COLUMNS)
            cells = [sums.get(kind, 0) for kind in _COLUMNS] + [other]
            shown = [format_credits(amount) if amount else "" for amount in cells]
            table.add_row(role, *shown, format_credits(self.balances[role]))
        return table

    def _gas_table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title="Gas paid by account")
        table.title_justify = "left"
        for title in ("account", "transactions", "gas", "fee (gwei)"):
            table.add_column(Text(title), justify="left" if title == "account" else "right")
        for role, gas in self.gas.items():
            table.add_row(role, str(gas.transactions), f"{gas.used:,}", f"{gas.wei // GWEI:,}")
        return table


async def audit_grid_ledgers(
    grid: LocalGrid, tracker: DemoTracker, problems: list[str], signed: int
) -> DemoSummary:
    """Rebuild the ledgers from events only, and compare them with the contracts' storage.

    `problems` are the differences from the scenario so far, `signed` is the number of requests
    signed by the customer without coins.

    Raises:
        AuditError: The events are inconsistent, so that the ledgers can't be rebuilt.
    """
    report = await audit_grid(grid.contracts)
    ledger, audit = report.ledger, report.audit
    jobs = [_job(tracker, number) for number in sorted(tracker.jobs)]
    document: dict[str, Any] = {
        "jobs": jobs,
        "audit": {"difference": str(audit.difference), "ok": audit.ok},
    }
    coinless_address = grid.accounts[CUSTOMER_WITHOUT_COIN].address
    coin = await grid.contracts.w3.eth.get_balance(coinless_address)
    document["gasless"] = {"customer": coinless_address, "requests": signed, "coin_wei": str(coin)}
    if coin or coinless_address in tracker.reader.by_account or not signed:
        problems = [*problems, f"{CUSTOMER_WITHOUT_COIN} paid gas or signed no request"]
    names = {account: grid.name_of(account) for account in ledger.accounts}
    names = {account: name for account, name in names.items() if name != account}
    return DemoSummary(
        document=document,
        audit=audit,
        statements={name: _sums(ledger.statement(account)) for account, name in names.items()},
        balances={name: ledger.balances.get(account, 0) for account, name in names.items()},
        gas={grid.name_of(sender): gas for sender, gas in tracker.reader.by_account.items()},
        folder=grid.folder,
        signed=signed,
        problems=problems,
    )


def _sums(rows: list[StatementRow]) -> dict[MovementKind, int]:
    sums: dict[MovementKind, int] = {}
    for row in rows:
        sums[row.kind] = sums.get(row.kind, 0) + row.amount
    return sums


def _job(tracker: DemoTracker, number: int) -> dict[str, Any]:
    job, history = tracker.jobs[number], tracker.histories[number]
    return {
        "id": number,
        "name": history.name,
        "status": job.status.name,
        "customer": job.customer,
        "provider": history.provider or None,
        "funded": str(history.funded),
        "paid": str(history.paid),
        "fee": str(history.fee),
        "refunded": str(history.refunded),
        "retry_of": history.retry_of,
    }


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
            _run_on_grid(
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
        console.print(f"Interrupted: everything was stopped. Logs: {path / 'logs'}")
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


async def _run_on_grid(
    folder: Path,
    chain: ChainKind,
    examples: Path,
    console: Console,
    summaries: list[DemoSummary],
    *,
    executor: str,
    serve: bool,
    port: int,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        with DemoDisplay(console, "DeepSquare grid") as display:
            settings: dict[str, str] = {}
            if executor == "slurm":
                cluster = await stack.enter_async_context(slurm_cluster(display.step))
                settings = cluster.environment
            grid = await stack.enter_async_context(
                LocalGrid(
                    folder,
                    chain=chain,
                    relay_port=0,
                    provider_settings=settings,
                    report=display.step,
                )
            )
            display.step(f"explorer: {await grid.start_explorer(port)}")
            runner = DemoRunner(grid, display, examples)
            await runner.run()
            display.step("auditing the ledgers")
            summary = await audit_grid_ledgers(grid, runner.tracker, runner.problems, runner.signed)
            if not serve:
                await stack.aclose()
        console.print(display.table())
        summary.show(console)
        summaries.append(summary)
        if serve:
            console.print(f"Explorer: {grid.explorer_url} (stop with Ctrl-C)", markup=False)
            await asyncio.Event().wait()
        console.print(
            "To browse jobs and credits afterwards: deepsquare demo --serve", markup=False
        )


def _new_folder(folder: Path | None) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = (folder or Path(".deepsquare") / f"demo-{stamp}").absolute()
    try:
        path.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        raise UsageError(f"{path} already exists", hint="Give a new folder.") from None
    except OSError as error:
        raise GridError(f"{path} can't be created: {error.strerror}") from None
    return path


def _examples() -> Path:
    """Find the example job files: in the project, the installed package or the working folder."""
    package = Path(__file__).parent
    candidates = (package.parents[1] / "examples", package / "examples", Path.cwd() / "examples")
    for candidate in candidates:
        if (candidate / "hello.yaml").is_file():
            return candidate
    raise NotFoundError(
        "The example job files were not found",
        hint="Install the package again, or run it from the project's folder.",
    )
