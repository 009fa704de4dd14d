"""How large the activations of a network are, and how far training moves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from llm.objective import Objective

Activations = dict[str, list[Tensor]]  # module -> its output, each time that it was called


class Size(NamedTuple):
    """Means of absolute values: of an activation, and of its difference to what it was before the first step."""

    now: float
    change: float


class Coordinates(Callback):
    """Sizes on one micro-batch, the run's first, before the first step and after each: of the embedding, of the logits,
    and of each block's attention and feed-forward.

    sizes   for each step, from 0 on, the name of a module -> Size
    """

    def __init__(self) -> None:
        self.sizes: list[dict[str, Size]] = []
        self._probe: Any = None
        self._before: Activations = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first batch, and what the network makes of it untrained."""
        if self._probe is None:
            self._probe = batch.micro_batches[0]
            self._before = activations(pl_module, self._probe)
            self._measure(self._before)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What the step has changed."""
        self._measure(activations(pl_module, self._probe))

    def _measure(self, found: Activations) -> None:
        self.sizes.append(
            {
                name: Size(_mean(outputs), _mean([a - b for a, b in zip(outputs, self._before[name], strict=True)]))
                for name, outputs in found.items()
            }
        )


def activations(objective: L.LightningModule, batch: Any) -> Activations:
    """What modules of the network give for a micro-batch, without dropout."""
    assert isinstance(objective, Objective)
    training = objective.training
    objective.eval()
    with torch.no_grad(), _listening(objective.network) as found:
        objective.losses(batch)
    objective.train(training)
    return found


@contextmanager
def _listening(network: nn.Module) -> Iterator[Activations]:
    found: Activations = {}
    handles = []
    for name, module in network.named_modules():
        if name in ("embed", "head") or name.endswith(("attention", "feed_forward")):
            told = "logits" if name == "head" else name

            def tell(_: nn.Module, __: Any, output: Tensor, told: str = told) -> None:
                found.setdefault(told, []).append(output.detach())

            handles.append(module.register_forward_hook(tell))
    yield found
    for handle in handles:
        handle.remove()


def _mean(tensors: list[Tensor]) -> float:
    return sum(tensor.double().abs().mean().item() for tensor in tensors) / len(tensors)
