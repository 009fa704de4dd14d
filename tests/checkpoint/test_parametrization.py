"""Networks under mup elsewhere: as folders that transformers loads, and as the weights that another run starts from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm.agree import agree_with_checkpoint
from llm.checkpoint import CheckpointError, disagreements, export_folder, huggingface, newest, write_peft
from llm.config import ConfigError
from llm.model import Source, Transformer, TransformerConfig
from llm.run import run, settled
from tests.runs import Compose

V = 61
MUP = {"dim": 48, "n_layers": 2, "n_heads": 4, "ffn_dim": 80, "vocab_size": V, "max_length": 32}
MUP |= {"parametrization": "mup", "base_dim": 16}
BERT = {"norm": "layer", "norm_eps": 1e-12, "norm_position": "post", "embed_norm": True, "bias": True}
MARIAN = {"norm": "layer", "norm_position": "post", "bias": True, "activation": "silu", "head_bias": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, untied": ("AutoModelForCausalLM", {}),
    "qwen3, tied": ("AutoModelForCausalLM", {"qk_norm": True, "tie_embeddings": True, "n_kv_heads": 2}),
    "gpt2, tied": (
        "AutoModelForCausalLM",
        {"position": "learned", "norm": "layer", "bias": True, "activation": "gelu_tanh", "tie_embeddings": True},
    ),
    "bert, tied": (
        "AutoModelForMaskedLM",
        BERT
        | {"family": "encoder", "position": "learned", "n_segments": 2, "activation": "gelu"}
        | {"tie_embeddings": True, "head_bias": True},
    ),
    "t5, tied": (
        "AutoModelForSeq2SeqLM",
        {"family": "encoder_decoder", "position": "relative", "norm_eps": 1e-6, "activation": "relu"}
        | {"scale_attention": False, "scale_logits": True, "tie_embeddings": True},
    ),
    "marian, tied": (
        "AutoModelForSeq2SeqLM",
        MARIAN | {"family": "encoder_decoder", "position": "sinusoidal", "tie_embeddings": True},
    ),
}


def network(**settings: Any) -> Transformer:
    """With every weight away from where it started."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**(MUP | settings))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    """What mup multiplies with is a part of the weights there; a tied head no longer is the embedding."""
    transformers = pytest.importorskip("transformers", reason="comes with the extra huggingface")
    kind, settings = CASES[name]
    mine = network(**settings)
    assert mine.blocks[0].attention.scale is not None
    config, state = huggingface.folded(mine.config, mine.state_dict())
    huggingface.write(config, state, None, tmp_path / "out")
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "out").eval()
    tokens, source = torch.randint(2, V, (2, 9)), torch.randint(2, V, (2, 7))
    with torch.no_grad():
        if config.family == "encoder_decoder":
            expected = mine.logits(mine(tokens, source=Source(source)))
            found = theirs(input_ids=source, decoder_input_ids=tokens).logits
        else:
            expected, found = mine.logits(mine(tokens)), theirs(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.05


def test_at_its_base_nothing_is_folded() -> None:
    mine = network(base_dim=48, tie_embeddings=True)
    config, state = huggingface.folded(mine.config, mine.state_dict())
    assert config == replace(mine.config, parametrization="standard", base_dim=None)
    assert all(torch.equal(weight, state[name]) for name, weight in mine.state_dict().items())


def test_weights_of_another_parametrization_are_refused() -> None:
    mup = TransformerConfig(**MUP)
    standard = replace(mup, parametrization="standard", base_dim=None)
    assert disagreements(mup, standard) == [
        "model.parametrization: mup - the weights have standard - set it to that",
        "model.base_dim: 16 - the weights have None - set it to that",
    ]
    assert disagreements(mup, replace(mup, base_dim=24)) == [
        "model.base_dim: 16 - the weights have 24 - set it to that"
    ]
    assert disagreements(replace(mup, base_dim=48), standard) == []
    assert disagreements(mup, mup) == []
    tied, apart = (replace(mup, tie_embeddings=tied) for tied in (True, False))  # whose scores have no multiplier
    assert disagreements(apart, tied) == ["model.tie_embeddings: False - the weights have True - set it to that"]
    assert disagreements(replace(apart, base_dim=48), replace(tied, base_dim=48)) == []
    assert disagreements(mup, replace(mup, base_ffn_dim=20)) == []  # which says how it is trained, not what it computes


def test_a_run_under_mup_and_what_can_be_made_of_it(compose_run: Compose, tmp_path: Path) -> None:
    """It goes on, is exported, and starts no other run; an adapter of it is not exported alone."""
    mup = ["model.parametrization=mup", "model.base_dim=16", "model.tie_embeddings=true", "model.bias=true"]
    mup += ["model.position=learned", "model.activation=gelu_tanh", "model.qk_norm=false"]
    run(compose_run(*mup, "trainer.max_steps=3"))
    assert run(compose_run(*mup, "trainer.max_steps=4")).step == 4
    export_folder(tmp_path / "run", tmp_path / "out")
    assert '"tie_word_embeddings": false' in (tmp_path / "out" / "config.json").read_text()
    other = [f"init_from={tmp_path / 'run'}", f"run_dir={tmp_path / 'other'}"]
    with pytest.raises(ConfigError, match=r"init_from: .*: model\.parametrization: standard - the weights have mup"):
        run(compose_run(*mup[2:], *other))
    with pytest.raises(ConfigError, match=r"model\.base_dim: 32 - .* has 16 - restore it"):
        run(compose_run(*mup, "model.base_dim=32", "trainer.max_steps=5"))
    run(compose_run(*mup, *other, "adapter=lora", "trainer.max_steps=1", "schedule.warmup_steps=0"))
    with pytest.raises(CheckpointError, match=r"model\.parametrization: mup - .* - export the merged model instead"):
        write_peft(tmp_path / "other", tmp_path / "peft")


def test_a_run_made_before_there_was_a_key_goes_on(compose_run: Compose, tmp_path: Path) -> None:
    cfg = compose_run("trainer.max_steps=1", "schedule.warmup_steps=0")
    run(cfg)
    step = newest(tmp_path / "run")
    assert step is not None
    shutil.copytree(step, tmp_path / "old")
    saved = yaml.safe_load((step / "config.yaml").read_text())
    for key in ("parametrization", "base_dim"):
        del saved["model"][key]
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(saved))
    data, _ = settled(cfg)
    data.prepare()
    agree_with_checkpoint(cfg, data, tmp_path / "old")
    cfg.model.parametrization, cfg.model.base_dim = "mup", 16
    with pytest.raises(ConfigError, match=r"model\.parametrization: mup - .* has standard - restore it"):
        agree_with_checkpoint(cfg, data, tmp_path / "old")
