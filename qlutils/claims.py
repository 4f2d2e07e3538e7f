"""The paper's claims, each decided by one statistic of a run's saved results and its 95 % interval over facts.

A claim has parts; a part is a difference (or a share) that is claimed to lie above a bound. It *holds* where the
interval lies above it, *does not hold* where it does not, and is *not testable here* where the statistic or its interval
is not defined; then `why` says what is missing. Nothing here is written by hand for a model, and nothing needs torch.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from .analysis import classified_facts
from .controls import split_half
from .page import table_html
from .stats import Estimate, bootstrap_difference, bootstrap_mean
from .tables import display_table

HOLDS, FAILS, OPEN = "holds", "does not hold", "not testable here"
THRESHOLDS = ("static", "otsu")
COMMON, HIGH, MARGIN = 0.25, 0.5, 0.1
CLAIMS = {
    1: f"K_II is common (here: more than {COMMON:.0%} of the facts)",
    2: "the classes' CS differ (classes from one half of the queries, CS2 from the other)",
    3: "larger models have more K_II and lower CS",
    4: "local edits of K_II generalise less than those of K_I, and their Avg is lower",
    5: "global edits of K_II raise perplexity more than those of K_I",
    6: "a query's own KNs matter, in both classes (more than random neurons)",
    7: "for K_II the neighbours' KNs matter less than the query's own",
    8: "this gap is smaller for K_I",
    9: f"predominance is high (here: above {HIGH:g})",
    10: "scaling a query's synapses moves KNs and P(answer) more than scaling an irrelevant query's",
    11: "it moves them more for K_II",
    12: "for K_II, CAS beats local on Gen, global on Loc and perplexity, and both on Avg",
    13: f"for K_I, CAS is comparable to local and global (here: Avg within {MARGIN:g})",
}
READS = {1: "02", 2: "02", 3: "02", 4: "03", 5: "03", 6: "04", 7: "04", 8: "04", 9: "05", 10: "06", 11: "06", 12: "07",
         13: "07"}


class Missing(Exception):
    """A result that a claim needs is not there; the message says which and why."""


@dataclass
class Evidence:
    """One part of a claim: the statistic in words and numbers, and the side on which it must lie."""

    part: str
    statistic: str
    estimate: Estimate
    threshold: str = ""
    above: float = 0.0
    within: float | None = None  # instead: the whole interval within +- this

    def row(self) -> dict:
        value, low, high = (getattr(self.estimate, name) for name in ("mean", "mean_low", "mean_high"))
        why = ""
        if np.isnan(value):
            verdict = OPEN
            why = (f"a class is empty by the {self.threshold} threshold" if self.threshold else "nothing to compare")
        elif np.isnan(low):
            verdict, why = OPEN, "too few facts for an interval"
        elif self.within is not None:
            verdict = HOLDS if -self.within < low and high < self.within else FAILS
        else:
            verdict = HOLDS if low > self.above else FAILS
        return dict(part=self.part, threshold=self.threshold, statistic=self.statistic, value=value, value_low=low,
                    value_high=high, n=self.estimate.n, n_facts=self.estimate.n_clusters, verdict=verdict, why=why)


def scoreboard(get, models, methods, downstream, *, t=0.2, static=0.1, seed=0) -> pd.DataFrame:
    """A row a claim, part, model, method and threshold.

    get(model, method, name): a saved frame, or raises `Missing`. `methods` localise (claims 1-3), `downstream` those of
    claims 4-13. models: smallest first, as claim 3 compares neighbours in this order."""
    rows, options = [], dict(t=t, static=static, seed=seed)
    for number, claim in CLAIMS.items():
        for method in methods if READS[number] == "02" else downstream:
            for model in models:
                here = dict(claim=number, text=claim, model=model, method=method)
                try:
                    if number == 3:
                        before = models[models.index(model) - 1] if models.index(model) else None
                        found = _size(get, model, before, method, **options)
                    else:
                        found = _TESTS[number](lambda name: get(model, method, name), **options)  # noqa: B023
                    rows += [here | evidence.row() for evidence in found]
                except Missing as missing:
                    rows.append(here | dict(part="", threshold="", statistic="", value=np.nan, value_low=np.nan,
                                            value_high=np.nan, n=0, n_facts=0, verdict=OPEN, why=str(missing)))
    return pd.DataFrame(rows)


def overall(board: pd.DataFrame) -> pd.DataFrame:
    """One verdict a claim, model and method: of its parts that could be tested, do all, some or none hold?"""
    rows = []
    for keys, part in board.groupby(["claim", "text", "method", "model"], sort=False):
        tested = part[part["verdict"] != OPEN]
        held = int((tested["verdict"] == HOLDS).sum())
        if tested.empty:
            verdict = f"{OPEN}: {part['why'].iloc[0]}"
        else:
            word = HOLDS if held == len(tested) else FAILS if held == 0 else "holds in part"
            verdict = f"{word} ({held} of {len(tested)}" + (f", {len(part) - len(tested)} untestable)"
                                                            if len(tested) < len(part) else ")")
        rows.append(dict(zip(("claim", "text", "method", "model"), keys)) | dict(verdict=verdict))
    return pd.DataFrame(rows)


# --- section 2: consistency and edits ---------------------------------------------------------------------

def _common(get, *, t, static, seed):
    facts = classified_facts(get("queries"), t, static)
    for threshold in THRESHOLDS:
        label = facts[f"class_{threshold}"]
        share = facts.assign(second=(label == "II").astype(float).where(label.notna()))
        yield Evidence("", "share of K_II", bootstrap_mean(share, "second", seed=seed), threshold, above=COMMON)


def _differ(get, *, t, static, seed):
    for row in split_half(get("queries"), t=t, static=static, seed=seed).to_dict("records"):
        yield Evidence("", "CS2 of K_I - CS2 of K_II", _as_estimate(row, "I - II"), row["threshold"])


def _size(get, model, before, method, *, t, static, seed):
    if before is None:
        raise Missing("the smallest model of the run")
    both = []
    for name in (before, model):
        facts = classified_facts(get(name, method, "queries"), t, static).assign(model=name)
        both.append(facts.assign(**{f"second_{threshold}": (facts[f"class_{threshold}"] == "II").astype(float)
                                    .where(facts[f"class_{threshold}"].notna()) for threshold in THRESHOLDS}))
    both = pd.concat(both, ignore_index=True)
    for threshold in THRESHOLDS:
        yield Evidence("more K_II", f"share of K_II less that of {before}", bootstrap_difference(
            both, f"second_{threshold}", "model", (model, before), seed=seed), threshold)
    yield Evidence("lower CS", f"CS2 of {before} less CS2", bootstrap_difference(both, "cs2", "model", (before, model),
                                                                                 seed=seed))


def _edited(get, name, t, static):
    """A notebook's edits of knowledge neurons (not its controls), with the facts' classes and the paper's names."""
    frame = get(name)
    frame = frame[(frame["control"] == "none") & frame["note"].isna()]
    classes = classified_facts(get("queries"), t, static)[["fact", "class_static", "class_otsu"]]
    frame = frame.drop(columns=["class_static", "class_otsu"], errors="ignore").merge(classes, on="fact", how="left")
    return frame.assign(operation=frame["op"].replace({"erase": "erasure"}))


