"""Settings of remote connections: proxy, certificates, headers, and messages for TLS failures.

Proxies are read from the environment, as by curl: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY,
in upper or lower case. Loopback addresses are never reached through a proxy.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
import stat
import tomllib
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx2

from deepsquare_chain.errors import NotFoundError, UsageError
from deepsquare_chain.observability.redaction import hide_secret
from deepsquare_chain.settings import MAX_FILE_BYTES, safe_url

_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_PROXY_SCHEMES: Final = ("http", "https")
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
_VALUE: Final = re.compile(r"[\x20-\x7e]{0,8000}")
#: Headers that belong to the connection or the body, and can't be configured.
_RESERVED: Final = frozenset(
    {"connection", "content-length", "content-type", "host", "te", "transfer-encoding", "upgrade"}
)


@dataclass(frozen=True, slots=True)
class Transport:
    """Settings to reach remote addresses, in addition to the environment's proxies."""

    #: Certificates (PEM) of authorities to trust in addition to the system's.
    ca_file: Path | None = None
    #: Headers by `host` or `host:port`; they hold keys and are never logged or printed.
    headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, ca_file: Path | None, headers_file: Path | None) -> Transport:
        """Read the files named in the settings.

        Raises:
            NotFoundError: A file does not exist.
            UsageError: A file can't be read or is invalid, or a file of headers is readable by
                other users.
        """
        transport = cls(ca_file, {} if headers_file is None else _read_headers(headers_file))
        transport.context()
        return transport

    def context(self) -> ssl.SSLContext | None:
        """Return the SSL context for TLS connections; None without additional certificates.

        Raises:
            NotFoundError: The file of certificates does not exist.
            UsageError: It holds no certificates.
        """
        if self.ca_file is None:
            return None
        context = ssl.create_default_context()
        try:
            context.load_verify_locations(self.ca_file)
        except FileNotFoundError:
            raise NotFoundError(
                f"There is no certificate file {self.ca_file}", hint="Correct ca_file."
            ) from None
        except (OSError, ValueError) as error:  # OpenSSL raises an OSError for an invalid file
            raise UsageError(
                f"{self.ca_file} does not contain certificates: {_ssl_reason(error)}",
                hint="ca_file is a certificate file in PEM format (-----BEGIN CERTIFICATE-----).",
            ) from None
        return context

    def headers_for(self, url: str) -> dict[str, str]:
        """Return the headers configured for the host of a URL; none for other hosts."""
        host, port = _host_and_port(url)
        return {**self.headers.get(host, {}), **self.headers.get(f"{host}:{port}", {})}


def proxy_for(url: str) -> str | None:
    """Return the proxy for a URL from the environment, or None.

    Raises:
        UsageError: The environment names an invalid proxy.
    """
    host, port = _host_and_port(url)
    scheme = "https" if urlsplit(url).scheme in {"https", "wss"} else "http"
    proxies = urllib.request.getproxies_environment()
    value = proxies.get(scheme) or proxies.get("all")
    if not value or _is_loopback(host) or _is_proxy_exempt(host, port, proxies.get("no", "")):
        return None
    proxy = value if "://" in value else f"http://{value}"
    try:
        parts = urlsplit(proxy)
        usable = parts.scheme in _PROXY_SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(
            f"The proxy {safe_url(proxy)} of the environment is not valid",
            hint=f"{scheme.upper()}_PROXY must be a URL such as http://proxy.example:3128; "
            "NO_PROXY lists hosts to reach without it.",
        )
    return proxy


