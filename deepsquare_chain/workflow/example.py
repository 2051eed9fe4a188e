"""The job file that `deepsquare init` writes: every key, with what it means."""

from __future__ import annotations

from typing import Final

JOB_FILE: Final = """\
# A job of the grid. Check it with `deepsquare validate`, price it with `deepsquare quote`,
# and pay for it with `deepsquare submit --wait`.
name: my-job

# Of the whole job: tasks x cpusPerTask cpus, and memPerCpu MB for each of them.
resources: {tasks: 1, cpusPerTask: 1, memPerCpu: 64, gpus: 0}

# It is ended after so long. What it does not use comes back.
timeLimit: 10m

# The most that it may cost: this goes into escrow, and buys the time limit at least.
credits: "1"

# COST (cheapest provider), TIME (fastest) or ENERGY (most frugal).
objective: COST

# How often it may begin again elsewhere if its provider is lost, up to 5.
retries: 0

# Run on until the credits are spent, instead of stopping at the time limit.
untilSpent: false

# Labels that its provider must have, such as gpu.model=h100 or compute.gflops>=1000.
uses: []

# Variables of all steps; each step may add its own.
env:
  GREETING: Hello from the grid

# Run one after the other by a shell; the first that fails ends the job.
steps:
  - name: greet
    run:
      command: echo "$GREETING, job $DEEPSQUARE_JOB_ID"
"""
