"""`python -m llm verify`: a certificate that a configuration's runs survive interruptions bit for bit.

The configuration is run shortened: undisturbed, twice; then interrupted in three ways and continued; then continued on
another number of processes. Everything that a run leaves is compared with what the undisturbed one left.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from llm import ledger
from llm.checkpoint import find, read_state, read_tensors, steps
from llm.config import ConfigError
from llm.machine import accelerator, precision

TRAIN = Path(__file__).parents[1] / "train.py"
PARTS = ("weights", "optimizer", "generators", "position", "schedule", "metrics", "ledger")
_OPTIMIZER = "optimizer."

Train = Callable[[list[str], Path], int]  # overrides, and where the output goes; gives the exit code


class Row(NamedTuple):
    """One comparison: of `part` of a run; `detail` says what differs first, or how closely it agrees."""

    run: str
    part: str
    equal: bool
    detail: str = ""


@dataclass(frozen=True)
class Plan:
    """What is run, as overrides.

    overrides  of the user, without those that the plan sets itself
    short      what makes it a short run that writes everything down
    other      for another number of processes; None: there is none here, for the reason `why_not`
    """

    overrides: list[str]
    short: list[str]
    n_steps: int
    n_processes: int
    other: list[str] | None
    n_other: int = 0
    why_not: str = ""
    without_dropout: list[str] = field(default_factory=list)
    tolerance: float = 1e-5


def plan(cfg: DictConfig, overrides: Sequence[str], n_steps: int) -> Plan:
    """How to verify `cfg`, which `overrides` compose.

    Raises:
        ConfigError: if it cannot be run here, or writes too little down.
    """
    missing = [name for name in ("checkpoint", "ledger", "metrics", "preempt") if name not in cfg.callback]
    mistakes = [f"callback.{name}: a certificate is made of what it writes - leave it in" for name in missing]
    if cfg.trainer.num_nodes != 1:
        mistakes.append("trainer.num_nodes: the runs of a certificate are started here - give trainer.num_nodes=1")
    if mistakes:
        raise ConfigError(mistakes)
    short = {
        "logger": "none",
        "resume": "auto",
        "stage": "fit",
        "trainer.max_steps": n_steps,
        "trainer.max_tokens": "null",
        "trainer.max_epochs": "null",
        "trainer.val_check_interval": n_steps // 2,
        "callback.checkpoint.every_n_train_steps": n_steps // 4,
        "callback.checkpoint.save_top_k": 1,
        "callback.metrics.every_n_steps": 2,
        "callback.ledger.every_n_steps": 2,
        "schedule.warmup_steps": min(cfg.schedule.get("warmup_steps", 0), n_steps // 4),
    }
    own = {*short, "run_name", "run_dir"}
    kept = [text for text in overrides if _key(text) not in own and not _key(text).startswith("logger")]
    n = _n_processes(cfg)
    other, n_other, why_not = _other(cfg, n)
    computes_in = precision(cfg.trainer.precision, accelerator(cfg.trainer.accelerator))
    return Plan(
        overrides=kept,
        short=[f"{key}={value}" for key, value in short.items()],
        n_steps=n_steps,
        n_processes=n,
        other=other,
        n_other=n_other,
        why_not=why_not,
        without_dropout=["model.dropout=0.0"] if cfg.model.get("dropout") else [],
        tolerance=1e-5 if computes_in == "32-true" else 2e-2,
    )


def verify(made: Plan, out: Path, train: Train, say: Callable[[str], None] = print) -> list[Row]:
    """Run the plan in `out`; one row for each comparison. The undisturbed run stays, and those that differ."""
    quarter = made.n_steps // 4
    at_all, at_one, in_save = quarter + 2, 2 * quarter + 1, 3 * quarter
    faults = (
        ("SIGUSR1", at_all, f"SIGUSR1 to all in step {at_all}", {75}),
        ("SIGTERM", at_one, f"SIGTERM to one process in step {at_one}", {75}),
        ("SIGKILL", in_save, f"SIGKILL in the save of step {in_save}", {137, -9}),
    )
    runs = Runs(made, out, train, say)
    straight = runs.whole("straight", "undisturbed")
    if straight is None:
        return runs.rows
    again = runs.whole("again", "undisturbed, again")
    if again is not None:
        runs.add(again, compare("undisturbed, again", straight, again))
    for fault, step, name, codes in faults:
        run_dir = runs.interrupted(fault, step, name, codes)
        if run_dir is not None:
            runs.add(run_dir, compare(name, straight, run_dir))
    if made.other is None:
        say(f"not compared: another number of processes: {made.why_not}")
        return runs.rows
    reference = runs.whole("plain", "without dropout", made.without_dropout) if made.without_dropout else straight
    name = f"from {made.n_processes} to {made.n_other} processes"
    extra = [*made.without_dropout, "callback.checkpoint.save_top_k=-1"]  # what was loaded is looked at afterwards
    changed = runs.interrupted("SIGTERM", at_all, name, {75}, extra, made.other)
    if reference is not None and changed is not None:
        runs.add(changed, compare_worlds(name, reference, changed, made.tolerance))
    return runs.rows


@dataclass
class Runs:
    """The runs of a plan, one after the other."""

    plan: Plan
    out: Path
    train: Train
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)

    def add(self, run_dir: Path, rows: list[Row]) -> None:
        """Rows of a run, which is then of no more use if it is as it has to be: checkpoints are large."""
        self.rows += rows
        if all(row.equal for row in rows):
            shutil.rmtree(run_dir)

    def whole(self, folder: str, name: str, extra: Sequence[str] = ()) -> Path | None:
        """A run that nothing disturbs; None if it fails, which is a row."""
        return self.out / folder if self._run(folder, name, {0}, extra) else None

    def interrupted(
        self,
        fault: str,
        step: int,
        name: str,
        codes: set[int],
        extra: Sequence[str] = (),
        other: Sequence[str] | None = None,
    ) -> Path | None:
        """A run that is interrupted, and continued, perhaps on other processes."""
        folder = fault if other is None else "world"
        broken = [*extra, f"+callback.rehearsal={{_target_: llm.callback.Rehearsal, fault: {fault}, step: {step}}}"]
        if not self._run(folder, name, codes, broken):
            return None
        loaded = "+callback.rehearsal={_target_: llm.callback.Rehearsal, fault: none}"
        more = [*extra] if other is None else [*extra, *other, loaded]
        return self.out / folder if self._run(folder, f"{name}, continued", {0}, more) else None

    def _run(self, folder: str, name: str, codes: set[int], extra: Sequence[str]) -> bool:
        self.say(f"  {name} …")
        taken = {_key(text) for text in extra}
        given = [text for text in (*self.plan.overrides, *self.plan.short) if _key(text) not in taken]
        log = self.out / f"{folder}.log"
        code = self.train([*given, f"run_dir={self.out / folder}", *extra], log)
        if code not in codes:
            wanted = " or ".join(map(str, sorted(codes)))
            self.rows.append(Row(name, "exit code", False, f"{code}, where {wanted} was due; see {log}"))
        return code in codes


def compare(name: str, one: Path, two: Path) -> list[Row]:
    """Everything that two runs have left, to the bit."""
    found = [_State.of(folder) for folder in (one, two)]
    return [Row(name, part, *_same(getattr(found[0], part), getattr(found[1], part))) for part in PARTS]


def compare_worlds(name: str, reference: Path, changed: Path, tolerance: float) -> list[Row]:
    """What was loaded, to the bit; the batches; and the losses to `tolerance`, since sums have another order."""
    accounts = [ledger.read(folder) for folder in (reference, changed)]
    resumed = max(event["step"] for event in accounts[1].events)
    saved = next(path for path in steps(changed) if path.name.endswith(f"{resumed:08d}"))
    loaded = [read_tensors(folder) for folder in (saved, changed / "loaded")]
    rows = []
    for part in ("weights", "optimizer"):
        mine = [{k: v for k, v in t.items() if k.startswith(_OPTIMIZER) == (part == "optimizer")} for t in loaded]
        rows.append(Row(name, f"loaded {part}", *_same(*mine)))
    batches = [{step: line["samples"] for step, line in account.steps.items()} for account in accounts]
    rows.append(Row(name, "batches", *_same(*batches)))
    losses = [{step: float.fromhex(line["loss"]) for step, line in account.steps.items()} for account in accounts]
    off = max(abs(losses[1].get(step, float("inf")) - loss) / abs(loss) for step, loss in losses[0].items())
    rows.append(Row(name, "losses", off <= tolerance, f"within {off:.1e}, where {tolerance:.0e} is allowed"))
    return rows


@dataclass(frozen=True)
class _State:
    """What a run has left, by part."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    generators: Any
    position: Any
    schedule: dict[int, float]
    metrics: list[dict[str, Any]]
    ledger: dict[int, tuple[list[int], str]]

    @classmethod
    def of(cls, run_dir: Path) -> _State:
        step = find(run_dir)
        tensors, state = read_tensors(step), read_state(step)
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return cls(
            weights={name: value for name, value in tensors.items() if not name.startswith(_OPTIMIZER)},
            optimizer={name: value for name, value in tensors.items() if name.startswith(_OPTIMIZER)},
            generators=state["rng"],
            position={key: state["objective"][key] for key in ("n_batches", "n_steps")},
            schedule={row["step"]: row["lr"] for row in rows if "lr" in row},
            metrics=[{k: v for k, v in row.items() if k != "lr" and not k.startswith("speed/")} for row in rows],
            ledger={n: (line["samples"], line["loss"]) for n, line in ledger.read(run_dir).steps.items()},
        )


