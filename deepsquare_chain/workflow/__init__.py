"""Job files, validated definitions, and the scripts that run them."""

from __future__ import annotations

from deepsquare_chain.workflow.checks import parse_duration
from deepsquare_chain.workflow.definition import Definition, Step, digest
from deepsquare_chain.workflow.jobfile import JobFile, load_job_file, parse_job_file
from deepsquare_chain.workflow.script import ExecutionSite, render_script

__all__ = [
    "Definition",
    "ExecutionSite",
    "JobFile",
    "Step",
    "digest",
    "load_job_file",
    "parse_duration",
    "parse_job_file",
    "render_script",
]
