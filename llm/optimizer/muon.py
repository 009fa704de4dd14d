"""Muon: matrices of one shape are orthogonalised together and, of several processes, each matrix by one."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from llm.machine import multiplies_bfloat16
from llm.optimizer.closure import evaluated
from llm.reduce import Owned, n_copies, own_part, world_size

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero (Jordan et al. 2024)
_N_ITERATIONS = 5
_EPS = 1e-7
_ROOM = 2**25  # elements of whole matrices that a process has before it at once: 64 MiB as they travel


class _Round(NamedTuple):
    """Matrices that are worked on at once."""

    matrices: list[Tensor]
    owned: Owned


class Muon(Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024): torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but faster.

    A matrix is stepped by 0.2 sqrt(max(rows, columns)) times its orthogonal factor, AdamW's typical update size (Liu
    et al. 2025, arXiv:2502.16982). Of several processes each orthogonalises whole matrices, its share of the work,
    in rounds that bound what it holds of other processes' parts.
    """

    def __init__(
        self, matrices: Iterable[Tensor] | Iterable[dict[str, Any]], *, lr: float, weight_decay: float, momentum: float
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._plans: dict[int, tuple[list[int], list[_Round]]] = {}  # of each group: for which matrices, and the plan

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, runs first, under grad, and its value is returned."""
        result = evaluated(closure)
        for number, group in enumerate(self.param_groups):
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if matrices:
                self._step(matrices, group, self._plan(number, matrices))
        return result

    def _plan(self, number: int, matrices: list[Tensor]) -> list[_Round]:
        """That of the group of this number, made anew when other matrices of it have gradients."""
        ids = [id(matrix) for matrix in matrices]
        if number not in self._plans or self._plans[number][0] != ids:
            self._plans[number] = ids, plan(matrices)
        return self._plans[number][1]

    def _step(self, matrices: list[Tensor], group: dict[str, Any], rounds: list[_Round]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix, requires_grad=False)
        torch._foreach_lerp_(self._momenta(matrices), _gradients(matrices), 1 - momentum)
        torch._foreach_mul_([own_part(matrix) for matrix in matrices], 1 - lr * group["weight_decay"])
        for matrices, owned in rounds:
            given = [matrices[i] for i in owned.given]
            nesterov = torch._foreach_lerp(_gradients(given), self._momenta(given), momentum) if given else ()
            updates = owned.spread(orthogonalise(owned.collect(nesterov)))
            by_size: dict[int, list[tuple[Tensor, Tensor]]] = {}
            for matrix, update in zip(matrices, updates, strict=True):
                by_size.setdefault(max(matrix.shape), []).append((own_part(matrix), update))
            for size, pairs in by_size.items():
                weights, steps = zip(*pairs, strict=True)
                torch._foreach_add_(weights, steps, alpha=-lr * 0.2 * math.sqrt(size))

    def _momenta(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        return [own_part(self.state[matrix]["momentum_buffer"]) for matrix in matrices]


def _gradients(matrices: Sequence[Tensor]) -> list[Tensor]:
    return [own_part(matrix.grad) for matrix in matrices if matrix.grad is not None]


def plan(matrices: Sequence[Tensor]) -> list[_Round]:
    """Who works on which matrix, and when; it follows from shapes and layout alone, so all processes agree on it.

    What is worked on at once is bounded, whole and with the results that come from others, but for a matrix that is
    larger by itself.
    """
    owners = share_out([n_multiplications(matrix.shape) for matrix in matrices], world_size())
    rounds: dict[tuple[object, int], list[int]] = {}
    filled: dict[tuple[object, int], tuple[int, int]] = {}  # of each owner: its last round, elements in that
    # Shape after shape, so that those of one meet in a round.
    for i in sorted(range(len(matrices)), key=lambda i: sorted(matrices[i].shape)):
        matrix, mesh = matrices[i], getattr(matrices[i], "device_mesh", None)
        number, n_elements = filled.get((mesh, owners[i]), (0, 0))
        size = matrix.numel() * n_copies(matrix)
        if n_elements and n_elements + size > _ROOM:
            number, n_elements = number + 1, 0
        filled[mesh, owners[i]] = number, n_elements + size
        rounds.setdefault((mesh, number), []).append(i)
    return [
        _Round(
            [matrices[i] for i in round_],
            Owned([matrices[i] for i in round_], [owners[i] for i in round_], torch.bfloat16),
        )
        for round_ in rounds.values()
    ]


def traffic(matrices: Sequence[Tensor]) -> Counter[str]:
    """Bytes of a step by kind of collective, as `Owned.traffic` counts them; the matrices may be on the meta device."""
    counted: Counter[str] = Counter()
    if world_size() > 1:
        for _, owned in plan(matrices):
            kind, n_bytes = owned.traffic()
            counted[kind] += n_bytes
    return counted


def n_multiplications(shape: Sequence[int]) -> int:
    """Of one iteration on a matrix [r, c], r <= c: XXᵀ and its product with X r²c each, its square r³."""
    rows, columns = sorted(shape)
    return 2 * rows * rows * columns + rows**3


def share_out(costs: Sequence[int], n: int) -> list[int]:
    """Which of `n` processes does which job: the costliest first, each to whom has least to do (Graham 1969)."""
    loads = [(0, k) for k in range(n)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, owners[i] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[i], owners[i]))
    return owners


def orthogonalise(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The nearest semi-orthogonal matrix to each, about: its singular values become 0.7 to 1.2."""
    batches: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        batches.setdefault(tuple(sorted(matrix.shape)), []).append(i)
    results = list(matrices)
    for batch in batches.values():
        wide = [matrices[i] if matrices[i].shape[0] <= matrices[i].shape[1] else matrices[i].mT for i in batch]
        for i, result in zip(batch, newton_schulz(torch.stack(wide)), strict=True):
            results[i] = result if matrices[i].shape[0] <= matrices[i].shape[1] else result.mT
    return results


def newton_schulz(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz iterations on each of the matrices [N, r, c], r <= c."""
    a, b, c = _COEFFICIENTS
    x = matrices.to(_product_dtype(matrices.device))
    norms = torch.stack(torch._foreach_norm(list(x.unbind())))  # one by one: the same in a batch of any size
    x = x / norms.clamp(min=_EPS)[:, None, None]  # no singular value is above 1
    for _ in range(_N_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def _product_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16, unless this is a CPU that has no instructions for it: in float32 that takes a thirtieth of the time."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
