"""How to sum the integral: nodes and weights of each rule, and how far each is from the converged integral."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

RULES = ("right", "left", "endpoints", "midpoint", "gauss", "auto")
COMPARED = (("right", 20), ("left", 20), ("endpoints", 20), ("midpoint", 20), ("midpoint", 6), ("gauss", 8), ("gauss", 6),
            ("auto", 6))
CONVERGED = 100  # Gauss nodes
PROFILE = 7  # forward passes a path with which "auto" looks where the probability moves
POWER = 0.75  # of the total variation along a path, in proportion to which a query shares out its evaluations
UNIFORM = 0.7  # share of "auto"'s nodes that are spread evenly whatever the profile says

# A plan says, for each layer, where gradients are taken: (index (P,), node (Q or 1, P), weight (Q or 1, P)), the
# baselines of P points, their places on the path and their weights.
Plan = list[tuple[Tensor, Tensor, Tensor]]


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
    index = torch.arange(baselines).repeat(len(nodes))
    return [(index, nodes.repeat_interleave(baselines)[None], weights.repeat_interleave(baselines)[None])] * layers, at_end


def adaptive_plan(probabilities, p_clean: Tensor, steps: int) -> tuple[Plan, Tensor]:
    """The rule "auto": `steps` gradient evaluations a layer and baseline on average, where the probability moves; and P at
    the paths' beginnings (Q, B, L).

    `probabilities(nodes)` -> (Q, B, L, K) by forward passes; `p_clean` (Q,) is P at the end. A query's evaluations are
    shared among its paths in proportion to the total variation of P along them to the power 0.75 (at least 2 each), and
    placed at Gauss-Legendre nodes of u, a monotone change of variables alpha(u) in which P moves evenly (mixed with an even
    share). What a query gets depends on that query alone; where the queries of a batch want different numbers the shorter
    lists are padded with points of weight 0."""
    inner = (1 - np.cos(np.pi * np.arange(1, PROFILE + 1) / (PROFILE + 1))) / 2
    found = probabilities(torch.from_numpy(np.concatenate([[0.0], inner])))
    end = p_clean[:, None, None, None].expand(*found.shape[:-1], 1)
    profile = torch.cat([found, end], -1).double().cpu().numpy()
    alpha = np.concatenate([[0.0], inner, [1.0]])
    moves = np.abs(np.diff(profile, axis=-1))  # (Q, B, L, K - 1)
    variation = moves.sum(-1)
    share = (variation + 1e-12) ** POWER
    share /= share.sum((1, 2), keepdims=True)
    queries, baselines, layers = variation.shape
    counts = np.maximum(2, np.floor(steps * baselines * layers * share)).astype(int)
    spare = counts.sum((1, 2)) - steps * baselines * layers  # what the floor of two took too much
    top = counts.reshape(queries, -1).argmax(1)
    counts.reshape(queries, -1)[np.arange(queries), top] -= np.clip(spare, 0, counts.reshape(queries, -1).max(1) - 2)
    plan = []
    for layer in range(layers):
        length = counts[:, :, layer].max(0)  # (B,)
        node, weight = np.full((2, queries, length.sum()), 0.5)
        weight[:] = 0
        offset = np.concatenate([[0], np.cumsum(length)])
        for q in range(queries):
            for b in range(baselines):
                n, moved = counts[q, b, layer], moves[q, b, layer]
                density = (1 - UNIFORM) * moved / max(moved.sum(), 1e-30) + UNIFORM * np.diff(alpha)
                u = np.concatenate([[0.0], np.cumsum(density)])
                to_alpha = PchipInterpolator(u / u[-1], alpha)
                at, w = quadrature("gauss", n)
                node[q, offset[b]:offset[b] + n] = to_alpha(at)
                w = w * to_alpha.derivative()(at)
                weight[q, offset[b]:offset[b] + n] = w / w.sum()  # exact for a constant
        index = torch.arange(baselines).repeat_interleave(torch.from_numpy(length))
        plan.append((index, torch.from_numpy(node), torch.from_numpy(weight)))
    return plan, found[..., 0]


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
