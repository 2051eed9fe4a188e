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
#: Timeout of a git command in seconds.
_TIMEOUT: Final = 120.0
_COMMIT: Final = re.compile(r"[0-9a-f]{7,40}")


def load_job(path: str | Path, *, lenient: bool = False) -> JobFile:
    """Read a job file and resolve its modules; local module paths are relative to the file.

    Args:
        path: Path of the job file.
        lenient: Skip unknown keys with a warning instead of an error.

    Raises:
        JobFileError: The file is invalid, or a module can't be fetched or is invalid.
    """
    folder = Path(path).absolute().parent
    job = load_job_file(path, lenient=lenient)
    return resolve_modules(job, lambda source: fetch_module(source, folder))


def fetch_module(source: str, folder: Path) -> FetchedModule:
    """Fetch a module from a folder or a git repository.

    Raises:
        JobFileError: The module can't be fetched.
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
    return FetchedModule(_limited_text(text, source), f"sha256:{hashlib.sha256(text).hexdigest()}")


def _from_git(source: str) -> FetchedModule:
    repository_path, _, ref = source.partition("@")
    host, owner, repository, *folders = repository_path.split("/")
    url = f"https://{host}/{owner}/{repository}"
    path = "/".join([*folders, _FILE])
    with tempfile.TemporaryDirectory(prefix="deepsquare-module-") as clone:
        _git(source, "clone", "--quiet", "--bare", "--filter=blob:none", url, clone)
        commit = _commit(source, clone, ref, "/".join(folders))
        text = _git(source, "-C", clone, "cat-file", "blob", f"{commit}:{path}")
    return FetchedModule(_limited_text(text, source), commit)


def _commit(source: str, place: str, ref: str, folder: str) -> str:
    """Return the full commit hash of a tag, a branch or an abbreviated commit.

    Tags of a folder, `FOLDER/TAG`, take precedence over other tags.
    """
    names = [f"refs/tags/{folder}/{ref}", f"refs/tags/{ref}", f"refs/heads/{ref}"] if ref else []
    names += [ref] if _COMMIT.fullmatch(ref) else []
    for name in names or ["HEAD"]:
        try:
            output = _git(
                source, "-C", place, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"
            )
        except JobFileError:
            continue
        return output.decode().strip()
    raise JobFileError(
        f"module {source}: the repository has no tag, branch or commit {ref!r}",
        hint="Correct the reference after @.",
    )


def _git(source: str, *words: str) -> bytes:
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        completed = subprocess.run(
            ["git", *words],  # noqa: S607 - the user's own git
            capture_output=True, timeout=_TIMEOUT, check=False, env=env,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise JobFileError(f"module {source}: git is not installed", hint="Install git.") from None
    except subprocess.TimeoutExpired:
        raise JobFileError(
            f"module {source}: the repository does not respond", hint="Try again later."
        ) from None
    if completed.returncode:
        error_lines = completed.stderr.decode(errors="replace").strip().splitlines()
        raise JobFileError(
            f"module {source}: {error_lines[-1][:300] if error_lines else 'it could not be fetched'}",
            hint="Check the source, and that this machine can reach the repository over https.",
        )
    return completed.stdout


def _limited_text(text: bytes, source: str) -> bytes:
    if len(text) > _MAX_BYTES:
        raise JobFileError(
            f"module {source}: {_FILE} is larger than {_MAX_BYTES:,} bytes",
            hint="A module must contain steps, not data.",
        )
    return text
