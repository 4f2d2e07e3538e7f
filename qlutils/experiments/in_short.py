"""What the report opens with: ten topics, each told of each model in a few plain sentences that are
computed from a run's saved results. The sentences stand in `in_short.jinja`.

Every statistic stands with its 95 % interval, and n where it is not that of all facts, so that the
sentences are true of any model; what is missing, undefined or rests on too few facts "cannot be
told". They are about the first method by which neurons were changed; the claims' matrix has all.
"""

import re
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from IPython.display import HTML

from qlutils import paths
from qlutils.experiments.claims import (
    CLAIMS,
    MARKS,
    UNTOLD,
    Case,
    deciding,
    overall,
    synapse_rates,
)
from qlutils.experiments.consistency import otsu_null, second_by_relation, share_of_class
from qlutils.experiments.controls import NULLS, answered_and_not, null_consistency
from qlutils.experiments.edit_tables import PAPER_OP
from qlutils.experiments.effects import query_gaps
from qlutils.experiments.report import NOTEBOOKS, SavedResults
from qlutils.show.page import template
from qlutils.show.stats import LEAST
from qlutils.show.tables import counted, format_value
from qlutils.study.results import Missing

EDITED = {  # {(neurons, control): whose value vectors were edited}
    ("local", "none"): "one wording's %s KNs",
    ("local", "random"): "%s random neurons",
}


count = partial(format_value, digits=0)  # a mean number of neurons


@dataclass(kw_only=True)
class Reading(Case):
    """A model and method of the report: `board`, its rows of the scoreboard."""

    saved: SavedResults
    board: pd.DataFrame

    # -- statistics in words -----------------------------------------------------------------------
    def told(self, row, words):
        """`words` of a value and its interval, with n facts where they are not all of the run."""
        found = [row[name] for name in ("value", "value_low", "value_high")]
        text = UNTOLD if np.isnan(found).any() else words(*found)
        n = counted(row, "n_facts")
        every = self.frame("queries")["fact"].nunique()
        return text if n in (f"{every}", f"{every} and {every}") else f"{text} (n = {n})"

    def say(self, found, words, measure="mean"):
        """The same of an estimate."""
        return self.told(found.row(measure, "value") | found.facts(), words)

    def value(self, frame, column):
        return self.say(self.mean(frame, column), format_value)

    def percent(self, frame, column, measure="mean"):
        return self.say(self.mean(frame, column, share=measure == "mean"), percent, measure)

    def share(self, facts, threshold, among=None):
        """The share of K_II."""
        found = share_of_class(
            facts,
            threshold,
            seed=self.seed,
            among=among,
        )
        return self.say(found, percent)

    def gap(self, frame, one, other, way="average"):
        """How much more a set moves P(answer) than another."""
        return self.say(self.mean(query_gaps(frame, one, [other], way), "gap"), more, "trimmed")

    def change(self, frame, name, way):
        """By how much a set changes P(answer): up is the direction expected of enhancing."""
        gaps = query_gaps(frame, name, direction=way)
        if way == "suppress":
            gaps["gap"] *= -1
        return self.say(self.mean(gaps, "gap"), percent, "trimmed")

    # -- what they are about -----------------------------------------------------------------------
    def data(self, path):
        folder = Path(path)
        return folder.parent.name if folder.name == "data" else folder.name

    def ran(self, number, **given):
        """The methods for which a notebook was run with the model, and with `given` parameters."""
        entries, _ = self.saved.read_all(number, self.saved.entry)
        return [
            method
            for (model, method), entry in entries.items()
            if model == self.model and given.items() <= entry["parameters"].items()
        ]

    def runs(self, number):
        """Whether a notebook was run by this reading's method; 02 is of all methods."""
        return bool({self.method, None} & set(self.ran(number)))

    def inside(self):
        """In which share of the facts the answer stands in the subject."""
        facts = self.frame("queries").drop_duplicates("fact")
        pairs = zip(facts["object"], facts["subject"])
        return np.mean([answer.casefold() in subject.casefold() for answer, subject in pairs])

    def groups(self):
        """{kind of NULLS: CS2}"""
        groups = null_consistency(self.frame("queries"), t=self.t, seed=self.seed)
        return {kind: self.value(groups[groups["kind"] == kind], "cs2") for kind in NULLS}

    def noise(self, facts):
        """How much of noise Otsu's threshold makes K_II."""
        found = otsu_null(facts, seed=self.seed)
        if np.isnan(found["R_II"]):
            return UNTOLD
        return f"{hundred(found['R_II_low'])} % to {hundred(found['R_II_high'])} %"

    def three(self, facts):
        """With `three`: whether a fact is in K_II by three of its wordings."""
        cs2 = facts["cs2_3"]
        return facts.assign(three=(cs2 <= self.static).astype(float).where(cs2.notna()))

    def split(self):
        """The parts of the claim that the classes differ."""
        rows = self.board[self.board["claim"] == 2].to_dict("records")
        if not rows[0]["statistic"]:
            raise Missing(rows[0]["why"])
        return [self.told(row, more) for row in rows]

    def edited(self):
        """What was edited how, how many neurons, and the edits; controls only where there are."""
        edits = self.frame("edits")
        edits = edits[edits["note"].isna()].assign(lost=1 - edits["loc"])
        for op, ((neurons, control), whose) in product(PAPER_OP, EDITED.items()):
            kind = (edits["neurons"] == neurons) & (edits["control"] == control)
            part = edits[kind & (edits["op"] == op)]
            if len(part) or control == "none":
                name = f"{PAPER_OP[op].capitalize()} of {whose}"
                yield name, count(part["n_neurons"].mean()), part

    def marks(self):
        """{mark: claims}"""
        claims = overall(self.board).groupby("mark")["claim"].agg(list)
        return {mark: claims[mark] for mark in MARKS if mark in claims}

    def more_facts(self):
        """Claims of which nothing can be told: {claim: facts that would tell}, and others."""
        facts = self.facts()["cs2"].count()
        needs = {}
        never = []
        for number in self.marks().get(UNTOLD, ()):
            parts = deciding(self.board[self.board["claim"] == number]).to_dict("records")
            times = min(times_the_facts(CLAIMS[number], row) for row in parts)
            if times < np.inf:
                needs[number] = max(facts + 1, float(f"{times * facts:.2g}"))
            else:
                never.append(number)
        return needs, never


