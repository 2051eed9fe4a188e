"""Connects to a chain through one or several endpoints, with failover."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from eth_utils.address import to_checksum_address
from web3 import AsyncWeb3
from web3.exceptions import Web3Exception
from web3.middleware import AttributeDictMiddleware, ExtraDataToPOAMiddleware

from deepsquare_chain.chain.rpc.endpoint import (
    REQUEST_TIMEOUT,
    CheckedProvider,
    TransientEndpointError,
    WrongEndpointError,
)
from deepsquare_chain.chain.rpc.pool import MAX_LAG_BLOCKS, Pool
from deepsquare_chain.chain.rpc.transport import Transport
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.settings import is_url, safe_url, split_urls

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics

__all__ = [
    "TransientEndpointError",
    "WrongEndpointError",
    "chain_time",
    "close",
    "connect",
    "connected",
]


async def connect(
    url: str | Sequence[str],
    *,
    chain_id: int | None = None,
    contracts: Iterable[str] = (),
    landmark: int | None = None,
    attempts: int = 4,
    timeout: float = REQUEST_TIMEOUT,
    max_lag_blocks: int = MAX_LAG_BLOCKS,
    metrics: Metrics | None = None,
    transport: Transport | None = None,
) -> AsyncWeb3[Any]:
    """Connect to a chain and verify that it is the right one.

    Args:
        url: URL of a JSON-RPC endpoint, or several in order of preference, as a sequence or
            separated by commas.
        chain_id: Chain ID that each endpoint must serve, if known.
        contracts: Addresses that must hold code.
        landmark: Number of a block that identifies the chain, such as the deployment's.
        attempts: Number of attempts of a read; each tries all available endpoints.
        timeout: Seconds for one request.
        max_lag_blocks: Blocks that an endpoint may lag behind the best before it is excluded.
        metrics: Receives the metrics of each endpoint.
        transport: Certificates and headers for remote endpoints.

    Raises:
        UsageError: The environment names an invalid proxy.
        WrongEndpointError: An endpoint serves another chain or has no HTTP URL, or a contract is
            missing.
        EndpointError: All endpoints are down, or are not nodes.
    """
    urls = split_urls(url) if isinstance(url, str) else tuple(url)
    for endpoint in urls:
        if not is_url(endpoint, ("http", "https")):
            raise WrongEndpointError(
                f"The endpoint {safe_url(endpoint)} is not an http:// or https:// URL"
            )
    pool = Pool(
        [
            CheckedProvider(endpoint, timeout=timeout, transport=transport or Transport())
            for endpoint in urls
        ],
        chain_id=chain_id,
        landmark=landmark,
        attempts=attempts,
        max_lag_blocks=max_lag_blocks,
        metrics=metrics,
    )
    w3: AsyncWeb3[Any] = AsyncWeb3(
        pool,
        # No ENS lookups and no gas estimates: only attribute access to results, and support for
        # chains with long extra data.
        middleware=[
            (AttributeDictMiddleware, "attrdict"),
            (ExtraDataToPOAMiddleware, "extradata"),
        ],
    )
    try:
        await pool.open()
        await _check(w3, ", ".join(endpoint.place for endpoint in pool.providers), contracts)
    except BaseException:
        await close(w3)
        raise
    return w3


async def close(w3: AsyncWeb3[Any]) -> None:
    """Close the connection (idempotent)."""
    await w3.provider.disconnect()


@asynccontextmanager
async def connected(url: str | Sequence[str], **options: Any) -> AsyncIterator[AsyncWeb3[Any]]:
    """Connect for the duration of a with block; takes the options of `connect`."""
    w3 = await connect(url, **options)
    try:
        yield w3
    finally:
        await close(w3)


async def _check(w3: AsyncWeb3[Any], place: str, contracts: Iterable[str]) -> None:
    try:
        for address in contracts:
            if not await w3.eth.get_code(to_checksum_address(address)):
                raise WrongEndpointError(
                    f"There is no contract at {address} on the chain of {place}",
                    hint="A restarted local chain is empty: deploy again, or give the right "
                    "deployment record with --deployment.",
                )
    except (Web3Exception, ValueError) as error:
        raise EndpointError(
            f"The endpoint {place} is not a usable node: {str(error)[:200]}"
        ) from None


async def chain_time(w3: AsyncWeb3[Any]) -> int:
    """Return the time of the latest block in seconds; billing uses no other clock."""
    return int((await w3.eth.get_block("latest"))["timestamp"])
