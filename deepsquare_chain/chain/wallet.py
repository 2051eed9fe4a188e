"""Wallets: encrypted keystore v3 files, the format of geth and most wallets.

Private keys and passwords are never command arguments and are never logged. A private key leaves
this module only inside an account object.
"""

from __future__ import annotations

import codecs
import contextlib
import getpass
import hashlib
import json
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_utils.address import is_address, to_checksum_address
from pydantic_core import from_json

from deepsquare_chain.errors import NotAuthorisedError, NotFoundError, UsageError

PASSWORD_FILE_VARIABLE: Final = "DEEPSQUARE_PASSWORD_FILE"  # noqa: S105 - its name only
MAX_BYTES: Final = 100_000
#: Cost parameter of scrypt; the light one is for development wallets without real value.
_STRONG: Final = 2**18
_LIGHT: Final = 2**12
_MAX_SCRYPT_BYTES: Final = 2**30
_MAX_ROUNDS: Final = 10_000_000
#: Maximum number of wallets in an address book.
_MAX_KNOWN: Final = 500
#: Derivation path of the first account in most wallets.
DERIVATION: Final = "m/44'/60'/0'/0/0"
_DERIVATION: Final = re.compile(r"m(/[0-9]{1,10}'?){1,10}")
_BACKUP: Final = "Give the right file with --keystore, or restore it from a backup."

Prompt = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Wallet:
    """A keystore file and the address that it states, which is not verified; "" for none."""

    path: Path
    address: str


def create_wallet(path: str | Path, password: str, *, light: bool = False) -> LocalAccount:
    """Generate a new key and write it to a new file.

    Raises:
        UsageError: The file exists or can't be written, or the password is empty.
    """
    account: LocalAccount = Account.create()
    return _write(Path(path), account, password, light=light)


def import_key(
    path: str | Path, key: str | bytes, password: str, *, light: bool = False
) -> LocalAccount:
    """Write an existing private key (32 bytes, or their hex) to a new file.

    Raises:
        UsageError: It is not a private key, or the file exists or can't be written.
    """
    try:
        raw = bytes.fromhex(key.strip().removeprefix("0x")) if isinstance(key, str) else bytes(key)
        account: LocalAccount = Account.from_key(raw)
    except Exception:  # noqa: BLE001 - any message may quote the key
        raise UsageError(
            "This is not a private key", hint="A private key is 64 hexadecimal digits."
        ) from None
    return _write(Path(path), account, password, light=light)


def import_mnemonic(
    path: str | Path,
    words: str,
    password: str,
    *,
    derivation: str = DERIVATION,
    light: bool = False,
) -> LocalAccount:
    """Derive a key from a mnemonic (BIP-39) and a derivation path (BIP-44); write it to a new file.

    Raises:
        UsageError: The mnemonic or path is invalid, or the file exists or can't be written.
    """
    if not _DERIVATION.fullmatch(derivation):
        raise UsageError(
            f"{derivation[:60]!r} is not a derivation path", hint=f"The default is {DERIVATION}."
        )
    Account.enable_unaudited_hdwallet_features()
    try:
        account: LocalAccount = Account.from_mnemonic(
            " ".join(words.split()), account_path=derivation
        )
    except Exception:  # noqa: BLE001 - any message may quote the words
        raise UsageError(
            "This is not a mnemonic",
            hint="A mnemonic has 12, 15, 18, 21 or 24 English words; check the order and spelling.",
        ) from None
    return _write(Path(path), account, password, light=light)


def import_keystore(path: str | Path, source: str | Path, password: str) -> LocalAccount:
    """Copy another program's keystore file to a new file, after decrypting it with its password.

    The copy states the address of the key, which may differ from the source's.
    """
    body = _read(Path(source))[0]  # read once: it may be a pipe
    account = _decrypted(source, body, password)
    write_secret(Path(path), json.dumps(body | {"address": account.address[2:].lower()}))
    return account


def list_wallets(folder: str | Path) -> list[Wallet]:
    """Return the keystore files of a folder, sorted by name; other files are skipped."""
    wallets = []
    directory = Path(folder)
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        # File names differ by program: alice.json, UTC--2026-... of geth, no extension with cast.
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            wallets.append(Wallet(path, stated_address(path)))
        except (UsageError, NotFoundError):
            continue
    return wallets


