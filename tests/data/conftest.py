"""Small corpora for the tests of the data room."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "näive",
    "cafés",
    "日本",
    "tea",
    "😀",
    "return",
    "x",
    "+",
    "1",
]


def make_texts(n: int, seed: int = 0, longest: int = 60) -> list[str]:
    """`n` different documents of 1 to `longest` words."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for i in range(n)]


def write_jsonl(path: Path, texts: Sequence[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Data sets that lie beside some checkouts; tests that want them are skipped elsewhere."""
    folder = Path(__file__).parents[2] / "../shared/data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data here")
    return folder
