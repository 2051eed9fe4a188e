"""Notifications of jobs: targets and occasions, as written in job files and settings."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

from deepsquare_chain.job import JobStatus

MAX_TARGETS: Final = 10
#: Target of notifications on the desktop. Only a setting can name it, never a job file.
DESKTOP: Final = "desktop"
_MAX_LENGTH: Final = 500
#: A URL may contain commas: only a comma before a scheme or an e-mail address separates targets.
_BETWEEN: Final = re.compile(r"\s*,\s*(?=https?://|[^\s,/]+@)")
# RFC 5321 allows more characters, which would need quoting in headers.
_EMAIL: Final = re.compile(
    r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,200}[A-Za-z0-9])?"
)
_FAILURES: Final = frozenset({JobStatus.FAILED, JobStatus.OUT_OF_CREDITS, JobStatus.PANICKED})


class Occasion(StrEnum):
    """When to notify, with the names of Slurm's --mail-type."""

    BEGIN = "begin"  # the job is RUNNING
    END = "end"  # the job ended, with any status
    FAIL = "fail"  # the job ended as FAILED, OUT_OF_CREDITS or PANICKED
    REQUEUE = "requeue"  # the job left its provider and is PENDING again
    ALL = "all"

    def holds(self, before: JobStatus, after: JobStatus) -> bool:
        """Whether a change of status matches this occasion."""
        if self is Occasion.BEGIN:
            return after is JobStatus.RUNNING
        if self is Occasion.END:
            return after.is_final
        if self is Occasion.FAIL:
            return after in _FAILURES
        if self is Occasion.REQUEUE:
            return after is JobStatus.PENDING and before is not JobStatus.NONE
        return any(occasion.holds(before, after) for occasion in tuple(Occasion)[:-1])


@dataclass(frozen=True, slots=True)
class Notify:
    """E-mail addresses and webhooks, and the occasions on which they are notified."""

    to: tuple[str, ...] = ()
    on: tuple[Occasion, ...] = (Occasion.END,)

    def holds(self, before: JobStatus, after: JobStatus) -> bool:
        """Whether a change of status matches one of the occasions."""
        return any(occasion.holds(before, after) for occasion in self.on)


def standing_request(to: str, on: str) -> Notify:
    """Return the recipients of every job of a wallet, as in the settings `notify_to` and `notify_on`."""
    return Notify(parse_targets(to), parse_occasions(on.split(",")))


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A change of a job's status; `id` does not change with a reorg, `time` is chain time."""

    id: str
    job_id: int
    before: JobStatus
    after: JobStatus
    block: int
    time: int


def is_email(target: str) -> bool:
    """Whether a valid target is an e-mail address."""
    return "@" in target and "://" not in target


def is_url(url: str, schemes: Collection[str]) -> bool:
    """Return whether a text is a URL of one of these schemes, with a host and a valid port."""
    try:
        parts = urlsplit(url)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def parse_target(text: str) -> str:
    """Parse an e-mail address or the URL of a webhook.

    Raises:
        ValueError: The text is neither.
    """
    target = text.strip().removeprefix("mailto:")
    if len(target) <= _MAX_LENGTH and target.isprintable() and " " not in target:
        if _EMAIL.fullmatch(target) and ".." not in target:
            return target
        if is_url(target, ("http", "https")):
            return target
    raise ValueError("must be an e-mail address or the URL of a webhook (https://...)")


def parse_targets(text: str) -> tuple[str, ...]:
    """Parse targets joined by commas, without duplicates.

    Raises:
        ValueError: A target is invalid, or there are more than `MAX_TARGETS`.
    """
    parts = [part for part in _BETWEEN.split(text.strip()) if part]
    targets = tuple(dict.fromkeys(parse_target(part) for part in parts))
    if len(targets) > MAX_TARGETS:
        raise ValueError(f"must be at most {MAX_TARGETS} e-mail addresses and webhooks")
    return targets


def parse_occasions(words: Iterable[str]) -> tuple[Occasion, ...]:
    """Parse the names of occasions; case-insensitive.

    Raises:
        ValueError: A name is unknown.
    """
    try:
        return tuple(dict.fromkeys(Occasion(word.strip().lower()) for word in words))
    except ValueError:
        raise ValueError(f"must be any of {', '.join(Occasion)}") from None
