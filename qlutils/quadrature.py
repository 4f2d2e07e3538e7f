"""How to sum the integral: nodes and weights of each rule, and how far each is from the converged integral."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

RULES = ("right", "left", "endpoints", "midpoint", "gauss")
COMPARED = (("right", 20), ("left", 20), ("endpoints", 20), ("midpoint", 20), ("midpoint", 6), ("gauss", 8), ("gauss", 6))
CONVERGED = 100  # Gauss nodes


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
