"""The simulation: traces, grids, baselines, measures, and what the command prints."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepsquare_chain.cli.app import app
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import Objective
from deepsquare_chain.metascheduler.policy import Rules
from deepsquare_chain.metascheduler.simulation.engine import (
    Cluster,
    SimulatedRun,
    first_come_first_served,
    run_clusters,
    run_policy,
    smallest_area_first,
    to_the_earliest_completion,
    to_the_least_loaded,
    to_the_less_loaded_of_two,
    to_the_only_one,
)
from deepsquare_chain.metascheduler.simulation.experiment import (
    Case,
    Experiment,
    Scheduler,
    against_blind,
    run_case,
    run_experiment,
    summarise,
)
from deepsquare_chain.metascheduler.simulation.grid_file import SimulatedGrid, read_grid
from deepsquare_chain.metascheduler.simulation.page import render
from deepsquare_chain.metascheduler.simulation.workload import (
    Trace,
    TraceJob,
    fold,
    read_trace,
    scaled,
    synthetic,
    with_objectives,
    with_patience,
)

pytestmark = pytest.mark.unit

EXAMPLES = Path(__file__).parents[2] / "examples"
GRID = EXAMPLES / "grid.yaml"
LINE = "{} {} 5 {} {} -1 -1 {} {} {} 1 7 1 -1 -1 -1 -1 -1"


def line(
    number: int = 1, at: int = 0, run_seconds: int = 60, cpus: int = 2, limit: int = 100
) -> str:
    return LINE.format(number, at, run_seconds, cpus, cpus, limit, -1)


def job(number: int, at: float, cpus: int, limit: int, seconds: float | None = None) -> TraceJob:
    return TraceJob(number, at, cpus, limit, limit if seconds is None else seconds, "user 1")


def starts(outcomes: list[SimulatedRun]) -> dict[int, float]:
    return {outcome.job.id: outcome.start for outcome in outcomes}


class TestTraces:
    def test_fields_and_comments(self, tmp_path: Path) -> None:
        path = tmp_path / "a.swf"
        unfinished = line(3, 20, run_seconds=-1)
        path.write_text(
            f"; MaxProcs: 100\n\n{line(1, 50, run_seconds=150)}\n{line(2, 10, limit=-1)}\n{unfinished}\n"
        )
        trace = read_trace(path)
        assert trace.processors == 100
        first, second = trace.jobs
        assert (first.id, first.at, first.cpus, first.limit, first.seconds) == (1, 0, 2, 60, 60.0)
        # A run that was stopped late counts up to its limit.
        assert (second.at, second.limit, second.seconds) == (40, 100, 100.0)
        assert second.customer == "user 7"

    def test_a_limit_fits_a_job_record(self, tmp_path: Path) -> None:
        path = tmp_path / "a.swf"
        path.write_text(line(run_seconds=10**15, limit=10**15))
        (job,) = read_trace(path).jobs
        assert (job.limit, job.seconds) == (2**24 - 1, 2.0**24 - 1)

    def test_compressed_traces_are_equal(self, tmp_path: Path) -> None:
        plain, packed = tmp_path / "a.swf", tmp_path / "b"
        plain.write_text(line())
        for content in (gzip.compress(line().encode(), mtime=0), lzma.compress(line().encode())):
            packed.write_bytes(content)
            assert read_trace(plain).jobs == read_trace(packed).jobs

    @pytest.mark.parametrize("change", ["\r\n", "\t", "byte order mark", "comments", "reversed"])
    def test_other_spellings_of_a_trace_are_the_same(self, tmp_path: Path, change: str) -> None:
        plain, other = tmp_path / "a.swf", tmp_path / "b.swf"
        lines = [line(n, at=n) for n in (1, 2, 3)]
        plain.write_text("\n".join(lines))
        changed = {
            "\r\n": "\r\n".join(lines),
            "\t": "\n".join(lines).replace(" ", "\t"),
            "byte order mark": "\ufeff; MaxProcs: 2\n" + "\n".join(lines),
            "comments": "\n; Note: a word\n\n".join(lines),
            "reversed": "\n".join(reversed(lines)),
        }
        other.write_bytes(changed[change].encode())
        assert read_trace(plain).jobs == read_trace(other).jobs

    def test_jobs_without_a_needed_field_are_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "a.swf"
        incomplete = [
            line(2, at=-1),
            line(3, run_seconds=0),
            line(4, cpus=-1),
            line(5, cpus=10**18),
        ]
        path.write_text("\n".join([line(), *incomplete]))
        trace = read_trace(path)
        assert (len(trace.jobs), trace.left_out, trace.processors) == (1, 4, 2)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "does not contain a job that ran"),
            (b"; only words\n", "does not contain a job that ran"),
            (b"1 2 3\n", "line 1 of .* is not a job: it needs 18 numbers"),
            (line().replace("60", "sixty", 1).encode(), "line 1 of .* is not a job"),
            (line().replace("60", "nan", 1).encode(), "line 1 of .* is not a job"),
            (b"\x1f\x8bnonsense", "can't be read"),
            (gzip.compress(line().encode(), mtime=0)[:-9], "can't be read"),
            (lzma.compress(line().encode())[:-9], "can't be read"),
            (b"\xfd7zXZ\x00nonsense", "can't be read"),
        ],
    )
    def test_errors_name_the_bad_trace(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "bad.swf"
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_trace(path)
        with pytest.raises(UsageError, match="can't be read"):
            read_trace(tmp_path / "missing.swf")

    def test_examples_are_reproducible(self) -> None:
        for style, name in (("mixed", "mixed.swf"), ("campaign", "campaign.swf.gz")):
            generated = synthetic(style, 1_500, 1)
            trace = read_trace(EXAMPLES / name)
            assert [job.cpus for job in trace.jobs] == [job.cpus for job in generated.jobs]
            assert trace.processors == generated.processors

    def test_a_wide_machine_counts_as_the_mean_cluster(self) -> None:
        grid = read_grid(GRID)
        for processors, width in ((5_000, 129), (100, 100)):
            trace = Trace("x", (job(1, 0, processors, 10),), processors)
            assert Experiment(trace, grid, [0.9], 1, ["TIME"]).width == width
        assert Experiment(trace, grid, [0.9], 1, ["TIME"], width=7).width == 7

    def test_sizes_are_scaled_in_proportion(self) -> None:
        trace = Trace("x", (job(1, 0, 1_000, 10), job(2, 0, 1, 10), job(3, 0, 501, 10)), 1_000)
        assert [trace_job.cpus for trace_job in scaled(trace, 100).jobs] == [100, 1, 51]
        assert scaled(trace, 2_000) == trace

    @pytest.mark.parametrize("load", [0.5, 0.9])
    def test_folding_keeps_all_jobs_and_gives_the_load(self, load: float) -> None:
        trace = synthetic("mixed", 400, 3)
        folded = fold(trace, capacity=2_000.0, load=load, seed=1)
        length = trace.work / (2_000.0 * load)
        assert len(folded) == len(trace.jobs)
        assert all(0 <= job.at < length for job in folded)
        assert [job.at for job in folded] == sorted(job.at for job in folded)
        assert fold(trace, capacity=2_000.0, load=load, seed=1) == folded
        assert fold(trace, capacity=2_000.0, load=load, seed=2) != folded

    def test_objectives(self) -> None:
        jobs = [job(n, n, 1, 10) for n in range(300)]
        mixed = [trace_job.objective for trace_job in with_objectives(jobs, "MIXED", 1)]
        assert all(70 < mixed.count(objective) < 130 for objective in Objective)
        assert {trace_job.objective for trace_job in with_objectives(jobs, "TIME", 1)} == {
            Objective.TIME
        }


class TestBaselines:
    def run(self, jobs: list[TraceJob], *sizes: int, route: object = to_the_only_one) -> dict:
        clusters = [Cluster(size, 1.0, first_come_first_served) for size in sizes]
        return starts(run_clusters(jobs, clusters, route))  # type: ignore[arg-type]

    def test_easy_backfills_without_delaying_the_first_job(self) -> None:
        jobs = [
            job(1, 0, 6, 100),
            job(2, 1, 8, 50),  # waits for the first
            job(3, 2, 2, 98),  # ends with the first: is backfilled
            job(4, 3, 2, 98),  # would delay the second
        ]
        assert self.run(jobs, 8) == {1: 0, 2: 100, 3: 2, 4: 150}

    def test_longer_jobs_fit_next_to_the_reservation(self) -> None:
        jobs = [job(1, 0, 6, 100), job(2, 1, 7, 50), job(3, 2, 1, 900), job(4, 3, 1, 900)]
        assert self.run(jobs, 8) == {1: 0, 2: 100, 3: 2, 4: 150}

    def test_smallest_area_first(self) -> None:
        jobs = [job(1, 0, 8, 100), job(2, 1, 8, 90), job(3, 2, 8, 10)]
        outcomes = run_clusters(jobs, [Cluster(8, 1.0, smallest_area_first)], to_the_only_one)
        assert starts(outcomes) == {1: 0, 3: 100, 2: 110}

    def test_runs_are_as_fast_as_the_cluster_and_stop_at_the_limit(self) -> None:
        jobs = [job(1, 0, 8, 100, 80)]
        for speed, end in ((2.0, 40.0), (0.5, 100.0)):
            [outcome] = run_clusters(
                jobs, [Cluster(8, speed, first_come_first_served)], to_the_only_one
            )
            assert outcome.end == end

    def test_routes(self) -> None:
        jobs = [job(1, 0, 8, 1_000), job(2, 1, 2, 10), job(3, 2, 8, 10)]
        outcomes = run_clusters(
            jobs,
            [Cluster(8, 1.0, first_come_first_served), Cluster(4, 1.0, first_come_first_served)],
            to_the_least_loaded,
        )
        # Eight CPUs fit the first cluster alone.
        assert [outcome.provider for outcome in outcomes] == [0, 1, 0]
        alike = [Cluster(8, 1.0, first_come_first_served) for _ in range(4)]
        drawn = run_clusters(
            [job(n, n, 1, 10_000) for n in range(1, 41)], alike, to_the_less_loaded_of_two(1)
        )
        # The most loaded of four is never the less loaded of two.
        counts = [[outcome.provider for outcome in drawn].count(i) for i in range(4)]
        assert max(counts) - min(counts) <= 3
        fast = Cluster(8, 4.0, first_come_first_served)
        slow = Cluster(8, 1.0, first_come_first_served)
        outcomes = run_clusters(
            [job(1, 0, 8, 100), job(2, 1, 8, 100), job(3, 2, 8, 1_000)],
            [slow, fast],
            to_the_earliest_completion,
        )
        assert [outcome.provider for outcome in outcomes] == [1, 0, 1]


class TestPolicyEngine:
    def test_chain_delay(self) -> None:
        """A job is seen in the next block and starts three blocks after the plan; its end is seen in the next block."""
        grid = read_grid(GRID)
        single_cluster = SimulatedGrid(
            (replace_cluster(grid, nodes=1, cpus_per_node=4, speed=1.0),)
        )
        jobs = [job(1, 1.0, 4, 20, 10), job(2, 1.5, 4, 20, 10)]
        outcomes = run_policy(jobs, single_cluster.views(), single_cluster.speeds, Rules(), block=2)
        # Blocks at 2, 4, ...: planned at 2, runs from 8 to 18, its end is seen at 20.
        assert starts(outcomes) == {1: 8, 2: 26}
        at_once = run_policy(jobs, single_cluster.views(), single_cluster.speeds, Rules())
        assert starts(at_once) == {1: 1.0, 2: 11.0}

    def test_jobs_may_arrive_at_the_end_of_time(self) -> None:
        jobs = [job(1, 0, 4, 60), job(2, 2.0**45, 4, 60)]
        views, speeds = read_grid(GRID).views(), read_grid(GRID).speeds
        assert starts(run_policy(jobs, views, speeds, Rules())) == {1: 0, 2: 2.0**45}

    def test_a_hold_ends_without_another_event(self) -> None:
        """An ENERGY job waits for the frugal cluster, then takes the other one."""
        grid = read_grid(GRID)
        frugal = replace_cluster(grid, nodes=1, cpus_per_node=4, speed=1.0, watts_per_cpu=5.0)
        other = replace_cluster(grid, nodes=1, cpus_per_node=4, speed=1.0, watts_per_cpu=9.0)
        two_clusters = SimulatedGrid((frugal, other))
        jobs = with_objectives([job(1, 0, 4, 10_000), job(2, 5, 4, 100, 80)], "ENERGY", 1)
        outcomes = run_policy(jobs, two_clusters.views(), two_clusters.speeds, Rules())
        assert [outcome.provider for outcome in outcomes] == [0, 1]
        assert starts(outcomes) == {1: 0, 2: 205}
        without_hold = run_policy(
            jobs, two_clusters.views(), two_clusters.speeds, Rules(energy_hold=0)
        )
        assert starts(without_hold) == {1: 0, 2: 5}

    def test_error_names_a_job_without_an_eligible_provider(self) -> None:
        grid = read_grid(GRID)
        jobs = [job(1, 0, 4, 100), job(2, 5, 10_000, 100), job(3, 6, 20_000, 100)]
        with pytest.raises(UsageError, match=r"2 of 3 jobs .* such as job 2 with 10000 CPUs"):
            run_policy(jobs, grid.views(), grid.speeds, Rules())

    def test_the_largest_limit_is_affordable_at_any_rate(self) -> None:
        grid = read_grid(GRID)
        expensive = replace_cluster(grid, nodes=1, cpus_per_node=4, speed=1.0, cpu_price=1_000_000)
        single_cluster = SimulatedGrid((expensive,))
        (run,) = run_policy(
            [job(1, 0, 4, 2**24 - 1, 60)], single_cluster.views(), single_cluster.speeds, Rules()
        )
        assert run.start == 0

    def test_patience_is_a_fraction_of_the_limit_of_cost_and_energy_jobs(self) -> None:
        jobs = with_objectives([job(n, n, 1, 100 * n) for n in range(1, 30)], "MIXED", 1)
        for trace_job in with_patience(jobs, 0.5):
            is_fast = trace_job.objective is Objective.TIME
            assert trace_job.patience == (0 if is_fast else trace_job.limit // 2)
        grid = read_grid(GRID)
        cheap = replace_cluster(grid, nodes=1, cpus_per_node=4, speed=1.0, cpu_price=1)
        expensive = replace_cluster(grid, nodes=1, cpus_per_node=4, speed=1.0, cpu_price=2)
        two_clusters = SimulatedGrid((cheap, expensive))
        jobs = [job(1, 0, 4, 100, 100), job(2, 5, 4, 100, 100)]
        without_patience = run_policy(jobs, two_clusters.views(), two_clusters.speeds, Rules())
        assert starts(without_patience) == {1: 0, 2: 5}
        long_patience = run_policy(
            with_patience(jobs, 10.0), two_clusters.views(), two_clusters.speeds, Rules()
        )
        assert starts(long_patience) == {1: 0, 2: 100}


def replace_cluster(grid: SimulatedGrid, **changes: object) -> object:
    return grid.providers[0].model_copy(update=changes)


class TestGrids:
    def test_the_example(self) -> None:
        grid = read_grid(GRID)
        assert (len(grid.providers), grid.cpus, grid.largest) == (8, 1_032, 256)
        assert (min(grid.speeds), max(grid.speeds)) == (0.7, 1.6)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "the document: "),
            ("providers: []", "providers: "),
            ("providers: [{name: a, nodes: 1}]", r"providers\.0\.cpus_per_node: Field required"),
            ("providers: [{name: a, nodes: 0, cpus_per_node: 1}]", r"providers\.0\.nodes: "),
            ("providers: [{name: a, nodes: 1, cpus_per_node: 1, sped: 2}]", r"providers\.0\.sped"),
            ("providers: [{name: a, nodes: 1, cpu_per_node: 1}]", r"providers\.0\.cpu_per_node"),
            (
                "providers: [{name: a, nodes: 1, cpus_per_node: 16, mem_per_node: 8}]",
                r"providers\.0: .*mem_per_node is in MB",
            ),
            ("providers: [{name: a, nodes: 1, cpus_per_node: 1, speed: 1e-300}]", "speed"),
            ("providers: [{name: a, nodes: 1, cpus_per_node: 1, cpu_price: 1e-30}]", "cpu_price"),
            ("providers: [{name: 2026-13-45}]", "can't be read"),
            ("providers: [{name: a, nodes: 1, cpus_per_node: 1, speed: .nan}]", "speed"),
            ("{", "can't be read"),
            ("\x00", "can't be read"),
        ],
    )
    def test_errors_name_the_bad_grid_file(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        with pytest.raises(UsageError, match=message) as error:
            read_grid(path)
        assert "examples/grid.yaml" in (error.value.hint or "")


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment(synthetic("mixed", 300, 1), read_grid(GRID), [0.9], 2, ["MIXED"])


class TestExperiments:
    def test_measures_and_rows(self, experiment: Experiment) -> None:
        reports: list[tuple[int, int]] = []
        measures = run_experiment(
            experiment, processes=1, progress=lambda *progress: reports.append(progress)
        )
        assert reports == [(n, 12) for n in range(13)]
        rows = {row.scheduler: row for row in summarise(measures)}
        assert set(rows) == set(Scheduler)
        saf, fcfs = rows[Scheduler.MERGED_SAF], rows[Scheduler.MERGED_FCFS]
        assert (saf.vs_merged_saf, fcfs.wait_p99_vs_fcfs) == (1.0, 1.0)
        assert rows[Scheduler.LEAST_LOADED].better_than_least_loaded == 1.0
        policy = rows[Scheduler.POLICY]
        assert policy.money is not None
        assert policy.energy is not None
        assert policy.money < 1.0
        assert policy.energy < 1.0
        assert saf.money is None
        page = render(experiment, list(rows.values()), measures)
        assert page.count("<svg") == 6
        assert "least loaded" in page

    def test_the_reference_price_is_the_mean_of_the_grid(self) -> None:
        """A workload that keeps every cluster busy all the time has exactly the mean price."""
        grid = read_grid(GRID)
        hours = [
            SimulatedRun(
                replace(job(n, 0, provider.cpus, 3_600), objective=Objective.COST), n, 0, 3_600
            )
            for n, provider in enumerate(grid.providers)
        ]

        assert against_blind(hours, grid, Objective.COST) == pytest.approx(1.0)
        assert against_blind(hours, grid, Objective.ENERGY) is None

    def test_results_do_not_depend_on_the_number_of_processes(self, experiment: Experiment) -> None:
        small = replace(experiment, trace=synthetic("mixed", 80, 2), seeds=1)
        assert run_experiment(small, processes=2, progress=lambda *_: None) == run_experiment(
            small, processes=1, progress=lambda *_: None
        )

    def test_every_line_of_a_plot_looks_different(self, experiment: Experiment) -> None:
        result = replace(experiment, mixes=["TIME", "COST", "MIXED"], blocks=[0.0, 1.0], seeds=1)
        measures = run_experiment(result, processes=1, progress=lambda *_: None)
        plot = render(result, summarise(measures), measures).split("<figure>")[1]
        styles = re.findall(r'stroke="(#\w+)" stroke-width="1.5" stroke-dasharray="([^"]*)"', plot)
        assert len(set(styles)) == len(styles) == len(measures)

    def test_names_from_files_are_escaped(self, experiment: Experiment) -> None:
        trace = replace(synthetic("mixed", 60, 2), name="<script>alert(1)</script>")
        hostile = replace(experiment, trace=trace, seeds=1)
        measures = [run_case(hostile, Case(Scheduler.POLICY, 0.9, 0, "COST"))]
        assert "<script>" not in render(hostile, summarise(measures), measures)


class TestCommand:
    def invoke(self, *arguments: str) -> tuple[int, str]:
        small = ["simulate", str(EXAMPLES / "mixed.swf"), "--providers", str(GRID)]
        result = CliRunner().invoke(app, [*small, *arguments])
        return result.exit_code, result.output

    @pytest.fixture
    def trace(self, tmp_path: Path) -> Path:
        path = tmp_path / "few.swf"
        path.write_text("\n".join(line(n, 30 * n, cpus=100) for n in range(60)))
        return path

    def test_json_csv_and_page(self, trace: Path, tmp_path: Path) -> None:
        arguments = ["simulate", str(trace), "--providers", str(GRID), "--seeds", "1"]
        page = tmp_path / "page.html"
        arguments += ["--processes", "1", "--want", "time", "--block", "0", "--block", "1"]
        result = CliRunner().invoke(app, [*arguments, "-o", "json", "--page", str(page)])
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)["rows"]
        assert len(rows) == 7
        policy = [row for row in rows if row["scheduler"] == "policy"]
        assert [(row["objective"], row["block_seconds"]) for row in policy] == [
            ("TIME", 0.0),
            ("TIME", 1.0),
        ]
        assert page.read_text().startswith("<!doctype html>")
        assert "e+0" not in page.read_text()
        result = CliRunner().invoke(app, [*arguments, "-o", "csv", "--no-baselines"])
        assert len(list(csv.reader(io.StringIO(result.stdout)))) == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--load", "1e-300"], "a load from 0.001 to 3, such as 0.9"),
            (["--load", "nan"], "a load from 0.001 to 3, such as 0.9"),
            (["--block", "-1"], "seconds from 0 to 600, such as 2"),
            (["--patience", "101"], "a part of the limit from 0 to 100"),
            (["--want", "speed"], "is none of MIXED, COST, TIME, ENERGY"),
            (["--seeds", "0"], "is not a whole number from 1 to 1000, such as 6"),
        ],
    )
    def test_errors_name_the_bad_value(self, arguments: list[str], message: str) -> None:
        code, output = self.invoke(*arguments)
        assert code == 2
        assert message in " ".join(output.replace("│", " ").split())

    def test_changes_of_the_trace_are_reported(self, tmp_path: Path) -> None:
        path = tmp_path / "wide.swf"
        path.write_text("\n".join([line(1, cpus=4_096), line(2, run_seconds=0)]))
        arguments = ["simulate", str(path), "--providers", str(GRID), "--seeds", "1", "--processes"]
        result = CliRunner().invoke(app, [*arguments, "1", "--no-baselines"])
        assert result.exit_code == 0
        assert "wide.swf: 1 of 2 jobs are left out" in result.stderr
        assert "wide.swf: job sizes are scaled from 4096 to 129 CPUs" in result.stderr

    def test_jobs_wider_than_every_cluster_are_refused(self) -> None:
        code, output = self.invoke("--width", "257")
        assert code == 2
        assert "The largest cluster has 256 CPUs, and jobs may be 257 wide" in output

    def test_a_page_that_cannot_be_written(self, trace: Path, tmp_path: Path) -> None:
        arguments = [
            "simulate",
            str(trace),
            "--providers",
            str(GRID),
            "--seeds",
            "1",
            "--processes",
        ]
        result = CliRunner().invoke(
            app, [*arguments, "1", "--no-baselines", "--page", str(tmp_path / "no" / "page.html")]
        )
        assert result.exit_code != 0
        assert "can't be written" in result.output
