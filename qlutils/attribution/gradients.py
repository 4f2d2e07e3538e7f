"""Gradients of the answer's probability at points of many paths, by one pass forward and back.

Points become rows: copies of a query's last token in which one layer's neurons are replaced. The
rows of all layers go through the model as one growing batch (see `model.passes`): entering layer l
it holds the rows of layers 0..l-1; layer l adds its own, its leaf. One backward pass then reaches
the L leaves.

Shapes: Q queries, B baselines a query, P points of a layer and query, K points in all, R rows a
query, L layers, d residual width, W the width of a leaf's row (see `paths`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlutils.attribution.paths import Paths
from qlutils.model.answer import answer_probabilities
from qlutils.model.passes import (
    CleanPass,
    on_device,
    replaying,
    run_layer,
    site_module,
    start_rows,
)
from qlutils.model.trace import hooked

# Rows up to which a pass through the model takes about as long as for one: it reads all weights.
PASS_ROWS = 40


@dataclass
class Leaf:
    """Points of a layer: on the paths from baselines `index` (Q or 1, P) at the places `node`, as
    many. Their rows come after those of lower layers or, where `row` (Q, P) says so, at these
    places; then the batch has `count` rows a query from there on."""

    index: Tensor
    node: Tensor
    row: Tensor | None = None
    count: int = 0

    def place(self, hidden: Tensor | None, new: Tensor) -> Tensor:
        """The rows `hidden` (Q, R, d) of lower layers together with the leaf's, `new` (Q, P, d)."""
        old = [] if hidden is None else [hidden]
        if self.row is None:
            return torch.cat([*old, new], 1)
        missing = self.count - sum(one.shape[1] for one in old)
        empty = new.new_zeros(len(new), missing, new.shape[2])
        return torch.cat([*old, empty], 1).scatter(1, self.row[..., None].expand_as(new), new)


@dataclass
class Gradients:
    """`at`, L x (Q, P, W), gradients at the leaves; `probability` of the answer in the rows, (Q, R)
    or those asked for, (K,); `end`, L x (Q, W), gradients at the paths' ends, if asked for."""

    at: list[Tensor]
    probability: Tensor
    end: list[Tensor]


