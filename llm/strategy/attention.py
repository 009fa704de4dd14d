"""Which of torch's kernels computes attention: all give the same up to rounding, at very different speeds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from llm import reduce
from llm.model import Source, Transformer, TransformerConfig
from llm.model.mask import Way

Kernel = Literal["flash", "cudnn", "efficient", "math"]
AttentionKernel = Literal["auto", "flash", "cudnn", "efficient", "math"]

_BACKENDS: dict[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_ON_CPU = ("flash", "math")
_NARROWEST = 16  # heads that flex_attention takes


class Call(NamedTuple):
    """One kind of call of scaled_dot_product_attention: shapes, and what the kernels distinguish."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    mask: tuple[tuple[int, ...], torch.dtype, bool] | None  # shape, type, whether it is trained
    dropout: float
    causal: bool
    grouped: bool

    def __call__(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Make it, forward and backward, of random numbers; gives the output."""
        query = torch.randn(self.query, device=device, dtype=dtype, requires_grad=True)
        key, value = (torch.randn(self.key, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
        mask = None
        if self.mask is not None:
            shape, kind, trained = self.mask
            if kind == torch.bool:
                mask = torch.ones(shape, device=device, dtype=kind)
            else:
                mask = torch.zeros(shape, device=device, dtype=dtype, requires_grad=trained)
        out = F.scaled_dot_product_attention(
            query, key, value, mask, self.dropout, self.causal, enable_gqa=self.grouped
        )
        out.backward(torch.ones_like(out))
        return out


class _Recorded(TorchFunctionMode):
    """The kinds of calls made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Call, None] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self._record(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _record(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        mask = None if attn_mask is None else (tuple(attn_mask.shape), attn_mask.dtype, attn_mask.requires_grad)
        self.calls[Call(tuple(query.shape), tuple(key.shape), mask, dropout_p, is_causal, enable_gqa)] = None


def way_of(asked: AttentionKernel, config: TransformerConfig, device: torch.device, *, compiled: bool) -> Way:
    """How documents and windows are hidden (see llm/model/mask.py): on a CPU by run, unless that is compiled, which
    would be for every layout of documents; else by block, where flex_attention can serve, unless a kernel was `asked`
    for by name.
    """
    if device.type == "cpu":
        return "dense" if compiled else "runs"
    return "blocks" if asked == "auto" and config.dropout == 0 and config.head_width >= _NARROWEST else "dense"


def calls_of(
    config: TransformerConfig, n_rows: int, length: int, n_shares: int = 1, *, documents: bool = True
) -> list[Call]:
    """What a network of `config` calls with dense masks in training on rows [n_rows, length], of several documents or
    not, where `n_shares` processes have a share of its heads each. Found out by running it on the meta device: nothing
    is computed."""
    config = replace(
        config,
        n_heads=config.n_heads // n_shares,
        n_kv_heads=config.kv_heads // n_shares,
        head_dim=config.head_width,
        vocab_size=config.vocab_size or 1,
    )
    with torch.device("meta"):
        network = Transformer(config).train()
        tokens = torch.zeros(n_rows, length, dtype=torch.long)
        source = Source(tokens, tokens, tokens) if config.family == "encoder_decoder" else None
        with _Recorded() as recorded:
            network(tokens, documents=tokens if documents else None, positions=tokens, source=source)
    return list(recorded.calls)


def dtype_of(precision: str) -> torch.dtype:
    """In which attention computes under trainer.precision."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


def serves(kernel: str, call: Call, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can do this, here: tried, with one row."""
    small = call._replace(query=(1, *call.query[1:]), key=(1, *call.key[1:]))
    if call.mask is not None:
        small = small._replace(mask=((1, *call.mask[0][1:]), *call.mask[1:]))
    try:
        with _kept_generators(device), sdpa_kernel(_BACKENDS[kernel]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of all kernels that are switched off
            small(device, dtype)
    except RuntimeError:
        return False
    return True


def problems(
    kernel: AttentionKernel,
    config: TransformerConfig,
    accelerator: str,
    precision: str,
    n_shares: int = 1,
    *,
    documents: bool = True,
) -> list[str]:
    """One line if `kernel`, asked for by name, cannot serve the model on this machine."""
    if kernel in ("auto", "math"):
        return []
    if accelerator == "cpu" and kernel not in _ON_CPU:
        return [f"strategy.attention: {kernel} - a CPU has {' and '.join(_ON_CPU)} only - take auto, or one of them"]
    if accelerator != "cpu" and kernel in ("flash", "cudnn") and dtype_of(precision) == torch.float32:
        return [
            f"strategy.attention: {kernel} - computes in 16 bits, and trainer.precision is {precision} - "
            f"take trainer.precision=bf16-mixed, or auto or efficient"
        ]
    if accelerator != "cpu" and not torch.cuda.is_available():
        return []  # which is said elsewhere
    device = torch.device("cpu") if accelerator == "cpu" else torch.device("cuda", torch.cuda.current_device())
    for call in calls_of(config, 1, config.max_length, n_shares, documents=documents):
        if not serves(kernel, call, device, dtype_of(precision)):
            return [f"strategy.attention: {kernel} - cannot do what the model asks for ({_told(call)}) - take auto"]
    return []


def _told(call: Call) -> str:
    mask = "no mask" if call.mask is None else f"a mask of {'truth values' if call.mask[1] == torch.bool else 'scores'}"
    return f"heads of {call.query[-1]}, {mask}, dropout {call.dropout}"


def fastest(
    calls: Sequence[Call],
    device: torch.device,
    dtype: torch.dtype,
    cost: Callable[[str, Sequence[Call], torch.device, torch.dtype], float] | None = None,
) -> Kernel | None:
    """The kernel that does all `calls`, forward and backward, in the least time; None if there are none to do.

    Args:
        calls: at the size of a micro-batch.
        device: where.
        dtype: of queries, keys and values.
        cost: of a kernel; measured if None.
    """
    if not calls:
        return None
    costs = {
        kernel: (cost or seconds)(kernel, calls, device, dtype)
        for kernel in get_args(Kernel)
        if all(serves(kernel, call, device, dtype) for call in calls)
    }
    return min(costs, key=costs.__getitem__)


def seconds(kernel: str, calls: Sequence[Call], device: torch.device, dtype: torch.dtype) -> float:
    """Of all `calls` once, the best of five; infinite where memory does not suffice."""
    times = []
    try:
        with _kept_generators(device), sdpa_kernel(_BACKENDS[kernel]):
            for _ in range(6):
                _wait(device)
                start = time.perf_counter()
                for call in calls:
                    call(device, dtype)
                _wait(device)
                times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return float("inf")
    return min(times[1:])  # the first one loads and warms up


def _kept_generators(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside is not missed outside."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_used: AbstractContextManager[Any] | None = None


def use(kernel: Kernel | None) -> None:
    """Prefer `kernel` in this process from now on, the others where it cannot serve (in generation, masks are of other
    kinds); math is also the only one, as it serves everything. None: torch's own choice.
    """
    global _used
    if _used is not None:
        _used.__exit__(None, None, None)
        _used = None
    torch.compiler.config.cache_key_tag = "" if kernel is None else f"attention={kernel}"  # of graphs kept on disk
    if kernel is not None:
        others = [] if kernel == "math" else [backend for name, backend in _BACKENDS.items() if name != kernel]
        _used = sdpa_kernel([_BACKENDS[kernel], *others], set_priority=True)
        _used.__enter__()


def agreed(kernel: Kernel | None, device: torch.device) -> Kernel | None:
    """What the first process says, on all."""
    names = get_args(Kernel)
    number = torch.tensor(-1 if kernel is None else names.index(kernel), device=device)
    index = int(reduce.from_first(number))
    return None if index < 0 else names[index]


def measurable(device: torch.device) -> bool:
    """Whether auto looks for the fastest: on a CPU torch has one kernel and a stopgap."""
    return device.type == "cuda"


class Attentive:
    """What the strategies share: the kernel of attention, chosen once for the run, its resumptions included: kernels
    differ in rounding. Before `Stored` in the order of base classes.

    Attributes:
        attention: what the user asks for.
        kernel: what serves; None is torch's own choice.
    """

    attention: AttentionKernel
    kernel: Kernel | None = None
    root_device: torch.device
    _able: Callable[[str], bool] | None = None  # where auto has a choice

    def choose_attention(
        self,
        trainer: L.Trainer,
        network: Transformer,
        dtype: torch.dtype,
        n_data_processes: int,
        n_shares: int = 1,
        *,
        compiled: bool,
    ) -> None:
        """Settle which kernel serves; all processes call this, before anything is traced.

        Args:
            trainer: with the data.
            network: which is told how to hide documents from each other.
            dtype: in which attention computes.
            n_data_processes: among how many a batch is divided.
            n_shares: how many processes share the heads.
            compiled: whether the network, or its blocks, will be.
        """
        config = network.config
        network.mask_way = way_of(self.attention, config, self.root_device, compiled=compiled)
        self.kernel = None if self.attention == "auto" else self.attention
        if self.attention == "auto" and measurable(self.root_device):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            n_rows = data.micro_batch_size or data.batch_size // n_data_processes
            calls = calls_of(config, n_rows, data.max_length, n_shares, documents=data.tells_documents)
            if network.mask_way == "blocks":  # what has truth values for a mask does not call for these kernels
                calls = [call for call in calls if call.mask is None or call.mask[1] != torch.bool]
            self._able = lambda kernel: all(serves(kernel, call, self.root_device, dtype) for call in calls)
            found = fastest(calls, self.root_device, dtype) if reduce.rank() == 0 else None
            self.kernel = agreed(found, self.root_device)
        use(self.kernel)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Go on with the kernel that the run had, if this machine has it too."""
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)  # type: ignore[misc]
        kept: Kernel | None = checkpoint.get("attention")
        if self._able is not None and kept is not None:
            able = reduce.rank() == 0 and self._able(kept)
            self.kernel = agreed(kept if able else self.kernel, self.root_device)
            use(self.kernel)
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """With the kernel, whose rounding is in the weights."""
        if self.kernel is not None:
            checkpoint["attention"] = self.kernel
        super().save_checkpoint(checkpoint, filepath, storage_options)  # type: ignore[misc]

    def teardown(self) -> None:
        """Another run in this process starts from torch's own choice."""
        use(None)
        super().teardown()  # type: ignore[misc]
