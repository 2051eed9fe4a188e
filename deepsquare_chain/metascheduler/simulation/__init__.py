"""Simulation of a grid: the real policy and baselines, driven by recorded workloads."""
