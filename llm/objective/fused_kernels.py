"""The kernels of `llm.objective.fused`: one program for each row of scores. Needs Triton, so it is imported lazily."""

from typing import Any

import triton
import triton.language as tl

_LEAST: Any = tl.constexpr(-1.0e30)  # of no score: its exponential is 0 beside any other


@triton.jit
def normalise(  # type: ignore[no-untyped-def]
    logits,
    labels,
    nats,
    log_sums,
    stride,
    n_outcomes,
    smoothing,
    IGNORED: tl.constexpr,  # noqa: N803
    SMOOTHED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """log Σ exp of a row, and the loss of its label. A row without a label is not read."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    if label == IGNORED:
        tl.store(nats + row, 0.0)
        tl.store(log_sums + row, 0.0)
        return
    logits += row * stride
    peaks = tl.full((BLOCK,), _LEAST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_outcomes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n_outcomes
        scores = tl.load(logits + at, mask=inside, other=_LEAST).to(tl.float32)
        higher = tl.maximum(peaks, scores)
        sums = sums * tl.exp(peaks - higher) + tl.exp(scores - higher)
        peaks = higher
        if SMOOTHED:
            plain += tl.where(inside, scores, 0.0)
    peak = tl.max(peaks, axis=0)
    log_sum = peak + tl.log(tl.sum(sums * tl.exp(peaks - peak), axis=0))
    nat = log_sum - (1.0 - smoothing) * tl.load(logits + label).to(tl.float32)
    if SMOOTHED:
        nat -= smoothing * tl.sum(plain, axis=0) / n_outcomes
    tl.store(nats + row, nat)
    tl.store(log_sums + row, log_sum)


@triton.jit
def differentiate(  # type: ignore[no-untyped-def]
    logits,
    labels,
    log_sums,
    gradients,
    stride,
    width,
    n_outcomes,
    smoothing,
    IGNORED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """(p - target) times the gradient of the row's loss, written over the scores; 0 beyond the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    log_sum = tl.load(log_sums + row)
    gradient = tl.load(gradients + row)
    gradient = tl.where(label == IGNORED, 0.0, gradient)
    logits += row * stride
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        scores = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        target = tl.where(at == label, 1.0 - smoothing, 0.0) + smoothing / n_outcomes
        change = (tl.exp(tl.minimum(scores - log_sum, 0.0)) - target) * gradient
        change = tl.where((at < n_outcomes) & (label != IGNORED), change, 0.0)
        tl.store(logits + at, change, mask=inside)
