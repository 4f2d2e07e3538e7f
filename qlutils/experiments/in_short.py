"""The ten sentences that open the report, computed from a run's saved results.

Each is a list of statistics with their 95 % intervals and n facts, so that it is true of any model;
what is missing, undefined or rests on too few facts "cannot be told". They are about the first
method by which neurons were changed; the claims' matrix has all.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import HTML

from qlutils import paths
from qlutils.experiments.claims import (
    CLAIMS,
    MARKS,
    NAMES,
    NOT_RUN,
    QUANTITIES,
    UNTOLD,
    Case,
    deciding,
    n_facts,
    overall,
    synapse_rates,
)
from qlutils.experiments.consistency import classified_facts, share_of_class
from qlutils.experiments.edit_tables import PAPER_OP
from qlutils.experiments.effects import query_gaps
from qlutils.experiments.report import NOTEBOOKS, SavedResults
from qlutils.show.stats import LEAST
from qlutils.show.tables import format_value
from qlutils.study.results import Missing

SCALING = {"suppress": "suppressing", "enhance": "enhancing"}
SENTENCES: dict = {}  # {topic: functions that tell a `Reading`'s sentence, or raise `Missing`}

CAS_AGAINST = (("gen", "local"), ("loc", "global"), ("avg", "local"), ("avg", "global"))


@dataclass
class Reading(Case):
    """A model and method of the report: `board`, its rows of the scoreboard."""

    saved: SavedResults
    board: pd.DataFrame

    def located_by(self, method) -> bool:
        """Whether notebook 01 was run by this method."""
        try:
            return bool(self.saved.entry("01", self.model, method))
        except Missing:
            return False


def about(topic):
    """Decorator: the function tells a part of `topic` of a `Reading`."""

    def register(tell):
        SENTENCES.setdefault(topic, []).append(tell)
        return tell

    return register


def in_short(saved, board, *, t=0.2, static=0.1, seed=0) -> pd.DataFrame:
    """topic, model, sentence: ten topics, a sentence for each model of which anything was run."""
    method, rows = (saved.downstream or saved.methods)[0], []
    board = board[board["method"] == method]
    ran = set(board.loc[board["statistic"] != "", "model"])
    models = [model for model in saved.models if paths.label(model) in ran] or saved.models
    for (topic, parts), model in product(SENTENCES.items(), models):
        label = paths.label(model)
        own = board[board["model"] == label]
        one = Reading(saved.frame, model, method, None, t, static, seed, saved, own)
        sentence = "; ".join(_sentence(one, tell) for tell in parts)
        rows.append(dict(topic=topic, model=label, sentence=sentence))
    return pd.DataFrame(rows)


def _sentence(one, tell) -> str:
    try:
        return tell(one)
    except Missing as missing:
        return f"{UNTOLD}: {missing}"


def show(table: pd.DataFrame) -> HTML:
    """The sentences as a list, of several models each in a line of its own."""
    items = []
    for topic, rows in table.groupby("topic", sort=False):
        lines = [html.escape(sentence) for sentence in rows["sentence"]]
        if len(rows) > 1:
            names = map(html.escape, rows["model"])
            lines = [f"<br><i>{name}</i>: {line}" for name, line in zip(names, lines)]
        items.append(f"<li><b>{html.escape(topic)}</b> {''.join(lines)}.</li>")
    return HTML(f"<ol>{''.join(items)}</ol>")


# --- statistics in words --------------------------------------------------------------------------


def _row(found, measure="mean") -> dict:
    """An estimate as a row of the scoreboard."""
    return found.row(measure, "value") | found.facts()


def _listed(rows, compared=False) -> str:
    """{text with {} in it: row} as one text: "0.31 [0.25, 0.38] (n = 72) by Otsu's threshold, ...";
    n facts where it is another than before. `compared`: the values are differences, so "more" or
    "less"."""
    parts, before = [], None
    for text, row in rows.items():
        n = n_facts(row)
        told = _told(row, compared) + (f" (n = {n})" if n != before else "")
        parts.append(text.format(told))
        before = n
    return ", ".join(parts)


def _told(row, compared) -> str:
    value, low, high = (row[name] for name in ("value", "value_low", "value_high"))
    if np.isnan(low):
        return UNTOLD
    if not compared:
        return format_value(value, low, high)
    if low <= 0 <= high:
        return f"{UNTOLD} ({format_value(value, low, high)})"
    more = f"{format_value(value, low, high)} more"
    return more if low > 0 else f"{format_value(-value, -high, -low)} less"


# --- the run and the claims -----------------------------------------------------------------------


@about("What was run:")
def _run(one):
    entry = one.saved.entry("01", one.model, one.method)
    given, done = entry["parameters"], []
    for number in NOTEBOOKS:
        found, _ = one.saved.read_all(number, lambda *pair, at=number: one.saved.entry(at, *pair))
        if any(model == one.model for model, _ in found):
            done.append(number)
    known = given.get("known_prompts", 0)
    which = f" that the model knows in {known} wordings or more" if known else ""
    rule = given["rule"]
    integral = "the converged integral" if rule == "converged" else f"the rule {rule}"
    if rule == "right":
        integral = f"the paper's sum of {given['steps']} steps"
    return (
        f"{entry['facts']} facts{which} ({Path(given['data']).name}); neurons located by "
        f"{', '.join(filter(one.located_by, one.saved.methods))} at t = {one.t:g}, by {integral}; "
        f"notebooks {', '.join(done)}; what follows is of {one.method}"
    )


@about("What holds of the paper's 13 claims, and what does not:")
def _holds(one):
    marks = overall(one.board).set_index("claim")["mark"]
    groups = marks.index.groupby(marks)
    words = {NOT_RUN: "not run, or with nothing to compare"}
    return "; ".join(
        f"{words.get(mark, mark)}: {', '.join(map(str, groups[mark]))}"
        for mark in MARKS
        if mark in groups
    )


@about("What cannot be told, and about how many such facts it would take:")
def _untold(one):
    marks, facts = overall(one.board).set_index("claim")["mark"], one.facts()["cs2"].notna().sum()
    found = []
    for number in marks.index[marks == UNTOLD]:
        parts = deciding(one.board[one.board["claim"] == number])
        times = min(times_the_facts(CLAIMS[number], row) for row in parts.to_dict("records"))
        about = f"about {float(f'{times * facts:.2g}'):,.0f}"
        need = about if times < np.inf else "no number can be said"
        found.append(f"{number} ({need})")
    if found:
        return f"claims {', '.join(found)}; there are {facts} now"
    undecided = one.board.loc[one.board["verdict"] == UNTOLD, "claim"].unique()
    some = f"; parts of claims {', '.join(map(str, undecided))}" if len(undecided) else ""
    return f"no claim as a whole{some}"


def times_the_facts(claim, row) -> float:
    """By how much the facts must be multiplied to tell a part of a claim, if its value stays: an
    interval narrows with the root of n, and each side needs `stats.LEAST` facts. Infinite where
    more facts would not do."""
    value, low, high = (row[name] for name in ("value", "value_low", "value_high"))
    if row["verdict"] == UNTOLD:
        bounds = (-claim.within, claim.within) if claim.within else (claim.above,)
        distance = min(abs(value - bound) for bound in bounds)
        return (max(value - low, high - value) / distance) ** 2 if distance else np.inf
    side = np.nanmin([row["n_facts"], row["n_facts_other"]])
    return LEAST / side if 0 < side < LEAST else np.inf


# --- section 2 ------------------------------------------------------------------------------------


@about("K_II's share of the facts:")
def _share(one):
    facts, found = one.facts(), {}
    found[f"{{}} by the static threshold {one.static:g}"] = _share_of(one, facts)
    found["{} by Otsu's"] = _share_of(one, facts, "otsu")
    for t in sorted({0.1, 0.5} - {one.t}):
        other = classified_facts(one.frame("queries"), t, one.static)
        found[f"{{}} by the static one if t were {t:g}"] = _share_of(one, other)
    three = (facts["cs2_3"] <= one.static).astype(float).where(facts["cs2_3"].notna())
    average = f"{facts['n_queries'].mean():.2g}"
    wordings = f"{{}} counting three wordings of each fact instead of all ({average} on average)"
    found[wordings] = _row(one.mean(facts.assign(three=three), "three", share=True))
    return _listed(found)


def _share_of(one, facts, threshold="static", among=None) -> dict:
    return _row(share_of_class(facts, threshold, seed=one.seed, among=among))


@about("CS2 of K_I against K_II, cut on one half of the wordings and measured on the other:")
def _differ(one):
    rows = one.board[one.board["claim"] == 2].to_dict("records")
    if not rows[0]["statistic"]:
        raise Missing(rows[0]["why"])
    told = {}
    for row in rows:
        threshold = {"static": "static threshold", "otsu": "Otsu's"}[row["threshold"]]
        told[f"{threshold}, {row['part']}: {{}}"] = row
    return _listed(told, compared=True)


@about("What an edit breaks elsewhere (local: one wording's KNs; global: all wordings'):")
def _broken(one):
    edits, found = one.edits("edits"), []
    for op, neurons in product(PAPER_OP, ("local", "global")):
        part = edits[(edits["op"] == op) & (edits["neurons"] == neurons)]
        lost = one.mean(part.assign(lost=1 - part["loc"]), "lost", share=True)
        told = {
            "{} of other facts' answers change": _row(lost),
            "{} of texts break": _row(one.mean(part, "broken", share=True)),
            "median relative change of the perplexity {}": _row(one.mean(part, "dppl"), "median"),
        }
        found.append(f"{PAPER_OP[op]} of {neurons} KNs: {_listed(told)}")
    return "; ".join(found)


# --- section 3 ------------------------------------------------------------------------------------


@about("How far scaling a query's own neurons moves P(answer) as expected, relative to it:")
def _own(one):
    frame = one.frame("query_kn_mapping")
    others = {
        "against its neighbours' together {}": "union",
        "against another fact's of the relation {}": "self_same_relation",
        "against a fact's of another relation {}": "self_other_relation",
        "against random ones {}": "self_random",
    }
    gaps = {name: _gap(one, frame, "self", second) for name, second in others.items()}
    alone = {
        f"{{}} by {word}": _gap(one, frame, "self", direction=direction)
        for direction, word in SCALING.items()
    }
    return f"{_listed(alone)}; on average of both, {_listed(gaps, True)}"


@about("Attention:")
def _predominance(one):
    facts = one.frame("attention_predominance")
    least = (1 / facts["n_queries"]).mean()
    token = f"one token (at least {least:.2f} by construction)"
    same = {
        f"{{}} of a fact's wordings attend most to {token}": "predominance",
        "without the first token {}": "predominance_rest",
    }
    return _listed({name: _row(one.mean(facts, column)) for name, column in same.items()})


@about("Attention:")
def _synapses(one):
    frame, gaps = one.frame("knowledge_synapses"), {}
    for name, quantity in QUANTITIES.items():
        rows = synapse_rates(frame, quantity)
        for direction, word in SCALING.items():
            gap = _gap(one, rows, "self", "irrelevant", direction=direction)
            gaps[f"{name} {{}} by {word}"] = gap
        rest = _gap(one, rows, "self_without_first", "irrelevant_without_first")
        gaps[f"{name} without the first token, on average of both, {{}}"] = rest
    return (
        "scaling own synapses moves, against an irrelevant query's, KNs (dValue) and P(answer) "
        f"(dProb), as expected: {_listed(gaps, True)}"
    )


def _gap(one, frame, first, *second, direction="average") -> dict:
    return _row(one.mean(query_gaps(frame, first, second, direction), "gap"), "trimmed")


@about("What CAS buys:")
def _cas(one):
    edits, found = one.edits("cas_edits"), []
    for op, name in PAPER_OP.items():
        part, gaps = edits[edits["op"] == op], {}
        for measure, other in CAS_AGAINST:
            gap = one.apart(part, measure, "neurons", ("cas", other), share=True)
            gaps[f"{NAMES[measure]} against {other} edits {{}}"] = _row(gap)
        found.append(f"{name}: {_listed(gaps, True)}")
    return "; ".join(found)


@about("Facts known in every wording against the others:")
def _known(one):
    facts = one.facts()
    facts["all_known"] = facts["known"] == 1
    gap = one.apart(facts, "cs2", "all_known", (True, False))
    share = _share_of(one, facts, among="all_known")
    share_told = _listed({"{} of the former are K_II (static threshold)": share})
    return f"{_listed({'CS2 {}': _row(gap)}, True)}; {share_told}"