def _local(get, *, t, static, seed):
    edits = _edited(get, "edits", t, static)
    for operation, measure, threshold in product(("erasure", "update"), ("gen", "avg"), THRESHOLDS):
        part = edits[(edits["operation"] == operation) & (edits["neurons"] == "local")]
        yield Evidence(f"{operation}, {measure.title()}", f"{measure.title()} of K_I - of K_II", bootstrap_difference(
            part, measure, f"class_{threshold}", ("I", "II"), seed=seed), threshold)


def _global(get, *, t, static, seed):
    edits = _edited(get, "edits", t, static)
    for operation, threshold in product(("erasure", "update"), THRESHOLDS):
        part = edits[(edits["operation"] == operation) & (edits["neurons"] == "global")]
        yield Evidence(operation, "dPPL of K_II - of K_I", bootstrap_difference(
            part, "dppl", f"class_{threshold}", ("II", "I"), seed=seed), threshold)


# --- section 3: expression --------------------------------------------------------------------------------

def query_gaps(frame, first, second=()) -> pd.DataFrame:
    """A row a query of `effects.rates` rows, both directions averaged: fact, relation, prompt_index, classes, known,
    and gap, the rate of set `first` less the mean rate of the sets `second`. Known queries, where there is one."""
    frame = frame[(frame["direction"] == "average") & frame["set"].isin([first, *second])]
    wide = frame.pivot(index=["fact", "prompt_index"], columns="set", values="rate").reindex(columns=[first, *second])
    gap = wide[first] - (wide[list(second)].mean(axis=1, skipna=False) if second else 0.0)
    about = frame.drop_duplicates(["fact", "prompt_index"])[["fact", "relation", "prompt_index", "class_static",
                                                             "class_otsu", "known"]]
    gaps = about.merge(gap.rename("gap").reset_index(), on=["fact", "prompt_index"])
    return gaps[gaps["known"]] if gaps["known"].any() else gaps


