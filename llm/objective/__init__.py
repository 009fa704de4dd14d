"""Objectives: a head and a loss around a Transformer, each a LightningModule."""

from llm.objective.base import Objective
from llm.objective.causal_lm import CausalLM
from llm.objective.loss import Loss

__all__ = ["CausalLM", "Loss", "Objective"]
