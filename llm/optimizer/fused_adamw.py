"""AdamW's kernel, called directly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llm.optimizer.closure import evaluated
from llm.reduce import own_part


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), to the bit and with the same state.

    Its own step looks at every option of Adam's for every parameter, sorts them by device and dtype, and names itself
    for a profiler: of a small model that takes as long as the kernel. Of a parameter that is spread over processes only
    this process's part is seen, so that no operator has to ask how it is spread. No step hooks are called.

    Args:
        groups: of parameters of one dtype on one device.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, runs first, under grad, and its value is returned."""
        result = evaluated(closure)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step(parameters, group)
        return result

    step.hooked = True  # type: ignore[attr-defined]  # else torch wraps it in what looks for hooks and names it

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] or self._begun(parameter) for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            [own_part(parameter) for parameter in parameters],
            [own_part(parameter.grad) for parameter in parameters if parameter.grad is not None],
            [own_part(state["exp_avg"]) for state in states],
            [own_part(state["exp_avg_sq"]) for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _begun(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter that has made no step."""
        state: dict[str, Tensor] = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)  # bfloat16 counts to 256
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state
