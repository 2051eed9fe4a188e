"""GPUs by name: which a machine hands out, and how a run learns which are its own.

A GPU is named by its number, or as the daemon's own CUDA_VISIBLE_DEVICES (on AMD machines
ROCR_VISIBLE_DEVICES) names it, where that is set: so an owner keeps some of them back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

_CUDA: Final = "CUDA_VISIBLE_DEVICES"
_ROCR: Final = "ROCR_VISIBLE_DEVICES"
_NAMING: Final = (_CUDA, _ROCR)
#: What each kind of driver reads. ROCR's choice comes before HIP's, which counts among the chosen.
_NVIDIA: Final = (_CUDA, "NVIDIA_VISIBLE_DEVICES")
_AMD: Final = (_ROCR,)
_ALL: Final = (*_NVIDIA, *_AMD, "HIP_VISIBLE_DEVICES")
#: How a variable says that there is no device; empty or unset would mean all to some drivers.
_NONE: Final = "-1"
_NONE_OF: Final = {"NVIDIA_VISIBLE_DEVICES": "void"}


def device_names(count: int, environ: Mapping[str, str] | None = None) -> list[str]:
    """Names of the GPUs that a machine with `count` of them hands out; fewer where it names fewer."""
    env = os.environ if environ is None else environ
    for variable in _NAMING:
        if variable in env:
            names = [name.strip() for name in env[variable].split(",")]
            return [name for name in names if name and name != _NONE][:count]
    return [str(number) for number in range(count)]


def device_environment(devices: Sequence[str], dev: Path = Path("/dev")) -> dict[str, str]:
    """Variables that show these GPUs to a run and hide all others, whatever the driver.

    Args:
        devices: Names; none for a run without GPUs.
        dev: Folder of the devices, which tells the driver.
    """
    if not devices:
        return {name: _NONE_OF.get(name, _NONE) for name in _ALL}
    shown = ",".join(devices)
    # Numbers mean the same to every driver and tool only in the order of the bus.
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if (dev / "kfd").exists() and not (dev / "nvidiactl").exists():
        return dict.fromkeys(_AMD, shown)
    if (dev / "nvidiactl").exists():
        return dict.fromkeys(_NVIDIA, shown) | order
    return dict.fromkeys(_ALL, shown) | order


def free_devices(
    names: Sequence[str], held: Sequence[Sequence[str] | int], wanted: int
) -> list[str] | None:
    """The first GPUs that no live run holds; None where there are not enough.

    Args:
        names: All that are handed out.
        held: For each live run the names it holds, or their number where it was given no names.
        wanted: How many.
    """
    taken = {name for each in held if not isinstance(each, int) for name in each}
    left = [name for name in names if name not in taken]
    unnamed = sum(each for each in held if isinstance(each, int))
    return left[unnamed : unnamed + wanted] if len(left) >= unnamed + wanted else None
