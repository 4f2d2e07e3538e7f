"""Intervals and tests of the study: a bootstrap over facts, Welch's t-test, a permutation test of
the classes.

A fact's queries are not independent, so facts are resampled (column fact), within their relation
(the stratum, column relation). Undefined statistics are NaN beside their n; no interval rests on
fewer than `LEAST` facts on a side.
"""

import warnings
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import sub

import numpy as np
import pandas as pd

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


def welch(a, b) -> dict:
    """t, df and p of `scipy.stats.ttest_ind(a, b, equal_var=False)` and d, Cohen's with the pooled
    deviation.

    NaNs are left out of a and b. All four are NaN where a sample has fewer than `LEAST` values or
    neither varies."""
    from scipy.stats import ttest_ind

    a, b = (np.asarray(values, dtype=np.float64) for values in (a, b))
    a = a[~np.isnan(a)]
    b = b[~np.isnan(b)]
    if min(len(a), len(b)) < LEAST or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return dict.fromkeys(("t", "df", "p", "d"), np.nan)
    with warnings.catch_warnings():  # one class of equal values is no loss of precision
        warnings.simplefilter("ignore", RuntimeWarning)
        test = ttest_ind(a, b, equal_var=False)
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    d = (a.mean() - b.mean()) / np.sqrt(pooled)
    return dict(
        t=float(test.statistic),
        df=float(test.df),
        p=float(test.pvalue),
        d=float(d),
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
    median: float = np.nan
    median_low: float = np.nan
    median_high: float = np.nan
    trimmed: float = np.nan
    trimmed_low: float = np.nan
    trimmed_high: float = np.nan
    n: int = 0
    n_clusters: int = 0
    n_missing: int = 0
    n_draws: int = 0
    n_other: int | None = None
    n_clusters_other: int | None = None

    def row(self, statistic="mean", name=None) -> dict:
        """One statistic as columns for `tables.write_table`: `name`, `name`_low, `name`_high, n
        and, of a difference, n_other."""
        values = asdict(self)
        row = {
            f"{name or statistic}{end}": values[statistic + end] for end in ("", "_low", "_high")
        }
        counts = {"n": self.n, "n_other": self.n_other}
        return row | {key: count for key, count in counts.items() if count is not None}

    def facts(self) -> dict:
        """n_facts and, of a difference, n_facts_other."""
        counts = {"n_facts": self.n_clusters, "n_facts_other": self.n_clusters_other}
        return {key: count for key, count in counts.items() if count is not None}


def bootstrap_mean(frame, value, draws=1000, seed=0, share=False) -> Estimate:
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
        from scipy.stats import binomtest

        low, high = binomtest(int(frame[value].sum()), found.n).proportion_ci(LEVEL)
        found = replace(found, mean_low=float(low), mean_high=float(high))
    return found


def bootstrap_difference(frame, value, by, levels, draws=1000, seed=0, share=False) -> Estimate:
    """Statistic where `by` is levels[0] minus where it is levels[1], with intervals as in
    `bootstrap_mean`.

    Facts are resampled once for both sides. So two conditions measured on the same facts are
    compared paired, and two classes of facts unpaired. Where a side has no value, all is NaN; where
    it has fewer than `LEAST` facts, the intervals. share: as in `bootstrap_mean`; where a side's
    facts are all 0 or 1, the interval is put together from the sides' own (Newcombe 1998), paired
    by their correlation where the facts are the same."""
    if by not in frame or len(levels) != 2:
        raise ValueError(f"by={by!r} must be a column and levels={levels!r} two of its values")
    sides = [frame[frame[by] == level] for level in levels]
    found = _bootstrap(sides, value, draws, seed)
    certain = share and any(_all_or_nothing(side, value) for side in sides)
    if certain and not np.isnan(found.mean_low):
        one, two = (bootstrap_mean(side, value, draws, seed, share=True) for side in sides)
        low, high = _newcombe(one, two, _correlation(*sides, value))
        found = replace(found, mean_low=low, mean_high=high)
    return found


def _all_or_nothing(frame, value) -> bool:
    """Whether each fact has one value, 0 or 1."""
    kept = frame.dropna(subset=value)
    return len(kept) > 0 and kept[value].isin([0, 1]).all() and kept["fact"].is_unique


def _newcombe(one: Estimate, two: Estimate, correlation) -> tuple[float, float]:
    """Interval of a difference of means from the intervals of both (Newcombe 1998, method 10; Zou
    2007)."""

    def reach(first, second):
        return float(np.sqrt(max(0.0, first**2 + second**2 - 2 * correlation * first * second)))

    gap = one.mean - two.mean
    below = reach(one.mean - one.mean_low, two.mean_high - two.mean)
    above = reach(one.mean_high - one.mean, two.mean - two.mean_low)
    return gap - below, gap + above


def _correlation(one, two, value) -> float:
    """Correlation of two sides over the facts that both have; 0 without such facts or where a side
    is constant."""
    means = [side.groupby("fact")[value].mean() for side in (one, two)]
    first, second = means[0].align(means[1], join="inner")
    if len(first) < 2 or first.nunique() < 2 or second.nunique() < 2:
        return 0.0
    return float(np.nan_to_num(first.corr(second)))


def bootstrap_statistic(frames, statistic, draws=1000, seed=0) -> Estimate:
    """statistic(frame, weights) of one frame of facts, or of the first of two less that of the
    second, computed anew from each draw's weights, as what hangs on a threshold that is itself
    estimated must be. Facts that both frames have are drawn for both. Only `mean` and its interval
    are filled; the interval is NaN with fewer than `LEAST` facts in a frame."""

    def statistics(frame, weights, at):  # (draws, facts) -> (draws, 1)
        found = [statistic(frame, row[at]) if len(frame) else np.nan for row in weights]
        return np.array(found).reshape(-1, 1)

    [point], sample, _, counts = _resample(frames, statistics, draws, seed)
    low, high = np.percentile(sample, TAILS) if len(sample) else (np.nan, np.nan)
    return Estimate(float(point), float(low), float(high), **counts)


def mean_columns(frame, values, seed=0, share=False) -> dict:
    """The means of several columns side by side, each with its interval, and n, as one row of a
    table. n is that of the last column; one with another n has its own, n_<column>."""
    row = {}
    counts = {}
    for value in values:
        row |= bootstrap_mean(frame, value, seed=seed, share=share).row("mean", value)
        counts[f"n_{value}"] = row["n"]
    return row | {name: count for name, count in counts.items() if count != row["n"]}


def _bootstrap(sides, value, draws, seed) -> Estimate:
    """The statistics of column `value` of a frame or, of two, of the first less the second."""
    kept = [_values(side, value) for side in sides]
    x = [side["value"].to_numpy() for side in kept]

    def statistics(frame, weights, at):
        return _statistics(frame["value"].to_numpy(), weights, at)

    point, sample, stretch, counts = _resample(kept, statistics, draws, seed)
    low, high = np.full((2, 3), np.nan)
    if len(sample):
        bounds = np.percentile(sample, TAILS, axis=0)  # (2, 3)
        # a mean, and a difference of means, lies between what the values there are allow
        first, *second = x
        least = reduce(sub, [first.min(), *(other.max() for other in second)])
        most = reduce(sub, [first.max(), *(other.min() for other in second)])
        low, high = np.clip([point + stretch * (bound - point) for bound in bounds], least, most)
    found = np.stack([point, low, high], axis=1).ravel()  # in the order of the fields
    # what rounding leaves of an exact 0 must not decide on which side of 0 it lies
    # (sized by the same statistic of the absolute values: a few huge ones do not hide a median; and
    # by what is large among those up to 1, where most are rounding themselves)
    sizes = [_statistics(np.sort(np.abs(one)), np.ones((1, len(one))), slice(None))[0] for one in x]
    sizes = np.maximum(np.max(sizes, axis=0), min(1.0, np.abs(np.concatenate(x)).max(initial=0.0)))
    found[np.abs(found) < 1e-13 * np.repeat(sizes, 3)] = 0.0
    missing = sum(map(len, sides)) - sum(map(len, x))
    return Estimate(*found.tolist(), n_missing=missing, **counts)


def _values(frame, value) -> pd.DataFrame:
    """fact, relation and value of the rows that have one, in the order of the values."""
    for column in (value, "fact", "relation"):
        if column not in frame:
            names = ", ".join(map(str, frame.columns))
            raise ValueError(f"the frame has no column {column!r}: {names}")
    x = frame[value].to_numpy(np.float64, na_value=np.nan)
    if np.isinf(x).any():
        raise ValueError(f"column {value!r} has infinite values; mark undefined ones as NaN")
    order = np.argsort(x, kind="stable")[: np.sum(~np.isnan(x))]  # NaNs are last
    return frame[["fact", "relation"]].iloc[order].assign(value=x[order])


def _resample(frames, statistics, draws, seed):
    """statistics(frame, weights, at) of one frame, or of the first less that of the second:
    (statistics,) of all rows and (draws, statistics) of draws, by what to stretch the interval, and
    the counts as fields of an `Estimate`. `weights` (draws, facts), `at` the fact of each row."""
    every = pd.concat([frame[["fact", "relation"]] for frame in frames]).astype(str)
    every = every.drop_duplicates("fact").sort_values("fact")  # no matter how rows are ordered
    place = pd.Series(range(len(every)), every["fact"])
    rows = [place[frame["fact"].astype(str)].to_numpy() for frame in frames]
    members = [np.unique(at) for at in rows]
    sizes = [len(one) for one in members]

    def value(weights):
        return reduce(sub, (statistics(one, weights, at) for one, at in zip(frames, rows)))

    point = value(np.ones((1, len(every))))[0]
    stretch = 1.0
    sample = np.empty((0, len(point)))
    if min(sizes) >= LEAST and not np.isnan(point).any():
        strata, stretch = _strata(pd.factorize(every["relation"], sort=True)[0], members)
        sample = value(resampling_weights(strata, draws, seed))
        sample = sample[~np.isnan(sample).any(axis=1)]
    counts = dict(zip(("n", "n_other"), map(len, rows)), n_draws=len(sample))
    return point, sample, stretch, counts | dict(zip(("n_clusters", "n_clusters_other"), sizes))


def _strata(strata, members) -> tuple[np.ndarray, float]:
    """The strata to draw in, and by what the interval is stretched, for sides of these facts
    (their positions).

    The side with the fewest degrees of freedom decides (facts less strata; singletons form one);
    where it has too few, all facts are one stratum."""
    from scipy.stats import norm, t

    def freedom(counts):
        return counts.sum() - (counts > 1).sum() - (counts == 1).any()

    least = min(freedom(np.bincount(strata[inside])) for inside in members)
    if least < LEAST - 1:
        strata = np.zeros_like(strata)
        least = min(map(len, members)) - 1
    return strata, float(t.ppf(TAILS[1] / 100, max(1, least)) / norm.ppf(TAILS[1] / 100))


def resampling_weights(strata, draws, seed):
    """(draws, clusters) weights of a stratified Rao-Wu bootstrap, `strata` (clusters,) the stratum
    of each; no rows when there is one cluster only."""
    strata = np.where(np.bincount(strata)[strata] == 1, -1, strata)  # singletons form one stratum
    if np.sum(strata == -1) == 1 and len(strata) > 1:  # a lone one joins the smallest other stratum
        names, counts = np.unique(strata[strata >= 0], return_counts=True)
        strata[strata == -1] = names[counts.argmin()]
    if len(strata) < 2:
        return np.zeros((0, len(strata)), np.float32)
    rng = np.random.default_rng(seed)
    weights = np.empty((draws, len(strata)), np.float32)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        n = len(members)
        drawn = rng.integers(n, size=(draws, n - 1)) + n * np.arange(draws)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)
        weights[:, members] = counts * (n / (n - 1))
    return weights


