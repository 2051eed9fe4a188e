"""Output of runs on this machine, for people who stand before it; nothing is locked or changed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.executors.rundir import RunFolder, read_bytes
from deepsquare_chain.provider.model import parse_key, run_key

_MOST: Final = 1024 * 1024


def find_run(root: Path, chain_id: int, contract: str, job_id: int) -> Path | None:
    """Folder of a job's latest run below a provider's state folder, or a folder of several.

    Args:
        root: A provider's state folder, or the folder that holds those of a whole local grid.
        chain_id: Chain of the job.
        contract: Address of the MetaScheduler.
        job_id: The job.
    """
    first = run_key(chain_id, contract, job_id)
    found: list[tuple[int, float, Path]] = []
    for runs in _run_folders(root):
        for path in (runs / first, *runs.glob(f"{first}.*")):
            parsed = parse_key(chain_id, contract, path.name)
            if parsed is not None and path.is_dir():
                found.append((parsed[1], path.stat().st_mtime, path))
    return max(found)[2] if found else None


def read_output(run: Path, offset: int = 0, limit: int = _MOST) -> bytes:
    """Up to `limit` bytes, from byte `offset`, of what a run printed.

    Raises:
        NotFoundError: The run left no output that can be read.
    """
    folder = RunFolder(run)
    try:
        return read_bytes(folder.output, offset, limit)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise NotFoundError(f"The output of {folder.key} can't be read: {error.strerror}") from None


def has_ended(run: Path) -> bool:
    """Whether the run's end is on disk, so that its output will not grow."""
    return (run / "exit.json").exists()


def _run_folders(root: Path) -> list[Path]:
    candidates = [root / "runs", *root.glob("*/runs"), *root.glob("*/*/runs")]
    return [path for path in candidates if path.is_dir()]
