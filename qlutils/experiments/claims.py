"""The paper's claims, each decided by one statistic of a run's saved results and its 95 % interval
over facts.

A claim has parts; a part is a mean, or a difference of two, that is claimed to lie above a bound.
It *holds* where the interval lies above it, *does not hold* where it lies below (*the opposite
holds* where the bound is 0), *cannot be told* where it holds the bound, and is *not testable here*
where the statistic or its interval is not defined (fewer than `stats.LEAST` facts on a side) or
would say nothing; then `why` says so. Claims 6-8, 10 and 11, about changes of P(answer), are
decided by the 10 % trimmed mean over all queries, as the paper counts them; the same over the known
ones stands beside and decides nothing. Nothing is written by hand for a model, nothing needs torch.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd
from IPython.display import HTML

from qlutils import paths
from qlutils.experiments.consistency import (
    CLASSES,
    THRESHOLDS,
    classified_facts,
    difference_of_shares,
    otsu_null,
    second_class,
    share_of_class,
)
from qlutils.experiments.controls import split_frames
from qlutils.experiments.edit_tables import PAPER_OP, with_classes
from qlutils.experiments.effects import (
    COUNTED,
    DIRECTIONS,
    NEIGHBOURS,
    POPULATIONS,
    query_gaps,
    rates,
)
from qlutils.paths import COMPARES as LOCALISED  # its claims are decided for every method
from qlutils.show.page import folded, shown
from qlutils.show.stats import LEAST, Estimate, bootstrap_difference, bootstrap_mean
from qlutils.show.tables import format_value, too_few
from qlutils.study.results import Missing

HOLDS, PARTLY, MIXED = "holds", "holds in part", "mixed"
FAILS, OPPOSITE = "does not hold", "the opposite holds"
UNTOLD, OPEN, NOT_RUN = "cannot be told", "not testable here", "not run"
COMMON, HIGH, MARGIN = 0.25, 0.5, 0.1
QUANTITIES = {"dValue": "value", "dProb": "probability"}  # what scaling synapses moves
NAMES = {
    "rel": "Rel",
    "gen": "Gen",
    "loc": "Loc",
    "avg": "Avg",
    "dppl": "median dPPL",
    "broken": "share of broken texts",
    "cas": "CAS",
    "I": "K_I",
    "II": "K_II",
}
# How the claims about changes count; the known queries stand beside.
QUERIES = "of all queries, trimmed mean"
MARKS = {HOLDS: "✓", PARTLY: "◐", MIXED: "±", FAILS: "✗", OPPOSITE: "✗", UNTOLD: "?", NOT_RUN: "–"}
COLOURS = dict(zip("✓◐±✗?–", "#cfe8dc #eaf2d3 #f6eed0 #f8d9c8 #eceff1 #ffffff".split()))
STYLE = [
    dict(selector="th", props="text-align: left; font-weight: normal; white-space: normal"),
    dict(selector="thead th", props="text-align: center; font-weight: bold"),
    dict(selector="td", props="text-align: center; color: #1c2024; border: 1px solid #ffffff"),
    dict(selector="td span", props="cursor: help; padding: 0 0.8em; font-size: 1.2em"),
]
LEGEND = (
    "✓ holds · ◐ holds in part: of other parts nothing can be told · ± mixed: of other parts the "
    "opposite holds, or they do not · ✗ no part that can be told holds · ? cannot be told · – not "
    "run, or nothing to compare with. After the mark: how many of the parts that can be tested "
    "hold. On hover, a mark shows the statistics that decide it."
)


def synapse_rates(frame, quantity) -> pd.DataFrame:
    """The rows of notebook 06 about one of QUANTITIES, attention not renormalised."""
    return frame[(frame["quantity"] == quantity) & ~frame["renormalise"].astype(bool)]


@dataclass
class Claim:
    """What the paper claims, the notebook whose results decide it, and the function that gives its
    parts."""

    text: str
    notebook: str
    parts: Callable
    above: float = 0.0
    within: float | None = None  # instead: the whole interval within +- this


@dataclass
class Part:
    """A statistic of a claim; `measure` is that of the estimate which decides it, `queries` those
    counted where that is a choice, and `why` says why the estimate would say nothing."""

    name: str
    statistic: str
    threshold: str
    found: Estimate
    why: str = ""
    measure: str = "mean"
    queries: str = ""


@dataclass
class Case:
    """The saved results of one model and method, as claims read them; `before`: the next smaller
    model, or None."""

    get: Callable  # (model, method, name) -> frame, or raises Missing
    model: str
    method: str
    before: str | None
    t: float
    static: float
    seed: int

    def frame(self, name, model=None) -> pd.DataFrame:
        return self.get(model or self.model, self.method, name)

    def facts(self, model=None) -> pd.DataFrame:
        return classified_facts(self.frame("queries", model), self.t, self.static)

    def edits(self, name) -> pd.DataFrame:
        """A notebook's edits of knowledge neurons (not its controls), with the facts' classes."""
        frame = self.frame(name)
        made = (frame["control"] == "none") & frame["note"].isna()
        return with_classes(frame[made], self.facts())

    def moved(self):
        """(name, rates) of what scaling synapses moves: signed as in the paper, and in size, since
        signs can cancel."""
        for name, quantity in QUANTITIES.items():
            part = synapse_rates(self.frame("knowledge_synapses"), quantity)
            yield name, part
            changes = part[part["direction"] != "average"].drop(columns="rate")
            yield f"|{name}|", rates(changes, quantity, size=True)

    def neighbour_gaps(self):
        """(name, gaps): as the paper counts, empty sets changing nothing; Union and Refine alone,
        as the Intersection is nearly empty; and Union with both sets cut to one size."""
        frame = self.frame("query_kn_mapping")
        yield "mean of all three", query_gaps(frame, "self", NEIGHBOURS)
        yield "Union alone", query_gaps(frame, "self", ("union",))
        yield "Refine alone", query_gaps(frame, "self", ("refine",))
        yield "Union, sizes matched", query_gaps(frame, "self_as_union", ("union_matched",))

    def mean(self, frame, value, share=False) -> Estimate:
        return bootstrap_mean(frame, value, seed=self.seed, share=share)

    def apart(self, frame, value, by, levels=("II", "I"), share=False) -> Estimate:
        return bootstrap_difference(frame, value, by, levels, seed=self.seed, share=share)

    def gap_parts(self, gaps, name, statistic, threshold="", classes=False):
        """The mean of `query_gaps`, or K_II's less K_I's: a part for the queries that decide and
        one for those beside."""
        for queries in COUNTED:
            rows = POPULATIONS[queries](gaps)
            found = (
                self.apart(rows, "gap", f"class_{threshold}") if classes else self.mean(rows, "gap")
            )
            yield Part(name, statistic, threshold, found, measure="trimmed", queries=queries)

    def edit_part(self, edits, op, measure, by, levels, threshold):
        """A measure of edits where `by` is levels[0] less where it is levels[1]; dPPL, which a few
        broken texts decide, by its median."""
        edits, name, why = edits[edits["op"] == op], NAMES[measure], ""
        if len(edits) and not edits["rel"].fillna(0).any():  # sets that do nothing are alike
            why = "no edit changes its own query's answer (Rel is 0)"
        elif measure == "broken" and not edits["broken"].fillna(0).any():
            why = "no edit breaks a text"
        first, second = (NAMES.get(level, level) for level in levels)
        return Part(
            f"{PAPER_OP[op]}, {name}",
            f"{name} of {first} - of {second}",
            threshold,
            self.apart(edits, measure, by, levels, share=measure != "dppl"),
            why,
            "median" if measure == "dppl" else "mean",
        )


CLAIMS: dict[int, Claim] = {}


def claim(number, notebook, text, **bounds):
    """The function below decides this claim: of a `Case` it gives the parts."""

    def register(parts):
        CLAIMS[number] = Claim(text, notebook, parts, **bounds)
        return parts

    return register


# --- section 2: consistency and edits -------------------------------------------------------------


@claim(1, "02", f"K_II is common (here: more than {COMMON:.0%} of the facts)", above=COMMON)
def _common(case):
    facts = case.facts()
    noise = otsu_null(facts, seed=case.seed)
    for threshold in THRESHOLDS:
        share, why = share_of_class(facts, threshold, seed=case.seed), ""
        if threshold == "otsu" and share.mean_low <= noise["R_II_high"]:
            least, most = (f"{noise[f'R_II_{end}']:.0%}" for end in ("low", "high"))
            why = f"Otsu's threshold makes {least} to {most} of normal noise K_II"
        yield Part("", "share of K_II", threshold, share, why)


@claim(2, "02", "the classes' CS differ (classes from one half of the queries, CS2 from the other)")
def _differ(case):
    halves = split_frames(case.frame("queries"), t=case.t, static=case.static, seed=case.seed)
    for threshold, _, _, frame in halves:
        found = case.apart(frame, "value", "label", ("I", "II"))
        yield Part("all facts", "CS2 of K_I - CS2 of K_II", threshold, found)
        yield _within_relations(frame, threshold, case.seed)


def _within_relations(frame, threshold, seed) -> Part:
    """The same with each CS2 less its relation's mean. Relations are resampled, not facts: of two
    facts of a relation, one is then the other's negative."""
    frame = frame[frame["label"].notna() & frame["value"].notna()]
    both = frame[frame.groupby("relation")["label"].transform("nunique") == 2]
    centred = both["value"] - both.groupby("relation")["value"].transform("mean")
    resampled = both.assign(value=centred, fact=both["relation"], relation="all")
    found = bootstrap_difference(resampled, "value", "label", ("I", "II"), seed=seed)
    one, two = (int((both["label"] == name).sum()) for name in CLASSES)
    relations = both["relation"].nunique()
    why = (
        f"{relations} relations have facts of both classes; an interval over relations needs "
        f"{LEAST}"
    )
    return Part(
        "within relations",
        "CS2 of K_I - CS2 of K_II, less each relation's mean",
        threshold,
        replace(found, n_clusters=one, n_clusters_other=two),
        why if relations < LEAST else "",
    )


