"""Lightning's own classes, and what people who know Lightning will try."""

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import OmegaConf

from llm.config import ConfigError, check
from llm.config.habit import CALLBACKS, HABITS, PRECISION
from llm.config.target import TargetError, resolve, signature

Found = Callable[[dict[str, Any]], list[str]]
RIGHT = {
    "_target_": "lightning.Trainer",
    "max_steps": 10,
    "max_tokens": None,
    "max_epochs": None,
    "precision": "bf16-mixed",
    "use_distributed_sampler": False,
    "check_val_every_n_epoch": None,
}
STEPS = {"_target_": "toyhouse.Linear"}


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"max_steps": None, "max_tokens": 1e9},
        {"max_steps": None, "max_epochs": 2},
        {"devices": "auto"},
        {"devices": [0, 1], "accelerator": "cpu", "num_nodes": 2},
        {"accumulate_grad_batches": 1, "gradient_clip_val": None, "barebones": False, "overfit_batches": 0.0},
        {"deterministic": "warn", "profiler": "simple", "limit_val_batches": 0.5},
    ],
)
def test_right_trainer_passes(mistakes: Found, trainer: dict[str, Any]) -> None:
    assert mistakes({"trainer": {**RIGHT, **trainer}}) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_steps", -7, "trainer.max_steps: -7 - must be a whole number greater than 0 or null"),
        ("max_steps", "abc", "trainer.max_steps: 'abc' - must be a whole number"),
        ("max_steps", 1e3, "trainer.max_steps: 1000.0 - must be a whole number greater than 0 or null - write 1000"),
        ("precision", "bf17", "must be 'auto' or '32-true' or 'bf16-mixed' or 'bf16-true' - did you mean 'bf16-"),
        ("devices", 0, "trainer.devices: 0 - must be a whole number greater than 0 or 'auto' or -1 or a list"),
        ("accelerator", "gpuu", "did you mean 'gpu'?"),
        ("val_check_interval", 0.5, "trainer.val_check_interval: 0.5 - must be a whole number greater than 0 or null"),
        ("use_distributed_sampler", True, "must be false: the data module itself gives every process its share"),
        ("check_val_every_n_epoch", 1, "must be null: val_check_interval counts optimizer steps across epochs"),
        ("num_nodes", "${nodes}", "trainer.num_nodes: ${nodes} - nodes does not exist"),
        ("detect_anomaly", "yes", "trainer.detect_anomaly: 'yes' - must be true or false"),
        ("max_stesp", 5, "lightning.Trainer has no such argument - did you mean trainer.max_steps?"),
        ("default_root_dir", 3, "trainer.default_root_dir: 3 - must be text"),
        ("strategy", "ddp", "trainer.strategy: 'ddp' - is a group of its own here - choose the group: strategy=…"),
        ("logger", False, "trainer.logger: false - is a group of its own here - the loggers are the nodes of logger"),
        ("callbacks", [STEPS], "trainer.callbacks.0: a Linear - must be a node that builds a Callback"),
    ],
)
def test_trainer_value(mistakes: Found, key: str, value: Any, message: str) -> None:
    (found,) = mistakes({"trainer": {**RIGHT, key: value}})
    assert message in found


def test_defaults_of_lightning_have_to_be_spelt_out(mistakes: Found) -> None:
    short = {
        key: value for key, value in RIGHT.items() if key not in ("use_distributed_sampler", "check_val_every_n_epoch")
    }
    found = mistakes({"trainer": short})
    assert found[0].startswith("trainer.use_distributed_sampler: not set - must be false")
    assert found[1].endswith("write trainer.check_val_every_n_epoch=null")


def test_exactly_one_length(mistakes: Found) -> None:
    rule = "exactly one of trainer.max_steps, trainer.max_tokens, trainer.max_epochs says how long the run is"
    none, two = {**RIGHT, "max_steps": None}, {**RIGHT, "max_tokens": 1e6}
    assert mistakes({"trainer": none}) == [f"trainer.max_steps: null - {rule} - write trainer.max_steps=1000"]
    assert mistakes({"trainer": two}) == [
        f"trainer.max_tokens: max_steps=10, max_tokens=1000000.0 - {rule} - write trainer.max_steps=null beside it"
    ]
    wrong = mistakes({"trainer": {**RIGHT, "max_steps": None, "max_tokens": -1}})
    assert wrong == ["trainer.max_tokens: -1 - must be a whole number or a number greater than 0 or null"]


@pytest.mark.parametrize("name", sorted(HABITS))
def test_habit_is_answered_with_its_replacement(mistakes: Found, name: str) -> None:
    (found,) = mistakes({"trainer": {**RIGHT, name: 4}})
    assert found == f"trainer.{name}: 4 - {HABITS[name].rule} - {HABITS[name].remedy}"


