#!/usr/bin/env python3
"""Break our contracts one small change at a time, and see whether the forge tests notice.

The changes are slither-mutate's (`mutants.py`). Its own loop is not used: it counts a time-out as caught,
can't be resumed, and leaves the source mutated where it is ended. Here a change is judged in steps, from
cheap to dear:

1. It is compiled alone. What does not compile is `invalid`; what gives the very code of the source, plain or
   optimized, is `same`: no test could tell them apart. Two changes with one code get one verdict.
2. Its code takes the place of the contract's in a tree whose tests deploy from artifacts, so that the tests
   need no new compilation. A failing test is a catch. With such tests one of several refusals of a
   constructor can pass wrongly, but none fails wrongly.
3. What is left (`suspect`) is tested so with more fuzz runs, once all others are judged, and its code is
   compared as it is deployed (via-IR).
4. A change outside of the functions, of a constructor or what it calls, or of code that tests carry themselves
   (libraries, the token) is built and tested in the ordinary way at last: `caught` or `survived`.
   A `timeout` anywhere is not counted as caught.

Verdicts are kept in .mutation/ with the state of the tests; a run goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from rich.progress import MofNCompleteColumn, Progress

ROOT = Path(__file__).resolve().parent.parent
FORGE = ROOT / "node_modules" / "@foundry-rs" / "forge-linux-amd64" / "bin"
HOME = ROOT / ".mutation"
VERDICTS = HOME / "verdicts.json"
RECORD = ROOT / "docs" / "mutation.json"
DEPLOYED = {
    name: f"contracts/{name}.sol" for name in ("MetaScheduler", "ProviderRegistry", "Credit")
}
ENVIRONMENT = {
    **os.environ,
    "FOUNDRY_PROFILE": "mutation",
    "PATH": f"{FORGE}{os.pathsep}{os.environ['PATH']}",
}
#: Enough to notice nearly everything; step 3 has what the profile says.
QUICK = {
    "FOUNDRY_FUZZ_RUNS": "16",
    "FOUNDRY_INVARIANT_RUNS": "2",
    "FOUNDRY_INVARIANT_DEPTH": "60",
}
#: What moves status or money comes first, so that a run that is ended early has judged it.
FIRST = (
    *("Billing", "Load", "JobLifecycle", "JobRecord", "Settlement", "SchedulerBase"),
    *("Liveness", "Assignments", "Submission", "MetaScheduler"),
)
#: The parts of MetaScheduler by concern, which nothing else carries.
PARTS = "contracts/scheduler/"
#: What is listed one by one, with the reason why it may be so.
LEFT = ("survived", "timeout", "suspect", "unsure")
OUTCOMES = ("caught", "survived", "timeout", "same", "invalid", "suspect", "unsure")
#: Of a change about which the record says nothing.
NONE = ("", False)
Mutant = dict[str, Any]
Mutants = dict[str, Mutant]
Verdicts = dict[str, list[str]]


class Tree:
    """A copy of sources and tests; what was compiled there is kept.

    Args:
        name: Of its folder.
        linked: Tests deploy from artifacts instead of carrying the contracts' code.
    """

    def __init__(self, name: str, *, linked: bool) -> None:
        self.path = HOME / name
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in ("contracts", "tests/forge", "scripts"):
            shutil.rmtree(self.path / folder, ignore_errors=True)
            shutil.copytree(ROOT / folder, self.path / folder)
        (self.path / "tests/forge/Proofs.t.sol").unlink(missing_ok=True)
        configuration = (ROOT / "foundry.toml").read_text(encoding="utf-8")
        if linked:
            configuration = configuration.replace(
                "[profile.default]\n", "[profile.default]\ndynamic_test_linking = true\n"
            )
        (self.path / "foundry.toml").write_text(configuration, encoding="utf-8")
        shutil.copy(ROOT / "package.json", self.path)
        if not (self.path / "node_modules").exists():
            (self.path / "node_modules").symlink_to(ROOT / "node_modules")

    def forge(self, *arguments: str, seconds: int, **more: str) -> int | None:
        """Exit code of a forge command, None after so many seconds."""
        process = subprocess.Popen(
            [FORGE / "forge", *arguments],
            cwd=self.path,
            env=ENVIRONMENT | more,
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

    def check(self, seconds: int, **more: str) -> None:
        """Compile, and refuse a tree whose tests fail without any change."""
        # A run that was ended may have left the code of a change among the artifacts.
        built = self.forge("build", "--force", seconds=seconds)
        if built != 0 or self.forge("test", seconds=seconds, **more) != 0:
            sys.exit(f"The tests fail on the unchanged contracts in {self.path}.")


class Compiler:
    """One solc for many changes: loading it takes longer than a compilation."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["node", ROOT / "scripts" / "mutation_compiler.js"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def codes(self, mutant: Mutant | None, targets: list[str], **mode: bool) -> list[str] | None:
        """Creation codes of the targets, None if they do not compile."""
        question = {"targets": targets, **mode}
        if mutant is not None:
            question |= {"file": mutant["file"], "content": apply(mutant).decode()}
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer.get("codes")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class Bench:
    """Judges one change after another; each worker has its own."""

    _seen: dict[str, str] = {}  # noqa: RUF012 - shared on purpose: verdicts by code
    _originals: dict[tuple[str, ...], list[str] | None] = {}  # noqa: RUF012

    def __init__(self, number: int, seconds: int) -> None:
        self.tree = Tree(f"linked-{number}", linked=True)
        self.tree.check(seconds, **QUICK)
        self._seconds = seconds
        self._compiler = Compiler()
        self._artifacts = {
            source: self.tree.path / "out" / f"{name}.sol" / f"{name}.json"
            for name, source in DEPLOYED.items()
        }
        self._whole = {source: path.read_bytes() for source, path in self._artifacts.items()}

    def judge(self, mutant: Mutant) -> str:
        """What becomes of one change in the first two steps."""
        targets = _touched(mutant)
        codes = self._compiler.codes(mutant, targets)
        if codes is None:
            return "invalid"
        if codes == self._original(targets):
            return "same"
        name = hashlib.sha256("".join(codes).encode()).hexdigest()
        if name not in self._seen:
            self._seen[name] = self._tested(targets, codes, **QUICK) or self._look(mutant, targets)
        return self._seen[name]

    def close(self) -> None:
        """End its compiler."""
        self._compiler.close()

    def _original(self, targets: list[str], **mode: bool) -> list[str] | None:
        key = (*targets, *mode)
        if key not in self._originals:
            self._originals[key] = self._compiler.codes(None, targets, **mode)
        return self._originals[key]

    def _tested(self, targets: list[str], codes: list[str], **more: str) -> str | None:
        """What the tests of the linked tree say to codes; None where they pass."""
        try:
            for target, code in zip(targets, codes, strict=True):
                artifact = json.loads(self._whole[target])
                artifact["bytecode"]["object"] = f"0x{code}"
                self._artifacts[target].write_text(json.dumps(artifact), encoding="utf-8")
            ended = self.tree.forge("test", "--fail-fast", seconds=self._seconds, **more)
        finally:
            for target in targets:
                self._artifacts[target].write_bytes(self._whole[target])
        return {0: None, None: "timeout"}.get(ended, "caught")

    def _look(self, mutant: Mutant, targets: list[str]) -> str:
        """Whether optimized code tells the change from the source."""
        optimized = self._compiler.codes(mutant, targets, optimize=True)
        return "same" if optimized == self._original(targets, optimize=True) else "suspect"

    def judge_suspect(self, mutant: Mutant) -> str:
        """What becomes of a suspect in the third step."""
        targets = _touched(mutant)
        codes = self._compiler.codes(mutant, targets)
        if codes is None:
            return "invalid"
        if (ended := self._tested(targets, codes)) is not None:
            return ended
        deployed = self._compiler.codes(mutant, targets, optimize=True, viaIR=True)
        if deployed == self._original(targets, optimize=True, viaIR=True):
            return "same"
        return "unsure" if needs_ordinary_build(mutant) else "survived"


