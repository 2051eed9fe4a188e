"""`--gasless` from the command line, on a devnet with the relay that it runs."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import pytest

from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.faults import VARIABLE
from tests.support.cli import EXAMPLES, Outcome, run_forked
from tests.support.local_devnet import Cli, LocalDevnet

HELLO = str(EXAMPLES / "hello.yaml")


def data(result: Outcome) -> Any:
    assert result.code == 0, result
    return json.loads(result.out)


@pytest.fixture
def bob(local_devnet: LocalDevnet) -> tuple[str, ...]:
    """Return the flags for the customer who has credits and no coin."""
    return ("--keystore", str(local_devnet.wallets / "bob.json"))


def balance(cli: Cli, bob: tuple[str, ...]) -> dict[str, Any]:
    results: dict[str, Any] = data(cli("credit", "balance", "-o", "json", *bob))
    return results


def test_a_wallet_without_coin_can_act_as_a_customer(
    cli: Cli, local_devnet: LocalDevnet, bob: tuple[str, ...]
) -> None:
    before = balance(cli, bob)
    assert before["gas"] == "0"
    submission = cli("submit", HELLO, "--array", "2", "--gasless", "--yes", "-o", "json", *bob)
    first, second = (str(item["id"]) for item in data(submission))
    for message in (
        "function",
        "submitJobs",
        "2 jobs named 'hello'",
        "2 credits into escrow",
        "a permit for 2 credits",
        "paid by the relay at http://127.0.0.1:",
        "a relay pays the gas",
    ):
        assert message in submission.err
    topped = cli("job", "topup", first, "1", "--gasless", "--yes", "-o", "json", *bob)
    assert data(topped)["gas_fee"] == "0"
    assert "1 credit into its escrow" in topped.err
    assert cli("job", "cancel", first, second, "--gasless", "--yes", *bob).code == 0
    retry = data(cli("job", "retry", second, "--gasless", "--yes", "-o", "json", *bob))
    assert (retry["name"], retry["status"]) == ("hello", "PENDING")
    assert cli("job", "cancel", str(retry["id"]), "--gasless", "--yes", *bob).code == 0
    parked = cli("credit", "withdraw", "--gasless", "--yes", *bob)
    assert parked.code == 6
    assert "no credits to withdraw" in parked.err
    assert balance(cli, bob) == before
    requests = data(cli("relay", "requests", "-o", "json", *bob))
    assert [item["state"] for item in requests] == ["executed"] * 5
    assert len({item["transaction"] for item in requests}) == 5

    async def sent() -> int:
        account = json.loads((local_devnet.wallets / "bob.json").read_text())["address"]
        async with connected(local_devnet.endpoint) as w3:
            return int(await w3.eth.get_transaction_count(w3.to_checksum_address(account)))

    assert asyncio.run(sent()) == 0


def test_nothing_is_signed_without_confirmation(cli: Cli, bob: tuple[str, ...]) -> None:
    before = balance(cli, bob)
    result = cli("submit", HELLO, "--gasless", *bob)
    assert (result.code, result.out) == (2, "")
    assert "To be signed:" in result.err
    assert "--yes" in result.err
    dry = cli("submit", HELLO, "--gasless", "--dry-run", "-o", "json", *bob)
    assert data(dry)["gas"] == "0"
    assert balance(cli, bob) == before


@pytest.mark.parametrize("crash_at", ["gasless.recorded", "gasless.handed"])
def test_a_gasless_submission_killed_anywhere_pays_once_when_repeated(
    cli: Cli, pending: LocalDevnet, bob: tuple[str, ...], crash_at: str
) -> None:
    """A request that was signed before the kill is sent again, and nothing is signed twice."""
    before = balance(cli, bob)
    signed = len(data(cli("relay", "requests", "-o", "json", *bob)))
    arguments = (
        "submit",
        HELLO,
        "--gasless",
        "--yes",
        "--key",
        f"killed at {crash_at}",
        "-o",
        "json",
    )
    killed = run_forked([*arguments, *bob], pending.folder, 120, **{VARIABLE: crash_at})
    assert killed.code == -signal.SIGKILL, killed
    (job,) = data(cli(*arguments, *bob))
    assert data(cli(*arguments, *bob)) == [job]
    assert len(data(cli("relay", "requests", "-o", "json", *bob))) == signed + 1
    assert cli("job", "cancel", str(job["id"]), "--gasless", "--yes", *bob).code == 0
    assert balance(cli, bob) == before


def test_a_key_is_one_submission_with_and_without_a_relay(cli: Cli, bob: tuple[str, ...]) -> None:
    submit_command = ("submit", HELLO, "--gasless", "--yes", "-o", "json", *bob)
    first = data(cli(*submit_command, "--key", "once"))
    assert data(cli(*submit_command, "--key", "once")) == first
    direct = cli("submit", HELLO, "--key", "once", *bob)
    assert direct.code == 2
    assert "Repeat it with --gasless" in direct.err
    # Conversely, a call that was sent without a relay is not signed for one.
    own_submission = data(cli("submit", HELLO, "--key", "own", "-o", "json"))
    assert (
        data(cli("submit", HELLO, "--key", "own", "--gasless", "--yes", "-o", "json"))
        == own_submission
    )


def test_a_relay_returns_its_terms_and_one_that_is_down_is_reported(
    cli: Cli, local_devnet: LocalDevnet, bob: tuple[str, ...]
) -> None:
    terms = data(cli("relay", "show", "-o", "json"))
    assert terms["open"] is True
    assert terms["url"] == local_devnet.record["extra"]["relay"]
    assert "submitJobs" in terms["functions"]
    missing_relay = ("--relay", "http://127.0.0.1:1")
    result = cli("submit", HELLO, "--gasless", "--yes", *missing_relay, *bob)
    assert result.code == 7
    assert "The relay at http://127.0.0.1:1 can't be reached" in result.err
    assert "without --gasless" in result.err
    assert cli("relay", "show", "--relay", "ftp://x").code == 2
