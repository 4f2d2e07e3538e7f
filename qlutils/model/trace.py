"""Hooks on a model's modules: what passes through them while it runs is kept, or changed.

Hooks are registered one by one inside an exit stack, so that an interruption leaves none behind.
"""

import inspect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@contextmanager
def hooked(handles):
    """Inside, the hooks are there whose registration the iterable `handles` yields."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def edited(modules, *, before=None, after=None):
    """Inside, `modules` get the arguments that `before(module, args, kwargs)` returns and give what
    `after(module, args, output)` returns; where that is None, all stays as it is."""

    def handles():
        for module in modules:
            if before is not None:
                yield module.register_forward_pre_hook(before, with_kwargs=True)
            if after is not None:
                yield module.register_forward_hook(after)

    return hooked(handles())


@contextmanager
def replaced(objects, attribute, change):
    """Inside, the attribute of each of the objects is what `change` makes of its own."""
    own = [getattr(one, attribute) for one in objects]
    try:
        for one, value in zip(objects, own):
            setattr(one, attribute, change(value))
        yield
    finally:
        for one, value in zip(objects, own):
            setattr(one, attribute, value)


def by_name(module, args, kwargs):
    """The arguments of a call of `module` by the names that its class gives them."""
    _, *names = inspect.signature(type(module).forward).parameters  # the first is self
    return dict(zip(names, args)) | kwargs


def first(output):
    """The hidden states among what a decoder layer gives, alone or in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Call:
    """One call of a module: what it was given and what it gave."""

    module: nn.Module
    args: tuple
    kwargs: dict
    output: Any

    @property
    def arguments(self):
        return by_name(self.module, self.args, self.kwargs)


@contextmanager
def traced(modules, keep=lambda call: call):
    """Inside, the list grows by one entry for each call of one of `modules` that ends: the `Call`,
    or what `keep` makes of it.

        with traced(lm.downs, lambda call: call.args[0]) as neurons:  # a tensor a layer
            lm.model(input_ids=ids)
    """
    kept = []

    def end(*call):
        kept.append(keep(Call(*call)))

    with hooked(one.register_forward_hook(end, with_kwargs=True) for one in modules):
        yield kept
