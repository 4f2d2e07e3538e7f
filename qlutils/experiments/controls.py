"""What else could make a fact's queries agree or disagree: controls of the study that the paper
does not have. Input is the `queries` frame of a run; nothing here needs torch.

The report has seven, by number:
1  groups of queries that are no fact's: `null_consistency`
2  sets that should be one, localised again by other rules and in other words: `relocalise.noise`
3  other thresholds on scores and on CS2: `consistency.threshold_sensitivity`
4  interventions on other neurons: `report.other_neurons` for notebook 04's sets; those that 03 and
   07 edit are drawn in `edit_plans`
5  classes from one half of a fact's queries, outcomes from the other, in place of a circular test:
   `split_half`
6  KN sets in two precisions of the model: `relocalise.precision`
7  is K_II only ignorance? `knowledge`

In notebooks 03 and 07 a "control" (the parameter `controls`, the column `control`) is something
narrower, and part of number 4: other neurons, of `edit_plans.CONTROLS`, that are edited in place of
a KN set.
"""

import re
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from qlutils.experiments.consistency import (
    CLASSES,
    THRESHOLDS,
    classified_facts,
    share_of_class,
)
from qlutils.facts import seeded
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
    bootstrap_difference,
    bootstrap_statistic,
    mean_columns,
    permutation_test,
)

PAIR = ["cs2", "probability"]
GROUP = 3  # queries a group: CS2 grows with their number, so every control has as many


# Kinds of groups: what the queries of a group have in common.
NULLS = {
    "own": "the fact's own queries",
    "same pattern": "one pattern, different objects",
    "other objects": "different patterns and objects, one relation",
    "other relations": "different patterns and objects, different relations",
    "same object": "different facts and patterns, one object",
    "random": "random neurons, as many in each layer",
}
# Columns in which a group's queries are all equal (True) or all differ (False): those of DIFFERENT,
# unless its kind says otherwise.
ALIKE = {
    "same pattern": {"pattern": True},
    "other objects": {"relation": True},
    "other relations": {"relation": False},
    "same object": {"object": True},
}
DIFFERENT = dict.fromkeys(("fact", "object", "pattern"), False)


def summarise(
    frame,
    by="kind",
    values=("cs2", "jaccard"),
    seed=0,
):
    """Mean of `values` for each level of `by` with its 95 % interval over facts within relation; n
    facts, n_missing."""
    rows = []
    for level, part in frame.groupby(by, sort=False):
        missing = part[values[-1]].isna().sum()
        rows.append({by: level} | mean_columns(part, values, seed) | {"n_missing": missing})
    return pd.DataFrame(rows)


def agreement(sets):
    """cs2, of groups of 3 of the KN sets, and jaccard, of their pairs; NaN for fewer than 3."""
    return {
        "cs2": cs2_subsampled(sets, GROUP),
        "jaccard": consistency(sets).jaccard if len(sets) >= GROUP else np.nan,
    }


# --- 1: groups of queries that are no fact's ------------------------------------------------------


def null_consistency(queries, num_neurons=None, t=0.2, seed=0):
    """`agreement` of groups of 3 queries, a row a fact and kind of NULLS: fact, relation, kind,
    n_queries, cs2, jaccard.

    A group starts from a seeded query of the fact and adds queries drawn among all that the kind
    allows beside those already in it; there may be fewer than 3. "own": the fact's queries.
    num_neurons: of a layer of the model; None: as many as the largest index among the KNs says."""
    if num_neurons is None:
        num_neurons = 1 + int(np.concatenate([*queries["neuron"]]).max(initial=0))
    queries = queries.reset_index(drop=True)
    patterns = []
    for row in queries.itertuples():
        wording, times = subject_in(row.subject).subn("[X]", row.prompt)
        if not times:  # 法国 in 法国的首都, Frankreichs
            wording = row.prompt.replace(row.subject, "[X]")
        patterns.append(f"{row.relation} {wording}")
    about = queries[["fact", "relation", "object"]].assign(pattern=patterns)
    codes = {name: pd.factorize(about[name])[0] for name in about}
    sets = kn_sets(queries, t)
    rows = []
    for (fact, relation), group in queries.groupby(["fact", "relation"], sort=False):
        for kind in NULLS:
            rng = seeded(seed, fact, kind)
            start = int(rng.choice(group.index))
            members = group.index
            if kind in ALIKE:
                members = _draw(codes, start, DIFFERENT | ALIKE[kind], rng)
            found = [sets[row] for row in members]
            if kind == "random":
                some = found[:GROUP]
                found = [random_neurons(one, num_neurons, rng, outside=False) for one in some]
            row = {"fact": fact, "relation": relation, "kind": kind}
            row["n_queries"] = min(GROUP, len(found))
            rows.append(row | agreement(found))
    return pd.DataFrame(rows)


def subject_in(subject):
    """Finds the subject in a prompt where it is not a part of another word."""
    return re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)")


def _draw(codes, start, alike, rng):
    """Rows of a group of GROUP queries, or fewer where the data has no more that fit."""
    members = [start]
    allowed = True
    while len(members) < GROUP:
        for name, same in alike.items():
            allowed &= (codes[name] == codes[name][members[-1]]) == same
        if not allowed.any():
            break
        members.append(int(rng.choice(np.flatnonzero(allowed))))
    return members


# --- 5: classes from one half, outcomes from the other --------------------------------------------


