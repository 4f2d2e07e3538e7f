"""Intervals and tests of the study: a bootstrap over facts, Welch's t-test, a permutation test of
the classes.

A fact's queries are not independent, so facts are resampled (column fact), within their relation
(the stratum, column relation). Undefined statistics are NaN beside their n; no interval rests on
fewer than `LEAST` facts on a side.
"""

import warnings
from dataclasses import dataclass, replace
from functools import reduce
from operator import sub

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm, ttest_ind
from scipy.stats import t as student

LEVEL = 0.95
TAILS = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)  # percentiles
TRIM = 0.1
STATISTICS = {"trimmed": "10 % trimmed mean", "mean": "mean", "median": "median"}
# The least number of resampled clusters (facts, or relations where these are resampled) on each
# side of an interval or test. A side of one fact has no spread, which a bootstrap takes for
# certainty. By simulation (tests/show/test_stats.py), intervals of 10 facts cover what they
# estimate in at least 93 % of samples for means of symmetric values, medians, trimmed means and
# shares, alone or as a difference of classes, and in 90 % for means of skewed values; with 4, in as
# few as 80 %.
LEAST = 10
_CHUNK = 1_000_000  # draws x rows worked on at a time: little enough to stay near the processor


def welch(a, b):
    """t, df and p of `scipy.stats.ttest_ind(a, b, equal_var=False)` and d, Cohen's with the pooled
    deviation.

    NaNs are left out of a and b. All four are NaN where a sample has fewer than `LEAST` values or
    neither varies."""
    a, b = (pd.Series(sample, dtype=float).dropna() for sample in (a, b))
    if min(len(a), len(b)) < LEAST or a.nunique() == b.nunique() == 1:
        return dict.fromkeys(("t", "df", "p", "d"), np.nan)
    with warnings.catch_warnings():  # one class of equal values is no loss of precision
        warnings.simplefilter("ignore", RuntimeWarning)
        test = ttest_ind(a, b, equal_var=False)
        pooled = ttest_ind(a, b)
    return {
        "t": test.statistic,
        "df": test.df,
        "p": test.pvalue,
        "d": pooled.statistic * np.sqrt(1 / len(a) + 1 / len(b)),
    }


