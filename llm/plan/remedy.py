"""What is wrong with a plan, and the smallest changes that help: found by planning again with them."""

from __future__ import annotations

import heapq
import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from omegaconf import DictConfig

from llm.cluster import partition
from llm.cluster.slurm import Slurm, cluster_of
from llm.command import compose
from llm.config import ConfigError
from llm.config.mistake import line
from llm.plan.plan import Plan, attempt_s, plan
from llm.plan.subject import Stated, Subject, subject
from llm.strategy import DDP, FSDP

_ALTERNATIVES = 3  # remedies that are shown
_TRIES = 40  # plans made to find them
_LONGEST = 5  # changes of a remedy
_PARTS = 4096  # positions whose scores are in memory at once
_ASSIGNED = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)=([\w.:+-]*\w)((?:, \w+)*)")  # key=a, b, c
_WITHOUT = "without "
Changes = tuple[str, ...]  # overrides; "without KEY": one that is left out


@dataclass(frozen=True)
class Judged:
    """The run of some overrides, as far as it came: without a plan if its configuration has mistakes."""

    subject: Subject | None
    plan: Plan | None
    problems: list[str]
    arguments: Changes = ()


@cache
def examine(arguments: Changes, stated: Stated) -> Judged:
    """Compose, build and plan what these overrides describe, and say all that is wrong with it."""
    try:
        cfg = compose(arguments)
    except ConfigError as error:
        return Judged(None, None, error.mistakes, arguments)
    return replace(judge(cfg, stated), arguments=arguments)


def judge(cfg: DictConfig, stated: Stated, *, costs: bool = True) -> Judged:
    """Build and plan a run, and say what cannot be true of it or, if it is to be known what it `costs`, will not work,
    though the configuration has no mistake."""
    try:
        found = subject(cfg, stated)
    except ConfigError as error:
        cluster = None if cfg.cluster is None else cluster_of(cfg)
        return Judged(None, None, [*_of_partition(cluster), *error.mistakes])
    if not costs:
        return Judged(found, None, [])
    made = plan(found, stated)
    return Judged(found, made, [*_of_partition(found.cluster), *_of_memory(made), *_of_time(found, made)])


def _of_partition(cluster: Slurm | None) -> list[str]:
    return [] if cluster is None else partition.refusals(cluster)


def _of_memory(made: Plan) -> Iterator[str]:
    there, needed = made.memory["usable"], made.memory["peak"]
    if there is not None and needed > there:
        rule = f"a process needs {needed / 2**30:.1f} GiB in the {made.memory['at']}, and may have {there / 2**30:.1f}"
        yield line("data.micro_batch_size", str(made.step["micro_batch_rows"]), rule)


def _of_time(found: Subject, made: Plan) -> Iterator[str]:
    """Whether the job's time limit lets the run get on, and a save come to its end."""
    cluster, step_s = found.cluster, made.time.get("step_s", 0.0)
    if cluster is None:
        return
    save_s = made.checkpoint["save_s"]
    if cluster.warning_s and save_s + step_s > cluster.warning_s:
        rule = f"a step and a save take {save_s + step_s:.0f} s, and the job ends after the warning"
        least = math.ceil((save_s + step_s) * 1.5 / 60) * 60
        yield line("cluster.warning_s", str(cluster.warning_s), rule, f"cluster.warning_s={least}")
    attempts = made.time.get("attempts", 1)
    most = cluster.max_requeues + 1
    if attempts > most:
        limit = math.ceil(made.time["hours"] * 3600 / most + cluster.warning_s)
        rule = (
            f"the run takes {made.time['hours']:.0f} h, and {most} attempts have {most * attempt_s(found) / 3600:.0f}"
        )
        text = f"cluster.time={_clock(limit)} or cluster.max_requeues={attempts - 1}"
        yield line("cluster.time", str(cluster.time), rule, text)


