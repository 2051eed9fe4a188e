"""Local development chains (the embedded node and anvil), and the parts of a local grid.

This module imports nothing, so that programs that only need anvil do not load an EVM.
"""
