"""Code shared by all commands: common options, settings, wallets, error handling, coroutines."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, ParamSpec, cast

import typer
from typer.core import TyperArgument, TyperCommand

from deepsquare_chain.cli.output import Column, Format, Kind, Printer, row_of
from deepsquare_chain.errors import GridError, UsageError, number_problem
from deepsquare_chain.observability.redaction import plain

if TYPE_CHECKING:
    from deepsquare_chain.chain.bindings.calls import Call
    from deepsquare_chain.chain.bindings.contracts import Contracts
    from deepsquare_chain.chain.bindings.deployment import Deployment
    from deepsquare_chain.chain.transactions.sender import TxReceipt
    from deepsquare_chain.client.gasless import Confirm, GaslessWallet
    from deepsquare_chain.client.network import WalletConnection
    from deepsquare_chain.client.transactions import Preview
    from deepsquare_chain.settings import Settings

P = ParamSpec("P")

_UNSIGNED_HELP: Final = "Send nothing; print the calldata for this account, such as a Safe."
_PANEL: Final = "Common options"
#: Seconds until the first message about a pending transaction, and between further messages.
_FIRST_MESSAGE_AFTER: Final = 3.0
_MESSAGE_INTERVAL: Final = 15.0

#: Flags that override a setting: type, help, whether `--help` lists it. A test checks that none is missing.
SETTING_FLAGS: Final[Mapping[str, tuple[type, str, bool]]] = {
    "context": (str, "Network to use: a context of the configuration files.", True),
    "endpoint": (list[str], "JSON-RPC endpoint of the chain; may be repeated.", True),
    "websocket": (str, "ws:// URL of a node that reports new blocks to services.", False),
    "ca_file": (Path, "Additional trusted certificates (PEM).", False),
    "headers_file": (Path, "File of HTTP headers for endpoints, such as API keys.", False),
    "relay": (str, "URL of the relay that pays the gas of --gasless.", False),
    "gateway": (list[str], "URL of a gateway of definitions, logs and results.", False),
    "max_lag_blocks": (int, "Blocks that an endpoint may lag behind the best one.", False),
    "deployment": (Path, "Record of the deployed contracts.", True),
    "keystore": (Path, "Encrypted wallet file.", True),
    "signer": (str, "URL of an external signer (web3signer; clef+URL for clef).", False),
    "signer_account": (str, "Account of the signer, if it has several.", False),
    "password_file": (Path, "File with the password of the wallet.", True),
    "result_key": (Path, "File of the age key that decrypts results.", False),
    "store": (Path, "Folder of job definitions.", False),
    "state_dir": (Path, "Folder of databases, logs and runs.", False),
    "chain_id": (int, "Chain ID that the endpoint must serve.", False),
    "confirmations": (int, "Confirmations before the state of a block is used.", False),
    "poll_interval": (float, "Poll interval of the chain in seconds.", False),
    "timeout": (float, "Seconds to wait for a receipt.", False),
    "max_fee_gwei": (float, "Maximum fee per gas, in gwei.", False),
    "max_answer_fee_gwei": (float, "The same while a challenge is open, in gwei.", False),
    "collect_interval": (int, "Seconds between interim payments; 0 for none.", False),
    "collect_gas_share": (float, "Maximum share of an interim payment for gas.", False),
    "coin_value": (float, "Credits that one coin of the chain is worth.", False),
    "unbilled_warning": (float, "Unbilled credits of one run above which to warn.", False),
    "health_port": (int, "Port on 127.0.0.1 of a service's health and metrics.", False),
    "follow_offer": (bool, "Keep a provider's offer at the free capacity of its cluster.", False),
    "publish_abilities": (bool, "Test the abilities of jobs, and publish them as labels.", False),
    "disk_floor": (int, "MB of free disk below which a provider claims no job.", False),
    "keep_runs_days": (float, "Days for which folders of ended jobs are kept.", False),
    "keep_runs_mb": (int, "Maximum MB of these folders; 0 for no limit.", False),
    "executor": (str, "Executor of a provider: local, slurm or another one.", False),
    "executor_options": (list[str], "KEY=VALUE option of the executor; may be repeated.", False),
    "gateway_options": (list[str], "KEY=VALUE option of `gateway serve`; may be repeated.", False),
    "relay_options": (list[str], "KEY=VALUE option of `relay serve`; may be repeated.", False),
    "allow_unisolated": (bool, "Run jobs without isolation from the daemon.", False),
    "allow_root": (bool, "Run a provider's daemon and its jobs as root.", False),
    "explorer_database": (str, "File or URL of the explorer's index.", False),
    "explorer_links": (str, "Other explorers to link to: NAME.tx=https://.../{} ...", False),
    "notify_to": (
        list[str],
        "Recipient of notifications: e-mail or webhook; may be repeated.",
        False,
    ),
    "notify_on": (str, "When: begin, end, fail, requeue, all.", False),
    "notify_by": (str, "Sender of notifications: run (`notify run`) or gateway.", False),
    "notify_desktop": (bool, "Notify on this machine's desktop too.", False),
    "notify_key_file": (Path, "File of the key that signs webhooks.", False),
    "smtp": (str, "Mail server of notifications: smtp://USER@HOST:587.", False),
    "smtp_from": (str, "Sender of notifications by e-mail.", False),
    "smtp_password_file": (Path, "File of the mail server's password.", False),
    "log_level": (str, "debug, info, warning or error.", False),
    "log_format": (str, "auto, console or json.", False),
}


#: What `--help` shows for the value of a setting's flag, by its type and for some by its name.
_METAVARS: Final[Mapping[Any, str]] = {
    str: "TEXT",
    list[str]: "TEXT",
    int: "N",
    float: "N",
    Path: "PATH",
    "context": "NAME",
    "endpoint": "URL",
    "gateway": "URL",
    "relay": "URL",
    "websocket": "URL",
    "signer": "URL",
    "signer_account": "ADDRESS",
    "executor_options": "KEY=VALUE",
    "gateway_options": "KEY=VALUE",
    "relay_options": "KEY=VALUE",
}

#: Names of the parameters that all commands share.
_COMMON_NAMES: Final = frozenset({*SETTING_FLAGS, "output", "wide", "debug", "help"})

#: Values in a setting that switch an option on.
_TRUE: Final = frozenset({"true", "yes", "on", "1"})

_RECEIPT: Final = (
    Column("label", "done"),
    Column("transaction", "transaction", Kind.HASH),
    Column("block", "block", Kind.NUMBER),
    Column("gas_used", "gas used", Kind.NUMBER),
    Column("gas_fee", "gas fee (coin)", Kind.COIN),
)


_UNSIGNED: Final = (
    Column("label", "does"),
    Column("to", "to", Kind.HASH),
    Column("value", "value (wei)", Kind.NUMBER),
    Column("data", "data", Kind.TEXT),
)


class CommandContext:
    """The context of a command: its printer, flags, and settings, which load at first use."""

    def __init__(
        self,
        printer: Printer,
        flags: Mapping[str, Any] | None = None,
        *,
        debug: bool = False,
        unsigned: str | None = None,
    ) -> None:
        self.printer = printer
        self.debug = debug
        self.flags = dict(flags or {})
        #: Account for which calls are printed instead of sent; None to send them.
        self.unsigned = unsigned
        #: Message for Ctrl-C: what continues after the command was interrupted.
        self.continues = ""

    @functools.cached_property
    def settings(self) -> Settings:
        """The merged settings of all layers.

        Raises:
            UsageError: A layer can't be read or holds a wrong value.
        """
        from deepsquare_chain.settings import load_settings

        settings = load_settings(self.flags)
        self.quiet_libraries(settings.log_level if self.flags.get("log_level") else "error")
        return settings

    def quiet_libraries(self, level: str = "error") -> None:
        """Configure logging so that libraries write to stderr only, at `level` or above."""
        from deepsquare_chain.observability import configure_logging

        configure_logging(level, "console")

    def announce(self, label: str, text: str, *, key: str = "url") -> None:
        """Print a fact of a service that is ready, such as its URL; with JSON, on one line."""
        if self.printer.style is Format.JSON:
            self.printer.text(json.dumps({key: text}))
        else:
            self.printer.note(f"{label:<12}{text}")

    def receipt(self, receipt: TxReceipt) -> None:
        """Print the receipt of a transaction; nothing with --unsigned."""
        if self.unsigned is not None:
            return
        row = row_of(
            _RECEIPT,
            receipt,
            transaction=receipt.hash,
            block=receipt.block_number,
            gas_fee=receipt.fee_wei,
        )
        self.printer.record(_RECEIPT, row)

    @functools.cached_property
    def deployment(self) -> Deployment:
        """The deployment record of the settings; raises the errors of `Deployment.load`."""
        from deepsquare_chain.chain.bindings.deployment import Deployment

        return Deployment.load(self.settings.deployment)

    def grid(self) -> AbstractAsyncContextManager[Contracts]:
        """Open the contracts of the settings; raises the errors of `open_grid`."""
        from deepsquare_chain.client.network import open_grid

        return open_grid(self.settings)

    @asynccontextmanager
    async def wallet(self) -> AsyncIterator[WalletConnection]:
        """Open the wallet of the settings; prints progress while transactions are pending.

        Raises the errors of `open_wallet`.
        """
        import asyncio

        from deepsquare_chain.client.network import open_wallet

        if self.unsigned is not None:
            async with self._unsigned_wallet(self.unsigned) as unsigned:
                yield unsigned
            return
        async with open_wallet(self.settings) as wallet:
            ticker = asyncio.create_task(self._tick(wallet), name="transaction progress")
            try:
                yield wallet
            except asyncio.CancelledError:
                for entry in wallet.sender.pending():
                    self.print_sent(entry.call.label, entry.latest.tx_hash, "tx list")
                raise
            finally:
                ticker.cancel()
                await asyncio.wait([ticker])

    @asynccontextmanager
    async def _unsigned_wallet(self, account: str) -> AsyncIterator[WalletConnection]:
        """A wallet whose calls are printed at the end."""
        from deepsquare_chain.client.transactions import UnsignedSender, open_unsigned

        async with open_unsigned(self.settings, account) as wallet:
            yield wallet
            chain_id = wallet.contracts.deployment.chain_id
            calls = wallet.sender.calls if isinstance(wallet.sender, UnsignedSender) else []
        self.print_unsigned(chain_id, wallet.address, calls)

    def print_unsigned(self, chain_id: int, account: str, calls: Sequence[Call]) -> None:
        """Print calls for an account to send: as records, CSV, or JSON for Safe's Transaction Builder."""
        from deepsquare_chain.client.transactions import safe_batch

        if self.printer.style is Format.JSON:
            self.printer.document(safe_batch(chain_id, account, calls))
            return
        rows = [(call.label, call.to, call.value, f"0x{call.data.hex()}") for call in calls]
        if self.printer.style is Format.CSV:
            self.printer.rows(_UNSIGNED, rows)
            return
        for row in rows:
            self.printer.record(_UNSIGNED[:-1], row[:-1])
            self.printer.text(row[-1])  # the calldata in full on one line, for copying
        if rows:
            self.printer.note(
                f"Nothing was sent. Send this from {account} on chain {chain_id}, in this "
                "order; -o json prints a file for Safe's Transaction Builder."
            )

    async def _tick(self, wallet: WalletConnection) -> None:
        """Print a message about each pending transaction after some seconds, and then at intervals."""
        import asyncio
        import time

        first_seen: dict[str, float] = {}
        next_message: dict[str, float] = {}
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            for entry in wallet.sender.pending():
                tx_hash = entry.latest.tx_hash
                waited = now - first_seen.setdefault(tx_hash, now)
                if waited >= next_message.setdefault(tx_hash, _FIRST_MESSAGE_AFTER):
                    next_message[tx_hash] = waited + _MESSAGE_INTERVAL
                    self.printer.note(
                        f"{entry.call.label!r} was sent ({tx_hash}) and waits for a block: "
                        f"{waited:.0f} s."
                    )

    def print_sent(self, label: str, name: str, where: str) -> None:
        """Print which transaction or submission was sent before the command was interrupted."""
        self.printer.note(
            f"{label!r} was sent and may still be executed ({name}): look with "
            f"`deepsquare {where}` before you send it again."
        )

    def unchanged(self, text: str) -> None:
        """Print that the requested state is already in effect and nothing was sent."""
        self.printer.note(f"{text} Nothing was sent.")

    def confirm_all(self, risks: Sequence[str], *, yes: bool, warnings: Sequence[str] = ()) -> bool:
        """Print warnings and risks, and ask for confirmation on stderr; return whether to proceed.

        Args:
            risks: What the change undoes, or why it may be a mistake; each requires confirmation.
            yes: Whether --yes was given; skips the question.
            warnings: Possible mistakes that require confirmation on a terminal only; otherwise only printed.

        Raises:
            UsageError: There are risks, stdin is no terminal, and --yes was not given.
        """
        for message in (*warnings, *risks):
            self.printer.note(plain(message))
        is_interactive = sys.stdin.isatty()
        if yes or not (risks or (warnings and is_interactive)):
            return True
        if not is_interactive:
            raise UsageError(
                "Nothing was changed: there is no terminal to ask on",
                hint="Give --yes to confirm all of it.",
            )
        if ask_yes_no("Go on?"):
            return True
        self.printer.note("Nothing was changed.")
        return False


