"""Notifications of a customer's jobs: webhooks and e-mail, at most once per event."""
