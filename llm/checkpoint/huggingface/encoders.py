"""BERT, RoBERTa and ModernBERT."""

from dataclasses import replace

from llm.checkpoint.huggingface import special
from llm.checkpoint.huggingface.architecture import Architecture, Row, Setting

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


def _layer(body: str) -> tuple[Row, ...]:
    layer = f"{body}.encoder.layer.{{n}}"
    return (
        Row(f"{layer}.attention.self.query", "attention.query"),
        Row(f"{layer}.attention.self.key", "attention.key"),
        Row(f"{layer}.attention.self.value", "attention.value"),
        Row(f"{layer}.attention.output.dense", "attention.out"),
        Row(f"{layer}.attention.output.LayerNorm", "attention_norm"),
        Row(f"{layer}.intermediate.dense", "feed_forward.up"),
        Row(f"{layer}.output.dense", "feed_forward.down"),
        Row(f"{layer}.output.LayerNorm", "feed_forward_norm"),
    )


def _embeddings(body: str, *, offset: bool) -> tuple[Row, ...]:
    return (
        Row(f"{body}.embeddings.word_embeddings", "embed"),
        Row(f"{body}.embeddings.position_embeddings", "encoder.position.table", offset=offset),
        Row(f"{body}.embeddings.token_type_embeddings", "encoder.segment"),
        Row(f"{body}.embeddings.LayerNorm", "encoder.embed_norm"),
        Row(f"{body}.pooler.dense", "pooler"),
    )


BERT = Architecture(
    model_type="bert",
    classes=(
        *("BertForMaskedLM", "BertForPreTraining", "BertModel", "BertForNextSentencePrediction"),
        *("BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"),
    ),
    family="encoder",
    settings=(
        Setting("hidden_size", "dim", 768),
        Setting("num_hidden_layers", "n_layers", 12),
        Setting("num_attention_heads", "n_heads", 12),
        Setting("intermediate_size", "ffn_dim", 3072),
        Setting("vocab_size", "vocab_size"),
        Setting("max_position_embeddings", "max_length", 512),
        Setting("type_vocab_size", "n_segments", 2),
        Setting("layer_norm_eps", "norm_eps", 1e-12),
        Setting("hidden_act", "activation", "gelu", _ACTIVATIONS),
        Setting("tie_word_embeddings", "tie_embeddings", True),
    ),
    constants={
        "position": "learned",
        "norm": "layer",
        "norm_position": "post",
        "embed_norm": True,
        "bias": True,
        "head_bias": True,
        "initialisation": "bert",
    },
    fixed={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    ignored=frozenset(
        {
            *("classifier_dropout", "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_type"),
            *("pooler_num_fc_layers", "pooler_size_per_head"),
        }
    ),
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    rows=(
        *_embeddings("bert", offset=False),
        Row("cls.predictions.transform.dense", "transform.dense"),
        Row("cls.predictions.transform.LayerNorm", "transform.norm"),
        Row("cls.predictions.decoder.weight", "head.weight", whole=True),
        Row("cls.predictions.bias", "head.bias", whole=True),
        Row("cls.seq_relationship", "next_sentence"),
        Row("classifier", "classifier"),
        Row("qa_outputs", "classifier"),
    ),
    layers={"encoder": _layer("bert")},
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    prefix="bert.",
    dropped=(r"bert\.embeddings\.position_ids",),
    headed=("cls.", "bert.pooler.", "classifier.", "qa_outputs."),
)

ROBERTA = replace(
    BERT,
    model_type="roberta",
    classes=("RobertaForMaskedLM", "RobertaModel"),
    settings=tuple(setting for setting in BERT.settings if setting.theirs != "hidden_act"),
    # The head's activation is gelu whatever hidden_act says, and ours is one for both.
    constants=BERT.constants | {"activation": "gelu"},
    fixed=BERT.fixed | {"hidden_act": "gelu"},
    rows=(
        *_embeddings("roberta", offset=True),
        Row("lm_head.dense", "transform.dense"),
        Row("lm_head.layer_norm", "transform.norm"),
        Row("lm_head.decoder.weight", "head.weight", whole=True),
        Row("lm_head.bias", "head.bias", whole=True),
    ),
    layers={"encoder": _layer("roberta")},
    copies={"lm_head.decoder.bias": "lm_head.bias"},
    prefix="roberta.",
    dropped=(r"roberta\.embeddings\.position_ids",),
    headed=("lm_head.", "roberta.pooler."),
    offset=lambda theirs: (
        (1 if theirs.get("pad_token_id") is None else theirs["pad_token_id"]) + 1
    ),  # the first position is the one after padding's
)

MODERNBERT = Architecture(
    model_type="modernbert",
    classes=("ModernBertForMaskedLM", "ModernBertModel"),
    family="encoder",
    settings=(
        Setting("hidden_size", "dim", 768),
        Setting("num_hidden_layers", "n_layers", 22),
        Setting("num_attention_heads", "n_heads", 12),
        Setting("intermediate_size", "ffn_dim", 1152),
        Setting("vocab_size", "vocab_size"),
        Setting("max_position_embeddings", "max_length", 8192),
        Setting("norm_eps", "norm_eps", 1e-5),
        Setting("tie_word_embeddings", "tie_embeddings", True),
        Setting("decoder_bias", "head_bias", True),
        # The head's activation is gelu whatever hidden_activation says, and ours is one for both.
        Setting("hidden_activation", "activation", "gelu", {"gelu": "geglu"}),
    ),
    constants={
        "position": "rotary",
        "norm": "layer",
        "norm_position": "pre",
        "embed_norm": True,
        "bias": False,
        "initialisation": "bert",
    },
    fixed={
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "classifier_activation": "gelu",
    },
    ignored=frozenset(
        {
            *("classifier_dropout", "classifier_pooling", "deterministic_flash_attn", "initializer_cutoff_factor"),
            *("sparse_pred_ignore_index", "sparse_prediction", "reference_compile", "repad_logits_with_grad"),
            *("position_embedding_type", "layer_norm_eps"),
        }
    ),
    dropouts=("mlp_dropout", "attention_dropout", "embedding_dropout"),
    special=special.MODERNBERT_KEYS,
    from_theirs=special.modernbert_from,
    to_theirs=special.modernbert_to,
    rows=(
        Row("model.embeddings.tok_embeddings", "embed"),
        Row("model.embeddings.norm", "encoder.embed_norm"),
        Row("model.final_norm", "encoder.norm"),
        Row("head.dense", "transform.dense"),
        Row("head.norm", "transform.norm"),
        Row("decoder", "head"),
    ),
    layers={
        "encoder": (
            Row("model.layers.{n}.attn_norm", "attention_norm"),
            Row("model.layers.{n}.attn.Wqkv", ("attention.query", "attention.key", "attention.value")),
            Row("model.layers.{n}.attn.Wo", "attention.out"),
            Row("model.layers.{n}.mlp_norm", "feed_forward_norm"),
            Row("model.layers.{n}.mlp.Wi", ("feed_forward.gate", "feed_forward.up")),
            Row("model.layers.{n}.mlp.Wo", "feed_forward.down"),
        )
    },
    prefix="model.",
    headed=("head.", "decoder."),
)
