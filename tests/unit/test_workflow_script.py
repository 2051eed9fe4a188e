"""The script of a job, executed by bash."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from deepsquare_chain.executors.base import MAX_SCRIPT_BYTES
from deepsquare_chain.job import Resources
from deepsquare_chain.workflow import Definition, ExecutionSite, Step, load_job_file, render_script
from deepsquare_chain.workflow.abilities import RUNTIMES
from deepsquare_chain.workflow.definition import definition_of
from deepsquare_chain.workflow.schema import ContainerSection
from deepsquare_chain.workflow.steps import image_name

EXAMPLES = Path(__file__).parents[2] / "examples"
BASH = shutil.which("bash") or "/bin/bash"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)


def definition(*steps: Step | str, **env: str) -> Definition:
    all_steps = [step if isinstance(step, Step) else Step.simple("", step) for step in steps]
    return Definition(Resources(2, 3, 64, 1), env, tuple(all_steps))


def run(
    job: Definition, folder: Path, job_env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    script = folder / "job.sh"
    script.write_bytes(render_script(job, job_env or {}))
    return subprocess.run(
        [BASH, str(script)], cwd=folder, capture_output=True, timeout=60, check=False
    )


def test_steps_run_in_order(tmp_path: Path) -> None:
    result = run(definition("echo one", "echo two >&2", "echo three"), tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"one\nthree\n", b"two\n")


@pytest.mark.parametrize("code", [1, 3, 126, 255])
def test_the_first_step_that_fails_ends_the_job(tmp_path: Path, code: int) -> None:
    result = run(definition("echo one", f"echo two; exit {code}", "echo three"), tmp_path)
    assert (result.returncode, result.stdout) == (code, b"one\ntwo\n")


def test_a_step_killed_by_a_signal_fails_the_job(tmp_path: Path) -> None:
    result = run(definition("kill -TERM $$", "echo never"), tmp_path)
    assert (result.returncode, result.stdout) == (128 + signal.SIGTERM, b"")


def test_a_missing_program_and_broken_shell_fail_the_job(tmp_path: Path) -> None:
    assert run(definition("no-such-program-here"), tmp_path).returncode == 127
    assert run(definition("if then"), tmp_path).returncode == 2


@pytest.mark.parametrize("command", ["-x", "+e", "--version"])
def test_a_command_is_not_an_option_of_the_shell(tmp_path: Path, command: str) -> None:
    result = run(definition(command), tmp_path)
    assert (result.returncode, result.stdout) == (127, b"")
    assert f"{command}: command not found" in result.stderr.decode()


def test_steps_do_not_share_a_shell(tmp_path: Path) -> None:
    result = run(
        definition("X=1; cd /; set -e; exec 3>&1", 'echo "[$X]"; pwd; false; echo on'), tmp_path
    )
    assert result.stdout.decode() == f"[]\n{tmp_path}\non\n"


def test_steps_share_a_folder(tmp_path: Path) -> None:
    assert run(definition("echo data > file", "cat file"), tmp_path).stdout == b"data\n"


def test_variables_of_job_step_and_grid(tmp_path: Path) -> None:
    job = definition(
        Step.simple("", 'echo "$A $B $DEEPSQUARE_JOB_ID"', {"B": "step"}),
        'echo "$A $B $DEEPSQUARE_JOB_ID"',
        A="job",
        B="job",
    )
    result = run(job, tmp_path, {"DEEPSQUARE_JOB_ID": "42"})
    assert result.stdout == b"job step 42\njob job 42\n"


def test_the_grid_wins_over_the_job(tmp_path: Path) -> None:
    result = run(definition('echo "$A"', A="job"), tmp_path, {"A": "grid"})
    assert result.stdout == b"grid\n"


def test_resources_are_passed_to_the_job(tmp_path: Path) -> None:
    names = ("TASKS", "CPUS_PER_TASK", "MEM_PER_CPU", "GPUS")
    command = "echo " + " ".join(f"$DEEPSQUARE_{name}" for name in names)
    assert run(definition(command), tmp_path).stdout == b"2 3 64 1\n"


@pytest.mark.parametrize("name", ["BASH", "IFS", "SHELL", "_", "A1", "TMOUT", "LC_ALL"])
def test_variables_of_the_shell_itself_do_not_stop_the_job(tmp_path: Path, name: str) -> None:
    result = run(definition('printf "%s\n" reached', **{name: "/nowhere"}), tmp_path)
    assert (result.returncode, result.stdout) == (0, b"reached\n")


def test_a_command_as_long_as_allowed_runs(tmp_path: Path) -> None:
    # A quoted quotation mark takes four characters: the worst case.
    result = run(definition("true " + "'" * 65_530), tmp_path)
    assert result.returncode == 0


# One bash for many texts: each is printed with a NUL behind it.
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(
    ["'", '"', "\\", "$(id)", "`id`", "${HOME}", "!!", "\n", "\n\n", "a\nb", "", " ", "*", "~"]
)
@example(["\n#SBATCH --uid=0", "'\n'", "$'\\n'", "\r\n", "\x1b[31m", "-n", "é\u2028", "'$'\\n''"])
@given(texts=st.lists(TEXT, min_size=1, max_size=10))
def test_texts_reach_the_job_unchanged(tmp_path: Path, texts: list[str]) -> None:
    env = {f"V{at}": text for at, text in enumerate(texts)}
    shows = "; ".join(f'printf "%s\\0" "$V{at}"' for at in range(len(texts)))
    result = run(definition(Step.simple("", shows, env), shows, **env), tmp_path)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode().split("\0") == [*texts, *texts, ""]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(TEXT, min_size=1, max_size=5))
def test_commands_reach_their_shell_unchanged(tmp_path: Path, arguments: list[str]) -> None:
    # The shell shows its own command line, so any text may follow the first comment sign.
    text = "\n".join(arguments)
    command = f"tr '\\0' '\\n' < /proc/$$/cmdline; exit 7\n{text}"
    result = run(definition(command), tmp_path)
    assert result.returncode == 7
    assert result.stdout.decode().endswith(f"-c\n{command}\n")


@given(st.lists(TEXT | TEXT.map("\n#SBATCH ".__add__), min_size=1, max_size=5))
def test_no_text_of_a_customer_starts_a_line(texts: list[str]) -> None:
    def outline(texts: list[str]) -> list[str]:
        env = {f"V{at}": text for at, text in enumerate(texts)}
        job = definition(*(Step.simple("", text or "x", env) for text in texts), **env)
        script = render_script(job, {"DEEPSQUARE_NAME": texts[0]}).decode()
        return [line.split("=")[0].split("$")[0].split("'")[0] for line in script.split("\n")]

    hostile = [text if text.strip() else "x" for text in texts]
    assert outline(hostile) == outline(["'x'" for _ in texts])


ONE_LINE = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("'\"\\$`;&|<>()#!*~ "),
    min_size=1, max_size=40,
)  # fmt: skip


def job_with_text(text: str, line: str) -> Definition:
    """Return a job with a customer's text in every field."""
    path = f"/{line.replace('..', '')}"
    container: dict[str, Any] = {"image": path, "registry": "r", "username": line, "password": line}
    mounted = re.sub(r"[\s:,]", "", path)
    container["mounts"] = [{"hostDir": mounted, "containerDir": mounted, "options": "ro"}]
    keys = {"accessKeyId": line, "secretAccessKey": line, "region": line, "bucketUrl": "s3://bb"}
    keys |= {"endpointUrl": "http://h", "path": "/" + re.sub(r"[*?\[\]]", "", line)}
    run = {"command": text, "env": {"A": text}, "workDir": path}
    peer = {"publicKey": line, "preSharedKey": line, "allowedIPs": ["192.0.2.1/24"]}
    interfaces = [
        {"wireguard": {"privateKey": line, "address": ["192.0.2.2/24"], "peers": [peer]}},
        {"bore": {"boreAddress": "b.example:1", "targetPort": 1, "secret": line}},
        {"vnet": {"name": "net", "address": "10.0.0.2/24"}},
    ]
    network = {"network": "pasta", "mapUid": 0, "customNetworkInterfaces": interfaces}
    steps: list[dict[str, Any]] = [
        {"name": line, "if": text, "run": run},
        {"run": {**run, **network}},
        {"run": {**run, **network, "container": {**container, "runtime": "charliecloud"}}},
        {"for": {"parallel": False, "items": [text], "steps": [{"run": {"command": text}}]}},
        *(
            {"run": {**run, "container": {**container, "runtime": runtime}}}
            for runtime in ("podman", "charliecloud", "enroot", "apptainer")
        ),
    ]
    tree: dict[str, Any] = {
        "version": 1,
        "resources": {"memPerCpu": 1},
        "env": {"A": text},
        "steps": steps,
    }
    tree |= {"virtualNetworks": [{"name": "net", "gatewayAddress": "10.0.0.1/24"}]}
    tree |= {"input": {"s3": keys}, "output": {"s3": keys}, "continuousOutputSync": True}
    return definition_of(from_json(json.dumps(tree)), "everything")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("'\n#SBATCH x\n", "'; exit; '")
