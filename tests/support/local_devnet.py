"""Fixtures: a devnet in a folder, and commands that run in this process."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deepsquare_chain.chain.wallet import import_key, unlock
from deepsquare_chain.cli import main
from tests.support.anvil import has_anvil
from tests.support.cli import Outcome, devnet

Cli = Callable[..., Outcome]


def make_light(keystore: Path, password_file: Path) -> None:
    """Encrypt a wallet again with the light scrypt parameters: decrypting takes milliseconds.

    With the strong ones each command that signs takes a second of CPU time.
    """
    password = password_file.read_text().strip()
    key = bytes(unlock(keystore, password).key)
    keystore.unlink()
    import_key(keystore, key, password, light=True)


@dataclass(frozen=True)
class LocalDevnet:
    """A devnet, and the working folder of commands that use it."""

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        """URL of the devnet's node."""
        settings = tomllib.loads((self.folder / ".deepsquare.toml").read_text())
        return str(settings["endpoint"])

    @property
    def password_file(self) -> Path:
        """Password file of the customer, whose settings are those of the folder."""
        return self.folder / ".deepsquare" / "alice" / "password"

    @property
    def wallets(self) -> Path:
        return self.folder / ".deepsquare" / "wallets"


@pytest.fixture(scope="module")
def local_devnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDevnet]:
    """A devnet on anvil where it is installed: the embedded chain takes more CPU time."""
    folder = tmp_path_factory.mktemp("devnet")
    with devnet(folder, "--no-explorer", "--chain", "anvil" if has_anvil() else "embedded"):
        record = json.loads((folder / ".deepsquare" / "deployment.json").read_text())
        yield LocalDevnet(folder, record)


@pytest.fixture
def pending(local_devnet: LocalDevnet) -> LocalDevnet:
    """The devnet, from now on with a block per second only: transactions are pending until then."""
    if has_anvil():
        body = {"jsonrpc": "2.0", "id": 1, "method": "evm_setIntervalMining", "params": [1]}
        assert "error" not in httpx2.post(local_devnet.endpoint, json=body).json()
    return local_devnet


def commands_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """Return a function that runs commands in a folder and in this process.

    That takes a tenth of the CPU time of a process. An exception that a process would print as a
    traceback is raised.
    """

    def call(*arguments: str) -> Outcome:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        output = capsys.readouterr()
        return Outcome(int(exit_info.value.code or 0), output.out, output.err)

    return call


@pytest.fixture
def cli(
    local_devnet: LocalDevnet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """Runs commands in the devnet's folder and in this process."""
    return commands_in(local_devnet.folder, monkeypatch, capsys)
