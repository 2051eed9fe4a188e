"""Invalid input gets a clear error, costs nothing, and gives no traceback."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.chain.bindings.calls import plural
from deepsquare_chain.chain.bindings.records import Parameters
from deepsquare_chain.cli.output import Printer
from deepsquare_chain.client import registration
from deepsquare_chain.errors import GridError
from tests.support.cli import EXAMPLES, PROJECT, Outcome, run, running
from tests.support.local_devnet import Cli, LocalDevnet, make_light

HELLO = str(EXAMPLES / "hello.yaml")


def refused(found: Outcome, code: int, *words: str) -> None:
    """It ended with this code, said these words on stderr, and printed no data."""
    assert found.code == code, found
    assert found.out == ""
    assert "Error: " in found.err
    assert "Traceback" not in found.err
    for word in words:
        assert word in found.err


def worth(cli: Cli) -> tuple[str, str, int]:
    """Credits, gas and jobs of the customer: what a refusal must not change."""
    found = json.loads(cli("credit", "balance", "-o", "json").out)
    jobs = json.loads(cli("job", "list", "--all", "-o", "json").out)
    return found["balance"], found["gas"], len(jobs)


def nobody() -> str:
    """An address where no node listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


# ----------------------------------------------------------------- exit codes


def test_every_documented_exit_code_is_reached(
    cli: Cli, local_devnet: LocalDevnet, tmp_path: Path
) -> None:
    """By a command of its own; what a service or a script is told to rely on."""
    text = (PROJECT / "docs" / "cli.md").read_text()
    documented = {int(number) for number in re.findall(r"\| (\d{1,2}) \| [a-z]", text)}
    bad, record = tmp_path / "bad.yaml", tmp_path / "deployment.json"
    bad.write_text("nmae: x\n")
    record.write_text(json.dumps(local_devnet.record | {"treasury": "0x" + "12" * 20}))
    alpine = ["--keystore", str(local_devnet.wallets / "alpine.json")]
    job = str(json.loads(cli("submit", HELLO, "--permit", "-o", "json").out)[0]["id"])
    commands = {
        0: ["job", "get", job],
        1: ["doctor", "--endpoint", nobody()],
        2: ["job", "list", "--status", "asleep"],
        3: ["validate", str(bad)],
        4: ["job", "get", "999999"],
        5: ["submit", HELLO, "--credits", "100000"],
        6: ["provider", "offer", "--cpus", "9999", "--memory", "1", *alpine],
        7: ["job", "list", "--endpoint", nobody()],
        8: ["admin", "close"],
        9: ["job", "watch", job, "--wait-timeout", "0"],
        10: ["contracts", "verify", "--deployment", str(record)],
    }
    assert {code: cli(*words).code for code, words in commands.items()} == {
        code: code for code in commands
    }
    assert commands.keys() == documented
    known = {each.exit_code for each in (GridError, *GridError.__subclasses__())}
    assert known <= documented
    assert cli("job", "cancel", job).code == 0


# ------------------------------------------------------------------ job files

