"""Secrets of a job: variables that only the providers that may run it, and the customer, can read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.wallet import read_secret
from deepsquare_chain.client.quotes import quotes
from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import JobFlags, Terms
from deepsquare_chain.store.encryption import (
    SECRETS_KEY_LABEL,
    SECRETS_LABEL,
    encrypt_secrets,
    secrets_labels,
)
from deepsquare_chain.workflow import Definition

#: Most providers that can read the secrets of a job; requirements on chain have 512 bytes.
MAX_READERS: Final = 20


def read_secrets(words: Sequence[str]) -> dict[str, str]:
    """Secrets as the command line names them: NAME for a variable of the environment, or NAME=FILE.

    Raises:
        UsageError: There is no such variable, or the file can't be used.
        NotFoundError: There is no such file.
    """
    found: dict[str, str] = {}
    for word in words:
        name, separator, file = word.partition("=")
        if separator:
            found[name] = read_secret(Path(file), "secret's file")
        elif name in os.environ:
            found[name] = os.environ[name]
        else:
            raise UsageError(
                f"--secret {name[:60]!r}: the environment has no such variable",
                hint="Export it first, or write NAME=FILE. The value itself is never an argument.",
            )
    return found


async def with_secrets(
    contracts: Contracts,
    definition: Definition,
    terms: Terms,
    secrets: Mapping[str, str],
    *,
    customer: str,
    own: Sequence[str] = (),
) -> tuple[Definition, Terms]:
    """The definition with encrypted secrets, and terms that lead to a provider that can read them.

    Args:
        contracts: Of the grid.
        definition: What runs.
        terms: Of the job.
        secrets: Values by the name of the variable.
        customer: Address of the job's customer: for nobody else's job are they decrypted.
        own: Further public keys that can read them, such as the customer's.

    Raises:
        UsageError: No provider that could run the job takes secrets.
        JobFileError: A name or value is not allowed.
    """
    definition.with_env(secrets)  # refuses names that the grid or bash keeps
    taken = sorted(set(secrets) & set(definition.env))
    if taken:
        raise UsageError(
            f"{taken[0]} is a secret and a variable of the job file", hint="Keep one of them."
        )
    readers: dict[str, str] = {}
    for each in await quotes(contracts, terms):
        key = each.provider.labels.get(SECRETS_KEY_LABEL, "")
        name = each.provider.labels.get(SECRETS_LABEL, "")
        if each.eligible and key and secrets_labels(key)[SECRETS_LABEL] == name:
            readers.setdefault(name, key)
    readers = dict(list(readers.items())[:MAX_READERS])
    if not readers:
        raise UsageError(
            "No provider that could run this job takes secrets",
            hint="See `deepsquare quote`; a provider publishes its key with its abilities.",
        )
    sealed = encrypt_secrets(secrets, customer, [*readers.values(), *own])
    uses = ",".join(filter(None, [terms.uses, f"{SECRETS_LABEL}:in:{'|'.join(readers)}"]))
    flags = terms.flags | JobFlags.NO_SELF_SCHEDULING
    return replace(definition, secrets=sealed), replace(terms, uses=uses, flags=flags)
