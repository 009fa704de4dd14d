"""The run's own account: `metrics.jsonl`, and the same as CSV."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import lightning as L

Row = dict[str, float | None]


class Record:
    """Rows of numbers in `RUN/metrics.jsonl`, appended as they come; readable while the run goes on."""

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"

    @classmethod
    def of(cls, trainer: L.Trainer) -> Record:
        """The record of the run that `trainer` trains."""
        return cls(trainer.default_root_dir)

    def append(self, row: Row) -> None:
        """Add one row; a reader sees it whole."""
        with open(self.path, "a") as file:
            file.write(_line(row))

    def rows(self) -> list[Row]:
        """All rows so far; a last line that a crash cut short is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`: a resumed run writes them again."""
        self._keep([row for row in self.rows() if (row["step"] or 0) <= step])

    def forget_validation(self, step: int) -> None:
        """Forget what was measured at `step`: it is about to be measured again."""
        self._keep([row for row in self.rows() if row["step"] != step or "val/loss" not in row])

    def _keep(self, rows: list[Row]) -> None:
        if self.path.exists():
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(map(_line, rows)))
            os.replace(temporary, self.path)

    def export_csv(self) -> None:
        """`metrics.csv`: one column for every name that occurs, empty where a row has no such value."""
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        with open(self.path.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


def _line(row: Row) -> str:
    """A row as JSON, which has no NaN and no infinity: those are null."""
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite) + "\n"
