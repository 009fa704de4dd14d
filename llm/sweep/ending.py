"""What is said when a sweep has ended."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from llm.submit.record import FILE
from llm.sweep.outcome import outcomes
from llm.sweep.table import table

FAILED = 1  # exit code of a sweep with jobs that came to no good end


class Ending(Callback):
    """Print the table, and leave with 1 if jobs failed, or were interrupted."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """After the last job."""
        folder = Path(str(config.run_dir))
        if not (folder / FILE).exists():
            return  # of another launcher than ours
        contents, found = outcomes(folder)
        print(table(contents, found))
        print(f"python -m llm report {folder} draws it")
        if any(job.status in ("failed", "interrupted") for job in found):  # others are at work for another process
            sys.exit(FAILED)
