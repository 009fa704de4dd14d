"""LoRA, by peft."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Lt

if TYPE_CHECKING:
    from torch import nn

_LAYERS = ("query", "key", "value", "out", "gate", "up", "down")
_HEADS = ("classifier.", "pooler.")  # of one task: they are trained whole, also where the weights have them


@dataclass(frozen=True)
class Lora:
    """Each chosen linear layer gets a product of two thin matrices added to its own, and only those are trained (Hu et
    al. 2021, arXiv:2106.09685): W + alpha / r · B A, where B starts at 0.

    r        inner width of the product
    alpha    its weight is alpha / r
    dropout  on what goes into A
    layers   which layers of every block: query, key, value, out, gate, up, down
    """

    r: Annotated[int, Gt(0)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    layers: Sequence[str] = ("query", "value")

    def __post_init__(self) -> None:
        wrong = [name for name in self.layers if name not in _LAYERS]
        if wrong or not self.layers:
            raise ValueError(f"adapter.layers={list(self.layers)}: must be some of {', '.join(_LAYERS)}")

    @property
    def scale(self) -> float:
        """What the product is multiplied with."""
        return self.alpha / self.r

    def attach(self, network: nn.Module, anew: Collection[str] = ()) -> None:
        """Change `network`, a Transformer, in place, and freeze what is not trained: all but the matrices, a
        classifier, and the weights that are `anew`, which nobody has trained yet.

        Raises ValueError if no layer has one of the names, or peft is not installed.
        """
        import torch

        try:
            import peft
        except ImportError:
            raise ValueError("adapter: peft is not installed: pip install 'llm-on-lightning[adapter]'") from None
        names = [
            name for name, _ in network.named_modules() if ".blocks." in name and name.rpartition(".")[2] in self.layers
        ]
        if not names:
            raise ValueError(f"adapter.layers={list(self.layers)}: the model has none of them")
        settings = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a fraction is as good
            lora_dropout=self.dropout,
            target_modules=names,
            bias="none",
        )
        peft.inject_adapter_in_model(settings, network)
        seed = torch.initial_seed()
        for name, module in network.named_modules():
            if ".lora_A." in name:
                module.base_shape = _base_shape(network.get_submodule(name.partition(".lora_")[0]), self.r)
            if ".lora_A." in name or ".lora_B." in name:
                module.reset_parameters = partial(_draw, module, f"{seed} {name}")
                module.reset_parameters()
        for name, parameter in network.named_parameters():
            starts_anew = name.replace(".base_layer.", ".") in anew
            parameter.requires_grad_(".lora_" in name or name.startswith(_HEADS) or starts_anew)


@contextmanager
def switched_off(network: nn.Module) -> Iterator[None]:
    """Inside, the network computes what it would without its adapter."""
    layers: list[Any] = [module for module in network.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True  # peft's own way also takes the gradients away, on which ddp relies
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _base_shape(layer: Any, r: int) -> tuple[float, float] | None:
    """Of an A: its inputs grow with the width, what B reads does not, so that A alone is slower in a wider network, and
    B as fast (Hayou et al. 2024, arXiv:2402.12354)."""
    around = layer.base_layer.base_shape
    return None if around is None else (r, around[1])


def _draw(module: Any, name: str) -> None:
    """A's initial weights, uniform as peft's, from a generator of their own: the same whether they are drawn at once
    or, on the meta device, later and by several processes. B starts at 0."""
    import torch

    weight = module.weight.data
    if ".lora_B." in name:
        weight.zero_()
        return
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(weight.shape[1])
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
