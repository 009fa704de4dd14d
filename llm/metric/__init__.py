"""What a run is measured by."""

from llm.metric.classification import confusion_metrics
from llm.metric.compression import (
    bits_per_byte,
    gzip_bits_per_byte,
    perplexities,
    perplexity,
    unigram_bits_per_byte,
    unigram_nats,
)
from llm.metric.interval import wilson_interval
from llm.metric.score import Score, bootstrapped, mean
from llm.metric.text import METRICS, check_installed
from llm.metric.utilisation import model_flops_utilisation

__all__ = [
    "METRICS",
    "Score",
    "bits_per_byte",
    "bootstrapped",
    "check_installed",
    "confusion_metrics",
    "gzip_bits_per_byte",
    "mean",
    "model_flops_utilisation",
    "perplexities",
    "perplexity",
    "unigram_bits_per_byte",
    "unigram_nats",
    "wilson_interval",
]
