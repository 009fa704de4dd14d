"""Where numbers live: strategies place a model on devices, without changing what it computes."""

from llm.strategy.ddp import DDP
from llm.strategy.environment import Environment
from llm.strategy.fsdp import FSDP
from llm.strategy.process_group import leave
from llm.strategy.rendezvous import Rendezvous, first_to_fail, meet, see_off, share_run_id
from llm.strategy.single import Single
from llm.strategy.stored import Stored

__all__ = [
    "DDP",
    "FSDP",
    "Environment",
    "Rendezvous",
    "Single",
    "Stored",
    "first_to_fail",
    "leave",
    "meet",
    "see_off",
    "share_run_id",
]
