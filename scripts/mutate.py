#!/usr/bin/env python3
"""Break our contracts on a copy, one small change at a time, and see whether the forge tests notice.

The changes are slither-mutate's. Its own loop is not used: it counts a time-out as caught, can't be resumed,
and leaves the source mutated where it is ended. Verdicts are kept in .mutation/, so a run goes on where the
last one stopped: `caught`, `survived`, `timeout` (not counted as caught) and `invalid` (does not compile).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from slither import Slither
from slither.tools.mutator.mutators import all_mutators
from slither.tools.mutator.mutators.abstract_mutator import AbstractMutator

ROOT = Path(__file__).resolve().parent.parent
FORGE = ROOT / "node_modules" / "@foundry-rs" / "forge-linux-amd64" / "bin"
HOME = ROOT / ".mutation"
TREE = HOME / "tree"
VERDICTS = HOME / "verdicts.json"
CONTRACTS = (
    "MetaScheduler",
    "ProviderRegistry",
    "Billing",
    "CapacityReader",
    "JobLifecycle",
    "JobRecord",
    "Credit",
)
ENVIRONMENT = {
    **os.environ,
    "FOUNDRY_PROFILE": "mutation",
    "PATH": f"{FORGE}{os.pathsep}{os.environ['PATH']}",
}
Mutant = dict[str, Any]


def copy_tree() -> None:
    """A fresh copy of sources and tests; what was compiled there is kept."""
    for name in ("contracts", "tests/forge", "scripts"):
        shutil.rmtree(TREE / name, ignore_errors=True)
        shutil.copytree(ROOT / name, TREE / name)
    (TREE / "tests/forge/Proofs.t.sol").unlink(missing_ok=True)
    for name in ("foundry.toml", "package.json"):
        shutil.copy(ROOT / name, TREE)
    if not (TREE / "node_modules").exists():
        (TREE / "node_modules").symlink_to(ROOT / "node_modules")


def generate() -> list[Mutant]:
    """Every change that slither-mutate knows for our contracts, each once."""
    os.chdir(TREE)
    os.environ.update(ENVIRONMENT)
    found: dict[str, Mutant] = {}
    kinds = [
        kind
        for kind in vars(all_mutators).values()
        if isinstance(kind, type) and issubclass(kind, AbstractMutator)
    ]
    for unit in Slither(".").compilation_units:
        for contract in unit.contracts:
            if contract.name not in CONTRACTS:
                continue
            for kind in kinds:
                mutator = kind(unit, 0, "", "", contract, None, False, HOME, [])
                for name, patches in mutator._mutate().get("patches", {}).items():  # noqa: SLF001
                    source = Path(name).relative_to(TREE)
                    for patch in patches:
                        mutant = {**patch, "kind": kind.NAME, "file": str(source)}
                        found[identity(mutant)] = mutant
    # The same sample for the same seed, whatever order slither has.
    return [found[name] for name in sorted(found)]


def apply(mutant: Mutant) -> bytes:
    """The changed source."""
    text = (ROOT / mutant["file"]).read_bytes()
    return text[: mutant["start"]] + mutant["new_string"].encode() + text[mutant["end"] :]


def identity(mutant: Mutant) -> str:
    """Same change of the same source, same name."""
    return hashlib.sha256(mutant["file"].encode() + apply(mutant)).hexdigest()


def run(*arguments: str, seconds: int) -> int | None:
    """Exit code of a forge command, None after so many seconds."""
    process = subprocess.Popen(
        [FORGE / "forge", *arguments],
        cwd=TREE,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return None


def judge(mutant: Mutant, seconds: int) -> str:
    """What the tests say of one change; the copy is whole again afterwards."""
    target = TREE / mutant["file"]
    target.write_bytes(apply(mutant))
    try:
        built = run("build", seconds=seconds)
        if built != 0:
            return "timeout" if built is None else "invalid"
        tested = run("test", "--fail-fast", seconds=seconds)
        return {0: "survived", None: "timeout"}.get(tested, "caught")
    finally:
        shutil.copy(ROOT / mutant["file"], target)


def report(mutants: list[Mutant], verdicts: dict[str, str]) -> None:
    """Score over what was judged, and every change that the tests did not notice."""
    by: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        if (verdict := verdicts.get(identity(mutant))) is not None:
            by.setdefault(verdict, []).append(mutant)
    for verdict in ("survived", "timeout"):
        for mutant in by.get(verdict, []):
            place = f"{mutant['file']}:{mutant['line_number']}"
            change = f"{mutant['old_string'][:90]!r} -> {mutant['new_string'][:90]!r}"
            print(f"{verdict} {place} {mutant['kind']} {change}")
    counts = {name: len(by.get(name, [])) for name in ("caught", "survived", "timeout", "invalid")}
    judged = sum(counts.values())
    valid = judged - counts["invalid"]
    score = f"{100 * counts['caught'] / valid:.1f} %" if valid else "none"
    print(f"{judged} of {len(mutants)} judged: {counts}; score {score} of those that compile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, help="only so many, drawn by --seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", default="", help="files whose path holds this come first")
    parser.add_argument("--timeout", type=int, default=900, help="seconds of a build, and of tests")
    parser.add_argument("--report", action="store_true", help="only say what is known")
    options = parser.parse_args()
    TREE.mkdir(parents=True, exist_ok=True)
    copy_tree()
    verdicts: dict[str, str] = (
        json.loads(VERDICTS.read_text(encoding="utf-8")) if VERDICTS.exists() else {}
    )
    mutants = generate()
    random.Random(options.seed).shuffle(mutants)  # noqa: S311 - no secret
    mutants.sort(key=lambda mutant: options.first not in mutant["file"])
    todo = mutants[: options.sample]
    if not options.report:
        if run("test", seconds=options.timeout) != 0:
            sys.exit("The tests fail on the unchanged contracts; there is nothing to measure.")
        for mutant in todo:
            name = identity(mutant)
            if name not in verdicts:
                verdicts[name] = judge(mutant, options.timeout)
                VERDICTS.write_text(json.dumps(verdicts, indent=1) + "\n", encoding="utf-8")
                print(verdicts[name], mutant["file"], mutant["line_number"], flush=True)
    report(mutants, verdicts)


if __name__ == "__main__":
    main()
