"""Semantics of steps, executed by bash: order, conditions, failures, loops, variables."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepsquare_chain.workflow import parse_job_file, render_script

BASH = shutil.which("bash") or "/bin/bash"
HEAD = "resources: {tasks: 4, cpusPerTask: 2, memPerCpu: 100, gpus: 8}\n"


def render(text: str, folder: Path) -> list[str]:
    script = folder / "job.sh"
    script.write_bytes(
        render_script(parse_job_file((HEAD + text).encode()).definition, {"DEEPSQUARE_JOB_ID": "7"})
    )
    return [BASH, str(script)]


def run(text: str, folder: Path) -> tuple[int, list[str]]:
    """Run a job; return exit code and lines. Only bash's messages about signals may be on stderr."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    result = subprocess.run(
        render(text, folder),
        cwd=work, umask=0o27, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert not [
        line for line in result.stderr.splitlines() if not re.search("Terminated|Killed", line)
    ]
    return result.returncode, result.stdout.splitlines()


def test_a_failure_is_caught_and_stays_a_failure(tmp_path: Path) -> None:
    text = """
steps:
- run: {command: exit 3}
  catch: [{run: {command: 'echo "caught $DEEPSQUARE_ERROR_CODE"; exit 9'}}]
  finally: [{run: {command: 'echo "finally $DEEPSQUARE_ERROR_CODE"'}}]
- run: {command: echo never}
"""
    assert run(text, tmp_path) == (3, ["caught 3", "finally 3"])


def test_finally_runs_after_success_and_can_fail(tmp_path: Path) -> None:
    text = """
steps:
- run: {command: echo ok}
  catch: [{run: {command: echo never}}]
  finally: [{run: {command: 'echo "finally $DEEPSQUARE_ERROR_CODE"; exit %d'}}]
- run: {command: echo next}
"""
    assert run(text % 0, tmp_path) == (0, ["ok", "finally 0", "next"])
    assert run(text % 5, tmp_path) == (5, ["ok", "finally 0"])


def test_the_code_of_a_failure_is_seen_only_where_it_is_handled(tmp_path: Path) -> None:
    text = """
steps:
- steps:
  - run: {command: 'echo "[${DEEPSQUARE_ERROR_CODE-unset}]"'}
  finally: [{run: {command: exit 0}}]
- run: {command: 'echo "[${DEEPSQUARE_ERROR_CODE-unset}]"'}
"""
    assert run(text, tmp_path) == (0, ["[unset]", "[unset]"])


def test_nested_loops_run_all_iterations(tmp_path: Path) -> None:
    text = """
steps:
- for:
    parallel: false
    range: {begin: 1, end: 2}
    steps:
    - for:
        parallel: false
        range: {begin: 6, end: 2, increment: -2}
        steps:
        - for: {parallel: false, items: ['a b', ''], steps: [{run: {command: 'echo "$index[$item]"'}}]}
    - run: {command: 'echo "outer $index"'}
"""
    inner = [f"{n}[{item}]" for n in (6, 4, 2) for item in ("a b", "")]
    assert run(text, tmp_path) == (0, [*inner, "outer 1", *inner, "outer 2"])


def test_a_sequential_loop_ends_with_its_first_failure(tmp_path: Path) -> None:
    text = """
steps:
- for:
    parallel: false
    range: {begin: 1, end: 5}
    steps: [{run: {command: 'echo "$index"; [ "$index" -lt 3 ] || exit 6'}}]
"""
    assert run(text, tmp_path) == (6, ["1", "2", "3"])


def test_parallel_iterations_run_at_once_and_all_to_their_end(tmp_path: Path) -> None:
    # Each iteration waits for all others: in sequence they would never end.
    text = """
steps:
- for:
    parallel: true
    range: {begin: 1, end: 4}
    steps:
    - run:
        command: |
          touch "here.$index"
          while [ "$(ls here.* | wc -l)" -lt 4 ]; do sleep 0.05; done
          [ "$index" != 2 ] || exit 8
          touch "done.$index"
- run: {command: echo never}
"""
    assert run(text, tmp_path) == (8, [])
    assert {path.name for path in (tmp_path / "work").glob("done.*")} == {
        "done.1", "done.3", "done.4"
    }  # fmt: skip


