"""SLURM: what a job asks it for, what it has, and how jobs are."""

from llm.cluster.slurm import Slurm

__all__ = ["Slurm"]
