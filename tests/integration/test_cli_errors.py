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

import httpx2
import pytest

from deepsquare_chain.chain.bindings.calls import plural
from deepsquare_chain.chain.bindings.records import Parameters
from deepsquare_chain.cli.output import Printer
from deepsquare_chain.client import registration
from deepsquare_chain.errors import GridError
from tests.support.cli import EXAMPLES, PROJECT, Outcome, run_forked, running
from tests.support.local_devnet import Cli, LocalDevnet, make_light

HELLO = str(EXAMPLES / "hello.yaml")


def assert_refused(result: Outcome, code: int, *arguments: str) -> None:
    """Check the exit code, that stderr has an error with these words, and that stdout is empty."""
    assert result.code == code, result
    assert result.out == ""
    assert "Error: " in result.err
    assert "Traceback" not in result.err
    for word in arguments:
        assert word in result.err


def customer_state(cli: Cli) -> tuple[str, str, int]:
    """Return credits, coin and number of jobs of the customer, which a refusal must not change."""
    balance = json.loads(cli("credit", "balance", "-o", "json").out)
    jobs = json.loads(cli("job", "list", "--all", "-o", "json").out)
    return balance["balance"], balance["gas"], len(jobs)


def unused_url() -> str:
    """Return a URL where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


# ----------------------------------------------------------------- exit codes


def test_every_documented_exit_code_is_reached(
    cli: Cli, local_devnet: LocalDevnet, tmp_path: Path
) -> None:
    """Scripts rely on the table in docs/cli.md: each code is reached by one command."""
    text = (PROJECT / "docs" / "cli.md").read_text()
    documented = {int(number) for number in re.findall(r"\| (\d{1,2}) \| [a-z]", text)}
    bad, record = tmp_path / "bad.yaml", tmp_path / "deployment.json"
    bad.write_text("nmae: x\n")
    record.write_text(json.dumps(local_devnet.record | {"treasury": "0x" + "12" * 20}))
    alpine = ["--keystore", str(local_devnet.wallets / "alpine.json")]
    job = str(json.loads(cli("submit", HELLO, "--permit", "-o", "json").out)[0]["id"])
    commands = {
        0: ["job", "get", job],
        1: ["doctor", "--endpoint", unused_url()],
        2: ["job", "list", "--status", "asleep"],
        3: ["validate", str(bad)],
        4: ["job", "get", "999999"],
        5: ["submit", HELLO, "--credits", "100000"],
        6: ["provider", "offer", "--cpus", "9999", "--memory", "1", *alpine],
        7: ["job", "list", "--endpoint", unused_url()],
        8: ["admin", "close"],
        9: ["job", "watch", job, "--wait-timeout", "0"],
        10: ["contracts", "verify", "--deployment", str(record)],
    }
    assert {code: cli(*words).code for code, words in commands.items()} == {
        code: code for code in commands
    }
    assert commands.keys() == documented
    known = {error.exit_code for error in (GridError, *GridError.__subclasses__())}
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
def test_bad_job_files_end_with_exit_code_3(cli: Cli, tmp_path: Path, verb: str, name: str) -> None:
    text, messages = BAD_FILES[name]
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    result = cli(verb, str(file))
    assert_refused(result, 3)
    assert messages.lower() in result.err.lower()


def test_missing_job_file(cli: Cli) -> None:
    assert_refused(cli("submit", "nowhere.yaml"), 3, "nowhere.yaml", "Hint:")


# ---------------------------------------------------------------------- money


def test_too_few_credits_cost_nothing(cli: Cli) -> None:
    before = customer_state(cli)
    assert_refused(
        cli("submit", HELLO, "--credits", "1001"), 5, "has 1000 credits", "1001", "faucet"
    )
    assert_refused(cli("submit", HELLO, "--array", "250", "--credits", "5"), 5, "1250")
    assert customer_state(cli) == before


def test_more_jobs_than_a_block_holds(cli: Cli) -> None:
    assert_refused(cli("submit", HELLO, "--array", "251"), 2, "251", "Lower --array")


def test_dry_run_checks_everything_and_sends_nothing(cli: Cli) -> None:
    before = customer_state(cli)
    result = cli("submit", HELLO, "--dry-run")
    assert (result.code, result.out) == (0, "")
    assert "Escrowing 1 of 1000 credits; sends an approval for exactly 1" in result.err
    assert "Dry run: nothing was sent." in result.err
    assert customer_state(cli) == before


def test_no_gas(cli: Cli, local_devnet: LocalDevnet, tmp_path: Path) -> None:
    wallet = str(tmp_path / "poor.json")
    wallet_info = json.loads(cli("wallet", "new", wallet, "-o", "json").out)
    assert_refused(cli("submit", HELLO, "--keystore", wallet), 5, "has 0 credits")
    assert cli("credit", "transfer", wallet_info["address"], "2").code == 0
    assert_refused(cli("submit", HELLO, "--keystore", wallet), 5, "coin", "gas")
    assert_refused(cli("credit", "approve", "1", "--keystore", wallet), 5, "gas")


# -------------------------------------------------------------------- wallets


def test_wrong_password(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("wrong\n")
    file.chmod(0o600)
    assert_refused(cli("submit", HELLO, "--password-file", str(file)), 8, "password", "alice")
    file.chmod(0o644)
    assert_refused(cli("submit", HELLO, "--password-file", str(file)), 2, "chmod 600")
    assert_refused(cli("submit", HELLO, "--password-file", str(tmp_path / "none")), 4, "none")


def test_no_terminal_to_ask_for_the_password(local_devnet: LocalDevnet, tmp_path: Path) -> None:
    for name in ("alice.json", "password"):
        shutil.copy(local_devnet.wallets / name, tmp_path / name)
    record = local_devnet.folder / ".deepsquare" / "deployment.json"
    result = run_forked(
        ["submit", HELLO, "--keystore", "alice.json", "--deployment", str(record)],
        tmp_path,
        DEEPSQUARE_ENDPOINT=local_devnet.record["extra"]["endpoint"],
    )
    assert_refused(result, 8, "needs its password", "DEEPSQUARE_PASSWORD_FILE")


def test_a_missing_and_an_invalid_wallet(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("submit", HELLO, "--keystore", str(tmp_path / "no.json")), 4, "no.json")
    (tmp_path / "x.json").write_text("{}")
    assert_refused(cli("wallet", "show", "--keystore", str(tmp_path / "x.json")), 2, "x.json")
    assert_refused(cli("wallet", "new", str(tmp_path / "x.json")), 2, "never overwritten")
    result = run_forked(["credit", "balance"], tmp_path)
    assert_refused(
        result, 2, "No wallet is configured", "deepsquare wallet new FILE", "deepsquare devnet up"
    )
    checks = {
        check["check"]: check
        for check in json.loads(run_forked(["doctor", "-o", "json"], tmp_path).out)
    }
    for name in ("wallet", "balance"):
        assert (checks[name]["ok"], "--keystore" in checks[name]["hint"]) == (False, True)
    result = cli("wallet", "import", str(tmp_path / "n.json"), "--key-file", str(tmp_path / "k"))
    assert_refused(result, 4, "There is no key file", "Check the path")


# ------------------------------------------------------------------ endpoints


def test_endpoint_down(cli: Cli) -> None:
    url = unused_url()
    for arguments in (["submit", HELLO], ["job", "list"]):
        assert_refused(cli(*arguments, "--endpoint", url), 7, "can't be reached", "devnet up")


def test_a_service_logs_the_wait_for_its_endpoint(local_devnet: LocalDevnet) -> None:
    service = ["provider", "run", "--endpoint", unused_url(), "--log-format", "console"]
    with running(service, local_devnet.folder, "waiting") as daemon:
        daemon.wait_for("endpoint unavailable")
        assert daemon.end(signal.SIGTERM) == 0
    log = daemon.log.read_text()
    assert log.count("endpoint unavailable") == log.count("can't be reached") == 1
    assert "devnet up" in log
    assert "Traceback" not in log


def test_endpoint_is_not_a_node(cli: Cli, local_devnet: LocalDevnet) -> None:
    faucet = local_devnet.record["extra"]["faucet"]
    assert_refused(cli("job", "list", "--endpoint", faucet), 7, "responded with HTTP status")
    assert_refused(cli("job", "list", "--endpoint", "ftp://host"), 2, "endpoint")


def test_wrong_chain_id(cli: Cli, local_devnet: LocalDevnet, tmp_path: Path) -> None:
    assert_refused(cli("job", "list", "--chain-id", "5"), 2, "chain 1337", "chain 5")
    other = tmp_path / "deployment.json"
    other.write_text(json.dumps(local_devnet.record | {"chain_id": 5}))
    assert_refused(
        cli("job", "list", "--deployment", str(other)), 7, "serves chain 1337, not chain 5"
    )


def test_no_contract_at_the_address(cli: Cli, local_devnet: LocalDevnet, tmp_path: Path) -> None:
    other = tmp_path / "deployment.json"
    other.write_text(json.dumps(local_devnet.record | {"scheduler": "0x" + "12" * 20}))
    result = cli("job", "list", "--deployment", str(other))
    assert_refused(result, 7, "no contract at 0x1212121212121212121212121212121212121212")


def test_missing_and_invalid_deployment_record(cli: Cli, tmp_path: Path) -> None:
    record = tmp_path / "deployment.json"
    assert_refused(
        cli("job", "list", "--deployment", str(record)), 4, "no deployment record", "devnet up"
    )
    record.write_text("[]")
    assert_refused(cli("job", "list", "--deployment", str(record)), 2, "not a deployment record")


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
def test_unknown_job_id_ends_with_exit_code_4(cli: Cli, arguments: list[str]) -> None:
    assert_refused(cli("job", *arguments), 4, "Job 999 does not exist")


def test_commands_for_a_job_without_a_provider(
    cli: Cli, local_devnet: LocalDevnet, tmp_path: Path
) -> None:
    """The grid has neither a scheduler nor providers, so the job stays PENDING."""
    submission = json.loads(cli("submit", HELLO, "--permit", "-o", "json").out)
    job = str(submission[0]["id"])
    assert_refused(cli("job", "watch", job, "--wait-timeout", "0"), 9, "still PENDING")
    assert_refused(cli("job", "logs", job), 4, "No gateway has a log of job")
    assert_refused(cli("job", "retry", job), 6, "has not ended")
    assert_refused(cli("job", "topup", job, "5000"), 5, "has 99", "5000")
    bob = str(local_devnet.wallets / "bob.json")
    assert_refused(cli("job", "cancel", job, "--keystore", bob), 8, "belongs to another customer")
    assert cli("job", "topup", job, "0.5").code == 0
    record = json.loads(cli("job", "get", job, "-o", "json").out)
    assert (record["status"], record["escrow_credits"]) == ("PENDING", "1.5")
    assert cli("job", "cancel", job).code == 0
    record = json.loads(cli("job", "get", job, "-o", "json").out)
    assert (record["status"], record["refunded_credits"]) == ("CANCELLED", "1.5")
    assert_refused(cli("job", "cancel", job), 6, "CANCELLED")
    assert_refused(cli("job", "topup", job, "1"), 6, "CANCELLED")
    retry = cli("job", "retry", job, "-o", "json", "--credits", "1")
    assert json.loads(retry.out)["escrow_credits"] == "1"
    assert cli("job", "cancel", str(json.loads(retry.out)["id"])).code == 0


def test_unknown_status(cli: Cli) -> None:
    assert_refused(cli("job", "list", "--status", "asleep"), 2, "asleep", "PENDING")


# ---------------------------------------------------------------------- roles


def test_commands_of_roles_and_providers_are_refused_to_others(
    cli: Cli, local_devnet: LocalDevnet
) -> None:
    alpine = json.loads(cli("provider", "status", "--all", "-o", "json").out)[0]["account"]
    assert_refused(cli("admin", "approve", alpine), 8, "does not have APPROVER_ROLE")
    assert_refused(cli("admin", "ban", alpine, "--yes"), 8, "does not have APPROVER_ROLE")
    assert_refused(cli("admin", "close"), 8, "does not have DEFAULT_ADMIN_ROLE")
    for verb in ("approve", "ban", "unban"):
        assert_refused(
            cli("admin", verb, "0x" + "12" * 20), 4, "is not registered", "Check the address"
        )
    assert_refused(cli("provider", "run"), 4, "not registered", "provider register")
    assert_refused(cli("provider", "status"), 4, "not registered")
    assert_refused(cli("metascheduler", "run"), 8, "METASCHEDULER_ROLE")
    keystore = ["--keystore", str(local_devnet.wallets / "alpine.json")]
    result = cli("provider", "offer", "--cpus", "99", "--memory", "1", *keystore)
    assert_refused(result, 6, "more than the approved hardware")


class _AnsweringTerminal(io.StringIO):
    """A terminal on which every question gets the same answer."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: Any) -> str:
        return self.getvalue()


