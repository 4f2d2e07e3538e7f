"""What notebooks 04 to 06 make of their interventions: units of work before them, relative changes
and tables after them. Nothing here needs torch."""

from itertools import product

import numpy as np
import pandas as pd

from qlutils.experiments.consistency import CLASSES, THRESHOLDS, cells, classified_facts
from qlutils.facts import seeded
from qlutils.neurons.others import OtherFacts
from qlutils.neurons.sets import QUERY, kn_sets
from qlutils.show.stats import LEAST, bootstrap_difference, bootstrap_mean, mean_columns

FIGURE_4_SETS = ("self", "union", "intersection", "refine")
FIGURE_4_DRAWN = (*FIGURE_4_SETS, "self_random", "union_random")  # as many random neurons beside
NEIGHBOURS = FIGURE_4_SETS[1:]  # made of the KNs of the fact's other queries, too
# Beyond the paper, see `query_kn_mapping.query_sets`: those of which notebook 04 shows the effect.
COMPARISON_SETS = (
    "self_random",
    "self_same_relation",
    "self_other_relation",
    "self_active",
    "union_others",
    "union_matched",
    "self_as_union",
)
OTHER_FACTS = ("same_relation", "other_relation")
DIRECTIONS = ("enhance", "suppress", "average")
INTERVALS = (
    "95 % intervals: bootstrap over facts within relation, 1,000 draws; for these relations and "
    f"wordings; none below {LEAST} facts on a side."
)


def _known(frame):
    return frame[frame["known"].astype(bool)]


POPULATIONS = {
    "all": lambda frame: frame,
    "known": _known,
    "known, not empty": lambda frame: _known(frame[frame["size"] > 0]),
}
# All queries, as in the paper, decide; the known ones stand beside.
COUNTED = ("all", "known")


# --- units of work --------------------------------------------------------------------------------


def each_query(unit):
    """(fact, i, {fact, relation, prompt_index}) of every query of a unit: the i-th of its fact."""
    for fact in unit:
        for i, index in enumerate(fact["prompt_index"]):
            about = {"fact": fact["fact"], "relation": fact["relation"], "prompt_index": index}
            yield fact, i, about


def units(queries, t=None, *, irrelevant=None, other=None):
    """The facts of a `queries` frame as one unit for the tasks of notebooks 04-06.

    A fact is a dict: fact, relation, object, and lists over its queries: prompts, prompt_index.
    With `t` also layer and neuron, the KNs at that threshold. With `irrelevant`, a seed, also
    irrelevant: a random prompt of another relation, of equal length where one exists (None where
    the run has one relation only). With `t` and `other`, a seed, also same_relation and
    other_relation: as many (layer, neuron) in each layer as the query has KNs, of one other
    fact."""
    queries = queries.reset_index(drop=True)
    lists = queries[["prompt", "prompt_index"]].rename(columns={"prompt": "prompts"})
    if t is not None:
        sets = [sorted(one) for one in kn_sets(queries, t)]
        lists["layer"] = [[layer for layer, _ in one] for one in sets]
        lists["neuron"] = [[neuron for _, neuron in one] for one in sets]
        for kind in OTHER_FACTS if other is not None else ():
            lists[kind] = _other_facts_neurons(queries, sets, kind, other)
    if irrelevant is not None:
        drawn = [_irrelevant(queries, row, irrelevant) for row in queries.index]
        lists["irrelevant"] = pd.Series(drawn, dtype=object)  # as text, None would become NaN
    facts = queries.drop_duplicates("fact")[["fact", "relation", "object"]].to_dict("records")
    groups = queries.groupby("fact").groups
    return [[fact | lists.loc[groups[fact["fact"]]].to_dict("list") for fact in facts]]


def _irrelevant(queries, row, seed):
    """A prompt of another relation than the query's in this row."""
    query = queries.loc[row]
    others = queries[queries["relation"] != query["relation"]]
    same = others[others["prompt_tokens"] == query["prompt_tokens"]]
    pool = (same if len(same) else others)["prompt"].tolist()
    rng = seeded(seed, query["fact"], query["prompt_index"])
    return pool[rng.integers(len(pool))] if pool else None


def _other_facts_neurons(queries, sets, kind, seed):
    """For each query sorted neurons of one other fact, of its relation or of another."""
    others = OtherFacts(queries, sets)
    drawn = []
    for fact, index, neurons in zip(queries["fact"], queries["prompt_index"], sets):
        rng = seeded(seed, fact, index, kind)
        found = others.draw(neurons, fact, rng, same_relation=kind == "same_relation")
        drawn.append(sorted(found))
    return drawn


