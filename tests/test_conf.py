"""Every shipped YAML: composes, passes the check, and runs two steps or, if of real size, is built on the meta
device."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from llm.config import ConfigError, check, check_overrides, register
from llm.model import Transformer
from llm.run import run
from llm.tokenizer import Bytes, WordPiece
from tests.runs import Compose, composed

CONF = Path(__file__).parents[1] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CHOICES = sorted(
    (group.name, path.stem)
    for group in CONF.iterdir()
    if group.is_dir() and group.name != "experiment"
    for path in group.glob("[!_]*.yaml")
)
REAL_SIZE = {"gpt2_124m", "llama_1b", "bert_base", "t5_base"}
# What an objective needs beside itself, in the tiny run.
FAMILY = {
    "masked_lm": ["model=tiny_encoder", "data/tasks=masked_lm", "tokenizer=wordpiece", "tokenizer.vocab_size=300"],
    "seq2seq": ["model=tiny_encoder_decoder", "data/tasks=span_denoising", "tokenizer=unigram"],
}
# Objectives that need rows with answers: tests/test_evaluate.py trains each of them.
SUPERVISED = {"classification", "token_classification", "span_extraction", "preference", "lora"}
# Of each experiment in fine-tuning: rows as its own data set has them, and a model in the place of the pretrained one.
FINE_TUNING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "translate_multi30k": ({"en": "a dog", "de": "ein Hund"}, ["model.n_layers=1", "tokenizer.vocab_size=130"]),
    "summarise_scitldr": (
        {"source": "a long text", "target": "short"},
        ["model=tiny_encoder_decoder", "data.target_length=32"],
    ),
    "chat_sft": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        ["model=tiny_decoder"],
    ),
    "classify_banking77": ({"text": "where is my card", "label_text": "card_arrival"}, ["model=tiny_encoder"]),
    "classify_pairs": ({"sentence1": "a dog", "sentence2": "dogs", "label": 1}, ["model=tiny_encoder"]),
    "dpo": ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, ["model=tiny_decoder", "init_from=BASE"]),
    "lora_smollm2": (
        {"question": "one and one", "answer": "two"},
        ["model=tiny_decoder", "adapter.layers=[query,up]", "init_from=BASE"],
    ),
    "qa_squad": (
        {"question": "who", "context": "a dog runs", "answers": {"text": ["dog"], "answer_start": [2]}},
        ["model=tiny_encoder"],
    ),
}


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """What tokenizer=pretrained asks for."""
    Bytes().build([]).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def needs(choice: str, corpus: Path, tokenizer_folder: Path) -> list[str]:
    """The keys that a choice leaves to the user."""
    return {
        "files": [f"data.path={corpus}"],
        "text": [f"data.sources.text.path={corpus.parent}/text.txt"],
        "book": [f"data.sources.text.path={corpus.parent}/text.txt"],
        "shakespeare_char": [f"data.sources.text.path={corpus}"],
        "mixture": [f"data.sources.files.path={corpus}"],
        "pretrained": [f"tokenizer.path={tokenizer_folder}"],
        "llama_1b": [f"tokenizer.path={tokenizer_folder}"],
        "lines": [f"data.sources.lines.paths={{text:{corpus}}}"],
        "classification": ["data.tasks.classification.labels=[a,b]"],
    }.get(choice, [])


def on_meta(cfg: DictConfig) -> Transformer:
    """The network of `cfg` without its memory."""
    config = instantiate(OmegaConf.merge(cfg.model, {"vocab_size": cfg.model.vocab_size or 512}))
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning(name: str, corpus: Path, cache_dir: Path, tmp_path: Path) -> None:
    """On local rows of the same columns, with a small model in the place of the pretrained one."""
    row, model = FINE_TUNING[name]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    recipe = WordPiece(80) if model == ["model=tiny_encoder"] else Bytes()
    recipe.build(["some words where is my card a dog runs who"]).save(tmp_path / "tokenizer")
    tokenizer = [] if name == "translate_multi30k" else [f"tokenizer.path={tmp_path / 'tokenizer'}"]
    places = [f"data.cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}", "trainer.accelerator=cpu", "logger=none"]
    local = ["data=files", f"data.path={tmp_path / 'rows.jsonl'}", "data.val_every=10", "data.max_length=64"]
    short = ["trainer.max_epochs=null", "trainer.max_steps=1", "schedule.warmup_steps=0", "data.batch_size=2"]
    short += ["data.micro_batch_size=null", "trainer.limit_val_batches=1"]
    if "init_from=BASE" in model:
        base = [*places, *short, "tokenizer=pretrained", *tokenizer, "data=files", f"data.path={corpus}"]
        run(composed(["data.max_length=64", f"run_dir={tmp_path / 'base'}"], base))
        model = [word.replace("BASE", str(tmp_path / "base")) for word in model]
    settings = [*places, *local, *short, *model, *tokenizer]
    assert run(composed(settings, [f"experiment={name}"])).step == 1


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in FINE_TUNING])
def test_experiment(name: str, corpus: Path, cache_dir: Path, tokenizer_folder: Path) -> None:
    cfg = composed(needs(name, corpus, tokenizer_folder), [f"experiment={name}"])
    check(cfg)
    if name in REAL_SIZE:
        assert on_meta(cfg).n_parameters() > 1e8
        assert cfg.strategy.compile == "auto"
        return
    places = [f"data.cache_dir={cache_dir}", f"run_dir={tokenizer_folder.parent / 'run'}", "trainer.accelerator=cpu"]
    local = ["data=files", f"data.path={corpus}", "logger=none", "trainer.max_steps=1", "schedule.warmup_steps=0"]
    short = ["trainer.limit_val_batches=1", "callback.sample.max_new_tokens=4"]
    assert run(composed([*places, *local, *short], [f"experiment={name}"])).step == 1


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: str(value))
def test_choice(
    group: str, choice: str, compose_run: Compose, corpus: Path, tokenizer_folder: Path, request: pytest.FixtureRequest
) -> None:
    """One by one in the default run: the check passes; models are built, sources of the hub not (that needs a
    network)."""
    (corpus.parent / "text.txt").write_text("One paragraph.\n\nAnother one.\n" * 20)
    small = group not in ("model", "data", "trainer")
    overrides = [f"{group}={choice}", *(needs(choice, corpus, tokenizer_folder) if group != "model" else [])]
    if choice in SUPERVISED:
        return
    if (group, choice) == ("model", "pretrained"):
        check(composed([], overrides))
    elif group == "model":
        cfg = composed([], overrides)
        check(cfg)
        assert on_meta(cfg).n_parameters() > 1e6
    elif small and group not in ("callback", "logger", "tokenizer"):
        run(compose_run(*overrides, *FAMILY.get(choice, []), "trainer.max_steps=3"))
    else:
        cfg = composed([], overrides)
        check(cfg)
        assert instantiate(cfg.data, _convert_="all").sources


@pytest.mark.parametrize("choice", ["bpe", "bytes", "pretrained"])
def test_tokenizer_choice_trains(choice: str, compose_run: Compose, corpus: Path, tokenizer_folder: Path) -> None:
    vocabulary = ["tokenizer.vocab_size=300"] if choice == "bpe" else []
    run(
        compose_run(f"tokenizer={choice}", *needs(choice, corpus, tokenizer_folder), *vocabulary, "trainer.max_steps=3")
    )


def documents() -> str:
    return "\n".join(
        page.read_text() for page in [CONF.parent / "README.md", *sorted((CONF.parent / "docs").glob("*.md"))]
    )


def test_commands_of_the_documents_compose(corpus: Path, tokenizer_folder: Path) -> None:
    """Every `python train.py …` of README and docs is a command line without mistakes."""
    register()
    commands = re.findall(r"^python train\.py ?([^#\n]*)", documents(), flags=re.MULTILINE)
    assert len(commands) > 10
    for command in dict.fromkeys(commands):
        plain = re.sub(r"\$('[^']*')", lambda found: found[1].replace("\\n", "\n"), command)  # as bash reads $'…'
        words = shlex.split(plain)
        for name, path in (
            ("my.jsonl", corpus),
            ("book.txt", corpus),
            ("FOLDER", tokenizer_folder),
            ("runs/smollm2", tokenizer_folder),
        ):
            words = [word.replace(name, str(path)) for word in words]
        check_overrides(words, CONF)


def test_mistakes_shown_in_the_documents_are_what_is_printed() -> None:
    register()
    shown = re.findall(r"^\$ python train\.py ([^\n]*)\n(.*?)```", documents(), flags=re.MULTILINE | re.DOTALL)
    assert shown
    for command, printed in shown:
        with pytest.raises(ConfigError) as refused:
            check_overrides(command.split(), CONF)
        assert str(refused.value) == printed.strip()


def test_python_of_the_documents_runs(compose_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(compose_run(f"run_dir={tmp_path / 'runs' / 'wider'}"))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", documents(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_pages_that_are_linked_exist() -> None:
    pages = re.findall(r"\]\(([^)#]+\.md)\)", (CONF.parent / "README.md").read_text())
    assert pages
    assert [page for page in pages if not (CONF.parent / page).exists()] == []
