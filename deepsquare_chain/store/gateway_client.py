"""The HTTP client of a gateway, for definitions, logs and results of jobs.

Gateways are untrusted: definitions are verified by the digest on chain, outputs by the digest that
the provider reported.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Final, Self
from urllib.parse import quote, urlsplit

import httpx2
from pydantic_core import from_json

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.transport import (
    CERTIFICATE_HINT,
    Transport,
    failure_reason,
    http_client,
)
from deepsquare_chain.chain.sign_in import SignInMessage
from deepsquare_chain.chain.signers import Signer, SigningDomain, signed_by
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    JobFileError,
    NotAuthorisedError,
    NotFoundError,
)
from deepsquare_chain.notification import Notify
from deepsquare_chain.observability.redaction import plain
from deepsquare_chain.settings import Settings, safe_url, split_urls
from deepsquare_chain.store.definitions import MAX_BYTES, DefinitionMismatch
from deepsquare_chain.store.encryption import FOLDER as ENCRYPTED
from deepsquare_chain.workflow import digest as digest_of

# -- base of the clients of HTTP services: limited responses, and errors that name the service

_TIMEOUT: Final = 15.0


@dataclass(frozen=True, slots=True)
class ServiceResponse:
    """A response with its body, which has a size limit."""

    status: int
    headers: httpx2.Headers
    content: bytes

    @property
    def is_success(self) -> bool:
        """Return whether the request succeeded."""
        return 200 <= self.status < 300

    def body(self) -> dict[str, Any] | None:
        """Parse the content as a JSON object; None if it is something else."""
        return json_object(self.content)


class ServiceClient:
    """Client of one HTTP service; an async context manager. `transport` is for tests.

    Raises:
        UsageError: The proxy in the environment is invalid.
    """

    #: Name of the service, and the hint of its errors.
    service: ClassVar[str]
    advice: ClassVar[str]
    #: Maximum size of a response in bytes.
    max_response_bytes: ClassVar[int]

    def __init__(
        self,
        url: str,
        transport_settings: Transport | None = None,
        *,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.display_url = safe_url(url)
        self._client = http_client(
            self.url, transport_settings, timeout=_TIMEOUT, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _send(self, method: str, path: str, **request: Any) -> ServiceResponse:
        content = bytearray()
        try:
            async with self._client.stream(method, path, **request) as response:
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > self.max_response_bytes:
                        raise self._invalid_response("a response that is too long")
                return ServiceResponse(response.status_code, response.headers, bytes(content))
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> EndpointError:
        why = failure_reason(error)
        hint = CERTIFICATE_HINT if "certificate" in why else self.advice
        return EndpointError(
            f"The {self.service} at {self.display_url} can't be reached: {why}", hint=hint
        )

    def _invalid_response(self, detail: str = "") -> EndpointError:
        detail = f" ({detail})" if detail else ""
        return EndpointError(
            f"{self.display_url} is not a working {self.service}{detail}",
            hint=f"Check the URL. {self.advice}",
        )


def json_object(data: bytes) -> dict[str, Any] | None:
    """Parse bytes as a JSON object; None if they are something else."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# -- the gateway's client

#: Maximum definitions of one registration of recipients.
MAX_REGISTERED_DEFINITIONS: Final = 50
#: File name of the log, which grows while a run is alive.
LOG: Final = "log"
_MAX_NAME: Final = 1_024
_STREAM_TIMEOUT: Final = httpx2.Timeout(15.0, read=60.0)
_MAX_EVENT: Final = 256 * 1024
_TRIES: Final = 5
_STATEMENT: Final = "Sign in to the gateway. This moves no credits and costs no gas."


