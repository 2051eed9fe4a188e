"""Executors, which run the jobs: one module per kind of machine, behind the protocol in `base`.

Nothing is imported here: a supervisor starts for every job and must start fast.
"""
