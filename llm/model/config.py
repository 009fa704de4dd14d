"""The description of a Transformer, as `conf/model/*.yaml` writes it. No torch: it is checked before that loads."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

Count = Annotated[int, Gt(0)]


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder: causal self-attention and feed-forward blocks between an embedding and a vocabulary head.

    dim             width of the residual stream
    n_kv_heads      key/value heads, each shared by n_heads / n_kv_heads query heads (Ainslie et al. 2023,
                    arXiv:2305.13245); null = n_heads (multi-head), 1 = multi-query (Shazeer 2019, arXiv:1911.02150)
    head_dim        width of one head; null = dim / n_heads
    ffn_dim         hidden width of the feed-forward; null = 4 dim, and for swiglu, which has a third matrix, 8/3 dim
                    rounded up to a multiple of 64 (Shazeer 2020, arXiv:2002.05202, keeps the parameters equal)
    vocab_size      null = the tokenizer's
    max_length      context in tokens. Learned positions end there; the others have no end, but generation stops there
    position        rotary (Su et al. 2021, arXiv:2104.09864), learned, or sinusoidal (Vaswani et al. 2017,
                    arXiv:1706.03762)
    rope_theta      base of the rotary wavelengths, 2π to 2π·rope_theta positions
    norm            rms (Zhang and Sennrich 2019, arXiv:1910.07467) or layer (Ba et al. 2016, arXiv:1607.06450)
    norm_position   pre: x + f(norm(x)), and a last norm before the head; post: norm(x + f(x)) (Vaswani et al. 2017)
    activation      gelu; gelu_tanh, its approximation in GPT-2 (both Hendrycks and Gimpel 2016, arXiv:1606.08415);
                    swiglu; relu_squared (So et al. 2021, arXiv:2109.08668)
    qk_norm         normalise queries and keys per head, before the rotation (Henry et al. 2020, arXiv:2010.04245)
    bias            biases in the linear layers of the blocks and in layer norms; the head never has one
    dropout         on embeddings, attention weights and the output of both halves of a block
    tie_embeddings  the head's weight is the embedding's (Press and Wolf 2016, arXiv:1608.05859)
    initialisation  see llm.model.initialisation
    """

    dim: Count
    n_layers: Count
    n_heads: Count
    max_length: Count
    vocab_size: Count | None = None
    n_kv_heads: Count | None = None
    head_dim: Count | None = None
    ffn_dim: Count | None = None
    position: Literal["rotary", "learned", "sinusoidal"] = "rotary"
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    activation: Literal["gelu", "gelu_tanh", "swiglu", "relu_squared"] = "swiglu"
    qk_norm: bool = False
    bias: bool = False
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    tie_embeddings: bool = False
    initialisation: Literal["gpt2", "llama"] = "llama"

    def __post_init__(self) -> None:
        """Raise ValueError with every rule between keys that does not hold."""
        problems = self._problems()
        if problems:
            raise ValueError("\n".join(problems))

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
        if self.ffn_dim:
            return self.ffn_dim
        return -(-8 * self.dim // (3 * 64)) * 64 if self.activation == "swiglu" else 4 * self.dim

    def _problems(self) -> list[str]:
        counts = ("dim", "n_layers", "n_heads", "max_length", "vocab_size", "n_kv_heads", "head_dim", "ffn_dim")
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


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
