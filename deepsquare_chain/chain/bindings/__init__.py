"""The contracts in Python: ABI, typed calls, events, reverts, and the record of a deployment."""
