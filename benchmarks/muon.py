"""What a step of Muon costs, ours and torch.optim.Muon's: `python benchmarks/muon.py`, in some minutes.

CPU seconds of a step on one thread, the two in turn; bytes that the first process sends in a step among so many
processes, of which there is only this one (a fake process group). torch.optim.Muon multiplies in bfloat16 whatever the
CPU; on one without instructions for that a step of gpt2_124m takes many minutes, so that one layer is compared
(`--layers`). Writes benchmarks/results/muon.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from llm.model import Transformer, TransformerConfig  # noqa: E402
from llm.optimizer.groups import hidden_matrices  # noqa: E402
from llm.optimizer.muon import Muon  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "muon.json"
SETTINGS = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95}
MAKES: dict[str, Callable[[Any], Optimizer]] = {
    "torch": lambda matrices: torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **SETTINGS),
    "ours": lambda matrices: Muon(matrices, **SETTINGS),
}


class Traffic(TorchDispatchMode):
    """Bytes that this process sends to others, in a ring where there is one."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.n_bytes = n, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # so it comes to what the DTensor calls
        result = function(*args, **(kwargs or {}))
        ring = (self.n - 1) / self.n
        sizes: dict[str, Callable[[], float]] = {
            "_allgather_base_": lambda: ring * args[0].nbytes,
            "all_gather_into_tensor": lambda: ring * result.nbytes,
            "reduce_scatter_tensor": lambda: ring * args[0].nbytes,
            "all_reduce": lambda: 2 * ring * args[0].nbytes,
            "all_to_all_single": lambda: ring * args[0].nbytes,
            "shard_dim_alltoall": lambda: ring * args[0].nbytes,
            "alltoall_base_": lambda: (sum(args[4]) - args[4][0]) * args[1].element_size(),
        }
        if function.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            name = function.__name__.partition(".")[0]
            assert name in {*sizes, "wait_tensor", "_wrap_tensor_autograd"}, name
            self.n_bytes += sizes[name]() if name in sizes else 0
        return result


def network(name: str, n_layers: int | None) -> Transformer:
    node = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())
    settings = {key: value for key, value in node.items() if key != "_target_"}
    config = TransformerConfig(**{**settings, "vocab_size": 256, "max_length": 128})  # which are not Muon's
    return Transformer(replace(config, n_layers=n_layers or config.n_layers))


def step(optimizer: Optimizer) -> float:
    """CPU seconds."""
    start = time.process_time()
    optimizer.step()
    return time.process_time() - start


def optimizers(model: Transformer, names: list[str]) -> dict[str, Optimizer]:
    matrices = hidden_matrices(model)
    for matrix in matrices:
        matrix.grad = matrix.detach().clone()
    return {name: MAKES[name](matrices) for name in names}


def seconds(model: Transformer, names: list[str], n_rounds: int) -> dict[str, float]:
    """The median of rounds in which each takes its turn, after one that does not count."""
    made = optimizers(model, names)
    rounds = [{name: step(optimizer) for name, optimizer in made.items()} for _ in range(n_rounds + 1)]
    return {name: statistics.median(round_[name] for round_ in rounds[1:]) for name in names}


def traffic(name: str, n: int, layout: str, maker: str) -> float:
    """MB that leave the first of `n` processes in a step."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    model = network(name, None)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (n,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
    made = optimizers(model, [maker])[maker]
    with Traffic(n) as wire:
        made.step()
    torch.distributed.destroy_process_group()
    return wire.n_bytes / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=1, help="of gpt2_124m for the comparison; 12 are all")
    parser.add_argument("--traffic-of", default="gpt2_124m")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    results: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor(), "cpu multiplies bf16": bf16}
    both = list(MAKES)
    results["seconds"] = {
        "tiny_decoder": seconds(network("tiny_decoder", None), both, arguments.rounds),
        f"gpt2_124m, {arguments.layers} of 12 layers": seconds(network("gpt2_124m", arguments.layers), both, 1),
        "gpt2_124m": seconds(network("gpt2_124m", None), ["ours"], 1),
    }
    print(json.dumps(results, indent=1), flush=True)
    name = arguments.traffic_of
    results["MB"] = {f"{name} ddp x{n}": {"ours": traffic(name, n, "ddp", "ours")} for n in (2, 8)}
    for n in (2, 8, 64):
        results["MB"][f"{name} fsdp x{n}"] = {maker: traffic(name, n, "fsdp", maker) for maker in both}
    print(json.dumps(results["MB"], indent=1))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
