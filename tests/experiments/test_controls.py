"""Controls on data whose answer is known beforehand: what each null group shares, what noise does,
what classes mean."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import query_row

from qlutils.experiments import controls, relocalise
from qlutils.experiments.consistency import classified_facts
from qlutils.show.stats import LEAST, welch

PATTERNS = (
    "{} lies in the land of",
    "The capital {} belongs to",
    "You will find {} in",
    "It is {}",
)


def query(fact, pattern, kns, **more):
    prompt = PATTERNS[pattern % 4].format(fact.split("|")[1])
    return query_row(fact, pattern, kns, **dict(prompt=prompt) | more)


@pytest.fixture
def pattern_and_object():
    """Each query has one neuron of its pattern and one of its object; objects recur in both
    relations' facts."""
    return pd.DataFrame(
        query(f"P{r}|s{f}|o{f % 3}", p, [(0, 4 * r + p), (1, f % 3)])
        for r, f, p in product((1, 2), range(6), range(4))
    )


def test_null_groups_share_what_their_kind_says(pattern_and_object):
    found = controls.null_consistency(pattern_and_object, num_neurons=10**5)
    mean = found.groupby("kind")["cs2"].mean()
    # {p1, o}, {p2, o}, {p3, o}: one of four neurons is repeated
    assert mean["own"] == mean["same object"] == pytest.approx(1 / 4)
    assert mean["other objects"] == 0 and mean["random"] < 0.01
    # the pattern's neuron is repeated, and an object's where two facts happen to share it
    assert found.loc[found["kind"] == "same pattern", "cs2"].between(1 / 4, 1).all()
    assert set(found["kind"]) == set(controls.NULLS) and len(found) == 12 * len(controls.NULLS)


def test_a_wording_is_one_whether_or_not_spaces_set_its_subject_apart(pattern_and_object):
    joined = pattern_and_object["prompt"].str.replace(" ", "")  # as in 法国的首都是
    found, same = map(
        controls.null_consistency, (pattern_and_object, pattern_and_object.assign(prompt=joined))
    )
    pd.testing.assert_frame_equal(found, same)


def test_a_null_group_that_cannot_be_made_is_counted_not_invented(pattern_and_object):
    found = controls.summarise(controls.null_consistency(pattern_and_object.head(4), 100))
    n = dict.fromkeys(controls.NULLS, 0) | {"own": 1, "random": 1}
    assert dict(zip(found["kind"], found["n"])) == n
    assert (found["n_missing"] == 1 - found["n"]).all()
    assert (found["cs2"].isna() == (found["n"] == 0)).all()


@pytest.mark.parametrize(
    "prompt, subject, expected",
    [
        ("X is the capital of", "X", ["X is capital of", "The X is the capital of"]),
        ("In the city X lies in", "X", ["In city X lies in", "In the city the X lies in"]),
        ("the Seine flows through", "Seine", ["Seine flows through"]),
        ("Who has the wrong place of birth, the", "x", ["Who has wrong place of birth, the"]),
        ("Rome", "Rome", ["The Rome"]),
        ("Charles the Bald died in", "Charles the Bald", ["The Charles the Bald died in"]),
        ("the language of The Gambia is", "The Gambia", ["language of The Gambia is"]),
    ],
)
def test_variants_change_an_article_but_not_the_last_word(prompt, subject, expected):
    assert relocalise.variants(prompt, subject) == expected


