"""The command lines of contestants that are modules here and read their settings from a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contest import Contestant
from benchmarks.material import ADAMW, CLIP_NORM
from benchmarks.measure import Session
from llm.model import TransformerConfig


def contestant(
    session: Session, name: str, module: str, python: str, settings: dict[str, Any], **options: Any
) -> Contestant:
    """`python -m benchmarks.contestants.MODULE` with `settings` and the optimizer that all share."""
    path = session.folder / "settings" / f"{len(list((session.folder / 'settings').glob('*')))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"adamw": ADAMW, "clip_norm": CLIP_NORM, **settings}))
    return Contestant(name, [python, "-m", f"benchmarks.contestants.{module}", str(path)], **options)


def plain(
    session: Session,
    name: str,
    config: TransformerConfig,
    weights: Path,
    steps: Path,
    precision: str,
    *,
    fields: Sequence[str] = (),
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Contestant:
    """A plain loop over our model class; `fields` of a batch are passed to the model beside its tokens."""
    settings = {
        "kind": "ours",
        "model": asdict(config),
        "weights": str(weights / "state.pt" if (weights / "state.pt").exists() else weights / "step-0"),
        "steps": str(steps),
        "precision": precision,
        "fields": list(fields),
        **(more or {}),
    }
    return contestant(session, name, "plain", sys.executable, settings, **options)


def theirs(
    session: Session, name: str, module: str, kind: str, weights: Path, steps: Path, precision: str, **options: Any
) -> Contestant:
    """A model of transformers, in a plain loop or under its Trainer."""
    settings = {"kind": kind, "weights": str(weights / "theirs"), "steps": str(steps), "precision": precision}
    return contestant(session, name, module, session.peers.python, settings, **options)
