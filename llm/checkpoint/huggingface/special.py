"""Settings of Hugging Face that no single key of ours answers to: rotations, windows and gated feed-forwards."""

from __future__ import annotations

from typing import Any

from llm.checkpoint.store import CheckpointError
from llm.model import RopeScaling, TransformerConfig

Settings = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"
ROPE_KEYS = frozenset({"rope_parameters", "rope_theta", "rope_scaling"})
WINDOW_KEYS = frozenset({"layer_types", "use_sliding_window", "sliding_window", "max_window_layers"})
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")


def rope_from(theirs: Settings) -> Settings:
    """transformers 5 has rope_parameters, before it there were rope_theta and rope_scaling."""
    node = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    kind = node.pop("rope_type", None) or node.pop("type", None) or "default"
    node.pop("type", None)
    theta = node.pop("rope_theta", None) or theirs.get("rope_theta") or 10000.0
    if kind == "llama3":
        original = node.pop("original_max_position_embeddings", None) or theirs.get("original_max_position_embeddings")
        if original is None:
            raise CheckpointError("rope_parameters: llama3 without original_max_position_embeddings - add it")
        factor, low, high = (float(node.pop(key)) for key in _LLAMA3)
        scaling = RopeScaling(factor, low, high, original)
    elif kind == "default":
        scaling = None
    else:
        raise CheckpointError(f"rope_scaling: {kind} - only llama3 and default are known")
    left = {key: value for key, value in node.items() if value is not None}
    if left:
        raise CheckpointError(f"rope_parameters: {left} - not known for rope_type {kind}")
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def rope_to(config: TransformerConfig) -> Settings:
    """Both spellings, so that older versions read it too."""
    scaling = config.rope_scaling
    node: Settings = {"rope_type": "default"}
    if scaling is not None:
        node = {"rope_type": "llama3", "original_max_position_embeddings": scaling.original_length}
        node |= {key: getattr(scaling, key) for key in _LLAMA3}
    old = {} if scaling is None else {"rope_scaling": dict(node)}
    return {"rope_theta": config.rope_theta, "rope_parameters": node | {"rope_theta": config.rope_theta}} | old


def gpt2_from(theirs: Settings) -> Settings:
    """Nothing but the width, of which null is four times the stream's."""
    return {"ffn_dim": theirs.get("n_inner") or 4 * theirs["n_embd"]}


def gpt2_to(config: TransformerConfig) -> Settings:
    return {"n_inner": config.ffn_width}


def mistral_from(theirs: Settings) -> Settings:
    """Every layer has the window; version 0.1 of Mistral's weights has one, later ones none."""
    return rope_from(theirs) | {"window": theirs.get("sliding_window", 4096)}


def mistral_to(config: TransformerConfig) -> Settings:
    return rope_to(config) | {"sliding_window": config.window}


def qwen_from(theirs: Settings) -> Settings:
    """A window in the layers that `layer_types` names, or from layer `max_window_layers` on."""
    n_layers = theirs["num_hidden_layers"]
    window = theirs.get("sliding_window", 4096) if theirs.get("use_sliding_window") else None
    first = theirs.get("max_window_layers", 28)
    kinds = theirs.get("layer_types") or [FULL if window is None or i < first else SLIDING for i in range(n_layers)]
    return rope_from(theirs) | windows_from(kinds, window)


def qwen_to(config: TransformerConfig) -> Settings:
    kinds = windows_to(config)
    return rope_to(config) | {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": 0 if config.window is not None else config.n_layers,
        "layer_types": kinds,
    }


def windows_from(kinds: list[str], window: int | None) -> Settings:
    """The window, and the period of the layers without one."""
    if SLIDING not in kinds:
        strange = set(kinds) - {FULL}
        if strange:
            raise CheckpointError(f"layer_types: {sorted(strange)} - only {FULL} and {SLIDING} are known")
        return {"window": None, "global_every": None}
    if FULL not in kinds:
        return {"window": window, "global_every": None}
    for period in range(1, len(kinds) + 1):
        if kinds == [SLIDING if layer % period else FULL for layer in range(len(kinds))]:
            return {"window": window, "global_every": period}
    raise CheckpointError(f"layer_types: {kinds} - only every n-th layer, the first among them, can be {FULL} here")


def windows_to(config: TransformerConfig) -> list[str]:
    return [SLIDING if config.has_window(layer) else FULL for layer in range(config.n_layers)]


MODERNBERT_KEYS = frozenset(
    {
        "rope_parameters",
        "global_rope_theta",
        "local_rope_theta",
        "local_attention",
        "global_attn_every_n_layers",
        "layer_types",
    }
)


