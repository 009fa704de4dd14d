"""What an architecture of Hugging Face is made of: its settings and its weights, under their names and under ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm.model import TransformerConfig

REQUIRED = object()  # a setting without which config.json cannot be understood


@dataclass(frozen=True)
class Setting:
    """A key of config.json that is a key of ours.

    default  what transformers takes where config.json does not say
    values   theirs -> ours, where they are spelt differently; of two spellings the first is written
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Row:
    """A module whose weight and bias are ours.

    theirs      name, `{n}` for the layer
    ours        name of ours, or those that theirs holds one after the other along its outputs
    transposed  whether its matrix is [inputs, outputs]
    whole       whether the names are those of tensors, with .weight or .bias
    offset      whether its first rows are for no position; see `Architecture.offset`
    flat        whether theirs is [1, N] and ours [N]
    """

    theirs: str
    ours: str | tuple[str, ...]
    transposed: bool = False
    whole: bool = False
    offset: bool = False
    flat: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Ours, always as several."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


Settings = dict[str, Any]
Names = frozenset[str]


@dataclass(frozen=True)
class Architecture:
    """One `model_type`.

    model_type   as config.json has it
    classes      the class that is written into config.json, and those that are read
    family       of ours
    settings     keys that have a key of ours
    constants    what follows for ours from the architecture alone
    fixed        keys of theirs that must have this value; null and absent count as it. They are written too
    ignored      keys that say nothing about what the network computes
    dropouts     keys for which we have one; the first is read
    special      keys that `from_theirs` reads and `to_theirs` writes, as no single key of ours answers to them
    rows         weights outside of layers
    layers       (name of ours for a stack, rows of one layer)
    copies       names of a tied weight that older files also hold -> the name that is read
    prefix       what a body saved without a head lacks in front of its names
    dropped      regular expressions of names that hold nothing trained
    headed       their names that are a head's: those may be left over, and ours may be missing
    offset       how many first rows of a position table are for no position
    """

    model_type: str
    classes: tuple[str, ...]
    family: str
    settings: tuple[Setting, ...]
    constants: Settings
    rows: tuple[Row, ...]
    layers: Mapping[str, tuple[Row, ...]]
    fixed: Settings = field(default_factory=dict)
    ignored: Names = frozenset()
    dropouts: tuple[str, ...] = ()
    special: Names = frozenset()
    from_theirs: Callable[[Settings], Settings] = lambda theirs: {}
    to_theirs: Callable[[TransformerConfig], Settings] = lambda config: {}
    copies: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    dropped: tuple[str, ...] = ()
    headed: tuple[str, ...] = ()
    offset: Callable[[Settings], int] = lambda theirs: 0

    def expanded(self, config: TransformerConfig) -> list[Row]:
        """All rows, those of layers once for each layer."""
        n_layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
        return [
            *self.rows,
            *(
                Row(
                    row.theirs.format(n=layer, gate="wi_0", up="wi_1" if config.gated else "wi"),
                    tuple(f"{stack}.blocks.{layer}.{part}" for part in row.parts),
                    row.transposed,
                )
                for stack, rows in self.layers.items()
                for layer in range(n_layers[stack])
                for row in rows
            ),
        ]
