"""Knowledge neurons of a query, and how well a fact's neighbour queries agree on them.

Equations 1, 3, 7 and 19 of the paper. A neuron is (layer, index), zero-based; a *KN set* is a set
of them. Everything undefined is NaN: the consistency of empty sets, the class of a fact without
one. Dense scores may be arrays, or tensors on any device; nothing else here needs torch.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import chain, combinations
from math import comb
from numbers import Real

import numpy as np
import pandas as pd

STORE_THRESHOLD = 0.05  # results keep the neurons above this share of their query's largest score
CAS_BETAS = ((1.0, 0.0), (0.9, 0.1), (0.8, 0.2), (0.7, 0.3), (0.6, 0.4), (0.5, 0.5))
CAS_MIN_THRESHOLD = 0.1
CAS_SCORES = ("raw", "max")
MAX_SUBSETS = 20


# --- knowledge neurons of a query (Eq. 19) --------------------------------------------------------


def knowledge_neurons(scores, t=0.2) -> list[set]:
    """One set of (layer, neuron) a query: the neurons scoring above `t` times the query's largest
    score.

    scores: (Q, L, N), NumPy or torch. A query whose largest score is not positive has no knowledge
    neurons. Raises ValueError when t is outside (0, 1), on a wrong shape, or naming the query with
    a non-finite score.
    """
    _check_share("t", t)
    sets = []
    for query, score in enumerate(_dense(scores)):
        score = score.double()  # the same comparison as with the stored, sparse scores
        if not score.isfinite().all():
            raise ValueError(f"query {query} has non-finite attribution scores")
        top = score.max()
        sets.append(set(map(tuple, ((score > t * top) & (top > 0)).nonzero().tolist())))
    return sets


def kn_sets(queries, t=0.2) -> list[set]:
    """One KN set a row of a `queries` frame (list columns layer, neuron, score; empty or null = no
    KNs).

    Raises ValueError when t is below what the store keeps (0.05) or not below 1.
    """
    _check_share("t", t)
    if t < STORE_THRESHOLD:
        raise ValueError(
            f"t={t} is below {STORE_THRESHOLD}, the smallest share of the largest score that "
            "results keep; localise again for a smaller one"
        )
    sets = []
    for row, (layer, neuron, score) in enumerate(
        zip(queries["layer"], queries["neuron"], queries["score"])
    ):
        score = _array(score, np.float64)
        if not np.isfinite(score).all():
            raise ValueError(f"query {_query_name(queries, row)} has non-finite attribution scores")
        if not score.size or score.max() <= 0:
            sets.append(set())
            continue
        keep = score > t * score.max()
        sets.append(set(zip(_array(layer, int)[keep].tolist(), _array(neuron, int)[keep].tolist())))
    return sets


# --- consistency of a fact's sets (Eq. 1) ---------------------------------------------------------


@dataclass(frozen=True)
class Consistency:
    """Agreement of a fact's KN sets; `cs1`, `cs2`, `jaccard` are NaN where every set is empty.

    cs1: share of the union that is in every set. cs2: share that is in more than one. jaccard: mean
    over the pairs of sets whose union is not empty. sizes: number of KNs of each query.
    """

    cs1: float
    cs2: float
    jaccard: float
    n_queries: int
    n_union: int
    n_intersection: int
    sizes: tuple[int, ...]


def consistency(kn_sets) -> Consistency:
    """CS1, CS2 (Eq. 1) and mean pairwise Jaccard of one fact's KN sets; ValueError with fewer than
    two."""
    if (
        isinstance(kn_sets, (set, frozenset))
        or hasattr(kn_sets, "shape")
        or hasattr(kn_sets, "scores")
    ):
        raise ValueError(
            f"consistency needs a list of KN sets, one a query, as knowledge_neurons gives it; "
            f"got one "
            f"{type(kn_sets).__name__}"
        )
    try:
        sets = [frozenset(one) for one in kn_sets]
    except TypeError:
        raise ValueError(
            f"consistency needs one set of (layer, neuron) a query, not {kn_sets!r}"
        ) from None
    if len(sets) < 2:
        raise ValueError(
            f"consistency needs the KN sets of at least 2 queries of a fact, not {len(sets)}"
        )
    counts = _counts(sets)
    union = len(counts)
    everywhere = sum(count == len(sets) for count in counts.values())
    shared = [(len(a & b), len(a) + len(b)) for a, b in combinations(sets, 2) if a or b]
    pairs = [both / (total - both) for both, total in shared]
    repeated = sum(count > 1 for count in counts.values())
    return Consistency(
        cs1=everywhere / union if union else np.nan,
        cs2=repeated / union if union else np.nan,
        jaccard=float(np.mean(pairs)) if pairs else np.nan,
        n_queries=len(sets),
        n_union=union,
        n_intersection=everywhere,
        sizes=tuple(len(one) for one in sets),
    )


def cs2_subsampled(kn_sets, k=3, seed=0) -> float:
    """Mean CS2 of `k` of the fact's sets, since CS2 grows with their number.

    All subsets of size k are used, or 20 different seeded ones where there are more. NaN with fewer
    than k sets.
    """
    sets = list(kn_sets)
    if k < 2:
        raise ValueError(f"k must be at least 2, not {k}")
    if len(sets) < k:
        return np.nan
    if comb(len(sets), k) <= MAX_SUBSETS:
        subsets = list(combinations(range(len(sets)), k))
    else:
        rng, subsets = np.random.default_rng(seed), {}
        while (
            len(subsets) < MAX_SUBSETS
        ):  # a dict keeps the order, and with it the sum, reproducible
            subsets[tuple(sorted(rng.choice(len(sets), k, replace=False).tolist()))] = None
    place = {neuron: column for column, neuron in enumerate(_counts(sets))}
    member = np.zeros((len(sets), len(place)), dtype=np.int8)
    for row, one in enumerate(sets):
        member[row, [place[neuron] for neuron in one]] = 1
    counts = member[np.array(list(subsets))].sum(axis=1)  # (subsets, union)
    union, repeated = (counts > 0).sum(1), (counts > 1).sum(1)
    return float(np.mean(repeated[union > 0] / union[union > 0])) if union.any() else np.nan


def neighbour_sets(kn_sets, i) -> dict[str, set]:
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
    others = sets[:i] + sets[i + 1 :]
    counts = _counts(others)
    return {
        "self": sets[i],
        "union": set(counts),
        "intersection": {n for n, count in counts.items() if count == len(others)},
        "refine": {n for n, count in counts.items() if count > 1},
    }


# --- other neurons, to compare with ---------------------------------------------------------------


def random_neurons(neurons, num_neurons, rng, *, among=None, outside=True) -> set:
    """As many neurons in each layer, drawn from all `num_neurons`, or from `among`(layer), that are
    not in `neurons` (outside=False: may be in them too); fewer where there are not that many."""
    drawn = set()
    for layer in sorted({layer for layer, _ in neurons}):
        inside = [neuron for at, neuron in neurons if at == layer]
        pool = list(among(layer)) if among else np.arange(num_neurons)
        free = np.setdiff1d(pool, inside if outside else [])
        drawn |= {
            (layer, int(neuron))
            for neuron in rng.choice(free, min(len(inside), len(free)), replace=False)
        }
    return drawn


class OtherFacts:
    """The KNs of whole facts, to be drawn from as a control: if a fact's neurons do what only they
    can, another fact's do not. `queries`: a `queries` frame; `sets`: the KN set of each of its
    rows."""

    def __init__(self, queries, sets):
        self.facts, self.of_relation = {}, {}
        columns = queries[["fact", "relation", "subject", "object"]].itertuples(index=False)
        for (fact, *about), one in zip(columns, sets):
            if fact not in self.facts:
                self.facts[fact] = (*about, set())
                self.of_relation.setdefault(about[0], []).append(fact)
            self.facts[fact][-1].update(one)
        self.names = list(self.facts)

    def draw(self, neurons, fact, rng, *, same_relation: bool) -> set:
        """As many neurons in each layer as `neurons`, drawn among the KNs of one fact that `rng`
        chooses, less those of `fact`; fewer where it has fewer. It has another subject and object,
        and is of the same relation or of another. Empty where no fact is."""
        relation, subject, obj, own = self.facts[fact]
        names = self.of_relation[relation] if same_relation else self.names
        for place in rng.permutation(len(names)):
            its_relation, its_subject, its_object, its_own = self.facts[names[place]]
            if (
                (its_relation == relation) == same_relation
                and its_subject != subject
                and its_object != obj
            ):
                pool = its_own - own
                return random_neurons(
                    neurons, None, rng, among=lambda layer: [n for at, n in pool if at == layer]
                )
        return set()


def active_neurons(neurons, active, but=()) -> set:
    """For each neuron another of its layer, neither in `neurons` nor in `but`, each used once,
    whose |activation| is nearest; the most active neurons choose first. active: (L, N)."""
    neurons, taken = set(neurons), set(neurons) | set(but)
    strength, found = np.abs(np.asarray(active, np.float64)), set()
    for layer, neuron in sorted(neurons, key=lambda pair: (-strength[pair], pair)):
        gap = np.abs(strength[layer] - strength[layer, neuron])
        gap[[other for at, other in taken | found if at == layer]] = np.inf
        if np.isfinite(gap.min()):
            found.add((layer, int(gap.argmin())))
    return found


# --- consistency-aware selection (Eq. 7) ----------------------------------------------------------


def cas_candidates(scores) -> dict[str, np.ndarray]:
    """What has to be kept of one fact's dense scores (Q, L, N) so that every offered CAS setting
    can be applied.

    Returns arrays of equal length, in order of (layer, neuron): layer, neuron, and the mean and
    population deviation over the fact's queries of the scores (mean, std) and of the scores divided
    by each query's largest (mean_max, std_max; a query whose largest is not positive counts as
    zeros, as it has no KNs). A neuron is kept when some pair of CAS_BETAS puts it above
    CAS_MIN_THRESHOLD of the largest CAS, for either kind of score; so the largest is kept too, and
    any higher threshold selects among the kept.
    """
    scores = _dense(
        scores
    ).double()  # on their device: of a large model they are half a million a query
    if not scores.isfinite().all():
        bad = [query for query, score in enumerate(scores) if not score.isfinite().all()]
        raise ValueError(f"query {bad[0]} has non-finite attribution scores")
    top = scores.amax((1, 2), keepdim=True)
    scaled = (scores / top.clamp_min(np.finfo(float).tiny)).where(top > 0, 0.0)
    moments = dict(
        mean=scores.mean(0),
        std=scores.std(0, correction=0),
        mean_max=scaled.mean(0),
        std_max=scaled.std(0, correction=0),
    )
    keep = scores.new_zeros(scores.shape[1:], dtype=bool)
    for suffix in ("", "_max"):
        for b1, b2 in CAS_BETAS:
            cas = b1 * moments[f"mean{suffix}"] - b2 * moments[f"std{suffix}"]
            keep |= (cas > CAS_MIN_THRESHOLD * cas.max()) & (cas > 0)
    layer, neuron = keep.nonzero(as_tuple=True)
    found = dict(
        layer=layer, neuron=neuron, **{name: value[keep] for name, value in moments.items()}
    )
    return {name: value.cpu().numpy() for name, value in found.items()}


def cas_neurons(candidates, *, b1=0.7, b2=0.3, threshold=0.3, score="raw") -> set:
    """The fact's neurons with CAS = b1 * mean - b2 * std above `threshold` times the largest CAS
    (Eq. 7).

    candidates: what `cas_candidates` gives, or a fact's first row of a `queries` frame (columns
    cas_layer, ...).
    score: "raw", or "max" for scores divided by each query's largest. Only the offered settings,
    for which enough was kept: (b1, b2) of CAS_BETAS, 0.1 <= threshold < 1; else ValueError. An
    empty set where no CAS is positive.
    """
    numbers = [
        isinstance(value, Real) and not isinstance(value, bool) for value in (b1, b2, threshold)
    ]
    if not all(numbers[:2]) or not any(
        np.allclose((b1, b2), pair, rtol=0, atol=1e-9) for pair in CAS_BETAS
    ):
        raise ValueError(f"(b1, b2) = ({b1!r}, {b2!r}) is not offered: use one of {CAS_BETAS}")
    if not numbers[2] or not CAS_MIN_THRESHOLD <= threshold < 1:
        raise ValueError(
            f"CAS threshold {threshold!r} is not offered: it must be at least "
            f"{CAS_MIN_THRESHOLD} and below 1"
        )
    if score not in CAS_SCORES:
        raise ValueError(f"CAS score {score!r} is unknown: use one of {CAS_SCORES}")
    prefix = "cas_" if "cas_layer" in candidates else ""
    suffix = "_max" if score == "max" else ""
    mean = _array(candidates[f"{prefix}mean{suffix}"], np.float64)
    std = _array(candidates[f"{prefix}std{suffix}"], np.float64)
    cas = b1 * mean - b2 * std
    keep = (cas > threshold * cas.max(initial=0.0)) & (cas > 0)
    layer, neuron = (_array(candidates[prefix + name], int)[keep] for name in ("layer", "neuron"))
    return set(zip(layer.tolist(), neuron.tolist()))


def strongest_neurons(candidates, count, score="raw") -> set:
    """The `count` neurons of the largest mean score over a fact's queries: of a CAS set's size,
    without its penalty on spread. Fewer where fewer were kept for certain (see `cas_candidates`;
    `candidates` and `score` as for `cas_neurons`)."""
    prefix = "cas_" if "cas_layer" in candidates else ""
    layer, neuron = (_array(candidates[prefix + name], int) for name in ("layer", "neuron"))
    mean = _array(candidates[f"{prefix}mean{'_max' if score == 'max' else ''}"], np.float64)
    order = np.argsort(-mean, kind="stable")[:count]
    keep = [i for i in order if mean[i] > CAS_MIN_THRESHOLD * mean.max()]
    return set(zip(layer[keep].tolist(), neuron[keep].tolist()))


# --- classes --------------------------------------------------------------------------------------


def classify(cs2, threshold) -> np.ndarray:
    """ "I" above the threshold, "II" at or below it, None where CS2 is NaN (or the threshold
    is)."""
    cs2 = np.asarray(cs2, dtype=np.float64)
    classes = np.full(cs2.shape, None, dtype=object)
    if not np.isnan(threshold):
        classes[cs2 > threshold] = "I"
        classes[cs2 <= threshold] = "II"
    return classes


def otsu_threshold(values) -> float:
    """Otsu's threshold (scikit-image, 256 bins) of the values less NaNs; NaN unless two of them
    differ."""
    from skimage.filters import threshold_otsu

    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not np.isfinite(values).all():
        raise ValueError("Otsu's threshold needs finite values")
    if np.unique(values).size < 2:
        return np.nan
    return float(threshold_otsu(values))


def fact_table(queries, t=0.2) -> pd.DataFrame:
    """One row a fact of a `queries` frame, in its order: agreement, size and depth of the KN sets
    at `t`.

    Columns: fact, relation, subject, object, n_queries, n_empty (queries without a KN), cs1, cs2,
    jaccard, cs2_3 (CS2 at 3 subsampled prompts), mean_size (KNs a query), union_size, mean_layer
    (over all KNs of all queries), known (share of queries answered right), probability (mean
    P(answer)). A fact with a single query has NaN scores.
    """
    rows = []
    for fact, group in queries.groupby("fact", sort=False):
        sets = kn_sets(group, t)
        sizes = [len(one) for one in sets]
        agreement = consistency(sets) if len(sets) > 1 else None
        layers = [layer for one in sets for layer, _ in one]
        first = group.iloc[0]
        rows.append(
            dict(
                fact=fact,
                relation=first["relation"],
                subject=first["subject"],
                object=first["object"],
                n_queries=len(sets),
                n_empty=sizes.count(0),
                cs1=agreement.cs1 if agreement else np.nan,
                cs2=agreement.cs2 if agreement else np.nan,
                jaccard=agreement.jaccard if agreement else np.nan,
                cs2_3=cs2_subsampled(sets),
                mean_size=float(np.mean(sizes)),
                union_size=len(set().union(*sets)),
                mean_layer=float(np.mean(layers)) if layers else np.nan,
                known=float(group["known"].mean()),
                probability=float(group["probability"].mean()),
            )
        )
    columns = [
        "fact",
        "relation",
        "subject",
        "object",
        "n_queries",
        "n_empty",
        "cs1",
        "cs2",
        "jaccard",
        "cs2_3",
        "mean_size",
        "union_size",
        "mean_layer",
        "known",
        "probability",
    ]
    return pd.DataFrame(rows, columns=columns)


# --- helpers --------------------------------------------------------------------------------------


def _check_share(name, value):
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, not {value!r}")


def _dense(scores):
    """`scores` (Q, L, N) as a tensor on the device they are on."""
    if hasattr(scores, "scores"):
        raise ValueError(
            f"scores must be an array; pass the .scores of this {type(scores).__name__}"
        )
    import torch

    if not isinstance(scores, torch.Tensor):
        try:
            scores = np.asarray(scores)
        except ValueError as error:
            raise ValueError(
                f"scores must have the shape (queries, layers, neurons): {error}"
            ) from None
        if scores.dtype.kind not in "fiu":
            raise ValueError(f"scores must be real numbers, not {scores.dtype}")
        scores = torch.from_numpy(scores.astype(np.float64))
    if scores.dtype == torch.bool or scores.is_complex():
        raise ValueError(f"scores must be real numbers, not {scores.dtype}")
    if scores.ndim != 3 or 0 in scores.shape[1:]:
        raise ValueError(
            f"scores must have the shape (queries, layers, neurons), not {tuple(scores.shape)}"
        )
    return scores.detach()


def _array(values, dtype):
    """A list cell as an array; null cells (None, NaN) are empty lists."""
    if values is None or (np.isscalar(values) and pd.isna(values)):
        return np.zeros(0, dtype)
    return np.asarray(values, dtype)


def _counts(sets):
    """{neuron: number of sets it is in}."""
    return Counter(chain.from_iterable(sets))


def _query_name(queries, row):
    named = [
        str(queries.iloc[row][column]) for column in ("fact", "prompt_index") if column in queries
    ]
    return " prompt ".join(named) or str(row)
