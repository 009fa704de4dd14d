"""Loggers, which show a run elsewhere: one that fails must not end it. metrics.jsonl has every row in any case."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning as L

_log = logging.getLogger(__name__)


def tell(trainer: L.Trainer, what: Callable[[Any], None]) -> None:
    """Call `what` with each logger; one that raises is told nothing more. W&B's helper process, for one, dies of the
    SIGTERM that SLURM sends to everything in a job."""
    for logger in trainer.loggers:
        if getattr(logger, "failed", False):
            continue
        try:
            what(logger)
        except Exception as error:
            logger.failed = True  # type: ignore[attr-defined]
            name = type(logger).__name__
            _log.warning("%s: %s: %s; it is told nothing more in this attempt", name, type(error).__name__, error)
