"""litgpt's model under Fabric, step for step as its `pretrain.fit` does it (litgpt 0.5.13), without its validation.

`python -m benchmarks.contestants.fabric SETTINGS.json`, in the peers' environment.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import ThroughputMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from litgpt.model import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch import Tensor
from torchmetrics.aggregation import RunningMean

from benchmarks.contestants.plain import LOG_EVERY, device_figures, groups, load_steps
from benchmarks.turn import Turn


def config_of(model: dict[str, Any]) -> Config:
    """A decoder of ours with rotary positions, layer norms and an untied head, as litgpt describes it."""
    return Config(
        block_size=model["max_length"],
        n_layer=model["n_layers"],
        n_embd=model["dim"],
        n_head=model["n_heads"],
        vocab_size=model["vocab_size"],
        padded_vocab_size=model["vocab_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=True,
        norm_class_name="LayerNorm",
        norm_eps=model["norm_eps"],
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
        intermediate_size=model.get("ffn_dim") or 4 * model["dim"],
    )


def renamed(state: dict[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """Weights of ours under litgpt's names; queries, keys and values are one matrix there."""
    found = {
        "lm_head.weight": state["head.weight"],
        "transformer.wte.weight": state["embed.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"transformer.ln_f.{kind}"] = state[f"decoder.norm.{kind}"]
        for layer in range(n_layers):
            mine, theirs = f"decoder.blocks.{layer}", f"transformer.h.{layer}"
            heads = [state[f"{mine}.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{theirs}.attn.qkv.{kind}"] = torch.cat(heads)
            for own, other in (
                ("attention_norm", "norm_1"),
                ("attention.out", "attn.proj"),
                ("feed_forward_norm", "norm_2"),
                ("feed_forward.up", "mlp.fc"),
                ("feed_forward.down", "mlp.proj"),
            ):
                found[f"{theirs}.{other}.{kind}"] = state[f"{mine}.{own}.{kind}"]
    return found


def main(settings: dict[str, Any]) -> None:
    """Train as litgpt's `fit`."""
    logger = TensorBoardLogger("logs")
    accelerator = settings.get("device", "cpu")
    fabric = L.Fabric(accelerator=accelerator, devices=1, precision=settings["precision"], loggers=[logger])
    loaded = load_steps(settings["steps"])
    steps = [[{name: value.to(fabric.device) for name, value in m.items()} for m in step] for step in loaded]
    with fabric.init_module():
        model = GPT(config_of(settings["model"]))
    model.load_state_dict(renamed(torch.load(settings["weights"], weights_only=True), settings["model"]["n_layers"]))
    if settings.get("compile"):
        model = torch.compile(model)
    model = fabric.setup(model)
    own = dict(settings["adamw"])
    optimizer = torch.optim.AdamW(groups(model, own.pop("weight_decay")), **own, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)
    throughput = ThroughputMonitor(fabric, window_size=5)
    running_loss = RunningMean(window=1, sync_on_compute=False).to(fabric.device)
    turn, total_t0 = Turn(0, *device_figures(fabric.device)), time.perf_counter()
    n_tokens = sum(micro_batch["tokens"].numel() for micro_batch in steps[0])
    for iteration in range(1, turn.pace.n_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings["adamw"]["lr"]
        iter_t0 = time.perf_counter()
        step, total = steps[(iteration - 1) % len(steps)], torch.zeros((), device=fabric.device)
        for number, batch in enumerate(step, 1):
            with fabric.no_backward_sync(model, enabled=number < len(step)):
                logits = model(batch["tokens"])
                loss = chunked_cross_entropy(logits, batch["labels"])
                fabric.backward(loss / len(step))
            total += loss.detach() / len(step)
        running_loss.update(loss.detach())
        fabric.clip_gradients(model, optimizer, max_norm=settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if iteration % LOG_EVERY == 0:
            mean, t1 = running_loss.compute().item(), time.perf_counter()
            lengths = iteration * n_tokens
            throughput.update(time=t1 - total_t0, batches=iteration, samples=iteration * len(step), lengths=lengths)
            metrics = {"loss": mean, "iter": iteration, "iter_time": t1 - iter_t0, "tokens": lengths}
            metrics |= {"learning_rate": settings["adamw"]["lr"], **throughput.compute()}
            fabric.print(f"iter {iteration} | loss train: {mean:.3f} | iter time: {(t1 - iter_t0) * 1000:.2f} ms")
            fabric.log_dict(metrics, step=iteration - 1)
        turn.after_step(total)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
