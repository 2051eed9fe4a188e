"""The root of the command line.

A group's module is loaded when one of its commands is asked for, so that the root's help and the
completion of names answer at once.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from deepsquare_chain import __version__
from deepsquare_chain.cli.frame import SETTING_FLAGS


class _Part(NamedTuple):
    """A command or group: its module in this package, and its line in the root's help."""

    module: str
    help: str


#: Commands that stand at the top, without a group.
COMMANDS: Final = {
    "demo": _Part(
        "demo", "Run a whole grid on this machine, from submission to audit; under 90 seconds."
    ),
    "init": _Part("init", "Write a job file to begin with; every key is explained in it."),
    "validate": _Part("jobfile", "Check a job file; nothing is sent anywhere."),
    "convert": _Part(
        "jobfile", "Rewrite older keys of a job file; the result is checked and printed."
    ),
    "schema": _Part("jobfile", "Print the JSON schema of job files, for editors."),
    "quote": _Part(
        "submit",
        "Show what a job would cost at each provider, how long it could run, and when it may start.",
    ),
    "submit": _Part("submit", "Pay for a job and put it into the grid's queue."),
    "simulate": _Part(
        "simulate",
        "Run a recorded workload through the policy on a grid of your own, and compare it.",
    ),
    "top": _Part(
        "top",
        "Show own jobs, the queue and providers as they change; keys: logs, cancel, top up, quit.",
    ),
    "doctor": _Part("doctor", "Look at all that a command needs; exit 1 if something is wrong."),
}
#: Groups, each a file with an `app` of the same help.
GROUPS: Final = {
    "job": _Part("job", "List, look at, watch, read, fetch, cancel, top up, retry, challenge."),
    "credit": _Part("credit", "Balances, transfers, allowances, statements, mint and burn."),
    "wallet": _Part("wallet", "Make, import, list and show encrypted wallets."),
    "tx": _Part("tx", "Look at what a wallet has sent, and replace what is stuck."),
    "provider": _Part("provider", "Register, offer, price, label, run, drain, earn."),
    "metascheduler": _Part(
        "metascheduler", "Run the meta-scheduler, and see what it would decide."
    ),
    "gateway": _Part("gateway", "Run a gateway of definitions, logs and results, and look at one."),
    "notify": _Part("notify", "Notify of a wallet's jobs by webhook and e-mail."),
    "relay": _Part(
        "relay", "Run a relay that pays customers' gas, and look at what was signed for one."
    ),
    "admin": _Part("admin", "Roles, providers, fee, handover, open and close."),
    "audit": _Part("audit", "Check the books from events alone."),
    "explorer": _Part("explorer", "Look at jobs and credits in a browser."),
    "contracts": _Part("contracts", "Deploy, verify, show addresses."),
    "devnet": _Part("devnet", "Run a local grid."),
    "config": _Part("config", "Show the settings, choose a context."),
}


#: Short forms: the words they stand for without and with an argument.
ALIASES: Final = {
    "jobs": (("job", "list"), ("job",)),
    "list": (("job", "list"), ("job", "list")),
    "status": (("job", "list"), ("job", "get")),
    **{
        verb: (("job", verb), ("job", verb))
        for verb in ("get", "why", "watch", "logs", "results", "cancel", "topup", "retry")
    },
}
#: What people type who come from elsewhere, and the command that does it here.
ELSEWHERE: Final = {
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
#: Common options that may stand before the verb as well: whether each takes a value.
_COMMON: Final = {
    **{f"--{name.replace('_', '-')}": True for name in SETTING_FLAGS},
    "--output": True,
    "-o": True,
    "--wide": False,
    "-w": False,
    "--debug": False,
}


def behind_verb(args: list[str]) -> list[str]:
    """The words of a command line, with common options that stand before the verb after it."""
    at = 0
    while at < len(args) and (takes := _COMMON.get(args[at].partition("=")[0])) is not None:
        at += 2 if takes and "=" not in args[at] else 1
    moved, rest = args[:at], args[at:]
    if not rest:
        return args
    end = rest.index("--") if "--" in rest else len(rest)
    return [*rest[:end], *moved, *rest[end:]]


class LightGroup(TyperGroup):
    """A group whose flags cost nothing where nobody gave them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take common options before the verb as if they stood after it."""
        return super().parse_args(ctx, behind_verb(args))

    def get_params(self, ctx: Any) -> list[Any]:
        """Its flags; an absent one is False, since a None makes typer load pydantic."""
        found = super().get_params(ctx)
        for each in found:
            if getattr(each, "is_bool_flag", False) and each.default is None:
                each.default = False
        return found


class LazyRoot(LightGroup):
    """The root with its table of commands and groups."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """All names, in the order of the table."""
        return [*COMMANDS, *GROUPS]

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the words mean, a short form written out."""
        name, rest = args[0], args[1:]
        if name in ALIASES:
            given = bool(rest) and not rest[0].startswith("-")
            args = [*ALIASES[name][given], *rest]
        elif name not in COMMANDS and name not in GROUPS and not ctx.resilient_parsing:
            ctx.fail(_unknown(name))
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """A command with its module loaded, or while help is made only its name and line."""
        part = COMMANDS.get(cmd_name) or GROUPS.get(cmd_name)
        if part is None:
            return None
        if self._listing:
            return TyperCommand(cmd_name, help=part.help)
        held = import_module(f"deepsquare_chain.cli.{part.module}").app
        held.info.cls = LightGroup
        found = typer.main.get_group(held)
        if cmd_name in COMMANDS:
            return found.commands[cmd_name]
        found.name = cmd_name
        return found

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Help from the table alone."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


def _unknown(name: str) -> str:
    words = f"No such command {name[:60]!r}."
    if name in ELSEWHERE:
        return f"{words} Here it is `deepsquare {ELSEWHERE[name]}`."
    near = get_close_matches(name, [*COMMANDS, *GROUPS, *ALIASES], n=2)
    return f"{words} Did you mean {' or '.join(near)}?" if near else words


app = typer.Typer(
    name="deepsquare",
    cls=LazyRoot,
    help="A grid of compute providers whose jobs and credits live on an Ethereum chain.",
    epilog="Common options, such as --context and -o json, may stand before or after the command.",
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
    """A grid of compute providers whose jobs and credits live on an Ethereum chain."""
