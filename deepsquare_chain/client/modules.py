"""Fetches the modules of a job file: from a folder, or from git over https."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.workflow import JobFile, load_job_file
from deepsquare_chain.workflow.modules import FetchedModule, resolve_modules

_FILE: Final = "module.yaml"
_MAX_BYTES: Final = 1_000_000
#: Seconds for one command of git.
_TIMEOUT: Final = 120.0
_COMMIT: Final = re.compile(r"[0-9a-f]{7,40}")


def load_job(path: str | Path, *, lenient: bool = False) -> JobFile:
    """Read a job file and put its modules into the definition; local ones are relative to the file.

    Args:
        path: Of the job file.
        lenient: Leave out unknown keys and warn instead of refusing them.

    Raises:
        JobFileError: The file is not valid, or a module can't be had or does not fit.
    """
    folder = Path(path).absolute().parent
    job = load_job_file(path, lenient=lenient)
    return resolve_modules(job, lambda source: fetch_module(source, folder))


def fetch_module(source: str, folder: Path) -> FetchedModule:
    """A module by its source.

    Raises:
        JobFileError: It can't be had.
    """
    if source.startswith((".", "/")):
        return _from_folder(folder / source, source)
    return _from_git(source)


def _from_folder(folder: Path, source: str) -> FetchedModule:
    try:
        with (folder / _FILE).open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise JobFileError(
            f"module {source}: {folder / _FILE} can't be read: {error.strerror}",
            hint="Local modules are folders with a module.yaml; the path is relative to the job file.",
        ) from None
    return FetchedModule(_bounded(text, source), f"sha256:{hashlib.sha256(text).hexdigest()}")


def _from_git(source: str) -> FetchedModule:
    where, _, ref = source.partition("@")
    host, owner, repository, *inside = where.split("/")
    url = f"https://{host}/{owner}/{repository}"
    path = "/".join([*inside, _FILE])
    with tempfile.TemporaryDirectory(prefix="deepsquare-module-") as place:
        _git(source, "clone", "--quiet", "--bare", "--filter=blob:none", url, place)
        commit = _commit(source, place, ref, "/".join(inside))
        text = _git(source, "-C", place, "cat-file", "blob", f"{commit}:{path}")
    return FetchedModule(_bounded(text, source), commit)


def _commit(source: str, place: str, ref: str, folder: str) -> str:
    """The full commit of a tag, a branch or the beginning of a commit; a folder's tags begin with its name."""
    names = [f"refs/tags/{folder}/{ref}", f"refs/tags/{ref}", f"refs/heads/{ref}"] if ref else []
    names += [ref] if _COMMIT.fullmatch(ref) else []
    for name in names or ["HEAD"]:
        try:
            found = _git(
                source, "-C", place, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"
            )
        except JobFileError:
            continue
        return found.decode().strip()
    raise JobFileError(
        f"module {source}: the repository has no tag, branch or commit {ref!r}",
        hint="Correct what stands behind @.",
    )


def _git(source: str, *words: str) -> bytes:
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *words],  # noqa: S607 - the user's own git
            capture_output=True, timeout=_TIMEOUT, check=False, env=env,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise JobFileError(f"module {source}: git is not installed", hint="Install git.") from None
    except subprocess.TimeoutExpired:
        raise JobFileError(
            f"module {source}: the repository does not answer", hint="Try again later."
        ) from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise JobFileError(
            f"module {source}: {said[-1][:300] if said else 'it can not be fetched'}",
            hint="Check the source, and that this machine reaches the repository over https.",
        )
    return done.stdout


def _bounded(text: bytes, source: str) -> bytes:
    if len(text) > _MAX_BYTES:
        raise JobFileError(
            f"module {source}: {_FILE} is larger than {_MAX_BYTES:,} bytes",
            hint="A module holds steps, not data.",
        )
    return text
