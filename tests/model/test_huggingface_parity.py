"""Logits and loss equal those of transformers' GPT-2 and Llama, from the same weights."""

import pytest
import torch
import torch.nn.functional as F

from llm.model import Transformer, TransformerConfig

transformers = pytest.importorskip("transformers")

GPT2 = {
    "transformer.wte": "embed",
    "transformer.wpe": "decoder.position.table",
    "transformer.ln_f": "decoder.norm",
    "lm_head": "head",
    "ln_1": "attention_norm",
    "ln_2": "feed_forward_norm",
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "feed_forward.up",
    "mlp.c_proj": "feed_forward.down",
}
LLAMA = {
    "model.embed_tokens": "embed",
    "model.norm": "decoder.norm",
    "lm_head": "head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.out",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}


def renamed(name, names):
    for prefix in ("transformer.h.", "model.layers."):
        name = name.replace(prefix, "decoder.blocks.")
    module, kind = name.rsplit(".", 1)
    block = ".".join(module.split(".")[:3]) + "." if module.startswith("decoder.blocks.") else ""
    return f"{block}{names[module.removeprefix(block)]}.{kind}"


def from_gpt2(theirs):
    """Conv1D holds its weight transposed, and queries, keys and values side by side."""
    ours = {}
    for name, tensor in theirs.items():
        tensor = tensor.T if tensor.dim() == 2 and ".h." in name else tensor
        if "c_attn" in name:
            _, _, layer, _, _, kind = name.split(".")
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                ours[f"decoder.blocks.{layer}.attention.{part}.{kind}"] = chunk
        else:
            ours[renamed(name, GPT2)] = tensor
    return ours


def scatter(model):
    """Away from 0 and 1, where biases and norms start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def assert_same(theirs, ours):
    torch.manual_seed(1)
    tokens = torch.randint(ours.config.vocab_size, (3, 17))
    expected = theirs(tokens, labels=tokens)  # shifts the labels itself
    logits = ours(tokens)
    logits = ours.logits(logits)
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)


def test_gpt2():
    theirs = scatter(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=3, n_head=4)
        )
    )
    ours = Transformer(
        TransformerConfig(
            dim=24,
            n_layers=3,
            n_heads=4,
            vocab_size=61,
            max_length=32,
            position="learned",
            norm="layer",
            activation="gelu_tanh",
            bias=True,
            dropout=0.1,
            tie_embeddings=True,
            initialisation="gpt2",
        )
    ).eval()
    ours.load_state_dict(from_gpt2(theirs.state_dict()))
    assert_same(theirs, ours)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_llama(n_kv_heads, tied):
    theirs = scatter(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=61,
                max_position_embeddings=32,
                hidden_size=24,
                intermediate_size=40,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=n_kv_heads,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0},
                tie_word_embeddings=tied,
            )
        )
    )
    ours = Transformer(
        TransformerConfig(
            dim=24,
            n_layers=3,
            n_heads=4,
            n_kv_heads=n_kv_heads,
            ffn_dim=40,
            vocab_size=61,
            max_length=32,
            rope_theta=500.0,
            tie_embeddings=tied,
        )
    ).eval()
    ours.load_state_dict({renamed(name, LLAMA): tensor for name, tensor in theirs.state_dict().items()})
    assert_same(theirs, ours)
