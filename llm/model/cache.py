"""Keys and values of the tokens already seen, so that a new token costs one column of attention."""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer, [B, G, max_length, K], allocated when the first ones arrive.

    Only then are their shape, dtype and device known: under autocast, or with heads spread over devices, the
    configuration does not tell them.

    memory  the cross-attention's keys and values of the source, [B, G, S, K] each
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.memory: tuple[Tensor, Tensor] | None = None

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

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]
        if self.memory is not None:
            self.memory = self.memory[0][rows], self.memory[1][rows]


class Cache:
    """The cache of a decoder: pass it to every forward, with only the tokens that are new.

    documents         [B, length], kept if the first forward was given documents (so, if prompts are padded)
    source_documents  [B, S], of the source that the first forward was given
    """

    def __init__(self, n_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.layers = [LayerCache(max_length) for _ in range(n_layers)]
        self.documents: Tensor | None = None
        self.source_documents: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length

    @property
    def has_memory(self) -> bool:
        """Whether a source has been seen, so that none needs to be given."""
        return self.layers[0].memory is not None

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was (int64 [B']): the beams of a search change places."""
        for layer in self.layers:
            layer.select(rows)
        if self.documents is not None:
            self.documents = self.documents[rows]
        if self.source_documents is not None:
            self.source_documents = self.source_documents[rows]
