"""Hooks on a model's modules: what passes through them while it runs is kept, or changed.

Hooks are registered one by one inside an exit stack, so that an interruption leaves none behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@contextmanager
def hooked(handles: Iterable):
    """Inside, the hooks are there whose registration the iterable `handles` yields."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def edited(modules: Iterable[nn.Module], *, before: Callable | None = None, after=None):
    """Inside, `modules` get the arguments that `before(module, args, kwargs)` returns and give what
    `after(module, args, output)` returns; where that is None, all stays as it is."""

    def handles():
        for module in modules:
            if before is not None:
                yield module.register_forward_pre_hook(before, with_kwargs=True)
            if after is not None:
                yield module.register_forward_hook(after)

    return hooked(handles())


@dataclass
class Call:
    """One call of a module: what it was given and what it gave."""

    module: nn.Module
    args: tuple
    kwargs: dict
    output: Any

    @property
    def hidden(self) -> Tensor:
        """The hidden states that a decoder layer was given."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]


def first(output):
    """The hidden states among what a decoder layer gives, alone or in a tuple."""
    return output[0] if isinstance(output, tuple) else output


class Trace:
    """Inside, `kept` grows by one entry for each call of one of `modules` that ends: the `Call`, or
    what `keep` makes of it.

        with Trace(lm.downs, lambda call: call.args[0]) as trace:
            lm.model(input_ids=ids)
        neurons = trace.kept  # a tensor a layer
    """

    def __init__(self, modules: Iterable[nn.Module], keep: Callable[[Call], Any] | None = None):
        self.modules, self.keep = list(modules), keep
        self.kept: list = []
        self._hooks = ExitStack()

    def __enter__(self) -> Trace:
        handles = (one.register_forward_hook(self._end, with_kwargs=True) for one in self.modules)
        self._hooks.enter_context(hooked(handles))
        return self

    def __exit__(self, *error) -> None:
        self._hooks.close()

    def _end(self, module, args, kwargs, output) -> None:
        call = Call(module, args, kwargs, output)
        self.kept.append(call if self.keep is None else self.keep(call))
