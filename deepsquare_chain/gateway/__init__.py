"""The gateway: an HTTP server for definitions, logs and results, authorised by chain state."""
