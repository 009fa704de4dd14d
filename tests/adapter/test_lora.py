"""LoRA: what is trained, what stays, and the same network merged, apart, and in peft's hands."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm.__main__ import main
from llm.adapter import Lora
from llm.checkpoint import (
    CheckpointError,
    average,
    export_folder,
    import_folder,
    load,
    load_into,
    put_on,
    weights_of,
    write_peft,
)
from llm.config import ConfigError
from llm.model import Transformer, TransformerConfig
from llm.optimizer import AdamW
from llm.plan.subject import Stated, subject
from llm.run import run
from tests.ranks import run_on_ranks
from tests.runs import FAMILIES, Compose, run_composed, saved

pytest.importorskip("peft", reason="comes with the extra adapter")
LLAMA = ["model.qk_norm=false", "model.norm=rms", "model.activation=swiglu", "model.dropout=0"]
ADAPTED = [*LLAMA, "adapter=lora", "adapter.layers=[query,value,down]", "optimizer.lr=0.05"]
TOKENS = torch.arange(12).unsqueeze(0) + 97


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().logits(model(TOKENS))


@pytest.fixture
def base(compose_run: Compose, tmp_path: Path) -> Path:
    run(compose_run(*LLAMA, "trainer.max_steps=2", "schedule.warmup_steps=0", f"run_dir={tmp_path / 'base'}"))
    return tmp_path / "base"


@pytest.mark.parametrize("growth", [1, 4])
def test_only_what_reads_the_width_is_slower_in_a_wide_network(growth: int) -> None:
    """Under mup: of A the inputs grow, of B, which reads r numbers, they do not (Hayou et al. 2024)."""
    config = TransformerConfig(dim=32, n_layers=1, n_heads=2, max_length=32, vocab_size=257, ffn_dim=64)
    model = Transformer(replace(config, parametrization="mup", base_dim=32 // growth))
    Lora(layers=["query", "down"]).attach(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = AdamW(lr=1e-2).build(model).param_groups
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert len(rates) == 4
    assert all(rate == pytest.approx(1e-2 / (growth if "lora_A" in name else 1)) for name, rate in rates.items())


def test_it_starts_as_the_network_that_it_is_put_on() -> None:
    config = TransformerConfig(dim=32, n_layers=2, n_heads=2, max_length=32, vocab_size=257)
    torch.manual_seed(0)
    model = Transformer(config)
    before = logits(model)
    Lora(r=4).attach(model)
    assert torch.equal(logits(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2  # A and B, of two layers in each of two blocks
    assert all(".lora_" in name for name in trained)
    layer = model.blocks[0].attention.query
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    layer.lora_B["default"].reset_parameters()
    assert not layer.lora_B["default"].weight.any()


def test_heads_that_start_anew_are_trained(compose_run: Compose, tmp_path: Path) -> None:
    """Those that the weights lack, also of the vocabulary; those that they have are not."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=120, max_position_embeddings=32, **sizes)
    bert = transformers.BertForMaskedLM(config)
    bert.save_pretrained(tmp_path / "whole")
    bert.bert.save_pretrained(tmp_path / "body")
    tuned = [*FAMILIES["encoder"], "adapter=lora", "data.tasks.masked_lm.next_sentence=false"]
    tuned = [line for line in tuned if line.partition("=")[0] != "model.next_sentence"]
    trained = {}
    for name in ("whole", "body"):
        cfg = compose_run(*tuned, f"init_from={tmp_path / name}", f"run_dir={tmp_path / 'runs' / name}")
        cfg.model = {"_target_": "llm.model.Pretrained"}
        run(cfg)
        optimizer = saved(tmp_path / "runs" / name)["optimizer"]
        names = {key.removeprefix("optimizer.model.").rpartition(".")[0] for key in optimizer}
        trained[name] = {key for key in names if ".lora_" not in key}
        planned = subject(cfg, Stated()).network.named_parameters()
        assert {key for key, weight in planned if weight.requires_grad and ".lora_" not in key} == trained[name]
    assert trained["whole"] == set()
    heads = {"transform.dense.weight", "transform.dense.bias", "transform.norm.weight", "transform.norm.bias"}
    assert trained["body"] == heads | {"head.bias"}
    with pytest.raises(CheckpointError, match=r"head: is trained, and no layer of its own .* export the merged model"):
        write_peft(tmp_path / "runs" / "body", tmp_path / "adapter")


def test_merged_apart_and_in_peft_it_is_the_same(compose_run: Compose, tmp_path: Path, base: Path) -> None:
    run(compose_run(*ADAPTED, f"init_from={base}"))
    before, after = saved(base)["state_dict"], saved(tmp_path / "run")["state_dict"]
    kept = {name.replace(".base_layer", ""): weight for name, weight in after.items() if ".lora_" not in name}
    assert kept.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in kept.items())
    merged, _ = load(tmp_path / "run")
    plain, _ = load(base)
    assert (logits(merged) - logits(plain)).abs().max() > 1e-3  # it has learnt something
    put_on(plain, tmp_path / "run")
    torch.testing.assert_close(logits(plain), logits(merged))

    import peft
    from transformers import AutoModelForCausalLM

    export_folder(base, tmp_path / "theirs")
    write_peft(tmp_path / "run", tmp_path / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(TOKENS).logits, logits(merged), rtol=1e-4, atol=1e-5)
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    export_folder(tmp_path / "run", tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(TOKENS).logits, logits(merged), rtol=1e-4, atol=1e-5)


