"""Integrated gradients of the answer's probability over MLP neurons, for many queries at once (Eq. 8-18).

The neurons of one layer move together along a straight path from a baseline b to their clean values w, in the
clean context; each layer is a separate integral. All layers' integrals of a batch of queries go through the model
as one growing batch of last-token rows (see `replay`): entering layer l it holds the rows of layers 0..l-1; layer
l adds its own. One backward pass then reaches the L leaves. Where a rule has a node at the end of the path, that
row is the clean forward pass for every layer, so one row serves all of them.

Shapes: Q queries, B baselines a query, P points a layer, L layers, N neurons a layer, T prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from .quadrature import RULES, adaptive_plan, fixed_plan
from .replay import (CleanPass, answer_probabilities, clean_pass, computing, hooked, neuron_vectors,
                     on_device, replaying, run_layer, site_module, start_rows, within_memory)
from .rows import score_queries

METHODS = ("ig", "sig", "amig")
SITES = ("down_input", "pre_activation")
CPU_MEMORY = 2**29  # bytes of activations a batch may keep on a CPU; fixed, so that batches are the same everywhere


@dataclass(frozen=True)
class Spec:
    """How to attribute; every field is a notebook parameter. `row_budget` bounds the rows of a batch
    (None: from the device's memory)."""

    method: str = "ig"
    steps: int = 20
    rule: str = "right"
    answer: str = "all"
    site: str = "down_input"
    amig_factor: str = "w-b"
    row_budget: int | None = None

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("rule", RULES), ("answer", ("all", "first")),
                              ("site", SITES), ("amig_factor", ("w-b", "w"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, Integral) or self.steps < 2:
            raise ValueError(f"steps is {self.steps!r}; an integral needs a whole number of at least 2 steps")
        budget = self.row_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 1):
            raise ValueError(f"row_budget is {budget!r}; use a whole number of at least 1 row, or None for the default")
        object.__setattr__(self, "steps", int(self.steps))  # NumPy's whole numbers have no place in the JSON of a run
        object.__setattr__(self, "row_budget", budget if budget is None else int(budget))


@dataclass
class Attribution:
    """Scores of Q queries: `scores` (Q, L, N), normalised as the method says; `completeness_gap` (Q, L), of the raw
    scores; `probability` (Q,) of the whole answer; `known` (Q,), whether greedy decoding gives it, all of them on the
    model's device; `row_budget`, the rows a batch was allowed in the end (halved after running out of memory)."""

    scores: Tensor
    completeness_gap: Tensor
    probability: Tensor
    known: Tensor
    row_budget: int

    def cpu(self) -> Attribution:
        """The same in main memory."""
        return replace(self, **{name: getattr(self, name).cpu() for name in ("scores", "completeness_gap", "probability", "known")})


def default_row_budget(lm) -> int:
    """Rows of a batch whose activations fit: of most of a GPU's free memory, of a fixed share on a CPU."""
    memory = CPU_MEMORY
    if lm.device.type == "cuda":
        unused = torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)  # torch's own, at hand
        memory = max(2**28, 0.8 * (torch.cuda.mem_get_info(lm.device)[0] + unused))
    width = lm.arch.head.weight.shape[1]
    per_row = (14 * width + 5 * lm.num_neurons) * lm.dtype.itemsize * (lm.num_layers + 1) / 2
    return max(lm.num_layers, int(memory / per_row))


def attribute(lm, prompts, answers, *, method="ig", steps=20, rule="right", answer="all", site="down_input",
              amig_factor="w-b", row_budget=None) -> Attribution:
    """Attribution scores of every neuron for each query (prompt, answer).

    `prompts`, `answers`: Q texts each. `method`: "ig" (Eq. 10), "sig" (Eq. 13, 14) or "amig" (Eq. 16, 18).
    `rule`: quadrature over the path, "right" being the paper's Riemann sum; "auto" places `steps` gradient
    evaluations a layer on average where they count (6 are enough). `answer`: "all" averages the raw
    attribution over the answer's tokens, "first" takes the first. Dense in memory, Q x L x N: for a handful of
    queries (runs stream through `localize`). ValueError names the offending prompt, answer or parameter.
    """
    spec = Spec(method, steps, rule, answer, site, amig_factor, row_budget)
    return attribute_encoded(lm, lm.encode_all(prompts, answers), spec).cpu()


def attribute_encoded(lm, queries: list[tuple[list[int], list[int]]], spec: Spec, names=None) -> Attribution:
    """`attribute` for queries already tokenised into (prompt ids, answer ids). `names` are used in errors."""
    lm.check_ready()
    if lm.dtype == torch.float16:
        raise ValueError("float16 gradients of a probability underflow silently; load the model in bfloat16 or float32")
    names = names or [lm.tokenizer.decode(p, skip_special_tokens=True) for p, _ in queries]
    with computing(lm):
        return within_memory(lambda budget: _attribute(lm, queries, replace(spec, row_budget=budget), names),
                             spec.row_budget or default_row_budget(lm), lm.num_layers)