def _same(one: Any, two: Any) -> tuple[bool, str]:
    """Whether two values are the same to the bit, and where they first differ."""
    for path, a, b in _pairs(one, two, ""):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                return False, f"{path} is {b.dtype} {list(b.shape)}, was {a.dtype} {list(a.shape)}"
            if not torch.equal(a, b):
                off = (a.double() - b.double()).abs().max().item()
                return False, f"{path} differs by up to {off:.3g}"
        elif type(a) is not type(b) or a != b:
            return False, f"{path} is {str(b)[:40]}, was {str(a)[:40]}"
    return True, ""


def _pairs(one: Any, two: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """The leaves of two nested values, side by side; where the shapes differ, these values themselves."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted({*one, *two}, key=lambda k: (str(type(k)), k)):
            name = f"{path}.{key}".lstrip(".")
            if key in one and key in two:
                yield from _pairs(one[key], two[key], name)
            else:
                yield (name, "present", "missing") if key in one else (name, "missing", "present")
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        for n, (a, b) in enumerate(zip(one, two, strict=True)):
            yield from _pairs(a, b, f"{path}[{n}]")
    else:
        yield path, one, two


def write_certificate(out: Path, made: Plan, rows: Sequence[Row]) -> bool:
    """`certificate.json`; whether all agree."""
    passed = bool(rows) and all(row.equal for row in rows)
    content = {
        "passed": passed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **_made_with(out / "straight" / "summary.json"),
        "plan": asdict(made),
        "rows": [row._asdict() for row in rows],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "certificate.json").write_text(json.dumps(content, indent=1) + "\n")
    return passed


def _made_with(summary: Path) -> dict[str, Any]:
    """The code that ran, as the undisturbed run has summed it up."""
    try:
        content = json.loads(summary.read_text())
    except OSError:
        return {}
    return {name: content[name] for name in ("commit", "versions", "parameters")}


def table(rows: Sequence[Row]) -> str:
    """A line for each run; below it, what differs."""
    lines = []
    for name in dict.fromkeys(row.run for row in rows):
        mine = [row for row in rows if row.run == name]
        same = ", ".join(f"{row.part} {row.detail}".strip() for row in mine if row.equal)
        lines.append(f"{name}\n    same: {same or 'nothing'}")
        lines += [f"    DIFFERS: {row.part}: {row.detail}" for row in mine if not row.equal]
    return "\n".join(lines)


def train_in_process(overrides: list[str], log: Path) -> int:
    """As a user would."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN), *overrides]
    with open(log, "ab") as file:
        return subprocess.run(command, stdout=file, stderr=file, check=False).returncode


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _n_processes(cfg: DictConfig) -> int:
    devices = cfg.trainer.devices
    if isinstance(devices, int) and devices > 0:
        return devices
    return max(1, torch.cuda.device_count()) if devices in ("auto", -1) else len(devices)


def _other(cfg: DictConfig, n: int) -> tuple[list[str] | None, int, str]:
    """Overrides for another number of processes; or None, and why not."""
    other = 2 if n == 1 else n // 2
    if cfg.data.batch_size % other:
        return None, other, f"data.batch_size={cfg.data.batch_size} is no multiple of {other}"
    on_gpus = cfg.trainer.accelerator in ("gpu", "cuda") or (
        cfg.trainer.accelerator == "auto" and torch.cuda.is_available()
    )
    if on_gpus and other > torch.cuda.device_count():
        return None, other, f"there are not {other} GPUs here"
    share = cfg.data.batch_size // other
    micro = cfg.data.micro_batch_size
    changed = [f"trainer.devices={other}"]
    if micro is not None and share % micro:
        changed.append(f"data.micro_batch_size={share}")
    if str(cfg.strategy._target_).endswith(".Single"):
        changed.append("strategy=ddp")
    return changed, other, ""