@claim(3, "02", "larger models (later in the list) have more K_II and lower CS")
def _size(case):
    if case.before is None:
        raise Missing("it needs a smaller model, earlier in the list, to compare with")
    models, facts = (case.model, case.before), case.facts()
    smaller, name = case.facts(case.before), paths.label(case.before)
    both = pd.concat([facts.assign(model=case.model), smaller.assign(model=case.before)])
    both = both.reset_index(drop=True)
    shares = f"share of K_II less that of {name}"
    second = both.assign(second=second_class(both, "static"))
    found = case.apart(second, "second", "model", models, share=True)
    yield Part("more K_II", shares, "static", found)
    yield Part("more K_II", shares, "otsu", difference_of_shares(facts, smaller, case.seed))
    found = case.apart(both, "cs2", "model", models[::-1])
    yield Part("lower CS", f"CS2 of {name} less CS2", "", found)


def _edits_by_class(case, neurons, measures, levels):
    """Edits of one kind of set, class against class."""
    edits = case.edits("edits")
    edits = edits[edits["neurons"] == neurons]
    for op, measure, threshold in product(PAPER_OP, measures, THRESHOLDS):
        yield case.edit_part(edits, op, measure, f"class_{threshold}", levels, threshold)


@claim(4, "03", "local edits of K_II generalise less than those of K_I, and their Avg is lower")
def _local(case):
    return _edits_by_class(case, "local", ("gen", "avg"), ("I", "II"))