def test_a_classifier_goes_with_its_adapter(
    compose_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Put on the network that it was trained on, and in peft's hands: the head is not the one that was there."""
    import peft
    import transformers

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "red two"[n % 2 :], "label": n % 2}) + "\n" for n in range(60)))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=120, max_position_embeddings=32, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tuned = ["model=tiny_encoder", "objective=classification", "data/tasks=classification", "tokenizer=wordpiece"]
    tuned += ["tokenizer.vocab_size=120", "data.tasks.classification.labels=[a,b]", "callback.sample.prompts=[]"]
    cfg = compose_run(*tuned, f"data.path={path}", f"init_from={tmp_path / 'base'}", "adapter=lora", "optimizer.lr=0.1")
    cfg.model = {"_target_": "llm.model.Pretrained"}
    run(cfg)
    ours, _ = load(tmp_path / "run")
    tokens = TOKENS[:, :9]
    expected = ours.label_logits(ours(tokens)[:, 0])
    write_peft(tmp_path / "run", tmp_path / "adapter")
    bert = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(bert, tmp_path / "adapter").eval()
    torch.testing.assert_close(adapted(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    plain = Transformer(ours.config).eval()
    load_into(plain, tmp_path / "base")
    put_on(plain, tmp_path / "run")
    torch.testing.assert_close(plain.label_logits(plain(tokens)[:, 0]), expected, rtol=1e-4, atol=1e-5)
    load(tmp_path / "run")[1].save(tmp_path / "base")
    import_folder(tmp_path / "base", tmp_path / "imported")
    capsys.readouterr()
    main(["generate", str(tmp_path / "imported"), "--adapter", str(tmp_path / "run"), "--prompt", "red"])
    told = re.fullmatch(r"([ab]) [\d.]+%  ([ab]) [\d.]+%\n", capsys.readouterr().out)
    assert told is not None, "labels are the base's, which has no names"
    with pytest.raises(
        CheckpointError, match=r"classifier\.bias was trained beside its adapter, .* use the run itself"
    ):
        put_on(Transformer(replace(ours.config, n_labels=None)), tmp_path / "run")


def test_the_mean_of_checkpoints_is_that_of_merged_weights(compose_run: Compose, tmp_path: Path, base: Path) -> None:
    """Not of A and of B, whose product would be another; what is written needs no adapter."""
    kept = ["callback.checkpoint.every_n_train_steps=3", "callback.checkpoint.save_top_k=2"]
    run(compose_run(*ADAPTED, f"init_from={base}", *kept))
    taken = average(tmp_path / "run", tmp_path / "mean", 2)
    first, second, mean = (weights_of(load(path)[0]) for path in (*taken, tmp_path / "mean"))
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match="was trained without an adapter"):
        put_on(load(base)[0], tmp_path / "mean")


def test_an_interrupted_run_goes_on_as_it_was(compose_run: Compose, tmp_path: Path, base: Path) -> None:
    """Under the default optimizer too, of which half has nothing to do."""
    run(compose_run(*ADAPTED, f"init_from={base}", "optimizer=muon"))
    halves = [*ADAPTED, f"init_from={base}", f"run_dir={tmp_path / 'halves'}"]
    run(compose_run(*halves, "trainer.max_steps=3", "schedule=constant"))
    run(compose_run(*ADAPTED, "schedule=constant", f"init_from={base}", f"run_dir={tmp_path / 'one'}"))
    run(compose_run(*halves, "trainer.max_steps=6", "schedule=constant"))
    one, two = (saved(tmp_path / name)["state_dict"] for name in ("one", "halves"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_the_same(
    compose_run: Compose, tmp_path: Path, corpus: Path, cache_dir: Path, base: Path, strategy: str
) -> None:
    settings = [*ADAPTED, f"init_from={base}", "optimizer.lr=1e-3"]
    run(compose_run(*settings))
    places = [f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path / 'two'}"]
    run_on_ranks(run_composed, 2, [*places, *settings, f"strategy={strategy}", "trainer.devices=2"])
    one, two = (saved(tmp_path / name)["state_dict"] for name in ("run", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_says_why(compose_run: Compose, tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="adapter: changes weights that are there - init_from is null"):
        run(compose_run("adapter=lora"))
    with pytest.raises(ConfigError, match=r"adapter\.layers: gate - model\.activation=gelu has none - leave it out"):
        run(compose_run("adapter=lora", "model.activation=gelu", "adapter.layers=[gate,query]", f"init_from={base}"))
    with pytest.raises(ConfigError, match="adapter: changes weights that are there - init_from is null"):
        run(compose_run("adapter=lora", "resume=must", f"run_dir={base}"))
    with pytest.raises(ConfigError, match=r"adapter.layers=.'nothing'.: must be some of query, key"):
        run(compose_run("adapter=lora", "adapter.layers=[nothing]", f"init_from={base}"))
    run(compose_run(*ADAPTED, f"init_from={base}", "trainer.max_steps=3"))
    with pytest.raises(ConfigError, match=r"adapter\.alpha: 64 - .*step-00000003 has 16\.0"):
        run(compose_run(*ADAPTED, f"init_from={base}", "adapter.alpha=64"))
    with pytest.raises(CheckpointError, match="was trained without an adapter"):
        put_on(load(base)[0], base)
    with pytest.raises(CheckpointError, match="was trained without an adapter"):
        write_peft(base, tmp_path / "out")
