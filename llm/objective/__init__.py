"""Objectives: a head and a loss around a Transformer, each a LightningModule."""

from llm.objective.base import Objective
from llm.objective.causal_lm import CausalLM
from llm.objective.loss import Loss
from llm.objective.masked_lm import MaskedLM
from llm.objective.seq2seq import Seq2Seq

__all__ = ["CausalLM", "Loss", "MaskedLM", "Objective", "Seq2Seq"]
