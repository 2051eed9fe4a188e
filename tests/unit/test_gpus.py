"""GPU allocation: each live run has its own GPUs and does not see those of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepsquare_chain.executors.base import ExecutorUnavailableError, RunSpec
from deepsquare_chain.executors.launch import (
    device_environment,
    device_names,
    free_devices,
    make_run,
)
from deepsquare_chain.executors.local import Runs
from deepsquare_chain.executors.rundir import RunFolder
from deepsquare_chain.job import Offer, Resources

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("count", "environ", "names"),
    [
        (2, {}, ["0", "1"]),
        (0, {}, []),
        (2, {"CUDA_VISIBLE_DEVICES": "2,3"}, ["2", "3"]),
        (1, {"CUDA_VISIBLE_DEVICES": "GPU-8932f937, GPU-11111111"}, ["GPU-8932f937"]),
        (4, {"ROCR_VISIBLE_DEVICES": "1,"}, ["1"]),
        (2, {"CUDA_VISIBLE_DEVICES": "-1"}, []),
        (2, {"CUDA_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_names_are_numbers_or_the_owners(
    count: int, environ: dict[str, str], names: list[str]
) -> None:
    assert device_names(count, environ) == names


@pytest.mark.parametrize(
    ("in_use", "count", "expected"),
    [
        ([], 1, ["0"]),
        ([["0"]], 1, ["1"]),
        ([["1"], []], 2, ["0", "2"]),
        ([["0"], ["1"], ["2"]], 1, None),
        ([["0"]], 3, None),
        ([1], 1, ["1"]),  # of an earlier version, which did not record them
        ([2, ["0"]], 1, None),
        ([["9"]], 3, ["0", "1", "2"]),
    ],
)
def test_no_gpu_is_given_twice(
    in_use: list[list[str] | int], count: int, expected: list[str] | None
) -> None:
    assert free_devices(["0", "1", "2"], in_use, count) == expected


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["nvidiactl"], {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"}),
        (["kfd"], {"ROCR_VISIBLE_DEVICES"}),
        (["kfd", "nvidiactl"], {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"}),
        ([], {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
              "HIP_VISIBLE_DEVICES"}),
    ],
)  # fmt: skip
def test_each_driver_gets_its_own_variables(
    tmp_path: Path, files: list[str], names: set[str]
) -> None:
    for file in files:
        (tmp_path / file).touch()
    environment = device_environment(["1", "3"], tmp_path)
    assert {name for name in environment if name != "CUDA_DEVICE_ORDER"} == names
    assert {environment[name] for name in names} == {"1,3"}
    hidden = device_environment([], tmp_path)
    assert names <= set(hidden)
    assert set(hidden.values()) == {"-1", "void"}


def spec(key: str, gpus: int) -> RunSpec:
    return RunSpec(key, b"true", Resources(1, 1, 1, gpus), 1, {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_live_runs_of_an_earlier_daemon_keep_their_gpus(tmp_path: Path) -> None:
    names = ["0", "1"]
    before = Runs(tmp_path)
    for key, devices in (("a", ["0"]), ("none", [])):
        assert before._devices(spec(key, len(devices)), names) == devices
        make_run(tmp_path, spec(key, len(devices)), devices)
    after = Runs(tmp_path)
    assert after._devices(spec("b", 1), names) == ["1"]
    with pytest.raises(ExecutorUnavailableError, match="requests 2 GPUs"):
        after._devices(spec("c", 2), names)
    # Its end, here by a cancel before its start, gives the GPU back.
    after.request_cancel("a")
    assert after._devices(spec("c", 2), names) == ["0", "1"]
    # Variables of a job file never override the run's GPUs.
    assert RunFolder(tmp_path / "a").spec()["env"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert RunFolder(tmp_path / "none").spec()["env"]["CUDA_VISIBLE_DEVICES"] == "-1"


@pytest.mark.parametrize(
    "text", ['{"gpus": "x"}', '{"gpus": 1e999}', "{}", "spoilt", '{"devices": 5, "gpus": 1}']
)
def test_a_run_without_a_record_of_its_gpus_blocks_all(tmp_path: Path, text: str) -> None:
    make_run(tmp_path, spec("a", 1), ["0"])
    (tmp_path / "a" / "spec.json").write_text(text)
    with pytest.raises(OSError, match=r"holds no record|does not record"):
        Runs(tmp_path)._devices(spec("b", 1), ["0", "1"])


def test_no_capacity_is_free_while_a_run_records_an_infinite_size(tmp_path: Path) -> None:
    make_run(tmp_path, spec("a", 1), ["0"])
    (tmp_path / "a" / "spec.json").write_text('{"cpus": 1e999, "memory": 1, "gpus": 0}')
    assert Runs(tmp_path).free(Offer(8, 1_000, 1), min_free=0) == Offer(0, 0, 0)
