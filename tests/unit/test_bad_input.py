"""Ten thousand bad inputs: each is accepted, or refused with its name and the next step.

Valid samples are mutated at random with a seed, as if a person, a disk, a customer or a node had
changed them. The only exception allowed is a `GridError`; any other is a defect.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from sqlalchemy import Connection
from web3 import AsyncWeb3
from web3.exceptions import BlockNotFound, TransactionNotFound, Web3RPCError
from web3.middleware import AttributeDictMiddleware, ExtraDataToPOAMiddleware

from deepsquare_chain.chain import wallet
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import Event, decode_log, decode_logs
from deepsquare_chain.chain.follower import Batch, Follower, ReorgTooDeepError
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.endpoint import CheckedProvider
from deepsquare_chain.chain.rpc.responses import InvalidResultError, checked
from deepsquare_chain.chain.wallet import load_account
from deepsquare_chain.errors import EndpointError, GridError, JobFileError, UsageError
from deepsquare_chain.executors.local import Runs
from deepsquare_chain.executors.rundir import RunFolder
from deepsquare_chain.indexer.queries import decode_cursor, encode_cursor
from deepsquare_chain.settings import Settings, load_settings
from deepsquare_chain.store.database import Store
from deepsquare_chain.workflow import Definition, load_job_file
from tests.support.fakechain import FakeChain
from tests.support.mutate import STRANGERS, WORDS, mutated_bytes, mutated_tree
from tests.unit.test_follower import CREDIT, IDENTITY, log
from tests.unit.test_workflow_hostile import VALID

#: Number of inputs of each kind; every test below runs exactly this number.
CASES = {
    "job file": 2_200,
    "definition": 1_500,
    "configuration file": 1_200,
    "environment": 600,
    "deployment record": 1_300,
    "keystore": 700,
    "password file": 200,
    "node answer": 1_500,
    "log": 1_800,
    "follower": 300,
    "run record": 500,
    "page cursor": 400,
}
A = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
HASH = "0x" + "ab" * 32
RECORD = {
    "format": 1,
    "chain_id": 1337,
    "credit": A,
    "registry": A,
    "scheduler": A,
    "treasury": A,
    "block": 12,
    "transactions": {"Credit": HASH},
    "constructor_args": {"Credit": {"admin": A}},
    "compiler_digest": "ab",
    "extra": {"faucet": "http://127.0.0.1:1"},
}
CONFIG = b"""\
endpoint = ["http://127.0.0.1:8545", "https://other.example/key"]
deployment = "deployment.json"
confirmations = 2
poll_interval = 0.5
max_fee_gwei = 100.0
health_port = 9000
log_level = "debug"
log_format = "json"
"""


def rng_of(kind: str) -> random.Random:
    return random.Random(kind)


def refused(act: Callable[[], object], kind: type[GridError], *names: str) -> bool:
    """Return whether it was refused; checks that the message names the input and the next step."""
    rejection: GridError | None = None
    try:
        act()
    except kind as error:
        rejection = error
    if rejection is None:
        return False
    assert any(name in rejection.message for name in names), rejection.message
    assert rejection.hint, rejection.message
    assert len(rejection.message) < 5_000
    message = rejection.message + rejection.hint
    assert message.replace("\n", "").isprintable(), rejection.message
    return True


def test_there_are_ten_thousand_inputs() -> None:
    assert sum(CASES.values()) >= 10_000


def test_job_files(tmp_path: Path) -> None:
    rng, path = rng_of("job file"), tmp_path / "job.yaml"
    count = 0
    for _ in range(CASES["job file"]):
        path.write_bytes(mutated_bytes(VALID, rng))
        count += refused(lambda: load_job_file(path), JobFileError, str(path))
    assert CASES["job file"] // 3 < count < CASES["job file"], "most are refused, some are valid"


def test_definitions() -> None:
    rng = rng_of("definition")
    tree = {
        "env": {"A": "b"},
        "resources": {"tasks": 1, "cpusPerTask": 2, "memPerCpu": 64, "gpus": 0},
        "steps": [{"name": "only", "run": {"command": "true", "env": {}}}],
        "version": 1,
    }
    text = Definition.from_bytes(valid_definition()).to_bytes()
    for number in range(CASES["definition"]):
        if number % 2:
            data = mutated_bytes(text, rng)
        else:
            data = json.dumps(mutated_tree(json.loads(text) or tree, rng)).encode()
        refused(lambda data=data: Definition.from_bytes(data), JobFileError, "definition ")


def valid_definition() -> bytes:
    path = Path(__file__).parents[2] / "examples"
    result = next(iter(sorted(path.glob("*.y*ml"))))
    return load_job_file(result).definition.to_bytes()


@pytest.fixture
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("DEEPSQUARE_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("_no_variables")
def test_configuration_files(tmp_path: Path) -> None:
    rng, path = rng_of("configuration file"), tmp_path / ".deepsquare.toml"
    for number in range(CASES["configuration file"]):
        if number % 3:
            path.write_bytes(mutated_bytes(CONFIG, rng))
        else:
            key = rng.choice(list(Settings.model_fields))
            value = json.dumps(rng.choice([item for item in STRANGERS if item is not None]))
            path.write_text(f"{key} = {value}\n", errors="replace")
        refused(
            lambda: load_settings(project_dir=tmp_path, user_config=tmp_path / "none"),
            UsageError,
            str(path),
        )


@pytest.mark.usefixtures("_no_variables")
def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = rng_of("environment")
    for _ in range(CASES["environment"]):
        variable = f"DEEPSQUARE_{rng.choice(list(Settings.model_fields)).upper()}"
        value = rng.choice(
            [str(item) for item in STRANGERS] + [item.decode("latin1") for item in WORDS]
        )
        monkeypatch.setenv(variable, value.replace("\x00", "").encode("utf-8", "replace").decode())
        refused(
            lambda: load_settings(project_dir=tmp_path, user_config=tmp_path / "none"),
            UsageError,
            variable,
        )
        monkeypatch.delenv(variable)


def test_deployment_records(tmp_path: Path) -> None:
    rng, path = rng_of("deployment record"), tmp_path / "deployment.json"
    for number in range(CASES["deployment record"]):
        whole = json.dumps(RECORD).encode()
        path.write_bytes(
            mutated_bytes(whole, rng)
            if number % 2
            else json.dumps(mutated_tree(RECORD, rng)).encode()
        )
        refused(lambda: Deployment.load(path), UsageError, str(path))


def test_keystores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The pauses after a wrong password are too long for a test.
    monkeypatch.setattr(wallet, "_MAX_SCRYPT_BYTES", 2**16)
    monkeypatch.setattr(wallet, "_MAX_ROUNDS", 100)
    rng, path, password = rng_of("keystore"), tmp_path / "wallet.json", tmp_path / "password"
    password.write_text("secret")
    password.chmod(0o600)
    good = Account.encrypt("0x" + "11" * 32, "secret", kdf="scrypt", iterations=2)
    for number in range(CASES["keystore"]):
        whole = json.dumps(good).encode()
        path.write_bytes(
            mutated_bytes(whole, rng)
            if number % 2
            else json.dumps(mutated_tree(good, rng)).encode()
        )
        refused(lambda: load_account(path, password), GridError, str(path))


def test_password_files(tmp_path: Path) -> None:
    rng, path, password = rng_of("password file"), tmp_path / "wallet.json", tmp_path / "password"
    good = Account.encrypt("0x" + "11" * 32, "secret", kdf="scrypt", iterations=2)
    path.write_text(json.dumps(good))
    password.touch(0o600)
    for _ in range(CASES["password file"]):
        data = mutated_bytes(b"secret\n", rng)
        password.write_bytes(data)
        opens = data.removesuffix(b"\n").removesuffix(b"\r") == b"secret"
        names = (str(path), str(password))
        assert refused(lambda: load_account(path, password), GridError, *names) is not opens


# ------------------------------------------------------------------------------- from a node

BLOCK = {
    "number": "0x10",
    "hash": HASH,
    "parentHash": HASH,
    "timestamp": "0x65",
    "gasLimit": "0x1",
    "gasUsed": "0x0",
    "baseFeePerGas": "0x7",
    "extraData": "0x",
    "miner": A,
    "size": "0x1",
    "logsBloom": "0x00",
    "difficulty": "0x0",
    "nonce": "0x0000000000000000",
    "uncles": [],
    "transactions": [HASH],
    "stateRoot": HASH,
    "mixHash": HASH,
}
LOG = {
    **log(7),
    "blockNumber": "0x10",
    "blockHash": HASH,
    "transactionHash": HASH,
    "logIndex": "0x0",
    "transactionIndex": "0x0",
    "removed": False,
}
RECEIPT = {
    "transactionHash": HASH,
    "blockHash": HASH,
    "blockNumber": "0x10",
    "gasUsed": "0x5208",
    "status": "0x1",
    "logs": [LOG],
    "from": A,
    "to": A,
    "contractAddress": None,
    "type": "0x2",
    "effectiveGasPrice": "0x7",
    "cumulativeGasUsed": "0x5208",
    "transactionIndex": "0x0",
}
FEES = {
    "oldestBlock": "0x1",
    "baseFeePerGas": ["0x7", "0x8"],
    "gasUsedRatio": [0.5],
    "reward": [["0x1"]],
}
QUESTIONS: list[tuple[Any, Callable[[AsyncWeb3[Any]], Any]]] = [
    ("0x10", lambda w3: w3.eth.block_number),
    ("0x539", lambda w3: w3.eth.chain_id),
    ("0x1", lambda w3: w3.eth.get_transaction_count(A)),
    (BLOCK, lambda w3: w3.eth.get_block("latest")),
    (BLOCK, lambda w3: w3.eth.get_block(16)),
    (RECEIPT, lambda w3: w3.eth.get_transaction_receipt(HASH)),
    ([LOG], lambda w3: w3.eth.get_logs({"address": A})),
    (FEES, lambda w3: w3.eth.fee_history(1, "latest", [50])),
    ("0x" + "00" * 32, lambda w3: w3.eth.call({"to": A, "data": "0x"})),
    ("0x5208", lambda w3: w3.eth.estimate_gas({"to": A, "from": A})),
    (HASH, lambda w3: w3.eth.send_raw_transaction("0x02")),
    ([LOG], lambda w3: ask_all(w3, [("eth_getLogs", [{}])])),
]


class FaultyProvider(CheckedProvider):
    """A web3 provider with a chosen response, with the right id or another one."""

    result: Any = None
    rng = rng_of("node answer")

    async def _post(self, body: bytes) -> Any:
        request = json.loads(body)
        single = request[0] if isinstance(request, list) else request
        answer = {"jsonrpc": "2.0", "id": single["id"], "result": self.result}
        answer = [answer] if isinstance(request, list) else answer
        if self.rng.random() < 0.2:
            answer = mutated_tree(answer, self.rng)
        return answer


async def test_node_answers() -> None:
    provider = FaultyProvider("http://127.0.0.1:1")
    w3: AsyncWeb3[Any] = AsyncWeb3(
        provider,
        middleware=[
            (AttributeDictMiddleware, "attrdict"),
            (ExtraDataToPOAMiddleware, "extradata"),
        ],
    )
    for sample, ask in QUESTIONS:
        provider.result, provider.rng = sample, random.Random(3)  # a seed that changes nothing
        provider.rng.random = lambda: 1.0  # type: ignore[method-assign]
        await ask(w3)
    provider.rng = rng_of("node answer")
    fair, messages = 0, list[str]()
    for number in range(CASES["node answer"]):
        sample, ask = QUESTIONS[number % len(QUESTIONS)]
        provider.result = mutated_tree(sample, provider.rng)
        if not isinstance(sample, dict | list):
            provider.result = provider.rng.choice(STRANGERS)
        try:
            await ask(w3)
            fair += 1
        except EndpointError as error:
            messages.append(error.message)
        except (BlockNotFound, TransactionNotFound, Web3RPCError):
            pass  # errors that callers handle
    assert fair > 50
    assert len(messages) > CASES["node answer"] // 2
    assert all("127.0.0.1:1" in words and len(words) < 1_000 for words in messages)


def test_logs() -> None:
    rng, read = rng_of("log"), 0
    for number in range(CASES["log"]):
        result = decode_log(mutated_tree(LOG, rng))
        read += result is not None
        if number % 8 == 0:
            decode_logs([LOG, mutated_tree(LOG, rng), LOG])
    assert 20 < read < CASES["log"] // 2
    assert decode_log(LOG) is not None


class DamagingChain(FakeChain):
    """A chain whose node sometimes damages a response in a batch."""

    rng: random.Random | None = None

    async def make_batch_request(self, requests: list[Any]) -> Any:
        answers = await super().make_batch_request(requests)
        if self.rng is None or self.rng.random() < 0.3:
            return answers
        altered = []
        for (method, _), item in zip(requests, answers, strict=True):
            result = mutated_tree(item.get("result"), self.rng)
            try:
                result = checked(method, result)  # as the connection does
            except InvalidResultError:
                raise EndpointError(f"an invalid response to {method}") from None
            altered.append({**item, "result": result} if "result" in item else item)
        return altered


async def test_a_follower_loses_no_event() -> None:
    """After damaged responses for a while, each event is stored once."""
    chain, rng, events = DamagingChain(), rng_of("follower"), list[Event]()

    def apply(batch: Batch, _: Connection) -> None:
        if batch.rolled_back_to is not None:
            events[:] = [event for event in events if event.block_number <= batch.rolled_back_to]
        events.extend(batch.events)

    with Store.open(None, **IDENTITY) as store:
        follower = Follower(chain, [CREDIT], store, start_block=1, confirmations=0)  # type: ignore[arg-type]
        for number in range(CASES["follower"]):
            chain.mine([log(number)])
            chain.rng = rng
            try:
                await follower.poll(apply)
            except (EndpointError, ReorgTooDeepError):
                pass
            finally:
                chain.rng = None
    amounts = [event.amount for event in events]  # type: ignore[attr-defined]
    assert amounts == sorted(set(amounts)), "in order, each once"
    assert len(amounts) > CASES["follower"] // 2


# --------------------------------------------------------------------- what a job can spoil


def test_run_records(tmp_path: Path) -> None:
    """A job can damage its own folder: its run is then unknown or ended, and nothing crashes."""
    rng = rng_of("run record")
    records = {
        "exit.json": {
            "code": 0,
            "reason": "exited",
            "seconds": 1,
            "started_at": 1.0,
            "ended_at": 2.0,
        },
        "control.json": {"walltime": 5, "cancel": False},
        "job.json": {"pid": 2**22, "ticks": 1, "boot": "x", "started_at": 1.0, "started": 1.0},
        "spec.json": {"key": "k", "env": {}, "walltime": 5, "cpus": 1, "memory": 1, "gpus": 0},
        "supervisor.json": {"pid": 2**22, "ticks": 1, "boot": "x", "token": "t", "since": 1.0},
    }
    runs = Runs(tmp_path / "runs")
    for number in range(CASES["run record"]):
        folder = RunFolder(runs.path / f"run-{number}")
        folder.path.mkdir()
        altered_record = rng.choice(list(records))
        for name, record in records.items():
            text = json.dumps(
                mutated_tree(record, rng) if name == altered_record else record
            ).encode()
            (folder.path / name).write_bytes(
                mutated_bytes(text, rng) if name == altered_record and number % 2 else text
            )
        runs.poll(folder.key)
    assert len(runs.keys()) == CASES["run record"]


def test_page_cursors() -> None:
    rng = rng_of("page cursor")
    for _ in range(CASES["page cursor"]):
        good = encode_cursor("jobs", [2**40, 7])
        text = mutated_bytes(good.encode(), rng).decode("latin1")
        refused(lambda text=text: decode_cursor("jobs", text, 2), UsageError, text[:10], "cursor")
