#!/usr/bin/env python3
"""Write the synthetic workloads of `examples/`; see `simulation/workload.py`."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from deepsquare_chain.metascheduler.simulation.workload import Trace, synthetic

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
    (FOLDER / "mixed.swf").write_text(swf(synthetic("mixed", 1_500, 1)), encoding="utf-8")
    packed = gzip.compress(swf(synthetic("campaign", 1_500, 1)).encode(), mtime=0)
    (FOLDER / "campaign.swf.gz").write_bytes(packed)


if __name__ == "__main__":
    main()
