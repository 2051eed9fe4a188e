"""Transactions of a wallet from the command line: listed, replaced, and cancelled while pending."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.cli import EXAMPLES, Outcome, devnet, run_forked
from tests.support.local_devnet import Cli, LocalDevnet

HELLO = str(EXAMPLES / "hello.yaml")


def data(result: Outcome) -> Any:
    assert result.code == 0, result
    return json.loads(result.out)


def test_sent_transactions_are_listed_and_shown(cli: Cli) -> None:
    submission = data(cli("submit", HELLO, "--permit", "--key", "nightly", "-o", "json"))
    newest = data(cli("tx", "list", "--limit", "1", "-o", "json"))[0]
    assert newest["transaction"] == submission[0]["transaction"]
    assert (newest["state"], newest["label"], newest["attempts"]) == ("mined", "submit 1 job", 1)
    assert int(newest["fee"]) > 0
    for reference in (str(newest["id"]), newest["transaction"], newest["transaction"].upper()[2:]):
        transaction = data(cli("tx", "show", reference, "-o", "json"))
        assert (transaction["id"], transaction["key"]) == (newest["id"], "submit:nightly")
        assert transaction["succeeded"] is True
        assert [attempt["transaction"] for attempt in transaction["attempts"]] == [
            newest["transaction"]
        ]
    assert "submit 1 job" in cli("tx", "list").out


@pytest.mark.parametrize("verb", ["speed-up", "cancel"])
def test_mined_transactions_can_not_be_replaced(cli: Cli, verb: str) -> None:
    data(cli("submit", HELLO, "--permit", "-o", "json"))
    number = data(cli("tx", "list", "--limit", "1", "-o", "json"))[0]["id"]
    result = cli("tx", verb, str(number))
    assert (result.code, result.out) == (2, "")
    assert "is mined: there is nothing to replace" in result.err


@pytest.mark.parametrize(
    ("reference", "code"),
    [("nonsense", 2), ("-1", 2), ("0x12", 2), ("999999", 4), ("0x" + "ab" * 32, 4)],
)
def test_unknown_transactions_are_refused(cli: Cli, reference: str, code: int) -> None:
    for verb in ("show", "speed-up", "cancel"):
        result = cli("tx", verb, "--", reference)
        assert (result.code, result.out) == (code, "")
        assert "Traceback" not in result.err
        assert "deepsquare tx list" in result.err


class PausedDevnet:
    """A devnet on a real node that mines only on request."""

    def __init__(self, folder: Path) -> None:
        self.local_devnet = LocalDevnet(folder)
        self.rpc("evm_setIntervalMining", 0)
        self.rpc("evm_setAutomine", False)

    def rpc(self, method: str, *params: Any) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return httpx2.post(self.local_devnet.endpoint, json=body, timeout=20).json()["result"]

    def mine(self) -> None:
        self.rpc("evm_mine")

    def run(self, *arguments: str) -> Outcome:
        return run_forked(arguments, self.local_devnet.folder)

    def newest(self) -> Any:
        return data(self.run("tx", "list", "--limit", "1", "-o", "json"))[0]


@pytest.fixture(scope="module")
def paused_devnet(
    tmp_path_factory: pytest.TempPathFactory,
    anvil_binary: Path,
) -> Iterator[PausedDevnet]:
    folder = tmp_path_factory.mktemp("halted")
    with devnet(folder, "--chain", "anvil", "--no-explorer"):
        yield PausedDevnet(folder)


def stuck(paused_devnet: PausedDevnet) -> Any:
    """Send a transfer that stays in the mempool."""
    to = "0x00000000000000000000000000000000000000AA"
    transfer = paused_devnet.run("credit", "transfer", to, "1", "--timeout", "1")
    assert transfer.code == 9, transfer
    waiting = paused_devnet.newest()
    assert waiting["state"] == "open"
    return waiting


def test_a_stuck_transaction_is_outbid_by_an_eighth_and_mined(paused_devnet: PausedDevnet) -> None:
    before = stuck(paused_devnet)
    result = data(paused_devnet.run("tx", "speed-up", str(before["id"]), "-o", "json"))
    first, second = result["attempts"][-2:]
    for fee in ("max_fee_wei", "priority_fee_wei"):
        assert int(second[fee]) * 8 >= int(first[fee]) * 9
    assert (result["nonce"], result["state"]) == (before["nonce"], "open")
    paused_devnet.mine()
    mined = data(paused_devnet.run("tx", "show", str(before["id"]), "-o", "json"))
    assert (mined["state"], mined["transaction"]) == ("mined", second["transaction"])


def test_a_stuck_transaction_is_taken_back_and_has_no_effect(paused_devnet: PausedDevnet) -> None:
    balance = data(paused_devnet.run("credit", "balance", "-o", "json"))["balance"]
    before = stuck(paused_devnet)
    result = paused_devnet.run("tx", "cancel", str(before["id"]), "-o", "json")
    assert "may still be mined first" in result.err
    assert data(result)["attempts"][-1]["cancels"] is True
    paused_devnet.mine()
    transaction = data(paused_devnet.run("tx", "show", str(before["id"]), "-o", "json"))
    assert (transaction["state"], transaction["nonce"]) == ("cancelled", before["nonce"])
    assert data(paused_devnet.run("credit", "balance", "-o", "json"))["balance"] == balance
