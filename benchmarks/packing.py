"""Packed rows against padded ones: the same documents, the same model, the same loop."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.contest import Spread
from benchmarks.contestants.ours import ours
from benchmarks.material import apart, n_real, save_steps, steps_of, tokenizer_of
from benchmarks.measure import Bar, Row, Session
from llm.objective.loss import IGNORED

STEPS = 10


def packed_against_padded(session: Session, run: Sequence[str], *, rows: int, of_theory: float = 1.0) -> list[Row]:
    """The rows of a measure over a run of packed rows.

    Args:
        run: overrides of a run whose rows hold several documents.
        rows: of a packed step.
        of_theory: the part of the padding avoided that the gain has to reach.
    """
    n_steps = session.n_steps(STEPS)
    small = ["model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.ffn_dim=64"] if session.smoke else []
    run = [
        *run,
        *small,
        f"data.batch_size={rows}",
        "data.micro_batch_size=null",
        f"trainer.max_steps={n_steps}",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
    ]
    packed = steps_of(run, n_steps)
    fillers = {"labels": IGNORED, "tokens": tokenizer_of(run).pad_id}
    padded = [apart(step, fillers) for step in packed]
    work = n_real(packed)
    assert work == n_real(padded), "a document was lost on the way"
    outcome = session.compete(
        "packing",
        [
            ours("packed", run, n_steps, None, work=work),
            ours("padded", run, n_steps, None, steps=save_steps(padded, session.folder / "padded.pt"), work=work),
        ],
        steps=STEPS,
    )
    fills = [sum(work) / sum(step[0]["tokens"].numel() for step in steps) for steps in (packed, padded)]
    theory = of_theory * fills[0] / fills[1]
    gain = outcome.ratio("packed", "padded")
    note = f"{100 * fills[0]:.0f} % of packed and {100 * fills[1]:.0f} % of padded positions hold a token"
    return [
        Row("packed / padded", "x", gain, Bar(">=", round(theory, 3)), note=note, figures=outcome.figures()),
        *(Row(name, "real tokens/CPU-s", Spread.of(outcome.rates(name))) for name in ("packed", "padded")),
    ]
