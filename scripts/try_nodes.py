#!/usr/bin/env python3
"""Run a grid on every node that is available in package registries, and print a table of results.

The scenario: deploy, two daemons, five jobs, audit with proofs, export and replay. Nodes without
Cancun must be refused before any transaction. The table is that of docs/networks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deepsquare_chain.errors import GridError
from tests.support.nodes import CANDIDATES, Candidate, run_on_node


def tried(candidate: Candidate) -> tuple[bool, str]:
    """Run the scenario on a node; return whether it succeeded, and the row of the table."""
    print(f"{candidate.name} ...", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="node-") as folder:
            outcome = asyncio.run(run_on_node(candidate, Path(folder)))
    except (GridError, AssertionError) as error:
        message = getattr(error, "message", None) or str(error)
        print(f"  {message}", file=sys.stderr)
        return False, f"| {candidate.name} | | FAILED: {message.splitlines()[0][:200]} | |"
    did = "; ".join(
        name if text == "ok" else f"{name}: {text.split(':')[0]}"
        for name, text in outcome.steps.items()
    )
    return True, f"| {candidate.name} | {outcome.version} | {did} | {outcome.seconds:.0f} s |"


def main() -> int:
    """Run the scenario on all nodes; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="nodes with this word in their name")
    options = parser.parse_args()
    results = [
        tried(candidate)
        for candidate in CANDIDATES
        if options.only.lower() in candidate.name.lower()
    ]
    print("| node | version | did | took |\n|---|---|---|---|")
    print("\n".join(line for _, line in results))
    return 0 if results and all(fine for fine, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
