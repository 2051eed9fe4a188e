"""The gateway: definitions, logs and results over HTTP, for whom the chain names."""
