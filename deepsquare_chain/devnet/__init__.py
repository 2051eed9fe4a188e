"""A chain of one's own: the embedded node, a real node, and the parts of a local grid.

Nothing is imported here, so that a program which only needs anvil never loads an EVM.
"""
