"""Isolation of jobs from the daemon: its enforcement, and the checks of `provider doctor`."""

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
from deepsquare_chain.observability.metrics import Check

UNISOLATED: Final = (
    "Jobs are not isolated: they can read all files of the daemon's user, including its keystore"
)
_INSTALL: Final = (
    "Install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap) where jobs run and let users "
    "make namespaces, or accept the risk with --allow-unisolated."
)
_DELEGATE: Final = (
    "Missing limits are enforced by measurements several times per second; CPUs are then not limited. With systemd, "
    "set Delegate=yes and DelegateSubgroup=daemon."
)
_log = get_logger(__name__)


def refuse_unisolated(context: ExecutorContext, reason: str) -> None:
    """Refuse jobs without isolation unless that is allowed; then log a warning.

    Raises:
        UsageError: Jobs without isolation are not allowed.
    """
    if not context.allow_unisolated:
        raise UsageError(f"{UNISOLATED}. {reason}", hint=_INSTALL)
    _log.warning("jobs not isolated", reason=reason, consequence=UNISOLATED)


def refuse_exposure(options: SandboxOptions, private: Iterable[Path]) -> None:
    """Refuse options that would expose the daemon's own folders to jobs.

    Raises:
        UsageError: A folder would be exposed; the message names it.
    """
    exposed = options.exposed(private)
    if exposed is not None:
        raise UsageError(
            f"Options readable and writable of the executor would show {exposed} to jobs",
            hint="Give folders without files of the daemon, or move its files elsewhere.",
        )


class LocalOptions(SandboxOptions):
    """Options of the local executor in `executor_options`.

    Attributes:
        isolation: `sandbox`, or `none` for jobs as plain processes, as needed in containers.
    """

    isolation: Literal["sandbox", "none"] = "sandbox"

    def probe(self) -> SandboxProbe:
        """Return the sandbox of this machine, or why there is none."""
        if self.isolation == "none":
            return SandboxProbe(None, "the option isolation is none")
        return probe_sandbox()


def isolate(options: LocalOptions, context: ExecutorContext) -> Isolation:
    """Return the isolation of jobs on this machine, and log it.

    Raises:
        UsageError: Jobs would not be isolated, which is not allowed; or an option is unsafe.
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
        "isolation checked",
        sandbox="bubblewrap" if probe.sandbox else "none",
        network=options.network or probe.sandbox is None,
        cgroups=" ".join(cgroups.controllers) or "none",
        disk_mb=options.disk,
    )
    return Isolation(probe.sandbox, options, cgroups, tuple(private))


@dataclass(frozen=True, slots=True)
class MachineIsolation:
    """Isolation that this machine supports, in words, and the settings that a provider here needs."""

    words: str
    allowances: Mapping[str, bool]


def machine_isolation() -> MachineIsolation:
    """Return the isolation that this machine supports; read-only."""
    probe = probe_sandbox()
    needed = {"allow_unisolated": probe.sandbox is None, "allow_root": os.geteuid() == 0}
    description = describe(probe, find_cgroups(enable=False))
    return MachineIsolation(
        description, {name: True for name, is_needed in needed.items() if is_needed}
    )


def describe(probe: SandboxProbe, cgroups: CgroupParent) -> str:
    """Describe a sandbox and control groups, for display."""
    limits = ", ".join({"pids": "processes"}.get(name, name) for name in cgroups.controllers)
    sandbox = "bubblewrap" if probe.sandbox else f"none: {probe.reason}"
    return f"{sandbox}; limits by control groups: {limits or 'none'}"


def local_checks(options: LocalOptions, context: ExecutorContext) -> list[Check]:
    """Return the checks of isolation on this machine; read-only.

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
        nesting = "with" if options.namespaces else "without"
        text = f"bubblewrap, {network}, {nesting} user namespaces (containers, networks of steps)"
        isolation = Check("isolation", True, text, "", "executor_options")
    missing = [name for name in CONTROLLERS if name not in cgroups.controllers]
    text = f"lack {', '.join(missing)}" if missing else "memory, cpu and processes"
    hint = _DELEGATE if missing else ""
    return [isolation, Check("control groups", True, text, hint)]


def _sentence(reason: str) -> str:
    return reason[:1].upper() + reason[1:]
