"""Health pages over HTTP, on loopback."""

from __future__ import annotations

import asyncio
import platform

import httpx2
import pytest

from deepsquare_chain import __version__
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.errors import UsageError
from deepsquare_chain.observability.metrics import Health, Metrics
from deepsquare_chain.observability.serving import LoopbackServer, health_app, health_server


async def test_pages_show_health_and_metrics() -> None:
    health = Health(live=True, ready=False, details={"cycles": 3})
    metrics = Metrics("test")
    metrics.gauge("running", "Running jobs.").set(2)
    server = health_server(health_app(lambda: health, metrics))
    await server.start()
    url = server.url
    try:
        async with httpx2.AsyncClient(base_url=url) as client:
            assert (await client.get("/live")).status_code == 200
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/status")).json() == {
                "live": True,
                "ready": False,
                "cycles": 3,
            }
            assert 'deepsquare_running{service="test"} 2.0' in (await client.get("/metrics")).text
            assert (await client.post("/live")).status_code == 405
            assert (await client.get("/other")).status_code == 404
            response = await client.get("/status", headers={"host": "evil.example"})
            assert response.status_code == 400
            health = Health(live=False, ready=True)
            assert (await client.get("/live")).status_code == 503
            assert (await client.get("/ready")).status_code == 200
    finally:
        await server.stop()
    await server.stop()
    async with httpx2.AsyncClient() as client:
        with pytest.raises(httpx2.ConnectError):
            await client.get(url + "/live")


async def test_port_in_use_and_unknown_host_names_are_refused() -> None:
    app = health_app(lambda: Health(live=True, ready=True))
    server = health_server(app)
    await server.start()
    url = server.url
    port = int(url.rsplit(":", 1)[1])
    with pytest.raises(UsageError, match=f"Port {port}"):
        await health_server(app, port=port).start()
    async with httpx2.AsyncClient(base_url=url) as client:
        assert (await client.get("/metrics")).status_code == 404
    await server.stop()
    for host in ("0.0.0.0", "192.0.2.1", "::"):  # noqa: S104
        with pytest.raises(UsageError, match="loopback"):
            health_server(app, host=host)


async def test_daemon_serves_its_health_and_closes_it() -> None:
    async def cycle() -> None:
        pass

    daemon = Daemon("test", cycle, interval=0.05)
    server = health_server(health_app(daemon.health, daemon.metrics))
    await server.start()
    url = server.url
    daemon.on_close("health", server.stop)
    task = asyncio.create_task(daemon.run())
    await daemon.ready.wait()
    async with httpx2.AsyncClient(base_url=url) as client:
        assert (await client.get("/ready")).status_code == 200
        assert "deepsquare_cycles_total" in (await client.get("/metrics")).text
        # A connection that is kept open does not hold up the end.
        daemon.stop.set()
        async with asyncio.timeout(5):
            await task


async def test_a_server_counts_its_requests() -> None:
    metrics = Metrics("explorer")
    app = health_app(lambda: Health(live=True, ready=False, details={}), metrics)
    server = LoopbackServer(app, metrics=metrics)
    await server.start()
    try:
        async with httpx2.AsyncClient(base_url=server.url) as client:
            for path in ("/live", "/ready", "/nothing", "/status"):
                await client.get(path)
            text = (await client.get("/metrics")).text
    finally:
        await server.stop()
    counts = {
        code: metrics.value("http_requests_total", code=code) for code in ("2xx", "4xx", "5xx")
    }
    assert counts == {"2xx": 3, "4xx": 1, "5xx": 1}
    assert metrics.value("http_response_seconds_count") == 5
    assert f'deepsquare_build_info{{python="{platform.python_version()}",' in text
    assert f'version="{__version__}"}} 1.0' in text
