"""Networks of steps in the sandbox: namespaces, WireGuard between jobs, virtual networks and tunnels.

The hub of WireGuard and the server of tunnels run on this machine, outside of the sandbox.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deepsquare_chain.executors.base import Executor, ExecutorContext, RunSpec, RunState
from deepsquare_chain.executors.local import create
from deepsquare_chain.executors.sandbox import SandboxOptions, bubblewrap_arguments
from deepsquare_chain.job import Offer
from deepsquare_chain.provider.offering import probe_abilities
from deepsquare_chain.workflow import ExecutionSite, parse_job_file, render_script
from deepsquare_chain.workflow.steps import NETWORK_LIBRARY
from tests.support.anvil import REQUIRE_REAL

#: Programs of this machine, as jobs find them.
PATH = "/usr/local/bin:/usr/bin:/bin"
PYTHON = "/usr/bin/python3"
SERVER = Path(__file__).parents[1] / "support" / "boreserver.py"
SITE = ExecutionSite(frozenset())
RESOURCES = "resources: {tasks: 2, cpusPerTask: 1, memPerCpu: 128}\n"
SECONDS = 60


@pytest.fixture(autouse=True)
def _programs() -> None:
    missing = [
        name
        for name in ("bwrap", "slirp4netns", "wg", "wireguard-go", "socat", "busybox", "ch-run")
        if shutil.which(name, path=PATH) is None
    ]
    if os.geteuid() and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        missing.append("/dev/net/tun")
    if not missing:
        return
    if os.environ.get(REQUIRE_REAL) == "1":
        pytest.fail(f"not installed: {', '.join(missing)}")
    pytest.skip(f"not installed: {', '.join(missing)}")


def executor(folder: Path, **options: object) -> Executor:
    context = ExecutorContext(
        folder, Offer(8, 8_192, 0), allow_root=True, options={"namespaces": True, **options}
    )
    return create(context)


async def run(
    executor: Executor, text: str, name: str = "job", site: ExecutionSite = SITE
) -> tuple[int, str]:
    """Exit code and output of a job."""
    definition = parse_job_file((RESOURCES + text).encode(), "job.yaml").definition
    handle = await executor.submit(
        RunSpec(
            key=name,
            script=render_script(definition, {"DEEPSQUARE_JOB_ID": "7"}, site),
            resources=definition.resources,
            walltime=SECONDS,
            env={},
        )
    )
    while (status := (await executor.poll([handle]))[handle]).state is not RunState.ENDED:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    assert status.exit is not None
    return status.exit.code, (await executor.output(handle)).decode()


async def test_abilities_are_those_of_the_sandbox(tmp_path: Path) -> None:
    allowed, forbidden = await asyncio.gather(
        probe_abilities(executor(tmp_path / "a")),
        probe_abilities(executor(tmp_path / "b", namespaces=False)),
    )
    names = {"netns.host", "netns.interfaces", "netns", "wireguard", "vnet", "bore", "charliecloud"}
    assert {name for name in names if allowed[name] == "yes"} == names, allowed
    assert not {name for name in names if forbidden[name] == "yes"}
    assert "option namespaces" in forbidden["netns.host"]


async def test_a_step_has_its_own_network_and_the_user_of_the_file(tmp_path: Path) -> None:
    code, output = await run(
        executor(tmp_path),
        """\
steps:
- run: {command: 'readlink /proc/self/ns/net; id -u'}
- run:
    network: pasta
    mapUid: 77
    dns: [192.0.2.1, 192.0.2.2]
    command: |
      readlink /proc/self/ns/net; id -u; grep -c nameserver /etc/resolv.conf; echo "$ANSWER"
    env: {ANSWER: "it's 42"}
- run: {network: slirp4netns, command: 'id -u; ip link delete tap0 2>&1; exit 5'}
""",
    )
    first, user, own_address, mapped, servers, answer, same, refused = output.splitlines()
    assert first != own_address
    assert (mapped, servers, answer) == ("77", "2", "it's 42")
    assert same == user
    assert "Operation not permitted" in refused
    assert code == 5


def test_root_of_a_namespace_changes_nothing_of_the_machine(tmp_path: Path) -> None:
    for name in ("shown/state", "work", "temporary"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "shown/state/key").write_text("secret")
    (tmp_path / "script").write_text(
        f"""\
