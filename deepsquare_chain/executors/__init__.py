"""Where jobs really run; one module per kind of machine, behind the protocol in `base`.

Nothing is imported here: the supervisor starts once a job and must start fast.
"""
