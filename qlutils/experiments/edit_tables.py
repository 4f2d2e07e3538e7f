"""Tables 2 and 3, and the differences that are read from them."""

from collections import Counter

import numpy as np
import pandas as pd

from qlutils.experiments.consistency import CLASSES, THRESHOLDS, cells
from qlutils.show.stats import bootstrap_difference, bootstrap_mean, mean_columns
from qlutils.show.tables import paper_value, verdict, without_empty_paper_columns

PAPER_OP = {"erase": "erasure", "update": "update"}
RATES = ("rel", "gen", "loc", "avg")
METRICS = (*RATES, "dppl", "broken")
MEDIANS = ("dppl",)  # a few broken texts decide its mean
AVG_NOTE = (
    "Rel, Gen, Loc and Avg are means over the edits for which each is defined (n_rel, n_gen, "
    "n_loc, n_avg). Avg is that of the edits with all three: where n_avg is less than the others, "
    "it is not the mean of the columns beside it."
)
PERPLEXITY_NOTE = (
    "dPPL is the median; broken, the share of texts whose perplexity an edit multiplies by more "
    "than ten; dppl_mean, the mean, where no text is."
)


def measures_table(
    frame,
    classes,
    model,
    *,
    table=2,
    sets=("local", "global"),
    controls=("random",),
    seed=0,
):
    """Table 2 or 3: a row a split of the facts, operation and neuron set; its controls right below
    it.

    classes: a frame with fact, class_static, class_otsu. Rel, Gen, Loc and Avg are means over
    edits with 95 % intervals (facts resampled within relations), and so is broken; dppl is the
    median, dppl_mean the mean where no text is broken. n edits, of which n_rel, n_gen, n_loc and
    n_avg have a defined Rel, Gen, Loc and Avg (see AVG_NOTE); n_empty had no neurons to edit.
    Classes without a fact show n = 0. Columns ending in _paper hold the paper's values, for its
    models and methods; they are left out for others."""
    frame = with_classes(frame[frame["note"].isna()], classes)
    levels = {
        "threshold": ("all", *THRESHOLDS),
        "class": ("all", *CLASSES),
        "op": PAPER_OP,
        "neurons": sets,
        "control": ("none", *controls),
    }
    rows = []
    for keys, part in cells(frame, levels):
        control = keys.pop("control")
        row = keys | {"op": PAPER_OP[keys["op"]]} | _measures(part, seed)
        if control == "none":
            row |= _printed(table, model, keys)
        elif part.empty:  # a class without a fact is one row, n = 0
            continue
        else:
            row["neurons"] = f"{keys['neurons']} ({control})"
        rows.append(row)
    return without_empty_paper_columns(pd.DataFrame(rows))


def _printed(table, model, keys):
    """The paper's values of a row, which are by the static threshold; it counts no broken texts."""
    if keys["threshold"] != "static":
        return {}
    which = keys | {"operation": PAPER_OP[keys["op"]]}
    return {f"{name}_paper": paper_value(table, model, name, **which) for name in METRICS[:-1]}


def _measures(part, seed):
    """The measures of some edits, as columns of a row."""
    counts = {
        "n": len(part),
        "n_empty": (part["n_neurons"] == 0).sum(),
    }
    row = counts | {"neurons_edited": part["n_neurons"].mean()}
    for metric in METRICS:
        estimate = bootstrap_mean(part, metric, seed, share=True)
        row |= estimate.row("median" if metric in MEDIANS else "mean", metric)
        if metric in RATES:
            row[f"n_{metric}"] = estimate.n
    row["dppl_mean"] = np.nan if part["broken"].fillna(0).any() else part["dppl"].mean()
    return row | counts


def of_neurons(frame):
    """The edits of knowledge neurons, not of controls, that could be made."""
    return frame.query("control == 'none' and note.isna()")


def locality_table(frame, seed):
    """Loc of the KNs' edits on queries of the same relation (loc_same) and of others (loc_other),
    and the share of unrelated queries that an update makes answer with the new object (loc_new)."""
    rows = []
    for (op, neurons), part in of_neurons(frame).groupby(["op", "neurons"], sort=False):
        row = {"op": op, "neurons": neurons}
        for name in ("loc_new", "loc_same", "loc_other"):
            row |= mean_columns(part, [name], seed)
            row[f"n_{name}"] = row.pop("n")
        rows.append(row)
    return pd.DataFrame(rows)


# --- differences ----------------------------------------------------------------------------------


def contrasts(
    frame,
    by,
    levels,
    metrics=METRICS,
    within=("op", "neurons"),
    seed=0,
):
    """Mean (of dPPL: median) where `by` is levels[0] less that where it is levels[1], for every
    metric within every group: columns of `within`, metric, difference with its 95 % interval, n
    facts of the first and n_other of the second."""
    rows = []
    frame = frame[frame["note"].isna()]
    for keys, part in frame.groupby(list(within), sort=False):
        for metric in metrics:
            gap = bootstrap_difference(part, metric, by, levels, seed, share=True)
            row = dict(zip(within, keys), metric=metric)
            row |= gap.row(
                "median" if metric in MEDIANS else "mean",
                "difference",
            )
            row |= {
                "n": gap.n_clusters,
                "n_other": gap.n_clusters_other,
            }
            rows.append(row)
    return pd.DataFrame(rows)


def with_verdicts(contrasts):
    """`contrasts` to be read: with what each interval says about 0, in the paper's words."""
    words = {"op": PAPER_OP, "metric": {"dppl": "median dPPL"}}
    return contrasts.replace(words).assign(verdict=_verdicts(contrasts))


def verdict_counts(contrasts, what):
    """How many of some differences lie on which side of 0; `what` says which differences."""
    counts = Counter(said.split(" (")[0] for said in _verdicts(contrasts))
    said = [f"{one} in {count} of {counts.total()}" for one, count in counts.items()]
    return f"{what}: {', '.join(said) or 'nothing to compare'}"


def _verdicts(contrasts):
    return [verdict(row, "difference") for row in contrasts.to_dict("records")]


# --- classes of the facts -------------------------------------------------------------------------


def with_classes(frame, classes):
    """The edits with class_static and class_otsu of their fact."""
    return frame.merge(classes[["fact", "class_static", "class_otsu"]], on="fact", how="left")


def dividing_thresholds(classes):
    """The class thresholds by which no class is empty."""
    return [name for name in THRESHOLDS if classes[f"class_{name}"].nunique() == 2]


def by_class(frame, classes):
    """{name: edits} of all facts, and of each class of the `dividing_thresholds`."""
    groups = {"all facts": frame}
    frame = with_classes(frame, classes)
    for threshold in dividing_thresholds(classes):
        for name in CLASSES:
            groups[f"K_{name} ({threshold})"] = frame[frame[f"class_{threshold}"] == name]
    return groups


def class_contrasts(frame, classes, seed=0):
    """`contrasts` of K_I less K_II by each of the `dividing_thresholds`."""
    frame = with_classes(frame, classes)
    parts = [pd.DataFrame()]
    for threshold in dividing_thresholds(classes):
        part = contrasts(frame, f"class_{threshold}", CLASSES, seed=seed)
        part.insert(0, "threshold", threshold)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
