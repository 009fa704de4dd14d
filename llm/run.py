"""A run: check, agree, claim the directory, prepare the data, build, and train."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from llm.checkpoint import CheckpointError, newest
from llm.checkpoint.store import find
from llm.config import ConfigError, check, wandb_offline
from llm.data import TextData
from llm.exit import RunExistsError, finished, guarded, write_exit
from llm.model import TransformerConfig
from llm.strategy import DirectoryIO


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run_dir: Path
    step: int
    metrics: dict[str, float]


def run(cfg: DictConfig) -> Outcome:
    """Train (stage=fit) or evaluate (stage=validate) what `cfg` describes.

    Raises:
        ConfigError: naming every key that is wrong, before anything is built or written.
        DataError: data that cannot be used.
        CheckpointError: a checkpoint that cannot be used.
        RunExistsError: see there.
        OSError: storage that cannot be written.
        PreemptedError: the run was told to stop, and saved.
    """
    check(cfg)
    cfg = cfg.copy()
    _quiet()
    cfg.trainer.accelerator = _accelerator(cfg.trainer.accelerator)
    data: TextData = built(cfg.data)
    cfg.model.vocab_size = cfg.model.vocab_size or vocab_size(data)
    agree(cfg, built(cfg.model), data)
    run_dir = Path(cfg.run_dir)
    checkpoint = claim(run_dir, cfg.resume)
    data.prepare()
    _set_length(cfg, data)
    if cfg.stage == "validate":
        return _validate(cfg, data, checkpoint)
    if checkpoint is not None and finished(run_dir, cfg.trainer.max_steps):
        print(f"{run_dir}: finished already at step {cfg.trainer.max_steps}; a larger trainer.max_steps continues it")
        return Outcome(run_dir, int(cfg.trainer.max_steps), {})
    return _fit(cfg, data, checkpoint)


def main(cfg: DictConfig) -> None:
    """`run`, for a shell: a mistake of the user's is one line, a bug a traceback, and each has its exit code."""
    speak()
    with guarded(Path(cfg.run_dir)):
        run(cfg)


def prepare(cfg: DictConfig) -> None:
    """Make the tokenizer and the token cache of `cfg`, and print what they hold."""
    check(cfg)
    speak()
    data: TextData = built(cfg.data)
    data.prepare()
    print(yaml.safe_dump(data.report(), sort_keys=False))


def agree(cfg: DictConfig, model: TransformerConfig, data: TextData) -> None:
    """The rules between groups, all of them at once.

    Raises:
        ConfigError: with one line for each rule that does not hold.
    """
    mistakes = []
    if vocab_size(data) > (model.vocab_size or 0):
        mistakes.append(
            f"model.vocab_size: {model.vocab_size} - the tokenizer has {vocab_size(data)} ids - "
            f"give at least that, or null to take the tokenizer's"
        )
    if data.max_length > model.max_length:
        mistakes.append(
            f"data.max_length: {data.max_length} - the model's context is model.max_length={model.max_length} - "
            f"shorten the first or raise the second"
        )
    n_devices, n_nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    if cfg.strategy._target_.endswith(".Single") and (n_devices, n_nodes) not in ((1, 1), ("auto", 1)):
        mistakes.append(
            f"trainer.devices: {n_devices} on {n_nodes} nodes - strategy=single drives one device - "
            f"set trainer.devices=1 and trainer.num_nodes=1"
        )
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        mistakes.append(
            f"trainer.accelerator: {cfg.trainer.accelerator} - torch sees no GPU here - set trainer.accelerator=cpu"
        )
    try:
        data.check_world(1)
    except ValueError as error:
        mistakes.append(str(error))
    if cfg.resume == "must" and newest(cfg.run_dir) is None:
        mistakes.append(
            f"resume: must - there is no checkpoint in {cfg.run_dir}/checkpoints - give the run's run_name or run_dir"
        )
    if cfg.stage == "validate" and cfg.resume == "never" and cfg.init_from is None:
        mistakes.append("stage: validate - needs weights - set resume to a run or step directory")
    if mistakes:
        raise ConfigError(mistakes)


