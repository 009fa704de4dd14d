"""What a run will cost, before it is queued: parameters, FLOPs, memory, bytes on the wire, time, disk.

Everything here is counted, of the run's own parts (`llm/plan/subject.py`), but for what `Stated` states.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm.checkpoint import newest
from llm.checkpoint.manifest import MANIFEST
from llm.code import ROOT
from llm.hardware import Gpu, gpu_named
from llm.optimizer import MuonAdamW
from llm.optimizer.groups import hidden_matrices
from llm.optimizer.muon import traffic
from llm.plan.scaling import H100_ETHERNET, H100_INFINIBAND, Cluster, StepTime, step_time, update_s
from llm.plan.subject import Stated, Subject, unprepared
from llm.plan.trace import on_meta, peak
from llm.plan.traffic import Layout, bytes_by_kind, stages
from llm.strategy import FSDP
from llm.strategy.process_group import fake_ranks

# What of a GPU's memory a run cannot have: CUDA's context, NCCL's buffers, holes between what is allocated. Assumed.
RESERVED = 0.08
ASSUMED_MFU = 0.4
_RECORDED = ROOT / "benchmarks" / "results" / "gpu.json"
_RECOMPUTED = {"none": 1.0, "selective": 1.0, "full": 4 / 3}  # of the blocks' FLOPs


@dataclass(frozen=True)
class Plan:
    """Of one run; figures by name, as `--json` prints them."""

    model: dict[str, Any]
    step: dict[str, Any]
    memory: dict[str, Any]
    wire: dict[str, int]
    time: dict[str, Any]
    checkpoint: dict[str, Any]
    data: dict[str, Any]

    @property
    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(subject: Subject, stated: Stated) -> Plan:
    """All of it."""
    return Plan(
        model=_model(subject),
        step=_step(subject),
        memory=_memory(subject),
        wire=dict(wire(subject)),
        time=_time(subject, stated),
        checkpoint=_checkpoint(subject, stated),
        data=_data(subject),
    )


def _model(subject: Subject) -> dict[str, Any]:
    network = subject.network
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    found = {"family": subject.model.family, "parameters": network.n_parameters()}
    return found | ({"trained": trained} if trained != found["parameters"] else {})


def _step(subject: Subject) -> dict[str, Any]:
    rows, data = subject.rows, subject.data
    positions = data.batch_size * (rows.length + rows.target)
    return {
        "rows": data.batch_size,
        "positions": positions,
        "processes": subject.world_size,
        "with_data_of_their_own": subject.n_data,
        "micro_batches": subject.n_micro_batches,
        "micro_batch_rows": rows.n,
        "matmul_flops": matmul_flops(subject),
        "model_flops": subject.flops_per_token * positions,
        "convention": "6N + 12·L·H·K·T a token, causal attention not halved, recomputation not counted",
    }


def matmul_flops(subject: Subject) -> int:
    """Of all matrix products of a step, on all processes together, as they would be computed without checkpointing;
    those of an adapter's frozen layers have no gradient of their weights."""
    rows = subject.rows
    pairs = rows.n * rows.texts if subject.data.has_pairs else 0
    scored = rows.scored if subject.model.n_labels is None else rows.labelled
    forward = subject.network.matmul_flops(rows.n, rows.length, rows.target, scored, pairs)
    times = 3 if subject.objective.adapter is None else 2
    return times * forward * subject.n_micro_batches * subject.n_data


def _memory(subject: Subject) -> dict[str, Any]:
    at, kinds = peak(subject.moments)
    found: dict[str, Any] = {kind: round(n_bytes) for kind, n_bytes in kinds.items()}
    found |= {"peak": sum(found.values()), "at": at, "device": subject.memory_bytes, "usable": usable(subject)}
    return found


def usable(subject: Subject) -> float | None:
    """Bytes that a process may hold at its worst; None where nobody says what there is."""
    there = subject.memory_bytes
    return None if there is None else there * (1 - RESERVED)


