"""A run: check, agree, claim the directory, prepare the data, build, and train."""

from __future__ import annotations

import gc
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from hydra.utils import get_class
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from llm import attempts, signals
from llm.agree import (
    agree,
    agree_with_checkpoint,
    agree_with_first,
    agree_with_network,
    agree_with_weights,
    began_with,
    label_of,
    own_checkpoint,
    vocab_size,
)
from llm.build import build, built
from llm.callback import Preempt, tell
from llm.checkpoint import (
    configuration_at,
    find,
    newest_verified,
    oldest_verified,
    read_state,
    remove_after,
    set_aside_damaged,
    sweep,
)
from llm.config import ConfigError, check
from llm.console import quiet, speak
from llm.data import DataError, TextData
from llm.exit import RunExistsError, as_rank, before_begun, finished, guarded, recorded, write_end
from llm.guard import DivergedError, RollBackError, Window
from llm.launch import place
from llm.lock import FOLDER, Lock
from llm.machine import accelerator, keep_freed_memory, precision
from llm.model import Pretrained, node_of
from llm.signals import PreemptedError
from llm.strategy import Rendezvous, Stored, first_to_fail, leave, meet, see_off

_BEFORE = (FOLDER, "jobs", "exit.json")  # what lies in a run directory before there is a run
_log = logging.getLogger(__name__)


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
        DivergedError: the loss or the gradient went wrong, and the guard could not help it.
        PreemptedError: the run was told to stop, and saved.
    """
    signals.begin()
    check(cfg)
    cfg = cfg.copy()
    quiet()
    cfg.trainer.accelerator = accelerator(cfg.trainer.accelerator)
    cfg.trainer.precision = precision(cfg.trainer.precision, cfg.trainer.accelerator)
    if cfg.trainer.accelerator == "cpu":
        keep_freed_memory()
    together = meet()
    signals.raise_at_once()
    here = together.here
    as_rank(here.rank, here.world_size, watched=here.launcher == "launch")
    data, objective = settled(cfg)
    agree(cfg, built(cfg.model), data, built(cfg.strategy), together.here, objective)
    agree_with_first(cfg, together.share("config", lambda: OmegaConf.to_container(cfg, resolve=True)))
    try:
        outcome = _validate(cfg, data, together) if cfg.stage == "validate" else _fit(cfg, data, together)
    except PreemptedError as told:
        if told.together:
            leave()
        raise
    leave()
    return outcome


def settled(cfg: DictConfig) -> tuple[TextData, type]:
    """Fill in what of the model follows from the weights and the data; gives the data and the objective's class."""
    data: TextData = built(cfg.data)
    model = built(cfg.model)
    if isinstance(model, Pretrained):
        cfg.model = _model_of_weights(model, own_checkpoint(cfg) or cfg.init_from, data)
    cfg.model.vocab_size = cfg.model.vocab_size or vocab_size(data)
    if cfg.model.get("n_labels") is None and data.n_labels is not None:
        OmegaConf.update(cfg, "model.n_labels", data.n_labels, force_add=True)
        OmegaConf.update(cfg, "model.label_of", label_of(data), force_add=True)
    return data, get_class(cfg.objective._target_)


def main(cfg: DictConfig) -> None:
    """`run`, for a shell: a mistake of the user's is one line, a bug a traceback, and each has its exit code."""
    speak()
    with guarded(first_to_fail, see_off):
        run(cfg)


def prepare(cfg: DictConfig, share: tuple[int, int] | None = None) -> None:
    """Make the tokenizer and the token cache of `cfg`, and print what they hold; with `share` (number, of) that part of
    the token files, and the rest if it is the last one.

    Raises:
        ConfigError: if there is no such share.
    """
    check(cfg)
    speak()
    data: TextData = built(cfg.data)
    vocab_size(data)  # a folder without a tokenizer is refused before any text is read
    if share is not None:
        try:
            complete = data.prepare_share(*share)
        except DataError:
            raise
        except ValueError as error:
            raise ConfigError([str(error)]) from error
        if not complete:
            print(f"share {share[0]}/{share[1]}: made; others are not there yet")
            return
    data.prepare()
    print(yaml.safe_dump(data.report(), sort_keys=False))


def stage(cfg: DictConfig, folder: Path) -> None:
    """Prepare the data of `cfg`, or find it, and copy it to another cache directory."""
    check(cfg)
    speak()
    data: TextData = built(cfg.data)
    vocab_size(data)
    data.prepare()
    data.stage(folder)


