"""The embedded node, and anvil: JSON-RPC nodes for one machine."""