BAD_FILES = {
    "unknown key": ("nmae: x\n", "did you mean"),
    "negative": ("resources: {tasks: -1}\n", "tasks"),
    "zero": ("resources: {tasks: 0}\n", "tasks"),
    "huge": ("resources: {tasks: 99999999999999999999}\n", "tasks"),
    "not a number": ("resources: {tasks: many}\n", "tasks"),
    "no command": (
        "resources: {memPerCpu: 1}\nsteps:\n  - name: a\n    run: {command: ''}\n",
        "command",
    ),
    "broken YAML": ("a: [1,\n", "bad.yaml"),
    "bomb": ("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n", "bad.yaml"),
    "over 1 MB": (f"name: {'x' * 1_100_000}\n", "1,000,000"),
    "empty": ("", "empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("verb", ["validate", "submit"])
def test_bad_job_files_are_exit_3(cli: Cli, tmp_path: Path, verb: str, name: str) -> None:
    text, words = BAD_FILES[name]
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    found = cli(verb, str(file))
    refused(found, 3)
    assert words.lower() in found.err.lower()


def test_missing_job_file(cli: Cli) -> None:
    refused(cli("submit", "nowhere.yaml"), 3, "nowhere.yaml", "Hint:")


# ---------------------------------------------------------------------- money


def test_too_few_credits_costs_nothing(cli: Cli) -> None:
    before = worth(cli)
    refused(cli("submit", HELLO, "--credits", "1001"), 5, "has 1000 credits", "1001", "faucet")
    refused(cli("submit", HELLO, "--array", "250", "--credits", "5"), 5, "1250")
    assert worth(cli) == before


def test_more_jobs_than_a_block_holds(cli: Cli) -> None:
    refused(cli("submit", HELLO, "--array", "251"), 2, "251", "Lower --array")


def test_dry_run_checks_everything_and_sends_nothing(cli: Cli) -> None:
    before = worth(cli)
    found = cli("submit", HELLO, "--dry-run")
    assert (found.code, found.out) == (0, "")
    assert "Escrowing 1 of 1000 credits; sends an approval for exactly 1" in found.err
    assert "Dry run: nothing was sent." in found.err
    assert worth(cli) == before


def test_no_gas(cli: Cli, local_devnet: LocalDevnet, tmp_path: Path) -> None:
    wallet = str(tmp_path / "poor.json")
    made = json.loads(cli("wallet", "new", wallet, "-o", "json").out)
    refused(cli("submit", HELLO, "--keystore", wallet), 5, "has 0 credits")
    assert cli("credit", "transfer", made["address"], "2").code == 0
    refused(cli("submit", HELLO, "--keystore", wallet), 5, "coin", "gas")
    refused(cli("credit", "approve", "1", "--keystore", wallet), 5, "gas")


# -------------------------------------------------------------------- wallets


def test_wrong_password(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("wrong\n")
    file.chmod(0o600)
    refused(cli("submit", HELLO, "--password-file", str(file)), 8, "password", "alice")
    file.chmod(0o644)
    refused(cli("submit", HELLO, "--password-file", str(file)), 2, "chmod 600")
    refused(cli("submit", HELLO, "--password-file", str(tmp_path / "none")), 4, "none")


def test_no_terminal_to_ask_for_the_password(local_devnet: LocalDevnet, tmp_path: Path) -> None:
    for name in ("alice.json", "password"):
        shutil.copy(local_devnet.wallets / name, tmp_path / name)
    record = local_devnet.folder / ".deepsquare" / "deployment.json"
    found = run(
        ["submit", HELLO, "--keystore", "alice.json", "--deployment", str(record)],
        tmp_path,
        DEEPSQUARE_ENDPOINT=local_devnet.record["extra"]["endpoint"],
    )
    refused(found, 8, "needs its password", "DEEPSQUARE_PASSWORD_FILE")


def test_no_wallet_and_a_wallet_that_is_none(cli: Cli, tmp_path: Path) -> None:
    refused(cli("submit", HELLO, "--keystore", str(tmp_path / "no.json")), 4, "no.json")
    (tmp_path / "x.json").write_text("{}")
    refused(cli("wallet", "show", "--keystore", str(tmp_path / "x.json")), 2, "x.json")
    refused(cli("wallet", "new", str(tmp_path / "x.json")), 2, "never overwritten")
    found = run(["credit", "balance"], tmp_path)
    refused(
        found, 2, "No wallet is configured", "deepsquare wallet new FILE", "deepsquare devnet up"
    )
    checks = {
        each["check"]: each for each in json.loads(run(["doctor", "-o", "json"], tmp_path).out)
    }
    for name in ("wallet", "balance"):
        assert (checks[name]["ok"], "--keystore" in checks[name]["hint"]) == (False, True)
    found = cli("wallet", "import", str(tmp_path / "n.json"), "--key-file", str(tmp_path / "k"))
    refused(found, 4, "There is no key file", "Check the path")


# ------------------------------------------------------------------ endpoints


def test_endpoint_down(cli: Cli) -> None:
    url = nobody()
    for arguments in (["submit", HELLO], ["job", "list"]):
        refused(cli(*arguments, "--endpoint", url), 7, "can't be reached", "devnet up")


def test_a_service_logs_the_wait_for_its_endpoint(local_devnet: LocalDevnet) -> None:
    service = ["provider", "run", "--endpoint", nobody(), "--log-format", "console"]
    with running(service, local_devnet.folder, "waiting") as daemon:
        daemon.wait_for("endpoint unavailable")
        assert daemon.end(signal.SIGTERM) == 0
    log = daemon.log.read_text()
    assert log.count("endpoint unavailable") == log.count("can't be reached") == 1
    assert "devnet up" in log
    assert "Traceback" not in log


def test_endpoint_that_is_no_node(cli: Cli, local_devnet: LocalDevnet) -> None:
    faucet = local_devnet.record["extra"]["faucet"]
    refused(cli("job", "list", "--endpoint", faucet), 7, "responded with HTTP status")
    refused(cli("job", "list", "--endpoint", "ftp://host"), 2, "endpoint")


def test_wrong_chain_id(cli: Cli, local_devnet: LocalDevnet, tmp_path: Path) -> None:
    refused(cli("job", "list", "--chain-id", "5"), 2, "chain 1337", "chain 5")
    other = tmp_path / "deployment.json"
    other.write_text(json.dumps(local_devnet.record | {"chain_id": 5}))
    refused(cli("job", "list", "--deployment", str(other)), 7, "serves chain 1337, not chain 5")


def test_no_contract_at_the_address(cli: Cli, local_devnet: LocalDevnet, tmp_path: Path) -> None:
    other = tmp_path / "deployment.json"
    other.write_text(json.dumps(local_devnet.record | {"scheduler": "0x" + "12" * 20}))
    found = cli("job", "list", "--deployment", str(other))
    refused(found, 7, "no contract at 0x1212121212121212121212121212121212121212")


def test_deployment_record_that_is_none(cli: Cli, tmp_path: Path) -> None:
    record = tmp_path / "deployment.json"
    refused(cli("job", "list", "--deployment", str(record)), 4, "no deployment record", "devnet up")
    record.write_text("[]")
    refused(cli("job", "list", "--deployment", str(record)), 2, "not a deployment record")


# ----------------------------------------------------------------------- jobs


@pytest.mark.parametrize(
    "arguments",
    [
        ["get", "999"],
        ["why", "999"],
        ["watch", "999"],
        ["logs", "999"],
        ["cancel", "999"],
        ["topup", "999", "1"],
        ["retry", "999"],
    ],
    ids=" ".join,
)
def test_unknown_job_id_is_exit_4(cli: Cli, arguments: list[str]) -> None:
    refused(cli("job", *arguments), 4, "Job 999 does not exist")


def test_a_job_that_no_provider_runs(cli: Cli, local_devnet: LocalDevnet, tmp_path: Path) -> None:
    """A job of one's own, on a grid without scheduler and providers."""
    sent = json.loads(cli("submit", HELLO, "--permit", "-o", "json").out)
    job = str(sent[0]["id"])
    refused(cli("job", "watch", job, "--wait-timeout", "0"), 9, "still PENDING")
    refused(cli("job", "logs", job), 4, "No gateway has a log of job")
    refused(cli("job", "retry", job), 6, "has not ended")
    refused(cli("job", "topup", job, "5000"), 5, "has 99", "5000")
    bob = str(local_devnet.wallets / "bob.json")
    refused(cli("job", "cancel", job, "--keystore", bob), 8, "belongs to another customer")
    assert cli("job", "topup", job, "0.5").code == 0
    record = json.loads(cli("job", "get", job, "-o", "json").out)
    assert (record["status"], record["escrow_credits"]) == ("PENDING", "1.5")
    assert cli("job", "cancel", job).code == 0
    record = json.loads(cli("job", "get", job, "-o", "json").out)
    assert (record["status"], record["refunded_credits"]) == ("CANCELLED", "1.5")
    refused(cli("job", "cancel", job), 6, "CANCELLED")
    refused(cli("job", "topup", job, "1"), 6, "CANCELLED")
    again = cli("job", "retry", job, "-o", "json", "--credits", "1")
    assert json.loads(again.out)["escrow_credits"] == "1"
    assert cli("job", "cancel", str(json.loads(again.out)["id"])).code == 0


def test_status_that_is_none(cli: Cli) -> None:
    refused(cli("job", "list", "--status", "asleep"), 2, "asleep", "PENDING")


# ---------------------------------------------------------------------- roles


def test_only_roles_and_providers_may(cli: Cli, local_devnet: LocalDevnet) -> None:
    alpine = json.loads(cli("provider", "status", "--all", "-o", "json").out)[0]["account"]
    refused(cli("admin", "approve", alpine), 8, "does not have APPROVER_ROLE")
    refused(cli("admin", "ban", alpine, "--yes"), 8, "does not have APPROVER_ROLE")
    refused(cli("admin", "close"), 8, "does not have DEFAULT_ADMIN_ROLE")
    for verb in ("approve", "ban", "unban"):
        refused(cli("admin", verb, "0x" + "12" * 20), 4, "is not registered", "Check the address")
    refused(cli("provider", "run"), 4, "not registered", "provider register")
    refused(cli("provider", "status"), 4, "not registered")
    refused(cli("metascheduler", "run"), 8, "METASCHEDULER_ROLE")
    keystore = ["--keystore", str(local_devnet.wallets / "alpine.json")]
    found = cli("provider", "offer", "--cpus", "99", "--memory", "1", *keystore)
    refused(found, 6, "more than the approved hardware")


class _Declining(io.StringIO):
    """A terminal on which every question gets the same answer."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: Any) -> str:
        return self.getvalue()


def test_a_provider_from_its_wallet_to_a_ban(
    cli: Cli, local_devnet: LocalDevnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["--keystore", str(tmp_path / "provider.json"), "-o", "json"]
    admin = ["--keystore", str(local_devnet.wallets / "admin.json"), "-o", "json"]
    account = json.loads(cli("wallet", "new", own[1], "-o", "json").out)["address"]
    make_light(Path(own[1]), local_devnet.password_file)
    assert cli("credit", "faucet", account).code == 0
    hardware = ["--nodes", "2", "--cpus-per-node", "8", "--mem-per-node", "16000"]
    prices = ["--cpu-price", "3.6", "--mem-price", "0.0036"]
    too_many = ["--cpus-per-node", "70000", "--yes"]
    refused(cli("provider", "register", *prices, *too_many, *own), 2)
    refused(cli("provider", "register", *own), 2, "needs a price", "--cpu-price and --mem-price")
    free = ["--cpu-price", "0", "--mem-price", "0"]
    # Hardware that is not given is this machine's, and only a question stands before it is sent.
    unasked = cli("provider", "register", *free, *own)
    machine = registration.machine()
    assert f"This machine has {plural(machine.cpus_per_node, 'CPU')}, " in unasked.err
    warned = cli("provider", "register", *hardware, *prices, "--cpus-per-node", "9999", *own)
    assert warned.code == 0, warned
    assert "9999 CPUs per node would be registered, but this machine has" in warned.err
    # The same again changes nothing, although no version is approved yet.
    same = cli("provider", "register", "--cpus-per-node", "9999", *own)
    assert (same.code, same.out) == (0, "")
    assert "Nothing was sent." in same.err
    unasked = cli("provider", "register", *hardware, *free, *own)
    refused(unasked, 2, "no terminal to ask on", "--yes")
    assert "All prices would be zero" in unasked.err

    def shown() -> Any:
        return json.loads(cli("provider", "status", account, "-o", "json").out)

    steps: list[tuple[list[str], dict[str, Any]]] = [
        (
            ["provider", "register", *hardware, *prices, "--label", "site=here", "--yes", *own],
            {"status": "WAITING_APPROVAL", "labels": "site=here", "price_gpu": "0"},
        ),
        (["admin", "approve", account, *admin], {"status": "ACTIVE", "offer_cpus": 16}),
        (
            ["provider", "offer", "--cpus", "4", "--memory", "99", *own],
            {"offer_cpus": 4, "offer_memory": 99},
        ),
        (
            ["provider", "price", "--mem-price", "0", "--gpu-price", "36", "--yes", *own],
            {"price_cpu": str(10**15), "price_mem": "0", "price_gpu": str(10**16)},
        ),
        (
            ["provider", "labels", "--label", "a=b", "--label", "c=d", "--yes", *own],
            {"labels": "a=b c=d"},
        ),
        # What is not given again stays; what is the same needs no question.
        (
            ["provider", "register", "--cpus-per-node", "1", "--nodes", "2", "--yes", *own],
            {"labels": "a=b c=d", "price_cpu": str(10**15), "price_gpu": str(10**16)},
        ),
        (["provider", "drain", "--wait", *own], {"status": "DRAINING"}),
        (["provider", "resume", *own], {"status": "ACTIVE"}),
        (["admin", "ban", account, "--reason", "late", "--yes", *admin], {"status": "BANNED"}),
        (["admin", "unban", account, *admin], {"status": "ACTIVE"}),
    ]
    for arguments, wanted in steps:
        found = cli(*arguments)
        assert found.code == 0, found
        assert int(json.loads(found.out)["gas_fee"]) > 0
        now = shown()
        assert {key: now[key] for key in wanted} == wanted
    # Once more changes nothing, and a ban is asked about.
    for arguments in (
        ["provider", "offer", "--cpus", "4", "--memory", "99M", *own],
        ["provider", "price", "--cpu-price", "3.6", *own],
        ["provider", "labels", "--label", "c=d", "--label", "a=b", *own],
        ["provider", "register", "--nodes", "2", *own],
        ["provider", "resume", *own],
        ["admin", "unban", account, *admin],
        ["admin", "open", *admin],
    ):
        found = cli(*arguments)
        assert (found.code, found.out) == (0, ""), found
        assert "Nothing was sent." in found.err
    refused(cli("admin", "ban", account, *admin), 2, "no terminal to ask on", "--yes")
    monkeypatch.setattr("sys.stdin", _Declining("n\n"))
    for words, arguments in (
        ("from 3.6 to 3.7 credits", ["provider", "price", "--cpu-price", "3.7", *own]),
        ("is registered: the new", ["provider", "register", "--cpus-per-node", "4", *own]),
    ):
        declined = cli(*arguments)
        assert (declined.code, declined.out.strip()) == (0, "")
        assert words in declined.err
        assert "Nothing was changed." in declined.err
    jobs = cli("provider", "jobs", account)
    assert (jobs.code, jobs.out) == (0, "")


def test_roles_fee_mint_and_handover(cli: Cli, local_devnet: LocalDevnet) -> None:
    admin = ["--keystore", str(local_devnet.wallets / "admin.json"), "-o", "json"]
    alice = json.loads(cli("wallet", "show", "-o", "json").out)["address"]
    owner = json.loads(cli("wallet", "show", *admin).out)["address"]

    def holders(role: str) -> set[str]:
        rows = json.loads(cli("admin", "roles", "-o", "json").out)
        return {each["holder"] for each in rows if each["role"] == role}

    before = holders("METASCHEDULER_ROLE")
    for verb, expected in (("grant", before | {alice}), ("revoke", before)):
        yes = ["--yes"] if verb == "revoke" else []
        assert cli("admin", verb, "scheduler", alice, *yes, *admin).code == 0
        assert holders("METASCHEDULER_ROLE") == expected
        again = cli("admin", verb, "scheduler", alice, *yes, *admin)
        assert (again.code, again.out) == (0, "")
    refused(cli("admin", "grant", "minter", alice), 8, "DEFAULT_ADMIN_ROLE")
    assert cli("admin", "fee", "250", *admin).code == 0
    found = json.loads(cli("admin", "params", "-o", "json").out)
    assert found["fee_bps"] == 250
    names = {field.name for field in dataclasses.fields(Parameters)}
    assert names | {"approval_period"} == set(found)
    assert cli("admin", "fee", "500", *admin).code == 0

    credits = worth(cli)
    assert cli("credit", "mint", alice, "3", *admin).code == 0
    refused(cli("credit", "mint", alice, "3"), 8, "MINTER_ROLE")
    refused(cli("credit", "burn", "3"), 2, "no terminal to ask on")
    assert cli("credit", "burn", "3", "--yes").code == 0
    assert worth(cli)[0] == credits[0]

    named = cli("admin", "handover", alice, "--yes", *admin)
    assert [each["next"] for each in json.loads(named.out)] == [alice] * 3
    again = cli("admin", "handover", alice, "--yes", *admin)
    assert f"The handover of Credit to {alice} is pending." in again.err
    withdrawn = cli("admin", "handover", "--cancel", *admin)
    assert [each["next"] for each in json.loads(withdrawn.out)] == [None] * 3
    nothing = cli("admin", "handover", "--accept", "-o", "json")
    assert f"No handover of MetaScheduler to {alice} is pending." in nothing.err
    same = cli("admin", "handover", owner, "--yes", *admin)
    assert f"{owner} is the administrator of Credit already." in same.err
    assert {each["admin"] for each in json.loads(nothing.out)} == {owner}


def test_a_new_version_continues_with_the_old_credit_and_registry(
    cli: Cli, local_devnet: LocalDevnet, tmp_path: Path
) -> None:
    record = str(tmp_path / "new.json")
    new = ["--keystore", str(local_devnet.wallets / "admin.json"), "--deployment", record]
    old = local_devnet.record
    wrong = ["--credit", old["registry"], "--registry", old["registry"]]
    refused(cli("contracts", "deploy", *wrong, *new), 2, "is not this package's Credit")
    kept = ["--credit", old["credit"], "--registry", old["registry"]]
    deployed = cli("contracts", "deploy", *kept, "--demo-timeouts", *new)
    assert deployed.code == 0
    assert "No --treasury was given: " in deployed.err
    made = json.loads(Path(record).read_text())
    assert (made["credit"], made["registry"]) == (old["credit"], old["registry"])
    assert made["scheduler"] != old["scheduler"]
    assert made["block"] == old["block"]
    verified = cli("contracts", "verify", "--deployment", record)
    assert verified.code == 0
    assert "has METASCHEDULER_ROLE of MetaScheduler" in verified.out
    assert cli("audit", "verify", "--deployment", record).code == 0
    # Its providers are those of the old version.
    providers = cli("provider", "status", "--all", "--deployment", record, "-o", "json")
    assert [each["status"] for each in json.loads(providers.out)][:2] == ["ACTIVE", "ACTIVE"]


def test_closed_submissions(cli: Cli, local_devnet: LocalDevnet) -> None:
    admin = ["--keystore", str(local_devnet.wallets / "admin.json")]
    assert cli("admin", "close", *admin).code == 0
    refused(cli("submit", HELLO), 6, "does not accept new jobs")
    assert json.loads(cli("admin", "params", "-o", "json").out)["submissions_open"] is False
    assert cli("admin", "open", *admin).code == 0
    assert cli("submit", HELLO, "--dry-run").code == 0


def test_a_job_that_fits_nowhere_is_warned_of_and_explained(cli: Cli) -> None:
    sent = cli("submit", HELLO, "--credits", "0.0001", "-o", "json")
    assert sent.code == 0
    assert "Warning: no provider is eligible now" in sent.err
    job = str(json.loads(sent.out)[0]["id"])
    found = cli("job", "why", job)
    assert found.code == 0
    assert "too expensive" in found.out
    assert f"Next: `deepsquare job topup {job} CREDITS`" in found.out
    reported = json.loads(cli("job", "why", job, "-o", "json").out)
    assert (reported["id"], reported["status"]) == (int(job), "PENDING")
    assert reported["why"] == found.out.splitlines()[0]
    assert reported["next"].startswith("`deepsquare job topup")
    assert cli("job", "cancel", job).code == 0
    assert "CANCELLED" in cli("job", "why", job).out


def test_waiting_for_a_job_prints_why_it_makes_no_progress(
    cli: Cli, local_devnet: LocalDevnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    def note(_printer: Printer, text: str) -> None:
        notes.append(text)
        if "too expensive" in text:  # what the customer does about it ends the waiting
            job = text.split()[1]
            assert run(["job", "cancel", job], local_devnet.folder).code == 0

    monkeypatch.setattr(Printer, "note", note)
    arguments = (HELLO, "--credits", "0.0001", "--wait", "--poll-interval", "0.05", "-o", "json")
    found = cli("submit", *arguments)
    assert (found.code, found.err) == (1, "")
    ended = json.loads(found.out)[0]
    assert ended["status"] == "CANCELLED"
    reasons = [each for each in notes if "too expensive" in each]
    assert len(reasons) == 1
    assert f"Next: `deepsquare job topup {ended['id']} CREDITS` raises" in reasons[0]


def test_words_that_are_no_address_or_label(cli: Cli) -> None:
    refused(cli("credit", "balance", "0x12"), 2, "'0x12'")
    refused(cli("credit", "transfer", "alice", "1"), 2, "'alice'")
    refused(cli("credit", "transfer", "0x" + "00" * 20, "1"), 6, "can't receive credits")
    mistyped = "0x976EA74026E726554dB657fA54763abd0C3a0aA9"
    refused(cli("credit", "transfer", mistyped, "1"), 2, mistyped, "checksum is wrong")
    nothing = cli("credit", "transfer", mistyped.lower(), "0")
    assert (nothing.code, nothing.out) == (2, "")
    assert "is not more than 0" in nothing.err
    refused(cli("provider", "labels", "--label", "fast"), 2, "KEY=VALUE")


# ---------------------------------------------------------------------- ports


def test_port_in_use_and_folder_in_use(local_devnet: LocalDevnet, tmp_path: Path) -> None:
    port = local_devnet.record["extra"]["endpoint"].rpartition(":")[2]
    others = ["--faucet-port", "0", "--relay-port", "0", "--no-explorer"]
    found = run(["devnet", "up", "--port", port, *others], tmp_path)
    assert f"Error: Port {port} on 127.0.0.1 is in use." in found.err
    assert (found.code, "Traceback" in found.err) == (2, False)
    found = run(["devnet", "up", "--port", "0", *others], local_devnet.folder)
    refused(found, 2, "A devnet is already running in")


def test_faucet_pays_a_new_wallet(cli: Cli, tmp_path: Path) -> None:
    wallet = str(tmp_path / "new.json")
    assert cli("wallet", "new", wallet).code == 0
    assert cli("credit", "faucet", "--keystore", wallet).code == 0
    found = json.loads(cli("credit", "balance", "--keystore", wallet, "-o", "json").out)
    assert (found["balance_credits"], found["gas_coin"]) == ("1000", "10")


def test_a_faucet_that_is_down(cli: Cli, local_devnet: LocalDevnet, tmp_path: Path) -> None:
    record = {**local_devnet.record, "extra": {**local_devnet.record["extra"], "faucet": nobody()}}
    (tmp_path / "deployment.json").write_text(json.dumps(record))
    found = cli("credit", "faucet", "--deployment", str(tmp_path / "deployment.json"))
    refused(found, 7, "no connection", "deepsquare devnet up")


def test_doctor_reports_problems(cli: Cli, local_devnet: LocalDevnet) -> None:
    found = cli("doctor", "-o", "json")
    assert found.code == 0
    assert all(check["ok"] for check in json.loads(found.out))
    found = cli("doctor", "-o", "json", "--endpoint", "http://127.0.0.1:9")
    wrong = {check["check"] for check in json.loads(found.out) if not check["ok"]}
    assert found.code == 1
    assert {"deployment and endpoint", "rules", "contracts", "clock", "balance"} == wrong


def test_doctor_tries_the_password(cli: Cli, tmp_path: Path) -> None:
    other = tmp_path / "password"
    other.write_text("another one")
    other.chmod(0o600)
    found = cli("doctor", "-o", "json", "--password-file", str(other))
    assert found.code == 1
    (wrong,) = (check for check in json.loads(found.out) if not check["ok"])
    assert wrong["check"] == "password file"
    assert "The password does not open the wallet" in wrong["text"]
    assert wrong["hint"]
    assert "another one" not in found.out + found.err
    nobody = json.loads(cli("doctor", "-o", "json", "--keystore", str(other)).out)
    reported = {check["check"]: check["ok"] for check in nobody}
    assert (reported["wallet"], reported["password file"]) == (False, True)


@pytest.mark.parametrize("verb", [("submit", HELLO), ("quote", HELLO), ("job", "retry", "1")])
def test_no_credits_are_never_taken_for_the_default(cli: Cli, verb: tuple[str, ...]) -> None:
    before = worth(cli)
    found = cli(*verb, "--credits", "0")
    assert (found.code, found.out) == (2, "")
    assert "--credits" in found.err
    assert "is not more than 0" in found.err
    assert worth(cli) == before


def test_an_existing_record_is_never_overwritten(cli: Cli) -> None:
    refused(cli("contracts", "deploy"), 2, "never overwritten")


def test_contracts_on_chain_are_this_build(cli: Cli) -> None:
    found = cli("contracts", "verify", "-o", "json")
    assert found.code == 0
    assert all(row["ok"] for row in json.loads(found.out))


def test_deploying_anew_writes_a_record_that_verifies(
    cli: Cli, local_devnet: LocalDevnet, tmp_path: Path
) -> None:
    record = tmp_path / "deployment.json"
    options = ["--deployment", str(record), "-o", "json"]
    admin = ["--keystore", str(local_devnet.wallets / "admin.json"), *options]
    refused(cli("contracts", "deploy", "--treasury", "0x12", *admin), 2, "treasury")
    assert not record.exists()
    found = cli("contracts", "deploy", "--demo-timeouts", *admin)
    assert found.code == 0, found
    assert json.loads(found.out)["scheduler"] != local_devnet.record["scheduler"]
    verified = cli("contracts", "verify", *options)
    assert verified.code == 0, verified
    assert [path.name for path in tmp_path.iterdir()] == ["deployment.json"]
    # A record that is not the chain's is found out.
    record.write_text(json.dumps(json.loads(record.read_text()) | {"treasury": "0x" + "12" * 20}))
    assert cli("contracts", "verify", *options).code == 10
