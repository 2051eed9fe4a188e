"""The explorer's pages over HTTP, on a grid with all final statuses and hostile texts."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import httpx2
import pytest
from web3.types import Wei

from deepsquare_chain.audit.runner import audit_grid
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.job import JobStatus
from deepsquare_chain.web.security import HEADERS
from tests.support.busyexplorer import BusyExplorer, busy_explorer
from tests.support.busygrid import HOSTILE

JSON = {"Content-Type": "application/json"}
FORM: dict[str, Any] = {
    "name": "from a browser",
    "credits": "1.5",
    "time_limit": "10m",
    "tasks": "1",
    "cpus_per_task": "1",
    "mem_per_cpu": "64",
    "gpus": "0",
    "retries": "0",
    "objective": "cost",
    "uses": "",
    "script": "echo hello\r\necho again",
    "payment": "permit",
}


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BusyExplorer]:
    with busy_explorer(tmp_path_factory.mktemp("explorer")) as explorer:
        yield explorer


@pytest.fixture(scope="module")
def web(explorer: BusyExplorer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=explorer.url, timeout=60, trust_env=False) as client:
        yield client


class Tags(HTMLParser):
    """Parses a page to its tags with attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def links(self) -> set[str]:
        return {str(values["href"]) for tag, values in self.tags if tag == "a" and "href" in values}


def crawl(web: httpx2.Client) -> dict[str, Tags]:
    """Follow links to pages, at most some of each kind."""
    pages: dict[str, Tags] = {}
    kinds: dict[str, int] = {}
    waiting = ["/", "/submit", "/search?q=pi"]
    while waiting:
        path = waiting.pop(0)
        kind = re.sub(r"0x[0-9a-fA-F]+|\d+|(?<==)[^&]*", "N", path.partition("#")[0])
        if path in pages or kinds.get(kind, 0) >= 6 or not path.startswith("/"):
            continue
        kinds[kind] = kinds.get(kind, 0) + 1
        answer = web.get(path)
        assert answer.status_code == 200, (path, answer.text[-2_000:])
        if answer.headers["content-type"].startswith("text/html"):
            pages[path] = Tags(answer.text)
            waiting += sorted(pages[path].links() - {"/api/v1"})
    return pages


@pytest.fixture(scope="module")
def pages(web: httpx2.Client) -> dict[str, Tags]:
    return crawl(web)


def test_every_link_leads_somewhere(pages: dict[str, Tags]) -> None:
    kinds = {re.sub(r"0x[0-9a-fA-F]+|\d+", "N", path).partition("?")[0] for path in pages}
    for kind in (
        *("/", "/jobs", "/jobs/N", "/accounts/N", "/jobs/N/invoice", "/providers"),
        *("/providers/N", "/transactions", "/transactions/N", "/blocks", "/blocks/N"),
        *("/audit", "/contracts", "/contracts/Credit", "/contracts/MetaScheduler", "/submit"),
    ):
        assert kind in kinds


def test_hostile_texts_are_shown_as_text(pages: dict[str, Tags]) -> None:
    """Hostile texts create no tag or attribute, and are shown in full."""
    for path, page in pages.items():
        for tag, attributes in page.tags:
            assert tag not in {"img", "iframe", "object", "embed", "base"}, path
            assert not [name for name in attributes if name.startswith("on")], path
            assert "style" not in attributes, path
            href = str(attributes.get("href") or attributes.get("src") or "")
            assert not href.lower().startswith(("javascript:", "data:", "//")), (path, href)
            if tag == "script":
                assert href.startswith("/static/"), path
    all_text = "".join(page.text for page in pages.values())
    assert HOSTILE[0] in all_text
    assert HOSTILE[1] in all_text
    assert "\\u202egnp.exe" in all_text
    assert "\u202e" not in all_text


def test_pages_load_nothing_from_other_hosts(pages: dict[str, Tags]) -> None:
    for path, page in pages.items():
        for tag, attributes in page.tags:
            for name in ("src", "href", "action"):
                result = str(attributes.get(name) or "")
                if result.startswith("http"):
                    assert (tag, name) == ("a", "href"), (path, result)
                    assert "noopener" in str(attributes.get("rel"))


