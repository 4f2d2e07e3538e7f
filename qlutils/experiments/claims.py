"""The paper's claims, each decided by one statistic of a run's saved results and its 95 % interval
over facts.

`claims.json` lists them: the text, the notebook whose results decide it, and which method of `Case`
gives its parts. A part is a mean, or a difference of two, that is claimed to lie above a bound. It
*holds* where the interval lies above it, *does not hold* where it lies below (*the opposite holds*
where the bound is 0), *cannot be told* where it holds the bound, and is *not testable here* where
the statistic or its interval is not defined (fewer than `stats.LEAST` facts on a side) or would say
nothing; then `why` says so. Claims 6-8, 10 and 11, about changes of P(answer), are decided by the
10 % trimmed mean over all queries, as the paper counts them; the same over the known ones stands
beside and decides nothing. Nothing is written by hand for a model, nothing needs torch.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise, product

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
from qlutils.experiments.edit_tables import MEDIANS, PAPER_OP, of_neurons, with_classes
from qlutils.experiments.effects import COUNTED, POPULATIONS, class_gap, query_gaps, rates
from qlutils.show.page import folded, shown, template
from qlutils.show.stats import LEAST, bootstrap_difference, bootstrap_mean
from qlutils.show.tables import counted, format_value, too_few
from qlutils.study.results import Missing

HOLDS = "holds"
PARTLY = "holds in part"
MIXED = "mixed"
FAILS = "does not hold"
OPPOSITE = "the opposite holds"
UNTOLD = "cannot be told"
OPEN = "not testable here"
NOT_RUN = "not run"
MARKS = {
    HOLDS: "✓",
    PARTLY: "◐",
    MIXED: "±",
    FAILS: "✗",
    OPPOSITE: "✗",
    UNTOLD: "?",
    NOT_RUN: "–",
}
QUANTITIES = {"dValue": "value", "dProb": "probability"}  # what scaling synapses moves
COLUMNS = """
claim text model method part threshold queries statistic value value_low value_high n_facts
n_facts_other verdict why""".split()
NOTHING = dict.fromkeys(("part", "threshold", "queries", "statistic"), "")
NOTHING |= dict(n_facts=0, verdict=OPEN)


def synapse_rates(frame, quantity):
    """The rows of notebook 06 about one of QUANTITIES, attention not renormalised."""
    return frame[(frame["quantity"] == quantity) & ~frame["renormalise"].astype(bool)]


@dataclass
class Claim:
    """A claim of `claims.json`: `parts`, the method of `Case` that gives them, is `given` these
    arguments; each is claimed to lie between `low` and `high`."""

    text: str
    notebook: str
    parts: str
    low: float = 0.0
    high: float = np.inf
    given: dict = field(default_factory=dict)

    def verdict(self, row):
        """What the interval of a part says."""
        if row["why"]:
            return OPEN
        if self.low < row["value_low"] and row["value_high"] < self.high:
            return HOLDS
        if self.low <= row["value_high"] and row["value_low"] <= self.high:
            return UNTOLD
        return OPPOSITE if self.low == 0 else FAILS


_LISTED = json.loads(paths.packaged("experiments/claims.json"))
CLAIMS = {int(number): Claim(**one) for number, one in _LISTED["claims"].items()}


def part(found, statistic, name="", threshold="", *, why="", measure="mean", queries=""):
    """A part of a claim as a row of the scoreboard. `measure`: that of the estimate which decides
    it; `queries`: those counted, where that is a choice; `why`: why the estimate would say
    nothing."""
    row = found.row(measure, "value") | found.facts()
    few = too_few(row)
    if np.isnan(row["value"]):
        empty = ", as no value is defined"
        if threshold:
            empty = f": a class is empty by the {threshold} threshold, or nothing in it has a value"
        why = f"nothing to compare{empty} ({few})"
    elif np.isnan(row["value_low"]):
        why = why or few
    return row | dict(
        part=name,
        threshold=threshold,
        queries=queries,
        statistic=statistic,
        why=why,
    )


@lru_cache(maxsize=8)  # minutes for all of ParaRel, and asked for by claim after claim
def _classified(get, model, method, t, static):
    return classified_facts(get(model, method, "queries"), t, static)


@dataclass
class Case:
    """The saved results of one model and method, as claims read them; `before`: the next smaller
    model, or None."""

    get: Callable  # (model, method, name) -> frame, or raises Missing
    model: str
    method: str
    before: str | None = None
    t: float = 0.2
    static: float = 0.1
    seed: int = 0

    def frame(self, name):
        return self.get(self.model, self.method, name)

    def facts(self, t=None):
        return _classified(self.get, self.model, self.method, t or self.t, self.static)

    def edits(self, name):
        """A notebook's edits of knowledge neurons (not its controls), with the facts' classes."""
        return with_classes(of_neurons(self.frame(name)), self.facts())

    def mean(self, frame, value, share=False):
        return bootstrap_mean(frame, value, self.seed, share)

    def apart(self, frame, value, by, levels, share=False):
        return bootstrap_difference(frame, value, by, levels, self.seed, share)

    def second_class(self):
        """The share of K_II."""
        facts = self.facts()
        noise = otsu_null(facts, seed=self.seed)
        for threshold in THRESHOLDS:
            found = share_of_class(facts, threshold, seed=self.seed)
            why = ""
            few = found.mean_high < CLAIMS[1].low  # fewer than claimed, whatever noise gives
            if threshold == "otsu" and not few and found.mean_low <= noise["R_II_high"]:
                made = "{R_II_low:.0%} to {R_II_high:.0%}".format(**noise)
                why = f"Otsu's threshold makes {made} of normal noise K_II"
            yield part(
                found,
                "share of K_II",
                threshold=threshold,
                why=why,
            )

    def split_half(self):
        """Classes from one half of the queries, CS2 from the other."""
        queries = self.frame("queries")
        for split in split_frames(queries, t=self.t, static=self.static, seed=self.seed):
            found = self.apart(split.frame, "value", "label", CLASSES)
            yield part(found, "CS2 of K_I - CS2 of K_II", "all facts", split.threshold)
            yield self.within_relations(split.frame, split.threshold)

    def within_relations(self, frame, threshold):
        """The same with each CS2 less its relation's mean. Relations are resampled, not facts: of
        two facts of a relation, one is then the other's negative."""
        frame = frame.dropna(subset=["label", "value"])
        both = frame[frame.groupby("relation")["label"].transform("nunique") == 2]
        centred = both["value"] - both.groupby("relation")["value"].transform("mean")
        resampled = both.assign(value=centred, fact=both["relation"], relation="all")
        found = self.apart(resampled, "value", "label", CLASSES)
        relations = both["relation"].nunique()
        why = ""
        if relations < LEAST:
            why = (
                f"{relations} relations have facts of both classes; an interval over relations "
                f"needs {LEAST}"
            )
        found = replace(found, n_clusters=found.n, n_clusters_other=found.n_other)
        return part(
            found,
            "CS2 of K_I - CS2 of K_II, less each relation's mean",
            "within relations",
            threshold,
            why=why,
        )

    def sizes(self):
        """This model and the next smaller one."""
        if self.before is None:
            raise Missing("it needs a smaller model, earlier in the list, to compare with")
        facts = self.facts()
        name = paths.label(self.before)
        try:
            smaller = replace(self, model=self.before).facts()
        except Missing as missing:
            raise Missing(f"{name}: {missing}") from None
        both = pd.concat({"larger": facts, "smaller": smaller}, names=["side"]).reset_index("side")
        both["second"] = second_class(both, "static")
        static = self.apart(
            both,
            "second",
            "side",
            ("larger", "smaller"),
            share=True,
        )
        otsu = difference_of_shares(facts, smaller, self.seed)
        cs2 = self.apart(both, "cs2", "side", ("smaller", "larger"))
        yield part(static, f"share of K_II less that of {name}", "more K_II", "static")
        yield part(otsu, f"share of K_II less that of {name}", "more K_II", "otsu")
        yield part(cs2, f"CS2 of {name} less CS2", "lower CS")

    def predominance(self):
        """Whether a fact's wordings attend to one token."""
        facts = self.frame("attention_predominance")
        why = ""
        if (facts["first"] == 1).all():
            why = "the first token always wins, so it tells how many wordings begin alike"
        every = self.mean(facts, "predominance")
        rest = self.mean(facts, "predominance_rest")
        yield part(every, "mean predominance", "all tokens", why=why)
        yield part(rest, "mean predominance", "without the first token")

    def edits_compared(self, saved, column, kept, by, compared):
        """Edits saved under a name whose `column` ("class" or "neurons") is `kept`: for each
        (measure, one, other) of `compared` the measure where `by`, the other column, is `one`, less
        that where it is `other`."""
        edits = self.edits(saved)
        for op, (measure, *levels), threshold in product(PAPER_OP, compared, THRESHOLDS):
            own = edits[edits["op"] == op].rename(columns={f"class_{threshold}": "class"})
            own = own[(own[column] == kept) & own[by].isin(levels)]
            why = ""
            broken = own["broken"].any()
            idle = own["rel"].count() >= LEAST and not own["rel"].any()
            if idle and (measure in ("gen", "avg") or not broken):  # sets that do nothing are alike
                why = "no edit does to its own query what it should (Rel is 0)"
            elif measure == "broken" and not broken:
                why = "no edit breaks a text"
            found = self.apart(
                own,
                measure,
                by,
                levels,
                share=True,
            )
            what, one, other = (_LISTED["names"][word] for word in (measure, *levels))
            told = f"{what} of {one} - of {other}"
            name = f"{PAPER_OP[op]}, {what}"
            yield part(
                found,
                told,
                name,
                threshold,
                why=why,
                measure="median" if measure in MEDIANS else "mean",
            )

    def moved(self, saved):
        """{name: rates} of what scaling KNs or synapses moves; by synapses signed as in the paper,
        and in size, since signs can cancel."""
        frame = self.frame(saved)
        if saved == "query_kn_mapping":
            return {"dProb": frame}
        found = {}
        for name, quantity in QUANTITIES.items():
            signed = synapse_rates(frame, quantity)
            changes = signed[signed["direction"] != "average"].drop(columns="rate")
            found |= {name: signed, f"|{name}|": rates(changes, quantity, size=True)}
        return found

    def gaps_compared(self, saved, name, statistic, sets, ways=("average",), classes=("",)):
        """Trimmed means of `query_gaps` of each of `sets`, {compared: (first, second)}, by
        `class_gap`; a part for the queries that decide and one for those beside."""
        thresholds = THRESHOLDS if any(classes) else ("",)
        frames = self.moved(saved).items()
        for (moved, frame), (compared, pair), way in product(frames, sets.items(), ways):
            gaps = query_gaps(frame, *pair, way)
            for which, threshold, queries in product(classes, thresholds, COUNTED):
                found = class_gap(POPULATIONS[queries](gaps), which, threshold, self.seed)
                words = dict(
                    moved=moved,
                    compared=compared,
                    way=way,
                    which=which,
                )
                told = statistic.format(**words), name.format(**words), threshold
                yield part(
                    found,
                    *told,
                    measure="trimmed",
                    queries=queries,
                )


