"""What can be done to neurons: a `Change` of single rows, a `Scaling` of all passes of a model.

Shapes: R rows, S tokens a row, d residual width, N neurons a layer.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qlutils.checks import check
from qlutils.model.trace import replaced


class Change:
    """What a row does to `neurons`, (layer, index) pairs, at every token the row feeds: their
    activations are multiplied by `factor`, and `vector` (d,) times their sum is added to the output
    of their layer's down-projection."""

    def __init__(self, lm, neurons, factor=1.0, vector=None):
        self.neurons = lm.check_neurons(neurons)
        self.vector = vector
        self.factor = check_finite(lm, "factor", factor)
        self.by_layer: dict[int, list[int]] = {}
        for layer, index in self.neurons:
            self.by_layer.setdefault(layer, []).append(index)
        self.start = min(self.by_layer, default=lm.num_layers)  # the first layer it changes


def check_finite(lm, name, value):
    """`value` as a float; ValueError for what is no finite number of the model's dtype."""
    largest = torch.finfo(lm.dtype).max
    check(f"{name} is", value, -largest, largest, f"a finite number of {lm.dtype}")
    return float(value)


@dataclass(eq=False)
class Scaling:
    """An active `scale_neurons`, and which tokens of the pass now running it scales."""

    change: Change
    prompt: int | None = None  # tokens of the prompt; None: to be told from each pass
    tokens: int = 0  # S of the pass
    first: int | None = None  # the first token to scale; None where no pass is running

    def begin(self, tokens, past, mask):
        """At the start of a forward pass, see `attention.forward_passes`."""
        if self.prompt is not None:
            first = max(0, self.prompt - 1 - past)
        else:
            check_ends(mask)
            first = 0 if past else tokens - 1
        self.at(tokens, first)

    def end(self, _output=None):
        self.first = None

    def at(self, tokens, first):
        """From here on rows have `tokens` tokens and are scaled from the token `first` on."""
        self.tokens = tokens
        self.first = first

    def hook(self, index):
        """A hook that scales the neurons `index` in the input of their down-projection."""

        def scale(_, inputs):
            if self.first is None:
                raise ValueError(
                    "scale_neurons acts on whole forward passes; attribute outside of it"
                )
            given, *rest = inputs
            rows = given.unflatten(0, (-1, self.tokens)) if given.dim() == 2 else given
            x = rows.clone()  # (R, S, N); OPT flattens (R, S)
            x[:, self.first :, index] *= self.change.factor
            return x.view_as(given), *rest

        return scale


def check_ends(mask):
    """ValueError unless by its attention mask (1: a token, 0: padding) every row ends with a
    token."""
    if mask is None:
        return
    plain = isinstance(mask, Tensor) and mask.dim() == 2
    if not plain or not mask[:, -1].all():
        raise ValueError(
            "scale_neurons takes each row's last position for its prompt's last token: give a 2-D "
            'attention_mask, and pad on the left (tokenizer.padding_side = "left"), not the right'
        )


@contextmanager
def prompt_of(scalings, tokens):
    """Inside, a text's first `tokens` tokens are its prompt, in however many passes it is fed."""
    try:
        with replaced(scalings, "prompt", lambda outer: tokens):
            yield
    finally:
        for one in scalings:
            one.end()
