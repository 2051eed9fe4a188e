#!/usr/bin/env python3
"""Write the synthetic workloads of `examples/`, or all of `simulation/workload.py` into a folder."""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from deepsquare_chain.metascheduler.simulation.workload import STYLES, Trace, synthetic

FOLDER = Path(__file__).parents[1] / "examples"


def swf(trace: Trace) -> str:
    """Format a trace in the Standard Workload Format."""
    head = [
        "; Version: 2.2",
        f"; Computer: synthetic workload `{trace.name}`",
        "; Conversion: scripts/make_traces.py",
        f"; MaxJobs: {len(trace.jobs)}",
        f"; MaxProcs: {trace.processors}",
    ]
    lines = [
        f"{job.id} {job.at:.0f} -1 {job.seconds:.0f} {job.cpus} -1 -1 {job.cpus} {job.limit} -1 1 "
        f"{job.customer.removeprefix('user ')} -1 -1 -1 -1 -1 -1"
        for job in trace.jobs
    ]
    return "\n".join([*head, *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="write each style as a file")
    folder = parser.parse_args().all
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for style in STYLES:
            (folder / f"{style}.swf").write_text(swf(synthetic(style, 3_000, 1)), encoding="utf-8")
        return
    (FOLDER / "mixed.swf").write_text(swf(synthetic("mixed", 1_500, 1)), encoding="utf-8")
    packed = gzip.compress(swf(synthetic("campaign", 1_500, 1)).encode(), mtime=0)
    (FOLDER / "campaign.swf.gz").write_bytes(packed)


if __name__ == "__main__":
    main()
