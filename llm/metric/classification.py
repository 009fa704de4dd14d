"""Accuracy and its like from a confusion matrix, as scikit-learn has them."""

from __future__ import annotations

import math

import numpy as np


def confusion_metrics(confused: np.ndarray) -> dict[str, float]:
    """From how often label i was taken for label j, int64 [n, n].

    macro_f1  the mean over the labels that are in the truth or in the predictions of 2TP / (2TP + FP + FN)
    mcc       Matthews' correlation for any number of labels (Gorodkin 2004); 0 where one side has a single label
    """
    n = int(confused.sum())
    right = confused.diagonal().astype(np.float64)
    truth, found = confused.sum(1).astype(np.float64), confused.sum(0).astype(np.float64)
    seen = (truth + found) > 0
    f1 = 2 * right[seen] / (truth + found)[seen]
    spread = (n**2 - float(found @ found)) * (n**2 - float(truth @ truth))
    mcc = (right.sum() * n - float(truth @ found)) / math.sqrt(spread) if spread > 0 else 0.0
    return {"macro_f1": float(f1.mean()) if seen.any() else math.nan, "mcc": float(mcc)}