def thorough(tree: Tree, mutant: Mutant, seconds: int) -> str:
    """Step 4, in a tree in the ordinary way."""
    with _changed(tree, mutant):
        if tree.forge("build", seconds=seconds) != 0:
            return "timeout"  # it compiled before
        ended = tree.forge("test", "--fail-fast", seconds=seconds)
    return {0: "survived", None: "timeout"}.get(ended, "caught")


def needs_ordinary_build(mutant: Mutant) -> bool:
    """Whether tests that deploy from artifacts may pass wrongly."""
    deployed = mutant["file"] in (DEPLOYED["MetaScheduler"], DEPLOYED["ProviderRegistry"])
    if not deployed and not mutant["file"].startswith(PARTS):
        return True
    text = (ROOT / mutant["file"]).read_text(encoding="utf-8")
    # Sources are ASCII, so that bytes and characters count alike.
    bodies = {match[1]: _body(text, match.start()) for match in _FUNCTION.finditer(text)}
    called: set[str] = set()
    if "constructor(" in text:
        begun = _body(text, text.index("constructor("))
        called = set(_CALLED.findall(text[begun[0] : begun[1]]))
    ordinary = [span for name, span in bodies.items() if name not in called]
    return not any(first <= mutant["start"] < last for first, last in ordinary)


