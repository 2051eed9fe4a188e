"""Script lines of a step: quoting, its container (a function per runtime), its networks. Pure."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from types import MappingProxyType
from typing import Final

from deepsquare_chain.workflow.schema import (
    BoreSection,
    ContainerSection,
    RunSection,
    VirtualNetworkSection,
    VnetSection,
    WireguardSection,
)

#: Files of this package that scripts contain. Read on import, so that rendering does no I/O.
LIBRARIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        name: files("deepsquare_chain.workflow").joinpath(name).read_text(encoding="utf-8")
        for name in ("runtime.sh", "transfers.sh", "containers.sh", "networks.sh", "bore_client.py")
    }
)


def quote(text: str) -> str:
    """Quote a text as one bash word, always on one line, and at most about twice as long.

    Raises:
        ValueError: The text contains a NUL byte.
    """
    if "\0" in text:
        raise ValueError("a NUL byte can't be passed to a program")
    if "\n" not in text and "'" not in text:
        return shlex.quote(text)
    # A raw newline in the quoted text would start a line of the script with customer text.
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'"


def command_argument(command: str) -> str:
    """Quote a command as the argument of a shell's `-c`, which takes a leading - or + for an option."""
    return quote(f" {command}" if command.startswith(("-", "+")) else command)


def exports(env: Mapping[str, str]) -> list[str]:
    """Return lines that export variables.

    Raises:
        ValueError: A name is not an identifier, or a value contains a NUL byte.
    """
    return [f"export {identifier(key)}={quote(value)}" for key, value in env.items()]


def identifier(name: str) -> str:
    """Return the name unchanged if it is a valid variable name.

    Raises:
        ValueError: The name is not an ASCII identifier.
    """
    if not (name.isascii() and name.isidentifier()):
        raise ValueError(f"{name[:60]!r} is not a name of a variable")
    return name


_DOCKER_HUB: Final = "registry-1.docker.io"
#: Folder of the images hosted by DeepSquare, on providers.
_HOSTED: Final = "/opt/software"
#: Folders of the job, and their mount points in a container.
_FOLDERS: Final = (
    ("$DEEPSQUARE_STORAGE", "/deepsquare"),
    ("$DEEPSQUARE_HOST_SHARED", "/deepsquare/tmp"),
    ("$DEEPSQUARE_HOST_WORLD", "/deepsquare/world-tmp"),
    ("$DEEPSQUARE_HOST_DISK", "/deepsquare/disk/tmp"),
    ("$DEEPSQUARE_HOST_DISK_WORLD", "/deepsquare/disk/world-tmp"),
)


def container_lines(runtime: str, run: RunSection, container: ContainerSection) -> list[str]:
    """Return the lines that replace the shell of a step by its container.

    `"$@"` holds the launch command of the step, such as `srun` and its options.
    """
    return [
        "set_container_folders || exit",
        *_login(runtime, container),
        *_RUNTIME_LINES[runtime](run, container),
    ]


def image_name(container: ContainerSection) -> str:
    """Return the full name of an image, including its registry."""
    registry, image = _split(container)
    # A digest is more precise than a tag, and some runtimes do not accept both.
    image = re.sub(r":[^:/@]+@", "@", image)
    if registry in {_DOCKER_HUB, "docker.io"}:
        return f"docker.io/{image if '/' in image else f'library/{image}'}"
    return f"{registry}/{image}"


def _split(container: ContainerSection) -> tuple[str, str]:
    """Return registry and image. Without `registry`, the image may begin with it, as in ghcr.io/a/b."""
    if container.registry is not None:
        return container.registry, container.image
    first, slash, rest = container.image.partition("/")
    # A name on Docker Hub has neither a dot nor a port.
    if slash and (re.search("[.:]", first) or first == "localhost"):
        return first, rest
    return _DOCKER_HUB, container.image


def _login(runtime: str, container: ContainerSection) -> list[str]:
    """Return lines that write the registry login to a file: other users can see arguments."""
    if container.username is None or container.password is None or container.registry is None:
        return []
    login = quote(f"{container.username}:{container.password}")
    return [f"registry_login {runtime} {quote(container.registry)} {login} || exit"]


