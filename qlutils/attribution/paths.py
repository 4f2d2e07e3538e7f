"""The straight paths along which neurons move, from a baseline to their clean values.

Shapes: Q queries, B baselines a query, P points a layer, L layers, N neurons a layer, d residual
width, W the width of a row: d, at pre-activations N.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from qlutils.attribution.coordinate import Coordinate


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

    @classmethod
    def of(cls, lm, clean, starts, spec):
        """From the baselines `starts` (Q, B, L, N), None standing for zero."""
        w = torch.cat(clean.neurons, 1)[:, None]  # (Q, 1, L, N)
        starts = torch.zeros_like(w) if starts is None else starts
        begin = starts.unbind(2)
        end = clean.neurons
        if spec.site == "down_input":
            end = clean.written
            with torch.no_grad():
                begin = [down(one) for down, one in zip(lm.downs, begin)]
        of_w = spec.method == "amig" and spec.amig_factor == "w"
        factor = w.expand_as(starts) if of_w else w - starts
        return cls(lm, spec.site, begin, end, factor.to(lm.score_dtype))

    def pick(self, queries):
        """The paths of some of the queries."""
        begin, end = ([one[queries] for one in ends] for ends in (self.begin, self.end))
        return replace(self, begin=begin, end=end, factor=self.factor[queries])

    def rows(self, layer, index, node):
        """(Q, P, W) points at `node` (Q or 1, P) of the paths from baselines `index`, as many."""
        begin = self.begin[layer]
        query = torch.arange(len(begin), device=begin.device)[:, None]
        dtype = self.factor.dtype  # bfloat16 would round the nodes, too
        start = begin[query, index].to(dtype)
        end = self.end[layer].to(dtype)
        return torch.lerp(start, end, node[..., None].to(start)).to(begin.dtype)

    def neuron_gradients(self, layer, gradient):
        """(..., N) gradients at a layer's neurons from those at rows (..., W)."""
        if self.site == "pre_activation":
            return gradient
        with torch.enable_grad():
            size = (*gradient.shape[:-1], self.lm.num_neurons)
            neurons = self.begin[layer].new_zeros(size).requires_grad_()
            written = self.lm.downs[layer](neurons)
        [found] = torch.autograd.grad(written, neurons, gradient.to(written))
        return found.to(gradient.dtype)

    def rise(self, path, gradient):
        """(K,) change of the probability along the paths `path` (K, 3), to first order: a gradient
        (K, W) each, times end - begin."""
        dtype = self.factor.dtype
        changes = [end.to(dtype) - begin.to(dtype) for end, begin in zip(self.end, self.begin)]
        return (torch.stack(changes, 2)[tuple(path.T)] * gradient).sum(1)

    def largest_score(self, path, gradient):
        """(K,) largest |attribution| of a neuron by each of the gradients (K, W) alone."""
        largest = gradient.new_zeros(len(gradient))
        for layer in path[:, 2].unique().tolist():
            chosen = (path[:, 2] == layer).nonzero()[:, 0]
            factor = self.factor[tuple(path[chosen].T)]
            chosen = chosen.to(gradient.device)
            at_neurons = self.neuron_gradients(layer, gradient[chosen])
            largest[chosen] = (factor * at_neurons).abs().amax(1)
        return largest

    def scores(self, mean, layer):
        """(Q, N) raw attributions of a layer, summed over baselines, from its mean gradients
        (Q, B, W)."""
        return (self.factor[:, :, layer] * self.neuron_gradients(layer, mean)).sum(1)

    def coordinate(self):
        """Each path's coordinate: straight where no norm follows the MLP."""
        norms = self.lm.arch.norm_epsilons
        if self.site == "pre_activation":
            norms = [None] * len(norms)
        return Coordinate.of(self.begin, self.end, [inf if one is None else one for one in norms])
