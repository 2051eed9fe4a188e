"""The soak test for a minute and a half: daemons are killed and restarted, without loss or leak."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.support.anvil import require_anvil

PROJECT = Path(__file__).resolve().parents[2]


async def test_a_short_soak(tmp_path: Path):
    require_anvil()
    run = await asyncio.create_subprocess_exec(
        *(sys.executable, "scripts/soak.py", "--minutes", "1.5", "--kill-every", "15"),
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await run.communicate()
    assert run.returncode is not None
    assert output, errors.decode(errors="replace")[-2_000:]
    document = json.loads(output)
    assert document["findings"] == []
    assert run.returncode == 0
    assert sum(document["kills"].values()) >= 3
    assert document["jobs"] >= 20
    assert "growth_percent" in document["watched"], "long enough to see it grow"
