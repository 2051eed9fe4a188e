"""What the integers of rows count, as a note on their types: whoever shows them reads it there."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, TypeAlias


class Unit(Enum):
    """Units of amounts; other integers are seconds, counts, ids or block numbers."""

    CREDITS = "credit-wei"
    RATE = "credit-wei a second"
    COIN = "wei of the chain's own coin"
    GAS = "units of gas"
    RAW = "values as an event gives them"


Credits: TypeAlias = Annotated[int, Unit.CREDITS]
Rate: TypeAlias = Annotated[int, Unit.RATE]
Coin: TypeAlias = Annotated[int, Unit.COIN]
Gas: TypeAlias = Annotated[int, Unit.GAS]
Values: TypeAlias = Annotated[Mapping[str, Any], Unit.RAW]