def _clock(seconds: int) -> str:
    """As sbatch reads a time limit, in whole hours."""
    days, hours = divmod(math.ceil(seconds / 3600), 24)
    return f"{days}-{hours:02d}:00:00"


def shortage(found: Subject, made: Plan) -> list[str]:
    """One line if the disk of this machine's run directory does not hold the checkpoints."""
    needed = made.checkpoint.get("disk_bytes", 0)
    folder = Path(found.cfg.run_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed <= free:
        return []
    rule = f"checkpoints take {needed / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB left"
    return [line("run_dir", str(found.cfg.run_dir), rule, "another run_dir, or keep fewer (callback.checkpoint)")]


# ---- remedies --------------------------------------------------------------------------------------------------------
def remedies(judged: Judged, stated: Stated) -> list[Changes]:
    """The fewest changes with which nothing is wrong any more, and others as few: each has been planned again."""
    found: list[Changes] = []
    queue: list[tuple[int, int, Changes, Judged]] = [(0, 0, (), judged)]
    n_tries = 0
    while queue and n_tries < _TRIES and len(found) < _ALTERNATIVES:
        _, _, so_far, here = heapq.heappop(queue)
        for more in _candidates(here, stated):
            changes = (*_without_same(so_far, more), *more)
            longest = len(found[0]) if found else _LONGEST
            if n_tries == _TRIES or len(found) == _ALTERNATIVES or len(changes) > longest or changes in found:
                continue
            n_tries += 1
            tried = examine(after(judged.arguments, changes), stated)
            if not tried.problems:
                found.append(changes)
            elif here.problems[0] not in tried.problems:
                heapq.heappush(queue, (len(changes), n_tries, changes, tried))
    return [changes for changes in found if len(changes) == min(map(len, found))]


def _without_same(changes: Changes, others: Changes) -> Changes:
    """Those of which `others` change something else."""
    keys = set(map(_key, others))
    return tuple(change for change in changes if _key(change) not in keys)


def _key(change: str) -> str:
    return change.removeprefix(_WITHOUT).lstrip("+~").partition("=")[0]


def after(arguments: Changes, changes: Changes) -> Changes:
    """Overrides, of which `changes` take the place of those of the same key, or of keys in the group they choose."""
    keys = set(map(_key, changes))
    groups = {key for key in keys if "." not in key}
    kept = [text for text in arguments if _key(text) not in keys and _key(text).partition(".")[0] not in groups]
    return (*kept, *(change for change in changes if not change.startswith(_WITHOUT)))


def _candidates(judged: Judged, stated: Stated) -> Iterator[Changes]:
    """Changes that may mend the first problem, the smallest first."""
    if judged.plan is not None and not _fits(judged.plan):
        yield from _fitting(judged, stated)
    else:
        yield from _named(judged.problems[0], judged.arguments)


def _named(text: str, arguments: Sequence[str]) -> Iterator[Changes]:
    """What the line itself names: the word that was meant; key=value; values that its key may have, or another key's;
    at last, to leave out what was given. A rule may be one of two keys, as `a x b`."""
    head = re.split(r":| = |=", text, maxsplit=1)[0].strip()
    rest, keys = text[len(head) :], head.split(" x ")
    given = {_key(argument): argument.partition("=")[2] for argument in arguments}
    for key in keys:
        for meant in re.findall(r"[\w./-]+", rest.partition("did you mean")[2].replace(" or ", " ")):
            if "no such" not in rest:
                yield (f"{key}={meant}",)
            elif key in given:
                yield (f"{_WITHOUT}{key}", f"{meant}={given[key]}")
        for name, value, others in _ASSIGNED.findall(rest):
            yield from ((f"{name}={word}",) for word in (value, *re.findall(r"[\w-]+", others)) if name != key)
            yield (f"{key}={value}",)
            if key in given:
                yield (f"{name}={given[key]}",)
    numbers = list(_numbers(rest))
    yield from ((f"{key}={number}",) for key in keys if len(keys) == 1 or key in given for number in numbers)
    yield from ((f"{key}=null",) for key in keys if "null" in rest)
    yield from ((f"{_WITHOUT}{key}",) for key in keys if key in given)


def _numbers(rule: str) -> Iterator[int]:
    """Values that a rule allows, the likeliest first."""
    listed = re.search(r"(?:one of|nearest that are:|at most) \[?(\d[\d, or]*)", rule)
    yield from map(int, re.findall(r"\d+", listed[1]) if listed else ())
    divided = re.search(r"must divide .*?(\d+)", rule)
    if divided:
        yield from (n for n in range(int(divided[1]), 0, -1) if int(divided[1]) % n == 0)


# ---- memory ----------------------------------------------------------------------------------------------------------
def _fits(made: Plan) -> bool:
    return made.memory["usable"] is None or made.memory["peak"] <= made.memory["usable"]


def _fitting(judged: Judged, stated: Stated) -> Iterator[Changes]:
    """What makes it fit: of as few kinds of changes as possible, and of each the least. More machines come last."""
    assert judged.subject is not None
    kinds = _levers(judged.subject)

    def fits(changes: Changes) -> bool:
        tried = examine(after(judged.arguments, changes), stated)
        return tried.plan is not None and _fits(tried.plan)

    for n in range(1, len(kinds) + 1):
        some = False
        for chosen in itertools.combinations(kinds, n):
            strongest = tuple(values[-1] for values in chosen)
            if not fits(strongest):
                continue
            some = True
            # The first lever is the cheapest: as little as possible of the others, then of it.
            yield tuple(_least(chosen, strongest, fits))
        if some:
            return
    yield from _more_machines(judged.subject)


def _least(chosen: Sequence[Sequence[str]], strongest: Changes, fits: Callable[[Changes], bool]) -> list[str]:
    """Weaken one change after the other, from the last on, as far as it still fits."""
    found = list(strongest)
    for place in reversed(range(len(chosen))):
        for value in chosen[place][:-1]:
            weaker = [*found[:place], value, *found[place + 1 :]]
            if fits(tuple(weaker)):
                found = weaker
                break
    return found


def _levers(found: Subject) -> list[list[str]]:
    """Kinds of changes that need less memory, from what costs nothing to what costs time; of each the weakest first."""
    share = found.data.batch_size // found.n_data
    smaller = [f"data.micro_batch_size={n}" for n in range(found.rows.n - 1, 0, -1) if share % n == 0]
    order = ("none", "selective", "full")
    recomputed = [f"strategy.checkpointing={name}" for name in order[order.index(found.strategy.checkpointing) + 1 :]]
    kinds = [smaller, _spread(found), recomputed]
    if found.rows.scored > _PARTS and found.objective.logits_at_once is None and found.model.n_labels is None:
        kinds.append([f"objective.logits_at_once={_PARTS}"])
    return [kind for kind in kinds if kind]


def _spread(found: Subject) -> list[str]:
    """What lays the state over more processes."""
    if isinstance(found.strategy, DDP):
        return ["strategy=fsdp"]
    if not isinstance(found.strategy, FSDP):
        return []
    if found.strategy.replicate_size > 1:
        return ["strategy.replicate_size=1"]
    return [] if found.strategy.reshard_after_forward else ["strategy.reshard_after_forward=true"]


def _more_machines(found: Subject) -> Iterator[Changes]:
    key = "trainer.num_nodes" if found.cluster is None else "cluster.nodes"
    rest: Changes = ("data.micro_batch_size=1", "strategy.checkpointing=full")
    if not isinstance(found.strategy, FSDP):
        rest = ("strategy=fsdp", *rest)
    for factor in (2, 4, 8, 16, 32, 64):
        yield (f"{key}={int(found.cfg.trainer.num_nodes) * factor}", *rest)