def test_headers_keep_pages_safe(web: httpx2.Client) -> None:
    for path in ("/", "/nope", "/static/style.css", "/wallet/grid", "/healthz"):
        answer = web.get(path)
        for name, value in HEADERS.items():
            assert answer.headers[name] == value, (path, name)
        assert "set-cookie" not in answer.headers


def test_only_requests_for_its_host_names_are_served(web: httpx2.Client) -> None:
    assert web.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert web.get("/", headers={"Host": "localhost"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/nope", 404, "There is no page at /nope"),
        ("/jobs/999999", 404, "Job 999999 does not exist"),
        ("/jobs/abc", 404, "is not a job ID"),
        ("/jobs/" + "9" * 40, 404, ""),
        ("/jobs?status=sleeping", 400, "is not a status of a job"),
        ("/jobs?page=xyz", 400, "is not the number of a page"),
        ("/jobs?page=0", 400, "Pages have the numbers"),
        ("/jobs?sort=colour", 400, "not a sort key of jobs"),
        ("/jobs?from=yesterday", 400, "is not a date"),
        ("/jobs?from=2026-11-27&to=2026-11-20", 400, "No time lies"),
        ("/providers?sort=colour", 400, "not a sort key of providers"),
        ("/accounts/0x" + "12" * 20 + "?kind=gift", 400, "is not a kind of movement"),
        ("/?range=century", 400, "is not a range"),
        ("/accounts/0x12", 400, "is not a valid address"),
        ("/accounts/<script>alert(1)", 400, "&lt;script&gt;"),
        ("/providers/77", 404, "There is no provider"),
        ("/transactions/0x" + "12" * 32, 404, "has no event"),
        ("/blocks/99999999", 404, "There is no block 99999999 yet"),
        ("/blocks/0x" + "12" * 32, 404, "There is no block 0x1212"),
        ("/blocks/0x12", 404, "There is no block 0x12"),
        ("/blocks/latest", 404, "is not a block number"),
        ("/contracts/Nothing", 404, "There is no contract"),
        ("/contracts/Credit?call=mint", 400, "no function"),
        ("/contracts/Credit?call=balanceOf&a0=zz", 400, "is not a valid address"),
        ("/audit?of=everything", 400, "is not a kind of anomaly"),
    ],
)
def test_errors_contain_help(web: httpx2.Client, path: str, status: int, message: str) -> None:
    answer = web.get(path)
    assert answer.status_code == status
    assert message in answer.text
    assert "Traceback" not in answer.text
    assert "<script>alert" not in answer.text


def test_home_shows_the_grid(web: httpx2.Client) -> None:
    text = web.get("/").text
    for message in ("Live jobs by status", "Utilisation by provider", "Credits in escrow"):
        assert message in text
    assert 'role="img"' in text
    for name in ("hour", "day", "week", "all"):
        assert web.get("/", params={"range": name}).status_code == 200


def job_of(explorer: BusyExplorer, status: JobStatus) -> int:
    async def find() -> int:
        scheduler = explorer.grid.contracts.scheduler
        ids = list(range(1, await scheduler.job_count() + 1))
        return next(job.id for job in await scheduler.get_jobs(ids) if job.status is status)

    return explorer.run(find())


@pytest.mark.parametrize("status", [item for item in JobStatus if item], ids=lambda s: s.name)
def test_a_job_of_every_status_has_its_page(
    explorer: BusyExplorer, web: httpx2.Client, status: JobStatus
) -> None:
    number = job_of(explorer, status)
    text = web.get(f"/jobs/{number}").text
    assert f'<span class="status s-{status.name}" title="{status.meaning.capitalize()}">' in text
    assert "Where the credits went" in text
    is_final = status.is_final
    assert ("agrees with the chain" in text) == is_final
    assert "differs from the chain" not in text
    assert ("data-act=" in text) == status.is_live
    is_pending = status is JobStatus.PENDING
    assert ("Expected start" in text) == is_pending
    assert bool(re.search(r"number \d+ of \d+ in the queue; .*estimates", text)) == is_pending


def paid_while_running(explorer: BusyExplorer) -> dict[JobStatus, int]:
    """Return the jobs with interim payments by status."""

    async def find() -> dict[JobStatus, int]:
        scheduler = explorer.grid.contracts.scheduler
        ids = list(range(1, await scheduler.job_count() + 1))
        jobs = await scheduler.get_jobs(ids)
        return {job.status: job.id for job in jobs if job.allows_interim_payments}

    return explorer.run(find())


