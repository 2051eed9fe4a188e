"""Submissions from the command line: the payment, the number of transactions, and retries."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain import Grid
from deepsquare_chain.chain.bindings.contracts import MetaSchedulerContract
from deepsquare_chain.chain.rpc.pool import connected
from deepsquare_chain.chain.transactions.outbox import Entry
from deepsquare_chain.chain.wallet import load_account
from deepsquare_chain.client import submission
from deepsquare_chain.faults import VARIABLE
from deepsquare_chain.store.outbox import OutboxTables
from tests.support.cli import EXAMPLES, Outcome, run_forked
from tests.support.local_devnet import Cli, LocalDevnet
from tests.support.signer import ReferenceSigner, serving

HELLO = str(EXAMPLES / "hello.yaml")
PI = str(EXAMPLES / "pi.yaml")


def data(result: Outcome) -> Any:
    assert result.code == 0, result
    return json.loads(result.out)


def credits(cli: Cli) -> int:
    return int(data(cli("credit", "balance", "-o", "json"))["balance"])


def jobs(cli: Cli) -> list[int]:
    return [item["id"] for item in data(cli("job", "list", "-o", "json"))]


async def nonce(local_devnet: LocalDevnet) -> int:
    """Return the number of transactions of alice's wallet."""
    wallet = json.loads((local_devnet.wallets / "alice.json").read_text())
    async with connected(local_devnet.endpoint) as w3:
        return int(await w3.eth.get_transaction_count(w3.to_checksum_address(wallet["address"])))


@pytest.fixture
def count_sent(local_devnet: LocalDevnet) -> Any:
    """How many transactions were sent since the last call."""
    last = asyncio.run(nonce(local_devnet))

    def count() -> int:
        nonlocal last
        before, last = last, asyncio.run(nonce(local_devnet))
        return last - before

    return count


def test_a_job_with_a_start_time_waits_for_it(cli: Cli, local_devnet: LocalDevnet) -> None:
    conditions = "startAfter: 2h\nstartBefore: 3h\npatience: 10m\npreferences: [region=ch]\n"
    (local_devnet.folder / "later.yaml").write_text(Path(HELLO).read_text() + conditions)
    [job] = [item["id"] for item in data(cli("submit", "later.yaml", "-o", "json"))]
    assert "at the earliest" in data(cli("job", "why", str(job), "-o", "json"))["why"]
    # The key of a submission names the same job each time, so its times are absolute.
    repeated = cli("submit", "later.yaml", "--key", "later")
    assert "startAfter and startBefore are relative to the submission" in repeated.err
    assert cli("job", "cancel", str(job)).code == 0


def test_a_job_that_missed_its_start_is_refunded(cli: Cli, local_devnet: LocalDevnet) -> None:
    before = credits(cli)
    (local_devnet.folder / "soon.yaml").write_text(Path(HELLO).read_text() + "startBefore: 1s\n")
    [job] = [item["id"] for item in data(cli("submit", "soon.yaml", "-o", "json"))]
    assert credits(cli) == before - 10**18
    time.sleep(1.5)  # the next block, with the next transaction, comes after the deadline
    assert cli("submit", HELLO).code == 0
    reported = data(cli("job", "why", str(job), "-o", "json"))
    assert "it had to start before" in reported["why"]
    assert "refunds all of its credits" in reported["next"]
    assert cli("job", "cancel", "--unmet").code == 0
    assert credits(cli) == before - 10**18  # the other one


def test_a_dry_run_pays_nothing(cli: Cli, count_sent: Any) -> None:
    before = credits(cli)
    result = cli("submit", HELLO, "--dry-run")
    assert (result.code, result.out) == (0, "")
    assert "Dry run: nothing was sent." in result.err
    assert (credits(cli), count_sent()) == (before, 0)
    reported = data(cli("submit", HELLO, "--array", "2", "--dry-run", "-o", "json"))
    assert (reported["jobs"], reported["total"], reported["total_credits"]) == (
        2,
        str(2 * 10**18),
        "2",
    )
    assert (reported["balance"], reported["approval"]) == (str(before), True)
    assert int(reported["gas"]) > 0
    assert (credits(cli), count_sent()) == (before, 0)


