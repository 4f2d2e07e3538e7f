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
    second_class,
    share_of_class,
)
from qlutils.experiments.controls import split_frames
from qlutils.experiments.edit_tables import PAPER_OP
from qlutils.experiments.effects import COUNTED, DIRECTIONS, POPULATIONS, query_gaps, rates
from qlutils.show.page import folded, missing_html, table_html
from qlutils.show.stats import LEAST, Estimate, bootstrap_difference, bootstrap_mean
from qlutils.show.tables import display_table, too_few

HOLDS, FAILS, OPPOSITE = "holds", "does not hold", "the opposite holds"
UNTOLD, OPEN = "cannot be told", "not testable here"
COMMON, HIGH, MARGIN = 0.25, 0.5, 0.1
LOCALISED = "02"  # the notebook whose claims every method decides
NEIGHBOURS = ("union", "intersection", "refine")
NAMES = {
    "rel": "Rel",
    "gen": "Gen",
    "loc": "Loc",
    "avg": "Avg",
    "dppl": "median dPPL",
    "cas": "CAS",
    "broken": "share of broken texts",
}
# How the claims about changes count; the known queries stand beside.
QUERIES = "of all queries, trimmed mean"


class Missing(Exception):
    """A result that a claim needs is not there; the message says which and why."""


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

    def frame(self, name) -> pd.DataFrame:
        return self.get(self.model, self.method, name)

    def facts(self, model=None) -> pd.DataFrame:
        return classified_facts(
            self.get(model or self.model, self.method, "queries"), self.t, self.static
        )

    def edits(self, name) -> pd.DataFrame:
        """A notebook's edits of knowledge neurons (not its controls), with the facts' classes."""
        frame = self.frame(name)
        if "broken" not in frame:
            raise Missing(
                "its edits were made by an earlier version, which did not count broken texts: "
                "run it again"
            )
        frame = frame[(frame["control"] == "none") & frame["note"].isna()]
        return frame.merge(
            self.facts()[["fact", "class_static", "class_otsu"]], on="fact", how="left"
        )

    def moved(self):
        """(name, rates) of what scaling synapses moves: signed as in the paper, and in size, since
        signs can cancel."""
        frame = self.frame("knowledge_synapses")
        for name, quantity in (("dValue", "value"), ("dProb", "probability")):
            part = frame[(frame["quantity"] == quantity) & ~frame["renormalise"].astype(bool)]
            yield name, part
            yield (
                f"|{name}|",
                rates(
                    part[part["direction"] != "average"].drop(columns="rate"), quantity, size=True
                ),
            )

    def neighbour_gaps(self):
        """As the paper counts, empty sets changing nothing; without the Intersection, which is
        nearly empty; and Union with both sets cut to one size."""
        frame = self.frame("query_kn_mapping")
        yield "mean of all three", query_gaps(frame, "self", NEIGHBOURS)
        yield "Union alone", query_gaps(frame, "self", ("union",))
        yield "Refine alone", query_gaps(frame, "self", ("refine",))
        yield "Union, sizes matched", query_gaps(frame, "self_as_union", ("union_matched",))

    def mean(self, frame, value) -> Estimate:
        return bootstrap_mean(frame, value, seed=self.seed)

    def apart(self, frame, value, by, levels=("II", "I"), share=False) -> Estimate:
        return bootstrap_difference(frame, value, by, levels, seed=self.seed, share=share)

    def counted(self, gaps, name, statistic, threshold, estimate):
        """Parts about `query_gaps`, one for the queries that decide and one for those beside:
        `estimate` of their rows."""
        for queries in COUNTED:
            found = estimate(POPULATIONS[queries](gaps))
            yield Part(name, statistic, threshold, found, measure="trimmed", queries=queries)

    def edited(self, part, name, measure, sides, by, levels, threshold):
        """The part about a measure of edits; dPPL, which a few broken texts decide, by its
        median."""
        found = self.apart(part, measure, by, levels, share=measure != "dppl")
        why = _idle(part)
        if measure == "broken" and not part["broken"].fillna(0).any():
            why = why or "no edit breaks a text"
        return Part(
            f"{name}, {NAMES[measure]}",
            f"{NAMES[measure]} of {sides[0]} - of {sides[1]}",
            threshold,
            found,
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
    for threshold in THRESHOLDS:
        yield Part(
            "", "share of K_II", threshold, share_of_class(case.facts(), threshold, seed=case.seed)
        )


@claim(2, "02", "the classes' CS differ (classes from one half of the queries, CS2 from the other)")
def _differ(case):
    for threshold, _, _, frame in split_frames(
        case.frame("queries"), t=case.t, static=case.static, seed=case.seed
    ):
        found = case.apart(frame, "value", "label", ("I", "II"))
        yield Part("all facts", "CS2 of K_I - CS2 of K_II", threshold, found)
        frame = frame[frame["label"].notna() & frame["value"].notna()]
        both = frame[frame.groupby("relation")["label"].transform("nunique") == 2]
        both = both.assign(
            value=both["value"] - both.groupby("relation")["value"].transform("mean")
        )
        # relations are resampled, not facts: less its mean, one of two facts is the other's
        # negative
        resampled = both.assign(fact=both["relation"], relation="all")
        within = bootstrap_difference(resampled, "value", "label", ("I", "II"), seed=case.seed)
        relations = both["relation"].nunique()
        why = (
            f"{relations} relations have facts of both classes; an interval over relations "
            f"needs {LEAST}"
        )
        one, two = (int((both["label"] == name).sum()) for name in CLASSES)
        yield Part(
            "within relations",
            "CS2 of K_I - CS2 of K_II, less each relation's mean",
            threshold,
            replace(within, n_clusters=one, n_clusters_other=two),
            why if relations < LEAST else "",
        )


@claim(3, "02", "larger models (later in the list) have more K_II and lower CS")
def _size(case):
    if case.before is None:
        raise Missing("it needs a smaller model, earlier in the list, to compare with")
    both = pd.concat(
        [case.facts(model).assign(model=model) for model in (case.before, case.model)],
        ignore_index=True,
    )
    second, shares = (
        both.assign(second=second_class(both, "static")),
        f"share of K_II less that of {case.before}",
    )
    found = case.apart(second, "second", "model", (case.model, case.before), share=True)
    yield Part("more K_II", shares, "static", found)
    yield Part(
        "more K_II",
        shares,
        "otsu",
        difference_of_shares(case.facts(), case.facts(case.before), case.seed),
    )
    found = case.apart(both, "cs2", "model", (case.before, case.model))
    yield Part("lower CS", f"CS2 of {paths.label(case.before)} less CS2", "", found)


@claim(4, "03", "local edits of K_II generalise less than those of K_I, and their Avg is lower")
def _local(case):
    edits = case.edits("edits")
    for op, measure, threshold in product(PAPER_OP, ("gen", "avg"), THRESHOLDS):
        part = edits[(edits["op"] == op) & (edits["neurons"] == "local")]
        yield case.edited(
            part,
            PAPER_OP[op],
            measure,
            ("K_I", "K_II"),
            f"class_{threshold}",
            ("I", "II"),
            threshold,
        )


@claim(
    5,
    "03",
    "global edits of K_II raise perplexity more than those of K_I (by its median, and in broken "
    "texts)",
)
def _global(case):
    edits = case.edits("edits")
    for op, measure, threshold in product(PAPER_OP, ("dppl", "broken"), THRESHOLDS):
        part = edits[(edits["op"] == op) & (edits["neurons"] == "global")]
        yield case.edited(
            part,
            PAPER_OP[op],
            measure,
            ("K_II", "K_I"),
            f"class_{threshold}",
            ("II", "I"),
            threshold,
        )


def _idle(edits) -> str:
    """Why edits prove nothing that are all without effect: sets of neurons that do nothing are
    alike."""
    return (
        "no edit changes its own query's answer (Rel is 0)"
        if len(edits) and not edits["rel"].fillna(0).any()
        else ""
    )


# --- section 3: expression ------------------------------------------------------------------------


@claim(6, "04", f"a query's own KNs matter, in both classes (more than random neurons; {QUERIES})")
def _own(case):
    for way in DIRECTIONS[:2]:
        gaps = query_gaps(case.frame("query_kn_mapping"), "self", ("self_random",), way)
        for name, threshold in product(CLASSES, THRESHOLDS):
            part = gaps[gaps[f"class_{threshold}"] == name]
            yield from case.counted(
                part,
                f"K_{name}, {way}",
                "dProb of own KNs - of random neurons",
                threshold,
                lambda rows: case.mean(rows, "gap"),
            )


@claim(7, "04", f"for K_II the neighbours' KNs matter less than the query's own ({QUERIES})")
def _neighbours(case):
    for (kind, gaps), threshold in product(case.neighbour_gaps(), THRESHOLDS):
        part = gaps[gaps[f"class_{threshold}"] == "II"]
        yield from case.counted(
            part,
            kind,
            "dProb of own - of neighbours' KNs, K_II",
            threshold,
            lambda rows: case.mean(rows, "gap"),
        )


@claim(8, "04", f"this gap is smaller for K_I ({QUERIES})")
def _less(case):
    for (kind, gaps), threshold in product(case.neighbour_gaps(), THRESHOLDS):
        label = f"class_{threshold}"
        yield from case.counted(
            gaps,
            kind,
            "the gap of K_II - the gap of K_I",
            threshold,
            lambda rows, label=label: case.apart(rows, "gap", label),
        )


@claim(9, "05", f"predominance is high (here: above {HIGH:g})", above=HIGH)
def _predominance(case):
    facts = case.frame("attention_predominance")
    given = (facts["same_first"] == 1).all() and (facts["first"] == 1).all()
    why = (
        "1 by construction: all prompts begin with the same token, and it always wins"
        if given
        else ""
    )
    yield Part("all tokens", "mean predominance", "", case.mean(facts, "predominance"), why)
    yield Part(
        "without the first token", "mean predominance", "", case.mean(facts, "predominance_rest")
    )


@claim(
    10,
    "06",
    "scaling a query's synapses moves KNs and P(answer) more than scaling an irrelevant query's "
    f"({QUERIES})",
)
def _synapses(case):
    for (name, frame), way in product(case.moved(), DIRECTIONS[:2]):
        gaps = query_gaps(frame, "self", ("irrelevant",), way)
        yield from case.counted(
            gaps,
            f"{name}, {way}",
            f"{name} of S - of S_ir",
            "",
            lambda rows: case.mean(rows, "gap"),
        )


@claim(11, "06", f"it moves them more for K_II ({QUERIES})")
def _synapse_classes(case):
    for (name, frame), threshold in product(case.moved(), THRESHOLDS):
        gaps, label = query_gaps(frame, "self"), f"class_{threshold}"
        yield from case.counted(
            gaps,
            name,
            f"{name} of K_II - of K_I",
            threshold,
            lambda rows, label=label: case.apart(rows, "gap", label),
        )


# --- section 3.3: CAS -----------------------------------------------------------------------------


@claim(12, "07", "for K_II, CAS beats local on Gen, global on Loc and perplexity, and both on Avg")
def _cas(case):
    edits = case.edits("cas_edits")
    compared = (
        ("gen", "cas", "local"),
        ("loc", "cas", "global"),
        ("dppl", "global", "cas"),
        ("broken", "global", "cas"),
        ("avg", "cas", "local"),
        ("avg", "cas", "global"),
    )
    for op, (measure, *levels), threshold in product(PAPER_OP, compared, THRESHOLDS):
        part = edits[
            (edits["op"] == op)
            & (edits[f"class_{threshold}"] == "II")
            & edits["neurons"].isin(levels)
        ]
        sides = [NAMES.get(name, name) for name in levels]
        yield case.edited(part, PAPER_OP[op], measure, sides, "neurons", levels, threshold)


@claim(
    13,
    "07",
    f"for K_I, CAS is comparable to local and global (here: Avg within {MARGIN:g})",
    within=MARGIN,
)
def _comparable(case):
    edits = case.edits("cas_edits")
    for op, other, threshold in product(PAPER_OP, ("local", "global"), THRESHOLDS):
        part = edits[
            (edits["op"] == op)
            & (edits[f"class_{threshold}"] == "I")
            & edits["neurons"].isin(["cas", other])
        ]
        yield case.edited(
            part,
            f"{PAPER_OP[op]}, {other}",
            "avg",
            ("CAS", other),
            "neurons",
            ("cas", other),
            threshold,
        )


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
        for method, (before, model) in product(
            methods if one.notebook == LOCALISED else downstream, zip([None, *models], models)
        ):
            here = dict(claim=number, text=one.text, model=paths.label(model), method=method)
            try:
                case = Case(get, model, method, before, t, static, seed)
                rows += [here | _row(one, part) for part in one.parts(case)]
            except Missing as missing:
                rows.append(
                    here
                    | dict(
                        part="",
                        threshold="",
                        queries="",
                        statistic="",
                        value=np.nan,
                        value_low=np.nan,
                        value_high=np.nan,
                        n_facts=0,
                        n_facts_other=np.nan,
                        verdict=OPEN,
                        why=str(missing),
                    )
                )
    return pd.DataFrame(rows)


def _row(claim: Claim, part: Part) -> dict:
    found = part.found.row(part.measure, "value")
    value, low, high = (found[f"value{end}"] for end in ("", "_low", "_high"))
    facts = {"n_facts_other": np.nan} | part.found.facts()
    why = part.why
    if np.isnan(value):
        why = (
            "nothing to compare"
            + (
                f": a class is empty by the {part.threshold} threshold, or nothing in it has a "
                f"value"
                if part.threshold
                else ", as no value is defined"
            )
            + f" ({too_few(facts)})"
        )
    elif np.isnan(low):
        why = why or too_few(facts)
    if claim.within is None:
        holds, fails = low > claim.above, high < claim.above
    else:
        holds, fails = (
            -claim.within < low and high < claim.within,
            low >= claim.within or high <= -claim.within,
        )
    opposite = OPPOSITE if claim.within is None and claim.above == 0 else FAILS
    verdict = OPEN if why else HOLDS if holds else opposite if fails else UNTOLD
    return dict(
        part=part.name,
        threshold=part.threshold,
        queries=part.queries,
        statistic=part.statistic,
        value=value,
        value_low=low,
        value_high=high,
        n_facts=facts["n_facts"],
        n_facts_other=facts["n_facts_other"],
        verdict=verdict,
        why=why,
    )


def overall(board: pd.DataFrame) -> pd.DataFrame:
    """One verdict a claim, model and method: of its parts that could be tested, do all, some or
    none hold? `known`: the same of the parts over known queries, which decide nothing; "" where a
    claim has none."""
    rows = []
    for keys, part in board.groupby(["claim", "text", "method", "model"], sort=False):
        beside = part["queries"] == COUNTED[1]
        rows.append(
            dict(zip(("claim", "text", "method", "model"), keys))
            | dict(
                verdict=_together(part[~beside]),
                known=_together(part[beside]) if beside.any() else "",
            )
        )
    return pd.DataFrame(rows)


def _together(part) -> str:
    """One verdict of several parts of a claim."""
    tested, held = int((part["verdict"] != OPEN).sum()), int((part["verdict"] == HOLDS).sum())
    reverse, untold = (int((part["verdict"] == one).sum()) for one in (OPPOSITE, UNTOLD))
    alike = {HOLDS: held, OPPOSITE: reverse, UNTOLD: untold}
    word = next(
        (one for one, count in alike.items() if count == tested), "holds in part" if held else FAILS
    )
    held = alike.get(word, held)
    rest = f", {reverse} the opposite" if reverse and word != OPPOSITE else ""
    rest += f", {untold} undecided" if untold and word != UNTOLD else ""
    rest += f", {len(part) - tested} untestable" if tested < len(part) else ""
    return f"{word} ({held} of {tested}{rest})" if tested else f"{OPEN}: {part['why'].iloc[0]}"


def tell(study, notebook, methods=None, *, t=0.2, static=0.1) -> HTML:
    """Print the verdicts on the claims that a notebook's saved results decide, for its model;
    returns their parts."""

    def get(model, method, name):
        try:
            return study.load(name, method)
        except ValueError as error:
            raise Missing(str(error)) from None

    methods = methods or [study.method]
    board = scoreboard(
        get, [study.model], methods, methods, notebook=notebook, t=t, static=static, seed=study.seed
    )
    for row in overall(board).itertuples():
        print(
            f"({row.claim}) {row.text}{f', {row.method}' if len(methods) > 1 else ''}:\n    "
            f"{row.verdict}" + (f"\n    known queries alone: {row.known}" if row.known else "")
        )
    parts = board.drop(columns=["text", "model"] + ["method"] * (len(methods) == 1))
    return HTML(table_html(display_table(parts, 3), tint=_tint))


def show_scoreboard(board: pd.DataFrame) -> HTML:
    """The claims as rows, models (and methods) as columns, verdicts as words on a tint, in a table
    for those that every method decides and one for those of the downstream methods; every part of
    every claim, folded, below. Models and methods without a single result are named once."""
    ran, shown = (
        board.groupby(["model", "method"], sort=False)["statistic"].transform(
            lambda names: (names != "").any()
        ),
        [],
    )
    for localised, what in ((True, "about where neurons are"), (False, "about what they do")):
        numbers = [
            number for number, one in CLAIMS.items() if (one.notebook == LOCALISED) == localised
        ]
        part = board[ran & board["claim"].isin(numbers)]
        table = pd.DataFrame(
            {
                "claim": numbers,
                f"what the paper claims {what}": [CLAIMS[one].text for one in numbers],
            }
        )
        several = part["method"].nunique() > 1
        for (model, method), one in (
            overall(part).groupby(["model", "method"], sort=False) if len(part) else ()
        ):
            verdicts = table["claim"].map(one.set_index("claim")["verdict"]).fillna("–")
            table[f"{model} · {method}" if several else model] = verdicts
        shown.append(table_html(table, tint=_tint))
    absent = board[~ran].groupby("model", sort=False)["method"].unique()
    details = [
        folded(f"({number}) {CLAIMS[number].text}", part.drop(columns=["claim", "text"])).data
        for number, part in board[ran].groupby("claim", sort=False)
    ]
    not_run = missing_html([f"{model} ({', '.join(names)})" for model, names in absent.items()])
    return HTML("\n".join([*shown, not_run, *details]))


def _tint(text) -> str:
    """The class of a cell with a verdict, for its colour."""
    starts = {
        f"{HOLDS} (": "holds",
        "holds in part": "part",
        FAILS: "not",
        OPPOSITE: "not",
        UNTOLD: "open",
        OPEN: "open",
        "–": "open",
    }
    return (
        "holds"
        if text == HOLDS
        else next((name for start, name in starts.items() if str(text).startswith(start)), "")
    )
