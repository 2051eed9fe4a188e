"""One connection to a chain, through whichever of its endpoints is good."""

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
from deepsquare_chain.settings import safe_url, split_urls

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
    """Connect to a chain and look whether it is the right one.

    Args:
        url: HTTP address of a JSON-RPC endpoint, or several in the order of preference, as a
            sequence or parted by commas.
        chain_id: Chain that each must serve, if known.
        contracts: Addresses that must hold code.
        landmark: Number of a block by which the chain is known again, such as the deployment's.
        attempts: How often a read is tried, each time at every endpoint that may answer.
        timeout: Seconds for one request.
        max_lag_blocks: Blocks that an endpoint may be behind the best before it is left alone.
        metrics: Where the figures of each endpoint go.
        transport: Certificates and headers for remote endpoints.

    Raises:
        UsageError: The environment names a proxy that can't be used.
        WrongEndpointError: One serves another chain or is no HTTP address, or a contract is not
            there.
        EndpointError: All are down, or no nodes.
    """
    urls = split_urls(url) if isinstance(url, str) else tuple(url)
    for each in urls:
        if not each.startswith(("http://", "https://")):
            raise WrongEndpointError(
                f"The endpoint {safe_url(each)} is no http:// or https:// address"
            )
    pool = Pool(
        [
            CheckedProvider(each, timeout=timeout, transport=transport or Transport())
            for each in urls
        ],
        chain_id=chain_id,
        landmark=landmark,
        attempts=attempts,
        max_lag_blocks=max_lag_blocks,
        metrics=metrics,
    )
    w3: AsyncWeb3[Any] = AsyncWeb3(
        pool,
        # No ENS look-ups, no gas guesses: only readable answers, and chains with long extra data.
        middleware=[
            (AttributeDictMiddleware, "attrdict"),
            (ExtraDataToPOAMiddleware, "extradata"),
        ],
    )
    try:
        await pool.open()
        await _check(w3, ", ".join(each.place for each in pool.providers), contracts)
    except BaseException:
        await close(w3)
        raise
    return w3


async def close(w3: AsyncWeb3[Any]) -> None:
    """Close the connection; harmless when it is closed."""
    await w3.provider.disconnect()


@asynccontextmanager
async def connected(url: str | Sequence[str], **options: Any) -> AsyncIterator[AsyncWeb3[Any]]:
    """`connect` for the time of a with block."""
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
        raise EndpointError(f"The endpoint {place} is no usable node: {str(error)[:200]}") from None


async def chain_time(w3: AsyncWeb3[Any]) -> int:
    """Time of the latest block, in seconds: the only clock that billing knows."""
    return int((await w3.eth.get_block("latest"))["timestamp"])
