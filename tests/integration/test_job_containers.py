"""Steps in containers with Podman and Charliecloud: images from a registry, a folder, an archive."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepsquare_chain.workflow import ExecutionSite, parse_job_file, render_script
from tests.support.images import Image, image_folder, registry

BASH = shutil.which("bash") or "/bin/bash"
RUNTIMES = ("podman", "charliecloud")
#: Variables that make the certificate of a test trusted.
_TRUST = ("CONTAINERS_REGISTRIES_CONF", "REQUESTS_CA_BUNDLE")
#: A login, and the same for the registry.
_LOGIN = ("user", "it's $HOME, secret")
_USERS = "user:$2b$05$abcdefghijklmnopqrstuu9MF.Cw/RWaEOg0MO4qYf8J34kiHe/gi\n"
_PROGRAMS = {"podman": "podman", "charliecloud": "ch-run"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Image, Path]]:
    """A registry with one image, the image as archive, and as folder."""
    base = tmp_path_factory.mktemp("images")
    folder = image_folder(base / "folder")
    image = Image(folder)
    with registry(base / "registry") as address:
        image.push(address, "user/box", "1")
        conf = base / "registries.conf"
        conf.write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
        os.environ["CONTAINERS_REGISTRIES_CONF"] = str(conf)
        os.environ["REQUESTS_CA_BUNDLE"] = str(base / "registry" / "cert.pem")
        yield address, image, folder
        del os.environ["CONTAINERS_REGISTRIES_CONF"], os.environ["REQUESTS_CA_BUNDLE"]


def run(runtime: str, steps: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    text = f"resources: {{tasks: 2, memPerCpu: 100}}\nenv: {{PLACE: job, LIST: 'a,b'}}\nsteps:\n{steps}"
    definition = parse_job_file(text.encode()).definition
    script = folder / "job.sh"
    script.write_bytes(
        render_script(definition, {"DEEPSQUARE_JOB_ID": "7"}, ExecutionSite(frozenset({runtime})))
    )
    work = folder / "work"
    work.mkdir(exist_ok=True)
    return subprocess.run(
        [BASH, str(script)],
        cwd=work, capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(work), "LANG": "C.UTF-8", **{
            name: value for name, value in os.environ.items() if name in _TRUST
        }, **env},
    )  # fmt: skip


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if shutil.which(_PROGRAMS[name]) is None or shutil.which("docker-registry") is None:
        if os.environ.get("DEEPSQUARE_REQUIRE_REAL"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed")
    return name


def test_an_image_of_a_registry(
    runtime: str, images: tuple[str, Image, Path], tmp_path: Path
) -> None:
    address, image, _ = images
    steps = f"""
- run:
    container: {{image: 'user/box:1', registry: '{address}'}}
    env: {{STEP: "x y", PLACE: step}}
    command: |
      echo "$FROM_IMAGE $PLACE $LIST $STEP $DEEPSQUARE_JOB_ID $NTASKS"
      echo "$STORAGE_PATH $DEEPSQUARE_INPUT $DEEPSQUARE_OUTPUT $DEEPSQUARE_ENV $DEEPSQUARE_TMP"
      cat /app/marker
      echo 'FOUND=a,b
      second' >> "$DEEPSQUARE_ENV"
      echo data > "$DEEPSQUARE_OUTPUT/file"
      touch "$DEEPSQUARE_TMP/t" "$DEEPSQUARE_DISK_TMP/t" "$DEEPSQUARE_SHARED_WORLD_TMP/t" /written
- run:
    container: {{image: 'user/box@{image.digest}', registry: '{address}'}}
    workDir: /new/folder
    command: 'pwd; echo "[$FOUND]"; exit 7'
"""
    result = run(runtime, steps, tmp_path)
    assert result.stdout.splitlines() == [
        "image step a,b x y 7 2",
        "/deepsquare /deepsquare/input /deepsquare/output /deepsquare/env /deepsquare/tmp",
        "inside",
        "/new/folder",
        "[a,b",
        "second]",
    ], result.stderr
    assert result.returncode == 7
    assert (tmp_path / "work" / "output" / "file").read_text() == "data\n"


@pytest.fixture(scope="module")
def closed_registry(
    images: tuple[str, Image, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """A registry with the same image that requires a login, and its certificate."""
    _, image, _ = images
    folder = tmp_path_factory.mktemp("closed")
    with registry(folder, _USERS) as address:
        image.push(address, "user/box", "1", _LOGIN)
        yield address, folder / "cert.pem"


def test_an_image_behind_a_login(
    runtime: str,
    closed_registry: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, certificate = closed_registry
    conf = tmp_path / "registries.conf"
    conf.write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(conf))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    steps = """
- run:
    container: {{image: 'user/box:1', registry: '{}', username: user, password: "{}"}}
    command: cat /app/marker; env
"""
    refusal = run(runtime, steps.format(address, "wrong"), tmp_path)
    assert refusal.returncode != 0
    assert "inside" not in refusal.stdout
    result = run(runtime, steps.format(address, _LOGIN[1]), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("inside\n")
    assert "secret" not in result.stdout + result.stderr
    # Nothing of it is left in the job's folder, which its customer may upload.
    remaining = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert not [path for path in remaining if b"secret" in path.read_bytes()]


def test_an_image_in_a_folder_or_an_archive(
    runtime: str, images: tuple[str, Image, Path], tmp_path: Path
) -> None:
    _, image, folder = images
    (tmp_path / "work").mkdir()
    shutil.copytree(folder, tmp_path / "work" / "box", symlinks=True)
    if runtime == "podman":
        image.save(tmp_path / "work" / "box.tar")
    else:  # Charliecloud reads archives of the file system
        (tmp_path / "work" / "box.tar").write_bytes(image.plain)
    steps = """
- run: {container: {image: /box}, command: 'cat /app/marker'}
- run: {container: {image: /box.tar}, command: 'cat /app/marker; id -u', mapUid: 0}
"""
    result = run(runtime, steps, tmp_path)
    assert (result.returncode, result.stdout) == (0, "inside\ninside\n0\n"), result.stderr
