"""Whether jobs are isolated from the daemon: the rule, and what `provider doctor` says of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from deepsquare_chain.errors import UsageError
from deepsquare_chain.executors.base import ExecutorContext
from deepsquare_chain.executors.cgroups import CONTROLLERS, CgroupParent, find_cgroups
from deepsquare_chain.executors.sandbox import (
    Isolation,
    SandboxOptions,
    SandboxProbe,
    probe_sandbox,
)
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.probe import Check

UNISOLATED: Final = (
    "Jobs are not isolated: they can read what the daemon's user can read, its keystore included"
)
_INSTALL: Final = (
    "Install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap) where jobs run and let users "
    "make namespaces, or accept the risk with --allow-unisolated."
)
_ROOT: Final = "Give the daemon a user of its own, or accept the risk with --allow-root."
_DELEGATE: Final = (
    "What is lacking is measured several times a second; CPUs are not limited then. With systemd, "
    "set Delegate=yes and DelegateSubgroup=daemon."
)
_log = get_logger(__name__)


def refuse_root(context: ExecutorContext) -> None:
    """Refuse to run jobs as root where that is not allowed.

    Raises:
        UsageError: This process is root's.
    """
    if os.geteuid() == 0 and not context.allow_root:
        raise UsageError("A provider does not run as root: its jobs would be root's", hint=_ROOT)


def refuse_unisolated(context: ExecutorContext, reason: str) -> None:
    """Say plainly that jobs are not isolated; refuse where that is not allowed.

    Args:
        context: Of the executor.
        reason: Why they are not.

    Raises:
        UsageError: It is not allowed.
    """
    if not context.allow_unisolated:
        raise UsageError(f"{UNISOLATED}. {reason}", hint=_INSTALL)
    _log.warning("jobs not isolated", reason=reason, consequence=UNISOLATED)


def refuse_exposure(options: SandboxOptions, private: Iterable[Path]) -> None:
    """Refuse options that would show the daemon's own folders to jobs.

    Raises:
        UsageError: Naming the folder.
    """
    exposed = options.exposed(private)
    if exposed is not None:
        raise UsageError(
            f"Options readable and writable of the executor would show {exposed} to jobs",
            hint="Name folders that hold nothing of the daemon, or move its files elsewhere.",
        )


class LocalOptions(SandboxOptions):
    """What a provider may say in `executor_options` of the local executor.

    Attributes:
        isolation: `sandbox`, or `none` for jobs as plain processes: containers need that.
    """

    isolation: Literal["sandbox", "none"] = "sandbox"

    def probe(self) -> SandboxProbe:
        """The sandbox of jobs on this machine, or why there is none."""
        if self.isolation == "none":
            return SandboxProbe(None, "the option isolation is none")
        return probe_sandbox()


def isolate(options: LocalOptions, context: ExecutorContext) -> Isolation:
    """How jobs of this machine are isolated, which is also logged.

    Raises:
        UsageError: They would not be, and that is not allowed; or an option is unsafe.
    """
    private = (context.state_dir, *context.private)
    refuse_exposure(options, private)
    probe = options.probe()
    if probe.sandbox is None:
        refuse_unisolated(context, _sentence(probe.reason))
    cgroups = find_cgroups()
    removed = cgroups.sweep()
    if removed:
        _log.info("empty control groups removed", groups=removed)
    _log.info(
        "job isolation",
        sandbox="bubblewrap" if probe.sandbox else "none",
        network=options.network or probe.sandbox is None,
        cgroups=" ".join(cgroups.controllers) or "none",
        disk_mb=options.disk,
    )
    return Isolation(probe.sandbox, options, cgroups, tuple(private))


@dataclass(frozen=True, slots=True)
class MachineIsolation:
    """What this machine has to isolate jobs.

    Attributes:
        words: The same for people.
        allowances: Settings that a provider on this machine needs in order to start, for programs
            that choose what the machine has.
    """

    words: str
    allowances: Mapping[str, bool]


def machine_isolation() -> MachineIsolation:
    """What this machine has to isolate jobs; nothing is changed."""
    probe = probe_sandbox()
    needed = {"allow_unisolated": probe.sandbox is None, "allow_root": os.geteuid() == 0}
    words = describe(probe, find_cgroups(enable=False))
    return MachineIsolation(words, {name: True for name, wanted in needed.items() if wanted})


def describe(probe: SandboxProbe, cgroups: CgroupParent) -> str:
    """What a machine with these parts has, in words."""
    limits = ", ".join({"pids": "processes"}.get(name, name) for name in cgroups.controllers)
    words = "bubblewrap" if probe.sandbox else f"none: {probe.reason}"
    return f"{words}; limits by control groups: {limits or 'none'}"


def local_checks(options: LocalOptions, context: ExecutorContext) -> list[Check]:
    """How jobs of this machine would be isolated; nothing is changed.

    Raises:
        UsageError: An option is unsafe.
    """
    refuse_exposure(options, (context.state_dir, *context.private))
    probe, cgroups = options.probe(), find_cgroups(enable=False)
    if probe.sandbox is None:
        reason = _sentence(probe.reason)
        isolation = Check("isolation", False, reason, _INSTALL, "allow_unisolated")
    else:
        network = "with the machine's network" if options.network else "without network"
        setting = "executor_options.network"
        isolation = Check("isolation", True, f"bubblewrap, {network}", "", setting)
    missing = [name for name in CONTROLLERS if name not in cgroups.controllers]
    text = f"lack {', '.join(missing)}" if missing else "memory, cpu and processes"
    hint = _DELEGATE if missing else ""
    return [isolation, Check("control groups", True, text, hint)]


def user_check() -> Check:
    """Whether this user may run jobs."""
    if os.geteuid() == 0:
        return Check("user", False, "root: its jobs would be root's", _ROOT, "allow_root")
    return Check("user", True, f"user {os.geteuid()}, not root", "", "allow_root")


def _sentence(reason: str) -> str:
    return reason[:1].upper() + reason[1:]
