"""The command of `python -m llm` that plans."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llm.command import Parser


def plan(arguments: Sequence[str]) -> None:
    """What a run will cost and whether it fits, before it is queued (docs/plan.md): plan cluster=gpu experiment=…"""
    parser = Parser("python -m llm plan", description=plan.__doc__)
    parser.add_argument("--json", action="store_true", help="all figures, for programs")
    parser.add_argument("--search", action="store_true", help="the fastest settings that fit")
    parser.add_argument(
        "--gpu", metavar="NAME", help="as H100; without it cluster.gpu_type, or the GPU of this machine"
    )
    parser.add_argument("--network", choices=("infiniband", "ethernet"), default="infiniband", help="between nodes")
    parser.add_argument("--mfu", type=float, help="share of its peak that one GPU alone reaches; 0.4 for 40 %%")
    parser.add_argument("--tokens-per-s", type=float, metavar="N", help="that one device alone trains on, instead")
    parser.add_argument("--disk", type=float, default=1.0, metavar="GB/S", help="at which checkpoints are written")
    options, overrides = parser.parse_known_args(list(arguments))
    for name, most in (("mfu", 1.0), ("tokens_per_s", None), ("disk", None)):
        value = getattr(options, name)
        if value is not None and not (value > 0 and (most is None or value <= most)):
            parser.error(
                f"--{name.replace('_', '-')} {value}: must be above 0{f' and at most {most:g}' if most else ''}"
            )
    from llm.plan.remedy import examine, remedies, shortage
    from llm.plan.search import Setting, search
    from llm.plan.show import advice, ranking, table
    from llm.plan.subject import Stated

    stated = Stated(options.gpu, options.network, options.mfu, options.tokens_per_s, options.disk * 1e9)
    found = examine(tuple(overrides), stated)
    mended = remedies(found, stated) if found.problems else []
    problems = list(found.problems)
    fastest: list[Setting] = []
    if found.subject is not None and found.plan is not None:
        problems += shortage(found.subject, found.plan)
        fastest = search(found.subject, stated) if options.search else []
    if options.json:
        figures = None if found.plan is None else found.plan.as_json
        told: dict[str, Any] = {"plan": figures, "problems": problems, "remedies": mended}
        told |= {"search": [asdict(setting) for setting in fastest]} if options.search else {}
        print(json.dumps(told, indent=1))
    else:
        print("\n".join([*([table(found.plan)] if found.plan else []), *ranking(fastest)]))
        print(advice(problems, mended), end="", file=sys.stderr)
    if problems:
        sys.exit(64)
