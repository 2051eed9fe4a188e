"""Commands for settings and contexts, and the command doctor, which checks the environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind
from deepsquare_chain.errors import UsageError

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Check
    from deepsquare_chain.settings import Sources

app = typer.Typer()
#: The command `deepsquare doctor`, which belongs to no group.
root_app = typer.Typer()

_SETTINGS: Final = (
    Column("setting", "setting"),
    Column("value", "value"),
    Column("origin", "source"),
    Column("meaning", "meaning", detail=True),
)
_CONTEXTS: Final = (
    Column("name", "context"),
    Column("used", "in use", Kind.FLAG),
    Column("endpoint", "endpoint"),
)

CHECKS: Final = (
    Column("check", "check"),
    Column("ok", "OK", Kind.FLAG),
    Column("text", "found"),
    Column("hint", "what to do"),
    Column("setting", "setting"),
)


@command(app)
async def show(context: CommandContext) -> None:
    """Show every setting in force and its source: flag, variable, file, context or default."""
    from deepsquare_chain.settings import (
        PROJECT_FILE,
        Settings,
        find_sources,
        format_setting,
        resolve,
        user_config_path,
    )

    sources = find_sources(context.flags)
    settings = resolve(sources)
    context.printer.rows(
        _SETTINGS,
        (
            (name, format_setting(getattr(settings, name)), sources.origin(name), field.description)
            for name, field in Settings.model_fields.items()
        ),
    )
    for path in (Path.cwd() / PROJECT_FILE, user_config_path()):
        if path is None:
            context.printer.note(
                "This user has no home folder and therefore no user configuration."
            )
        else:
            context.printer.note(f"{path}: {'read' if _is_there(path) else 'missing'}")


@command(app)
async def contexts(context: CommandContext) -> None:
    """List the contexts of the configuration files, and the built-in ones."""
    from deepsquare_chain.settings import find_sources

    _show_contexts(context, find_sources(context.flags))


@command(app)
async def use(
    context: CommandContext,
    name: Annotated[str, typer.Argument(metavar="CONTEXT", help="As `config contexts` lists it.")],
) -> None:
    """Select a context from now on, in your own configuration file."""
    from deepsquare_chain.settings import choose_context, find_sources, user_config_path

    find_sources({"context": name})  # raises if the context does not exist
    path = user_config_path()
    if path is None:
        raise UsageError(
            "This user has no home folder and therefore no user configuration to change",
            hint="Set HOME or XDG_CONFIG_HOME, or choose with --context or DEEPSQUARE_CONTEXT.",
        )
    choose_context(path, name)
    context.printer.note(f'{path} sets context = "{name}".')
    sources = find_sources()
    if sources.context != name:
        context.printer.note(f"Here {sources.origin('context')} overrides it.")
    _show_contexts(context, sources)


def _show_contexts(context: CommandContext, sources: Sources) -> None:
    from deepsquare_chain.settings import format_setting

    context.printer.rows(
        _CONTEXTS,
        (
            (name, name == sources.context, format_setting(endpoint) if endpoint else None)
            for name, endpoint in sources.contexts.items()
        ),
        empty="No file has a table [contexts.NAME].",
    )


def _is_there(path: Path) -> bool:
    """Whether the file exists; False if this user may not read its folder."""
    try:
        return path.is_file()
    except OSError:
        return False


@command(root_app)
async def doctor(context: CommandContext) -> int:
    """Check endpoint, contracts, wallet and folders; exit 1 if a check fails."""
    from deepsquare_chain.client.doctor import examine

    checks = await examine(context.settings)
    return print_checks(context, checks)


def print_checks(context: CommandContext, checks: Sequence[Check]) -> int:
    """Print the checks; return exit code 1 if one failed."""
    context.printer.rows(CHECKS, ((e.name, e.ok, e.text, e.hint, e.setting) for e in checks))
    return 0 if all(check.ok for check in checks) else 1
