"""The test cluster. Its tests are a command of their own: python -m pytest -m slurm -n 0 tests/cluster"""

from __future__ import annotations

from collections.abc import Iterator

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
