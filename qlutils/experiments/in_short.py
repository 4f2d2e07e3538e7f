"""What the report opens with: ten topics, each told of each model in a few plain sentences that are
computed from a run's saved results.

Every statistic stands with its 95 % interval, and n where it is not that of all facts, so that the
sentences are true of any model; what is missing, undefined or rests on too few facts "cannot be
told". They are about the first method by which neurons were changed; the claims' matrix has all.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import HTML

from qlutils import paths
from qlutils.experiments.claims import (
    CLAIMS,
    MARKS,
    NOT_RUN,
    UNTOLD,
    Case,
    deciding,
    n_facts,
    overall,
    synapse_rates,
)
from qlutils.experiments.consistency import classified_facts, otsu_null, share_of_class
from qlutils.experiments.controls import NULLS, answered_and_not, null_consistency
from qlutils.experiments.edit_tables import PAPER_OP
from qlutils.experiments.effects import query_gaps
from qlutils.experiments.report import NOTEBOOKS, SavedResults
from qlutils.show.stats import LEAST
from qlutils.show.tables import format_value
from qlutils.study.results import Missing

WITHOUT_FIRST = ("self_without_first", "irrelevant_without_first")
SENTENCES: dict = {}  # {topic: functions that yield its sentences of a `Reading`}
EDITED = {  # {(neurons, control): whose value vectors were edited}
    ("local", "none"): "one wording's {} KNs",
    ("global", "none"): "all wordings' {} KNs",
    ("local", "random"): "{} random neurons",
}


@dataclass
class Reading(Case):
    """A model and method of the report: `board`, its rows of the scoreboard."""

    saved: SavedResults
    board: pd.DataFrame

    def ran(self, number) -> list:
        """The methods for which a notebook was run with the model."""
        entries, _ = self.saved.read_all(number, lambda *pair: self.saved.entry(number, *pair))
        return [method for model, method in entries if model == self.model]

    def n(self) -> int:
        """The facts of the run."""
        return self.frame("queries")["fact"].nunique()


def about(topic):
    """Decorator: the generator below yields sentences of `topic`; it may raise `Missing`."""

    def register(tell):
        SENTENCES.setdefault(topic, []).append(tell)
        return tell

    return register


def in_short(saved, board, *, t=0.2, static=0.1, seed=0) -> pd.DataFrame:
    """topic, model, sentence: a row a sentence, ten topics of each model of which anything was
    run."""
    method, rows = (saved.downstream or saved.methods)[0], []
    board = board[board["method"] == method]
    ran = set(board.loc[board["statistic"] != "", "model"])
    models = [model for model in saved.models if paths.label(model) in ran] or saved.models
    for (topic, tellers), model in product(SENTENCES.items(), models):
        label = paths.label(model)
        own = board[board["model"] == label]
        one = Reading(saved.frame, model, method, None, t, static, seed, saved, own)
        for sentence in chain.from_iterable(_told(tell, one) for tell in tellers):
            rows.append(dict(topic=topic, model=label, sentence=sentence))
    return pd.DataFrame(rows)


def _told(tell, one):
    try:
        yield from tell(one)
    except Missing as missing:
        yield f"{UNTOLD.capitalize()}: {missing}."


def show(table: pd.DataFrame) -> HTML:
    """The sentences as a list of topics, of several models each in a paragraph of its own."""
    items = []
    for topic, rows in table.groupby("topic", sort=False):
        texts = []
        for model, own in rows.groupby("model", sort=False):
            name = f"<i>{html.escape(model)}</i>: " if table["model"].nunique() > 1 else ""
            texts.append(name + "<br>".join(map(html.escape, own["sentence"])))
        items.append(f"<li><b>{html.escape(topic)}</b><br>{'<br>'.join(texts)}</li>")
    return HTML(f"<ol>{''.join(items)}</ol>")


# --- statistics in words --------------------------------------------------------------------------


def _value(found, of=None) -> str:
    """A mean for reading: "0.31 [0.25, 0.38]", with n facts where they are not `of`, all."""
    text = format_value(found.mean, found.mean_low, found.mean_high)
    return (UNTOLD if np.isnan(found.mean_low) else text) + _n(found.facts(), of)


def _percent(found, measure="mean", of=None, sign=1) -> str:
    """The same as a percentage: "31 % [25, 38]". sign: -1 turns a fall into a negative change."""
    row = found.row(measure, "value")
    value, *bounds = (sign * row[name] for name in ("value", "value_low", "value_high"))
    low, high = map(_hundred, sorted(bounds))
    text = UNTOLD if np.isnan(bounds[0]) else f"{_hundred(value)} % [{low}, {high}]"
    return text + _n(found.facts(), of)


def _hundred(share) -> str:
    """A share in percent, below one with a decimal."""
    text = f"{100 * share:.{1 if abs(share) < 0.0095 else 0}f}"
    return text if float(text) else "0"


def _apart(row, of=None) -> str:
    """A difference, a row with value, value_low and value_high, as "0.31 [0.25, 0.38] more"."""
    value, low, high = (row[name] for name in ("value", "value_low", "value_high"))
    if np.isnan(low):
        text = UNTOLD
    elif low <= 0 <= high:
        text = f"{UNTOLD} ({format_value(value, low, high)})"
    elif low > 0:
        text = f"{format_value(value, low, high)} more"
    else:
        text = f"{format_value(-value, -high, -low)} less"
    return text + _n(row, of)


_count = partial(format_value, digits=0)  # a mean number of neurons


def _n(row, of) -> str:
    """n facts, " (n = 62 and 52)", where they are others than `of`, the number of all."""
    n = n_facts(row)
    return "" if n in (f"{of}", f"{of} and {of}") else f" (n = {n})"


def _row(found, measure="mean") -> dict:
    """An estimate as a row of the scoreboard."""
    return found.row(measure, "value") | found.facts()


# --- the run --------------------------------------------------------------------------------------


@about("What was run")
def _run(one):
    entry, queries = one.saved.entry("01", one.model, one.method), one.frame("queries")
    given = entry["parameters"]
    known = given.get("known_prompts", 0)
    which = f" of which the model answers {known} wordings or more" if known else ""
    data = Path(given["data"])
    name = data.parent.name if data.name == "data" else data.name
    facts = queries.drop_duplicates("fact")
    inside = [
        one.casefold() in other.casefold() for one, other in zip(facts["object"], facts["subject"])
    ]
    yield (
        f"{entry['facts']} facts ({name}){which}; {len(queries):,} queries, of which it answers "
        f"{queries['known'].sum():,}; in {_hundred(np.mean(inside))} % of the facts the answer "
        "stands in the subject."
    )
    rule = given["rule"]
    integral = "the converged integral" if rule == "converged" else f"the rule {rule}"
    if rule == "right":
        integral = f"the paper's sum of {given['steps']} steps"
    located, done = ", ".join(one.ran("01")), ", ".join(filter(one.ran, NOTEBOOKS))
    yield (
        f"KNs: neurons with more than {one.t:g} of a query's largest score, by {located}, with "
        f"{integral}; what follows is of {one.method}. Notebooks {done}."
    )


# --- section 2 ------------------------------------------------------------------------------------


@about("Do the wordings of a fact share their neurons?")
def _shared(one):
    facts, n = one.facts(), one.n()
    cs2, jaccard = (_value(one.mean(facts, name), n) for name in ("cs2", "jaccard"))
    yield (
        f"Of a fact's KNs more than one wording has {cs2} (CS2); of two wordings' KNs both have "
        f"{jaccard} (Jaccard)."
    )
    relations = facts.assign(fact=facts["relation"], relation="")
    spread = _value(one.mean(relations, "cs2"), n)
    yield f"With relations resampled in place of facts CS2 is {spread}."
    groups = null_consistency(one.frame("queries"), t=one.t, seed=one.seed)
    told = {kind: _value(one.mean(groups[groups["kind"] == kind], "cs2"), n) for kind in NULLS}
    yield (
        f"CS2 of three queries: {told['own']} where they ask for one fact, {told['same pattern']} "
        f"where they ask for three facts in one wording, {told['other relations']} where nothing "
        f"is the same, {told['random']} of random neurons."
    )


@about("How many facts are K_II, whose wordings disagree?")
def _share(one):
    facts, n = one.facts(), one.n()
    static, otsu = (_percent(_share_of(one, facts, name), of=n) for name in ("static", "otsu"))
    noise = otsu_null(facts, seed=one.seed)
    if np.isnan(noise["R_II"]):
        made = UNTOLD
    else:
        made = " % to ".join(_hundred(noise[f"R_II{end}"]) for end in ("_low", "_high")) + " %"
    yield (
        f"{static} by the static class threshold (CS2 at most {one.static:g}); {otsu} by Otsu's "
        f"(of normal noise it makes {made} K_II)."
    )
    others = []
    for t in sorted({0.1, 0.5} - {one.t}):
        other = classified_facts(one.frame("queries"), t, one.static)
        others.append(f"{_percent(_share_of(one, other), of=n)} if KNs were cut at {t:g}")
    three = (facts["cs2_3"] <= one.static).astype(float).where(facts["cs2_3"].notna())
    few = one.mean(facts.assign(three=three), "three", share=True)
    others.append(f"{_percent(few, of=n)} from three wordings of each fact")
    yield f"The static share hangs on choices: {', '.join(others)}."


def _share_of(one, facts, threshold="static", among=None):
    return share_of_class(facts, threshold, seed=one.seed, among=among)


@about("Are the classes more than a cut?")
def _differ(one):
    rows = one.board[one.board["claim"] == 2].to_dict("records")
    if not rows[0]["statistic"]:
        raise Missing(rows[0]["why"])
    found = {(row["threshold"], row["part"]): _apart(row) for row in rows}
    parts = [
        f"by {label} {found[name, 'all facts']}, within relations {found[name, 'within relations']}"
        for name, label in (("static", "the static threshold"), ("otsu", "Otsu's"))
    ]
    yield (
        "Classes from one half of a fact's wordings, CS2 from the other; K_I against K_II: "
        f"{'; '.join(parts)}."
    )


@about("What does an edit of KNs change?")
def _edited(one):
    edits = one.frame("edits")
    edits = edits[edits["note"].isna()]
    n = one.n()
    for op, ((neurons, control), text) in product(PAPER_OP, EDITED.items()):
        same = (edits["op"] == op) & (edits["neurons"] == neurons) & (edits["control"] == control)
        part = edits[same]
        if part.empty and control != "none":
            continue
        rel, gen = (_percent(one.mean(part, name, share=True), of=n) for name in ("rel", "gen"))
        lost = one.mean(part.assign(lost=1 - part["loc"]), "lost", share=True)
        whose = text.format(_count(part["n_neurons"].mean()))
        told = (
            f"{PAPER_OP[op].capitalize()} of {whose}: this wording {rel}, the others {gen}, other "
            f"facts' answers lost {_percent(lost, of=n)}"
        )
        if part["dppl"].notna().any():
            broken = _percent(one.mean(part, "broken", share=True), of=n)
            perplexity = _percent(one.mean(part, "dppl"), "median", n)
            told += f", broken texts {broken}, perplexity {perplexity} up in the median"
        if part["loc_new"].notna().any():
            shouted = _percent(one.mean(part, "loc_new", share=True), of=n)
            told += f", unrelated queries answered with the new object {shouted}"
        yield told + "."


# --- section 3 ------------------------------------------------------------------------------------


@about("Whose neurons move an answer?")
def _own(one):
    frame = one.frame("query_kn_mapping")
    n = one.n()
    own = _percent(_gap(one, frame, "self", direction="suppress"), "trimmed", n, -1)
    doubled = _percent(_gap(one, frame, "self", direction="enhance"), "trimmed", n)
    yield (
        f"P(answer) changes by {own} when a query's own KNs are switched off, by {doubled} when "
        "they are doubled (trimmed means over queries)."
    )
    others = {
        "the other wordings' that are not its own": "union_others",
        "as many of all other wordings' as it has": "union_matched",
        "another fact's of the relation, without what they share": "self_same_relation",
        "random ones": "self_random",
    }
    told = []
    for name, kind in others.items():
        change = _percent(_gap(one, frame, kind, direction="suppress"), "trimmed", n, -1)
        told.append(f"{name} {change}")
    yield f"Others switched off in their place: {', '.join(told)}."
    sizes = frame.groupby("set")["size"].mean()
    union = f"all other wordings' KNs together ({_count(sizes.get('union'))} against "
    gaps = {
        f"{union}{_count(sizes.get('self'))})": ("union", "self"),
        "as many of them as own": ("union_matched", "self_as_union"),
        "another fact's of the relation": ("self_same_relation", "self"),
        "random ones": ("self_random", "self"),
    }
    told = [
        f"{name}: {_apart(_row(_gap(one, frame, *pair), 'trimmed'), n)}"
        for name, pair in gaps.items()
    ]
    yield f"Other neurons against the own, both averaged: {'; '.join(told)}."


@about("Does attention choose them?")
def _predominance(one):
    facts = one.frame("attention_predominance")
    n, least = one.n(), (1 / facts["n_queries"]).mean()
    all_tokens, rest, first = (
        _percent(one.mean(facts, name, share=True), of=n)
        for name in ("predominance", "predominance_rest", "first")
    )
    yield (
        f"The first token draws most attention in {first} of the queries; {all_tokens} of a fact's "
        f"wordings attend most to the same token, without the first {rest} (at least "
        f"{_hundred(least)} % by construction)."
    )


@about("Does attention choose them?")
def _synapses(one):
    rows = synapse_rates(one.frame("knowledge_synapses"), "probability")
    n = one.n()
    for way, word, sign in (("suppress", "Suppressed", -1), ("enhance", "Enhanced", 1)):
        own, other = (
            _percent(_gap(one, rows, name, direction=way), "trimmed", n, sign)
            for name in ("self", "irrelevant")
        )
        gap = _apart(_row(_gap(one, rows, "self", "irrelevant", direction=way), "trimmed"), n)
        yield (
            f"{word}, a query's own synapses (columns that collect attention) change P(answer) by "
            f"{own}, an irrelevant query's by {other}; own against irrelevant, in the direction "
            f"claimed: {gap}."
        )
    rest = {
        word: _apart(_row(_gap(one, rows, *WITHOUT_FIRST, direction=way), "trimmed"), n)
        for way, word in (("suppress", "suppressed"), ("enhance", "enhanced"))
    }
    told = ", ".join(f"{word} {gap}" for word, gap in rest.items())
    yield f"Own against irrelevant without the first token, in the direction claimed: {told}."


def _gap(one, frame, first, *second, direction="average"):
    return one.mean(query_gaps(frame, first, second, direction), "gap")


@about("What does CAS buy?")
def _cas(one):
    edits, n = one.edits("cas_edits"), one.n()
    size = _count(edits.loc[edits["neurons"] == "cas", "n_neurons"].mean())
    for op, name in PAPER_OP.items():
        part = edits[edits["op"] == op]
        gen, loc = (
            _apart(_row(one.apart(part, measure, "neurons", ("cas", other), share=True)), n)
            for measure, other in (("gen", "local"), ("loc", "global"))
        )
        yield (
            f"{name.capitalize()} of its {size} neurons against one wording's KNs: the other "
            f"wordings reached (Gen) {gen}; against all wordings': other facts spared (Loc) {loc}."
        )


@about("Are facts known in every wording different?")
def _known(one):
    facts = one.facts()
    facts["all_known"] = facts["known"] == 1
    gap = _row(one.apart(facts, "cs2", "all_known", (True, False)))
    share = _percent(_share_of(one, facts, among="all_known"))
    yield f"Their CS2 against the others': {_apart(gap)}; {share} of them are K_II (static)."
    thirds = answered_and_not(one.frame("queries"), one.t, one.seed)
    gap = _row(one.apart(thirds, "cs2", "known", (True, False)))
    yield f"CS2 of three answered wordings against three others of the same facts: {_apart(gap)}."


# --- the claims -----------------------------------------------------------------------------------


@about("What holds of the paper's 13 claims?")
def _holds(one):
    marks = overall(one.board).set_index("claim")["mark"]
    groups = marks.index.groupby(marks)
    words = {NOT_RUN: "not run, or with nothing to compare"}
    told = [
        f"{words.get(mark, mark)}: {', '.join(map(str, groups[mark]))}"
        for mark in MARKS
        if mark in groups
    ]
    yield "; ".join(told).capitalize() + "."
    facts = one.facts()["cs2"].notna().sum()
    needs, never = [], []
    for number in marks.index[marks == UNTOLD]:
        parts = deciding(one.board[one.board["claim"] == number])
        times = min(times_the_facts(CLAIMS[number], row) for row in parts.to_dict("records"))
        if times < np.inf:
            needs.append(f"{number} about {float(f'{times * facts:.2g}'):,.0f}")
        else:
            never.append(str(number))
    if needs:
        yield (
            f"To tell a part of claim {', '.join(needs)} such facts would do, if its value stays "
            f"({facts} now)."
        )
    if never:
        yield f"Of claim {', '.join(never)} more facts alone would tell nothing."


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
