"""A plan's figures against counted ones, and what it says of runs that cannot be."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm.hardware import GPUS, gpu_named
from llm.model import Transformer
from llm.objective.scale import start
from llm.plan.plan import matmul_flops, plan, recorded_mfu, wire
from llm.plan.remedy import examine, remedies
from llm.plan.rows import batch
from llm.plan.show import advice, table
from llm.plan.subject import Stated, Subject
from llm.strategy import FSDP
from llm.strategy.materialise import materialise
from llm.strategy.process_group import fake_ranks
from tests.cluster.test_scaling import KINDS
from tests.cluster.test_trace import planned
from tests.runs import FAMILIES, run_composed
from tests.strategy.test_wire import Wire

RUN = ["data.path=x", "model.dropout=0.0", "data.batch_size=64", "data.micro_batch_size=2"]
CLASSIFY = [
    "model=tiny_encoder",
    "objective=classification",
    "data/tasks=classification",
    "data.tasks.classification.labels=[a,b,c]",
]
KIND_OF_RUN = {"decoder": [], **FAMILIES}


def step(found: Subject, network: Transformer) -> None:
    """Forward and backward of a step, and the update, on real zeros."""
    objective, strategy = found.objective, found.strategy
    objective.model = network
    recipe = objective.optimizer_recipe.build(network)
    for number in range(1, found.n_micro_batches + 1):
        last = number == found.n_micro_batches or not isinstance(strategy, FSDP)
        with torch.autocast("cpu", torch.bfloat16, enabled=found.precision.endswith("mixed")):
            parts = objective.losses(batch(found.data, found.rows, documents=found.data.tells_documents))
        with nullcontext() if last else strategy.block_backward_sync():
            loss, gradient = start(parts, dict.fromkeys(parts, 1.0))  # type: ignore[arg-type]
            loss.backward(gradient)
    recipe.step()


def counted(found: Subject) -> Counter[str]:
    """What really travels in a step."""
    with fake_ranks(found.world_size), Wire() as wired:
        with torch.device("meta"):
            network = Transformer(found.model)
        found.strategy.connect(found.objective)
        if isinstance(found.strategy, FSDP):
            found.strategy.lay_out("cpu", found.world_size, found.precision)
        found.strategy.place(network, "none", 1)
        materialise(network, torch.device("cpu"))
        step(found, network)
    sums: Counter[str] = Counter()
    for name, n_bytes in wired.n_bytes.items():
        sums[KINDS.get(name, "all_to_all")] += n_bytes
    return sums


LAYOUTS = {
    "fsdp": ["strategy=fsdp", "trainer.devices=8"],
    "bf16, not resharded": [
        "strategy=fsdp",
        "trainer.devices=8",
        "trainer.precision=bf16-true",
        "strategy.reshard_after_forward=false",
    ],
    "hsdp": ["strategy=fsdp", "trainer.devices=8", "strategy.replicate_size=2", "data.micro_batch_size=4"],
    "tensor": ["strategy=fsdp", "trainer.devices=4", "strategy.tensor_parallel_size=2"],
    "tensor, mixed": [
        "strategy=fsdp",
        "trainer.devices=4",
        "strategy.tensor_parallel_size=2",
        "trainer.precision=bf16-mixed",
        "model.norm=rms",  # which gives float32 on a CPU, too, as under autocast any norm does on a GPU
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", KIND_OF_RUN)
def test_bytes_on_the_wire_are_those_that_are_counted(family: str, layout: str) -> None:
    """Of Muon; AdamW exchanges nothing."""
    run = [*RUN, *KIND_OF_RUN[family], *LAYOUTS[layout]]
    found = planned([*run, "optimizer=muon"])
    both = counted(found)
    assert wire(found) == both
    alone = wire(planned(run))
    assert alone == {kind: n for kind, n in both.items() if kind != "all_to_all"}


@pytest.mark.parametrize("family", KIND_OF_RUN)
def test_under_ddp_every_gradient_travels_once(family: str) -> None:
    """What tests/strategy/test_wire.py counts of a real run."""
    found = planned([*RUN, *KIND_OF_RUN[family], "strategy=ddp", "trainer.devices=4"])
    assert wire(found) == {"all_reduce": 4 * Transformer(found.model).n_parameters()}
    muon = planned([*RUN, *KIND_OF_RUN[family], "strategy=ddp", "trainer.devices=4", "optimizer=muon"])
    exchanged = counted(muon)  # DDP's own sums are not among them: its wrapper is not there
    assert wire(muon) == exchanged + wire(found)


@pytest.mark.parametrize("family", [*KIND_OF_RUN, "classification"])
def test_flops_are_those_that_are_counted(family: str) -> None:
    run = {**KIND_OF_RUN, "classification": CLASSIFY}[family]
    found = planned([*RUN, *run])
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = stack.enter_context(FlopCounterMode(display=False))
        step(found, Transformer(found.model))
    assert matmul_flops(found) == counter.get_total_flops()


def test_parameters_memory_and_table() -> None:
    run = [*RUN, "strategy=fsdp", "trainer.devices=8", "trainer.accelerator=auto"]
    found = planned(run, gpu="H100")
    made = plan(found, Stated(gpu="H100"))
    assert made.model["parameters"] == Transformer(found.model).n_parameters()
    assert made.memory["peak"] == sum(made.memory[kind] for kind in made.memory if kind in KIND_NAMES)
    assert json.loads(json.dumps(made.as_json)) == made.as_json
    text = table(made)
    assert f"{made.model['parameters']:,} parameters, decoder" in text
    assert "8 processes x 4 micro-batches of 2 rows" in text
    assert "assumed: none is recorded of H100" in text
    assert "data        cannot be prepared on this machine (x: no such file" in text


KIND_NAMES = ("parameters", "gradients", "optimizer", "gathered", "activations", "logits", "buffers")


@pytest.mark.parametrize("memory", ["64G", "64g", "65536", "67108864K"])
def test_memory_is_read_as_sbatch_reads_it(memory: str) -> None:
    assert planned([*RUN, "cluster=cpu", "cluster.tasks_per_node=1", f"cluster.memory={memory}"]).memory_bytes == 2**36


def test_time_is_that_of_the_model_of_scaling() -> None:
    """One device: compute and update, nothing else."""
    found = planned([*RUN, "trainer.max_steps=1000"])
    made = plan(found, Stated(tokens_per_s=1e5))
    n_tokens = 64 * 32
    assert made.time["step_s"] == pytest.approx(n_tokens / 1e5, rel=1e-2)
    assert made.time["hours"] == pytest.approx(1000 * made.time["step_s"] / 3600)
    assert made.time["device_hours"] == made.time["hours"]


def test_the_utilisation_is_that_of_the_nearest_recorded_size() -> None:
    h200 = gpu_named("H200")
    assert h200 is not None
    mfu, source = recorded_mfu(h200, 124_000_000)
    assert (round(mfu, 3), source) == (0.464, "as recorded of 124M on one H200")
    assert recorded_mfu(h200, 8_000_000_000)[1] == "as recorded of 1.56B on one H200"
    assert recorded_mfu(GPUS[0], 124_000_000) == (0.4, f"assumed: none is recorded of {GPUS[0].name}")


def test_a_checkpoint_is_as_large_as_one(tmp_path: Any, texts: Any) -> None:
    run = [f"data.path={texts}", "model.dropout=0.0", "trainer.max_steps=2", "schedule.warmup_steps=0"]
    run_composed([*run, f"run_dir={tmp_path}", "~callback.sample", "~callback.summary", "~callback.progress"])
    (step,) = (tmp_path / "checkpoints").iterdir()
    found = planned(run)
    n_bytes = sum(file.stat().st_size for file in step.rglob("*.safetensors"))
    assert plan(found, Stated()).checkpoint["bytes"] == pytest.approx(n_bytes, rel=0.05)
    onwards = plan(planned([*run, f"init_from={tmp_path}"]), Stated()).data["weights"]
    assert onwards == hashlib.sha256((step / "MANIFEST.json").read_bytes()).hexdigest()[:16]


H100S = ["cluster=gpu", "cluster.gpu_type=h100", "data=text", "data.sources.text.path=x", "logger=none"]

TOO_LARGE = ["cluster.gpus_per_node=1", "tokenizer=bytes", "model=gpt2_124m", "data.max_length=1024"]
TOO_LARGE += ["data.batch_size=256", "data.micro_batch_size=256"]


@pytest.mark.parametrize(
    ("run", "problem", "remedy"),
    [
        (["optimizer.lrr=1e-3"], "no such key", ("without optimizer.lrr",)),
        (["schedule.warmup_steps=500"], "must be below trainer.max_steps=150", ("schedule.warmup_steps=15",)),
        (["trainer.devices=2"], "drives one device", ("strategy=ddp",)),
        (
            [*H100S, "cluster.gpus_per_node=4", "strategy=ddp", "data.batch_size=12"],
            "multiple",
            ("data.batch_size=32",),
        ),
        (
            [*H100S, *TOO_LARGE],
            "a process needs",
            None,
        ),
    ],
)
def test_what_is_wrong_has_a_reason_and_a_remedy_that_passes(
    run: list[str], problem: str, remedy: tuple[str, ...] | None
) -> None:
    found = examine(tuple(run), Stated())
    assert problem in found.problems[0]
    changes = remedies(found, Stated())
    assert changes
    assert remedy is None or remedy in changes
    assert "passes with " in advice(found.problems, changes)
