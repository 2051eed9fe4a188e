"""Authentication by EIP-4361 sign-in with short sessions, and authorisation by chain state.

A sign-in is bound to the page or program that requests it (domain), to this gateway, chain and
contract, and to one job or all jobs of the account. Its nonce is valid once. The customer and the
provider of a job are read from the chain; the gateway trusts no other statement of a client.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Final

from eth_account.messages import encode_defunct

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.sign_in import SignInMessage, is_signed_by, rfc3339, seconds_of
from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.gateway.storage import GatewayRecords, JobSpace
from deepsquare_chain.job import DAY, MEGABYTE, Job, JobStatus
from deepsquare_chain.observability.serving import RateLimit, RequestRefusedError, forbidden
from deepsquare_chain.store.gateway_client import contract_resource, is_file_name, jobs_resource

# -- limits and quotas of a gateway


@dataclass(frozen=True, slots=True)
class GatewayRules:
    """Limits and quotas per account."""

    max_part: int = 4 * MEGABYTE  # maximum bytes of one part of an upload
    max_log: int = 64 * MEGABYTE  # maximum bytes of the log of a job
    max_job: int = 16 * 1024 * MEGABYTE  # maximum bytes of all files of a job
    max_files: int = 10_000  # maximum number of files of a job
    max_account: int = 64 * 1024 * MEGABYTE  # maximum bytes of all jobs of a customer
    max_definitions: int = 256 * MEGABYTE  # maximum bytes of the definitions of a customer
    max_streams: int = 200  # maximum number of open log streams of an account
    max_shares: int = 10_000  # maximum number of shares of a customer that have not expired
    #: Sustained rate limit of refused requests per second and account; 0 for no limit.
    refusals: float = 2.0
    refusal_burst: int = 100  # burst size of `refusals`
    rate: float = 100.0  # sustained rate limit of requests per second and account; 0 for no limit
    burst: int = 2_000  # burst size of `rate`
    #: Sustained rate limit of sign-ins per second and IP address; 0 for no limit.
    sign_in_rate: float = 5.0
    sign_in_burst: int = 300  # burst size of `sign_in_rate`
    session_seconds: int = 900  # maximum lifetime of a session in seconds
    #: Retention period of files after their last change or use, in seconds.
    keep_seconds: int = 30 * DAY
    #: Seconds after the end of a job in which its provider may still upload.
    catch_up_seconds: int = 7 * DAY
    notifications: int = 1_000  # maximum notifications of a customer per day


def check_name(name: str) -> str:
    """Return `name` if it is a valid name of a file of a job (see `is_file_name`).

    Raises:
        RequestRefusedError: The name is invalid.
    """
    if not is_file_name(name):
        raise RequestRefusedError(
            "The name of a job's file is not valid",
            code="bad-name",
            status=HTTPStatus.BAD_REQUEST,
            hint="The files of a job are log, output, and paths below work/.",
        )
    return name


# -- sign-in and permissions

#: Lifetime of a nonce and tolerated clock skew, in seconds.
_NONCE_SECONDS: Final = 300
_SKEW: Final = 60
_NONCE: Final = re.compile(r"[0-9a-f]{56}")
_LOCAL_DOMAIN: Final = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")
_MAX_SESSIONS: Final = 100_000
#: Cache lifetime of a job's record in seconds: for pending jobs, and for jobs that run or have
#: ended, whose provider rarely changes.
_LIVE_JOB_SECONDS: Final = 1.0
_JOB_SECONDS: Final = 5.0
#: Cache lifetime in seconds when a request would be refused.
_REFUSAL_CACHE_SECONDS: Final = 0.25
_MAX_CACHED: Final = 10_000


class Permission(Enum):
    """A permission on a job."""

    READ_DEFINITION = "read the definition"
    READ = "read the output"
    WRITE = "deliver output"
    OWN = "act as its customer"


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in account.

    `jobs` are the only jobs that it may access, None for all; `expires` is in epoch seconds.
    """

    account: str
    jobs: frozenset[int] | None
    expires: float


