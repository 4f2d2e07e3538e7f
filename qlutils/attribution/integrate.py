"""The integral over many paths at once: gradients of the answer's probability at points of them.

Points become rows of one growing batch of last tokens (see `replay`): entering layer l it holds the
rows of layers 0..l-1; layer l adds its own. One backward pass then reaches the L leaves.

Shapes: Q queries, B baselines a query, P points a layer, L layers, N neurons a layer, d residual
width, W the width of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qlutils.attribution.bisection import Coordinate, Integral, Intervals, bisect
from qlutils.attribution.quadrature import fixed_plan
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.passes import (
    CleanPass,
    answer_probabilities,
    hooked,
    on_device,
    replaying,
    run_layer,
    site_module,
    start_rows,
)

PASS = 40  # rows for which a pass through the model takes as long as for one: it reads all weights
ROUNDING = 4  # units in the last place by which a probability may be off: bfloat16 has 8 bits


@dataclass
class Paths:
    """The paths of Q queries as what their rows put at the site module's output: from `begin[l]`
    (Q, B, W) to the clean `end[l]` (Q, 1, W). The down-projection is affine, so a straight line of
    neurons is one of outputs, where a row is narrower (W = d, not N) and needs no product of its
    own; at pre-activations W = N."""

    lm: object
    site: str
    begin: list[Tensor]
    end: list[Tensor]
    factor: Tensor  # (Q, B, L, N), what a gradient at a neuron is multiplied with
    values: list[Tensor | None]  # (N, W) value vectors; None where no plain weight holds them

    @classmethod
    def of(cls, lm, clean: CleanPass, starts: Tensor | None, spec) -> Paths:
        """From the baselines `starts` (Q, B, L, N), None standing for zero."""
        w = torch.stack(clean.neurons, 1)[:, None]  # (Q, 1, L, N)
        starts = torch.zeros_like(w) if starts is None else starts
        begin = [starts[:, :, layer] for layer in range(lm.num_layers)]
        if spec.site == "pre_activation":
            end = [one[:, None] for one in clean.neurons]
        else:
            end = clean.written
            with torch.no_grad():
                begin = [down(one) for down, one in zip(lm.downs, begin)]
        of_w = spec.method == "amig" and spec.amig_factor == "w"
        factor = (w.expand_as(starts) if of_w else w - starts).to(lm.score_dtype)
        values = [_values(lm, layer) for layer in range(lm.num_layers)]
        return cls(lm, spec.site, begin, end, factor, values)

    def pick(self, queries: Tensor) -> Paths:
        """The paths of some of the queries."""
        begin, end = ([one[queries] for one in ends] for ends in (self.begin, self.end))
        return replace(self, begin=begin, end=end, factor=self.factor[queries])

    def rows(self, layer: int, index: Tensor, node: Tensor) -> Tensor:
        """(Q, P, W) points at `node` (Q or 1, P) of the paths from baselines `index`, as many."""
        begin = self.begin[layer]
        query = torch.arange(len(begin), device=begin.device)[:, None]
        dtype = self.factor.dtype  # bfloat16 would round the nodes, too
        start, end = begin[query, index].to(dtype), self.end[layer].to(dtype)
        return torch.lerp(start, end, node[..., None].to(start)).to(begin.dtype)

    def neuron_gradients(self, layer: int, gradient: Tensor) -> Tensor:
        """(..., N) gradients at a layer's neurons from those at rows (..., W)."""
        if self.site == "pre_activation":
            return gradient
        if self.values[layer] is not None:
            return (gradient.to(self.values[layer]) @ self.values[layer].T).to(gradient.dtype)
        with torch.enable_grad():
            size = (*gradient.shape[:-1], self.lm.num_neurons)
            neurons = self.begin[layer].new_zeros(size).requires_grad_()
            written = self.lm.downs[layer](neurons)
            (found,) = torch.autograd.grad(written, neurons, gradient.to(written))
        return found.to(gradient.dtype)

    def change(self, path: Tensor) -> Tensor:
        """(K, W) end - begin of the paths `path` (3, K)."""
        dtype = self.factor.dtype
        ends = zip(self.end, self.begin)
        change = torch.stack([end.to(dtype) - begin.to(dtype) for end, begin in ends], 2)
        return change[tuple(path)]

    def scores(self, mean: Tensor, layer: int) -> Tensor:
        """(Q, N) raw attributions of a layer, summed over baselines, from its mean gradients
        (Q, B, W)."""
        return (self.factor[:, :, layer] * self.neuron_gradients(layer, mean)).sum(1)

    def coordinate(self) -> Coordinate:
        """Each path's coordinate: straight where no norm follows the MLP."""
        queries, baselines = self.begin[0].shape[:2]
        coordinate = Coordinate.straight(queries, baselines, len(self.begin))
        for layer, epsilon in enumerate(self.lm.arch.norm_epsilons):
            if epsilon is not None and self.site == "down_input":
                center, floor = Coordinate.of_norm(self.begin[layer], self.end[layer], epsilon)
                coordinate.center[:, :, layer], coordinate.floor[:, :, layer] = center, floor
        return coordinate


