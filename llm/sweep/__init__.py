"""Many runs that are one question: Hydra's launchers and sweepers for `python train.py -m` (docs/sweeps.md), and what
comes out.

register()                       # once per process, before Hydra composes
"""

from llm.sweep.ending import Ending
from llm.sweep.launcher import Processes
from llm.sweep.local import Local
from llm.sweep.plugin import register
from llm.sweep.search import Optuna
from llm.sweep.slurm import Slurm

__all__ = ["Ending", "Local", "Optuna", "Processes", "Slurm", "register"]