@example("$(id)\n}\n`", "\\")
@example("\\\U00010000", "\\\U00010000")  # in JSON a surrogate pair after a backslash
@given(TEXT.filter(str.strip), ONE_LINE.filter(lambda text: text.strip() and text.isprintable()))
def test_hostile_text_changes_no_line_of_any_script(tmp_path: Path, text: str, line: str) -> None:
    site = ExecutionSite(frozenset({*RUNTIMES, "netns.interfaces"}))

    def outline(text: str, line: str) -> tuple[int, list[str]]:
        lines = render_script(job_with_text(text, line), {}, site).decode()
        return lines.count("\n"), [
            re.sub(r"[^a-zA-Z_({}=].*", "", part) for part in lines.split("\n")
        ]

    assert outline(text, line) == outline("'", "'")
    script = tmp_path / "job.sh"
    script.write_bytes(render_script(job_with_text(text, line), {}, site))
    assert subprocess.run([BASH, "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("image", "registry", "name"),
    [
        ("alpine", None, "docker.io/library/alpine"),
        ("user/app:1", "registry-1.docker.io", "docker.io/user/app:1"),
        ("ghcr.io/org/app:1", None, "ghcr.io/org/app:1"),
        ("localhost:5000/app", None, "localhost:5000/app"),
        ("localhost/app", None, "localhost/app"),
        ("a.b/app", "registry.example:5000", "registry.example:5000/a.b/app"),
        (f"app:1@sha256:{'0' * 64}", "r.example", f"r.example/app@sha256:{'0' * 64}"),
    ],
)
def test_names_of_images(image: str, registry: str | None, name: str) -> None:
    assert image_name(ContainerSection(image=image, registry=registry)) == name


@pytest.mark.parametrize("text", ["'", "\n", "\\", "'\n", "$"])
def test_the_largest_definitions_make_scripts_that_executors_take(text: str) -> None:
    job = definition(*("x" + text * (60_000 // len(text)) for _ in range(15)))
    assert len(render_script(job, {})) <= MAX_SCRIPT_BYTES


def test_a_broken_rendered_script_is_refused() -> None:
    for name in ("A B", "1", "", "A;id", "é", "A\n"):
        with pytest.raises(ValueError, match="not a name of a variable"):
            render_script(definition("true"), {name: "x"})
    with pytest.raises(ValueError, match="NUL"):
        render_script(definition("true"), {"A": "x\0y"})


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("exits-3", 3, "looking for the input file"),
        ("pi", 0, "pi is about 3.1"),
        ("wordcount", 0, "the count is right"),
    ],
)
def test_examples_run(tmp_path: Path, name: str, code: int, message: str) -> None:
    job = load_job_file(EXAMPLES / f"{name}.yaml").definition
    result = run(job, tmp_path, {"DEEPSQUARE_JOB_ID": "1"})
    assert result.returncode == code
    assert message in result.stdout.decode()
    assert b"never printed" not in result.stdout