def _values(lm, layer: int) -> Tensor | None:
    try:
        return lm.value_vectors(layer)
    except UnsupportedModel:  # quantised, say: its own backward pass knows
        return None


@dataclass
class Raw:
    """Raw attributions `scores` (Q, L, N), summed over baselines, and what their sums lack to
    completeness, `gap` (Q, L), signed; `converged` (Q,), whether the integrals have settled, None
    for a rule that cannot tell; `evaluations` (Q,), gradients a layer and baseline."""

    scores: Tensor
    gap: Tensor
    converged: Tensor | None
    evaluations: Tensor


def integrate(lm, clean: CleanPass, target, starts, p_clean, spec) -> Raw:
    """Raw attributions of Q queries from baselines `starts` (Q, B, L, N; None: zero) to their clean
    neurons. `target` and `p_clean` (Q,) are the answer token and its probability."""
    paths = Paths.of(lm, clean, starts, spec)
    if spec.rule == "converged":
        batch = _Batch(lm, clean, target, paths, spec.row_budget)
        integral, p_start = batch.converge(spec.tolerance)
        mean, converged = integral.mean, integral.converged
        evaluations = integral.evaluations.mean(1)
    else:
        mean, p_start = _fixed_sum(lm, clean, target, paths, spec)
        converged = None
        evaluations = torch.full((len(target),), spec.steps, dtype=torch.float64)
    scores = [paths.scores(mean[:, :, layer], layer) for layer in range(lm.num_layers)]
    scores = torch.stack(scores, 1)
    gap = scores.sum(-1) - (p_clean[:, None, None] - p_start).sum(1)
    return Raw(scores, gap, converged, evaluations)


