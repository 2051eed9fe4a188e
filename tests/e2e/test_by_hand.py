"""The steps of the README by hand: each service is a process, and jobs run from end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from eth_account.messages import encode_defunct, encode_typed_data
from eth_utils.address import to_checksum_address
from playwright.sync_api import Page, expect

from deepsquare_chain.chain.wallet import unlock
from deepsquare_chain.demo.runner import processes_of
from tests.support.browser import open_browser
from tests.support.cli import EXAMPLES, Outcome, clean_environment, devnet, run, running
from tests.support.local_devnet import Cli, LocalDevnet


@pytest.fixture(scope="module")
def local_devnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDevnet]:
    """A devnet with its explorer, a meta-scheduler and a provider, each in its own folder."""
    folder = tmp_path_factory.mktemp("by-hand")
    with devnet(folder, "--explorer-port", "0"), ExitStack() as stack:
        for name, verb in (("scheduler", "metascheduler"), ("alpine", "provider")):
            home = folder / ".deepsquare" / name
            stack.enter_context(running([verb, "run"], home, name))
        yield LocalDevnet(folder)
    assert processes_of(folder) == []


def data(outcome: Outcome) -> Any:
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def test_one_job_from_end_to_end(cli: Cli, local_devnet: LocalDevnet) -> None:
    hello = str(EXAMPLES / "hello.yaml")
    before = data(cli("credit", "balance", "-o", "json"))
    offers = data(cli("quote", hello, "-o", "json"))
    assert [offer["provider_id"] for offer in offers if offer["eligible"]] == [1, 2]

    submission = run(
        ["submit", hello, "--wait", "--wait-timeout", "200", "-o", "json"], local_devnet.folder, 240
    )
    (job,) = data(submission)
    assert "Escrowing 1 of 1000 credits" in submission.err
    for status in ("RUNNING at provider 1", "FINISHED at provider 1"):
        assert f"job 1: {status}" in submission.err

    assert (job["name"], job["status"], job["exit_code"]) == ("hello", "FINISHED", 0)
    assert int(job["funded"]) == int(job["paid"]) + int(job["fee"]) + int(job["refunded"])
    after = data(cli("credit", "balance", "-o", "json"))
    assert int(before["balance"]) - int(after["balance"]) == int(job["paid"]) + int(job["fee"])
    assert (before["allowance"], after["allowance"]) == ("0", "0")

    logs = cli("job", "logs", "1")
    assert logs.out.splitlines()[0] == "Hello from the grid, reader"
    assert "line 3 of job 1" in logs.out
    results = data(cli("job", "results", "1", "--to", "got", "-o", "json"))
    assert [(item["name"], item["on_chain"]) for item in results] == [("output", True)]
    assert (local_devnet.folder / "got" / "output").read_text() == logs.out
    assert "job 1 ended FINISHED at provider 1" in cli("job", "why", "1").out


def test_submit_wait_ends_with_the_jobs_own_code(local_devnet: LocalDevnet) -> None:
    result = run(["submit", str(EXAMPLES / "exits-3.yaml"), "--wait"], local_devnet.folder, 240)
    assert result.code == 3
    assert "FAILED" in result.err


def test_the_example_of_the_sdk_runs_a_job_from_quote_to_statement(
    local_devnet: LocalDevnet,
) -> None:
    result = subprocess.run(
        [sys.executable, EXAMPLES / "sdk.py"],
        cwd=local_devnet.folder,
        env=clean_environment(local_devnet.folder),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result
    lines = result.stdout.splitlines()
    assert lines[0].startswith("provider 1: 0.06")
    assert lines[0].endswith("credits, start now")
    job_id = lines[2].split()[1]
    assert f"job {job_id}: FINISHED" in lines
    assert f"line 3 of job {job_id}" in lines
    assert any(re.fullmatch(r"output: \d+ bytes, as reported on chain: True", x) for x in lines)
    assert "s billed:" in lines[-2]
    assert lines[-1].endswith("credits after a refund")


class BrowserWallet:
    """A browser wallet (EIP-1193) that signs with a key of this test; addresses in lower case."""

    def __init__(self, page: Page, home: Path) -> None:
        settings = tomllib.loads((home / ".deepsquare.toml").read_text())
        password = (home / "password").read_text().strip()
        self.account = unlock(home / "wallet.json", password)
        self.requests: list[str] = []
        self._node = settings["endpoint"]
        page.expose_function("walletAsked", self._answer)
        page.add_init_script(
            """window.ethereum = { on() {}, request: async (asked) => {
              const told = JSON.parse(await window.walletAsked(JSON.stringify(asked)));
              if (told.error) throw new Error(told.error.message);
              return told.result;
            } };"""
        )

    def _answer(self, text: str) -> str:
        body = json.loads(text)
        method, params = body["method"], body.get("params") or []
        self.requests.append(method)
        match method:
            case "eth_requestAccounts":
                result: Any = [self.account.address.lower()]
            case "personal_sign":
                signable = encode_defunct(hexstr=params[0])
                result = "0x" + bytes(self.account.sign_message(signable).signature).hex()
            case "eth_signTypedData_v4":
                signable = encode_typed_data(full_message=json.loads(params[1]))
                result = "0x" + bytes(self.account.sign_message(signable).signature).hex()
            case "eth_sendTransaction":
                result = self._send(params[0])
            case _:
                return json.dumps(self._rpc(method, params))
        return json.dumps({"result": result})

    def _send(self, transaction: dict[str, Any]) -> str:
        number = self._rpc("eth_getTransactionCount", [self.account.address, "latest"])["result"]
        price = int(self._rpc("eth_gasPrice", [])["result"], 16)
        signed = self.account.sign_transaction(
            {
                "to": to_checksum_address(transaction["to"]),
                "data": transaction["data"],
                "value": int(transaction["value"], 16),
                "chainId": int(transaction["chainId"], 16),
                "nonce": int(number, 16),
                "gas": 1_000_000,
                "maxFeePerGas": 2 * price,
                "maxPriorityFeePerGas": 10**9,
            }
        )
        raw = "0x" + bytes(signed.raw_transaction).hex()
        return str(self._rpc("eth_sendRawTransaction", [raw])["result"])

    def _rpc(self, method: str, params: list[Any]) -> Any:
        call = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return httpx2.post(self._node, json=call, trust_env=False, timeout=30).json()


FROM_BROWSER = """\
name: from a browser
resources: {tasks: 1, cpusPerTask: 1, memPerCpu: 64, gpus: 0}
timeLimit: 60
credits: "1"
steps:
  - name: say
    run: {command: "echo private words; sleep 3; echo the end; echo kept > kept.txt"}
