"""Keystores: created, opened and refused; no password or key in any message."""

from __future__ import annotations

import codecs
import io
import json
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account

from deepsquare_chain.chain import wallet as wallets
from deepsquare_chain.chain.wallet import (
    PASSWORD_FILE_VARIABLE,
    AddressBook,
    Wallet,
    create_wallet,
    import_key,
    import_keystore,
    list_wallets,
    load_account,
    read_key,
    stated_address,
    unlock,
)
from deepsquare_chain.cli.frame import ask_yes_no
from deepsquare_chain.client.network import find_own_address, open_account
from deepsquare_chain.errors import GridError, NotAuthorisedError, NotFoundError, UsageError
from deepsquare_chain.settings import Settings

KEY = "4c0883a69102937d6231471b5dbb6204fe5129617082792ae468d01a3f362318"
SECRET = "correct horse"


@pytest.fixture(autouse=True)
def _no_password_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_FILE_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture
def wallet(tmp_path: Path) -> Path:
    import_key(tmp_path / "w.json", KEY, SECRET, light=True)
    return tmp_path / "w.json"


def password_file(folder: Path, text: str | bytes = SECRET + "\n", mode: int = 0o600) -> Path:
    path = folder / "password"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def test_a_new_wallet_opens_with_its_password(tmp_path: Path) -> None:
    keystore = create_wallet(tmp_path / "deep" / "w.json", SECRET, light=True)
    path = tmp_path / "deep" / "w.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert unlock(path, SECRET).address == keystore.address == stated_address(path)
    assert json.loads(path.read_text())["crypto"]["kdfparams"]["n"] == 2**12


def test_the_strong_derivation_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt, prompts = Account.encrypt, []

    def light(key: bytes, password: str, **options: Any) -> Any:
        prompts.append(options)
        return encrypt(key, password, **(options | {"iterations": 2}))

    monkeypatch.setattr(Account, "encrypt", light)  # the strong one takes a second
    create_wallet(tmp_path / "w.json", SECRET)
    assert prompts == [{"kdf": "scrypt", "iterations": 2**18}]


def test_a_wallet_is_never_overwritten(wallet: Path) -> None:
    before = wallet.read_bytes()
    with pytest.raises(UsageError, match="already exists"):
        create_wallet(wallet, SECRET, light=True)
    assert wallet.read_bytes() == before


@pytest.mark.parametrize("key", [KEY, "0x" + KEY, f" {KEY}\n", bytes.fromhex(KEY)])
def test_a_key_is_imported(tmp_path: Path, key: str | bytes) -> None:
    result = import_key(tmp_path / "w.json", key, SECRET, light=True)
    assert result.address == Account.from_key(bytes.fromhex(KEY)).address


@pytest.mark.parametrize("key", ["", "12", "zz" * 32, "00" * 32, "ff" * 32, KEY + "00", b"short"])
def test_an_invalid_key_is_refused_without_quoting_it(tmp_path: Path, key: str | bytes) -> None:
    with pytest.raises(UsageError, match="not a private key") as error:
        import_key(tmp_path / "w.json", key, SECRET, light=True)
    assert not key or str(key) not in str(error.value.__dict__)
    assert error.value.__suppress_context__
    assert not (tmp_path / "w.json").exists()


def test_an_empty_password_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not empty"):
        create_wallet(tmp_path / "w.json", "")
    assert list_wallets(tmp_path) == []


def test_a_wrong_password_names_the_file(wallet: Path) -> None:
    with pytest.raises(NotAuthorisedError) as error:
        unlock(wallet, "battery staple")
    assert str(wallet) in error.value.message
    assert error.value.exit_code == 8
    assert "battery" not in error.value.message


