"""Nodes and weights of the rules whose nodes are fixed in advance."""

from functools import cache

import numpy as np
import torch


@cache
def quadrature(rule, steps):
    """(nodes, weights) on [0, 1] of a rule with `steps` nodes fixed in advance.

    right: the paper's Riemann sum, alpha = j/m (Eq. 10). left: (j-1)/m. midpoint: (j-1/2)/m.
    endpoints: linspace(0, 1, m) weighted 1/m, as public code for knowledge neurons does. gauss:
    Gauss-Legendre. clenshaw: Clenshaw-Curtis in u, alpha = u**3, which sees what happens close to
    the baseline. The weights sum to 1 (clenshaw: from 3 nodes on)."""
    if rule == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return (nodes + 1) / 2, weights / 2
    if rule == "clenshaw":
        nodes, weights = _clenshaw_curtis(steps)
        return nodes**3, weights * 3 * nodes**2
    j = np.arange(1, steps + 1)
    nodes = {
        "right": j / steps,
        "left": (j - 1) / steps,
        "midpoint": (j - 0.5) / steps,
        "endpoints": np.linspace(0, 1, steps),
    }[rule]
    return nodes, np.full(steps, 1 / steps)


def _clenshaw_curtis(count):
    """Nodes and weights on [0, 1]: the weights integrate Chebyshev polynomials of degree < `count`
    exactly, which is a linear system at Chebyshev's extrema."""
    angle = np.pi * np.arange(count) / (count - 1)
    degree = np.arange(count)
    exact = np.zeros(count)
    exact[::2] = 1 / (1 - degree[::2] ** 2)
    chebyshev = np.cos(np.outer(degree, angle))
    weights = np.linalg.solve(chebyshev, exact)
    return (1 - np.cos(angle)) / 2, weights


def fixed_plan(rule, steps, baselines):
    """(baseline, node, weight), each (1, P), of the points of a rule with the same nodes
    everywhere. The first points are the paths' beginnings, of weight 0 where the rule has no node
    there, because the completeness gap needs P at them. A node at the paths' ends, where one row
    serves all layers and baselines, is left out, and its weight given apart (0: there is none)."""
    nodes, weights = quadrature(rule, steps)
    at_end = weights[-1] if nodes[-1] == 1 else 0.0
    if at_end:
        nodes = nodes[:-1]
        weights = weights[:-1]
    if nodes[0] != 0:
        nodes = np.insert(nodes, 0, 0.0)
        weights = np.insert(weights, 0, 0.0)
    baseline = np.tile(np.arange(baselines), len(nodes))
    points = baseline, nodes.repeat(baselines), weights.repeat(baselines)
    return tuple(torch.from_numpy(one)[None] for one in points), float(at_end)