def test_life_cycle_of_a_provider_from_registration_to_a_ban(
    cli: Cli, local_devnet: LocalDevnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider_options = ["--keystore", str(tmp_path / "provider.json"), "-o", "json"]
    admin = ["--keystore", str(local_devnet.wallets / "admin.json"), "-o", "json"]
    account = json.loads(cli("wallet", "new", provider_options[1], "-o", "json").out)["address"]
    make_light(Path(provider_options[1]), local_devnet.password_file)
    assert cli("credit", "faucet", account).code == 0
    hardware = ["--nodes", "2", "--cpus-per-node", "8", "--mem-per-node", "16000"]
    prices = ["--cpu-price", "3.6", "--mem-price", "0.0036"]
    too_many = ["--cpus-per-node", "70000", "--yes"]
    assert_refused(cli("provider", "register", *prices, *too_many, *provider_options), 2)
    assert_refused(
        cli("provider", "register", *provider_options),
        2,
        "needs a price",
        "--cpu-price and --mem-price",
    )
    free = ["--cpu-price", "0", "--mem-price", "0"]
    # Without hardware options, this machine's hardware is registered after a confirmation.
    unconfirmed = cli("provider", "register", *free, *provider_options)
    machine = registration.machine()
    assert f"This machine has {plural(machine.cpus_per_node, 'CPU')}, " in unconfirmed.err
    warned = cli(
        "provider", "register", *hardware, *prices, "--cpus-per-node", "9999", *provider_options
    )
    assert warned.code == 0, warned
    assert "9999 CPUs per node would be registered, but this machine has" in warned.err
    # A repetition sends nothing, although no version is approved yet.
    same = cli("provider", "register", "--cpus-per-node", "9999", *provider_options)
    assert (same.code, same.out) == (0, "")
    assert "Nothing was sent." in same.err
    unconfirmed = cli("provider", "register", *hardware, *free, *provider_options)
    assert_refused(unconfirmed, 2, "no terminal to ask on", "--yes")
    assert "All prices would be zero" in unconfirmed.err

    def status() -> Any:
        return json.loads(cli("provider", "status", account, "-o", "json").out)

    steps: list[tuple[list[str], dict[str, Any]]] = [
        (
            [
                "provider",
                "register",
                *hardware,
                *prices,
                "--label",
                "site=here",
                "--yes",
                *provider_options,
            ],
            {"status": "WAITING_APPROVAL", "labels": "site=here", "price_gpu": "0"},
        ),
        (["admin", "approve", account, *admin], {"status": "ACTIVE", "offer_cpus": 16}),
        (
            ["provider", "offer", "--cpus", "4", "--memory", "99", *provider_options],
            {"offer_cpus": 4, "offer_memory": 99},
        ),
        (
            [
                "provider",
                "price",
                "--mem-price",
                "0",
                "--gpu-price",
                "36",
                "--yes",
                *provider_options,
            ],
            {"price_cpu": str(10**15), "price_mem": "0", "price_gpu": str(10**16)},
        ),
        (
            ["provider", "labels", "--label", "a=b", "--label", "c=d", "--yes", *provider_options],
            {"labels": "a=b c=d"},
        ),
        # Options that are not given keep their values; an unchanged registration needs no confirmation.
        (
            [
                "provider",
                "register",
                "--cpus-per-node",
                "1",
                "--nodes",
                "2",
                "--yes",
                *provider_options,
            ],
            {"labels": "a=b c=d", "price_cpu": str(10**15), "price_gpu": str(10**16)},
        ),
        (["provider", "drain", "--wait", *provider_options], {"status": "DRAINING"}),
        (["provider", "resume", *provider_options], {"status": "ACTIVE"}),
        (["admin", "ban", account, "--reason", "late", "--yes", *admin], {"status": "BANNED"}),
        (["admin", "unban", account, *admin], {"status": "ACTIVE"}),
    ]
    for arguments, expected in steps:
        result = cli(*arguments)
        assert result.code == 0, result
        assert int(json.loads(result.out)["gas_fee"]) > 0
        record = status()
        assert {key: record[key] for key in expected} == expected
    # Repetitions send nothing; a ban needs a confirmation.
    for arguments in (
        ["provider", "offer", "--cpus", "4", "--memory", "99M", *provider_options],
        ["provider", "price", "--cpu-price", "3.6", *provider_options],
        ["provider", "labels", "--label", "c=d", "--label", "a=b", *provider_options],
        ["provider", "register", "--nodes", "2", *provider_options],
        ["provider", "resume", *provider_options],
        ["admin", "unban", account, *admin],
        ["admin", "open", *admin],
    ):
        result = cli(*arguments)
        assert (result.code, result.out) == (0, ""), result
        assert "Nothing was sent." in result.err
    assert_refused(cli("admin", "ban", account, *admin), 2, "no terminal to ask on", "--yes")
    monkeypatch.setattr("sys.stdin", _AnsweringTerminal("n\n"))
    for message, arguments in (
        ("from 3.6 to 3.7 credits", ["provider", "price", "--cpu-price", "3.7", *provider_options]),
        (
            "is registered: the new",
            ["provider", "register", "--cpus-per-node", "4", *provider_options],
        ),
    ):
        declined = cli(*arguments)
        assert (declined.code, declined.out.strip()) == (0, "")
        assert message in declined.err
        assert "Nothing was changed." in declined.err
    jobs = cli("provider", "jobs", account)
    assert (jobs.code, jobs.out) == (0, "")


def test_roles_fee_mint_and_handover(cli: Cli, local_devnet: LocalDevnet) -> None:
    admin = ["--keystore", str(local_devnet.wallets / "admin.json"), "-o", "json"]
    alice = json.loads(cli("wallet", "show", "-o", "json").out)["address"]
    owner = json.loads(cli("wallet", "show", *admin).out)["address"]

    def holders(role: str) -> set[str]:
        rows = json.loads(cli("admin", "roles", "-o", "json").out)
        return {row["holder"] for row in rows if row["role"] == role}

    before = holders("METASCHEDULER_ROLE")
    for verb, expected in (("grant", before | {alice}), ("revoke", before)):
        yes = ["--yes"] if verb == "revoke" else []
        assert cli("admin", verb, "scheduler", alice, *yes, *admin).code == 0
        assert holders("METASCHEDULER_ROLE") == expected
        second_handover = cli("admin", verb, "scheduler", alice, *yes, *admin)
        assert (second_handover.code, second_handover.out) == (0, "")
    assert_refused(cli("admin", "grant", "minter", alice), 8, "DEFAULT_ADMIN_ROLE")
    assert cli("admin", "fee", "250", *admin).code == 0
    result = json.loads(cli("admin", "params", "-o", "json").out)
    assert result["fee_bps"] == 250
    names = {field.name for field in dataclasses.fields(Parameters)}
    assert names | {"approval_period"} == set(result)
    assert cli("admin", "fee", "500", *admin).code == 0

    credits = customer_state(cli)
    assert cli("credit", "mint", alice, "3", *admin).code == 0
    assert_refused(cli("credit", "mint", alice, "3"), 8, "MINTER_ROLE")
    assert_refused(cli("credit", "burn", "3"), 2, "no terminal to ask on")
    assert cli("credit", "burn", "3", "--yes").code == 0
    assert customer_state(cli)[0] == credits[0]

    proposed = cli("admin", "handover", alice, "--yes", *admin)
    assert [row["next"] for row in json.loads(proposed.out)] == [alice] * 3
    second_handover = cli("admin", "handover", alice, "--yes", *admin)
    assert f"The handover of Credit to {alice} is pending." in second_handover.err
    withdrawn = cli("admin", "handover", "--cancel", *admin)
    assert [row["next"] for row in json.loads(withdrawn.out)] == [None] * 3
    early_accept = cli("admin", "handover", "--accept", "-o", "json")
    assert f"No handover of MetaScheduler to {alice} is pending." in early_accept.err
    same = cli("admin", "handover", owner, "--yes", *admin)
    assert f"{owner} is the administrator of Credit already." in same.err
    assert {row["admin"] for row in json.loads(early_accept.out)} == {owner}


def test_a_new_version_continues_with_the_old_credit_and_registry(
    cli: Cli, local_devnet: LocalDevnet, tmp_path: Path
) -> None:
    record = str(tmp_path / "new.json")
    new = ["--keystore", str(local_devnet.wallets / "admin.json"), "--deployment", record]
    old = local_devnet.record
    wrong = ["--credit", old["registry"], "--registry", old["registry"]]
    assert_refused(cli("contracts", "deploy", *wrong, *new), 2, "is not this package's Credit")
    kept_options = ["--credit", old["credit"], "--registry", old["registry"]]
    deployed = cli("contracts", "deploy", *kept_options, "--demo-timeouts", *new)
    assert deployed.code == 0
    assert "No --treasury was given: " in deployed.err
    record_data = json.loads(Path(record).read_text())
    assert (record_data["credit"], record_data["registry"]) == (old["credit"], old["registry"])
    assert record_data["scheduler"] != old["scheduler"]
    # Its history begins with the older contract, which need not be the first that was deployed.
    first_block = int(record_data["block"])
    assert not _has_code(local_devnet, (old["credit"], old["registry"]), first_block - 1)
    assert _has_code(local_devnet, (old["credit"], old["registry"]), first_block)
    verified = cli("contracts", "verify", "--deployment", record)
    assert verified.code == 0
    assert "has METASCHEDULER_ROLE of MetaScheduler" in verified.out
    assert cli("audit", "verify", "--deployment", record).code == 0
    # The new version has the providers of the old one.
    providers = cli("provider", "status", "--all", "--deployment", record, "-o", "json")
    assert [row["status"] for row in json.loads(providers.out)][:2] == ["ACTIVE", "ACTIVE"]


def _has_code(local_devnet: LocalDevnet, addresses: tuple[str, ...], block: int) -> bool:
    """Return whether one of these contracts exists at a block."""
    requests = [
        {"jsonrpc": "2.0", "id": 1, "method": "eth_getCode", "params": [address, hex(block)]}
        for address in addresses
    ]
    responses = [httpx2.post(local_devnet.endpoint, json=request) for request in requests]
    return any(response.json()["result"] != "0x" for response in responses)


def test_closed_submissions(cli: Cli, local_devnet: LocalDevnet) -> None:
    admin = ["--keystore", str(local_devnet.wallets / "admin.json")]
    assert cli("admin", "close", *admin).code == 0
    assert_refused(cli("submit", HELLO), 6, "does not accept new jobs")
    assert json.loads(cli("admin", "params", "-o", "json").out)["submissions_open"] is False
    assert cli("admin", "open", *admin).code == 0
    assert cli("submit", HELLO, "--dry-run").code == 0


def test_a_job_without_an_eligible_provider_gets_a_warning_and_a_reason(cli: Cli) -> None:
    submission = cli("submit", HELLO, "--credits", "0.0001", "-o", "json")
    assert submission.code == 0
    assert "Warning: no provider is eligible now" in submission.err
    job = str(json.loads(submission.out)[0]["id"])
    result = cli("job", "why", job)
    assert result.code == 0
    assert "too expensive" in result.out
    assert f"Next: `deepsquare job topup {job} CREDITS`" in result.out
    reported = json.loads(cli("job", "why", job, "-o", "json").out)
    assert (reported["id"], reported["status"]) == (int(job), "PENDING")
    assert reported["why"] == result.out.splitlines()[0]
    assert reported["next"].startswith("`deepsquare job topup")
    assert cli("job", "cancel", job).code == 0
    assert "CANCELLED" in cli("job", "why", job).out


def test_waiting_for_a_job_prints_why_it_makes_no_progress(
    cli: Cli, local_devnet: LocalDevnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    def note(_printer: Printer, text: str) -> None:
        notes.append(text)
        if "too expensive" in text:  # cancelling the job ends the wait
            job = text.split()[1]
            assert run_forked(["job", "cancel", job], local_devnet.folder).code == 0

    monkeypatch.setattr(Printer, "note", note)
    arguments = (HELLO, "--credits", "0.0001", "--wait", "--poll-interval", "0.05", "-o", "json")
    result = cli("submit", *arguments)
    assert (result.code, result.err) == (1, "")
    ended_job = json.loads(result.out)[0]
    assert ended_job["status"] == "CANCELLED"
    reasons = [text for text in notes if "too expensive" in text]
    assert len(reasons) == 1
    assert f"Next: `deepsquare job topup {ended_job['id']} CREDITS` raises" in reasons[0]


def test_invalid_addresses_amounts_and_labels(cli: Cli) -> None:
    assert_refused(cli("credit", "balance", "0x12"), 2, "'0x12'")
    assert_refused(cli("credit", "transfer", "alice", "1"), 2, "'alice'")
    assert_refused(cli("credit", "transfer", "0x" + "00" * 20, "1"), 6, "can't receive credits")
    mistyped = "0x976EA74026E726554dB657fA54763abd0C3a0aA9"
    assert_refused(cli("credit", "transfer", mistyped, "1"), 2, mistyped, "checksum is wrong")
    zero_transfer = cli("credit", "transfer", mistyped.lower(), "0")
    assert (zero_transfer.code, zero_transfer.out) == (2, "")
    assert "is not more than 0" in zero_transfer.err
    assert_refused(cli("provider", "labels", "--label", "fast"), 2, "KEY=VALUE")


# ---------------------------------------------------------------------- ports


def test_port_in_use_and_folder_in_use(local_devnet: LocalDevnet, tmp_path: Path) -> None:
    port = local_devnet.record["extra"]["endpoint"].rpartition(":")[2]
    others = ["--faucet-port", "0", "--relay-port", "0", "--no-explorer"]
    result = run_forked(["devnet", "up", "--port", port, *others], tmp_path)
    assert f"Error: Port {port} on 127.0.0.1 is in use." in result.err
    assert (result.code, "Traceback" in result.err) == (2, False)
    result = run_forked(["devnet", "up", "--port", "0", *others], local_devnet.folder)
    assert_refused(result, 2, "A devnet is already running in")


def test_faucet_pays_a_new_wallet(cli: Cli, tmp_path: Path) -> None:
    wallet = str(tmp_path / "new.json")
    assert cli("wallet", "new", wallet).code == 0
    assert cli("credit", "faucet", "--keystore", wallet).code == 0
    result = json.loads(cli("credit", "balance", "--keystore", wallet, "-o", "json").out)
    assert (result["balance_credits"], result["gas_coin"]) == ("1000", "10")


def test_a_faucet_that_is_down(cli: Cli, local_devnet: LocalDevnet, tmp_path: Path) -> None:
    record = {
        **local_devnet.record,
        "extra": {**local_devnet.record["extra"], "faucet": unused_url()},
    }
    (tmp_path / "deployment.json").write_text(json.dumps(record))
    result = cli("credit", "faucet", "--deployment", str(tmp_path / "deployment.json"))
    assert_refused(result, 7, "no connection", "deepsquare devnet up")


def test_doctor_reports_problems(cli: Cli, local_devnet: LocalDevnet) -> None:
    result = cli("doctor", "-o", "json")
    assert result.code == 0
    assert all(check["ok"] for check in json.loads(result.out))
    result = cli("doctor", "-o", "json", "--endpoint", "http://127.0.0.1:9")
    wrong = {check["check"] for check in json.loads(result.out) if not check["ok"]}
    assert result.code == 1
    assert {"deployment and endpoint", "rules", "contracts", "clock", "balance"} == wrong


def test_doctor_checks_the_password(cli: Cli, tmp_path: Path) -> None:
    other = tmp_path / "password"
    other.write_text("another one")
    other.chmod(0o600)
    result = cli("doctor", "-o", "json", "--password-file", str(other))
    assert result.code == 1
    (wrong,) = (check for check in json.loads(result.out) if not check["ok"])
    assert wrong["check"] == "password file"
    assert "The password does not open the wallet" in wrong["text"]
    assert wrong["hint"]
    assert "another one" not in result.out + result.err
    without_wallet = json.loads(cli("doctor", "-o", "json", "--keystore", str(other)).out)
    reported = {check["check"]: check["ok"] for check in without_wallet}
    assert (reported["wallet"], reported["password file"]) == (False, True)


@pytest.mark.parametrize("verb", [("submit", HELLO), ("quote", HELLO), ("job", "retry", "1")])
def test_zero_credits_are_not_replaced_by_the_default(cli: Cli, verb: tuple[str, ...]) -> None:
    before = customer_state(cli)
    result = cli(*verb, "--credits", "0")
    assert (result.code, result.out) == (2, "")
    assert "--credits" in result.err
    assert "is not more than 0" in result.err
    assert customer_state(cli) == before


def test_an_existing_record_is_never_overwritten(cli: Cli) -> None:
    assert_refused(cli("contracts", "deploy"), 2, "never overwritten")


def test_contracts_on_chain_match_this_build(cli: Cli) -> None:
    result = cli("contracts", "verify", "-o", "json")
    assert result.code == 0
    assert all(row["ok"] for row in json.loads(result.out))


def test_a_new_deployment_writes_a_record_that_verifies(
    cli: Cli, local_devnet: LocalDevnet, tmp_path: Path
) -> None:
    record = tmp_path / "deployment.json"
    options = ["--deployment", str(record), "-o", "json"]
    admin = ["--keystore", str(local_devnet.wallets / "admin.json"), *options]
    assert_refused(cli("contracts", "deploy", "--treasury", "0x12", *admin), 2, "treasury")
    assert not record.exists()
    result = cli("contracts", "deploy", "--demo-timeouts", *admin)
    assert result.code == 0, result
    assert json.loads(result.out)["scheduler"] != local_devnet.record["scheduler"]
    verified = cli("contracts", "verify", *options)
    assert verified.code == 0, verified
    assert [path.name for path in tmp_path.iterdir()] == ["deployment.json"]
    # A record that differs from the chain is detected.
    record.write_text(json.dumps(json.loads(record.read_text()) | {"treasury": "0x" + "12" * 20}))
    assert cli("contracts", "verify", *options).code == 10
