"""Rules of isolation, arguments of bubblewrap, and control groups in temporary folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepsquare_chain.errors import UsageError
from deepsquare_chain.executors import isolation, local
from deepsquare_chain.executors.base import ExecutorContext, create_executor, stored_in
from deepsquare_chain.executors.cgroups import CgroupParent, JobCgroup, find_cgroups
from deepsquare_chain.executors.launch import remove_tree
from deepsquare_chain.executors.rundir import disk_usage
from deepsquare_chain.executors.sandbox import (
    EtcCopy,
    Sandbox,
    SandboxOptions,
    SandboxProbe,
    bubblewrap_arguments,
    device_arguments,
    parse_options,
)
from deepsquare_chain.executors.slurm.executor import create as create_slurm
from deepsquare_chain.executors.slurm.executor import isolation_checks
from deepsquare_chain.executors.slurm.options import parse_options as parse_slurm_options
from deepsquare_chain.job import Offer

MISSING = SandboxProbe(None, "bubblewrap is not installed")


@pytest.fixture(autouse=True)
def _restored_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with delegated groups the search would move this process."""
    monkeypatch.setattr(isolation, "find_cgroups", lambda **_: CgroupParent(1, {}))


def context(folder: Path, **changes: object) -> ExecutorContext:
    return ExecutorContext(folder, Offer(1, 512, 0), **changes)  # type: ignore[arg-type]


# -- the rule


def test_root_is_refused_unless_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(UsageError, match="must not run as root") as error_info:
        create_executor("local", context(tmp_path, allow_unisolated=True))
    assert "--allow-root" in str(error_info.value.hint)
    assert create_executor("local", context(tmp_path, allow_root=True, allow_unisolated=True))


def test_jobs_that_are_not_isolated_are_refused_unless_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "probe_sandbox", lambda: MISSING)
    with pytest.raises(
        UsageError, match=r"not isolated.*Bubblewrap is not installed"
    ) as error_info:
        local.create(context(tmp_path))
    assert "--allow-unisolated" in str(error_info.value.hint)
    local.create(context(tmp_path, allow_unisolated=True))
    assert isolation.machine_isolation().allowances["allow_unisolated"]


def test_the_sandbox_can_be_left_out_where_that_is_allowed(tmp_path: Path) -> None:
    options = {"isolation": "none"}
    with pytest.raises(UsageError, match="The option isolation is none"):
        local.create(context(tmp_path, options=options))
    local.create(context(tmp_path, options=options, allow_unisolated=True))


def test_slurm_without_the_sandbox_is_refused_unless_that_is_allowed(tmp_path: Path) -> None:
    plain = {"isolation": "none"}
    with pytest.raises(UsageError, match="not isolated"):
        create_slurm(context(tmp_path, options=plain))
    create_slurm(context(tmp_path, options=plain, allow_unisolated=True))
    create_slurm(context(tmp_path))


@pytest.mark.parametrize("name", ["readable", "writable"])
def test_options_that_show_the_daemons_folders_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    executor_context = context(tmp_path / "state", options={name: [str(tmp_path / "link")]})
    with pytest.raises(UsageError, match=r"would show .*state to jobs"):
        local.create(executor_context)
    for path in ("relative", "/", "/a/../b"):
        with pytest.raises(UsageError, match=f"Option {name} of the local executor"):
            parse_options("local", SandboxOptions, {name: [path]})


def test_unknown_option_is_named_with_the_closest_one() -> None:
    with pytest.raises(UsageError, match=r"Option partition .* did you mean partitions"):
        parse_slurm_options({"partition": "main"})
    with pytest.raises(UsageError, match="Option xyz of the local executor: there is no such"):
        parse_options("local", SandboxOptions, {"xyz": 1})


def test_the_doctor_names_missing_features_of_a_cluster() -> None:
    good = {"ProctrackType": "proctrack/cgroup", "TaskPlugin": "task/affinity,task/cgroup"}
    good |= {"PrivateData": "jobs,usage"}
    assert all(check.ok for check in isolation_checks(parse_slurm_options({}), good))
    bad = good | {"TaskPlugin": "task/none"}
    checks = isolation_checks(parse_slurm_options({"isolation": "none"}), bad)
    assert [check.name for check in checks if not check.ok] == ["isolation", "TaskPlugin"]


def test_a_start_removes_groups_that_nothing_is_left_of(tmp_path: Path) -> None:
    """Groups of other programs and groups that a supervisor may just have created are kept."""
    for name in ("deepsquare-old", "deepsquare-new", "other"):
        (tmp_path / name).mkdir()
    busy = tmp_path / "deepsquare-busy"
    busy.mkdir()
    (busy / "process").mkdir()  # the kernel refuses to remove a group in use
    for path in (tmp_path / "deepsquare-old", tmp_path / "other", busy):
        os.utime(path, (0, 0))
    parent = CgroupParent(1, {"memory": tmp_path, "pids": tmp_path})
    assert parent.sweep() == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"deepsquare-new", "deepsquare-busy", "other"}


