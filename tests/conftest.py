"""What many tests share: a small corpus, and runs composed as the command line composes them."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from omegaconf import DictConfig

from tests.lean import lean
from tests.runs import Compose, composed

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True, scope="session")
def _signals_are_heard() -> None:
    """What a shell starts in the background ignores Ctrl-C, what nohup does the end of the terminal, and both is
    inherited."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and two test runs on two cores lose much."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _lean() -> Iterator[None]:
    with lean():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of some words each, from a fixed seed."""
    draw = random.Random(0)
    words = "the a cat dog sees likes runs over under big small red house tree and but then never often"
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    documents = (" ".join(draw.choices(words.split(), k=draw.randint(3, 40))) for _ in range(120))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token cache for all runs of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def compose_run(corpus: Path, cache_dir: Path, tmp_path: Path) -> Compose:
    """`compose_run(*overrides)`: the tiny run in a directory of this test, overrides last."""

    def compose_tiny(*overrides: str) -> DictConfig:
        return composed(
            [f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}", *overrides]
        )

    return compose_tiny
