"""The description of a Transformer, as `conf/model/*.yaml` writes it. No torch: it is checked before that loads."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

Count = Annotated[int, Gt(0)]


@dataclass(frozen=True)
class RopeScaling:
    """Rotary wavelengths stretched for a longer context than they were trained on, as Llama 3.1 did (Grattafiori et
    al. 2024, arXiv:2407.21783): those longer than original_length / low_freq_factor by `factor`, those shorter than
    original_length / high_freq_factor not at all, the ones between in part.
    """

    factor: Annotated[float, Gt(0)]
    low_freq_factor: Annotated[float, Gt(0)]
    high_freq_factor: Annotated[float, Gt(0)]
    original_length: Count

    def __post_init__(self) -> None:
        """Raise ValueError unless there is room between the two factors."""
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor = {self.low_freq_factor}: must be below high_freq_factor = "
                f"{self.high_freq_factor}; Llama 3.1 has 1 and 4"
            )


@dataclass(frozen=True)
class TransformerConfig:
    """Blocks of attention and feed-forward between an embedding and a vocabulary head, in one of three families:

    decoder          each token sees those before it (Radford et al. 2018)
    encoder          each token sees all; a transform before the head (Devlin et al. 2019, arXiv:1810.04805)
    encoder_decoder  a decoder that also looks at what an encoder made of a source (Vaswani et al. 2017)

    dim             width of the residual stream
    n_layers        blocks; of an encoder_decoder in each stack, unless n_decoder_layers says otherwise
    n_kv_heads      key/value heads, each shared by n_heads / n_kv_heads query heads (Ainslie et al. 2023,
                    arXiv:2305.13245); null = n_heads (multi-head), 1 = multi-query (Shazeer 2019, arXiv:1911.02150)
    head_dim        width of one head; null = dim / n_heads
    ffn_dim         hidden width of the feed-forward; null = 4 dim, and for gated ones, which have a third matrix, 8/3
                    dim rounded up to a multiple of 64 (Shazeer 2020, arXiv:2002.05202, keeps the parameters equal)
    vocab_size      null = the tokenizer's
    max_length      context in tokens. Learned positions end there; the others have no end, but generation stops there
    position        rotary (Su et al. 2021, arXiv:2104.09864), learned, sinusoidal (Vaswani et al. 2017,
                    arXiv:1706.03762), or relative: a learned bias on the scores by distance, one table for all layers
                    of a stack (Raffel et al. 2020, arXiv:1910.10683), in relative_buckets up to relative_distance
    rope_theta      base of the rotary wavelengths, 2π to 2π·rope_theta positions; local_rope_theta in layers with a
                    window, null = the same
    rope_scaling    see RopeScaling
    n_segments      vectors for the parts of a pair, added to an encoder's embedding (Devlin et al. 2019); 0 = none. An
                    encoder_decoder has them to go on from such an encoder: its source is all of the first part
    window          a token sees so many tokens, itself among them (Beltagy et al. 2020, arXiv:2004.05150); in an
                    encoder window // 2 on each side
    global_every    layers 0, n, 2n … see everything, only the others the window (Warner et al. 2024,
                    arXiv:2412.13663); null = all have the window
    norm            rms (Zhang and Sennrich 2019, arXiv:1910.07467) or layer (Ba et al. 2016, arXiv:1607.06450)
    norm_position   pre: x + f(norm(x)), and a last norm before the head; post: norm(x + f(x)) (Vaswani et al. 2017)
    embed_norm      a norm right after the embeddings; with pre, the first block then has none before its attention
    activation      gelu; gelu_tanh, its approximation in GPT-2 (both Hendrycks and Gimpel 2016, arXiv:1606.08415);
                    relu; silu; relu_squared (So et al. 2021, arXiv:2109.08668); gated: swiglu, geglu, geglu_tanh
    qk_norm         normalise queries and keys per head, before the rotation (Henry et al. 2020, arXiv:2010.04245)
    bias            biases in the linear layers of the blocks and in layer norms; qkv: only in those three projections
    scale_attention divide scores by sqrt(head_dim); T5 has that in its initial weights instead
    scale_logits    divide hidden states by sqrt(dim) before the head, as T5 with its tied one
    dropout         on embeddings, attention weights and the output of each part of a block
    tie_embeddings  the head's weight is the embedding's (Press and Wolf 2016, arXiv:1608.05859)
    head_bias       a bias in the vocabulary head
    next_sentence   a pooler and a classifier of pairs on the first token (Devlin et al. 2019)
    n_labels        in the place of the vocabulary head a classifier of so many labels; label_of: of the text, on what a
                    pooler makes of its first token, or of each token (Devlin et al. 2019)
    initialisation  see llm.model.initialisation
    parametrization what of that, and of the learning rates, changes with the width: see llm.model.parametrization
    base_dim        with mup the dim that hyper-parameters were chosen at, of a network that was narrower in all its
                    widths. A head_dim that is given was the same there (heads are added), else n_heads was
    base_ffn_dim    ffn_dim at base_dim; null = in the same proportion to dim
    """

    dim: Count
    n_layers: Count
    n_heads: Count
    max_length: Count
    family: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    n_decoder_layers: Count | None = None
    vocab_size: Count | None = None
    n_kv_heads: Count | None = None
    head_dim: Count | None = None
    ffn_dim: Count | None = None
    position: Literal["rotary", "learned", "sinusoidal", "relative"] = "rotary"
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    local_rope_theta: Annotated[float, Gt(0)] | None = None
    rope_scaling: RopeScaling | None = None
    relative_buckets: Annotated[int, Ge(4)] = 32
    relative_distance: Annotated[int, Ge(4)] = 128
    n_segments: Annotated[int, Ge(0)] = 0
    window: Count | None = None
    global_every: Count | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    embed_norm: bool = False
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "relu_squared", "swiglu", "geglu", "geglu_tanh"] = "swiglu"
    qk_norm: bool = False
    bias: bool | Literal["qkv"] = False
    scale_attention: bool = True
    scale_logits: bool = False
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    tie_embeddings: bool = False
    head_bias: bool = False
    next_sentence: bool = False
    n_labels: Annotated[int, Ge(2)] | None = None
    label_of: Literal["text", "token"] = "text"
    initialisation: Literal["gpt2", "llama", "bert", "t5", "vaswani"] = "llama"
    parametrization: Literal["standard", "mup"] = "standard"
    base_dim: Count | None = None
    base_ffn_dim: Count | None = None

    def __post_init__(self) -> None:
        """Raise ValueError with every rule between keys that does not hold."""
        problems = self._problems() or [
            *self._problems_of_family(),
            *self._problems_of_position(),
            *self._problems_of_parametrization(),
        ]
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder; 0 in an encoder."""
        return 0 if self.family == "encoder" else self.n_decoder_layers or self.n_layers

    @property
    def encoder_layers(self) -> int:
        """Blocks of the encoder; 0 in a decoder."""
        return 0 if self.family == "decoder" else self.n_layers

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a third matrix."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def kv_heads(self) -> int:
        """What n_kv_heads comes to."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """What head_dim comes to."""
        return self.head_dim or self.dim // self.n_heads

    @property
    def ffn_width(self) -> int:
        """What ffn_dim comes to."""
        return self.ffn_dim or self._ffn_width_at(self.dim)

    @property
    def growth(self) -> float:
        """How many times wider than at base_dim."""
        return self.dim / (self.base_dim or self.dim)

    @property
    def base_head_width(self) -> int:
        """What head_dim came to at base_dim."""
        return self.head_dim or (self.base_dim or self.dim) // self.n_heads

    @property
    def base_ffn_width(self) -> float:
        """What ffn_dim came to at base_dim."""
        if self.base_ffn_dim:
            return self.base_ffn_dim
        return self.ffn_dim / self.growth if self.ffn_dim else self._ffn_width_at(self.base_dim or self.dim)

    def has_window(self, layer: int) -> bool:
        """Whether block `layer` of a stack sees only the window."""
        return self.window is not None and (self.global_every is None or layer % self.global_every != 0)

    def _ffn_width_at(self, dim: int) -> int:
        return -(-8 * dim // (3 * 64)) * 64 if self.gated else 4 * dim

    def _problems(self) -> list[str]:
        counts = ["dim", "n_layers", "n_heads", "max_length", "vocab_size", "n_kv_heads", "head_dim", "ffn_dim"]
        counts += ["n_decoder_layers", "window", "global_every", "base_dim", "base_ffn_dim"]
        problems = [
            f"model.{key} = {value}: must be at least 1"
            for key in counts
            if (value := getattr(self, key)) is not None and value < 1
        ]
        if problems:
            return problems  # the rules below divide by these
        if self.head_dim is None and self.dim % self.n_heads:
            problems.append(
                f"model.n_heads = {self.n_heads}: must divide model.dim = {self.dim}; "
                f"take one of {_divisors(self.dim)}, or set model.head_dim"
            )
        elif self.position == "rotary" and self.head_width % 2:
            problems.append(
                f"model.head_dim = {self.head_width}: must be even, as rotary positions turn pairs of channels; "
                "change model.head_dim or model.n_heads, or take model.position=learned"
            )
        if self.n_heads % self.kv_heads:
            problems.append(
                f"model.n_kv_heads = {self.n_kv_heads}: must divide model.n_heads = {self.n_heads}, "
                f"each key/value head serving as many queries; take one of {_divisors(self.n_heads)}"
            )
        if self.position == "sinusoidal" and self.dim % 2:
            problems.append(
                f"model.dim = {self.dim}: must be even, as sinusoidal positions are pairs of sine and cosine; "
                f"take {self.dim + 1}"
            )
        return problems

    def _problems_of_family(self) -> list[str]:
        """Keys that would do nothing in this family."""
        only = {
            "n_decoder_layers": ("encoder_decoder",),
            "n_segments": ("encoder", "encoder_decoder"),
            "next_sentence": ("encoder",),
            "n_labels": ("encoder",),
            "window": ("encoder", "decoder"),
        }
        if self.next_sentence and self.n_labels:
            return [
                f"model.n_labels = {self.n_labels}: a classifier has no other heads; set model.next_sentence to false"
            ]
        if self.next_sentence and self.n_segments == 1:
            return ["model.n_segments = 1: model.next_sentence tells two parts apart; set it to 2, or to 0 for none"]
        return [
            f"model.{key} = {getattr(self, key)}: there is none in model.family={self.family}, only in "
            f"{' and '.join(families)}; leave the key out"
            for key, families in only.items()
            if getattr(self, key) and self.family not in families
        ]

    def _problems_of_position(self) -> list[str]:
        """Keys that would do nothing beside the others."""
        problems = []
        if self.global_every is not None and self.window is None:
            problems.append(
                f"model.global_every = {self.global_every}: without model.window all layers see everything; set it too"
            )
        for key in ("rope_scaling", "local_rope_theta"):
            if getattr(self, key) is not None and self.position != "rotary":
                problems.append(
                    f"model.{key} = {getattr(self, key)}: is for model.position=rotary, not {self.position}; "
                    "leave it null"
                )
        if self.local_rope_theta is not None and self.window is None:
            problems.append(
                f"model.local_rope_theta = {self.local_rope_theta}: is for layers with a window; set model.window, "
                "or model.rope_theta for all layers"
            )
        if self.position == "relative" and self.relative_distance <= self.relative_buckets // 2:
            problems.append(
                f"model.relative_distance = {self.relative_distance}: must be more than half of "
                f"model.relative_buckets = {self.relative_buckets}, which the nearest tokens have each for itself"
            )
        return problems

    def _problems_of_parametrization(self) -> list[str]:
        """A base without something to scale from it, and the other way round."""
        if self.parametrization == "standard":
            return [
                f"model.{key} = {getattr(self, key)}: does nothing under model.parametrization=standard; "
                "set that to mup, or leave the key null"
                for key in ("base_dim", "base_ffn_dim")
                if getattr(self, key) is not None
            ]
        if self.base_dim is None:
            return [
                "model.base_dim = None: model.parametrization=mup scales from the width that hyper-parameters were "
                "chosen at; set it to that dim"
            ]
        if self.head_dim is None and self.base_dim % self.n_heads:
            return [
                f"model.base_dim = {self.base_dim}: had no model.n_heads = {self.n_heads} heads; set model.head_dim = "
                f"{self.head_width} if heads were added since, or take a multiple of model.n_heads"
            ]
        return []


@dataclass(frozen=True)
class Pretrained:
    """The model whose weights `init_from` names, but for what is given here; null is as it was.

    dropout, max_length   as in TransformerConfig
    """

    dropout: Annotated[float, Ge(0), Lt(1)] | None = None
    max_length: Count | None = None

    def of(
        self, weights: TransformerConfig, n_labels: int | None, label_of: Literal["text", "token"] = "text"
    ) -> TransformerConfig:
        """That of these weights, with a head for `n_labels` labels of texts or of tokens, or for the vocabulary."""
        given = {"dropout": self.dropout, "max_length": self.max_length}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        changes |= {"n_labels": n_labels, "label_of": label_of}
        return replace(weights, **changes, next_sentence=weights.next_sentence and n_labels is None)


def node_of(config: TransformerConfig) -> dict[str, Any]:
    """The `model` node of a config.yaml."""
    node: dict[str, Any] = {"_target_": "llm.model.TransformerConfig"} | asdict(config)
    if config.rope_scaling is not None:
        node["rope_scaling"] = {"_target_": "llm.model.RopeScaling"} | node["rope_scaling"]
    return node


def config_from(node: Mapping[str, Any]) -> TransformerConfig:
    """The configuration that the `model` node of a config.yaml describes."""
    values = {key: value for key, value in node.items() if key != "_target_"}
    if values.get("rope_scaling") is not None:
        scaling = dict(values["rope_scaling"])
        scaling.pop("_target_", None)
        values["rope_scaling"] = RopeScaling(**scaling)
    return TransformerConfig(**values)


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
