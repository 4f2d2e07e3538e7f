"""Intervals and tests of the study: a bootstrap over facts, Welch's t-test, a permutation test of
the classes.

A fact's queries are not independent, so the unit that is resampled is the fact (the *cluster*), and
facts are resampled within their relation (the *stratum*). Undefined statistics are NaN beside their
n; no interval rests on fewer than `LEAST` facts on a side.
"""

import warnings
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

LEVEL = 0.95
TAILS = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)  # percentiles
TRIM = 0.1
STATISTICS = {"trimmed": "10 % trimmed mean", "mean": "mean", "median": "median"}
# The least number of resampled clusters (facts, or relations where these are resampled) on each
# side of an interval or test. A side of one fact has no spread, which a bootstrap takes for
# certainty. By simulation (tests/test_stats.py), intervals of 10 facts cover what they estimate in
# at least 93 % of samples for means of symmetric values, medians, trimmed means and shares, alone
# or as a difference of classes, and in 90 % for means of skewed values; with 4, in as few as 80 %.
LEAST = 10
_CHUNK = 1_000_000  # draws x rows worked on at a time: little enough to stay near the processor


def welch(a, b) -> dict:
    """t, df and p of `scipy.stats.ttest_ind(a, b, equal_var=False)` and d, Cohen's with the pooled
    deviation.

    NaNs are left out of a and b. All four are NaN where a sample has fewer than `LEAST` values or
    neither varies."""
    from scipy.stats import ttest_ind

    a, b = (np.asarray(values, dtype=np.float64) for values in (a, b))
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    if min(len(a), len(b)) < LEAST or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return dict.fromkeys(("t", "df", "p", "d"), np.nan)
    with warnings.catch_warnings():  # one class of equal values is no loss of precision
        warnings.simplefilter("ignore", RuntimeWarning)
        result = ttest_ind(a, b, equal_var=False)
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    return dict(
        t=float(result.statistic),
        df=float(result.df),
        p=float(result.pvalue),
        d=float((a.mean() - b.mean()) / np.sqrt(pooled)),
    )


