"""JSON-RPC: endpoints with failover, checked answers, batches, the head of the chain, and logs."""
