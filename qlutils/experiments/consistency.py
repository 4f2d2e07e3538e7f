"""The classes of facts, and the tables of consistency: Tables 1, 4 and 5."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd

from qlutils.neurons.sets import classify, fact_table, kn_sets, otsu_threshold
from qlutils.show.stats import (
    LEAST,
    Estimate,
    bootstrap_mean,
    bootstrap_statistic,
    mean_columns,
    welch,
)
from qlutils.show.tables import paper_value, without_empty_paper_columns
from qlutils.checks import METHODS

CLASSES, THRESHOLDS = ("I", "II"), ("static", "otsu")
RELATIONS = {  # Wikidata's names of the properties in ParaRel
    "P17": "country",
    "P19": "place of birth",
    "P20": "place of death",
    "P27": "citizenship",
    "P30": "continent",
    "P36": "capital",
    "P37": "official language",
    "P39": "position held",
    "P47": "shares border with",
    "P101": "field of work",
    "P103": "native language",
    "P106": "occupation",
    "P108": "employer",
    "P127": "owned by",
    "P131": "located in",
    "P136": "genre",
    "P138": "named after",
    "P140": "religion",
    "P159": "headquarters",
    "P176": "manufacturer",
    "P178": "developer",
    "P190": "twinned city",
    "P264": "record label",
    "P276": "location",
    "P279": "subclass of",
    "P361": "part of",
    "P364": "original language",
    "P407": "language of work",
    "P413": "position played",
    "P449": "original broadcaster",
    "P463": "member of",
    "P495": "country of origin",
    "P530": "diplomatic relation",
    "P740": "place founded",
    "P937": "work location",
    "P1001": "jurisdiction",
    "P1303": "instrument",
    "P1376": "capital of",
    "P1412": "language spoken",
}


# --- classes --------------------------------------------------------------------------------------


def classified_facts(queries: pd.DataFrame, t: float = 0.2, static: float = 0.1) -> pd.DataFrame:
    """`neurons.fact_table` with a class a threshold: `class_static` and `class_otsu`, and the
    thresholds themselves.

    "I" above the threshold, "II" at or below it, None where CS2 is `undefined` (no query of the
    fact has a KN). Facts of exactly two prompts (`two_prompts`), whose CS2 is CS1, are counted
    apart: here their cs2 is NaN, and so their class."""
    facts = fact_table(queries, t)
    facts["two_prompts"] = facts["n_queries"] == 2
    facts["undefined"] = facts["cs2"].isna()
    facts["cs2"] = facts["cs2"].where(~facts["two_prompts"])
    facts["threshold_static"], facts["threshold_otsu"] = static, otsu_threshold(facts["cs2"])
    for name in THRESHOLDS:
        facts[f"class_{name}"] = classify(facts["cs2"], facts[f"threshold_{name}"].iloc[0])
    return facts


def second_class(facts: pd.DataFrame, threshold: str) -> pd.Series:
    """1 where a fact is in K_II, 0 where it is in K_I, NaN where it has no class; its mean is the
    share of K_II."""
    classes = facts[f"class_{threshold}"]
    return (classes == "II").astype(float).where(classes.notna())


def cells(frame: pd.DataFrame, levels: dict):
    """(keys, rows) of every combination of `levels`, {column: values}, in their order, also where
    there are no rows.

    The pseudo-columns "threshold" and "class" choose by class_<threshold>; to threshold "all"
    belongs class "all"."""
    columns = [name for name in levels if name not in ("threshold", "class")]
    groups = dict(list(frame.groupby(columns, sort=False))) if columns else {(): frame}
    for values in product(*levels.values()):
        keys = dict(zip(levels, values))
        if (keys["threshold"] == "all") == (keys["class"] == "all"):
            part = groups.get(tuple(keys[name] for name in columns), frame.iloc[:0])
            yield (
                keys,
                part
                if keys["class"] == "all"
                else part[part[f"class_{keys['threshold']}"] == keys["class"]],
            )


# --- tables ---------------------------------------------------------------------------------------


def table_1(facts: dict[str, pd.DataFrame], model: str, seed: int = 0) -> pd.DataFrame:
    """Table 1 of one model: a row a method and threshold, from `classified_facts` of each method.

    R is a class's share of the classified facts, S its mean CS2 with a 95 % interval (bootstrap
    over facts within relation); t, df, p and Cohen's d are Welch's, between the classes' CS2. The
    paper's value stands in columns ending in `_paper`, for the paper's models."""
    rows = []
    for threshold, (method, frame) in product(THRESHOLDS, facts.items()):
        paper = partial(paper_value, 1, model, threshold=threshold, method=method)
        classes = frame[f"class_{threshold}"]
        n = int(classes.notna().sum())
        row = {
            "threshold": threshold,
            "method": method,
            "at": frame[f"threshold_{threshold}"].iloc[0],
            "n": n,
        }
        for name in CLASSES:
            part = frame[classes == name]
            share = share_of_class(frame, threshold, name, seed)
            row |= {
                **share.row("mean", f"R_{name}"),
                f"R_{name}_paper": paper(f"ratio_{name}"),
                f"n_{name}": len(part),
                **bootstrap_mean(part, "cs2", seed=seed).row("mean", f"S_{name}"),
                "n": n,
                f"S_{name}_paper": paper(f"cs_{name}"),
            }
        test = welch(*(frame["cs2"][classes == name] for name in CLASSES))
        rows.append(
            row
            | {
                "t": test.pop("t"),
                "t_paper": paper("t"),
                **test,
                "cap_II": common_class_two(facts, threshold),
                "cap_II_paper": paper("cap_II"),
            }
        )
    return without_empty_paper_columns(pd.DataFrame(rows))


def share_of_class(facts, threshold, name="II", seed=0, among=None) -> Estimate:
    """Share of the classified facts (of those for which the column `among` is True) that are in a
    class, with its interval. Otsu's threshold, which is that of all facts, is computed anew in each
    draw: held fixed, it would make the interval half as wide as it is."""
    classified = facts.dropna(subset="cs2")
    part = classified if among is None else classified[classified[among]]
    if threshold == "static":
        inside = (part["class_static"] == name).astype(float)
        return bootstrap_mean(part.assign(inside=inside), "inside", seed=seed, share=True)
    found = bootstrap_statistic([classified], partial(_otsu, name, among=among), seed=seed)
    if len(part) < LEAST:  # however many facts the threshold comes from
        found = replace(found, mean_low=np.nan, mean_high=np.nan)
    return replace(found, n=len(part), n_clusters=len(part))


def difference_of_shares(facts, other, seed=0) -> Estimate:
    """`share_of_class` II by Otsu's threshold of `facts` less that of `other`, such as another
    model's."""
    return bootstrap_statistic(
        [one.dropna(subset="cs2") for one in (facts, other)], partial(_otsu, "II"), seed=seed
    )


