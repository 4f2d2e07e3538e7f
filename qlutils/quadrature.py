"""How to sum the integral: nodes and weights of each rule, and how far each is from the converged integral."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

RULES = ("right", "left", "endpoints", "midpoint", "gauss", "auto")
COMPARED = (("right", 20), ("left", 20), ("endpoints", 20), ("midpoint", 20), ("midpoint", 6), ("gauss", 8), ("gauss", 6),
            ("auto", 6))
CONVERGED = 100  # Gauss nodes
LONG = 8  # evaluations from which on "auto" looks where on a path the probability moves,
PROFILE = 5  # with so many forward passes,
UNIFORM = 0.6  # and spreads this share of its nodes evenly whatever they say

# A plan says, for each layer, where gradients are taken: (index, node, weight), each (Q or 1, P): the baselines of P
# points, their places on the path, and their weights. Lists of a query's own are padded with points of weight 0.
Plan = list[tuple[Tensor, Tensor, Tensor]]


@cache
def quadrature(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(nodes, weights) on [0, 1] of a rule with `steps` nodes; the weights sum to 1.

    right: the paper's Riemann sum, alpha = j/m (Eq. 10). left: (j-1)/m. midpoint: (j-1/2)/m. endpoints:
    linspace(0, 1, m) weighted 1/m, as public code for knowledge neurons does. gauss: Gauss-Legendre."""
    j = np.arange(1, steps + 1)
    if rule == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return (nodes + 1) / 2, weights / 2
    nodes = {"right": j / steps, "left": (j - 1) / steps, "midpoint": (j - 0.5) / steps,
             "endpoints": np.linspace(0, 1, steps)}[rule]
    return nodes, np.full(steps, 1 / steps)


def fixed_plan(rule: str, steps: int, baselines: int, layers: int) -> tuple[Plan, float | None]:
    """The same nodes on every path. The first points are the paths' beginnings, of weight 0 where the rule has no node
    there, because the completeness gap needs P at them. A node at the end of a path is the clean pass, for every baseline
    and layer; it is left out of the plan and its weight returned, for the one row that serves them all."""
    nodes, weights = (torch.from_numpy(x) for x in quadrature(rule, steps))
    at_end = float(weights[-1]) if nodes[-1] == 1 else None
    if at_end is not None:
        nodes, weights = nodes[:-1], weights[:-1]
    if nodes[0] != 0:
        nodes, weights = (torch.cat([one.new_zeros(1), one]) for one in (nodes, weights))
    index = torch.arange(baselines).repeat(len(nodes))[None]
    return [(index, nodes.repeat_interleave(baselines)[None], weights.repeat_interleave(baselines)[None])] * layers, at_end