# -- arguments


def arguments(options: SandboxOptions, **changes: object) -> str:
    paths = {"work": "/runs/1/work", "temporary": "/runs/1/tmp", "script": "/runs/1/script"}
    return " ".join(bubblewrap_arguments(options, **{**paths, **changes}))  # type: ignore[arg-type]


def test_jobs_outlive_the_daemon_and_have_no_network() -> None:
    closed = arguments(SandboxOptions())
    assert "--unshare-net" in closed
    assert "--cap-drop ALL" in closed
    assert closed.endswith("--remount-ro /")
    for flag in ("--new-session", "--die-with-parent"):
        assert flag not in closed
    assert "--unshare-net" not in arguments(SandboxOptions(network=True))


def test_on_this_machine_one_mount_shows_the_copy_of_etc(tmp_path: Path) -> None:
    copied = arguments(SandboxOptions(), etc=tmp_path)
    assert f"--ro-bind {tmp_path} /etc " in copied
    assert "/etc/" not in copied
    assert "/etc/passwd" in arguments(SandboxOptions())


def etc_with(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_the_copy_of_etc_has_only_files_that_jobs_may_read(tmp_path: Path) -> None:
    source = etc_with(tmp_path / "etc", passwd="root", shadow="secret", elsewhere="zone")
    (source / "localtime").symlink_to("elsewhere")
    (source / "ssl" / "private").mkdir(parents=True)
    (source / "ssl" / "certs").mkdir()
    (source / "ssl" / "certs" / "a.pem").symlink_to("../../missing")
    os.mkfifo(source / "hosts")
    copy = EtcCopy(tmp_path / "copy", source).current()
    assert copy is not None
    names = {str(path.relative_to(copy)) for path in copy.rglob("*")}
    assert names == {"passwd", "localtime", "ssl", "ssl/certs", "ssl/certs/a.pem"}
    assert (copy / "localtime").read_text() == "zone"
    assert os.readlink(copy / "ssl" / "certs" / "a.pem") == "../../missing"


def test_the_copy_of_etc_follows_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepsquare_chain.executors.sandbox._ETC_PERIOD", 0.0)
    source = etc_with(tmp_path / "etc", passwd="root", hosts="old", group="users")
    etc = EtcCopy(tmp_path / "copy", source)
    copy = etc.current()
    assert copy is not None
    (source / "hosts").write_text("newer")
    (source / "passwd").unlink()
    (source / "group").unlink()
    (source / "group").mkdir()
    (source / "group" / "members").write_text("none")
    assert etc.current() == copy
    assert (copy / "hosts").read_text() == "newer"
    assert not (copy / "passwd").exists()
    assert (copy / "group" / "members").read_text() == "none"
    assert not list(copy.glob(".*"))


def test_an_etc_that_is_too_large_to_copy_is_bound_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = etc_with(tmp_path / "etc", passwd="root", hosts="loopback")
    monkeypatch.setattr("deepsquare_chain.executors.sandbox._ETC_BYTES", 5)
    assert EtcCopy(tmp_path / "copy", source).current() is None
    monkeypatch.setattr("deepsquare_chain.executors.sandbox._ETC_BYTES", 500)
    assert EtcCopy(tmp_path / "copy", source).current() == tmp_path / "copy"
    (tmp_path / "file").write_text("no folder can be made here")
    assert EtcCopy(tmp_path / "file", source).current() is None


def test_private_paths_are_hidden_below_readable_folders(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "key").write_text("secret")
    private = (tmp_path / "state", tmp_path / "key", Path("/elsewhere"))
    options = arguments(SandboxOptions(readable=(tmp_path,)), private=private)
    assert f"--tmpfs {tmp_path}/state --remount-ro {tmp_path}/state" in options
    assert f"--ro-bind /dev/null {tmp_path}/key" in options
    assert "/elsewhere" not in options


def test_only_a_newer_bubblewrap_forbids_user_namespaces() -> None:
    assert Sandbox("bwrap", (0, 8)).command(["x"]) == ["bwrap", "--disable-userns", "x"]
    assert Sandbox("bwrap", (0, 4)).command(["x"]) == ["bwrap", "x"]


def test_namespaces_are_allowed_by_an_option() -> None:
    options = SandboxOptions(namespaces=True)
    assert Sandbox("bwrap", (0, 8)).command(["x"], namespaces=options.namespaces) == ["bwrap", "x"]
    assert "/dev/net/tun" not in arguments(SandboxOptions())
    bwrap_arguments = arguments(options)
    assert "--dev-bind-try /dev/net/tun /dev/net/tun" in bwrap_arguments
    assert "--bind-try /proc/sys/net /proc/sys/net" in bwrap_arguments
    assert "--uid" not in bwrap_arguments
    # The kernel allows no job to map its own root user, and root could change the machine's network.
    assert "--uid 1000 --gid 1000" in arguments(options, is_root=True)
    shared = SandboxOptions(namespaces=True, network=True)
    assert "/proc/sys/net" not in arguments(shared, is_root=True)


def test_a_job_gets_its_own_gpus_alone(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    assert device_arguments([], tmp_path) == []
    arguments_of_gpu = " ".join(device_arguments(["1"], tmp_path))
    assert "nvidia1" in arguments_of_gpu
    assert "nvidiactl" in arguments_of_gpu
    assert "nvidia0" not in arguments_of_gpu
    assert "nvidia0" in " ".join(device_arguments(["GPU-8a7b"], tmp_path))


# -- control groups


def unified(tmp_path: Path, controllers: str) -> tuple[Path, Path, Path]:
    """A delegated cgroup of version 2, with files of mounts and of own groups."""
    group = tmp_path / "service"
    group.mkdir()
    (group / "cgroup.controllers").write_text(controllers)
    (group / "cgroup.subtree_control").write_text("")
    (group / "cgroup.procs").write_text("")
    mounts, own_group = tmp_path / "mountinfo", tmp_path / "own"
    mounts.write_text(f"41 31 0:38 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    own_group.write_text("0::/service\n")
    return group, mounts, own_group


def test_a_delegated_group_gets_its_controllers_enabled(tmp_path: Path) -> None:
    group, mounts, own_group = unified(tmp_path, "cpuset cpu memory pids")
    assert find_cgroups(mounts, own_group, enable=False).controllers == ("memory", "cpu", "pids")
    assert not (group / "daemon").exists()
    assert find_cgroups(mounts, own_group).controllers == ("memory", "cpu", "pids")
    assert (group / "cgroup.subtree_control").read_text() == "+memory +cpu +pids"
    own_group.write_text("0::/service/daemon\n")  # as after a restart
    assert find_cgroups(mounts, own_group).controllers == ("memory", "cpu", "pids")
    own_group.write_text("0::/elsewhere\n")
    assert find_cgroups(mounts, own_group).controllers == ()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (1, {"memory.limit_in_bytes": "1000", "cpu.cfs_quota_us": "200000", "pids.max": "9"}),
        (2, {"memory.max": "1000", "cpu.max": "200000 100000", "pids.max": "9"}),
    ],
)
def test_limits_of_both_versions(tmp_path: Path, version: int, expected: dict[str, str]) -> None:
    group = CgroupParent(version, dict.fromkeys(("memory", "cpu", "pids"), tmp_path)).job("1")
    assert group is not None
    group = JobCgroup.from_record(group.record())
    assert group is not None
    [folder] = {Path(entrance).parent for entrance in group.entrances}
    folder.mkdir()
    for name in (*expected, "cpu.cfs_period_us"):
        (folder / name).touch()
    group.make(memory=1000, cpus=2, processes=9)
    assert {name: (folder / name).read_text() for name in expected} == expected
    assert not group.ran_out_of_memory()
    events = folder / ("memory.oom_control" if version == 1 else "memory.events")
    events.write_text("low 0\noom_kill 1\n")
    assert group.ran_out_of_memory()


# -- the disk


def test_disk_usage_sees_closed_folders_and_no_links(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "data").write_bytes(bytes(100_000))
    (tmp_path / "link").symlink_to("/usr")
    (tmp_path / "a" / "b").chmod(0)
    (tmp_path / "a").chmod(0)
    usage = disk_usage(str(tmp_path), 10**9)
    assert 100_000 <= usage < 130_000
    assert disk_usage(str(tmp_path), 50_000) > 50_000


@pytest.mark.parametrize(("name", "depth"), [("d", 1_200), ("d" * 99, 60)])
def test_folders_nested_without_end_are_measured_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, depth: int
) -> None:
    """Paths are longer than the kernel accepts, or deeper than Python's recursion limit."""
    monkeypatch.chdir(tmp_path)
    for _ in range(depth):
        Path(name).mkdir()
        os.chdir(name)
    Path("data").write_bytes(bytes(10_000_000))
    os.chdir(tmp_path)
    (tmp_path / name).chmod(0)
    assert disk_usage(str(tmp_path), 5_000_000) > 5_000_000
    assert stored_in(tmp_path / name) is not None
    remove_tree(tmp_path / name)
    assert not list(tmp_path.iterdir())
