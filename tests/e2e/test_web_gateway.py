"""From a job file in the browser's editor to its output, through a relay and a gateway."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount
from playwright.sync_api import Page, expect

from deepsquare_chain.devnet.grid import CUSTOMER_WITHOUT_COIN, LocalGrid
from tests.support.browser import injected_wallet, open_browser

T = TypeVar("T")
JOB = """\
name: from the editor
credits: "1"
timeLimit: 5m
resources: {tasks: 1, cpusPerTask: 1, memPerCpu: 64}
steps:
  - run:
      command: |
        for number in 1 2 3 4; do echo "line $number"; sleep 0.7; done
"""
OUTPUT = "".join(f"line {number}\n" for number in range(1, 5))


@dataclass
class ServedGrid:
    """A devnet with one provider and an explorer, on an event loop in a thread."""

    grid: LocalGrid
    url: str
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the grid's loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(240)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGrid]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    grid = LocalGrid(tmp_path_factory.mktemp("grid") / "devnet", relay_port=0)

    async def start() -> str:
        await grid.__aenter__()
        await grid.start_service("scheduler")
        await grid.start_service("alpine")
        return await grid.start_explorer(0)

    try:
        url = asyncio.run_coroutine_threadsafe(start(), loop).result(240)
        yield ServedGrid(grid, url, loop)
    finally:
        asyncio.run_coroutine_threadsafe(grid.close(), loop).result(120)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


class SigningWallet:
    """A browser wallet that signs with a key of this test; it records its requests."""

    def __init__(self, page: Page, account: LocalAccount, chain_id: int) -> None:
        self._account = account
        self._chain_id = chain_id
        self.requests: list[str] = []
        page.expose_function("walletAsked", self._answer)
        page.add_init_script(injected_wallet("Owl"))

    def _answer(self, _name: str, text: str) -> str:
        body = json.loads(text)
        params = body.get("params") or []
        self.requests.append(body["method"])
        match body["method"]:
            case "eth_requestAccounts":
                return json.dumps({"result": [self._account.address]})
            case "eth_chainId":
                return json.dumps({"result": hex(self._chain_id)})
            case "personal_sign":
                signed = self._account.sign_message(encode_defunct(hexstr=params[0]))
            case "eth_signTypedData_v4":
                signed = self._account.sign_typed_data(full_message=json.loads(params[1]))
            case other:
                return json.dumps({"error": {"code": 4200, "message": f"{other} is not offered"}})
        return json.dumps({"result": signed.signature.to_0x_hex()})


def test_a_job_file_of_a_customer_without_coin_runs_and_its_output_is_followed(
    served: ServedGrid,
) -> None:
    expect.set_options(timeout=60_000)
    grid = served.grid
    with open_browser() as browser:
        context = browser.new_context()
        context.set_default_timeout(60_000)
        page = context.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        wallet = SigningWallet(page, grid.accounts[CUSTOMER_WITHOUT_COIN], grid.node.chain_id)
        page.goto(f"{served.url}/submit")
        page.get_by_label("Job file", exact=True).check()
        expect(page.locator("#file")).to_have_value(re.compile("steps:"))
        page.locator("#file").fill(JOB)
        page.locator("[name=payment][value=relay]").check()
        expect(page.locator("#quote")).to_contain_text("could run it")
        assert wallet.requests == []
        page.locator("#submit-job").click()
        dialog = page.locator("dialog")
        expect(dialog).to_contain_text("A relay pays the gas")
        dialog.get_by_role("button", name="Submit").click()
        page.wait_for_url(re.compile(r"/jobs/\d+$"), timeout=120_000)
        expect(page.locator("h1")).to_have_text("from the editor")
        # After a reload in the middle, the page has the whole output once.
        expect(page.locator("#output pre")).to_contain_text("line 2")
        page.reload()
        expect(page.locator("#output pre")).to_have_text(OUTPUT)
        expect(page.locator("#output li")).to_contain_text("as its provider reported on chain")
        signatures = [request for request in wallet.requests if "sign" in request]
        assert signatures == ["personal_sign", "eth_signTypedData_v4", "eth_signTypedData_v4"]
        assert served.run(coin_of(grid)) == 0
        # A visitor who did not sign in sees no output.
        other = browser.new_context().new_page()
        other.goto(page.url)
        expect(other.locator("[data-output]")).to_be_visible()
        assert "line 2" not in str(other.locator("main").text_content())
        assert faults == []


async def coin_of(grid: LocalGrid) -> int:
    """Return the coin of the customer without coin, in wei."""
    return int(
        await grid.contracts.w3.eth.get_balance(grid.accounts[CUSTOMER_WITHOUT_COIN].address)
    )
