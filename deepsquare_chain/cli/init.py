"""The command init, which writes a first job file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column

app = typer.Typer()

_WRITTEN: Final = (Column("path", "written"),)


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
