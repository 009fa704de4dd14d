"""The step: the one place where a batch becomes a change of the weights.

One Lightning batch is one optimizer step. It arrives as this process's micro-batches of the whole global step, so the
count that normalises the loss is known before the first backward, gradients are synchronised once, and the global batch
means the same whatever the number of processes and the size of a micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import lightning as L
import torch
from annotated_types import Gt
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from llm.checkpoint import load_into, starting_anew
from llm.guard import Guard, Stop
from llm.metric import unigram_nats
from llm.model import Transformer, TransformerConfig
from llm.objective import fused
from llm.objective.given import Adapter, Batch, OptimizerRecipe, Step
from llm.objective.loss import IGNORED, Loss, Reduction, of_rows, token_nats
from llm.objective.scale import Scale, plus, start
from llm.reduce import Reading, Sum, Totals, all_sum, clip_gradients, from_first

# What a step counts and finds. nn.Module asks of everything that is set whether it is a parameter, a module or a
# buffer, which takes microseconds each time.
_OF_A_STEP = frozenset({"n_batches", "lr", "step_loss", "skipped", "trouble", "_watched"})


class Objective(L.LightningModule):
    """A Transformer, its loss, and the optimizer step; subclasses say what the loss is.

    Args:
        model: configuration of the network, which is built in `configure_model`, where the strategy wants it built.
        optimizer: recipe of the optimizer.
        schedule: factor of the learning rate for each step.
        guard: what becomes of the run if a step is not finite, or its loss a spike; None stops it.
        init_from: run or step directory whose weights the training starts from; a resumed run overrides it.
        logits_at_once: positions whose scores over the vocabulary are in memory at the same time; None: those of a
            whole micro-batch, which is fastest.
        adapter: what is put around layers of the network, and trained in their place; None trains all.

    Raises ValueError if the model is of another family than `family`, which a subclass names.
    """

    family: ClassVar[str | None] = None
    answers: ClassVar[str] = "vocabulary"  # what is chosen from: that, a label, tags or a span
    predicts: ClassVar[str] = "labels"  # the field of a batch that holds what is to be predicted
    label_smoothing: float = 0.0  # of the training's loss
    fused: bool = False  # whether the loss over the vocabulary has kernels of its own; a strategy for GPUs says so

    def __init__(
        self,
        model: TransformerConfig,
        optimizer: OptimizerRecipe,
        schedule: Callable[[int], float],
        guard: Guard | None = None,
        init_from: str | None = None,
        logits_at_once: Annotated[int, Gt(0)] | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        if self.family not in (None, model.family):
            raise ValueError(
                f"model.family={model.family}: {type(self).__name__} trains a model.family={self.family}; "
                "take another objective= or model="
            )
        self.automatic_optimization = False
        self.model_config, self.optimizer_recipe = model, optimizer
        self.schedule, self.guard = schedule, guard or Stop()
        self.init_from = init_from
        self.continues = False  # the run says whether Lightning is about to restore a checkpoint
        self.logits_at_once, self.adapter = logits_at_once, adapter
        self.model: Transformer | None = None
        self.n_batches = 0  # batches consumed: where the data goes on after a restart
        self.lr: float  # of the last step, where a parameter has no factor of its own
        self.step_loss: Sum  # sum and count of the last step, of this process
        self.skipped: str | None = None  # why the last step made no update
        self.trouble: Exception | None = None  # what ends this fit, on all processes
        self._watched: tuple[int, Reading] | None = None  # a step that is still to be judged
        self.task_names: list[str] = []  # that the data mixes, in the order in which a batch's `tasks` number them
        self.label_names: list[str] = []  # that the data has, in the order of the classifier's scores
        self.anew: list[str] = []  # names of weights that `init_from` lacks, of a network with an adapter
        self.train_totals = Totals()
        self.val_totals = Totals()
        self.label_counts: Tensor | None = None  # int64 [V], of the labels validated so far
        self.unigram_loss: float | None = None  # nats per label that their frequencies alone would reach

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_A_STEP:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # What a subclass says

    def counts(self, batch: Batch) -> dict[str, int]:
        """Name of each part of the loss -> how much of it this micro-batch predicts; from labels on the host."""
        raise AssertionError(f"{type(self).__name__} has to count what it predicts")

    def losses(self, batch: Batch) -> dict[str, Loss]:
        """Name of each part of the loss -> its sum and weight over this micro-batch."""
        raise AssertionError(f"{type(self).__name__} has to say what its loss is")

    def validation_sums(self, batch: Batch, parts: dict[str, Loss]) -> dict[str, Sum]:
        """Name -> (sum, count) of what validation adds up beside the parts of the loss."""
        return {}

    def validation_metrics(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        """Log name -> value, from the sums over the whole validation set."""
        return {f"val/{name}": value for name, value in self.means(totals).items()}

    def means(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        """Name -> mean, of training or validation; what nothing was counted of is left out, apart from the loss."""
        return {name: total / max(count, 1.0) for name, (total, count) in totals.items() if count or name == "loss"}

    def token_loss(self, hidden: Tensor, labels: Tensor) -> Loss:
        """Cross-entropy in nats of every position with a label: hidden [B, T, D], labels [B, T]."""
        if self.by_row:
            return of_rows(self.nats(hidden.flatten(0, 1), labels.flatten()), labels)
        return Loss(self.nats(hidden.flatten(0, 1), labels.flatten(), "sum"))

    def nats(
        self, hidden: Tensor, labels: Tensor, reduction: Reduction = "none", network: Transformer | None = None
    ) -> Tensor:
        """-log p(label) of each position, 0 where nothing is predicted, or their sum: hidden [N, D], labels [N]; by the
        head of the objective's network or of another one.

        Scores are the largest tensors of a step: as wide as the vocabulary, and kept for the backward several times
        over. With `logits_at_once` there are only so many, and the backward computes them again.
        """
        network = network or self.network
        if self.logits_at_once is None:
            return self._nats(network, hidden, labels, reduction)
        parts = zip(hidden.split(self.logits_at_once), labels.split(self.logits_at_once), strict=True)
        # Nothing is drawn in there: the generators' state need not be kept.
        found = [
            checkpoint(self._nats, network, *part, reduction, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        return torch.cat(found) if reduction == "none" else torch.stack(found).sum()

    def _nats(self, network: Transformer, hidden: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        logits, n_tokens = network.logits(hidden, padded=True), network.config.vocab_size
        assert n_tokens is not None
        if self.fused and network is self.network:  # prepared by the strategy
            nats = fused.token_nats(logits, labels, n_tokens, smoothing)
            return nats if reduction == "none" else nats.sum()
        return token_nats(logits[:, :n_tokens], labels, reduction, smoothing)

    # Building

    def configure_model(self) -> None:
        """Build the network once; Lightning calls this again on every entry point."""
        if self.model is None:
            self.model = Transformer(self.model_config)
            if self.adapter is not None:
                self.adapter.attach(self.model, self.anew)

    def configure_optimizers(self) -> Optimizer:
        """The one optimizer, each group with the peak rate that the schedule multiplies."""
        optimizer = self.optimizer_recipe.build(self.network)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.settings = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        return optimizer

    @property
    def network(self) -> Transformer:
        """The network, which exists from `configure_model` on."""
        assert self.model is not None, "the network is built in configure_model"
        return self.model

    def setup(self, stage: str) -> None:
        """Learn what the data is made of, and what an adapter cannot be put on."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.task_names = list(getattr(data, "task_names", ()))
        self.label_names = list(getattr(data, "labels", ()))
        if stage == "fit" and self.adapter is not None and self.init_from is not None:
            self.anew = starting_anew(self.model_config, self.init_from)

    def on_fit_start(self) -> None:
        """Start from other weights."""
        if self.init_from is not None and not self.continues:
            load_into(self.network, self.init_from, self.label_names)

    def on_train_start(self) -> None:
        """A checkpoint brings back the optimizer's state; its settings are those of this run's configuration."""
        for group, settings in zip(self._optimizer().param_groups, self.settings, strict=True):
            group.update(settings)

    # The step

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count what is predicted while the labels are on the host, where that costs no kernels."""
        batch.counts = [self.counts(micro_batch) for micro_batch in batch.micro_batches]
        return batch

    def training_step(self, batch: Step, batch_index: int) -> None:
        """Forward and backward over every micro-batch, then clip, step and zero: no host sync on the way."""
        assert batch.index == self.n_batches, f"batch {batch.index} came where {self.n_batches} was due"
        optimizer = self._optimizer()
        self.set_learning_rate(optimizer)
        self.n_batches = batch.index + 1
        if batch.index in self.guard.left_out:
            self._leave_out(batch, optimizer)
            return
        sums = self._gradient(batch)
        norm = self.clip_gradients_to_norm(optimizer)
        self.step_loss = sums["loss"]
        self._watch(norm)
        if self.skipped is not None:
            optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing
        optimizer.step()
        self._drop_gradients(optimizer)
        if self.skipped is not None:
            return
        self.train_totals.add({**sums, "n_tokens": (batch.n_tokens, 1), "grad_norm": (norm, 1)})

    def _gradient(self, batch: Step) -> dict[str, Sum]:
        """The gradient of the whole step; gives name -> (sum, count) of this process."""
        scale = Scale(batch.counts, self.device)
        sums: dict[str, Sum] = {}
        for number, (micro_batch, counts) in enumerate(zip(batch.micro_batches, batch.counts, strict=True), 1):
            with self.gradient_sync(last=number == len(batch.micro_batches)):
                parts = self.losses(micro_batch)
                loss, gradient = start(parts, scale)
                self.manual_backward(loss, gradient=gradient)
            added = self.sums(parts, counts, micro_batch)
            sums = added if number == 1 else {name: plus(sums[name], more) for name, more in added.items()}
        return sums

    def _drop_gradients(self, optimizer: LightningOptimizer) -> None:
        """At once, not before the next backward: the old gradients would live through the next forward."""
        if getattr(self.trainer.strategy, "keeps_gradients", False):
            optimizer.zero_grad(set_to_none=False)
            return
        for group in optimizer.param_groups:  # the optimizer's own way opens a profiler's range each time
            for parameter in group["params"]:
                parameter.grad = None

    # The guard

    def _leave_out(self, batch: Step, optimizer: LightningOptimizer) -> None:
        """A step without an update."""
        self.settle()
        self.skipped = "left out"
        self.step_loss = torch.zeros((), device=self.device), 0
        optimizer.zero_grad(set_to_none=True)
        optimizer.step()

    def _watch(self, norm: Tensor) -> None:
        """Judge this step if its update has to wait for that; else the one before, whose numbers have arrived by now:
        nobody waits for the device."""
        self.skipped = None
        values = norm  # it says enough, and is that of all processes
        if self.guard.sigma is not None:
            total, count = self.step_loss
            n = torch.full_like(total, float(count), dtype=torch.float64)
            values = torch.stack([norm.double(), total.double(), n])
            all_sum(values[1:])
            values = from_first(values)
        if not self.guard.before_update:
            self.settle()
        self._watched = self.n_batches, Reading(values)
        if self.guard.before_update:
            self.skipped = self.settle()

    def settle(self) -> str | None:
        """Judge the step that is still to be judged; gives what is wrong with it. All processes call this."""
        if self._watched is None:
            return None
        (step, reading), self._watched = self._watched, None
        norm, *loss = reading.read()
        cause = self.guard.judge(norm, loss[0] / max(loss[1], 1.0) if loss else None)
        if cause is not None and self.trouble is None:  # else it is what followed from that
            self.trouble = self.guard.respond(step, cause)
        return cause

    def on_train_batch_end(self, outputs: Any, batch: Step, batch_index: int) -> None:
        """After all callbacks, which have seen what was consumed."""
        self._raise_trouble()

    def on_train_epoch_end(self) -> None:
        """The last step is still to be judged."""
        self.settle()
        self._raise_trouble()

    def _raise_trouble(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    def sums(self, parts: dict[str, Loss], counts: dict[str, int], batch: Batch) -> dict[str, Sum]:
        """Name -> (sum, count) of every part and, of several tasks in one run, of the loss of each: `loss/TASK`."""
        sums: dict[str, Sum] = {name: (part.total.detach(), counts[name]) for name, part in parts.items()}
        tasks, rows = self.task_names, parts["loss"].rows
        if len(tasks) < 2 or rows is None:
            return sums
        of_task = batch["tasks"].unsqueeze(1) == torch.arange(len(tasks), device=batch["tasks"].device)  # [B, tasks]
        totals, n_predicted = ((values.unsqueeze(1) * of_task).sum(0) for values in rows)
        return {**sums, **{f"loss/{name}": (totals[i], n_predicted[i]) for i, name in enumerate(tasks)}}

    @property
    def by_row(self) -> bool:
        """Whether somebody will ask for the loss of single rows: validation, and several tasks in one run."""
        return not self.training or len(self.task_names) > 1

    def _optimizer(self) -> LightningOptimizer:
        """Wrapped: its `step` is what the trainer counts."""
        optimizer = self.optimizers(use_pl_optimizer=True)
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    def set_learning_rate(self, optimizer: LightningOptimizer) -> None:
        """A pure function of the batch number, so that nothing about it has to be saved."""
        factor = self.schedule(self.n_batches)
        self.lr = self.optimizer_recipe.lr * factor
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients travel between processes only in the backward of the last micro-batch."""
        strategy = self.trainer.strategy
        block = getattr(strategy, "block_backward_sync", None)
        return contextlib.nullcontext() if last or block is None else block()

    def clip_gradients_to_norm(self, optimizer: LightningOptimizer) -> Tensor:
        """Scale the gradient down to `clip_norm`; returns its L2 norm before that, on the device."""
        groups = optimizer.param_groups  # walking the network for its parameters takes longer
        return clip_gradients((p for group in groups for p in group["params"]), self.optimizer_recipe.clip_norm)

    # Validation

    def validation_step(self, batch: Step, batch_index: int) -> None:
        """Add the sums of as many rows as a training step has; nothing is read back until the end."""
        for micro_batch, counts in zip(batch.micro_batches, batch.counts, strict=True):
            parts = self.losses(micro_batch)
            self.val_totals.add({**self.sums(parts, counts, micro_batch), **self.validation_sums(micro_batch, parts)})
            self._count_labels(micro_batch[self.predicts])

    def on_validation_epoch_end(self) -> None:
        """One reduction for the whole set; `callback_metrics` is where checkpoints and early stopping look."""
        totals = self.val_totals.reduce()
        if totals:
            self.log_dict(self.validation_metrics(totals), logger=False)
        if self.label_counts is not None:
            self.unigram_loss = unigram_nats(all_sum(self.label_counts).tolist())
            self.label_counts = None

    def _count_labels(self, labels: Tensor) -> None:
        """How often each token is to be predicted: the least that a model has to know."""
        if self.label_counts is None:
            self.label_counts = labels.new_zeros(self.n_outcomes)
        flat = labels.flatten()
        self.label_counts.scatter_add_(0, flat.clamp(min=0), (flat != IGNORED).to(flat.dtype))

    @property
    def n_outcomes(self) -> int:
        """How many different labels there are: the vocabulary."""
        assert self.model_config.vocab_size is not None
        return self.model_config.vocab_size

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The position in the data, and the sums of the log row that is still open.

        Lightning's own loop state is left out: restoring it replays or skips validations, depending on the hook in
        which the checkpoint was taken.
        """
        self.settle()
        self._raise_trouble()  # no checkpoint is taken of it
        checkpoint.pop("loops", None)
        checkpoint["objective"] = {
            "n_batches": self.n_batches,
            "n_steps": self.global_step,
            "train_totals": self.train_totals.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting; to Lightning's loops this is a run that starts with these totals."""
        state = checkpoint["objective"]
        self.n_batches = state["n_batches"]
        self.train_totals.load_state_dict(state["train_totals"])
        self.guard.load_state_dict(state["guard"])
        loop = self.trainer.fit_loop.epoch_loop
        loop.batch_progress.total.increment_by(state["n_batches"])
        loop.manual_optimization.optim_step_progress.total.increment_by(state["n_steps"])
        loop._batches_that_stepped = state["n_steps"]