try() {{ if "$@" 2>/dev/null; then echo "it can: $*"; fi; }}
cd {tmp_path}/shown; ls; mkdir /tmp/other
try umount state
try mount --bind . /tmp/other
try mount --rbind . /tmp/other; cat state/key /tmp/other/state/key 2>/dev/null
try mount -o remount,rw,bind /usr
try mount -t proc proc /tmp/other
try umount /proc/sys
try mknod /tmp/disk b 8 0
for file in kernel/core_pattern net/core/netdev_max_backlog; do try cp /dev/null /proc/sys/$file; done
echo end
"""
    )
    arguments = bubblewrap_arguments(
        SandboxOptions(namespaces=True, network=True, readable=(tmp_path / "shown",)),
        work=str(tmp_path / "work"),
        temporary=str(tmp_path / "temporary"),
        script=str(tmp_path / "script"),
        private=(tmp_path / "shown/state",),
        is_root=os.geteuid() == 0,
    )
    enter = ["unshare", "--user", "--map-root-user", "--mount", "bash", "/run/job/script"]
    result = subprocess.run(
        ["bwrap", *arguments, *enter], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [
        "state",
        "it can: mount --rbind . /tmp/other",
        "end",
    ]


@contextmanager
def wireguard_hub(folder: Path) -> Iterator[tuple[int, str, list[str], str]]:
    """A WireGuard server: its port, public key, private keys of its two clients, and shared key."""

    def wg(command: str, text: str = "") -> str:
        result = subprocess.run(
            ["wg", command], input=text, capture_output=True, text=True, check=True
        )
        return result.stdout.strip()

    server, *clients = (wg("genkey") for _ in range(3))
    shared = wg("genpsk")
    config = ["[Interface]", f"PrivateKey = {server}", "ListenPort = 51820"]
    for number, key in enumerate(clients, 2):
        config += ["[Peer]", f"PublicKey = {wg('pubkey', key)}", f"AllowedIPs = 10.9.0.{number}"]
        config += [f"PresharedKey = {shared}"] if number == 2 else []
    files = {
        "hub.wireguard": "\n".join(config),
        "hub.addresses": "10.9.0.1/24",
        "hub.routes": "",
        "resolv.conf": "",
        "hub": "127.0.0.1",
    }
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text + "\n" if text else "")
    script = NETWORK_LIBRARY + "\nnetwork_program && exec bash $DEEPSQUARE_NETWORK/program main "
    script += '"$DEEPSQUARE_NETWORK" "" "" sleep infinity'
    hub = subprocess.Popen(
        ["bash", "-c", script], env={"PATH": PATH, "DEEPSQUARE_NETWORK": str(folder)}
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not (folder / "port").exists():
            assert hub.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield int((folder / "port").read_text()), wg("pubkey", server), clients, shared
    finally:
        hub.kill()
        hub.wait()


async def test_two_jobs_reach_each_other_through_wireguard(tmp_path: Path) -> None:
    with wireguard_hub(tmp_path / "hub") as (port, public, keys, shared):
        peer = f"publicKey: '{public}', endpoint: '169.254.254.2:{port}', persistentKeepalive: 1"
        server = f"""\
steps:
- run:
    network: slirp4netns
    mapUid: 0
    customNetworkInterfaces:
    - wireguard:
        address: [10.9.0.2/32]
        privateKey: '{keys[0]}'
        peers: [{{{peer}, preSharedKey: '{shared}', allowedIPs: [10.9.0.0/24]}}]
    command: |
      echo "keys in sight: $(cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | grep -ca '[{keys[0][0]}]{keys[0][1:]}')"
      mkfifo answer; (echo 'through the hub' > answer) & busybox nc -l -p 8080 < answer
"""
        # Everything passes through the peer, but not the packets to the peer itself.
        client = f"""\
steps:
- run:
    network: pasta
    customNetworkInterfaces:
    - wireguard:
        address: [10.9.0.3/32]
        privateKey: '{keys[1]}'
        peers: [{{{peer}, allowedIPs: [0.0.0.0/0]}}]
    command: |
      until busybox nc -w 5 10.9.0.2 8080 2>/tmp/nc; do sleep 0.2; done
      ip route get 192.0.2.1
