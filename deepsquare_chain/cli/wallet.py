"""Commands for wallets, which are encrypted keystore files, and for their transactions.

Secrets come from a file or are typed without echo, never from a flag.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Format, Kind, as_object, row_of
from deepsquare_chain.cli.types import LimitOption
from deepsquare_chain.errors import NotAuthorisedError, NotFoundError, UsageError

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

    from deepsquare_chain.chain.transactions.outbox import Entry
    from deepsquare_chain.client.network import WalletConnection

app = typer.Typer()

_WALLET: Final = (Column("address", "address", Kind.HASH), Column("path", "keystore"))
_RESULT_KEY: Final = (Column("recipient", "public key"), Column("path", "file"))
_LIST: Final = (
    Column("address", "address", Kind.HASH),
    Column("path", "keystore"),
    Column("checked", "verified", Kind.FLAG),
)
NewFile = Annotated[Path, typer.Argument(metavar="FILE", help="New keystore file.")]

tx_app = typer.Typer()

_TRANSACTIONS: Final = (
    Column("id", "number", Kind.NUMBER),
    Column("nonce", "nonce", Kind.NUMBER, detail=True),
    Column("state", "state", Kind.WORD),
    Column("label", "does"),
    Column("created", "recorded (UTC)", Kind.TIME),
    Column("attempts", "attempts", Kind.NUMBER, detail=True),
    Column("max_fee_wei", "fee ceiling (wei per gas)", Kind.NUMBER, detail=True),
    Column("fee", "paid (coin)", Kind.COIN),
    Column("transaction", "transaction", Kind.HASH),
)
_SHOWN: Final = (
    Column("id", "number", Kind.NUMBER),
    Column("nonce", "nonce", Kind.NUMBER),
    Column("state", "state", Kind.WORD),
    Column("label", "does"),
    Column("key", "key"),
    Column("to", "to", Kind.HASH),
    Column("gas", "gas limit", Kind.NUMBER),
    Column("created", "recorded (UTC)", Kind.TIME),
    Column("block", "block", Kind.NUMBER),
    Column("succeeded", "succeeded", Kind.FLAG),
    Column("gas_used", "gas used", Kind.NUMBER),
    Column("fee", "paid (coin)", Kind.COIN),
    Column("transaction", "transaction", Kind.HASH),
    Column("note", "note"),
)
_ATTEMPTS: Final = (
    Column("number", "attempt", Kind.NUMBER),
    Column("max_fee_wei", "fee ceiling (wei per gas)", Kind.NUMBER),
    Column("priority_fee_wei", "tip (wei per gas)", Kind.NUMBER),
    Column("sent_block", "sent after block", Kind.NUMBER),
    Column("cancels", "cancels", Kind.FLAG),
    Column("transaction", "transaction", Kind.HASH),
)

TransactionArgument = Annotated[
    str, typer.Argument(metavar="TRANSACTION", help="Number in `tx list`, or a hash.")
]


@command(app)
async def new(context: CommandContext, file: NewFile) -> None:
    """Create a new key and store it, encrypted, in a new file."""
    from deepsquare_chain.chain.wallet import create_wallet

    password = new_password(file, context.settings.password_file)
    _show(context, file, create_wallet(file, password))


@command(app, "import")
async def import_wallet(
    context: CommandContext,
    file: NewFile,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="KEYSTORE",
            help="Another program's keystore (JSON); - reads it from standard input.",
        ),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File of a private key in hex, readable only by its owner; - for standard input."
        ),
    ] = None,
    mnemonic: Annotated[bool, typer.Option("--mnemonic", help="Prompt for a mnemonic.")] = False,
    mnemonic_file: Annotated[
        Path | None,
        typer.Option(help="File of a mnemonic, readable only by its owner; - for standard input."),
    ] = None,
    derivation: Annotated[
        str | None,
        typer.Option(
            "--path", metavar="PATH", help="Derivation path; m/44'/60'/0'/0/0 by default."
        ),
    ] = None,
) -> None:
    """Import a keystore of another program, a private key, or a mnemonic, from a file or typed."""
    from deepsquare_chain.chain.wallet import (
        DERIVATION,
        import_key,
        import_keystore,
        import_mnemonic,
        read_password,
    )

    given = [source is not None, key_file is not None, mnemonic or mnemonic_file is not None]
    if sum(given) > 1:
        raise UsageError(
            "--from, --key-file and --mnemonic name different wallets", hint="Give one of them."
        )
    if derivation is not None and not given[2]:
        raise UsageError("--path belongs to a mnemonic", hint="Give --mnemonic, or leave it out.")
    if source is not None:
        password = read_password(source, context.settings.password_file)
        account = import_keystore(file, or_stdin(source), password)
    elif given[2]:
        words = _read_or_ask(mnemonic_file, "Mnemonic (not shown): ")
        password = new_password(file, context.settings.password_file)
        account = import_mnemonic(file, words, password, derivation=derivation or DERIVATION)
    else:
        key = _read_or_ask(key_file, "Private key (not shown): ")
        account = import_key(file, key, new_password(file, context.settings.password_file))
    _show(context, file, account)


@command(app, "list")
async def list_wallets(
    context: CommandContext,
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of keystores; that of the keystore by default.")
    ] = None,
) -> None:
    """List the wallets of a folder with the addresses that their files state.

    An address is verified only when its wallet is opened.
    """
    from deepsquare_chain.chain import wallet
    from deepsquare_chain.client.network import address_book

    own = context.settings.keystore
    directory = folder or (own.parent if own else context.settings.state_dir / "wallets")
    if folder is not None and not folder.is_dir():
        raise NotFoundError(
            f"There is no folder {folder}",
            hint="`deepsquare wallet show FILE` shows the address of one keystore.",
        )
    keystores = wallet.list_wallets(directory)
    book = address_book(context.settings)
    verified = {keystore.path: book.known_address(keystore.path) for keystore in keystores}
    context.printer.rows(
        _LIST,
        (
            (
                verified[keystore.path] or keystore.address or None,
                str(keystore.path),
                bool(verified[keystore.path]),
            )
            for keystore in keystores
        ),
        empty=f"No wallets in {directory}; `deepsquare wallet list FOLDER` lists another folder.",
    )


@command(app)
async def show(
    context: CommandContext,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Keystore; that of the settings by default."),
    ] = None,
) -> None:
    """Show the address of a wallet, by default of the one that commands use; its key is never shown."""
    from deepsquare_chain.chain.wallet import stated_address
    from deepsquare_chain.client.network import own_address

    settings = context.settings
    if file is not None:
        settings = settings.model_copy(update={"keystore": file, "signer": None})
    try:
        address = own_address(settings, None)
    except NotAuthorisedError as error:
        # This command only displays the address, so an unverified one is acceptable.
        address = stated_address(settings.keystore) if settings.keystore else ""
        if not address:
            raise
        context.printer.note(
            f"This address is recorded in the file; it was not compared with the key: {error.message}."
        )
    keystore = None if settings.signer or settings.keystore is None else str(settings.keystore)
    context.printer.record(_WALLET, (address, keystore))


@command(app, "result-key")
async def result_key(context: CommandContext) -> None:
    """Show the public key to which results are encrypted, and create the key if it is missing.

    `submit --encrypt` uses it. Put it into a job file (recipients) or give it to others.
    """
    from deepsquare_chain.store.encryption import ensure_result_key

    key, is_new = ensure_result_key(context.settings.result_key_file)
    if is_new:
        context.printer.note(
            f"Created {key.path}: keep a copy; data encrypted to it can't be decrypted without it."
        )
    context.printer.record(_RESULT_KEY, (key.recipient, str(key.path)))


def _show(context: CommandContext, file: Path, account: LocalAccount) -> None:
    """Print a new wallet, and store its address, so that later commands find it without the password."""
    from deepsquare_chain.client.network import address_book

    address_book(context.settings).remember(file, account)
    context.printer.record(_WALLET, (account.address, str(file)))


def new_password(file: Path, password_file: Path | None) -> str:
    """Return the password for a new wallet, from the password file or typed twice.

    Raises:
        NotAuthorisedError: Stdin is no terminal.
        UsageError: The two inputs differ, or the password file is not usable.
    """
    from deepsquare_chain.chain.wallet import ask_hidden, read_password

    typed = read_password(file, password_file)
    if password_file is None and ask_hidden("Repeat the password: ") != typed:
        raise UsageError("The two passwords differ", hint="Nothing was written; try again.")
    return typed


def ask_secret(prompt: str) -> str:
    """Prompt for a private key or mnemonic without echo.

    Raises:
        NotAuthorisedError: Stdin is no terminal.
    """
    from deepsquare_chain.chain.wallet import ask_hidden

    if not sys.stdin.isatty():
        raise NotAuthorisedError(
            "A secret can only be entered on a terminal",
            hint="Give its file with --key-file or --mnemonic-file, import a keystore with --from, "
            "or use a terminal.",
        )
    return ask_hidden(prompt)


def _read_or_ask(file: Path | None, prompt: str) -> str:
    """Read a secret from its file, or prompt for it without a file."""
    from deepsquare_chain.chain.wallet import read_key

    return ask_secret(prompt) if file is None else read_key(or_stdin(file))


def or_stdin(path: Path) -> Path:
    """Return the path, or that of standard input for `-`."""
    return Path("/dev/stdin") if str(path) == "-" else path


@command(tx_app, "list")
async def list_transactions(context: CommandContext, limit: LimitOption = 50) -> None:
    """List the transactions that this wallet sent from this state folder, newest first."""
    async with context.wallet() as wallet:
        await wallet.sender.reconcile()
        entries = wallet.store.recent_entries(limit)
    context.printer.rows(
        _TRANSACTIONS,
        map(_list_row, entries),
        empty="This state folder has no transactions of this wallet.",
    )


@command(tx_app, "show")
async def show_transaction(context: CommandContext, transaction: TransactionArgument) -> None:
    """Show one transaction with all its attempts and its outcome."""
    from deepsquare_chain.client.transactions import find

    async with context.wallet() as wallet:
        await wallet.sender.reconcile()
        await _print(context, wallet, find(wallet, transaction))


@command(tx_app, "speed-up")
async def speed_up(context: CommandContext, transaction: TransactionArgument) -> None:
    """Replace a pending transaction with the same one with both fees at least 12.5 % higher."""
    from deepsquare_chain.client.transactions import pending

    async with context.wallet() as wallet:
        entry = pending(wallet, transaction)
        await wallet.sender.speed_up(entry)
        await _print(context, wallet, wallet.store.entry(entry.id))


@command(tx_app)
async def cancel(context: CommandContext, transaction: TransactionArgument) -> None:
    """Replace a pending transaction with an empty transfer to this wallet; only one of them is mined."""
    from deepsquare_chain.client.transactions import pending

    async with context.wallet() as wallet:
        entry = pending(wallet, transaction)
        await wallet.sender.cancel(entry)
        context.printer.note(
            f"The original of {entry.call.label!r} may still be mined first; "
            f"see `deepsquare tx show {entry.id}`."
        )
        await _print(context, wallet, wallet.store.entry(entry.id))


async def _print(context: CommandContext, wallet: WalletConnection, entry: Entry) -> None:
    from deepsquare_chain.client.transactions import inclusion

    mined = await inclusion(wallet, entry)
    row = row_of(
        _SHOWN,
        entry,
        state=entry.state.value,
        label=entry.call.label,
        to=entry.call.to,
        created=entry.created or None,
        block=mined and mined.block,
        succeeded=mined and mined.ok,
        gas_used=mined and mined.gas_used,
        fee=mined and mined.fee,
        transaction=mined.tx_hash if mined else entry.latest.tx_hash,
        note=entry.note or None,
    )
    attempts = [
        row_of(
            _ATTEMPTS,
            attempt,
            number=number,
            max_fee_wei=attempt.max_fee,
            priority_fee_wei=attempt.priority_fee,
            transaction=attempt.tx_hash,
        )
        for number, attempt in enumerate(entry.attempts, 1)
    ]
    if context.printer.style is Format.JSON:
        body = as_object(_SHOWN, row)
        body["attempts"] = [as_object(_ATTEMPTS, attempt) for attempt in attempts]
        context.printer.document(body)
        return
    context.printer.record(_SHOWN, row)
    if context.printer.style is Format.TABLE:
        context.printer.rows(_ATTEMPTS, attempts)


def _list_row(entry: Entry) -> tuple[Any, ...]:
    return row_of(
        _TRANSACTIONS,
        entry,
        state=entry.state.value,
        label=entry.call.label,
        created=entry.created or None,
        attempts=len(entry.attempts),
        max_fee_wei=entry.latest.max_fee,
        transaction=entry.mined_hash or entry.latest.tx_hash,
    )
