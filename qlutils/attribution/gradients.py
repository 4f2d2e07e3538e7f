"""Gradients of the answer's probability at points of many paths, by one pass forward and back.

Points become rows: copies of a query's last token in which one layer's neurons are replaced. The
rows of all layers go through the model as one growing batch (see `model.passes`): entering layer l
it holds the rows of layers 0..l-1; layer l adds its own, its leaf. One backward pass then reaches
the L leaves.

Shapes: Q queries, B baselines a query, P points of a layer and query, K points in all, R rows a
query, L layers, d residual width, W the width of a leaf's row (see `paths`).
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad

from qlutils.attribution.paths import Paths
from qlutils.model.answer import answer_probabilities
from qlutils.model.passes import (
    CleanPass,
    on_device,
    replaying,
    run_layer,
    site_modules,
    start_rows,
)
from qlutils.model.trace import edited

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

    def place(self, hidden, new):
        """The rows `hidden` (Q, R, d) of lower layers together with the leaf's, `new` (Q, P, d)."""
        if self.row is None:
            return torch.cat([hidden, new], 1)
        missing = self.count - hidden.shape[1]
        wider = pad(hidden, (0, 0, 0, missing))
        row = self.row[..., None].expand_as(new)
        return wider.scatter(1, row, new)


@dataclass
class Replay:
    """Q queries with what running their last token again takes: their clean passes, answer tokens
    `target` (Q,) and paths."""

    lm: object
    clean: CleanPass
    target: Tensor
    paths: Paths

    def pick(self, queries):
        """Some of the queries."""
        queries = on_device(queries, self.target.device)
        return Replay(
            self.lm,
            self.clean.pick(queries),
            self.target[queries],
            self.paths.pick(queries),
        )

    def gradients(self, leaves, rows=None):
        """Gradients at each layer's leaf, L x (Q, P, W), and the answer's probability in all rows
        (Q, R). `rows`: (query, row) of the K points whose probabilities (K,) are wanted; all others
        are padding."""
        target = self.target
        with torch.enable_grad():
            hidden, points = self._grow(leaves)
            if rows is not None:
                hidden = hidden[rows][:, None]
                target = target[rows[0]]
            p = answer_probabilities(self.lm, hidden, target, need_grad=True)
            at = torch.autograd.grad(p.sum(), points, materialize_grads=True)
        p = p.detach()
        return at, p if rows is None else p[:, 0]

    def _grow(self, leaves):
        """The last layer's output (Q, R, d) and the leaves' rows, L x (Q, P, W).

        With 2 points a layer the batch has 0, 2, 4, ... rows a query when it enters layers 0, 1,
        2, ...: a layer runs the rows that are there, then those of its own leaf begin at its
        output."""
        lm = self.lm
        clean = self.clean
        paths = self.paths
        points = []
        hidden = clean.inputs[0][:, :0]  # no row yet
        with replaying(lm):
            for layer, leaf in enumerate(leaves):
                rows = paths.rows(layer, leaf.index, leaf.node)
                points.append(rows.requires_grad_())
                if hidden.shape[1]:
                    hidden = run_layer(lm, clean, layer, hidden)
                if rows.shape[1]:
                    begun = start_rows(lm, clean, layer, rows, paths.site)
                    hidden = leaf.place(hidden, begun)
        return hidden, points

    def gradients_at_end(self):
        """(Q, L, W) gradients at the paths' ends: the clean pass, whatever the baseline, so that
        one row serves all layers."""
        lm = self.lm
        points = []

        def watch(_, __, output):
            points.append(output)
            return output.clone()  # which the layer may change in place

        sites = site_modules(lm, self.paths.site)
        with torch.enable_grad(), replaying(lm), edited(sites, after=watch):
            hidden = self.clean.inputs[0].detach().requires_grad_()
            for layer in range(lm.num_layers):
                hidden = run_layer(lm, self.clean, layer, hidden)
            p = answer_probabilities(lm, hidden, self.target, need_grad=True)
            at = torch.autograd.grad(p.sum(), points)
        at = torch.stack([one.flatten(0, -2) for one in at], 1)  # (Q, L, W)
        width = self.paths.end[0].shape[-1]  # a fused gate_up_proj gives more
        return at[..., :width].to(lm.score_dtype)

    def gradients_at(self, path, alpha, row_budget):
        """(K, W) gradients and (K,) probabilities at `alpha` (K,) of the paths `path` (K, 3: query,
        baseline, layer), in batches of at most `row_budget` rows."""
        path = path.numpy()
        alpha = alpha.numpy()
        parts = []
        found = []
        for chosen in even_batches(path[:, 0], row_budget):
            chosen = chosen[path[chosen, 2].argsort(kind="stable")]
            parts.append(chosen)
            found.append(self._at_points(path[chosen], alpha[chosen]))
        back = np.concatenate(parts).argsort()
        back = on_device(back, self.target.device)
        gradients, probabilities = zip(*found)
        gradient = torch.cat(gradients)[back].to(self.lm.score_dtype)
        return gradient, torch.cat(probabilities)[back]

    def _at_points(self, path, alpha):
        """`gradients_at` of points in the order of their layers, in one batch.

        The batch has as many rows for each query as for the one with most points, and a leaf as
        many columns; row 0 takes the padding. Points of (layer, query) (0, a), (0, a), (0, b),
        (1, b) get rows 1, 2, 1, 2, as b's point of layer 1 comes after its own of layer 0, and the
        leaves 2 columns and 1."""
        layers = self.lm.num_layers
        device = self.target.device
        query, baseline, layer = path.T
        queries, query = np.unique(query, return_inverse=True)
        row = 1 + _rank(query)
        column = _rank(query + layer * len(queries))  # in the leaf
        points = np.zeros((len(queries), layers), int)
        np.add.at(points, (query, layer), 1)
        width = points.max(0)
        count = 1 + points.cumsum(1).max(0)  # rows a query from each layer on
        column = column + (width.cumsum() - width)[layer]  # among those of all leaves

        def by_leaf(values):
            table = np.zeros((len(queries), width.sum()), values.dtype)
            table[query, column] = values
            table = on_device(table, device)
            return table.split(width.tolist(), 1)

        leaves = list(map(Leaf, *map(by_leaf, (baseline, alpha, row)), count.tolist()))
        query, row, column = on_device(np.stack([query, row, column]), device)
        at, probability = self.pick(queries).gradients(leaves, rows=(query, row))
        return torch.cat(at, 1)[query, column], probability


