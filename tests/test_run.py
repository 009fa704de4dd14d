"""The life of a run: what is refused and how, what is left behind, and the exit codes a batch script sees."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llm.checkpoint import CheckpointError, average, newest
from llm.config import ConfigError
from llm.data import DataError
from llm.exit import RunExistsError
from llm.lock import Lock
from llm.run import Outcome, claim, run
from tests.runs import TINY, Compose, composed, run_composed

ROOT = Path(__file__).parents[1]
SMOKE = ("experiment=smoke", "logger=none", "trainer.accelerator=cpu", "trainer.precision=32-true")


def train(*overrides: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python train.py …` in a process of its own."""
    return finished([sys.executable, str(ROOT / "train.py"), *overrides], cwd, **environment)


def finished(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=110)


@pytest.fixture(scope="module")
def trained(corpus: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The tiny run, finished; no test changes anything in it."""
    places = (f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path_factory.mktemp('trained')}/run")
    return run_composed([*places])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What runs in this process print."""
    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    caplog.set_level(logging.INFO, "llm")
    return caplog


def test_rules_between_groups_all_at_once(compose_run: Compose, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        run(
            compose_run(
                "model.vocab_size=100",
                "model.max_length=16",
                "data.batch_size=6",
                "trainer.devices=2",
                "trainer.accelerator=gpu",
                "resume=must",
                "trainer.default_root_dir=/elsewhere",
            )
        )
    text = str(refused.value)
    assert len(refused.value.mistakes) == 7
    assert "model.vocab_size: 100 - the tokenizer has 257 ids - give at least that, or null" in text
    assert (
        "data.max_length: 32 - the model's context is model.max_length=16 - shorten the first or raise the second"
        in text
    )
    assert (
        "data.batch_size=6: must be a multiple of 1 processes x data.micro_batch_size=4 = 4; "
        "the nearest that are: 4 or 8" in text
    )
    assert (
        "strategy: single - drives one device, and trainer.devices x trainer.num_nodes is 2 - "
        "take strategy=ddp or strategy=fsdp, or set both to 1" in text
    )
    assert "trainer.accelerator: gpu - torch sees no GPU here - set trainer.accelerator=cpu" in text
    assert "trainer.default_root_dir: /elsewhere - a run has one place - set run_dir=" in text
    assert "resume: must - there is no checkpoint in" in text
    assert not (tmp_path / "run").exists()


def test_resume_never_keeps_out_of_a_run(compose_run: Compose, trained: Outcome) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.run_dir.rglob("*")}
    with pytest.raises(RunExistsError, match=r"run_dir: .* exists - resume=never .* - give another run_name"):
        run(compose_run("resume=never", f"run_dir={trained.run_dir}"))
    assert before == {path: path.stat().st_mtime_ns for path in trained.run_dir.rglob("*")}


def test_finished_run_is_left_alone_and_a_longer_one_goes_on(
    compose_run: Compose, tmp_path: Path, trained: Outcome, said: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained.run_dir, tmp_path / "run")
    summary = tmp_path / "run" / "summary.json"
    before = summary.read_bytes(), summary.stat().st_mtime_ns
    assert run(compose_run()).step == 6
    assert "finished already, at step 6" in said.text
    assert (summary.read_bytes(), summary.stat().st_mtime_ns) == before
    assert run(compose_run("trainer.max_steps=8")).step == 8
    assert json.loads(summary.read_text())["steps"] == 8


def test_resume_from_another_run(compose_run: Compose, tmp_path: Path, trained: Outcome) -> None:
    cfg = compose_run(f"resume={trained.run_dir}", f"run_dir={tmp_path / 'second'}", "trainer.max_steps=8")
    assert run(cfg).step == 8
    assert newest(tmp_path / "second").name == "step-00000008"  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        claim(tmp_path / "third", str(tmp_path / "nothing"), Lock(tmp_path / "third"))


ENCODER = ("model=tiny_encoder", "objective=masked_lm", "data/tasks=masked_lm", "tokenizer=wordpiece")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=masked_lm"], "objective: trains a model.family=encoder - the model has decoder"),
        (["data/tasks=masked_lm"], r"model.family: decoder - data.tasks \(masked_lm\) make rows for encoder"),
        ([*ENCODER, "model.next_sentence=true"], "model.next_sentence: True - data.tasks make no pairs"),
        (
            [*ENCODER, "data.tasks.masked_lm.next_sentence=true"],
            r"model.next_sentence: False - data.tasks make pairs \(next_sentence of masked_lm\) - set both or none",
        ),
        (
            ["model=tiny_encoder_decoder", "objective=seq2seq", "data/tasks=span_denoising", "data.target_length=99"],
            "data.target_length: 99 - the model's context is model.max_length=32",
        ),
    ],
)
def test_families_that_do_not_fit_together(compose_run: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(compose_run(*overrides))


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("-1", "trainer.devices: -1 - a CPU is not several - give a number of processes"),
        ("[0]", r"trainer.devices: \[0\] - a CPU is not several"),
        ("[]", r"trainer.devices: \[\] - names no device - give how many"),
    ],
)
def test_a_cpu_has_no_devices_to_name(compose_run: Compose, devices: str, message: str) -> None:
    cfg = compose_run("trainer.accelerator=cpu", f"trainer.devices={devices}", "strategy=ddp")
    with pytest.raises(ConfigError, match=f"1 mistake.*\n  {message}"):
        run(cfg)


