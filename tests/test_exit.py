"""How a run ends: the exit code, the words on stderr, and the cause in exit.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm import exit
from llm.checkpoint import CheckpointError
from llm.config import ConfigError
from llm.data import DataError
from llm.exit import (
    LostPeerError,
    RunExistsError,
    as_rank,
    before_begun,
    exit_code,
    finished,
    forget,
    guarded,
    record,
    recorded,
    version,
    write_end,
)
from llm.run import run
from llm.signals import PreemptedError
from tests.runs import Compose

ROOT = Path(__file__).parents[1]
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7001. GLHF!"


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    as_rank(0, 1)


def end(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "exit.json").read_text())


def rank(body: str, number: int = 1, first: str = "lambda: True") -> subprocess.CompletedProcess[str]:
    """What becomes of one of two ranks that runs `body` guarded."""
    program = f"""
import atexit, multiprocessing, os, signal, sys, threading
from llm.exit import LostPeerError, as_rank, guarded
as_rank({number}, 2)
@guarded({first})
def main():
{textwrap.indent(textwrap.dedent(body), "    ")}
main()
"""
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=20
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["x"]), 64),
        (DataError("x"), 65),
        (ZeroDivisionError(), 70),
        (RunExistsError("x"), 73),
        (CheckpointError("x"), 74),
        (OSError(28, "No space left on device"), 74),
        (PreemptedError("x", 75), 75),
        (LostPeerError("x"), 76),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_and_the_cause(
    tmp_path: Path, error: BaseException, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(error) == code
    write_end(tmp_path, 5, 5)

    def goes_on_and_fails() -> None:
        with guarded(), recorded(tmp_path):
            assert not (tmp_path / "exit.json").exists()  # a run that goes on has no end
            raise error

    with pytest.raises(SystemExit) as left:
        goes_on_and_fails()
    assert left.value.code == code
    printed = capfd.readouterr().err
    assert ("Traceback" in printed) == (code == 70)
    cause = str(error) if code == 76 else f"{type(error).__name__}: {error}"
    assert end(tmp_path) == {"code": code, "cause": cause}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]
    assert finished(tmp_path, 1) is None


def test_ctrl_c_that_lightning_turned_into_an_exit_is_still_one() -> None:
    @guarded()
    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(SystemExit) as left:
        interrupted()
    assert left.value.code == 130


@pytest.mark.parametrize(("error", "words"), [(KeyboardInterrupt(), "KeyboardInterrupt\n"), (DataError("x"), "x\n")])
def test_what_is_guarded_twice_is_said_once(
    error: BaseException, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left, guarded(), guarded():
        raise error
    assert (left.value.code, capfd.readouterr().err) == (exit_code(error), words)


def test_an_exit_on_purpose_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for code, meant in ((0, 0), (3, 3), (None, 0), ("message", 1)):
        assert exit_code(SystemExit(code)) == meant
        with pytest.raises(SystemExit) as left, guarded():
            sys.exit(code)
        assert left.value.code == code
    with pytest.raises(SystemExit), recorded(tmp_path):
        sys.exit(0)
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_finished_means_nothing_to_add(tmp_path: Path) -> None:
    assert finished(tmp_path, 1) is None
    write_end(tmp_path, 6, 6)
    assert (finished(tmp_path, 6), finished(tmp_path, 7)) == (6, None)
    write_end(tmp_path, 6, 50)  # early stopping
    assert (finished(tmp_path, 50), finished(tmp_path, 51)) == (6, None)
    (tmp_path / "exit.json").write_text("{")
    assert finished(tmp_path, 6) is None


def test_the_first_cause_stays_but_a_lost_peer_is_none(tmp_path: Path) -> None:
    record(tmp_path, 76, "lost", 0)
    assert end(tmp_path) == {"code": 76, "cause": "lost", "rank": 0}
    record(tmp_path, 76, "lost too", 2)
    assert end(tmp_path)["rank"] == 0
    record(tmp_path, 137, "killed", 1)
    assert end(tmp_path) == {"code": 137, "cause": "killed", "rank": 1}
    for code in (70, 76):
        record(tmp_path, code, "later", 0)
        assert end(tmp_path)["code"] == 137
    (tmp_path / "exit.json").write_text("{")  # of a disk that was full
    record(tmp_path, 70, "bug")
    assert end(tmp_path) == {"code": 70, "cause": "bug"}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    record(tmp_path, 70, "bug")
    record(tmp_path, 65, "later")
    assert end(tmp_path) == {"code": 70, "cause": "bug"}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_one_of_many_is_first(tmp_path: Path) -> None:
    """Eight processes at once: one whole file, of one of them."""
    program = """