def is_file_name(name: str) -> bool:
    """Return whether a gateway accepts this name for a file of a job.

    Names are `log` (the output during the run), `output` (the output that its provider kept and
    reported on chain) and paths below `work/`, or below `encrypted/` where the job has recipients.
    """
    parts = name.split("/")
    plain_text = name.isprintable() and "\\" not in name and len(name) <= _MAX_NAME
    inside = name in {LOG, "output"} or (parts[0] in {"work", ENCRYPTED} and len(parts) > 1)
    return plain_text and inside and not any(part in {"", ".", ".."} for part in parts)


def contract_resource(chain_id: int, contract: str) -> str:
    """Return the contract as a resource of a sign-in (CAIP-10)."""
    return f"eip155:{chain_id}:{contract.lower()}"


def jobs_resource(url: str) -> str:
    """Return all jobs of a gateway as a resource of a sign-in; append `/ID` for one job."""
    return f"{url.rstrip('/')}/v1/jobs"


def share_data(
    chain_id: int, contract: str, job_id: int, reader: str, until: int
) -> dict[str, Any]:
    """Return the EIP-712 document to let a reader read a job until `until` (epoch seconds)."""
    fields = {"jobId": "uint256", "reader": "address", "until": "uint64"}
    message = {"jobId": job_id, "reader": reader, "until": until}
    domain = SigningDomain("DeepSquare Gateway", "1", chain_id, contract)
    return domain.typed_data("ShareJob", fields, message)


def gateway_urls(settings: Settings, deployment: Deployment) -> tuple[str, ...]:
    """Return the gateways of the settings, else the gateway recorded by a devnet, if any."""
    urls = settings.gateway or deployment.extra.get("gateway")
    if not isinstance(urls, str) or not urls.startswith(("http://", "https://")):
        return ()
    return tuple(url.rstrip("/") for url in split_urls(urls))


