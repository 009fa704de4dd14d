"""The ledger says what was consumed, whatever happened to the run; and one altered byte of it is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm import ledger
from llm.__main__ import main
from llm.audit import check, show_step, show_window
from llm.config import ConfigError
from llm.data import DataError
from llm.run import run
from llm.signals import PreemptedError
from tests.ranks import run_on_ranks
from tests.runs import Compose, run_composed

SOUND = "every seal holds, no step is missing, no sample was lost or used twice"


@given(st.lists(st.integers(0, 2**40)))
def test_ids_survive_packing(samples: list[int]) -> None:
    assert ledger.unpacked(ledger.packed(samples)) == samples


def settings_of(corpus: Path, cache_dir: Path, run_dir: Path, max_steps: int, n: int = 1) -> list[str]:
    return [
        f"data.path={corpus}",
        f"data.cache_dir={cache_dir}",
        f"run_dir={run_dir}",
        f"trainer.max_steps={max_steps}",
        "~callback.sample",
        "schedule=constant",
        "callback.ledger.every_n_steps=2",
        "callback.checkpoint.every_n_train_steps=3",
        "callback.checkpoint.save_top_k=-1",
        "trainer.val_check_interval=50",
        *(["strategy=ddp", f"trainer.devices={n}", "data.micro_batch_size=2"] if n > 1 else []),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache_dir: Path) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole")
    run_composed(settings_of(corpus, cache_dir, run_dir, 24))
    return run_dir


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache_dir: Path) -> Path:
    """The same steps: killed at 5, with the checkpoint of 3; then two processes, then one again."""
    run_dir = tmp_path_factory.mktemp("audited")
    run_composed(settings_of(corpus, cache_dir, run_dir, 5))
    shutil.rmtree(run_dir / "checkpoints" / "step-00000005")
    (run_dir / "exit.json").unlink()
    with open(run_dir / ledger.NAME, "a") as file:
        file.write('{"step": 6, "bat')
    run_on_ranks(run_composed, 2, settings_of(corpus, cache_dir, run_dir, 9, n=2))
    run_composed(settings_of(corpus, cache_dir, run_dir, 24))
    return run_dir


def test_the_account_is_that_of_the_run_that_nothing_disturbed(whole: Path, audited: Path) -> None:
    report, sound = check(audited)
    assert sound, report
    assert SOUND in report
    assert "24 steps, 192 samples\n  3 starts, on 1, 2, 1 processes; 2 steps done again" in report
    one, other = ledger.read(whole), ledger.read(audited)
    assert [one.steps[step]["samples"] for step in range(1, 25)] == [
        other.steps[step]["samples"] for step in range(1, 25)
    ]
    assert [float.fromhex(one.steps[step]["loss"]) for step in range(1, 4)] == [
        float.fromhex(other.steps[step]["loss"]) for step in range(1, 4)
    ]


def test_passes_over_two_sources_run_on_across_steps() -> None:
    drawn = [[0, 3, 2], [1, 4, 1], [4, 3, 0], [2, 2, 3]]  # rows 0 to 2 are the first source's, 3 and 4 the second's
    account = ledger.Account(
        {step: {"samples": ids} for step, ids in enumerate(drawn, 1)}, [{"rows": {"a": 3, "b": 2}}]
    )
    assert ledger.passes(account) == []
    account.steps[4]["samples"] = [2, 3, 3]
    assert ledger.passes(account) == ["b: pass 3 has row 0 twice (1 such rows)"]
    account.steps[4]["samples"] = [2, 9, 3]
    assert ledger.passes(account) == ["sample 9 is of no source"]


def altered(run_dir: Path, tmp_path: Path, number: int, change: str) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    lines = (copy / ledger.NAME).read_text().splitlines(keepends=True)
    if change == "lost":
        del lines[number]
    elif change == "twice":
        lines.insert(number, lines[number])
    elif change == "loss":
        lines[number] = lines[number].replace("0x1.", "0x1.0", 1)
    elif change == "end":
        del lines[number:]
    elif change == "sample":
        line = json.loads(lines[number])
        line["samples"] = ledger.packed([7, *ledger.unpacked(line["samples"])[1:]])
        lines[number] = json.dumps(line) + "\n"
    (copy / ledger.NAME).write_text("".join(lines))
    return copy


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (4, "lost", "line 5: was altered, or a line before it is lost or added"),
        (4, "twice", "line 6: step 4, where 5 was due"),
        (4, "loss", "line 5: was altered"),
        (9, "sample", "line 10: was altered"),
        (-3, "end", "step-00000024 knows of a line with chain"),
    ],
)
def test_one_alteration_is_found(audited: Path, tmp_path: Path, number: int, change: str, message: str) -> None:
    report, sound = check(altered(audited, tmp_path, number, change))
    assert not sound
    assert message in report
    assert SOUND not in report


START = {"event": "start", "step": 0, "world_size": 1, "data": "a", "rows": {"a": 9}}
STEP = {"step": 1, "batch": 0, "samples": ledger.packed([1, 2]), "loss": (1.5).hex()}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([STEP], "there is no start"),
        ([START, STEP | {"samples": "1:AQ="}], "line 2: holds what no ledger is given"),
        ([START, STEP | {"samples": "0:AQ=="}], "line 2: holds what no ledger is given"),
        ([START, {"step": 1, "batch": 0, "loss": None}], "line 2: holds what no ledger is given"),
        ([START, STEP | {"step": "1"}], "line 2: holds what no ledger is given"),
        ([START, STEP | {"loss": "much"}], "line 2: holds what no ledger is given"),
        ([START | {"rows": {"a": 0}}, STEP], "line 1: holds what no ledger is given"),
        ([START, START | {"event": "rollback"}], "line 2: holds what no ledger is given"),
        ([START, STEP, START | {"after": []}], "line 3: holds what no ledger is given"),
    ],
)
def test_what_no_ledger_holds_is_damage_and_not_a_crash(
    tmp_path: Path, lines: list[ledger.Line], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.Ledger(tmp_path).append(lines)
    with pytest.raises(SystemExit) as left:
        main(["audit", str(tmp_path)])
    assert left.value.code == 74
    assert f"wrong: {message}" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["[1]", "3", '{"chain": []}', '{"chain": {}}', "[" * 99999])
def test_a_line_of_another_kind_is_no_line_of_a_ledger(tmp_path: Path, line: str) -> None:
    (tmp_path / ledger.NAME).write_text(f"{line}\n")
    assert ledger.read(tmp_path).mistakes == ["line 1: is no line of a ledger"]


def test_a_ledger_that_is_sealed_and_wrong_is_found(whole: Path, tmp_path: Path) -> None:
    """By its own arithmetic: a sample used twice, a batch left out."""
    book, account = ledger.Ledger(tmp_path), ledger.read(whole)
    lines = [account.events[0], *(account.steps[step] for step in sorted(account.steps))]
    first = lines[1]["samples"][0]
    for line in lines:
        if "samples" in line:
            line["samples"] = ledger.packed([first, *line["samples"][1:]])
    book.append(lines)
    assert any("pass 1 has row" in mistake for mistake in ledger.passes(ledger.read(tmp_path)))
    skipping = ledger.Ledger(tmp_path / "skipping")
    skipping.path.parent.mkdir()
    skipping.append([lines[0], lines[1], lines[2] | {"batch": 2}])
    assert "line 3: batch 2 after batch 0" in ledger.read(tmp_path / "skipping").mistakes


def test_the_command(audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", str(audited)])
    assert SOUND in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["audit", str(altered(audited, tmp_path, 4, "lost"))])
    assert left.value.code == 74
    with pytest.raises(SystemExit) as left:
        main(["audit", str(tmp_path)])
    assert left.value.code == 65
    assert "holds no ledger.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["audit", str(audited), "--steps", "4"])
    assert left.value.code == 64


def test_the_text_of_a_step_is_that_of_the_corpus(audited: Path, corpus: Path) -> None:
    documents = {json.loads(line)["text"] for line in corpus.read_text().splitlines()}
    shown = show_step(audited, 4)
    assert shown.startswith("step 4, batch 3, loss ")
    texts = [line.replace("<|endoftext|>", "") for line in shown.splitlines()[1:] if not line.startswith("====")]
    assert len(texts) >= 8
    assert all(any(text in document for document in documents) for text in texts)
    with pytest.raises(DataError, match="step 99 is not in the ledger, which has 1 to 24"):
        show_step(audited, 99)


def test_a_window_ranks_its_sources(whole: Path) -> None:
    shown = show_window(whole, 2, 5).splitlines()
    assert shown[0].startswith("steps 2 to 5, mean loss ")
    assert shown[2].split() == ["files/causal_lm", "32", "100.0%", "100.0%"]
    with pytest.raises(DataError, match="none of the steps 90 to 95"):
        show_window(whole, 90, 95)


def test_stopped_and_resumed_it_is_sound(compose_run: Compose, tmp_path: Path) -> None:
    with pytest.raises(PreemptedError):
        run(compose_run("+callback.signal={_target_: tests.test_resume.Signal, step: 3}", "packages=[tests]"))
    run(compose_run())
    report, sound = check(tmp_path / "run")
    assert sound, report
    assert "2 starts, on 1, 1 processes; 0 steps done again" in report


def test_the_stored_configuration_names_nothing_but_what_may_be_called(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    file, canary = copy / "config.yaml", tmp_path / "canary"
    text = file.read_text().replace("_target_: llm.data.TextData", f"_target_: pathlib.Path\n  x: {canary}")
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"pathlib\.Path"):
        show_step(copy, 4)
    assert not canary.exists()