def _otsu(what, facts, weights, among=None) -> float:
    """Of facts under weights: Otsu's threshold on CS2 ("at"), or the share (`among` some) that it
    puts into class "I" or "II"."""
    from skimage.filters import threshold_otsu

    cs2, weights = facts["cs2"].to_numpy(np.float64), weights.astype(np.float64)
    if not weights.any() or np.ptp(cs2[weights > 0]) == 0:
        return np.nan
    counts, edges = np.histogram(cs2, 256, weights=weights)
    at = threshold_otsu(hist=(counts, (edges[1:] + edges[:-1]) / 2))
    counted = weights if among is None else weights * facts[among].to_numpy(bool)
    share = counted[cs2 <= at].sum() / counted.sum() if counted.any() else np.nan
    return float({"at": at, "I": 1 - share, "II": share}[what])


def common_class_two(facts: dict[str, pd.DataFrame], threshold: str) -> float:
    """cap:II, the share of facts that every one of the three methods puts into K_II; NaN while a
    method is missing."""
    if set(facts) != set(METHODS):
        return np.nan
    classes = pd.concat(
        [frame.set_index("fact")[f"class_{threshold}"] for frame in facts.values()], axis=1
    ).dropna()
    return float((classes == "II").all(axis=1).mean()) if len(classes) else np.nan


def table_4(facts: dict[str, pd.DataFrame], model: str, seed: int = 0) -> pd.DataFrame:
    """Table 4: the thresholds on CS2 behind Table 1 beside the paper's, and where Otsu's lies in 95
    % of resamplings; the static one is chosen."""
    rows = []
    for threshold, (method, frame) in product(THRESHOLDS, facts.items()):
        row = {
            "threshold": threshold,
            "method": method,
            "value": frame[f"threshold_{threshold}"].iloc[0],
        }
        if threshold == "otsu":
            found = bootstrap_statistic(
                [frame.dropna(subset="cs2")], partial(_otsu, "at"), seed=seed
            )
            row |= {"at least": found.mean_low, "at most": found.mean_high}
        rows.append(
            row
            | {
                "value_paper": paper_value(
                    4, model, "threshold_value", threshold=threshold, method=method
                )
            }
        )
    return without_empty_paper_columns(
        pd.DataFrame(
            rows, columns=["threshold", "method", "value", "at least", "at most", "value_paper"]
        )
    )


def table_5(queries: pd.DataFrame) -> pd.DataFrame:
    """Table 5: one example query and answer a relation, the first of the data in use, and what
    ParaRel's codes mean."""
    first = queries.groupby("relation", sort=False).first().reset_index()
    first["meaning"] = first["relation"].map(RELATIONS).fillna("–")
    return first[["relation", "meaning", "prompt", "object"]].rename(
        columns={"prompt": "example query", "object": "answer"}
    )


