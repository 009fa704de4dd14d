"""A run of several ranks: what is checked before it starts, what it leaves behind, what its callbacks do to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from llm.agree import agree_with_first
from llm.config import ConfigError
from llm.launch import Place
from llm.run import run
from tests.ranks import run_on_ranks
from tests.runs import Compose, run_composed, saved

FSDP_TP = ["strategy=fsdp", "strategy.tensor_parallel_size=2"]


@pytest.fixture
def places(corpus: Path, cache_dir: Path) -> list[str]:
    return [f"data.path={corpus}", f"data.cache_dir={cache_dir}", "data.micro_batch_size=1", "packages=[tests]"]


class Validated(Callback):
    """Writes down the held-out rows that this rank is given."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        with open(Path(self.folder) / f"rank{trainer.global_rank}", "a") as file:
            samples = [sample for part in batch.micro_batches for sample in part["samples"].tolist()]
            file.writelines(f"{sample}\n" for sample in samples if sample >= 0)


@pytest.mark.parametrize(
    ("n", "strategy", "readers"),
    [
        (2, ["strategy=ddp"], [[0], [1]]),
        (4, ["strategy=fsdp", "strategy.replicate_size=2"], [[0], [1], [2], [3]]),
        (4, FSDP_TP, [[0, 1], [2, 3]]),
    ],
)
def test_each_held_out_row_counts_once(
    n: int, strategy: list[str], readers: list[list[int]], places: list[str], tmp_path: Path
) -> None:
    """Over the ranks; those of one tensor axis read the same."""
    watch = f"+callback.validated={{_target_: tests.strategy.test_run.Validated, folder: {tmp_path}}}"
    short = ["trainer.max_steps=1", "schedule=constant", "schedule.warmup_steps=0", "~callback.sample"]
    arguments = [*places, *short, *strategy, f"trainer.devices={n}", f"run_dir={tmp_path / 'run'}", watch]
    run_on_ranks(run_composed, n, arguments)
    seen = [sorted(map(int, (tmp_path / f"rank{rank}").read_text().split())) for rank in range(n)]
    for same in readers:
        assert all(seen[rank] == seen[same[0]] for rank in same)
    rows = sorted(row for same in readers for row in seen[same[0]])
    assert rows == list(range(len(rows)))
    assert len(rows) > n


@pytest.fixture(scope="module")
def with_all() -> dict[str, Any]:
    """Filled by the first test: the weights of a run with all callbacks."""
    return {}


@pytest.mark.parametrize("removed", ["", "metrics", "progress", "sample", "due_validation", "preempt", "summary"])
def test_no_callback_changes_the_curve(
    places: list[str], tmp_path: Path, with_all: dict[str, Any], removed: str
) -> None:
    """Five steps on two ranks that each hold half of the weights; dropout is on."""
    without = [f"~callback.{removed}"] if removed else []
    arguments = [*places, "strategy=fsdp", "trainer.devices=2", "trainer.max_steps=5", f"run_dir={tmp_path}", *without]
    run_on_ranks(run_composed, 2, arguments)
    weights = saved(tmp_path)["state_dict"]
    with_all.setdefault("weights", weights)
    torch.testing.assert_close(weights, with_all["weights"], rtol=0, atol=0)


def test_only_rank_0_writes(places: list[str], tmp_path: Path) -> None:
    """One run directory with one of everything, the same as of one process."""
    arguments = [*places, "strategy=ddp", "trainer.devices=2", "logger=default", f"run_dir={tmp_path / 'run'}"]
    run_on_ranks(run_composed, 2, arguments)
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    files.remove(".lock")
    everything = (
        "attempts.jsonl checkpoints config.yaml exit.json ledger.jsonl loss.png metrics.csv metrics.jsonl samples.txt"
    )
    assert " ".join(files) == f"{everything} summary.json tensorboard tokenizer wandb"
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 3, 4, 6, 6]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"]


def evaluated(overrides: list[str]) -> dict[str, float]:
    return run_composed(overrides).metrics


