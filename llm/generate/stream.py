"""A text as it is written."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llm.tokenizer import Tokenizer


class Stream:
    """Give it to `generate` as what processes agree by: of the one text that is being written, `write` gets what is new
    with every token. Half a character waits for the other half."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self.text = ""

    def __call__(self, new: Tensor) -> Tensor:
        self._ids.append(int(new[0, 0]))
        text = self._tokenizer.decode(self._ids, skip_special=True)
        if not text.endswith("\ufffd"):
            self._write(text[len(self.text) :])
            self.text = text
        return new
