"""The folder of a service, and the status file that its daemon writes there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json

_MAX_BYTES = 100_000


def service_folder(state_dir: Path, service: str, address: str) -> Path:
    """Return the state folder of a service and wallet; several may share a state directory."""
    return state_dir / f"{service}-{address[:10].lower()}"


def running_services(state_dir: Path, service: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield folder and status of each running daemon of a service below a state folder."""
    for path in sorted(state_dir.glob(f"{service}-*/{service}.json")):
        status = read_status(path.parent, service)
        if status is not None:
            yield path.parent, status


def read_status(folder: Path, service: str) -> dict[str, Any] | None:
    """Return a daemon's last status; None if it does not run, or the file can't be read."""
    try:
        with (folder / f"{service}.json").open("rb") as file:
            status = from_json(file.read(_MAX_BYTES), allow_inf_nan=False)
        alive = status["state"] != "stopped" and _is_alive(int(status["pid"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return dict(status) if alive else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return pid > 0