def _attribute(lm, queries, spec, names) -> Attribution:
    # Everything stays on the device to the end: nothing here waits for it, and the next batch is on its way meanwhile.
    count, device = len(queries), lm.device
    raw = torch.zeros(count, lm.num_layers, lm.num_neurons, dtype=lm.score_dtype, device=device)
    gap = torch.zeros(count, lm.num_layers, dtype=lm.score_dtype, device=device)
    probability = torch.ones(count, dtype=lm.score_dtype, device=device)
    known = torch.ones(count, dtype=torch.bool, device=device)
    for batch in _batches(queries, spec, lm):
        ids, target, query, used = (on_device([item[place] for item in batch], device) for place in range(1, 5))
        clean = clean_pass(lm, ids, spec.site)
        p_clean = torch.softmax(clean.logits, -1).gather(1, target[:, None])[:, 0]
        starts = _baselines(lm, ids, [length for length, *_ in batch], spec)
        part, missing = _integrate(lm, clean, target, starts, p_clean, spec)
        # no two tokens of one answer share a batch: they have prompts of different lengths
        raw[query] += part / used[:, None, None]
        gap[query] += missing / used[:, None]
        probability[query] *= p_clean
        known[query] &= clean.logits.argmax(-1) == target
    if spec.answer == "first":
        whole = score_queries(lm, queries)
        probability = torch.from_numpy(np.exp(whole.log_probability)).to(probability)
        known = torch.from_numpy(whole.exact).to(device)
    bad = (~(torch.isfinite(raw).flatten(1).all(1) & torch.isfinite(probability))).cpu()
    if bad.any():
        raise ValueError(f"the scores of {names[int(bad.nonzero()[0])]!r} are not finite: {lm.name} gives infinite or "
                         f"NaN values in {lm.dtype}; try float32")
    return Attribution(_normalise(raw, spec.method, names), gap.abs(), probability, known, spec.row_budget)


