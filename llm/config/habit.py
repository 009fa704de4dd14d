"""What people who know Lightning or Hugging Face will try, and what it is called here."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Interval

Steps = Annotated[int, Gt(0)]

# Our own rules for keys of lightning.Trainer: narrower than its hints, and judged without importing it.
TRAINER: dict[str, Any] = {
    "max_steps": Steps | None,
    "max_tokens": Annotated[int | float, Gt(0)] | None,
    "max_epochs": Steps | None,
    "precision": Literal["auto", "32-true", "bf16-mixed", "bf16-true"],
    "accelerator": Literal["auto", "cpu", "gpu", "cuda"],
    "devices": Steps | Literal["auto", -1] | list[int],
    "num_nodes": Steps,
    "val_check_interval": Steps | None,
    # A whole number of batches, or a share of them.
    "limit_val_batches": Annotated[int, Ge(0)] | Annotated[float, Interval(ge=0, le=1)] | None,
    "num_sanity_val_steps": Annotated[int, Ge(-1)] | None,
}
LENGTHS = ("max_steps", "max_tokens", "max_epochs")

# Defaults of Lightning that would break a run here: they have to be spelt out.
FIXED: dict[str, tuple[Any, str]] = {
    "use_distributed_sampler": (False, "the data module itself gives every process its share of each step"),
    "check_val_every_n_epoch": (None, "val_check_interval counts optimizer steps across epochs"),
}


class Habit(NamedTuple):
    """A key of Lightning's that has another place here; `neutral` values change nothing and pass."""

    rule: str
    remedy: str
    neutral: tuple[Any, ...] = (None,)


_RESUME = "write resume=auto, must, never or a path"
HABITS: dict[str, Habit] = {
    "accumulate_grad_batches": Habit(
        "follows from the two batch sizes and the number of devices",
        "set data.batch_size (of a step) and data.micro_batch_size (of a device)",
        (None, 1),
    ),
    "gradient_clip_val": Habit("the optimizer clips", "write optimizer.clip_norm=…"),
    "gradient_clip_algorithm": Habit("gradients are clipped by their norm", "write optimizer.clip_norm=…"),
    "log_every_n_steps": Habit("metrics have one flush interval", "write callback.metrics.every_n_steps=…"),
    "ckpt_path": Habit("a run finds its own checkpoint", _RESUME, ()),
    "resume_from": Habit("a run finds its own checkpoint", _RESUME, ()),
    "resume_from_checkpoint": Habit("a run finds its own checkpoint", _RESUME, ()),
    "limit_train_batches": Habit("a run is as long as it says", "write trainer.max_steps=…", (None, 1.0)),
    "limit_test_batches": Habit(
        "there is no test stage", "stage=validate and trainer.limit_val_batches=…", (None, 1.0)
    ),
    "max_time": Habit(
        "a run that ends by the clock is not finished",
        "send it SIGTERM when its time is up: it saves, and continues later",
    ),
    "barebones": Habit("removes what a run is recorded by", "write callback=none logger=none", (None, False)),
    "fast_dev_run": Habit(
        "silences loggers and checkpoints, so it tries out another run than yours",
        "write trainer.max_steps=2 trainer.limit_val_batches=2",
        (None, False, 0),
    ),
    "overfit_batches": Habit(
        "replaces the order of the data",
        "write trainer.max_steps=… with a small data set",
        (None, 0),
    ),
    "plugins": Habit(
        "a strategy brings its own processes, precision and checkpoints",
        "choose strategy=… and trainer.precision=…",
        (None, []),
    ),
    "enable_checkpointing": Habit("checkpoints are a callback", "write ~callback.checkpoint to have none", (None,)),
    "enable_progress_bar": Habit("the bar is a callback", "write ~callback.progress to have none", (None,)),
    "reload_dataloaders_every_n_epochs": Habit(
        "one loader serves the whole run", "leave it out; the order of the data differs from epoch to epoch", (None, 0)
    ),
    "auto_lr_find": Habit("there is no tuner", "sweep it: -m optimizer.lr=1e-3,3e-3", ()),
    "auto_scale_batch_size": Habit("there is no tuner", "set data.micro_batch_size", ()),
    "gpus": Habit("is the number of devices", "write trainer.devices=…", ()),
    "resume": Habit("belongs to the run", _RESUME, ()),
}
# Values that Lightning takes where a node of another group belongs.
NODE_HABITS = {
    "strategy": "choose the group: strategy=…",
    "callbacks": "the callbacks are the nodes of callback: +callback.NAME={_target_: …}, ~callback.NAME",
    "logger": "the loggers are the nodes of logger: logger=none, ~logger.NAME",
}
PRECISION = {
    "16-mixed": "float16 needs loss scaling, bfloat16 does not: write trainer.precision=bf16-mixed",
    "16-true": "float16 needs loss scaling, bfloat16 does not: write trainer.precision=bf16-true",
    "16": "float16 needs loss scaling, bfloat16 does not: write trainer.precision=bf16-mixed",
    "bf16": "write trainer.precision=bf16-mixed",
    "32": "write trainer.precision=32-true",
    "64": "nothing here gains from float64: write trainer.precision=32-true",
    "64-true": "nothing here gains from float64: write trainer.precision=32-true",
    "transformer-engine": "Transformer Engine replaces our layers: write trainer.precision=bf16-mixed",
    "transformer-engine-float16": "Transformer Engine replaces our layers: write trainer.precision=bf16-mixed",
}
CALLBACKS = {
    "StochasticWeightAveraging": ("replaces the schedule", "leave it out; schedule=wsd ends in a decay"),
    "GradientAccumulationScheduler": (
        "accumulation follows from the two batch sizes and the number of devices",
        "set data.batch_size and data.micro_batch_size",
    ),
    "BatchSizeFinder": ("there is no tuner", "set data.micro_batch_size"),
    "LearningRateFinder": ("there is no tuner", "sweep it: -m optimizer.lr=1e-3,3e-3"),
}