def test_the_password_comes_from_a_file(wallet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = password_file(wallet.parent)
    assert load_account(wallet, path).address == stated_address(wallet)
    monkeypatch.setenv(PASSWORD_FILE_VARIABLE, str(path))
    assert load_account(wallet).address == stated_address(wallet)


def test_only_one_newline_is_dropped(tmp_path: Path) -> None:
    import_key(tmp_path / "w.json", KEY, " spaced \n", light=True)
    load_account(tmp_path / "w.json", password_file(tmp_path, " spaced \n\n"))
    with pytest.raises(NotAuthorisedError):
        load_account(tmp_path / "w.json", password_file(tmp_path, "spaced\n"))


def test_a_password_file_that_others_can_read_is_refused(wallet: Path) -> None:
    for mode in (0o644, 0o640, 0o604):
        with pytest.raises(UsageError, match="readable by other users") as error:
            load_account(wallet, password_file(wallet.parent, mode=mode))
        assert "chmod 600" in error.value.hint


def test_password_files_that_can_not_be_read(wallet: Path) -> None:
    with pytest.raises(NotFoundError, match="no password file"):
        load_account(wallet, wallet.parent / "none")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_account(wallet, password_file(wallet.parent, b"\xff\xfe"))
    with pytest.raises(UsageError, match="can't be read"):
        load_account(wallet, wallet.parent)


def test_without_a_terminal_there_is_no_prompt(wallet: Path) -> None:
    with pytest.raises(NotAuthorisedError, match="no terminal") as error:
        load_account(wallet)
    assert PASSWORD_FILE_VARIABLE in error.value.hint


def test_on_a_terminal_the_prompt_names_the_wallet(
    wallet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    def prompt(text: str) -> str:
        prompts.append(text)
        return SECRET

    assert load_account(wallet, prompt=prompt).address == stated_address(wallet)
    monkeypatch.setattr("getpass.getpass", prompt)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert load_account(wallet).address == stated_address(wallet)
    assert prompts == [f"Password of {wallet}: "] * 2


async def test_ctrl_c_ends_a_prompt_within_a_coroutine_at_once(
    wallet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def prompt(_: str) -> str:
        threads.append(threading.current_thread())
        signal.raise_signal(signal.SIGINT)
        return SECRET  # asyncio's own handler would only cancel the task, which returns first

    monkeypatch.setattr("getpass.getpass", prompt)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: bool(prompt("")))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    signal.signal(signal.SIGINT, lambda *_: None)  # that of asyncio, in a command
    settings = Settings(keystore=wallet, state_dir=wallet.parent)
    try:
        with pytest.raises(KeyboardInterrupt):
            await open_account(settings)
        with pytest.raises(KeyboardInterrupt):
            await find_own_address(settings, None)
        with pytest.raises(KeyboardInterrupt):
            ask_yes_no("Go on?")
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert threads == [threading.main_thread()] * 3


def test_a_missing_wallet() -> None:
    for call in (stated_address, load_account, lambda path: unlock(path, "x")):
        with pytest.raises(NotFoundError, match="no wallet at /nowhere"):
            call("/nowhere/w.json")


def test_other_files_of_a_folder_are_ignored(wallet: Path) -> None:
    (wallet.parent / "a.json").write_text("{}")
    (wallet.parent / "b.json").write_text("no json")
    (wallet.parent / ".c.json").write_text(wallet.read_text())
    assert list_wallets(wallet.parent) == [Wallet(wallet, stated_address(wallet))]
    assert list_wallets(wallet.parent / "none") == []


def test_another_programs_keystore_is_taken_over(tmp_path: Path, wallet: Path) -> None:
    # pbkdf2 is what some wallets write.
    body = Account.encrypt(KEY, SECRET, kdf="pbkdf2", iterations=1_000)
    (tmp_path / "theirs.json").write_text(json.dumps(body))
    import_keystore(tmp_path / "mine.json", tmp_path / "theirs.json", SECRET)
    assert unlock(tmp_path / "mine.json", SECRET).address == stated_address(wallet)
    with pytest.raises(NotAuthorisedError):
        import_keystore(tmp_path / "x.json", tmp_path / "theirs.json", "wrong")
    assert not (tmp_path / "x.json").exists()


def changed(wallet: Path, **changes: Any) -> Path:
    body = json.loads(wallet.read_text())
    crypto = {**body["crypto"], **changes.pop("crypto", {})}
    params = {**crypto["kdfparams"], **changes.pop("kdfparams", {})}
    path = wallet.parent / "changed.json"
    path.write_text(json.dumps({**body, "crypto": {**crypto, "kdfparams": params}, **changes}))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"version": "3"},
        {"crypto": {"cipher": "none"}},
        {"crypto": {"kdf": "none"}},
        {"crypto": {"ciphertext": 5}},
        {"crypto": {"cipherparams": {}}},
        {"kdfparams": {"n": "many"}},
        {"kdfparams": {"n": -1}},
        {"kdfparams": {"r": 0}},
        {"kdfparams": {"salt": "zz"}},
        {"kdfparams": {"n": 3}},
    ],
)
def test_broken_keystores_are_refused(wallet: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(GridError) as error:
        unlock(changed(wallet, **changes), SECRET)
    assert isinstance(error.value, UsageError | NotAuthorisedError)


@pytest.mark.parametrize(
    "params", [{"n": 2**30}, {"n": 2**20, "r": 64}, {"n": 2**18, "p": 1_000}, {"c": 10**12}]
)
def test_a_keystore_that_would_take_all_memory_is_refused(
    wallet: Path, params: dict[str, int]
) -> None:
    with pytest.raises(UsageError, match="too expensive"):
        unlock(changed(wallet, kdfparams=params), SECRET)


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "{}", '{"version": 3}', "[" * 5_000, "x" * 200_000]
)
def test_invalid_keystores_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(UsageError):
        unlock(path, SECRET)
    with pytest.raises(UsageError):
        stated_address(path)


OTHER = "0x90F79bf6EB2c4f870365E785982E1f101E93b906"


def restated(wallet: Path, address: str | None) -> Path:
    """Return the wallet with another address field, or none."""
    body = json.loads(wallet.read_text(encoding="utf-8-sig"))
    del body["address"]
    path = wallet.parent / "restated.json"
    path.write_text(json.dumps(body if address is None else body | {"address": address}))
    return path


