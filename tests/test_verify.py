"""The certificate says that all is well where it is, and names the part that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm.__main__ import main
from llm.callback import Checkpoint
from llm.config import ConfigError
from llm.data import TextData
from llm.objective import Objective
from llm.signals import PreemptedError
from llm.strategy import Single
from llm.verify import PARTS, Plan, Runs, _same, compare, plan, table, verify, write_certificate
from tests.ranks import RankError, run_on_ranks
from tests.runs import composed, run_composed

Step = st.integers(-3, 3)
LEAVES = st.none() | st.booleans() | Step | st.text(max_size=2)
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner))


def without_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data begins again."""
    load = Objective.on_load_checkpoint

    def forgetful(self: Objective, checkpoint: dict[str, Any]) -> None:
        checkpoint["objective"]["n_batches"] = 0
        load(self, checkpoint)

    monkeypatch.setattr(Objective, "on_load_checkpoint", forgetful)
    monkeypatch.setattr(TextData, "load_state_dict", lambda *_: None)


def without_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout begins again."""
    monkeypatch.setattr(Checkpoint, "on_load_checkpoint", lambda *_: None)


def without_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate begins again."""
    start, rate = Objective.on_train_start, Objective.set_learning_rate

    def forgetful(self: Any) -> None:
        start(self)
        self.first = self.n_batches

    def from_here(self: Any, optimizer: Any) -> None:
        before, self.n_batches = self.n_batches, self.n_batches - self.first
        rate(self, optimizer)
        self.n_batches = before

    monkeypatch.setattr(Objective, "on_train_start", forgetful)
    monkeypatch.setattr(Objective, "set_learning_rate", from_here)


def without_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer begins again."""
    monkeypatch.setattr(Single, "load_optimizer_state_dict", lambda *_: None)


MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "position": (without_position, "ledger"),
    "generators": (without_generators, "weights"),
    "schedule": (without_schedule, "weights"),
    "optimizer": (without_moments, "weights"),
}


def train(overrides: list[str], mutation: str | None = None) -> int:
    """A run in this process, and the exit code that it comes to."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if mutation is not None:
            MUTATIONS[mutation][0](monkeypatch)
        try:
            run_composed([text for text in overrides if text != "logger=none"])
        except PreemptedError as error:
            return error.exit_code
    return 0


def in_ranks(overrides: list[str], log: Path, mutation: str | None = None) -> int:
    """As `train_in_process`, without the seconds that a new Python takes."""
    n = 2 if "trainer.devices=2" in overrides else 1
    try:
        return run_on_ranks(train, n, overrides, mutation)[0]
    except RankError as error:
        return 137 if "SIGKILL" in str(error) else 70


def planned(*overrides: str) -> Plan:
    return plan(composed(overrides), overrides, 8)


@pytest.fixture(scope="module")
def made(corpus: Path, cache_dir: Path) -> Plan:
    return planned(f"data.path={corpus}", f"data.cache_dir={cache_dir}", "~callback.sample")


