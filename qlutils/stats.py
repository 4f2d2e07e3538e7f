"""Intervals and tests of the study: a bootstrap over facts, Welch's t-test, a permutation test of the classes.

A fact's queries are not independent, so the unit that is resampled is the fact (the *cluster*), and facts are resampled
within their relation (the *stratum*). Undefined statistics are NaN beside their n.
"""

import warnings
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

LEVEL = 0.95
TRIM = 0.1
_CHUNK = 1_000_000  # draws x rows worked on at a time: little enough to stay near the processor


def welch(a, b) -> dict:
    """t, df and p of `scipy.stats.ttest_ind(a, b, equal_var=False)` and d, Cohen's with the pooled deviation.

    NaNs are left out of a and b. All four are NaN where a sample has fewer than two values or neither varies."""
    from scipy.stats import ttest_ind

    a, b = (np.asarray(values, dtype=np.float64) for values in (a, b))
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    if min(len(a), len(b)) < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return dict.fromkeys(("t", "df", "p", "d"), np.nan)
    with warnings.catch_warnings():  # one class of equal values is no loss of precision
        warnings.simplefilter("ignore", RuntimeWarning)
        result = ttest_ind(a, b, equal_var=False)
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    return dict(t=float(result.statistic), df=float(result.df), p=float(result.pvalue),
                d=float((a.mean() - b.mean()) / np.sqrt(pooled)))


# --- bootstrap over facts ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Estimate:
    """Mean, median and 10 % trimmed mean, each with its percentile 95 % interval (NaN where undefined).

    n: values used; n_clusters: facts they come from; n_missing: NaNs left out; n_draws: draws behind the interval
    (draws without a value, as of an empty class, are left out)."""

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

    def row(self, statistic="mean", name=None) -> dict:
        """One statistic as columns for `tables.write_table`: `name`, `name`_low, `name`_high, n."""
        name, values = name or statistic, asdict(self)
        return {f"{name}{end}": values[f"{statistic}{end}"] for end in ("", "_low", "_high")} | {"n": self.n}


def bootstrap_mean(frame, value, cluster="fact", strata="relation", draws=1000, seed=0, share=False) -> Estimate:
    """Mean, median and trimmed mean of column `value` over all rows, with intervals over resampled facts.

    Facts are drawn with replacement within their relation, a fact's rows staying together. Of a relation's n facts
    n - 1 are drawn and weigh n / (n - 1), so that the interval is not too narrow where a relation has few facts (Rao &
    Wu 1988; drawing n of n understates the variance by (n - 1) / n, which is a half for two facts). Relations with one
    fact left are pooled into one stratum. With one fact in all, the interval is NaN. strata=None resamples all facts
    together. share: the values lie between 0 and 1; where all are 0, or all 1, draws cannot say how far from it the mean
    may be, and its interval is Clopper and Pearson's for as many facts."""
    found = _bootstrap(frame, value, None, [None], cluster, strata, draws, seed)
    if share and found.n_clusters > 1 and found.mean_low == found.mean_high and found.mean in (0.0, 1.0):
        from scipy.stats import binomtest

        low, high = binomtest(int(found.mean) * found.n_clusters, found.n_clusters).proportion_ci(LEVEL)
        found = replace(found, mean_low=float(low), mean_high=float(high))
    return found


def bootstrap_difference(frame, value, by, levels, cluster="fact", strata="relation", draws=1000, seed=0) -> Estimate:
    """Statistic where `by` is levels[0] minus where it is levels[1], with intervals as in `bootstrap_mean`.

    Facts are resampled once for both sides. So two conditions measured on the same facts are compared paired, and two
    classes of facts unpaired. n counts the values of both sides. Where a side has no value, all is NaN."""
    if by not in frame or len(levels) != 2:
        raise ValueError(f"by={by!r} must be a column and levels={levels!r} two of its values")
    return _bootstrap(frame[frame[by].isin(list(levels))], value, by, levels, cluster, strata, draws, seed)


def bootstrap_statistic(frames, statistic, cluster="fact", strata="relation", draws=1000, seed=0) -> Estimate:
    """statistic(frame, weights) of one frame of facts, or of the first of two less that of the second, computed anew from
    each draw's weights, as what hangs on a threshold that is itself estimated must be. Facts that both frames have are drawn
    for both. Only `mean` and its interval are filled."""
    every = pd.concat([frame[[cluster, strata]] for frame in frames]).drop_duplicates(cluster).sort_values(cluster)
    place = pd.Series(range(len(every)), every[cluster])
    weights = resampling_weights(pd.factorize(every[strata], sort=True)[0], draws, seed)

    def value(w):
        first, *second = (statistic(frame, w[place[frame[cluster]].to_numpy()]) for frame in frames)
        return first - second[0] if second else first

    point = value(np.ones(len(every))) if all(map(len, frames)) else np.nan
    sample = [] if np.isnan(point) else [value(w) for w in weights]
    sample = [one for one in sample if not np.isnan(one)]
    low, high = np.percentile(sample, (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)) if sample else (np.nan, np.nan)
    return Estimate(float(point), float(low), float(high), *[np.nan] * 6, n=sum(map(len, frames)), n_clusters=len(every),
                    n_missing=0, n_draws=len(sample))