@dataclass
class Replay:
    """Q queries with what running their last token again takes: their clean passes, answer tokens
    `target` (Q,), the probabilities of these there, `p_clean` (Q,), and paths."""

    lm: object
    clean: CleanPass
    target: Tensor
    p_clean: Tensor
    paths: Paths

    def pick(self, queries: Tensor) -> Replay:
        """Some of the queries."""
        queries = on_device(queries, self.target.device)
        target, p_clean = self.target[queries], self.p_clean[queries]
        return Replay(self.lm, self.clean.pick(queries), target, p_clean, self.paths.pick(queries))

    def gradients(
        self,
        leaves: list[Leaf],
        *,
        with_end: bool = False,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> Gradients:
        """Gradients at each layer's leaf. `with_end`: also at the end of the paths, which is the
        clean pass for every layer and baseline: one more row serves them all. `rows`: (query, row)
        of the K points whose probabilities are wanted; all others are padding."""
        lm, target = self.lm, self.target
        with torch.enable_grad():
            hidden, points, end = self._grow(leaves, with_end)
            if rows is not None:
                hidden, target = hidden[rows][:, None], target[rows[0]]
            probability = answer_probabilities(lm, hidden, target, need_grad=True)
            present = [leaf for leaf in points if leaf.shape[1]]
            found = iter(torch.autograd.grad(probability.sum(), present))
        at = [next(found) if leaf.shape[1] else leaf.detach() for leaf in points]
        probability = probability.detach() if rows is None else probability.detach()[:, 0]
        if with_end:
            end[0], at[0] = at[0][:, 0].to(lm.score_dtype), at[0][:, 1:]
            probability = probability[:, 1:]
        return Gradients(at, probability, end)

    def _grow(self, leaves: list[Leaf], with_end: bool):
        """The last layer's output (Q, R, d); the leaves' rows, L x (Q, P, W); and a list that the
        backward pass fills with the gradients of row 0, the clean one, L x (Q, W) (`with_end`).

        With 2 points a layer the batch has 0, 2, 4, ... rows a query when it enters layers 0, 1,
        2, ...: a layer runs the rows that are there, then those of its own leaf begin at its
        output. `with_end`: the clean row begins with the leaf of layer 0, and is a row of every
        later layer."""
        lm, site = self.lm, self.paths.site
        hidden, points, end = None, [], [None] * lm.num_layers
        with replaying(lm):
            for layer, leaf in enumerate(leaves):
                rows = self.paths.rows(layer, leaf.index, leaf.node)
                if with_end and layer == 0:
                    rows = torch.cat([self.paths.end[0], rows], 1)
                points.append(rows.requires_grad_())
                if hidden is not None:
                    with hooked(self._watch_clean_row(layer, end) if with_end else ()):
                        hidden = run_layer(lm, self.clean, layer, hidden)
                if rows.shape[1]:
                    hidden = leaf.place(hidden, start_rows(lm, self.clean, layer, rows, site))
        return hidden, points, end

    def _watch_clean_row(self, layer: int, end: list):
        """A hook that puts the gradient at the layer's site module in row 0 into `end[layer]`."""
        lm, site = self.lm, self.paths.site
        width = lm.num_neurons if site == "pre_activation" else None

        def watch(_, __, output):
            def store(gradient):
                of_query = gradient.reshape(len(self.target), -1, gradient.shape[-1])
                end[layer] = of_query[:, 0, :width].to(lm.score_dtype)

            output.register_hook(store)

        yield site_module(lm, layer, site).register_forward_hook(watch)

    def gradients_at(self, path: Tensor, alpha: Tensor, row_budget: int) -> tuple[Tensor, Tensor]:
        """(K, W) gradients and (K,) probabilities at `alpha` (K,) of the paths `path` (3, K: query,
        baseline, layer), in batches of at most `row_budget` rows."""
        width, device = self.paths.end[0].shape[-1], self.target.device
        gradient = torch.zeros(len(alpha), width, dtype=self.lm.score_dtype, device=device)
        probability = gradient.new_zeros(len(alpha))
        for chosen in even_batches(path[0].numpy(), row_budget):
            query, baseline, layer = path[:, chosen].numpy()
            order = np.lexsort((query, layer))
            chosen, query, layer = chosen[order], query[order], layer[order]
            queries, query = np.unique(query, return_inverse=True)
            some = self.pick(torch.from_numpy(queries))
            layout = Layout(query, layer, len(queries), self.lm.num_layers)
            leaves = layout.leaves(baseline[order], alpha[chosen].numpy(), device)
            rows = on_device(query, device), on_device(layout.row, device)
            found = some.gradients(leaves, rows=rows)
            column, at = on_device(layout.column, device), on_device(chosen, device)
            probability[at] = found.probability
            for here, of_layer in zip(layout.of_layer, found.at):
                gradient[at[here]] = of_layer[rows[0][here], column[here]].to(gradient)
        return gradient, probability


def even_batches(query: np.ndarray, row_budget: int) -> Iterator[np.ndarray]:
    """Indices of points, given the query of each, in batches. A batch holds as many rows for each
    of its queries as for the one with most; so a query with less than half as many joins it only
    while the padding costs less than a pass of its own.

    Queries with 100, 90 and 4 points: the first two share a batch of 200 rows; the third would add
    96 rows of padding, more than `PASS_ROWS`, and gets a batch of its own."""
    queries, count = np.unique(query, return_counts=True)
    order = np.argsort(-count, kind="stable")
    start = 0
    while start < len(order):
        most, padding = count[order[start]], 0
        stop = start + 1
        while stop < len(order) and (stop - start + 1) * most <= row_budget:
            few = count[order[stop]]
            padding += most - few if 2 * few <= most else 0
            if padding > PASS_ROWS:
                break
            stop += 1
        chosen = np.flatnonzero(np.isin(query, queries[order[start:stop]]))
        parts = -(-len(chosen) // row_budget) if stop == start + 1 else 1  # one query, too many
        yield from np.array_split(chosen, parts)
        start = stop


class Layout:
    """Where K points of Q queries stand, sorted by layer, then query: in the batch, at `row` (K,)
    of their query's rows (row 0 takes the padding); in their layer's leaf, at `column` (K,) of the
    query's. `of_layer`: the slice of each layer's points.

    Points of (layer, query) (0, a), (0, a), (0, b), (1, b): `column` is 0, 1, 0, 0; `row` 1, 2, 1,
    2, as b's point of layer 1 comes after its own of layer 0. The leaves have 2 columns and 1; the
    batch has 3 rows a query from layer 0 on: row 0 and at most two points."""

    def __init__(self, query: np.ndarray, layer: np.ndarray, queries: int, layers: int):
        self.query, self.queries = query, queries
        number = np.zeros((layers, queries), int)
        np.add.at(number, (layer, query), 1)
        first = (np.cumsum(number) - number.ravel()).reshape(number.shape)
        self.column = np.arange(len(query)) - first[layer, query]
        upto = np.cumsum(number, 0)  # points of a query up to a layer
        self.row = 1 + (upto - number)[layer, query] + self.column
        self.width = number.max(1)  # (L,) columns of the leaves
        self.count = 1 + upto.max(1)  # (L,) rows of the batch from there on
        stops = np.cumsum(number.sum(1))
        self.of_layer = [slice(a, b) for a, b in zip([0, *stops[:-1]], stops)]

    def leaves(self, baseline: np.ndarray, alpha: np.ndarray, device) -> list[Leaf]:
        """The leaves of points at `alpha` (K,) of the paths from `baseline` (K,)."""
        leaves = []
        for here, width, count in zip(self.of_layer, self.width, self.count):
            tables = []
            for values in (baseline, alpha, self.row):
                table = np.zeros((self.queries, width), values.dtype)  # padded with row 0
                table[self.query[here], self.column[here]] = values[here]
                tables.append(on_device(torch.from_numpy(table), device))
            leaves.append(Leaf(*tables, count=int(count)))
        return leaves
