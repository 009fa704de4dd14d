"""What travels in one step, to the byte: counted in the real code, against what the shapes of the weights say.

In a ring each of W processes sends and receives (W-1)/W of what is gathered or scattered, and 2(W-1)/W of what is
all-reduced. With w bytes a weight, g bytes a gradient and k micro-batches that is, for P parameters,
(W-1)/W · (2·w·P·k + g·P) when blocks are gathered again for their backward, and (W-1)/W · (w·P·k + g·P) when not. Two
things refine it: the group around the blocks (embedding, last norm, head) is gathered once a micro-batch in both cases,
and the first axis of each weight is padded to a multiple of the processes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode

from llm.model import Transformer, TransformerConfig
from llm.strategy import FSDP
from llm.strategy.materialise import materialise
from llm.strategy.process_group import fake_ranks
from tests.ranks import run_on_ranks
from tests.runs import run_composed

CONFIG = TransformerConfig(dim=32, n_layers=3, n_heads=2, max_length=16, vocab_size=51, qk_norm=True)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


class Wire(TorchDispatchMode):
    """Bytes by kind of collective: of the whole that is gathered or scattered, of what is all-reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes: Counter[str] = Counter()
        self.n_calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.__name__.partition(".")[0]
        whole = {
            "_allgather_base_": lambda: args[0],
            "_reduce_scatter_base_": lambda: args[1],
            "allreduce_": lambda: args[0][0],
            "all_reduce": lambda: args[0],
            "all_gather_into_tensor": lambda: result,
        }
        if name == "alltoall_base_":
            self.n_bytes[name] += _sent(*args[1:5])
            self.n_calls[name] += 1
        if function.namespace in ("c10d", "_c10d_functional") and name in whole:
            tensor: Tensor = whole[name]()
            self.n_bytes[name] += tensor.numel() * tensor.element_size()
            self.n_calls[name] += 1
        return result


def _sent(tensor: Tensor, group: Any, received: list[int], sent: list[int]) -> int:
    """Bytes that leave this process for others."""
    return (sum(sent) - sent[dist.get_rank()]) * tensor.element_size()


@contextmanager
def network_on_mesh(strategy: FSDP, world_size: int, config: TransformerConfig = CONFIG) -> Iterator[Transformer]:
    """A network as the strategy places it, in the first of so many processes of which there is only this one."""
    with fake_ranks(world_size):
        yield place_network(strategy, world_size, config)


def place_network(strategy: FSDP, world_size: int, config: TransformerConfig) -> Transformer:
    """A network as the strategy places it, among the processes of the default group."""
    strategy.lay_out("cpu", world_size, "bf16-true" if strategy._policy.param_dtype else "32-true")
    with torch.device("meta"):
        network = Transformer(config)
    strategy._lightning_module = SimpleNamespace(network=network)  # type: ignore[assignment]
    strategy.place(network, "none", vocabulary_multiple=1)
    materialise(network, torch.device("cpu"))
    return network


def step(strategy: FSDP, network: Transformer, n_micro_batches: int) -> None:
    tokens = torch.zeros(2, 8, dtype=torch.long)
    for number in range(1, n_micro_batches + 1):
        with nullcontext() if number == n_micro_batches else strategy.block_backward_sync():
            network.logits(network(tokens)).float().logsumexp(-1).sum().backward()


