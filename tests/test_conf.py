"""Every shipped YAML: composes, passes the check, and runs two steps or, if of real size, is built on the meta
device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from llm.config import ConfigError, check, check_overrides, register
from llm.model import Transformer
from llm.run import run
from llm.tokenizer import Bytes
from tests.runs import Compose

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
    }.get(choice, [])


def on_meta(cfg: DictConfig) -> Transformer:
    """The network of `cfg` without its memory."""
    config = instantiate(OmegaConf.merge(cfg.model, {"vocab_size": cfg.model.vocab_size or 512}))
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name: str, compose_run: Compose, corpus: Path, cache_dir: Path, tokenizer_folder: Path) -> None:
    cfg = compose("train", [f"experiment={name}", *needs(name, corpus, tokenizer_folder)])
    check(cfg)
    if name in REAL_SIZE:
        assert on_meta(cfg).n_parameters() > 1e8
        assert cfg.strategy.compile == "auto"
        return
    places = [f"data.cache_dir={cache_dir}", f"run_dir={tokenizer_folder.parent / 'run'}", "trainer.accelerator=cpu"]
    local = ["data=files", f"data.path={corpus}", "logger=none", "trainer.max_steps=1", "schedule.warmup_steps=0"]
    short = ["trainer.limit_val_batches=1", "callback.sample.max_new_tokens=4"]
    assert run(compose("train", [f"experiment={name}", *places, *local, *short])).step == 1


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: str(value))
def test_choice(
    group: str, choice: str, compose_run: Compose, corpus: Path, tokenizer_folder: Path, request: pytest.FixtureRequest
) -> None:
    """One by one in the default run: the check passes; models are built, sources of the hub not (that needs a
    network)."""
    (corpus.parent / "text.txt").write_text("One paragraph.\n\nAnother one.\n" * 20)
    small = group not in ("model", "data", "trainer")
    overrides = [f"{group}={choice}", *(needs(choice, corpus, tokenizer_folder) if group != "model" else [])]
    if group == "model":
        cfg = compose("train", overrides)
        check(cfg)
        assert on_meta(cfg).n_parameters() > 1e6
    elif small and group not in ("callback", "logger", "tokenizer"):
        run(compose_run(*overrides, *FAMILY.get(choice, []), "trainer.max_steps=3"))
    else:
        cfg = compose("train", overrides)
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


def test_commands_of_the_documents_compose(corpus: Path) -> None:
    """Every `python train.py …` of README and docs is a command line without mistakes."""
    register()
    commands = re.findall(r"^python train\.py ?([^#\n]*)", documents(), flags=re.MULTILINE)
    assert len(commands) > 10
    for command in commands:
        words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)]
        check_overrides(
            [word.replace("my.jsonl", str(corpus)).replace("book.txt", str(corpus)) for word in words], CONF
        )


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
