"""Scripts of whole jobs, compared line by line and checked by shellcheck.

A change of a script shows in `tests/golden/jobs`; DEEPSQUARE_UPDATE_GOLDEN=1 writes the files anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepsquare_chain.workflow import ExecutionSite, load_job_file, render_script
from deepsquare_chain.workflow.abilities import RUNTIMES

GOLDEN = Path(__file__).parents[1] / "golden" / "jobs"
PACKAGE = Path(__file__).parents[2] / "deepsquare_chain"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
#: The part of a script that differs between jobs begins here; the functions before it are separate files.
MARK = "\n# -- the job\n\n"


def render(name: str) -> str:
    definition = load_job_file(GOLDEN / f"{name}.yaml").definition
    site = ExecutionSite(frozenset({*RUNTIMES, "netns", "netns.interfaces"}))
    return render_script(definition, {"DEEPSQUARE_JOB_ID": "7"}, site).decode()


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.yaml")))
def test_a_script_is_as_it_was_and_clean(name: str, tmp_path: Path) -> None:
    script = render(name)
    golden = GOLDEN / f"{name}.sh"
    _, _, script_body = script.partition(MARK)
    if os.environ.get("DEEPSQUARE_UPDATE_GOLDEN"):
        golden.write_text(script_body)
    assert script_body == golden.read_text()
    assert lint(script, tmp_path) == ""


def test_the_test_of_abilities_is_clean(tmp_path: Path) -> None:
    networks = (PACKAGE / "workflow" / "networks.sh").read_text()
    test = (PACKAGE / "provider" / "abilities.sh").read_text()
    # The script as it runs: its first line has the directives of shellcheck.
    assert lint(test.partition("\n")[0] + networks + test, tmp_path) == ""


def lint(script: str, folder: Path) -> str:
    file = folder / "script.sh"
    file.write_text(script)
    result = subprocess.run(
        [str(SHELLCHECK), "--format=gcc", str(file)], capture_output=True, text=True, check=False
    )
    return result.stdout + result.stderr
