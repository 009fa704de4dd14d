"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llm.plan.plan import Plan
from llm.plan.search import Setting
from llm.plan.trace import KINDS

_GIB = 2.0**30
_NAMES = {"gathered": "gathered and cast weights"}


def table(plan: Plan) -> str:
    """Some ten lines, a title before each."""
    rows = list(_rows(plan))
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"{title:<{width}}  {text}" for title, text in rows)


def summary(plan: Plan) -> Iterator[tuple[str, str]]:
    """Its two most asked for lines, for those who submit."""
    for title, (_, text) in (("needs", next(_memory(plan))), ("takes", next(_time(plan)))):
        yield title, text


def advice(problems: Sequence[str], remedies: Sequence[Sequence[str]]) -> str:
    """What is wrong, and what helps."""
    lines = [*problems, *(f"  passes with {' '.join(changes)}" for changes in remedies)]
    return "".join(f"{text}\n" for text in lines)


def ranking(settings: Sequence[Setting]) -> Iterator[str]:
    """The settings that were found, the fastest first."""
    for place, setting in enumerate(settings, 1):
        speed = f"{setting.tokens_per_s:>12,.0f} tokens/s, {setting.efficiency:.1%} efficient"
        yield f"{place:>2}. {speed}, {setting.memory_bytes / _GIB:6.1f} GiB  {' '.join(setting.changes)}"


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    step, made = plan.step, plan.checkpoint
    trained = f", {plan.model['trained']:,} of them trained" if "trained" in plan.model else ""
    yield "model", f"{plan.model['parameters']:,} parameters{trained}, {plan.model['family']}"
    shared = "" if step["processes"] == step["with_data_of_their_own"] else f" ({step['with_data_of_their_own']} data)"
    processes = _counted(step["processes"], "process", "es")
    yield (
        "step",
        f"{step['positions']:,} positions in {step['rows']:,} rows: {processes}{shared} x "
        f"{_counted(step['micro_batches'], 'micro-batch', 'es')} of {_counted(step['micro_batch_rows'], 'row')}",
    )
    yield "FLOPs", f"{step['matmul_flops']:.4g} a step in matrix products, {step['model_flops']:.4g} as MFU counts"
    yield "", f"({step['convention']})"
    yield from _memory(plan)
    yield "wire", _wire(plan)
    yield from _time(plan)
    size = f"{made['bytes'] / 1e9:.3g} GB, {made['save_s']:.2g} s to save"
    kept = f"; {made['saves']} saves, {made['kept']} kept: {made['disk_bytes'] / 1e9:.3g} GB" if "saves" in made else ""
    yield "checkpoint", size + kept
    yield "data", _data(plan)


def _counted(n: int, what: str, plural: str = "s") -> str:
    return f"{n:,} {what}{'' if n == 1 else plural}"


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    memory = plan.memory
    unit, name = (_GIB, "GiB") if memory["peak"] >= _GIB else (2.0**20, "MiB")
    of = f" of {memory['usable'] / unit:.1f} {name} that it may have" if memory["usable"] is not None else ""
    yield "memory", f"{memory['peak'] / unit:.3g} {name} a process at the worst ({memory['at']}){of}"
    parts = (f"{_NAMES.get(kind, kind)} {memory[kind] / unit:.3g}" for kind in KINDS if memory[kind])
    yield "", ", ".join(parts)


def _wire(plan: Plan) -> str:
    if not plan.wire:
        return "nothing"
    return ", ".join(f"{kind.replace('_', '-')} {n / 1e6:,.4g} MB" for kind, n in sorted(plan.wire.items())) + " a step"


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    time = plan.time
    steps = "unknown number of" if time["steps"] is None else f"{time['steps']:,}"
    if "step_s" not in time:
        yield (
            "time",
            f"{steps} steps; for how long, say --gpu NAME, or --tokens-per-s N of one device",
        )
        return
    speed = f"{time['step_s']:.3g} s a step, {time['tokens_per_s']:,.0f} tokens/s, {time['efficiency']:.1%} efficient"
    yield "time", f"{steps} steps; {speed} ({time['network']}; {time['source']})"
    if "hours" in time:
        energy = f", {time['kwh']:,.3g} kWh" if "kwh" in time else ""
        attempts = f", {time['attempts']:,} attempts within the time limit" if "attempts" in time else ""
        yield "", f"{time['hours']:,.3g} h, {time['device_hours']:,.4g} device hours{energy}{attempts}"


def _data(plan: Plan) -> str:
    data = plan.data
    weights = f"weights of {data['init_from']} ({data['weights'] or 'not ours'}); " if data["init_from"] else ""
    if not data["prepared"]:
        return f"{weights}{data['unprepared']}: tokens and epochs are not known"
    epochs = ", ".join(f"{name} {n:.3g} times" for name, n in data.get("epochs", {}).items())
    seen = f"; {data['tokens']:,} tokens, {epochs}" if epochs else ""
    return f"{weights}{data['fingerprint']}, tokenizer {data['tokenizer']}{seen}"