# --- localised again, by a study that answers from a rule -----------------------------------------
class Stub:
    """Stands in for a study: its "localisation" gives every prompt neurons that depend on the rule
    and the dtype."""

    model, method, dtype = "stub", "ig", None

    def __init__(self, own="float32"):
        self.own, self.asked = own, []

    def lm(self):
        return SimpleNamespace(dtype=getattr(torch, self.own))

    def beside(self, model, dtype):
        other = Stub()
        other.dtype, other.asked = dtype, self.asked
        return other

    def run(self, task, units, config, desc=None):
        self.asked.append(self.dtype or config.get("rule"))
        extra = {"right": 1, "midpoint": 2, "gauss": 3}.get(config.get("rule"), 0)
        extra += 10 * (self.dtype == "bfloat16")
        rows = []
        for fact in units[0]:
            name = f"{fact['relation']}|{fact['subject']}|{fact['object']}"
            found = dict(probability=0.5 + extra / 100, left_out=None)
            for i, prompt in enumerate(fact["prompts"]):
                rows.append(query(name, i, [(0, 100), (0, extra)], prompt=prompt, **found))
        return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "own, asked, shared",
    [
        # neuron 100 by two rules and two others by the run's own, which is not asked again
        (dict(rule="right", steps=20), ["midpoint", "gauss", "right"], (1 / 5, 1 / 9)),
        (dict(rule="right", steps=10), [*relocalise.RULES, "right"], (1 / 4, 1 / 3)),
        (dict(steps=20), [*relocalise.RULES, None], (1 / 4, 1 / 3)),  # 100 thrice, an own one each
    ],
)
def test_noise_compares_three_rules_and_three_wordings_of_one_query(
    pattern_and_object, own, asked, shared
):
    study = Stub()
    found = relocalise.noise(study, pattern_and_object, n=4, t=0.2, seed=0, **own)
    found = controls.summarise(found).set_index("kind")
    assert study.asked == asked and found["n"].eq(4).all()
    assert found.loc["quadrature", ["cs2", "jaccard"]].tolist() == pytest.approx(shared)
    # the run's own two neurons, and twice the same two others
    assert found.loc[["variants", "neighbours"], "cs2"].tolist() == pytest.approx([1 / 2, 1 / 4])


@pytest.mark.parametrize(
    "own, asked", [("float32", ["bfloat16"]), ("float64", ["float32", "bfloat16"])]
)
def test_precision_compares_the_sets_of_two_dtypes_query_by_query(pattern_and_object, own, asked):
    count, study = len(pattern_and_object), Stub(own)
    kns = dict(layer=[[0, 0]] * count, neuron=[[100, 0]] * count)  # as the stub's in float32
    queries = pattern_and_object.assign(**kns, known=pattern_and_object["prompt_index"] == 2)
    found = relocalise.precision(study, queries, n=5, t=0.2, seed=0)
    assert study.asked == asked
    assert found["jaccard"].tolist() == pytest.approx([1 / 3] * 5)
    assert found["change"].tolist() == pytest.approx([0.1] * 5)
    # one query a fact, known ones first
    assert found["fact"].is_unique and set(found["prompt"].str.split().str[0]) == {"You"}


# --- split half -----------------------------------------------------------------------------------
def facts_with(agreeing, n=24, k=6, seed=0):
    """n facts of 2 relations with k queries; `agreeing(f)` is the chance that a query uses its
    fact's common set."""
    rng, rows = np.random.default_rng(seed), []
    for f, p in product(range(n), range(k)):
        kns = [(1, 1000 * f + 10 * p + j) for j in range(4)]
        if rng.random() < agreeing(f):
            kns = [(0, 10 * f + j) for j in range(4)]
        rows.append(query(f"P{f % 2}|s{f}|o", p, kns))
    return pd.DataFrame(rows)


def halved(f):
    return 0.95 if f % 4 < 2 else 0.05


def carried_over(queries, outcomes=(), outcome="CS2", threshold="otsu", **options):
    """The row of the split-half test of one outcome and threshold."""
    rows = controls.split_half(queries, outcomes, **options).set_index(["threshold", "outcome"])
    return rows.loc[(threshold, outcome)]


def test_classes_cut_from_noise_do_not_carry_over_though_the_circular_test_is_significant():
    row = carried_over(facts_with(halved))  # classes that are real do
    assert row["I - II_low"] > 0 and row["p"] < 0.01 and row["n_I"] + row["n_II"] == 24
    carried, circular = [], []
    for seed in range(8):
        queries = facts_with(lambda f: 0.4, n=80, k=8, seed=seed)
        facts = classified_facts(queries)
        classes = [facts["cs2"][facts["class_otsu"] == name] for name in ("I", "II")]
        if min(map(len, classes)) >= LEAST:
            circular.append(welch(*classes)["p"])
        row = carried_over(queries, seed=seed)
        carried.append(row["I - II_low"] > 0 and row["p"] < 0.05)
    assert len(circular) > 4 and max(circular) < 0.005
    assert sum(carried) <= 1  # of 8; each is an accident with a chance of 2.5 %


