"""JSON-RPC nodes for development: the embedded node, and anvil."""
