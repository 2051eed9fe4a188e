"""The Slurm executor: jobs of the grid as jobs of a Slurm cluster."""

from deepsquare_chain.executors.slurm.executor import SlurmExecutor, create

__all__ = ["SlurmExecutor", "create"]