def claim(run_dir: Path, resume: str, lock: Lock) -> str | None:
    """Make the run directory, lock it, and say which checkpoint to go on from; None starts at step 0.

    Raises:
        RunExistsError: if there is a run and `resume` is never.
        LockedError: if another process writes into it.
        CheckpointError: if there are checkpoints, and all are damaged.
        OSError: naming the key, if the directory cannot be made.
    """
    if resume == "never" and run_dir.exists() and any(path.name not in _BEFORE for path in run_dir.iterdir()):
        raise RunExistsError(
            f"run_dir: {run_dir} exists - resume=never does not write into an existing run - "
            f"give another run_name, or resume=auto to continue it"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.take()
    except OSError as error:
        raise OSError(f"run_dir: {run_dir} - cannot be made ({error.strerror}) - give another run_dir") from error
    sweep(run_dir)
    checkpoint = newest_verified(run_dir)  # requeued, a run goes on where it is, not where it came from
    if checkpoint is not None:
        set_aside_damaged(run_dir, checkpoint)
    if checkpoint is None and resume not in ("auto", "must", "never"):
        checkpoint = find(resume)
    return None if checkpoint is None else str(checkpoint)


def _model_of_weights(model: Pretrained, init_from: str | Path | None, data: TextData) -> dict[str, Any]:
    """The node of the model whose weights `init_from` names."""
    if init_from is None:
        raise ConfigError(["model: pretrained - is that of the weights to start from - set init_from=FOLDER or RUN"])
    weights = configuration_at(init_from)
    if weights is None:
        remedy = f"python -m llm import {init_from} OUT, then init_from=OUT"
        raise ConfigError([f"model: pretrained - {init_from} does not say its model - {remedy}"])
    try:
        return node_of(model.of(weights, data.n_labels, label_of(data)))
    except ValueError as error:
        raise ConfigError([f"model: pretrained - {init_from} is a model.family={weights.family} - {error}"]) from error


def _set_length(cfg: DictConfig, data: TextData) -> None:
    """Turn tokens or epochs into optimizer steps, which schedules and loops count in."""
    if cfg.trainer.max_steps is None:
        cfg.trainer.max_steps = data.n_steps(max_tokens=cfg.trainer.max_tokens, max_epochs=cfg.trainer.max_epochs)


def _fit(cfg: DictConfig, data: TextData, together: Rendezvous) -> Outcome:
    """Train, on from a checkpoint if there is one. Nothing but `exit.json` is written before all that
    can be refused has been."""
    run_dir = Path(cfg.run_dir)
    lock = Lock(run_dir)
    found = together.share("claim", lambda: claim(run_dir, cfg.resume, lock))
    try:
        return _trained(cfg, data, together, found, lock)
    finally:
        lock.release()


def _trained(cfg: DictConfig, data: TextData, together: Rendezvous, found: str | None, lock: Lock) -> Outcome:
    run_dir = Path(cfg.run_dir)
    _log.info("%s: preparing the data", run_dir)
    world_size = together.here.world_size
    with before_begun(run_dir):
        together.once_per_node("data", data.prepare)
        data.prepare()  # which finds what was made
        _set_length(cfg, data)
        step = together.share("start", lambda: _start(cfg, data, found, world_size))
        cfg.init_from = together.share("weights", lambda: began_with(cfg, data, None if found is None else Path(found)))
    if step is not None:
        _log.info("%s: finished already, at step %d; a larger trainer.max_steps continues it", run_dir, step)
        return Outcome(run_dir, step, {})
    with attempts.attempted(run_dir, first=together.here.rank == 0), recorded(run_dir):
        back = _Back()
        while True:
            outcome = _attempt(cfg, data, together, found, lock, back)
            if isinstance(outcome, Outcome):
                return outcome
            found = together.share(f"back {len(back.windows)}", partial(_go_back, run_dir, outcome, found))
            back.windows.append(outcome)
            back.targets.append(found)
            if back.targets.count(found) > cfg.guard.attempts:
                where = "the start" if found is None else Path(found).name
                raise DivergedError(
                    f"step {outcome.step}: {outcome.cause}, and the run has gone back to {where} {cfg.guard.attempts} "
                    f"times (guard.attempts); python -m llm audit {run_dir} names the batches"
                )
            gc.collect()  # the last attempt's network and optimizer, which refer to each other


@dataclass
class _Back:
    """Where this process's run has gone back to, and which batches it has left out."""

    windows: list[Window] = field(default_factory=list)
    targets: list[str | None] = field(default_factory=list)


def _attempt(
    cfg: DictConfig, data: TextData, together: Rendezvous, found: str | None, lock: Lock, back: _Back
) -> Outcome | Window:
    """Train to the end, or until batches have to be left out."""
    run_dir = Path(cfg.run_dir)
    trainer, objective = build(cfg)
    for window in back.windows:
        objective.guard.leave_out(window)
    _continue_wandb(trainer, run_dir)
    assert isinstance(trainer.strategy, Stored), "every strategy of ours saves through our store"
    trainer.strategy.attachments = _write_inputs(cfg, run_dir, data)
    trainer.strategy.lock, objective.continues = lock, found is not None
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    world_size = together.here.world_size
    _log.info(
        f"{run_dir}: {cfg.trainer.max_steps:,} steps of {data.tokens_per_step:,.0f} tokens, "
        f"{cfg.trainer.accelerator}{'' if world_size == 1 else f' x {world_size}'}, {cfg.trainer.precision}"
    )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    asked = any(isinstance(callback, Preempt) for callback in callbacks)
    with signals.kept() if asked else signals.unheard():
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)
        # Rank 0 has taken the end of the last attempt away, and all keep signals.
        together.all_here(f"attempt {len(back.windows)}")
        try:
            with together.naming_lost():
                _entered(trainer.fit, objective, datamodule=data, ckpt_path=found)
        except RollBackError as error:  # on all processes
            trainer.strategy.finish_saving()  # in the background, of a step before
            _finish_wandb(trainer)
            return error.window
        if not trainer.is_global_zero:
            signals.ignore()  # all is saved; whether the run has ended is now for the first to say
        together.share("end", lambda: _end(trainer, run_dir))
    signals.ignore()
    return Outcome(run_dir, trainer.global_step, _metrics(trainer))


