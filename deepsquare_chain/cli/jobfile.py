"""Commands for job files: write a first one, check, convert, print the schema. Nothing is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind

app = typer.Typer()

_JOB_FILE: Final = (
    Column("name", "name"),
    Column("definition", "definition (SHA-256)", Kind.HASH),
    Column("steps", "steps", Kind.NUMBER),
    Column("tasks", "tasks", Kind.NUMBER),
    Column("cpus", "CPUs", Kind.NUMBER),
    Column("memory", "memory (MB)", Kind.NUMBER),
    Column("gpus", "GPUs", Kind.NUMBER),
    Column("time_limit", "time limit", Kind.SECONDS),
    Column("credits", "credits", Kind.CREDITS),
    Column("uses", "requirements"),
)

LenientOption = Annotated[
    bool,
    typer.Option(
        "--lenient", help="Ignore unknown keys with a warning, instead of rejecting them."
    ),
]
_WRITTEN: Final = (Column("path", "written"),)


@command(app)
async def validate(
    context: CommandContext,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Job file (YAML or JSON).")],
    lenient: LenientOption = False,
) -> None:
    """Check a job file without sending anything."""
    from deepsquare_chain.workflow import load_job_file

    job_file = load_job_file(file, lenient=lenient)
    for warning in job_file.warnings:
        context.printer.note(f"Warning: {warning}")
    resources = job_file.definition.resources
    context.printer.record(
        _JOB_FILE,
        (
            job_file.name,
            job_file.definition.digest.hex(),
            len(job_file.definition.steps),
            resources.tasks,
            resources.cpus,
            resources.memory,
            resources.gpus,
            job_file.time_limit,
            job_file.credits,
            job_file.uses,
        ),
    )


@command(app)
async def convert(
    context: CommandContext,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Job file (YAML or JSON).")],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="Output file; standard output by default."),
    ] = None,
) -> None:
    """Rewrite older keys of a job file; the result is checked and printed."""
    from deepsquare_chain.errors import UsageError
    from deepsquare_chain.workflow.jobfile import convert as rewrite
    from deepsquare_chain.workflow.jobfile import (
        dump,
        parse_job_file,
        read_file,
        read_job_tree,
        unwrap,
    )

    data = read_file(file)
    tree, _ = unwrap(*read_job_tree(data, str(file)))
    changes = rewrite(tree)
    text = dump(tree, data.decode("utf-8-sig"))
    # Parsed again, so that line numbers in errors refer to the converted text.
    job_file = parse_job_file(text.encode(), f"{file} (converted)")
    for line in (*changes, *job_file.warnings):
        context.printer.note(line)
    if not changes:
        context.printer.note(f"{file} has no outdated keys.")
    if to is None:
        context.printer.raw(text.encode())
        return
    try:
        with to.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(
            f"{to} already exists and is not changed", hint="Give another name."
        ) from None
    except OSError as error:
        raise UsageError(f"{to} can't be written: {error.strerror}") from None


@command(app)
async def schema(context: CommandContext) -> None:
    """Print the JSON schema of job files, for editors."""
    import json

    from deepsquare_chain.workflow.schema import job_file_schema

    context.printer.raw((json.dumps(job_file_schema(), indent=2) + "\n").encode())


@command(app)
async def init(
    context: CommandContext,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Path of the new file.")] = Path(
        "job.yaml"
    ),
) -> None:
    """Write an example job file in which every key is explained."""
    from deepsquare_chain.errors import UsageError
    from deepsquare_chain.workflow.jobfile import JOB_FILE

    schema = _write_schema()
    modeline = f"# yaml-language-server: $schema={schema}\n" if schema else ""
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(modeline + JOB_FILE)
    except FileExistsError:
        raise UsageError(
            f"{file} already exists and is not changed", hint="Give another name."
        ) from None
    except OSError as error:
        raise UsageError(f"{file} can't be written: {error.strerror}") from None
    context.printer.record(_WRITTEN, (str(file),))
    context.printer.note(f"Next: deepsquare quote {file}")


def _write_schema() -> Path | None:
    """Write the JSON schema into the user's cache; the job file's first line refers editors to it."""
    import json
    import os

    from deepsquare_chain.workflow.schema import job_file_schema

    try:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "deepsquare"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "job.schema.json"
        path.write_text(json.dumps(job_file_schema(), indent=2) + "\n", encoding="utf-8")
    except (OSError, RuntimeError):
        return None  # the schema is optional
    return path
