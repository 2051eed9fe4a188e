"""Input and output with curl and s5cmd: an HTTP server and an S3 server on loopback."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deepsquare_chain.workflow import parse_job_file, render_script
from tests.support.images import free_port, serving

BASH = shutil.which("bash") or "/bin/bash"
TOOLS = Path(sys.executable).parent
SECRET = "SK-0123456789"


def start(text: str, folder: Path, tools: Path = TOOLS) -> subprocess.Popen[str]:
    head = "resources: {memPerCpu: 100}\n"
    script = folder / "job.sh"
    script.write_bytes(render_script(parse_job_file((head + text).encode()).definition, {}))
    work = folder / "work"
    work.mkdir(exist_ok=True)
    return subprocess.Popen(
        [BASH, str(script)], cwd=work, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"PATH": f"{tools}:/usr/local/bin:/usr/bin:/bin", "HOME": str(work), "LANG": "C.UTF-8"},
    )  # fmt: skip


def run(text: str, folder: Path) -> tuple[int, str]:
    with start(text, folder) as process:
        output, _ = process.communicate(timeout=120)
    assert SECRET not in output
    return process.returncode, output


# ------------------------------------------------------------------ HTTP


class Files(ThreadingHTTPServer):
    """Serves `files`, with ranges; stores PUT requests; fails `failures` times first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.put: dict[str, bytes] = {}
        self.failures = 0
        self.cut = False
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve in a thread."""
        thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Files

    def do_GET(self) -> None:
        data = self.server.files.get(self.path.split("?")[0])
        if data is None or self.server.failures:
            self.server.failures = max(0, self.server.failures - 1)
            self.send_error(404 if data is None else 503)
            return
        range_header = self.headers.get("Range")
        begin = int(range_header.removeprefix("bytes=").rstrip("-")) if range_header else 0
        if range_header:
            self.server.ranges.append(range_header)
        self.send_response(206 if range_header else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        if range_header:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.server.cut and not range_header:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[begin:])

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.put[self.path] = data
        answer = f"http://files.example{self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def web() -> Iterator[Files]:
    server = Files()
    with server.serving():
        yield server


def tar(*names: str, link: str = "") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"text"))
        if link:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return data.getvalue()


def zipped(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, "text")
    return data.getvalue()


def http_job(url: str, command: str, more: str = "") -> str:
    return (
        f"input: {{http: {{url: '{url}'}}}}\n{more}\nsteps: [{{run: {{command: '{command}'}}}}]\n"
    )


@pytest.mark.parametrize(
    ("name", "data", "files"),
    [
        ("a.tar.gz", tar("x", "d/y"), "a.tar.gz d/y x"),
        ("b.zip", zipped("x", "d/y"), "b.zip d/y x"),
        ("c.txt", b"plain", "c.txt"),
        ("inside", tar("x", link="x"), "inside link x"),
    ],
)
def test_input_by_http_is_unpacked_and_kept(
    web: Files, tmp_path: Path, name: str, data: bytes, files: str
) -> None:
    web.files[f"/{name}"] = data
    text = http_job(
        f"{web.url}/{name}?key={SECRET}",
        'cd "$DEEPSQUARE_INPUT"; echo $(find . -not -type d | sort | cut -c3-)',
        "inputMode: 493",
    )
    assert run(text, tmp_path) == (0, f"{files}\n")
    archive_file = tmp_path / "work" / "input" / name
    assert archive_file.read_bytes() == data
    assert archive_file.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "data",
    [
        tar("../escaped"), tar("/tmp/escaped-absolute"), tar("x", link="/etc"),
        tar("x", link="../../.."), zipped("../escaped"),
    ],
)  # fmt: skip
def test_archives_that_lead_out_of_their_folder_are_refused(
    web: Files, tmp_path: Path, data: bytes
) -> None:
    web.files["/evil"] = data
    code, output = run(http_job(f"{web.url}/evil", "echo never"), tmp_path)
    assert code != 0
    assert "it is not extracted" in output
    assert "never" not in output
    assert not list(tmp_path.rglob("escaped*"))


def test_a_download_is_tried_again_and_continued(web: Files, tmp_path: Path) -> None:
    web.files["/data.bin"] = os.urandom(100_000)
    web.cut, web.failures = True, 1
    code, _ = run(http_job(f"{web.url}/data.bin", "true"), tmp_path)
    assert code == 0
    assert (tmp_path / "work" / "input" / "data.bin").read_bytes() == web.files["/data.bin"]
    assert web.ranges == ["bytes=50000-"]


@pytest.mark.parametrize("code", [0, 3])
def test_output_by_http_is_sent_also_after_a_failure(web: Files, tmp_path: Path, code: int) -> None:
    script = f'echo data > "$DEEPSQUARE_OUTPUT/result"; exit {code}'
    text = f"output: {{http: {{url: '{web.url}/'}}}}\nsteps: [{{run: {{command: '{script}'}}}}]\n"
    assert run(text, tmp_path) == (code, "http://files.example/result\n")
    assert web.put == {"/result": b"data\n"}


def test_several_files_are_sent_as_an_archive(web: Files, tmp_path: Path) -> None:
    text = f"""
