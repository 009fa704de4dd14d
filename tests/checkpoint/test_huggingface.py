"""Weights of transformers' give the same logits here, and ours there, for every architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import torch as safetensors
from torch import nn

from llm.checkpoint import CheckpointError, export_folder, huggingface, import_folder, load_into, read_tensors
from llm.checkpoint.load import stored
from llm.model import Source, Transformer, TransformerConfig

transformers = pytest.importorskip("transformers", reason="comes with the extra huggingface")

V = 61
LLAMA = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BERT = {key: LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")} | {
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
MODERN = BERT | {"num_hidden_layers": 5, "local_attention": 6, "tie_word_embeddings": True}
MODERN |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
BART = {
    "vocab_size": V,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
T5 = {"vocab_size": V, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}

# name -> (class, configuration, its settings)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": V, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": False}),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen2_window": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA | QWEN_WINDOW),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 8}),
    "bert": ("BertForPreTraining", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT | {"type_vocab_size": 1}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", MODERN),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5_1.1": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        BART | {"scale_embedding": True, "activation_function": "swish"},
    ),
}


def theirs(name: str, folder: Path) -> Any:
    """A model with its weights away from 0 and 1, saved in `folder`."""
    kind, config, settings = CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    if name == "t5_1.1":  # transformers 5 builds it tied; the released weights are not
        model.lm_head.weight = nn.Parameter(torch.randn(V, 24))
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name == "marian" and "embed_positions" in key:
                continue
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    return model


def ours(folder: Path) -> Transformer:
    found = huggingface.read(folder)
    assert not found.anew
    assert not found.unused
    model = Transformer(found.config)
    model.load_state_dict(found.state)
    return model.eval()


@torch.no_grad()
def assert_same(model: Any, mine: Transformer) -> None:
    """Logits of every head, and the loss."""
    torch.manual_seed(1)
    tokens, source = torch.randint(3, V, (2, 23)), torch.randint(3, V, (2, 19))
    labels = torch.where(torch.rand(tokens.shape) < 0.3, tokens, -100)
    family = mine.config.family
    if family == "encoder_decoder":
        expected = model(input_ids=source, decoder_input_ids=tokens, labels=labels)
        logits = mine.logits(mine(tokens, source=Source(source)))
    elif mine.config.n_segments > 1:
        segments = (torch.arange(23) > 9).long().expand(2, 23)
        extra = {"next_sentence_label": torch.tensor([0, 1])} if mine.config.next_sentence else {}
        expected = model(input_ids=tokens, token_type_ids=segments, labels=labels, **extra)
        hidden = mine(tokens, segments=segments)
        logits = mine.logits(hidden)
    else:
        expected = model(input_ids=tokens, labels=labels)
        logits = mine.logits(mine(tokens))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if family == "decoder":
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    if mine.config.next_sentence:
        pairs = mine.sentence_logits(hidden[:, 0])
        torch.testing.assert_close(pairs, expected.seq_relationship_logits, rtol=0, atol=1e-4)
        loss = loss + F.cross_entropy(pairs, torch.tensor([0, 1]))
    theirs_logits = expected.prediction_logits if mine.config.next_sentence else expected.logits
    assert theirs_logits.std() > 0.1
    torch.testing.assert_close(logits, theirs_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    model = theirs(name, tmp_path / "theirs")
    mine = ours(tmp_path / "theirs")
    assert_same(model, mine)
    huggingface.write(mine.config, mine.state_dict(), None, tmp_path / "out")
    again = huggingface.read(tmp_path / "out")
    assert huggingface.settings.meaning(again.config) == huggingface.settings.meaning(mine.config)
    torch.testing.assert_close(again.state, dict(mine.state_dict()), rtol=0, atol=0)
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0]
    back, report = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["unexpected_keys"]
    missing = {key for key in report["missing_keys"] if "embed_positions" not in key}
    assert not missing
    if name == "roberta":
        back.config.pad_token_id = 1
    assert_same(back.eval(), mine)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    theirs("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.load_file(file)
    kept = weights.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.save_file(weights | {"model.layers.1.mlp.side.weight": kept}, file)
    with pytest.raises(CheckpointError) as refused:
        huggingface.read(tmp_path)
    assert "decoder.blocks.1.feed_forward.up.weight: not in the folder" in str(refused.value)
    assert "model.layers.1.mlp.side.weight: left over" in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention_bias", True, "attention_bias: True - only False is known"),
        ("hidden_act", "mish", "hidden_act: mish - only silu"),
        ("logit_softcap", 30.0, "logit_softcap: 30.0 - not known for model_type llama"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "rope_scaling: yarn - only llama3"),
        ("model_type", "gemma9", "model_type: gemma9 - known are llama"),
        ("hidden_size", None, "hidden_size: not there - it has no default"),
    ],
)
def test_a_setting_that_is_not_honoured_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    theirs("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        huggingface.read(tmp_path)


def test_only_safetensors_whole_or_in_parts(tmp_path: Path) -> None:
    model = theirs("gpt2", tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    torch.testing.assert_close(huggingface.read(tmp_path / "parts").state, huggingface.read(tmp_path / "whole").state)
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "whole" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, a pickle, which can run code"):
        huggingface.read(tmp_path / "whole")
    next((tmp_path / "parts").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-.*: not there, though .*index\.json names it"):
        huggingface.read(tmp_path / "parts")


def test_import_export_and_heads_that_start_anew(tmp_path: Path) -> None:
    theirs("bert", tmp_path / "theirs").bert.save_pretrained(tmp_path / "body")
    assert import_folder(tmp_path / "theirs", tmp_path / "step") == ([], [])
    with pytest.raises(CheckpointError, match="is there already"):
        import_folder(tmp_path / "theirs", tmp_path / "step")
    export_folder(tmp_path / "step", tmp_path / "out")
    assert_same(transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "out"), ours(tmp_path / "theirs"))
    assert all(name.startswith("model.") for name in read_tensors(tmp_path / "step"))
    config, _ = stored(tmp_path / "step")
    anew = load_into(Transformer(config), tmp_path / "body")
    assert {name.partition(".")[0] for name in anew} == {"transform", "head", "next_sentence"}
    short = TransformerConfig(**{**config.__dict__, "max_length": 16})
    with pytest.raises(CheckpointError, match=r"position\.table\.weight: \(32, 24\).*set model\.max_length=32"):
        load_into(Transformer(short), tmp_path / "body")
    other = TransformerConfig(**{**config.__dict__, "activation": "relu"})
    with pytest.raises(CheckpointError, match=r"model\.activation: relu - the weights have gelu"):
        load_into(Transformer(other), tmp_path / "body")


def test_what_transformers_has_not_is_not_exported(tmp_path: Path) -> None:
    config = TransformerConfig(dim=24, n_layers=2, n_heads=4, vocab_size=V, max_length=32, activation="relu_squared")
    with pytest.raises(CheckpointError, match=r"nearest is llama.*\n  model\.activation: relu_squared - llama has"):
        huggingface.write(config, Transformer(config).state_dict(), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