def percent(value, low, high):
    """A share and its interval: "31 % [25, 38]"."""
    return f"{hundred(value)} % [{hundred(low)}, {hundred(high)}]"


def hundred(share):
    """A share in percent, with a decimal within one of 0 or 100: 0.4, 99.6."""
    digits = abs(share - round(share)) < 0.0095
    return f"{100 * share:z.{digits:d}f}".removesuffix(".0")


def more(value, low, high):
    """A difference: "0.31 [0.25, 0.38] more"."""
    if low <= 0 <= high:
        return f"{UNTOLD} ({format_value(value, low, high)})"
    if low > 0:
        return f"{format_value(value, low, high)} more"
    return f"{format_value(-value, -high, -low)} less"


def times_the_facts(claim, row):
    """By how much the facts must be multiplied to tell a part of a claim, if its value stays: an
    interval narrows with the root of n, and each side needs `stats.LEAST` facts. Infinite where
    more facts would not do."""
    value = row["value"]
    low = row["value_low"]
    high = row["value_high"]
    if row["verdict"] == UNTOLD:
        distance = min(abs(value - claim.low), abs(value - claim.high))
        return (max(value - low, high - value) / distance) ** 2 if distance else np.inf
    side = np.nanmin([row["n_facts"], row["n_facts_other"]])
    return LEAST / side if 0 < side < LEAST else np.inf


# --- the sentences --------------------------------------------------------------------------------


_PAGE = template("experiments/in_short.html")
_TEXT = paths.packaged("experiments/in_short.jinja")
_NAMES = dict(
    answered_and_not=answered_and_not,
    count=count,
    hundred=hundred,
    least=LEAST,
    more=more,
    notebooks=NOTEBOOKS,
    operations=PAPER_OP,
    second_by_relation=second_by_relation,
    synapse_rates=synapse_rates,
)
TOPICS = dict(re.findall(r"(?ms)^## (.*?)\n(.*?)(?=^##|\Z)", _TEXT))


def in_short(saved, board, **options):
    """topic, model, sentence: a row a sentence, ten topics of each model of which anything was
    run. options: t, static and seed of a `Case`."""
    method = (saved.downstream or saved.methods)[0]
    rows = []
    board = board[board["method"] == method]
    ran = set(board.loc[board["statistic"] != "", "model"])
    models = [model for model in saved.models if paths.label(model) in ran] or saved.models
    for (topic, text), model in product(TOPICS.items(), models):
        label = paths.label(model)
        own = board[board["model"] == label]
        one = Reading(
            saved.frame,
            model,
            method,
            saved=saved,
            board=own,
            **options,
        )
        told = "\n\n".join(_told(part, one) for part in text.split("---"))
        for sentence in filter(str.strip, re.split(r"\n\s*\n", told)):
            rows.append(dict(topic=topic, model=label, sentence=" ".join(sentence.split())))
    return pd.DataFrame(rows)


def _told(text, one):
    try:
        return jinja2.Template(text, trim_blocks=True).render(one=one, **_NAMES)
    except Missing as missing:
        return f"{UNTOLD.capitalize()}: {missing}."


def show(table):
    """The sentences as a list of topics, of several models each in a paragraph of its own."""
    several = table["model"].nunique() > 1
    return HTML(_PAGE.render(rows=table.to_dict("records"), several=several))