def consistency_summary(facts: dict[str, pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """What CS2 alone does not show, a row a method: CS1, CS2, mean pairwise Jaccard, CS2 at three
    prompts, set sizes, mean layer, each a mean over facts with its 95 % interval; and how many
    facts have no defined CS2. Facts of two prompts are counted, and in no mean."""
    columns = ("cs1", "cs2", "jaccard", "cs2_3", "mean_size", "union_size", "mean_layer")
    rows = []
    for method, frame in facts.items():
        counts = {
            "n": int(frame["cs2"].notna().sum()),
            "n_undefined": int(frame["undefined"].sum()),
            "n_two_prompts": int(frame["two_prompts"].sum()),
        }
        rows.append(
            {
                "method": method,
                **counts,
                **mean_columns(frame[~frame["two_prompts"]], columns, seed),
                **counts,
            }
        )
    return pd.DataFrame(rows)


def otsu_null(facts: pd.DataFrame, draws: int = 200, seed: int = 0) -> dict:
    """What `otsu_threshold` makes of nothing: R_II and Welch's t, means over `draws` and 95 %
    ranges, of as many values from a normal distribution with the mean and deviation of the facts'
    CS2 (NaN for fewer than `LEAST` facts or equal ones; of t, over the draws whose classes have as
    many)."""
    cs2 = facts["cs2"].dropna().to_numpy()
    found = np.full((draws, 2), np.nan)
    if len(cs2) >= LEAST and np.ptp(cs2) > 0:
        for draw in range(draws):
            noise = np.random.default_rng(seed + draw).normal(cs2.mean(), cs2.std(), len(cs2))
            second = noise <= otsu_threshold(noise)
            found[draw] = second.mean(), welch(noise[~second], noise[second])["t"]
    row: dict = {}
    for name, values in zip(("R_II", "t"), found.T):
        values = values[~np.isnan(values)]
        low, high = np.quantile(values, (0.025, 0.975)) if len(values) else (np.nan, np.nan)
        row |= {
            name: values.mean() if len(values) else np.nan,
            f"{name}_low": low,
            f"{name}_high": high,
        }
    return row | {"n": len(cs2)}


def threshold_sensitivity(
    queries: pd.DataFrame,
    t_values=(0.1, 0.2, 0.3, 0.4, 0.5),
    static_values=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
) -> pd.DataFrame:
    """Mean CS2 and the share of K_II over the KN threshold t and the static class threshold, a row
    a pair, with 95 % intervals."""
    rows = []
    for t in t_values:
        facts = classified_facts(queries, t).dropna(subset="cs2")
        cs2 = mean_columns(facts, ["cs2"])
        rows += [
            {
                "t": t,
                "static": static,
                **cs2,
                **mean_columns(
                    facts.assign(R_II=(facts["cs2"] <= static).astype(float)), ["R_II"], share=True
                ),
            }
            for static in static_values
        ]
    return pd.DataFrame(rows)


def rules_compared(
    queries: pd.DataFrame, other: pd.DataFrame, rule: str, t: float, static: float, seed: int = 0
) -> pd.DataFrame:
    """Does the error of the sum make K_II? The facts of `other` (see
    `localize.localise_by_other_rule`) by the run's `rule` and by the other one: a row a rule, with
    the mean CS2 and the share of K_II by the static threshold, each with its interval, the mean
    Jaccard index of a query's two KN sets, the share of its queries that settled (NaN for a rule
    that cannot tell), the mean number of KNs, and n facts and queries."""
    pairs = ["fact", "prompt_index"]
    same = queries.merge(other[pairs], on=pairs)
    both = (
        same[pairs]
        .assign(one=kn_sets(same, t))
        .merge(other[pairs].assign(two=kn_sets(other, t)), on=pairs)
    )
    jaccard = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in zip(both["one"], both["two"])]
    rows = []
    for name, frame in ((rule, same), (other["rule"].iloc[0], other)):
        facts = classified_facts(frame, t, static)
        usable = facts.dropna(subset="cs2")
        cs2 = bootstrap_mean(usable, "cs2", seed=seed)
        second = share_of_class(facts, "static", "II", seed)
        settled = frame["converged"].dropna()
        rows.append(
            {
                "rule": name,
                "cs2": cs2.mean,
                "cs2_low": cs2.mean_low,
                "cs2_high": cs2.mean_high,
                "R_II": second.mean,
                "R_II_low": second.mean_low,
                "R_II_high": second.mean_high,
                "jaccard": np.mean(jaccard),
                "mean_size": np.mean([len(one) for one in kn_sets(frame, t)]),
                "converged": settled.astype(float).mean() if len(settled) else np.nan,
                "evaluations": frame["evaluations"].mean(),
                "n": len(usable),
                "n_queries": len(frame),
            }
        )
    return pd.DataFrame(rows)