import sys
from pathlib import Path
from llm.exit import record
sys.stdin.read()
record(Path(sys.argv[1]), 70, "x" * 10000, int(sys.argv[2]))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(n)], cwd=ROOT, stdin=subprocess.PIPE)
        for n in range(8)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(timeout=20) for process in processes] == [0] * 8
    assert end(tmp_path)["rank"] in range(8)
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_what_an_earlier_attempt_left(tmp_path: Path) -> None:
    assert version(tmp_path) is None
    forget(tmp_path)
    record(tmp_path, 75, "saved")
    first = version(tmp_path)
    assert first == version(tmp_path)
    forget(tmp_path)
    assert version(tmp_path) is None
    write_end(tmp_path, 6, 6)
    forget(tmp_path)
    assert version(tmp_path) not in (None, first)


def test_ranks_record_who_they_are_and_only_the_first_takes_the_old_end_away(tmp_path: Path) -> None:
    record(tmp_path, 75, "saved")
    as_rank(1, 2)
    with pytest.raises(ValueError, match="x"), recorded(tmp_path):
        raise ValueError("x")
    assert end(tmp_path) == {"code": 75, "cause": "saved"}
    as_rank(0, 2)
    with pytest.raises(ValueError, match="x"), recorded(tmp_path):
        raise ValueError("x")
    assert end(tmp_path) == {"code": 70, "cause": "ValueError: x", "rank": 0}


def raised(kind: str, text: str, bases: tuple[type, ...] = (RuntimeError,)) -> Exception:
    return type(kind, bases, {})(text)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError(GLOO), 76),
        (RuntimeError("Gloo connectFullMesh failed with ... Connection refused, remote=[10.0.0.1]:1"), 76),
        (RuntimeError("[x.cc:81] Timed out waiting 15000ms for recv operation to complete"), 76),
        (RuntimeError("Connection reset by peer"), 76),
        (RuntimeError("Broken pipe"), 76),
        (raised("DistNetworkError", "recvValue failed"), 76),
        (raised("DistNetworkError", "The server socket has failed to listen. code: -98, name: EADDRINUSE"), 70),
        (raised("DistBackendError", "NCCL error: ... remote process exited or there was a network error"), 76),
        (raised("DistBackendError", "NCCL communicator was aborted on rank 1"), 76),
        (raised("DistBackendError", "ncclInvalidUsage: Duplicate GPU detected"), 70),
        (RuntimeError("shapes do not match"), 70),
        (BrokenPipeError(32, "Broken pipe"), 74),  # of stdout
    ],
)
def test_a_peer_that_is_gone(error: Exception, code: int) -> None:
    as_rank(1, 2)
    assert exit_code(error) == code
    as_rank(0, 1)
    assert exit_code(error) == (70 if code == 76 else code)  # alone there is no peer


def test_what_was_raised_first_counts() -> None:
    def raised_while_handling(first: Exception, second: Exception) -> Exception:
        try:
            try:
                raise first
            except Exception:
                raise second  # noqa: B904
        except Exception as error:
            return error

    as_rank(0, 2)
    assert exit_code(raised_while_handling(RuntimeError(GLOO), ValueError("nothing to take down"))) == 76
    assert exit_code(raised_while_handling(ZeroDivisionError(), RuntimeError(GLOO))) == 70
    assert exit_code(raised_while_handling(RuntimeError(GLOO), CheckpointError("x"))) == 74


def test_a_rank_says_in_one_line_that_it_lost_another() -> None:
    done = rank(f"raise RuntimeError({GLOO!r})", number=0)
    assert done.returncode == 76
    assert done.stderr == "rank 0: lost contact with another rank (Connection closed by peer [127.0.0.1]:7001)\n"
    done = rank("raise LostPeerError('rank 1 did not arrive')", number=0)
    assert (done.returncode, done.stderr) == (76, "rank 0: rank 1 did not arrive\n")


def test_who_was_told_why_another_left_does_not_ask_for_another_try() -> None:
    """Before the run begins nothing is on record, and srun ends with the highest code of its tasks."""
    assert rank("raise LostPeerError('rank 0 failed', 65)").returncode == 65
    assert rank("as_rank(1, 2, watched=True)\nraise LostPeerError('rank 0 failed', 65)").returncode == 76