def stated_address(path: str | Path) -> str:
    """Return the address that a keystore file states, "" for none; only the key proves it.

    Raises:
        NotFoundError: The file does not exist.
        UsageError: It is not a keystore (v3).
    """
    body = _read(Path(path))[0]
    _check_keystore(Path(path), body)
    return _stated_address(body)


class AddressBook:
    """A cache of the addresses of opened keystore files, to ask for each password only once.

    A file is identified by the SHA-256 of its content, so that any change invalidates its entry.
    If the cache's own file is unusable, nothing is cached.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def address_of(
        self,
        wallet: str | Path,
        password_file: str | Path | None = None,
        prompt: Prompt | None = None,
    ) -> str:
        """Return the address of a keystore's key; the wallet is opened only the first time.

        Raises the errors of `load_account`.
        """
        if known := self.known_address(wallet):
            return known
        account = load_account(wallet, password_file, prompt)
        self.remember(wallet, account)
        return account.address

    def known_address(self, wallet: str | Path) -> str:
        """Return the address of a file that was opened before; "" for another file."""
        known = self._known().get(_read(Path(wallet))[1])
        return to_checksum_address(known) if is_address(known) else ""

    def remember(self, wallet: str | Path, account: LocalAccount) -> None:
        """Record the account of a keystore file that was opened or written."""
        digest, known = _read(Path(wallet))[1], self._known()
        if known.get(digest) == account.address:
            return
        entries = list((known | {digest: account.address}).items())[-_MAX_KNOWN:]
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_text(json.dumps(dict(entries)))
            temporary.replace(self._path)

    def _known(self) -> dict[str, Any]:
        try:
            with self._path.open("rb") as file:
                known = from_json(file.read(MAX_BYTES))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def load_account(
    path: str | Path, password_file: str | Path | None = None, prompt: Prompt | None = None
) -> LocalAccount:
    """Open a wallet.

    The password is read from `password_file`, or from the file named by DEEPSQUARE_PASSWORD_FILE,
    or from `prompt`, which by default asks on a terminal only.

    Raises:
        NotFoundError: The wallet or password file does not exist.
        NotAuthorisedError: The password is wrong, or there is no terminal to ask for it.
        UsageError: A file is invalid, or its permissions are too open.
    """
    body = _read(Path(path))[0]
    _check_keystore(Path(path), body)
    return _unlocked(path, body, read_password(path, password_file, prompt))


def unlock(path: str | Path, password: str) -> LocalAccount:
    """Open a wallet with a given password; raises the errors of `load_account`."""
    return _unlocked(path, _read(Path(path))[0], password)


def _unlocked(path: str | Path, body: dict[str, Any], password: str) -> LocalAccount:
    """Decrypt a keystore's account; reject one that states another address than its key's."""
    account = _decrypted(path, body, password)
    stated = _stated_address(body)
    if stated and stated != account.address:
        raise UsageError(
            f"The wallet {path} states the address {stated}, but its key is that of "
            f"{account.address}",
            hint=f"`deepsquare wallet import NEW --from {path}` makes a wallet of the key's own "
            "address.",
        )
    return account


def _stated_address(body: dict[str, Any]) -> str:
    address = body.get("address")
    return to_checksum_address(address) if is_address(address) else ""


def _decrypted(path: str | Path, body: dict[str, Any], password: str) -> LocalAccount:
    _check_keystore(Path(path), body)
    try:
        key = Account.decrypt(body, password)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        if "mac" in str(error).lower():
            raise NotAuthorisedError(
                f"The password does not open the wallet {path}",
                hint="Try again, or check the content of the password file.",
            ) from None
        raise UsageError(f"{path} is not a usable wallet (keystore v3)", hint=_BACKUP) from None
    account: LocalAccount = Account.from_key(key)
    return account


def read_password(
    path: str | Path, password_file: str | Path | None = None, prompt: Prompt | None = None
) -> str:
    """Return the password of a wallet, without one trailing newline.

    Raises the errors of `load_account`.
    """
    source = password_file or os.environ.get(PASSWORD_FILE_VARIABLE)
    if source:
        return read_secret(Path(source), "password file")
    if prompt is None and not sys.stdin.isatty():
        raise NotAuthorisedError(
            f"The wallet {path} needs its password, and there is no terminal to prompt for it",
            hint=f"Set {PASSWORD_FILE_VARIABLE} to a file that contains it.",
        )
    return (prompt or ask_hidden)(f"Password of {path}: ")


def ask_hidden(text: str) -> str:
    """Prompt on the terminal for a secret, without echo; Ctrl-C raises KeyboardInterrupt."""
    with interruptible():
        return getpass.getpass(text)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt at once, for a prompt in a coroutine.

    asyncio only cancels the task at Ctrl-C, which a blocking read does not notice. Works in the main
    thread only; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def read_key(path: str | Path) -> str:
    """Read a private key or mnemonic from a private file; the caller validates it.

    Raises:
        NotFoundError: The file does not exist.
        UsageError: It can't be read, is not text, or other users can read it.
    """
    return read_secret(Path(path), "key file")


def read_secret(path: Path, file_kind: str) -> str:
    """Read a secret from a private file, without one trailing newline.

    `file_kind` is the kind of file for error messages.

    Raises:
        NotFoundError: The file does not exist.
        UsageError: It can't be read, is not text, or other users can read it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(MAX_BYTES)
    except FileNotFoundError:
        hint = "Check the path of the key file."
        if file_kind == "password file":
            hint = f"Set {PASSWORD_FILE_VARIABLE} to one, or unset it to be prompted."
        raise NotFoundError(f"There is no {file_kind} {path}", hint=hint) from None
    except OSError as error:
        raise UsageError(
            f"The {file_kind} {path} can't be read: {error.strerror}", hint="Check its permissions."
        ) from None
    if stat.S_ISREG(mode) and mode & 0o077:
        raise UsageError(
            f"The {file_kind} {path} is readable by other users", hint=f"chmod 600 {path}"
        )
    try:
        # Some editors write a byte order mark first.
        return raw.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise UsageError(
            f"The {file_kind} {path} is not UTF-8 text",
            hint=f"It must contain only the {file_kind.removesuffix(' file')}, on one line.",
        ) from None


