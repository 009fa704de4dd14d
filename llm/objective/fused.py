"""The loss over a vocabulary in two passes over the scores, for GPUs.

What torch.compile makes of a softmax in float32 and its gradient takes three times as long as reading and writing the
scores does, and keeps a second tensor as large. Here the forward reads them once (Milakov and Gimelshein 2018,
arXiv:1805.02867), and the backward writes the gradient over them.

Written in Triton, which comes with torch where that is built for GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm.objective.loss import IGNORED

_BLOCK = 4096  # scores that a program looks at together
_WARPS = 8


def token_nats(logits: Tensor, labels: Tensor, n_outcomes: int, smoothing: float = 0.0) -> Tensor:
    """-log p(label) by a softmax in float32: [N, V or more], [N] -> [N], 0 where nothing is predicted.

    Its backward writes the gradient over `logits`, which nobody else may want any more, and serves once.

    Args:
        logits: scores, each row contiguous; those from `n_outcomes` on are not looked at, and their gradient is 0.
        labels: int64, IGNORED where nothing is predicted.
        n_outcomes: V, the size of the vocabulary.
        smoothing: share of the label that is spread over the whole vocabulary (Szegedy et al. 2016, section 7).
    """
    nats: Tensor = _Nats.apply(logits, labels, n_outcomes, smoothing)
    return nats


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, n_outcomes: int, smoothing: float) -> Tensor:
        from llm.objective.fused_kernels import normalise

        assert logits.stride(1) == 1
        nats, log_sums = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
        if len(logits):
            normalise[(len(logits),)](
                logits,
                labels,
                nats,
                log_sums,
                logits.stride(0),
                n_outcomes,
                smoothing,
                IGNORED=IGNORED,
                SMOOTHED=smoothing > 0,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
        ctx.save_for_backward(logits, labels, log_sums)
        ctx.n_outcomes, ctx.smoothing = n_outcomes, smoothing
        return nats

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        from llm.objective.fused_kernels import differentiate

        logits, labels, log_sums = ctx.saved_tensors
        if len(logits):
            differentiate[(len(logits),)](
                logits,
                labels,
                log_sums,
                gradients[0].contiguous(),
                logits.stride(0),
                logits.shape[1],
                ctx.n_outcomes,
                ctx.smoothing,
                IGNORED=IGNORED,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
        return logits, None, None, None
