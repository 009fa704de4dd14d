"""Starting ranks, passing signals on, ending together, and leaving nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm.config import ConfigError
from llm.launch import launch
from llm.launch.launcher import FORWARDED
from llm.signals import TOLD
from tests.launch.jobs import ROOT, Start, command, left

WAIT = "signal.pause()\n"
GRACE_S = 0.3


def end(run_dir: Path) -> dict[str, object] | None:
    path = run_dir / "exit.json"
    return json.loads(path.read_text()) if path.exists() else None


def say(process: subprocess.Popen[str], n: int) -> list[str]:
    """The next `n` lines of a job's ranks."""
    assert process.stdout is not None
    return sorted(process.stdout.readline().strip() for _ in range(n))


def test_what_a_rank_knows(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("NODE_RANK", "3")
    names = "LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK MASTER_ADDR LLM_RUN_ID LLM_LAUNCHER OMP_NUM_THREADS"
    code = launch(
        command(f"tell(*(os.environ[name] for name in {names.split()}), 'LLM_STORE_FD' in os.environ, os.getsid(0))"),
        2,
        run_dir=tmp_path,
        run_id="a/0",
    )
    out, err = capfd.readouterr()
    first, second = (line.split() for line in sorted(out.splitlines()))
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    shared = ["2", "2", "0", "127.0.0.1", "a/0", str(os.getpid()), threads]
    assert first[:-1] == ["0", "0", *shared, "True"]
    assert second[:-1] == ["1", "1", *shared, "False"]
    assert len({first[-1], second[-1], str(os.getsid(0))}) == 3  # sessions
    assert (code, err, end(tmp_path)) == (0, "", None)


def test_threads_that_were_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch(command("tell(os.environ['OMP_NUM_THREADS'])"), 1, run_dir=tmp_path) == 0
    assert capfd.readouterr().out == "0 7\n"


def test_one_node_of_several(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29500", "LLM_RUN_ID": "made"}.items():
        monkeypatch.setenv(name, value)
    names = "LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT"
    body = f"tell(*(os.environ[name] for name in {names.split()}), {{'LLM_RUN_ID', 'LLM_STORE_FD'}} & set(os.environ))"
    assert launch(command(body), 2, run_dir=tmp_path, n_nodes=3) == 0
    expected = ["2 0 6 2 1 n0 29500 set()", "3 1 6 2 1 n0 29500 set()"]
    assert sorted(capfd.readouterr().out.splitlines()) == expected


@pytest.mark.parametrize(
    ("variables", "rule"),
    [
        ({}, r"this process knows one node only \(NODE_RANK= MASTER_ADDR= MASTER_PORT=\)"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "n0"}, r"this process knows one node only \(NODE_RANK=0 MASTER_ADDR=n0"),
        ({"NODE_RANK": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "1"}, "NODE_RANK=2 must be between 0 and 1"),
        (
            {"NODE_RANK": "0", "MASTER_ADDR": "n0", "MASTER_PORT": "x"},
            "MASTER_PORT=x must be between 1 and 65535",
        ),
    ],
)
def test_nodes_that_do_not_know_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], rule: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    remedy = "start one per node with NODE_RANK=… MASTER_ADDR=… MASTER_PORT=…, .* or use torchrun or srun"
    with pytest.raises(ConfigError, match=f"trainer.num_nodes: 2 - {rule}.* - {remedy}"):
        launch(command(""), 1, run_dir=tmp_path, n_nodes=2)


def test_the_store_has_its_socket_before_anybody_asks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    import socket
    if rank == 0:
        served, _ = socket.socket(fileno=int(os.environ["LLM_STORE_FD"])).accept()
        served.sendall(b"hello")
    else:
        peer = socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        tell(peer.recv(5).decode())
    """
    assert launch(command(body), 2, run_dir=tmp_path) == 0
    assert capfd.readouterr().out == "1 hello\n"


def test_the_launcher_itself_does_not_hold_the_socket(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    import socket
    if rank == 1:
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
            tell(peer.recv(1))
        except (ConnectionRefusedError, ConnectionResetError):
            tell("nobody")
    """
    assert launch(command(body), 2, run_dir=tmp_path, grace_s=20) == 0
    assert capfd.readouterr().out == "1 nobody\n"