@claim(
    5,
    "03",
    "global edits of K_II raise perplexity more than those of K_I (by its median, and in broken "
    "texts)",
)
def _global(case):
    return _edits_by_class(case, "global", ("dppl", "broken"), ("II", "I"))


# --- section 3: expression ------------------------------------------------------------------------


@claim(6, "04", f"a query's own KNs matter, in both classes (more than random neurons; {QUERIES})")
def _own(case):
    statistic = "dProb of own KNs - of random neurons"
    for way in DIRECTIONS[:2]:
        gaps = query_gaps(case.frame("query_kn_mapping"), "self", ("self_random",), way)
        for name, threshold in product(CLASSES, THRESHOLDS):
            part = gaps[gaps[f"class_{threshold}"] == name]
            yield from case.gap_parts(part, f"K_{name}, {way}", statistic, threshold)


@claim(7, "04", f"for K_II the neighbours' KNs matter less than the query's own ({QUERIES})")
def _neighbours(case):
    statistic = "dProb of own - of neighbours' KNs, K_II"
    for (kind, gaps), threshold in product(case.neighbour_gaps(), THRESHOLDS):
        part = gaps[gaps[f"class_{threshold}"] == "II"]
        yield from case.gap_parts(part, kind, statistic, threshold)


@claim(8, "04", f"this gap is smaller for K_I ({QUERIES})")
def _less(case):
    statistic = "the gap of K_II - the gap of K_I"
    for (kind, gaps), threshold in product(case.neighbour_gaps(), THRESHOLDS):
        yield from case.gap_parts(gaps, kind, statistic, threshold, classes=True)


