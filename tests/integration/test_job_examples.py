"""Every workflow of `examples/workflows` from file to output, under the local executor and on Slurm."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepsquare_chain.client.job_file import load_job
from deepsquare_chain.executors.base import Executor, Exit, RunSpec, RunState
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.job import Offer
from deepsquare_chain.provider.offering import probe_abilities
from deepsquare_chain.workflow import ExecutionSite, render_script
from deepsquare_chain.workflow.abilities import needed_abilities
from tests.integration.test_job_data import Bucket, Files
from tests.support.images import free_port, serving
from tests.support.slurm import LocalSlurm

FOLDER = Path(__file__).parents[2] / "examples" / "workflows"
TOOLS = Path(sys.executable).parent
PATH = f"{TOOLS}:/usr/local/bin:/usr/bin:/bin"

#: Exit code of each example, and what it must print.
EXPECTED: dict[str, tuple[int, tuple[str, ...]]] = {
    "background": (0, ("in the meantime", "the data is 42", "the last one is awaited")),
    "cleanup": (4, ("working", "failed with code 4", "cleaned up")),
    "conditions": (0, ("12 is above 10, list a,b,c", "first line", "second line")),
    "container": (0, ("made for job 7", "inside, with a comma: 21 bytes")),
    "download": (0, ("6 words", "http://files.example/results/words.txt")),
    "grid-search": (0, ("best: x = 0.5 y = 2",)),
    "module": (0, ("inside of the module: Hello, reader", "after it: Hello, reader")),
    "mpi": (0, ("2 ranks, sum 1",)),
    "name-servers": (0, ("nameserver 9.9.9.9", "nameserver 1.1.1.1", "interfaces: lo tap0")),
    "parallel": (0, ("the sum is 5050",)),
    "pipeline": (0, ("prepared 3 parts", "counted", "15 words in all")),
    "server": (0, ("served hello",)),
    "storage": (0, ("6",)),
    "sweep": (0, ("job 3 of 4: pi is about 3.14",)),
    "virtual-network": (0, ("hello through the virtual network",)),
    "user-namespace": (0, ("user 1337, group 1337", "/tmp")),
}
#: What the example's comment says for a cluster: Open MPI finds its ranks by PMIx.
ON_SLURM = {"mpi": ("command: ./ring", "command: ./ring\n      mpi: pmix_v4")}


@dataclass
class Services:
    """The services that the examples use: a bucket and a web server."""

    bucket: Bucket
    web: Files


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    port, web = free_port(), Files()
    log = tmp_path_factory.mktemp("s3") / "log"
    with (
        web.serving(),
        serving([str(TOOLS / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port, log),
    ):
        bucket = Bucket(f"http://127.0.0.1:{port}", "examples")
        bucket.put("numbers/a.txt", "1\n2\n3\n")
        bucket.put("numbers-of-others/b.txt", "9\n")
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as archive:
            for name, text in (("texts/a", b"one two\n"), ("texts/b", b"three four five six\n")):
                info = tarfile.TarInfo(name)
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text))
        web.files["/texts.tar.gz"] = data.getvalue()
        yield Services(bucket, web)


def prepared(
    name: str, services: Services, folder: Path, changes: Iterable[tuple[str, str]]
) -> Path:
    """The example with the addresses of the services of this test, and other changes."""
    text = (FOLDER / f"{name}.yaml").read_text()
    for old, new in (
        *changes,
        ("https://s3.example.org", services.bucket.endpoint),
        ("ACCESS_KEY", "AK"),
        ("https://files.example.org", services.web.url),
    ):
        text = text.replace(old, new)
    shutil.copytree(FOLDER / "greet", folder / "greet", dirs_exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return file


async def run(executor: Executor, name: str, file: Path, site: ExecutionSite) -> tuple[Exit, str]:
    definition = load_job(file).definition
    lacking = set(needed_abilities(definition)) - site.abilities
    assert not lacking, f"{name} needs {lacking}"
    if name == "sweep":
        definition = definition.in_array(3, 4)
    script = render_script(definition, {"DEEPSQUARE_JOB_ID": "7"}, site)
    handle = await executor.submit(
        RunSpec(
            key=f"{name}-{os.getpid()}",
            script=script.replace(b"\n", f"\nexport PATH={PATH}\n".encode(), 1),
            resources=definition.resources,
            walltime=120,
            env={},
        )
    )
    while (status := (await executor.poll([handle]))[handle]).state is not RunState.ENDED:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    assert status.exit is not None
    output = (await executor.output(handle)).decode()
    return status.exit, output


async def run_all(
    executor: Executor,
    services: Services,
    folder: Path,
    changes: Mapping[str, tuple[str, str]],
) -> dict[str, tuple[int, list[str]]]:
    """Check exit code and output of every example; all but the pipeline's jobs run concurrently."""
    states = await probe_abilities(executor)
    # Reachable for these examples is this machine, and s5cmd is where PATH finds it.
    usable = {name for name, state in states.items() if state == "yes"} | {"internet", "s3"}
    site = ExecutionSite(frozenset(usable))

    async def one(name: str, *parts: str) -> tuple[str, tuple[int, list[str]]]:
        codes, lines = [], []
        changes_given = [changes[name]] if name in changes else []
        for part in parts or (name,):
            exit_status, output = await run(
                executor, part, prepared(part, services, folder, changes_given), site
            )
            codes.append(exit_status.code)
            lines += output.splitlines()
        return name, (max(codes), lines)

    pipeline = sorted(path.stem for path in FOLDER.glob("pipeline-*.yaml"))
    names = set(EXPECTED) - {"pipeline"}
    return dict(
        await asyncio.gather(one("pipeline", *pipeline), *(one(name) for name in sorted(names)))
    )


def check(results: dict[str, tuple[int, list[str]]]) -> None:
    for name, (code, lines) in results.items():
        expected_code, expected = EXPECTED[name]
        assert code == expected_code, (name, lines)
        assert set(expected) <= set(lines), (name, lines)
        assert "never printed" not in lines, name


def test_every_example_is_expected() -> None:
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert {name.split("-")[0] if name.startswith("pipeline") else name for name in names} == set(
        EXPECTED
    )


async def test_examples_under_the_local_executor(services: Services, tmp_path: Path) -> None:
    executor = LocalExecutor(tmp_path / "state", Offer(cpus=64, memory=65_536, gpus=0))
    check(await run_all(executor, services, tmp_path, {}))
    assert services.bucket.get("sums/a.txt") == "6\n"
    assert services.web.put["/results/words.txt"] == b"6\n"


@contextmanager
def cluster() -> Iterator[LocalSlurm]:
    slurm_cluster = LocalSlurm()
    try:
        yield slurm_cluster
    finally:
        slurm_cluster.close()


async def test_examples_on_slurm(services: Services, tmp_path: Path) -> None:
    with cluster() as slurm:
        executor = slurm.executor(tmp_path / "state")
        check(await run_all(executor, services, tmp_path, ON_SLURM))