#: Extras of the package (`pip install 'deepsquare-chain[EXTRA]'`), and the modules each requires.
EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {
    "devnet": ("eth_tester", "eth", "alembic", "fastapi", "obstore", "sse_starlette"),
    "explorer": ("alembic", "fastapi", "sse_starlette"),
    "gateway": ("fastapi", "obstore", "sse_starlette"),
    "top": ("textual",),
}


def require(extra: str, feature: str) -> None:
    """Check that the extra a command needs is installed.

    `extra` is a key of `EXTRAS`, `feature` the command for the error message.

    Raises:
        UsageError: A module of the extra is missing.
    """
    from importlib.util import find_spec

    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"`deepsquare {feature}` needs the optional part {extra!r} of this package, which is not "
            f"installed (missing: {', '.join(missing)})",
            hint=f"Install it: pip install 'deepsquare-chain[{extra}]'",
        )


class GridCommand(TyperCommand):
    """A command whose messages about bad values name the value, what is allowed, and an example."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments.

        Raises:
            typer.BadParameter: A value is invalid.
        """
        # A negative number is a value, which its parser refuses with what is allowed; not an option.
        ctx.ignore_unknown_options |= any(re.match(r"-[0-9.]", argument) for argument in args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            message = _value_problem(error)
            if message is None:
                raise
            raise typer.BadParameter(message, ctx=error.ctx, param=error.param) from None

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; `--help` shows no type for flags, and one name for arguments."""
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if getattr(parameter, "is_bool_flag", False):
                parameter.metavar = ""
            elif isinstance(parameter, TyperArgument):
                parameter.display_type_rich = _no_type  # type: ignore[method-assign]
        return parameters


def _no_type(ctx: Any) -> None:
    """Return no type, for the help text of an argument."""


def _value_problem(error: typer.BadParameter) -> str | None:
    """Return the message for a value that pydantic refused; None for other errors."""
    details = getattr(error.__cause__, "errors", None)
    if details is None:
        return None
    first, parameter = details()[0], cast("Any", error.param)
    kind = parameter.type_descriptor.annotation
    if kind not in (int, float):
        return str(first["msg"]).removeprefix("Value error, ")
    return number_problem(
        first["input"],
        whole=kind is int,
        low=parameter.min,
        high=parameter.max,
        example=parameter.default,
    )


def command(
    app: typer.Typer,
    name: str | None = None,
    *,
    service: bool = False,
    sends: bool = False,
    table: str = "",
    **options: Any,
) -> Callable[
    [Callable[Concatenate[CommandContext, P], Awaitable[int | None]]],
    Callable[Concatenate[CommandContext, P], Awaitable[int | None]],
]:
    """Register a coroutine function as a command; its result is the exit code, None meaning 0.

    The function gets a `CommandContext` first and then its own parameters. The common options are
    added.

    Args:
        app: The command group.
        name: Name of the command; the function's name by default.
        service: Whether `--help` lists the flags of all settings instead of the usual ones.
        sends: Whether the command sends transactions from a wallet; adds --unsigned.
        table: Setting with values of the command's own options, for those that are not given.
        options: Further arguments of `typer.Typer.command`.
    """

    def register(
        func: Callable[Concatenate[CommandContext, P], Awaitable[int | None]],
    ) -> Callable[Concatenate[CommandContext, P], Awaitable[int | None]]:
        @functools.wraps(func)
        def run(**given: Any) -> None:
            flags = {key: given.pop(key) for key in SETTING_FLAGS}
            typed = given.pop("typed", None)
            debug = given.pop("debug")
            printer = Printer(given.pop("output"), wide=given.pop("wide"))
            unsigned = given.pop("unsigned", None)
            context = CommandContext(printer, flags, debug=debug, unsigned=unsigned)

            async def start() -> int | None:
                if typed is not None:
                    given.update(_table_values(context, table, typed))
                return await call(context, **given)

            code = _run_guarded(start(), context)
            if code:
                raise typer.Exit(code)

        call = cast("Callable[..., Awaitable[int | None]]", func)
        _describe(run, func, service=service, sends=sends, reads_table=bool(table))
        app.command(name, cls=GridCommand, **options)(run)
        return func

    return register


def _table_values(context: CommandContext, table: str, typed: typer.Context) -> dict[str, Any]:
    """Return the values of options in a setting, except for those on the command line.

    Raises:
        UsageError: The command has no such option, or a value is invalid.
    """
    own = {item.name: item for item in typed.command.params if item.name not in _COMMON_NAMES}
    arguments: dict[str, list[str]] = {}
    for key, value in getattr(context.settings, table).items():
        option = own.get(key.replace("-", "_"))
        if option is None:
            raise UsageError(
                f"{table}: there is no option {key[:60]!r}",
                hint=f"Options are: {', '.join(sorted(filter(None, own)))}.",
            )
        flag, name = option.opts[0], str(option.name)
        source = typed.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            continue
        if getattr(option, "is_flag", False):
            arguments[name] = [flag] * (str(value).lower() in _TRUE)
        elif isinstance(value, list):
            arguments[name] = [part for item in value for part in (flag, item)]
        else:
            arguments[name] = [flag, str(value)]
    line = [part for parts in arguments.values() for part in parts]
    try:
        parsed = typed.command.make_context(typed.info_name, line, parent=typed.parent)
    except typer.BadParameter as error:
        raise UsageError(f"{table}: {error.format_message()}") from None
    return {name: parsed.params[name] for name in arguments}


def _describe(
    run: Callable[..., None],
    func: Callable[..., Any],
    *,
    service: bool,
    sends: bool,
    reads_table: bool,
) -> None:
    """Set the wrapper's signature: the parameters after the command context, then the common options."""
    signature = inspect.signature(func, eval_str=True)
    own_parameters = list(signature.parameters.values())[1:]
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own_parameters]
    if reads_table:
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter("typed", kind, annotation=typer.Context))
    if sends:
        parameters.append(
            _option("unsigned", str | None, None, _UNSIGNED_HELP, "--unsigned", metavar="ACCOUNT")
        )
    all_parameters = [*parameters, *_common(service=service)]
    del run.__dict__["__wrapped__"]
    run.__dict__["__signature__"] = inspect.Signature(all_parameters)
    run.__annotations__ = {item.name: item.annotation for item in all_parameters}


