"""Shell completion, set up as documented and executed by bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

PROGRAM = Path(sys.executable).with_name("deepsquare")
#: Completes its arguments as bash does when Tab is pressed after them.
ASK = """
. "$HOME/.bashrc"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
$(complete -p deepsquare | sed 's/.*-F \\([^ ]*\\).*/\\1/') deepsquare
printf '%s\\n' "${COMPREPLY[@]}"
"""


def bash(home: Path, script: str, *arguments: str) -> str:
    env = {key: value for key, value in os.environ.items() if "DEEPSQUARE" not in key.upper()}
    env |= {"HOME": str(home), "PATH": f"{PROGRAM.parent}{os.pathsep}{env['PATH']}"}
    command = [shutil.which("bash") or "bash", "--norc", "-c", script, "bash", *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_bash_completes_commands_verbs_and_options(tmp_path: Path) -> None:
    # Two commands: with one, bash is replaced by it, and the shell is searched among the processes.
    bash(tmp_path, "deepsquare --install-completion bash && true")

    def complete(*arguments: str) -> set[str]:
        return set(bash(tmp_path, ASK, "deepsquare", *arguments).split())

    assert complete("sub") == {"submit"}
    assert complete("job", "wa") == {"watch"}
    assert complete("config", "") == {"contexts", "show", "use"}
    assert {"--credits", "--array"} <= complete("submit", "--")
    assert complete("job", "list", "--output", "") == {"table", "json", "csv"}
    assert complete("nonsense", "x") == set()
