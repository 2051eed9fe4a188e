"""Modules: copied into the definition, checked against the job, and run with inputs and outputs."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from deepsquare_chain.client.job_file import fetch_module, load_job
from deepsquare_chain.errors import JobFileError
from deepsquare_chain.workflow import Definition, parse_job_file, render_script
from deepsquare_chain.workflow.jobfile import FetchedModule, resolve_modules

GREET = b"""\
name: greet
description: Greets.
minimumResources: {tasks: 1, cpusPerTask: 1, memPerCpu: 10, gpus: 0}
inputs:
  - {key: WHO, description: Who is greeted, default: nobody}
  - {key: MARK, description: What ends it, default: '!'}
outputs:
  - {key: RESULT, description: The greeting}
steps:
  - name: greet
    steps:
      - run: {command: 'echo "RESULT=Hello, $WHO$MARK" >> "$DEEPSQUARE_ENV"; echo "PRIVATE=x" >> "$DEEPSQUARE_ENV"'}
      {{- .Step.Use.Steps | toYaml | nindent 6 }}
    finally:
      - run: {command: 'echo "bye $WHO"'}
"""


def job(use: str, resources: str = "memPerCpu: 10") -> str:
    return f"""\
resources: {{{resources}}}
env: {{WHO: job}}
steps:
- use: {use}
- run: {{command: 'echo "${{OUT_RESULT-}} ${{PRIVATE-unset}} $WHO"'}}
"""


def resolved(text: str, modules: Mapping[str, bytes]) -> Definition:
    def fetch(source: str) -> FetchedModule:
        return FetchedModule(modules[source], "abc123")

    return resolve_modules(parse_job_file(text.encode(), "job.yaml"), fetch).definition


def test_a_module_runs_with_its_inputs_outputs_and_steps_of_its_user(tmp_path: Path) -> None:
    use_step = (
        '{source: ./greet, exportEnvAs: OUT, args: [{key: WHO, value: "it\'s you"}], '
        "steps: [{run: {command: 'echo \"inside $WHO $RESULT\"'}}]}"
    )
    definition = resolved(job(use_step), {"./greet": GREET})
    assert Definition.from_bytes(definition.to_bytes()) == definition
    assert definition.steps[0].use is not None
    assert definition.steps[0].use.commit == "abc123"
    script = tmp_path / "job.sh"
    script.write_bytes(render_script(definition, {}))
    result = subprocess.run(
        ["/bin/bash", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.splitlines(), result.stderr) == (
        0,
        ["inside it's you Hello, it's you!", "bye it's you", "Hello, it's you! unset job"],
        "",
    )


def test_a_module_without_steps_of_its_user(tmp_path: Path) -> None:
    definition = resolved(job("{source: ./greet}"), {"./greet": GREET})
    assert [command for _, command in definition.commands()][1:] == [
        'echo "bye $WHO"',
        'echo "${OUT_RESULT-} ${PRIVATE-unset} $WHO"',
    ]


def test_an_argument_may_be_a_value_of_the_module() -> None:
    steps = (
        b'{{ if .Step.Use.Args }}{{ range .Step.Use.Args }}{{ if eq .Key "WHO" }}{{ .Value }}{{ end }}'
        b"{{ end }}{{ else }}/tmp{{ end }}"
    )
    module = GREET.replace(
        b"- run: {command: 'echo \"bye", b"- run: {workDir: %s, command: 'echo \"bye" % steps
    )
    for use_step, folder in (
        ("{source: ./m}", "/tmp"),
        ("{source: ./m, args: {WHO: '/a: b'}}", "/a: b"),
    ):
        fetched = resolved(job(use_step), {"./m": module}).to_bytes().decode()
        assert f'"workDir":"{folder}"' in fetched


def test_abilities_of_modules_are_requirements() -> None:
    module = GREET.replace(
        b"      {{-", b"      - run: {container: {image: a}, command: x}\n      {{-"
    )
    fetched = resolve_modules(
        parse_job_file(job("{source: ./m}").encode()), lambda _: FetchedModule(module, "c")
    )
    assert fetched.uses == "ability.container=yes,ability.internet=yes"


@pytest.mark.parametrize(
    ("use", "module", "message"),
    [
        ("{source: ./m, args: {NOBODY: x}}", GREET, "module ./m has no input 'NOBODY'"),
        ("{source: ./m}", GREET.replace(b"memPerCpu: 10", b"memPerCpu: 11"), "needs resources.memPerCpu of 11, and the job has 10"),
        ("{source: ./m}", GREET.replace(b"gpus: 0", b"gpusPerTask: 1"), "needs resources.gpus of 1"),
        ("{source: ./m}", GREET.replace(b"name: greet\n", b"", 1), "module ./m:1: name is missing"),
        ("{source: ./m}", GREET.replace(b"    steps:", b"    stepz:", 1), "module ./m:11: steps[0].stepz is an unknown key; did you mean steps?"),
        ("{source: ./m}", GREET + b"# {{ fine }}\n", ""),
        ("{source: ./m}", GREET.replace(b"Greets.", b"{{ .Job }}"), "module ./m:2: contains a template expression that is not supported"),
        ("{source: ./m, steps: [{run: {command: x}}]}", GREET.replace(b"{{- .Step.Use.Steps | toYaml | nindent 6 }}", b""), "module ./m does not accept steps"),
        ("{source: ./m}", GREET.replace(b"{{- .Step", b"- use: {source: ./m}\n      {{- .Step"), "deeper than 8 levels"),
        ("{source: ./m}", b"a: [", "module ./m:"),
    ],
)  # fmt: skip
def test_modules_that_do_not_fit_are_refused(use: str, module: bytes, message: str) -> None:
    if not message:
        resolved(job(use), {"./m": module})
        return
    with pytest.raises(JobFileError) as error_info:
        resolved(job(use), {"./m": module})
    assert message in str(error_info.value)
    assert error_info.value.hint
    if "deeper" not in message:
        assert str(error_info.value).endswith("\njob.yaml: steps[0].use uses this module")


def test_the_step_that_uses_an_invalid_module_is_named() -> None:
    outer = GREET.replace(b"{{- .Step", b"- use: {source: ./inner}\n      {{- .Step")
    text = "resources: {memPerCpu: 10}\nsteps:\n- launch: {steps: [{use: {source: ./m}}]}\n"
    with pytest.raises(JobFileError, match="inner") as error_info:
        resolved(text, {"./m": outer, "./inner": b"steps: []"})
    assert str(error_info.value).endswith("module ./m: steps[0].steps[1].use uses this module")
    with pytest.raises(JobFileError) as error_info:
        resolved(text, {"./m": b"steps: []"})
    assert str(error_info.value).endswith("job.yaml: steps[0].launch.steps[0].use uses this module")


def test_a_job_can_not_be_submitted_before_its_modules_are_fetched() -> None:
    with pytest.raises(JobFileError, match=r"the module \./m is not fetched"):
        parse_job_file(job("{source: ./m}").encode()).terms(credits=1, time_limit=1)


def test_local_modules_are_relative_to_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "modules" / "greet").mkdir(parents=True)
    (tmp_path / "modules" / "greet" / "module.yaml").write_bytes(GREET)
    file = tmp_path / "job.yaml"
    file.write_text(job("{source: ./modules/greet}"))
    used_module = load_job(file).definition.steps[0].use
    assert used_module is not None
    assert used_module.commit == f"sha256:{hashlib.sha256(GREET).hexdigest()}"
    with pytest.raises(JobFileError, match="can't be read"):
        fetch_module("./none", tmp_path)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository on disk under an https URL, by git's `insteadOf`."""
    repository = tmp_path / "host" / "owner" / "repo"
    for name, value in {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/host/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://git.example/",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org",
        "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (repository / "greet").mkdir(parents=True)
    git(repository, "init", "--quiet", "-b", "main")
    for text, tag in ((GREET, "greet/v1"), (GREET.replace(b"Hello", b"Hi"), "")):
        (repository / "greet" / "module.yaml").write_bytes(text)
        git(repository, "add", ".")
        git(repository, "commit", "--quiet", "-m", "x")
        if tag:
            git(repository, "tag", tag)
    return repository


def git(repository: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(repository), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_modules_from_git_are_pinned_by_their_commit(repository: Path, tmp_path: Path) -> None:
    first, last = git(repository, "rev-parse", "HEAD~1"), git(repository, "rev-parse", "HEAD")
    source = "git.example/owner/repo/greet"
    for ref, commit, text in (
        ("", last, b"Hi"), ("@v1", first, b"Hello"), (f"@{first}", first, b"Hello"),
        (f"@{first[:8]}", first, b"Hello"), ("@main", last, b"Hi"),
    ):  # fmt: skip
        fetched = fetch_module(source + ref, tmp_path)
        assert fetched.commit == commit
        assert text in fetched.text
    for wrong, message in (
        ("@v9", "no tag, branch or commit 'v9'"),
        ("/none", "module git.example/owner/repo/greet/none: "),
    ):
        with pytest.raises(JobFileError, match=message):
            fetch_module(source + wrong, tmp_path)
    with pytest.raises(JobFileError, match=r"module git\.example/owner/none: "):
        fetch_module("git.example/owner/none", tmp_path)