# --- relative changes -----------------------------------------------------------------------------


def beside_queries(frame, queries, t, static):
    """`frame` with known, subject, object, prompt, cs2, class_static and class_otsu of its query
    (fact, prompt_index)."""
    facts = classified_facts(queries, t, static)
    facts = facts[["fact", "cs2", "class_static", "class_otsu"]]
    about = queries[[*QUERY, "subject", "object", "prompt", "known"]].merge(facts, how="left")
    return frame.merge(
        about,
        on=QUERY,
        how="left",
        validate="many_to_one",
    )


def rates(frame, quantity="probability", *, size=False):
    """Rows of `frame` with `rate`, the relative change of `quantity`, positive in the expected
    direction (section 3.1), and one more row, "average", for each pair of directions.

    size: the magnitude of the change instead, whichever way it goes. NaN where the quantity was 0
    before or is undefined."""
    before = frame[f"{quantity}_before"]
    sign = frame["direction"].map({"enhance": 1.0, "suppress": -1.0})
    rate = sign * (frame[quantity] - before) / before.where(before != 0)
    frame = frame.assign(rate=rate.abs() if size else rate)
    keys = [name for name in (*QUERY, "set", "renormalise") if name in frame]
    both = frame.groupby(keys)["rate"].transform("sum", min_count=2)  # NaN where one is undefined
    averages = frame.assign(direction="average", rate=both / 2)
    return pd.concat([frame, averages[frame["direction"] == "enhance"]], ignore_index=True)


def summary(
    frame,
    sets,
    *,
    directions=DIRECTIONS,
    populations=COUNTED,
    thresholds=THRESHOLDS,
    seed=0,
):
    """Statistics of `rate`, a row a threshold, population of queries (of POPULATIONS), set,
    direction and class; a class without facts has n = 0 and NaN.

    See `all_statistics`; undefined: values that are NaN; empty: share of empty sets; size: their
    mean size."""
    levels = {
        "threshold": thresholds,
        "set": sets,
        "direction": directions,
        "class": CLASSES,
    }
    rows = []
    for population in populations:
        for keys, part in cells(POPULATIONS[population](frame), levels):
            estimate = bootstrap_mean(part, "rate", seed)
            row = {"threshold": keys["threshold"], "queries": population}
            row |= keys | all_statistics(estimate)
            row |= {
                "undefined": estimate.n_missing,
                "empty": (part["size"] == 0).mean(),
                "size": part["size"].mean(),
            }
            rows.append(row)
    return pd.DataFrame(rows)


def query_gaps(frame, first, second=(), direction="average"):
    """A row a query of `rates` rows of one direction: fact, relation, prompt_index, classes, known,
    and gap, the rate of set `first` less the mean rate of the sets `second`."""
    frame = frame[(frame["direction"] == direction) & frame["set"].isin([first, *second])]
    wide = frame.pivot(index=QUERY, columns="set", values="rate")
    wide = wide.reindex(columns=[first, *second])
    gap = wide.pop(first)
    if second:
        gap = gap - wide.mean(axis=1, skipna=False)
    columns = [*QUERY, "relation", "class_static", "class_otsu", "known"]
    about = frame.drop_duplicates(QUERY)[columns]
    return about.join(gap.rename("gap"), on=QUERY)


def class_gap(gaps, which, threshold, seed):
    """Of rows of `query_gaps`: over the facts of a class ("I", "II"), over all (""), or K_II's less
    K_I's ("II - I")."""
    label = f"class_{threshold}"
    if which == "II - I":
        return bootstrap_difference(
            gaps,
            "gap",
            label,
            ("II", "I"),
            seed,
        )
    return bootstrap_mean(gaps[gaps[label] == which] if which else gaps, "gap", seed)


def contrast(frame, first, second, seed=0):
    """Statistics of `query_gaps` by threshold, queries counted and class, and of the difference of
    the classes, "II - I" (n queries and n_facts of II, n_other and n_facts_other of I). Queries
    where a rate is undefined are left out."""
    gaps = query_gaps(frame, first, second)
    rows = []
    for threshold, queries, which in product(THRESHOLDS, COUNTED, (*CLASSES, "II - I")):
        found = class_gap(POPULATIONS[queries](gaps), which, threshold, seed)
        keys = {"threshold": threshold, "queries": queries, "class": which}
        rows.append(keys | all_statistics(found))
    return pd.DataFrame(rows)


def all_statistics(estimate):
    """Mean, median and 10 % trimmed mean as columns, each with its 95 % interval; n values of
    n_facts facts, of both sides of a difference."""
    means = estimate.row("mean") | estimate.row("median") | estimate.row("trimmed")
    return means | estimate.facts()


