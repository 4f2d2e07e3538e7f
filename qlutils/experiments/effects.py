"""From the rows of notebooks 04-06 to what they show: units of work, relative changes and tables.

Reads results only; nothing here needs torch.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd

from qlutils.experiments.consistency import CLASSES, THRESHOLDS, cells, classified_facts
from qlutils.neurons.others import OtherFacts
from qlutils.neurons.sets import kn_sets
from qlutils.show.stats import LEAST, bootstrap_difference, bootstrap_mean, mean_columns

DIRECTIONS = ("enhance", "suppress", "average")
INTERVALS = (
    "95 % intervals: bootstrap over facts within relation, 1,000 draws; for these relations and "
    "wordings; none below "
    f"{LEAST} facts on a side."
)
POPULATIONS = {
    "all": lambda frame: frame,
    "known": lambda frame: frame[frame["known"].astype(bool)],
    "known, not empty": lambda frame: frame[frame["known"].astype(bool) & (frame["size"] > 0)],
}
COUNTED = (
    "all",
    "known",
)  # all queries, as in the paper, which decide; the known ones stand beside


# --- units of work --------------------------------------------------------------------------------


def units(
    queries: pd.DataFrame,
    t: float | None = None,
    *,
    irrelevant: int | None = None,
    other: int | None = None,
    size: int = 24,
) -> list[list[dict]]:
    """Units of at most `size` facts for the tasks of notebooks 04-06, from a `queries` frame.

    A fact is a dict: fact, relation, object, and lists over its queries: prompts, prompt_index;
    with `t` also layer and neuron, the KNs at that threshold; with `irrelevant`, a seed, also
    irrelevant: a random prompt of another relation, of equal length where one exists (null where
    the run has one relation only); with `t` and `other`, a seed, also same_relation and
    other_relation: as many (layer, neuron) in each layer as the query has KNs, of one other
    fact."""
    queries, extra = queries.reset_index(drop=True), {}
    if t is not None:
        sets = [sorted(one) for one in kn_sets(queries, t)]
        extra = {
            name: [[neuron[place] for neuron in one] for one in sets]
            for place, name in enumerate(("layer", "neuron"))
        }
        if other is not None:
            extra |= {
                kind: _other(queries, sets, other, kind)
                for kind in ("same_relation", "other_relation")
            }
    if irrelevant is not None:
        extra["irrelevant"] = [_irrelevant(queries, row, irrelevant) for row in range(len(queries))]
    facts = [
        dict(
            fact=fact,
            relation=group["relation"].iloc[0],
            object=group["object"].iloc[0],
            prompts=group["prompt"].tolist(),
            prompt_index=group["prompt_index"].astype(int).tolist(),
            **{name: [values[row] for row in group.index] for name, values in extra.items()},
        )
        for fact, group in queries.groupby("fact", sort=False)
    ]
    return [facts[start : start + size] for start in range(0, len(facts), size)]


def _irrelevant(queries, row, seed):
    query = queries.loc[row]
    others = queries[queries["relation"] != query["relation"]]
    same = others[others["prompt_tokens"] == query["prompt_tokens"]]
    pool = (same if len(same) else others)["prompt"].tolist()
    rng = np.random.default_rng([seed, *f"{query['fact']} {query['prompt_index']}".encode()])
    return pool[rng.integers(len(pool))] if pool else None


def _other(queries, sets, seed, kind):
    others = OtherFacts(queries, sets)
    return [
        sorted(
            others.draw(
                one,
                fact,
                np.random.default_rng([seed, *f"{fact} {index} {kind}".encode()]),
                same_relation=kind == "same_relation",
            )
        )
        for fact, index, one in zip(queries["fact"], queries["prompt_index"], sets)
    ]


# --- relative changes -----------------------------------------------------------------------------


def beside_queries(
    frame: pd.DataFrame, queries: pd.DataFrame, t: float, static: float
) -> pd.DataFrame:
    """`frame` with known, subject, object, cs2, class_static and class_otsu of its query (fact,
    prompt_index)."""
    facts = classified_facts(queries, t, static)[["fact", "cs2", "class_static", "class_otsu"]]
    about = queries[["fact", "prompt_index", "subject", "object", "prompt", "known"]].merge(
        facts, on="fact", how="left"
    )
    return frame.merge(about, on=["fact", "prompt_index"], how="left", validate="many_to_one")


def rates(
    frame: pd.DataFrame, quantity: str = "probability", *, size: bool = False
) -> pd.DataFrame:
    """Rows of `frame` with `rate`, the relative change of `quantity` with the sign of its direction
    (section 3.1), and one more row for each pair of directions, "average". `size`: the magnitude of
    the change instead, whichever way it goes. NaN where the quantity was 0 before or is
    undefined."""
    before = frame[f"{quantity}_before"]
    sign = frame["direction"].map({"enhance": 1.0, "suppress": -1.0})
    rate = sign * (frame[quantity] - before) / before.where(before != 0)
    frame = frame.assign(rate=rate.abs() if size else rate)
    keys = [name for name in ("fact", "prompt_index", "set", "renormalise") if name in frame]
    average = (
        frame.groupby(keys, sort=False)["rate"]
        .agg(lambda pair: pair.mean(skipna=False))
        .reset_index()
    )
    first = frame[frame["direction"] == "enhance"].drop(columns="rate")
    first = first.merge(average, on=keys, validate="one_to_one")
    return pd.concat([frame, first.assign(direction="average")], ignore_index=True)


def summary(
    frame: pd.DataFrame,
    sets,
    *,
    directions=DIRECTIONS,
    populations=COUNTED,
    thresholds=THRESHOLDS,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean, median and 10 % trimmed mean of `rate`, each with its 95 % interval, for every
    threshold, population of queries (of POPULATIONS), set, direction and class; n values of n_facts
    facts, the share of `empty` sets and their mean size, and how many values are `undefined` (0
    before the change). A class without facts has n = 0 and NaN."""
    rows = []
    for population in populations:
        levels = {"threshold": thresholds, "set": sets, "direction": directions, "class": CLASSES}
        for keys, part in cells(POPULATIONS[population](frame), levels):
            estimate = bootstrap_mean(part, "rate", seed=seed)
            rows.append(
                {
                    "threshold": keys["threshold"],
                    "queries": population,
                    **keys,
                    **all_statistics(estimate),
                    "undefined": estimate.n_missing,
                    "empty": (part["size"] == 0).mean(),
                    "size": part["size"].mean(),
                }
            )
    return pd.DataFrame(rows)


