"""A run's configuration: its schema, and every mistake in it at once, before anything is built.

register()                                              # once per process, before Hydra composes
check_overrides(sys.argv[1:], "conf", "train")          # what Hydra would refuse, and check(), in one list
check(cfg)                                              # a configuration composed elsewhere
"""

from llm.config.check import check
from llm.config.command_line import check_overrides, quoted, split_flags
from llm.config.mistake import ConfigError, refuse
from llm.config.online import wandb_offline
from llm.config.schema import Run, given_run_id, job_run_id, made_run_id, register, run_id

__all__ = [
    "ConfigError",
    "Run",
    "check",
    "check_overrides",
    "given_run_id",
    "job_run_id",
    "made_run_id",
    "quoted",
    "refuse",
    "register",
    "run_id",
    "split_flags",
    "wandb_offline",
]