@claim(9, "05", f"predominance is high (here: above {HIGH:g})", above=HIGH)
def _predominance(case):
    facts, why = case.frame("attention_predominance"), ""
    if (facts["first"] == 1).all():
        why = "the first token always wins, so it tells how many wordings begin alike"
    name = "mean predominance"
    yield Part("all tokens", name, "", case.mean(facts, "predominance"), why)
    yield Part("without the first token", name, "", case.mean(facts, "predominance_rest"))


@claim(
    10,
    "06",
    "scaling a query's synapses moves KNs and P(answer) more than scaling an irrelevant query's "
    f"({QUERIES})",
)
def _synapses(case):
    for (name, frame), way in product(case.moved(), DIRECTIONS[:2]):
        gaps = query_gaps(frame, "self", ("irrelevant",), way)
        yield from case.gap_parts(gaps, f"{name}, {way}", f"{name} of S - of S_ir")


@claim(11, "06", f"it moves them more for K_II ({QUERIES})")
def _synapse_classes(case):
    for (name, frame), threshold in product(case.moved(), THRESHOLDS):
        statistic = f"{name} of K_II - of K_I"
        yield from case.gap_parts(query_gaps(frame, "self"), name, statistic, threshold, True)


# --- section 3.3: CAS -----------------------------------------------------------------------------


def _edits_by_set(case, name, compared):
    """Edits of one class's facts, one kind of set against another."""
    edits = case.edits("cas_edits")
    for op, (measure, *levels), threshold in product(PAPER_OP, compared, THRESHOLDS):
        part = edits[(edits[f"class_{threshold}"] == name) & edits["neurons"].isin(levels)]
        yield case.edit_part(part, op, measure, "neurons", levels, threshold)


@claim(12, "07", "for K_II, CAS beats local on Gen, global on Loc and perplexity, and both on Avg")
def _cas(case):
    compared = (
        ("gen", "cas", "local"),
        ("loc", "cas", "global"),
        ("dppl", "global", "cas"),
        ("broken", "global", "cas"),
        ("avg", "cas", "local"),
        ("avg", "cas", "global"),
    )
    return _edits_by_set(case, "II", compared)


@claim(
    13,
    "07",
    f"for K_I, CAS is comparable to local and global (here: Avg within {MARGIN:g})",
    within=MARGIN,
)
def _comparable(case):
    return _edits_by_set(case, "I", (("avg", "cas", "local"), ("avg", "cas", "global")))


# --- the scoreboard -------------------------------------------------------------------------------


