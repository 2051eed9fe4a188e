"""DeepSquare chain: the contracts of the grid, and the programs that use them.

`Grid` is the entry point for programs; see docs/sdk.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepsquare_chain.client.grid import Grid as Grid

__version__ = "0.1.0"
__all__ = ["Grid", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Grid` and its dependencies on first access, so that commands start faster."""
    if name == "Grid":
        from deepsquare_chain.client.grid import Grid

        return Grid
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