def test_torch_takes_the_socket(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    from torch.distributed import TCPStore
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket = int(os.environ["LLM_STORE_FD"])
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=socket)
    store.set("a", "b")
    tell(TCPStore(host, port, is_master=False, wait_for_workers=False).get("a"))
    """
    without_s = [word for word in command(body) if word != "-S"]
    assert launch(without_s, 1, run_dir=tmp_path) == 0
    assert capfd.readouterr().out == "0 b'b'\n"


def test_a_rank_that_fails_ends_the_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert launch(command("sys.exit(70) if rank == 1 else signal.pause()"), 3, run_dir=tmp_path, grace_s=GRACE_S) == 70
    assert GRACE_S <= time.monotonic() - began < 10
    assert capfd.readouterr().err == "rank 1 failed; its traceback is above\n"
    assert end(tmp_path) is None  # the rank writes that itself


def test_a_rank_that_is_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = f"tell(os.getpid())\nif rank == 1: os.kill(os.getpid(), 9)\n{WAIT}"
    assert launch(command(body), 2, run_dir=tmp_path, grace_s=GRACE_S) == 137
    out, err = capfd.readouterr()
    _, pid = sorted(out.splitlines())[1].split()
    assert err.startswith(f"rank 1 (pid {pid}) was killed by SIGKILL, as the kernel does when memory runs out")
    assert err.endswith("; the other ranks were stopped\n")
    assert end(tmp_path) == {"code": 137, "cause": err.strip(), "rank": 1}


def test_a_rank_that_leaves_early(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(command(f"if rank == 0: {WAIT}"), 3, run_dir=tmp_path, grace_s=GRACE_S) == 70
    err = capfd.readouterr().err
    assert err.endswith(" left early with exit code 0, while other ranks were still at work\n")
    assert end(tmp_path) == {"code": 70, "cause": err.strip(), "rank": int(err.split()[1])}


def test_ranks_that_leave_in_time_are_not_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    import socket
    if rank == 0:
        served, _ = socket.socket(fileno=int(os.environ["LLM_STORE_FD"])).accept()
        served.recv(1)  # until the other one is gone
        tell("done")
        sys.exit(76)
    socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
    sys.exit(65)
    """
    assert launch(command(body), 2, run_dir=tmp_path, grace_s=20) == 65
    assert capfd.readouterr() == ("0 done\n", "")


KILLED = "os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(
    ("earlier", "during", "kept"),
    [
        ({"code": 75, "cause": "saved"}, None, 137),
        ({"code": 0, "cause": "finished", "step": 6, "max_steps": 6}, None, 0),
        (None, {"code": 76, "cause": "LostPeerError"}, 137),
        (None, {"code": 65, "cause": "DataError"}, 65),
        ({"code": 75, "cause": "saved"}, {"code": 65, "cause": "DataError"}, 65),
    ],
)
def test_the_cause_that_is_kept(tmp_path: Path, earlier: object, during: object, kept: int) -> None:
    """Of an earlier attempt only a finished run counts, of this one only what is not itself a consequence."""
    path = tmp_path / "exit.json"
    if earlier is not None:
        path.write_text(json.dumps(earlier))
    rewrite = "" if during is None else f"open({str(path)!r}, 'w').write({json.dumps(during)!r})"
    assert launch(command(f"{rewrite}\n{KILLED}"), 1, run_dir=tmp_path) == 137
    assert json.loads(path.read_text())["code"] == kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["exit.json"]


def test_no_directory_is_made_for_the_cause(tmp_path: Path) -> None:
    assert launch(command(KILLED), 1, run_dir=tmp_path / "run") == 137
    assert not (tmp_path / "run").exists()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 9)", "os._exit(70)"])
def test_nothing_that_a_rank_started_stays_behind(start: Start, ending: str) -> None:
    body = f"""
    worker = os.fork()
    if worker == 0:
        {WAIT}
    tell(os.getpid(), worker)
    if rank == 1:
        {ending}
    {WAIT}
    """
    process = start(body, grace_s=GRACE_S)
    told = say(process, 2)
    left(process)  # the end of their output is the end of the last of them
    assert not [pid for line in told for pid in line.split()[1:] if alive(int(pid))]


def test_what_a_dead_rank_started_is_gone_before_the_grace_is_over(start: Start) -> None:
    """Workers hold the connections of their rank open, and the others would go on waiting for it."""
    body = """
    import socket
    if rank == 0:
        served, _ = socket.socket(fileno=int(os.environ["LLM_STORE_FD"])).accept()
        served.recv(1)  # until the last that holds the other end is gone
        sys.exit(76)
    peer = socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
    if os.fork() == 0:
        signal.pause()
    os.kill(os.getpid(), 9)
    """
    process = start(body, grace_s=60)
    left(process)
    assert process.returncode == 137


