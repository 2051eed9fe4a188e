"""Simulation of a grid: runs recorded workloads through the real policy and baselines."""
