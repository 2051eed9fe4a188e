"""The explorer in a real browser: every page, the wallet, live updates, keyboard, no scripts."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect

from deepsquare_chain.credits import CREDIT
from deepsquare_chain.job import JobStatus
from tests.support.anvil import REQUIRE_REAL
from tests.support.browser import WatchedPage, injected_wallet, open_browser, watch
from tests.support.busyexplorer import BusyExplorer, busy_explorer

PROJECT = Path(__file__).parents[2]
AXE = PROJECT / "node_modules" / "axe-core" / "axe.min.js"
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1_280, "height": 900}
# A machine under load is slow, not wrong.
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def explorer(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BusyExplorer]:
    """An explorer with several hundred jobs in all final statuses."""
    with busy_explorer(tmp_path_factory.mktemp("explorer"), jobs=70) as explorer:
        yield explorer


def open_page(browser: Browser, explorer: BusyExplorer, **options: Any) -> Iterator[WatchedPage]:
    context = browser.new_context(viewport=DESKTOP, **options)
    context.set_default_timeout(30_000)
    try:
        yield watch(context, explorer.url)
    finally:
        context.close()


@pytest.fixture
def tab(browser: Browser, explorer: BusyExplorer) -> Iterator[WatchedPage]:
    """A page in a desktop window, in light mode."""
    yield from open_page(browser, explorer, color_scheme="light")


def every_page(explorer: BusyExplorer) -> list[str]:
    """Return paths of one page of each kind and of a job in each status, including hostile ones."""

    async def numbers() -> list[int]:
        scheduler = explorer.grid.contracts.scheduler
        ids = list(range(1, await scheduler.job_count() + 1))
        by_status = {job.status: job.id for job in await scheduler.get_jobs(ids)}
        return [*by_status.values(), *ids[-9:]]

    with httpx2.Client(base_url=explorer.url, timeout=60, trust_env=False) as web:
        links = re.findall(r'href="(/transactions/0x\w+)"', web.get("/transactions").text)
        block = re.findall(r'href="(/blocks/\d+)"', web.get("/blocks").text)
    return [
        *("/", "/?range=hour", "/jobs", "/jobs?status=live", "/providers", "/providers/1"),
        *("/providers/2", "/transactions", links[0], links[-1], "/blocks", block[0], "/audit"),
        *("/audit?of=jobs", "/contracts", "/contracts/Credit", "/contracts/MetaScheduler"),
        *("/contracts/Credit?call=totalSupply", "/submit", "/search?q=e", "/search?q=zzzz"),
        *(f"/accounts/{explorer.alice}", f"/jobs?customer={explorer.alice}&sort=-cost&page=2"),
        *(f"/accounts/0x{'12' * 20}", *(f"/jobs/{number}" for number in explorer.run(numbers()))),
    ]


def assert_fits(page: Page, path: str) -> None:
    """No element is wider than the window; wide tables scroll in their own box."""
    wide, available = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= available, path


def test_every_page_has_no_errors_on_desktop_and_phone(
    browser: Browser, explorer: BusyExplorer
) -> None:
    for watched_page in open_page(browser, explorer):
        page = watched_page.page
        for path in every_page(explorer):
            answer = page.goto(explorer.url + path)
            assert answer is not None
            assert answer.status == 200, path
            assert page.locator("h1").count() == 1, path
            assert_fits(page, path)
            page.set_viewport_size(PHONE)
            assert_fits(page, path)
            page.set_viewport_size(DESKTOP)
        watched_page.check()
        assert page.context.cookies() == []


class Shot(NamedTuple):
    """A screenshot of the documentation: its page, colour scheme and size."""

    path: str
    scheme: Literal["light", "dark"]
    width: int
    height: int


def shots(explorer: BusyExplorer) -> dict[str, Shot]:
    """Screenshots in docs/images by file name."""
    answer = httpx2.get(
        f"{explorer.url}/api/v1/jobs",
        params={"status": "FINISHED", "customer": explorer.bob},
        trust_env=False,
        timeout=60,
    )
    job = f"/jobs/{answer.json()['items'][-1]['id']}"
    return {
        "explorer-home.png": Shot("/", "light", 1_280, 960),
        "explorer-job.png": Shot(job, "light", 1_280, 1_060),
        "explorer-phone.png": Shot(job, "light", 390, 860),
        "explorer-statement.png": Shot(f"/accounts/{explorer.bob}", "dark", 1_280, 820),
    }


def size_of(picture: bytes) -> tuple[int, int]:
    """Return width and height of a PNG."""
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


def test_screenshots_of_the_documentation(
    browser: Browser, explorer: BusyExplorer, tmp_path: Path
) -> None:
    """With DEEPSQUARE_SCREENSHOTS=docs/images the screenshots are taken again."""
    folder = Path(os.environ.get("DEEPSQUARE_SCREENSHOTS", tmp_path))
    for name, shot in shots(explorer).items():
        for watched_page in open_page(browser, explorer, color_scheme=shot.scheme):
            page = watched_page.page
            page.set_viewport_size({"width": shot.width, "height": shot.height})
            page.goto(explorer.url + shot.path)
            expect(page.locator("#live")).to_have_class(re.compile("on"))
            screenshot = page.screenshot(path=folder / name)
        assert size_of(screenshot) == size_of((PROJECT / "docs" / "images" / name).read_bytes()), (
            name
        )
        assert len(screenshot) > 20_000, name
    documents = "".join(
        p.read_text() for p in (PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"))
    )
    assert set(re.findall(r"images/(explorer-[\w-]+\.png)", documents)) == set(shots(explorer))


def axe() -> str:
    if not AXE.is_file():
        missing = f"{AXE} is not there: `make setup-dev` brings it"
        if os.environ.get(REQUIRE_REAL) == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return AXE.read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible(browser: Browser, explorer: BusyExplorer, scheme: str) -> None:
    script = axe()
    # The schemes differ in their colours alone.
    rule_tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
    chosen = rule_tags if scheme == "light" else ["color-contrast"]
    rules = {"runOnly": chosen, "resultTypes": ["violations"]}
    faults = []
    kinds = list({re.sub(r"/(\d+|0x\w+)|\?.*", "/N", p): p for p in every_page(explorer)}.values())
    for watched_page in open_page(browser, explorer, color_scheme=scheme):
        for path in [*kinds, "/nope"]:
            watched_page.page.goto(explorer.url + path)
            watched_page.page.evaluate(script)
            # Charts have names and tables, and rows are alike; checking all takes minutes.
            context = {"include": [["body"]], "exclude": [["svg"], ["tbody tr:nth-child(n + 10)"]]}
            evaluate = watched_page.page.evaluate("([c, r]) => axe.run(c, r)", [context, rules])
            faults += [
                (
                    path,
                    violation["id"],
                    violation["nodes"][0]["html"][:160],
                    violation["nodes"][0]["failureSummary"],
                )
                for violation in evaluate["violations"]
            ]
    assert faults == []


def test_without_scripts_everything_can_be_read(browser: Browser, explorer: BusyExplorer) -> None:
    for watched_page in open_page(browser, explorer, java_script_enabled=False):
        page = watched_page.page
        page.goto(explorer.url)
        expect(page.locator("h1")).to_have_text("The grid at a glance")
        page.get_by_role("link", name="All jobs →").click()
        page.locator("tbody a").first.click()
        expect(page.get_by_role("heading", name="Where the credits went")).to_be_visible()
        assert page.locator("button[data-act]:visible").count() == 0
        page.locator("#q").fill(explorer.alice)
        page.locator("#q").press("Enter")
        expect(page.locator("h1")).to_have_text("alice")
        page.goto(f"{explorer.url}/submit")
        expect(page.get_by_text("The form needs scripts and a wallet")).to_be_visible()


def test_everything_is_reachable_by_keyboard(tab: WatchedPage, explorer: BusyExplorer) -> None:
    page = tab.page
    page.goto(explorer.url)
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    focused: list[str] = []
    for _ in range(25):
        page.keyboard.press("Tab")
        outline = page.evaluate(
            "getComputedStyle(document.activeElement).outlineStyle + ' ' + "
            "getComputedStyle(document.activeElement).outlineWidth"
        )
        assert outline.startswith("solid"), page.evaluate("document.activeElement.outerHTML")
        focused.append(page.evaluate("document.activeElement.outerHTML"))
    assert len(set(focused)) > 15
    page.locator("h1").click()
    page.keyboard.press("/")
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.type(explorer.alice)
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("alice")
    tab.check()


def test_the_theme_is_remembered_on_this_device(tab: WatchedPage, explorer: BusyExplorer) -> None:
    page = tab.page
    page.goto(explorer.url)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.locator("#theme").click()
    dark = page.evaluate(ground)
    assert dark != light
    page.goto(f"{explorer.url}/jobs")
    assert page.evaluate(ground) == dark
    assert page.context.cookies() == []
    tab.check()


def test_a_new_job_appears_without_a_reload(tab: WatchedPage, explorer: BusyExplorer) -> None:
    page = tab.page
    page.goto(f"{explorer.url}/jobs")
    expect(page.locator("#live")).to_have_class(re.compile("on"))
    page.evaluate("window.stayed = true")
    ids = explorer.run(explorer.busy.submit(1, name="comes by itself"))
    expect(page.locator(f'tr[data-row="{ids[0]}"]')).to_contain_text("comes by itself")
    assert page.evaluate("window.stayed")
    tab.check()


def test_a_job_is_checked_and_priced_before_there_is_a_wallet(
    tab: WatchedPage, explorer: BusyExplorer
) -> None:
    page = tab.page
    page.goto(f"{explorer.url}/submit")
    quote = page.locator("#quote")
    expect(quote).to_contain_text("the whole time limit costs")
    page.locator("[name=credits]").fill("abc")
    expect(quote).to_contain_text("'abc' is not a valid amount of credits")
    page.locator("#submit-job").click()
    expect(page.locator("[data-report]")).to_contain_text("is not a valid amount of credits")
    page.locator("[name=credits]").fill("2")
    expect(quote).to_contain_text("the whole time limit costs")
    tab.check()


def test_without_a_wallet_no_job_is_topped_up_or_cancelled(
    tab: WatchedPage, explorer: BusyExplorer
) -> None:
    jobs = httpx2.get(
        f"{explorer.url}/api/v1/jobs", params={"status": "PENDING"}, trust_env=False, timeout=60
    ).json()["items"]
    page = tab.page
    page.goto(f"{explorer.url}/jobs/{jobs[-1]['id']}")
    expect(page.locator("#live")).to_have_class(re.compile("on"))
    for action in ("topup", "cancel"):
        expect(page.locator(f"#{action}")).to_have_count(1)
        expect(page.locator(f"#{action}")).to_be_hidden()


def test_a_job_file_is_written_with_the_schemas_help(
    tab: WatchedPage, explorer: BusyExplorer
) -> None:
    page = tab.page
    page.goto(f"{explorer.url}/submit")
    page.locator("[name=name]").fill("as a file")
    expect(page.locator("#quote")).to_contain_text("the whole time limit costs")
    page.get_by_label("Job file", exact=True).check()
    expect(page.locator("[name=name]")).to_be_hidden()
    editor = page.locator("#file")
    expect(editor).to_have_value(re.compile(r"name: as a file\n[^$]*command: \|"))
    editor.press("Control+End")
    page.keyboard.type("ret")
    expect(page.get_by_role("option")).to_have_count(1)
    expect(page.get_by_role("option")).to_contain_text("retries")
    page.keyboard.press("Enter")
    page.keyboard.type("many")
    wrong = page.locator("#quote .problems button")
    expect(wrong).to_have_text(re.compile(r"line \d+"))
    expect(page.locator("[data-help]")).to_contain_text("retries: integer 0 to 5")
    for _ in "many":
        page.keyboard.press("Backspace")
    page.keyboard.type("2\nobjective: ")
    page.keyboard.press("Control+Space")
    expect(page.get_by_role("option")).to_have_text(["COST", "TIME", "ENERGY"])
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    # The form has already written an objective: the second one is reported at its line.
    expect(editor).to_have_value(re.compile(r"retries: 2\nobjective: TIME$"))
    expect(wrong).to_have_count(1)
    tab.check()


def test_a_page_in_the_back_forward_cache_holds_no_stream(
    tab: WatchedPage, explorer: BusyExplorer
) -> None:
    page = tab.page
    page.goto(f"{explorer.url}/jobs")
    expect(page.locator("#live")).to_have_class(re.compile("on"))
    page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true }))")
    ids = explorer.run(explorer.busy.submit(1, name="while it was away"))
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    expect(page.locator(f'tr[data-row="{ids[0]}"]')).to_contain_text("while it was away")
    tab.check()


# -- the wallet


class TestWallet:
    """A browser wallet of an account that the node signs for; it records its requests."""

    __test__ = False

    def __init__(self, page: Page, explorer: BusyExplorer, account: str) -> None:
        self.account = account
        self.chain_id = 1337
        self.refuses: set[str] = set()
        self.asked: list[tuple[str, Any]] = []
        self._node = explorer.node_url
        page.expose_function("walletAsked", self._answer)

    def announce(self, page: Page, *names: str) -> None:
        """Announce the wallet to the page under these names (EIP-6963)."""
        for name in names:
            page.add_init_script(injected_wallet(name))

    def methods(self) -> list[str]:
        """Return the methods of the requests that need a signature."""
        signing = {"eth_sendTransaction", "eth_signTypedData_v4"}
        return [method for method, _ in self.asked if method in signing]

    def _answer(self, _name: str, text: str) -> str:
        body = json.loads(text)
        method, params = body["method"], body.get("params") or []
        self.asked.append((method, params))
        if method in self.refuses:
            return json.dumps({"error": {"code": 4001, "message": "User rejected the request."}})
        if method == "eth_requestAccounts":
            return json.dumps({"result": [self.account]})
        if method == "eth_chainId":
            return json.dumps({"result": hex(self.chain_id)})
        if method == "wallet_switchEthereumChain":
            self.chain_id = int(params[0]["chainId"], 16)
            return json.dumps({"result": None})
        if method == "eth_signTypedData_v4":
            params = [params[0], json.loads(params[1])]
        call = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return httpx2.post(self._node, json=call, trust_env=False).text


@pytest.fixture
def wallet(tab: WatchedPage, explorer: BusyExplorer) -> TestWallet:
    """A wallet with credits and no allowance."""
    grid = explorer.grid
    owner = grid.stranger.address

    async def fund() -> None:
        credit = grid.contracts.credit
        await grid.send(grid.admin, credit.mint(owner, 20 * CREDIT))
        await grid.send(grid.stranger, credit.approve(grid.contracts.scheduler.address, 0))
        # From here on the node signs for this account; the test's sender must not.
        grid.senders.pop(owner, None)

    explorer.run(fund())
    return TestWallet(tab.page, explorer, owner)


def fill(page: Page, explorer: BusyExplorer, **values: str) -> None:
    page.goto(f"{explorer.url}/submit")
    for name, text in {"name": "from a browser", "credits": "2", **values}.items():
        page.locator(f"#job-form [name={name}]").fill(text)


def job_at(page: Page) -> int:
    return int(page.url.rpartition("/")[2])


def status_of(explorer: BusyExplorer, number: int) -> JobStatus:
    return explorer.run(explorer.grid.contracts.scheduler.get_job(number)).status


def test_a_job_is_submitted_topped_up_and_cancelled(
    tab: WatchedPage, explorer: BusyExplorer, wallet: TestWallet
) -> None:
    page = tab.page
    wallet.announce(page, "Owl")
    fill(page, explorer, script="echo from a browser")
    page.locator("#submit-job").click()
    dialog = page.locator("dialog")
    expect(dialog).to_contain_text("2 credits go from your wallet into escrow")
    expect(dialog).to_contain_text("a permit of exactly 2 credits")
    assert wallet.methods() == []
    dialog.get_by_role("button", name="Submit").click()
    page.wait_for_url(re.compile(r"/jobs/\d+$"))
    number = job_at(page)
    assert wallet.methods() == ["eth_signTypedData_v4", "eth_sendTransaction"]
    expect(page.locator("h1")).to_have_text("from a browser")
    expect(page.locator("pre")).to_contain_text("echo from a browser")
    assert explorer.run(explorer.grid.contracts.scheduler.get_job(number)).escrow == 2 * CREDIT

    page.locator("#topup").click()
    page.locator("dialog input").fill("1.25")
    page.get_by_role("button", name="Continue").click()
    expect(dialog).to_contain_text("grows to 3.25 credits")
    dialog.get_by_role("button", name="Top up").click()
    expect(page.locator(".figures")).to_contain_text("3.25")
    assert (
        explorer.run(explorer.grid.contracts.scheduler.get_job(number)).escrow == 13 * CREDIT // 4
    )

    page.locator("#cancel").click()
    expect(dialog).to_contain_text("All 3.25 credits are refunded.")
    dialog.get_by_role("button", name="Cancel the job").click()
    expect(page.locator(".head .status")).to_have_text("CANCELLED")
    assert status_of(explorer, number) is JobStatus.CANCELLED
    tab.check()


def test_a_job_can_also_be_paid_after_an_approval(
    tab: WatchedPage, explorer: BusyExplorer, wallet: TestWallet
) -> None:
    page = tab.page
    wallet.announce(page, "Owl")
    fill(page, explorer)
    page.locator("[name=payment][value=approve]").check()
    page.locator("#submit-job").click()
    page.locator("dialog").get_by_role("button", name="Submit").click()
    page.wait_for_url(re.compile(r"/jobs/\d+$"))
    assert wallet.methods() == ["eth_sendTransaction", "eth_sendTransaction"]
    credit, scheduler = explorer.grid.contracts.credit, explorer.grid.contracts.scheduler
    assert explorer.run(credit.allowance(wallet.account, scheduler.address)) == 0
    tab.check()


def test_a_wrong_network_is_refused_until_it_is_switched(
    tab: WatchedPage, explorer: BusyExplorer, wallet: TestWallet
) -> None:
    page = tab.page
    wallet.announce(page, "Owl")
    wallet.chain_id = 1
    fill(page, explorer)
    page.locator("#submit-job").click()
    dialog = page.locator("dialog")
    expect(dialog).to_contain_text("The wallet is on chain 1; this grid is on chain 1337.")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator("[data-report]")).to_contain_text("nothing was sent")
    assert wallet.methods() == []
    page.locator("#submit-job").click()
    dialog.get_by_role("button", name="Switch the wallet").click()
    expect(dialog).to_contain_text("into escrow")
    assert wallet.chain_id == 1337
    page.keyboard.press("Escape")
    expect(page.locator("[data-report]")).to_contain_text("Cancelled. Nothing was sent.")
    assert wallet.methods() == []
    tab.check()


@pytest.mark.parametrize("refused_method", ["eth_signTypedData_v4", "eth_sendTransaction"])
def test_a_refusal_in_the_wallet_costs_nothing(
    tab: WatchedPage, explorer: BusyExplorer, wallet: TestWallet, refused_method: str
) -> None:
    page = tab.page
    wallet.announce(page, "Owl")
    wallet.refuses.add(refused_method)
    before = explorer.run(explorer.grid.contracts.scheduler.job_count())
    fill(page, explorer)
    page.locator("#submit-job").click()
    page.locator("dialog").get_by_role("button", name="Submit").click()
    expect(page.locator("[data-report]")).to_contain_text("You refused it in the wallet.")
    expect(page.locator("#submit-job")).to_be_enabled()
    assert explorer.run(explorer.grid.contracts.scheduler.job_count()) == before
    tab.check()


def test_one_of_several_wallets_can_be_chosen(
    tab: WatchedPage, explorer: BusyExplorer, wallet: TestWallet
) -> None:
    page = tab.page
    wallet.announce(page, "Owl", "<img src=x onerror=alert(1)>")
    page.goto(explorer.url)
    page.locator("#wallet").click()
    dialog = page.locator("dialog")
    expect(dialog).to_contain_text("<img src=x onerror=alert(1)>")
    dialog.get_by_role("button", name="Owl").click()
    expect(page.locator("#wallet")).to_contain_text(wallet.account[:6])
    page.locator("#wallet").click()
    page.wait_for_url(re.compile(f"/accounts/{wallet.account}", re.IGNORECASE))
    tab.check()


def test_an_unaffordable_call_is_reported_before_the_wallet_signs(
    tab: WatchedPage, explorer: BusyExplorer, wallet: TestWallet
) -> None:
    page = tab.page
    wallet.announce(page, "Owl")
    fill(page, explorer, credits="5000000")
    page.locator("#submit-job").click()
    expect(page.locator("[data-report]")).to_contain_text("less than the 5000000 credits needed")
    fill(page, explorer, time_limit="soon")
    page.locator("#submit-job").click()
    expect(page.locator("[data-report]")).to_contain_text("Time limit")
    assert wallet.methods() == []
    # The browser logs a refused POST request as a failed load.
    assert all("status of 4" in fault for fault in tab.faults)


def test_a_missing_wallet_is_reported(tab: WatchedPage, explorer: BusyExplorer) -> None:
    page = tab.page
    page.goto(explorer.url)
    page.locator("#wallet").click()
    expect(page.locator("dialog")).to_contain_text("No wallet was found in this browser.")
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    tab.check()


def test_an_open_page_drops_rows_that_a_reorg_removed(
    tab: WatchedPage, explorer: BusyExplorer
) -> None:
    """This test must be the last one: it removes blocks from the shared chain."""
    page = tab.page
    page.goto(f"{explorer.url}/jobs")
    node = explorer.grid.node
    mark = explorer.run(node.rpc("evm_snapshot"))
    ids = explorer.run(explorer.busy.submit(1, name="will not have been"))
    row = page.locator(f'tr[data-row="{ids[0]}"]')
    expect(row).to_contain_text("will not have been")
    expect(row).to_contain_text("not final")
    explorer.run(node.rpc("evm_revert", mark))
    for _ in range(4):
        explorer.run(node.rpc("evm_mine"))
    expect(row).to_have_count(0)
    page.goto(f"{explorer.url}/jobs/{ids[0]}")
    expect(page.locator("h1")).to_have_text("Not found")
