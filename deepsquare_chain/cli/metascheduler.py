"""Commands for the meta-scheduler: run it, explain its decisions, simulate its policy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Format, Kind, progress, row_of
from deepsquare_chain.cli.types import number_option, whole_number
from deepsquare_chain.errors import StoreError, UsageError

if TYPE_CHECKING:
    from deepsquare_chain.metascheduler.simulation.experiment import ResultRow

app = typer.Typer()
#: The command `deepsquare simulate`, which belongs to no group.
root_app = typer.Typer()

RulesFile = Annotated[
    Path | None,
    typer.Option("--rules", metavar="FILE", help="Rules of the policy, in YAML; see examples/."),
]
_PLAN: Final = (
    Column("job_id", "job", Kind.NUMBER),
    Column("provider_id", "provider", Kind.NUMBER),
    Column("text", "why"),
)
_OBJECTIVES: Final = ("MIXED", "COST", "TIME", "ENERGY")
_TABLE: Final = (
    Column("trace", "trace", Kind.WORD, detail=True),
    Column("scheduler", "scheduler", Kind.WORD),
    Column("objective", "objective", Kind.WORD),
    Column("load", "load", Kind.NUMBER),
    Column("block_seconds", "block s", Kind.NUMBER),
    Column("slowdown", "slowdown", Kind.NUMBER),
    Column("vs_merged_saf", "x SAF", Kind.NUMBER),
    Column("better_than_least_loaded", "x better than least loaded", Kind.NUMBER),
    Column("wait_p99_vs_fcfs", "p99 wait x FCFS", Kind.NUMBER),
    Column("wait_longest_vs_fcfs", "longest wait x FCFS", Kind.NUMBER),
    Column("money", "money of COST", Kind.WORD),
    Column("energy", "energy of ENERGY", Kind.WORD),
    Column("utilisation", "busy", Kind.WORD),
)


@command(app, service=True)
async def run(
    context: CommandContext,
    challenge_after: Annotated[
        int | None,
        number_option(
            "Time without activity after which a provider with jobs is challenged; twice the "
            "claim timeout by default.",
            1,
            metavar="SECONDS",
        ),
    ] = None,
    rules: RulesFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run without a wallet; only log the decisions.")
    ] = False,
) -> None:
    """Run the meta-scheduler until Ctrl-C: assign jobs, challenge unresponsive providers."""
    from deepsquare_chain.cli.services import schedule

    await schedule(context.settings, challenge_after=challenge_after, rules=rules, dry_run=dry_run)


@command(app)
async def explain(
    context: CommandContext,
    job: Annotated[
        int | None, typer.Argument(parser=whole_number(1), metavar="JOB", help="Only this job.")
    ] = None,
    rules: RulesFile = None,
) -> None:
    """Show what a meta-scheduler would decide now for each waiting job, and why."""
    from deepsquare_chain.cli.why import reasons
    from deepsquare_chain.metascheduler.rules_file import read_rules

    policy_rules = None if rules is None else read_rules(rules)
    async with context.grid() as contracts:
        if job is not None:
            await contracts.scheduler.get_job(job)
        decisions, share_error = await reasons(contracts, policy_rules)
    context.printer.rows(
        _PLAN,
        (row_of(_PLAN, decision) for decision in decisions if job in (None, decision.job_id)),
        empty="No job is waiting." if job is None else f"Job {job} is not waiting.",
    )
    context.printer.note(
        f"Customers' recent use differs from equal shares by {share_error:.0%} of what was paid."
    )


def _number(allowed: str, low: float, high: float) -> Callable[[str], float]:
    """Return a parser of numbers, whose error message is that a text is not `allowed`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not low <= value <= high:
            raise typer.BadParameter(f"{str(text)[:80]!r} is not {allowed}")
        return value

    return number


def _objective(text: str) -> str:
    objective = str(text).strip().upper()
    if objective not in _OBJECTIVES:
        raise typer.BadParameter(f"{str(text)[:80]!r} is none of {', '.join(_OBJECTIVES)}")
    return objective


