"""The house rules of docs/architecture.md, read off the syntax trees: imports point down, libraries stay in their
rooms."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "llm").rglob("*.py"), ROOT / "train.py"])

# Room -> the rooms it may import; docs/architecture.md shows the same as floors.
FLOORS: dict[str, set[str]] = {
    "model": set(),
    "tokenizer": set(),
    "schedule": set(),
    "guard": set(),
    "optimizer": {"machine", "reduce"},
    "machine": set(),
    "code": set(),
    "command": {"config"},
    "console": {"config", "launch"},
    "attempts": {"exit"},
    "cluster": {"attempts", "code", "command", "config", "exit"},
    "submit": {"cluster", "code", "command", "config", "exit", "plan"},
    "plan": {
        "agree",
        "build",
        "checkpoint",
        "cluster",
        "code",
        "command",
        "config",
        "data",
        "hardware",
        "machine",
        "model",
        "objective",
        "optimizer",
        "reduce",
        "run",
        "strategy",
    },
    "hardware": set(),
    "study": set(),
    "sweep": {"cluster", "command", "config", "exit", "launch", "lock", "signals", "study", "submit"},
    "config": set(),
    "reduce": set(),
    "strategy": {"model", "checkpoint", "config", "exit", "launch", "lock", "reduce", "signals"},
    "checkpoint": {"model", "tokenizer"},
    "generate": {"model", "tokenizer"},
    "data": {"tokenizer", "launch", "signals"},
    "metric": {"reduce"},
    "adapter": set(),
    "objective": {"adapter", "model", "checkpoint", "guard", "metric", "reduce"},
    "watch": {"exit", "launch", "signals"},
    "callback": {
        "attempts",
        "guard",
        "code",
        "launch",
        "watch",
        "objective",
        "generate",
        "metric",
        "checkpoint",
        "data",
        "hardware",
        "ledger",
        "reduce",
        "signals",
        "study",
    },
    "launch": {"config", "exit", "signals"},
    "exit": set(),
    "signals": {"exit"},
    "lock": {"exit"},
    "ledger": set(),
    "agree": {"checkpoint", "config", "data", "launch", "model", "tokenizer"},
    "build": {"config", "launch", "loop", "strategy"},
    "loop": set(),
    "run": {
        "attempts",
        "console",
        "agree",
        "build",
        "callback",
        "guard",
        "exit",
        "config",
        "checkpoint",
        "data",
        "launch",
        "lock",
        "machine",
        "model",
        "signals",
        "strategy",
    },
    "talk": {"data", "generate", "model", "tokenizer"},
    "evaluate": {"build", "checkpoint", "config", "data", "generate", "metric", "model", "tokenizer"},
    "audit": {"checkpoint", "config", "data", "ledger"},
    "verify": {"checkpoint", "config", "ledger", "machine"},
    "coordinates": {"agree", "build", "callback", "config", "console", "data", "guard", "machine", "model", "run"},
    "__main__": {
        "audit",
        "checkpoint",
        "cluster",
        "command",
        "config",
        "coordinates",
        "data",
        "evaluate",
        "exit",
        "generate",
        "model",
        "plan",
        "run",
        "submit",
        "sweep",
        "talk",
        "tokenizer",
        "verify",
    },
    "__init__": set(),
    "train": {"run", "config", "exit", "launch", "signals", "strategy", "sweep"},
}
# Library -> the rooms, or files of a room, that may import it.
LIBRARIES: dict[str, set[str]] = {
    "lightning": {"objective", "strategy", "callback", "data/module.py", "build", "loop", "run"},
    "torch.distributed": {"strategy", "checkpoint", "reduce", "plan/meter.py", "plan/trace.py"},
    "hydra": {
        "cluster",
        "submit",
        "evaluate",
        "train",
        "__main__",
        "build",
        "run",
        "audit",
        "config",
        "launch",
        "sweep",
    },
    "omegaconf": {
        "cluster",
        "plan",
        "submit",
        "command",
        "coordinates",
        "evaluate",
        "verify",
        "train",
        "__main__",
        "build",
        "run",
        "agree",
        "audit",
        "config",
        "launch",
        "sweep",
    },
    "pydantic": {"config"},
    "transformers": {"tokenizer", "checkpoint/huggingface/gguf.py"},
    "tokenizers": {"tokenizer"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "wandb": {"build"},
    "matplotlib": {"callback", "coordinates", "sweep/plot.py"},
    "optuna": {"study", "sweep/search.py", "sweep/sampler.py", "sweep/space.py"},
    "jinja2": {"data/chat.py"},
    "sacrebleu": {"metric"},
    "rouge_score": {"metric"},
    "peft": {"adapter"},
}
LIGHT = (
    "llm",
    "llm.config",
    "llm.launch",
    "llm.exit",
    "llm.model",
    "llm.tokenizer",
    "llm.optimizer",
    "llm.schedule",
    "llm.guard",
    "llm.cluster",
    "llm.plan",
    "llm.submit",
    "llm.sweep",
    "llm.study",
    "llm.signals",
    "llm.data.source",
)


def place(path: Path) -> tuple[str, str]:
    """The room of a file, and the file's name within llm/."""
    inside = path.relative_to(ROOT / "llm") if path.is_relative_to(ROOT / "llm") else path.relative_to(ROOT)
    return inside.parts[0].removesuffix(".py"), inside.as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of what is imported"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: place(path)[1])