class GatewayRefusedError(EndpointError):
    """The gateway refused a request; `code` is its code for the reason.

    `offset` is the size of the file at the gateway, for an offset mismatch.
    """

    def __init__(
        self, message: str, *, hint: str = "", code: str = "", offset: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.offset = offset


class NotDeliveredError(NotFoundError):
    """The provider has not uploaded all results yet; `received` bytes are at the gateway."""

    def __init__(self, message: str, *, hint: str = "", received: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.received = received


class WrongAccountError(NotAuthorisedError):
    """The account lacks the permission for this request."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a job at the gateway; `size` in bytes."""

    name: str
    size: int
    complete: bool


@dataclass(frozen=True, slots=True)
class LogPart:
    """A part of a log, and the byte offset of the next part; `end` after the last one."""

    data: bytes
    offset: int
    end: bool = False


class GatewayClient(ServiceClient):
    """Client of one gateway for one account; an async context manager.

    Args:
        account: Signer for the sign-in; None if no request needs one.
        chain_id: Chain of the grid, part of the sign-in.
        contract: Address of the MetaScheduler, part of the sign-in.
        job_id: The only job of the sign-in; None for all jobs of the account.

    Raises:
        UsageError: The proxy in the environment is invalid.
    """

    service: ClassVar[str] = "gateway"
    advice: ClassVar[str] = "Check that it is running, or give another one with --gateway."
    max_response_bytes: ClassVar[int] = 16 * 1024 * 1024

    def __init__(
        self,
        url: str,
        account: Signer | None,
        *,
        chain_id: int,
        contract: str,
        job_id: int | None = None,
        transport_settings: Transport | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, transport_settings, transport=transport)
        self._account = account
        self._grid = (chain_id, contract)
        self._job_id = job_id
        self._token = ""
        self._signing = asyncio.Lock()

    async def terms(self) -> dict[str, Any]:
        """Return the gateway's terms; no sign-in is needed.

        Raises:
            EndpointError: The gateway is down, or belongs to another grid.
        """
        response = await self._send("GET", "/v1/gateway")
        terms = response.body() if response.is_success else None
        if terms is None:
            raise self._invalid_response()
        chain_id, contract = self._grid
        if (
            terms.get("chain_id") != chain_id
            or str(terms.get("contract")).lower() != contract.lower()
        ):
            raise EndpointError(
                f"The gateway at {self.display_url} belongs to another grid",
                hint="Give a gateway of this grid with --gateway.",
            )
        numbers = {name: value for name, value in terms.items() if isinstance(value, int)}
        return {**numbers, "contract": contract}

    # -- notifications

    async def register_notifications(
        self, definitions: Sequence[str], requests: Sequence[Notify], key: str
    ) -> None:
        """Let the gateway notify of the jobs of definitions (hexadecimal digests).

        Replaces earlier requests for them; without recipients, nobody is notified. `key` signs
        webhooks, "" for none.

        Raises:
            NotFoundError: The gateway sends no notifications.
            GatewayRefusedError: It refuses the recipients.
            EndpointError: The gateway is down.
        """
        parts = [{"to": request.to, "on": request.on} for request in requests if request.to]
        for start in range(0, len(definitions), MAX_REGISTERED_DEFINITIONS):
            part = list(definitions[start : start + MAX_REGISTERED_DEFINITIONS])
            body = {"definitions": part, "requests": parts, "key": key}
            await self._request("PUT", "/v1/notifications", json=body)

    async def notifications(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest notifications of the account's jobs that the gateway sent or will send.

        Raises:
            NotFoundError: The gateway sends no notifications.
            EndpointError: The gateway is down or refuses.
        """
        response = await self._request("GET", f"/v1/notifications?limit={limit}")
        return self._objects(response, "notifications")

    # -- definitions

    async def put_definition(self, data: bytes) -> bytes:
        """Upload a definition and return its digest; idempotent.

        Raises:
            JobFileError: The definition is too large.
            WrongAccountError: The gateway accepts no definitions from this account.
            EndpointError: The gateway is down or refuses.
        """
        if len(data) > MAX_BYTES:
            raise JobFileError(f"A definition of {len(data):,} bytes is larger than {MAX_BYTES:,}")
        key = digest_of(data)
        await self._request("PUT", f"/v1/definitions/{key.hex()}", content=data)
        return key

    async def definition(self, job_id: int, digest: bytes) -> bytes:
        """Return the definition of a job.

        Raises:
            NotFoundError: The gateway does not have it.
            DefinitionMismatch: The gateway has other bytes.
            WrongAccountError: This account may not read it.
            EndpointError: The gateway is down or refuses.
        """
        response = await self._request("GET", f"/v1/jobs/{job_id}/definition")
        if digest_of(response.content) != digest:
            raise DefinitionMismatch(
                f"The gateway at {self.display_url} returned another definition than that of job {job_id}",
                hint="Tell the operator of the gateway; submit the job file again to restore it.",
            )
        return response.content

    # -- files

    async def size(self, job_id: int, name: str) -> RemoteFile | None:
        """Return the size of a file at the gateway; None if it is missing. Errors as `append`."""
        try:
            response = await self._request("HEAD", _file(job_id, name))
        except NotFoundError:
            return None
        return self._file_of(name, response)

    async def append(
        self,
        job_id: int,
        name: str,
        offset: int,
        data: bytes,
        *,
        complete: bool = False,
        exact: bool = False,
    ) -> RemoteFile:
        """Upload the part of a file that begins at `offset`; existing bytes are not changed.

        With `exact` the part is refused unless the file ends at `offset`, for parts whose bytes
        can't be reproduced.

        Raises:
            NotFoundError: The gateway lacks the job's definition: another one has it.
            GatewayRefusedError: The gateway refuses the part; with `offset` on a mismatch.
            WrongAccountError: The job is not assigned to this account.
            EndpointError: The gateway is down.
        """
        headers = {"Upload-Offset": str(offset), "Upload-Complete": "?1" if complete else "?0"}
        if exact:
            headers["Upload-Exact"] = "?1"
        response = await self._request("PATCH", _file(job_id, name), content=data, headers=headers)
        return self._file_of(name, response)

    async def put_results(self, job_id: int, files: Sequence[Mapping[str, Any]]) -> None:
        """Upload the list of a run's files, once all are uploaded; errors as `append`."""
        await self._request("PUT", f"/v1/jobs/{job_id}/results", json={"files": list(files)})

    async def results(self, job_id: int) -> list[dict[str, Any]]:
        """Return the provider's list of a run's files.

        Raises:
            NotDeliveredError: The provider has not uploaded all of them yet.
            WrongAccountError: This account may not read it.
            EndpointError: The gateway is down, or its response is invalid.
        """
        response = await self._request("GET", f"/v1/jobs/{job_id}/results")
        return self._objects(response, "files")

    @asynccontextmanager
    async def download(
        self, job_id: int, name: str, start: int = 0
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Stream a file's bytes from an offset to its current end; errors as `results`."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        async with self._stream(_file(job_id, name), headers) as response:
            if start and response.status_code != HTTPStatus.PARTIAL_CONTENT:
                raise self._invalid_response("it ignores range requests")
            yield self._chunks(response)

    async def follow(self, job_id: int, offset: int = 0) -> AsyncIterator[LogPart]:
        """Stream a job's log from an offset as it grows, until it ends or the connection closes.

        Raises:
            WrongAccountError: This account may not read it.
            EndpointError: The connection failed; resume from the last offset.
        """
        path = f"/v1/jobs/{job_id}/log/events?offset={offset}"
        async with self._stream(path, {"Accept": "text/event-stream"}) as response:
            async for kind, number, data in self._events(response):
                if kind == "log":
                    part = _decoded(data)
                    if part is None or number != offset + len(part):
                        raise self._invalid_response("its log has a gap")
                    offset = number
                    yield LogPart(part, offset)
                elif kind == "end":
                    yield LogPart(b"", offset, end=True)
                    return

    async def share(self, job_id: int, reader: str, until: int) -> None:
        """Let another address read the log and results of a job until `until` (epoch seconds).

        Raises:
            WrongAccountError: This account is not the customer of the job.
            EndpointError: The gateway is down or refuses.
        """
        account = self._signer()
        data = share_data(*self._grid, job_id, reader, until)
        signed = await signed_by(account, lambda: account.sign_typed_data(full_message=data))
        body = {"reader": reader, "until": until, "signature": "0x" + bytes(signed.signature).hex()}
        await self._request("PUT", f"/v1/jobs/{job_id}/shares", json=body)

    # -- requests

    async def _request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **request: Any
    ) -> ServiceResponse:
        """Send a request with authorisation; retried with backoff after a rate limit."""
        pause, renewed = 0.5, False
        for retries_left in range(_TRIES - 1, -1, -1):
            all_headers = {**(headers or {}), **await self._authorisation()}
            response = await self._send(method, path, headers=all_headers, **request)
            if response.is_success:
                return response
            if response.status == HTTPStatus.UNAUTHORIZED and not renewed:
                renewed, self._token = True, ""
                continue
            if not retries_left or response.status != HTTPStatus.TOO_MANY_REQUESTS:
                break
            await asyncio.sleep(min(5.0, _number(response.headers.get("retry-after"), pause)))
            pause *= 2
        raise self._error_of_response(response.status, response.content)

    @asynccontextmanager
    async def _stream(
        self, path: str, headers: Mapping[str, str]
    ) -> AsyncIterator[httpx2.Response]:
        for is_last_attempt in (False, True):
            all_headers = {**headers, **await self._authorisation()}
            try:
                async with self._client.stream(
                    "GET", path, headers=all_headers, timeout=_STREAM_TIMEOUT
                ) as response:
                    if response.is_success:
                        yield response
                        return
                    body = await response.aread()
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise self._unreachable(error) from None
            if is_last_attempt or response.status_code != HTTPStatus.UNAUTHORIZED:
                raise self._error_of_response(response.status_code, body)
            self._token = ""

    async def _chunks(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        try:
            async for chunk in response.aiter_bytes():
                yield chunk
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from None

    async def _events(self, response: httpx2.Response) -> AsyncIterator[tuple[str, int, str]]:
        """Yield kind, ID and data of each server-sent event."""
        kind, number, data = "", -1, ""
        async for line in self._lines(response):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line:
                if kind:
                    yield kind, number, data
                kind, number, data = "", -1, ""
            elif name == "event":
                kind = value
            elif name == "id" and value.isascii() and value.isdigit() and len(value) < 20:
                number = int(value)
            elif name == "data":
                data = value

    async def _lines(self, response: httpx2.Response) -> AsyncIterator[str]:
        rest = b""
        async for chunk in self._chunks(response):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.removesuffix(b"\r").decode(errors="replace")
            if len(rest) > _MAX_EVENT:
                raise self._invalid_response("an event that is too long")

    async def _authorisation(self) -> dict[str, str]:
        if not self._token:
            async with self._signing:
                if not self._token:
                    self._token = await self._sign_in()
        return {"Authorization": f"Bearer {self._token}"}

    async def _sign_in(self) -> str:
        """Sign in and return a token. The message is composed here, never by the gateway."""
        account = self._signer()
        chain_id, contract = self._grid
        challenge = self._object(await self._post("/v1/sign-in/nonce", {}))
        jobs = jobs_resource(self.url)
        try:
            text = SignInMessage(
                domain=urlsplit(self.url).netloc,
                address=account.address,
                statement=_STATEMENT,
                uri=f"{self.url}/v1/sign-in",
                chain_id=chain_id,
                nonce=str(challenge["nonce"]),
                issued_at=str(challenge["issued_at"]),
                expiration_time=str(challenge["expiration_time"]),
                resources=(
                    contract_resource(chain_id, contract),
                    jobs if self._job_id is None else f"{jobs}/{self._job_id}",
                ),
            ).text()
            message = SignInMessage.parse(text)  # the gateway's values must not alter the message
        except (KeyError, GridError):
            raise self._invalid_response() from None
        if message.nonce != challenge["nonce"] or message.address != account.address:
            raise self._invalid_response()
        signature = "0x" + (await signed_by(account, lambda: message.sign(account))).hex()
        response = await self._post("/v1/sign-in", {"message": text, "signature": signature})
        token = self._object(response).get("token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise self._invalid_response()
        return token

    async def _post(self, path: str, body: Any) -> ServiceResponse:
        response = await self._send("POST", path, json=body)
        if not response.is_success:
            raise self._error_of_response(response.status, response.content)
        return response

    def _signer(self) -> Signer:
        if self._account is None:
            raise NotAuthorisedError(
                f"The gateway at {self.display_url} requires a sign-in, and no wallet is configured",
                hint="Give the wallet of the job with --keystore.",
            )
        return self._account

    def _file_of(self, name: str, response: ServiceResponse) -> RemoteFile:
        size = response.headers.get("upload-offset", "")
        if not (size.isascii() and size.isdigit() and len(size) < 20):
            raise self._invalid_response()
        return RemoteFile(name, int(size), response.headers.get("upload-complete") == "?1")

    def _object(self, response: ServiceResponse) -> dict[str, Any]:
        body = response.body()
        if body is None:
            raise self._invalid_response()
        return body

    def _objects(self, response: ServiceResponse, name: str) -> list[dict[str, Any]]:
        """Return the field of a response that holds a list of objects."""
        items = self._object(response).get(name)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise self._invalid_response()
        return items

    def _error_of_response(self, status: int, content: bytes) -> GridError:
        body = json_object(content) or {}
        detail, code, hint = body.get("detail"), body.get("code"), body.get("hint")
        if not isinstance(detail, str):
            return (
                self._error_of_status(status)
                if not content
                else self._invalid_response(f"status {status}")
            )
        message = f"The gateway at {self.display_url} refused: {plain(detail)[:500]}"
        advice = plain(hint)[:300] if isinstance(hint, str) else ""
        if status == HTTPStatus.NOT_FOUND and code == "not-delivered":
            return NotDeliveredError(message, hint=advice, received=_count(body, "received") or 0)
        if status == HTTPStatus.NOT_FOUND and isinstance(code, str):
            return NotFoundError(message, hint=advice)
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            return WrongAccountError(message, hint=advice)
        return GatewayRefusedError(
            message,
            hint=advice or self.advice,
            code=code[:40] if isinstance(code, str) else "",
            offset=_count(body, "offset"),
        )

    def _error_of_status(self, status: int) -> GridError:
        """Return the error of a refusal without a body, as for HEAD."""
        if status == HTTPStatus.NOT_FOUND:
            return NotFoundError(f"The gateway at {self.display_url} does not have it")
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            return WrongAccountError(
                f"The gateway at {self.display_url} does not let this account read it",
                hint="Only its customer can read a job's output, and accounts to which it is shared with `deepsquare job share`.",
            )
        return GatewayRefusedError(
            f"The gateway at {self.display_url} responded with status {status}"
        )


class GatewayDefinitionStore:
    """Definitions in one or several gateways; see `store.definitions.DefinitionStore`.

    A definition is uploaded to all of them; those that are down are skipped if at least one
    accepts it. It is read from the first gateway that has the right bytes.
    """

    def __init__(self, gateways: Sequence[GatewayClient]) -> None:
        self.gateways = tuple(gateways)
        self._put: set[bytes] = set()

    async def put(self, data: bytes) -> bytes:
        """Upload to every gateway.

        Raises:
            JobFileError: The definition is too large.
            GridError: No gateway accepts it.
        """
        key = hashlib.sha256(data).digest()
        if key in self._put:
            return key
        results = await asyncio.gather(
            *(gateway.put_definition(data) for gateway in self.gateways), return_exceptions=True
        )
        failures = [result for result in results if isinstance(result, BaseException)]
        if len(failures) == len(results):
            raise failures[0]
        for result in failures:
            if not isinstance(result, GridError):
                raise result
        self._put.add(key)
        return key

    async def get(self, digest: bytes, job_id: int | None = None) -> bytes:
        """Return a job's definition from the first gateway that has it; errors as the interface."""
        if job_id is None:
            raise NotFoundError("A gateway returns a definition by job, not by digest alone")
        missing: GridError | None = None
        failure: GridError | None = None
        for gateway in self.gateways:
            try:
                return await gateway.definition(job_id, digest)
            except (NotFoundError, DefinitionMismatch) as error:
                missing = missing or error
            except GridError as error:
                failure = failure or error
        # A gateway that does not answer may have it: it is missing only if all of them say so.
        raise failure or missing or NotFoundError("No gateway is configured")


@asynccontextmanager
async def open_gateways(
    urls: Sequence[str],
    account: Signer | None,
    deployment: Deployment,
    transport_settings: Transport | None = None,
) -> AsyncIterator[tuple[GatewayClient, ...]]:
    """Open clients of gateways for an account; the sign-in is for all its jobs."""
    async with AsyncExitStack() as stack:
        yield tuple(
            [
                await stack.enter_async_context(
                    GatewayClient(
                        url,
                        account,
                        chain_id=deployment.chain_id,
                        contract=deployment.scheduler,
                        transport_settings=transport_settings,
                    )
                )
                for url in urls
            ]
        )


def _file(job_id: int, name: str) -> str:
    return f"/v1/jobs/{job_id}/files/{quote(name)}"


def _count(body: Mapping[str, Any], name: str) -> int | None:
    """Return a number of bytes of a response; None if it is missing or invalid."""
    value = body.get(name)
    return value if type(value) is int and value >= 0 else None


def _decoded(data: str) -> bytes | None:
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        return None


def _number(text: str | None, default: float) -> float:
    try:
        return max(0.05, float(text or default))
    except ValueError:
        return default
