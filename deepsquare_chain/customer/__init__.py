"""What a customer does: check a job, pay for it, watch it, end it."""
