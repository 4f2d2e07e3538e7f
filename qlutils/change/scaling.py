"""Answers and their probabilities, as the model gives them and with some of its neurons scaled
(section 3.1)."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from qlutils.change.rows import Change, score_queries, score_rows
from qlutils.model.attention import forward_passes, tokens_of


def answer_probability(lm, prompts, answers, *, answer="all") -> Tensor:
    """P(answer | prompt) of Q queries, float32 (Q,) on the CPU: the product of the answer's
    teacher-forced token probabilities, or the first token's with `answer="first"`. Prompts may
    differ in length: no padding is used.

    Inside `scale_neurons` or `edit_weights` the changed model answers. ValueError names an unusable
    prompt.
    """
    if answer not in ("all", "first"):
        raise ValueError(f"answer {answer!r} is unknown; use all, first")
    queries = lm.encode_all(prompts, answers)
    scores = score_queries(lm, [(p, a if answer == "all" else a[:1]) for p, a in queries])
    return torch.from_numpy(np.exp(scores.log_probability)).float()


def scaled_answer_probabilities(lm, rows, *, answer="all") -> np.ndarray:
    """(R,) P(answer | prompt) for rows (prompt ids, answer ids, neurons, factor), each with its own
    set of neurons scaled at the last prompt token and every later one (float64). An empty set
    changes nothing."""
    queries, order, changes, plan = [], {}, {}, []
    for prompt, target, neurons, factor in rows:
        target = target if answer == "all" else target[:1]
        key = tuple(prompt), tuple(target)
        if key not in order:
            order[key] = len(queries)
            queries.append(key)
        name = frozenset(neurons), factor
        if name not in changes:
            changes[name] = Change(lm, neurons, factor)
        plan.append((order[key], changes[name]))
    return np.exp(score_rows(lm, queries, plan, everywhere=False).log_probability)


def greedy_answers(lm, prompts, lengths) -> list[list[int]]:
    """Greedy decoding of `lengths[i]` tokens after the prompt ids `prompts[i]`."""
    found: list[list[int]] = [[] for _ in prompts]
    for step in range(max(lengths, default=0)):
        going = [i for i, length in enumerate(lengths) if length > step]
        scores = score_queries(
            lm, [(prompts[i], [*found[i], 0]) for i in going]
        )  # the 0 is never fed
        for i, greedy in zip(going, scores.greedy):
            found[i].append(greedy[-1])
    return found


@contextmanager
def scale_neurons(lm, neurons, factor):
    """Multiply the activations of `neurons`, (layer, index) pairs, by `factor` in every forward
    pass inside, at the last prompt token and every later one (section 3.1; 0 suppresses, 2
    enhances).

        with scale_neurons(lm, {(3, 17), (4, 2)}, 0):
            p = answer_probability(lm, prompts, answers)
            text = lm.model.generate(**tokens)

    In a bare `lm.model(...)` the whole input is the prompt, its end read from a 2-D
    `attention_mask` on either padding side; a call that continues the cache of an earlier one
    inside the context is "later" throughout. Nested contexts compose. ValueError names a neuron
    outside the model. `attribute` cannot be used inside.
    """
    lm.check_ready()
    change = Change(lm, neurons, factor)
    watch = _Watch(lm, change)
    active = lm.scales
    try:
        active.append(change)
        watch.start()
        yield
    finally:
        watch.stop()
        active.remove(change)


class _Watch:
    """The hooks of one `scale_neurons`: on the model's forward passes, to learn which tokens are
    the prompt's, and on the down-projections, to scale."""

    def __init__(self, lm, change):
        self.lm, self.change, self.handles = lm, change, []
        self.seen = weakref.WeakSet()  # caches that already hold a prompt
        self.prompt_end = None  # inside `generate`: index of the last prompt token
        self.reach: Tensor | None = None  # (B, S) tokens to scale in the forward now running
        self.generate, self.ended = (
            None,
            False,
        )  # what `generate` of the model's own dict this watch replaced

    def start(self):
        for handle in forward_passes(self.lm.model, self.lm.layers[0], self._before, self._after):
            self.handles.append(handle)
        for layer, index in self.change.by_layer.items():
            self.handles.append(self.lm.downs[layer].register_forward_pre_hook(self._scaler(index)))
        self.lm.model.generate = self._wrap(self.lm.model.generate)

    def stop(self):
        for handle in self.handles:
            handle.remove()
        self.ended, methods = True, self.lm.model.__dict__
        while (
            top := getattr(methods.get("generate"), "watch", None)
        ) and top.ended:  # contexts may end in any order
            methods["generate"] = top.generate
        if methods.get("generate") is None:
            methods.pop("generate", None)  # the class's method shows again

    def _wrap(self, generate):
        def run(inputs=None, *args, **kwargs):
            given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            tokens = next((part for part in given if part is not None), None)
            outer, self.prompt_end = (
                self.prompt_end,
                tokens.shape[1] - 1 if tokens is not None else 0,
            )
            try:
                return generate(inputs, *args, **kwargs)
            finally:
                self.prompt_end = outer

        self.generate, run.watch = self.lm.model.__dict__.get("generate"), self
        return run

    def _before(self, call):
        tokens, mask, cache = tokens_of(call), call.get("attention_mask"), call["cache"]
        if tokens is None:  # the model says so itself
            return
        batch, length = tokens.shape[:2]
        place = torch.arange(length, device=tokens.device).expand(batch, -1)
        past = cache.get_seq_length() if cache is not None else 0
        if self.prompt_end is not None:
            first = torch.full((batch, 1), self.prompt_end - past, device=tokens.device)
        elif past and cache in self.seen:
            first = torch.zeros(batch, 1, device=tokens.device)
        elif mask is None:
            first = torch.full((batch, 1), length - 1, device=tokens.device)
        elif isinstance(mask, Tensor) and mask.dim() == 2:
            first = (mask[:, -length:].to(tokens.device).bool() * place).amax(1, keepdim=True)
        else:
            raise ValueError(
                "scale_neurons finds the last prompt token in a 2-D attention_mask (1: a token, "
                "0: padding); this forward pass was given another kind of mask"
            )
        if cache is not None:
            self.seen.add(cache)
        self.reach = place >= first

    def _after(self, output):
        if isinstance(output, dict):
            output = tuple(output.values())
        if isinstance(output, tuple):
            self.seen.update(part for part in output if isinstance(part, Cache))
        self.reach = None

    def _scaler(self, index):
        def hook(_, inputs):
            if self.lm.__dict__.get("scoring"):  # `score_rows` applies the active scales itself
                return None
            if self.reach is None:
                raise ValueError(
                    "scale_neurons acts on whole forward passes; attribute outside of it"
                )
            x = inputs[0]
            factors = x.new_ones(x.shape[-1])
            factors[index] = self.change.factor
            reach = self.reach.to(x.device).reshape(*x.shape[:-1], 1)
            return (torch.where(reach, x * factors, x), *inputs[1:])

        return hook
