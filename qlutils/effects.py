"""From the rows of notebooks 04-06 to what they show: units of work, relative changes, tables and sentences.

Reads results only; nothing here needs torch.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd

from .analysis import with_classes
from .neurons import kn_sets
from .stats import bootstrap_difference, bootstrap_mean

DIRECTIONS = ("enhance", "suppress", "average")
INTERVALS = "95 % intervals: bootstrap over facts within relation, 1,000 draws."
CLASSES, THRESHOLDS, STATISTICS = ("I", "II"), ("static", "otsu"), ("mean", "median", "trimmed")
POPULATIONS = {"known": lambda frame: frame[frame["known"]], "all": lambda frame: frame,
               "known, not empty": lambda frame: frame[frame["known"] & (frame["size"] > 0)]}
LABELS = {"self": "Self", "union": "Union", "intersection": "Inter.", "refine": "Refine",
          "irrelevant": "Irrelevant", "enhance": "enhanced", "suppress": "suppressed",
          "average": "average of both", "probability": r"$\Delta$Prob", "value": r"$\Delta$Value",
          "static": "static threshold", "otsu": "Otsu's threshold"}


def units(queries: pd.DataFrame, t: float | None = None, *, irrelevant: int | None = None,
          size: int = 24) -> list[list[dict]]:
    """Units of at most `size` facts for the tasks of notebooks 04-06, from a `queries` frame.

    A fact is a dict: fact, relation, object, and lists over its queries: prompts, prompt_index; with `t`
    also layer and neuron, the KNs at that threshold; with `irrelevant`, a seed, also irrelevant: a random
    prompt of another relation, of equal length where one exists (null where the run has one relation
    only)."""
    queries, extra = queries.reset_index(drop=True), {}
    if t is not None:
        sets = [sorted(one) for one in kn_sets(queries, t)]
        extra = {name: [[neuron[place] for neuron in one] for one in sets]
                 for place, name in enumerate(("layer", "neuron"))}
    if irrelevant is not None:
        extra["irrelevant"] = [_irrelevant(queries, row, irrelevant) for row in range(len(queries))]
    facts = [dict(fact=fact, relation=group["relation"].iloc[0], object=group["object"].iloc[0],
                  prompts=group["prompt"].tolist(), prompt_index=group["prompt_index"].astype(int).tolist(),
                  **{name: [values[row] for row in group.index] for name, values in extra.items()})
             for fact, group in queries.groupby("fact", sort=False)]
    return [facts[start:start + size] for start in range(0, len(facts), size)]


def _irrelevant(queries, row, seed):
    query = queries.loc[row]
    others = queries[queries["relation"] != query["relation"]]
    same = others[others["prompt_tokens"] == query["prompt_tokens"]]
    pool = (same if len(same) else others)["prompt"].tolist()
    rng = np.random.default_rng([seed, *f"{query['fact']} {query['prompt_index']}".encode()])
    return pool[rng.integers(len(pool))] if pool else None


def beside_queries(frame: pd.DataFrame, queries: pd.DataFrame, t: float, static: float) -> pd.DataFrame:
    """`frame` with known, subject, object, cs2, class_static and class_otsu of its query (fact,
    prompt_index)."""
    columns = ["fact", "prompt_index", "subject", "object", "prompt", "known", "cs2", "class_static",
               "class_otsu"]
    known = with_classes(queries, t, static)[columns]
    return frame.merge(known, on=["fact", "prompt_index"], how="left", validate="many_to_one")


def rates(frame: pd.DataFrame, quantity: str = "probability", *, size: bool = False) -> pd.DataFrame:
    """Rows of `frame` with `rate`, the relative change of `quantity` with the sign of its direction
    (section 3.1), and one more row for each pair of directions, "average". `size`: the magnitude of the
    change instead, whichever way it goes. NaN where the quantity was 0 before or is undefined."""
    before = frame[f"{quantity}_before"]
    sign = frame["direction"].map({"enhance": 1.0, "suppress": -1.0})
    rate = sign * (frame[quantity] - before) / before.where(before != 0)
    frame = frame.assign(rate=rate.abs() if size else rate)
    keys = [name for name in ("fact", "prompt_index", "set", "renormalise") if name in frame]
    average = frame.groupby(keys, sort=False)["rate"].agg(lambda pair: pair.mean(skipna=False)).reset_index()
    first = frame[frame["direction"] == "enhance"].drop(columns="rate")
    first = first.merge(average, on=keys, validate="one_to_one")
    return pd.concat([frame, first.assign(direction="average")], ignore_index=True)


def summary(frame: pd.DataFrame, sets, *, directions=DIRECTIONS, populations=("known",),
            thresholds=THRESHOLDS, seed: int = 0) -> pd.DataFrame:
    """Mean, median and 10 % trimmed mean of `rate`, each with its 95 % interval, for every threshold,
    population of queries, set, direction and class; n values of n_facts facts, the share of `empty` sets
    and their mean size, and how many values are `undefined` (0 before the change). A class without facts
    has n = 0 and NaN."""
    rows, label = [], {name: f"class_{name}" for name in thresholds}
    for population in populations:
        cells = dict(list(POPULATIONS[population](frame).groupby(["set", "direction"], sort=False)))
        for threshold, one, direction, name in product(thresholds, sets, directions, CLASSES):
            part = cells.get((one, direction), frame.iloc[:0])
            part = part[part[label[threshold]] == name]
            estimate = bootstrap_mean(part, "rate", seed=seed)
            row = dict(threshold=threshold, queries=population, set=one, direction=direction, **{"class": name})
            for statistic in STATISTICS:
                row |= estimate.row(statistic)
            rows.append(row | dict(n_facts=estimate.n_clusters, undefined=estimate.n_missing,
                                   empty=(part["size"] == 0).mean(), size=part["size"].mean()))
    return pd.DataFrame(rows)


def contrast(frame: pd.DataFrame, first: str, second, *, direction: str = "average", threshold: str = "static",
             seed: int = 0, **keys) -> pd.DataFrame:
    """rate of set `first` minus the mean rate of the sets `second`, paired by query: per class, and class
    II minus class I.

    A row each for I, II and "II - I", with the mean, its 95 % interval, n and n_facts. Queries where any is
    undefined are left out."""
    second = [second] if isinstance(second, str) else list(second)
    frame = frame[frame["direction"] == direction]
    for column, level in keys.items():
        frame = frame[frame[column] == level]
    query, label = ["fact", "prompt_index"], f"class_{threshold}"
    wide = frame.pivot(index=query, columns="set", values="rate").reindex(columns=[first, *second])
    wide["gap"] = wide[first] - wide[second].mean(axis=1, skipna=False)
    about = frame.drop_duplicates(query)[[*query, "relation", label]]
    gaps = about.merge(wide[["gap"]].reset_index(), on=query)
    found = {name: bootstrap_mean(gaps[gaps[label] == name], "gap", seed=seed) for name in CLASSES}
    found["II - I"] = bootstrap_difference(gaps, "gap", label, ("II", "I"), seed=seed)
    return pd.DataFrame([dict(threshold=threshold, **{"class": name}, **one.row("mean"), n_facts=one.n_clusters)
                         for name, one in found.items()])


# --- predominance (Eq. 4) --------------------------------------------------------------------------------

def predominance(winners: pd.DataFrame) -> pd.DataFrame:
    """One row a fact of the rows of `synapses.attend`: predominance (share of its queries whose most
    attended token is the modal one), predominance_rest (the first token left out), first (share whose
    winner is the first token), same_first (what predominance would be if every query's winner were its
    first token: no attention involved), the modal tokens, n_queries and the mean share of attention that
    the first token draws."""
    rows = []
    for fact, group in winners.groupby("fact", sort=False):
        row = dict(fact=fact, relation=group["relation"].iloc[0], n_queries=len(group),
                   first=(group["column"] == 0).mean(), first_share=group["first_share"].mean())
        for name in ("", "_rest"):
            counts = group[f"token_id{name}"].value_counts()
            row[f"predominance{name}"] = counts.iloc[0] / len(group)
            row[f"modal{name}"] = group.loc[group[f"token_id{name}"] == counts.index[0], f"token{name}"].iloc[0]
        row["same_first"] = group["token_id_first"].value_counts().iloc[0] / len(group)
        rows.append(row)
    return pd.DataFrame(rows)


def predominance_table(facts: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means of `predominance` over facts by threshold and class, with 95 % intervals, and `least`, the mean
    of 1/k."""
    rows = []
    for threshold, name in product(THRESHOLDS, CLASSES):
        part = facts[facts[f"class_{threshold}"] == name]
        row = dict(threshold=threshold, **{"class": name})
        for column in ("predominance", "predominance_rest", "first", "same_first", "first_share"):
            row |= bootstrap_mean(part, column, seed=seed).row("mean", column)
        rows.append(row | dict(least=(1 / part["n_queries"]).mean()))
    return pd.DataFrame(rows)


