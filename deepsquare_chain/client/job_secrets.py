"""Secrets of a job: environment variables encrypted to eligible providers and the customer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.wallet import read_secret
from deepsquare_chain.client.offers import quotes
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import JobFlags, Terms
from deepsquare_chain.store.encryption import (
    SECRETS_KEY_LABEL,
    SECRETS_LABEL,
    encrypt_secrets,
    secrets_labels,
)
from deepsquare_chain.workflow import Definition

#: Maximum number of providers that can read the secrets: requirements on chain have 512 bytes.
MAX_READERS: Final = 20


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

    Args:
        contracts: Contracts of the grid.
        definition: Definition of the job.
        terms: Terms of the job.
        secrets: Values by name of the variable.
        customer: Address of the job's customer; providers decrypt the secrets for its jobs only.
        own: Further public keys that can read the secrets, such as the customer's.

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
