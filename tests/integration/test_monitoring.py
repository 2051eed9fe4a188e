"""Metrics follow Prometheus' conventions; alert rules and the dashboard use only existing metrics."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

import deepsquare_chain
from deepsquare_chain.client.registration import provider_files
from deepsquare_chain.observability.metrics import Metrics
from tests.support.anvil import REQUIRE_REAL
from tests.support.promtool import promtool

PACKAGE = Path(deepsquare_chain.__file__).parent
SHIPPED = files("deepsquare_chain.client") / "operations"
RULE_TESTS = Path(__file__).with_name("alerts_test.yml")
KINDS = {"counter", "gauge", "gauges", "histogram"}
#: Suffixes of the samples that each kind of metric has.
SAMPLES = {
    "counter": ("_total",),
    "gauge": ("",),
    "gauges": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}


@functools.cache
def defined() -> tuple[tuple[str, str, str], ...]:
    """See `_definitions`; the source is read once."""
    return tuple(_definitions())


def _definitions() -> Iterator[tuple[str, str, str]]:
    """Return kind, name and help of every metric that the source code defines."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr not in KINDS or not owner.endswith("metrics"):
                continue
            name = ast.literal_eval(node.args[0])
            text = node.args[1]
            description = text.value if isinstance(text, ast.Constant) else "Given by a variable."
            yield node.func.attr, name, str(description)


def samples() -> set[str]:
    """Return the names of the metrics in Prometheus."""
    result = {f"deepsquare_{name}{end}" for kind, name, _ in defined() for end in SAMPLES[kind]}
    assert len(result) > 40, "the metrics were not found in the source"
    return result


def used(expression: str) -> set[str]:
    """Return the project's metrics in an expression."""
    return set(re.findall(r"\bdeepsquare_[a-z0-9_]+", expression))


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((SHIPPED / "alerts.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def test_all_metrics_follow_the_naming_conventions() -> None:
    metrics = Metrics("service")
    for name, (kind, text) in {name: (kind, text) for kind, name, text in defined()}.items():
        getattr(metrics, kind)(name, text)
    result = promtool("check", "metrics", text=metrics.render())
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert promtool("check", "metrics", text=b"deepsquare_free_megabytes 1\n").returncode != 0


def test_alert_rules_are_valid_and_fire_when_they_should() -> None:
    with_rules = SHIPPED / "alerts.yml"
    checked = promtool("check", "rules", str(with_rules))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", RULE_TESTS)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    # Every rule has a test in which it fires, and one in which it does not.
    cases = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    outcomes: dict[str, set[bool]] = {}
    for case in cases:
        for item in case["alert_rule_test"]:
            outcomes.setdefault(item["alertname"], set()).add(bool(item.get("exp_alerts")))
    assert outcomes == {rule["alert"]: {True, False} for rule in rules()}


def test_alerts_and_dashboard_use_only_metrics_that_exist() -> None:
    known = samples()
    dashboard = json.loads((SHIPPED / "dashboard.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [str(item["query"]) for item in dashboard["templating"]["list"]]
    for expression in (*panels, *variables, *(rule["expr"] for rule in rules())):
        assert used(expression) <= known, expression
    assert len(panels) > 20
    assert all(used(panel) or "up{" in panel for panel in panels)


def test_systemd_takes_the_unit_and_the_restrictions(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        if os.environ.get(REQUIRE_REAL) == "1":
            pytest.fail("systemd-analyze is missing: install the Debian package systemd")
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    unit = tmp_path / "deepsquare-provider.service"
    drop_in = tmp_path / "deepsquare-provider.service.d" / "hardened.conf"
    drop_in.parent.mkdir()
    texts = provider_files(tmp_path, "slurm")
    drop_in.write_text(texts["hardened.conf"])

    def verify(text: str) -> str:
        unit.write_text(text)
        result = subprocess.run(
            ["systemd-analyze", "verify", unit],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        # Messages about other units of this machine are ignored.
        return "\n".join(line for line in result.stderr.splitlines() if "deepsquare" in line)

    assert verify(texts[unit.name]) == ""
    assert "Unknown key" in verify(texts[unit.name].replace("KillMode=", "KillMod="))


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_describes_the_remedy(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"].endswith(".")
