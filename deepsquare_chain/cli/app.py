"""The root of the command line.

The module of a group is imported only when one of its commands is used, so that the root's help
and the completion of command names are fast.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from deepsquare_chain import __version__
from deepsquare_chain.cli.frame import SETTING_FLAGS


class _Part(NamedTuple):
    """A command or group: its module, its line in the root's help, and the name of its Typer app."""

    module: str
    help: str
    app: str = "app"


#: Top-level commands, without a group.
COMMANDS: Final = {
    "demo": _Part(
        "devnet",
        "Run a whole grid on this machine, from submission to audit; under 90 seconds.",
        "root_app",
    ),
    "init": _Part("submit", "Write an example job file in which every key is explained."),
    "validate": _Part("submit", "Check a job file without sending anything."),
    "convert": _Part(
        "submit", "Rewrite older keys of a job file; the result is checked and printed."
    ),
    "schema": _Part("submit", "Print the JSON schema of job files, for editors."),
    "quote": _Part(
        "submit",
        "Show what a job would cost at each provider, how long it could run, and when it may start.",
    ),
    "submit": _Part("submit", "Pay for a job and submit it to the grid's queue."),
    "simulate": _Part(
        "metascheduler",
        "Simulate the scheduling policy with a recorded workload on a grid of your own.",
        "root_app",
    ),
    "top": _Part(
        "job",
        "Show your jobs, the queue and providers live; keys: logs, cancel, top up, quit.",
        "root_app",
    ),
    "doctor": _Part(
        "config",
        "Check endpoint, contracts, wallet and folders; exit 1 if a check fails.",
        "root_app",
    ),
}
#: Command groups.
GROUPS: Final = {
    "job": _Part(
        "job", "List, show, watch, cancel, top up and retry jobs; logs, results, challenges."
    ),
    "credit": _Part("credit", "Balances, transfers, allowances, statements, mint and burn."),
    "wallet": _Part("wallet", "Create, import, list and show encrypted wallets."),
    "tx": _Part("wallet", "Show a wallet's transactions, and replace stuck ones.", "tx_app"),
    "provider": _Part("provider", "Register, offer, price, label, run, drain, earn."),
    "metascheduler": _Part("metascheduler", "Run the meta-scheduler, or explain its decisions."),
    "gateway": _Part("gateway", "Run or show a gateway of definitions, logs and results."),
    "notify": _Part("notify", "Send notifications of a wallet's jobs by webhook and e-mail."),
    "relay": _Part("relay", "Run a relay that pays customers' gas, and list signed requests."),
    "admin": _Part("contracts", "Roles, providers, fee, handover, open and close.", "admin_app"),
    "audit": _Part("audit", "Audit the ledgers from events alone."),
    "explorer": _Part("explorer", "Show jobs and credits in a browser."),
    "contracts": _Part("contracts", "Deploy, record, verify, show addresses."),
    "devnet": _Part("devnet", "Run a local grid."),
    "config": _Part("config", "Show the settings, or choose a context."),
}

#: Aliases: the commands they run without and with an argument.
ALIASES: Final = {
    "jobs": (("job", "list"), ("job",)),
    "list": (("job", "list"), ("job", "list")),
    "status": (("job", "list"), ("job", "get")),
    **{
        verb: (("job", verb), ("job", verb))
        for verb in ("get", "why", "watch", "logs", "results", "cancel", "topup", "retry")
    },
}
#: Names from Slurm and other tools, and the equivalent command; only used in the error message.
EQUIVALENT_COMMANDS: Final = {
    "sbatch": "submit FILE",
    "srun": "submit FILE --wait",
    "squeue": "job list",
    "sacct": "job list",
    "scancel": "job cancel JOB",
    "scontrol": "job get JOB",
    "sinfo": "provider status --all",
    "balance": "credit balance",
    "login": "config use CONTEXT",
    "version": "--version",
}
#: Common options, which are also accepted before the command: whether each takes a value.
_COMMON: Final = {
    **{f"--{name.replace('_', '-')}": True for name in SETTING_FLAGS},
    "--output": True,
    "-o": True,
    "--wide": False,
    "-w": False,
    "--debug": False,
}


def behind_verb(args: list[str]) -> list[str]:
    """Move common options that precede the command behind it, but before any `--`."""
    position = 0
    while (
        position < len(args)
        and (takes_value := _COMMON.get(args[position].partition("=")[0])) is not None
    ):
        position += 2 if takes_value and "=" not in args[position] else 1
    options, rest = args[:position], args[position:]
    if not rest:
        return args
    end = rest.index("--") if "--" in rest else len(rest)
    return [*rest[:end], *options, *rest[end:]]


class LightGroup(TyperGroup):
    """A group that accepts common options before the command and avoids importing pydantic."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; common options before the command count as given after it."""
        return super().parse_args(ctx, behind_verb(args))

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; flags default to False, since typer imports pydantic for a None."""
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if getattr(parameter, "is_bool_flag", False) and parameter.default is None:
                parameter.default = False
        return parameters


class LazyRoot(LightGroup):
    """The root group, which imports the modules of `COMMANDS` and `GROUPS` on demand."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Return all names in the order of the tables."""
        return [*COMMANDS, *GROUPS]

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command that the arguments name, with aliases expanded."""
        name, rest = args[0], args[1:]
        if name in ALIASES:
            has_argument = bool(rest) and not rest[0].startswith("-")
            args = [*ALIASES[name][has_argument], *rest]
        elif name not in COMMANDS and name not in GROUPS and not ctx.resilient_parsing:
            ctx.fail(_unknown(name))
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """Import a command's module and return it; for the root's help, a stub with its help text."""
        part = COMMANDS.get(cmd_name) or GROUPS.get(cmd_name)
        if part is None:
            return None
        if self._listing:
            return TyperCommand(cmd_name, help=part.help)
        group = _group(getattr(import_module(f"deepsquare_chain.cli.{part.module}"), part.app))
        if cmd_name in COMMANDS:
            return group.commands[cmd_name]
        group.name, group.help, group.no_args_is_help = cmd_name, part.help, True
        return group

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the root's help from the tables, without importing any group."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


@cache
def _group(module_app: typer.Typer) -> Any:
    # Kept for the next command of this process: building a group takes 50 ms.
    module_app.info.cls = LightGroup
    return typer.main.get_group(module_app)


def _unknown(name: str) -> str:
    message = f"No such command {name[:60]!r}."
    if name in EQUIVALENT_COMMANDS:
        return f"{message} In this program it is `deepsquare {EQUIVALENT_COMMANDS[name]}`."
    suggestions = get_close_matches(name, [*COMMANDS, *GROUPS, *ALIASES], n=2)
    return f"{message} Did you mean {' or '.join(suggestions)}?" if suggestions else message


app = typer.Typer(
    name="deepsquare",
    cls=LazyRoot,
    epilog="Common options, such as --context and -o json, may be given before or after the command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepsquare {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """A grid of compute providers, with jobs and credits recorded on an Ethereum chain."""
