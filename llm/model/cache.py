"""Keys and values of the tokens already seen, so that a new token costs one column of attention."""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer, [B, G, max_length, K], allocated when the first ones arrive.

    Only then are their shape, dtype and device known: under autocast, or with heads spread over devices, the
    configuration does not tell them.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of T new tokens, [B, G, T, K], and return all so far, without a copy."""
        if self.keys is None or self.values is None:
            batch, heads, _, width = keys.shape
            self.keys = keys.new_empty(batch, heads, self.max_length, width)
            self.values = values.new_empty(batch, heads, self.max_length, width)
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Cache:
    """The cache of a whole model: pass it to every forward, with only the tokens that are new.

    documents  [B, length], kept if the first forward was given documents (so, if prompts are padded)
    """

    def __init__(self, n_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.layers = [LayerCache(max_length) for _ in range(n_layers)]
        self.documents: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length
