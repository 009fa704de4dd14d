"""Of two answers the better one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor

from llm.adapter import switched_off
from llm.checkpoint import load_into
from llm.guard import Guard
from llm.model import Transformer, TransformerConfig
from llm.objective.base import Objective
from llm.objective.given import Adapter, Batch, OptimizerRecipe
from llm.objective.loss import IGNORED, Loss, n_labels


class Preference(Objective):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7): the model is to prefer the
    chosen answer over the rejected one by more than the model does that it began as, the reference.

    With an adapter the reference is the network without it; else a copy of the weights that `init_from` names, which is
    held beside the network on every device, and which no checkpoint holds.

    A batch holds `tokens`, `labels`, `documents` and `positions`, all [B, T], of chosen answers behind their prompts,
    the same of rejected ones under `rejected_…`, document n of a row being the other answer to the same prompt, and
    `pairs` [B, P], IGNORED where a row has fewer than P.

    Args:
        beta: how far the model may go from the reference: less for larger ones.

    Validation adds how often the chosen answer is preferred, `val/accuracy`, and by how much, `val/margin`.
    """

    family: ClassVar[str] = "decoder"
    answers: ClassVar[str] = "preference"

    def __init__(
        self,
        model: TransformerConfig,
        optimizer: OptimizerRecipe,
        schedule: Callable[[int], float],
        guard: Guard | None = None,
        init_from: str | None = None,
        logits_at_once: Annotated[int, Gt(0)] | None = None,
        adapter: Adapter | None = None,
        beta: Annotated[float, Gt(0)] = 0.1,
    ) -> None:
        super().__init__(model, optimizer, schedule, guard, init_from, logits_at_once, adapter)
        if init_from is None:
            raise ValueError("init_from=null: a preference is measured against the weights that training starts from")
        self.beta = beta
        self._reference: tuple[Transformer, ...] = ()  # in a tuple: no part of the module, nor of its checkpoints

    def on_fit_start(self) -> None:
        """Start from other weights, and keep them."""
        super().on_fit_start()
        self._keep_reference()

    def on_validation_start(self) -> None:
        """Alone, too."""
        self._keep_reference()

    def counts(self, batch: Batch) -> dict[str, int]:
        """The pairs."""
        return dict.fromkeys(("loss", "accuracy", "margin"), n_labels(batch["pairs"]))

    def losses(self, batch: Batch) -> dict[str, Loss]:
        """In nats; margins in nats of both answers together, times beta."""
        real = batch["pairs"] != IGNORED  # [B, P]
        chosen, rejected = (self._log_probability(batch, side) for side in ("", "rejected_"))
        with torch.no_grad():
            before = [self._log_probability(batch, side, reference=True) for side in ("", "rejected_")]
        margins = self.beta * ((chosen - before[0]) - (rejected - before[1]))  # [B, P]
        nats = -F.logsigmoid(margins) * real
        told = margins.detach()
        return {
            "loss": Loss(nats.sum(), rows=(nats.detach().sum(1), real.sum(1))),
            "accuracy": Loss(((told > 0) & real).sum(), weight=0.0),
            "margin": Loss((told * real).sum(), weight=0.0),
        }

    def _log_probability(self, batch: Batch, side: str, *, reference: bool = False) -> Tensor:
        """log p of what is learnt of each document: [B, P], float32."""
        network = self._reference[0] if reference and self._reference else self.network
        off: AbstractContextManager[Any] = self._as_it_was(network) if reference else nullcontext()
        documents, labels = batch[f"{side}documents"], batch[f"{side}labels"]
        with off:
            hidden = network(batch[f"{side}tokens"], documents=documents, positions=batch[f"{side}positions"])
            flat, wanted = hidden.flatten(0, 1), labels.flatten()
            nats = self.nats(flat, wanted, network=network)
        n_pairs = batch["pairs"].shape[1]
        by_document = nats.new_zeros(len(labels), n_pairs + 1).scatter_add(1, documents, nats.view_as(labels))
        return -by_document[:, 1:]  # document 0 is padding

    @contextmanager
    def _as_it_was(self, network: Transformer) -> Iterator[None]:
        """Without its adapter, and without dropout, for which there is no reason in a reference."""
        training = network.training
        network.eval()
        try:
            with switched_off(network):
                yield
        finally:
            network.train(training)

    def _keep_reference(self) -> None:
        if self.adapter is not None or self._reference:
            return
        assert self.init_from is not None
        network = Transformer(self.model_config).requires_grad_(False).eval()
        load_into(network, self.init_from)
        network.to(self.device, self.network.embed.weight.dtype)  # as exact as what it is compared with
        network.mask_way = self.network.mask_way
        self._reference = (network,)