def _container_command(run: RunSection) -> str:
    """Return the command of a container: a shell with the step's command, or entrypoint arguments."""
    if run.shell == "ENTRYPOINT" or not run.command.strip():
        # Split into words like a shell, without expansion.
        return " ".join(quote(word) for word in shlex.split(run.command))
    shell = run.shell or "/bin/sh"
    command = command_argument(run.command)
    if run.work_dir is None:
        return f"{shell} -c {command}"
    enter = 'mkdir -p -- "$1" && cd -- "$1" && shift && exec "$@"'
    return f"{shell} -c {quote(enter)} enter {quote(run.work_dir)} {shell} -c {command}"


def uses_entrypoint(run: RunSection) -> bool:
    """Whether a step runs the entrypoint of its image instead of a shell."""
    return run.shell == "ENTRYPOINT" or not run.command.strip()


def _podman(run: RunSection, container: ContainerSection) -> list[str]:
    options = ["run", "--rm", "--quiet", "--log-driver=none", "--security-opt", "label=disable"]
    # Podman 4.3 has no pasta; for a step, slirp4netns is equivalent.
    options += [f"--network={'host' if run.network in {None, 'host'} else 'slirp4netns'}"]
    options += [f"--dns={address}" for address in run.dns]
    options += [f'--volume "{host}:{target}"' for host, target in _FOLDERS]
    options += ['--volume "$HOME:$HOME"', "--env=HOME"] if container.mount_home else []
    options += ["--volume=/tmp/.X11-unix:/tmp/.X11-unix:ro"] if container.x11 else []
    for mount in container.mounts:
        options += [f"--volume={quote(f'{mount.host_dir}:{mount.container_dir}:{mount.options}')}"]
    options += ["--read-only"] if container.read_only_root_fs else []
    if run.map_uid is not None or run.map_gid is not None:
        options += [f"--user={run.map_uid or 0}:{run.map_gid or 0}"]
    if not uses_entrypoint(run):
        options += ["--entrypoint="]
    elif run.work_dir:
        options += [f"--workdir={quote(run.work_dir)}"]
    command = _container_command(run)
    call = f'exec "$@" podman {" ".join(options)} "${{DEEPSQUARE_OPTIONS[@]}}" {command}'.rstrip()
    return [
        "mapfile -t DEEPSQUARE_OPTIONS < <(podman_limits && container_variables | sed 's/^/--env=/')",
        f"podman_image {_image_words(container)} || exit",
        call,
    ]


def _charliecloud(run: RunSection, container: ContainerSection) -> list[str]:
    options = [] if container.read_only_root_fs else ["--write"]
    options += [f'--bind "{host}:{target}"' for host, target in _FOLDERS]
    options += ["--home"] if container.mount_home else []
    options += ["--bind /tmp/.X11-unix:/tmp/.X11-unix"] if container.x11 else []
    options += [f"--bind {quote(f'{m.host_dir}:{m.container_dir}')}" for m in container.mounts]
    options += [] if run.map_uid is None else [f"--uid={run.map_uid}"]
    options += [] if run.map_gid is None else [f"--gid={run.map_gid}"]
    # Variables of the step override those of the image.
    options += ['"${DEEPSQUARE_OPTIONS[@]}"']
    options += [f'--set-env={name}="${{{name}}}"' for name in run.env]
    return [
        f"charliecloud_image {_image_words(container)} || exit",
        f'exec "$@" ch-run {" ".join(options)} "$DEEPSQUARE_IMAGE" -- {_container_command(run)}',
    ]


