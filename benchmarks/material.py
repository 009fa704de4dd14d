"""What all contestants of a contest get: one set of weights, one sequence of steps, written once by the runner."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.machine import ROOT
from benchmarks.measure import Session
from llm.agree import vocab_size
from llm.build import built
from llm.checkpoint import export_folder, save, weights_of
from llm.config import register
from llm.data.collate import Step
from llm.model import Transformer, TransformerConfig
from llm.tokenizer import Tokenizer

# What every run of ours has here: nothing but training, by the settings that all contestants share.
SHARED = [
    "optimizer=adamw",
    "optimizer.lr=1e-4",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "data.val_every=null",
    "trainer.limit_val_batches=0",
]
# As in conf/optimizer/adamw.yaml, but for a tenth of its rate: AdamW divides a gradient by its own size, so that at
# 1e-3 the last bit of two orders of summation has grown to 5e-4 of loss within twenty steps (litgpt's beside ours).
ADAMW = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
CLIP_NORM = 1.0


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of train.py with these overrides."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [*overrides, "run_name=benchmark"])


def vocabulary(overrides: Sequence[str]) -> int:
    """The size of the tokenizer's."""
    return vocab_size(built(composed(overrides).data))


def tokenizer_of(overrides: Sequence[str]) -> Tokenizer:
    """The tokenizer of a run's data."""
    data = built(composed(overrides).data)
    data.prepare()
    return data.tokenizer


def text_file(folder: Path, n_bytes: int) -> Path:
    """So much of the standard library's source, which every machine has."""
    path, texts, size = folder / "text.txt", [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size >= n_bytes:
            break
        texts.append(file.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(texts)[:n_bytes], encoding="utf-8")
    return path


def steps_of(overrides: Sequence[str], n_steps: int) -> list[list[dict[str, Tensor]]]:
    """The first steps of the data of a run, each its micro-batches, as its objective sees them."""
    data = built(composed(overrides).data)
    data.prepare()
    steps: Iterator[Step] = iter(data.train_dataloader())
    found = [step.micro_batches for step in islice(steps, n_steps)]
    while len(found) < n_steps:  # a small corpus is read again
        found += found[: n_steps - len(found)]
    return found


def save_steps(steps: Sequence[Sequence[Mapping[str, Tensor]]], path: Path) -> Path:
    """As `load_steps` of a contestant reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save([[dict(micro_batch) for micro_batch in step] for step in steps], path)
    return path


def save_weights(
    config: TransformerConfig,
    folder: Path,
    *,
    theirs: bool = False,
    state: bool = True,
    tokenizer: Tokenizer | None = None,
    device: str = "cpu",
) -> Path:
    """Weights from a fixed seed, up to three times in `folder`: `step-0`, a step directory for init_from; if `state`,
    `state.pt`, a state dict of llm.model.Transformer; and, if `theirs`, `theirs`, a folder for transformers, which
    takes from `tokenizer` which token is padding. They are drawn on `device`: large ones are sooner on a GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config)
    model.cpu()
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    if state:
        torch.save(model.state_dict(), folder / "state.pt")
    settings = folder / "config.yaml"
    node = {"_target_": "llm.model.TransformerConfig", **asdict(config)}
    settings.write_text(yaml.safe_dump({"model": node}, sort_keys=False))
    attachments = [settings]
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
        attachments.append(folder / "tokenizer")
    save(folder / "step-0", {f"model.{name}": value for name, value in weights_of(model).items()}, {}, attachments)
    if theirs:
        export_folder(folder / "step-0", folder / "theirs")
    return folder


def text_run(session: Session, *, length: int, rows: int, n_steps: int, precision: str) -> list[str]:
    """Overrides of a run over bytes of one long document, so that no row has padding or a second document."""
    text = text_file(session.folder, 30_000 if session.smoke else 1_000_000)
    return [
        "tokenizer=bytes",
        "data=files",
        f"data.path={text}",
        f"data.max_length={length}",
        f"data.batch_size={rows}",
        f"data.micro_batch_size={rows}",
        "data.document_mask=false",
        f"trainer.max_steps={n_steps}",
        f"trainer.precision={precision}",
        "trainer.accelerator=cpu",
        *SHARED,
    ]


def apart(step: Sequence[Mapping[str, Tensor]], fillers: Mapping[str, int]) -> list[dict[str, Tensor]]:
    """The documents of a step of packed rows, each in a row of its own, padded to the longest of the step: what is
    trained on is the same. `fillers` says what padding is, 0 where it says nothing."""
    pieces = [
        {name: values[row][documents == number] for name, values in batch.items() if values.ndim == 2}
        for batch in step
        for row, documents in enumerate(batch["documents"])
        for number in documents.unique().tolist()
        if number
    ]
    names = pieces[0].keys()
    padded = {
        name: pad_sequence([piece[name] for piece in pieces], batch_first=True, padding_value=fillers.get(name, 0))
        for name in names
    }
    return [
        padded | {"documents": (padded["documents"] > 0).long(), "tasks": torch.zeros(len(pieces), dtype=torch.long)}
    ]


def n_real(steps: Sequence[Sequence[Mapping[str, Tensor]]]) -> list[float]:
    """Of each step, the tokens that are not padding, to which no document belongs; rows that tell none are full."""
    return [
        float(
            sum(
                int((batch["documents"] > 0).sum()) if "documents" in batch else batch["tokens"].numel()
                for batch in step
            )
        )
        for step in steps
    ]


def model_config(**settings: Any) -> TransformerConfig:
    """A decoder as GPT-2's, unless `settings` say otherwise."""
    gpt2 = {
        "position": "learned",
        "norm": "layer",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
        "initialisation": "gpt2",
    }
    return TransformerConfig(**gpt2 | settings)


def model_overrides(config: TransformerConfig) -> list[str]:
    """The same model, as a run of ours is told."""
    return [f"++model.{key}={'null' if value is None else value}" for key, value in asdict(config).items()]
