"""Folders of Hugging Face's as a user meets them: by the commands, with a tokenizer, older names, half a model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from torch import nn

from llm.__main__ import main
from llm.checkpoint import CheckpointError, huggingface, import_folder, load, load_into
from llm.checkpoint.load import stored
from llm.generate import beam_search
from llm.model import Source, Transformer, TransformerConfig
from llm.tokenizer import ByteLevelBPE

transformers = pytest.importorskip("transformers", reason="comes with the extra huggingface")

V = 300
SMALL = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SIDES = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 40))}
MARIAN = {"vocab_size": V, "d_model": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **SIDES}
MARIAN |= {
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "scale_embedding": True,
}
MARIAN |= {"activation_function": "swish"}
T5 = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}


def saved(kind: str, config: str, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    if hasattr(model, "final_logits_bias"):  # sines and cosines must stay what they are
        for side in (model.model.encoder, model.model.decoder):
            if kind.startswith("Marian"):
                table = side.embed_positions.weight
                table.data = transformers.MarianMTModel(model.config).model.encoder.embed_positions.weight.data.clone()
    model.save_pretrained(folder)
    return model


def gpt2(folder: Path) -> Any:
    return saved("GPT2LMHeadModel", "GPT2Config", folder, vocab_size=V, n_positions=32, n_embd=24, n_layer=2, n_head=4)


def rewrite(folder: Path, rename: Any) -> None:
    file = folder / "model.safetensors"
    weights = {rename(name): weight for name, weight in safetensors.load_file(file).items() if rename(name)}
    safetensors.save_file(weights, file)


def test_there_and_back_by_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gpt2(tmp_path / "theirs")
    tokenizer = ByteLevelBPE(V).build(["the cat sees a dog"] * 9)
    tokenizer.save(tmp_path / "theirs")
    step, out = str(tmp_path / "step"), str(tmp_path / "out")
    main(["import", str(tmp_path / "theirs"), step])
    assert capsys.readouterr().out == f"{step}: written\n"
    main(["generate", step, "--prompt", "the cat", "--temperature", "0", "--max-new-tokens", "6"])
    text = capsys.readouterr().out
    ids = torch.tensor([[tokenizer.eot_id, *tokenizer.encode("the cat")]])
    greedy = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0
    )
    assert text == tokenizer.decode(greedy[0, 1:].tolist()) + "\n"
    main(["export", step, out])
    assert capsys.readouterr().out == f"{out}: written\n"
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert transformers.AutoTokenizer.from_pretrained(out)("the cat").input_ids == ids[0, 1:].tolist()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_import_and_export_refuse(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gpt2(tmp_path / "theirs")
    (tmp_path / "there").mkdir()
    for arguments, message in (
        (["import", str(tmp_path), str(tmp_path / "new")], "config.json: not there - give a folder of Hugging Face's"),
        (["import", str(tmp_path / "theirs"), str(tmp_path / "there")], "is there already"),
        (["export", str(tmp_path / "there"), str(tmp_path / "new")], "no checkpoint here"),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 74
        assert message in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


def test_names_of_older_versions(tmp_path: Path) -> None:
    gpt2(tmp_path / "gpt2")
    expected = huggingface.read(tmp_path / "gpt2").state
    rewrite(tmp_path / "gpt2", lambda name: name.removeprefix("transformer."))  # as OpenAI's were published
    torch.testing.assert_close(huggingface.read(tmp_path / "gpt2").state, expected)
    saved("BertForPreTraining", "BertConfig", tmp_path / "bert", **SMALL)
    expected = huggingface.read(tmp_path / "bert").state

    def of_tensorflow(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite(tmp_path / "bert", of_tensorflow)
    assert any(name.endswith("gamma") for name in safetensors.load_file(tmp_path / "bert" / "model.safetensors"))
    torch.testing.assert_close(huggingface.read(tmp_path / "bert").state, expected)


def test_marian_comes_without_its_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved("MarianMTModel", "MarianConfig", tmp_path / "theirs", **MARIAN)
    (tmp_path / "theirs" / "vocab.json").write_text('{"</s>": 0}')
    for name in ("source.spm", "target.spm"):
        (tmp_path / "theirs" / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert import_folder(tmp_path / "theirs", tmp_path / "step") == ([], [])
    assert "two SentencePiece models have no form for the tokenizers library" in caplog.text
    assert not (tmp_path / "step" / "tokenizer").exists()
    with pytest.raises(CheckpointError, match="holds no tokenizer - copy one to"):
        load(tmp_path / "step")


def test_heads_without_a_place_are_named_and_poolers_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roberta = saved("RobertaModel", "RobertaConfig", tmp_path / "roberta", **SMALL, type_vocab_size=1)
    assert roberta.pooler is not None
    main(["import", str(tmp_path / "roberta"), str(tmp_path / "one")])
    printed = capsys.readouterr().out
    assert "not in it, so new: transform.dense.weight" in printed
    assert "has no place here, so left out: roberta.pooler.dense.bias, roberta.pooler.dense.weight" in printed
    bert = saved("BertModel", "BertConfig", tmp_path / "bert", **SMALL)
    main(["import", str(tmp_path / "bert"), str(tmp_path / "two")])
    assert "left out" not in capsys.readouterr().out
    config, state = stored(tmp_path / "two")
    assert config.next_sentence
    assert torch.equal(state["pooler.weight"], bert.pooler.dense.weight)


def test_an_untied_head_is_no_embedding(tmp_path: Path) -> None:
    llama = SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": False}
    saved("LlamaForCausalLM", "LlamaConfig", tmp_path, **llama)
    config = huggingface.read(tmp_path).config
    with pytest.raises(CheckpointError, match=r"model\.tie_embeddings: True - the weights have False"):
        load_into(Transformer(TransformerConfig(**{**config.__dict__, "tie_embeddings": True})), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "modernbert", "hidden_activation": "silu"}, r"hidden_activation: silu - only gelu are known"),
        ({"residual_multiplier": 0.0}, r"residual_multiplier: 0\.0 - not known for model_type llama"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            "llama3 without original_max_position_embeddings - add it",
        ),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    llama = {**SMALL, "model_type": "llama", "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(llama | changes))
    with pytest.raises(CheckpointError, match=message):
        huggingface.configuration(tmp_path)


def test_a_table_that_is_no_sines_is_refused(tmp_path: Path) -> None:
    saved("MarianMTModel", "MarianConfig", tmp_path, **MARIAN)
    file = tmp_path / "model.safetensors"
    weights = safetensors.load_file(file)
    name = "model.encoder.embed_positions.weight"
    safetensors.save_file(weights | {name: torch.ones(32, 24)}, file)
    with pytest.raises(CheckpointError, match=r"embed_positions\.weight: not the sines and cosines"):
        huggingface.read(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_an_encoder_begins_an_encoder_decoder(tmp_path: Path, tied: bool) -> None:
    saved("BertForPreTraining", "BertConfig", tmp_path, **SMALL)
    config = huggingface.read(tmp_path).config
    changes = {"family": "encoder_decoder", "next_sentence": False, "tie_embeddings": tied}
    both = Transformer(TransformerConfig(**{**config.__dict__, **changes}))
    before = {name: weight.clone() for name, weight in both.state_dict().items()}
    anew = load_into(both, tmp_path)
    assert {name.partition(".")[0] for name in anew} == {"decoder", "head"}
    assert ("head.weight" in anew) != tied
    encoder = Transformer(config).eval()
    load_into(encoder, tmp_path)
    for name, weight in both.state_dict().items():
        if name.startswith(("encoder.", "embed.")):
            assert torch.equal(weight, encoder.state_dict()[name])
        elif name in anew:
            assert torch.equal(weight, before[name])


def test_roberta_counts_positions_from_behind_its_padding(tmp_path: Path) -> None:
    settings = SMALL | {"pad_token_id": 3, "max_position_embeddings": 30, "type_vocab_size": 1}
    model = saved("RobertaForMaskedLM", "RobertaConfig", tmp_path, **settings)
    found = huggingface.read(tmp_path)
    assert found.config.max_length == 26
    mine = Transformer(found.config).eval()
    mine.load_state_dict(found.state)
    tokens = torch.randint(5, V, (2, 26))
    torch.testing.assert_close(mine.logits(mine(tokens)), model(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_beams", [1, 4])
def test_beam_search_finds_what_transformers_finds(n_beams: int, tmp_path: Path) -> None:
    model = saved("T5ForConditionalGeneration", "T5Config", tmp_path / "theirs", vocab_size=40, **T5)
    import_folder(tmp_path / "theirs", tmp_path / "step")
    config, state = stored(tmp_path / "step")
    mine = Transformer(config).eval()
    mine.load_state_dict(state)
    source = torch.randint(2, 40, (6, 9), generator=torch.Generator().manual_seed(0))
    theirs = model.generate(
        source, attention_mask=torch.ones_like(source), num_beams=n_beams, do_sample=False, max_new_tokens=12,
        length_penalty=0.0, early_stopping=False,
    )  # fmt: skip
    start = torch.zeros(6, 1, dtype=torch.long)
    found = beam_search(mine, start, 12, n_beams=n_beams, alpha=0.0, eos_id=1, source=Source(source))
    for row, expected in zip(found.tolist(), theirs.tolist(), strict=True):
        text = expected[: expected.index(1) + 1] if 1 in expected else expected
        assert row[: len(text)] == text


def test_an_exported_folder_says_what_its_targets_start_with(tmp_path: Path) -> None:
    config = TransformerConfig(
        dim=24, n_layers=2, n_heads=4, vocab_size=V, max_length=32, family="encoder_decoder", position="relative",
        norm="rms", activation="relu", scale_attention=False, scale_logits=True, bias=False,
    )  # fmt: skip
    tokenizer = ByteLevelBPE(V).build(["the cat sees a dog"] * 9)
    huggingface.write(config, Transformer(config).state_dict(), tokenizer, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["decoder_start_token_id"] == tokenizer.pad_id