def query_gaps(frame: pd.DataFrame, first: str, second=(), direction="average") -> pd.DataFrame:
    """A row a query of `rates` rows, one direction or both averaged: fact, relation, prompt_index,
    classes, known, and gap, the rate of set `first` less the mean rate of the sets `second`."""
    frame = frame[(frame["direction"] == direction) & frame["set"].isin([first, *second])]
    wide = frame.pivot(index=["fact", "prompt_index"], columns="set", values="rate").reindex(
        columns=[first, *second]
    )
    gap = wide[first] - (wide[list(second)].mean(axis=1, skipna=False) if second else 0.0)
    about = frame.drop_duplicates(["fact", "prompt_index"])[
        ["fact", "relation", "prompt_index", "class_static", "class_otsu", "known"]
    ]
    return about.merge(gap.rename("gap").reset_index(), on=["fact", "prompt_index"])


def contrast(frame: pd.DataFrame, first: str, second, seed: int = 0) -> pd.DataFrame:
    """Mean, median and trimmed mean of `query_gaps` by threshold, queries counted and class, and
    their differences of the classes, "II - I", with 95 % intervals; n queries and n_facts, of II -
    I with those of I as n_other and n_facts_other. Queries where a rate is undefined are left
    out."""
    gaps, rows = query_gaps(frame, first, second), []
    for threshold, queries in product(THRESHOLDS, COUNTED):
        label, counted = f"class_{threshold}", POPULATIONS[queries](gaps)
        found = {
            name: bootstrap_mean(counted[counted[label] == name], "gap", seed=seed)
            for name in CLASSES
        }
        found["II - I"] = bootstrap_difference(counted, "gap", label, ("II", "I"), seed=seed)
        rows += [
            {"threshold": threshold, "queries": queries, "class": name, **all_statistics(one)}
            for name, one in found.items()
        ]
    return pd.DataFrame(rows)


def all_statistics(estimate) -> dict:
    """Mean, median and trimmed mean as columns, each with its interval; n values and facts, of
    both sides of a difference."""
    return {
        **estimate.row("mean"),
        **estimate.row("median"),
        **estimate.row("trimmed"),
        **estimate.facts(),
    }


