"""Text from the model while it learns."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from llm.callback.loggers import tell
from llm.generate import complete
from llm.objective import Objective
from llm.reduce import from_first


class Sample(Callback):
    """Complete a few prompts after every validation and at the end, into `RUN/samples.txt` and the loggers.

    A decoder continues them. An encoder fills their masks, written as the tokenizer names them ([MASK]); without one it
    is asked for the next word. An encoder-decoder fills their spans (<extra_id_0>), or answers a prompt without any. A
    model that chooses from labels writes nothing.

    Draws from a generator of its own, seeded by the step: the run's generators, and so its losses, are not touched.

    Args:
        prompts: texts to complete; an empty one starts a document.
        max_new_tokens: length of each continuation.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens; null from all.
        top_p: draw from the smallest set of tokens that has this probability; null from all.
        seed: of the generator, together with the step.
    """

    def __init__(
        self,
        prompts: list[str],
        max_new_tokens: Annotated[int, Gt(0)] = 100,
        temperature: Annotated[float, Ge(0)] = 0.8,
        top_k: Annotated[int, Gt(0)] | None = None,
        top_p: Annotated[float, Interval(gt=0, le=1)] | None = 0.95,
        seed: int = 0,
    ) -> None:
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.seed = seed
        self._sampled_step = -1
        self.texts: list[str] = []  # the newest samples, prompts included

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what an earlier attempt wrote after the checkpoint that the run goes on from: it comes again."""
        file = _file(trainer)
        if not trainer.is_global_zero or not file.exists():
            return
        samples = re.split(r"^(?===== step \d+, sample \d+ ====$)", file.read_text(), flags=re.MULTILINE)
        kept = [text for text in samples[1:] if int(text.split(maxsplit=3)[2].rstrip(",")) <= self._sampled_step]
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, file)

    def state_dict(self) -> dict[str, Any]:
        """The step of the newest samples."""
        return {"sampled_step": self._sampled_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The other half of `state_dict`."""
        self._sampled_step = state_dict["sampled_step"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, and add to the file."""
        if not trainer.sanity_checking:
            self._write_samples(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run without validation ends with samples all the same."""
        if self._sampled_step != trainer.global_step:
            self._write_samples(trainer, pl_module)

    def _write_samples(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Objective)
        self._sampled_step = trainer.global_step
        if pl_module.answers not in ("vocabulary", "preference"):
            return
        self.texts = self._complete_prompts(trainer, pl_module)  # by every process: each may hold a part of the weights
        if not trainer.is_global_zero:
            return
        with open(_file(trainer), "a") as file:
            for number, text in enumerate(self.texts, 1):
                file.write(f"==== step {trainer.global_step}, sample {number} ====\n{text}\n\n")
        tell(trainer, lambda logger: self._show(logger, trainer.global_step))

    def _show(self, logger: Any, step: int) -> None:
        if isinstance(logger, WandbLogger):
            rows = [[str(step), text] for text in self.texts]
            logger.log_text("samples", columns=["step", "text"], data=rows, step=step)
        elif isinstance(logger, TensorBoardLogger):
            for number, text in enumerate(self.texts, 1):
                logger.experiment.add_text(f"sample/{number}", f"```\n{text}\n```", step)

    def _complete_prompts(self, trainer: L.Trainer, objective: Objective) -> list[str]:
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        generator = torch.Generator(objective.device).manual_seed(self.seed + trainer.global_step)
        with trainer.precision_plugin.forward_context():
            return complete(
                objective.network,
                tokenizer,
                self.prompts,
                self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                generator=generator,
                agree=from_first,
            )


def _file(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "samples.txt"
