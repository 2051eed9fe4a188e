#!/usr/bin/env python3
"""Print all mutations that slither-mutate generates for our contracts as JSON; writes no files.

Runs in the environment of slither, whose dependencies conflict with ours.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from slither import Slither
from slither.tools.mutator.mutators import all_mutators
from slither.tools.mutator.mutators.abstract_mutator import AbstractMutator

CONTRACTS = (
    "MetaScheduler",
    "SchedulerBase",
    "Liveness",
    "Assignments",
    "Settlement",
    "Submission",
    "ProviderRegistry",
    "Billing",
    "CalldataArray",
    "CapacityReader",
    "JobLifecycle",
    "JobRecord",
    "LoadWord",
    "Credit",
)


def generate(tree: Path) -> list[dict[str, Any]]:
    """Return the mutations of a compiled tree: file, bounds in bytes, old and new text, kind."""
    kinds = [
        kind
        for kind in vars(all_mutators).values()
        if isinstance(kind, type) and issubclass(kind, AbstractMutator)
    ]
    mutations = []
    for unit in Slither(str(tree)).compilation_units:
        for contract in unit.contracts:
            if contract.name not in CONTRACTS:
                continue
            for kind in kinds:
                mutator = kind(unit, 0, "", "", contract, None, False, tree, [])
                for name, patches in mutator._mutate().get("patches", {}).items():  # noqa: SLF001
                    source = str(Path(name).relative_to(tree))
                    mutations += [{**patch, "kind": kind.NAME, "file": source} for patch in patches]
    return mutations


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    os.chdir(root)
    shown = os.dup(1)
    os.dup2(2, 1)  # output of the tools goes to stderr; stdout is for the mutations
    changes = generate(root)
    with os.fdopen(shown, "w") as output:
        json.dump(changes, output)