@pytest.mark.parametrize("value", sorted(PRECISION))
def test_precision_is_refused_with_its_reason(mistakes: Found, value: str) -> None:
    (found,) = mistakes({"trainer": {**RIGHT, "precision": value}})
    assert found.startswith(
        f"trainer.precision: '{value}' - must be 'auto' or '32-true' or 'bf16-mixed' or 'bf16-true' - "
    )
    assert found.endswith(PRECISION[value])


@pytest.mark.parametrize("name", sorted(CALLBACKS))
def test_callback_is_refused(mistakes: Found, name: str) -> None:
    target = f"lightning.pytorch.callbacks.{name}"
    (found,) = mistakes({"callback": {"mine": {"_target_": target}}})
    assert found == f"callback.mine: {target} - {CALLBACKS[name][0]} - {CALLBACKS[name][1]}"


def test_lightnings_callbacks_and_loggers_are_judged(mistakes: Found) -> None:
    checkpoint = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "every_n_train_step": 5, "save_top_k": "x"}
    wandb = {"_target_": "lightning.pytorch.loggers.WandbLogger", "projct": "llm", "tags": ["any"]}
    found = mistakes({"callback": {"checkpoint": checkpoint}, "logger": {"wandb": wandb}})
    assert [text.split(":")[0] for text in found] == [
        "callback.checkpoint.every_n_train_step",
        "callback.checkpoint.save_top_k",
        "logger.wandb.projct",
    ]
    assert found[0].endswith("did you mean callback.checkpoint.every_n_train_steps?")


def test_wiring_by_reference_is_judged_by_class(mistakes: Found) -> None:
    callback = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss"}
    logger = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "x"}
    trainer = {**RIGHT, "callbacks": "${oc.dict.values:callback}", "logger": "${oc.dict.values:logger}"}
    nodes = {"callback": {"stop": callback}, "logger": {"csv": logger}, "trainer": trainer}
    assert mistakes(nodes) == []
    nodes["trainer"] = {**trainer, "callbacks": "${oc.dict.values:logger}"}
    (found,) = mistakes(nodes)
    assert "trainer.callbacks.0: a CSVLogger - must be a node that builds a Callback" in found


def test_only_what_a_run_needs_of_lightning_may_be_named() -> None:
    for path in ("lightning.Trainer", "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.callbacks.Timer"):
        assert callable(resolve(path, ()))
    refused = {
        "lightning.seed_everything": "is defined in lightning.fabric.utilities.seed",
        "lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree": "leads into shutil",
        "lightning.pytorch.callbacks.model_checkpoint.Path": "is defined in pathlib, which a config",
        "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpont": "did you mean .*ModelCheckpoint",
        "lightning.Fabric": "is defined in lightning.fabric.fabric",
    }
    for path, message in refused.items():
        with pytest.raises(TargetError, match=message):
            resolve(path, ())
    with pytest.raises(TargetError, match="is outside llm, lightning - packages="):
        resolve("torch.optim.AdamW", ())
    assert "lr" in signature(resolve("torch.optim.AdamW", ("torch.optim",))).parameters


def test_trainers_wrapped_constructor_is_seen_through() -> None:
    parameters = signature(resolve("lightning.Trainer", ())).parameters
    assert {"precision", "max_steps", "detect_anomaly"} <= set(parameters)
    assert parameters["max_steps"].hint is int


def test_a_light_mistake_is_answered_without_the_heavy_rooms() -> None:
    model = {"_target_": "toyhouse.Net", "dim": 0}
    data = {"_target_": "toyhouse.Open", "namee": 1}
    cfg = OmegaConf.create({"packages": ["toyhouse"], "model": model, "data": data})

    def found(overrides: list[str] | None) -> int:
        with pytest.raises(ConfigError) as caught:
            check(cfg, overrides)
        return len(caught.value.mistakes)

    assert found(["model.dim=0", "trainer.max_steps=3"]) == 1
    assert found(["model.dim=0", "data.namee=1"]) == found(["trainer.detect_anomaly=1"]) == found(None) == 2


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"max_time": {"hours": 1}}, "a run that ends by the clock is not finished - send it SIGTERM"),
        (
            {"limit_train_batches": 3},
            "trainer.limit_train_batches: 3 - a run is as long as it says - write trainer.max_steps=…",
        ),
        (
            {"callbacks": []},
            "trainer.callbacks: [] - is a group of its own here - the callbacks are the nodes of callback",
        ),
        ({"enable_progress_bar": False}, "the bar is a callback - write ~callback.progress"),
        ({"enable_checkpointing": True}, "checkpoints are a callback - write ~callback.checkpoint"),
        ({"limit_val_batches": 2.5}, "trainer.limit_val_batches: 2.5 - must be"),
    ],
)
def test_what_would_make_another_run_is_answered(mistakes: Found, trainer: dict[str, Any], message: str) -> None:
    (line,) = mistakes({"trainer": {**RIGHT, **trainer}})
    assert message in line
