"""The consistency-aware score (CAS, Eq. 7) of a fact's neurons, and the neurons it selects.

CAS = b1 * mean - b2 * std of a neuron's attribution over the fact's queries. Results keep the means
and deviations of those neurons that an offered setting can select, and of no others.
"""

import numpy as np
import pandas as pd

from qlutils.checks import CHOICES, check, one_of
from qlutils.neurons.sets import above_share, as_set, dense_scores, list_cell

CAS_BETAS = (
    (1.0, 0.0),
    (0.9, 0.1),
    (0.8, 0.2),
    (0.7, 0.3),
    (0.6, 0.4),
    (0.5, 0.5),
)
CAS_MIN_THRESHOLD = 0.1


def cas_candidates(scores):
    """What has to be kept of one fact's dense scores (Q, L, N) so that every offered CAS setting
    can be applied.

    Returns arrays of equal length, in order of (layer, neuron): layer, neuron, and the mean and
    population deviation over the fact's queries of the scores (mean, std) and of the scores divided
    by each query's largest (mean_max, std_max; a query whose largest is not positive counts as
    zeros, as it has no KNs). A neuron is kept when some pair of CAS_BETAS puts it above
    CAS_MIN_THRESHOLD of the largest CAS, for either kind of score; so the largest is kept too, and
    any higher threshold selects among the kept.
    """
    scores = dense_scores(scores)
    top = scores.max((1, 2), keepdims=True)
    nothing = np.zeros_like(scores)
    scaled = np.divide(scores, top, out=nothing, where=top > 0)
    keep = np.zeros(scores.shape[1:], bool)
    moments = {}
    for ending, values in (("", scores), ("_max", scaled)):
        moments[f"mean{ending}"] = mean = values.mean(0)  # (L, N)
        moments[f"std{ending}"] = std = values.std(0)
        for b1, b2 in CAS_BETAS:
            keep |= above_share(b1 * mean - b2 * std, CAS_MIN_THRESHOLD)
    layer, neuron = keep.nonzero()
    kept = {name: values[keep] for name, values in moments.items()}
    return {"layer": layer, "neuron": neuron} | kept


def kept_neurons(candidates, score):
    """A fact's kept neurons: layer, neuron, mean, std of its attribution over the fact's queries.

    candidates: what `cas_candidates` gives, or a fact's first row of a `queries` frame (columns
    cas_layer, ...). score: "raw", or "max" for scores divided by each query's largest."""
    one_of("CAS score", score, CHOICES["cas_score"])
    prefix = "cas_" if "cas_layer" in candidates else ""
    ending = "_max" if score == "max" else ""
    kept = pd.DataFrame()
    for name in ("layer", "neuron"):
        kept[name] = list_cell(candidates[f"{prefix}{name}"], int)
    for name in ("mean", "std"):
        kept[name] = list_cell(candidates[f"{prefix}{name}{ending}"], float)
    return kept


def cas_neurons(candidates, *, b1=0.7, b2=0.3, threshold=0.3, score="raw"):
    """The fact's neurons with CAS = b1 * mean - b2 * std above `threshold` times the largest CAS
    (Eq. 7); an empty set where no CAS is positive.

    candidates, score: as for `kept_neurons`. Only the offered settings, for which enough was kept:
    (b1, b2) of CAS_BETAS, 0.1 <= threshold < 1; else ValueError.
    """
    if (b1, b2) not in CAS_BETAS:
        raise ValueError(f"(b1, b2) = ({b1!r}, {b2!r}) is not offered: use one of {CAS_BETAS}")
    what = "a number (of others not enough is kept: they are not offered)"
    check("CAS threshold", threshold, CAS_MIN_THRESHOLD, 1, what)
    kept = kept_neurons(candidates, score)
    cas = b1 * kept["mean"] - b2 * kept["std"]
    kept = kept[above_share(cas.to_numpy(), threshold)]
    return as_set(kept["layer"], kept["neuron"])


def strongest_neurons(candidates, count, score="raw"):
    """The `count` neurons of the largest mean score over a fact's queries: of a CAS set's size,
    without its penalty on spread. Fewer where fewer were kept for certain (see `cas_candidates`;
    `candidates` and `score` as for `kept_neurons`)."""
    kept = kept_neurons(candidates, score)
    kept = kept[above_share(kept["mean"].to_numpy(), CAS_MIN_THRESHOLD)]
    kept = kept.sort_values("mean", ascending=False, kind="stable").head(count)
    return as_set(kept["layer"], kept["neuron"])
