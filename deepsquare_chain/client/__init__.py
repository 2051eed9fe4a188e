"""What the owner of a wallet does on the grid: check, pay, submit, watch, end.

Nothing is imported here, so that a command loads only what it needs.
"""