def _statistics(values, weights, at):
    """(draws, 3): mean, median and trimmed mean of the sorted values (n,) under the weights (draws,
    facts) of their facts `at` (n,)."""
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
    upper = np.cumsum(w, axis=1)
    total = upper[:, -1:].copy()  # upper is written over below
    tiny = 2e-7 * total  # the weights have single precision
    ends = []
    for row, half, slack in zip(upper, total[:, 0] / 2, tiny[:, 0]):
        after = np.searchsorted(row, half + slack, side="right")
        ends.append((np.searchsorted(row, half - slack), after))
    low, high = x[np.minimum(np.array(ends), len(x) - 1)].T
    median = np.where(total[:, 0] > 0, (low + high) / 2, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (w @ x) / total[:, 0]
        cut = np.floor(TRIM * total + tiny)  # as scipy.stats.trim_mean
        inside = np.minimum(upper, total - cut)  # what of each value's weight lies between the cuts
        inside -= np.maximum(np.subtract(upper, w, out=upper), cut)
        kept = np.clip(inside, 0, None, out=inside)
        trimmed = (kept @ x) / kept.sum(1)
    return np.stack([mean, median, trimmed], axis=1)


# --- permutation of the classes -------------------------------------------------------------------


def permutation_test(frame, value, label, draws=1000, seed=0) -> dict:
    """Two-sided test that the labels "I" and "II" say nothing about `value`, permuting them among
    the facts of a relation.

    A fact's rows are averaged first. The test is exact for any number of facts, so it needs no
    least one. Returns within, the difference of the class means of the values less their
    relation's mean, whose expectation under the permutation is 0; p = (1 + as extreme) / (1 +
    draws); n1 and n2 facts. NaN where no relation has both classes."""
    frame = frame[frame[label].isin(["I", "II"]) & frame[value].notna()]
    keys = ["fact", label, "relation"]
    facts = frame.groupby(keys, sort=False, as_index=False)[value].mean()
    if not facts["fact"].is_unique:
        raise ValueError(
            f"fact {facts['fact'][facts['fact'].duplicated()].iloc[0]!r} has two labels"
        )
    relations = facts.groupby("relation")
    first = (facts[label] == "I").to_numpy()
    n1 = int(first.sum())
    n2 = int((~first).sum())
    if not (relations[label].nunique() > 1).any():
        return dict(
            within=np.nan,
            p=np.nan,
            n1=n1,
            n2=n2,
        )
    centred = (facts[value] - relations[value].transform("mean")).to_numpy(np.float64)
    within = centred[first].mean() - centred[~first].mean()
    rng = np.random.default_rng(seed)
    sums = np.zeros(draws)
    for _, at in sorted(relations.indices.items()):
        sums += rng.permuted(np.tile(first[at], (draws, 1)), axis=1) @ centred[at]
    drawn = sums * (1 / n1 + 1 / n2)  # centred values sum to 0: the second class has -sums
    p = (1 + np.sum(np.abs(drawn) >= abs(within) - 1e-12)) / (1 + draws)
    return dict(
        within=float(within),
        p=float(p),
        n1=n1,
        n2=n2,
    )
