"""Script lines that run a step in a container, one function per runtime. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from deepsquare_chain.workflow.schema import ContainerSection, RunSection
from deepsquare_chain.workflow.shell import command_argument, quote

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
        return " ".join(quote(word) for word in split_words(run.command))
    shell = run.shell or "/bin/sh"
    command = command_argument(run.command)
    if run.work_dir is None:
        return f"{shell} -c {command}"
    enter = 'mkdir -p -- "$1" && cd -- "$1" && shift && exec "$@"'
    return f"{shell} -c {quote(enter)} enter {quote(run.work_dir)} {shell} -c {command}"


def split_words(text: str) -> list[str]:
    """Split a text into arguments, with the quoting rules of a shell.

    Raises:
        ValueError: A quote is not closed.
    """
    return shlex.split(text)


def uses_entrypoint(run: RunSection) -> bool:
    """Whether a step runs the entrypoint of its image instead of a shell."""
    return run.shell == "ENTRYPOINT" or not run.command.strip()


def _podman(run: RunSection, container: ContainerSection) -> list[str]:
    options = [
        "run",
        "--rm",
        "--quiet",
        "--log-driver=none",
        "--security-opt",
        "label=disable",
    ]
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
    if uses_entrypoint(run):
        options += [f"--workdir={quote(run.work_dir)}"] if run.work_dir else []
        command = _container_command(run)
    else:
        options += ["--entrypoint="]
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
    options += (
        ["--mount /tmp/.X11-unix:/tmp/.X11-unix:ro,x-create=dir,bind"] if container.x11 else []
    )
    for mount in container.mounts:
        options += [
            f"--mount {quote(f'{mount.host_dir}:{mount.container_dir}:x-create=auto,bind,{mount.options}')}"
        ]
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
