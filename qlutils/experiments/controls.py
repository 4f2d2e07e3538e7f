"""What else could make a fact's queries agree or disagree: the controls of the study that the paper
does not have.

Null groups, the noise of the method, a split-half version of the circular test, precision, and
whether K_II is only ignorance. Input is the `queries` frame of a run; `noise` and `precision`
localise a few dozen queries again.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from qlutils.experiments.consistency import THRESHOLDS, classified_facts, share_of_class
from qlutils.neurons.others import random_neurons
from qlutils.neurons.sets import (
    classify,
    consistency,
    cs2_subsampled,
    fact_table,
    kn_sets,
    otsu_threshold,
)
from qlutils.show.stats import (
    LEAST,
    bootstrap_difference,
    mean_columns,
    permutation_test,
    resampling_weights,
)

GROUP = 3  # queries a group: CS2 grows with their number, so every control has as many
# Kind of a group: what it is; for those drawn among queries, the columns where members are equal
# and where they differ.
NULLS = {
    "own": ("the fact's own queries",),
    "same pattern": ("one pattern, different facts", ("pattern",), ("fact",)),
    "other objects": (
        "different patterns and objects, one relation",
        ("relation",),
        ("fact", "object", "pattern"),
    ),
    "other relations": (
        "different patterns and objects, different relations",
        (),
        ("fact", "object", "pattern", "relation"),
    ),
    "same object": ("different facts and patterns, one object", ("object",), ("fact", "pattern")),
    "random": ("random neurons, as many in each layer",),
}
RULES = {"right": 20, "midpoint": 20, "gauss": 20}


def summarise(
    frame: pd.DataFrame, by: str = "kind", values=("cs2", "jaccard"), seed: int = 0
) -> pd.DataFrame:
    """Mean of `values` for each level of `by` with its 95 % interval over facts within relation; n
    facts, n_missing."""
    rows = [
        {by: level, **mean_columns(part, values, seed), "n_missing": part[values[-1]].isna().sum()}
        for level, part in frame.groupby(by, sort=False)
    ]
    return pd.DataFrame(rows)


def _agreement(sets) -> dict:
    if len(sets) < GROUP:
        return dict(cs2=np.nan, jaccard=np.nan)
    found = consistency(sets)
    return dict(cs2=found.cs2, jaccard=found.jaccard)


# --- 1: groups of queries that are no fact's ------------------------------------------------------


def null_consistency(
    queries: pd.DataFrame, num_neurons: int | None, t: float = 0.2, seed: int = 0
) -> pd.DataFrame:
    """CS2 and mean pairwise Jaccard of groups of 3 queries, a row a fact and kind of NULLS: fact,
    relation, kind, cs2, jaccard, n_queries.

    A group starts from a seeded query of the fact and adds queries drawn among all that the kind
    allows beside those already in it; where there are fewer than 3, both are NaN. "own" averages
    over groups of 3 of the fact's queries.
    num_neurons: of a layer of the model; None: as many as the largest index among the KNs says."""
    num_neurons = num_neurons or 1 + max(
        int(max(neurons)) for neurons in queries["neuron"] if len(neurons)
    )
    queries = queries.reset_index(drop=True)
    queries["pattern"] = [
        f"{relation} " + re.sub(rf"(?<!\w){re.escape(subject)}(?!\w)", "[X]", prompt)
        for relation, subject, prompt in zip(
            queries["relation"], queries["subject"], queries["prompt"]
        )
    ]
    sets, rows = kn_sets(queries, t), []
    columns = {
        name: pd.factorize(queries[name])[0] for name in ("fact", "relation", "object", "pattern")
    }
    for fact, group in queries.groupby("fact", sort=False):
        own = [sets[row] for row in group.index]
        key = dict(fact=fact, relation=group["relation"].iloc[0])
        rows.append(
            key
            | dict(
                kind="own",
                cs2=cs2_subsampled(own, GROUP, seed),
                n_queries=min(GROUP, len(own)),
                jaccard=consistency(own).jaccard if len(own) >= GROUP else np.nan,
            )
        )
        for kind in list(NULLS)[1:]:
            rng = np.random.default_rng([seed, *f"{fact} {kind}".encode()])
            start = int(rng.choice(group.index))
            chosen = (
                [sets[row] for row in _draw(columns, start, kind, rng)]
                if kind != "random"
                else [random_neurons(one, num_neurons, rng, outside=False) for one in own[:GROUP]]
            )
            rows.append(key | dict(kind=kind, n_queries=len(chosen), **_agreement(chosen)))
    return pd.DataFrame(rows)


def _draw(columns, start, kind, rng) -> list[int]:
    """Rows of a group of GROUP queries, or fewer where the data has no more that fit."""
    members, allowed = [start], np.ones(len(columns["fact"]), bool)
    _, equal, differ = NULLS[kind]
    while len(members) < GROUP:
        for name in equal:
            allowed &= columns[name] == columns[name][members[-1]]
        for name in differ:
            allowed &= columns[name] != columns[name][members[-1]]
        if not allowed.any():
            break
        members.append(int(rng.choice(np.flatnonzero(allowed))))
    return members


# --- 2 and 6: the same queries, localised again ---------------------------------------------------


def sample_queries(queries: pd.DataFrame, n: int = 24, seed: int = 0) -> pd.DataFrame:
    """At most `n` queries, one a fact, known ones first; the same for every method."""
    order = np.random.default_rng(seed).permutation(len(queries))
    shuffled = queries.iloc[order].sort_values("known", ascending=False, kind="stable")
    return shuffled.drop_duplicates("fact").head(n).sort_values(["fact", "prompt_index"])


def variants(prompt: str, subject: str) -> list[str]:
    """At most two wordings as close to the prompt as can be: an article dropped, or one added
    before the subject. The last word, at which attribution is read, stays."""
    place = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)
    name = range(place.start(), place.end()) if place else ()
    found = [
        prompt[: m.start()] + prompt[m.end() :]
        for m in re.finditer(r"\b(?:the|a|an) ", prompt)
        if m.start() not in name
    ]
    if (
        place
        and not re.search(r"\b(?:the|a|an) $", prompt[: place.start()], re.I)
        and not re.match(r"(?:the|a|an) ", subject, re.I)
    ):
        article = "the " if place.start() else "The "
        found.append(prompt[: place.start()] + article + prompt[place.start() :])
    last = prompt.split()[-1:]
    return [one for one in dict.fromkeys(found) if one != prompt and one.split()[-1:] == last][:2]


def _localise_again(study, rows, prompts, what, **spec) -> pd.DataFrame:
    """The `queries` frame of the facts of `rows` with these lists of prompts; what cannot be read
    is left out."""
    from qlutils.experiments.localize import localise_unit

    facts = rows[["relation", "subject", "object"]].to_dict("records")
    unit = [fact | {"prompts": texts} for fact, texts in zip(facts, prompts) if texts]
    if not unit:
        return rows.head(0)
    config, name = {"method": study.method, **spec}, f"{study.model} {study.method} {what}"
    frame = study.run(localise_unit, [unit], config, desc=name)
    return frame[frame["left_out"].isna()]


def noise(
    study, queries: pd.DataFrame, *, t: float = 0.2, n: int = 24, seed: int = 0, **spec
) -> pd.DataFrame:
    """How far KN sets that should be one differ: a row a sampled query and kind, with cs2 and
    jaccard of its 3 sets.

    "quadrature": the query by three rules of the integral; "variants": the query and two
    near-identical wordings; "neighbours": CS2 of 3 of the same facts' queries, to compare. Sampled
    are queries of which two such wordings can be made; where there are none, others, without that
    kind."""
    near = np.array(
        [len(variants(*pair)) == GROUP - 1 for pair in zip(queries["prompt"], queries["subject"])],
        bool,
    )
    rows, out = sample_queries(queries[near] if near.any() else queries, n, seed), []
    texts = [
        [prompt, *variants(prompt, subject)]
        for prompt, subject in zip(rows["prompt"], rows["subject"])
    ]
    byrule = [
        _localise_again(
            study,
            rows,
            [one[:1] for one in texts],
            f"noise {rule}",
            **spec | {"rule": rule, "steps": steps},
        )
        for rule, steps in RULES.items()
    ]
    worded = _localise_again(
        study, rows, [one if len(one) == GROUP else [] for one in texts], "noise wording", **spec
    )
    for kind, frame in (
        ("quadrature", pd.concat(byrule, ignore_index=True)),
        ("variants", worded),
        ("neighbours", queries[queries["fact"].isin(rows["fact"])]),
    ):
        for fact, group in frame.groupby("fact", sort=False):
            sets = kn_sets(group, t)
            found = _agreement(sets)
            if kind == "neighbours":
                found["cs2"] = cs2_subsampled(sets, GROUP, seed)
            out.append(dict(fact=fact, relation=group["relation"].iloc[0], kind=kind, **found))
    return pd.DataFrame(out)


def precision(
    study,
    queries: pd.DataFrame,
    *,
    dtypes=("float32", "bfloat16"),
    t: float = 0.2,
    n: int = 24,
    seed: int = 0,
    **spec,
) -> pd.DataFrame:
    """Jaccard of the KN sets of sampled queries in two precisions of the model, a row a query; and
    by how much P(answer) differs. The weights are loaded once in each."""
    rows, found = sample_queries(queries, n, seed), {}
    for dtype in dtypes:
        other = type(study)(study.notebook, **{**study.parameters, "dtype": dtype})
        frame = _localise_again(other, rows, [[prompt] for prompt in rows["prompt"]], dtype, **spec)
        found[dtype] = frame.assign(kn=kn_sets(frame, t))[
            ["fact", "relation", "prompt", "kn", "probability"]
        ]
    both = found[dtypes[0]].merge(
        found[dtypes[1]], on=["fact", "relation", "prompt"], suffixes=("", "_b")
    )
    pairs = [len(a & b) / len(a | b) if a | b else np.nan for a, b in zip(both["kn"], both["kn_b"])]
    change = (both["probability_b"] - both["probability"]).abs()
    return both[["fact", "relation", "prompt"]].assign(
        pair=" and ".join(dtypes), jaccard=pairs, change=change
    )


# --- 5: classes from one half, outcomes from the other --------------------------------------------


def halves(queries: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`queries` of the facts with at least 4, with `half`: "A" or "B", drawn within each fact (A
    has the odd one)."""
    parts = []
    for fact, group in queries.groupby("fact", sort=False):
        if len(group) >= 4:
            order = np.random.default_rng([seed, *fact.encode()]).permutation(len(group))
            parts.append(group.assign(half=np.where(order < (len(group) + 1) // 2, "A", "B")))
    return pd.concat(parts, ignore_index=True) if parts else queries.head(0).assign(half="")


def split_frames(
    queries: pd.DataFrame, outcomes=(), *, t: float = 0.2, static: float = 0.1, seed: int = 0
):
    """(threshold, its value, outcome, frame with fact, relation, label and value): labels "I" and
    "II" by the CS2 of half A of each fact's queries, values from half B: its "CS2", and `outcomes`,
    {name: frame with fact, prompt_index, value}, quantities measured a query, and `edited`, the
    prompt_index of another query of half B where the value hangs on one. Facts with fewer than 4
    queries take no part."""
    split = halves(queries, seed)
    first, second = fact_table(split[split["half"] == "A"], t), split[split["half"] == "B"]
    tables = {"CS2": fact_table(second, t)[["fact", "cs2"]].rename(columns={"cs2": "value"})}
    for name, frame in dict(outcomes).items():
        for place in ("prompt_index", "edited"):
            if place in frame:
                inside = second[["fact", "prompt_index"]].set_axis(["fact", place], axis=1)
                frame = frame.merge(inside, on=["fact", place])
        tables[name] = frame[["fact", "value"]]
    for threshold, at in zip(THRESHOLDS, (static, otsu_threshold(first["cs2"]))):
        labels = first[["fact", "relation"]].assign(label=classify(first["cs2"], at))
        for name, table in tables.items():
            yield threshold, at, name, table.merge(labels, on="fact").dropna(subset=["label"])


def split_half(queries: pd.DataFrame, outcomes=(), *, seed: int = 0, **thresholds) -> pd.DataFrame:
    """Class I minus class II by `split_frames`, a row an outcome and threshold: the difference with
    its 95 % interval (bootstrap over facts within relation; NaN below `stats.LEAST` facts of a
    class), the difference less the relations' means and its permutation p (exact for any number),
    n_I and n_II facts."""
    rows = []
    for threshold, at, name, frame in split_frames(queries, outcomes, seed=seed, **thresholds):
        estimate = bootstrap_difference(frame, "value", "label", ("I", "II"), seed=seed)
        test = permutation_test(frame, "value", "label", seed=seed)
        found = estimate.row("mean", "I - II")
        rows.append(
            dict(
                threshold=threshold,
                at=at,
                outcome=name,
                **{end: found[end] for end in found if end[0] != "n"},
                within=test["within"],
                p=test["p"],
                n_I=test["n1"],
                n_II=test["n2"],
            )
        )
    return pd.DataFrame(rows)


# --- 7: is K_II only ignorance? -------------------------------------------------------------------


def knowledge(
    queries: pd.DataFrame, *, t: float = 0.2, static: float = 0.1, seed: int = 0
) -> pd.DataFrame:
    """CS2 against knowledge, a row a statistic: value with its 95 % interval, n facts (of a
    difference, and n_other).

    Spearman's correlation of CS2 with mean P(answer), over all facts and within relations (ranks
    less their relation's mean), the mean CS2 of facts known in every wording less that of the
    others, and the share of K_II over all facts and over those known in every wording. The
    correlations' intervals keep the ranks of the whole sample."""
    facts = classified_facts(queries, t, static).dropna(subset=["cs2"]).copy()
    facts["all_known"] = facts["known"] == 1
    ranks = facts[["cs2", "probability"]].rank()
    inside = ranks - ranks.groupby(facts["relation"]).transform("mean")
    relation = pd.factorize(facts["relation"], sort=True)[0]
    rows = [
        dict(statistic=name, **_correlation(frame.to_numpy(), *drawn, seed), n=len(facts))
        for name, frame, drawn in (
            ("correlation of CS2 and P(answer)", ranks, (np.arange(len(facts)), relation)),
            ("the same, within relations", inside, (relation, np.zeros(len(set(relation)), int))),
        )
    ]
    difference = bootstrap_difference(facts, "cs2", "all_known", (True, False), seed=seed)
    rows.append(
        dict(statistic="CS2 of known facts minus CS2 of others", **difference.row("mean", "value"))
    )
    for threshold in THRESHOLDS:
        for which, among in (("all facts", None), ("known facts", "all_known")):
            share = share_of_class(facts, threshold, seed=seed, among=among)
            rows.append(
                dict(
                    statistic=f"share of K_II, {threshold} threshold, {which}",
                    **share.row("mean", "value"),
                )
            )
    return pd.DataFrame(rows)


def _correlation(values, cluster, strata, seed) -> dict:
    """Pearson's correlation of two columns, with an interval over resampled clusters, `cluster` of
    each row and `strata` of each cluster; NaN where a column is constant, and the interval with
    fewer than `LEAST` clusters. Ranks less their relation's mean hang together within a relation
    (of two facts, one is the other's negative), so there the relation is the cluster."""

    def weighted(w):
        x, y = (values - (w @ values) / w.sum()).T
        size = np.sqrt((w @ x**2) * (w @ y**2))
        return (w @ (x * y)) / size if size > 1e-9 else np.nan

    enough = len(strata) >= LEAST
    draws = resampling_weights(strata, 1000, seed).astype(float)[:, cluster] if enough else ()
    sample = [one for one in map(weighted, draws) if not np.isnan(one)]
    value = weighted(np.ones(len(values))) if len(values) else np.nan
    low, high = (
        np.percentile(sample, (2.5, 97.5))
        if len(sample) and not np.isnan(value)
        else (np.nan, np.nan)
    )
    return dict(value=value, value_low=low, value_high=high)
