"""Limits and quotas of a gateway."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from deepsquare_chain.job import MEGABYTE
from deepsquare_chain.observability.serving import RequestRefusedError
from deepsquare_chain.store.gateway_client import is_file_name

DAY: Final = 86_400


@dataclass(frozen=True, slots=True)
class GatewayRules:
    """Limits and quotas per account.

    Attributes:
        max_part: Maximum bytes of one part of an upload.
        max_log: Maximum bytes of the log of a job.
        max_job: Maximum bytes of all files of a job.
        max_files: Maximum number of files of a job.
        max_account: Maximum bytes of all jobs of a customer.
        max_definitions: Maximum bytes of the definitions of a customer.
        max_streams: Maximum number of open log streams of an account.
        max_shares: Maximum number of shares of a customer that have not expired.
        refusals: Sustained rate limit of refused requests per second and account; 0 for no limit.
        refusal_burst: Burst size of `refusals`.
        rate: Sustained rate limit of requests per second and account; 0 for no limit.
        burst: Burst size of `rate`.
        sign_in_rate: Sustained rate limit of sign-ins per second and IP address; 0 for no limit.
        sign_in_burst: Burst size of `sign_in_rate`.
        session_seconds: Maximum lifetime of a session in seconds.
        keep_seconds: Retention period of files after their last change or use, in seconds.
        catch_up_seconds: Seconds after the end of a job in which its provider may still upload.
    """

    max_part: int = 4 * MEGABYTE
    max_log: int = 64 * MEGABYTE
    max_job: int = 16 * 1024 * MEGABYTE
    max_files: int = 10_000
    max_account: int = 64 * 1024 * MEGABYTE
    max_definitions: int = 256 * MEGABYTE
    max_streams: int = 200
    max_shares: int = 10_000
    refusals: float = 2.0
    refusal_burst: int = 100
    rate: float = 100.0
    burst: int = 2_000
    sign_in_rate: float = 5.0
    sign_in_burst: int = 300
    session_seconds: int = 900
    keep_seconds: int = 30 * DAY
    catch_up_seconds: int = 7 * DAY


def check_name(name: str) -> str:
    """Return `name` if it is a valid name of a file of a job (see `is_file_name`).

    Raises:
        RequestRefusedError: The name is invalid.
    """
    if not is_file_name(name):
        raise RequestRefusedError(
            "That is no name of a file of a job",
            code="bad-name",
            status=HTTPStatus.BAD_REQUEST,
            hint="Files of a job are log, output, and paths below work/.",
        )
    return name
