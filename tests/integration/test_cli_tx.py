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
    made = data(cli("submit", HELLO, "--permit", "--key", "nightly", "-o", "json"))
    newest = data(cli("tx", "list", "--limit", "1", "-o", "json"))[0]
    assert newest["transaction"] == made[0]["transaction"]
    assert (newest["state"], newest["label"], newest["attempts"]) == ("mined", "submit 1 job", 1)
    assert int(newest["fee"]) > 0
    for which in (str(newest["id"]), newest["transaction"], newest["transaction"].upper()[2:]):
        shown = data(cli("tx", "show", which, "-o", "json"))
        assert (shown["id"], shown["key"]) == (newest["id"], "submit:nightly")
        assert shown["succeeded"] is True
        assert [attempt["transaction"] for attempt in shown["attempts"]] == [newest["transaction"]]
    assert "submit 1 job" in cli("tx", "list").out


@pytest.mark.parametrize("verb", ["speed-up", "cancel"])
def test_mined_transactions_can_not_be_replaced(cli: Cli, verb: str) -> None:
    data(cli("submit", HELLO, "--permit", "-o", "json"))
    number = data(cli("tx", "list", "--limit", "1", "-o", "json"))[0]["id"]
    result = cli("tx", verb, str(number))
    assert (result.code, result.out) == (2, "")
    assert "is mined: there is nothing to replace" in result.err


@pytest.mark.parametrize(
    ("which", "code"),
    [("nonsense", 2), ("-1", 2), ("0x12", 2), ("999999", 4), ("0x" + "ab" * 32, 4)],
)
def test_unknown_transactions_are_refused(cli: Cli, which: str, code: int) -> None:
    for verb in ("show", "speed-up", "cancel"):
        result = cli("tx", verb, "--", which)
        assert (result.code, result.out) == (code, "")
        assert "Traceback" not in result.err
        assert "deepsquare tx list" in result.err


class Halted:
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
def halted(
    tmp_path_factory: pytest.TempPathFactory,
    anvil_binary: Path,
) -> Iterator[Halted]:
    folder = tmp_path_factory.mktemp("halted")
    with devnet(folder, "--chain", "anvil", "--no-explorer"):
        yield Halted(folder)


def stuck(halted: Halted) -> Any:
    """Send a transfer that stays in the mempool."""
    to = "0x00000000000000000000000000000000000000AA"
    sent = halted.run("credit", "transfer", to, "1", "--timeout", "1")
    assert sent.code == 9, sent
    waiting = halted.newest()
    assert waiting["state"] == "open"
    return waiting


def test_a_stuck_transaction_is_outbid_by_an_eighth_and_mined(halted: Halted) -> None:
    before = stuck(halted)
    result = data(halted.run("tx", "speed-up", str(before["id"]), "-o", "json"))
    first, second = result["attempts"][-2:]
    for fee in ("max_fee_wei", "priority_fee_wei"):
        assert int(second[fee]) * 8 >= int(first[fee]) * 9
    assert (result["nonce"], result["state"]) == (before["nonce"], "open")
    halted.mine()
    mined = data(halted.run("tx", "show", str(before["id"]), "-o", "json"))
    assert (mined["state"], mined["transaction"]) == ("mined", second["transaction"])


def test_a_stuck_transaction_is_taken_back_and_has_no_effect(halted: Halted) -> None:
    balance = data(halted.run("credit", "balance", "-o", "json"))["balance"]
    before = stuck(halted)
    result = halted.run("tx", "cancel", str(before["id"]), "-o", "json")
    assert "may still be mined first" in result.err
    assert data(result)["attempts"][-1]["cancels"] is True
    halted.mine()
    ended = data(halted.run("tx", "show", str(before["id"]), "-o", "json"))
    assert (ended["state"], ended["nonce"]) == ("cancelled", before["nonce"])
    assert data(halted.run("credit", "balance", "-o", "json"))["balance"] == balance