@pytest.mark.parametrize(("key", "value", "steps"), [("max_tokens", 2000, 8), ("max_epochs", 1, None)])
def test_length_in_tokens_or_epochs(
    compose_run: Compose, tmp_path: Path, key: str, value: int, steps: int | None
) -> None:
    outcome = run(compose_run("trainer.max_steps=null", f"trainer.{key}={value}"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == saved["schedule"]["max_steps"] == outcome.step
    if steps is not None:
        assert outcome.step == steps
        assert rows[-1]["tokens"] == pytest.approx(value, rel=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_every_precision_learns(compose_run: Compose, precision: str) -> None:
    once = ("trainer.val_check_interval=20", "~callback.sample")
    outcome = run(compose_run(f"trainer.precision={precision}", "optimizer.lr=1e-2", "trainer.max_steps=20", *once))
    assert outcome.metrics["val/loss"] < 5  # log(257) = 5.55 at the start


def test_validate_only(compose_run: Compose, tmp_path: Path, trained: Outcome) -> None:
    """With dropout on."""
    files = sorted(trained.run_dir.rglob("*"))
    again = run(compose_run("stage=validate", "model.dropout=0.1", f"run_dir={trained.run_dir}"))
    assert again.metrics["val/loss"] == pytest.approx(trained.metrics["val/loss"], abs=1e-6)
    assert sorted(trained.run_dir.rglob("*")) == files
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        run(compose_run("stage=validate", f"run_dir={tmp_path / 'none'}"))
    other = ["model.activation=gelu", "model.dim=64"]
    with pytest.raises(ConfigError, match=r"model\.dim: 64 - .*step-00000006 has 32 - restore it") as told:
        run(compose_run("stage=validate", f"run_dir={trained.run_dir}", *other))
    assert "model.activation: gelu" in str(told.value)
    with pytest.raises(ConfigError, match=r"resume: .*step-00000006 - its tokenizer is not that of the data"):
        run(compose_run("stage=validate", f"run_dir={trained.run_dir}", "tokenizer=bpe", "tokenizer.vocab_size=257"))


def test_weights_alone_are_no_run_to_go_on_from(compose_run: Compose, tmp_path: Path, trained: Outcome) -> None:
    average(trained.run_dir, tmp_path / "mean", 1)
    with pytest.raises(ConfigError, match=r"holds weights and no run - start one from them with init_from="):
        run(compose_run(f"resume={tmp_path / 'mean'}", "trainer.max_steps=8"))


def test_a_run_needs_the_weights_that_it_began_with_no_more(
    compose_run: Compose, tmp_path: Path, trained: Outcome
) -> None:
    base = shutil.copytree(trained.run_dir, tmp_path / "base")
    own = [word for word in TINY if not word.startswith("model.")]
    cfg = compose_run(f"init_from={base}")
    start = [f"{key}={cfg[key]}" for key in ("init_from", "run_dir")]
    start += [f"data.{key}={cfg.data[key]}" for key in ("path", "cache_dir")]
    start += ["model=pretrained", "schedule=constant"]
    run(composed([*start, "trainer.max_steps=3"], own))
    labels = ["objective=classification", "data/tasks=classification", "data.tasks.classification.labels=[a,b]"]
    with pytest.raises(ConfigError, match=r"model: pretrained - .*-00000003 is a model.family=decoder - model.n_lab"):
        run(composed([*start, *labels], own))
    shutil.rmtree(base)
    assert run(composed(start, own)).step == 6


def everything_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("data.seed=1", DataError, r"cannot resume on other data .* data\.seed \(was 0, is 1\)"),
        ("model.dim=64", ConfigError, r"model\.dim: 64 - .*step-00000006 has 32 - restore it, or start another run"),
        (
            "optimizer=muon",
            ConfigError,
            r"optimizer\._target_: llm\.optimizer\.MuonAdamW - .* has llm\.optimizer\.AdamW",
        ),
        ("schedule.warmup_steps=100", ConfigError, r"schedule\.warmup_steps: 100 - must be below trainer\.max_steps=8"),
    ],
)
def test_a_refused_continuation_writes_nothing(
    compose_run: Compose, trained: Outcome, override: str, error: type[Exception], message: str
) -> None:
    before = everything_below(trained.run_dir)
    with pytest.raises(error, match=message):
        run(compose_run(override, "trainer.max_steps=8", f"run_dir={trained.run_dir}"))
    assert everything_below(trained.run_dir) == before


def test_a_continued_run_takes_the_optimizer_settings_of_its_configuration(
    compose_run: Compose, tmp_path: Path
) -> None:
    run(compose_run("schedule=constant"))
    run(compose_run("schedule=constant", "trainer.max_steps=8", "optimizer.lr=1e-5", "optimizer.weight_decay=0"))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2])
    assert (last["step"], last["lr"]) == (8, 1e-5)


