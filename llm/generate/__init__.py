"""What a model writes: continuations, answers, filled masks and filled spans."""

from llm.generate.answer import answer, room_for_prompt, until
from llm.generate.beam import beam_search
from llm.generate.decode import choose, generate
from llm.generate.fill import Candidate, fill_mask, fill_spans
from llm.generate.text import complete, continue_text

__all__ = [
    "Candidate",
    "answer",
    "beam_search",
    "choose",
    "complete",
    "continue_text",
    "fill_mask",
    "fill_spans",
    "generate",
    "room_for_prompt",
    "until",
]