def halves(queries, seed=0):
    """`queries` of the facts with at least 4, with `half`: "A" or "B", drawn within each fact (A
    has the odd one)."""
    queries = queries[queries.groupby("fact")["fact"].transform("size") >= 4]
    half = np.full(len(queries), "A")
    for fact, rows in queries.groupby("fact").indices.items():
        order = seeded(seed, fact).permutation(len(rows))
        half[rows[order >= (len(rows) + 1) // 2]] = "B"
    return queries.assign(half=half)


class Split(NamedTuple):
    """Facts with their class from one half of their queries and an outcome from the other.

    at: the value of the threshold; frame: fact, relation, label ("I", "II" or None) and value."""

    threshold: str
    at: float
    outcome: str
    frame: pd.DataFrame


def split_frames(
    queries,
    outcomes=(),
    *,
    t=0.2,
    static=0.1,
    seed=0,
):
    """Yield a `Split` for each threshold and outcome: labels by the CS2 of half A of each fact's
    queries, values from half B: its "CS2", and `outcomes`.

    outcomes: {name: frame with fact, prompt_index and value, of a query, and maybe `edited`, the
    prompt_index of another query, also of half B, on which the value hangs}."""
    split = halves(queries, seed)
    inside = split.loc[split["half"] == "B", ["fact", "prompt_index"]]
    first, second = (fact_table(split[split["half"] == half], t) for half in "AB")
    values = {"CS2": second.rename(columns={"cs2": "value"})}
    for name, frame in dict(outcomes).items():
        for query in frame.columns.intersection(["prompt_index", "edited"]):
            frame = frame.merge(inside.rename(columns={"prompt_index": query}))
        values[name] = frame
    for threshold, at in zip(THRESHOLDS, (static, otsu_threshold(first["cs2"]))):
        labels = first[["fact", "relation"]].assign(label=classify(first["cs2"], at))
        for name, frame in values.items():
            yield Split(
                threshold,
                at,
                name,
                frame[["fact", "value"]].merge(labels, on="fact"),
            )


def split_half(
    queries,
    outcomes=(),
    *,
    seed=0,
    **thresholds,
):
    """Class I minus class II by `split_frames`, a row an outcome and threshold: the difference with
    its 95 % interval (bootstrap over facts within relation; NaN below `stats.LEAST` facts of a
    class), the difference less the relations' means and its permutation p (exact for any number),
    n_I and n_II facts."""
    rows = []
    for split in split_frames(queries, outcomes, seed=seed, **thresholds):
        estimate = bootstrap_difference(split.frame, "value", "label", CLASSES, seed)
        row = split._asdict() | estimate.row("mean", "I - II")
        rows.append(row | permutation_test(split.frame, "value", "label", seed=seed))
    table = pd.DataFrame(rows)
    table = table.drop(columns=["frame", "n", "n_other"])  # n: values, several of a fact
    return table.rename(columns={"n1": "n_I", "n2": "n_II"})


# --- 7: is K_II only ignorance? -------------------------------------------------------------------


def knowledge(queries, *, t=0.2, static=0.1, seed=0):
    """CS2 against knowledge, a row a statistic: value with its 95 % interval, n facts (of a
    difference, and n_other).

    Spearman's correlation of CS2 with mean P(answer), over all facts and within relations (ranks
    less their relation's mean), the mean CS2 of facts known in every wording less that of the
    others, the same of 3 wordings that are answered and 3 that are not, of one fact, and the share
    of K_II over all facts and over those known in every wording. The correlations' intervals keep
    the ranks of the whole sample."""
    facts = classified_facts(queries, t, static).dropna(subset="cs2")
    facts["all_known"] = facts["known"] == 1
    # drawn in the order of the frame
    ranks = facts.assign(fact=[f"{place:09}" for place in range(len(facts))])
    ranks[PAIR] = facts[PAIR].rank()
    # Ranks less their relation's mean hang together within it (of two facts, one is the other's
    # negative), so the relation is what is resampled.
    inside = facts.assign(fact=facts["relation"], relation="all")
    inside[PAIR] = ranks[PAIR] - ranks.groupby("relation")[PAIR].transform("mean")
    thirds = answered_and_not(queries, t)
    found = {
        "correlation of CS2 and P(answer)": bootstrap_statistic([ranks], _correlation, seed),
        "the same, within relations": bootstrap_statistic([inside], _correlation, seed),
        "CS2 of known facts minus CS2 of others": bootstrap_difference(
            facts, "cs2", "all_known", (True, False), seed
        ),
        "CS2 of 3 answered wordings minus 3 others": bootstrap_difference(
            thirds, "cs2", "known", (True, False), seed
        ),
    }
    groups = {"all facts": None, "known facts": "all_known"}
    for threshold, (which, among) in product(THRESHOLDS, groups.items()):
        name = f"share of K_II, {threshold} threshold, {which}"
        found[name] = share_of_class(facts, threshold, seed=seed, among=among)
    return pd.DataFrame(
        [{"statistic": name} | one.row("mean", "value") for name, one in found.items()]
    )


def answered_and_not(queries, t):
    """`agreement` of a fact's answered wordings and of its others, a row each, of the facts with at
    least 3 of both: fact, relation, known, cs2, jaccard."""
    queries = queries.assign(sets=kn_sets(queries, t))
    rows = []
    for (fact, relation), group in queries.groupby(["fact", "relation"], sort=False):
        if min(group["known"].sum(), (~group["known"]).sum()) < GROUP:
            continue
        for known, part in group.groupby("known"):
            row = {
                "fact": fact,
                "relation": relation,
                "known": known,
            }
            rows.append(row | agreement([*part["sets"]]))
    return pd.DataFrame(rows, columns=["fact", "relation", "known", "cs2", "jaccard"])


def _correlation(facts, weights):
    """Pearson's correlation of the columns PAIR; NaN where one is constant or no fact counts."""
    if not weights.any():
        return np.nan
    (xx, xy), (_, yy) = np.cov(facts[PAIR].T, aweights=weights, ddof=0)
    return xy / np.sqrt(xx * yy) if min(xx, yy) > 1e-9 else np.nan