def _fixed_sum(lm, clean, target, paths, spec) -> tuple[Tensor, Tensor]:
    """Mean gradients (Q, B, L, W) by a rule whose nodes are known in advance, and the probabilities
    (Q, B, L) at the paths' beginnings."""
    queries, baselines = len(target), paths.factor.shape[1]
    (index, node, weight), at_end = fixed_plan(spec.rule, spec.steps, baselines)
    index, node, weight = (on_device(one, target.device) for one in (index, node, weight))
    mean = [torch.zeros(one.shape, dtype=lm.score_dtype, device=one.device) for one in paths.begin]
    first = []
    size = max(1, spec.row_budget // (lm.num_layers * queries))
    for start in range(0, index.shape[1], size):
        part = slice(start, start + size)
        points = [(index[:, part], node[:, part])] * lm.num_layers
        with_clean = at_end is not None and start == 0
        found = _gradients(lm, clean, target, paths, points, None, with_clean)
        of_baseline = torch.nn.functional.one_hot(index[:, part], baselines) * weight[:, part, None]
        for layer, gradient in enumerate(found.gradient):
            mean[layer] += of_baseline.mT.to(mean[layer]) @ gradient.to(mean[layer])
            if with_clean:
                mean[layer] += at_end * found.end[layer][:, None]
        first.append(found.probability.unflatten(1, (lm.num_layers, -1)))
    return torch.stack(mean, 2), torch.cat(first, 2)[:, :, :baselines].mT


@dataclass
class _Batch:
    """Q queries whose integrals are refined until they have settled; what `bisect` asks for."""

    lm: object
    clean: CleanPass
    target: Tensor  # (Q,)
    paths: Paths
    row_budget: int

    @property
    def rounding(self) -> float:
        return ROUNDING * torch.finfo(self.lm.dtype).eps

    def converge(self, tolerance: float) -> tuple[Integral, Tensor]:
        """The integral, and the probabilities (Q, B, L) at the paths' beginnings."""
        coordinate = self.paths.coordinate()
        queries, baselines, layers = coordinate.center.shape
        size, parts = max(1, self.row_budget // (layers * 2 * baselines)), []
        for some in torch.arange(queries).split(size):
            part = self._whole(coordinate.pick(some), self._pick(some))
            part.path[0] += some[0]
            parts.append(part)
        whole = Intervals.join(parts)
        p_start = whole.probability[:, 0].view(coordinate.center.shape)
        return bisect(self, coordinate, whole, tolerance), p_start

    def _pick(self, queries):
        queries = on_device(queries, self.target.device)
        return self.clean.pick(queries), self.target[queries], self.paths.pick(queries)

    def _whole(self, coordinate: Coordinate, picked) -> Intervals:
        """Every path as one interval: gradients at its beginning, middle and (all of them shared)
        end."""
        lm, (queries, baselines, layers) = self.lm, coordinate.center.shape
        clean, target, paths = picked
        path = torch.cartesian_prod(*(torch.arange(n) for n in coordinate.center.shape)).T
        nodes = []
        for u in (0.0, 0.5):
            alpha = coordinate.alpha(path, torch.full((path.shape[1],), u, dtype=torch.float64))
            nodes.append(alpha.view(queries, baselines, layers))
        node = on_device(torch.cat(nodes, 1), self.target.device)  # (Q, 2B, L)
        index = torch.arange(baselines, device=node.device).repeat(2)[None]
        found, size = [], max(1, self.row_budget // (layers * queries))
        for start in range(0, 2 * baselines, size):
            part = slice(start, start + size)
            points = [(index[:, part], node[:, part, layer]) for layer in range(layers)]
            with_end = start == 0
            found.append(_gradients(lm, clean, target, paths, points, None, with_end))
        gradient = torch.cat([torch.stack(one.gradient, 2) for one in found], 1)  # (Q, 2B, L, W)
        probability = torch.cat(
            [one.probability.unflatten(1, (layers, -1)).mT for one in found], 1
        )  # (Q, 2B, L)
        end = torch.stack(found[0].end, 1)[:, None].expand(-1, baselines, -1, -1)
        p_end = torch.softmax(clean.logits, -1).gather(1, target[:, None])
        p_end = p_end[..., None].expand(-1, baselines, layers)
        gradient = torch.stack([*gradient.to(end).chunk(2, 1), end], 3).flatten(0, 2)  # (K, 3, W)
        probability = torch.stack([*probability.chunk(2, 1), p_end], 3).flatten(0, 2)
        places = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        slopes = [coordinate.slope(path, u.expand(path.shape[1])) for u in places]
        gradient = gradient * torch.stack(slopes, 1).to(gradient)[..., None]
        return Intervals.whole(path, gradient, probability)

    def scores(self, mean: Tensor, layer: int) -> Tensor:
        return self.paths.scores(mean, layer)

    def largest_score(self, path: Tensor, gradient: Tensor) -> Tensor:
        largest = gradient.new_zeros(len(gradient))
        for layer in path[2].unique().tolist():
            chosen = (path[2] == layer).nonzero()[:, 0]
            query, baseline = path[:2, chosen]
            chosen = chosen.to(gradient.device)
            at_neurons = self.paths.neuron_gradients(layer, gradient[chosen])
            factor = self.paths.factor[query, baseline, layer]
            largest[chosen] = (factor * at_neurons).abs().amax(1).to(largest)
        return largest

    def rise(self, path: Tensor, gradient: Tensor) -> Tensor:
        return (self.paths.change(path).to(gradient) * gradient).sum(1)

    def gradients(self, path: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """See `bisection.Integrand`. Queries that need about as many rows share a batch."""
        width = self.paths.end[0].shape[-1]
        gradient = torch.zeros(
            len(alpha), width, dtype=self.lm.score_dtype, device=self.target.device
        )
        probability = gradient.new_zeros(len(alpha))
        for chosen in _even_batches(path[0].numpy(), self.row_budget):
            queries = np.unique(path[0].numpy()[chosen])
            local = np.searchsorted(queries, path[0].numpy()[chosen])
            layout = _Layout.of(local, path[2].numpy()[chosen], len(queries), self.lm.num_layers)
            found = self._gradients_of(queries, layout, path[1][chosen], alpha[chosen])
            at = on_device(torch.from_numpy(chosen), gradient.device)
            probability[at] = found.probability
            for layer in np.unique(layout.layer):
                here = np.flatnonzero(layout.layer == layer)
                there = found.gradient[layer][local[here], layout.column[here]]
                gradient[at[here]] = there.to(gradient)
        return gradient, probability

    def _gradients_of(self, queries, layout, baseline, alpha) -> _Found:
        """Gradients at points laid out for some of the queries."""
        device = self.target.device
        points = [
            (on_device(baseline[which], device), on_device(alpha[which], device))
            for which in layout.which
        ]
        clean, target, paths = self._pick(queries)
        chosen = (on_device(layout.query, device), on_device(layout.row, device))
        return _gradients(
            self.lm, clean, target, paths, points, layout.slots(device), False, chosen
        )


def _even_batches(query: np.ndarray, row_budget: int) -> Iterator[np.ndarray]:
    """Indices of points, given the query of each, in batches of queries that have about as many:
    a batch holds as many rows for each of its queries as for the one with most."""
    queries, count = np.unique(query, return_counts=True)
    order = np.argsort(-count, kind="stable")
    start = 0
    while start < len(order):
        most = count[order[start]]
        fitting = max(1, row_budget // most)
        stop = start + 1
        spare = PASS
        while stop < len(order) and stop - start < fitting:
            few = count[order[stop]]
            if 2 * few <= most:
                spare -= most - few
                if spare < 0:
                    break
            stop += 1
        chosen = np.flatnonzero(np.isin(query, queries[order[start:stop]]))
        parts = -(-len(chosen) // row_budget) if stop == start + 1 else 1  # one query, too many
        yield from np.array_split(chosen, parts)
        start = stop


@dataclass
class _Layout:
    """Where K points of Q queries stand. In the leaves of their layer: `column` (K,) of the query's
    row. In the batch: `row` (K,); row 0 of each query takes the padding. `which`, L x (Q, P), are
    the points of each layer's leaves, padded with point 0; `count` (L,) the rows from there on."""

    query: np.ndarray
    layer: np.ndarray
    column: np.ndarray
    row: np.ndarray
    which: list[np.ndarray]
    count: np.ndarray

    @classmethod
    def of(cls, query: np.ndarray, layer: np.ndarray, queries: int, layers: int) -> _Layout:
        """For points of the given queries and layers."""
        number = np.zeros((layers, queries), int)
        np.add.at(number, (layer, query), 1)
        order = np.lexsort((query, layer))
        group_start = np.cumsum(number).reshape(number.shape) - number
        column = np.empty(len(query), int)
        column[order] = np.arange(len(query)) - group_start[layer, query][order]
        below = np.cumsum(number, 0) - number  # points of the query in lower layers
        row = 1 + below[layer, query] + column
        which = []
        for one in range(layers):
            points = np.zeros((queries, number[one].max()), int)
            here = layer == one
            points[query[here], column[here]] = np.flatnonzero(here)
            which.append(points)
        return cls(query, layer, column, row, which, 1 + np.cumsum(number, 0).max(1))

    def slots(self, device: torch.device) -> list[Slots]:
        """For each layer, the rows of the points of its leaves."""
        slots = []
        for layer, points in enumerate(self.which):
            rows = np.zeros(points.shape, int)
            here = self.layer == layer
            rows[self.query[here], self.column[here]] = self.row[here]
            slots.append(Slots(on_device(torch.from_numpy(rows), device), int(self.count[layer])))
        return slots


class Slots(NamedTuple):
    """The rows (Q, P) of a layer's leaves in the batch; the `count` of rows from there on."""

    row: Tensor
    count: int


@dataclass
class _Found:
    """Gradients at a layer's leaves, L x (Q, P, W); the answer's probability for all rows, (Q, R);
    with a clean row, the gradients there, L x (Q, W)."""

    gradient: list[Tensor]
    probability: Tensor
    end: list[Tensor]


def _gradients(lm, clean, target, paths, points, slots, with_clean, chosen=None) -> _Found:
    """Gradients at `points`, for each layer (baselines (Q or 1, P), places (Q or 1, P)). `slots`:
    see `_grow`. `with_clean`: the first row is the clean one, the common end of all paths."""

    def rows(layer):
        leaf = paths.rows(layer, *points[layer])
        return torch.cat([paths.end[layer], leaf], 1) if with_clean and layer == 0 else leaf

    with torch.enable_grad():
        hidden, leaves, end = _grow(lm, clean, rows, slots, with_clean, paths.site)
        if chosen is not None:  # the padding needs no probabilities
            hidden, target = hidden[chosen][:, None], target[chosen[0]]
        probability = answer_probabilities(lm, hidden, target, need_grad=True)
        if chosen is not None:
            probability = probability[:, 0]
        present = [leaf for leaf in leaves if leaf.shape[1]]
        found = iter(torch.autograd.grad(probability.sum(), present))
    gradient = [next(found) if leaf.shape[1] else leaf.detach() for leaf in leaves]
    if with_clean:
        end[0], gradient[0] = gradient[0][:, 0].to(lm.score_dtype), gradient[0][:, 1:]
        probability = probability[:, 1:]
    return _Found(gradient, probability.detach(), end)


def _grow(lm, clean, rows, slots, with_clean, site):
    """Push a growing batch of rows through the layers.

    `rows(layer)` (Q, P, W) is what the rows that start in `layer` have at its site module's output;
    they come last, or where `slots[layer]` says. Returns the last layer's output (Q, rows, d), the
    leaves, and a list that a backward pass fills with the gradients there of row 0, (Q, W) a layer,
    when that row is the clean one."""
    hidden, leaves, at_end = None, [], [None] * lm.num_layers
    width = lm.num_neurons if site == "pre_activation" else None

    def keep(layer):
        def hook(_, __, output):
            queries = hidden.shape[0]

            def store(gradient):
                clean_row = gradient.reshape(queries, -1, gradient.shape[-1])[:, 0, :width]
                at_end[layer] = clean_row.to(lm.score_dtype)

            output.register_hook(store)

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
                hidden = _place(hidden, new, None if slots is None else slots[layer])
    return hidden, leaves, at_end


def _place(hidden: Tensor | None, new: Tensor, slots: Slots | None) -> Tensor:
    """`hidden` (Q, R, d) with the rows `new` (Q, P, d) after it or at their slots."""
    old = [] if hidden is None else [hidden]
    if slots is None:
        return torch.cat([*old, new], 1)
    empty = new.new_zeros(len(new), slots.count - sum(one.shape[1] for one in old), new.shape[2])
    return torch.cat([*old, empty], 1).scatter(1, slots.row[..., None].expand_as(new), new)