@command(root_app)
async def simulate(
    context: CommandContext,
    trace: Annotated[
        Path,
        typer.Argument(help="Workload in the Standard Workload Format, also packed by gzip or xz."),
    ],
    providers: Annotated[Path, typer.Option(metavar="FILE", help="Clusters of the grid, in YAML.")],
    load: Annotated[
        list[float] | None,
        typer.Option(
            parser=_number("a load from 0.001 to 3, such as 0.9", 0.001, 3),
            metavar="LOAD",
            help="Load (work divided by capacity); may be repeated. 0.9 by default.",
        ),
    ] = None,
    seeds: Annotated[
        int, number_option("Number of runs of each case.", 1, 1_000, 6, metavar="COUNT")
    ] = 6,
    want: Annotated[
        list[str] | None,
        typer.Option(
            parser=_objective,
            metavar="OBJECTIVE",
            help="Objective of the jobs: COST, TIME, ENERGY, or MIXED for a third each, which is the "
            "default; again for more.",
        ),
    ] = None,
    block: Annotated[
        list[float] | None,
        typer.Option(
            parser=_number("seconds from 0 to 600, such as 2", 0, 600),
            metavar="SECONDS",
            help="Block time in seconds, which delays the scheduler; may be repeated. 0 by default.",
        ),
    ] = None,
    rules: RulesFile = None,
    patience: Annotated[
        float,
        typer.Option(
            parser=_number("a part of the limit from 0 to 100", 0, 100),
            metavar="PART",
            help="Patience of jobs that want COST or ENERGY, as a part of their limit, such as 0.05.",
        ),
    ] = 0.0,
    width: Annotated[
        int | None,
        number_option(
            "CPUs to scale the trace's machine to; its own, or those of the mean cluster if it is wider.",
            *(1, 10**6, 128),
            metavar="CPUS",
        ),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Also simulate the baselines.")
    ] = True,
    processes: Annotated[
        int | None, number_option("Processes; one per CPU by default.", 1, 256, metavar="COUNT")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page (HTML) with tables and plots over time."),
    ] = None,
) -> None:
    """Simulate the scheduling policy with a recorded workload on a grid of your own.

    Job sizes of a trace from a machine wider than the mean cluster are scaled down to it.
    Pieces of the trace are overlaid so that the grid has the requested load.
    docs/scheduling.md explains the metrics.
    """
    import asyncio

    from deepsquare_chain.metascheduler.policy import Rules
    from deepsquare_chain.metascheduler.rules_file import read_rules
    from deepsquare_chain.metascheduler.simulation.experiment import (
        BASELINES,
        Experiment,
        run_experiment,
        summarise,
    )
    from deepsquare_chain.metascheduler.simulation.grid_file import read_grid
    from deepsquare_chain.metascheduler.simulation.page import render
    from deepsquare_chain.metascheduler.simulation.workload import read_trace

    recorded = await asyncio.to_thread(read_trace, trace)
    experiment = Experiment(
        trace=recorded,
        grid=read_grid(providers),
        loads=tuple(dict.fromkeys(load or [0.9])),
        seeds=seeds,
        mixes=tuple(dict.fromkeys(want or ["MIXED"])),
        baselines=BASELINES if baselines else (),
        blocks=tuple(dict.fromkeys(block or [0.0])),
        rules=Rules() if rules is None else read_rules(rules),
        width=width or 0,
        patience=patience,
    )
    if experiment.width > experiment.grid.largest:
        raise UsageError(
            f"The largest cluster has {experiment.grid.largest} CPUs, and jobs may be "
            f"{experiment.width} wide",
            hint="Give a smaller --width, or a larger cluster.",
        )
    if recorded.left_out:
        context.printer.note(
            f"{trace.name}: {recorded.left_out} of {len(recorded.jobs) + recorded.left_out} jobs are "
            "left out: their submission time, processors or run time are unknown, or the latter 0."
        )
    if experiment.width < recorded.processors:
        context.printer.note(
            f"{trace.name}: job sizes are scaled from {recorded.processors} to "
            f"{experiment.width} CPUs of the machine (--width)."
        )
    with progress("simulating") as update:
        measures = await asyncio.to_thread(
            run_experiment, experiment, processes=processes or os.cpu_count() or 1, progress=update
        )
    rows = summarise(measures)
    if page is not None:
        try:
            page.write_text(render(experiment, rows, measures), encoding="utf-8")
        except OSError as error:
            raise StoreError(f"The page {page} can't be written: {error.strerror}") from error
        context.printer.note(f"Wrote {page}.")
    _print(context, experiment.trace.name, rows)


def _print(context: CommandContext, trace: str, rows: list[ResultRow]) -> None:
    from deepsquare_chain.metascheduler.simulation.page import change, number

    if context.printer.style is Format.JSON:
        context.printer.document({"trace": trace, "rows": [_document(trace, row) for row in rows]})
        return
    context.printer.rows(
        _TABLE,
        (
            (
                trace,
                row.scheduler.value,
                row.mix or None,
                f"{row.load:g}",
                f"{row.block:g}",
                number(row.slowdown),
                number(row.vs_merged_saf),
                number(row.better_than_least_loaded, 1),
                number(row.wait_p99_vs_fcfs),
                number(row.wait_longest_vs_fcfs, 1),
                change(row.money),
                change(row.energy),
                f"{row.utilisation:.0%}",
            )
            for row in rows
        ),
        empty="No case was simulated.",
    )


def _document(trace: str, row: ResultRow) -> dict[str, Any]:
    """Return a row as JSON: ratios as numbers, waits in seconds."""
    return {
        "trace": trace,
        "scheduler": row.scheduler.value,
        "objective": row.mix or None,
        "load": row.load,
        "block_seconds": row.block,
        "seeds": row.seeds,
        "slowdown": row.slowdown,
        "slowdown_vs_merged_saf": row.vs_merged_saf,
        "slowdown_vs_merged_saf_by_seed": list(row.each_vs_merged_saf),
        "times_better_than_least_loaded": row.better_than_least_loaded,
        "wait_mean_seconds": row.wait_mean,
        "wait_p99_seconds": row.wait_p99,
        "wait_p99_vs_merged_fcfs": row.wait_p99_vs_fcfs,
        "wait_longest_seconds": row.wait_longest,
        "wait_longest_vs_merged_fcfs": row.wait_longest_vs_fcfs,
        "utilisation": row.utilisation,
        "money_vs_blind": row.money,
        "energy_vs_blind": row.energy,
        "worst_vs_median_customer": row.unfairness,
    }
