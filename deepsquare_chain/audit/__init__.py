"""Audit of a grid: a ledger rebuilt from events alone, and what it proves. It trusts no index and no page."""