@pytest.mark.parametrize("stated", [None, "", 5])
def test_a_keystore_without_an_address_opens_as_its_key(wallet: Path, stated: Any) -> None:
    path = restated(wallet, stated)
    assert stated_address(path) == ""
    assert unlock(path, SECRET).address == stated_address(wallet)
    book = AddressBook(wallet.parent / "book")
    assert book.address_of(path, password_file(wallet.parent)) == stated_address(wallet)


@pytest.mark.parametrize("stated", [OTHER, OTHER[2:].lower(), OTHER.upper().replace("0X", "0x")])
def test_an_address_that_is_not_the_keys_is_never_used(wallet: Path, stated: str) -> None:
    path, secret = restated(wallet, stated), password_file(wallet.parent)
    book = AddressBook(wallet.parent / "book")
    for call in (load_account, book.address_of):
        with pytest.raises(UsageError, match="its key is that of") as error:
            call(path, secret)
        assert stated_address(wallet) in error.value.message
    assert not book.known_address(path)


@pytest.mark.parametrize("stated", [None, OTHER, "nonsense"])
def test_an_imported_keystore_states_the_address_of_its_key(
    wallet: Path, stated: str | None
) -> None:
    path = wallet.parent / "mine.json"
    import_keystore(path, restated(wallet, stated), SECRET)
    assert stated_address(path) == stated_address(wallet) == unlock(path, SECRET).address


def test_an_address_is_known_without_the_password_until_the_file_changes(wallet: Path) -> None:
    book, secret = AddressBook(wallet.parent / "new" / "book"), password_file(wallet.parent)
    with pytest.raises(NotAuthorisedError):
        book.address_of(wallet)
    address = book.address_of(wallet, secret)
    assert book.address_of(wallet) == address
    assert book.known_address(wallet)
    wallet.write_text("\ufeff" + json.dumps(json.loads(wallet.read_text()), indent=1))
    assert book.address_of(wallet) == address
    wallet.write_text(restated(wallet, OTHER).read_text())
    assert not book.known_address(wallet)
    with pytest.raises(NotAuthorisedError):
        book.address_of(wallet)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"%s": 5}', '{"%s": "0x12"}'])
def test_a_damaged_address_cache_is_ignored(wallet: Path, text: str) -> None:
    path = wallet.parent / "book"
    AddressBook(path).address_of(wallet, password_file(wallet.parent))
    (digest,) = json.loads(path.read_text())
    path.write_text(text.replace("%s", digest))
    book = AddressBook(path)
    assert book.address_of(wallet, password_file(wallet.parent)) == stated_address(wallet)
    assert book.address_of(wallet) == stated_address(wallet)


def test_a_byte_order_mark_is_not_part_of_a_password_key_or_wallet(wallet: Path) -> None:
    secret = password_file(wallet.parent, codecs.BOM_UTF8 + SECRET.encode() + b"\r\n")
    wallet.write_bytes(codecs.BOM_UTF8 + wallet.read_bytes())
    account = load_account(wallet, secret)
    assert account.address == stated_address(wallet)
    key_file = wallet.parent / "key"
    key_file.write_bytes(codecs.BOM_UTF8 + KEY.encode())
    key_file.chmod(0o600)
    assert import_key(wallet.parent / "k.json", read_key(key_file), SECRET, light=True) == account


def test_a_mnemonic_gives_the_keys_that_other_wallets_show(tmp_path: Path) -> None:
    """The mnemonic and accounts of every development node."""
    words = "test test test test test test test test test test test junk"
    first = wallets.import_mnemonic(tmp_path / "a.json", f" {words}\n", "pw", light=True)
    second = wallets.import_mnemonic(
        tmp_path / "b.json", words, "pw", derivation="m/44'/60'/0'/0/1", light=True
    )
    assert first.address == "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"
    assert second.address == "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"
    assert wallets.unlock(tmp_path / "b.json", "pw").address == second.address


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ("test test junk", "m/44'/60'/0'/0/0"),
        ("test " * 12, "m/44'/60'/0'/0/0"),
        ("test test test test test test test test test test test junk", "44/60"),
    ],
)
def test_an_invalid_mnemonic_is_refused_without_quoting_it(
    tmp_path: Path, message: str, path: str
) -> None:
    with pytest.raises(UsageError) as error_info:
        wallets.import_mnemonic(tmp_path / "a.json", message, "pw", derivation=path, light=True)
    assert "junk" not in error_info.value.message
    assert not (tmp_path / "a.json").exists()


def test_keystores_of_other_programs_are_listed(tmp_path: Path) -> None:
    keystore = wallets.create_wallet(tmp_path / "own.json", "pw", light=True)
    body = json.loads((tmp_path / "own.json").read_text())
    (tmp_path / f"UTC--2026-11-27T00-00-00Z--{keystore.address[2:].lower()}").write_text(
        json.dumps(body)
    )
    del body["address"]  # as cast writes them
    (tmp_path / "deployer").write_text(json.dumps(body))
    (tmp_path / "password").write_text("pw")
    result = {item.path.name: item.address for item in wallets.list_wallets(tmp_path)}
    assert len(result) == 3
    assert result["deployer"] == ""
    assert set(result.values()) == {"", keystore.address}
    assert (
        wallets.load_account(tmp_path / "deployer", None, lambda _: "pw").address
        == keystore.address
    )
