"""What Lightning calls in every step, called directly.

Lightning asks every callback for every hook, whether it has one or not, each in a profiler's context; a backward and an
optimizer step go through closures and plugins that scale losses and clip. That takes longer than a small model's step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

Hook = Callable[..., Any]


class Hooks:
    """`hooks(name, …)` calls the hook `name` of every callback that has one of its own, then the module's."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._callbacks: list[Callback] = []
        self._own: dict[str, list[Hook]] = {}

    def __call__(self, name: str, *arguments: Any) -> None:
        """`self.log` of Lightning asks in which hook it is called."""
        hooks = self._hooks(name)
        if not hooks:
            return
        attributes = self._module.__dict__  # nn.Module's own way of setting one costs microseconds
        before, attributes["_current_fx_name"] = attributes["_current_fx_name"], name
        for hook in hooks:
            hook(*arguments)
        attributes["_current_fx_name"] = before

    def _hooks(self, name: str) -> list[Hook]:
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        if callbacks != self._callbacks:
            self._callbacks, self._own = list(callbacks), {}
        if name not in self._own:
            given = self._trainer, self._module
            theirs = [partial(hook, *given) for callback in callbacks for hook in _own(callback, Callback, name)]
            self._own[name] = [*theirs, *_own(self._module, L.LightningModule, name)]
        return self._own[name]


def _own(owner: object, base: type, name: str) -> list[Hook]:
    """The hook `name` of `owner`; none if that is the one of `base`, which does nothing."""
    hook: Hook = getattr(owner, name)
    return [] if getattr(hook, "__func__", None) is getattr(base, name) else [hook]


class Hooked:
    """What the strategies share: hooks without detours. Before them in the order of base classes, this answers first.

    Losses are not scaled: fp16 is refused before anything starts.
    """

    lightning_module: L.LightningModule | None
    pre_backward: Callable[[Tensor], None]
    post_backward: Callable[[Tensor], None]
    _hooks: Hooks | None = None

    @property
    def hooks(self) -> Hooks:
        """Of the trainer that this strategy serves."""
        if self._hooks is None:
            assert self.lightning_module is not None
            self._hooks = Hooks(self.lightning_module.trainer, self.lightning_module)
        return self._hooks

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients of `closure_loss`; DDP gets ready for them first."""
        self.pre_backward(closure_loss)
        self.hooks("on_before_backward", closure_loss)
        closure_loss.backward(*args, **kwargs)
        self.hooks("on_after_backward")
        self.post_backward(closure_loss)
        return closure_loss

    def optimizer_step(self, optimizer: Optimizer, closure: Hook, model: Any = None, **kwargs: Any) -> Any:
        """The objective has computed and clipped the gradients."""
        result = closure()
        self.hooks("on_before_optimizer_step", optimizer)
        optimizer.step(**kwargs)
        return result
