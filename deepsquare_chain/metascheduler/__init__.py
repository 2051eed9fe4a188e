"""The meta-scheduler: assigns waiting jobs to providers and runs liveness checks on providers."""