def wire(subject: Subject) -> Counter[str]:
    """Bytes of a step by kind of collective, as one process sees them: of the whole that is gathered, scattered or
    summed, and of an all-to-all what leaves the process. Counts, norms and flags, some bytes each, are left out."""
    found: Counter[str] = Counter(bytes_by_kind(stages(subject.shapes, subject.layout)))
    if isinstance(subject.objective.optimizer_recipe, MuonAdamW) and subject.world_size > 1:
        found += _of_muon(subject)
    return found


def _of_muon(subject: Subject) -> Counter[str]:
    """Its exchange of matrices, which depends on all of them."""
    with fake_ranks(subject.world_size):
        placed = on_meta(subject.model, subject.objective)
        if isinstance(subject.strategy, FSDP):
            subject.strategy.lay_out("cpu", subject.world_size, subject.precision)
            subject.strategy.place(placed, "none", 1)
        return traffic(hidden_matrices(placed))


# ---- time ------------------------------------------------------------------------------------------------------------
def _time(subject: Subject, stated: Stated) -> dict[str, Any]:
    """Seconds of a step, and what the run comes to; empty where nobody knows how fast a device is."""
    speed = device_speed(subject, stated)
    found: dict[str, Any] = {"steps": subject.n_steps}
    if speed is None:
        return found
    tokens_per_s, source = speed
    time = timed(subject, stated, tokens_per_s)
    found |= {"tokens_per_s_of_one_device": tokens_per_s, "source": source, "network": stated.network}
    found |= {"step_s": time.seconds, "efficiency": time.efficiency}
    found["tokens_per_s"] = subject.layout.tokens / time.seconds
    if subject.n_steps is None:
        return found
    hours = time.seconds * subject.n_steps / 3600
    found |= {"hours": hours, "device_hours": hours * subject.world_size}
    if subject.gpu is not None:
        found["kwh"] = hours * subject.world_size * subject.gpu.watts / 1000
    if subject.cluster is not None:
        found["attempts"] = math.ceil(hours * 3600 / attempt_s(subject))
    return found


def attempt_s(subject: Subject) -> float:
    """Seconds that a job may train between its start and its warning."""
    assert subject.cluster is not None
    return 60 * subject.cluster.minutes - subject.cluster.warning_s


def device_speed(subject: Subject, stated: Stated) -> tuple[float, str] | None:
    """Tokens per second that one device alone trains on, without communication, and who says so."""
    if stated.tokens_per_s is not None:
        return stated.tokens_per_s, "--tokens-per-s"
    if subject.gpu is None:
        return None
    mfu, source = recorded_mfu(subject.gpu, subject.network.n_parameters())
    if stated.mfu is not None:
        mfu, source = stated.mfu, "--mfu"
    return mfu * subject.gpu.peak_flops / subject.flops_per_token, f"MFU {mfu:.1%}, {source}"


def recorded_mfu(gpu: Gpu, n_parameters: int) -> tuple[float, str]:
    """That of the run recorded on such a GPU whose model is nearest in size; else an assumed one."""
    found = [(abs(math.log(n / n_parameters)), mfu, name) for name, n, mfu in _records(gpu)]
    if not found:
        return ASSUMED_MFU, f"assumed: none is recorded of {gpu.name}"
    _, mfu, name = min(found)
    return mfu, f"as recorded of {name} on one {gpu.name}"


def _records(gpu: Gpu) -> Iterator[tuple[str, float, float]]:
    """Name, parameters and MFU of each model that was measured on such a GPU."""
    if not _RECORDED.exists():
        return
    measures = json.loads(_RECORDED.read_text())
    devices = {row["figures"]["device"] for row in measures["ceilings"]["rows"] if "figures" in row}
    if {gpu_named(device) for device in devices} != {gpu}:
        return
    for row in measures["sizes"]["rows"]:
        name, _, contestant = row["case"].partition(": ")
        mfu = re.search(r"MFU ([\d.]+) %", row.get("note", ""))
        size = re.fullmatch(r"([\d.]+)([MB])", name)
        if contestant == "ours" and mfu and size:
            yield name, float(size[1]) * {"M": 1e6, "B": 1e9}[size[2]], float(mfu[1]) / 100