def adaptive_plan(probabilities, p_start: Tensor, p_clean: Tensor, steps: int) -> Plan:
    """The rule "auto": `steps` gradient evaluations a layer and baseline on average, where the probability moves.

    `p_start` (Q, B, L) and `p_clean` (Q,) are P at the paths' ends; `probabilities(plan)` -> L x (Q, P) by forward passes.
    Every path gets a quarter of `steps` (at least 1); the rest of a query's evaluations go to its paths in proportion to
    |P(w) - P(b)|, which is what their attributions sum to: layers that hold no knowledge neurons need few. They sit at
    Gauss-Legendre nodes; on long paths at those of u, a monotone change of variables alpha(u) in which P moves evenly (mixed
    with an even share). What a query gets depends on that query alone; shorter lists are padded with points of weight 0."""
    change = (p_clean[:, None, None] - p_start).abs().double().cpu().numpy()
    queries, baselines, layers = change.shape
    share, least = change / np.maximum(change.sum((1, 2), keepdims=True), 1e-300), max(1, steps // 4)
    counts = least + np.floor(share * (steps - least) * baselines * layers).astype(int)
    maps, plan = _evenly(probabilities, counts >= LONG, p_start, p_clean), []
    for layer in range(layers):
        index = np.zeros((queries, counts[:, :, layer].sum(1).max()), int)
        node, weight = np.full(index.shape, 0.5), np.zeros(index.shape)
        for q, count in enumerate(counts[:, :, layer]):
            points = [quadrature("gauss", n) for n in count.tolist()]
            for b, to_alpha in maps.get((q, layer), {}).items():
                u, w = points[b]
                w = w * to_alpha.derivative()(u)
                points[b] = to_alpha(u), w / w.sum()  # exact for a constant
            index[q, :count.sum()] = np.repeat(np.arange(baselines), count)
            node[q, :count.sum()], weight[q, :count.sum()] = (np.concatenate(one) for one in zip(*points))
        plan.append(tuple(torch.from_numpy(one) for one in (index, node, weight)))
    return plan


def _evenly(probabilities, long, p_start, p_clean) -> dict:
    """{(query, layer): {baseline: alpha(u)}} of the paths that are `long` (Q, B, L), from P at a few points of them."""
    inner = (1 - np.cos(np.pi * np.arange(1, PROFILE + 1) / (PROFILE + 1))) / 2
    alpha, plan = np.concatenate([[0.0], inner, [1.0]]), []
    for one in long.transpose(2, 0, 1):  # (Q, B): each query's long paths, as a list padded with points of weight 0
        most = one.sum(1).max()
        path = np.argsort(~one, 1, kind="stable")[:, :most]
        points = path, np.tile(inner, (len(one), most)), np.take_along_axis(one, path, 1).astype(float)
        plan.append(tuple(torch.from_numpy(part if part is points[1] else part.repeat(PROFILE, 1)) for part in points))
    profiles = [one.double().cpu().numpy() for one in probabilities(plan)]
    p_start, p_clean = (one.double().cpu().numpy() for one in (p_start, p_clean))
    rank, maps = PROFILE * (long.cumsum(1) - 1), {}
    for q, b, layer in np.argwhere(long):
        at = rank[q, b, layer]
        moved = np.abs(np.diff([p_start[q, b, layer], *profiles[layer][q, at:at + PROFILE], p_clean[q]]))
        u = np.cumsum([0.0, *(1 - UNIFORM) * moved / max(moved.sum(), 1e-30) + UNIFORM * np.diff(alpha)])
        maps.setdefault((int(q), int(layer)), {})[int(b)] = PchipInterpolator(u / u[-1], alpha)
    return maps


def compare_rules(lm, queries: pd.DataFrame, spec, *, t: float = 0.2, sample: int = 20, seed: int = 0,
                  compared=COMPARED) -> pd.DataFrame:
    """Each rule against Gauss-Legendre with 100 nodes on a seeded sample of a run's queries.

    A row a rule: gradient evaluations a layer (and baseline), mean and 5th percentile over queries of the Jaccard
    index of the KN sets at `t`, mean over queries of the largest error of a score over the largest score, n."""
    from .attribution import attribute_encoded
    from .neurons import knowledge_neurons

    rows = queries.iloc[np.sort(np.random.default_rng(seed).permutation(len(queries))[:sample])]
    encoded = [lm.encode(prompt, answer) for prompt, answer in zip(rows["prompt"], rows["object"])]
    names = rows["prompt"].tolist()
    exact = attribute_encoded(lm, encoded, replace(spec, rule="gauss", steps=CONVERGED), names).scores
    wanted, top = knowledge_neurons(exact, t), exact.abs().flatten(1).amax(1).clamp_min(1e-30)
    out = []
    for rule, steps in compared:
        result = attribute_encoded(lm, encoded, replace(spec, rule=rule, steps=steps), names)
        pairs = list(zip(knowledge_neurons(result.scores, t), wanted))
        jaccard = np.array([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs])
        error = ((result.scores - exact).abs().flatten(1).amax(1) / top).mean()
        out.append({"rule": rule, "steps": steps, "evaluations": float(steps), "jaccard": jaccard.mean(),
                    "jaccard_p5": np.percentile(jaccard, 5), "error": float(error), "n": len(pairs)})
    return pd.DataFrame(out)
