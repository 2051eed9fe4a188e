"""A gateway for a live grid on a free loopback port, served by this process or by another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from eth_account.signers.local import LocalAccount

from deepsquare_chain.gateway.app import run_gateway
from deepsquare_chain.gateway.service import GatewaySettings
from deepsquare_chain.store.gateway_client import GatewayClient
from tests.support.cli import Running
from tests.support.livegrid import LiveGrid


@asynccontextmanager
async def served(
    grid: LiveGrid, folder: Path, *, port: int = 0, **settings: Any
) -> AsyncIterator[str]:
    """Run a gateway and yield its URL; `settings` are those of `GatewaySettings`."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        run_gateway(
            grid.node.url,
            grid.deployment,
            GatewaySettings(state_dir=folder, confirmations=0, **settings),
            host="127.0.0.1",
            port=port,
            ready=ready.set_result,
            stop=stop,
        )
    )
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        yield await ready
    finally:
        stop.set()
        await task


def client(grid: LiveGrid, url: str, account: LocalAccount, **options: Any) -> GatewayClient:
    """Return a client of a gateway for an account."""
    return GatewayClient(
        url,
        account,
        chain_id=grid.deployment.chain_id,
        contract=grid.deployment.scheduler,
        **options,
    )


async def started(grid: LiveGrid, folder: Path, port: int) -> Running:
    """Start a gateway as a process of its own, which can be killed; return when it answers."""
    grid.deployment.save(folder / "deployment.json")
    command = Running(
        [
            *("gateway", "serve", "--port", str(port), "--endpoint", grid.node.url),
            *("--chain-id", str(grid.deployment.chain_id), "--deployment", "deployment.json"),
            *("--state-dir", "state", "--confirmations", "0"),
        ],
        folder,
        "gateway",
    )
    async with asyncio.timeout(120):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                assert command.process.poll() is None, command.log.read_text()
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return command
