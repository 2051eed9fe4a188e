#!/usr/bin/env python3
"""Run Lighthouse on the explorer's pages, for desktop and phone, and print the scores of each.

Without `--url`, starts a grid on anvil with jobs of all final statuses. Lighthouse comes from npm and is
not part of the setup: it is fetched once into npm's cache. Prints the failed audits, and exits with 1 if a
score is below `--least`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deepsquare_chain.observability import configure_logging
from tests.support.browser import NAMES
from tests.support.busyexplorer import busy_explorer

PACKAGE: Final = "lighthouse@12.8.2"
CATEGORIES: Final = ("performance", "accessibility", "best-practices", "seo")
DEVICES: Final = ("desktop", "phone")
_SECONDS: Final = 240
_ATTEMPTS: Final = 3


@dataclass(frozen=True)
class Scores:
    """The result for a page on a device: scores by category (0 to 100), and failed audits."""

    page: str
    device: str
    scores: dict[str, int]
    lacking: tuple[str, ...]


@contextmanager
def explorer(url: str) -> Iterator[str]:
    """Yield the URL of an explorer: the given one, or that of a new grid."""
    if url:
        yield url.rstrip("/")
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        busy_explorer(Path(folder), jobs=20) as explorer_url,
    ):
        yield explorer_url.url


def pages(url: str) -> dict[str, str]:
    """Return the paths of the measured pages by name, including an ended job and its customer."""
    response = httpx2.get(f"{url}/api/v1/jobs", params={"limit": 200}, trust_env=False, timeout=60)
    jobs = response.raise_for_status().json()["items"]
    if not jobs:
        raise SystemExit("This grid has no job yet: submit one first.")
    job = next((row for row in jobs if row["status"] == "FINISHED"), jobs[0])
    return {
        "home": "/",
        "jobs": "/jobs",
        "job": f"/jobs/{job['id']}",
        "audit": "/audit",
        "submit": "/submit",
        "account": f"/accounts/{job['customer']}",
    }


def measure(command: Sequence[str], url: str, device: str) -> dict[str, Any]:
    """Run Lighthouse on a page, and return its report."""
    browser = next((path for name in NAMES if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("No Chromium is installed.")
    command_line = [
        *(*command, url, "--output=json", "--quiet", f"--only-categories={','.join(CATEGORIES)}"),
        "--chrome-flags=--headless=new --no-sandbox --disable-gpu",
        *(["--preset=desktop"] if device == "desktop" else []),
    ]
    env = {**os.environ, "CHROME_PATH": browser}
    for attempts_left in reversed(range(_ATTEMPTS)):
        process = subprocess.run(
            command_line, capture_output=True, text=True, timeout=_SECONDS, env=env, check=False
        )
        try:
            report: dict[str, Any] = json.loads(process.stdout)
        except ValueError:
            # Chromium sometimes records no trace (NO_NAVSTART); Lighthouse asks to run it again.
            if not attempts_left:
                raise SystemExit(
                    f"Lighthouse failed on {url}:\n{process.stderr[-2_000:]}"
                ) from None
        else:
            break
    return report


def read(report: dict[str, Any], page: str, device: str) -> Scores:
    """Extract the scores of a report, and the weighted audits without full score."""
    scores, lacking = {}, []
    for name in CATEGORIES:
        category = report["categories"][name]
        scores[name] = round(100 * (category["score"] or 0))
        for part in category["auditRefs"]:
            audit = report["audits"][part["id"]]
            if part["weight"] and audit["score"] is not None and audit["score"] < 1:
                display_value = audit.get("displayValue", "")
                lacking.append(f"{audit['id']} {audit['score']:.2f} {display_value}".strip())
    return Scores(page, device, scores, tuple(lacking))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="", help="a running explorer, such as that of a devnet")
    parser.add_argument("--page", action="append", help="only this page; repeat for more")
    parser.add_argument("--device", choices=DEVICES, help="only this device")
    parser.add_argument("--least", type=int, default=100, help="the score that each has to reach")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--lighthouse",
        default=f"npm exec --yes --package={PACKAGE} -- lighthouse",
        help="the command that runs Lighthouse",
    )
    return parser.parse_args()


def main() -> int:
    """Measure and print; return 1 if a score is too low."""
    options = arguments()
    command = options.lighthouse.split()
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not installed.")
    configure_logging("warning", "console", service="lighthouse")  # to stderr
    scores = []
    with explorer(options.url) as url:
        for page, path in pages(url).items():
            for device in DEVICES:
                if page in (options.page or [page]) and device in (options.device or device):
                    scores.append(read(measure(command, url + path, device), page, device))
                    print(line(scores[-1]), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps([vars(each) for each in scores], indent=2))
    return int(any(score < options.least for each in scores for score in each.scores.values()))


def line(page_scores: Scores) -> str:
    """Format a result for the terminal."""
    scores = "  ".join(f"{name} {page_scores.scores[name]:>3}" for name in CATEGORIES)
    lacking = "".join("\n    " + " ".join(failure.split()) for failure in page_scores.lacking)
    return f"{page_scores.page:<8} {page_scores.device:<8} {scores}{lacking}"


if __name__ == "__main__":
    sys.exit(main())
