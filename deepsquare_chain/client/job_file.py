"""Prepares a job file for submission: fetches its modules, and encrypts its secrets.

Modules come from a folder, or from git over https. Secrets are environment variables, encrypted to
eligible providers and the customer.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.wallet import read_secret
from deepsquare_chain.client.offers import quotes
from deepsquare_chain.errors import JobFileError, UsageError
from deepsquare_chain.job import JobFlags, Terms
from deepsquare_chain.store.encryption import (
    SECRETS_KEY_LABEL,
    SECRETS_LABEL,
    encrypt_secrets,
    secrets_labels,
)
from deepsquare_chain.workflow import Definition, JobFile, load_job_file
from deepsquare_chain.workflow.jobfile import FetchedModule, resolve_modules

_MODULE_FILE: Final = "module.yaml"
_MAX_MODULE_BYTES: Final = 1_000_000
#: Timeout of a git command in seconds.
_GIT_TIMEOUT: Final = 120.0
_COMMIT: Final = re.compile(r"[0-9a-f]{7,40}")

#: Maximum number of providers that can read the secrets: requirements on chain have 512 bytes.
MAX_READERS: Final = 20


def load_job(path: str | Path, *, lenient: bool = False) -> JobFile:
    """Read a job file and resolve its modules; local module paths are relative to the file.

    With `lenient`, unknown keys are skipped with a warning instead of an error.

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
        with (folder / _MODULE_FILE).open("rb") as file:
            text = file.read(_MAX_MODULE_BYTES + 1)
    except OSError as error:
        raise JobFileError(
            f"module {source}: {folder / _MODULE_FILE} can't be read: {error.strerror}",
            hint="Local modules are folders with a module.yaml; the path is relative to the job file.",
        ) from None
    return FetchedModule(_limited_text(text, source), f"sha256:{hashlib.sha256(text).hexdigest()}")


def _from_git(source: str) -> FetchedModule:
    repository_path, _, ref = source.partition("@")
    host, owner, repository, *folders = repository_path.split("/")
    url = f"https://{host}/{owner}/{repository}"
    path = "/".join([*folders, _MODULE_FILE])
    with tempfile.TemporaryDirectory(prefix="deepsquare-module-") as clone:
        _git(source, "clone", "--quiet", "--bare", "--filter=blob:none", url, clone)
        commit = _commit(source, clone, ref, "/".join(folders))
        text = _git(source, "-C", clone, "cat-file", "blob", f"{commit}:{path}")
    return FetchedModule(_limited_text(text, source), commit)


def _commit(source: str, clone: str, ref: str, folder: str) -> str:
    """Return the full commit hash of a tag, a branch or an abbreviated commit.

    Tags of a folder, `FOLDER/TAG`, take precedence over other tags.
    """
    names = [f"refs/tags/{folder}/{ref}", f"refs/tags/{ref}", f"refs/heads/{ref}"] if ref else []
    names += [ref] if _COMMIT.fullmatch(ref) else []
    for name in names or ["HEAD"]:
        try:
            output = _git(
                source, "-C", clone, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"
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
            capture_output=True, timeout=_GIT_TIMEOUT, check=False, env=env,
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
    if len(text) > _MAX_MODULE_BYTES:
        raise JobFileError(
            f"module {source}: {_MODULE_FILE} is larger than {_MAX_MODULE_BYTES:,} bytes",
            hint="A module must contain steps, not data.",
        )
    return text


def read_secrets(arguments: Sequence[str]) -> dict[str, str]:
    """Read secrets given as NAME for an environment variable, or as NAME=FILE.

    Raises:
        UsageError: The variable is not set, or the file can't be used.
        NotFoundError: The file does not exist.
    """
    secrets: dict[str, str] = {}
    for word in arguments:
        name, separator, file = word.partition("=")
        if separator:
            secrets[name] = read_secret(Path(file), "secret's file")
        elif name in os.environ:
            secrets[name] = os.environ[name]
        else:
            raise UsageError(
                f"--secret {name[:60]!r}: the environment does not have this variable",
                hint="Export it first, or write NAME=FILE. The value itself can't be an argument.",
            )
    return secrets


async def with_secrets(
    contracts: Contracts,
    definition: Definition,
    terms: Terms,
    secrets: Mapping[str, str],
    *,
    customer: str,
    own: Sequence[str] = (),
) -> tuple[Definition, Terms]:
    """Return the definition with encrypted secrets, and terms that require one of their readers.

    Providers decrypt the secrets for jobs of `customer` only; `own` are further public keys that
    can read them, such as the customer's.

    Raises:
        UsageError: No eligible provider accepts secrets, or a name is also a variable of the job.
        JobFileError: A name or value is not allowed.
    """
    definition.with_env(secrets)  # refuses names that are reserved by the grid or bash
    duplicates = sorted(set(secrets) & set(definition.env))
    if duplicates:
        raise UsageError(
            f"{duplicates[0]} is both a secret and a variable of the job file",
            hint="Remove one of them.",
        )
    readers: dict[str, str] = {}
    for quote in await quotes(contracts, terms):
        key = quote.provider.labels.get(SECRETS_KEY_LABEL, "")
        name = quote.provider.labels.get(SECRETS_LABEL, "")
        if quote.eligible and key and secrets_labels(key)[SECRETS_LABEL] == name:
            readers.setdefault(name, key)
    readers = dict(list(readers.items())[:MAX_READERS])
    if not readers:
        raise UsageError(
            "No eligible provider of this job accepts secrets",
            hint="See `deepsquare quote`; a provider publishes its key with its abilities.",
        )
    sealed = encrypt_secrets(secrets, customer, [*readers.values(), *own])
    uses = ",".join(filter(None, [terms.uses, f"{SECRETS_LABEL}:in:{'|'.join(readers)}"]))
    flags = terms.flags | JobFlags.NO_SELF_SCHEDULING
    return replace(definition, secrets=sealed), replace(terms, uses=uses, flags=flags)