def http_client(
    url: str,
    transport_settings: Transport | None,
    *,
    timeout: float | httpx2.Timeout,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> httpx2.AsyncClient:
    """Return an HTTP client for a service of the grid; `transport` replaces the network in tests.

    Raises:
        UsageError: The environment names an invalid proxy.
    """
    transport_settings = transport_settings or Transport()
    return httpx2.AsyncClient(
        base_url=url,
        timeout=timeout,
        trust_env=False,
        proxy=proxy_for(url),
        verify=transport_settings.context() or _system_context(),
        headers=transport_settings.headers_for(url),
        transport=transport,
    )


@cache
def _system_context() -> ssl.SSLContext:
    # One for all clients: each would read all certificates of the system, which takes 20 ms.
    return httpx2.create_ssl_context(trust_env=False)


def failure_reason(error: Exception) -> str:
    """Describe why a service could not be reached."""
    if isinstance(error, httpx2.ConnectError):
        return tls_problem(error) or "no connection"
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time"
    return type(error).__name__


def tls_problem(error: BaseException) -> str:
    """Describe the failure of a TLS connection; empty for any other error."""
    for cause in _causes(error):
        # Libraries raise errors of these types without OpenSSL's message.
        message, reason = getattr(cause, "verify_message", ""), getattr(cause, "reason", "")
        if isinstance(cause, ssl.SSLCertVerificationError) and message:
            return f"its certificate was not accepted: {message.rstrip('.')}"
        if isinstance(cause, ssl.SSLError) and reason:
            reason = reason.replace("_", " ").lower()
            if reason in {"wrong version number", "http request", "record layer failure"}:
                return "it does not use TLS: is it an http:// URL?"
            return f"no TLS connection: {reason}"
    return ""


#: Hint for a certificate that was not accepted.
CERTIFICATE_HINT: Final = (
    "Give the authority's certificate with --ca-file (or ca_file in a settings file), and check "
    "this machine's clock."
)


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, including those that libraries store in attributes."""
    causes: list[BaseException] = []
    queue: list[Any] = [error]
    while queue and len(causes) < 20:
        candidate = queue.pop(0)
        if isinstance(candidate, BaseException) and candidate not in causes:
            causes.append(candidate)
            queue += [getattr(candidate, name, None) for name in ("certificate_error", "os_error")]
            queue += [candidate.__cause__, candidate.__context__]
    return causes


def _host_and_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme, 0)


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _is_proxy_exempt(host: str, port: int, exceptions: str) -> bool:
    """Return whether NO_PROXY matches a host: by name, suffix, network or port, or with *."""
    for pattern in re.split(r"[,\s]+", exceptions.strip().lower()):
        if pattern == "*":
            return True
        with_port = pattern.count(":") == 1 or "]:" in pattern
        name, _, pattern_port = pattern.rpartition(":") if with_port else (pattern, "", "")
        if pattern_port and pattern_port != str(port):
            continue
        name = name.strip("[]").removeprefix("*").strip(".")
        if name and (host == name or host.endswith(f".{name}") or _is_in(host, name)):
            return True
    return False


def _is_in(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _read_headers(path: Path) -> dict[str, dict[str, str]]:
    """Read headers by host from a TOML file with one table per host."""
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"There is no headers file {path}", hint="Correct it.") from None
    except OSError as error:
        raise UsageError(f"The headers file {path} can't be read: {error.strerror}") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        raise UsageError(
            f"The headers file {path} is readable by other users", hint=f"chmod 600 {path}"
        )
    try:
        body = tomllib.loads(raw.decode("utf-8-sig"))
        return {str(host).lower(): _checked(values) for host, values in body.items()}
    except (TypeError, ValueError, RecursionError):  # the original message may quote a key
        raise UsageError(
            f"{path} is not a headers file",
            hint='Write a table for each host, such as ["node.example"], and below it lines such '
            'as Authorization = "Bearer ...".',
        ) from None


def _checked(values: Any) -> dict[str, str]:
    if not isinstance(values, dict):
        raise TypeError("no table")
    for name, value in values.items():
        if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
            raise ValueError("not a header name that can be configured")
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise ValueError("not a valid header value")
        hide_secret(value)
        hide_secret(value.rpartition(" ")[2])
    return dict(values)


def _ssl_reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no PEM").replace("_", " ").lower()
    return getattr(error, "strerror", None) or "no PEM"
