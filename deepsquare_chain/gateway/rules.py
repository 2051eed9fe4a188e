"""Limits of a gateway."""

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
    """What one account may use.

    Attributes:
        max_part: Bytes of one part of an upload.
        max_log: Bytes of the log of one job.
        max_job: Bytes of all files of one job.
        max_files: Files of one job.
        max_account: Bytes of all jobs of one customer.
        max_definitions: Bytes of the definitions of one customer.
        max_streams: Log streams that one account may hold open.
        max_shares: Shares of one customer that have not ended.
        refusals: Refused requests per second of one account in the long run; 0 for no limit.
        refusal_burst: Refused requests that it may make at once.
        rate: Requests per second of one account in the long run; 0 for no limit.
        burst: Requests that it may make at once.
        sign_in_rate: Sign-ins per second of one network address in the long run; 0 for no limit.
        sign_in_burst: Sign-ins that it may make at once.
        session_seconds: Longest time for which a sign-in is good.
        keep_seconds: Seconds after their last change or use for which files are kept.
        catch_up_seconds: Seconds after the end of a job in which its provider may deliver.
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
    """The name of a file of a job: `log`, `output`, or a path below `work/`.

    Raises:
        RequestRefusedError: It is none of these, or a path that leads elsewhere.
    """
    if not is_file_name(name):
        raise RequestRefusedError(
            "That is no name of a file of a job",
            code="bad-name",
            status=HTTPStatus.BAD_REQUEST,
            hint="Files of a job are log, output, and paths below work/.",
        )
    return name