# Names from elsewhere for keys of ours; only used for keys that do not exist.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "grad_clip": "optimizer.clip_norm",
    "max_grad_norm": "optimizer.clip_norm",
    "clip_grad_norm": "optimizer.clip_norm",
    "num_warmup_steps": "schedule.warmup_steps",
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "total_steps": "trainer.max_steps",
    "train_batch_size": "data.batch_size",
    "global_batch_size": "data.batch_size",
    "per_device_train_batch_size": "data.micro_batch_size",
    "block_size": "data.max_length",
    "seq_len": "data.max_length",
    "seq_length": "data.max_length",
    "sequence_length": "data.max_length",
    "context_length": "data.max_length",
    "d_model": "model.dim",
    "n_embd": "model.dim",
    "hidden_size": "model.dim",
    "embed_dim": "model.dim",
    "n_layer": "model.n_layers",
    "num_layers": "model.n_layers",
    "num_hidden_layers": "model.n_layers",
    "n_head": "model.n_heads",
    "num_heads": "model.n_heads",
    "num_attention_heads": "model.n_heads",
    "num_key_value_heads": "model.n_kv_heads",
    "intermediate_size": "model.ffn_dim",
    "num_gpus": "trainer.devices",
    "nproc_per_node": "trainer.devices",
    "nnodes": "trainer.num_nodes",
    "tp_size": "strategy.tensor_parallel_size",
    "tensor_parallel_degree": "strategy.tensor_parallel_size",
    "data_parallel_replicate_degree": "strategy.replicate_size",
    "sharding_strategy": "strategy.reshard_after_forward",
    "gradient_checkpointing": "strategy.checkpointing",
    "activation_checkpointing": "strategy.checkpointing",
    "torch_compile": "strategy.compile",
    "ddp_timeout": "strategy.timeout_s",
    "gpus": "trainer.devices",
    "bf16": "trainer.precision",
    "dtype": "trainer.precision",
    "output_dir": "run_dir",
    "gradient_accumulation_steps": "data.micro_batch_size",
    "logging_steps": "callback.metrics.every_n_steps",
    "save_total_limit": "callback.checkpoint.save_top_k",
    "fp16": "trainer.precision",
    "save_steps": "callback.checkpoint.every_n_train_steps",
    "eval_steps": "trainer.val_check_interval",
    "eval_interval": "trainer.val_check_interval",
}


def refused_callback(target: Any) -> tuple[str, str] | None:
    """Why a callback class, or one derived from it, has no place in a run: (rule, remedy)."""
    if not inspect.isclass(target):
        return None
    for base in target.__mro__:
        if base.__name__ in CALLBACKS and base.__module__.startswith("lightning."):
            return CALLBACKS[base.__name__]
    return None
