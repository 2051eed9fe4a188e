#!/usr/bin/env python3
"""Prove the `check_` functions of tests/forge/Proofs.t.sol with halmos, and record their times.

Any result but a pass is a failure: counterexamples, timeouts, and runs reported as incomplete. Works on
a copy, because `forge test` must not reuse its build output.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORGE = ROOT / "node_modules" / "@foundry-rs" / "forge-linux-amd64" / "bin"
SOURCE = ROOT / "tests" / "forge" / "Proofs.t.sol"
TABLE = ROOT / "docs" / "proofs.json"
VERDICT = re.compile(r"\[(\w+)\] (check_\w+)\(.*?time: ([\d.]+)s")


def copy(folder: Path) -> None:
    """Copy sources and settings, with the proofs as the only tests."""
    shutil.copytree(ROOT / "contracts", folder / "contracts", ignore=shutil.ignore_patterns("test"))
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "tests" / "forge").mkdir(parents=True)
    shutil.copy(SOURCE, folder / "tests" / "forge")
    for name in ("foundry.toml", "package.json"):
        shutil.copy(ROOT / name, folder)
    (folder / "node_modules").symlink_to(ROOT / "node_modules")


def prove(folder: Path, only: str, seconds: int) -> str:
    """Run halmos, print verdicts as they arrive, and return its output."""
    command = [Path(sys.executable).parent / "halmos", "--function", only or "check_"]
    command += ["--solver-timeout-assertion", f"{seconds}s", "--no-status", "--loop", "4"]
    command += ["--solver-threads", "1"]
    printed = ""
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PATH": f"{FORGE}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for coloured in process.stdout or ():
            line = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
            printed += line
            if VERDICT.search(line):
                print(line, end="", flush=True)
    return printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--function", default="", help="only those whose name begins so")
    parser.add_argument("--timeout", type=int, default=300, help="seconds of the solver a proof")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    options = parser.parse_args()
    if not (FORGE / "forge").exists():
        sys.exit(f"{FORGE} is missing. Run `npm ci` and try again.")
    with tempfile.TemporaryDirectory() as name:
        copy(Path(name))
        printed = prove(Path(name), options.function, options.timeout)
    verdicts = {m[2]: (m[1], float(m[3])) for m in VERDICT.finditer(printed)}
    names = re.findall(r"function (check_\w+)\(", SOURCE.read_text(encoding="utf-8"))
    selected = [name for name in names if name.startswith(options.function)]
    for name in selected:
        verdict, seconds = verdicts.get(name, ("MISSING", 0.0))
        print(f"{verdict:8} {seconds:7.1f} s  {name}")
    incomplete = re.findall(r".*(?:[Ii]ncomplete|unrolling bound|not fully explored).*", printed)
    if incomplete or any(verdicts.get(name, ("",))[0] != "PASS" for name in selected):
        sys.exit(printed[-6000:])
    if options.write:
        table = {name: round(verdicts[name][1], 1) for name in selected}
        TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
