"""Delivery of notifications: HTTP POST to a webhook, SMTP to a mail server, notify-send.

An attempt is delivered, refused temporarily or permanently, or has an unknown outcome. Only
temporarily refused notifications are retried.
"""

from __future__ import annotations

import asyncio
import ipaddress
import smtplib
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import EmailMessage
from enum import Enum, auto
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import httpx2
from pydantic_core import from_json

from deepsquare_chain.chain.rpc.transport import Transport, http_client
from deepsquare_chain.errors import GridError
from deepsquare_chain.notification import DESKTOP, is_email
from deepsquare_chain.notify.messages import EVENT_ID, SIGNATURE, desktop_command, email, signature
from deepsquare_chain.store.notifications import Delivery

#: Statuses of a proxy that did not get the recipient's answer, which may have been reached.
_FROM_A_PROXY: Final = (httpx2.codes.BAD_GATEWAY, httpx2.codes.GATEWAY_TIMEOUT)
_TIMEOUT: Final = 15.0
#: Threads of their own, so that slow name servers do not delay the other work of a gateway.
_RESOLVER: Final = ThreadPoolExecutor(4, thread_name_prefix="webhook-address")
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


class DeliveryOutcome(Enum):
    """Outcome of a delivery attempt."""

    ARRIVED = auto()
    REFUSED = auto()  # not accepted; may be retried
    REFUSED_FOR_GOOD = auto()
    UNKNOWN = auto()  # may have been delivered; never retried


class DeliveryResult(NamedTuple):
    """The verdict of an attempt, and the response or error."""

    verdict: DeliveryOutcome
    note: str = ""


@dataclass(frozen=True, slots=True)
class MailServer:
    """The SMTP server that accepts outgoing e-mail."""

    url: str  # `smtp://[USER@]HOST[:PORT]` with STARTTLS if the server offers it, or `smtps://...`
    sender: str  # address in the From header
    #: Password of USER; sent only through TLS or over loopback.
    password: str = field(default="", repr=False)

    @property
    def host(self) -> str:
        """Host name of the server, for messages."""
        return urlsplit(self.url).hostname or ""


class Deliverer:
    """Sends notifications.

    Args:
        secret: Key that signs webhooks; they are unsigned if it is empty.
        mail: The mail server; None if e-mail is not configured.
        public_only: Refuse webhooks at addresses that are not public, such as those of the local
            network: for recipients that others chose.
        timeout: Timeout of an attempt in seconds.
    """

    def __init__(
        self,
        transport_settings: Transport | None = None,
        *,
        secret: bytes = b"",
        mail: MailServer | None = None,
        public_only: bool = False,
        timeout: float = _TIMEOUT,
    ) -> None:
        self._public_only = public_only
        self._timeout = timeout
        self._transport_settings = transport_settings or Transport()
        self._secret = secret
        self._mail = mail

    def secret_of(self, _delivery: Delivery) -> bytes:
        """Return the key that signs a webhook; empty for none."""
        return self._secret

    async def send(self, delivery: Delivery) -> DeliveryResult:
        """Attempt one delivery; failures of the network or the recipient are returned, not raised."""
        if delivery.target == DESKTOP:
            return await _show(delivery)
        if is_email(delivery.target):
            return await asyncio.to_thread(self._send_mail, delivery)
        return await self._post(delivery)

    async def _post(self, delivery: Delivery) -> DeliveryResult:
        body = delivery.message.encode()
        headers = {"Content-Type": "application/json", EVENT_ID: delivery.event_id}
        if secret := self.secret_of(delivery):
            headers[SIGNATURE] = signature(secret, body, int(time.time()))
        try:
            url, extensions = await self._destination(delivery.target, headers)
            async with http_client(
                str(url), self._transport_settings, timeout=self._timeout
            ) as client:
                response = await client.post(
                    url, content=body, headers=headers, extensions=extensions
                )
        except _NotPublicError:
            return DeliveryResult(DeliveryOutcome.REFUSED_FOR_GOOD, "its address is not public")
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.InvalidURL, GridError) as error:
            return DeliveryResult(DeliveryOutcome.REFUSED, f"no connection: {type(error).__name__}")
        except httpx2.HTTPError as error:
            return DeliveryResult(DeliveryOutcome.UNKNOWN, f"no response: {type(error).__name__}")
        return DeliveryResult(_outcome(response), f"HTTP status {response.status_code}")

    async def _destination(
        self, target: str, headers: dict[str, str]
    ) -> tuple[httpx2.URL, dict[str, str]]:
        """Return the URL and options of a request; with `public_only` its host is an address.

        The connection goes to the address that was checked: a name may resolve to another one next.
        """
        url = httpx2.URL(target)
        if not self._public_only:
            return url, {}
        address = await _public_address(url)
        headers["Host"] = url.netloc.decode()
        return url.copy_with(host=address), {"sni_hostname": url.host}

    def _send_mail(self, delivery: Delivery) -> DeliveryResult:
        if self._mail is None:
            return DeliveryResult(
                DeliveryOutcome.REFUSED, "no mail server is configured: setting smtp"
            )
        message = email(from_json(delivery.message), self._mail.sender, delivery.target)
        try:
            server = _connect(self._mail, self._transport_settings)
        except smtplib.SMTPException as error:
            return DeliveryResult(DeliveryOutcome.REFUSED, f"{self._mail.host}: {_reason(error)}")
        except (OSError, ValueError) as error:
            return DeliveryResult(DeliveryOutcome.REFUSED, f"no connection: {type(error).__name__}")
        try:
            return _submit(server, message)
        finally:
            with suppress(smtplib.SMTPException, OSError):
                server.quit()