def timed(subject: Subject, stated: Stated, tokens_per_s: float, layout: Layout | None = None) -> StepTime:
    """One step of all processes, by the model of docs/scaling.md; `layout` if it is not the subject's."""
    layout, strategy = layout or subject.layout, subject.strategy
    compute = (layout.micro_batch_tokens + layout.source_tokens) / tokens_per_s / layout.tensor_size
    cluster = cluster_like(subject, stated)
    recompute = strategy.checkpointing == "full"
    update = update_s(subject.shapes, cluster)
    return step_time(subject.shapes, layout, cluster, compute * _RECOMPUTED[strategy.checkpointing], update, recompute)


def cluster_like(subject: Subject, stated: Stated) -> Cluster:
    """Links as docs/scaling.md has them, with the subject's nodes and memory."""
    cluster = H100_ETHERNET if stated.network == "ethernet" else H100_INFINIBAND
    node_size = subject.world_size // int(subject.cfg.trainer.num_nodes)
    found = replace(cluster, node_size=node_size)
    if subject.gpu is None:
        return found
    return replace(found, memory_bytes=subject.gpu.memory_bytes, memory_bytes_per_s=subject.gpu.memory_bytes_per_s)


# ---- disk and data ---------------------------------------------------------------------------------------------------
def _checkpoint(subject: Subject, stated: Stated) -> dict[str, Any]:
    """Size, and what lies on the disk at the worst: those that are kept, and the one that is being written."""
    kinds = subject.moments["update"]
    n_bytes = round((kinds["parameters"] + kinds["optimizer"]) * subject.layout.n_shards * subject.layout.tensor_size)
    found: dict[str, Any] = {"bytes": n_bytes, "save_s": n_bytes / stated.disk_bytes_per_s}
    node = subject.cfg.callback.get("checkpoint")
    if node is None or subject.n_steps is None:
        return found
    every = int(node.every_n_train_steps)
    n_saved = math.ceil(subject.n_steps / every)
    kept = n_saved if node.save_top_k == -1 else min(n_saved, max(1, int(node.save_top_k)))
    if node.save_top_k != -1 and node.keep_every_n_steps:
        kept += subject.n_steps // math.lcm(every, int(node.keep_every_n_steps))
    return found | {"saves": n_saved, "kept": kept, "disk_bytes": (kept + 1) * n_bytes}


def _data(subject: Subject) -> dict[str, Any]:
    """What is prepared, and how often it will be seen."""
    data = subject.data
    why = unprepared(data)
    found: dict[str, Any] = {"prepared": why is None, "unprepared": why, "init_from": subject.cfg.init_from}
    if subject.cfg.init_from is not None:
        found["weights"] = _fingerprint(Path(subject.cfg.init_from))
    if not found["prepared"]:
        return found
    found |= {"fingerprint": data.fingerprint, "tokenizer": data.tokenizer.fingerprint}
    found["tokens_per_step"] = data.tokens_per_step
    n_rows = data.n_rows
    shares = [share / sum(data.order.shares) for share in data.order.shares]
    if subject.n_steps is not None:
        drawn = subject.n_steps * data.batch_size
        found["epochs"] = {name: drawn * s / n for (name, n), s in zip(n_rows.items(), shares, strict=True)}
        found["tokens"] = round(subject.n_steps * data.tokens_per_step)
    return found


def _fingerprint(weights: Path) -> str | None:
    """Of the checkpoint that training starts from, by its manifest, which has a digest of every file; None of weights
    that are not ours."""
    step = weights if (weights / MANIFEST).exists() else newest(weights)
    if step is None or not (step / MANIFEST).exists():
        return None
    return hashlib.sha256((step / MANIFEST).read_bytes()).hexdigest()[:16]
