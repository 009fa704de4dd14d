"""Where numbers live: strategies place a model on devices, without changing what it computes."""

from llm.strategy.checkpoint_io import DirectoryIO
from llm.strategy.single import Single

__all__ = ["DirectoryIO", "Single"]
