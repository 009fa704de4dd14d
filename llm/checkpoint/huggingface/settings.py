"""config.json <-> TransformerConfig, strictly: what we do not honour is an error, never left out."""

from __future__ import annotations

import dataclasses
from typing import Any

from llm.checkpoint.huggingface.architecture import REQUIRED, Architecture, Settings
from llm.checkpoint.huggingface.decoders import GPT2, LLAMA, MISTRAL, QWEN2, QWEN3
from llm.checkpoint.huggingface.encoder_decoders import BART, MARIAN, T5
from llm.checkpoint.huggingface.encoders import BERT, MODERNBERT, ROBERTA
from llm.checkpoint.store import CheckpointError
from llm.model import TransformerConfig

# Where several could hold a model, the first is written.
ARCHITECTURES = (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, ROBERTA, BERT, MODERNBERT, T5, BART, MARIAN)

# Where a file came from, how its numbers are stored, how it is fine-tuned or generates: not what the network computes.
_COMMON = frozenset(
    {
        *(
            "architectures",
            "model_type",
            "transformers_version",
            "_name_or_path",
            "name_or_path",
            "torch_dtype",
            "dtype",
        ),
        *("use_cache", "initializer_range", "gradient_checkpointing", "task_specific_params", "id2label", "label2id"),
        *("num_labels", "problem_type", "finetuning_task", "_num_labels", "_attn_implementation", "use_return_dict"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id"),
        *("unk_token_id", "decoder_start_token_id", "forced_eos_token_id", "forced_bos_token_id", "bad_words_ids"),
        *("num_beams", "early_stopping", "no_repeat_ngram_size", "length_penalty", "min_length", "max_length"),
        *("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "prefix", "is_llama_config"),
        *(
            "begin_suppress_tokens",
            "_remove_final_layer_norm",
            "force_bos_token_to_be_generated",
            "output_past",
            "transformers.js_config",
        ),
        *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "tokenizer_class"),
    }
)


def architecture_of(theirs: Settings, where: str) -> Architecture:
    """The architecture that config.json names."""
    known = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    kind = theirs.get("model_type")
    if kind not in known:
        raise CheckpointError(f"{where}: model_type: {kind} - known are {', '.join(known)}")
    return known[kind]


def from_theirs(theirs: Settings, architecture: Architecture, where: str) -> TransformerConfig:
    """Our configuration of a config.json.

    Raises:
        CheckpointError: with one line for each setting that is missing, has a value that we do not have, or is unknown.
    """
    mistakes = _mistakes(theirs, architecture)
    if mistakes:
        raise CheckpointError(f"{where}: not what can be computed here\n" + "\n".join(f"  {line}" for line in mistakes))
    ours: dict[str, Any] = dict(architecture.constants) | {"family": architecture.family}
    for setting in architecture.settings:
        value = theirs.get(setting.theirs)
        value = setting.default if value is None else value
        ours[setting.ours] = value if setting.values is None else setting.values[value]
    if architecture.dropouts:
        ours["dropout"] = float(theirs.get(architecture.dropouts[0]) or 0.0)
    if architecture.offset(theirs) and ours["position"] == "learned" and architecture.model_type != "bart":
        ours["max_length"] -= architecture.offset(theirs)
    try:
        return TransformerConfig(**(ours | architecture.from_theirs(theirs)))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: {error} - mend the file") from None


def _mistakes(theirs: Settings, architecture: Architecture) -> list[str]:
    known = {setting.theirs for setting in architecture.settings} | {*architecture.dropouts, *architecture.special}
    known |= architecture.ignored | _COMMON
    mistakes = []
    for setting in architecture.settings:
        value = theirs.get(setting.theirs)
        if value is None and setting.default is REQUIRED:
            mistakes.append(f"{setting.theirs}: not there - it has no default")
        elif value is not None and setting.values is not None and value not in setting.values:
            mistakes.append(f"{setting.theirs}: {value} - only {', '.join(setting.values)} are known")
    for key, value in theirs.items():
        if key in architecture.fixed:
            if value is not None and value != architecture.fixed[key]:
                mistakes.append(f"{key}: {value} - only {architecture.fixed[key]} is known")
        elif key not in known and not (value is None or value is False or value in ({}, [])):
            mistakes.append(f"{key}: {value} - not known for model_type {architecture.model_type}")
    return mistakes


def to_theirs(config: TransformerConfig, pad_id: int) -> tuple[Architecture, Settings]:
    """The architecture that computes what `config` does, and its config.json without names and ids of tokens.

    Raises:
        CheckpointError: if there is none, naming the keys that keep the nearest from it.
    """
    nearest: tuple[list[str], str] | None = None
    for architecture in ARCHITECTURES:
        if architecture.family != config.family:
            continue
        theirs = _written(config, architecture, pad_id)
        try:
            again = from_theirs(theirs, architecture, "config.json")
        except CheckpointError:  # what is written is no configuration of that architecture
            continue
        again = dataclasses.replace(again, **_from_weights(config, architecture))
        mine, other = meaning(config), meaning(again)
        lines = [f"model.{key}: {mine[key]} - {architecture.model_type} has {other[key]}" for key in mine]
        lines = [line for key, line in zip(mine, lines, strict=True) if mine[key] != other[key]]
        if not lines:
            return architecture, theirs
        if nearest is None or len(lines) < len(nearest[0]):
            nearest = lines, architecture.model_type
    if nearest is None:
        raise CheckpointError(f"no architecture of Hugging Face is a model.family={config.family} with these sizes")
    raise CheckpointError(
        "no architecture of Hugging Face computes what this model does; the nearest is "
        f"{nearest[1]} - train with its settings to export\n" + "\n".join(f"  {line}" for line in nearest[0])
    )


def _written(config: TransformerConfig, architecture: Architecture, pad_id: int) -> Settings:
    theirs: Settings = {"model_type": architecture.model_type, "pad_token_id": pad_id} | architecture.fixed
    resolved = meaning(config)
    for setting in architecture.settings:
        value = resolved.get(setting.ours, getattr(config, setting.ours))
        if setting.values is not None:
            spelt = [name for name, ours in setting.values.items() if ours == value]
            value = spelt[0] if spelt else setting.default
        theirs[setting.theirs] = value
    if config.position == "learned" and architecture.model_type == "roberta":
        theirs["max_position_embeddings"] += architecture.offset(theirs)
    if architecture.model_type == "roberta":
        theirs["type_vocab_size"] = 1
    return theirs | dict.fromkeys(architecture.dropouts, config.dropout) | architecture.to_theirs(config)


def _from_weights(config: TransformerConfig, architecture: Architecture) -> dict[str, Any]:
    """What a folder says by the weights that it holds, and not in config.json."""
    optional = {"bert": ("next_sentence", "n_labels", "label_of"), "bart": ("head_bias",), "marian": ("head_bias",)}
    return {key: getattr(config, key) for key in optional.get(architecture.model_type, ())}


def meaning(config: TransformerConfig) -> dict[str, Any]:
    """What a network computes: defaults resolved, keys that do nothing left out, and those of training too."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for key in ("dropout", "initialisation", "global_every", "base_ffn_dim"):
        del values[key]
    if config.growth == 1:  # then mup is the standard parametrization
        values |= {"parametrization": "standard", "base_dim": None}
    values |= {"n_kv_heads": config.kv_heads, "head_dim": config.head_width, "ffn_dim": config.ffn_width}
    values["n_decoder_layers"] = config.decoder_layers if config.family == "encoder_decoder" else None
    values["windows"] = tuple(config.has_window(layer) for layer in range(config.n_layers))
    if not any(values["windows"]):
        values["window"] = None
    rotary, relative = config.position == "rotary", config.position == "relative"
    values["rope_theta"] = config.rope_theta if rotary else None
    values["local_rope_theta"] = (config.local_rope_theta or config.rope_theta) if rotary and values["window"] else None
    if not relative:
        values["relative_buckets"] = values["relative_distance"] = None
    return values