def test_the_halves_share_no_query_and_outcomes_come_from_the_second_only():
    few = facts_with(halved, k=3).assign(fact=lambda rows: rows["fact"] + " of three")
    queries = facts_with(halved)
    assert len(controls.halves(pd.concat([queries, few]))) == len(queries)
    split = controls.halves(queries)
    assert split.groupby("fact")["half"].value_counts().eq(3).all() and len(split) == len(queries)
    first, second = (split[split["half"] == half] for half in "AB")
    row = carried_over(queries, {"planted": first.assign(value=1.0)}, "planted")
    assert row["n_I"] + row["n_II"] == 0 and np.isnan(row["I - II"])
    second = second.assign(value=(second["layer"].map(max) == 0).astype(float))
    assert carried_over(queries, {"planted": second}, "planted")["I - II_low"] > 0.5
    for other, some in ((first, False), (second, True)):
        # what hangs on a query of the first half does not count
        place = other.groupby("fact")["prompt_index"].first()
        edited = second.assign(edited=second["fact"].map(place))
        row = carried_over(queries, {"planted": edited}, "planted")
        assert (row["n_I"] + row["n_II"] > 0) == some


def test_a_small_class_has_no_interval_and_shows_its_number():
    queries = facts_with(lambda f: 0.05 if f < 3 else 0.95, n=30)
    row = carried_over(queries, threshold="static")
    assert 0 < row["n_II"] < LEAST < row["n_I"] and row["I - II"] > 0.5
    assert row[["I - II_low", "I - II_high"]].isna().all()
    four = queries["fact"].isin(queries["fact"].unique()[:4])
    known = controls.knowledge(queries.assign(known=four)).set_index("statistic")
    difference = known.loc["CS2 of known facts minus CS2 of others"]
    assert (difference["n"], difference["n_other"]) == (4, 26)
    shares = known.filter(regex="share of K_II, .*, known facts", axis=0)
    assert shares["n"].tolist() == [4, 4] and (shares["value"] >= 0.5).all()
    within = known.loc["the same, within relations"]  # two, which are what is drawn there
    assert pd.DataFrame([difference, within, *shares.iloc])["value_low"].isna().all()


# --- knowledge ------------------------------------------------------------------------------------
def test_knowledge_finds_a_planted_correlation_and_counts_known_facts_only():
    rows = []
    for f, p in product(range(20), range(4)):
        # f of 20 queries' neurons agree, and so does the probability
        kns = [(0, 100 * f + j) for j in range(f)]
        kns += [(1, 1000 * f + 100 * p + j) for j in range(20 - f)]
        rows.append(query(f"P{f % 2}|s{f}|o", p, kns, probability=f / 20, known=f >= 10))
    found = controls.knowledge(pd.DataFrame(rows), static=0.15).set_index("statistic")
    assert found.loc["correlation of CS2 and P(answer)", "value"] == pytest.approx(1)
    correlations = found.filter(like="P(answer)", axis=0)[["value_low", "value_high"]]
    assert correlations.to_numpy().max() <= 1 + 1e-9 and correlations["value_low"].min() > 0.9
    assert found.loc["CS2 of known facts minus CS2 of others", "value_low"] > 0
    known = found.loc["share of K_II, static threshold, known facts"]
    assert (known["value"], known["n"]) == (0, 10)
    assert found.loc["share of K_II, static threshold, all facts", "value"] > 0.2
    # facts of two prompts are counted apart: here nothing is left
    two = controls.knowledge(pd.DataFrame(rows).query("prompt_index < 2"), static=0.15)
    assert len(two) == len(found) and two["value"].isna().all() and not two["n"].any()