_FUNCTION = re.compile(r"\bfunction\s+(\w+)")
_CALLED = re.compile(r"\b(\w+)\s*\(")


def _body(text: str, start: int) -> tuple[int, int]:
    """From a heading to the brace that closes its body."""
    depth = 0
    for at in range(text.index("{", start), len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return start, at
    return start, len(text)


@contextmanager
def _changed(tree: Tree, mutant: Mutant) -> Iterator[None]:
    """The tree with a change; it is whole again afterwards."""
    target = tree.path / mutant["file"]
    target.write_bytes(apply(mutant))
    try:
        yield
    finally:
        shutil.copy(ROOT / mutant["file"], target)


def _touched(mutant: Mutant) -> list[str]:
    """Deployed contracts that hold a source's code."""
    if mutant["file"] in DEPLOYED.values():
        return [mutant["file"]]
    if mutant["file"].startswith(PARTS):
        return [DEPLOYED["MetaScheduler"]]
    return [DEPLOYED["MetaScheduler"], DEPLOYED["ProviderRegistry"]]


def apply(mutant: Mutant) -> bytes:
    """The changed source."""
    text = (ROOT / mutant["file"]).read_bytes()
    return text[: mutant["start"]] + mutant["new_string"].encode() + text[mutant["end"] :]


def identity(mutant: Mutant) -> str:
    """Same change of the same source, same name."""
    return hashlib.sha256(mutant["file"].encode() + apply(mutant)).hexdigest()


def tests_now() -> str:
    """Name of the present tests: a survivor is judged again by others."""
    whole = hashlib.sha256()
    for path in sorted((ROOT / "tests" / "forge").glob("*.sol")):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def all_mutants(tree: Tree) -> Mutants:
    """Every change by its name."""
    python = ROOT / ".venv-slither" / "bin" / "python"
    if not python.exists():
        sys.exit("slither is missing: run `make mutate`, which brings it.")
    done = subprocess.run(
        [python, ROOT / "scripts" / "mutants.py", tree.path],
        env=ENVIRONMENT,
        check=True,
        stdout=subprocess.PIPE,
    )
    found = {identity(mutant): mutant for mutant in json.loads(done.stdout)}
    return dict(sorted(found.items()))


def compiler_version() -> str:
    """What the compiler answers at each start of forge, asked once."""
    done = subprocess.run(
        ["node", ROOT / "scripts" / "solc-wrapper.js", "--version"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.split("Version: ")[1].strip()


def known(verdicts: Verdicts, name: str, tests: str) -> str | None:
    """The verdict, unless other tests could say otherwise."""
    outcome, judged_by = verdicts.get(name, ("", ""))
    settled = outcome in ("caught", "same", "invalid") or _is_equivalent(name)
    return outcome or None if settled or judged_by == tests else None


def judge_each(
    title: str,
    names: list[str],
    judge: Callable[[str], str],
    verdicts: Verdicts,
    *,
    workers: int,
    tests: str,
) -> None:
    """Judge all, several side by side, and keep every verdict with the name of the tests."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task(title, total=len(names))
        todo = {pool.submit(judge, name): name for name in names}
        for future in as_completed(todo):
            name, outcome = todo[future], future.result()
            verdicts[name] = [outcome, tests]
            fresh = VERDICTS.with_suffix(".new")
            fresh.write_text(json.dumps(verdicts, indent=0) + "\n", encoding="utf-8")
            fresh.replace(VERDICTS)
            bar.advance(task)


def run(mutants: Mutants, names: list[str], verdicts: Verdicts, workers: int, seconds: int) -> None:
    """Judge what is left: each step for all that the one before left over."""
    tests = tests_now()
    left = [name for name in names if known(verdicts, name, tests) is None]
    further = [name for name in names if not _is_equivalent(name)]
    unsettled = {"suspect", "unsure"}
    if not left and not any(verdicts[name][0] in unsettled for name in further):
        return
    with ExitStack() as stack:
        benches: SimpleQueue[Bench] = SimpleQueue()
        for number in range(workers):
            bench = Bench(number, seconds)
            stack.callback(bench.close)
            benches.put(bench)
        cheap = lent(benches, lambda bench, name: bench.judge(mutants[name]))
        judge_each("compile and test", left, cheap, verdicts, workers=workers, tests=tests)
        suspects = [name for name in further if verdicts[name][0] == "suspect"]
        again = lent(benches, lambda bench, name: bench.judge_suspect(mutants[name]))
        judge_each("suspects", suspects, again, verdicts, workers=workers, tests=tests)
    if tests_now() != tests:
        sys.exit("The tests changed during the run; what it judged is kept. Run it again.")
    unsure = [name for name in names if verdicts[name][0] == "unsure"]
    trees: SimpleQueue[Tree] = SimpleQueue()
    for number in range(workers if unsure else 0):
        tree = Tree(f"full-{number}", linked=False)
        tree.check(seconds)
        trees.put(tree)
    dear = lent(trees, lambda tree, name: thorough(tree, mutants[name], seconds))
    judge_each("ordinary builds", unsure, dear, verdicts, workers=workers, tests=tests)


T = TypeVar("T")


def lent(stock: SimpleQueue[T], work: Callable[[T, str], str]) -> Callable[[str], str]:
    """The work with one of the stock, which is given back."""

    def do(name: str) -> str:
        one = stock.get()
        try:
            return work(one, name)
        finally:
            stock.put(one)

    return do


def describe(mutant: Mutant) -> str:
    """Where and what, in a line."""
    old, new = (" ".join(mutant[key].split())[:90] for key in ("old_string", "new_string"))
    return f"{mutant['file']}:{mutant['line_number']} {mutant['kind']} {old!r} -> {new!r}"


def summary(mutants: Mutants, verdicts: Verdicts) -> dict[str, Any]:
    """Counts in all, by file and by kind.

    `raw` is caught of all that differ from the source; what is not settled yet counts as not caught. `score`
    leaves out those that the record calls equivalent, as the mutation score is defined: killed of all that are
    not equivalent (Jia and Harman, IEEE Transactions on Software Engineering 37, 2011, section II).
    """
    counts: dict[str, Counter[str]] = {}
    reasons = _reasons()
    left = []
    for name, mutant in mutants.items():
        outcome = verdicts.get(name, ["not judged"])[0]
        for group in ("all", mutant["file"], f"kind {mutant['kind']}"):
            counts.setdefault(group, Counter())[outcome] += 1
            counts[group]["equivalent"] += outcome in LEFT and reasons.get(name[:16], NONE)[1]
        if outcome in LEFT:
            what = {"outcome": outcome, "change": describe(mutant)}
            reason, equivalent = reasons.get(name[:16], NONE)
            left.append({"id": name[:16], **what, "reason": reason, "equivalent": equivalent})
    table = {}
    for group, each in sorted(counts.items()):
        valid = each["caught"] + sum(each[outcome] for outcome in LEFT)
        raw, score = (
            round(100 * each["caught"] / of, 2) if of else None
            for of in (valid, valid - each["equivalent"])
        )
        numbers = {key: each[key] for key in (*OUTCOMES, "not judged", "equivalent")}
        table[group] = {**numbers, "raw": raw, "score": score}
    return {"groups": table, "left": sorted(left, key=lambda each: each["change"])}


def _is_equivalent(name: str) -> bool:
    """Whether the record says so: no test could catch it, and each further look at it is dear."""
    return _reasons().get(name[:16], NONE)[1]


@cache
def _reasons() -> dict[str, tuple[str, bool]]:
    """Why a change may survive, and whether it is equivalent, as the record says; written there by hand."""
    if not RECORD.exists():
        return {}
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return {each["id"]: (each["reason"], each.get("equivalent", False)) for each in record["left"]}


def _place(mutant: Mutant) -> int:
    """Order of a change's file among all of a whole run."""
    stem = Path(mutant["file"]).stem
    return FIRST.index(stem) if stem in FIRST else len(FIRST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, help="only so many, drawn by --seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="only files whose path holds this")
    parser.add_argument("--timeout", type=int, default=600, help="seconds of a build, and of tests")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only say what is known")
    parser.add_argument("--write", action="store_true", help=f"write {RECORD.name} too")
    options = parser.parse_args()
    verdicts: Verdicts = (
        json.loads(VERDICTS.read_text(encoding="utf-8")) if VERDICTS.exists() else {}
    )
    mutants = all_mutants(Tree("source", linked=False))
    if not options.report:
        ENVIRONMENT["KNOWN_SOLC_VERSION"] = compiler_version()
        order = [name for name in mutants if options.only in mutants[name]["file"]]
        random.Random(options.seed).shuffle(order)  # noqa: S311 - no secret
        if options.sample is None:
            order.sort(key=lambda name: _place(mutants[name]))
        run(mutants, order[: options.sample], verdicts, options.workers, options.timeout)
    found = summary(mutants, verdicts)
    if options.write:
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for group, row in found["groups"].items():
        print(f"{group:40} {row}")
    for each in found["left"]:
        print(f"{each['outcome']} {each['change']} | {each['reason'] or 'NO REASON GIVEN'}")


if __name__ == "__main__":
    main()