class _NotPublicError(Exception):
    """A webhook is at an address that is not public."""


async def _public_address(url: httpx2.URL) -> str:
    """Resolve the host of a URL.

    Raises:
        ConnectError: It has no address.
        _NotPublicError: One of its addresses is not public.
    """
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        infos = await asyncio.wait_for(
            asyncio.get_running_loop().run_in_executor(
                _RESOLVER, partial(socket.getaddrinfo, url.host, port, type=socket.SOCK_STREAM)
            ),
            _TIMEOUT,
        )
    except (OSError, UnicodeError, TimeoutError) as error:
        raise httpx2.ConnectError(str(error)) from None
    addresses = [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in infos]
    for address in addresses:
        unmapped = getattr(address, "ipv4_mapped", None) or address
        if not unmapped.is_global or unmapped.is_multicast:
            raise _NotPublicError
    return str(addresses[0])


async def _show(delivery: Delivery) -> DeliveryResult:
    """Show a notification on the desktop; without a shell, because names are chosen by users."""
    arguments = desktop_command(from_json(delivery.message))
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        note = f"{arguments[0]} can't be run: {error.strerror}"
        return DeliveryResult(DeliveryOutcome.REFUSED_FOR_GOOD, note)
    try:
        code = await asyncio.wait_for(process.wait(), _TIMEOUT)
    except TimeoutError:
        return DeliveryResult(DeliveryOutcome.UNKNOWN, f"{arguments[0]} does not end")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code:
        return DeliveryResult(
            DeliveryOutcome.REFUSED, f"{arguments[0]} ended with exit code {code}"
        )
    return DeliveryResult(DeliveryOutcome.ARRIVED)


def _outcome(response: httpx2.Response) -> DeliveryOutcome:
    if response.is_success:
        return DeliveryOutcome.ARRIVED
    if response.status_code == httpx2.codes.GONE:
        return DeliveryOutcome.REFUSED_FOR_GOOD
    if response.status_code in _FROM_A_PROXY:
        return DeliveryOutcome.UNKNOWN
    return DeliveryOutcome.REFUSED


def _submit(server: smtplib.SMTP, message: EmailMessage) -> DeliveryResult:
    """Send an e-mail; UNKNOWN if the connection is lost, since the server may have accepted it."""
    try:
        server.send_message(message)
    except smtplib.SMTPRecipientsRefused as error:
        return _refused(*next(iter(error.recipients.values())))
    except smtplib.SMTPResponseException as error:
        return _refused(error.smtp_code, error.smtp_error)
    except smtplib.SMTPNotSupportedError as error:
        return DeliveryResult(DeliveryOutcome.REFUSED_FOR_GOOD, str(error))
    except (smtplib.SMTPException, OSError) as error:
        return DeliveryResult(DeliveryOutcome.UNKNOWN, f"no response: {type(error).__name__}")
    return DeliveryResult(DeliveryOutcome.ARRIVED)


def _connect(mail: MailServer, transport_settings: Transport) -> smtplib.SMTP:
    """Connect to a mail server, encrypted if offered; a password requires encryption or loopback."""
    parts = urlsplit(mail.url)
    host = parts.hostname or ""
    context = transport_settings.context() or ssl.create_default_context()
    server: smtplib.SMTP
    if parts.scheme == "smtps":
        server = smtplib.SMTP_SSL(host, parts.port or 465, timeout=_TIMEOUT, context=context)
    else:
        server = smtplib.SMTP(host, parts.port or 587, timeout=_TIMEOUT)
    try:
        server.ehlo()
        encrypted = parts.scheme == "smtps"
        if not encrypted and server.has_extn("starttls"):
            server.starttls(context=context)
            server.ehlo()
            encrypted = True
        if parts.username:
            _check_privacy(host, encrypted=encrypted)
            server.login(unquote(parts.username), mail.password)
    except BaseException:
        server.close()
        raise
    return server


def _check_privacy(host: str, *, encrypted: bool) -> None:
    if not encrypted and host not in _LOOPBACK:
        raise smtplib.SMTPNotSupportedError(
            "it does not offer STARTTLS, and a password is never sent unencrypted"
        )


def _refused(code: int, text: Any) -> DeliveryResult:
    """Convert an SMTP error reply; 4xx replies may be retried (RFC 5321, section 4.2.1)."""
    verdict = DeliveryOutcome.REFUSED if 400 <= code < 500 else DeliveryOutcome.REFUSED_FOR_GOOD
    return DeliveryResult(verdict, f"{code} {_text(text)}"[:200])


def _reason(error: smtplib.SMTPException) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{error.smtp_code} {_text(error.smtp_error)}"[:200]
    return str(error)[:200] or type(error).__name__


def _text(reply: Any) -> str:
    return reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)