def test_imports_point_down(path: Path) -> None:
    room, _ = place(path)
    used = {name.split(".")[1] for name in imports(path) if name.startswith("llm.")} - {room}
    exported = {"load", "Tokenizer", "Transformer", "TransformerConfig"}  # names of llm/__init__.py
    assert used - exported <= FLOORS[room]


@pytest.mark.parametrize("path", FILES, ids=lambda path: place(path)[1])
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    room, name = place(path)
    for library, rooms in LIBRARIES.items():
        if any(module == library or module.startswith(library + ".") for module in imports(path)):
            assert room in rooms or name in rooms, f"{name} imports {library}"


@pytest.mark.parametrize("room", ["model", "objective"])
def test_model_and_objective_know_nothing_of_parallelism(room: str) -> None:
    forbidden = {"rank", "world_size", "mesh", "shard", "dtensor", "cuda"}
    for path in (ROOT / "llm" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
            assert not forbidden & {str(name).lower() for name in names if name}, f"{path}:{getattr(node, 'lineno', 0)}"


def test_no_room_without_a_name_of_its_own() -> None:
    assert not [path for path in FILES if path.stem in {"utils", "helpers", "common", "misc"}]


def test_every_group_has_a_room() -> None:
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    rooms = {place(path)[0] for path in FILES}
    assert groups - rooms == {"trainer", "logger", "experiment", "hydra"}
    assert {path.name for path in (ROOT / "conf" / "hydra").iterdir()} == {"launcher", "sweeper"}, "of the room sweep"


@pytest.mark.parametrize("path", FILES, ids=lambda path: place(path)[1])
def test_files_and_functions_are_short_enough_to_be_read(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is a sign that something wants its own name"


def test_light_modules_load_no_torch() -> None:
    """A mistake in the configuration is answered before anything heavy is imported."""
    program = f"import sys, {', '.join(LIGHT)}; sys.exit(str({{'torch', 'lightning', 'datasets'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]], ids=" ".join)
def test_asking_loads_nothing_that_trains(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "train.py", *arguments]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.stderr.splitlines()}
    assert "hydra" in loaded
    heavy = {
        "torch",
        "lightning",
        "numpy",
        "tokenizers",
        "transformers",
        "datasets",
        "wandb",
        "tensorboard",
        "matplotlib",
        "optuna",
    }
    assert not loaded & heavy


def test_every_library_that_is_imported_is_declared() -> None:
    """A dependency of a dependency may go away with the next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[<>=\[ ]", line)[0].lower().replace("-", "_") for group in groups for line in group}
    distribution = {"hydra": "hydra_core", "yaml": "pyyaml"}
    used = {name.partition(".")[0] for path in FILES for name in imports(path)} - {"llm"} - sys.stdlib_module_names
    used -= {"triton"}  # a part of torch where that is built for GPUs, and imported only there
    assert {distribution.get(name, name) for name in used} <= declared


def test_every_dependency_has_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *(x for group in project["optional-dependencies"].values() for x in group)]:
        assert line.startswith(project["name"]) or (">=" in line and "<" in line), line