def _common(*, service: bool) -> list[inspect.Parameter]:
    parameters = [
        _option("output", Format, Format.TABLE, "Output format.", "--output", "-o"),
        _option(
            "wide", bool, False, "Tables with all columns and complete hashes.", "--wide", "-w"
        ),
        _option("debug", bool, False, "Show the traceback of an unexpected error.", "--debug"),
    ]
    for name, (kind, text, listed) in SETTING_FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        # Numbers stay text: the settings check their range.
        option_kind: Any = str if kind in (int, float) else kind
        metavar = _METAVARS.get(name, _METAVARS.get(kind))
        hidden = not (listed or service)
        parameters.append(
            _option(name, option_kind | None, None, text, flag, hidden=hidden, metavar=metavar)
        )
    return parameters


def _option(
    name: str,
    kind: Any,
    default: Any,
    text: str,
    *flags: str,
    hidden: bool = False,
    metavar: str | None = None,
) -> inspect.Parameter:
    option = typer.Option(
        *flags,
        help=text,
        rich_help_panel=_PANEL,
        hidden=hidden,
        show_default=False,
        metavar=metavar,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _run_guarded(work: Coroutine[Any, Any, int | None], context: CommandContext) -> int:
    """Run a command; every error becomes a message on stderr and an exit code."""
    import asyncio

    try:
        return asyncio.run(work) or 0
    except GridError as error:
        _print_trace(context)
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. {context.continues}".rstrip(), err=True)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # the reader closed the pipe; typer exits without a message
        _print_trace(context)
        print_unexpected(error)
        return 1


def _print_trace(context: CommandContext) -> None:
    if context.debug:
        import traceback

        traceback.print_exc()


def print_error(error: GridError) -> None:
    """Print an error and its hint to stderr."""
    typer.echo(f"Error: {plain(error.message, keep=chr(10))}", err=True)
    if error.hint:
        typer.echo(f"Hint: {plain(error.hint, keep=chr(10))}", err=True)


def print_unexpected(error: Exception) -> None:
    """Print an unexpected exception to stderr as one line."""
    lines = str(error).strip().splitlines()
    text = plain(f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": "))
    typer.echo(f"Error: unexpected {text[:300]}", err=True)
    typer.echo("Hint: run it again with --debug for the traceback.", err=True)


