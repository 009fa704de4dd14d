"""Callbacks: what watches a run. Removing any of them leaves the loss curve bit-identical."""

from llm.callback.checkpoint import Checkpoint
from llm.callback.due_validation import DueValidation
from llm.callback.evaluate import Evaluate
from llm.callback.garbage import Garbage
from llm.callback.ledger import Ledger
from llm.callback.loggers import tell
from llm.callback.metrics import Metrics
from llm.callback.preempt import Preempt
from llm.callback.progress import Progress
from llm.callback.prune import Prune
from llm.callback.rehearsal import Rehearsal
from llm.callback.sample import Sample
from llm.callback.summary import Summary
from llm.callback.watchdog import Watchdog

__all__ = [
    "Checkpoint",
    "DueValidation",
    "Evaluate",
    "Garbage",
    "Ledger",
    "Metrics",
    "Preempt",
    "Progress",
    "Prune",
    "Rehearsal",
    "Sample",
    "Summary",
    "Watchdog",
    "tell",
]
