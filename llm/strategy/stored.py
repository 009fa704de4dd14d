"""Checkpoints of a strategy, through our store."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from llm.checkpoint import CheckpointError, load_tensors, read_state, remove, save, stored_tensors, weights_of
from llm.lock import Lock

_OPTIMIZER = "optimizer."
log = logging.getLogger(__name__)


class Stored:
    """What the strategies share: every process writes and reads what it holds of weights and optimizer state, whatever
    lies where; so a run goes on under another strategy, or on another number of processes.

    Lightning asks for these methods. Before them in the order of base classes, this class answers first.

    Attributes:
        attachments: what is copied into every checkpoint: the run sets them to its resolved config and its tokenizer.
        background: write in a thread while training goes on.
        on_error: what a full or broken disk means: the end of the run, or a warning.
        lock: the run's, on the first process: who has lost it saves no more.
    """

    lightning_module: L.LightningModule | None
    optimizers: list[Optimizer]
    is_global_zero: bool
    lightning_restore_optimizer = True
    restore_checkpoint_after_setup = True  # weights are read into where they lie

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attachments: list[Path] = []
        self.background = False
        self.on_error: Literal["stop", "warn"] = "stop"
        self.lock: Lock | None = None
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None
        self._read_from = Path()

    # Saving

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """The weights, those that have two names under the first."""
        assert self.lightning_module is not None
        return weights_of(self.lightning_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """What the optimizer keeps of each parameter, under the parameter's name."""
        assert self.lightning_module is not None
        found: dict[str, Tensor] = {}
        for name, parameter in self.lightning_module.named_parameters():
            found |= {f"{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save the directory `filepath`; all processes call this."""
        self.finish_saving()
        if self.is_global_zero and self.lock is not None:
            self.lock.still()
        tensors: dict[str, Tensor] = checkpoint.pop("state_dict")
        for state in checkpoint.pop("optimizer_states", []):
            tensors |= {f"{_OPTIMIZER}{name}": value for name, value in state.items()}
        try:
            self._pending = save(
                Path(filepath), tensors, checkpoint, self.attachments, self._saving_group(), background=self.background
            )
        except OSError as error:
            self._failed(error)
        if not self.background:
            self.finish_saving()

    def finish_saving(self) -> None:
        """Wait until the last save is done, on every process."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if self.on_error == "stop":
            raise error
        if self.is_global_zero:
            log.warning("this checkpoint was not saved, and the run goes on without it: %s", error)

    def _saving_group(self) -> dist.ProcessGroup | None:
        """Its own, as a thread may use it while training uses the others."""
        if self._group is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        return self._group

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete what retention no longer wants, once a newer one is there."""
        if self.is_global_zero:
            remove(Path(filepath))

    # Loading

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The plain data of a checkpoint; weights and optimizer state stay there until it is known where they go."""
        self._read_from = Path(checkpoint_path)
        return {**read_state(self._read_from), "state_dict": {}, "optimizer_states": []}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read every weight into where it lies."""
        weights = self.lightning_module_state_dict()
        stored = stored_tensors(self._read_from)
        saved = {name: whole.shape for name, whole in stored.items() if not name.startswith(_OPTIMIZER)}
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        if saved != shapes:
            lines = [f"  {name}: in the model, not in the checkpoint" for name in shapes if name not in saved]
            lines += [f"  {name}: in the checkpoint, not in the model" for name in sorted(saved.keys() - shapes.keys())]
            lines += [
                f"  {name}: {saved[name]} in the checkpoint, {shape} in the model"
                for name, shape in shapes.items()
                if saved.get(name, shape) != shape
            ]
            raise CheckpointError(
                f"{self._read_from}: is of another model - give the run that it was\n" + "\n".join(lines)
            )
        load_tensors(weights, self._read_from)
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(weights, strict=False)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read what the optimizer keeps of each parameter into where that lies."""
        assert self.lightning_module is not None
        names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        saved: dict[str, dict[str, Any]] = {}
        for name, whole in stored_tensors(self._read_from).items():
            parameter_name, _, key = name.rpartition(".")
            saved.setdefault(parameter_name, {})[key] = whole
        for optimizer in self.optimizers:
            tensors: dict[str, Tensor] = {}
            state: dict[int, dict[str, Tensor]] = {}
            for number, parameter in enumerate(_parameters(optimizer)):
                name = f"{_OPTIMIZER}{names[id(parameter)]}"
                mine = {
                    key: _room_for(whole.shape, whole.dtype, parameter) for key, whole in saved.get(name, {}).items()
                }
                if mine:
                    state[number] = mine
                tensors |= {f"{name}.{key}": value for key, value in mine.items()}
            load_tensors(tensors, self._read_from)
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    """In the order in which an optimizer's state numbers them."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _room_for(shape: tuple[int, ...], dtype: torch.dtype, parameter: nn.Parameter) -> Tensor:
    """An empty tensor that lies as the parameter does, if it is as large; else one of this process's own."""
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)
