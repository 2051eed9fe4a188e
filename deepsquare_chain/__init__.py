"""DeepSquare chain: the grid's contracts and the programs around them.

Programs use `Grid`; see docs/sdk.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepsquare_chain.client.grid import Grid as Grid

__version__ = "0.1.0"
__all__ = ["Grid", "__version__"]


def __getattr__(name: str) -> Any:
    """`Grid` with all that it needs is loaded when it is asked for: commands start without it."""
    if name == "Grid":
        from deepsquare_chain.client.grid import Grid

        return Grid
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