"""
        jobs = executor(tmp_path / "state", network=True)
        served, visited = await asyncio.gather(
            run(jobs, server, "server"), run(jobs, client, "client")
        )
    assert served == (0, "keys in sight: 0\n")
    assert visited[0] == 0
    answer, route = visited[1].splitlines()[:2]
    assert answer == "through the hub"
    assert "dev wg0" in route


async def test_containers_reach_each_other_in_a_virtual_network(tmp_path: Path) -> None:
    result = await run(
        executor(tmp_path),
        """\
virtualNetworks: [{name: inside, gatewayAddress: 10.7.0.1/24}]
steps:
- run:
    command: |
      mkdir -p image/{bin,dev,etc,home,mnt,proc,root,sys,tmp,var/tmp}
      cp "$(command -v busybox)" image/bin/
      for name in sh echo grep httpd ip sleep wget; do ln -s busybox image/bin/$name; done
      touch image/etc/{hosts,passwd,group,resolv.conf}
- launch:
    signalOnParentStepExit: 15
    steps:
    - run:
        network: slirp4netns
        mapUid: 0
        container: {image: /image}
        customNetworkInterfaces: [{vnet: {name: inside, address: 10.7.0.2/24}}]
        command: echo from a container > /deepsquare/page; exec httpd -f -p 8080 -h /deepsquare
- run:
    network: pasta
    container: {image: /image}
    customNetworkInterfaces: [{vnet: {name: inside, address: 10.7.0.3/24}}]
    dns: [192.0.2.1]
    command: |
      grep nameserver /etc/resolv.conf
      until wget -q -O - http://10.7.0.2:8080/page 2>/dev/null; do sleep 0.2; done
      wget -q -O - http://10.7.0.1:8080/page 2>&1
""",
        site=ExecutionSite(frozenset({"charliecloud", "netns.interfaces"})),
    )
    code, output = result
    assert output.splitlines()[:2] == ["nameserver 192.0.2.1", "from a container"]
    assert "10.7.0.1): Connection refused" in output  # the hub itself answers
    assert code == 1


@contextmanager
def bore_server(secret: Path) -> Iterator[subprocess.Popen[str]]:
    server = subprocess.Popen([PYTHON, str(SERVER), str(secret)], stdout=subprocess.PIPE, text=True)
    try:
        yield server
    finally:
        server.kill()
        server.wait()
        if server.stdout:
            server.stdout.close()


async def test_a_port_of_a_step_is_reached_through_a_tunnel(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("to'ken")
    with bore_server(tmp_path / "secret") as server:
        assert server.stdout is not None
        address = f"169.254.254.2:{server.stdout.readline().strip()}"
        job = asyncio.create_task(
            run(
                executor(tmp_path / "state", network=True),
                f"""\
steps:
- run:
    network: slirp4netns
    customNetworkInterfaces:
    - bore: {{boreAddress: '{address}', targetPort: 8080, secret: "to'ken"}}
    - bore: {{boreAddress: '{address}', targetPort: 8081, secret: 'another'}}
    command: |
      echo "secrets in sight: $(cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | grep -caE "to['][k]en|anothe[r]")"
      mkdir -p site/cgi-bin; printf '#!/bin/sh\\necho; echo through the tunnel; touch /tmp/visited' > site/cgi-bin/page
      chmod +x site/cgi-bin/page
      busybox httpd -p 8080 -h site
      until [ -e /tmp/visited ]; do sleep 0.1; done
      sleep 1
""",
            )
        )
        name, port = (await asyncio.to_thread(server.stdout.readline)).split()
        deadline = time.monotonic() + SECONDS
        page = ""
        while not page and time.monotonic() < deadline:
            try:
                page = await asyncio.to_thread(visit, f"http://127.0.0.1:{port}/cgi-bin/page")
            except OSError:
                await asyncio.sleep(0.1)
        code, output = await job
    assert (name, page) == ("fixed", "through the tunnel\n")
    assert code == 0
    assert "secrets in sight: 0" in output
    assert "URL: http://fixed.bore.example [31m" in output
    assert f"Tunnel: tcp://169.254.254.2:{port} leads to port 8080 of this step" in output
    assert f"Tunnel to {address}: the server rejected the secret" in output
    assert "to'ken" not in output


def visit(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310
        return str(response.read().decode())