# --- bootstrap over facts -------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Mean, median and 10 % trimmed mean, each with its 95 % interval (NaN where undefined).

    n: values used; n_clusters: facts they come from; n_other, n_clusters_other: those of the
    second side of a difference, None where there is none. n_missing: NaNs left out."""

    mean: float
    mean_low: float
    mean_high: float
    median: float = np.nan
    median_low: float = np.nan
    median_high: float = np.nan
    trimmed: float = np.nan
    trimmed_low: float = np.nan
    trimmed_high: float = np.nan
    n: int = 0
    n_clusters: int = 0
    n_missing: int = 0
    n_other: int | None = None
    n_clusters_other: int | None = None

    def row(self, statistic="mean", name=None):
        """One statistic as columns for `tables.write_table`: `name`, `name`_low, `name`_high, n
        and, of a difference, n_other."""
        row = {}
        for end in ("", "_low", "_high"):
            row[f"{name or statistic}{end}"] = getattr(self, statistic + end)
        return row | _given(n=self.n, n_other=self.n_other)

    def facts(self):
        """n_facts and, of a difference, n_facts_other."""
        return _given(n_facts=self.n_clusters, n_facts_other=self.n_clusters_other)


def _given(**counts):
    return {name: count for name, count in counts.items() if count is not None}


def bootstrap_mean(
    frame,
    value,
    seed=0,
    share=False,
    draws=1000,
) -> Estimate:
    """Mean, median and trimmed mean of column `value` over all rows, with intervals over resampled
    facts.

    Facts are drawn with replacement within their relation, a fact's rows staying together. Of a
    relation's n facts n - 1 are drawn and weigh n / (n - 1), so that the interval is not too narrow
    where a relation has few facts (Rao & Wu 1988; drawing n of n understates the variance by (n -
    1) / n, which is a half for two facts). Relations with one fact left are pooled into one
    stratum; where facts less relations are fewer than `LEAST` - 1, all are (wider, since what sets
    relations apart counts, too). The percentile interval is stretched by the ratio of Student's to
    the normal quantile, of facts less relations, but never beyond the values there are. With fewer
    than `LEAST` facts it is NaN.

    share: the values lie between 0 and 1. Where every fact's is 0 or 1, the interval of the mean
    is Clopper and Pearson's for as many facts: draws of rare or sure events cannot say how far
    from 0 or 1 their share may be."""
    found = _bootstrap([frame], value, draws, seed)
    if share and found.n_clusters >= LEAST and _all_or_nothing(frame, value):
        hits = int(frame[value].sum())
        low, high = binomtest(hits, found.n).proportion_ci(LEVEL)
        found = replace(found, mean_low=low, mean_high=high)
    return found


def bootstrap_difference(
    frame,
    value,
    by,
    levels,
    seed=0,
    share=False,
    draws=1000,
) -> Estimate:
    """Statistic where `by` is levels[0] minus where it is levels[1], with intervals as in
    `bootstrap_mean`.

    Facts are resampled once for both sides. So two conditions measured on the same facts are
    compared paired, and two classes of facts unpaired. Where a side has no value, all is NaN; where
    it has fewer than `LEAST` facts, the intervals. share: as in `bootstrap_mean`; where a side's
    facts are all 0 or 1, the interval is put together from the sides' own (Newcombe 1998), paired
    by their correlation where the facts are the same."""
    sides = [frame[frame[by] == level] for level in levels]
    found = _bootstrap(sides, value, draws, seed)
    certain = share and any(_all_or_nothing(side, value) for side in sides)
    if certain and not np.isnan(found.mean_low):
        own = [bootstrap_mean(side, value, seed, True, draws) for side in sides]
        low, high = _newcombe(*own, _correlation(sides, value))
        found = replace(found, mean_low=low, mean_high=high)
    return found


def _all_or_nothing(frame, value):
    """Whether each fact that has a value has one, 0 or 1."""
    kept = frame.dropna(subset=value)
    return kept["fact"].is_unique and kept[value].isin([0, 1]).all()


def _newcombe(one, two, correlation):
    """Interval of a difference of means from the intervals of both (Newcombe 1998, method 10; Zou
    2007)."""

    def reach(first, second):
        square = first**2 + second**2 - 2 * correlation * first * second
        return np.sqrt(max(0.0, square))

    gap = one.mean - two.mean
    below = reach(one.mean - one.mean_low, two.mean_high - two.mean)
    above = reach(one.mean_high - one.mean, two.mean - two.mean_low)
    return gap - below, gap + above


def _correlation(sides, value):
    """Correlation of the means of two sides: that over the facts that both have, less where others
    are not shared; 0 without such facts or where a side is constant."""
    first, second = [side.groupby("fact")[value].mean() for side in sides]
    shared = (first * second).count() / (first.count() * second.count()) ** 0.5
    return shared * np.nan_to_num(first.corr(second, min_periods=2))


def bootstrap_statistic(frames, statistic, seed=0) -> Estimate:
    """statistic(frame, weights) of one frame of facts, or of the first of two less that of the
    second, computed anew from each draw's weights, as what hangs on a threshold that is itself
    estimated must be. Facts that both frames have are drawn for both. Only `mean` and its interval
    are filled; the interval is NaN with fewer than `LEAST` facts in a frame."""

    def statistics(frame, weights, at):  # (draws, facts) -> (draws, 1)
        found = [statistic(frame, row[at]) for row in weights]
        return np.reshape(found, (-1, 1))

    [point], bounds, _, counts = _resample(frames, statistics, 1000, seed)
    return Estimate(point, *bounds.ravel(), **counts)


def mean_columns(frame, values, seed=0, share=False):
    """The means of several columns side by side, each with its interval, and n, as one row of a
    table. n is that of the last column; one with another n has its own, n_<column>."""
    row = {}
    counts = {}
    for value in values:
        row |= bootstrap_mean(frame, value, seed, share).row("mean", value)
        counts[f"n_{value}"] = row["n"]
    return row | {name: count for name, count in counts.items() if count != row["n"]}


def _bootstrap(sides, value, draws, seed):
    """The statistics of column `value` of a frame or, of two, of the first less the second."""
    kept = [_values(side, value) for side in sides]
    point, bounds, stretch, counts = _resample(kept, _statistics, draws, seed)
    # a mean, and a difference of means, lies between what the values there are allow
    lowest, *others_lowest = [side["value"].min() for side in kept]
    highest, *others_highest = [side["value"].max() for side in kept]
    least = reduce(sub, others_highest, lowest)
    most = reduce(sub, others_lowest, highest)
    low, high = np.clip(point + stretch * (bounds - point), least, most)
    found = np.stack([point, low, high], axis=1)
    rounding = 1e-13 * _sizes(kept)
    found[np.abs(found) < rounding[:, None]] = 0.0
    values = found.ravel().tolist()  # in the order of the fields
    missing = sum(map(len, sides)) - sum(map(len, kept))
    return Estimate(*values, n_missing=missing, **counts)


def _sizes(kept):
    """(3,) How large a statistic is whose rounding must not decide on which side of 0 it lies.

    That of the absolute values: a few huge ones do not hide a median; and what is large among
    those up to 1, where most are rounding themselves."""
    sizes = []
    for side in kept:
        absolute = side.assign(value=np.sort(side["value"].abs()))
        sizes += [*_statistics(absolute, np.ones((1, len(side))), slice(None))]
    largest = pd.concat(kept)["value"].abs().max()
    return np.maximum(np.max(sizes, axis=0), min(1.0, largest))


def _values(frame, value):
    """fact, relation and value of the rows that have one, in the order of the values."""
    x = frame[value].to_numpy(np.float64, na_value=np.nan)
    if np.isinf(x).any():
        raise ValueError(f"column {value!r} has infinite values; mark undefined ones as NaN")
    kept = frame[["fact", "relation"]].assign(value=x).dropna(subset="value")
    return kept.sort_values("value", kind="stable")


def _resample(frames, statistics, draws, seed):
    """statistics(frame, weights, at) of one frame, or of the first less that of the second:
    (rows of weights, S), where `weights` is (draws, facts) and `at` the fact of each row.

    Returns the values (S,), the percentiles of their draws (2, S), by what to stretch these around
    the values, and the counts as fields of an `Estimate`."""
    every = pd.concat(frames)[["fact", "relation"]].astype(str)
    fact = pd.factorize(every["fact"], sort=True)[0]  # no matter how rows are ordered
    relation = every["relation"].groupby(fact).first()
    rows = np.split(fact, [len(frames[0])])[: len(frames)]
    facts = list(map(np.unique, rows))

    def value(weights):
        found = [statistics(frame, weights, at) for frame, at in zip(frames, rows)]
        return reduce(sub, found)

    [point] = value(np.ones((1, len(relation))))
    bounds = np.full((2, len(point)), np.nan)
    stretch = 1.0
    if min(map(len, facts)) >= LEAST and not np.isnan(point).any():
        strata, stretch = _strata(pd.factorize(relation, sort=True)[0], facts)
        sample = value(resampling_weights(strata, draws, seed))
        sample = sample[~np.isnan(sample).any(axis=1)]  # a draw may leave a class empty
        if len(sample):
            bounds = np.percentile(sample, TAILS, axis=0)
    counts = dict(zip(("n", "n_other"), map(len, rows)))
    counts |= zip(("n_clusters", "n_clusters_other"), map(len, facts))
    return point, bounds, stretch, counts


def _strata(strata, sides):
    """The strata to draw in, and by what the interval is stretched, for sides of these facts
    (their positions).

    The side with the fewest degrees of freedom decides (facts less strata; singletons form one);
    where it has too few, all facts are one stratum."""

    def freedom(facts):
        counts = np.bincount(strata[facts])
        return counts.sum() - (counts > 1).sum() - (counts == 1).any()

    least = min(map(freedom, sides))
    if least < LEAST - 1:
        strata = np.zeros_like(strata)
        least = min(map(len, sides)) - 1
    quantile = TAILS[1] / 100
    return strata, student.ppf(quantile, least) / norm.ppf(quantile)


def resampling_weights(strata, draws, seed):
    """(draws, clusters) weights of a stratified Rao-Wu bootstrap, `strata` (clusters,) the stratum
    of each."""
    size = np.bincount(strata)[strata]
    strata = np.where(size == 1, -1, strata)  # singletons form one stratum
    if np.sum(strata == -1) == 1:  # a lone one joins the smallest other stratum
        names, counts = np.unique(strata[strata >= 0], return_counts=True)
        strata[strata == -1] = names[counts.argmin()]
    rng = np.random.default_rng(seed)
    weights = np.empty((draws, len(strata)), np.float32)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        n = len(members)
        drawn = rng.integers(n, size=(draws, n - 1))
        drawn += n * np.arange(draws)[:, None]  # to count those of each draw apart
        counts = np.bincount(drawn.ravel(), minlength=draws * n)
        weights[:, members] = counts.reshape(draws, n) * (n / (n - 1))
    return weights


def _statistics(frame, weights, at):
    """(draws, 3): mean, median and trimmed mean of a frame's sorted values under the weights
    (draws, facts) of their facts `at` (n,)."""
    values = frame["value"].to_numpy()
    if not len(values):
        return np.full((len(weights), 3), np.nan)
    step = max(1, _CHUNK // len(values))
    parts = [np.empty((0, 3))]
    for start in range(0, len(weights), step):
        chunk = weights[start : start + step, at].astype(np.float64)
        parts.append(weighted_statistics(values, chunk))
    return np.concatenate(parts)


def weighted_statistics(x, w):
    """(draws, 3): mean, median and trimmed mean of the sorted values x (n,) under weights w
    (draws, n); NaN for a draw without weight."""
    upper = np.cumsum(w, axis=1)  # of the weights up to each value
    total = upper[:, -1:]
    tiny = 2e-7 * total  # the weights have single precision
    low = np.sum(upper < total / 2 - tiny, axis=1)
    high = np.sum(upper <= total / 2 + tiny, axis=1)
    middle = x[np.minimum([low, high], len(x) - 1)].mean(0)
    median = np.where(total[:, 0] > 0, middle, np.nan)
    cut = np.floor(TRIM * total + tiny)  # as scipy.stats.trim_mean
    # what of each value's weight lies between the cuts
    ends = np.minimum(upper, total - cut)
    starts = np.maximum(upper - w, cut)
    kept = (ends - starts).clip(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (w @ x) / total[:, 0]
        trimmed = (kept @ x) / kept.sum(1)
    return np.stack([mean, median, trimmed], axis=1)


# --- permutation of the classes -------------------------------------------------------------------


def permutation_test(
    frame,
    value,
    label,
    draws=1000,
    seed=0,
):
    """Two-sided test that the labels "I" and "II" say nothing about `value`, permuting them among
    the facts of a relation.

    A fact's rows are averaged first. The test is exact for any number of facts, so it needs no
    least one. Returns within, the difference of the class means of the values less their
    relation's mean, whose expectation under the permutation is 0; p = (1 + as extreme) / (1 +
    draws); n1 and n2 facts. NaN where no relation has both classes."""
    keys = ["fact", label, "relation"]
    facts = frame.dropna(subset=[label, value]).groupby(keys, sort=False)[value].mean()
    facts = facts.reset_index()
    for fact in facts["fact"][facts["fact"].duplicated()]:
        raise ValueError(f"fact {fact!r} has two labels")
    relations = facts.groupby("relation")
    first = (facts[label] == "I").to_numpy()
    n1 = first.sum()
    n2 = (~first).sum()
    counts = dict(n1=n1, n2=n2)
    if not relations[label].nunique().max() > 1:
        return dict(within=np.nan, p=np.nan) | counts
    centred = (facts[value] - relations[value].transform("mean")).to_numpy(float)
    rng = np.random.default_rng(seed)
    sums = np.zeros(draws)  # of the first class; as all sum to 0, the second class has the negative
    for _, at in sorted(relations.indices.items()):
        labels = np.tile(first[at], (draws, 1))
        sums += rng.permuted(labels, axis=1) @ centred[at]
    scale = 1 / n1 + 1 / n2
    within = scale * (first @ centred)
    extreme = np.abs(scale * sums) >= abs(within) - 1e-12
    within = round(within, 12)  # not 4e-17 for 0
    return dict(within=within, p=(1 + extreme.sum()) / (1 + draws)) | counts