def test_init_from_with_another_tokenizer_is_refused(compose_run: Compose, tmp_path: Path) -> None:
    run(compose_run("tokenizer=bpe", "tokenizer.vocab_size=257"))
    second = (f"init_from={tmp_path / 'run'}", f"run_dir={tmp_path / 'second'}")
    with pytest.raises(ConfigError, match=r"its tokenizer is not that of the data - write tokenizer=pretrained"):
        run(compose_run(*second))
    run(compose_run(*second, "tokenizer=pretrained", f"tokenizer.path={tmp_path / 'run' / 'tokenizer'}"))
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        run(compose_run("init_from=/nowhere", f"run_dir={tmp_path / 'third'}"))


def test_what_lightning_refuses_is_no_traceback(compose_run: Compose) -> None:
    monitor = "{_target_: lightning.pytorch.callbacks.LearningRateMonitor}"
    with pytest.raises(ConfigError, match="LearningRateMonitor"):
        run(compose_run(f"+callback.rate={monitor}"))
    with pytest.raises(ConfigError, match="profiler"):
        run(compose_run("+trainer.profiler=bogus"))


@pytest.mark.timeout(240)
def test_a_run_directory_that_cannot_be_made(compose_run: Compose, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be made \(Not a directory\) - give another run_dir"):
        run(compose_run(f"run_dir={tmp_path / 'file' / 'run'}"))


def test_the_command_line(corpus: Path, cache_dir: Path, tmp_path: Path) -> None:
    """From another directory: a run, and text from the result."""
    places = (*SMOKE, "data=files", f"data.path={corpus}", f"data.cache_dir={cache_dir}", "run_name=a")
    done = train(*places, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Everything lies in" in done.stdout
    assert "this model" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    end = {"code": 0, "cause": "finished", "step": 2, "max_steps": 2}
    assert json.loads((tmp_path / "runs/a/exit.json").read_text()) == end

    asked = ("generate", str(tmp_path / "runs/a"), "--prompt", "the cat", "--max-new-tokens", "5")
    text = finished([sys.executable, "-m", "llm", *asked], ROOT)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("the cat")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_to_the_whole_group_saves_and_the_same_command_goes_on(
    corpus: Path,
    cache_dir: Path,
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
    number: signal.Signals,
    code: int,
) -> None:
    """As a terminal or a cluster sends it: loader workers get it too. The configuration goes on in this process."""
    places = (*SMOKE, "data=files", f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path}/run")
    settings = (*places, "data.num_workers=1", "trainer.val_check_interval=100000")
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train.py"), *settings, "trainer.max_steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step 3/"))  # training is under way
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"{number.name}: saved" in err
    step = int(newest(tmp_path / "run").name.removeprefix("step-"))  # type: ignore[union-attr]
    assert step >= 3
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == code
    assert run(composed([*settings, f"trainer.max_steps={step + 2}"], base=[])).step == step + 2
    assert f"continuing from {tmp_path}/run/checkpoints/step-{step:08d}" in said.text


@pytest.mark.timeout(240)
def test_a_launcher_that_is_told_while_the_data_is_prepared(corpus: Path, cache_dir: Path, tmp_path: Path) -> None:
    """All leave with 75, and nothing was lost, as there is nothing; the same command begins."""
    places = (*SMOKE, "data=files", f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path}/run")
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train.py"), *places, "strategy=ddp", "trainer.devices=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    next(line for line in process.stdout if "preparing the data" in line)
    process.send_signal(signal.SIGUSR2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "SIGUSR2: nothing is left to be saved" in err


@pytest.mark.timeout(240)
def test_a_sweep_makes_a_run_for_each_value(corpus: Path, cache_dir: Path, tmp_path: Path) -> None:
    places = (*SMOKE, "data=files", f"data.path={corpus}", f"data.cache_dir={cache_dir}")
    done = train("-m", *places, "optimizer.lr=1e-3,2e-3", cwd=tmp_path, LLM_RUN_ID="sweep")
    assert done.returncode == 0, done.stderr
    rates = {
        path.name: yaml.safe_load((path / "config.yaml").read_text())["optimizer"]["lr"]
        for path in (tmp_path / "runs" / "sweep").iterdir()
        if path.is_dir()
    }
    assert rates == {"0": 1e-3, "1": 2e-3}
