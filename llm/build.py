"""The trainer and the objective that a configuration describes."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from llm.config import ConfigError
from llm.launch import place
from llm.loop import EpochLoop, FitLoop
from llm.strategy import Environment


def build(cfg: DictConfig) -> tuple[L.Trainer, Any]:
    """The trainer, with its strategy, callbacks and loggers, and the objective. Seeded here: data preparation draws
    nothing."""
    L.seed_everything(cfg.seed, verbose=False)
    node = cfg.trainer.copy()
    OmegaConf.set_struct(node, False)
    for key in ("max_tokens", "max_epochs"):
        node.pop(key)  # ours, and turned into max_steps
    callbacks, loggers = built(node.pop("callbacks")), built(node.pop("logger"))
    if os.environ.get("WANDB_MODE") == "disabled":  # which Lightning's logger takes for offline
        loggers = [logger for logger in loggers if not isinstance(logger, WandbLogger)]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger._wandb_init.pop("anonymous", None)  # Lightning's default, which wandb warns about in every run
            _load_wandb()
    trainer = built(
        node,
        max_epochs=-1,
        callbacks=callbacks,
        logger=loggers,
        plugins=[Environment(place())],
        # Without these Lightning adds a bar and a checkpoint of its own where a user has taken ours away.
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    trainer.fit_loop.__class__ = FitLoop
    trainer.fit_loop.epoch_loop.__class__ = EpochLoop
    # Its handlers broadcast from inside the handler, and end a run that was told to go as if it were done.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer, built(cfg.objective)


def built(node: DictConfig, **arguments: Any) -> Any:
    """What `node` describes, with plain lists and dicts. What a constructor refuses is the
    user's mistake: no traceback."""
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError | MisconfigurationException):
            raise ConfigError(str(error.__cause__).splitlines()) from error
        raise


def _load_wandb() -> None:
    """What beginning a run loads, from so deep that it takes longer: below Python 3.13 pydantic looks for the
    source of each of wandb's classes in every frame there is. Only the first process begins one."""
    if place().rank == 0:
        import wandb.apis.public  # noqa: F401
