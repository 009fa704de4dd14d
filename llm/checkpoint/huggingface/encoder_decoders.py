"""T5 (1.0 and 1.1), BART and Marian."""

from dataclasses import replace

from llm.checkpoint.huggingface import special
from llm.checkpoint.huggingface.architecture import Architecture, Row, Setting


def _t5_layer(stack: str) -> tuple[Row, ...]:
    block, last = f"{stack}.block.{{n}}.layer", 2 if stack == "decoder" else 1
    parts = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
    cross = (
        *(Row(f"{block}.1.EncDecAttention.{theirs}", f"cross_attention.{ours}") for theirs, ours in parts),
        Row(f"{block}.1.layer_norm", "cross_attention_norm"),
    )
    return (
        *(Row(f"{block}.0.SelfAttention.{theirs}", f"attention.{ours}") for theirs, ours in parts),
        Row(f"{block}.0.layer_norm", "attention_norm"),
        *(cross if stack == "decoder" else ()),
        Row(f"{block}.{last}.DenseReluDense.{{gate}}", "feed_forward.gate"),
        Row(f"{block}.{last}.DenseReluDense.{{up}}", "feed_forward.up"),
        Row(f"{block}.{last}.DenseReluDense.wo", "feed_forward.down"),
        Row(f"{block}.{last}.layer_norm", "feed_forward_norm"),
    )


def _bart_layer(stack: str) -> tuple[Row, ...]:
    layer = f"model.{stack}.layers.{{n}}"
    parts = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))
    cross = (
        *(Row(f"{layer}.encoder_attn.{theirs}", f"cross_attention.{ours}") for theirs, ours in parts),
        Row(f"{layer}.encoder_attn_layer_norm", "cross_attention_norm"),
    )
    return (
        *(Row(f"{layer}.self_attn.{theirs}", f"attention.{ours}") for theirs, ours in parts),
        Row(f"{layer}.self_attn_layer_norm", "attention_norm"),
        *(cross if stack == "decoder" else ()),
        Row(f"{layer}.fc1", "feed_forward.up"),
        Row(f"{layer}.fc2", "feed_forward.down"),
        Row(f"{layer}.final_layer_norm", "feed_forward_norm"),
    )


T5 = Architecture(
    model_type="t5",
    classes=("T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel"),
    family="encoder_decoder",
    settings=(
        Setting("d_model", "dim", 512),
        Setting("d_kv", "head_dim", 64),
        Setting("d_ff", "ffn_dim", 2048),
        Setting("num_layers", "n_layers", 6),
        Setting("num_decoder_layers", "n_decoder_layers", None),
        Setting("num_heads", "n_heads", 8),
        Setting("vocab_size", "vocab_size"),
        Setting("n_positions", "max_length", 512),  # nothing ends there; the first releases say it
        Setting("relative_attention_num_buckets", "relative_buckets", 32),
        Setting("relative_attention_max_distance", "relative_distance", 128),
        Setting("layer_norm_epsilon", "norm_eps", 1e-6),
    ),
    constants={"position": "relative", "norm": "rms", "scale_attention": False, "initialisation": "t5"},
    fixed={"is_decoder": False, "is_encoder_decoder": True},
    ignored=frozenset({"initializer_factor", "classifier_dropout"}),
    dropouts=("dropout_rate",),
    special=special.T5_KEYS,
    from_theirs=special.t5_from,
    to_theirs=special.t5_to,
    rows=(
        Row("shared", "embed"),
        *(
            Row(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{stack}.relative.table")
            for stack in ("encoder", "decoder")
        ),
        Row("encoder.final_layer_norm", "encoder.norm"),
        Row("decoder.final_layer_norm", "decoder.norm"),
        Row("lm_head", "head"),
    ),
    layers={stack: _t5_layer(stack) for stack in ("encoder", "decoder")},
    copies={f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")},
    # Of the first releases: a bias of the cross-attention that was never used.
    dropped=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    headed=("lm_head.",),
)

_BART_ACTIVATIONS = {
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

BART = Architecture(
    model_type="bart",
    classes=("BartForConditionalGeneration", "BartModel"),
    family="encoder_decoder",
    settings=(
        Setting("d_model", "dim"),
        Setting("encoder_layers", "n_layers"),
        Setting("decoder_layers", "n_decoder_layers"),
        Setting("vocab_size", "vocab_size"),
        Setting("max_position_embeddings", "max_length", 1024),
        Setting("activation_function", "activation", "gelu", _BART_ACTIVATIONS),
        Setting("tie_word_embeddings", "tie_embeddings", True),
    ),
    constants={
        "position": "learned",
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_position": "post",
        "embed_norm": True,
        "bias": True,
        "initialisation": "bert",
    },
    fixed={
        "scale_embedding": False,
        "is_decoder": False,
        "is_encoder_decoder": True,
        "normalize_before": False,
        "normalize_embedding": True,
        "add_final_layer_norm": False,
        "static_position_embeddings": False,
        "add_bias_logits": False,
        "extra_pos_embeddings": 2,
    },
    ignored=frozenset(
        {
            *("classif_dropout", "classifier_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std"),
            *("num_hidden_layers", "max_length"),
        }
    ),
    dropouts=("dropout", "attention_dropout", "activation_dropout"),
    special=special.LAYERS_KEYS,
    from_theirs=special.layers_from,
    to_theirs=special.layers_to,
    rows=(
        Row("model.shared", "embed"),
        *(
            row
            for stack in ("encoder", "decoder")
            for row in (
                Row(f"model.{stack}.embed_positions", f"{stack}.position.table", offset=True),
                Row(f"model.{stack}.layernorm_embedding", f"{stack}.embed_norm"),
            )
        ),
        Row("lm_head.weight", "head.weight", whole=True),
        Row("final_logits_bias", "head.bias", whole=True, flat=True),
    ),
    layers={stack: _bart_layer(stack) for stack in ("encoder", "decoder")},
    copies={f"model.{stack}.embed_tokens.weight": "model.shared.weight" for stack in ("encoder", "decoder")},
    prefix="model.",
    dropped=(r"model\.(encoder|decoder)\.version",),
    headed=("lm_head.", "final_logits_bias"),
    offset=lambda theirs: 2,
)

MARIAN = replace(
    BART,
    model_type="marian",
    classes=("MarianMTModel", "MarianModel"),
    constants=BART.constants | {"position": "sinusoidal", "embed_norm": False, "initialisation": "vaswani"},
    fixed=BART.fixed
    | {
        "scale_embedding": True,
        "normalize_embedding": False,
        "static_position_embeddings": True,
        "extra_pos_embeddings": 0,
    },
    to_theirs=special.marian_to,
    rows=(Row("model.shared", "embed"), Row("lm_head.weight", "head.weight", whole=True), BART.rows[-1]),
    offset=lambda theirs: 0,
)
