"""A small container image with Debian's busybox: as folder, archive, or in a loopback registry."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

_PROGRAMS = (
    "sh", "ash", "cat", "echo", "env", "id", "ls", "mkdir", "pwd", "sleep", "touch", "tr", "true", "wc",
)  # fmt: skip
_CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "config": {
        "Entrypoint": ["/bin/echo", "entry"],
        "Env": ["PATH=/bin", "FROM_IMAGE=image", "PLACE=image"],
        "WorkingDir": "/app",
    },
}


def image_folder(folder: Path) -> Path:
    """Create an unpacked image."""
    for name in (
        "app",
        "bin",
        "dev",
        "etc",
        "proc",
        "sys",
        "tmp",
        "var/tmp",
        "root",
        "home",
        "mnt",
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
    busybox = shutil.which("busybox")
    assert busybox, "busybox-static is not installed"
    shutil.copy(busybox, folder / "bin" / "busybox")
    for name in _PROGRAMS:
        (folder / "bin" / name).symlink_to("busybox")
    (folder / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (folder / "etc" / "group").write_text("root:x:0:\n")
    (folder / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    (folder / "etc" / "resolv.conf").write_text("")
    (folder / "app" / "marker").write_text("inside\n")
    return folder


class Image:
    """The blobs of an image with one layer."""

    def __init__(self, folder: Path) -> None:
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w") as tar:
            for path in sorted(folder.rglob("*")):
                tar.add(path, path.relative_to(folder), recursive=False)
        self.plain = plain.getvalue()
        self.layer = gzip.compress(self.plain, 1)
        diff = {"type": "layers", "diff_ids": [_digest(self.plain)]}
        self.config = json.dumps({**_CONFIG, "rootfs": diff, "history": [{}]}).encode()
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                "config": _blob("application/vnd.docker.container.image.v1+json", self.config),
                "layers": [_blob("application/vnd.docker.image.rootfs.diff.tar.gzip", self.layer)],
            }
        ).encode()

    @property
    def digest(self) -> str:
        """The digest to pin the image."""
        return _digest(self.manifest)

    def save(self, path: Path) -> Path:
        """Write an archive in the format of `docker save`."""
        manifest: list[dict[str, Any]] = [
            {"Config": "config.json", "RepoTags": ["test:1"], "Layers": ["layer.tar"]}
        ]
        with tarfile.open(path, "w") as tar:
            for name, data in (
                ("manifest.json", json.dumps(manifest).encode()),
                ("config.json", self.config),
                ("layer.tar", self.plain),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    def push(
        self, registry: str, name: str, tag: str, login: tuple[str, str] | None = None
    ) -> None:
        """Upload the image to a registry."""
        with httpx2.Client(
            base_url=f"https://{registry}/v2/{name}/",
            auth=login,
            verify=False,
        ) as client:
            for data in (self.config, self.layer):
                location = client.post("blobs/uploads/").raise_for_status().headers["location"]
                separator = "&" if "?" in location else "?"
                client.put(
                    f"{location}{separator}digest={_digest(data)}", content=data
                ).raise_for_status()
            kind = {"content-type": "application/vnd.docker.distribution.manifest.v2+json"}
            client.put(f"manifests/{tag}", content=self.manifest, headers=kind).raise_for_status()


@contextlib.contextmanager
def registry(folder: Path, users: str = "") -> Iterator[str]:
    """Run Debian's docker-registry on loopback, with the certificate `cert.pem` in its folder.

    Args:
        folder: Folder of its data and log.
        users: Lines `NAME:BCRYPT` of the allowed users; empty allows everybody.

    Yields its host and port.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', tls: {{certificate: {certificate}, key: {key}}}}}\n"
    )
    if users:
        (folder / "users").write_text(users)
        with config.open("a") as file:
            file.write(f"auth: {{htpasswd: {{realm: test, path: {folder}/users}}}}\n")
    with serving(["docker-registry", "serve", str(config)], port, folder / "log"):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a server within a `with` block; wait until its port accepts connections."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(10)


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _blob(kind: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "size": len(data), "digest": _digest(data)}