def test_a_checkpoint_is_evaluated_by_any_strategy(places: list[str], tmp_path: Path) -> None:
    """On the same rows, where they are limited too: a batch of validation is a batch over all processes."""
    arguments = [*places, f"run_dir={tmp_path / 'run'}", "trainer.limit_val_batches=1"]
    trained = run_composed([*arguments, "strategy=single"]).metrics
    alone = run_composed([*arguments, "stage=validate"]).metrics
    sharded = run_on_ranks(evaluated, 4, [*arguments, "stage=validate", *FSDP_TP, "trainer.devices=4"])
    assert alone == trained
    for metrics in sharded:
        assert metrics == pytest.approx(alone, rel=1e-6)


def test_weights_of_one_process_start_a_run_of_many(places: list[str], tmp_path: Path) -> None:
    """The first loss of the new run is that of the old weights."""
    places = [*places, "trainer.max_steps=2", "schedule.warmup_steps=0", "~callback.sample"]
    run_composed([*places, f"run_dir={tmp_path / 'first'}", "schedule=constant"])
    fresh = [*places, f"init_from={tmp_path / 'first'}", "model.dropout=0", "callback.metrics.every_n_steps=1"]
    run_composed([*fresh, f"run_dir={tmp_path / 'one'}"])
    run_on_ranks(run_composed, 4, [*fresh, f"run_dir={tmp_path / 'many'}", *FSDP_TP, "trainer.devices=4"])
    losses = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]
        for name in ("one", "many")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["strategy=ddp", "trainer.devices=2"],
            "2 x 1 - this process is one of 1 (none) - python train.py starts them",
        ),
        (["strategy=ddp", "trainer.devices=3"], "data.batch_size=8: must be a multiple of 3 processes"),
        (
            ["strategy=fsdp", "trainer.devices=4", "strategy.tensor_parallel_size=4"],
            "strategy.tensor_parallel_size: 4 - must divide model.n_heads, which is 2 - change one of the two",
        ),
        (
            ["strategy=fsdp", "trainer.devices=3", "strategy.replicate_size=2"],
            "strategy.replicate_size x strategy.tensor_parallel_size: 2 x 1 - must divide the 3 processes of the run",
        ),
        (
            ["trainer.devices=2"],
            "strategy: single - drives one device, and trainer.devices x trainer.num_nodes is 2 - take strategy=ddp",
        ),
        (
            ["trainer.accelerator=gpu"],
            "trainer.accelerator: gpu - torch sees no GPU here - set trainer.accelerator=cpu",
        ),
    ],
)
def test_shapes_that_do_not_fit(compose_run: Compose, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run(compose_run(*overrides))
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("launcher", "remedy"),
    [
        ("torchrun", "start torchrun with --nnodes=1 --nproc-per-node=2, or change the two keys"),
        ("srun", "start srun with --nodes=1 --ntasks-per-node=2, or change the two keys"),
        ("environment", "WORLD_SIZE says how many there are: change it or the two keys, or unset RANK, LOCAL_RANK"),
        ("launch", "start python train.py once on each node"),
    ],
)
def test_other_processes_than_configured(compose_run: Compose, launcher: Any, remedy: str) -> None:
    from llm.agree import _processes

    cfg = compose_run("strategy=ddp", "trainer.devices=2")
    [line] = _processes(cfg, Place(1, 1, 4, 4, 0, "host", 1234, launcher))
    assert line.startswith(f"trainer.devices x trainer.num_nodes: 2 x 1 - this process is one of 4 ({launcher}) - ")
    assert remedy in line


def test_more_devices_than_there_are(compose_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm.agree import _devices

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cfg = compose_run("strategy=ddp", "trainer.devices=8", "trainer.accelerator=cuda")
    assert _devices(cfg) == ["trainer.devices: 8 - this machine has 4 GPUs - set trainer.devices=4"]


def test_ranks_with_another_configuration(compose_run: Compose) -> None:
    first = OmegaConf.to_container(compose_run(), resolve=True)
    agree_with_first(compose_run(), first)
    with pytest.raises(ConfigError, match=r"seed: 1 - rank 0 has 0 - start all ranks with the same command and files"):
        agree_with_first(compose_run("seed=1"), first)
