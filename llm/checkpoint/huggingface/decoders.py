"""GPT-2, and Llama with its relatives."""

from dataclasses import replace

from llm.checkpoint.huggingface import special
from llm.checkpoint.huggingface.architecture import Architecture, Row, Setting

GPT2 = Architecture(
    model_type="gpt2",
    classes=("GPT2LMHeadModel", "GPT2Model"),
    family="decoder",
    settings=(
        Setting("n_embd", "dim"),
        Setting("n_layer", "n_layers"),
        Setting("n_head", "n_heads"),
        Setting("n_positions", "max_length", 1024),
        Setting("vocab_size", "vocab_size"),
        Setting("layer_norm_epsilon", "norm_eps", 1e-5),
        Setting("tie_word_embeddings", "tie_embeddings", True),
        Setting(
            "activation_function",
            "activation",
            "gelu_new",
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"},
        ),
    ),
    constants={"position": "learned", "norm": "layer", "bias": True, "initialisation": "gpt2"},
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ignored=frozenset(
        {
            *("reorder_and_upcast_attn", "n_ctx", "summary_activation", "summary_first_dropout"),
            *("summary_proj_to_labels", "summary_type", "summary_use_proj"),
        }
    ),
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    special=frozenset({"n_inner"}),
    from_theirs=special.gpt2_from,
    to_theirs=special.gpt2_to,
    rows=(
        Row("transformer.wte", "embed"),
        Row("transformer.wpe", "decoder.position.table"),
        Row("transformer.ln_f", "decoder.norm"),
        Row("lm_head", "head"),
    ),
    layers={
        "decoder": (
            Row("transformer.h.{n}.ln_1", "attention_norm"),
            Row(
                "transformer.h.{n}.attn.c_attn",
                ("attention.query", "attention.key", "attention.value"),
                transposed=True,
            ),
            Row("transformer.h.{n}.attn.c_proj", "attention.out", transposed=True),
            Row("transformer.h.{n}.ln_2", "feed_forward_norm"),
            Row("transformer.h.{n}.mlp.c_fc", "feed_forward.up", transposed=True),
            Row("transformer.h.{n}.mlp.c_proj", "feed_forward.down", transposed=True),
        )
    },
    prefix="transformer.",
    dropped=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    headed=("lm_head.",),
)

LLAMA = Architecture(
    model_type="llama",
    classes=("LlamaForCausalLM", "LlamaModel"),
    family="decoder",
    settings=(
        Setting("hidden_size", "dim"),
        Setting("num_hidden_layers", "n_layers"),
        Setting("num_attention_heads", "n_heads"),
        Setting("num_key_value_heads", "n_kv_heads", None),
        Setting("head_dim", "head_dim", None),
        Setting("intermediate_size", "ffn_dim"),
        Setting("vocab_size", "vocab_size"),
        Setting("max_position_embeddings", "max_length", 2048),
        Setting("rms_norm_eps", "norm_eps", 1e-6),
        Setting("tie_word_embeddings", "tie_embeddings", False),
        Setting(
            "hidden_act",
            "activation",
            "silu",
            {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"},
        ),
    ),
    constants={"position": "rotary", "norm": "rms", "bias": False, "initialisation": "llama"},
    fixed={"attention_bias": False, "mlp_bias": False},
    ignored=frozenset({"pretraining_tp"}),
    dropouts=("attention_dropout",),
    special=special.ROPE_KEYS,
    from_theirs=special.rope_from,
    to_theirs=special.rope_to,
    rows=(Row("model.embed_tokens", "embed"), Row("model.norm", "decoder.norm"), Row("lm_head", "head")),
    layers={
        "decoder": (
            Row("model.layers.{n}.input_layernorm", "attention_norm"),
            Row("model.layers.{n}.self_attn.q_proj", "attention.query"),
            Row("model.layers.{n}.self_attn.k_proj", "attention.key"),
            Row("model.layers.{n}.self_attn.v_proj", "attention.value"),
            Row("model.layers.{n}.self_attn.o_proj", "attention.out"),
            Row("model.layers.{n}.self_attn.q_norm", "attention.query_norm"),
            Row("model.layers.{n}.self_attn.k_norm", "attention.key_norm"),
            Row("model.layers.{n}.post_attention_layernorm", "feed_forward_norm"),
            Row("model.layers.{n}.mlp.gate_proj", "feed_forward.gate"),
            Row("model.layers.{n}.mlp.up_proj", "feed_forward.up"),
            Row("model.layers.{n}.mlp.down_proj", "feed_forward.down"),
        )
    },
    prefix="model.",
    dropped=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
    headed=("lm_head.",),
)

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    classes=("MistralForCausalLM", "MistralModel"),
    fixed={},
    ignored=frozenset(),
    special=special.ROPE_KEYS | {"sliding_window"},
    from_theirs=special.mistral_from,
    to_theirs=special.mistral_to,
)

_WITHOUT_HEAD_DIM = tuple(setting for setting in LLAMA.settings if setting.ours != "head_dim")

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    classes=("Qwen2ForCausalLM", "Qwen2Model"),
    constants=LLAMA.constants | {"bias": "qkv"},
    fixed={},
    ignored=frozenset(),
    special=special.ROPE_KEYS | special.WINDOW_KEYS,
    from_theirs=special.qwen_from,
    to_theirs=special.qwen_to,
)

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    classes=("Qwen3ForCausalLM", "Qwen3Model"),
    settings=(*_WITHOUT_HEAD_DIM, Setting("head_dim", "head_dim", 128)),
    constants=LLAMA.constants | {"qk_norm": True},
    fixed={"attention_bias": False},
)