output: {{http: {{url: '{web.url}/'}}}}
steps: [{{run: {{command: 'cd "$DEEPSQUARE_OUTPUT"; mkdir d; echo a > a; echo b > d/b'}}}}]
"""
    assert run(text, tmp_path)[0] == 0
    with zipfile.ZipFile(io.BytesIO(web.put["/output.zip"])) as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == {"a", "d/b"}


# ------------------------------------------------------------------ S3


class Bucket:
    """A bucket on moto's server, accessed with s5cmd."""

    def __init__(self, endpoint: str, name: str = "data") -> None:
        self.endpoint, self.name = endpoint, name
        self._env = {
            "PATH": str(TOOLS), "AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1", "S3_ENDPOINT_URL": endpoint,
        }  # fmt: skip
        self.call("mb", f"s3://{name}")

    def call(self, *arguments: str, data: str = "") -> str:
        result = subprocess.run(
            [str(TOOLS / "s5cmd"), *arguments], env=self._env, input=data,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return result.stdout if not result.returncode else ""

    def put(self, key: str, text: str) -> None:
        self.call("pipe", f"s3://{self.name}/{key}", data=text)

    def get(self, key: str) -> str:
        return self.call("cat", f"s3://{self.name}/{key}")

    def section(self, path: str, more: str = "") -> str:
        return (
            f"{{s3: {{region: us-east-1, bucketUrl: s3://data, path: '{path}', accessKeyId: AK, "
            f"secretAccessKey: {SECRET}, endpointUrl: '{self.endpoint}'{more}}}}}"
        )


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    port = free_port()
    log = tmp_path_factory.mktemp("s3") / "log"
    with serving([str(TOOLS / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port, log):
        yield Bucket(f"http://127.0.0.1:{port}")


def test_a_prefix_is_a_folder_and_not_the_beginning_of_a_name(
    bucket: Bucket, tmp_path: Path
) -> None:
    for key in ("test/a", "test/d/b", "test2/c", "tester"):
        bucket.put(key, key)
    show = 'cd "$DEEPSQUARE_INPUT"; echo $(find . -type f | sort | cut -c3-)'
    for path, expected in (("/test", "a d/b"), ("/test/", "a d/b"), ("/tester", "tester")):
        (tmp_path / expected).mkdir(parents=True, exist_ok=True)
        text = f"input: {bucket.section(path)}\nsteps: [{{run: {{command: '{show}'}}}}]\n"
        assert run(text, tmp_path / expected) == (0, f"{expected}\n")


def test_output_to_a_bucket_also_after_a_failure_and_with_removal(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put("out/old", "old")
    command = 'mkdir "$DEEPSQUARE_OUTPUT/d"; echo new > "$DEEPSQUARE_OUTPUT/d/new"; exit 5'
    text = f"output: {bucket.section('/out', ', deleteSync: true')}\nsteps: [{{run: {{command: '{command}'}}}}]\n"
    assert run(text, tmp_path) == (5, "")
    assert bucket.get("out/d/new") == "new\n"
    assert bucket.get("out/old") == ""


def test_the_output_is_synchronised_while_the_job_runs_and_at_its_end(
    bucket: Bucket, tmp_path: Path
) -> None:
    command = """
echo first > "$DEEPSQUARE_OUTPUT/live"
while [ ! -e "$STORAGE_PATH/go" ]; do sleep 0.1; done
echo last > "$DEEPSQUARE_OUTPUT/live"
"""
    indented = command.replace("\n", "\n      ")
    text = (
        f"output: {bucket.section('/sync')}\ncontinuousOutputSync: true\n"
        f"steps:\n- run:\n    command: |{indented}\n"
    )
    with start(text, tmp_path) as process:
        deadline = time.monotonic() + 180
        while bucket.get("sync/live") != "first\n":
            assert time.monotonic() < deadline
            time.sleep(0.3)
        (tmp_path / "work" / "go").touch()
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "")
    assert bucket.get("sync/live") == "last\n"


def test_a_bucket_that_refuses_fails_the_job_without_its_secrets(tmp_path: Path) -> None:
    refusing_bucket = Bucket.__new__(Bucket)
    refusing_bucket.endpoint = f"http://127.0.0.1:{free_port()}"
    fast = tmp_path / "tools"
    fast.mkdir()
    (fast / "sleep").symlink_to("/bin/true")
    wrapper = fast / "s5cmd"
    wrapper.write_text(f'#!/bin/sh\nexec {TOOLS}/s5cmd --retry-count 0 "$@"\n')
    wrapper.chmod(0o755)
    text = f"input: {refusing_bucket.section('/x')}\nsteps: [{{run: {{command: echo never}}}}]\n"
    with contextlib.closing(start(text, tmp_path, fast).stdout) as printed:  # type: ignore[type-var]
        assert printed is not None
        output = printed.read()
    assert "never" not in output
    assert "ERROR" in output
    assert SECRET not in output