# --- predominance (Eq. 4) -------------------------------------------------------------------------


def predominance(winners: pd.DataFrame) -> pd.DataFrame:
    """One row a fact of the rows of `synapses.attend`: predominance (share of its queries whose
    most attended token is the modal one), predominance_rest (the first token left out), first
    (share whose winner is the first token), same_first (what predominance would be if every query's
    winner were its first token: no attention involved), the modal tokens, n_queries and the mean
    share of attention that the first token draws."""
    rows = []
    for fact, group in winners.groupby("fact", sort=False):
        row = dict(
            fact=fact,
            relation=group["relation"].iloc[0],
            n_queries=len(group),
            first=(group["column"] == 0).mean(),
            first_share=group["first_share"].mean(),
        )
        for name in ("", "_rest"):
            counts = group[f"token_id{name}"].value_counts()
            row[f"predominance{name}"] = counts.iloc[0] / len(group)
            row[f"modal{name}"] = group.loc[
                group[f"token_id{name}"] == counts.index[0], f"token{name}"
            ].iloc[0]
        row["same_first"] = group["token_id_first"].value_counts().iloc[0] / len(group)
        rows.append(row)
    return pd.DataFrame(rows)


def predominance_table(facts: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means of `predominance` over facts by threshold and class, with 95 % intervals, and `least`,
    the mean of 1/k."""
    columns = ("predominance", "predominance_rest", "first", "same_first", "first_share")
    return pd.DataFrame(
        [
            {**keys, **mean_columns(part, columns, seed), "least": (1 / part["n_queries"]).mean()}
            for keys, part in cells(facts, {"threshold": THRESHOLDS, "class": CLASSES})
        ]
    )


def top_tokens(winners: pd.DataFrame) -> pd.DataFrame:
    """The eight most attended tokens over all queries, with and without the first token: how often
    each wins, and with what mean share of the attention."""
    rows = [
        dict(
            counted=kind,
            token=repr(token),
            queries=len(group),
            share_of_queries=len(group) / len(winners),
            attention=group[f"share{name}"].mean(),
        )
        for kind, name in (("all tokens", ""), ("without the first", "_rest"))
        for token, group in winners.groupby(f"token{name}")
    ]
    frame = pd.DataFrame(rows).sort_values(
        ["counted", "queries", "token"], ascending=[True, False, True]
    )
    return frame.groupby("counted").head(8).reset_index(drop=True)


def reach(queries_kns, found: pd.DataFrame) -> float:
    """Share of the pairs of a synapse and a KN in which the synapse can move the KN: attention
    reaches the MLPs of its own layer and of later ones. `queries_kns`: KN sets; found: rows with
    by_layer, synapses a layer."""
    synapses = np.sum(found["by_layer"].tolist(), axis=0)
    kns = np.bincount([layer for one in queries_kns for layer, _ in one], minlength=len(synapses))
    return float((kns * np.cumsum(synapses)).sum() / max(1, kns.sum() * synapses.sum()))


# --- synapses (Eq. 5, 6) --------------------------------------------------------------------------


def synapse_counts(found: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How many synapses a query has, and how far S and S_ir coincide: means over queries with 95 %
    intervals. `_rest`: without column 0. mean depth: of a query's synapses (0 the first layer, 1
    the last)."""
    depth = found["by_layer"].map(
        lambda counts: (
            np.average(np.linspace(0, 1, len(counts)), weights=counts) if sum(counts) else np.nan
        )
    )
    first = (1 - found["n_self_rest"] / found["n_self"].where(found["n_self"] > 0)).astype(float)
    extra = {
        "share in column 0": first,
        "mean depth": depth,
        "no synapse": found["n_self"] == 0,
        "no synapse_rest": found["n_self_rest"] == 0,
    }
    names = [
        "n_self",
        "n_self_rest",
        "n_irrelevant",
        "n_irrelevant_rest",
        "jaccard",
        "jaccard_rest",
        *extra,
    ]
    frame = found.assign(**extra).reindex(columns=["fact", "relation", *names])
    frame = frame.astype(dict.fromkeys(names, float))
    return pd.DataFrame(
        [{"quantity": name, **bootstrap_mean(frame, name, seed=seed).row("mean")} for name in names]
    )
