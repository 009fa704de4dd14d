"""A plain PyTorch loop, as nanoGPT's: over our model class, or over one of transformers'.

`python -m benchmarks.contestants.plain SETTINGS.json`; nothing of llm is imported unless the model is ours.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.turn import Turn

LOG_EVERY = 10


def load_steps(path: str) -> list[list[dict[str, Tensor]]]:
    """Steps as `material.save_steps` wrote them."""
    return torch.load(path, weights_only=True)


class InMemory:
    """What a trainer iterates over, where it would take a list for several loaders."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; as nanoGPT's."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, settings: dict[str, Any]) -> torch.optim.AdamW:
    """The optimizer that all share."""
    own = dict(settings["adamw"])
    return torch.optim.AdamW(groups(model, own.pop("weight_decay")), **own, fused=True)


class Ours(nn.Module):
    """Our network under a loss: what a micro-batch gives is the mean over its predicted tokens.

    What a batch has and its model needs is passed on: a decoder of one document a row gets its tokens alone.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        from llm.model import Transformer, TransformerConfig

        self.family = settings["model"]["family"]
        self.fields = settings["fields"]
        self.network = Transformer(TransformerConfig(**settings["model"]))
        self.blocks = self.network.blocks if settings.get("compile") == "blocks" else []
        if Path(settings["weights"]).is_dir():
            from llm.checkpoint import load_into

            load_into(self.network, settings["weights"])
        else:
            self.network.load_state_dict(torch.load(settings["weights"], weights_only=True))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        given: dict[str, Any] = {name: batch[name] for name in self.fields}
        if self.family == "encoder_decoder":
            from llm.model import Source

            names = ("source_tokens", "source_documents", "source_positions")
            given["source"] = Source(*(batch[name] for name in names))
        hidden = self.network(batch["tokens"], **given).flatten(0, 1)
        labels = batch["labels"].flatten()
        if self.family == "encoder":
            at = (labels != -100).nonzero().squeeze(1)
            hidden, labels = hidden[at], labels[at]
        return F.cross_entropy(self.network.logits(hidden).float(), labels, ignore_index=-100)


class Theirs(nn.Module):
    """GPT-2 of transformers."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.network = AutoModelForCausalLM.from_pretrained(settings["weights"], attn_implementation="sdpa")
        self.network.train()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.network(batch["tokens"], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=-100)


def device_figures(device: torch.device) -> tuple[Callable[[], None] | None, Callable[[], dict[str, float]] | None]:
    """How a turn waits for the device, and what it tells of its memory; nothing of a CPU."""
    if device.type == "cpu":
        return None, None
    return torch.cuda.synchronize, lambda: {"peak_bytes": float(torch.cuda.max_memory_allocated())}


MODELS = {"ours": Ours, "transformers": Theirs}


def main(settings: dict[str, Any]) -> None:
    """Train. One micro-batch is one step, or several, whose gradients are added up."""
    rank, world_size = settings.get("rank", 0), settings.get("world_size", 1)
    device = torch.device(settings.get("device", "cpu"))
    torch.manual_seed(0)
    steps = load_steps(settings["steps"])
    steps = [[{k: _mine(v, rank, world_size).to(device) for k, v in m.items()} for m in step] for step in steps]
    model: nn.Module = MODELS[settings["kind"]](settings).to(device)
    compiled = settings.get("compile", "none")
    for part in {"none": [], "whole": [model], "blocks": getattr(model, "blocks", [])}[compiled]:
        part.compile()
    if world_size > 1:
        dist.init_process_group("gloo", init_method=settings["meeting"], rank=rank, world_size=world_size)
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = adamw(model, settings)
    parameters = list(model.parameters())
    precise = settings["precision"] == "32-true"
    autocast = contextlib.nullcontext() if precise else torch.autocast(device.type, dtype=torch.bfloat16)
    turn = Turn(rank, *device_figures(device))
    log = Log(Path("log.jsonl") if rank == 0 else None, device)
    for number in range(turn.pace.n_steps):
        step = steps[number % len(steps)]
        total = torch.zeros((), device=device)
        for micro_batch in step:
            with autocast:
                loss = model(micro_batch)
            loss = loss if len(step) == 1 else loss / len(step)
            loss.backward()
            total = loss.detach() if len(step) == 1 else total + loss.detach()
        norm = nn.utils.clip_grad_norm_(parameters, settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=world_size == 1)
        log.after_step(total, norm, step, optimizer)
        turn.after_step(total)
    if world_size > 1:
        dist.destroy_process_group()


class Log:
    """Five metrics of every step, added up, and written every LOG_EVERY steps: loss, tokens, norm of the gradient,
    learning rate, tokens per second."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self._file = None if path is None else path.open("w")
        self._sums = torch.zeros(2, device=device)
        self._tokens, self._step, self._clock = 0, 0, time.perf_counter()

    def after_step(
        self, loss: Tensor, norm: Tensor, step: list[dict[str, Tensor]], optimizer: torch.optim.Optimizer
    ) -> None:
        """At the end of every step."""
        self._step += 1
        self._sums += torch.stack((loss, norm))
        self._tokens += sum(micro_batch["tokens"].numel() for micro_batch in step)
        if self._step % LOG_EVERY:
            return
        loss_sum, norm_sum = self._sums.tolist()
        now = time.perf_counter()
        row = {
            "step": self._step,
            "loss": loss_sum / LOG_EVERY,
            "grad_norm": norm_sum / LOG_EVERY,
            "tokens": self._tokens,
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_s": self._tokens / (now - self._clock),
        }
        self._sums.zero_()
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


def _mine(value: Tensor, rank: int, world_size: int) -> Tensor:
    rows = len(value) // world_size
    return value if world_size == 1 else value[rank * rows : (rank + 1) * rows]


def start(settings: dict[str, Any]) -> None:
    """Here, or in as many processes as there are ranks."""
    n_ranks = settings.get("world_size", 1)
    if n_ranks == 1 or "rank" in settings:
        main(settings)
        return
    meeting = f"file://{Path('meeting').resolve()}"
    commands = []
    for rank in range(n_ranks):
        path = Path(f"rank{rank}.json")
        path.write_text(json.dumps({**settings, "rank": rank, "meeting": meeting}))
        commands.append([sys.executable, "-m", "benchmarks.contestants.plain", str(path)])
    ranks = [subprocess.Popen(command) for command in commands]
    sys.exit(max(abs(rank.wait()) for rank in ranks))


if __name__ == "__main__":
    start(json.loads(Path(sys.argv[1]).read_text()))