def scoreboard(
    get, models, methods, downstream, *, notebook=None, t=0.2, static=0.1, seed=0
) -> pd.DataFrame:
    """A row a claim, part, model, method and threshold.

    get(model, method, name): a saved frame, or raises `Missing`. `methods` localise (claims 1-3),
    `downstream` those of claims 4-13. models: smallest first, as claim 3 compares neighbours in
    this order. notebook: only the claims that its results decide."""
    rows = []
    for number, one in CLAIMS.items():
        if notebook not in (None, one.notebook):
            continue
        able = methods if one.notebook == LOCALISED else downstream
        for method, (before, model) in product(able, zip([None, *models], models)):
            here = dict(claim=number, text=one.text, model=paths.label(model), method=method)
            try:
                case = Case(get, model, method, before, t, static, seed)
                rows += [here | _row(one, part) for part in one.parts(case)]
            except Missing as missing:
                rows.append(here | NOTHING | dict(verdict=OPEN, why=str(missing)))
    return pd.DataFrame(rows)


NOTHING = dict(part="", threshold="", queries="", statistic="") | dict(
    value=np.nan, value_low=np.nan, value_high=np.nan, n_facts=0, n_facts_other=np.nan
)


def _row(claim: Claim, part: Part) -> dict:
    found = part.found.row(part.measure, "value")
    facts = {"n_facts_other": np.nan} | part.found.facts()
    why, few = part.why, too_few(facts)
    if np.isnan(found["value"]):
        empty = (
            f": a class is empty by the {part.threshold} threshold, or nothing in it has a value"
        )
        why = f"nothing to compare{empty if part.threshold else ', as no value is defined'} ({few})"
    elif np.isnan(found["value_low"]):
        why = why or few
    return dict(
        part=part.name,
        threshold=part.threshold,
        queries=part.queries,
        statistic=part.statistic,
        **{name: found[name] for name in ("value", "value_low", "value_high")},
        n_facts=facts["n_facts"],
        n_facts_other=facts["n_facts_other"],
        verdict=OPEN if why else _verdict(claim, found["value_low"], found["value_high"]),
        why=why,
    )


def _verdict(claim: Claim, low, high) -> str:
    """What an interval says of a claim."""
    if claim.within is not None:
        holds = -claim.within < low and high < claim.within
        fails = low >= claim.within or high <= -claim.within
    else:
        holds, fails = low > claim.above, high < claim.above
    opposite = OPPOSITE if claim.within is None and claim.above == 0 else FAILS
    return HOLDS if holds else opposite if fails else UNTOLD


def deciding(board: pd.DataFrame) -> pd.DataFrame:
    """The parts that decide: not those over known queries, which stand beside."""
    return board[board["queries"] != COUNTED[1]]


def overall(board: pd.DataFrame) -> pd.DataFrame:
    """A row a claim, method and model: `mark`, one word of MARKS; `verdict`, the same with how many
    of its parts that could be tested hold; `known`: that of the parts over known queries, which
    decide nothing; "" where a claim has none."""
    rows, names = [], ["claim", "text", "method", "model"]
    for keys, part in board.groupby(names, sort=False):
        first, beside = deciding(part), part[part["queries"] == COUNTED[1]]
        known = _together(beside) if len(beside) else ""
        row = dict(mark=_mark(first), verdict=_together(first), known=known)
        rows.append(dict(zip(names, keys)) | row)
    return pd.DataFrame(rows)


def _mark(part) -> str:
    """One word of MARKS for several parts of a claim."""
    tested = part.loc[part["verdict"] != OPEN, "verdict"]
    if tested.empty:
        return UNTOLD if part["statistic"].any() else NOT_RUN
    if tested.nunique() == 1:
        return tested.iloc[0]
    if not (tested == HOLDS).any():
        return FAILS
    return MIXED if tested.isin([FAILS, OPPOSITE]).any() else PARTLY