def top_tokens(winners: pd.DataFrame, count: int = 8) -> pd.DataFrame:
    """The most attended tokens over all queries, with and without the first token: how often each wins, and
    with what mean share of the attention."""
    rows = []
    for kind, name in (("all tokens", ""), ("without the first", "_rest")):
        for token, group in winners.groupby(f"token{name}"):
            rows.append(dict(counted=kind, token=repr(token), queries=len(group),
                             share_of_queries=len(group) / len(winners), attention=group[f"share{name}"].mean()))
    frame = pd.DataFrame(rows).sort_values(["counted", "queries", "token"], ascending=[True, False, True])
    return frame.groupby("counted").head(count).reset_index(drop=True)


# --- synapses (Eq. 5, 6) ---------------------------------------------------------------------------------

def synapse_counts(found: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How many synapses a query has, and how far S and S_ir coincide: means over queries with 95 %
    intervals. `_rest`: without column 0. mean layer: over the synapses of a query, as a share of the depth
    (0 first, 1 last layer)."""
    depth = found["by_layer"].map(lambda counts: np.average(np.linspace(0, 1, len(counts)), weights=counts)
                                  if sum(counts) else np.nan)
    first = (1 - found["n_self_rest"] / found["n_self"].where(found["n_self"] > 0)).astype(float)
    extra = {"share in column 0": first, "mean layer": depth, "no synapse": found["n_self"] == 0,
             "no synapse_rest": found["n_self_rest"] == 0}
    names = ["n_self", "n_self_rest", "n_irrelevant", "n_irrelevant_rest", "jaccard", "jaccard_rest", *extra]
    frame = found.assign(**extra).reindex(columns=["fact", "relation", *names])
    frame = frame.astype(dict.fromkeys(names, float))
    return pd.DataFrame([{"quantity": name, **bootstrap_mean(frame, name, seed=seed).row("mean")}
                         for name in names])


# --- figures ---------------------------------------------------------------------------------------------

def figure_bars(tables: dict[str, pd.DataFrame], statistic: str = "mean"):
    """Figures 4 and 6: for each named table of `summary` a row of panels, one a direction: bars by set and
    class.

    Returns the figure and the plotted rows."""
    import matplotlib.pyplot as plt

    from .plots import WIDE, bars_with_intervals

    size = WIDE, 0.7 + 1.75 * len(tables)
    fig, axes = plt.subplots(len(tables), len(DIRECTIONS), figsize=size, sharey="row", squeeze=False)
    for row, (name, table) in enumerate(tables.items()):
        table = table.assign(set=table["set"].map(lambda one: LABELS.get(one, one)))
        for column, direction in enumerate(DIRECTIONS):
            ax = axes[row, column]
            bars_with_intervals(table[table["direction"] == direction], ax, x="set", hue="class", y=statistic)
            ax.set_title(LABELS[direction] if row == 0 else "", pad=8)
            ax.set_ylabel(name if column == 0 else "")
        axes[row, 0].set_ylim(top=1.15 * axes[row, 0].get_ylim()[1])  # room for the numbers on the bars
    _one_legend(fig, axes)
    return fig, pd.concat([table.assign(panel=name) for name, table in tables.items()], ignore_index=True)


def _one_legend(fig, axes):
    """One legend above all panels in place of one a panel."""
    legend = axes[0, 0].get_legend()
    title = legend.get_title().get_text() or None
    fig.legend(handles=legend.legend_handles, labels=[text.get_text() for text in legend.get_texts()],
               title=title, title_fontsize=6, ncols=2, loc="outside upper center")
    for ax in axes.flat:
        ax.get_legend().remove()


def figure_predominance(facts: pd.DataFrame):
    """Figure 5: `predominance` and `predominance_rest` by model and class, by both thresholds; the figure
    and its rows."""
    import matplotlib.pyplot as plt

    from .plots import WIDE, violins_by_class

    fig, axes = plt.subplots(2, 2, figsize=(WIDE, 4.0), sharey=True, squeeze=False)
    values = {"predominance": "as in the paper", "predominance_rest": "without the first token"}
    for (row, threshold), (column, value) in product(enumerate(THRESHOLDS), enumerate(values)):
        ax, frame = axes[row, column], facts.assign(**{"class": facts[f"class_{threshold}"]})
        violins_by_class(frame, ax, value=value)
        ax.set_ylim(0, 1.03)
        ax.set_title(values[value] if row == 0 else "", pad=10)
        ax.set_ylabel(rf"predominance $\mathcal{{P}}$" + f"\n{LABELS[threshold]}" if column == 0 else "")
    _one_legend(fig, axes)
    return fig, facts[["model", "fact", "relation", "class_static", "class_otsu", *values, "n_queries"]]


def figure_conditions(maps: list[dict], conditions, kind: str):
    """Figures 7 and 10: (L, N) maps of queries, a column a query and a row a condition, all on one colour
    scale.

    maps: from `synapses.scaled_maps`. kind: "attribution" or "activation". Returns the figure and the
    plotted numbers."""
    import textwrap

    import matplotlib.pyplot as plt

    from .plots import WIDE, heatmap_neurons, pool_neurons, shared_norm

    pooled = {(row, place): pool_neurons(one[name][kind], bins=100) for row, name in enumerate(conditions)
              for place, one in enumerate(maps)}
    norm, frames = shared_norm(*pooled.values()), []
    fig, axes = plt.subplots(len(conditions), len(maps), figsize=(WIDE, 0.6 + 1.15 * len(conditions)),
                             sharex=True, sharey=True, squeeze=False)
    for (row, place), frame in pooled.items():
        one, ax = maps[place], heatmap_neurons(frame, axes[row, place], norm=norm, colorbar=False)
        subject = " | ".join(one["fact"].split("|")[1:])
        title = "\n".join([subject, *textwrap.wrap(f"{one['prompt']}\xa0…", 34)[:3]])
        ax.set_title(title if row == 0 else "", fontsize=5)
        ax.set_xlabel("neuron" if row == len(conditions) - 1 else "")
        ax.set_ylabel(f"{conditions[row]}\nlayer" if place == 0 else "", fontsize=6)
        about = dict(fact=one["fact"], prompt=one["prompt"], condition=conditions[row], kind=kind)
        frames.append(frame.assign(**about))
    fig.colorbar(axes[0, 0].collections[0], ax=axes, label=kind, pad=0.01, aspect=40)
    return fig, pd.concat(frames, ignore_index=True)


def figure_places(found: pd.DataFrame, num_heads: int):
    """Where synapses sit: mean number in each layer and head, and how likely each column is one in a layer
    and head."""
    import matplotlib.pyplot as plt

    from .plots import WIDE

    heads = np.stack(found["by_head"].map(np.asarray).to_list()).reshape(len(found), -1, num_heads).mean(0)
    longest = max(map(len, found["by_column"]))
    columns = np.full((len(found), longest), np.nan)
    for row, counts in enumerate(found["by_column"]):
        columns[row, :len(counts)] = np.asarray(counts) / heads.size
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 2.2))
    mesh = left.pcolormesh(heads, cmap="magma_r", vmin=0)
    left.set(xlabel="head", ylabel="layer", xticks=np.arange(num_heads) + 0.5, xticklabels=range(num_heads),
             yticks=np.arange(len(heads)) + 0.5, yticklabels=range(len(heads)))
    left.figure.colorbar(mesh, ax=left, label="synapses a query")
    right.bar(range(longest), np.nanmean(columns, 0), color="0.4")
    right.set(xlabel="column (token of the prompt)",
              ylabel="share of layers and heads\nin which it is a synapse")
    frame = pd.DataFrame([dict(layer=l, head=h, synapses=heads[l, h]) for l, h in np.ndindex(heads.shape)]
                         + [dict(column=c, share=v, n=int((~np.isnan(columns[:, c])).sum()))
                            for c, v in enumerate(np.nanmean(columns, 0))])
    return fig, frame


# --- sentences -------------------------------------------------------------------------------------------

def with_interval(row, name="mean", digits=2) -> str:
    """"0.41 [0.35, 0.47] (n = 120)"; "undefined (n = 0)"."""
    from .tables import format_value

    text = format_value(row[name], row[f"{name}_low"], row[f"{name}_high"], row["n"], digits)
    return f"undefined (n = {int(row['n'])})" if pd.isna(row[name]) else text


def verdict(row, name="mean") -> str:
    """What a 95 % interval says about 0, in words."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if pd.isna(row[name]) or pd.isna(low):
        return "cannot be tested here"
    return "lies above 0" if low > 0 else "lies below 0" if high < 0 else "cannot be told from 0"


def pick(table: pd.DataFrame, **keys) -> pd.Series:
    """The one row of a table with these values; `class_` stands for the column class."""
    for name, value in keys.items():
        table = table[table[name.rstrip("_")] == value]
    if len(table) != 1:
        raise ValueError(f"{len(table)} rows of the table have {keys}; want one")
    return table.iloc[0]
