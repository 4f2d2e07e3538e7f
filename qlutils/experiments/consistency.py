"""Consistency of a fact's queries (section 2): the two classes of facts, and Tables 1, 4 and 5."""

import json
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd

from qlutils.checks import METHODS
from qlutils.neurons.sets import (
    QUERY,
    classify,
    fact_table,
    jaccard,
    kn_sets,
    otsu_threshold,
)
from qlutils.paths import packaged
from qlutils.show.stats import (
    LEAST,
    Estimate,
    bootstrap_mean,
    bootstrap_statistic,
    mean_columns,
    welch,
)
from qlutils.show.tables import paper_value, without_empty_paper_columns

CLASSES = ("I", "II")
THRESHOLDS = ("static", "otsu")
# Wikidata's names of the properties in ParaRel.
RELATIONS = json.loads(packaged("experiments/relations.json"))


# --- classes --------------------------------------------------------------------------------------


def classified_facts(queries, t=0.2, static=0.1):
    """`sets.fact_table`, and each fact's class by the static and by Otsu's threshold on CS2.

    Columns class_static and class_otsu: "I" above the threshold, "II" at or below it, None where
    CS2 is `undefined` (no query of the fact has a KN). threshold_static and threshold_otsu: the
    thresholds. Of a fact with two prompts CS2 equals CS1; such facts are marked `two_prompts`, and
    their cs2 is NaN here."""
    facts = fact_table(queries, t)
    facts["two_prompts"] = facts["n_queries"] == 2
    facts["undefined"] = facts["cs2"].isna()
    facts["cs2"] = facts["cs2"].where(~facts["two_prompts"])
    facts["threshold_static"] = static
    facts["threshold_otsu"] = otsu_threshold(facts["cs2"])
    for name in THRESHOLDS:
        facts[f"class_{name}"] = classify(facts["cs2"], facts[f"threshold_{name}"].iloc[0])
    return facts


def second_class(facts, threshold):
    """1 where a fact is in K_II, 0 where it is in K_I, NaN where it has no class."""
    return facts[f"class_{threshold}"].map({"I": 0.0, "II": 1.0})


def cells(frame, levels):
    """Yield (keys, rows) for every combination of `levels`, {column: values}, also without rows.

    Two of the columns are not looked up by name: "class" is the class by "threshold". The
    threshold "all" has the one class "all", which holds all rows."""
    for values in product(*levels.values()):
        keys = dict(zip(levels, values))
        columns = dict(keys)
        threshold = columns.pop("threshold")
        name = columns.pop("class")
        if (threshold == "all") != (name == "all"):
            continue
        if name != "all":
            columns[f"class_{threshold}"] = name
        rows = frame
        for column, value in columns.items():
            rows = rows[rows[column] == value]
        yield keys, rows


def share_of_class(
    facts,
    threshold,
    name="II",
    seed=0,
    among=None,
):
    """Share of the classified facts that are in a class, as an `Estimate`; `among`: of those for
    which this column is True.

    Otsu's threshold, which is that of all facts, is computed anew in each draw of the bootstrap:
    held fixed, it would make the interval half as wide as it is."""
    facts = facts.dropna(subset="cs2")
    part = facts[facts[among]] if among else facts
    if threshold == "static":
        part = part.assign(inside=part["class_static"] == name)
        return bootstrap_mean(part, "inside", seed, share=True)
    found = bootstrap_statistic([facts], partial(otsu_share, name=name, among=among), seed)
    if len(part) < LEAST:  # however many facts the threshold comes from
        found = replace(found, mean_low=np.nan, mean_high=np.nan)
    return replace(found, n=len(part), n_clusters=len(part))


def difference_of_shares(facts, other, seed):
    """Share of K_II by Otsu's threshold among `facts` less that among `other` facts, such as
    another model's, as an `Estimate`."""
    sides = [side.dropna(subset="cs2") for side in (facts, other)]
    return bootstrap_statistic(sides, otsu_share, seed)


def weighted_otsu(facts, weights):
    """`otsu_threshold` of the CS2 of weighted facts."""
    return otsu_threshold(facts["cs2"], weights)


def otsu_share(facts, weights, name="II", among=None):
    """Share of the weighted facts (`among`: of those for which this column is True) that
    `weighted_otsu` of all of them puts into class `name`."""
    threshold = weighted_otsu(facts, weights)
    counted = weights * facts[among].to_numpy() if among else weights
    if np.isnan(threshold) or not counted.any():
        return np.nan
    return np.average(classify(facts["cs2"], threshold) == name, weights=counted.astype(float))