def _go_back(run_dir: Path, window: Window, found: str | None) -> str | None:
    """The checkpoint that lies before the window, or the first there is; those after it are of what is undone.

    Raises:
        CheckpointError: if there are checkpoints, and all are damaged.
    """
    target = newest_verified(run_dir, window.first) or oldest_verified(run_dir)
    if target is not None:
        remove_after(target)
        found = str(target)
    without = f"without batches {window.first} to {window.last}"
    _log.warning("step %d: %s; back to %s, %s", window.step, window.cause, found or "the start", without)
    return found


def _end(trainer: L.Trainer, run_dir: Path) -> None:
    """Nothing is left to be trained: what is left is to say so."""
    signals.raise_at_once()
    _finish_wandb(trainer)
    write_end(run_dir, trainer.global_step, trainer.max_steps)


def _finish_wandb(trainer: L.Trainer) -> None:
    """Whatever comes next in this process would go on writing into it."""
    tell(trainer, lambda logger: logger.experiment.finish() if isinstance(logger, WandbLogger) else None)


def _continue_wandb(trainer: L.Trainer, run_dir: Path) -> None:
    """One run here is one run there, from its first attempt on, whatever becomes of that; offline each attempt is
    another folder, which `wandb sync` adds to the first."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if not loggers or place().rank > 0:
        return
    path = run_dir / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    for logger in loggers:
        if logger._wandb_init.get("id") is None:
            logger._wandb_init |= {"id": path.read_text(), "resume": "allow"}


def _start(cfg: DictConfig, data: TextData, checkpoint: str | None, world_size: int) -> int | None:
    """Whether the run that `cfg` describes can go on, or begin; the step it is at if there is nothing left to do."""
    run_dir, at = Path(cfg.run_dir), 0
    if checkpoint is not None:
        step = finished(run_dir, cfg.trainer.max_steps)
        if step is not None:
            return step
        agree_with_checkpoint(cfg, data, Path(checkpoint))
        at = read_state(Path(checkpoint))["global_step"]
        _log.info("continuing from %s", checkpoint)
    elif cfg.init_from is not None:
        agree_with_weights(data, cfg.init_from)
    attempts.begin(run_dir, at, world_size)
    return None


def _validate(cfg: DictConfig, data: TextData, together: Rendezvous) -> Outcome:
    """Evaluate a checkpoint on the held-out documents; nothing is recorded."""
    given = cfg.resume not in ("auto", "must")
    checkpoint = together.share("checkpoint", lambda: str(find(cfg.resume if given else cfg.run_dir)))
    together.once_per_node("data", data.prepare)
    data.prepare()
    agree_with_network(cfg, data, Path(checkpoint))
    cfg.init_from = began_with(cfg, data, Path(checkpoint))
    cfg.trainer.max_steps = cfg.trainer.max_steps or 1  # not trained, so of no consequence
    quiet = cfg.copy()
    quiet.callback, quiet.logger = {}, {}
    trainer, objective = build(quiet)
    _entered(trainer.validate, objective, datamodule=data, ckpt_path=checkpoint, verbose=False)
    outcome = Outcome(Path(cfg.run_dir), trainer.global_step, _metrics(trainer))
    for name, value in outcome.metrics.items():
        _log.info("%s %.4f", name, value)
    return outcome


def _entered(entry_point: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Call a method of the trainer; what Lightning refuses about the configuration is the user's mistake."""
    try:
        entry_point(*arguments, **options)
    except MisconfigurationException as error:
        raise ConfigError(str(error).splitlines(), started=True) from error


def _metrics(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _write_inputs(cfg: DictConfig, run_dir: Path, data: TextData) -> list[Path]:
    """What the run is made of, which every checkpoint carries a copy of: the resolved configuration and the
    tokenizer. The first process writes it, as it writes the checkpoints."""
    if place().rank > 0:
        return []
    temporary = run_dir / ".config.yaml"
    temporary.write_text(OmegaConf.to_yaml(cfg, resolve=True))
    os.replace(temporary, run_dir / "config.yaml")
    data.tokenizer.save(run_dir / "tokenizer")
    return [run_dir / "config.yaml", run_dir / "tokenizer"]