# --- predominance (Eq. 4) -------------------------------------------------------------------------


def predominance(winners):
    """One row a fact of the rows of `attention_predominance.attend`, each query's most attended
    token, `_rest` with the first token left out.

    predominance: share of queries whose token is the most frequent one, `modal`. first: share whose
    token is the first one. same_first: what predominance would be if every query's were its first:
    no attention involved. first_share: mean share of the attention that the first token draws."""

    def largest(tokens):
        return tokens.value_counts(normalize=True).iloc[0]

    def modal(tokens):
        return tokens.value_counts().index[0]

    facts = winners.assign(first=winners["column"] == 0).groupby("fact", sort=False)
    return facts.agg(
        relation=("relation", "first"),
        n_queries=("relation", "size"),
        first=("first", "mean"),
        first_share=("first_share", "mean"),
        predominance=("token_id", largest),
        modal=("token", modal),
        predominance_rest=("token_id_rest", largest),
        modal_rest=("token_rest", modal),
        same_first=("token_id_first", largest),
    ).reset_index()


def predominance_table(facts, seed=0):
    """Means of `predominance` over facts by threshold and class, with 95 % intervals, and `least`,
    the mean of 1/k for facts of k queries."""
    columns = ["predominance", "predominance_rest", "first", "same_first", "first_share"]
    rows = []
    for keys, part in cells(facts, {"threshold": THRESHOLDS, "class": CLASSES}):
        means = mean_columns(part, columns, seed)
        rows.append(keys | means | {"least": (1 / part["n_queries"]).mean()})
    return pd.DataFrame(rows)


def top_tokens(winners):
    """The eight tokens that are most often the most attended one, with and without the first token
    of a prompt: in how many queries, and with what mean share of the attention."""
    parts = {}
    for counted, end in (("all tokens", ""), ("without the first", "_rest")):
        tokens = winners[f"token{end}"].map(repr).rename("token")
        shares = winners[f"share{end}"].groupby(tokens)
        found = shares.agg(queries="size", share_of_queries="size", attention="mean")
        found["share_of_queries"] /= len(winners)
        # where equal, by the token
        parts[counted] = found.sort_values("queries", ascending=False, kind="stable").head(8)
    return pd.concat(parts, names=["counted"]).reset_index()


def inside_subject(winners, queries):
    """Whether the most attended token but the first begins in the subject, for each row of
    `winners`; no where the prompt does not hold the subject as it is written."""
    rows = winners[[*QUERY, "at_rest"]].merge(queries[[*QUERY, "prompt", "subject"]], on=QUERY)
    found = []
    for row in rows.itertuples():
        rest = row.prompt[row.at_rest :].lstrip()  # some decoders drop a token's space
        first = len(row.prompt) - len(rest)
        start = row.prompt.find(row.subject)
        found.append(0 <= start <= first < start + len(row.subject))
    return np.array(found)


# --- synapses (Eq. 5, 6) --------------------------------------------------------------------------


def reach(queries_kns, found):
    """Share of the pairs of a synapse and a KN in which the synapse can move the KN: attention
    reaches the MLPs of its own layer and of later ones. by_layer of `found`: synapses a layer."""
    synapses = np.sum(found["by_layer"].tolist(), axis=0)  # (L,)
    kns = np.bincount([layer for one in queries_kns for layer, _ in one], minlength=len(synapses))
    return float((kns * np.cumsum(synapses)).sum() / max(1, kns.sum() * synapses.sum()))


def synapse_counts(found, seed=0):
    """How many synapses a query has, and how far S and S_ir coincide: means over queries with 95 %
    intervals. `_rest`: without column 0. mean depth: of a query's synapses (0 the first layer, 1
    the last)."""
    names = "n_self n_self_rest n_irrelevant n_irrelevant_rest jaccard jaccard_rest".split()
    more = {
        "share in column 0": 1 - found["n_self_rest"] / found["n_self"],  # NaN where 0 of 0
        "mean depth": found["by_layer"].map(_mean_depth),
        "no synapse": found["n_self"] == 0,
        "no synapse_rest": found["n_self_rest"] == 0,
    }
    frame = found[["fact", "relation", *names]].assign(**more)
    means = {name: bootstrap_mean(frame, name, seed).row() for name in frame.columns[2:]}
    return pd.DataFrame.from_dict(means, "index").rename_axis("quantity").reset_index()


def _mean_depth(counts):
    """Of synapses counted by layer."""
    depths = np.linspace(0, 1, len(counts))
    return np.average(depths, weights=counts) if sum(counts) else np.nan
