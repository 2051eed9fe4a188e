"""`python -m deepsquare_chain.cli` runs `deepsquare`."""

from __future__ import annotations

from deepsquare_chain.cli import main

main()
