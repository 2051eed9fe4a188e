#!/usr/bin/env python3
"""Play one story of a grid on every node that the package registries give; print a table of it.

Deploy, two daemons, five jobs, audit with proofs, export and replay. Nodes that lack the rules of
Cancun must be refused before anything is paid. The table is that of docs/networks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deepsquare_chain.errors import GridError
from tests.support.nodes import CANDIDATES, Candidate, play


def tried(candidate: Candidate) -> tuple[bool, str]:
    """Whether the node did all that it should, and its line of the table."""
    print(f"{candidate.name} ...", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="node-") as folder:
            found = asyncio.run(play(candidate, Path(folder)))
    except (GridError, AssertionError) as error:
        words = getattr(error, "message", None) or str(error)
        print(f"  {words}", file=sys.stderr)
        return False, f"| {candidate.name} | | FAILED: {words.splitlines()[0][:200]} | |"
    did = "; ".join(
        name if text == "ok" else f"{name}: {text.split(':')[0]}"
        for name, text in found.steps.items()
    )
    return True, f"| {candidate.name} | {found.version} | {did} | {found.seconds:.0f} s |"


def main() -> int:
    """Exit code 1 if a node failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="nodes with this word in their name")
    options = parser.parse_args()
    results = [tried(each) for each in CANDIDATES if options.only.lower() in each.name.lower()]
    print("| node | version | did | took |\n|---|---|---|---|")
    print("\n".join(line for _, line in results))
    return 0 if results and all(fine for fine, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
