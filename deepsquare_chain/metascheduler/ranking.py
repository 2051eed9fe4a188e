"""Which of several fitting providers an objective prefers. Pure.

Labels that the objectives read, all plain numbers:

| objective | label | better |
|---|---|---|
| TIME | `compute.gflops` | more: what one cpu computes, in gflop/s |
| TIME | `cpu.speed` | more: clock of one cpu, in GHz |
| ENERGY | `energy.watts_per_cpu` | less: power of one busy cpu, in W |
| ENERGY | `energy.grams_per_kwh` | less: carbon of the provider's electricity |

The first label counts most; a provider without it comes after all that have it and is compared
by the next one. Without any label the cheapest provider is taken, as under COST. Labels are the
provider's word: nothing but its approval stands behind them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

from deepsquare_chain.job import Objective

_NUMBER: Final = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")

#: Label and sign (-1: more is better) by falling weight.
_LABELS: Final[Mapping[Objective, tuple[tuple[str, int], ...]]] = {
    Objective.COST: (),
    Objective.TIME: (("compute.gflops", -1), ("cpu.speed", -1)),
    Objective.ENERGY: (("energy.watts_per_cpu", 1), ("energy.grams_per_kwh", 1)),
}


def preference(
    objective: Objective, labels: Mapping[str, str], rate: int
) -> tuple[tuple[float, ...], int]:
    """A key that sorts the preferred provider first.

    Args:
        objective: What the job's customer favours.
        labels: The provider's labels.
        rate: What the job would cost there, in credit-wei a second.
    """
    values = tuple(_measure(labels.get(key), sign) for key, sign in _LABELS[objective])
    return values, rate


def _measure(label: str | None, sign: int) -> float:
    if label is None or not _NUMBER.fullmatch(label):
        return math.inf
    return sign * float(label)
