"""Commands with corrupted files: a documented exit code, a plain error message, no traceback."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import pytest
from eth_account import Account

from deepsquare_chain import errors
from tests.support.cli import run
from tests.support.local_devnet import commands_in
from tests.support.mutate import mutated_bytes
from tests.unit.test_bad_input import CONFIG, RECORD
from tests.unit.test_workflow_hostile import VALID

CODES = {0} | {
    kind.exit_code
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.GridError)
}
KEYSTORE = json.dumps(Account.encrypt("0x" + "11" * 32, "secret", kdf="scrypt", iterations=2))
NOWHERE = ["--endpoint", "http://127.0.0.1:9"]
#: File name, valid content, and the command that reads it.
SAMPLES: dict[str, tuple[bytes, list[str]]] = {
    "job.yaml": (VALID, ["validate", "job.yaml"]),
    ".deepsquare.toml": (CONFIG, ["config", "show"]),
    "deployment.json": (
        json.dumps(RECORD).encode(),
        ["job", "list", "--deployment", "deployment.json", *NOWHERE],
    ),
    "wallet.json": (
        KEYSTORE.encode(),
        ["credit", "balance", "--keystore", "wallet.json", *NOWHERE],
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_corrupted_files(
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first corruption is read by a process, the others in this one."""
    whole, command = SAMPLES[name]
    rng = random.Random(name)
    call = commands_in(tmp_path, monkeypatch, capsys)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for number in range(5):
        (tmp_path / name).write_bytes(mutated_bytes(whole, rng))
        outcome = call(*command) if number else run(command, tmp_path)
        assert outcome.code in CODES, outcome
        assert "Traceback" not in outcome.err + outcome.out, outcome
        assert "\x1b[31m" not in outcome.err, "a file can't paint the terminal"
        if outcome.code:
            assert "Error: " in outcome.err, outcome
            assert outcome.out == "", outcome
