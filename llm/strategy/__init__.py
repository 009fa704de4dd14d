"""Where numbers live: strategies place a model on devices, without changing what it computes."""

from llm.strategy.checkpoint_io import DirectoryIO
from llm.strategy.ddp import DDP
from llm.strategy.environment import Environment
from llm.strategy.fsdp import FSDP
from llm.strategy.process_group import leave
from llm.strategy.rendezvous import Rendezvous, first_to_fail, meet, see_off, share_run_id
from llm.strategy.single import Single

__all__ = [
    "DDP",
    "FSDP",
    "DirectoryIO",
    "Environment",
    "Rendezvous",
    "Single",
    "first_to_fail",
    "leave",
    "meet",
    "see_off",
    "share_run_id",
]
