"""transformers' Trainer over one of transformers' models.

`python -m benchmarks.contestants.trainer SETTINGS.json`, in the peers' environment. Its own defaults but for what makes
the work equal: the optimizer's settings, rows in the order of the file, no evaluation, no checkpoints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from benchmarks.contestants.plain import LOG_EVERY, load_steps
from benchmarks.turn import Turn

Rows = list[dict[str, Tensor]]


def decoder_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Labels are those of ours, which are one token ahead of their place already."""
    labels = batch["labels"][row]
    return {"input_ids": batch["tokens"][row], "labels": labels, "shift_labels": labels}


def pair_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """A source and its target; what the decoder reads, the model makes of the labels."""
    return {
        "input_ids": batch["source_tokens"][row],
        "attention_mask": (batch["source_documents"][row] > 0).long(),
        "labels": batch["labels"][row],
    }


KINDS = {"decoder": (AutoModelForCausalLM, decoder_row), "encoder_decoder": (AutoModelForSeq2SeqLM, pair_row)}


class List(Dataset[dict[str, Tensor]]):
    """Rows of steps, one after the other."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class InOrder(Trainer):
    """The rows as they come, and the loss of each step at hand."""

    def _get_train_sampler(self, *arguments: Any, **options: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        found = super().compute_loss(model, inputs, *arguments, **options)
        self.step_loss = (found[0] if isinstance(found, tuple) else found).detach()
        return found


class Report(TrainerCallback):
    """After every step."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.trainer: InOrder | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        assert self.trainer is not None
        self.turn.after_step(self.trainer.step_loss)


def main(settings: dict[str, Any]) -> None:
    """Train."""
    turn = Turn()
    kind, row_of = KINDS[settings["kind"]]
    steps = [step[0] for step in load_steps(settings["steps"])]
    n_rows = len(steps[0]["tokens"])
    rows = [row_of(batch, row) for batch in steps for row in range(n_rows)]
    rows = (rows * -(-turn.pace.n_steps * n_rows // len(rows)))[: turn.pace.n_steps * n_rows]
    model = kind.from_pretrained(settings["weights"], attn_implementation="sdpa")
    adamw = settings["adamw"]
    arguments = TrainingArguments(
        output_dir="trainer",
        max_steps=turn.pace.n_steps,
        per_device_train_batch_size=n_rows,
        learning_rate=adamw["lr"],
        weight_decay=adamw["weight_decay"],
        adam_beta1=adamw["betas"][0],
        adam_beta2=adamw["betas"][1],
        adam_epsilon=adamw["eps"],
        max_grad_norm=settings["clip_norm"],
        lr_scheduler_type=settings.get("schedule", "constant"),
        optim="adamw_torch_fused",
        logging_steps=LOG_EVERY,
        save_strategy="no",
        eval_strategy="no",
        use_cpu=settings.get("device", "cpu") == "cpu",
        bf16=settings["precision"] == "bf16-mixed",
        remove_unused_columns=False,
        report_to="tensorboard",
    )
    report = Report(turn)
    trainer = InOrder(
        model, arguments, train_dataset=List(rows), data_collator=default_data_collator, callbacks=[report]
    )
    report.trainer = trainer
    trainer.train()
    if "save" in settings:
        trainer.save_model(settings["save"])


if __name__ == "__main__":
    torch.manual_seed(0)
    main(json.loads(Path(sys.argv[1]).read_text()))
