"""Keys and values of the tokens already seen, so that a new token costs one column of attention."""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer, [B, G, max_length, K], allocated when the first ones arrive.

    Their shape, dtype and device are then known: under autocast or with heads spread over devices, the
    configuration does not tell them.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write [B, G, T, K] at `start` and return everything up to their end, without a copy."""
        batch, heads, length, width = keys.shape
        if self.keys is None or self.values is None:
            self.keys = keys.new_empty(batch, heads, self.max_length, width)
            self.values = values.new_empty(batch, heads, self.max_length, width)
        end = start + length
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


class Cache:
    """The cache of a whole model: pass it to every forward, with only the tokens that are new.

    length     tokens seen so far
    documents  [B, length], kept if the first forward was given documents (so, if prompts are padded)
    """

    def __init__(self, n_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.layers = [LayerCache(max_length) for _ in range(n_layers)]
        self.length = 0
        self.documents: Tensor | None = None