def modernbert_from(theirs: Settings) -> Settings:
    """Two rotations, and a window in all layers but every third."""
    every = theirs.get("global_attn_every_n_layers") or 3
    n_layers = theirs["num_hidden_layers"]
    kinds = theirs.get("layer_types") or [SLIDING if layer % every else FULL for layer in range(n_layers)]
    nodes = theirs.get("rope_parameters") or {}
    everywhere = rope_from(
        {"rope_parameters": nodes.get(FULL), "rope_theta": theirs.get("global_rope_theta", 160000.0)}
    )
    nearby = rope_from({"rope_parameters": nodes.get(SLIDING), "rope_theta": theirs.get("local_rope_theta", 10000.0)})
    if everywhere["rope_scaling"] != nearby["rope_scaling"]:
        raise CheckpointError(f"rope_parameters: {nodes} - both kinds of layers must have the same scaling here")
    ours = windows_from(kinds, theirs.get("local_attention", 128)) | everywhere
    same = ours["window"] is None or nearby["rope_theta"] == everywhere["rope_theta"]
    return ours | {"local_rope_theta": None if same else nearby["rope_theta"]}


def modernbert_to(config: TransformerConfig) -> Settings:
    nearby = config.local_rope_theta or config.rope_theta
    node = rope_to(config)["rope_parameters"]
    return {
        "local_attention": config.window or 128,
        "layer_types": windows_to(config),
        "global_attn_every_n_layers": config.global_every or 1,
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": nearby,
        "rope_parameters": {FULL: node, SLIDING: node | {"rope_theta": nearby}},
    }


T5_KEYS = frozenset(
    {"feed_forward_proj", "is_gated_act", "dense_act_fn", "scale_decoder_outputs", "tie_word_embeddings"}
)
_T5_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "gated-gelu": "geglu_tanh",  # transformers means gelu_new by it
    "gated-silu": "swiglu",
}


def t5_from(theirs: Settings) -> Settings:
    """Version 1.0 has a scaled, tied head, which `tie_word_embeddings` told of until transformers 5."""
    activation = theirs.get("feed_forward_proj", "relu")
    if activation not in _T5_ACTIVATIONS:
        raise CheckpointError(f"feed_forward_proj: {activation} - only {', '.join(_T5_ACTIVATIONS)} are known")
    tied = theirs.get("tie_word_embeddings", True) is not False
    return {
        "activation": _T5_ACTIVATIONS[activation],
        "tie_embeddings": tied,
        "scale_logits": theirs.get("scale_decoder_outputs", tied),
    }


def t5_to(config: TransformerConfig) -> Settings:
    names = {ours: theirs for theirs, ours in _T5_ACTIVATIONS.items()}
    return {
        "feed_forward_proj": names.get(config.activation, "relu"),
        "scale_decoder_outputs": config.scale_logits,
        "tie_word_embeddings": config.tie_embeddings,
    }


def layers_from(theirs: Settings) -> Settings:
    """BART and Marian say heads and widths for each side."""
    for key in ("attention_heads", "ffn_dim"):
        encoder, decoder = theirs[f"encoder_{key}"], theirs[f"decoder_{key}"]
        if encoder != decoder:
            raise CheckpointError(f"decoder_{key}: {decoder} - must be encoder_{key}, {encoder}, here")
    same_words = theirs.get("share_encoder_decoder_embeddings", True)
    if not same_words or theirs.get("decoder_vocab_size") not in (None, theirs["vocab_size"]):
        raise CheckpointError(
            f"share_encoder_decoder_embeddings: {same_words}, decoder_vocab_size: {theirs.get('decoder_vocab_size')} - "
            "both sides must share one vocabulary here"
        )
    return {
        "n_heads": theirs["encoder_attention_heads"],
        "ffn_dim": theirs["encoder_ffn_dim"],
    }


def layers_to(config: TransformerConfig) -> Settings:
    return {f"{side}_attention_heads": config.n_heads for side in ("encoder", "decoder")} | {
        f"{side}_ffn_dim": config.ffn_width for side in ("encoder", "decoder")
    }


def marian_to(config: TransformerConfig) -> Settings:
    return layers_to(config) | {"share_encoder_decoder_embeddings": True, "decoder_vocab_size": config.vocab_size}


LAYERS_KEYS = frozenset(
    {
        *(f"{side}_{key}" for side in ("encoder", "decoder") for key in ("attention_heads", "ffn_dim")),
        "share_encoder_decoder_embeddings",
        "decoder_vocab_size",
    }
)