def test_zero_iterations_and_an_increment_of_zero(tmp_path: Path) -> None:
    text = """
steps:
- for: {parallel: false, range: {begin: 2, end: 1}, steps: [{run: {command: echo never}}]}
- for: {parallel: true, range: {begin: 1, end: 1, increment: 0}, steps: [{run: {command: echo once}}]}
"""
    assert run(text, tmp_path) == (0, ["once"])


def test_launched_commands_are_awaited(tmp_path: Path) -> None:
    text = """
steps:
- launch: {steps: [{run: {command: 'sleep 0.5; echo launched; exit %d'}}]}
- run: {command: echo first}
"""
    assert run(text % 0, tmp_path) == (0, ["first", "launched"])
    assert run(text % 4, tmp_path) == (4, ["first", "launched"])


def test_a_step_waits_for_the_launched_steps_it_depends_on(tmp_path: Path) -> None:
    text = """
steps:
- launch: {handleName: Task1, steps: [{run: {command: 'sleep 0.3; echo launched; exit %d'}}]}
- run: {command: echo first}
- dependsOn: [tASK1]
  if: -e work-is-done || 1 -eq 1
  run: {command: echo second}
"""
    assert run(text % 0, tmp_path) == (0, ["first", "launched", "second"])
    work = tmp_path / "work"
    result = subprocess.run(
        render(text % 5, tmp_path),
        cwd=work,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert (result.returncode, result.stdout) == (5, "first\nlaunched\n")
    assert result.stderr == "The launched step TASK1 failed with exit code 5.\n"


@pytest.mark.parametrize("parallel", ["true", "false"])
def test_each_iteration_waits_for_its_own_commands(tmp_path: Path, parallel: str) -> None:
    text = f"""
steps:
- launch: {{handleName: outer, steps: [{{run: {{command: 'sleep 0.3; touch outer'}}}}]}}
- for:
    parallel: {parallel}
    range: {{begin: 1, end: 2}}
    steps:
    - launch: {{handleName: a, steps: [{{run: {{command: 'sleep 0.$index; touch "a.$index"'}}}}]}}
    - dependsOn: [a, outer]
      run: {{command: '[ -e "a.$index" ] && [ -e outer ]'}}
"""
    assert run(text, tmp_path) == (0, [])


def test_a_launched_step_that_is_skipped_is_not_waited_for(tmp_path: Path) -> None:
    text = """
steps:
- {if: 1 -eq 2, launch: {handleName: a, steps: [{run: {command: echo never}}]}}
- {dependsOn: [a], run: {command: echo on}}
"""
    assert run(text, tmp_path) == (0, ["on"])


@pytest.mark.parametrize(("number", "code"), [(15, 0), (9, 0)])
def test_a_server_is_ended_by_the_signal_of_the_file(
    tmp_path: Path, number: int, code: int
) -> None:
    text = f"""
steps:
- launch: {{signalOnParentStepExit: {number}, steps: [{{run: {{command: 'sleep 600'}}}}]}}
- run: {{command: echo work}}
"""
    assert run(text, tmp_path) == (code, ["work"])


def test_a_failed_step_ends_launched_commands(tmp_path: Path) -> None:
    text = """
steps:
- launch: {signalOnParentStepExit: 0, steps: [{run: {command: sleep 600}, finally: [{run: {command: echo cleaned}}]}]}
- run: {command: 'sleep 0.5; exit 3'}
"""
    assert run(text, tmp_path) == (3, ["cleaned"])


def test_conditions_see_the_variables_of_the_job_and_of_steps(tmp_path: Path) -> None:
    text = """
env: {A: 'x y'}
steps:
- run: {command: 'echo "B=a,b" >> "$DEEPSQUARE_ENV"'}
- {if: '$A == "x y" && $B == "a,b"', run: {command: echo yes}}
- {if: '$B == c', run: {command: echo no}}
- {if: '$NTASKS -gt 3', steps: [{run: {command: echo four}}]}
- for: {parallel: false, items: [p, q], steps: [{if: '$item != p', run: {command: 'echo "$item"'}}]}
"""
    assert run(text, tmp_path) == (0, ["yes", "four", "q"])


def test_a_condition_that_is_no_test_fails_the_job(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    result = subprocess.run(
        render("steps: [{if: 'a b', run: {command: echo never}}]\n", tmp_path),
        cwd=work, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    assert "The condition of a step can't be evaluated." in result.stderr


def test_variables_reach_later_steps_with_commas_and_newlines(tmp_path: Path) -> None:
    text = r"""
env: {PLAIN: job, LATER: job}
steps:
- run:
    command: |
      {
        echo 'LIST=a,b,"c" $d'
        printf 'TEXT=one\n2 two=2 is no name\n  three\n\n'
        echo 'BLOCK<<END'
        echo 'X=1'
        echo
        echo 'END'
        echo 'LATER=env'
        echo 'EMPTY='
        echo 'DEEPSQUARE_JOB_ID=9'
        echo 'STORAGE_PATH=/'
        echo 'UID=0'
        printf 'LAST=no newline'
      } >> "$DEEPSQUARE_ENV"
- run:
    env: {STEP: own, LIST: own}
    command: 'echo "$STEP $LIST"'
- run:
    command: |
      printf '[%s]' "$LIST" "$TEXT" "$BLOCK" "$LATER" "${EMPTY-unset}" "$LAST" "${X-unset}" "$DEEPSQUARE_JOB_ID"
      [ "$STORAGE_PATH" != / ] || exit 1
"""
    code, lines = run(text, tmp_path)
    assert code == 0
    assert lines[0] == "own own"
    assert "\n".join(lines[1:]) == (
        '[a,b,"c" $d][one\n2 two=2 is no name\n  three][X=1\n][env][][no newline][unset][7]'
    )


def test_the_environment_and_folders_of_a_job(tmp_path: Path) -> None:
    text = r"""
steps:
- run:
    command: |
      echo "$NTASKS $CPUS_PER_TASK $MEM_PER_CPU $GPUS_PER_TASK $GPUS $CPUS $MEM $DEEPSQUARE_JOB_ID"
      [ "$PWD" = "$STORAGE_PATH" ] && [ "$DEEPSQUARE_INPUT" = "$STORAGE_PATH/input" ] || exit 1
      [ "$DEEPSQUARE_OUTPUT" = "$STORAGE_PATH/output" ] && [ "$DEEPSQUARE_ENV" = "$STORAGE_PATH/env" ] || exit 2
      [ "$DEEPSQUARE_TMP" = "$DEEPSQUARE_SHARED_TMP" ] || exit 3
      [ "$(umask)" = 0027 ] && [ "$(stat -c %a input output .deepsquare | tr '\n' ' ')" = "750 750 700 " ] || exit 5
      for folder in "$DEEPSQUARE_INPUT" "$DEEPSQUARE_OUTPUT" "$DEEPSQUARE_TMP" "$DEEPSQUARE_DISK_TMP" \
        "$DEEPSQUARE_SHARED_WORLD_TMP" "$DEEPSQUARE_DISK_WORLD_TMP"; do
        touch "$folder/file" || exit 4
      done
- run: {workDir: /tmp, shell: /bin/ash, command: pwd}
- run: {resources: {tasks: 1, gpusPerTask: 3}, command: 'echo "$GPUS_PER_TASK"'}
"""
    assert run(text, tmp_path) == (0, ["4 2 100 2 8 8 800 7", "/tmp", "3"])
    # Files that the job did not leave as results are removed.
    assert {path.name for path in (tmp_path / "work").rglob("*")} == {"input", "output", "file"}
    (tmp_path / "second").mkdir()
    command = "touch result tmp disk; rmdir output; touch output; ln -s . world-tmp"
    assert run(f"steps: [{{run: {{command: {command}}}}}]", tmp_path / "second") == (0, [])
    assert {path.name for path in (tmp_path / "second" / "work").iterdir()} == {
        "result", "tmp", "disk", "output", "world-tmp"
    }  # fmt: skip


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    text = """
steps:
- for:
    parallel: true
    items: [a]
    steps:
    - run: {command: 'echo begun; sleep 600'}
      catch: [{run: {command: echo never}}]
      finally: [{run: {command: 'sleep 0.3; echo cleaned'}}]
- run: {command: echo never}
"""
    process = subprocess.Popen(
        render(text, tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, text=True, process_group=0
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_finally_runs_when_the_job_is_ended(running: subprocess.Popen[str]) -> None:
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    os.killpg(running.pid, signal.SIGTERM)
    assert running.stdout.read() == "cleaned\n"
    assert running.wait(180) == 143