def common_class_two(facts, threshold):
    """The paper's "cap:II": the share of facts that all METHODS put into K_II; NaN while one of
    them is missing. A fact that a method cannot classify does not count."""
    if set(facts) != set(METHODS):
        return np.nan
    second = {
        method: second_class(frame.set_index("fact"), threshold) for method, frame in facts.items()
    }
    return pd.DataFrame(second).dropna().min(axis=1).mean()


# --- tables ---------------------------------------------------------------------------------------


def table_1(facts, model, seed=0):
    """Table 1 of one model, a row a threshold and method. facts: {method: `classified_facts`}.

    at: the threshold; n classified facts. R_I, R_II: share of each class, of n_I and n_II facts;
    S_I, S_II: their mean CS2; both with 95 % intervals (bootstrap over facts within relation). t,
    df, p: Welch's test between the classes' CS2; d: Cohen's. cap_II: see `common_class_two`.
    Columns ending in _paper: the paper's values, for its models."""
    rows = []
    for threshold, (method, frame) in product(THRESHOLDS, facts.items()):
        paper = partial(paper_value, 1, model, threshold=threshold, method=method)
        row = {
            "threshold": threshold,
            "method": method,
            "at": frame[f"threshold_{threshold}"].iloc[0],
            "n": 0,
        }
        cs2 = []
        for name in CLASSES:
            part = frame[frame[f"class_{threshold}"] == name]
            row |= share_of_class(frame, threshold, name, seed).row("mean", f"R_{name}")
            row[f"R_{name}_paper"] = paper(f"ratio_{name}")
            row[f"n_{name}"] = len(part)
            row |= bootstrap_mean(part, "cs2", seed).row("mean", f"S_{name}")
            row[f"S_{name}_paper"] = paper(f"cs_{name}")
            cs2.append(part["cs2"])
        test = welch(*cs2)
        row |= {
            "n": sum(map(len, cs2)),
            "t": test["t"],
            "t_paper": paper("t"),
        } | test
        row["cap_II"] = common_class_two(facts, threshold)
        row["cap_II_paper"] = paper("cap_II")
        rows.append(row)
    return without_empty_paper_columns(pd.DataFrame(rows))


def table_4(facts, model, seed=0):
    """Table 4: the thresholds on CS2 behind Table 1, the paper's beside them, and between which
    bounds Otsu's lies in 95 % of resamplings (the static one is chosen)."""
    rows = []
    for threshold, (method, frame) in product(THRESHOLDS, facts.items()):
        keys = {"threshold": threshold, "method": method}
        at = frame[f"threshold_{threshold}"].iloc[0]
        found = Estimate(at, np.nan, np.nan)
        if threshold == "otsu":
            found = bootstrap_statistic([frame.dropna(subset="cs2")], weighted_otsu, seed)
        rows.append(
            {
                **keys,
                "value": at,
                "at least": found.mean_low,
                "at most": found.mean_high,
                "value_paper": paper_value(4, model, "threshold_value", **keys),
            }
        )
    return without_empty_paper_columns(pd.DataFrame(rows))


def table_5(queries):
    """Table 5: the first query and answer of each relation, and what ParaRel's codes mean."""
    first = queries.drop_duplicates("relation", ignore_index=True)
    return pd.DataFrame(
        {
            "relation": first["relation"],
            "meaning": first["relation"].map(RELATIONS).fillna("–"),
            "example query": first["prompt"],
            "answer": first["object"],
        }
    )


def consistency_summary(facts, seed=0):
    """How far a fact's queries agree, a row a method: means over facts with 95 % intervals.

    CS1, CS2, mean pairwise Jaccard, CS2 of three prompts (cs2_3), KNs of a query (mean_size) and of
    all of a fact's queries (union_size), mean layer. Facts of two prompts are counted
    (n_two_prompts), as are those without a KN (n_undefined), and are in no mean."""
    columns = ["cs1", "cs2", "jaccard", "cs2_3", "mean_size", "union_size", "mean_layer"]
    rows = []
    for method, frame in facts.items():
        counts = {
            "n": frame["cs2"].count(),
            "n_undefined": frame["undefined"].sum(),
            "n_two_prompts": frame["two_prompts"].sum(),
        }
        means = mean_columns(frame[~frame["two_prompts"]], columns, seed)
        rows.append({"method": method} | counts | means | counts)  # n is that of CS2
    return pd.DataFrame(rows)


