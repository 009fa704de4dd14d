"""The commands of docs/parallel.md, whoever starts them, are command lines without mistakes."""

from __future__ import annotations

import re

import pytest

from llm.config import check_overrides, register
from llm.plan.subject import Stated, subject
from tests.launch.jobs import ROOT

PAGE = (ROOT / "docs" / "parallel.md").read_text()
COMMANDS = re.findall(r"^(?:[A-Z_]+=|python |torchrun |srun )[^\n]*", PAGE, flags=re.MULTILINE)


def test_each_launcher_is_shown() -> None:
    started = {re.sub(r"^([A-Z_]+=\S+ )+", "NODE ", command).split()[0] for command in COMMANDS}
    assert started == {"python", "torchrun", "srun", "NODE"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    """What takes Lightning to judge, tests/test_conf.py asks of each strategy."""
    register()
    overrides = command.partition("train.py ")[2].split()
    cfg = check_overrides(overrides, ROOT / "conf", elsewhere=lambda cfg: True)
    assert cfg is not None
    subject(cfg, Stated())  # which asks whether its processes can share a batch
