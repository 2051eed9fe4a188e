"""`python -m deepsquare_chain.cli` is `deepsquare`."""

from __future__ import annotations

from deepsquare_chain.cli import main

main()
