"""Audit of a grid: rebuilds a ledger from on-chain events and verifies it.

The audit does not depend on the index or on any web page.
"""
