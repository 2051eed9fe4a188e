"""Transactions of one account: nonces, fees, the outbox, broadcasts and receipts."""
