"""A run, or an array of them, on its way to SLURM: checked, frozen beside its results, handed to sbatch."""
