"""Answers and their probabilities, as the model gives them and with some of its neurons scaled
(section 3.1)."""

from contextlib import contextmanager
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from qlutils.change.changes import Change, Scaling, check_ends, prompt_of
from qlutils.change.rows import score_queries, score_rows
from qlutils.checks import CHOICES, one_of
from qlutils.model.attention import forward_passes
from qlutils.model.language_model import check_loaded
from qlutils.model.trace import hooked


def answer_probability(lm, prompts, answers, *, answer="all") -> Tensor:
    """P(answer | prompt) of Q queries, float32 (Q,) on the CPU: the product of the answer's
    teacher-forced token probabilities, or the first token's with `answer="first"`. Prompts may
    differ in length: no padding is used.

    Inside `scale_neurons` or `edit_weights` the changed model answers. ValueError names an unusable
    prompt.
    """
    check_loaded(lm)
    one_of("answer", answer, CHOICES["answer"])
    queries = lm.encode_all(prompts, answers)
    if answer == "first":
        queries = [(prompt, target[:1]) for prompt, target in queries]
    log_p = score_queries(lm, queries).log_probability
    return torch.from_numpy(np.exp(log_p)).float()


def scaled_answer_probabilities(lm, rows, *, answer="all"):
    """(R,) P(answer | prompt) for rows (prompt ids, answer ids, neurons, factor), each with its own
    set of neurons scaled at the last prompt token and every later one (float64). An empty set
    changes nothing."""
    queries = {}  # {(prompt, target): its place}
    change = cache(partial(Change, lm))  # one object for equal ones: they are computed once
    plan = []
    for prompt, target, neurons, factor in rows:
        scored = target if answer == "all" else target[:1]
        query = tuple(prompt), tuple(scored)
        place = queries.setdefault(query, len(queries))
        plan.append((place, change(frozenset(neurons), factor)))
    return np.exp(score_rows(lm, list(queries), plan).log_probability)


def greedy_answers(lm, prompts, lengths):
    """Greedy decoding of `lengths[i]` tokens after the prompt ids `prompts[i]`."""
    found = [[] for _ in prompts]
    while going := [i for i, length in enumerate(lengths) if length > len(found[i])]:
        queries = [(prompts[i], [*found[i], 0]) for i in going]  # the last token is not fed
        for i, greedy in zip(going, score_queries(lm, queries).greedy):
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

    In a bare `lm.model(...)` without a filled cache the whole input is the prompt, and its last
    position is scaled: pad on the left, right padding is refused. With a filled cache all that is
    fed is "later". Contexts may be nested, where factors of the same neuron multiply, and end as
    `with` ends them, the inner one first. ValueError names a neuron outside the model. `attribute`
    cannot be used inside.
    """
    check_loaded(lm)
    lm.check_ready()
    scaling = Scaling(Change(lm, neurons, factor))
    lm.scales.append(scaling)
    try:
        with hooked(_hooks(lm, scaling)), _generating(lm.model, scaling):
            yield
    finally:
        lm.scales.remove(scaling)


def _hooks(lm, scaling):
    yield from forward_passes(lm.model, lm.layers[0], scaling.begin, scaling.end)
    for layer, index in scaling.change.by_layer.items():
        yield lm.downs[layer].register_forward_pre_hook(scaling.hook(index))


@contextmanager
def _generating(model, scaling):
    """Inside, `model.generate` says how long its prompt is: without a cache each of its passes is
    fed the whole text so far."""
    generate = model.generate
    own = model.__dict__.get("generate")

    def run(inputs=None, *args, **kwargs):
        names = "input_ids", "inputs_embeds"
        given = [inputs, *map(kwargs.get, names)]
        lengths = [one.shape[1] for one in given if one is not None]
        check_ends(kwargs.get("attention_mask"))
        with prompt_of([scaling], max(lengths, default=1)):
            return generate(inputs, *args, **kwargs)

    try:
        model.generate = run
        yield
    finally:
        model.__dict__.pop("generate", None)  # the class's method shows again
        if own is not None:
            model.generate = own