def test_a_rank_puts_its_name_before_each_line() -> None:
    done = rank("1 / 0")
    assert done.returncode == 70
    lines = done.stderr.splitlines()
    assert lines[0] == "rank 1: Traceback (most recent call last):"
    assert lines[-1] == "rank 1: ZeroDivisionError: division by zero"
    assert all(line.startswith("rank 1: ") for line in lines)
    assert rank("1 / 0", number=0).stderr.startswith("Traceback")


def test_only_the_first_rank_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    asked = []
    with pytest.raises(SystemExit), guarded(lambda code: bool(asked.append(code))):
        raise ValueError("x")
    assert (asked, capfd.readouterr().err) == ([70], "")

    def unreachable() -> bool:
        raise RuntimeError(GLOO)

    with pytest.raises(SystemExit) as left, guarded(unreachable):
        raise DataError("who cannot ask must speak")
    assert (left.value.code, capfd.readouterr().err) == (65, "who cannot ask must speak\n")


def test_nothing_keeps_a_rank_from_leaving() -> None:
    """A second Ctrl-C while it asks, a closed stderr, threads that never end, exit handlers that hang."""
    assert rank("raise OSError(28, 'x')", first="lambda: os.kill(os.getpid(), signal.SIGINT)").returncode == 74
    assert rank("os.close(2)\n1 / 0").returncode == 70
    assert rank("threading.Thread(target=signal.pause).start()\n1 / 0").returncode == 70
    assert rank("atexit.register(signal.pause)\nsys.exit(3)").returncode == 3
    assert rank("print('said', end='')\nraise KeyboardInterrupt").stdout == "said"


def test_a_rank_that_ends_in_order_ends_as_ever() -> None:
    done = rank("atexit.register(print, 'handled')\nsys.exit(0)")
    assert (done.returncode, done.stdout) == (0, "handled\n")
    done = rank("sys.exit('what is wrong')", number=0)
    assert (done.returncode, done.stderr) == (1, "what is wrong\n")


def test_loader_workers_do_not_outlive_their_rank() -> None:
    body = """
    multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True).start()
    raise KeyboardInterrupt
    """
    assert rank(body).returncode == 130  # and its pipes are closed: the last who could write there is gone


def test_a_rank_that_leaves_the_talking_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(exit.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as left:
        exit.stand_back(64)
    assert (left.value.code, waited) == (64, [exit.STAND_BACK_S])


def loses_contact(run_dir: Path) -> None:
    with recorded(run_dir):
        record(run_dir, 70, "RuntimeError: boom", 1)
        raise RuntimeError("Connection closed by peer [127.0.0.1]:7001")


def test_what_ends_a_run_before_it_begins_is_on_record(tmp_path: Path) -> None:
    """The newest attempt's; what asks for another try says nothing of the run, and a finished one stays so."""
    for text in ("first", "second"):
        with pytest.raises(DataError), before_begun(tmp_path):
            raise DataError(text)
    end = {"code": 65, "cause": "DataError: second"}
    assert json.loads((tmp_path / "exit.json").read_text()) == end
    for error in (KeyboardInterrupt(), LostPeerError("rank 0 failed", 65), PreemptedError("told")):
        with pytest.raises(type(error)), before_begun(tmp_path):
            raise error
    assert json.loads((tmp_path / "exit.json").read_text()) == end
    write_end(tmp_path, 5, 5)
    with pytest.raises(DataError), before_begun(tmp_path):
        raise DataError("third")
    assert finished(tmp_path, 5) == 5


def test_a_run_without_its_data_leaves_the_cause_and_can_begin(compose_run: Compose, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run(compose_run(f"data.path={tmp_path / 'nowhere.jsonl'}", "resume=never"))
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 65
    run(compose_run("resume=never", "trainer.max_steps=3"))
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0


def test_who_lost_a_rank_leaves_with_the_code_of_what_ended_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun ends with the highest code of its tasks, and 76 would ask for another try of a bug."""
    monkeypatch.setattr("llm.exit._n_ranks", 2)
    with pytest.raises(LostPeerError) as lost:
        loses_contact(tmp_path)
    assert exit_code(lost.value) == 70
    assert str(lost.value).endswith("7001); the cause is that of rank 1: RuntimeError: boom")
    assert json.loads((tmp_path / "exit.json").read_text())["rank"] == 1
