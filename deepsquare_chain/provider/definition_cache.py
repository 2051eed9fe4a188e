"""A cache of job definitions, verified against the chain."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Final

from deepsquare_chain.errors import GridError, JobFileError, NotFoundError
from deepsquare_chain.job import Job, Resources
from deepsquare_chain.provider.model import CachedDefinition, DefinitionState
from deepsquare_chain.store.definitions import DefinitionMismatch, DefinitionStore
from deepsquare_chain.workflow import Definition, digest

_MAX_DEFINITIONS: Final = 256
_READY: Final = CachedDefinition(DefinitionState.READY)


class DefinitionCache:
    """A cache of definitions by digest.

    Args:
        store: Store of definitions, whose responses are verified.
        timeout: Seconds for one request; a slower store counts as unreachable.
    """

    def __init__(self, store: DefinitionStore, *, timeout: float = 5.0) -> None:
        self._store = store
        self._timeout = timeout
        self._definitions: OrderedDict[bytes, Definition | CachedDefinition] = OrderedDict()

    async def fetch(self, job: Job) -> CachedDefinition:
        """Fetch a job's definition if needed; returns whether it matches the job on chain."""
        cached = self._definitions.get(job.definition)
        if cached is None:
            cached = await self._fetch(job)
        if isinstance(cached, CachedDefinition):
            return cached
        if cached.resources != job.resources:
            difference = f"{_describe_resources(cached.resources)} instead of {_describe_resources(job.resources)}"
            return CachedDefinition(
                DefinitionState.INVALID, f"the definition requires {difference}"
            )
        return _READY

    def definition(self, job: Job) -> Definition | None:
        """Return the definition of a job that was READY; None when it was evicted."""
        cached = self._definitions.get(job.definition)
        return cached if isinstance(cached, Definition) else None

    async def _fetch(self, job: Job) -> Definition | CachedDefinition:
        key = job.definition
        name = f"definition {key.hex()[:16]}"
        try:
            async with asyncio.timeout(self._timeout):
                data = await self._store.get(key, job.id)
        except NotFoundError:
            return CachedDefinition(DefinitionState.MISSING, f"{name} is not in the store")
        except DefinitionMismatch:
            return CachedDefinition(DefinitionState.MISSING, f"{name} does not match its digest")
        except (GridError, TimeoutError, OSError) as error:
            return CachedDefinition(
                DefinitionState.UNREACHABLE, f"{name} can't be fetched: {error}"
            )
        if digest(data) != key:
            return CachedDefinition(DefinitionState.MISSING, f"{name} does not match its digest")
        definition = self._parse_definition(data)
        self._definitions[key] = definition
        while len(self._definitions) > _MAX_DEFINITIONS:
            self._definitions.popitem(last=False)
        return definition

    @staticmethod
    def _parse_definition(data: bytes) -> Definition | CachedDefinition:
        try:
            return Definition.from_bytes(data)
        except JobFileError as error:
            return CachedDefinition(DefinitionState.INVALID, error.message)


def _describe_resources(wanted: Resources) -> str:
    size = f"{wanted.tasks} x {wanted.cpus_per_task} cpus, {wanted.mem_per_cpu} MB per cpu"
    return f"{size}, {wanted.gpus} gpus"
