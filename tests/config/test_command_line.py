"""What is wrong with a command line, all of it; and that Hydra's own commands keep working."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from llm.config import check_overrides

REPOSITORY = Path(__file__).parents[2]
Refused = Callable[..., list[str]]

TRAIN = """
import sys
from pathlib import Path
import hydra
from llm.config import ConfigError, check_overrides, refuse, register

@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg):
    print("JOB", cfg.run_dir, cfg.optimizer.lr)

if __name__ == "__main__":
    register()
    try:
        check_overrides(sys.argv[1:], Path(__file__).parent / "conf")
    except ConfigError as error:
        refuse(error)
    main()
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=3", "optimizer.lrr: 3 - no such key - did you mean optimizer.lr?"),
        ("max_steps=5", "max_steps: 5 - no such key - did you mean trainer.max_steps?"),
        ("learning_rate=3", "learning_rate: 3 - no such key - did you mean optimizer.lr?"),
        ("trainer.learning_rate=3", "trainer.learning_rate: 3 - no such key - did you mean optimizer.lr?"),
        ("modle=small", "modle: small - no such key - did you mean model?"),
        ("modle.dim=8", "modle.dim: 8 - no such key - did you mean model.dim?"),
        ("model.dim.x=8", "model.dim.x: 8 - no such key - did you mean model.dim?"),
        ("model.dropout=0.1", "model.dropout: 0.1 - is not spelt in YAML - write +model.dropout=0.1"),
        ("data.extra=1", "data.extra: 1 - is not spelt in YAML - write +data.extra=1"),
        ("trainer.detect_anomaly=true", "is not spelt in YAML - write +trainer.detect_anomaly=true"),
        (
            "trainer.gradient_clip_val=1",
            "trainer.gradient_clip_val: 1 - the optimizer clips - write optimizer.clip_norm",
        ),
        ("gradient_clip_val=1", "gradient_clip_val: 1 - the optimizer clips - write optimizer.clip_norm=…"),
        (
            "ckpt_path=last",
            "ckpt_path: last - a run finds its own checkpoint - write resume=auto, must, never or a path",
        ),
        ("model=largee", "model: largee - no such choice - did you mean model=large? there are large, small"),
        ("model=null", "model: null - is no choice - write ~model"),
        ("trainer=3", "trainer: 3 - no such choice - there are default"),
        ("+model=large", "model: +model=large - is chosen already - write model=large"),
        ("+optimizer.lr=3", "optimizer.lr: 3 - is there already - write optimizer.lr=3"),
        ("+optimizer.lrr=3", "optimizer.lrr: 3 - toyhouse.Optimizer has no such argument - did you mean optimizer.lr?"),
        ("+modle=3", "modle: 3 - no such key - did you mean model?"),
        ("~callback.smaple", "callback.smaple: no such key - did you mean callback.sample?"),
        ("~optimizer", "optimizer: ??? - must be set - choose one: optimizer=…"),
        ("tokenizer@x=bytes", "tokenizer@x: bytes - no such group - did you mean tokenizer?"),
        (
            "optimizer.lr=1,2",
            "optimizer.lr: 1,2 - several values are a sweep - add -m to sweep, or write optimizer.lr=[1,2]",
        ),
        ("seed=range(3)", "seed: range(3) - several values are a sweep - add -m to sweep"),
        ("optimizer.lr", "optimizer.lr: is no key=value - write optimizer.lr=…"),
        ("7", "7: is no key=value - write key=value"),
        ("optimizer.lr =3", "optimizer.lr =3: has a space in its key - write optimizer.lr=3"),
        ("optimizer.lr=[1", "optimizer.lr: [1 - cannot be read ("),
        ("--optimizer.lr=3", "--optimizer.lr=3: no such flag; keys are written without dashes - write optimizer.lr=3"),
        ("--cfg=jobs", "command line: argument --cfg/-c: invalid choice: 'jobs'"),
        ("--config-dir=/nowhere", "--config-dir: /nowhere - is no directory"),
        ("--config-path=nowhere", "is no directory"),
        ("--config-name=nowhere", "nowhere"),
        ("model={dimm: 3}", "model.dimm: no such key - did you mean model.dim?"),
        ("seed=abc", "seed: 'abc' - must be a whole number at least 0 and less than 4294967296"),
        ("schedule.warmup_steps=-1", "schedule.warmup_steps: -1 - must be a whole number at least 0"),
        ("experiment=wied", "experiment: wied - no such choice - did you mean experiment=wide? there are broken"),
        ("experiment=missing", "'model/huge'"),
        ("experiment=broken", "broken.yaml:3: is no YAML"),
    ],
)
def test_mistake_of_one_override(refused: Refused, override: str, message: str) -> None:
    found = refused(override)
    assert len(found) == 1
    assert message in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["model=large", "optimizer.lr=0.1", "+model.dropout=0.1", "~callback.sample", "++trainer.detect_anomaly=true"],
        ["experiment=wide", "optimizer.betas=[0.5,0.6]", "run_name=mine"],
        ["-m", "optimizer.lr=0.1,0.2", "model=small,large", "seed=range(3)"],
        ["-m", "optimizer.lr=0.1,0.2", "run_name=mine/${hydra:job.num}"],
        ["-m", "run_dir=here,there"],
        ["hydra.run.dir=elsewhere"],
    ],
)
def test_right_command_line_passes(refused: Refused, argv: list[str]) -> None:
    assert refused(*argv) == []