# --- the scoreboard -------------------------------------------------------------------------------


def scoreboard(get, models, methods, downstream, *, notebook=None, **options):
    """A row a claim, part, model, method and threshold.

    get(model, method, name): a saved frame, or raises `Missing`. `methods` localise (claims 1-3),
    `downstream` those of claims 4-13. models: smallest first, as claim 3 compares neighbours in
    this order. notebook: only the claims that its results decide. options: t, static and seed of a
    `Case`."""
    rows = []
    for number, one in CLAIMS.items():
        if notebook not in (None, one.notebook):
            continue
        able = methods if one.notebook == paths.COMPARES else downstream
        for method, (before, model) in product(able, pairwise([None, *models])):
            case = Case(
                get,
                model,
                method,
                before,
                **options,
            )
            here = dict(
                claim=number,
                text=one.text,
                model=paths.label(model),
                method=method,
            )
            try:
                for row in getattr(case, one.parts)(**one.given):
                    rows.append(here | row | {"verdict": one.verdict(row)})
            except Missing as missing:
                rows.append(here | NOTHING | {"why": str(missing)})
    return pd.DataFrame(rows, columns=COLUMNS)


def deciding(board):
    """The parts that decide: not those over known queries, which stand beside."""
    return board[board["queries"] != COUNTED[1]]


