"""Who is notified of which events of a job: the words of job files and settings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

from deepsquare_chain.job import JobStatus

MAX_TARGETS: Final = 10
_MAX_LENGTH: Final = 500
#: A comma may also stand within a URL: only one before a scheme or an e-mail address parts two.
_BETWEEN: Final = re.compile(r"\s*,\s*(?=https?://|[^\s,/]+@)")
# RFC 5321 allows more; what is left out would need quoting in headers.
_EMAIL: Final = re.compile(
    r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,200}[A-Za-z0-9])?"
)
_FAILURES: Final = frozenset({JobStatus.FAILED, JobStatus.OUT_OF_CREDITS, JobStatus.PANICKED})


class Occasion(StrEnum):
    """When to notify, in the words of Slurm's --mail-type."""

    BEGIN = "begin"  # it runs
    END = "end"  # it ended, in whatever way
    FAIL = "fail"  # it FAILED, is OUT_OF_CREDITS or PANICKED
    REQUEUE = "requeue"  # it left a provider and waits for another one
    ALL = "all"

    def holds(self, before: JobStatus, after: JobStatus) -> bool:
        """Whether a change of status is such an occasion."""
        if self is Occasion.BEGIN:
            return after is JobStatus.RUNNING
        if self is Occasion.END:
            return after.is_final
        if self is Occasion.FAIL:
            return after in _FAILURES
        if self is Occasion.REQUEUE:
            return after is JobStatus.PENDING and before is not JobStatus.NONE
        return any(each.holds(before, after) for each in tuple(Occasion)[:-1])


@dataclass(frozen=True, slots=True)
class Notify:
    """E-mail addresses and webhooks, and the occasions on which they are told."""

    to: tuple[str, ...] = ()
    on: tuple[Occasion, ...] = (Occasion.END,)

    def holds(self, before: JobStatus, after: JobStatus) -> bool:
        """Whether a change of status is one of the occasions."""
        return any(each.holds(before, after) for each in self.on)


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A change of a job's status; `id` is the same after a reorganisation, `time` is chain time."""

    id: str
    job_id: int
    before: JobStatus
    after: JobStatus
    block: int
    time: int


def is_email(target: str) -> bool:
    """Whether a valid target is an e-mail address, and no webhook."""
    return "://" not in target


def parse_target(text: str) -> str:
    """An e-mail address or the URL of a webhook.

    Raises:
        ValueError: It is neither.
    """
    target = text.strip().removeprefix("mailto:")
    if len(target) <= _MAX_LENGTH and target.isprintable() and " " not in target:
        if _EMAIL.fullmatch(target) and ".." not in target:
            return target
        try:
            parts = urlsplit(target)
            if parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0:
                return target
        except ValueError:
            pass
    raise ValueError("must be an e-mail address or the URL of a webhook (https://...)")


def parse_targets(text: str) -> tuple[str, ...]:
    """Targets joined by commas, each once.

    Raises:
        ValueError: One is none, or there are more than `MAX_TARGETS`.
    """
    parts = [each for each in _BETWEEN.split(text.strip()) if each]
    found = tuple(dict.fromkeys(parse_target(each) for each in parts))
    if len(found) > MAX_TARGETS:
        raise ValueError(f"must be at most {MAX_TARGETS} e-mail addresses and webhooks")
    return found


def parse_occasions(words: Iterable[str]) -> tuple[Occasion, ...]:
    """Occasions by name, in either case.

    Raises:
        ValueError: A word is none.
    """
    try:
        return tuple(dict.fromkeys(Occasion(each.strip().lower()) for each in words))
    except ValueError:
        raise ValueError(f"must be of {', '.join(Occasion)}") from None
