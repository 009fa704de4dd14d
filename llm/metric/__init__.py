"""What a run is measured by."""

from llm.metric.classification import confusion_metrics
from llm.metric.compression import bits_per_byte, gzip_bits_per_byte, unigram_bits_per_byte, unigram_nats
from llm.metric.interval import wilson_interval
from llm.metric.text import METRICS, Score, mean
from llm.metric.utilisation import model_flops_utilisation, peak_flops

__all__ = [
    "METRICS",
    "Score",
    "bits_per_byte",
    "confusion_metrics",
    "gzip_bits_per_byte",
    "mean",
    "model_flops_utilisation",
    "peak_flops",
    "unigram_bits_per_byte",
    "unigram_nats",
    "wilson_interval",
]