def _write(path: Path, account: LocalAccount, password: str, *, light: bool) -> LocalAccount:
    if not password:
        raise UsageError("A wallet needs a password that is not empty")
    body = Account.encrypt(
        account.key, password, kdf="scrypt", iterations=_LIGHT if light else _STRONG
    )
    write_secret(path, json.dumps(body))
    return account


def write_secret(path: Path, text: str, file_kind: str = "wallet") -> None:
    """Write a new private file with fsync; `file_kind` is the kind of file for error messages.

    Raises:
        UsageError: The file exists (it is never overwritten), or can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(
            f"{path} already exists, and a {file_kind} is never overwritten",
            hint="Choose another name.",
        ) from None
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Return a keystore's body, and the SHA-256 of its content."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(
            f"There is no wallet at {path}",
            hint="Create one with `deepsquare wallet new`, or give --keystore.",
        ) from None
    except OSError as error:
        raise UsageError(
            f"The wallet {path} can't be read: {error.strerror}", hint="Check its permissions."
        ) from None
    try:
        text = raw.removeprefix(codecs.BOM_UTF8)
        body = from_json(text, allow_inf_nan=False) if len(raw) <= MAX_BYTES else None
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UsageError(f"{path} is not a wallet (keystore v3)", hint=_BACKUP)
    # The digest does not depend on the layout of the JSON.
    canonical = json.dumps(body, sort_keys=True).encode()
    return body, hashlib.sha256(canonical).hexdigest()


def _check_keystore(path: Path, body: dict[str, Any]) -> None:
    """Reject an invalid keystore, and one whose key derivation takes too much memory or time.

    Raises:
        UsageError: It is rejected.
    """
    crypto = body.get("crypto", body.get("Crypto"))
    params = crypto.get("kdfparams") if isinstance(crypto, dict) else None
    cipher = crypto.get("cipher") if isinstance(crypto, dict) else None
    if body.get("version") != 3 or cipher != "aes-128-ctr" or not isinstance(params, dict):
        raise UsageError(f"{path} is not a wallet (keystore v3)", hint=_BACKUP)
    costs = [params.get(name, 1) for name in ("n", "r", "p", "c")]
    if not all(type(value) is int and value > 0 for value in costs):
        raise UsageError(f"{path} is not a wallet (keystore v3)", hint=_BACKUP)
    n, r, p, rounds = costs
    if params.get("dklen") != 32:  # the only valid length; a longer one takes hours to derive
        raise UsageError(f"{path} is not a wallet (keystore v3)", hint=_BACKUP)
    if 128 * n * r * p > _MAX_SCRYPT_BYTES or rounds > _MAX_ROUNDS:
        raise UsageError(
            f"The wallet {path} has key derivation parameters that are too expensive", hint=_BACKUP
        )
