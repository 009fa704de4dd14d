"""`python -m llm report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llm.command import Parser
from llm.config.mistake import ConfigError, did_you_mean, line, nearest


def report(arguments: Sequence[str]) -> None:
    """Show what a sweep has found so far: a table here, all numbers as CSV, a page with pictures (docs/sweeps.md)."""
    from llm.sweep.outcome import outcomes
    from llm.sweep.page import page
    from llm.sweep.table import as_csv, table

    parser = Parser("python -m llm report", description=report.__doc__)
    parser.add_argument("sweep", help="name or directory: of python train.py -m run_name=NAME …")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page (default SWEEP/report.html)")
    parser.add_argument("--maximize", action="store_true", help="the larger the metric, the better")
    options = parser.parse_args(list(arguments))
    if options.out is not None and options.out.suffix == ".csv":
        parser.error(f"--out {options.out}: names the page, whose numbers go beside it as .csv; give FILE.html")
    folder = _found(options.sweep)
    out = options.out or folder / "report.html"
    contents, found = outcomes(folder)
    if options.maximize:
        contents = replace(contents, direction="maximize")
    print(table(contents, found))
    texts = {out: page(folder.name, contents, found), out.with_suffix(".csv"): as_csv(contents, found)}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)


def _found(name: str, root: Path = Path("runs")) -> Path:
    """The folder of a sweep.

    Raises:
        ConfigError: if it is none.
    """
    from llm.submit.record import FILE

    for folder in (root / name, Path(name)):
        if (folder / FILE).exists():
            return folder
    known = [str(path.parent.relative_to(root)) for path in root.glob(f"**/{FILE}")]
    remedy = did_you_mean(nearest(name, known)) or "python train.py -m run_name=NAME … makes one"
    raise ConfigError([line("sweep", name, f"no {FILE} here", remedy)])
