"""The meta-scheduler: decides late and lawfully who runs a job, and watches over who runs it."""