def _rank(group):
    """How many equal entries come before each."""
    return pd.Series(group).groupby(group).cumcount().to_numpy()


def even_batches(query, row_budget):
    """Indices of points, given the query of each, in batches. A batch holds as many rows for each
    of its queries as for the one with most; so a query with less than half as many joins it only
    while the padding costs less than a pass of its own.

    Queries with 100, 90 and 4 points: the first two share a batch of 200 rows; the third would add
    96 rows of padding, more than `PASS_ROWS`, and gets a batch of its own."""
    queries, count = np.unique(query, return_counts=True)
    order = np.argsort(-count, kind="stable")
    queries = queries[order]
    count = count[order]
    start = 0
    while start < len(queries):
        most = count[start]
        few = 2 * count <= most
        padding = np.where(few, most - count, 0)[start:]
        padding = padding.cumsum()
        rows = most * np.arange(1, len(padding) + 1)
        fit = (padding <= PASS_ROWS) & (rows <= row_budget)
        size = max(1, fit.cumprod().sum())  # as many as fit before the first that does not
        together = queries[start : start + size]
        chosen = np.flatnonzero(np.isin(query, together))
        parts = 1
        if size == 1:  # may be too many of one query
            parts = ceil(len(chosen) / row_budget)
        yield from np.array_split(chosen, parts)
        start += size
