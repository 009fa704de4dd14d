"""Weights of a GGUF file, through transformers, which knows its quantisations and its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint.store import CheckpointError


def dequantised(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its config.json, and its weights in fp32.

    Raises:
        CheckpointError: if it cannot be read, or the libraries for it are missing.
    """
    try:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file}: needs transformers and gguf ({reason}) - pip install transformers gguf"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({str(error).partition(chr(10))[0]}) - copy it again") from error
    theirs = model.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):  # of the file, and no longer of these weights
        theirs.pop(key, None)
    return theirs, model.state_dict()
