"""Weights of networks with an adapter: under the names of the network without one, merged into it, and apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from llm.checkpoint.huggingface import settings
from llm.checkpoint.huggingface.folder import new_folder
from llm.checkpoint.labels import labels_of
from llm.checkpoint.shards import index
from llm.checkpoint.store import CheckpointError, find, read_tensors, unused
from llm.model import TransformerConfig, config_from

PREFIX = "model."  # the network's attribute in the LightningModule whose state was saved
_BASE = ".base_layer."
_OPTIMIZER = f"optimizer.{PREFIX}"
_HEADS = ("classifier.", "pooler.")  # which an adapter's run always trains
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def is_adapters(name: str) -> bool:
    """Whether a weight is the adapter's."""
    return ".lora_" in name


def plain(name: str) -> str:
    """What a weight that an adapter was put around is called without it."""
    return name.replace(_BASE, ".")


def adapter_of(step: Path) -> dict[str, Any] | None:
    """The settings of the adapter that a step directory was trained with; None: none."""
    found = yaml.safe_load((step / "config.yaml").read_text()).get("adapter")
    return found if isinstance(found, dict) else None


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of the network without the adapter that computes the same: W + scale · B A."""
    whole = {plain(name): weight for name, weight in state.items() if not is_adapters(name)}
    for name, change in changes(state, scale).items():
        whole[name] = (whole[name].float() + change).to(whole[name].dtype)
    return whole


def changes(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Name of each weight that an adapter changes -> what it adds, in float32."""
    layers = [name.removesuffix(_A) for name in state if name.endswith(_A)]
    return {f"{layer}.weight": scale * (state[layer + _B].float() @ state[layer + _A].float()) for layer in layers}


def _trained_whole(step: Path) -> set[str]:
    """The names of the weights that were trained beside the adapter: heads, and all that had started anew."""
    names = index(step)
    kept = {name.removeprefix(_OPTIMIZER).rpartition(".")[0] for name in names if name.startswith(_OPTIMIZER)}
    heads = {name.removeprefix(PREFIX) for name in names if name.startswith(tuple(PREFIX + head for head in _HEADS))}
    return {name for name in kept | heads if not is_adapters(name)}


def put_on(model: nn.Module, path: str | Path) -> None:
    """Add what the adapter of a run or step directory changes to the weights of `model`, which it was trained on, and
    take over those that were trained beside it.

    Raises:
        CheckpointError: if the run has no adapter, or one for another network.
    """
    step = find(path)
    node = adapter_of(step)
    if node is None:
        raise CheckpointError(f"{step}: was trained without an adapter - give a run with adapter=lora")
    tensors = {name.removeprefix(PREFIX): weight for name, weight in read_tensors(step, PREFIX).items()}
    weights, beside = dict(model.named_parameters()), _trained_whole(step)
    with torch.no_grad():
        for name, change in changes(tensors, node["alpha"] / node["r"]).items():
            if name not in weights or weights[name].shape != change.shape:
                raise CheckpointError(
                    f"{step}: its adapter is for another network: {name} is not there, or of another size"
                )
            weights[name].add_(change.to(weights[name]))
        for name in sorted(beside):
            if plain(name) not in weights or weights[plain(name)].shape != tensors[name].shape:
                raise CheckpointError(
                    f"{step}: {plain(name)} was trained beside its adapter, and the model has none of that size - use "
                    "the run itself, whose weights are merged"
                )
            added = changes(tensors, node["alpha"] / node["r"]).get(plain(name), 0)
            weights[plain(name)].copy_(tensors[name] + added)


def write_peft(path: str | Path, out: str | Path) -> None:
    """Write the adapter of a run or step directory, and the heads that were trained beside it, as a folder that peft
    loads onto the model that it was trained on.

    Raises:
        CheckpointError: if `out` exists, the run has no adapter, or peft has no such layers.
    """
    from safetensors.torch import save_file

    step, out = find(path), unused(out)
    cfg = yaml.safe_load((step / "config.yaml").read_text())
    node = adapter_of(step)
    if node is None:
        raise CheckpointError(f"{step}: was trained without an adapter - python -m llm export {path} OUT")
    config = config_from(cfg["model"])
    if config.growth != 1:
        raise CheckpointError(
            f"{step}: model.parametrization: mup - its multipliers become a part of exported weights, which an adapter "
            f"alone does not fit - export the merged model instead: python -m llm export {path} OUT"
        )
    names, beside = _theirs(config, spans=labels_of(step)[1]), _trained_whole(step)
    tensors, whole = {}, set()
    for name, weight in read_tensors(step, PREFIX).items():
        name = name.removeprefix(PREFIX)
        if not is_adapters(name) and name not in beside:
            continue
        layer, _, rest = name.partition(".lora_") if is_adapters(name) else name.rpartition(".")
        if layer not in names:
            raise CheckpointError(
                f"{layer}: is trained, and no layer of its own in transformers that peft could save - export the "
                f"merged model instead: python -m llm export {path} OUT"
            )
        if is_adapters(name):
            rest = f"lora_{rest.replace('.default', '')}"
        else:
            whole.add(names[layer])
        tensors[f"base_model.model.{names[layer]}.{rest}"] = weight.contiguous()
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": cfg.get("init_from"),
        "r": node["r"],
        "lora_alpha": node["alpha"],
        "lora_dropout": node["dropout"],
        "target_modules": sorted({names[layer].rpartition(".")[2] for layer in names if _has(tensors, names[layer])}),
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }
    with new_folder(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _has(tensors: Mapping[str, Tensor], layer: str) -> bool:
    return f"base_model.model.{layer}.lora_A.weight" in tensors


def _theirs(config: TransformerConfig, *, spans: bool) -> dict[str, str]:
    """Our name of each layer that is one in transformers too -> theirs."""
    architecture, _ = settings.to_theirs(config, 0)
    rows = [row for row in architecture.expanded(config) if spans or row.theirs != "qa_outputs"]
    return {row.parts[0]: row.theirs for row in rows if len(row.parts) == 1 and not row.transposed and not row.whole}