@pytest.mark.parametrize("number", FORWARDED, ids=lambda number: number.name)
def test_each_signal_is_passed_on_once(start: Start, number: signal.Signals) -> None:
    """To a rank, not to its workers, and also where a terminal sends it to everybody; twice is twice."""
    body = f"""
    seen = []
    came, wakeup = os.pipe()  # pause() would sleep through a signal that comes just before it
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal({int(number)}, lambda number, frame: (seen.append(number), tell("saw", len(seen))))
    worker = os.fork()
    if worker == 0:
        signal.signal({int(number)}, lambda *_: tell("worker saw it"))
        os.write(1, b"ready\\n")
        while True: signal.pause()
    while len(seen) < 2: os.read(came, 1)
    os.kill(worker, signal.SIGKILL)
    """
    process = start(body)
    assert say(process, 2) == ["ready"] * 2
    for n in (1, 2):
        os.killpg(process.pid, number)
        assert say(process, 2) == [f"0 saw {n}", f"1 saw {n}"]
    assert process.wait(timeout=20) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 76), (signal.SIGQUIT, 131)])
def test_signals_that_come_too_early_for_a_rank(
    start: Start, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start(f"signal.signal({int(number)}, signal.SIG_DFL)\ntell('ready')\n{WAIT}")
    say(process, 2)
    process.send_signal(number)
    _, err = left(process)
    assert process.returncode == code
    said = "was ended by" if code != 131 else "was killed by"
    assert f"{said} {number.name}" in err
    assert end(tmp_path) == {"code": code, "cause": err.strip(), "rank": int(err.split()[1])}


def test_who_ends_the_ranks_has_said_why(start: Start, tmp_path: Path) -> None:
    """As the watchdog does: that they were killed is no news."""
    body = f"""
    sys.path[:0] = [{str(ROOT)!r}]
    from pathlib import Path
    from llm.exit import record
    if rank == 1:
        record(Path({str(tmp_path)!r}), 76, "hang", 1, final=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = start(body + WAIT.replace("\n", "\n    "), grace_s=GRACE_S)
    assert left(process) == ([], "")
    assert process.returncode == 76
    assert end(tmp_path) == {"code": 76, "cause": "hang", "rank": 1, "final": True}


@pytest.mark.parametrize("number", TOLD)
def test_a_signal_waits_until_a_rank_listens(start: Start, number: signal.Signals) -> None:
    """Before that it would end the rank, as it would have ended a rank that had not loaded Python yet."""
    body = f"""
    sys.path[:0] = [{str(ROOT)!r}]
    assert signal.{number.name} in held_back
    signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    from llm import signals
    tell("ready")
    while signal.{number.name} not in signal.sigpending(): pass
    signals.listen()
    signals.raise_at_once()
    """
    process = start(body)
    say(process, 2)
    process.send_signal(number)
    assert left(process) == ([], "")
    assert process.returncode == 75


def test_a_signal_that_is_ignored_stays_so(start: Start) -> None:
    """nohup."""
    body = f"""
    signal.signal(signal.SIGHUP, lambda *_: tell("HUP"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    tell("ready")
    {WAIT}
    """
    process = start(body, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    say(process, 2)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert left(process) == ([], "")
    assert process.returncode == 75


def test_ranks_die_with_a_launcher_that_is_killed(start: Start) -> None:
    body = f"""
    sys.path[:0] = [{str(ROOT)!r}, *{sys.path!r}]
    from llm.launch import die_with_launcher
    die_with_launcher()
    tell("ready")
    {WAIT}
    """
    process = start(body)
    say(process, 2)
    process.kill()
    assert left(process) == ([], "")


def test_only_a_rank_of_ours_dies_with_its_parent() -> None:
    """A program that a rank has started inherits the variable, not the parent."""
    program = """
import ctypes, os
from llm.launch import die_with_launcher
number = ctypes.c_int()
for launcher in ("1234567", str(os.getppid())):
    os.environ["LLM_LAUNCHER"] = launcher
    die_with_launcher()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    print(number.value)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n9\n"


def test_a_rank_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="rank 0 could not be started: No such file or directory: /nowhere/python"):
        launch(["/nowhere/python"], 2, run_dir=tmp_path)
    started = []

    def popen(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(Popen(*arguments, **options))  # type: ignore[call-overload]
        return started[0]

    Popen = subprocess.Popen  # noqa: N806
    monkeypatch.setattr(subprocess, "Popen", popen)
    before = [signal.getsignal(number) for number in FORWARDED]
    with pytest.raises(OSError, match="rank 1 could not be started: Resource temporarily unavailable"):
        launch(command(WAIT), 2, run_dir=tmp_path)
    assert started[0].returncode == -signal.SIGKILL
    assert [signal.getsignal(number) for number in FORWARDED] == before


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    launch(command(""), 2, run_dir=tmp_path)
    assert os.listdir("/proc/self/fd") == before
