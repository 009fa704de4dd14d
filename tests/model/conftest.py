"""A tiny model with every weight away from its starting value, so that no bias of 0 or norm of 1 hides a mistake."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llm.model import Transformer, TransformerConfig

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 50, "max_length": 24}


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tensors this small only make threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config() -> Callable[..., TransformerConfig]:
    return lambda **overrides: TransformerConfig(**{**TINY, **overrides})


@pytest.fixture
def build(config: Callable[..., TransformerConfig]) -> Callable[..., Transformer]:
    def build(**overrides: Any) -> Transformer:
        torch.manual_seed(0)
        model = Transformer(config(**overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return build
