"""Knowledge neurons of a query, and how well a fact's neighbour queries agree on them.

Equations 1, 3 and 19 of the paper. A neuron is (layer, index), zero-based; a *KN set* is a set of
them. Everything undefined is NaN: the consistency of empty sets, the class of a fact without one.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from math import comb
from numbers import Real

import numpy as np
import pandas as pd

FACT = ["fact", "relation", "subject", "object"]  # what a frame names a fact by
QUERY = ["fact", "prompt_index"]  # and a query
STORE_THRESHOLD = 0.05  # results keep the neurons above this share of their query's largest score
MAX_SUBSETS = 10_000


# --- knowledge neurons of a query (Eq. 19) --------------------------------------------------------


def above_share(scores, share):
    """The rule of Eq. 19: where scores, a NumPy array of any shape, exceed `share` of their
    largest; nowhere if none is positive."""
    return scores > share * scores.max(initial=0.0)


def knowledge_neurons(scores, t=0.2) -> list[set]:
    """One set of (layer, neuron) a query: the neurons scoring above `t` times the query's largest
    score.

    scores: (Q, L, N), NumPy or torch. A query whose largest score is not positive has no knowledge
    neurons. Raises ValueError when t is outside (0, 1), on a wrong shape, or naming the query with
    a non-finite score.
    """
    _check_share(t)
    return [as_set(*above_share(score, t).nonzero()) for score in dense_scores(scores)]


def kn_sets(queries, t=0.2):
    """One KN set a row of a `queries` frame (list columns layer, neuron, score; empty or null = no
    KNs).

    Raises ValueError when t is below what the store keeps (0.05) or not below 1.
    """
    check_kept(t)
    sets = []
    cells = zip(queries["layer"], queries["neuron"], queries["score"])
    for row, (layer, neuron, score) in enumerate(cells):
        score = list_cell(score, float)
        if not np.isfinite(score).all():
            fact, prompt = queries.iloc[row][QUERY]
            raise ValueError(f"query {fact} prompt {prompt} has non-finite attribution scores")
        keep = above_share(score, t)
        layer = list_cell(layer, int)
        neuron = list_cell(neuron, int)
        sets.append(as_set(layer[keep], neuron[keep]))
    return sets


def dense_scores(scores):
    """Scores (Q, L, N) of an array, or of a tensor on any device, as float64 in NumPy; ValueError
    for what is none, or naming the first query with a score that is not finite."""
    if hasattr(scores, "detach"):
        scores = scores.detach().cpu().double()
    try:
        scores = np.asarray(scores)
    except ValueError as error:
        raise ValueError(
            f"scores must have the shape (queries, layers, neurons): {error}"
        ) from None
    if scores.dtype.kind not in "fiu":
        raise ValueError(f"scores must be real numbers, not {scores.dtype}")
    if scores.ndim != 3 or 0 in scores.shape[1:]:
        raise ValueError(
            f"scores must have the shape (queries, layers, neurons), not {scores.shape}"
        )
    scores = scores.astype(np.float64)
    finite = np.isfinite(scores).all(axis=(1, 2))
    if not finite.all():
        raise ValueError(f"query {finite.argmin()} has non-finite attribution scores")
    return scores


def list_cell(values, dtype):
    """A list cell of a frame as an array; null cells (None, NaN) are empty lists."""
    null = np.ndim(values) == 0 and pd.isna(values)
    return np.asarray([] if null else values, dtype)


def as_set(layer, neuron):
    """The neurons of two arrays of equal length."""
    return set(zip(layer.tolist(), neuron.tolist()))


def _check_share(t):
    if isinstance(t, bool) or not isinstance(t, Real) or not 0 < t < 1:
        raise ValueError(f"t must lie strictly between 0 and 1, not {t!r}")


def check_kept(t):
    """ValueError for a threshold that is none, or below what results keep."""
    _check_share(t)
    if t < STORE_THRESHOLD:
        raise ValueError(
            f"t={t} is below {STORE_THRESHOLD}, the smallest share of the largest score that "
            "results keep; localise again for a smaller one"
        )


# --- consistency of a fact's sets (Eq. 1) ---------------------------------------------------------


@dataclass(frozen=True)
class Consistency:
    """Agreement of a fact's KN sets; `cs1`, `cs2`, `jaccard` are NaN where every set is empty.

    cs1: share of the union that is in every set. cs2: share that is in more than one. jaccard: mean
    over the pairs of sets whose union is not empty.
    """

    cs1: float
    cs2: float
    jaccard: float


def consistency(kn_sets) -> Consistency:
    """CS1, CS2 (Eq. 1) and mean pairwise Jaccard of one fact's KN sets; ValueError with fewer than
    two."""
    sets = list(kn_sets) if isinstance(kn_sets, Iterable) else []
    if len(sets) < 2 or not all(isinstance(one, (set, frozenset)) for one in sets):
        raise ValueError(
            "consistency needs the KN sets of at least 2 queries of a fact, as knowledge_neurons "
            f"gives them; got {kn_sets!r:.80}"
        )
    counts = np.array(list(_counts(sets).values()))
    pairs = [jaccard(*two) for two in combinations(sets, 2) if any(two)]
    return Consistency(
        cs1=_mean(counts == len(sets)),
        cs2=_mean(counts > 1),
        jaccard=_mean(pairs),
    )


def jaccard(one, other, empty=1.0):
    """Size of the intersection over that of the union; `empty` where both sets are."""
    return len(one & other) / len(one | other) if one or other else empty


def cs2_subsampled(kn_sets, k=3):
    """Mean CS2 of `k` of the fact's sets, since CS2 grows with their number.

    All subsets of size k are used, or 10,000 seeded ones where there are more (of more than 40 sets
    for k = 3). NaN with fewer than k sets.
    """
    sets = list(kn_sets)
    if k < 2:
        raise ValueError(f"k must be at least 2, not {k}")
    if len(sets) < k:
        return np.nan
    if comb(len(sets), k) <= MAX_SUBSETS:
        subsets = list(combinations(range(len(sets)), k))
    else:
        rng = np.random.default_rng(0)
        subsets = [rng.choice(len(sets), k, replace=False) for _ in range(MAX_SUBSETS)]
    has = np.array([[one in neurons for one in set().union(*sets)] for neurons in sets])
    chosen = np.zeros((len(subsets), len(sets)))
    np.put_along_axis(chosen, np.array(subsets), 1, axis=1)
    counts = chosen @ has  # (subsets, neurons): in how many of its sets each is
    counts = counts[counts.any(1)]
    return _mean((counts > 1).sum(1) / (counts > 0).sum(1))


def _counts(sets):
    """{neuron: number of sets it is in}."""
    return Counter(chain.from_iterable(sets))


def _mean(values):
    return float(np.mean(values)) if len(values) else np.nan


def neighbour_sets(kn_sets, i):
    """The sets that section 3.1 manipulates for query `i`: its own, and Eq. 3's over the other
    queries.

    union: in any other set; intersection: in every other; refine: in more than one other (empty
    where the fact has two queries only).
    """
    sets = [set(one) for one in kn_sets]
    if len(sets) < 2:
        raise ValueError(f"neighbour sets need at least 2 queries of a fact, not {len(sets)}")
    if not 0 <= i < len(sets):
        raise ValueError(f"query {i} is not one of the fact's {len(sets)} queries")
    counts = _counts(sets[:i] + sets[i + 1 :])
    return {
        "self": sets[i],
        "union": set(counts),
        "intersection": {neuron for neuron in counts if counts[neuron] == len(sets) - 1},
        "refine": {neuron for neuron in counts if counts[neuron] > 1},
    }


# --- facts and their classes ----------------------------------------------------------------------


def classify(cs2, threshold):
    """ "I" above the threshold, "II" at or below it, None where CS2 is NaN (or the threshold
    is)."""
    cs2 = np.asarray(cs2, dtype=np.float64)
    return np.select([cs2 > threshold, cs2 <= threshold], ["I", "II"], default=None)


def otsu_threshold(values, weights=None):
    """Otsu's threshold (scikit-image, 256 bins) of the values less NaNs, where value i counts
    `weights[i]` times; NaN unless two that count differ."""
    from skimage.filters import threshold_otsu  # slow to import, and seldom needed

    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    there = ~np.isnan(values)
    values, weights = values[there], weights[there]
    if not np.isfinite(values).all():
        raise ValueError("Otsu's threshold needs finite values")
    if np.unique(values[weights > 0]).size < 2:
        return np.nan
    counts, edges = np.histogram(values, 256, weights=weights)
    middles = (edges[1:] + edges[:-1]) / 2
    return float(threshold_otsu(hist=(counts, middles)))


FACT_COLUMNS = """
fact relation subject object n_queries n_empty cs1 cs2 jaccard cs2_3 mean_size union_size mean_layer
known probability
""".split()


def fact_table(queries, t=0.2):
    """One row a fact of a `queries` frame, in its order: agreement, size and depth of the KN sets
    at `t`.

    Columns: fact, relation, subject, object, n_queries, n_empty (queries without a KN), cs1, cs2,
    jaccard, cs2_3 (CS2 at 3 subsampled prompts), mean_size (KNs a query), union_size, mean_layer
    (over all KNs of all queries), known (share of queries answered right), probability (mean
    P(answer)). A fact with a single query has NaN scores.
    """
    rows = []
    for _, group in queries.groupby("fact", sort=False):
        sets = kn_sets(group, t)
        sizes = list(map(len, sets))
        layers = [layer for one in sets for layer, _ in one]
        row = group.iloc[0][FACT].to_dict()
        if len(sets) > 1:
            row |= asdict(consistency(sets))
        row |= dict(
            n_queries=len(sets),
            n_empty=sizes.count(0),
            cs2_3=cs2_subsampled(sets),
            mean_size=_mean(sizes),
            union_size=len(set().union(*sets)),
            mean_layer=_mean(layers),
            known=_mean(group["known"]),
            probability=_mean(group["probability"]),
        )
        rows.append(row)
    return pd.DataFrame(rows, columns=FACT_COLUMNS)
