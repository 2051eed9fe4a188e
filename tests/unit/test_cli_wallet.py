"""Import of a private key: from the owner's file only, never quoted, never as a flag."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from eth_account import Account
from typer.testing import CliRunner, Result

from deepsquare_chain.chain import wallet
from deepsquare_chain.cli.app import app

pytestmark = pytest.mark.unit

KEY = "4c" * 32
SECRET = "a password"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a password file; key derivation is fast."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(wallet, "_STRONG", wallet._LIGHT)
    write(tmp_path / "password", SECRET)
    monkeypatch.setenv(wallet.PASSWORD_FILE_VARIABLE, str(tmp_path / "password"))
    return tmp_path


def write(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def take(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["wallet", "import", "new.json", *arguments])


@pytest.mark.parametrize("text", [KEY, f"0x{KEY}", f"{KEY}\n", f" {KEY} \r\n"])
def test_a_key_file_becomes_a_wallet(folder: Path, text: str) -> None:
    write(folder / "key", text)
    result = take("--key-file", "key")
    assert result.exit_code == 0, result.output
    account = wallet.load_account(folder / "new.json", folder / "password")
    assert account.key == bytes.fromhex(KEY)
    assert account.address == Account.from_key(KEY).address
    assert account.address in result.output
    assert KEY not in result.output


@pytest.mark.parametrize(
    ("text", "mode", "code", "message"),
    [
        (KEY, 0o644, 2, "The key file key is readable by other users"),
        (KEY[:-2] + "zz", 0o600, 2, "This is not a private key"),
        ("", 0o600, 2, "This is not a private key"),
        (b"\xff\xfe", 0o600, 2, "The key file key is not UTF-8 text"),
    ],
)
def test_an_unsafe_key_file_is_refused_without_quoting_it(
    folder: Path, text: str | bytes, mode: int, code: int, message: str
) -> None:
    write(folder / "key", text, mode)
    result = take("--key-file", "key")
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert KEY[:20] not in result.output
    assert not (folder / "new.json").exists()


def test_a_missing_key_file_is_named(folder: Path) -> None:
    result = take("--key-file", "nowhere")
    assert result.exit_code == 4
    assert "There is no key file nowhere" in result.output


def test_two_sources_of_a_key_are_refused(folder: Path) -> None:
    write(folder / "key", KEY)
    result = take("--key-file", "key", "--from", "other.json")
    assert result.exit_code == 2
    assert "--from, --key-file and --mnemonic" in result.output


def test_without_a_terminal_the_possible_options_are_named() -> None:
    result = take()
    assert result.exit_code == 8
    assert "--key-file" in result.output


def test_no_option_takes_a_key() -> None:
    result = take("--key", KEY)
    assert result.exit_code == 2
    assert not Path("new.json").exists()


def test_a_key_or_a_keystore_comes_through_a_pipe(folder: Path) -> None:
    """The key is read from the standard input of a separate process."""

    def pipe(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deepsquare_chain.cli", "wallet", "import", *arguments]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    wallet.import_key(folder / "old.json", KEY, SECRET, light=True)
    keystore = (folder / "old.json").read_text()
    for text, flag, file in ((KEY, "--key-file", "a.json"), (keystore, "--from", "b.json")):
        result = pipe(text, file, flag, "-")
        assert result.returncode == 0, result.stderr
        assert wallet.load_account(file, folder / "password").key == bytes.fromhex(KEY)
    assert pipe("{}", "c.json", "--from", "-").returncode == 2


def show(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["wallet", *arguments])


def test_show_without_the_password_marks_the_address_as_unverified(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = wallet.import_key(folder / "w.json", KEY, SECRET, light=True)
    monkeypatch.delenv(wallet.PASSWORD_FILE_VARIABLE)
    result = show("show", "--keystore", "w.json")
    assert (result.exit_code, account.address in result.output) == (0, True), result.output
    assert "not compared with the key" in result.output
    assert show("list", "-o", "csv", ".").output.rstrip().endswith("w.json,False")
    monkeypatch.setenv(wallet.PASSWORD_FILE_VARIABLE, "password")
    other = wallet.import_key(folder / "other.json", b"\1" * 32, SECRET, light=True)
    assert other.address in show("show", "other.json", "--keystore", "w.json").output
    (folder / "other.json").unlink()
    assert "not compared" not in show("show", "--keystore", "w.json").output
    assert show("list", "-o", "csv", ".").output.rstrip().endswith("w.json,True")


def test_a_list_shows_the_verified_address_of_a_keystore_that_states_none(folder: Path) -> None:
    account = wallet.import_key(folder / "w.json", KEY, SECRET, light=True)
    body = json.loads((folder / "w.json").read_text())
    del body["address"]
    (folder / "w.json").write_text(json.dumps(body))
    assert show("list", "-o", "csv", ".").output.rstrip().endswith(",w.json,False")
    assert show("show", "w.json").exit_code == 0
    assert show("list", "-o", "csv", ".").output.rstrip().endswith(f"{account.address},w.json,True")
    missing = show("list", "nowhere")
    assert (missing.exit_code, "no folder nowhere" in missing.output) == (4, True), missing.output


def test_the_address_of_a_wallet_made_here_is_known_without_its_password(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "key", KEY)
    assert take("--key-file", "key").exit_code == 0
    monkeypatch.delenv(wallet.PASSWORD_FILE_VARIABLE)
    result = show("show", "--keystore", "new.json")
    assert (result.exit_code, "not compared" in result.output) == (0, False), result.output
