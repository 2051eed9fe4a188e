"""Allocation of GPUs by name, and the environment variables that expose them to a run.

The name of a GPU is its number, or its name in the daemon's own CUDA_VISIBLE_DEVICES (on AMD
machines ROCR_VISIBLE_DEVICES) if set, by which an operator can withhold GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

_CUDA: Final = "CUDA_VISIBLE_DEVICES"
_ROCR: Final = "ROCR_VISIBLE_DEVICES"
_NAMING: Final = (_CUDA, _ROCR)
#: Variables by driver. ROCR's selection is applied first; HIP's indexes refer to the selected GPUs.
_NVIDIA: Final = (_CUDA, "NVIDIA_VISIBLE_DEVICES")
_AMD: Final = (_ROCR,)
_ALL: Final = (*_NVIDIA, *_AMD, "HIP_VISIBLE_DEVICES")
#: Value for no device; an empty or unset variable means all devices to some drivers.
_NONE: Final = "-1"
_NONE_OF: Final = {"NVIDIA_VISIBLE_DEVICES": "void"}


def device_names(count: int, environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the names of at most `count` GPUs that a machine allocates."""
    env = os.environ if environ is None else environ
    for variable in _NAMING:
        if variable in env:
            names = [name.strip() for name in env[variable].split(",")]
            return [name for name in names if name and name != _NONE][:count]
    return [str(number) for number in range(count)]


def device_environment(devices: Sequence[str], dev: Path = Path("/dev")) -> dict[str, str]:
    """Return variables that expose these GPUs to a run and hide all others, for any driver.

    Args:
        devices: Names of GPUs; empty for a run without GPUs.
        dev: Device folder, from which the driver is detected.
    """
    if not devices:
        return {name: _NONE_OF.get(name, _NONE) for name in _ALL}
    names = ",".join(devices)
    # Only the order of the bus gives the same numbers in every driver and tool.
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if (dev / "kfd").exists() and not (dev / "nvidiactl").exists():
        return dict.fromkeys(_AMD, names)
    if (dev / "nvidiactl").exists():
        return dict.fromkeys(_NVIDIA, names) | order
    return dict.fromkeys(_ALL, names) | order


def free_devices(
    names: Sequence[str], held: Sequence[Sequence[str] | int], wanted: int
) -> list[str] | None:
    """Return the first GPUs that no live run uses; None if there are not enough.

    Args:
        names: Names of all GPUs that may be allocated.
        held: For each live run the names of its GPUs, or their number if it has no names.
        wanted: Number of GPUs.
    """
    in_use = {name for allocated in held if not isinstance(allocated, int) for name in allocated}
    unused = [name for name in names if name not in in_use]
    unnamed = sum(allocated for allocated in held if isinstance(allocated, int))
    return unused[unnamed : unnamed + wanted] if len(unused) >= unnamed + wanted else None
