"""A step of a run, taken on fake tensors by processes that are not there: what it needs of memory, kind by kind.

The network, the strategy and the optimizer are the run's own, and so are the operators; only numbers are missing. What
a GPU does in another way than the CPU on which this is played is played, too: attention in 16 bits, the loss over the
vocabulary in place. Compiled code is not traced, but what it keeps is played (`_AsCompiled`), by rules with which the
recorded peaks of one GPU are met within four per cent (tests/cluster/test_trace.py).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from llm.data import TextData
from llm.model import Transformer, TransformerConfig
from llm.model.feed_forward import TanhGelu
from llm.model.mask import LONG
from llm.objective import Objective, Preference
from llm.objective.scale import Scale, start
from llm.plan.meter import Meter
from llm.plan.rows import Rows, batch
from llm.reduce import clip_gradients, own_part
from llm.strategy import DDP, FSDP, Single
from llm.strategy.apply import vocabulary_multiple
from llm.strategy.attention import dtype_of, way_of
from llm.strategy.compiling import resolve
from llm.strategy.process_group import fake_ranks

Moments = dict[str, dict[str, float]]  # moment -> kind -> bytes, when that moment was worst
KINDS = ("parameters", "gradients", "optimizer", "gathered", "activations", "logits", "buffers")
_FEW = 2  # blocks of a stack: with one more, what any number of them needs


@dataclass(frozen=True)
class Played:
    """Where a step is played.

    Attributes:
        world_size: processes.
        precision: the trainer's, settled.
        gpu: whether in the way of a GPU; else of a CPU.
        rows: of a micro-batch.
        n_micro_batches: of a step, on each process.
    """

    world_size: int
    precision: str
    gpu: bool
    rows: Rows
    n_micro_batches: int


def on_meta(config: TransformerConfig, objective: Objective) -> Transformer:
    """The network that `objective` trains, without memory; of `config`, which need not be its own."""
    with torch.device("meta"):
        network = Transformer(config)
        if objective.adapter is not None:
            objective.adapter.attach(network, objective.anew)
    return network


def trace(objective: Objective, strategy: Single | DDP | FSDP, data: TextData, played: Played) -> Moments:
    """What a process holds at the worst of each moment of a step.

    Of a large network a few blocks are run: each moment grows in a straight line with the number of blocks.
    """
    whole = objective.model_config
    sizes: dict[str, Any] = {"n_layers": whole.n_layers}
    if whole.family == "encoder_decoder":
        sizes["n_decoder_layers"] = whole.decoder_layers
    few: dict[str, Any] = {name: min(n, _FEW) for name, n in sizes.items()}
    base = _Step(objective, strategy, data, played, replace(whole, **few)).worst()
    found = {moment: {kind: float(kinds.get(kind, 0)) for kind in KINDS} for moment, kinds in base.items()}
    for name in (name for name, n in sizes.items() if n > few[name]):
        one_more = _Step(objective, strategy, data, played, replace(whole, **few | {name: few[name] + 1})).worst()
        for moment, kinds in found.items():
            for kind in KINDS:
                slope = one_more[moment].get(kind, 0) - base[moment].get(kind, 0)
                kinds[kind] += (sizes[name] - few[name]) * slope
    return found


def peak(moments: Moments) -> tuple[str, dict[str, float]]:
    """The worst moment of all, and what there is then."""
    return max(moments.items(), key=lambda item: sum(item[1].values()))


class _Judge:
    """What kind of tensor has been made, by its shape and by when that was."""

    def __init__(self, network: Transformer, rows: Rows) -> None:
        self.forward = True
        own = {tuple(shape) for p in network.parameters() for shape in (p.shape, own_part(p).shape)}
        # An activation may happen to have the shape of a weight.
        self._weights = {shape for shape in own if shape[0] not in (rows.n * rows.length, rows.n * rows.target)}
        n_tokens = network.config.vocab_size
        assert n_tokens is not None
        self._scores = range(n_tokens, n_tokens + 64)

    def __call__(self, tensor: Tensor) -> str:
        shape = tuple(tensor.shape)
        if len(shape) > 1 and shape[-1] in self._scores:
            return "logits"
        if self.forward:
            return "activations"
        return "gradients" if shape in self._weights and tensor.is_floating_point() else "buffers"


class _Step:
    """A step of a network of `config`, which need not be the objective's own."""

    def __init__(
        self,
        objective: Objective,
        strategy: Single | DDP | FSDP,
        data: TextData,
        played: Played,
        config: TransformerConfig,
    ) -> None:
        self.objective, self.strategy, self.data, self.played, self.config = objective, strategy, data, played, config
        self.outputs: set[int] = set()  # of blocks, by storage

    def worst(self) -> Moments:
        """What there was at the worst of each moment of the step."""
        with ExitStack() as stack, _unwarned():
            if isinstance(self.strategy, FSDP) or self.played.world_size > 1:
                stack.enter_context(fake_ranks(self.played.world_size))
            self.network, self.reference = self._built(), self._built_reference()
            self.judge = _Judge(self.network, self.played.rows)
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            self.meter = stack.enter_context(Meter(self.judge))
            stack.callback(setattr, self.objective, "model", None)
            self._set_up()
            self.meter.forget()
            with self._autocast(), self._kernels(), self._kept():
                self._take()
        return self.meter.worst

    def _built(self) -> Transformer:
        """The network as the strategy has it, on the meta device."""
        played, strategy = self.played, self.strategy
        network = on_meta(self.config, self.objective)
        device = torch.device("cuda" if played.gpu else "cpu")
        spread = isinstance(strategy, FSDP)
        self.compiled = resolve(strategy.compile, network, device, spread=spread) != "none"
        way = way_of(strategy.attention, self.config, device, compiled=self.compiled)
        longest = max(played.rows.length, played.rows.target)
        self.dense = way == "dense" or (way == "runs" and longest < LONG) or self.config.position == "relative"
        if isinstance(strategy, FSDP):
            strategy.lay_out("cpu", played.world_size, played.precision)
        strategy.place(network, "none", vocabulary_multiple(device))
        if played.precision == "bf16-true" and not spread:
            network.to(torch.bfloat16)
        return network

    def _built_reference(self) -> tuple[Transformer, ...]:
        """What a preference is measured against, on the meta device, if there is one beside the network."""
        if not isinstance(self.objective, Preference) or self.objective.adapter is not None:
            return ()
        with torch.device("meta"):
            return (Transformer(self.config).requires_grad_(False),)

    def _set_up(self) -> None:
        """What lives through all steps."""
        network, objective = self.network, self.objective
        network.to_empty(device="cpu")
        objective.model, objective.task_names = network, self.data.task_names
        self.strategy.connect(objective)
        self.meter.call("parameters", list(network.parameters()))
        if isinstance(objective, Preference):
            objective._reference = tuple(reference.to_empty(device="cpu") for reference in self.reference)
            self.meter.call("parameters", [p for reference in self.reference for p in reference.parameters()])
        if self.played.gpu and not (isinstance(self.strategy, FSDP) and self.strategy.tensor_parallel_size > 1):
            objective._nats = self._fused_nats  # type: ignore[method-assign]
        self.optimizer = objective.optimizer_recipe.build(network)
        self.micro_batches = [self._batch() for _ in range(self.played.n_micro_batches)]
        self._make_state()
        self._mark_moments()

    def _make_state(self) -> None:
        """The optimizer's, which its first step makes. DDP's gradients lie in its buckets for good, others go."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self.meter.call("gradients", self._gradients())
        self.optimizer.step()
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        self.meter.call("optimizer", [value for value in state if isinstance(value, Tensor)])
        if not isinstance(self.strategy, DDP):
            for parameter in trained:
                parameter.grad = None

    def _batch(self) -> dict[str, Any]:
        """A micro-batch. What is hidden by run or by block needs no mask: as if each row were one document."""
        fields: dict[str, Any] = batch(self.data, self.played.rows, documents=self.data.tells_documents)
        if self.data.answers == "vocabulary" and not self.dense:
            fields |= dict.fromkeys({"documents", "source_documents"} & fields.keys())
        return fields

    def _mark_moments(self) -> None:
        """Say to the meter when the loss begins, and when the backward of a block does."""
        network, enter = self.network, self.meter.enter
        network.register_forward_hook(lambda *_: enter("loss"))
        for side in ("encoder", "decoder"):
            stack = getattr(network, side)
            blocks = [] if stack is None else list(stack.blocks)
            for place, block in enumerate(blocks):
                block.register_forward_hook(lambda _, __, output: self.outputs.add(_storage(output)))
                which = "last" if place == len(blocks) - 1 else "first" if place == 0 else "a middle"
                block.register_forward_hook(_at_backward(enter, f"backward of the {side}'s {which} block"))

    def _take(self) -> None:
        """Forward and backward of a step's first and last micro-batch, and the update: as Objective.training_step."""
        objective, played = self.objective, self.played
        n = min(2, played.n_micro_batches)
        for number, fields in enumerate(self.micro_batches[:n], 1):
            self.judge.forward = True
            self.meter.enter("forward")
            parts = objective.losses(fields)
            loss, gradient = start(parts, Scale([dict.fromkeys(parts, 1)], torch.device("cpu")))
            del parts
            self.judge.forward = False
            with nullcontext() if number == n else self._unsent():
                torch.autograd.backward(loss, gradient)
        self.meter.call("gradients", self._gradients())
        self.meter.enter("update")
        clip_gradients(list(self.network.parameters()), objective.optimizer_recipe.clip_norm)
        self.optimizer.step()

    def _unsent(self) -> AbstractContextManager[None]:
        return self.strategy.block_backward_sync() if isinstance(self.strategy, FSDP) else nullcontext()

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]

    def _autocast(self) -> AbstractContextManager[Any]:
        """Casts are kept for the step; those of compiled code are made where they are used."""
        if not self.played.precision.endswith("-mixed"):
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=not self.compiled)

    def _kernels(self) -> AbstractContextManager[Any]:
        return _kernels_of_gpu(dtype_of(self.played.precision)) if self.played.gpu else nullcontext()

    def _kept(self) -> AbstractContextManager[Any]:
        """What compiled code keeps for the backward, of what is kept without."""
        return _AsCompiled(self.meter, self.config, self.outputs).hooks() if self.compiled else nullcontext()

    def _fused_nats(self, network: Transformer, hidden: Tensor, labels: Tensor, reduction: str) -> Tensor:
        nats: Tensor = _FusedNats.apply(network.logits(hidden, padded=True))
        return nats if reduction == "none" else nats.sum()