# --- bootstrap over facts -------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Mean, median and 10 % trimmed mean, each with its 95 % interval (NaN where undefined).

    n: values used; n_clusters: facts they come from; n_other, n_clusters_other: those of the
    second side of a difference, None where there is none. n_missing: NaNs left out; n_draws: draws
    behind the interval (draws without a value, as of an empty class, are left out)."""

    mean: float
    mean_low: float
    mean_high: float
    median: float
    median_low: float
    median_high: float
    trimmed: float
    trimmed_low: float
    trimmed_high: float
    n: int
    n_clusters: int
    n_missing: int
    n_draws: int
    n_other: int | None = None
    n_clusters_other: int | None = None

    def row(self, statistic="mean", name=None) -> dict:
        """One statistic as columns for `tables.write_table`: `name`, `name`_low, `name`_high, n
        and, of a difference, n_other."""
        name, values = name or statistic, asdict(self)
        row = {f"{name}{end}": values[f"{statistic}{end}"] for end in ("", "_low", "_high")} | {
            "n": self.n
        }
        return row if self.n_other is None else row | {"n_other": self.n_other}

    def facts(self) -> dict:
        """n_facts and, of a difference, n_facts_other."""
        other = {} if self.n_clusters_other is None else {"n_facts_other": self.n_clusters_other}
        return {"n_facts": self.n_clusters} | other


def bootstrap_mean(
    frame, value, cluster="fact", strata="relation", draws=1000, seed=0, share=False
) -> Estimate:
    """Mean, median and trimmed mean of column `value` over all rows, with intervals over resampled
    facts.

    Facts are drawn with replacement within their relation, a fact's rows staying together. Of a
    relation's n facts n - 1 are drawn and weigh n / (n - 1), so that the interval is not too narrow
    where a relation has few facts (Rao & Wu 1988; drawing n of n understates the variance by (n -
    1) / n, which is a half for two facts). Relations with one fact left are pooled into one
    stratum; where facts less relations are fewer than `LEAST` - 1, all are (wider, since what sets
    relations apart counts, too). strata=None resamples all facts together. The percentile interval
    is stretched by the ratio of Student's to the normal quantile, of facts less relations, but
    never beyond the values there are. With fewer than `LEAST` facts it is NaN.

    share: the values lie between 0 and 1. Where every fact's is 0 or 1, the interval of the mean
    is Clopper and Pearson's for as many facts: draws of rare or sure events cannot say how far
    from 0 or 1 their share may be."""
    found = _bootstrap(frame, value, None, [None], cluster, strata, draws, seed)
    if share and found.n_clusters >= LEAST and _all_or_nothing(frame, value, cluster):
        from scipy.stats import binomtest

        low, high = binomtest(int(frame[value].sum()), found.n).proportion_ci(LEVEL)
        found = replace(found, mean_low=float(low), mean_high=float(high))
    return found


def bootstrap_difference(
    frame, value, by, levels, cluster="fact", strata="relation", draws=1000, seed=0, share=False
) -> Estimate:
    """Statistic where `by` is levels[0] minus where it is levels[1], with intervals as in
    `bootstrap_mean`.

    Facts are resampled once for both sides. So two conditions measured on the same facts are
    compared paired, and two classes of facts unpaired. Where a side has no value, all is NaN; where
    it has fewer than `LEAST` facts, the intervals. share: as in `bootstrap_mean`; where a side's
    facts are all 0 or 1, the interval is put together from the sides' own (Newcombe 1998), paired
    by their correlation where the facts are the same."""
    if by not in frame or len(levels) != 2:
        raise ValueError(f"by={by!r} must be a column and levels={levels!r} two of its values")
    frame = frame[frame[by].isin(list(levels))]
    found = _bootstrap(frame, value, by, levels, cluster, strata, draws, seed)
    sides = [frame[frame[by] == level] for level in levels]
    if (
        share
        and not np.isnan(found.mean_low)
        and any(_all_or_nothing(side, value, cluster) for side in sides)
    ):
        each = [
            bootstrap_mean(side, value, cluster, strata, draws, seed, share=True) for side in sides
        ]
        low, high = _newcombe(*each, _correlation(*sides, value, cluster))
        found = replace(found, mean_low=low, mean_high=high)
    return found


def _all_or_nothing(frame, value, cluster) -> bool:
    """Whether each fact has one value, 0 or 1."""
    kept = frame.dropna(subset=value)
    return bool(
        len(kept) and kept[value].isin([0, 1]).all() and not kept[cluster].duplicated().any()
    )


def _newcombe(one: Estimate, two: Estimate, correlation) -> tuple[float, float]:
    """Interval of a difference of means from the intervals of both (Newcombe 1998, method 10; Zou
    2007)."""

    def reach(first, second):
        return float(np.sqrt(max(0.0, first**2 + second**2 - 2 * correlation * first * second)))

    gap = one.mean - two.mean
    return (
        gap - reach(one.mean - one.mean_low, two.mean_high - two.mean),
        gap + reach(one.mean_high - one.mean, two.mean - two.mean_low),
    )


def _correlation(one, two, value, cluster) -> float:
    """Correlation of two sides over the facts that both have; 0 without such facts or where a side
    is constant."""
    both = [side.groupby(cluster)[value].mean() for side in (one, two)]
    first, second = both[0].align(both[1], join="inner")
    if len(first) < 2 or first.nunique() < 2 or second.nunique() < 2:
        return 0.0
    return float(np.nan_to_num(first.corr(second)))


def bootstrap_statistic(
    frames, statistic, cluster="fact", strata="relation", draws=1000, seed=0
) -> Estimate:
    """statistic(frame, weights) of one frame of facts, or of the first of two less that of the
    second, computed anew from each draw's weights, as what hangs on a threshold that is itself
    estimated must be. Facts that both frames have are drawn for both. Only `mean` and its interval
    are filled; the interval is NaN with fewer than `LEAST` facts in a frame."""
    every = (
        pd.concat([frame[[cluster, strata]] for frame in frames])
        .drop_duplicates(cluster)
        .sort_values(cluster)
    )
    place = pd.Series(range(len(every)), every[cluster])
    members = [place[frame[cluster]].to_numpy() for frame in frames]
    strata_of, _ = _strata(pd.factorize(every[strata], sort=True)[0], members)

    def value(w):
        first, *second = (statistic(frame, w[inside]) for frame, inside in zip(frames, members))
        return first - second[0] if second else first

    point = value(np.ones(len(every))) if all(map(len, frames)) else np.nan
    enough = min(map(len, frames)) >= LEAST and not np.isnan(point)
    sample = [value(w) for w in resampling_weights(strata_of, draws, seed)] if enough else []
    sample = [one for one in sample if not np.isnan(one)]
    low, high = np.percentile(sample, TAILS) if sample else (np.nan, np.nan)
    (n, *other) = map(len, frames)
    return Estimate(
        float(point),
        float(low),
        float(high),
        *[np.nan] * 6,
        n=n,
        n_clusters=n,
        n_missing=0,
        n_draws=len(sample),
        n_other=other[0] if other else None,
        n_clusters_other=other[0] if other else None,
    )


def mean_columns(frame, values, seed=0, share=False) -> dict:
    """The means of several columns side by side, each with its interval, and n, as one row of a
    table. n is that of the last column; one with another n has its own, n_<column>."""
    row, counts = {}, {}
    for value in values:
        row |= bootstrap_mean(frame, value, seed=seed, share=share).row("mean", value)
        counts[f"n_{value}"] = row["n"]
    return row | {name: count for name, count in counts.items() if count != row["n"]}


def _bootstrap(frame, value, by, levels, cluster, strata, draws, seed) -> Estimate:
    """The first level's statistics less the second's, where there is one; `by` None takes all
    rows."""
    for column in filter(None, (value, cluster, strata)):
        if column not in frame:
            raise ValueError(
                f"the frame has no column {column!r}: {', '.join(map(str, frame.columns))}"
            )
    x = frame[value].to_numpy(np.float64, na_value=np.nan)
    if np.isinf(x).any():
        raise ValueError(f"column {value!r} has infinite values; mark undefined ones as NaN")
    kept, x = frame[~np.isnan(x)], x[~np.isnan(x)]
    # sorted names, so that the result does not depend on the order of the rows
    clusters, names = pd.factorize(kept[cluster].astype(str), sort=True)
    strata_of = np.zeros(len(names), int)
    if strata:
        strata_of[clusters] = pd.factorize(kept[strata].astype(str), sort=True)[0]
    sides = [
        np.full(len(x), True) if by is None else (kept[by] == level).to_numpy() for level in levels
    ]
    members = [np.unique(clusters[side]) for side in sides]
    point, sample, stretch = np.full(3, np.nan), np.full((0, 3), np.nan), 1.0
    if all(side.any() for side in sides):

        def statistics(weights):
            first, *second = (_statistics(x[side], weights, clusters[side]) for side in sides)
            return first - second[0] if second else first

        point = statistics(np.ones((1, len(names))))[0]
        if min(map(len, members)) >= LEAST:
            strata_of, stretch = _strata(strata_of, members)
            sample = statistics(resampling_weights(strata_of, draws, seed))
            sample = sample[~np.isnan(sample).any(axis=1)]
    low, high = np.full((2, 3), np.nan)
    if len(sample):
        low, high = (
            point + stretch * (bound - point) for bound in np.percentile(sample, TAILS, axis=0)
        )
        low, high = np.clip((low, high), *_reach([x[side] for side in sides]))
    rounding = 1e-13 * np.abs(x).max(
        initial=0.0
    )  # of what is exactly 0; it must not decide on which side of 0 it lies
    fields = [
        0.0 if abs(number) < rounding else float(number)
        for triple in zip(point, low, high)
        for number in triple
    ]
    (n, facts), *other = [(int(side.sum()), len(inside)) for side, inside in zip(sides, members)]
    n_other, facts_other = other[0] if other else (None, None)
    return Estimate(
        *fields,
        n=n,
        n_clusters=facts,
        n_missing=len(frame) - len(x),
        n_draws=len(sample),
        n_other=n_other,
        n_clusters_other=facts_other,
    )


def _reach(sides) -> tuple[float, float]:
    """Between what the mean of one side, or the difference of the means of two, must lie, given
    the values there are."""
    (low, high), *second = [(side.min(), side.max()) for side in sides]
    return (low - second[0][1], high - second[0][0]) if second else (low, high)


def _strata(strata_of, members) -> tuple[np.ndarray, float]:
    """The strata to draw in, and by what the interval is stretched, for sides of these clusters
    (their positions).

    The side with the fewest degrees of freedom decides (clusters less strata; singletons form
    one); where it has too few, all clusters are one stratum."""
    from scipy.stats import norm, t

    def freedom(strata):
        counts = np.bincount(strata)
        return counts.sum() - (counts > 1).sum() - (counts == 1).any()

    if not all(map(len, members)):
        return strata_of, 1.0
    least = min(freedom(strata_of[inside]) for inside in members)
    if least < LEAST - 1:
        strata_of, least = np.zeros_like(strata_of), min(map(len, members)) - 1
    return strata_of, float(t.ppf(TAILS[1] / 100, max(1, least)) / norm.ppf(TAILS[1] / 100))


def resampling_weights(strata_of, draws, seed):
    """(draws, clusters) weights of a stratified Rao-Wu bootstrap; no rows when there is one cluster
    only."""
    counts = np.bincount(strata_of)
    strata_of = np.where(counts[strata_of] == 1, -1, strata_of)  # singletons form one stratum
    if (
        np.sum(strata_of == -1) == 1 and len(strata_of) > 1
    ):  # a lone one joins the smallest other stratum
        others = np.bincount(strata_of[strata_of >= 0])
        strata_of[strata_of == -1] = np.flatnonzero(others)[np.argmin(others[others > 0])]
    if len(strata_of) < 2:
        return np.zeros((0, len(strata_of)), np.float32)
    rng = np.random.default_rng(seed)
    weights = np.empty((draws, len(strata_of)), np.float32)
    for stratum in np.unique(strata_of):
        members = np.flatnonzero(strata_of == stratum)
        n = len(members)
        drawn = rng.integers(n, size=(draws, n - 1)) + n * np.arange(draws)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)
        weights[:, members] = counts * (n / (n - 1))
    return weights


def _statistics(values, weights, clusters):
    """(draws, 3): mean, median and trimmed mean of the values under each draw's cluster weights."""
    order = np.argsort(values, kind="stable")
    x, clusters = values[order], clusters[order]
    step = max(1, _CHUNK // len(x))
    parts = [
        _weighted(x, weights[start : start + step, clusters].astype(np.float64))
        for start in range(0, len(weights), step)
    ]
    return np.concatenate(parts) if parts else np.full((0, 3), np.nan)


def _weighted(x, w):
    """Statistics of the sorted values x (n,) under weights w (draws, n); NaN for a draw without
    weight."""
    upper = np.cumsum(w, axis=1)
    total = upper[:, -1:].copy()  # upper is written over below
    tiny = 2e-7 * total  # the weights have single precision
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (w @ x) / total[:, 0]
        ends = (
            (np.searchsorted(row, half - slack), np.searchsorted(row, half + slack, side="right"))
            for row, half, slack in zip(upper, total[:, 0] / 2, tiny[:, 0])
        )
        low, high = x[np.minimum(np.array(list(ends)), len(x) - 1)].T
        cut = np.floor(TRIM * total + tiny)  # as scipy.stats.trim_mean
        inside = np.minimum(upper, total - cut)  # what of each value's weight lies between the cuts
        inside -= np.maximum(np.subtract(upper, w, out=upper), cut)
        kept = np.clip(inside, 0, None, out=inside)
        trimmed = (kept @ x) / kept.sum(1)
    median = np.where(total[:, 0] > 0, (low + high) / 2, np.nan)
    return np.stack([mean, median, trimmed], axis=1)


# --- permutation of the classes -------------------------------------------------------------------


def permutation_test(
    frame, value, label, levels=("I", "II"), cluster="fact", strata="relation", draws=1000, seed=0
) -> dict:
    """Two-sided test that the labels say nothing about `value`, permuting them among the facts of a
    relation.

    A fact's rows are averaged first. The test is exact for any number of facts, so it needs no
    least one. Returns within, the difference of the class means of the values less their
    relation's mean, whose expectation under the permutation is 0; p = (1 + as extreme) / (1 +
    draws); n1 and n2 facts. NaN where a class is empty or no relation has both."""
    frame = frame[frame[label].isin(list(levels)) & frame[value].notna()]
    facts = frame.groupby([*filter(None, (cluster, label, strata))], sort=False, as_index=False)[
        value
    ].mean()
    if facts[cluster].duplicated().any():
        raise ValueError(
            f"{cluster} {facts[cluster][facts[cluster].duplicated()].iloc[0]!r} has two labels"
        )
    groups = (facts[strata] if strata else pd.Series(0, index=facts.index)).to_numpy()
    first = (facts[label] == levels[0]).to_numpy()
    n1, n2 = int(first.sum()), int((~first).sum())
    if not n1 or not n2:
        return dict(within=np.nan, p=np.nan, n1=n1, n2=n2)
    centred = (facts[value] - facts[value].groupby(groups).transform("mean")).to_numpy(np.float64)
    observed = centred[first].mean() - centred[~first].mean()
    rng, sums, mixed = np.random.default_rng(seed), np.zeros(draws), False
    for _, index in sorted(facts.groupby(groups).indices.items()):
        labels = first[index]
        mixed |= bool(labels.any() and not labels.all())
        sums += rng.permuted(np.tile(labels, (draws, 1)), axis=1) @ centred[index]
    if not mixed:
        return dict(within=np.nan, p=np.nan, n1=n1, n2=n2)
    drawn = sums * (
        1 / n1 + 1 / n2
    )  # the centred values sum to 0, so the second class's sum is minus the first's
    p = (1 + np.sum(np.abs(drawn) >= abs(observed) - 1e-12)) / (1 + draws)
    return dict(within=float(observed), p=float(p), n1=n1, n2=n2)
