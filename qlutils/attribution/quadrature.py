"""How to sum the integral: nodes and weights of each rule, and how far each is from the converged
integral."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor

RULES = ("right", "left", "endpoints", "midpoint", "gauss", "clenshaw", "converged")
# (rule, steps, tolerance) that notebook 01's appendix and the benchmark compare
COMPARED = (
    ("right", 20, None),
    ("endpoints", 20, None),
    ("gauss", 8, None),
    ("converged", None, 0.05),
)
EXACT = 0.005  # the tolerance of "converged" that stands for the exact integral
REFERENCE = 257  # nodes of "clenshaw" that stand for it in the benchmark, which shares no code


@cache
def quadrature(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
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


def _clenshaw_curtis(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1]: the weights integrate Chebyshev polynomials of degree < `count`
    exactly, which is a linear system at Chebyshev's extrema."""
    angle = np.pi * np.arange(count) / (count - 1)
    degree = np.arange(count)
    exact = np.where(degree % 2 == 0, 1 / (1 - degree.astype(float) ** 2 + (degree == 1)), 0.0)
    weights = np.linalg.solve(np.cos(np.outer(degree, angle)), exact)
    return (1 - np.cos(angle)) / 2, weights


def fixed_plan(
    rule: str, steps: int, baselines: int
) -> tuple[tuple[Tensor, Tensor, Tensor], float | None]:
    """(baseline, node, weight), each (1, P), of the points of a rule with the same nodes
    everywhere.

    The first points are the paths' beginnings, of weight 0 where the rule has no node there,
    because the completeness gap needs P at them. A node at the end of a path is the clean pass, for
    every baseline and layer; it is left out and its weight returned, for the one row that serves
    them all."""
    nodes, weights = (torch.from_numpy(x) for x in quadrature(rule, steps))
    at_end = float(weights[-1]) if nodes[-1] == 1 else None
    if at_end is not None:
        nodes, weights = nodes[:-1], weights[:-1]
    if nodes[0] != 0:
        nodes, weights = (torch.cat([one.new_zeros(1), one]) for one in (nodes, weights))
    index = torch.arange(baselines).repeat(len(nodes))[None]
    node, weight = (one.repeat_interleave(baselines)[None] for one in (nodes, weights))
    return (index, node, weight), at_end


def compare_rules(
    lm,
    queries: pd.DataFrame,
    spec,
    *,
    t: float = 0.2,
    sample: int = 20,
    seed: int = 0,
    compared=COMPARED,
) -> pd.DataFrame:
    """Each rule against "converged" with a tolerance of 0.005, on a seeded sample of a run's
    queries.

    A row a rule: gradient evaluations a layer (and baseline), mean and 5th percentile over queries
    of the Jaccard index of the KN sets at `t`; mean over queries of the largest error of a score
    and of a layer's largest completeness gap, both over the query's largest score (the latter NaN
    where scores are normalised); share of the queries that the rule calls converged (NaN where it
    cannot tell), n. The last row is the reference's own."""
    from qlutils.attribution.attribute import attribute_encoded
    from qlutils.neurons.sets import knowledge_neurons

    rows = queries.iloc[np.sort(np.random.default_rng(seed).permutation(len(queries))[:sample])]
    encoded = [lm.encode(prompt, answer) for prompt, answer in zip(rows["prompt"], rows["object"])]
    names = rows["prompt"].tolist()

    def scored(rule, steps, tolerance):
        changed = {"rule": rule, "steps": steps or spec.steps}
        changed["tolerance"] = tolerance or spec.tolerance
        return attribute_encoded(lm, encoded, replace(spec, **changed), names)

    reference = scored("converged", None, EXACT)
    exact = reference.scores
    wanted, top = knowledge_neurons(exact, t), exact.abs().flatten(1).amax(1).clamp_min(1e-30)
    out = []
    for rule, steps, tolerance in (*compared, ("converged", None, EXACT)):
        result = reference if tolerance == EXACT else scored(rule, steps, tolerance)
        sets = knowledge_neurons(result.scores, t)
        jaccard = np.array(
            [len(a & b) / len(a | b) if a | b else 1.0 for a, b in zip(sets, wanted)]
        )
        settled = np.nan if result.converged is None else float(result.converged.float().mean())
        gap = float((result.completeness_gap.amax(1) / top).mean())
        gap = gap if spec.method == "ig" else np.nan
        out.append(
            {
                "rule": rule,
                "steps or tolerance": steps or tolerance,
                "evaluations": float(result.evaluations.mean()),
                "jaccard": jaccard.mean(),
                "jaccard_p5": np.percentile(jaccard, 5),
                "error": float(((result.scores - exact).abs().flatten(1).amax(1) / top).mean()),
                "gap": gap,
                "converged": settled,
                "n": len(jaccard),
            }
        )
    return pd.DataFrame(out)