"""


#: Makes the page wait for each quote longer than it waits after the last key.
SLOW_QUOTES = """(() => {
  const { fetch } = window;
  window.fetch = async (path, ...rest) => {
    if (path === "/wallet/quote") await new Promise((resolve) => setTimeout(resolve, 1500));
    return fetch(path, ...rest);
  };
})();"""


def test_a_job_submitted_in_the_browser_has_a_live_page(local_devnet: LocalDevnet) -> None:
    """The page uploads the definition; only the wallet that signed in sees the output."""
    match = re.search(
        r"^explorer +(http://\S+)$", (local_devnet.folder / "devnet.log").read_text(), re.MULTILINE
    )
    assert match is not None
    with open_browser() as browser:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        wallet = BrowserWallet(page, local_devnet.folder / ".deepsquare" / "alice")
        page.add_init_script(SLOW_QUOTES)
        page.goto(f"{match[1]}/submit")
        page.get_by_label("Job file", exact=True).check()
        page.locator("[name=file]").fill(FROM_BROWSER)
        page.locator("#submit-job").click()
        # Another quote is requested before the one of the click is answered.
        page.locator("[name=file]").dispatch_event("input")
        page.locator("dialog").get_by_role("button", name="Submit").click()
        page.wait_for_url(re.compile(r"/jobs/\d+$"))
        assert "personal_sign" in wallet.requests
        output = page.locator("#output")
        expect(output.locator("pre")).to_contain_text("private words", timeout=60_000)
        expect(output.locator("pre")).to_contain_text("the end", timeout=60_000)
        expect(output).to_contain_text("as its provider reported on chain", timeout=60_000)
        with page.expect_download() as downloading:
            output.get_by_role("button", name="work/kept.txt").click()
        assert Path(downloading.value.path()).read_text() == "kept\n"
        assert wallet.requests.count("personal_sign") == 1
        assert faults == []
        stranger = browser.new_page()
        stranger.goto(page.url)
        expect(stranger.locator("#output")).to_contain_text("Sign in to see it")
        assert "private words" not in stranger.content()


def test_the_audit_finds_no_difference(cli: Cli) -> None:
    result = data(cli("audit", "verify", "-o", "json"))
    assert (result["ok"], result["difference"]) == (True, "0")


def test_one_jobs_credits_are_audited_by_hand(cli: Cli) -> None:
    deep = ["audit", "verify", "--proofs", "-o", "json"]
    result = data(cli(*deep))
    assert (result["ok"], result["proven"], result["findings"]) == (True, True, [])
    assert {check["difference"] for check in result["checks"]} == {"0"}
    assert all(check["how_to_repeat"] for check in result["checks"])
    assert {"fee-change", "role-change", "mint"} <= {row["code"] for row in result["exceptions"]}

    job = data(cli("audit", "job", "1", "-o", "json"))
    assert (job["status"], job["bill"]["ok"]) == ("FINISHED", True)
    assert job["bill"]["reported"] is not None
    assert [line["difference"] for line in job["bill"]["lines"]] == ["0"] * 4

    block = data(cli("audit", "verify", "--block", "0", "--events-only", "-o", "json"))
    assert (block["block"], block["jobs"], block["supply"]) == (0, 0, "0")
    empty = cli("audit", "statement", "--from", "0", "--to", "0", "-o", "json")
    assert data(empty) == []
    assert "Opening balance 0, closing balance 0; blocks 0 to 0." in empty.err
    rows = data(cli("audit", "statement", "-o", "json"))
    kinds = [row["kind"] for row in rows]
    assert kinds[0] == "mint"
    assert kinds.count("escrow") == kinds.count("refund") == len(kinds[1:]) // 2 >= 1


def test_an_export_is_replayed_and_a_tampered_one_is_found(
    cli: Cli, local_devnet: LocalDevnet
) -> None:
    export = data(cli("audit", "export", "books", "-o", "json"))
    assert export["logs"] > 20
    assert cli("audit", "verify", "books").code == 0
    assert cli("audit", "verify", "books/manifest.json", "--offline").code == 0
    assert cli("audit", "verify", "--offline").code == 2
    first_block = export["first_block"]
    dated = data(cli("audit", "export", "dated", "--to", str(first_block + 4), "-o", "json"))
    assert (dated["first_block"], dated["last_block"]) == (first_block, first_block + 4)
    assert dated["logs"] < export["logs"]
    assert cli("audit", "verify", "dated", "--offline").code == 0
    for options in (["--to", "2000-01-01"], ["--month", "1999-12"], ["--to", "9", "--block", "9"]):
        result = cli("audit", "export", "none", *options)
        assert (result.code, result.out) == (2, ""), result.err

    logs = local_devnet.folder / "books" / "logs.jsonl"
    logs.write_bytes(b"".join(logs.read_bytes().splitlines(keepends=True)[:-1]))
    result = cli("audit", "verify", "books", "-o", "json")
    assert result.code == 10
    codes = {finding["code"] for finding in json.loads(result.out)["findings"]}
    assert {"file", "chain", "storage"} <= codes
    assert cli("audit", "verify", "books", "--offline").code == 10


def test_the_devnet_prints_the_url_of_its_explorer(cli: Cli, local_devnet: LocalDevnet) -> None:
    """The explorer at this URL shows the jobs of this grid."""
    match = re.search(
        r"^explorer +(http://\S+)$", (local_devnet.folder / "devnet.log").read_text(), re.MULTILINE
    )
    assert match is not None
    jobs = data(cli("job", "list", "--all", "-o", "json"))
    with httpx2.Client(base_url=match[1], trust_env=False, timeout=30) as web:
        deadline = time.monotonic() + 180
        while (status := web.get("/api/v1/status").json())["lag"]:
            assert time.monotonic() < deadline, status
            time.sleep(0.1)
        rows = web.get("/api/v1/jobs").json()["items"]
        assert {row["id"] for row in rows} == {job["id"] for job in jobs}
        assert "hello" in web.get("/jobs/1").text


def test_sources_are_written_for_other_explorers(cli: Cli, local_devnet: LocalDevnet) -> None:
    result = cli("contracts", "verify", "--write", "tree")
    assert result.code == 0
    assert len(list((local_devnet.folder / "tree").rglob("metadata.json"))) == 4
    refusal = cli("contracts", "verify", "--sourcify", "http://127.0.0.1:1")
    assert refusal.code == 7
    assert "can't be reached" in refusal.err
