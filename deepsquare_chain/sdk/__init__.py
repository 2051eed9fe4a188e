"""The grid for Python programs: `from deepsquare_chain import Grid`.

The same coroutines that the command line runs, behind one small class; see docs/sdk.md.
"""

from __future__ import annotations

from deepsquare_chain.sdk.grid import Grid, Outcome, Submission
from deepsquare_chain.sdk.quoting import Offer
from deepsquare_chain.sdk.results import Result

__all__ = ["Grid", "Offer", "Outcome", "Result", "Submission"]
