"""A real browser for tests: Debian's Chromium, controlled by Playwright."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.support.anvil import REQUIRE_REAL

NAMES = ("chromium", "chromium-browser", "google-chrome")
#: A wallet (EIP-1193, announced by EIP-6963) that forwards its requests to `walletAsked`.
_WALLET = """(() => {
  const ask = async ({ method, params }) => {
    const response = JSON.parse(await window.walletAsked(NAME, JSON.stringify({ method, params })));
    if (response.error) throw Object.assign(new Error(response.error.message), { code: response.error.code });
    return response.result;
  };
  const info = { uuid: NAME, name: NAME, icon: "data:,", rdns: "example.wallet" };
  const detail = Object.freeze({ info, provider: { request: ask, on() {} } });
  const announce = () => dispatchEvent(new CustomEvent("eip6963:announceProvider", { detail }));
  addEventListener("eip6963:requestProvider", announce);
  announce();
})();"""
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)


def require_browser() -> Path:
    """Return the browser's path; without one, skip the test, or fail if real parts are required."""
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return Path(path)
    missing = f"none of {', '.join(NAMES)} is installed"
    if os.environ.get(REQUIRE_REAL) == "1":
        pytest.fail(missing)
    pytest.skip(missing)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Run a browser within a `with` block."""
    binary = require_browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class WatchedPage:
    """A page, and the faults observed on it."""

    page: Page
    base: str
    faults: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Assert that there was no error, no dialog, and no request to another host."""
        assert self.faults == []


def injected_wallet(name: str) -> str:
    """Return a script that injects a wallet with this name into a page."""
    return _WALLET.replace("NAME", json.dumps(name))


def watch(context: BrowserContext, base: str) -> WatchedPage:
    """Open a new page, and record its faults."""
    page = context.new_page()
    watched_page = WatchedPage(page, base)

    def note(kind: str, text: Any) -> None:
        watched_page.faults.append(f"{kind}: {text} at {page.url}")

    page.on("pageerror", lambda error: note("error", error))
    page.on(
        "console",
        lambda message: (
            note("console", message.text) if message.type in {"error", "warning"} else None
        ),
    )

    def refuse(dialog: Any) -> None:
        note("dialog", dialog.message)
        dialog.dismiss()

    page.on("dialog", refuse)
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((base, "data:")) else note("request", request.url)
        ),
    )
    return watched_page
