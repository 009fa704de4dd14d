"""What the scores of a run's classifier are of."""

from __future__ import annotations

from pathlib import Path

import yaml


def labels_of(step: Path) -> tuple[list[str], bool]:
    """The names of a classifier's labels, as the run's data had them, none where it had none; and whether what it
    scores are the start and the end of an answer."""
    cfg = yaml.safe_load((step / "config.yaml").read_text())
    tasks = ((cfg.get("data") or {}).get("tasks") or {}).values()
    spans = str((cfg.get("objective") or {}).get("_target_")).endswith("SpanExtraction")
    return max((task["labels"] for task in tasks if "labels" in task), key=len, default=[]), spans