def test_an_approval_takes_two_transactions_and_a_permit_one(cli: Cli, count_sent: Any) -> None:
    assert len(data(cli("submit", HELLO, "-o", "json"))) == 1
    assert count_sent() == 2
    assert len(data(cli("submit", HELLO, "--permit", "-o", "json"))) == 1
    assert count_sent() == 1
    assert data(cli("credit", "balance", "-o", "json"))["allowance"] == "0"


def test_gathered_submissions_are_one_transaction(
    cli: Cli, count_sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the five are ready at different times.
    monkeypatch.setattr(submission, "_GATHER_SECONDS", 3.0)

    async def gather() -> list[int]:
        async with Grid.open() as grid:
            submissions = await asyncio.gather(*(grid.submit(HELLO) for _ in range(5)))
        return [job_id for item in submissions for job_id in item.job_ids]

    before = credits(cli)
    ids = asyncio.run(gather())
    assert len(set(ids)) == 5
    assert credits(cli) == before - 5 * 10**18
    assert count_sent() == 2, "an approval and one submission"


def test_a_wait_without_a_result_is_reported_anyway(cli: Cli) -> None:
    """The jobs are paid for, so their ids are printed for people and programs."""
    waiting = ("submit", HELLO, "--array", "2", "--permit", "--wait", "--wait-timeout", "0")
    result = cli(*waiting)
    second, first = jobs(cli)[:2]
    assert result.code == 9
    assert f"Submitted and paid for: jobs {first}-{second} (sub-" in result.err
    assert f"Job {first} is still PENDING" in result.err
    assert (str(first) in result.out, str(second) in result.out) == (True, True)
    result = cli(*waiting, "-o", "json")
    second, first = jobs(cli)[:2]
    assert (result.code, [item["id"] for item in json.loads(result.out)]) == (9, [first, second])


def test_an_array_is_one_submission(cli: Cli, count_sent: Any) -> None:
    before = credits(cli)
    jobs = data(cli("submit", HELLO, "--array", "3", "--permit", "-o", "json"))
    assert len({item["id"] for item in jobs}) == 3
    assert (before - credits(cli), count_sent()) == (3 * 10**18, 1)


@pytest.mark.parametrize("more", [(), ("--permit",)])
def test_a_repeated_key_pays_once(cli: Cli, count_sent: Any, more: tuple[str, ...]) -> None:
    key = "-".join(["night", *more])
    first = data(cli("submit", HELLO, "--array", "2", "--key", key, *more, "-o", "json"))
    paid, count = credits(cli), len(jobs(cli))
    count_sent()
    # Another way of allowing the credits is still the same submission.
    for flags in (more, (), ("--permit",), ("--dry-run",)):
        result = cli("submit", HELLO, "--array", "2", "--key", key, *flags, "-o", "json")
        assert data(result) == first
        assert "nothing more is paid" in result.err
    assert (credits(cli), len(jobs(cli)), count_sent()) == (paid, count, 0)


def test_a_key_for_other_jobs_is_refused_by_name(cli: Cli, count_sent: Any) -> None:
    cli("submit", HELLO, "--key", "once")
    count_sent()
    for other in ((PI,), (HELLO, "--array", "2"), (HELLO, "--credits", "2")):
        result = cli("submit", *other, "--key", "once")
        assert result.code == 2
        assert "The key 'once' was used for another submission" in result.err
    for wrong in ("", "x" * 121, "a\nb"):
        assert cli("submit", HELLO, "--key", wrong).code == 2
    assert count_sent() == 0


def test_a_quote_has_price_longest_run_start_and_reasons(cli: Cli) -> None:
    result = data(cli("quote", HELLO, "-o", "json"))
    assert [item["provider_id"] for item in result] == [1, 2]
    cheap = result[0]
    assert cheap["eligible"] is True
    assert (cheap["start"], cheap["starts_in"]) == ("now", 0)
    # The queue is empty: the job would be the first, and start at once.
    assert [item["expected_in"] for item in result].count(None) == 1
    assert int(cheap["longest"]) == 10**18 // int(cheap["rate"])
    unaffordable = data(cli("quote", HELLO, "--credits", "0.0001", "-o", "json"))
    assert all(not item["eligible"] and "over budget" in item["reason"] for item in unaffordable)
    assert all(item["starts_in"] is None for item in unaffordable)
    assert "max runtime" in cli("quote", HELLO).out


def test_a_first_job_file_is_valid_and_never_overwritten(
    cli: Cli, local_devnet: LocalDevnet
) -> None:
    result = cli("init", "mine.yaml", "-o", "json")
    assert data(result) == {"path": "mine.yaml"}
    text = (local_devnet.folder / "mine.yaml").read_text()
    checked = data(cli("validate", "mine.yaml", "-o", "json"))
    assert (checked["name"], checked["time_limit"], checked["steps"]) == ("my-job", 600, 1)
    second_init = cli("init", "mine.yaml")
    assert second_init.code == 2
    assert "mine.yaml already exists" in second_init.err
    assert (local_devnet.folder / "mine.yaml").read_text() == text
    assert cli("init", "no/such/folder/x.yaml").code == 2


def test_an_older_job_file_is_converted_and_the_schema_printed(
    cli: Cli, local_devnet: LocalDevnet
) -> None:
    (local_devnet.folder / "old.json").write_text(
        '{"resources": {"tasks": 2, "gpusPerTask": 1, "memPerCpu": 100},'
        ' "steps": [{"run": {"command": "true"}}]}'
    )
    converted = cli("convert", "old.json")
    assert "resources.gpusPerTask is now resources.gpus: 2" in converted.err
    assert cli("convert", "old.json", "--to", "new.yaml").code == 0
    assert (local_devnet.folder / "new.yaml").read_text() == converted.out
    assert data(cli("validate", "new.yaml", "-o", "json"))["gpus"] == 2
    second_run = cli("convert", "old.json", "--to", "new.yaml")
    assert (second_run.code, second_run.out) == (2, "")
    assert "new.yaml already exists" in second_run.err
    document = json.loads(cli("schema").out)
    assert {"resources", "steps", "name"} <= set(document["properties"])


def test_the_schedulers_view_of_waiting_jobs(cli: Cli) -> None:
    job_id = data(cli("submit", HELLO, "-o", "json"))[0]["id"]
    result = data(cli("metascheduler", "explain", str(job_id), "-o", "json"))
    assert [item["job_id"] for item in result] == [job_id]
    # No provider runs here: jobs of earlier tests occupy the capacity.
    assert (result[0]["provider_id"] is None) == ("waits" in result[0]["text"])
    every = data(cli("metascheduler", "explain", "-o", "json"))
    assert job_id in [item["job_id"] for item in every]
    assert cli("metascheduler", "explain", "999999").code == 4


def test_a_job_that_never_ran_has_no_results(cli: Cli) -> None:
    job_id = str(data(cli("submit", HELLO, "-o", "json"))[0]["id"])
    result = cli("job", "results", job_id)
    assert (result.code, result.out) == (2, "")
    assert f"Job {job_id} has not ended: it is PENDING" in result.err
    assert cli("job", "cancel", job_id).code == 0
    result = cli("job", "results", job_id)
    assert (result.code, result.out) == (4, "")
    assert "It ended before a provider ran it." in result.err


def test_a_cancellation_names_the_jobs_that_it_left_out(cli: Cli) -> None:
    jobs = data(cli("submit", HELLO, "--array", "2", "--permit", "-o", "json"))
    first, second = (str(item["id"]) for item in jobs)
    assert cli("job", "cancel", first).code == 0
    cancellation = cli("job", "cancel", first, second, "-o", "json")
    assert cancellation.code == 0
    assert json.loads(cancellation.out)["label"] == f"cancel job {second}"
    assert f"Job {first} was skipped, because it is CANCELLED." in cancellation.err
    assert f"Job {second} was" not in cancellation.err
    assert data(cli("job", "get", second, "-o", "json"))["status"] == "CANCELLED"
    second_cancel = cli("job", "cancel", second)
    assert (second_cancel.code, second_cancel.out) == (6, "")
    assert f"Job {second} is CANCELLED already" in second_cancel.err


def test_a_provider_sees_why_jobs_are_not_assigned(cli: Cli, local_devnet: LocalDevnet) -> None:
    options = ("--keystore", str(local_devnet.wallets / "alpine.json"), "-o", "json")
    checks = {item["check"]: item for item in json.loads(cli("provider", "doctor", *options).out)}
    # The machine may be smaller than the offer, lack a sandbox, and run the tests as root.
    machine = {"offer", "isolation", "user"}
    assert {name for name, check in checks.items() if not check["ok"]} <= machine
    assert checks["registration"]["text"].startswith("provider 1, 0x")
    assert (checks["executor"]["ok"], checks["executor"]["setting"]) == (True, "executor")
    assert checks["deployment and endpoint"]["setting"] == "endpoint, chain_id, deployment"
    assert "definitions" in checks
    assert checks["status"]["text"] == "ACTIVE"
    assert checks["approval"]["text"].endswith("more days")
    for arguments in (
        (),
        ("1",),
        (json.loads(cli("provider", "status", "1", *options).out)["account"],),
    ):
        assert data(cli("provider", "earnings", *arguments, *options)) == []
        assert data(cli("provider", "jobs", *arguments, *options)) == []
    for unknown in ("99", "9" * 80):
        assert cli("provider", "earnings", unknown).code == 4
    assert cli("provider", "drain", *options).code == 0
    drained = cli("provider", "doctor", *options)
    assert drained.code == 1
    checks = {item["check"]: item for item in json.loads(drained.out)}
    assert (checks["status"]["ok"], checks["status"]["text"]) == (False, "DRAINING")
    assert "provider resume" in checks["status"]["hint"]
    assert cli("provider", "resume", *options).code == 0
    nobody = cli(
        "provider", "doctor", "--keystore", str(local_devnet.folder / "none.json"), "-o", "json"
    )
    checks = {item["check"]: item for item in json.loads(nobody.out)}
    assert (nobody.code, checks["registration"]["ok"], checks["executor"]["ok"]) == (1, False, True)
    stranger = cli("provider", "doctor", "-o", "json")
    assert stranger.code == 1
    checks = {item["check"]: item for item in json.loads(stranger.out)}
    assert (checks["registration"]["ok"], checks["registration"]["setting"]) == (False, "keystore")


def test_of_two_commands_of_one_key_at_once_one_pays(
    cli: Cli, count_sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = data(cli("submit", HELLO, "--key", "twins", "--permit", "-o", "json"))
    paid = credits(cli)
    count_sent()
    looked = []

    def find_late(outbox: OutboxTables, key: str) -> Entry | None:
        """Both commands check (three times, as they do) before either has recorded anything."""
        looked.append(key)
        return by_key(outbox, key) if len(looked) > 3 else None

    by_key = OutboxTables.by_key
    monkeypatch.setattr(OutboxTables, "by_key", find_late)
    repeated = data(cli("submit", HELLO, "--key", "twins", "--permit", "-o", "json"))
    assert repeated == first
    assert len(looked) > 3
    assert (credits(cli), count_sent()) == (paid, 0)


@pytest.mark.parametrize("clef", [False, True])
def test_an_external_signer_holds_the_key(cli: Cli, local_devnet: LocalDevnet, clef: bool) -> None:
    """Approval, permit, submission and cancellation, with the keystore out of reach."""
    account = load_account(local_devnet.wallets / "alice.json", local_devnet.wallets / "password")
    signer = ReferenceSigner(account, clef=clef)
    with serving(signer) as url:
        options = ["--signer", f"{'clef+' if clef else ''}{url}", "--keystore", "/nowhere"]
        [first] = data(cli("submit", HELLO, *options, "-o", "json"))
        [second] = data(cli("submit", HELLO, "--permit", *options, "-o", "json"))
        assert cli("job", "cancel", str(first["id"]), str(second["id"]), *options).code == 0
        jobs = data(cli("job", "list", "--limit", "2", *options, "-o", "json"))
        assert [item["status"] for item in jobs] == ["CANCELLED", "CANCELLED"]
        assert jobs[0]["customer"] == account.address
    prefix = "account_sign" if clef else "eth_sign"
    # The message is the sign-in at the gateway.
    assert {"Transaction", "TypedData", "Data" if clef else ""} == {
        method.removeprefix(prefix) for method in signer.methods if method.startswith(prefix)
    }
    failure = cli("submit", HELLO, *options)
    assert (failure.code, failure.out) == (7, "")
    assert "does not answer" in failure.err


def test_unsigned_calls_are_printed_for_a_safe(
    cli: Cli, local_devnet: LocalDevnet, count_sent: Any
) -> None:
    admin = load_account(
        local_devnet.wallets / "admin.json", local_devnet.wallets / "password"
    ).address
    alice = load_account(
        local_devnet.wallets / "alice.json", local_devnet.wallets / "password"
    ).address
    before = credits(cli)
    batch = data(cli("submit", HELLO, "--array", "1-2", "--unsigned", alice, "-o", "json"))
    assert (batch["version"], batch["chainId"]) == ("1.0", str(local_devnet.record["chain_id"]))
    assert [transaction["to"] for transaction in batch["transactions"]] == [
        local_devnet.record["credit"],
        local_devnet.record["scheduler"],
    ]
    assert (credits(cli), count_sent()) == (before, 0)
    # A call that the Safe could not execute is refused before it is signed.
    refusal = cli("admin", "fee", "1", "--unsigned", alice)
    assert (refusal.code, refusal.out) == (8, "")
    output = cli("admin", "fee", "1", "--unsigned", admin)
    assert "set the fee to 1 basis points" in output.out
    call = MetaSchedulerContract(None, local_devnet.record["scheduler"]).set_fee(1)  # type: ignore[arg-type]
    assert output.out.splitlines()[-1] == f"0x{call.data.hex()}"


def test_an_account_without_its_key_submits_and_retries(
    cli: Cli, local_devnet: LocalDevnet, count_sent: Any
) -> None:
    keystore = local_devnet.wallets / "bob.json"
    bob = load_account(keystore, local_devnet.wallets / "password").address
    signed = ("--gasless", "--yes", "--keystore", str(keystore))
    [job] = data(cli("submit", HELLO, *signed, "-o", "json"))
    assert cli("job", "cancel", str(job["id"]), *signed).code == 0
    # The wallet of the settings must not pay instead.
    for option in ("--gasless", "--permit", "--wait", "--key=k"):
        refusal = cli("submit", HELLO, option, "--yes", "--unsigned", bob)
        assert (refusal.code, refusal.out) == (2, ""), option
        assert option.partition("=")[0] in refusal.err, option
    unsigned = cli("submit", HELLO, "--env", "UNSIGNED=1", "--unsigned", bob, "-o", "json")
    assert "signs in to the gateway to upload the definition" in unsigned.err
    digest = data(unsigned)["transactions"][-1]["data"][-64:]
    assert list(local_devnet.folder.rglob(f"{digest}*")), "no gateway has the definition"
    # Only the customer could read the definition again, and a retry does not need to.
    retried = data(cli("job", "retry", str(job["id"]), "--unsigned", bob, "-o", "json"))
    assert retried["transactions"][-1]["data"].endswith(job["definition"])
    assert count_sent() == 0


def test_statements_by_date_and_an_invoice_as_a_page(
    cli: Cli, local_devnet: LocalDevnet, tmp_path: Path
) -> None:
    [submission] = data(cli("submit", HELLO, "-o", "json"))
    assert cli("job", "cancel", str(submission["id"])).code == 0
    [row] = [
        item
        for item in data(cli("audit", "statement", "--month", month(), "-o", "json"))
        if (item["job_id"], item["kind"]) == (submission["id"], "refund")
    ]
    assert row["job_name"] == "hello"
    later = cli("audit", "statement", "--from", "2999-01-01")
    assert (later.code, later.out) == (2, "")
    page = tmp_path / "invoice.html"
    result = data(cli("audit", "invoice", str(submission["id"]), "--html", str(page), "-o", "json"))
    assert (result["status"], result["cost"], result["refunded"]) == ("CANCELLED", "0", str(10**18))
    assert result["ok"] is True
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert row["transaction"] in text
    assert "The bill matches the recomputed bill." in text
    assert not re.search(r"<script|https?://", text), "a page of its own, for any printer"


def month() -> str:
    """Return the current month of the devnet's clock."""
    return datetime.now(UTC).strftime("%Y-%m")


# ------------------------------------------------- with transactions that stay pending for a while


@pytest.mark.parametrize("more", [(), ("--permit",), ("--array", "2")])
def test_submissions_at_once_succeed_all(
    cli: Cli, pending: LocalDevnet, more: tuple[str, ...]
) -> None:
    """Concurrent processes with one wallet: each uses the allowance that it has set."""
    before, known = credits(cli), set(jobs(cli))
    with ThreadPoolExecutor(3) as pool:
        arguments = ("submit", HELLO, *more, "-o", "json")
        result = list(pool.map(lambda _: run_forked(arguments, pending.folder), range(3)))
    ids = [item["id"] for output in result for item in data(output)]
    item = 2 if "--array" in more else 1
    assert len(set(ids) - known) == len(ids) == 3 * item
    assert credits(cli) == before - 3 * item * 10**18


def test_submissions_and_a_top_up_at_once(cli: Cli, pending: LocalDevnet) -> None:
    [first] = [item["id"] for item in data(cli("submit", HELLO, "-o", "json"))]
    lines = [("submit", HELLO), ("job", "topup", str(first), "2"), ("submit", HELLO, "--permit")]
    with ThreadPoolExecutor(3) as pool:
        result = list(pool.map(lambda line: run_forked(line, pending.folder), lines))
    assert [item.code for item in result] == [0, 0, 0], result
    assert data(cli("credit", "balance", "-o", "json"))["allowance"] == "0"


@pytest.mark.parametrize(
    ("crash_at", "more"),
    [
        ("sender.intent", ("--permit",)),
        ("sender.recorded", ("--permit",)),
        ("sender.broadcast", ("--permit",)),
        ("sender.receipt", ("--permit",)),
        ("sender.settled", ("--permit",)),
        ("sender.broadcast", ()),  # on the way to the approval
        ("sender.recorded:2", ()),  # between approval and submission
    ],
)
def test_a_command_killed_anywhere_pays_once_when_repeated(
    pending: LocalDevnet, cli: Cli, crash_at: str, more: tuple[str, ...]
) -> None:
    before, known = credits(cli), set(jobs(cli))
    arguments = ("submit", HELLO, "--key", f"killed at {crash_at} {more}", *more, "-o", "json")
    killed = run_forked(arguments, pending.folder, 120, **{VARIABLE: crash_at})
    assert killed.code == -signal.SIGKILL
    assert f"killed at {crash_at}" in killed.err

    (job,) = data(cli(*arguments))
    assert set(jobs(cli)) - known == {job["id"]}
    assert before - credits(cli) == int(job["escrow"])
    assert data(cli(*arguments)) == [job]
    assert before - credits(cli) == int(job["escrow"])
