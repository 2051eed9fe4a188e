"""Access to the chain: JSON-RPC, contract bindings, transactions, the event follower, and wallets.

Nothing is imported here, so that a program loads only the parts that it uses.
"""
