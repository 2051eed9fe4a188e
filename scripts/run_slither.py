#!/usr/bin/env python3
"""Run slither on our contracts; exit with 1 if there is a finding of high or medium impact.

Suppressions are in the code, each with its reason. Works on a copy, because `forge test` must not reuse
slither's build output.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORGE = ROOT / "node_modules" / "@foundry-rs" / "forge-linux-amd64" / "bin"
GRAVE = ("High", "Medium")


def copy(folder: Path) -> None:
    """Copy sources and settings, without tests."""
    shutil.copytree(ROOT / "contracts", folder / "contracts", ignore=shutil.ignore_patterns("test"))
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("foundry.toml", "package.json", "slither.config.json"):
        shutil.copy(ROOT / name, folder)
    (folder / "node_modules").symlink_to(ROOT / "node_modules")


def analyse(folder: Path) -> list[dict[str, str]]:
    """Run slither, and return all findings; exit the program if slither fails."""
    report = folder / "report.json"
    process = subprocess.run(
        [Path(sys.executable).parent / "slither", ".", "--json", report],
        check=False,
        cwd=folder,
        env={**os.environ, "PATH": f"{FORGE}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    if not report.exists():
        sys.exit(f"slither failed:\n{process.stderr[-4000:]}")
    outcome = json.loads(report.read_text(encoding="utf-8"))
    if not outcome["success"]:
        sys.exit(f"slither failed: {outcome['error']}")
    print(process.stderr.strip().splitlines()[-1])
    return list(outcome["results"].get("detectors", []))


def main() -> None:
    if not (FORGE / "forge").exists():
        sys.exit(f"{FORGE} is missing. Run `npm ci` and try again.")
    with tempfile.TemporaryDirectory() as name:
        copy(Path(name))
        findings = analyse(Path(name))
    for finding in findings:
        if finding["impact"] in GRAVE:
            print(finding["impact"], finding["check"], finding["description"])
    by_impact = {i: sum(f["impact"] == i for f in findings) for i in (*GRAVE, "Low")}
    print(", ".join(f"{impact}: {count}" for impact, count in by_impact.items()))
    if any(by_impact[impact] for impact in GRAVE):
        sys.exit(1)


if __name__ == "__main__":
    main()