def _apptainer(run: RunSection, container: ContainerSection) -> list[str]:
    options = ["--silent", "run" if uses_entrypoint(run) else "exec", "--no-mount=cwd,tmp"]
    options += [] if container.read_only_root_fs else ["--writable-tmpfs"]
    options += [f'--bind "{host}:{target}"' for host, target in _FOLDERS]
    options += [] if container.mount_home else ["--no-home"]
    options += ["--bind /tmp/.X11-unix:/tmp/.X11-unix:ro"] if container.x11 else []
    for mount in container.mounts:
        options += [f"--bind {quote(f'{mount.host_dir}:{mount.container_dir}:{mount.options}')}"]
    options += ["--fakeroot"] if run.map_uid == 0 or run.map_gid == 0 else []
    options += [f"--pwd {quote(run.work_dir)}"] if run.work_dir and uses_entrypoint(run) else []
    if container.deepsquare_hosted:
        image = quote("/".join((_HOSTED, *_split(container))))
    elif container.image.startswith("/"):
        image = f'"$DEEPSQUARE_STORAGE"{quote(container.image)}'
    else:
        image = quote(f"docker://{image_name(container)}")
    lines = [
        "if [[ -e /dev/nvidiactl ]]; then DEEPSQUARE_OPTIONS=(--nv); else DEEPSQUARE_OPTIONS=(); fi"
    ]
    call = f'exec "$@" apptainer {" ".join(options)} "${{DEEPSQUARE_OPTIONS[@]}}" {image} {_container_command(run)}'
    return [*lines, call.rstrip()]


def _enroot(run: RunSection, container: ContainerSection) -> list[str]:
    options = [] if container.read_only_root_fs else ["--rw"]
    options += [f'--mount "{host}:{target}"' for host, target in _FOLDERS]
    options += ['--mount "$HOME:$HOME"'] if container.mount_home else []
    x11 = "/tmp/.X11-unix:/tmp/.X11-unix:ro,x-create=dir,bind"  # noqa: S108 - in the container
    options += [f"--mount {x11}"] if container.x11 else []
    for mount in container.mounts:
        bind = f"{mount.host_dir}:{mount.container_dir}:x-create=auto,bind,{mount.options}"
        options += [f"--mount {quote(bind)}"]
    options += ["--root"] if run.map_uid == 0 else []
    startup = _startup(run)
    if startup is not None:
        options += ['--mount "$DEEPSQUARE_STARTUP:/etc/rc.local:x-create=file,bind,ro"']
    if container.image.startswith("/"):
        source = f'file "$DEEPSQUARE_STORAGE"{quote(container.image)}'
    else:
        registry, _, image = (
            image_name(container).replace("docker.io/", f"{_DOCKER_HUB}/", 1).partition("/")
        )
        source = f"registry {quote(f'docker://{registry}#{image}')}"
    call = f'exec "$@" enroot start {" ".join(options)} "${{DEEPSQUARE_OPTIONS[@]}}" "$DEEPSQUARE_IMAGE" {_container_command(run)}'
    return [
        "mapfile -t DEEPSQUARE_OPTIONS < <(container_variables | sed 's/^/--env=/')",
        f"enroot_image {source} || exit",
        *([] if startup is None else [f"enroot_startup {quote(startup)} || exit"]),
        call.rstrip(),
    ]


def _startup(run: RunSection) -> str | None:
    """Return lines that Enroot's command script of an image runs in its WORKDIR, before its entrypoint."""
    if not uses_entrypoint(run):
        return 'if [ $# -gt 0 ]; then exec "$@"; fi'
    if run.work_dir is None:
        return None
    folder = shlex.quote(run.work_dir)
    return f"mkdir -p -- {folder} && cd -- {folder} || exit"


def _image_words(container: ContainerSection) -> str:
    if container.image.startswith("/"):
        return f'file "$DEEPSQUARE_STORAGE"{quote(container.image)}'
    return f"registry {quote(image_name(container))}"


_RUNTIME_LINES: Final[Mapping[str, Callable[[RunSection, ContainerSection], list[str]]]] = (
    MappingProxyType(
        {
            "podman": _podman,
            "charliecloud": _charliecloud,
            "apptainer": _apptainer,
            "enroot": _enroot,
        }
    )
)


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
    """The virtual networks of a job, with the addresses of all its commands in them."""

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
        """Return the line that adds an interface of this name to the network of a step."""
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
