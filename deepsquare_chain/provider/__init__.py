"""A provider: takes the jobs it is assigned, runs them, and reports how they ended."""