def test_interim_payments_are_shown(explorer: BusyExplorer, web: httpx2.Client) -> None:
    result = paid_while_running(explorer)
    finished_job, running = result[JobStatus.FINISHED], result[JobStatus.RUNNING]
    for number in (finished_job, running):
        text = web.get(f"/jobs/{number}").text
        assert "Interim payments" in text
        assert "its provider may collect interim payments while it runs" in text
        assert "assign it to themselves" in text
        assert text.count('data-row="i') == 2
    assert "have accrued" in text
    text = web.get(f"/jobs/{finished_job}").text
    assert "agrees with the chain" in text
    assert "interim payments included" in text
    host = explorer.grid.providers[0].address
    text = web.get(f"/providers/{host}").text
    assert "<dt>Measured</dt>" in text
    assert "runs of jobs that ran elsewhere too" in text or "claimed speed suggests" in text
    assert "interim payment</span>" in text
    statement = web.get(f"/accounts/{host}/statement.csv").text
    assert statement.count(",interim-payment,") == 4
    body = web.get(f"/api/v1/jobs/{finished_job}").json()
    assert body["row"]["flags"] == ["NO_SELF_SCHEDULING", "INTERIM_PAYMENTS"]
    assert [payment["interim"] for payment in body["payments"]] == [True, True, False]
    total = sum(int(payment["paid"]) for payment in body["payments"])
    assert str(total) == body["row"]["paid"]


def test_a_signed_request_shows_its_signer_and_its_call(
    explorer: BusyExplorer, web: httpx2.Client
) -> None:
    items = web.get("/api/v1/transactions", params={"signer": explorer.bob}).json()["items"]
    [row] = items
    assert (row["contract"], row["method"]) == ("ERC2771Forwarder", "executeBatch")
    assert row["sender"] == explorer.grid.stranger.address
    detail = web.get(f"/api/v1/transactions/{row['at']['tx_hash']}").json()
    # The same request twice: its nonce is used up with the first.
    assert [(request["method"], request["ok"]) for request in detail["forwarded"]] == [
        ("submitJobs", True),
        ("submitJobs", False),
    ]
    assert {request["signer"] for request in detail["forwarded"]} == {explorer.bob}
    text = web.get(f"/transactions/{row['at']['tx_hash']}").text
    assert text.count("signed by") == 2
    assert text.count("not executed") == 1
    assert "requests[0].terms.name" in text
    [job] = {event["job_id"] for event in detail["events"] if event["job_id"]}
    body = web.get(f"/api/v1/jobs/{job}").json()["row"]
    assert (body["customer"], body["name"]) == (explorer.bob, "signed request")


def test_load_equals_that_of_the_contract(explorer: BusyExplorer, web: httpx2.Client) -> None:
    for number, account in enumerate(explorer.grid.providers, start=1):
        load = explorer.run(explorer.grid.contracts.scheduler.load_of(number))
        body = web.get(f"/api/v1/providers/{number}").json()["row"]
        assert body["load"] == {"cpus": load.cpus, "memory": load.memory, "gpus": load.gpus}
        offer = body["offer"]["cpus"]
        assert f"{load.cpus} of {offer}" in web.get(f"/providers/{account.address}").text


def test_the_forwarder_is_one_of_the_contracts(web: httpx2.Client) -> None:
    assert "ERC2771Forwarder" in web.get("/contracts").text
    text = web.get("/contracts/ERC2771Forwarder").text
    assert "same code as this package" in text
    answer = web.get("/contracts/ERC2771Forwarder?call=eip712Domain").text
    assert "DeepSquare" in answer


def test_an_ended_job_has_an_invoice(explorer: BusyExplorer, web: httpx2.Client) -> None:
    number = job_of(explorer, JobStatus.FINISHED)
    answer = web.get(f"/jobs/{number}/invoice")
    assert f"Invoice for job {number}" in answer.text
    assert "The bill matches the recomputed bill." in answer.text
    assert "style-src 'sha256-" in answer.headers["content-security-policy"]
    answer = web.get(f"/jobs/{job_of(explorer, JobStatus.RUNNING)}/invoice")
    assert (answer.status_code, "has not ended" in answer.text) == (400, True)


