"""Programs are run with limits, and judged."""

from __future__ import annotations

import os
import time

import pytest

from llm.metric.code import Limits, verdict, verdicts

QUICK = Limits(wall_s=2.0, memory=1 << 29)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("assert 1 + 1 == 3", "failed: AssertionError"),
        ("this is no program", "failed: SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "passed"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("x = 'a' * (1 << 31)", "failed: MemoryError"),
        ("open('big', 'w').write('a' * (1 << 22))", "failed: OSError: [Errno 27] File too large"),
        ("input()", "failed: EOFError: EOF when reading a line"),
        ("import os; assert 'SECRET' not in os.environ", "passed"),
        ("import os; assert not os.listdir('..') or os.getcwd() != '/'", "passed"),
    ],
)
def test_verdicts(program: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert verdict(program, QUICK) == said


def test_what_a_program_starts_goes_with_it() -> None:
    program = "import os, sys\nif os.fork() == 0:\n    import time; time.sleep(30)\nopen('/proc/self/comm')\nprint('x')"
    start = time.monotonic()
    assert verdict(program, QUICK) in ("passed", "timed out")  # the child holds on to what errors are read from
    assert time.monotonic() - start < 10


def test_many_keep_their_order() -> None:
    programs = [f"assert {n} % 3" for n in range(12)]
    assert [found == "passed" for found in verdicts(programs, QUICK)] == [bool(n % 3) for n in range(12)]
    assert os.getcwd()
