"""Rules of the policy from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepsquare_chain.errors import UsageError
from deepsquare_chain.metascheduler.policy import Rules
from deepsquare_chain.metascheduler.rules_file import read_rules
from tests.support.workloads import address

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples" / "rules.yaml"


def test_the_example_holds_the_defaults() -> None:
    assert read_rules(EXAMPLE) == Rules()
    expected = {
        "overdue_after",
        "overdue_factor",
        "reservations",
        "overdue_reservations",
        "weights",
    }
    expected |= {"start_margin", "fair_share", "priorities", "max_running"}
    expected |= {"energy_hold", "frugal_within", "longest_hold"}
    assert expected == set(Rules.__slots__)
    assert all(f"\n{name}:" in EXAMPLE.read_text() for name in expected)


def test_missing_keys_have_their_default(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("")
    assert read_rules(path) == Rules()
    lower = "0x" + "ab" * 20
    path.write_text(
        f"max_running: 3\npriorities: {{'{lower}': 4, user 7: 0.5}}\nweights: {{time: 1}}"
    )
    rules = read_rules(path)
    assert (rules.max_running, rules.weights.time, rules.weights.cost) == (3, 1.0, 1_000.0)
    # Lookups use the spelling of addresses in events.
    assert rules.priorities == {"0xABaBaBaBABabABabAbAbABAbABabababaBaBABaB": 4.0, "user 7": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fairshare: 1", "fairshare: Extra inputs are not permitted"),
        ("fair_share: -1", "fair_share: "),
        ("reservations: many", "reservations: "),
        ("weights: {cost: .inf}", "weights.cost: "),
        ("priorities: {a: 0}", "priorities.a: "),
        ("- a", "the document: "),
        ("{", "can't be read"),
    ],
)
def test_bad_rules_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_rules(path)
    assert message in str(error.value)
    assert "examples/rules.yaml" in (error.value.hint or "")
    with pytest.raises(UsageError, match="can't be read"):
        read_rules(tmp_path / address(1))