def test_a_job_is_priced_and_its_errors_are_reported_without_a_wallet(web: httpx2.Client) -> None:
    body = web.post("/wallet/quote", json={**FORM, "credits": "900"}).json()
    assert body["problems"] == []
    assert "could run it; the whole time limit costs" in body["verdict"]
    names = {row["provider"] for row in body["offers"]}
    assert names == {"provider 1 \u00b7 alpine", "provider 2 \u00b7 jura"}
    costs = [float(row["cost"]) for row in body["offers"] if not row["refusal"]]
    assert costs == sorted(costs)
    file = body["file"]
    second_quote = web.post("/wallet/quote", json={"mode": "file", "file": file}).json()
    assert second_quote["offers"] == body["offers"]
    wrong = web.post("/wallet/quote", json={"mode": "file", "file": file + "retires: 1\n"}).json()
    assert [problem["line"] for problem in wrong["problems"]] == [len(file.splitlines()) + 1]
    form = web.post("/wallet/quote", json={**FORM, "credits": "abc", "time_limit": "soon"}).json()
    assert len(form["problems"]) == 2
    schema = web.get("/submit/schema.json").json()
    assert "timeLimit" in schema["properties"]


def test_pages_are_compressed_and_can_be_gone_back_to(web: httpx2.Client) -> None:
    for path in ("/", "/jobs", "/submit", "/static/style.css"):
        answer = web.get(path, headers={"Accept-Encoding": "gzip"})
        assert answer.headers["content-encoding"] == "gzip", path
        assert answer.headers["cache-control"] == "no-cache", path
    with web.stream("GET", "/live", headers={"Accept-Encoding": "gzip"}) as stream:
        assert "content-encoding" not in stream.headers


def test_a_waiting_job_shows_the_reason(explorer: BusyExplorer, web: httpx2.Client) -> None:
    ids = explorer.run(explorer.busy.submit(1, uses="gpu.model=b200"))
    wait_for_page(web, f"/jobs/{ids[0]}")
    text = web.get(f"/jobs/{ids[0]}").text
    assert "gpu.model=b200: has no such label" in text


def wait_for_page(web: httpx2.Client, path: str) -> None:
    wait_until(lambda: web.get(path).status_code == 200)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_statement_ends_at_the_balance(explorer: BusyExplorer, web: httpx2.Client) -> None:
    answer = web.get(f"/accounts/{explorer.alice}/statement.csv")
    assert answer.headers["content-type"].startswith("text/csv")
    assert "attachment" in answer.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    balance = 0
    for row in rows:
        balance += int(row["credit"] or 0) - int(row["debit"] or 0)
        assert bool(row["job_id"]) is bool(row["job_name"])
        assert int(row["balance"]) == balance
    chain_balance = explorer.run(explorer.grid.contracts.credit.balance_of(explorer.alice))
    assert balance == chain_balance
    assert f"{chain_balance / CREDIT:,.0f}"[:3].replace(",", "") in web.get(
        f"/accounts/{explorer.alice}"
    ).text.replace("\u2009", "")


def test_the_audit_page_shows_no_difference(web: httpx2.Client) -> None:
    text = web.get("/audit").text
    assert "Every credit is accounted for" in text
    requests = re.findall(r"curl -H .*? -d", text)
    assert len(requests) == 2


def test_exceptions_are_those_of_the_audit(explorer: BusyExplorer, web: httpx2.Client) -> None:
    """Page, API and `audit exceptions` list the same anomalies."""
    report = explorer.run(audit_grid(explorer.grid.contracts))
    received: list[dict[str, Any]] = []
    options: dict[str, Any] = {"limit": 200}
    while True:
        page = web.get("/api/v1/exceptions", params=options).json()
        received += page["items"]
        if page["next"] is None:
            break
        options["cursor"] = page["next"]
    assert [
        (row["code"], row["severity"], row["message"], row["at"]["tx_hash"])
        for row in reversed(received)
    ] == [
        (row.code, row.severity, row.message, row.tx_hash)
        for row in report.anomalies
        if row.tx_hash
    ]
    page = Tags(web.get("/audit").text)
    conditions = {(row.code, row.job_id) for row in report.anomalies if not row.tx_hash}
    exceptions = web.get("/api/v1/exceptions/open").json()["items"]
    assert {(row["code"], row["job_id"]) for row in exceptions} >= conditions
    assert ("Open now" in page.text) == bool(exceptions)
    for kind, message in (("jobs", "was given up"), ("administration", "role MINTER_ROLE of")):
        assert message in Tags(web.get("/audit", params={"of": kind}).text).text