def _batches(queries, spec, lm):
    """Lists of (prompt length, ids up to the answer token, answer token, query, its answer tokens), equal lengths together.
    With answer="first" only the first token is attributed."""
    items = []
    for index, (prompt, answer) in enumerate(queries):
        used = answer if spec.answer == "all" else answer[:1]
        items += [(len(prompt), prompt + used[:k], used[k], index, len(used)) for k in range(len(used))]
    # one number of baselines a batch: sig has as many as prompt tokens
    kind = lambda item: (len(item[1]), item[0] if spec.method == "sig" else 0)  # noqa: E731
    for _, group in groupby(sorted(items, key=lambda item: (len(item[1]), item[0])), kind):
        group = list(group)
        baselines = group[0][0] - lm.bos_offset if spec.method == "sig" else 1
        size = max(1, spec.row_budget // (lm.num_layers * spec.steps * baselines))
        size = -(-len(group) // -(-len(group) // size))  # as many batches of even size
        yield from (group[start:start + size] for start in range(0, len(group), size))


def _baselines(lm, ids: Tensor, prompt_lengths: list[int], spec: Spec) -> Tensor | None:
    """(Q, B, L, N) neuron vectors the paths start from; None stands for zero."""
    if spec.method == "ig":
        return None
    first, (queries, length) = lm.bos_offset, ids.shape
    if spec.method == "amig":
        eos = lm.tokenizer.eos_token_id
        if eos is None or eos >= lm.num_embeddings:
            raise ValueError(f"{lm.name}: amig replaces the prompt by EOS tokens, and its "
                             "tokenizer has none that the model embeds")
        variants = ids.clone()
        for row, prompt_length in enumerate(prompt_lengths):
            variants[row, first:prompt_length] = eos
    else:
        candidates = (lm.tokenizer.mask_token_id, lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id)
        token = next((c for c in candidates if c is not None and c < lm.num_embeddings), None)
        if token is None:
            raise ValueError(f"{lm.name}: sig needs a mask, pad or EOS token, and its tokenizer has none that the model embeds")
        places = range(first, prompt_lengths[0])
        variants = ids[:, None].repeat(1, len(places), 1)
        for row, place in enumerate(places):
            variants[:, row, place] = token
    vectors = neuron_vectors(lm, variants.reshape(-1, length), spec.site, chunk=max(1, spec.row_budget // length))
    return vectors.view(queries, -1, lm.num_layers, lm.num_neurons)


@dataclass
class _Paths:
    """The paths of Q queries as what their rows put at the site module's output: from `begin[l]` (Q, B, W) to the clean
    `end[l]` (Q, 1, W). The down-projection is affine, so a straight line of neurons is one of outputs, where a row is
    narrower (W = d, not N) and needs no product of its own; at pre-activations W = N."""

    begin: list[Tensor]
    end: list[Tensor]
    neurons: list[Tensor] | None  # (Q, B, N), leaves of which `begin` is a differentiable function; None: the same

    @classmethod
    def of(cls, lm, clean: CleanPass, starts: Tensor, site: str) -> _Paths:
        neurons = [starts[:, :, layer] for layer in range(lm.num_layers)]
        if site == "pre_activation":
            return cls(neurons, [w[:, None] for w in clean.neurons], None)
        with torch.enable_grad():
            neurons = [one.detach().requires_grad_() for one in neurons]
            return cls([down(one) for down, one in zip(lm.downs, neurons)], clean.written, neurons)

    def rows(self, layer: int, index: Tensor, node: Tensor) -> Tensor:
        """(Q, P, W) points at `node` (Q or 1, P) of the paths from baselines `index` (Q or 1, P)."""
        begin = self.begin[layer].detach()
        query = torch.arange(len(begin), device=begin.device)[:, None]
        return torch.lerp(begin[query, index], self.end[layer], node[..., None].to(begin))

    def to_neurons(self, grads: list[Tensor], dtype) -> Tensor:
        """(Q, B, L, N) gradients at the neurons from those at the rows, L x (Q, B, W)."""
        if self.neurons is not None:
            grads = torch.autograd.grad(self.begin, self.neurons, [g.to(b) for g, b in zip(grads, self.begin)])
        return torch.stack(grads, 2).to(dtype)


def _integrate(lm, clean: CleanPass, target, starts, p_clean, spec) -> tuple[Tensor, Tensor]:
    """Raw attribution (Q, L, N), summed over baselines, and what its sum lacks to completeness (Q, L), signed."""
    w = torch.stack(clean.neurons, 1)  # (Q, L, N)
    starts = torch.zeros_like(w)[:, None] if starts is None else starts
    paths = _Paths.of(lm, clean, starts, spec.site)
    queries, count = starts.shape[:2]
    size = max(1, spec.row_budget // (lm.num_layers * queries))
    if queries * lm.num_layers * count * spec.steps <= spec.row_budget:  # all rows at once, however many a layer gets
        size = lm.num_layers * count * spec.steps
    if spec.rule == "auto":
        probabilities = lambda plan: _path_probabilities(lm, clean, target, paths, plan, size, spec.site)  # noqa: E731
        begin = torch.arange(count)[None]
        p_start = torch.stack(probabilities([(begin, torch.zeros(begin.shape), None)] * lm.num_layers), 2)
        plan, at_end = adaptive_plan(probabilities, p_start, p_clean, spec.steps), None
    else:
        plan, at_end = fixed_plan(spec.rule, spec.steps, count, lm.num_layers)
    mean = [torch.zeros(one.shape, dtype=lm.score_dtype, device=w.device) for one in paths.begin]  # of the gradients
    probability = [_add_gradients(lm, clean, target, paths, part, slots, mean, None if start else at_end, spec.site)
                   for start, part, slots in _parts(plan, size, w.device)]
    if spec.rule != "auto":  # the first points of a fixed plan are the paths' beginnings
        p_start = torch.cat([torch.stack(p, 2) for p in probability], 1)[:, :count]
    factor = (w[:, None] - starts).to(lm.score_dtype)
    if spec.method == "amig" and spec.amig_factor == "w":
        factor = w[:, None].to(lm.score_dtype)
    raw = (factor * paths.to_neurons(mean, lm.score_dtype)).sum(1)
    return raw, raw.sum(-1) - (p_clean[:, None, None] - p_start).sum(1)


def _parts(plan, size, device):
    """(first point, plan, slots) of at most `size` points a layer at a time, on `device`.

    `slots` is None where all queries have the same points. Else lists are padded with points of weight 0, and it says for
    each layer which of a query's rows a point is (Q, P), and how many rows there are from there on: a query's points take
    its next free ones, so that its rows fill up what other queries' longer lists leave empty. Padding goes to row 0."""
    moved = {id(points): [one if one is None else on_device(one, device) for one in points] for points in plan}
    for start in range(0, max(index.shape[1] for index, *_ in plan), size):
        part, slots, taken = [], [], 0
        for points in plan:  # layers that share their points share the copy
            part.append(tuple(one if one is None else one[:, start:start + size] for one in moved[id(points)]))
            if len(points[0]) > 1:
                real = points[2][:, start:start + size] > 0
                row = (taken + real.cumsum(1)).where(real, 0)
                taken = taken + real.sum(1, keepdim=True)
                slots.append((on_device(row, device), 1 + int(taken.max())))
        yield start, part, slots or None


@torch.no_grad()
def _path_probabilities(lm, clean, target, paths, plan, size, site) -> list[Tensor]:
    """L x (Q, P) answer probabilities at the points of a plan: forward passes only."""
    found = [[target.new_zeros(len(target), 0, dtype=lm.score_dtype)] for _ in plan]
    for _, part, slots in _parts(plan, size, target.device):
        hidden, *_ = _grow(lm, clean, lambda layer: paths.rows(layer, *part[layer][:2]), slots, False, site)
        for kept, one in zip(found, _by_layer(answer_probabilities(lm, hidden, target, need_grad=False), part, slots)):
            kept.append(one)
    return [torch.cat(one, 1) for one in found]


def _by_layer(rows, plan, slots) -> list[Tensor]:
    """L x (Q, P) of the points of a plan, from what was found for the rows (Q, R)."""
    if slots is None:
        return list(rows.split([index.shape[1] for index, *_ in plan], 1))
    return [rows.gather(1, row) for row, _ in slots]


def _add_gradients(lm, clean, target, paths, plan, slots, mean, at_end, site) -> list[Tensor]:
    """Add the weighted gradients of a plan (see `quadrature`) to `mean`, L x (Q, B, W), and return the probabilities at its
    points, L x (Q, P). With `at_end`, the weight of the paths' common end, the first row is the clean one, and the gradients
    there at every layer count with it."""

    def rows(layer):
        points = paths.rows(layer, *plan[layer][:2])
        return torch.cat([paths.end[layer], points], 1) if at_end is not None and layer == 0 else points

    with torch.enable_grad():
        hidden, leaves, end = _grow(lm, clean, rows, slots, at_end is not None, site)
        probability = answer_probabilities(lm, hidden, target, need_grad=True)
        grads = torch.autograd.grad(probability.sum(), leaves, allow_unused=True)  # None where no row starts in the layer
    for layer, (grad, (index, _, weight)) in enumerate(zip(grads, plan)):
        if at_end is not None and layer == 0:
            end[0], grad = grad[:, 0], grad[:, 1:]
        if index.shape[1]:
            baseline = torch.nn.functional.one_hot(index, mean[layer].shape[1]) * weight[..., None]  # (Q or 1, P, B)
            mean[layer] += baseline.mT.to(mean[layer]) @ grad.to(mean[layer])
        if at_end is not None:
            mean[layer] += at_end * end[layer][:, None]
    return _by_layer(probability.detach()[:, int(at_end is not None):], plan, slots)


def _grow(lm, clean, rows, slots, with_clean, site):
    """Push a growing batch of rows through the layers. `rows(layer)` (Q, P, W) is what the rows that start in `layer` have
    at its site module's output; they come last, or where `slots` says (see `_parts`). Returns the last layer's output
    (Q, rows, d), the leaves, and a list that a backward pass fills with the gradients there of row 0, (Q, W) a layer, when
    that row is the clean one."""
    hidden, leaves, at_end = None, [], [None] * lm.num_layers
    width = lm.num_neurons if site == "pre_activation" else None

    def keep(layer):
        def hook(_, __, output):
            queries = hidden.shape[0]
            output.register_hook(lambda g: at_end.__setitem__(
                layer, g.reshape(queries, -1, g.shape[-1])[:, 0, :width].to(lm.score_dtype)))
        return hook

    with replaying(lm):
        for layer in range(lm.num_layers):
            leaf = rows(layer)
            if torch.is_grad_enabled():
                leaf.requires_grad_()
            leaves.append(leaf)
            if hidden is not None:
                watched = [site_module(lm, layer, site)] if with_clean else []
                with hooked(module.register_forward_hook(keep(layer)) for module in watched):
                    hidden = run_layer(lm, clean, layer, hidden)
            if leaf.shape[1]:
                new = start_rows(lm, clean, layer, leaf, site)
                if slots is None:
                    hidden = new if hidden is None else torch.cat([hidden, new], 1)
                else:
                    (row, count), old = slots[layer], [] if hidden is None else [hidden]
                    empty = new.new_zeros(len(new), count - sum(one.shape[1] for one in old), new.shape[2])
                    hidden = torch.cat([*old, empty], 1).scatter(1, row[..., None].expand_as(new), new)
    return hidden, leaves, at_end


def _normalise(raw: Tensor, method: str, names) -> Tensor:
    if method == "sig":  # Eq. 14
        return raw / raw.flatten(1).norm(dim=1).clamp_min(torch.finfo(raw.dtype).tiny)[:, None, None]
    if method == "amig":  # Eq. 18, with the absolute value of the sum
        total = raw.sum((1, 2)).abs()
        if (total == 0).any():
            raise ValueError(f"amig divides by the sum of a query's scores, which is zero for "
                             f"{names[int((total == 0).nonzero()[0])]!r}")
        return raw / total[:, None, None]
    return raw
