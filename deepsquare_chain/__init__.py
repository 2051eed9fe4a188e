"""DeepSquare chain: the grid's contracts and the programs around them."""

from __future__ import annotations

__version__ = "0.1.0"