def _unauthorised(message: str, *, code: str) -> RequestRefusedError:
    return RequestRefusedError(
        message,
        code=code,
        status=HTTPStatus.UNAUTHORIZED,
        hint="Request a new nonce and sign in again with the wallet of the job.",
    )


class Nonces:
    """Issues and checks single-use nonces; only used nonces take memory.

    A nonce contains its expiry and an HMAC. The key is new for each process, so a nonce of an
    earlier process is refused.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._key = secrets.token_bytes(32)
        self._clock = clock
        self._used: OrderedDict[str, int] = OrderedDict()

    def issue(self) -> tuple[str, int]:
        """Return a new nonce and its expiry (epoch seconds)."""
        expires = int(self._clock()) + _NONCE_SECONDS
        head = secrets.token_hex(8) + f"{expires:08x}"
        return head + self._proof(head), expires

    def check(self, nonce: str) -> None:
        """Check that a nonce is valid, without using it.

        Raises:
            RequestRefusedError: The nonce was not issued here, has expired, or was used.
        """
        well_formed = _NONCE.fullmatch(nonce) is not None
        if not well_formed or not hmac.compare_digest(self._proof(nonce[:24]), nonce[24:]):
            raise _unauthorised("This gateway did not issue this nonce", code="unknown-nonce")
        if int(nonce[16:24], 16) < self._clock():
            raise _unauthorised("The nonce has expired", code="expired-nonce")
        if nonce in self._used:
            raise _unauthorised("The nonce has already been used", code="used-nonce")

    def use(self, nonce: str) -> None:
        """Mark a nonce as used; errors as `check`."""
        self.check(nonce)
        now = self._clock()
        while self._used and next(iter(self._used.values())) < now:
            self._used.popitem(last=False)
        self._used[nonce] = int(nonce[16:24], 16)

    def _proof(self, head: str) -> str:
        return hmac.new(self._key, head.encode(), hashlib.sha256).hexdigest()[:32]


class Access:
    """Authenticates accounts and authorises their requests; `clock` returns epoch seconds.

    Nobody can sign in before `serve_under` has set the domains.
    """

    def __init__(
        self,
        contracts: Contracts,
        records: GatewayRecords,
        rules: GatewayRules,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._contracts = contracts
        self._records = records
        self._rules = rules
        self.origins: tuple[str, ...] = ()
        self._domains: frozenset[str] = frozenset()
        self._clock = clock
        self._nonces = Nonces(clock)
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._jobs: OrderedDict[int, tuple[float, Job]] = OrderedDict()
        # New accounts are free, and each refusal costs a chain read.
        self._refusals = RateLimit(rules.refusals, rules.refusal_burst)

    def serve_under(self, origins: Collection[str], sites: Collection[str] = ()) -> None:
        """Set the URLs of this gateway, and the other origins whose visitors may sign in."""
        self.origins = tuple(origins)
        self._domains = frozenset(url.partition("://")[2] for url in (*origins, *sites))

    def now(self) -> float:
        """Return the time for the expiry of sessions and shares, in epoch seconds."""
        return self._clock()

    # -- sign-in

    def challenge(self) -> dict[str, str]:
        """Return a nonce, and the times for the message."""
        nonce, expires = self._nonces.issue()
        now = self._clock()
        return {
            "nonce": nonce,
            "issued_at": rfc3339(now),
            "expiration_time": rfc3339(now + self._rules.session_seconds),
            "nonce_expires": rfc3339(expires),
        }

    async def sign_in(self, text: str, signature: bytes) -> tuple[str, Session]:
        """Return a token and its session for a signed message.

        Raises:
            RequestRefusedError: The message is for another domain, chain or contract, is expired or
                not yet valid, has an invalid nonce, or is not signed by its address.
            EndpointError: The chain, needed for contract wallets, can't be read.
        """
        try:
            message = SignInMessage.parse(text)
        except UsageError as error:
            raise RequestRefusedError(
                error.message, code="no-message", status=HTTPStatus.BAD_REQUEST, hint=error.hint
            ) from None
        expires = self._check(message)
        self._nonces.check(message.nonce)
        signable = encode_defunct(text=text)
        if not await is_signed_by(self._contracts.w3, signable, signature, message.address):
            raise _unauthorised(
                f"The message is not signed by {message.address}", code="wrong-signature"
            )
        # No await from here on, so only one of two concurrent sign-ins can use a nonce.
        self._nonces.use(message.nonce)
        session = Session(message.address, self._scope(message), expires)
        return self._remember(session), session

    def session(self, token: str) -> Session:
        """Return the session of a token.

        Raises:
            RequestRefusedError: The token is unknown, or its session has expired.
        """
        key = hashlib.sha256(token.encode()).hexdigest()
        session = self._sessions.get(key)
        if session is None or session.expires < self._clock():
            self._sessions.pop(key, None)
            raise _unauthorised("This request needs a sign-in", code="signed-out")
        return session

    def _check(self, message: SignInMessage) -> float:
        """Check everything but nonce and signature; return the expiry (epoch seconds)."""
        deployment = self._contracts.deployment
        if message.domain not in self._domains and not self._is_local(message.domain):
            raise _unauthorised(
                f"The message is for {message.domain[:80]}, not for this gateway",
                code="wrong-domain",
            )
        if not any(_is_below_origin(message.uri, origin) for origin in self.origins):
            raise _unauthorised(
                "The URI of the message is not a URL of this gateway", code="wrong-uri"
            )
        if message.chain_id != deployment.chain_id:
            raise _unauthorised(
                f"The message is for chain {message.chain_id}, this is {deployment.chain_id}",
                code="wrong-chain",
            )
        contract = contract_resource(deployment.chain_id, self._contracts.scheduler.address)
        if contract not in message.resources:
            raise _unauthorised(
                "The message does not list the contract of this gateway in its resources",
                code="wrong-contract",
            )
        now = self._clock()
        if not message.expiration_time:
            raise _unauthorised("The message has no expiration time", code="no-expiry")
        expires = seconds_of(message.expiration_time)
        starts = max(
            seconds_of(message.issued_at),
            seconds_of(message.not_before) if message.not_before else 0.0,
        )
        if expires <= now or starts > now + _SKEW or starts < now - _NONCE_SECONDS - _SKEW:
            raise _unauthorised("The message is not valid at this time", code="wrong-time")
        return min(expires, now + self._rules.session_seconds)

    def _is_local(self, domain: str) -> bool:
        """Return whether the domain and all URLs of the gateway are on the loopback interface."""
        return _LOCAL_DOMAIN.fullmatch(domain) is not None and all(
            _LOCAL_DOMAIN.fullmatch(url.partition("://")[2]) for url in self.origins
        )

    def _scope(self, message: SignInMessage) -> frozenset[int] | None:
        """Return the jobs of a message; None for all jobs of the account."""
        jobs: set[int] = set()
        for origin in self.origins:
            base = jobs_resource(origin)
            if base in message.resources:
                return None
            for resource in message.resources:
                number = resource.removeprefix(f"{base}/")
                if (
                    number != resource
                    and number.isascii()
                    and number.isdigit()
                    and len(number) < 20
                ):
                    jobs.add(int(number))
        return frozenset(jobs)

    def _remember(self, session: Session) -> str:
        token = secrets.token_urlsafe(32)
        self._sessions[hashlib.sha256(token.encode()).hexdigest()] = session
        while len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return token

    def forget_expired(self) -> None:
        """Remove expired sessions."""
        now = self._clock()
        for key in [key for key, session in self._sessions.items() if session.expires < now]:
            del self._sessions[key]

    # -- authorisation

    async def job(
        self, session: Session, job_id: int, permission: Permission, *, counted: bool = True
    ) -> JobSpace:
        """Return the job if the account has this permission on it.

        With `counted`, a refusal counts for the rate limit of refusals.

        Raises:
            RequestRefusedError: The permission is missing or the job does not exist, with the same
                error for both, so that strangers can't tell them apart; or too many requests of
                the account were refused.
            EndpointError: The chain can't be read.
        """
        if session.jobs is not None and job_id not in session.jobs:
            raise forbidden(
                f"This sign-in is not for job {job_id}",
                code="wrong-job",
                hint="Sign in for that job.",
            )
        if not self._refusals.has_tokens(session.account):
            raise RequestRefusedError(
                "Too many requests of this account were refused",
                code="too-many-refused",
                status=HTTPStatus.TOO_MANY_REQUESTS,
                hint="Request only jobs of this account, or try again later.",
                retry=1,
            )
        job, fresh = await self._job(job_id, _JOB_SECONDS)
        if not (job and await self._allowed(session.account, job, permission)) and not fresh:
            # The job may have been assigned after the cached read.
            job, _ = await self._job(job_id, _REFUSAL_CACHE_SECONDS)
        if job is None or not await self._allowed(session.account, job, permission):
            if counted:
                self._refusals.wait(session.account)
            raise forbidden(
                f"{session.account} may not {permission.value} of job {job_id}",
                code="not-authorised",
                hint="Only its customer can read it, and only its current provider can upload to it.",
            )
        return JobSpace(job.id, job.customer, job.provider_id, job)

    def check_unrestricted(self, session: Session) -> None:
        """Refuse a sign-in for a single job.

        Raises:
            RequestRefusedError: The sign-in is for one job.
        """
        if session.jobs is not None:
            raise forbidden("This sign-in is valid for one job only", code="wrong-job")

    async def check_uploader(self, session: Session) -> None:
        """Refuse definitions of accounts that can't pay for any job.

        Raises:
            RequestRefusedError: The account holds no credits, or the sign-in is for one job.
            EndpointError: The chain can't be read.
        """
        self.check_unrestricted(session)
        known = self._records.has_definitions(session.account)
        if not known and not await self._contracts.credit.balance_of(session.account):
            raise forbidden(
                f"{session.account} has no credits",
                code="no-credits",
                hint="Definitions are accepted only from accounts that can pay for a job.",
            )

    async def _job(self, job_id: int, age: float) -> tuple[Job | None, bool]:
        """Return a job's record, at most `age` seconds old, and whether it was just read."""
        now = time.monotonic()
        read_at, job = self._jobs.get(job_id, (float("-inf"), None))
        is_pending = job is None or job.status < JobStatus.RUNNING
        if now - read_at < min(age, _LIVE_JOB_SECONDS if is_pending else _JOB_SECONDS):
            return job, False
        try:
            job = await self._contracts.scheduler.get_job(job_id)
        except NotFoundError:
            return None, True
        self._jobs[job_id] = (now, job)
        self._jobs.move_to_end(job_id)
        while len(self._jobs) > _MAX_CACHED:
            self._jobs.popitem(last=False)
        return job, True

    async def _allowed(self, account: str, job: Job, permission: Permission) -> bool:
        if _same_address(account, job.customer):
            return permission is not Permission.WRITE
        if permission is Permission.OWN:
            return False
        if permission is Permission.READ and self._is_guest(account, job):
            return True
        return self._may_access_as_provider(job, permission) and await self._is_provider(
            account, job
        )

    def _is_guest(self, account: str, job: Job) -> bool:
        return self._records.is_shared(job.id, job.customer, account, self._clock())

    def _may_access_as_provider(self, job: Job, permission: Permission) -> bool:
        """Return whether the job's provider currently has this permission."""
        if job.status.is_assigned:
            return True
        # The record of an ended job no longer changes: its last provider may upload the rest.
        seconds_since_end = self._clock() - job.since
        return (
            permission is Permission.WRITE
            and job.status.is_final
            and seconds_since_end < self._rules.catch_up_seconds
        )

    async def _is_provider(self, account: str, job: Job) -> bool:
        if not job.provider_id:
            return False
        provider = await self._contracts.registry.account_of(job.provider_id)
        return provider is not None and _same_address(account, provider)


def _same_address(one: str, other: str) -> bool:
    return one.lower() == other.lower()


def _is_below_origin(uri: str, origin: str) -> bool:
    return uri == origin or uri.startswith(f"{origin}/")
