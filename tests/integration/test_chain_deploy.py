"""scripts/deploy.py as a user runs it: refusals in plain words, interruptions, and the record."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from eth_utils.address import to_checksum_address
from hexbytes import HexBytes
from web3.types import RPCEndpoint

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import APPROVER_ROLE, METASCHEDULER_ROLE, Deployment
from deepsquare_chain.chain.deploying import (
    CREATE2_PROXY,
    DEMO_PARAMS,
    read_deployment,
    verify_deployment,
)
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.chain.wallet import PASSWORD_FILE_VARIABLE, import_key
from deepsquare_chain.client.deploy import plan, record
from deepsquare_chain.devnet.node.base import Node, dev_accounts
from deepsquare_chain.errors import UsageError
from deepsquare_chain.faults import VARIABLE
from deepsquare_chain.settings import Settings
from tests.support.anvil import start_anvil

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
    """A folder with a wallet, the URL of a node, and the script."""

    folder: Path
    url: str
    capture: pytest.CaptureFixture[str]

    async def run(self, *options: str) -> tuple[int, Any, str]:
        """Run the script in this process; return exit code, JSON of stdout, and stderr."""
        self.capture.readouterr()
        arguments = ["--endpoint", self.url, *options]
        code = await asyncio.to_thread(_script().main, arguments)
        out, err = self.capture.readouterr()
        return code, json.loads(out) if out else None, err

    async def deploy(self, *options: str) -> tuple[int, Any, str]:
        """Run the script with the wallet."""
        return await self.run(*_WALLET, "--demo", *options)

    async def killed(self, crash: str) -> int:
        """Run the script in a process that dies at a crash point; return its exit code."""
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
    # The record's values are compared, not only the existence of code.
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
    assert "code differs" in errors


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
    # Only the cached address of the wallet is left next to the record, and no outbox.
    assert sorted(path.name for path in folder.iterdir()) == ["deployment.json", "wallets"]
    code, _, errors = await shell.deploy()
    assert code == 2
    assert "never overwritten" in errors


async def test_a_plan_for_another_account_is_carried_out_and_recorded(tmp_path: Path) -> None:
    """A Safe deploys by plain calls: some are executed, the rest is planned again, recorded, verified."""
    owner, scheduler = DEPLOYER.address, dev_accounts()[8].address
    params = replace(DEMO_PARAMS, fee_bps=300, treasury=scheduler, schedulers=(scheduler,))
    record_path = tmp_path / "safe.json"
    async with start_anvil() as anvil:
        settings = Settings(endpoint=anvil.url, deployment=record_path)
        first = await plan(settings, params, owner, salt=7)
        assert [call.to for call in first.calls[:4]] == [CREATE2_PROXY] * 4
        assert {call.to for call in first.calls[4:]} == {
            *(first.deployment.credit, first.deployment.registry, first.deployment.scheduler)
        }
        with pytest.raises(UsageError, match="there is no code"):
            await record(settings, first.deployment.scheduler, None)
        await _carry_out(anvil.url, owner, first.calls[:2])
        repeated_plan = await plan(settings, params, owner, salt=7)
        assert repeated_plan.calls == first.calls[2:]
        await _carry_out(anvil.url, owner, repeated_plan.calls)
        assert (await plan(settings, params, owner, salt=7)).calls == []
        other = await plan(settings, params, owner, salt=8)
        assert other.deployment.scheduler != first.deployment.scheduler
        recorded = await record(settings, first.deployment.scheduler, None)
        assert recorded == Deployment.load(record_path)
        # The record read from the chain equals the plan, plus the transactions.
        assert recorded.constructor_args == json.loads(
            json.dumps(first.deployment.constructor_args)
        )
        assert replace(recorded, **_LEFT_OUT) == replace(first.deployment, **_LEFT_OUT)
        assert set(recorded.transactions) == {"Credit", "ProviderRegistry", "MetaScheduler"}
        assert recorded.block == 1
        async with connected(anvil.url, contracts=recorded.addresses) as w3:
            assert all(finding.ok for finding in await verify_deployment(w3, recorded))
            contracts = Contracts(w3, recorded)
            assert await contracts.scheduler.has_role(METASCHEDULER_ROLE, scheduler)
            assert await contracts.registry.has_role(APPROVER_ROLE, owner)
            with pytest.raises(UsageError, match="no first event"):
                await read_deployment(w3, recorded.scheduler, 6)
            await w3.provider.make_request(RPCEndpoint("anvil_setCode"), [CREATE2_PROXY, "0x"])
        with pytest.raises(UsageError, match="no deterministic deployment proxy"):
            await plan(settings, params, owner, salt=7)


async def _carry_out(url: str, account: str, calls: Sequence[Call]) -> None:
    async with connected(url) as w3:
        for call in calls:
            tx_hash = await w3.eth.send_transaction(
                {"from": to_checksum_address(account), "to": call.to, "data": HexBytes(call.data)}
            )
            assert (await w3.eth.wait_for_transaction_receipt(tx_hash))["status"] == 1


async def test_refusals(shell: Shell) -> None:
    cases: list[tuple[int, str, tuple[str, ...]]] = [
        (4, "no deployment record", ("--verify-only",)),
        (2, "No wallet is configured", ()),
        (4, "no wallet at", ("--keystore", "none.json")),
        (8, "no terminal to prompt for it", ("--keystore", "w.json")),
        (8, "does not open", ("--keystore", "w.json", "--password-file", "wrong")),
        (7, "serves chain", ("--keystore", "w.json", "--chain-id", "5")),
        (2, "fee_bps is 9999", (*_WALLET, "--fee-bps", "9999")),
        (2, "is not a valid treasury", (*_WALLET, "--treasury", "0x12")),
        (2, "is not a valid address of a role holder", (*_WALLET, "--scheduler", "me")),
    ]
    results = [await shell.run(*options) for _, _, options in cases]
    for (code, message, _), (result, document, errors) in zip(cases, results, strict=True):
        assert (result, document) == (code, None), errors
        assert message in errors
        assert "Traceback" not in errors


_LEFT_OUT: Any = {"block": 0, "transactions": {}, "extra": {}}
_WALLET = ("--keystore", "w.json", "--password-file", "password")