@asynccontextmanager
async def open_sending(
    context: CommandContext, *, gasless: bool, yes: bool
) -> AsyncIterator[WalletConnection | GaslessWallet]:
    """Open the wallet of a command; it sends transactions itself or through a relay.

    Raises:
        UsageError: Both --gasless and --unsigned were given.
        GridError: See `open_wallet` and `open_gasless`.
    """
    import asyncio

    if gasless and context.unsigned is not None:
        raise UsageError(
            "--gasless signs a request, and --unsigned signs nothing",
            hint="Leave out one of the two.",
        )
    if gasless:
        from deepsquare_chain.client.gasless import open_gasless

        async with open_gasless(context.settings, confirmation_prompt(context, yes=yes)) as relayed:
            try:
                yield relayed
            except asyncio.CancelledError:
                for request in relayed.store.open_requests():
                    context.print_sent(request.label, request.digest, "relay requests")
                raise
        return
    async with context.wallet() as wallet:
        yield wallet


def ask_yes_no(question: str) -> bool:
    """Ask on the terminal for a yes or no.

    Raises:
        KeyboardInterrupt: Ctrl-C, or the end of the input.
    """
    from deepsquare_chain.chain.wallet import interruptible

    try:
        with interruptible():
            return typer.confirm(question, err=True)
    except typer.Abort:
        raise KeyboardInterrupt from None


def confirmation_prompt(context: CommandContext, *, yes: bool) -> Confirm:
    """Return a function that prints a request to stderr and asks whether to sign it, unless `yes`.

    Raises (when called):
        UsageError: Stdin is no terminal, and --yes was not given.
    """

    def ask(preview: Preview) -> bool:
        printer = context.printer
        printer.note("To be signed:")
        width = max(len(name) for name, _ in preview.rows)
        for name, value in preview.rows:
            printer.note(f"  {name:<{width}}  {plain(value)}")
        if yes:
            return True
        if not sys.stdin.isatty():
            raise UsageError(
                "There is no terminal to confirm the signature",
                hint="Give --yes to sign without a confirmation.",
            )
        return ask_yes_no("Sign it?")

    return ask