def mean_columns(frame, values, seed=0, share=False) -> dict:
    """The means of several columns side by side, each with its interval, and n (of the last), as one row of a table."""
    row = {}
    for value in values:
        row |= bootstrap_mean(frame, value, seed=seed, share=share).row("mean", value)
    return row


def _bootstrap(frame, value, by, levels, cluster, strata, draws, seed) -> Estimate:
    """The first level's statistics less the second's, where there is one; `by` None takes all rows."""
    for column in filter(None, (value, cluster, strata)):
        if column not in frame:
            raise ValueError(f"the frame has no column {column!r}: {', '.join(map(str, frame.columns))}")
    x = frame[value].to_numpy(np.float64, na_value=np.nan)
    if np.isinf(x).any():
        raise ValueError(f"column {value!r} has infinite values; mark undefined ones as NaN")
    kept, x = frame[~np.isnan(x)], x[~np.isnan(x)]
    # sorted names, so that the result does not depend on the order of the rows
    clusters, names = pd.factorize(kept[cluster].astype(str), sort=True)
    strata_of = np.zeros(len(names), int)
    if strata:
        strata_of[clusters] = pd.factorize(kept[strata].astype(str), sort=True)[0]
    sides = [np.full(len(x), True) if by is None else (kept[by] == level).to_numpy() for level in levels]
    point, sample = np.full(3, np.nan), np.full((0, 3), np.nan)
    if all(side.any() for side in sides):
        def statistics(weights):
            first, *second = (_statistics(x[side], weights, clusters[side]) for side in sides)
            return first - second[0] if second else first

        point = statistics(np.ones((1, len(names))))[0]
        sample = statistics(resampling_weights(strata_of, draws, seed))
        sample = sample[~np.isnan(sample).any(axis=1)]
    tails = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)
    low, high = np.percentile(sample, tails, axis=0) if len(sample) else np.full((2, 3), np.nan)
    rounding = 1e-13 * np.abs(x).max(initial=0.0)  # of what is exactly 0; it must not decide on which side of 0 it lies
    fields = [0.0 if abs(number) < rounding else float(number) for triple in zip(point, low, high) for number in triple]
    return Estimate(*fields, n=len(x), n_clusters=len(names), n_missing=len(frame) - len(x), n_draws=len(sample))


def resampling_weights(strata_of, draws, seed):
    """(draws, clusters) weights of a stratified Rao-Wu bootstrap; no rows when there is one cluster only."""
    counts = np.bincount(strata_of)
    strata_of = np.where(counts[strata_of] == 1, -1, strata_of)  # singletons form one stratum
    if np.sum(strata_of == -1) == 1 and len(strata_of) > 1:  # a lone one joins the smallest other stratum
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
    parts = [_weighted(x, weights[start:start + step, clusters].astype(np.float64))
             for start in range(0, len(weights), step)]
    return np.concatenate(parts) if parts else np.full((0, 3), np.nan)


def _weighted(x, w):
    """Statistics of the sorted values x (n,) under weights w (draws, n); NaN for a draw without weight."""
    upper = np.cumsum(w, axis=1)
    total = upper[:, -1:].copy()  # upper is written over below
    tiny = 2e-7 * total  # the weights have single precision
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (w @ x) / total[:, 0]
        ends = ((np.searchsorted(row, half - slack), np.searchsorted(row, half + slack, side="right"))
                for row, half, slack in zip(upper, total[:, 0] / 2, tiny[:, 0]))
        low, high = x[np.minimum(np.array(list(ends)), len(x) - 1)].T
        cut = np.floor(TRIM * total + tiny)  # as scipy.stats.trim_mean
        inside = np.minimum(upper, total - cut)  # what of each value's weight lies between the cuts
        inside -= np.maximum(np.subtract(upper, w, out=upper), cut)
        kept = np.clip(inside, 0, None, out=inside)
        trimmed = (kept @ x) / kept.sum(1)
    median = np.where(total[:, 0] > 0, (low + high) / 2, np.nan)
    return np.stack([mean, median, trimmed], axis=1)


# --- permutation of the classes ---------------------------------------------------------------------------

def permutation_test(frame, value, label, levels=("I", "II"), cluster="fact", strata="relation", draws=1000,
                     seed=0) -> dict:
    """Two-sided test that the labels say nothing about `value`, permuting them among the facts of a relation.

    A fact's rows are averaged first. Returns within, the difference of the class means of the values less their
    relation's mean, whose expectation under the permutation is 0; p = (1 + as extreme) / (1 + draws); n1 and n2 facts.
    NaN where a class is empty or no relation has both."""
    frame = frame[frame[label].isin(list(levels)) & frame[value].notna()]
    facts = frame.groupby([*filter(None, (cluster, label, strata))], sort=False, as_index=False)[value].mean()
    if facts[cluster].duplicated().any():
        raise ValueError(f"{cluster} {facts[cluster][facts[cluster].duplicated()].iloc[0]!r} has two labels")
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
    drawn = sums * (1 / n1 + 1 / n2)  # the centred values sum to 0, so the second class's sum is minus the first's
    p = (1 + np.sum(np.abs(drawn) >= abs(observed) - 1e-12)) / (1 + draws)
    return dict(within=float(observed), p=float(p), n1=n1, n2=n2)
