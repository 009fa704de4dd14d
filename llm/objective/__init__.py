"""Objectives: a head and a loss around a Transformer, each a LightningModule."""

from llm.objective.base import Objective
from llm.objective.causal_lm import CausalLM
from llm.objective.classification import Classification, TokenClassification
from llm.objective.loss import Loss
from llm.objective.masked_lm import MaskedLM
from llm.objective.preference import Preference
from llm.objective.seq2seq import Seq2Seq
from llm.objective.span_extraction import SpanExtraction

__all__ = [
    "CausalLM",
    "Classification",
    "Loss",
    "MaskedLM",
    "Objective",
    "Preference",
    "Seq2Seq",
    "SpanExtraction",
    "TokenClassification",
]