class _AsCompiled:
    """What torch.compile keeps from the forward to the backward, of what is kept without it.

    Casts of weights are made again. What several layers read is cast once. Of a residual stream the sum within a block
    is made again, from the block's input and the product that was added to it. What an activation makes is made again,
    unless it is what the next product reads.
    """

    def __init__(self, meter: Meter, config: TransformerConfig, outputs: set[int]) -> None:
        self._meter, self._outputs = meter, outputs
        between = config.gated or config.activation == "relu_squared"
        self._again = ("silu", "gelu", "relu") if between else ()
        self._casts: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        own = own_part(tensor)
        maker, cast = self._meter.maker(own), self._meter.cast_of(own)
        if maker in self._again or (cast is not None and cast[1] in ("parameters", "gathered")):
            return _made_anew(tensor)
        if maker == "add" and own.dtype == torch.float32 and own.dim() == 3 and _storage(own) not in self._outputs:
            product = torch.empty(own.shape, dtype=torch.bfloat16)
            make = _made_anew(tensor)
            return lambda: make() if product.numel() else tensor
        if cast is None:
            return tensor
        same = self._casts.setdefault(cast[0], tensor)
        return same if same.shape == tensor.shape else tensor

    def _unpack(self, kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()


def _storage(tensor: Tensor) -> int:
    return own_part(tensor).untyped_storage()._cdata


def _made_anew(tensor: Tensor) -> Callable[[], Tensor]:
    """What gives another tensor like this one, and does not keep it."""
    own = own_part(tensor)
    make = partial(torch.empty, own.shape, dtype=own.dtype)
    if not isinstance(tensor, DTensor):
        return make
    mesh, placements = tensor.device_mesh, tensor.placements
    return lambda: DTensor.from_local(make(), mesh, placements, run_check=False)


def _at_backward(enter: Callable[[str], None], moment: str) -> Callable[..., None]:
    """A hook on a module's forward that calls `enter` when its backward begins."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: enter(moment))

    return hook


class _FusedNats(torch.autograd.Function):
    """What llm/objective/fused.py keeps and makes, without its kernels."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        nats, log_sums = (torch.empty(len(logits), dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(logits, log_sums)
        return nats

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        logits: Tensor = ctx.saved_tensors[0]
        return logits


@contextmanager
def _unwarned() -> Iterator[None]:
    """What torch has to say about the way collectives go is for those who wait for them."""
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _kernels_of_gpu(dtype: torch.dtype) -> Iterator[None]:
    """A GPU's attention keeps what it is given in 16 bits, for which llm/model/kernel.py has float32 on a CPU; and what
    it drops out, it does not keep. Its GELU keeps only what it is given."""
    compute, cpu_gelu = F.scaled_dot_product_attention, TanhGelu.apply

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return compute(query.to(dtype), key.to(dtype), value.to(dtype), **options | {"dropout_p": 0.0})

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    TanhGelu.apply = partial(F.gelu, approximate="tanh")  # type: ignore[method-assign]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = compute
        TanhGelu.apply = cpu_gelu  # type: ignore[method-assign]
