"""Deployment records and built contracts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.chain.bindings.abi import CONTRACTS, load_artifact
from deepsquare_chain.chain.bindings.deployment import Deployment, Timeouts
from deepsquare_chain.chain.deploying import GridParams, _check
from deepsquare_chain.errors import NotFoundError, UsageError

A = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
RECORD = Deployment(
    chain_id=1337,
    credit=A,
    registry=A,
    scheduler=A,
    treasury=A,
    forwarder=A,
    block=12,
    transactions={"Credit": "0x12"},
    constructor_args={"Credit": {"admin": A, "adminDelay": 0}},
    compiler_digest="ab",
    extra={"faucet": "http://127.0.0.1:1"},
)


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "deployment.json"
    RECORD.save(path)
    assert Deployment.load(path) == RECORD
    assert [item.name for item in path.parent.iterdir()] == ["deployment.json"]
    RECORD.save(path)  # and again
    assert Deployment.load(path).addresses == (A, A, A)


def test_a_record_that_an_editor_marked(tmp_path: Path) -> None:
    path = tmp_path / "deployment.json"
    path.write_text("\ufeff" + RECORD.to_json())
    assert Deployment.load(path) == RECORD
    assert Deployment.from_json(path.read_text()) == RECORD


def test_a_failed_write_leaves_the_old_record(tmp_path: Path) -> None:
    path = tmp_path / "deployment.json"
    RECORD.save(path)
    broken = Deployment(**{**RECORD.__dict__, "extra": {"x": object()}})
    with pytest.raises(TypeError):
        broken.save(path)
    assert Deployment.load(path) == RECORD
    assert len(list(tmp_path.iterdir())) == 1


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no deployment record at") as error:
        Deployment.load(tmp_path / "none.json")
    assert "devnet up" in error.value.hint
    with pytest.raises(UsageError, match="can't be read"):
        Deployment.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chain_id": "1"}, "chain_id is not a number"),
        ({"chain_id": True}, "chain_id is not a number"),
        ({"block": -1}, "block is not a number"),
        ({"block": None}, "block is not a number"),
        ({"credit": "0x12"}, "credit is not an address"),
        ({"scheduler": 5}, "scheduler is not an address"),
        ({"transactions": []}, "transactions is not an object"),
        ({"extra": "x"}, "extra is not an object"),
        ({"format": 2}, "format '2' is unknown"),
    ],
)
def test_errors_of_invalid_records_name_the_cause(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "deployment.json"
    path.write_text(json.dumps(json.loads(RECORD.to_json()) | change))
    with pytest.raises(UsageError, match=message) as error:
        Deployment.load(path)
    assert str(path) in error.value.message


def test_missing_fields_and_unknown_ones(tmp_path: Path) -> None:
    body = json.loads(RECORD.to_json())
    for name in ("chain_id", "credit", "registry", "scheduler", "treasury", "forwarder", "block"):
        short = {key: value for key, value in body.items() if key != name}
        with pytest.raises(UsageError, match=f"{name} is missing"):
            Deployment.from_json(json.dumps(short))
    # A later version may add fields, which are ignored.
    assert Deployment.from_json(json.dumps(body | {"colour": "red"})) == RECORD
    lower = json.dumps(body | {"credit": A.lower()})
    assert Deployment.from_json(lower).credit == A


@given(text=st.one_of(st.text(), st.binary(), st.just(b"[" * 100_000), st.just("9" * 5_000)))
def test_no_text_crashes_it(text: str | bytes) -> None:
    with pytest.raises(UsageError):
        Deployment.from_json(text)


@pytest.mark.parametrize("name", CONTRACTS)
def test_code_matches_whatever_its_immutables(name: str) -> None:
    artifact = load_artifact(name)
    code = bytearray(artifact.deployed_bytecode)
    for start, length in artifact.immutables:
        code[start : start + length] = b"\x77" * length
    assert artifact.matches(bytes(code))
    assert not artifact.matches(bytes(code[:-1]))
    assert not artifact.matches(b"")
    immutable_bytes = {
        at for start, length in artifact.immutables for at in range(start, start + length)
    }
    other = next(at for at in range(len(code)) if at not in immutable_bytes)
    code[other] ^= 1
    assert not artifact.matches(bytes(code))


def test_an_unknown_artifact() -> None:
    with pytest.raises(NotFoundError, match="no built contract"):
        load_artifact("Nonsense")


@pytest.mark.parametrize(
    "params",
    [
        GridParams(fee_bps=2_001),
        GridParams(fee_bps=-1),
        GridParams(approval_period=1),
        GridParams(timeouts=Timeouts(claim_timeout=4)),
        GridParams(timeouts=Timeouts(report_grace=3_599)),
        GridParams(timeouts=Timeouts(pending_timeout=600, pending_expiry=599)),
        GridParams(timeouts=Timeouts(response_timeout=300, lost_timeout=299)),
        GridParams(timeouts=Timeouts(collect_interval=4)),
        GridParams(timeouts=Timeouts(top_up_notice=3_601)),
        GridParams(timeouts=Timeouts(response_blocks=0)),
    ],
)
def test_parameters_are_checked_before_anything_is_paid(params: GridParams) -> None:
    with pytest.raises(UsageError, match=r"allowed (are|is)"):
        _check(params)
    _check(GridParams())
