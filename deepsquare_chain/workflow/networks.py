"""Script lines for the networks of steps: name servers, interfaces, tunnels, virtual networks. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from deepsquare_chain.workflow.schema import (
    BoreSection,
    RunSection,
    VirtualNetworkSection,
    VnetSection,
    WireguardSection,
)
from deepsquare_chain.workflow.shell import LIBRARIES, quote

#: Name server of a network namespace, which passes queries on to those of the machine.
_NAME_SERVER: Final = "169.254.254.3"
#: Routes to everything, which leave the route to the peers themselves in place.
_HALVES: Final = {4: ("0.0.0.0/1", "128.0.0.0/1"), 6: ("::/1", "8000::/1")}
#: Shell functions of networks, and the client of tunnels.
NETWORK_LIBRARY: Final = "".join(
    (
        LIBRARIES["networks.sh"],
        "\n# The client of bore tunnels, a program in Python.\n# shellcheck disable=SC2034\n",
        f"readonly BORE_CLIENT={quote(LIBRARIES['bore_client.py'])}\n",
    )
)


def has_network(run: RunSection) -> bool:
    """Whether a step runs in a network namespace of its own."""
    return run.network in {"slirp4netns", "pasta"}


class VirtualNetworks:
    """The virtual networks of a job, with the addresses of all steps in them.

    Args:
        networks: The networks of the definition.
        runs: All steps with a command.
    """

    def __init__(
        self, networks: Sequence[VirtualNetworkSection], runs: Iterable[RunSection]
    ) -> None:
        self._networks = {network.name: network for network in networks}
        self._numbers = {network.name: number for number, network in enumerate(networks)}
        #: Addresses of the peers by network, without prefix. Steps with one address are one peer.
        self._peers: dict[str, list[str]] = {name: [] for name in self._networks}
        for run in runs:
            for interface in run.custom_network_interfaces:
                if interface.vnet is not None and has_network(run):
                    peers = self._peers[interface.vnet.name]
                    address = _address(interface.vnet.address)
                    if address not in peers:
                        peers.append(address)

    def start_lines(self) -> list[str]:
        """Return the lines that start the hubs; those of networks without a step are left out."""
        lines = []
        for name, peers in self._peers.items():
            if peers:
                gateway = self._networks[name].gateway_address
                words = [gateway, _range(gateway), *peers]
                lines.append(
                    f"start_virtual_network {self._numbers[name]} {' '.join(map(quote, words))}"
                )
        return lines

    def join_line(self, name: str, vnet: VnetSection) -> str:
        """Return the line that adds an interface to the network of a step.

        Args:
            name: Name of the interface.
            vnet: The interface.
        """
        network = self._networks[vnet.name]
        address = _address(vnet.address)
        peer = self._peers[vnet.name].index(address)
        words = [vnet.address, _range(network.gateway_address)]
        return f"join_virtual_network {name} {self._numbers[vnet.name]} {peer} {' '.join(map(quote, words))}"


def network_lines(run: RunSection, virtual: VirtualNetworks) -> list[str]:
    """Return the lines that add the network of a step to its launch command `"$@"`."""
    servers = run.dns or [_NAME_SERVER]
    lines = [
        "network_folder",
        _file("resolv.conf", [f"nameserver {server}" for server in servers]),
    ]
    counts = {"wg": 0, "vnet": 0, "bore": 0}

    def next_name(prefix: str) -> str:
        counts[prefix] += 1
        return f"{prefix}{counts[prefix] - 1}"

    for interface in run.custom_network_interfaces:
        if interface.wireguard is not None:
            lines += _wireguard(next_name("wg"), interface.wireguard)
        if interface.vnet is not None:
            lines.append(virtual.join_line(next_name("vnet"), interface.vnet))
        if interface.bore is not None:
            lines.append(_file(f"{next_name('bore')}.bore", _bore(interface.bore)))
    if counts["bore"]:
        lines.append('network_file bore.py "$BORE_CLIENT"')
    # In a container the runtime maps users, as without a network.
    user, group = (
        "" if value is None or run.container else str(value) for value in (run.map_uid, run.map_gid)
    )
    words = f'main "$DEEPSQUARE_NETWORK" {quote(user)} {quote(group)}'
    return [
        *(f"{line} || exit" for line in (*lines, "network_program")),
        f'set -- "$@" "$BASH" "$DEEPSQUARE_NETWORK/program" {words}',
    ]


def _file(name: str, lines: Iterable[str]) -> str:
    return " ".join(["network_file", name, *map(quote, lines)])


def _wireguard(name: str, wireguard: WireguardSection) -> list[str]:
    lines = ["[Interface]", f"PrivateKey = {wireguard.private_key}"]
    routes: list[str] = []
    for peer in wireguard.peers:
        lines += ["[Peer]", f"PublicKey = {peer.public_key}"]
        if peer.pre_shared_key is not None:
            lines.append(f"PresharedKey = {peer.pre_shared_key}")
        if peer.allowed_ips:
            lines.append(f"AllowedIPs = {', '.join(peer.allowed_ips)}")
        if peer.endpoint is not None:
            lines.append(f"Endpoint = {peer.endpoint}")
        if peer.persistent_keepalive is not None:
            lines.append(f"PersistentKeepalive = {peer.persistent_keepalive}")
        routes += [route for allowed in peer.allowed_ips for route in _routes(allowed)]
    return [
        _file(f"{name}.wireguard", lines),
        _file(f"{name}.addresses", wireguard.address),
        _file(f"{name}.routes", dict.fromkeys(routes)),
    ]


def _bore(bore: BoreSection) -> list[str]:
    if bore.bore_address is not None:
        host, _, port = bore.bore_address.rpartition(":")
    else:
        host, port = bore.address or "", str(bore.port or 2200)
    return [host.strip("[]"), port, str(bore.target_port), bore.secret or ""]


def _routes(allowed: str) -> Iterator[str]:
    network = ipaddress.ip_interface(allowed).network
    if network.prefixlen:
        yield str(network)
    else:
        yield from _HALVES[network.version]


def _address(address: str) -> str:
    return str(ipaddress.ip_interface(address).ip)


def _range(gateway: str) -> str:
    return str(ipaddress.ip_interface(gateway).network)
