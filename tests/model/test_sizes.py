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


def bert(**sizes):
    transformers = pytest.importorskip("transformers")
    return transformers.BertForPreTraining(transformers.BertConfig(**sizes))


def modernbert():
    transformers = pytest.importorskip("transformers")
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig())


def t5(**sizes):
    transformers = pytest.importorskip("transformers")
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=32128, **sizes))


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.mark.parametrize(
    ("name", "count", "theirs"),
    [
        ("gpt2_124m", 124_439_808, lambda: gpt2(768, 12, 12)),
        ("gpt2_355m", 354_823_168, lambda: gpt2(1024, 24, 16)),
        ("gpt2_774m", 774_030_080, lambda: gpt2(1280, 36, 20)),
        ("gpt2_1558m", 1_557_611_200, lambda: gpt2(1600, 48, 25)),
        ("llama_1b", 1_235_814_400, lambda: llama(2048, 16, 8192, True)),
        ("llama_8b", 8_030_261_248, lambda: llama(4096, 32, 14336, False)),
        ("bert_base", 110_106_428, bert),
        ("bert_large", 336_226_108, lambda: bert(**LARGE)),
        ("modernbert_base", 149_655_232, modernbert),
        ("t5_small", 60_506_624, t5),
        ("t5_base", 222_903_552, lambda: t5(d_model=768, num_layers=12, num_heads=12, d_ff=3072)),
    ],
)
def test_released_sizes(name, count, theirs):
    with torch.device("meta"):
        assert Transformer(shipped(name)).n_parameters() == count
        assert theirs().num_parameters() == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("t5_v1_1_small", 76_961_152),  # google/t5-v1_1-small
        ("t5_v1_1_base", 247_577_856),
        ("transformer_base", 63e6),  # Vaswani et al. 2017, table 3: 65 and 213 million, to the last biases unsaid
        ("transformer_big", 214e6),
    ],
)
def test_published_sizes(name, count):
    with torch.device("meta"):
        assert Transformer(shipped(name)).n_parameters() == pytest.approx(count, rel=0 if count % 1000 else 0.01)


@pytest.mark.parametrize(("name", "most"), [("decoder", 3.5e6), ("encoder", 3.5e6), ("encoder_decoder", 5e6)])
def test_tiny(name, most):
    config = shipped(f"tiny_{name}")
    assert config.family == name
    assert config.dropout == 0
    with torch.device("meta"):
        assert 2.5e6 < Transformer(config).n_parameters() < most