def padded_sizes(n_shards: int) -> tuple[int, int]:
    """Elements of all blocks, and of what is around them, each weight's rows rounded up to a multiple of the shards."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(CONFIG).named_parameters()}
    sizes = {name: math.ceil(shape[0] / n_shards) * n_shards * math.prod(shape[1:]) for name, shape in shapes.items()}
    blocks = sum(size for name, size in sizes.items() if ".blocks." in name)
    return blocks, sum(sizes.values()) - blocks


@pytest.mark.parametrize(
    ("world_size", "n_replicas"), [(2, 1), (2, 2), (8, 1), (8, 2), (64, 1), (64, 8), (1024, 1), (1024, 128)]
)
@pytest.mark.parametrize("n_micro_batches", [1, 3])
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fsdp_and_hsdp(precision: str, reshard: bool, n_micro_batches: int, world_size: int, n_replicas: int) -> None:
    strategy = FSDP(replicate_size=n_replicas, reshard_after_forward=reshard)
    if precision == "bf16":
        strategy._policy = BF16
    with network_on_mesh(strategy, world_size) as network, Wire() as wire:
        step(strategy, network, n_micro_batches)
    n_shards = world_size // n_replicas
    blocks, around = padded_sizes(n_shards)
    weight_bytes = 2 if precision == "bf16" else 4
    gathered = weight_bytes * n_micro_batches * ((2 if reshard else 1) * blocks + around)
    expected = {}
    if n_shards > 1:
        expected |= {"_allgather_base_": gathered, "_reduce_scatter_base_": 4 * (blocks + around)}
    if n_replicas > 1:
        expected["allreduce_"] = 4 * (blocks + around) // n_shards
    assert wire.n_bytes == expected
    synchronised = {wire.n_calls[name] for name in expected if name != "_allgather_base_"}
    assert synchronised == {CONFIG.n_layers + 1}, "each group once a step, whatever the number of micro-batches"


def test_padding_is_what_theory_leaves_out() -> None:
    """Where every size is divisible the formula is that of the parameters alone."""
    n_parameters = sum(parameter.numel() for parameter in Transformer(CONFIG).parameters())
    assert sum(padded_sizes(1)) == n_parameters
    assert sum(padded_sizes(2)) == n_parameters + 2 * CONFIG.dim, "51 rows of the embedding and of the head become 52"


def test_tensor_parallelism() -> None:
    """Activations, per micro-batch: two all-reduces in each direction of a block, one for the embedding, one behind the
    head; the logits are gathered."""
    strategy = FSDP(tensor_parallel_size=2)
    with network_on_mesh(strategy, 2) as network:
        tokens = torch.zeros(2, 8, dtype=torch.long)
        with Wire() as forward:
            scores = network.logits(network(tokens))
        with Wire() as backward:
            scores.logsumexp(-1).sum().backward()
    hidden = 2 * 8 * CONFIG.dim * 4
    assert forward.n_bytes["all_reduce"] == (2 * CONFIG.n_layers + 1) * hidden
    assert forward.n_bytes["all_gather_into_tensor"] == 2 * 8 * 52 * 4
    norms = 2 * CONFIG.n_layers * CONFIG.head_width * 4  # of queries and keys: each rank has seen its own heads
    assert backward.n_bytes["all_reduce"] == (2 * CONFIG.n_layers + 1) * hidden + norms
    assert backward.n_bytes["all_gather_into_tensor"] == 0


class CountReduced(Callback):
    """Writes down, per step, the bytes that DDP all-reduces on this rank, and in how many buckets."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.sizes: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel)

        def counted(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            self.sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
            return allreduce_hook(None, bucket)

        # torch compares the classes, not their names.
        counted.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}
        trainer.strategy.model.register_comm_hook(None, counted)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        with open(Path(self.folder) / f"rank{trainer.global_rank}", "a") as file:
            file.write(f"{sum(self.sizes)}\n")
        self.sizes = []


@pytest.mark.parametrize("n_micro_batches", [1, 4])
def test_ddp(n_micro_batches: int, corpus: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Two gloo ranks: every gradient once a step, so 2(W-1)/W times 4 bytes a parameter on the wire of each."""
    count = f"+callback.count={{_target_: tests.strategy.test_wire.CountReduced, folder: {tmp_path}}}"
    arguments = [f"data.path={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}", "logger=none"]
    strategy = ["strategy=ddp", "trainer.devices=2", f"data.micro_batch_size={4 // n_micro_batches}"]
    without = [f"~callback.{name}" for name in ("sample", "summary", "progress", "checkpoint")]
    run_on_ranks(run_composed, 2, [*arguments, *strategy, *without, "packages=[tests]", count])
    node = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]
    node.pop("_target_")
    n_parameters = Transformer(TransformerConfig(**node)).n_parameters()
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text().split() == [str(4 * n_parameters)] * 6