NEIGHBOURS = ("union", "intersection", "refine")


def _own(get, *, t, static, seed):
    gaps = query_gaps(get("query_kn_mapping"), "self", ("self_random",))
    for name, threshold in product(("I", "II"), THRESHOLDS):
        part = gaps[gaps[f"class_{threshold}"] == name]
        yield Evidence(f"K_{name}", "dProb of own KNs - of random neurons", bootstrap_mean(part, "gap", seed=seed),
                       threshold)


def _neighbours(get, *, t, static, seed):
    for (kind, gaps), threshold in product(_neighbour_gaps(get), THRESHOLDS):
        part = gaps[gaps[f"class_{threshold}"] == "II"]
        yield Evidence(kind, "dProb of own - of neighbours' KNs, K_II", bootstrap_mean(part, "gap", seed=seed),
                       threshold)


def _less(get, *, t, static, seed):
    for (kind, gaps), threshold in product(_neighbour_gaps(get), THRESHOLDS):
        yield Evidence(kind, "the gap of K_II - the gap of K_I", bootstrap_difference(
            gaps, "gap", f"class_{threshold}", ("II", "I"), seed=seed), threshold)


def _neighbour_gaps(get):
    """As the paper counts, empty sets changing nothing; and Union with both sets cut to one size."""
    frame = get("query_kn_mapping")
    return [("as in the paper", query_gaps(frame, "self", NEIGHBOURS)),
            ("Union, sizes matched", query_gaps(frame, "self_as_union", ("union_matched",)))]


def _predominance(get, *, t, static, seed):
    facts = get("attention_predominance")
    for part, column in (("all tokens", "predominance"), ("without the first token", "predominance_rest")):
        yield Evidence(part, "mean predominance", bootstrap_mean(facts, column, seed=seed), above=HIGH)


def _moved(get):
    """(name, rates) of what scaling synapses moves: signed as in the paper, and in size, since signs can cancel."""
    frame = get("knowledge_synapses")
    for name, quantity in (("dValue", "value"), ("dProb", "probability")):
        part = frame[(frame["quantity"] == quantity) & ~frame["renormalise"].astype(bool)]
        yield name, part
        yield f"|{name}|", part.assign(rate=part["rate"].abs())


def _synapses(get, *, t, static, seed):
    for name, frame in _moved(get):
        gaps = query_gaps(frame, "self", ("irrelevant",))
        yield Evidence(name, f"{name} of S - of S_ir", bootstrap_mean(gaps, "gap", seed=seed))


def _synapse_classes(get, *, t, static, seed):
    for (name, frame), threshold in product(_moved(get), THRESHOLDS):
        yield Evidence(name, f"{name} of K_II - of K_I", bootstrap_difference(
            query_gaps(frame, "self"), "gap", f"class_{threshold}", ("II", "I"), seed=seed), threshold)


