"""The misbehaving contracts of `contracts/test/`, compiled once and cached in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

SOURCES = ["contracts/test/HostileCredits.sol"]


def require_compiler() -> None:
    """Without Node.js or npm packages, skip the test, or fail if real parts are required."""
    from scripts.compile import ROOT  # noqa: PLC0415 - py-solc-x is a development dependency

    missing = [
        name
        for name, is_installed in {
            "Node.js": shutil.which("node"),
            "node_modules/solc": (ROOT / "node_modules" / "solc").exists(),
            "node_modules/@openzeppelin": (ROOT / "node_modules" / "@openzeppelin").exists(),
        }.items()
        if not is_installed
    ]
    if not missing:
        return
    message = f"{' and '.join(missing)} missing: run `npm ci`"
    if os.environ.get("DEEPSQUARE_REQUIRE_REAL") == "1":
        pytest.fail(message)
    pytest.skip(message)


def hostile_artifacts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return ABI and bytecode by contract name, from the cache if the sources are unchanged."""
    require_compiler()
    from scripts.compile import compile_sources, gather, settings  # noqa: PLC0415

    compiler_input = json.dumps([gather(SOURCES), settings(via_ir=False)], sort_keys=True)
    path = folder / f"hostile-{hashlib.sha256(compiler_input.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        built = compile_sources(SOURCES)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(built), encoding="utf-8")
        # Another worker may write the same file at the same time; the rename is atomic.
        draft.replace(path)
    artifacts: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return artifacts
