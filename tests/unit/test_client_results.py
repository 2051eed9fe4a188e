"""A job's results match the digest that its provider reported, or none are written."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepsquare_chain.client import gateways
from deepsquare_chain.client.gateways import Result, job_results
from deepsquare_chain.errors import AuditError, NotFoundError, UsageError
from deepsquare_chain.job import JobStatus
from deepsquare_chain.provider.model import run_key
from deepsquare_chain.store.gateway_client import NotDeliveredError

pytestmark = pytest.mark.unit

CONTRACT = "0x" + "51" * 20
JOB = 7
PRINTED = b"printed\n"
DIGEST = hashlib.sha256(PRINTED).hexdigest()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of an ended run below a provider's state folder."""
    folder = tmp_path / "provider-0x12" / "runs" / run_key(1, CONTRACT, JOB)
    (folder / "work").mkdir(parents=True)
    (folder / "output").write_bytes(PRINTED)
    (folder / "work" / "b.txt").write_bytes(b"b")
    (folder / "exit.json").write_text("{}")
    return folder


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A deployment with an ended job, and the digest that its provider reported."""
    history = SimpleNamespace(status=JobStatus.FINISHED, digest=DIGEST)

    async def get_job(job_id: int) -> Any:
        return SimpleNamespace(id=job_id, status=history.status, rate=1)

    async def reported(_contracts: Any, _job_id: int) -> str:
        return str(history.digest)

    monkeypatch.setattr(gateways, "reported_digest", reported)
    history.scheduler = SimpleNamespace(address=CONTRACT, get_job=get_job)
    history.deployment = SimpleNamespace(chain_id=1)
    return history


async def fetch(chain: Any, root: Path, to: Path | None = None) -> list[Result]:
    return await job_results(chain, root, JOB, to)


async def test_the_output_is_compared_with_the_reported_digest(
    chain: Any, run: Path, tmp_path: Path
) -> None:
    result = await fetch(chain, tmp_path, tmp_path / "got")
    assert [(item.name, item.size, item.on_chain) for item in result] == [
        ("output", len(PRINTED), True),
        ("work/b.txt", 1, None),
    ]
    assert result[0].digest == DIGEST
    assert (tmp_path / "got" / "output").read_bytes() == PRINTED
    assert result == await fetch(chain, tmp_path)


@pytest.mark.parametrize("forged", [b"other\n", None])
async def test_another_output_is_named_and_not_copied(
    chain: Any, run: Path, tmp_path: Path, forged: bytes | None
) -> None:
    (run / "output").unlink()
    if forged is not None:
        (run / "output").write_bytes(forged)
    with pytest.raises(
        AuditError, match=f"output of job {JOB} below .* does not match the digest"
    ) as error:
        await fetch(chain, tmp_path, tmp_path / "got")
    assert error.value.hint
    assert not (tmp_path / "got").exists()


async def test_without_a_report_nothing_is_claimed(chain: Any, run: Path, tmp_path: Path) -> None:
    chain.digest = ""
    assert {item.on_chain for item in await fetch(chain, tmp_path)} == {None}


async def test_a_run_that_continues_gives_nothing_yet(
    chain: Any, run: Path, tmp_path: Path
) -> None:
    chain.status = JobStatus.RUNNING
    with pytest.raises(UsageError, match=f"Job {JOB} has not ended: it is RUNNING"):
        await fetch(chain, tmp_path)
    chain.status = JobStatus.FINISHED
    (run / "exit.json").unlink()
    with pytest.raises(UsageError, match="has not ended"):
        await fetch(chain, tmp_path)


async def test_a_job_that_ran_elsewhere_is_not_found(chain: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=rf"No run of job {JOB} \(FINISHED\)") as error:
        await fetch(chain, tmp_path)
    assert "state_dir" in error.value.hint


async def test_a_folder_that_is_there_is_left_alone(chain: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "got").mkdir()
    with pytest.raises(UsageError, match="can't be created"):
        await fetch(chain, tmp_path, tmp_path / "got")
    assert list((tmp_path / "got").iterdir()) == []


async def test_an_output_that_can_not_be_read_costs_no_other_file(
    chain: Any, run: Path, tmp_path: Path
) -> None:
    (run / "output").unlink()
    (run / "output").symlink_to("/dev/null")
    output, other = await fetch(chain, tmp_path, tmp_path / "got")
    assert (output.on_chain, output.problem != "") == (None, True)
    assert (other.name, other.problem) == ("work/b.txt", "")
    assert (tmp_path / "got" / "work" / "b.txt").read_bytes() == b"b"


class SlowGateway:
    """A gateway that receives `steps` bytes of results, one step per 30 seconds."""

    display_url = "https://gateway.test"

    def __init__(self, content: bytes, *steps: int) -> None:
        self.now, self._content, self._steps = 0.0, content, list(steps)

    async def results(self, job_id: int) -> list[dict[str, Any]]:
        self.now += 30
        if self._steps:
            raise NotDeliveredError("not yet", received=self._steps.pop(0))
        digest = hashlib.sha256(self._content).hexdigest()
        return [{"name": "output", "size": len(self._content), "digest": digest, "problem": ""}]

    @asynccontextmanager
    async def download(self, _job: int, _name: str, start: int = 0) -> AsyncIterator[Any]:
        async def chunks() -> AsyncIterator[bytes]:
            yield self._content[start:]

        yield chunks()


async def download(
    chain: Any, monkeypatch: pytest.MonkeyPatch, gateway: SlowGateway, to: Path
) -> list[Result]:
    monkeypatch.setattr(gateways, "time", SimpleNamespace(monotonic=lambda: gateway.now))
    monkeypatch.setattr(gateways, "_POLL_SECONDS", 0)
    slow: Any = gateway
    return await job_results(chain, to.parent, JOB, to, gateways=[slow])


async def test_results_are_awaited_while_more_of_them_arrives(
    chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gateway = SlowGateway(PRINTED, 0, 10, 20, 30, 40)
    [output] = await download(chain, monkeypatch, gateway, tmp_path / "got")
    assert (output.on_chain, (tmp_path / "got" / "output").read_bytes()) == (True, PRINTED)
    with pytest.raises(NotFoundError, match="has not delivered its results"):
        await download(
            chain, monkeypatch, SlowGateway(PRINTED, 0, 10, *[10] * 9), tmp_path / "none"
        )


async def test_a_downloaded_file_keeps_its_holes(
    chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = b"a" + bytes(8 * 2**20) + b"b" + bytes(2**20)
    chain.digest = hashlib.sha256(content).hexdigest()
    [output] = await download(chain, monkeypatch, SlowGateway(content), tmp_path / "got")
    copy = tmp_path / "got" / "output"
    assert (output.problem, copy.read_bytes()) == ("", content)
    assert copy.stat().st_blocks * 512 < 2**20