def test_the_set_up_is_collapsed_on_the_first_page_of_the_audit(web: httpx2.Client) -> None:
    all_rows = {
        row["at"]["tx_hash"]: row
        for row in web.get("/api/v1/exceptions?kind=administration&limit=200").json()["items"]
    }
    text = web.get("/audit").text
    visible, _, folded = text.partition(" of the set-up:")
    assert all_rows
    for tx_hash in all_rows:
        assert tx_hash not in visible
        assert tx_hash in folded


def test_lists_are_filtered_sorted_and_numbered(explorer: BusyExplorer, web: httpx2.Client) -> None:
    def ids(**query: object) -> list[int]:
        text = web.get("/jobs", params={key: str(value) for key, value in query.items()}).text
        return [int(match) for match in re.findall(r'<tr data-row="(\d+)"', text)]

    customer = web.get("/api/v1/jobs", params={"customer": explorer.alice, "limit": 200}).json()
    customer_jobs = [row["id"] for row in customer["items"]]
    assert ids(customer="alice") == ids(customer=explorer.alice) == customer_jobs[:50]
    assert ids(customer="alice", sort="job") == sorted(customer_jobs)[:50]
    assert (
        ids(status="finished", customer="alice", name="WORD")
        == [
            row["id"]
            for row in customer["items"]
            if row["status"] == "FINISHED" and "word" in row["name"].casefold()
        ][:50]
    )
    assert ids(to="2001-01-01") == []
    assert "No job matches" in web.get("/jobs?to=2001-01-01").text
    rows = web.get("/transactions").text.count("<tr data-row=")
    assert ('rel="next"' in web.get("/transactions").text) == (rows == 50)
    assert "/transactions?page=2" in web.get("/transactions").text


def test_the_printed_call_gives_the_same_result(explorer: BusyExplorer, web: httpx2.Client) -> None:
    text = Tags(web.get("/audit").text).text
    for request in re.findall(r"-d '(\{.*?\})' \$", text):
        answer = httpx2.post(explorer.node_url, json=json.loads(request), trust_env=False).json()
        assert int(answer["result"], 16) > 0


def test_a_refused_transaction_reports_why(explorer: BusyExplorer, web: httpx2.Client) -> None:
    grid = explorer.grid
    call = grid.contracts.scheduler.cancel([1])

    async def send() -> str:
        signed = grid.stranger.sign_transaction(
            {
                "to": call.to,
                "data": call.data,
                "gas": 300_000,
                "chainId": 1337,
                "nonce": await grid.w3.eth.get_transaction_count(grid.stranger.address),
                "gasPrice": 10**10,
                "value": 0,
            }
        )
        tx_hash = await grid.w3.eth.send_raw_transaction(signed.raw_transaction)
        await grid.w3.eth.wait_for_transaction_receipt(tx_hash)
        return "0x" + bytes(tx_hash).hex()

    tx_hash = explorer.run(send())
    text = web.get(f"/transactions/{tx_hash}").text
    assert "refused" in text
    assert "cancel(uint256[])" in text or "cancel(uint64[])" in text
    assert "Job 1" in text
    body = web.get(f"/wallet/outcome/{tx_hash}").json()
    assert body["state"] == "refused"
    assert "Job 1" in body["reason"]


def test_blocks_and_transactions_without_events_are_the_nodes(
    explorer: BusyExplorer, web: httpx2.Client
) -> None:
    """Search finds objects by any number or hash of the chain."""
    grid = explorer.grid

    async def send_to_stranger() -> tuple[str, Any]:
        tx_hash = await grid.w3.eth.send_transaction(
            {"from": grid.admin.address, "to": grid.stranger.address, "value": Wei(1)}
        )
        receipt = await grid.w3.eth.wait_for_transaction_receipt(tx_hash)
        return "0x" + bytes(tx_hash).hex(), await grid.w3.eth.get_block(receipt["blockNumber"])

    tx_hash, block = explorer.run(send_to_stranger())
    number, block_hash = block["number"], "0x" + bytes(block["hash"]).hex()
    wait_until(lambda: web.get("/api/v1/status").json()["block"] >= number)
    for key in (number, block_hash, block_hash.upper().replace("X", "x")):
        text = web.get(f"/blocks/{key}").text
        assert "This block has no event of this grid" in text
        assert block_hash in text
        assert f'href="/blocks/{number - 1}"' in text
    assert "has no event of this grid" in web.get(f"/transactions/{tx_hash}").text
    for text, target in (
        (str(number), f"/blocks/{number}"),
        (block_hash, f"/blocks/{block_hash}"),
        (tx_hash, f"/transactions/{tx_hash}"),
    ):
        assert web.get("/search", params={"q": text}).headers["location"] == target
    assert "Nothing found" in web.get("/search", params={"q": "9" * 18}).text
    assert "This block has no event of this grid" in web.get("/blocks/0").text


