"""What answers are worth while the model learns to give them."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Annotated, Any

import lightning as L
from annotated_types import Ge, Gt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from llm.data import Supervised
from llm.data.supervised import Read, examples
from llm.generate import answer
from llm.generate.decode import as_chosen
from llm.metric import METRICS
from llm.objective import Objective
from llm.reduce import from_first, gather_objects, is_spread, rank, world_size


class Evaluate(Callback):
    """After every validation the model answers held-out rows, and the answers are scored: `val/bleu` and its like, in
    the metrics, in the loggers, and for `callback.checkpoint.monitor`.

    Each row is answered once, by one process; where weights are spread over processes, by all together. The answers are
    gathered in the order of the rows, so that scores are the same for any number of processes.

    Args:
        metrics: names in llm.metric.METRICS.
        n_rows: the first held-out examples; null: all.
        max_new_tokens: of an answer.
        n_beams: more than 1 search for the likeliest answer.
        batch_size: rows answered at once, by each process.
    """

    def __init__(
        self,
        metrics: list[str],
        n_rows: Annotated[int, Gt(0)] | None = 200,
        max_new_tokens: Annotated[int, Gt(0)] = 100,
        n_beams: Annotated[int, Ge(1)] = 1,
        batch_size: Annotated[int, Gt(0)] = 32,
    ) -> None:
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics:
            raise ValueError(f"callback.evaluate.metrics={metrics}: must be some of {', '.join(METRICS)}")
        self.metrics = metrics
        self.n_rows = n_rows
        self.max_new_tokens = max_new_tokens
        self.n_beams = n_beams
        self.batch_size = batch_size
        self._reads: list[Read] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Which task it is. Raises MisconfigurationException for one whose answers are not written."""
        tasks = trainer.datamodule.tasks  # type: ignore[attr-defined]
        written = [task for task in tasks.values() if isinstance(task, Supervised) and task.answers == "vocabulary"]
        if len(tasks) != 1 or not written:
            raise MisconfigurationException(
                f"callback.evaluate: scores written answers, of one task; data.tasks has {', '.join(tasks)} - "
                "remove it with ~callback.evaluate"
            )
        self._task = written[0]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answer, score and log."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, Objective)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self._reads is None:
            kept = islice(examples(self._task, data.held_out(), Counter()), self.n_rows)
            self._reads = [read for read, _ in kept]
        texts = self._answers(trainer, pl_module, data.tokenizer)
        references = [self._task.references(read) for read in self._reads]
        scores = [METRICS[name](texts, references, 0) for name in self.metrics]
        values = {f"val/{name}": score.value for found in scores for name, score in found.items()}
        pl_module.log_dict(values, logger=False)

    def _answers(self, trainer: L.Trainer, objective: Objective, tokenizer: Any) -> list[str]:
        assert self._reads is not None
        together = is_spread(objective.network)
        mine = slice(None) if together else slice(rank(), None, world_size())
        prompts = [self._task.prompt_of(read, tokenizer) for read in self._reads[mine]]
        with trainer.precision_plugin.forward_context():
            texts = answer(
                objective.network,
                tokenizer,
                prompts,
                self.max_new_tokens,
                batch_size=self.batch_size,
                n_beams=self.n_beams,
                agree=from_first if together else as_chosen,
            )
        if not together:
            shares = gather_objects(texts)
            texts = [shares[n % len(shares)][n // len(shares)] for n in range(len(self._reads))]
        return [text.strip() for text in texts]