def claim(run_dir: Path, resume: str) -> Path | None:
    """Make the run directory and say which checkpoint to go on from; None starts at step 0."""
    if resume == "never" and run_dir.exists() and any(run_dir.iterdir()):
        raise RunExistsError(
            f"run_dir: {run_dir} exists - resume=never does not write into an existing run - "
            f"give another run_name, or resume=auto to continue it"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    if resume in ("auto", "must", "never"):
        return newest(run_dir)
    return newest(run_dir) or find(resume)


def build(cfg: DictConfig) -> tuple[L.Trainer, Any]:
    """The trainer, with its strategy, callbacks and loggers, and the objective. Seeded here: data preparation draws
    nothing."""
    L.seed_everything(cfg.seed, verbose=False)
    node = cfg.trainer.copy()
    OmegaConf.set_struct(node, False)
    for key in ("max_tokens", "max_epochs"):
        node.pop(key)  # ours, and turned into max_steps
    callbacks = built(node.pop("callbacks"))
    trainer = built(
        node,
        max_epochs=-1,
        callbacks=callbacks,
        # Without these Lightning adds a bar and a checkpoint of its own where a user has taken ours away.
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    return trainer, built(cfg.objective)


def built(node: DictConfig, **arguments: Any) -> Any:
    """What `node` describes, with plain lists and dicts. A constructor's ValueError is the user's mistake: no
    traceback."""
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise ConfigError(str(error.__cause__).splitlines()) from error
        raise


def vocab_size(data: TextData) -> int:
    """How many ids the tokenizer has, or will have at most once it is trained."""
    try:
        return data.recipe.vocab_size
    except ValueError as error:  # a folder that holds no tokenizer
        raise ConfigError([f"tokenizer.{error}"]) from error


def _set_length(cfg: DictConfig, data: TextData) -> None:
    """Turn tokens or epochs into optimizer steps, which schedules and loops count in."""
    if cfg.trainer.max_steps is None:
        cfg.trainer.max_steps = data.n_steps(max_tokens=cfg.trainer.max_tokens, max_epochs=cfg.trainer.max_epochs)


def _fit(cfg: DictConfig, data: TextData, checkpoint: Path | None) -> Outcome:
    """Train, from `checkpoint` if there is one."""
    run_dir = Path(cfg.run_dir)
    inputs = _write_inputs(cfg, run_dir, data)
    trainer, objective = build(cfg)
    checkpoint_io = trainer.strategy.checkpoint_io
    assert isinstance(checkpoint_io, DirectoryIO), "every strategy of ours saves through our store"
    checkpoint_io.attachments = inputs
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    for logger in trainer.loggers:
        logger.log_hyperparams(settings)
    if checkpoint is not None:
        print(f"continuing from {checkpoint}")
    trainer.fit(objective, datamodule=data, ckpt_path=checkpoint)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # the next run of a sweep would go on writing into it
    write_exit(run_dir, 0, "finished", max_steps=trainer.max_steps)
    return Outcome(run_dir, trainer.global_step, _metrics(trainer))


def _validate(cfg: DictConfig, data: TextData, checkpoint: Path | None) -> Outcome:
    """Evaluate the weights of `checkpoint` on the held-out documents; nothing is recorded."""
    if checkpoint is None:
        raise CheckpointError(
            f"{cfg.run_dir}: no checkpoint to validate - give the run's run_name, run_dir or resume=PATH"
        )
    quiet = cfg.copy()
    quiet.callback, quiet.logger = {}, {}
    trainer, objective = build(quiet)
    trainer.validate(objective, datamodule=data, ckpt_path=checkpoint, verbose=False)
    outcome = Outcome(Path(cfg.run_dir), trainer.global_step, _metrics(trainer))
    print("\n".join(f"{name} {value:.4f}" for name, value in outcome.metrics.items()))
    return outcome


def _metrics(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _write_inputs(cfg: DictConfig, run_dir: Path, data: TextData) -> list[Path]:
    """What the run is made of, which every checkpoint carries a copy of: the resolved configuration and the
    tokenizer."""
    temporary = run_dir / ".config.yaml"
    temporary.write_text(OmegaConf.to_yaml(cfg, resolve=True))
    os.replace(temporary, run_dir / "config.yaml")
    data.tokenizer.save(run_dir / "tokenizer")
    return [run_dir / "config.yaml", run_dir / "tokenizer"]


def _accelerator(wanted: str) -> str:
    """What auto means: a GPU where torch drives one, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def speak() -> None:
    """Print what the rooms have to say (a long preparation, a damaged cache), message by message."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("llm").handlers = [handler]
    logging.getLogger("llm").setLevel(logging.INFO)


def _quiet() -> None:
    """Silence what Lightning tells users of its own data loaders and loops; ours are other ones."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if wandb_offline():  # where the files lie is said at the end; online, people want the link
        os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CONSOLE", "off")  # the progress bar is no record worth keeping
    for message in (
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*The dirpath has changed from.*",
        ".*every_n_train_steps, but no pre-optimization state was saved.*",
        ".*isinstance.treespec, LeafSpec.* is deprecated.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
    ):
        warnings.filterwarnings("ignore", message=message)