def relation_table(facts, seed=0):
    """Wordings a fact, mean CS2 and the share of K_II by the static threshold, both with 95 %
    intervals, a row a method and relation, from the lowest CS2."""
    rows = []
    for method, frame in facts.items():
        frame = frame.dropna(subset="cs2").assign(R_II=second_class(frame, "static"))
        for code, part in frame.groupby("relation"):
            row = {
                "method": method,
                "relation": code,
                "meaning": RELATIONS.get(code, "–"),
                "wordings": part["n_queries"].mean(),
            }
            row |= mean_columns(part, ["cs2"], seed)
            rows.append(row | mean_columns(part, ["R_II"], seed, share=True))
    table = pd.DataFrame(rows, columns=None if rows else ["method", "relation", "cs2"])
    return table.sort_values(["method", "cs2"], kind="stable", ignore_index=True)


def second_by_relation(facts):
    """{what a relation means: its facts in K_II by the static threshold}, the most first."""
    second = facts.loc[facts["class_static"] == "II", "relation"].value_counts()
    return {RELATIONS.get(code, code): n for code, n in second.items()}


def otsu_null(facts, draws=200, seed=0):
    """What Otsu's threshold makes of noise: the share of K_II and Welch's t, each as the mean over
    `draws` with the range of 95 % of them.

    A draw is as many values as the facts have CS2 (n), from a normal distribution of the same mean
    and deviation. NaN for fewer than `LEAST` facts or equal CS2."""
    cs2 = facts["cs2"].dropna().to_numpy()
    found = []
    for draw in range(draws if len(cs2) >= LEAST and np.ptp(cs2) > 0 else 0):
        noise = np.random.default_rng(seed + draw).normal(cs2.mean(), cs2.std(), cs2.size)
        second = noise <= otsu_threshold(noise)
        found.append((second.mean(), welch(noise[~second], noise[second])["t"]))
    found = pd.DataFrame(found, columns=["R_II", "t"], dtype=float)
    row = {}
    for name, values in found.items():
        row[name] = values.mean()  # a t of fewer than `LEAST` values on a side is NaN and left out
        row[f"{name}_low"], row[f"{name}_high"] = values.quantile([0.025, 0.975])
    return row | {"n": len(cs2)}


def threshold_sensitivity(
    queries,
    t_values=(0.1, 0.2, 0.3, 0.4, 0.5),
    static_values=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
):
    """Mean CS2 and the share of K_II, with 95 % intervals, a row a pair of the KN threshold t and
    the static threshold on CS2."""
    rows = []
    for t in t_values:
        facts = classified_facts(queries, t).dropna(subset="cs2")
        cs2 = mean_columns(facts, ["cs2"])
        for static in static_values:
            second = (facts["cs2"] <= static).astype(float)
            share = mean_columns(facts.assign(R_II=second), ["R_II"], share=True)
            rows.append({"t": t, "static": static} | cs2 | share)
    return pd.DataFrame(rows)


def rules_compared(queries, other, rule, t, static, seed):
    """Does the error of the integral's sum make K_II? The same queries localised by the run's
    `rule` and by another one (`other`: see `localize.localise_by_other_rule`), a row a rule.

    Mean CS2 and share of K_II by the static threshold, each with its 95 % interval; jaccard: mean
    Jaccard index of a query's KN sets by the two rules; mean_size: KNs a query; converged: share of
    queries whose sum settled (NaN for a rule that cannot tell); evaluations: gradients a layer; n
    facts and n_queries."""
    frames = {
        rule: queries.merge(other[QUERY]),
        other["rule"].iloc[0]: other,
    }
    sets = {
        name: frame[QUERY].assign(kn=kn_sets(frame, t)).set_index(QUERY)["kn"]
        for name, frame in frames.items()
    }
    agreement = np.mean([jaccard(*two) for two in pd.DataFrame(sets).dropna().to_numpy()])
    rows = []
    for name, frame in frames.items():
        facts = classified_facts(frame, t, static)
        row = {"rule": name} | mean_columns(facts, ["cs2"], seed)
        row |= share_of_class(facts, "static", seed=seed).row("mean", "R_II")
        row |= {
            "jaccard": agreement,
            "mean_size": sets[name].map(len).mean(),
            "converged": frame["converged"].astype(float).mean(),
            "evaluations": frame["evaluations"].mean(),
            "n": row.pop("n"),
            "n_queries": len(frame),
        }
        rows.append(row)
    return pd.DataFrame(rows)
