"""scripts/deploy.py as a user runs it: refusals in plain words, interruptions, and the record."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.chain.bindings.contracts import APPROVER_ROLE, METASCHEDULER_ROLE, Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.connection import connected
from deepsquare_chain.chain.wallet import PASSWORD_FILE_VARIABLE, import_key
from deepsquare_chain.devnet.node.base import Node, dev_accounts
from deepsquare_chain.faults import VARIABLE

SCRIPT = Path(__file__).parents[2] / "scripts" / "deploy.py"
DEPLOYER = dev_accounts()[7]  # nobody else's in the shared tests


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("deploy_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Shell:
    """A folder with a wallet, a node's address, and the script."""

    folder: Path
    url: str
    capture: pytest.CaptureFixture[str]

    async def run(self, *options: str) -> tuple[int, Any, str]:
        """In this process: exit code, document on stdout, text on stderr."""
        self.capture.readouterr()
        arguments = ["--endpoint", self.url, *options]
        code = await asyncio.to_thread(_script().main, arguments)
        out, err = self.capture.readouterr()
        return code, json.loads(out) if out else None, err

    async def deploy(self, *options: str) -> tuple[int, Any, str]:
        """The same with the wallet."""
        return await self.run(*_WALLET, "--demo", *options)

    async def killed(self, crash: str) -> int:
        """A process of its own that dies at a label; its exit code."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(SCRIPT), "--endpoint", self.url, *_WALLET, "--demo"),
            stdout=asyncio.subprocess.DEVNULL,
            cwd=self.folder,
            env={**os.environ, VARIABLE: crash},
        )
        return await asyncio.wait_for(process.wait(), 120)


@pytest.fixture
def shell(
    tmp_path: Path,
    node: Node,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PASSWORD_FILE_VARIABLE, raising=False)
    import_key(tmp_path / "w.json", bytes(DEPLOYER.key), "secret", light=True)
    for name, text in (("password", "secret"), ("wrong", "no")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    return Shell(tmp_path, node.url, capsys)


async def test_deployed_and_verified(shell: Shell, node: Node) -> None:
    other = dev_accounts()[8].address
    code, document, errors = await shell.deploy(
        *("--treasury", other, "--scheduler", other, "--fee-bps", "300", "--record", "r.json")
    )
    assert (code, errors) == (0, "")
    assert document["ok"]
    deployment = Deployment.load(shell.folder / "r.json")
    assert document["deployment"]["scheduler"] == deployment.scheduler
    assert deployment.constructor_args["MetaScheduler"]["feeBps"] == 300
    assert set(deployment.transactions) >= {"Credit", "ProviderRegistry", "MetaScheduler"}
    assert deployment.compiler_digest
    async with connected(node.url, contracts=deployment.addresses) as w3:
        contracts = Contracts(w3, deployment)
        assert await contracts.scheduler.has_role(METASCHEDULER_ROLE, other)
        assert not await contracts.scheduler.has_role(METASCHEDULER_ROLE, DEPLOYER.address)
        assert await contracts.registry.has_role(APPROVER_ROLE, DEPLOYER.address)
        assert (await contracts.scheduler.parameters()).treasury == other
    # What the record says is compared, not only that something is there.
    body = json.loads((shell.folder / "r.json").read_text())
    body["treasury"] = DEPLOYER.address
    (shell.folder / "r.json").write_text(json.dumps(body))
    code, document, errors = await shell.run("--verify-only", "--record", "r.json")
    assert code == 10
    assert not document["ok"]
    assert "treasury" in errors
    body["credit"], body["registry"] = body["registry"], body["credit"]
    (shell.folder / "r.json").write_text(json.dumps(body))
    code, _, errors = await shell.run("--verify-only", "--record", "r.json")
    assert code == 10
    assert "other code" in errors


async def test_interrupted_and_started_again(shell: Shell, node: Node) -> None:
    async with connected(node.url) as w3:
        before = await w3.eth.get_transaction_count(DEPLOYER.address)
        for label in ("sender.recorded:2", "sender.receipt:2"):
            assert await shell.killed(label) == -signal.SIGKILL
        code, document, _ = await shell.deploy()
        assert code == 0
        # Four contracts and three roles, whatever was killed in between.
        assert await w3.eth.get_transaction_count(DEPLOYER.address) == before + 7
    assert len(document["deployment"]["transactions"]) == 7
    folder = shell.folder / ".deepsquare"
    # Beside the record only what is known of the wallet's file; nothing of the outbox is left.
    assert sorted(each.name for each in folder.iterdir()) == ["deployment.json", "wallets"]
    code, _, errors = await shell.deploy()
    assert code == 2
    assert "never overwritten" in errors


async def test_refusals(shell: Shell) -> None:
    cases: list[tuple[int, str, tuple[str, ...]]] = [
        (4, "no deployment record", ("--verify-only",)),
        (2, "No wallet is set", ()),
        (4, "no wallet at", ("--keystore", "none.json")),
        (8, "no terminal to ask on", ("--keystore", "w.json")),
        (8, "does not open", ("--keystore", "w.json", "--password-file", "wrong")),
        (7, "serves chain", ("--keystore", "w.json", "--chain-id", "5")),
        (2, "fee_bps is 9999", (*_WALLET, "--fee-bps", "9999")),
        (2, "is not a valid treasury", (*_WALLET, "--treasury", "0x12")),
        (2, "is not a valid address of a role holder", (*_WALLET, "--scheduler", "me")),
    ]
    results = [await shell.run(*options) for _, _, options in cases]
    for (code, words, _), (found, document, errors) in zip(cases, results, strict=True):
        assert (found, document) == (code, None), errors
        assert words in errors
        assert "Traceback" not in errors


_WALLET = ("--keystore", "w.json", "--password-file", "password")
