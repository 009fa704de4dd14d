"""The test cluster. Its tests are a command of their own: python -m pytest -m slurm -n 0 tests/cluster"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.box import Box, why_not


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """Three nodes, up as long as the tests of this session run."""
    if reason := why_not():
        pytest.skip(reason)
    cluster = Box(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.up(3)
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of some lengths, so that rows hold several."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = (" ".join(f"w{i * n}" for n in range(5 + i % 7)) for i in range(900))
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
    return path