def _together(part) -> str:
    """That word, and how many parts it rests on: "holds in part (2 of 4, 2 undecided)"."""
    counts, word = part["verdict"].value_counts(), _mark(part)
    tested = len(part) - counts.get(OPEN, 0)
    if not tested:
        return f"{OPEN}: {part['why'].iloc[0]}"
    text = f"{counts.get(HOLDS if word in (PARTLY, MIXED, FAILS) else word, 0)} of {tested}"
    for verdict, name in ((OPPOSITE, "the opposite"), (UNTOLD, "undecided"), (OPEN, "untestable")):
        if verdict in counts and verdict != word:
            text += f", {counts[verdict]} {name}"
    return f"{word} ({text})"


def judge(study, notebook, methods=None, *, t=0.2, static=0.1) -> HTML:
    """The verdicts on the claims that a notebook's saved results decide, for its model, and folded
    below their parts."""

    def get(model, method, name):
        try:
            return study.load(name, method)
        except ValueError as error:
            raise Missing(str(error)) from None

    methods, options = methods or [study.method], dict(t=t, static=static, seed=study.seed)
    board = scoreboard(get, [study.model], methods, methods, notebook=notebook, **options)
    verdicts = shown(overall(board).drop(columns=["model", "mark"]))
    parts = folded("Every part", board.drop(columns=["text", "model"]), digits=3)
    return HTML("\n".join([verdicts.data, parts.data]))


# --- the matrix -----------------------------------------------------------------------------------


def show_matrix(board: pd.DataFrame) -> HTML:
    """The matrix, its legend, and every part of every claim, folded."""
    details = [
        folded(f"({number}) {CLAIMS[number].text}", part.drop(columns=["claim", "text"])).data
        for number, part in board.groupby("claim", sort=False)
    ]
    return HTML("\n".join([f"<p>{LEGEND}</p>", matrix(board), *details]))


def matrix(board: pd.DataFrame) -> str:
    """HTML of a table with the claims as rows and models and methods as columns: a mark in each
    cell, on hover its verdict and the statistics behind it. The colours stand in the table itself,
    so that a notebook shows them, too."""
    names, cells = ["model", "method"], overall(board)
    cells["mark"] = cells["mark"].map(MARKS)
    cells["cell"] = [
        f'<span title="{html.escape(_hover(board, row))}">{row.mark}{_held(row.verdict)}</span>'
        for row in cells.itertuples()
    ]
    columns = pd.MultiIndex.from_product([board[name].unique() for name in names])
    wide = cells.pivot(index="claim", columns=names)
    wide.index = [f"{number}. {html.escape(CLAIMS[number].text)}" for number in wide.index]
    marks, cells = (wide[name].reindex(columns=columns).fillna("–") for name in ("mark", "cell"))
    styler = cells.style.format_index(html.escape, axis=1).set_table_styles(STYLE)
    styler.apply(lambda _: marks.map(lambda mark: f"background-color: {COLOURS[mark]}"), axis=None)
    return styler.set_uuid("claims").to_html()


def _held(verdict) -> str:
    """ "2/4" of a verdict "holds in part (2 of 4, 1 undecided)": of the parts that can be tested,
    those that hold; "" where none can."""
    found = re.search(r"\((\d+) of (\d+)", verdict)
    if not found:
        return ""
    held = 0 if verdict.startswith((UNTOLD, OPPOSITE)) else found[1]
    return f" <small>{held}/{found[2]}</small>"


def _hover(board, cell) -> str:
    """A verdict and, a line each, the parts that decide it."""
    same = [board[name] == getattr(cell, name) for name in ("claim", "model", "method")]
    parts, lines = deciding(board[np.logical_and.reduce(same)]), [cell.verdict]
    for row in parts[parts["statistic"] != ""].to_dict("records"):
        told = format_value(row["value"], row["value_low"], row["value_high"])
        what = " ".join(filter(None, [row["part"], row["threshold"], row["statistic"]]))
        lines.append(f"{what} {told} (n = {n_facts(row)})")
    return "\n".join(lines)


def n_facts(row) -> str:
    """The facts of a row of the scoreboard, on both sides of a difference: "90 and 30"."""
    sides = [row["n_facts"], row.get("n_facts_other")]
    return " and ".join(f"{count:.0f}" for count in sides if not pd.isna(count))