def test_all_at_once(refused: Refused) -> None:
    found = refused(
        "model=huge", "optimizer.lrr=1", "max_steps=5", "--foo=1", "optimizer.lr=abc", "model.dim=-8", "seed=nan",
        "schedule.warmup_steps=1.5", "+trainer.gradient_clip_val=1", "trainer.precision=bf17", "stage=train", "no",
    )  # fmt: skip
    assert len(found) == 12


def test_both_misspelt_keys_of_an_experiment(refused: Refused) -> None:
    found = refused("experiment=misspelt", "optimizer.lr=abc")
    assert found[:2] == [
        "experiment/misspelt.yaml: trainr - no such key - did you mean trainer?",
        "experiment/misspelt.yaml: optimiser - no such key - did you mean optimizer?",
    ]
    assert found[2].startswith("optimizer.lr: 'abc'")


def test_each_value_of_a_sweep_is_checked(refused: Refused) -> None:
    found = refused("-m", "optimizer.lr=0.1,abc,-1", "model=small,huge", "model.dim=8,9")
    assert [text.split(" - ")[0] for text in found] == [
        "optimizer.lr: 'abc'",
        "optimizer.lr: -1",
        "model: huge",
        "model.dim: 9",
    ]


def test_what_only_a_sweeper_that_draws_can_read(refused: Refused) -> None:
    (found,) = refused("-m", "optimizer.lr=interval(0,1)")
    assert found == "optimizer.lr: interval(0,1) - values are drawn from it by a sweeper - add hydra/sweeper=optuna"


def test_jobs_of_a_sweep_do_not_share_a_directory(refused: Refused) -> None:
    (found,) = refused("-m", "optimizer.lr=0.1,0.2", "run_name=mine")
    assert found == (
        "run_dir: 'runs/mine' - every job of a sweep needs a directory of its own"
        " - leave run_name out, or end it in '/${hydra:job.num}' (in quotes)"
    )
    assert refused("-m", "optimizer.lr=0.1,0.2", "run_name=mine,yours") == [found]


def test_gives_the_composed_configuration_and_leaves_hydra_alone(conf: Path) -> None:
    cfg = check_overrides(["model=large", "optimizer.lr=0.5"], conf)
    assert cfg is not None
    assert (cfg.model.dim, cfg.optimizer.lr, cfg.run_dir, "hydra" in cfg) == (512, 0.5, "runs/id", False)
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()


