"""The pure parts of the Slurm executor: arguments, outputs of many versions, verdicts, options.

`slurm_outputs/` has what the commands of several versions of Slurm print; `scripts/record_slurm.py`
recorded them from real clusters. Lines of versions in between are written in the formats that all share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.errors import UsageError
from deepsquare_chain.executors.base import (
    ExecutorUnavailableError,
    Exit,
    RunSpec,
    RunState,
)
from deepsquare_chain.executors.slurm import commands, parsing, records
from deepsquare_chain.executors.slurm.client import (
    CommandRefusedError,
    SlurmClient,
    UnknownJobError,
    failure,
)
from deepsquare_chain.executors.slurm.options import SlurmOptions, parse_options
from deepsquare_chain.executors.slurm.parsing import SlurmJob, registered_hardware
from deepsquare_chain.executors.slurm.records import Orders
from deepsquare_chain.job import Hardware, Resources

RECORDED = Path(__file__).with_name("slurm_outputs")
VERSIONS = sorted(path.name for path in RECORDED.iterdir())
of_each_version = pytest.mark.parametrize("version", VERSIONS)
PREFIX = "deepsquare-31337-5fbdb231-"
COMMENT = "deepsquare chain=31337 contract=0x5FbDB2315678afecb367f032d93F642f64180aa3 job=1"
SPEC = RunSpec("31337-5fbdb231-42", b"true", Resources(4, 2, 1000, 0), 90, {})


def recorded(version: str, name: str) -> str:
    return (RECORDED / version / f"{name}.txt").read_text()


def sbatch(spec: RunSpec = SPEC, **options: Any) -> list[str]:
    return commands.submit(
        spec,
        parse_options(options),
        folder="/grid/runs/50%",
        wrapper="/lib/wrapper.sh",
        limit_minutes=commands.minutes(spec.walltime),
        comment="deepsquare chain=31337 contract=0x5f job=42",
    )


# -- arguments


def test_arguments_of_sbatch() -> None:
    assert sbatch() == [
        "sbatch",
        "--parsable",
        "--job-name=deepsquare-31337-5fbdb231-42",
        "--comment=deepsquare chain=31337 contract=0x5f job=42",
        "--no-requeue",
        "--export=NONE",
        "--chdir=/grid/runs/50%/work",
        "--output=/grid/runs/50%%/slurm.log",
        "--input=/dev/null",
        "--ntasks=4",
        "--cpus-per-task=2",
        "--mem-per-cpu=1000M",
        "--time=4",
        "/lib/wrapper.sh",
        "/grid/runs/50%",
    ]


def test_configuration_becomes_arguments() -> None:
    options = {
        "partitions": ["long", "spare"],
        "gpu_partitions": "gpu",
        "account": "grid",
        "qos": "low",
        "constraint": "[ib|opa]",
        "extra": "--nice=100 --reservation=grid",
    }
    arguments = sbatch(**options)
    added = [request for request in arguments if request not in sbatch()]
    assert added == [
        "--partition=long,spare",
        "--account=grid",
        "--qos=low",
        "--constraint=[ib|opa]",
        "--nice=100",
        "--reservation=grid",
    ]
    trial = commands.trial(parse_options(options))
    assert trial[:2] == ["sbatch", "--test-only"]
    assert set(added) < set(trial)
    with_gpus = replace(SPEC, resources=replace(SPEC.resources, gpus=3))
    arguments = sbatch(with_gpus, gpu_type="h100", **options)
    assert "--partition=gpu" in arguments
    assert "--gpus=h100:3" in arguments
    arguments = sbatch(with_gpus, gpus="gres")
    assert [a for a in arguments if a.startswith(("--nodes", "--gr"))] == [
        "--nodes=1",
        "--gres=gpu:3",
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"partition": "x"},
        {"partitions": "a;b"},
        {"account": "--uid=0"},
        {"constraint": "-x"},
        {"constraint": "a\nb"},
        {"extra": "--array=0-9"},
        {"extra": "--arr=0-9"},
        {"extra": "--wrap=reboot"},
        {"extra": "-J name"},
        {"extra": "script.sh"},
        {"extra": "--requeue"},
        {"extra": "--export=ALL"},
        {"run_dir": "runs"},
        {"gpus": "some"},
        {"query_interval": -1},
        {"command_timeout": 0},
    ],
)
def test_options_that_are_wrong_or_would_undo_what_the_executor_sets(
    options: dict[str, Any],
) -> None:
    with pytest.raises(UsageError) as error_info:
        parse_options(options)
    assert next(iter(options)) in error_info.value.message


def test_limits_are_whole_minutes_above_the_seconds_that_are_paid() -> None:
    for seconds in (1, 59, 60, 61, 3600, 2**24):
        limit = commands.minutes(seconds) * 60
        assert seconds + 60 < limit <= seconds + 180


# -- outputs


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42\n", "42"),  # every version
        ("42;cluster-a\n", "42"),  # with a cluster's name, where several are configured
        ("sbatch: INFO: your quota is 90 % used\n42\n", "42"),  # a job_submit plugin prints text
        ("", None),
        ("Submitted batch job 42\n", None),
        ("42 43\n", None),
        ("0\n", None),
        ("-1\n", None),
        ("4" * 30, None),
    ],
)
def test_job_number_of_sbatch(text: str, number: str | None) -> None:
    assert parsing.job_id(text) == number


#: States of the recorded jobs, by the last part of their key.
STATES = {
    "1": "FAILED",
    "2": "COMPLETED",
    "3": "NODE_FAIL",
    "4": "CANCELLED",
    "5": "RUNNING",
    "6": "PENDING",
    "7": "PENDING",
}


def test_outputs_are_of_the_version_that_their_folder_names() -> None:
    assert len(VERSIONS) >= 3
    for version in VERSIONS:
        assert f" {version}." in recorded(version, "version")


@of_each_version
def test_recorded_queue(version: str) -> None:
    queue = parsing.queue(recorded(version, "squeue"))
    jobs = {job.name.removeprefix(PREFIX): job for job in queue}
    assert {name: job.state for name, job in jobs.items()} == STATES
    assert {job.comment for job in jobs.values()} == {COMMENT}
    assert all(jobs[name].started_at for name in "12345")
    assert jobs["6"].started_at is None
    assert {name: jobs[name].limit for name in "1567"} == {
        "1": 180,
        "5": 86_400,
        "6": 180,
        "7": 3_600,
    }
    assert records.never_starts(jobs["7"])
    assert not records.never_starts(jobs["6"])


@pytest.mark.parametrize(
    "line",
    [
        # 20.11 and 21.08
        f"7|COMPLETED|None|1700000000|1700000009|5:00|{PREFIX}7|(null)",
        # 23.02 and 23.11: a comment that is empty, a limit in hours
        f"7|COMPLETED|None|1700000000|1700000009|1:00:00|{PREFIX}7|",
        # 24.05 to 25.05: a time that is not known yet
        f"7|COMPLETED|None|1700000000|N/A|UNLIMITED|{PREFIX}7|a comment | with a bar",
    ],
)
def test_queue_of_other_versions(line: str) -> None:
    [job] = parsing.queue(line + "\nslurm_load_jobs warning: stale\n")
    assert (job.id, job.state, job.started_at) == ("7", "COMPLETED", 1700000000)
    assert commands.key_of(job.name) == "31337-5fbdb231-7"
    assert job.comment in {"", "a comment | with a bar"}


@of_each_version
def test_recorded_job_details(version: str) -> None:
    lines = recorded(version, "scontrol_job").splitlines()
    result = [job for line in lines if (job := parsing.job(line)) is not None]
    jobs = dict(zip(STATES, result, strict=True))
    assert {name: job.state for name, job in jobs.items()} == STATES
    assert (jobs["1"].exit_code, jobs["1"].exit_signal) == (3, 0)
    assert (jobs["4"].exit_code, jobs["4"].exit_signal) == (0, 15)
    assert jobs["5"].limit == 86_400
    for job in result[:4]:
        assert job.started_at is not None
        assert job.ended_at is not None
        assert 0 <= job.ended_at - job.started_at < 60


_DETAILS = (
    "JobId=7 JobName={name} UserId=grid(1000) GroupId=grid(1000) MCS_label=N/A Priority=1 Nice=0 "
    "Account=(null) QOS=normal {extra}JobState=FAILED Reason=NonZeroExitCode Dependency=(null) "
    "Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=3:0 RunTime=00:00:09 TimeLimit=1-00:00:00 "
    "TimeMin=N/A SubmitTime=1700000000 {times}StartTime=1700000001 EndTime=1700000010 Deadline=N/A "
    "Partition=main NodeList=n1 {tres} Command=/x/wrapper.sh WorkDir=/ Comment=JobState=RUNNING "
)


@pytest.mark.parametrize(
    ("extra", "times", "tres"),
    [
        ("", "EligibleTime=1700000000 AccrueTime=Unknown ", "TRES=cpu=1"),  # 20.11, 21.08
        ("", "EligibleTime=1700000000 ", "ReqTRES=cpu=1 AllocTRES=cpu=1"),  # 23.02, 23.11
        ("WCKey=* ", "EligibleTime=1700000000 ", "ReqTRES=cpu=1 AllocTRES=cpu=1"),  # 24.05
        ("WCKey=* ", "", "ReqTRES=cpu=1 AllocTRES=(null) OverSubscribe=OK"),  # 24.11, 25.05
    ],
)
@pytest.mark.parametrize("name", ["plain", "x JobState=COMPLETED ExitCode=0:0"])
def test_job_details_of_other_versions_and_of_names_that_lie(
    extra: str, times: str, tres: str, name: str
) -> None:
    job = parsing.job(_DETAILS.format(name=name, extra=extra, times=times, tres=tres))
    assert job is not None
    assert (job.state, job.exit_code, job.limit) == ("FAILED", 3, 86_400)
    assert (job.started_at, job.ended_at) == (1700000001, 1700000010)


def test_accounting() -> None:
    text = (
        f"5|CANCELLED by 1000|0:15|1700000000|1700000009|{PREFIX}5\n"  # every version
        f"6|OUT_OF_MEMORY|0:125|1700000000|1700000009|{PREFIX}6\n"
        f"7|RUNNING|0:0|1700000000|Unknown|{PREFIX}7\n"
        f"8|NODE_FAIL|1:0|None|1700000009|{PREFIX}8\n"
        "5.batch|CANCELLED|0:15|1700000000|1700000009|batch\n"
    )
    cancelled, memory, running, node = parsing.accounting(text)
    assert (cancelled.state, cancelled.cancelled_by, cancelled.exit_signal) == (
        "CANCELLED",
        1000,
        15,
    )
    assert (memory.state, memory.exit_signal) == ("OUT_OF_MEMORY", 125)
    assert (running.ended_at, node.started_at, node.exit_code) == (None, None, 1)


@of_each_version
def test_recorded_accounting(version: str) -> None:
    accounting = parsing.accounting(recorded(version, "sacct"))
    jobs = {job.name.removeprefix(PREFIX): job for job in accounting}
    assert {name: job.state for name, job in jobs.items()} == STATES
    assert (jobs["1"].exit_code, jobs["4"].cancelled_by) == (3, 0)
    assert (jobs["5"].ended_at, jobs["6"].started_at) == (None, None)


@of_each_version
def test_recorded_file_of_completed_jobs(version: str) -> None:
    completions = parsing.completions(recorded(version, "sacct_completion"))
    assert {job.name.removeprefix(PREFIX): job.state for job in completions} == {
        name: STATES[name] for name in "1234"
    }


@of_each_version
def test_recorded_nodes_partitions_and_configuration(version: str) -> None:
    def nodes(name: str) -> list[tuple[bool, int, int, int, int]]:
        result = parsing.nodes(recorded(version, name), default_only=False)
        return [
            (node.is_up, node.cpus, node.idle_cpus, node.gpus, node.allocated_gpus)
            for node in result
        ]

    assert nodes("sinfo_nodes") == [(True, 4, 4, 1, 0), (True, 4, 4, 1, 0)]
    assert nodes("sinfo_busy") == [(True, 4, 2, 1, 1), (False, 4, 0, 1, 0)]
    partitions = recorded(version, "sinfo_partitions")
    main, short = {"main": (True, 86_400)}, {"short": (True, 600)}
    assert parsing.partition_limits(partitions, default_only=False) == main | short
    assert parsing.partition_limits(partitions, default_only=True) == main
    config = parsing.config(recorded(version, "scontrol_config"))
    assert config["SlurmUser"] == "root(0)"
    assert config["AccountingStorageType"] == "accounting_storage/slurmdbd"
    assert config["JobCompType"] == "jobcomp/filetxt"


@pytest.mark.parametrize(
    ("state", "is_up"),
    [
        ("idle", True),
        ("mixed", True),
        ("allocated", True),
        ("completing", True),
        ("planned", True),  # 21.08 and later
        ("mixed-", True),  # planned for a job, by its mark
        ("idle~", True),  # saves power, and wakes for a job
        ("idle#", True),
        ("idle*", False),
        ("mixed*+drain", False),
        ("draining", False),
        ("drained", False),
        ("down", False),
        ("down*", False),
        ("inval", False),  # 21.08 and later
        ("blocked", False),  # 23.11 and later
        ("reserved", False),
        ("maint", False),
        ("mixed$", False),
        ("idle@", False),
        ("idle%", False),
        ("future", False),
        ("powered_down", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_states_of_nodes(state: str, is_up: bool) -> None:
    line = f"n1 main* {state or '?'} 1/2/1/4 2048 512 gpu:a100:2(S:0-1),shard:8 gpu:a100:1(IDX:0)"
    [node] = parsing.nodes(line, default_only=True)
    assert parsing.nodes(line.replace("main*", "main"), default_only=True) == []
    assert node.is_up is is_up
    assert (node.idle_cpus, node.allocated_memory, node.gpus, node.allocated_gpus) == (2, 512, 2, 1)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("gpu:4", 4),
        ("gpu:h100:8(S:0-1)", 8),
        ("gpu:a:2(IDX:0,3),gpu:b:1(IDX:N/A)", 3),
        ("craynetwork:4", 0),
        ("(null)", 0),
        ("N/A", 0),
        ("", 0),
        ("gpu:no", 0),
    ],
)
def test_gpus_of_a_node(text: str, count: int) -> None:
    assert parsing.gpus(text) == count


@pytest.mark.parametrize(
    "parse",
    [
        parsing.job_id,
        parsing.queue,
        parsing.job,
        parsing.accounting,
        parsing.completions,
        functools.partial(parsing.nodes, default_only=False),
        functools.partial(parsing.partition_limits, default_only=False),
        parsing.config,
        parsing.gpus,
        parsing.time_limit,
    ],
)
@given(
    st.text(alphabet=st.characters() | st.sampled_from("|=:/;0123456789\n "), max_size=200)
    | st.lists(
        st.sampled_from(
            ["1", "7", "|", "gpu:9", "JobId=7", "UserId=", "ExitCode=1:1", "N/A", "RUNNING", "²٣"]
        )
    ).map("|".join)
)
def test_no_output_stops_the_daemon(parse: Callable[[str], object], text: str) -> None:
    parse(text)


# -- errors


@of_each_version
def test_recorded_errors(version: str) -> None:
    for number in range(4):
        printed = recorded(version, f"sbatch_error_{number}")
        assert isinstance(failure("sbatch", printed), CommandRefusedError), printed
    for name in ("scontrol_error", "scontrol_update_error"):
        printed = recorded(version, name)
        assert isinstance(failure("scontrol", printed), UnknownJobError), printed
    error = failure("squeue", recorded(version, "unreachable"))
    assert type(error) is ExecutorUnavailableError
    assert "Unable to contact slurm controller" in error.message


def test_other_errors_of_sbatch() -> None:
    user = "sbatch: error: Batch job submission failed: User not found on host"
    assert isinstance(failure("sbatch", user), CommandRefusedError)


@pytest.mark.parametrize(
    "message",
    [
        "Socket timed out on send/recv operation",
        "Slurm temporarily unable to accept job, sleeping and retrying",
        "Zero Bytes were transmitted or received",
        "Job violates something that nobody has heard of",
        "",
    ],
)
def test_what_may_pass_is_no_refusal(message: str) -> None:
    assert type(failure("sbatch", f"sbatch: error: {message}")) is ExecutorUnavailableError


def test_words_of_slurm_are_data() -> None:
    error = failure("sbatch", "sbatch: error: \x1b[31mred\x07" + "x" * 5000)
    assert isinstance(error, ExecutorUnavailableError)
    assert error.message.isprintable()
    assert len(error.message) < 600


# -- verdicts

END = Exit(code=0, reason="exited", seconds=9, started_at=100.0, ended_at=109.0)


def conclude(state: str, end: Exit | None = None, **changes: Any) -> tuple[int, str]:
    """Return code and reason of a run that had started."""
    job = SlurmJob("7", state, started_at=100, ended_at=107, **changes.pop("job", {}))
    values = {"started_at": 100.0, "orders": Orders(), **changes}
    result = records.conclude(
        job if state else None,
        values["started_at"],
        end,
        values["orders"],
        user_id=1000,
        now=200.0,
    )
    return result.code, result.reason


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("COMPLETED", (0, "exited")),
        ("FAILED", (3, "exited")),
        ("TIMEOUT", (143, "walltime")),
        ("DEADLINE", (143, "walltime")),
        ("OUT_OF_MEMORY", (137, "memory")),
        ("CANCELLED", (143, "cancelled")),
        ("NODE_FAIL", (137, "lost")),
        ("BOOT_FAIL", (137, "lost")),
        ("PREEMPTED", (137, "lost")),
        ("REVOKED", (137, "lost")),
        ("LAUNCH_FAILED", (137, "lost")),
        ("RECONFIG_FAIL", (137, "lost")),
        ("", (137, "lost")),
    ],
)
def test_every_end_state_without_a_record_of_the_wrapper(
    state: str, expected: tuple[int, str]
) -> None:
    code = {"exit_code": 3 if state == "FAILED" else 0}
    assert conclude(state, job=code) == expected
    assert state == "" or records.run_state(state) is RunState.ENDED
    # If the script never began, it is the provider's failure.
    never = conclude(state, job=code, started_at=None)
    known_to_slurm = {
        "CANCELLED": "cancelled",
        "OUT_OF_MEMORY": "memory",
        "TIMEOUT": "walltime",
        "DEADLINE": "walltime",
        "COMPLETED": "unstarted",
        "FAILED": "unstarted",
        "LAUNCH_FAILED": "unstarted",
    }
    assert never[1] == known_to_slurm.get(state, "lost")


@pytest.mark.parametrize(
    ("state", "code", "reason", "expected"),
    [
        ("COMPLETED", 0, "exited", (0, "exited")),
        ("FAILED", 3, "exited", (3, "exited")),
        ("FAILED", 137, "signalled", (137, "signalled")),
        ("FAILED", 143, "walltime", (143, "walltime")),
        ("FAILED", 143, "cancelled", (143, "cancelled")),
        ("FAILED", 143, "terminated", (143, "signalled")),  # cancelled by the job itself
        ("TIMEOUT", 143, "terminated", (143, "walltime")),
        ("TIMEOUT", 143, "signalled", (143, "walltime")),
        ("TIMEOUT", 0, "exited", (0, "exited")),
        ("OUT_OF_MEMORY", 137, "signalled", (137, "memory")),
        ("OUT_OF_MEMORY", 0, "exited", (137, "memory")),
        ("CANCELLED", 143, "terminated", (143, "cancelled")),
        ("CANCELLED", 137, "signalled", (143, "cancelled")),
        ("CANCELLED", 4, "exited", (4, "exited")),
        ("NODE_FAIL", 0, "exited", (0, "exited")),
        ("NODE_FAIL", 1, "exited", (137, "lost")),
        ("PREEMPTED", 143, "terminated", (137, "lost")),
        ("PREEMPTED", 1, "exited", (137, "lost")),
        ("PREEMPTED", 0, "exited", (0, "exited")),
        ("", 0, "exited", (0, "exited")),
        ("", 6, "exited", (6, "exited")),
        ("", 143, "walltime", (143, "walltime")),
        ("", 143, "terminated", (137, "lost")),
    ],
)
def test_every_end_state_with_a_record_of_the_wrapper(
    state: str, code: int, reason: str, expected: tuple[int, str]
) -> None:
    assert conclude(state, replace(END, code=code, reason=reason)) == expected


def test_orders_and_who_cancelled() -> None:
    assert conclude("CANCELLED", orders=Orders(overdue=True)) == (143, "walltime")
    assert conclude("CANCELLED", orders=Orders(cancel=True)) == (143, "cancelled")
    own_cancel, other_cancel = {"cancelled_by": 1000}, {"cancelled_by": 0}
    assert conclude("CANCELLED", job=own_cancel) == (143, "signalled")
    assert conclude("CANCELLED", job=other_cancel) == (143, "cancelled")
    assert conclude("CANCELLED", job=own_cancel, started_at=None) == (143, "cancelled")
    assert conclude("CANCELLED", job=own_cancel, orders=Orders(cancel=True)) == (143, "cancelled")
    assert conclude("FAILED", job={"exit_code": 0, "exit_signal": 9}) == (137, "signalled")


def test_durations() -> None:
    job = SlurmJob("7", "TIMEOUT", started_at=90, ended_at=107)
    known: dict[str, Any] = {"orders": Orders(), "user_id": 1, "now": 200.0}
    with_record = records.conclude(job, 100.0, END, **known)
    assert (with_record.seconds, with_record.started_at, with_record.ended_at) == (9, 100.0, 109.0)
    # The start of the script counts, not that of the allocation.
    without_record = records.conclude(job, 100.5, None, **known)
    assert (without_record.seconds, without_record.ended_at) == (7, 107.0)
    assert records.conclude(None, 150.0, None, **known).seconds == 50
    assert records.conclude(job, None, None, **known).seconds == 0


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("PENDING", RunState.QUEUED),
        ("CONFIGURING", RunState.QUEUED),
        ("RUNNING", RunState.RUNNING),
        ("COMPLETING", RunState.RUNNING),
        ("SUSPENDED", RunState.RUNNING),
        ("STAGE_OUT", RunState.RUNNING),
        ("", RunState.UNKNOWN),
        ("BRAND_NEW", RunState.UNKNOWN),
    ],
)
def test_live_states(state: str, expected: RunState) -> None:
    assert records.run_state(state) is expected


# -- hardware


def test_hardware_to_register() -> None:
    lines = [
        "n1 main* mixed 4/4/0/8 1000 0 gpu:2 gpu:0",
        "n2 main* idle 0/8/0/8 1200 0 gpu:4 gpu:0",
        "n3 main* idle 0/2/0/2 500 0 (null) gpu:0",
        "n4 main* down* 0/0/64/64 9000 0 gpu:8 gpu:0",
    ]
    nodes = parsing.nodes("\n".join(lines), default_only=False)
    hardware = registered_hardware(nodes)
    assert hardware.hardware == Hardware(2, 8, 1000, 2)
    assert hardware.left_out == ("n3", "n4")
    with pytest.raises(UsageError, match="No node"):
        registered_hardware(parsing.nodes(lines[3], default_only=False))


def test_partitions_of_options() -> None:
    options = SlurmOptions(partitions=("a", "b"), gpu_partitions=("g", "a"))
    assert options.partitions_for(0) == ("a", "b")
    assert options.partitions_for(1) == ("g", "a")
    assert options.all_partitions == ("a", "b", "g")


async def test_missing_configuration_is_named_at_once(tmp_path: Path) -> None:
    client = SlurmClient(parse_options({"conf": str(tmp_path / "slurm.conf")}))
    with pytest.raises(ExecutorUnavailableError, match=r"configuration .*slurm\.conf is missing"):
        await client.run(commands.show_config())
