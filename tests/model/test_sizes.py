"""The shipped sizes: each builds on the meta device and has exactly as many parameters as the released model."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from llm.model import Transformer, TransformerConfig

CONF = Path(__file__).parents[2] / "conf" / "model"


def shipped(name):
    node = OmegaConf.create({"model": OmegaConf.load(CONF / f"{name}.yaml"), "data": {"max_length": 256}}).model
    values = OmegaConf.to_container(node, resolve=True)
    assert values.pop("_target_") == "llm.model.TransformerConfig"
    return TransformerConfig(**({**values, "vocab_size": 4096} if values["vocab_size"] is None else values))


def gpt2(dim, n_layers, n_heads):
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=dim, n_layer=n_layers, n_head=n_heads))


def llama(dim, n_layers, ffn_dim, tied):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=dim,
            num_hidden_layers=n_layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=ffn_dim,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize(
    ("name", "count", "theirs"),
    [
        ("gpt2_124m", 124_439_808, lambda: gpt2(768, 12, 12)),
        ("gpt2_355m", 354_823_168, lambda: gpt2(1024, 24, 16)),
        ("gpt2_774m", 774_030_080, lambda: gpt2(1280, 36, 20)),
        ("gpt2_1558m", 1_557_611_200, lambda: gpt2(1600, 48, 25)),
        ("llama_1b", 1_235_814_400, lambda: llama(2048, 16, 8192, True)),
        ("llama_8b", 8_030_261_248, lambda: llama(4096, 32, 14336, False)),
    ],
)
def test_released_sizes(name, count, theirs):
    with torch.device("meta"):
        assert Transformer(shipped(name)).n_parameters() == count
        assert theirs().num_parameters() == count


def test_tiny_decoder():
    config = shipped("tiny_decoder")
    assert config.dropout == 0
    with torch.device("meta"):
        assert 2.5e6 < Transformer(config).n_parameters() < 3.5e6


def test_every_file_is_tested():
    names = {path.stem for path in CONF.glob("*.yaml")}
    assert names == {*(f"gpt2_{size}" for size in ("124m", "355m", "774m", "1558m")), "llama_1b", "llama_8b"} | {
        "tiny_decoder"
    }