def test_read_functions_return_values(explorer: BusyExplorer, web: httpx2.Client) -> None:
    chain_balance = explorer.run(explorer.grid.contracts.credit.balance_of(explorer.alice))
    page = Tags(
        web.get("/contracts/Credit", params={"call": "balanceOf", "a0": explorer.alice}).text
    )
    assert any(tag == "dl" for tag, _ in page.tags)
    assert str(chain_balance)[:4] in page.text.replace("\u2009", "").replace(",", "")
    response = web.get("/contracts/MetaScheduler", params={"call": "getJobs", "a0": "[1, 2]"})
    assert response.status_code == 200
    assert explorer.alice[:8] in response.text or "alice" in response.text
    abi = web.get("/contracts/Credit/abi.json").json()
    assert any(entry.get("name") == "transfer" for entry in abi)
    assert "same code as this package" in web.get("/contracts").text


def test_search_redirects_to_a_single_result(explorer: BusyExplorer, web: httpx2.Client) -> None:
    answer = web.get("/search", params={"q": explorer.alice})
    assert (answer.status_code, answer.headers["location"]) == (303, f"/accounts/{explorer.alice}")
    assert "Nothing found" in web.get("/search", params={"q": "zzz"}).text
    assert "&lt;script&gt;zz" in web.get("/search", params={"q": "<script>zz"}).text


def test_health_and_metrics(web: httpx2.Client) -> None:
    assert web.get("/healthz").json() == {"live": True, "ready": True}
    assert "index_block" in web.get("/metrics").text


# -- the wallet's side


def test_a_submission_is_explained_and_encoded(explorer: BusyExplorer, web: httpx2.Client) -> None:
    """A customer with an allowance gets the call at once, and the definition is stored."""
    plan = web.post("/wallet/submit", json={**FORM, "account": explorer.alice}).json()
    assert plan["permit"] is plan["approval"] is None
    assert plan["call"]["to"] == explorer.grid.contracts.scheduler.address
    assert plan["call"]["chainId"] == "0x539"
    assert plan["call"]["value"] == "0"
    assert plan["effects"][0].startswith("1.5 credits go from your wallet into escrow")
    definitions = [json.loads(path.read_bytes()) for path in explorer.definitions.glob("*.json")]
    commands = [step["run"]["command"] for item in definitions for step in item["steps"]]
    assert "echo hello\necho again" in commands


def test_without_allowance_a_permit_or_an_approval_comes_first(
    explorer: BusyExplorer, web: httpx2.Client
) -> None:
    grid = explorer.grid

    async def fund() -> None:
        credit = grid.contracts.credit
        await grid.send(grid.admin, credit.mint(grid.stranger.address, 5 * CREDIT))

    explorer.run(fund())
    form = {**FORM, "account": grid.stranger.address}
    stored_count = len(list(explorer.definitions.glob("*.json")))
    plan = web.post("/wallet/submit", json={**form, "script": "true"}).json()
    assert plan["call"] is None
    message = plan["permit"]["message"]
    assert message["value"] == str(3 * CREDIT // 2)
    assert message["spender"] == grid.contracts.scheduler.address
    plan = web.post("/wallet/submit", json={**form, "payment": "approve", "script": "true"}).json()
    assert plan["approval"]["to"] == grid.contracts.credit.address
    # Nothing is stored for an account that has not shown that it can pay.
    assert len(list(explorer.definitions.glob("*.json"))) == stored_count


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"credits": "1000000"}, 409, "less than the 1000000 credits needed"),
        ({"credits": "much"}, 400, "redits"),
        ({"time_limit": "soon"}, 400, "ime limit"),
        ({"mem_per_cpu": "0"}, 400, "emory per CPU"),
        ({"tasks": "<b>"}, 400, "asks"),
        ({"script": ""}, 400, "cript"),
        ({"script": "x" * 70_000}, 400, "larger than"),
        ({"uses": "gpu"}, 400, "ses"),
        ({"file": "steps: ["}, 400, "job file"),
        ({"account": "0x1"}, 400, "is not a valid address"),
        (
            {"permit": {"value": "1", "deadline": "9", "signature": "0x" + "00" * 65}},
            400,
            "another amount",
        ),
        ({"permit": {"signature": "0x00"}}, 400, "invalid format"),
    ],
)
def test_an_invalid_submission_is_reported(
    explorer: BusyExplorer, web: httpx2.Client, change: dict[str, Any], status: int, message: str
) -> None:
    answer = web.post("/wallet/submit", json={**FORM, "account": explorer.alice, **change})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]