# --- section 3.3: CAS -------------------------------------------------------------------------------------

def _cas(get, *, t, static, seed):
    edits = _edited(get, "cas_edits", t, static)
    compared = (("gen", "cas", "local"), ("loc", "cas", "global"), ("dppl", "global", "cas"), ("avg", "cas", "local"),
                ("avg", "cas", "global"))
    for operation, (measure, first, second), threshold in product(("erasure", "update"), compared, THRESHOLDS):
        part = edits[(edits["operation"] == operation) & (edits[f"class_{threshold}"] == "II")]
        label = {"dppl": "dPPL"}.get(measure, measure.title())
        estimate = bootstrap_difference(part, measure, "neurons", (first, second), seed=seed)
        yield Evidence(f"{operation}, {label}", f"{label} of {_NAMES[first]} - of {_NAMES[second]}", estimate,
                       threshold)


def _comparable(get, *, t, static, seed):
    edits = _edited(get, "cas_edits", t, static)
    for operation, other, threshold in product(("erasure", "update"), ("local", "global"), THRESHOLDS):
        part = edits[(edits["operation"] == operation) & (edits[f"class_{threshold}"] == "I")]
        yield Evidence(f"{operation}, {other}", f"Avg of CAS - of {other}", bootstrap_difference(
            part, "avg", "neurons", ("cas", other), seed=seed), threshold, within=MARGIN)


_NAMES = {"cas": "CAS", "local": "local", "global": "global"}
_TESTS = {1: _common, 2: _differ, 4: _local, 5: _global, 6: _own, 7: _neighbours, 8: _less, 9: _predominance,
          10: _synapses, 11: _synapse_classes, 12: _cas, 13: _comparable}


def _as_estimate(row, name):
    empty = [np.nan] * 6
    return Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"], *empty, n=row["n"],
                    n_clusters=row["n_I"] + row["n_II"], n_missing=0, n_draws=0)


# --- for the page ------------------------------------------------------------------------------------------

def scoreboard_html(total: pd.DataFrame) -> str:
    """The claims as rows, models (and methods) as columns; verdicts as words on a tint."""
    columns = list(dict.fromkeys(zip(total["model"], total["method"])))
    several = len({method for _, method in columns}) > 1
    head = "".join(f'<th class="text">{html.escape(m)}{" · " + html.escape(k) if several else ""}</th>'
                   for m, k in columns)
    rows = []
    for (number, text), part in total.groupby(["claim", "text"], sort=False):
        verdicts = {(m, k): v for m, k, v in part[["model", "method", "verdict"]].itertuples(index=False)}
        cells = "".join(f'<td class="text {_tint(verdicts.get(key, ""))}">{html.escape(verdicts.get(key, "–"))}</td>'
                        for key in columns)
        claim = f'<td>{number}</td><td class="text" style="text-align:left">{html.escape(text)}</td>'
        rows.append(f"<tr>{claim}{cells}</tr>")
    return (f'<table><thead><tr><th>claim</th><th class="text">what the paper claims</th>{head}</tr></thead><tbody>'
            + "\n".join(rows) + "</tbody></table>")


def _tint(verdict):
    return "open" if verdict.startswith(OPEN) or not verdict else "not" if verdict.startswith(FAILS) else (
        "holds" if verdict.startswith(f"{HOLDS} (") else "part")


def details_html(board: pd.DataFrame) -> str:
    """Every part of every claim, folded, one block a claim."""
    blocks = []
    for (number, text), part in board.groupby(["claim", "text"], sort=False):
        frame = part[["model", "method", "part", "threshold", "statistic", "value", "value_low", "value_high", "n",
                      "n_facts", "verdict", "why"]]
        title = f"<summary>({number}) {html.escape(text)}</summary>"
        blocks.append(f"<details>{title}{table_html(display_table(frame))}</details>")
    return "\n".join(blocks)
