"""The committed artifacts equal those compiled from the committed sources, in any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.evm import ARTIFACTS, Reverted, load_artifact, person
from tests.support.grid import Grid
from tests.support.hostile import require_compiler

pytestmark = pytest.mark.contracts
ROOT = Path(__file__).resolve().parents[2]
OWN = ("Credit", "ProviderRegistry", "MetaScheduler")
NAMES = (*OWN, "ERC2771Forwarder")
SIZE_LIMIT = 24_576


def compile_in(tree: Path, cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(tree / "scripts" / "compile.py"), *options],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def copied_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the sources to another folder, with links to the npm packages."""
    require_compiler()
    tree = tmp_path_factory.mktemp("another place")
    shutil.copytree(ROOT / "contracts", tree / "contracts")
    shutil.copytree(
        ROOT / "scripts", tree / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tree / "node_modules").symlink_to(ROOT / "node_modules")
    return tree


def test_the_same_bytes_from_another_folder(copied_tree: Path, tmp_path: Path) -> None:
    result = compile_in(copied_tree, tmp_path, "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for name in (*NAMES, "standard-input"):
        built = (tmp_path / f"{name}.json").read_bytes()
        committed = (ARTIFACTS / f"{name}.json").read_bytes()
        assert built == committed, f"{name}.json is stale: run `make contracts`"


def test_a_check_names_what_is_stale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts import compile as build  # noqa: PLC0415 - py-solc-x is a part for developers

    built = {name: load_artifact(name) for name in NAMES}
    monkeypatch.setattr(build, "compile_contracts", lambda **_: built)
    monkeypatch.setattr(sys, "argv", ["compile.py", "--check"])
    # Sources can't be collected without the npm packages; these are unchanged.
    monkeypatch.setattr(build, "standard_input", lambda: load_artifact("standard-input"))
    build.main()
    assert "MetaScheduler" in capsys.readouterr().out
    built["MetaScheduler"] = built["MetaScheduler"] | {"metadata": "changed"}
    with pytest.raises(SystemExit, match=r"Out of date: MetaScheduler\."):
        build.main()


def test_without_ir_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Coverage tools need a compilation without IR; the forge tests compile all contracts so."""
    from scripts import compile as build  # noqa: PLC0415 - py-solc-x is a part for developers

    calls: list[dict[str, bool]] = []
    built = {name: load_artifact(name) for name in NAMES}
    monkeypatch.setattr(build, "compile_contracts", lambda **call: calls.append(call) or built)
    monkeypatch.setattr(sys, "argv", ["compile.py", "--no-ir", "--output", str(tmp_path / "out")])
    build.main()
    assert calls == [{"via_ir": False}]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_accepts_its_size(name: str) -> None:
    assert len(load_artifact(name)["deployedBytecode"]) // 2 - 1 <= SIZE_LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_holds_what_a_deployment_needs(name: str) -> None:
    artifact = load_artifact(name)
    assert artifact["contractName"] == name
    assert {"abi", "bytecode", "deployedBytecode", "immutableReferences", "metadata"} <= set(
        artifact
    )
    assert len({load_artifact(other)["inputDigest"] for other in NAMES}) == 1
    assert str(ROOT) not in (ARTIFACTS / f"{name}.json").read_text(encoding="utf-8")


def test_deployed_code_is_the_artifacts_but_for_immutables(grid: Grid) -> None:
    for name, contract in (
        ("Credit", grid.credit),
        ("ProviderRegistry", grid.registry),
        ("MetaScheduler", grid.scheduler),
        ("ERC2771Forwarder", grid.forwarder),
    ):
        artifact = load_artifact(name)
        expected = bytearray.fromhex(artifact["deployedBytecode"][2:])
        code = bytearray(grid.chain.state.get_code(bytes.fromhex(contract.address[2:])))
        for places in artifact["immutableReferences"].values():
            for reference in places:
                placeholder = slice(reference["start"], reference["start"] + reference["length"])
                assert not any(expected[placeholder])
                code[placeholder] = bytes(reference["length"])
        assert code == expected


def test_a_missing_compiler_fails_where_real_parts_are_demanded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("DEEPSQUARE_REQUIRE_REAL", "1")
    with pytest.raises(pytest.fail.Exception, match="npm ci"):
        require_compiler()
    monkeypatch.setitem(os.environ, "DEEPSQUARE_REQUIRE_REAL", "0")
    with pytest.raises(pytest.skip.Exception):
        require_compiler()


def test_no_function_takes_ether(grid: Grid) -> None:
    """Ether sent by mistake would be stuck, so none is accepted.

    OpenZeppelin's forwarder passes on what it gets, so that a call of ours makes it revert.
    """
    for name in OWN:
        payable = [e for e in load_artifact(name)["abi"] if e.get("stateMutability") == "payable"]
        assert payable == []
    with pytest.raises(Reverted):
        grid.chain.run(grid.scheduler.address, b"", person("alice"))