def test_a_job_file_may_depend_on_other_jobs(explorer: BusyExplorer, web: httpx2.Client) -> None:
    finished_job = job_of(explorer, JobStatus.FINISHED)
    file = web.post("/wallet/quote", json=FORM).json()["file"]
    form = {"mode": "file", "account": explorer.alice, "payment": "permit"}
    for depends, status in ((f"afterok:{finished_job}", 200), (f"afternotok:{finished_job}", 400)):
        body = {**form, "file": f"{file}dependsOn: [{depends!r}]\n"}
        assert web.post("/wallet/quote", json=body).json()["problems"] == []
        answer = web.post("/wallet/submit", json=body)
        assert answer.status_code == status, answer.text
    assert "can never be met" in answer.json()["detail"]


def test_a_false_permit_is_refused_before_a_payment(
    explorer: BusyExplorer, web: httpx2.Client
) -> None:
    body = {
        "value": str(3 * CREDIT // 2),
        "deadline": str(2**40),
        "signature": "0x" + "11" * 64 + "1b",
    }
    form = {**FORM, "account": explorer.grid.stranger.address, "permit": body}
    answer = web.post("/wallet/submit", json=form)
    assert answer.status_code == 409
    assert answer.json()["detail"]


def test_jobs_of_others_cant_be_cancelled(explorer: BusyExplorer, web: httpx2.Client) -> None:
    number = job_of(explorer, JobStatus.RUNNING)
    form = {"job": number, "account": explorer.grid.stranger.address}
    answer = web.post("/wallet/cancel", json=form)
    assert answer.status_code in {403, 409}
    assert "another customer" in answer.json()["detail"]
    assert web.post("/wallet/cancel", json={**form, "job": True}).status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 403),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 403),
        ({**JSON, "Origin": "https://evil.example"}, 403),
        ({**JSON, "Sec-Fetch-Site": "cross-site"}, 403),
        (JSON, 400),
    ],
)
def test_only_own_pages_may_post(web: httpx2.Client, headers: dict[str, str], status: int) -> None:
    answer = web.post("/wallet/cancel", content=b"[]", headers=headers)
    assert answer.status_code == status
    assert web.get("/wallet/cancel").status_code == 405


def test_request_bodies_are_limited(web: httpx2.Client) -> None:
    answer = web.post("/wallet/submit", content=b'"' + b"x" * 200_000 + b'"', headers=JSON)
    assert answer.status_code == 413


# -- live


def test_the_stream_reports_changes(explorer: BusyExplorer, web: httpx2.Client) -> None:
    change = int(re.search(r'data-change="(\d+)"', web.get("/").text)[1])  # type: ignore[index]
    with web.stream("GET", "/live", params={"since": change}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        ids = explorer.run(explorer.busy.submit(1))
        received = ""
        for part in stream.iter_text():
            received += part
            matches = re.findall(r"data: (.*)\n", received)
            if any(ids[0] in json.loads(match)["jobs"] for match in matches):
                break
    assert "event: change" in received


def test_an_unknown_event_id_means_a_full_reload(web: httpx2.Client) -> None:
    with web.stream("GET", "/live", params={"since": 10**15}) as stream:
        for part in stream.iter_text():
            if "data:" in part:
                assert json.loads(part.partition("data: ")[2].partition("\n")[0])["everything"]
                break