def overall(board):
    """A row a claim, method and model: `mark`, one word of MARKS; `verdict`, the same with how many
    of its parts that could be tested hold; `known`: that of the parts over known queries, which
    decide nothing; "" where a claim has none."""
    rows = []
    names = ["claim", "text", "method", "model"]
    for keys, parts in board.groupby(names, sort=False):
        first = deciding(parts)
        beside = parts.drop(first.index)
        known = _together(beside) if len(beside) else ""
        rows.append((*keys, _mark(first), _together(first), known))
    return pd.DataFrame(rows, columns=[*names, "mark", "verdict", "known"])


def _mark(parts):
    """One word of MARKS for several parts of a claim."""
    verdicts = set(parts["verdict"]) - {OPEN}
    if not verdicts:
        return UNTOLD if parts["statistic"].any() else NOT_RUN
    if len(verdicts) == 1:
        return verdicts.pop()
    if HOLDS not in verdicts:
        return FAILS
    return MIXED if verdicts & {FAILS, OPPOSITE} else PARTLY


def _together(parts):
    """That word, and how many parts it rests on: "holds in part (2 of 4, 2 undecided)"."""
    counts = parts["verdict"].value_counts()
    word = _mark(parts)
    tested = len(parts) - counts.get(OPEN, 0)
    if not tested:
        return f"{OPEN}: {parts['why'].iloc[0]}"
    first = word if word in (OPPOSITE, UNTOLD) else HOLDS
    text = f"{counts.get(first, 0)} of {tested}"
    others = {OPPOSITE: "the opposite", UNTOLD: "undecided", OPEN: "untestable"}
    for verdict, name in others.items():
        if verdict in counts and verdict != word:
            text += f", {counts[verdict]} {name}"
    return f"{word} ({text})"


