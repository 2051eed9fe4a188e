"""JSON-RPC: endpoints with failover, response validation, batches, chain head, and logs."""
