"""Callbacks watch: with or without any of them the losses are the same bits."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from llm.callback.plot import plot_run
from llm.callback.record import Record, Row
from llm.callback.summary import _print as print_summary
from llm.checkpoint import newest
from llm.config import ConfigError
from llm.console import speak
from llm.guard import DivergedError
from llm.run import run
from llm.signals import PreemptedError
from tests.runs import Compose, saved


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """Filled by the first test: the weights of a run with all callbacks."""
    return {}


@pytest.mark.parametrize(
    "removed", ["", "metrics", "progress", "sample", "due_validation", "preempt", "garbage", "summary"]
)
def test_no_callback_changes_the_curve(
    compose_run: Compose, tmp_path: Path, reference: dict[str, torch.Tensor], removed: str
) -> None:
    run(compose_run(*([f"~callback.{removed}"] if removed else []), "trainer.max_steps=5"))
    weights = saved(tmp_path / "run")["state_dict"]
    if not reference:
        reference.update(weights)
    torch.testing.assert_close(weights, reference, rtol=0, atol=0)


def test_a_run_leaves_what_the_readme_says(compose_run: Compose, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    outcome = run(compose_run("logger=default"))
    for name in [
        "config.yaml",
        "metrics.jsonl",
        "metrics.csv",
        "samples.txt",
        "summary.json",
        "loss.png",
        "exit.json",
        "attempts.jsonl",
    ]:
        assert (run_dir / name).stat().st_size > 0, name
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert list((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000006"]
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")

    summary = json.loads((run_dir / "summary.json").read_text())
    keys = "steps tokens wall_s tokens_per_s parameters train/loss val/loss val/bits_per_byte baselines commit versions"
    assert set(summary) == {*keys.split(), "restarts", "interruptions"}
    assert (summary["steps"], outcome.step) == (6, 6)
    assert summary["val/loss"] == outcome.metrics["val/loss"]
    assert 0 < summary["baselines"]["unigram/bits_per_byte"] < 8
    assert summary["baselines"]["gzip/bits_per_byte"] > 0
    assert 0 < summary["baselines"]["unigram/loss"] < math.log(257)
    assert summary["versions"]["torch"].startswith(torch.__version__.partition("+")[0])

    samples = (run_dir / "samples.txt").read_text()
    assert samples.count("==== step 3, sample") == samples.count("==== step 6, sample") == 3
    assert "\nimport" in samples


def test_rows_are_flushes_and_validations(compose_run: Compose, tmp_path: Path) -> None:
    """max_steps=7: flushes on 2, 4, 6 and the end; validations on 3, 6 and the end."""
    run(compose_run("trainer.max_steps=7"))
    rows = Record(tmp_path / "run").rows()
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6, 7]
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6, 7]
    tokens = [row["tokens"] for row in rows]
    assert tokens == sorted(tokens)
    assert set(rows[0]) == {"step", "tokens", "train/loss", "grad/norm", "lr", "speed/tokens_per_s"}
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["step"]) for row in table] == [row["step"] for row in rows]
    assert [row["val/loss"] for row in table if row["val/loss"]] == [
        str(row["val/loss"]) for row in rows if "val/loss" in row
    ]


def test_train_loss_is_the_token_mean_since_the_last_row(compose_run: Compose, tmp_path: Path) -> None:
    for every in (1, 3):
        run(compose_run(f"callback.metrics.every_n_steps={every}", f"run_dir={tmp_path / str(every)}"))
    fine = [row for row in Record(tmp_path / "1").rows() if "train/loss" in row]
    coarse = [row for row in Record(tmp_path / "3").rows() if "train/loss" in row]
    n_tokens = [row["tokens"] - before for row, before in zip(fine, [0, *(r["tokens"] for r in fine)], strict=False)]
    for number, row in enumerate(coarse):
        part = slice(3 * number, 3 * number + 3)
        mean = sum(r["train/loss"] * n for r, n in zip(fine[part], n_tokens[part], strict=True)) / sum(n_tokens[part])
        assert row["train/loss"] == pytest.approx(mean, abs=1e-9)


def test_early_stopping_ends_the_run_and_it_stays_ended(compose_run: Compose, tmp_path: Path) -> None:
    stop = (
        "callback=early_stopping",
        "callback.early_stopping.patience=1",
        "callback.early_stopping.min_delta=100",
        "callback.checkpoint.every_n_train_steps=100",
        "callback.metrics.every_n_steps=2",
        "trainer.max_steps=50",
    )
    assert run(compose_run(*stop)).step == 6  # validations on 3 and 6, the second no better by 100
    summary = (tmp_path / "run" / "summary.json").read_text()
    assert json.loads(summary)["steps"] == 6
    run(compose_run(*stop))
    assert (tmp_path / "run" / "summary.json").read_text() == summary


def test_a_run_without_validation_samples_at_its_end(compose_run: Compose, tmp_path: Path) -> None:
    run(compose_run("data.val_every=null"))
    assert (tmp_path / "run" / "samples.txt").read_text().count("==== step 6, sample") == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["val/loss"], summary["baselines"]) == (None, {})


def test_nothing_is_saved_where_the_checkpoint_was_taken_away(compose_run: Compose, tmp_path: Path) -> None:
    run(compose_run("~callback.checkpoint", "~callback.progress"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_only_the_newest_checkpoint_stays(compose_run: Compose, tmp_path: Path) -> None:
    run(compose_run("callback.checkpoint.every_n_train_steps=2"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000006"]


def test_the_last_steps_are_kept_and_those_of_interruptions_go(compose_run: Compose, tmp_path: Path) -> None:
    keep = ("callback.checkpoint.every_n_train_steps=2", "callback.checkpoint.save_top_k=2", "trainer.max_steps=9")
    signalled = "+callback.signal={_target_: tests.test_resume.Signal, step: 3}"
    with pytest.raises(PreemptedError):
        run(compose_run(*keep, signalled, "packages=[tests]"))
    names = lambda: sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())  # noqa: E731
    assert names() == ["step-00000002", "step-00000003"]
    run(compose_run(*keep))
    assert names() == ["step-00000008", "step-00000009"]


def test_the_best_is_kept_beside_the_newest(compose_run: Compose, tmp_path: Path) -> None:
    """With a rate of nothing no later validation is better than the first."""
    monitor = ("callback.checkpoint.monitor=val/loss", "callback.checkpoint.mode=min")
    still = ("optimizer.lr=1e-30", "callback.checkpoint.every_n_train_steps=3", "trainer.max_steps=12")
    run(compose_run(*monitor, *still))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000012"]
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    longer = ("trainer.max_steps=18", "callback.checkpoint.every_n_train_steps=6", f"run_dir={moved}")
    run(compose_run(*monitor, *still, *longer))
    names = sorted(path.name for path in (moved / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000018"], "the best one stays, wherever the run is and however it goes on"


def test_the_last_step_is_saved_before_the_run_is_summed_up(
    compose_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm.callback.summary.plot_run", full)
    with pytest.raises(OSError, match="No space left"):
        run(compose_run())
    assert newest(tmp_path / "run").name == "step-00000006"  # type: ignore[union-attr]


def test_what_is_recorded_of_a_diverged_run_is_json(compose_run: Compose, tmp_path: Path) -> None:
    wild = ("optimizer.lr=1e30", "optimizer.clip_norm=null", "schedule=constant", "callback.metrics.every_n_steps=1")
    with pytest.raises(DivergedError):
        run(compose_run(*wild))
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert rows[-1]["grad/norm"] is None


def test_prompts_longer_than_the_context_are_cut(compose_run: Compose, tmp_path: Path) -> None:
    run(compose_run(f"callback.sample.prompts=[{'x' * 100}]"))
    assert "==== step 6, sample 1 ====\n" + "x" * 30 in (tmp_path / "run" / "samples.txt").read_text()


def test_tokens_of_a_validation_row_are_those_read_by_then(compose_run: Compose, tmp_path: Path) -> None:
    for every in (1, 4):
        run(compose_run(f"callback.metrics.every_n_steps={every}", f"run_dir={tmp_path / str(every)}"))
    fine, coarse = (
        {row["step"]: row["tokens"] for row in Record(tmp_path / str(every)).rows() if "val/loss" in row}
        for every in (1, 4)
    )
    assert fine == coarse


def test_record_survives_a_line_cut_short(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.append({"step": 1, "a": 0.1})
    record.append({"step": 2, "a": math.pi})
    with open(record.path, "a") as file:
        file.write('{"step": 3, "a"')
    assert [row["step"] for row in record.rows()] == [1, 2]
    record.rewind(1)
    record.append({"step": 2, "a": 0.2})
    assert record.rows() == [{"step": 1, "a": 0.1}, {"step": 2, "a": 0.2}]


def test_plot_of_a_run_without_rows(tmp_path: Path) -> None:
    plot_run([], {}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_a_run_without_bits_per_byte_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A masked LM with pairs, two tasks, and baselines in one unit."""
    values = {"val/loss": 3.0, "val/loss/light": 2.5, "val/loss/heavy": 3.5, "val/next_sentence_accuracy": 0.8}
    rows: list[Row] = [
        {"step": 1, "tokens": 10, "train/loss": 6.0, "train/next_sentence_accuracy": 0.5},
        {"step": 1, "tokens": 10, **values, "val/next_sentence_pairs": 400.0},
        {"step": 2, "tokens": 20, **values, "val/next_sentence_pairs": 400.0},
    ]
    plain: list[Row] = [{"step": 1, "tokens": 10, "val/loss": 3.0}]
    for number, shown in enumerate((rows, plain)):
        plot_run(shown, {"unigram/loss": 5.5}, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 0
    summary = {
        "parameters": 9,
        "steps": 2,
        "tokens": 20,
        "wall_s": 1.0,
        "tokens_per_s": None,
        "train/loss": 6.0,
        **{name: value for name, value in rows[-1].items() if name.startswith("val/")},
        "baselines": {"unigram/loss": 5.5},
    }
    print_summary(summary, [], tmp_path)
    printed = capsys.readouterr().out
    assert "nats per token" in printed
    assert "bits per byte" not in printed
    assert "5.500" in printed
    assert "heavy: 3.500 nats per token" in printed
    assert "next sentence: 80.0% of 400 pairs right (95 %: 75.8% to 83.6%)" in printed


class Broken(CSVLogger):
    """As one whose server or helper has gone."""

    def log_metrics(self, *arguments: object, **options: object) -> None:
        raise ConnectionResetError("Connection lost")


def test_a_logger_that_fails_does_not_end_the_run(
    compose_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told nothing more, once, and the run's own record is whole."""
    broken = f"+logger.broken={{_target_: tests.callback.test_callbacks.Broken, save_dir: {tmp_path / 'broken'}}}"
    speak()
    assert run(compose_run(broken, "packages=[tests]")).step == 6
    assert capsys.readouterr().out.count("Broken: ConnectionResetError: Connection lost; it is told nothing more") == 1
    assert [row["step"] for row in Record(tmp_path / "run").rows()][-1] == 6


def test_wandb_mode_disabled_leaves_no_wandb_run(
    compose_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(compose_run("logger=default", "trainer.max_steps=3"))
    assert not (tmp_path / "run" / "wandb").exists()
    assert (tmp_path / "run" / "tensorboard").exists()


def test_what_is_monitored_is_measured(compose_run: Compose, tmp_path: Path) -> None:
    """Until it is the newest step is saved all the same; what never will be is said at the first validation."""
    monitor = ["callback.checkpoint.mode=min", "callback.checkpoint.every_n_train_steps=2"]
    with pytest.raises(
        ConfigError, match=r"callback\.checkpoint\.monitor: val/los - is not measured .*val/loss"
    ) as told:
        run(compose_run(*monitor, "callback.checkpoint.monitor=val/los", "trainer.val_check_interval=5"))
    assert "nothing was started" not in str(told.value), "it was"
    names = lambda: sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())  # noqa: E731
    assert names() == ["step-00000004"]
    unmeasured = ["callback.checkpoint.monitor=val/loss", "data.val_every=null", f"run_dir={tmp_path / 'blind'}"]
    run(compose_run(*monitor, *unmeasured, "trainer.max_steps=5"))
    assert [path.name for path in (tmp_path / "blind" / "checkpoints").iterdir()] == ["step-00000005"]
