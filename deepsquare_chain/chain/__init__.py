"""The road to the contracts: reading, signing, sending and following.

Nothing is imported here, so that a program loads only the parts that it walks on.
"""