@pytest.mark.parametrize("flag", ["--help", "--hydra-help", "--cfg=job", "--info=all", "-h", "--shell-completion"])
def test_steps_aside(conf: Path, flag: str) -> None:
    assert check_overrides([flag, "optimizer.lrr=3"], conf) is None


def test_own_configuration_directory(conf: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "tiny.yaml").write_text("_target_: toyhouse.Net\ndim: 2\n")
    cfg = check_overrides(["--config-dir", str(tmp_path / "mine"), "model=tiny"], conf)
    assert cfg is not None
    assert cfg.model.dim == 2
    searched = check_overrides([f"hydra.searchpath=[file://{tmp_path / 'mine'}]", "model=tiny"], conf)
    assert searched == cfg
    assert "no such choice" in refused("model=tiny")[0]


def _run(conf: Path, *argv: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command as a user gives it, and its CPU seconds: wall time would measure what else runs here."""
    (conf.parent / "train.py").write_text(TRAIN)
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "train.py", *argv]
    done = subprocess.run(command, cwd=conf.parent, env=environment, capture_output=True, text=True, timeout=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _files(conf: Path) -> set[str]:
    return {str(path.relative_to(conf.parent)) for path in conf.parent.rglob("*") if conf not in (path, *path.parents)}


def test_mistakes_exit_64_without_traceback_within_2_s(conf: Path) -> None:
    wrong = [f"model.dimm{n}=1" for n in range(9)]
    done, cpu_s = _run(conf, *wrong, "optimizer.lr=abc")
    assert done.returncode == 64
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 + 10
    assert "Traceback" not in done.stderr
    assert cpu_s < 2
    assert _files(conf) == {"train.py"}


def test_right_run_writes_nothing_of_hydras(conf: Path) -> None:
    done, _ = _run(conf, "optimizer.lr=0.5")
    assert (done.returncode, done.stdout) == (0, "JOB runs/id 0.5\n")
    assert _files(conf) == {"train.py"}


def test_sweep_writes_only_into_its_own_folder(conf: Path) -> None:
    done, _ = _run(conf, "-m", "optimizer.lr=0.1,0.2")
    assert done.returncode == 0
    assert [text for text in done.stdout.splitlines() if text.startswith("JOB")] == [
        "JOB runs/id/0 0.1",
        "JOB runs/id/1 0.2",
    ]
    assert _files(conf) == {"train.py", "runs", "runs/id", "runs/id/multirun.yaml"}


def test_hydras_own_commands(conf: Path) -> None:
    done, _ = _run(conf, "--help")
    assert done.returncode == 0
    assert "model: large, small" in done.stdout
    done, _ = _run(conf, "--cfg", "job", "model=large")
    assert done.returncode == 0
    assert "dim: 512" in done.stdout
    done, _ = _run(conf, "--info", "searchpath")
    assert done.returncode == 0


def test_lightnings_signature_costs_little_more_than_importing_it(conf: Path) -> None:
    """The bar is 5 s on two idle cores, of which `import lightning` alone takes 3.5: so the rest is tested, as a
    share, since a busy machine stretches both: 1.2 on an idle one, up to 1.65 beside four busy processes."""
    trainer = conf / "trainer" / "default.yaml"
    trainer.write_text(trainer.read_text().replace("toyhouse.Trainer", "lightning.Trainer"))
    done, cpu_s = _run(conf, "trainer.max_stesp=5")
    assert "trainer.max_stesp: 5 - no such key - did you mean trainer.max_steps?" in done.stderr
    assert cpu_s < 2
    done, cpu_s = _run(conf, "trainer.max_stesp=5", "+trainer.detect_anomly=true")
    assert done.returncode == 64
    assert "trainer.max_stesp: 5 - no such key - did you mean trainer.max_steps?" in done.stderr
    assert "did you mean trainer.detect_anomaly?" in done.stderr
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", "import gc, os; gc.disable(); import lightning; os._exit(0)"], check=True)
    assert cpu_s < 2 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
