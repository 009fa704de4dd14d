"""What a run prints: its own messages, and not Lightning's advice to users of its loaders and loops."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from llm.config import wandb_offline
from llm.launch import place


def speak() -> None:
    """Print what the rooms have to say (a long preparation, a damaged cache), message by message; of several processes
    the first prints, and the others only what is wrong."""
    rank = place().rank
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    log = logging.getLogger("llm")
    log.handlers, log.propagate = [handler], False  # Hydra has a handler at the root, which would say it again
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def quiet() -> None:
    """Silence what Lightning tells users of its own data loaders and loops; ours are other ones. Of several processes
    the first warns."""
    if place().rank > 0:
        warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Compiled, selective checkpointing is warned of for operations in place, of which a block has none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # Where it warns that a checkpoint gathers weights spread over two axes one axis after the other.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if wandb_offline():  # where the files lie is said at the end; online, people want the link
        os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CONSOLE", "off")  # the progress bar is no record worth keeping
    for message in (
        ".*does not have many workers.*",
        ".*You have overridden `on_before_batch_transfer`.*",
        ".*FSDP2-wrapped module .* returned a view tensor.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",
        ".*`srun` command is available on your system but is not used.*",
        ".*your dataloader is not resumable.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*is smaller than the logging interval.*",
        ".*You have overridden `on_before_batch_transfer` in `LightningModule`.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*The dirpath has changed from.*",
        ".*every_n_train_steps, but no pre-optimization state was saved.*",
        ".*isinstance.treespec, LeafSpec.* is deprecated.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*torch.distributed is disabled, unavailable or uninitialized.*",
    ):
        warnings.filterwarnings("ignore", message=message)