def judge(study, notebook, methods=None, **thresholds):
    """The verdicts on the claims that a notebook's saved results decide, for its model, and folded
    below their parts. thresholds: t and static of a `Case`."""

    methods = methods or [study.method]
    board = scoreboard(
        lambda model, method, name: study.load(name, method),
        [study.model],
        methods,
        methods,
        notebook=notebook,
        seed=study.seed,
        **thresholds,
    )
    verdicts = shown(overall(board).drop(columns=["model", "mark"]))
    parts = folded("Every part", board.drop(columns=["text", "model"]), digits=3)
    return HTML(f"{verdicts.data}\n{parts}")


# --- the matrix -----------------------------------------------------------------------------------


_MATRIX = template("experiments/claims.html")


def show_matrix(board):
    """A table with the claims as rows and models and methods as columns: a mark in each cell, on
    hover its verdict and the statistics behind it; its legend; and every part of every claim,
    folded. The colours stand in the table itself, so that a notebook shows them, too."""
    places = deciding(board).groupby(["claim", "model", "method"])
    cells = {place: _cell(parts) for place, parts in places}
    details = {
        number: folded(
            f"({number}) {CLAIMS[number].text}",
            parts.drop(columns=["claim", "text"]),
        )
        for number, parts in board.groupby("claim", sort=False)
    }
    names = {name: board[name].unique() for name in ("model", "method")}
    return HTML(_MATRIX.render(claims=CLAIMS, cells=cells, details=details, **names))


def _cell(parts):
    """Of a claim's deciding parts for one model and method: the mark, how many of the parts that
    can be tested hold, and, a line each, what decides."""
    lines = [_together(parts)]
    for row in parts[parts["statistic"] != ""].to_dict("records"):
        what = " ".join(filter(None, [row["part"], row["threshold"], row["statistic"]]))
        told = format_value(row["value"], row["value_low"], row["value_high"])
        lines.append(f"{what} {told} (n = {counted(row, 'n_facts')})")
    return {
        "mark": MARKS[_mark(parts)],
        "held": (parts["verdict"] == HOLDS).sum(),
        "tested": (parts["verdict"] != OPEN).sum(),
        "hover": "\n".join(lines),
    }