@pytest.fixture(scope="module")
def passed(made: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a certificate, which passed."""
    out = tmp_path_factory.mktemp("certificate")
    rows = verify(made, out, in_ranks, lambda _: None)
    assert write_certificate(out, made, rows), table(rows)
    return out


def test_all_is_well(passed: Path) -> None:
    assert sorted(path.name for path in passed.iterdir() if path.is_dir()) == ["plain", "straight"]
    certificate = json.loads((passed / "certificate.json").read_text())
    assert certificate["passed"] is True
    assert set(certificate["versions"]) >= {"python", "torch"}
    by_run: dict[str, list[str]] = {}
    for row in certificate["rows"]:
        by_run.setdefault(row["run"], []).append(row["part"])
    bitwise = ["undisturbed, again", "SIGUSR1 to all in step 4", "SIGTERM to one process in step 5"]
    assert by_run == {
        **{name: list(PARTS) for name in [*bitwise, "SIGKILL in the save of step 6"]},
        "from 1 to 2 processes": ["loaded weights", "loaded optimizer", "batches", "losses"],
    }


def test_float32_has_to_agree_closely_however_it_was_chosen(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for able, tolerance in ((False, 1e-5), (True, 2e-2)):
        monkeypatch.setattr("llm.machine.multiplies_bfloat16", lambda device, able=able: able)
        assert planned(*made.overrides, "trainer.precision=auto", "trainer.accelerator=cpu").tolerance == tolerance
    assert planned(*made.overrides, "trainer.precision=32-true").tolerance == 1e-5


@pytest.mark.parametrize("part", MUTATIONS)
def test_what_is_lost_is_named(made: Plan, passed: Path, tmp_path: Path, part: str) -> None:
    runs = Runs(made, tmp_path, partial(in_ranks, mutation=part), lambda _: None)
    run_dir = runs.interrupted("SIGTERM", 5, "told", {75})
    assert run_dir is not None, table(runs.rows)
    rows = compare("told", passed / "straight", run_dir)
    differing = {row.part for row in rows if not row.equal}
    assert {part, MUTATIONS[part][1]} <= differing
    assert f"DIFFERS: {part}: " in table(rows)
    assert not write_certificate(tmp_path, made, rows)
    if part == "schedule":
        assert "generators" not in differing, "nor what it did not touch"


def test_a_run_that_fails_is_a_row(made: Plan, tmp_path: Path) -> None:
    rows = verify(replace(made, short=[*made.short, "model.dim=33"]), tmp_path, in_ranks, lambda _: None)
    assert [(row.run, row.part, row.equal) for row in rows] == [("undisturbed", "exit code", False)]
    assert "straight.log" in rows[0].detail


@given(NESTED, NESTED)
def test_same_is_equality(one: Any, two: Any) -> None:
    assert _same(one, one) == (True, "")
    assert _same(one, two)[0] == (repr(one) == repr(two) or sorted_repr(one) == sorted_repr(two))


def sorted_repr(value: Any) -> str:
    if isinstance(value, dict):
        return repr({key: sorted_repr(value[key]) for key in sorted(value)})
    return repr([sorted_repr(item) for item in value]) if isinstance(value, list) else repr(value)


def test_tensors_are_compared_to_the_bit() -> None:
    one = {"a": torch.tensor([1.0, 2.0])}
    assert _same(one, {"a": torch.tensor([1.0, 2.5])}) == (False, "a differs by up to 0.5")
    assert _same(one, {"b": one["a"]})[1].startswith("a is missing, was present")
    assert _same(one, {"a": one["a"].bfloat16()})[1] == "a is torch.bfloat16 [2], was torch.float32 [2]"


def test_the_plan_takes_the_users_word_for_all_else(corpus: Path, cache_dir: Path) -> None:
    made = planned("trainer.max_steps=500", "optimizer.lr=1e-3", "run_name=mine", "data.micro_batch_size=8")
    assert made.overrides == ["optimizer.lr=1e-3", "data.micro_batch_size=8"]
    assert "trainer.max_steps=8" in made.short
    assert made.other == ["trainer.devices=2", "data.micro_batch_size=4", "strategy=ddp"]
    assert planned("strategy=fsdp", "trainer.devices=4").other == ["trainer.devices=2"]
    assert planned("data.batch_size=5", "data.micro_batch_size=1").why_not == "data.batch_size=5 is no multiple of 2"
    with pytest.raises(ConfigError, match=r"callback.ledger: a certificate(.|\n)*trainer.num_nodes: the runs"):
        planned("~callback.ledger", "trainer.num_nodes=2")


def test_the_command_refuses_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for arguments, words in ((["--steps", "3"], "at least 8"), (["--out", str(tmp_path)], "is not empty")):
        with pytest.raises(SystemExit) as left:
            main(["verify", *arguments])
        assert (left.value.code, words in capsys.readouterr().err) == (64, True)
