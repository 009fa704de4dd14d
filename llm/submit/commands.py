"""The commands of `python -m llm` that submit, and those that the templates of slurm/ call."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llm.command import Parser, compose


def submit(arguments: Sequence[str]) -> None:
    """Check a run, freeze it, and hand it to SLURM (docs/slurm.md): submit cluster=gpu cluster.nodes=4 experiment=…"""
    from llm.cluster.jobs import called
    from llm.submit import batch
    from llm.submit import submit as submitting

    parser = Parser("python -m llm submit", description=submit.__doc__)
    parser.add_argument("--dry-run", action="store_true", help="check, show the script, and submit nothing")
    parser.add_argument("--job", choices=batch.KINDS, default="train", help="which template of slurm/")
    parser.add_argument("--shares", type=int, metavar="N", help="with --job prepare: an array of so many")
    parser.add_argument("--after", action="append", default=[], metavar="RUN", help="start when its job has ended well")
    options, rest = parser.parse_known_args(list(arguments))
    if options.shares is not None and (options.job != "prepare" or options.shares < 1):
        parser.error(f"--shares {options.shares}: goes with --job prepare, and is at least 1")
    job = submitting.planned(options.job, rest, n_shares=options.shares, after=options.after)
    if options.dry_run:
        print(batch.written(job))
    id_ = None if options.dry_run else submitting.submit(job).job
    for title, text in batch.said(job, id_).items():
        print(f"{title:<6}{text}")
    if id_ is not None:
        name = called(job.run_dir)
        print(f"next  python -m llm status {name} | logs {name} --follow | cancel {name}")


def where(arguments: Sequence[str]) -> None:
    """Check a command line of train.py, and print the directory of its run: what the templates of slurm/ ask first."""
    print(Path(compose(list(arguments), elsewhere=lambda cfg: True, sweeps=True).run_dir))


def combination(arguments: Sequence[str]) -> None:
    """Print the overrides of one run of a sweep, each followed by a NUL: what slurm/sweep.sbatch asks for its task."""
    from llm.config import ConfigError, split_flags
    from llm.submit.combinations import combinations

    parser = Parser("python -m llm combination", description=combination.__doc__)
    parser.add_argument("number", type=int, help="of the run, counted from 0 as python train.py -m does")
    parser.add_argument("--file", type=Path, help="which says what each is: of a sweep by train.py -m")
    options, rest = parser.parse_known_args(list(arguments))
    if options.file is not None:
        written = json.loads(options.file.read_text())
        if str(options.number) not in written:
            raise ConfigError([f"{options.number}: {options.file} has {', '.join(written)}"])
        sys.stdout.write("".join(f"{word}\0" for word in written[str(options.number)]))
        return
    flags, overrides = split_flags(rest)
    found = combinations(overrides)
    if not 0 <= options.number < len(found):
        raise ConfigError(
            [f"{options.number}: {' '.join(overrides)} are {len(found)} runs - --array=0-{len(found) - 1}"]
        )
    sys.stdout.write("".join(f"{word}\0" for word in [*flags, *found[options.number]]))
