"""`python -m llm COMMAND`, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llm.__main__ import main
from llm.data.cache import caches
from llm.run import run
from tests.runs import Compose


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> list[str]:
    return [
        "data=files",
        f"data.path={corpus}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.max_length=32",
        "tokenizer.vocab_size=300",
    ]


def test_prepare_list_clean(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["prepare", "--list", *settings])
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'cache'}: nothing"
    main(["prepare", *settings])
    report = yaml.safe_load(capsys.readouterr().out)
    assert report["vocab_size"] == 300
    assert report["train"]["files"]["fill"] > 0.9
    kinds = [cache.kind for cache in caches(tmp_path / "cache")]
    assert sorted(set(kinds)) == ["rows", "tokenizer", "tokens"]
    main(["prepare", "--list", *settings])
    assert capsys.readouterr().out.count(" MB ") == len(kinds)
    main(["prepare", "--clean", *settings])
    assert "MB freed" in capsys.readouterr().out
    assert caches(tmp_path / "cache") == []


def test_stage(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run reads is found in the copy, and what it does not read is not there."""
    main(["prepare", *settings])
    main(["prepare", *settings, "data.max_length=64"])  # other rows, of another run
    wanted = {cache.path.name: cache.meta for cache in caches(tmp_path / "cache")}
    main(["stage", str(tmp_path / "disk"), *settings])
    staged = {cache.path.name: cache.meta for cache in caches(tmp_path / "disk")}
    assert sorted(name.partition("-")[0] for name in staged) == ["rows", "rows", "tokenizer", "tokens"]
    assert all(meta == wanted[name] for name, meta in staged.items())
    monkeypatch.setattr("llm.data.cache._build", lambda *arguments: pytest.fail("made again"))
    main(["prepare", *settings, f"data.cache_dir={tmp_path / 'disk'}"])


def test_a_share_that_there_is_not(settings: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for share, told in (("4/4", "share 4/4"), ("x", "give K/N")):
        with pytest.raises(SystemExit) as refused:
            main(["prepare", "--share", share, *settings])
        assert refused.value.code == 64
        assert told in capfd.readouterr().err


def test_a_share_of_data_that_cannot_be_used(
    settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SystemExit) as refused:
        main(["prepare", "--share", "0/2", *settings, f"data.path={tmp_path / 'empty.jsonl'}"])
    assert refused.value.code == 65
    assert "empty.jsonl: the file is empty" in capfd.readouterr().err


def test_generate_continues_each_prompt(
    compose_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(compose_run())
    capsys.readouterr()
    command = ["generate", str(tmp_path / "run"), "--prompt", "the cat", "--prompt", "a dog", "--max-new-tokens", "4"]
    main([*command, "--temperature", "0"])
    first = capsys.readouterr().out
    assert first.startswith("the cat")
    assert "\na dog" in first
    main([*command, "--temperature", "0", "--seed", "1"])
    assert capsys.readouterr().out == first  # greedy needs no seed


def test_generate_refuses_a_wrong_setting(
    compose_run: Compose, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(compose_run())
    with pytest.raises(SystemExit) as left:
        main(["generate", str(tmp_path / "run"), "--temperature", "-1"])
    assert left.value.code == 64
    assert "temperature = -1.0: must be at least 0" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nope"], 64, "usage: python -m llm COMMAND"),
        (["prepare", "data.max_lenght=3"], 64, "data.max_lenght: 3 - no such key - did you mean data.max_length?"),
        (["prepare", "--help-me"], 64, "--help-me"),
        (["prepare", "-m", "seed=1,2"], 64, "-m: sweeps over several runs, and this command is for one - leave it"),
        (["plan", "--multirun", "seed=1,2"], 64, "--multirun: sweeps over several runs"),
        (["prepare", "data.cache_dir="], 64, "data.cache_dir: '' - must be text of length at least 1"),
        (["prepare", "data=files", "data.path="], 64, "path='' of a data source: is empty; name a file"),
        (["prepare", "data=files", "data.path=/nowhere.txt"], 65, "/nowhere.txt"),
        (["evaluate", "run", "--batch-size", "0"], 64, "--batch-size: 0: must be a whole number, at least 1"),
        (["evaluate", "run", "--bootstrap", "-5"], 64, "--bootstrap: -5: must be a whole number, at least 0"),
        (["evaluate", "run", "--temperature", "nan"], 64, "--temperature: nan: must be a number, at least 0"),
        (["evaluate", "run", "--limit", "1.5"], 64, "--limit: 1.5: must be a whole number, at least 1"),
        (["generate"], 64, "the following arguments are required: RUN"),
        (["generate", "/nowhere"], 74, "/nowhere: no checkpoint here"),
        (["generate", "run", "--prompt", "a", "--chat"], 64, "--prompt and --chat: one of them at a time"),
        (["generate", "run", "--prompt", "a", "--system", "b"], 64, "--system: goes with --chat"),
        (["generate", "run", "--prompt", "a", "--stop", ""], 64, "--stop: is empty"),
        (
            ["generate", "run", "--seed", "-1"],
            64,
            "--seed: -1: must be a whole number, at least 0 and at most 18446744073709551615",
        ),
        (["generate", "run", "--seed", str(2**64)], 64, f"--seed: {2**64}: must be a whole number, at least 0"),
        (["average", "run", "out", "--last", "0"], 64, "--last: 0: must be a whole number, at least 1"),
        (["report", "mine", "--out", "it.csv"], 64, "--out it.csv: names the page"),
        (["generate", "run", "--chat", "--n-beams", "2"], 64, "--n-beams: does not go with --chat"),
        (["generate", "run", "--chat", "--stop", "x"], 64, "--stop: does not go with --chat"),
    ],
)
def test_mistakes(arguments: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == code
    printed = capfd.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    assert "prepare" in capsys.readouterr().out


def test_a_folder_without_a_tokenizer_is_a_mistake(
    settings: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    mistaken = [*settings[:-1], "tokenizer=pretrained", f"tokenizer.path={tmp_path / 'none'}"]
    for command in (["prepare"], ["stage", str(tmp_path / "disk")]):
        with pytest.raises(SystemExit) as left:
            main([*command, *mistaken])
        assert left.value.code == 64
        assert "transformers finds no tokenizer in it" in capfd.readouterr().err
