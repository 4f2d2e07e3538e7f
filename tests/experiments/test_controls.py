"""Controls on data whose answer is known beforehand: what each null group shares, what noise does,
what classes mean."""

import numpy as np
import pandas as pd
import pytest

from qlutils.experiments import controls, relocalise
from qlutils.experiments.consistency import classified_facts
from qlutils.neurons.others import random_neurons
from qlutils.show.stats import LEAST, welch

PATTERNS = (
    "{} lies in the land of",
    "The capital {} belongs to",
    "You will find {} in",
    "It is {} that is ruled by",
)


def query(relation, fact, subject, obj, pattern, kns, probability=0.5, known=True):
    return dict(
        fact=fact,
        relation=relation,
        subject=subject,
        object=obj,
        prompt_index=pattern,
        prompt=PATTERNS[pattern % 4].format(subject),
        probability=probability,
        known=known,
        layer=[layer for layer, _ in kns],
        neuron=[n for _, n in kns],
        score=[1.0] * len(kns),
    )


@pytest.fixture
def pattern_and_object():
    """Each query has one neuron of its pattern and one of its object; objects recur in both
    relations' facts."""
    rows = []
    for r, relation in enumerate(("P1", "P2")):
        for f in range(6):
            obj = f % 3
            rows += [
                query(
                    relation,
                    f"{relation}|s{f}|o{obj}",
                    f"s{f}",
                    f"o{obj}",
                    p,
                    [(0, 4 * r + p), (1, obj)],
                )
                for p in range(4)
            ]
    return pd.DataFrame(rows)


def test_null_groups_share_what_their_kind_says(pattern_and_object):
    found = controls.null_consistency(pattern_and_object, num_neurons=10**6)
    mean = found.groupby("kind")["cs2"].mean()
    assert mean["own"] == pytest.approx(
        1 / 4
    )  # {p1, o}, {p2, o}, {p3, o}: one of four neurons is repeated
    assert mean["same object"] == pytest.approx(1 / 4)
    assert mean["other objects"] == 0
    # of one pattern's facts, the pattern's neuron is repeated, and an object's where two facts
    # happen to share it
    assert found.loc[found["kind"] == "same pattern", "cs2"].between(1 / 4, 1).all()
    assert mean["random"] < 0.01
    assert set(found["kind"]) == set(controls.NULLS) and len(found) == 12 * len(controls.NULLS)


def test_a_null_group_that_cannot_be_made_is_counted_not_invented(pattern_and_object):
    one_fact = pattern_and_object[pattern_and_object["fact"] == "P1|s0|o0"]
    found = controls.summarise(controls.null_consistency(one_fact, 100)).set_index("kind")
    assert (
        found.loc[["same pattern", "other objects", "other relations", "same object"], "n"]
        .eq(0)
        .all()
    )
    assert found.loc["same pattern", "n_missing"] == 1 and np.isnan(
        found.loc["same pattern", "cs2"]
    )
    assert found.loc["own", "n"] == 1


def test_random_sets_keep_the_number_in_each_layer():
    neurons = {(0, 1), (0, 2), (3, 7)}
    drawn = [
        random_neurons(neurons, 4, np.random.default_rng(seed), outside=False) for seed in range(20)
    ]
    assert all(sorted(layer for layer, _ in one) == [0, 0, 3] for one in drawn)
    assert set().union(*drawn) == {
        (layer, neuron) for layer in (0, 3) for neuron in range(4)
    }  # its own, too
    assert random_neurons(set(), 50, np.random.default_rng(0), outside=False) == set()


@pytest.mark.parametrize(
    "prompt, subject, expected",
    [
        (
            "Paris is the capital of",
            "Paris",
            ["Paris is capital of", "The Paris is the capital of"],
        ),
        (
            "In the city Paris lies in",
            "Paris",
            ["In city Paris lies in", "In the city the Paris lies in"],
        ),
        ("the Seine flows through", "Seine", ["Seine flows through"]),
        ("Who has the wrong place of birth, the", "x", ["Who has wrong place of birth, the"]),
        ("Rome", "Rome", ["The Rome"]),
        ("Charles the Bald died in", "Charles the Bald", ["The Charles the Bald died in"]),
        (
            "the official language of The Gambia is",
            "The Gambia",
            ["official language of The Gambia is"],
        ),
    ],
)
def test_variants_change_an_article_but_not_the_last_word(prompt, subject, expected):
    assert relocalise.variants(prompt, subject) == expected


# --- localised again, by a study that answers from a rule -----------------------------------------


class Stub:
    """Stands in for a study: its "localisation" gives every prompt neurons that depend on the rule
    and the dtype."""

    notebook, model, method = "report", "stub", "ig"

    def __init__(self, notebook="report", **parameters):
        self.parameters, self.asked = {"dtype": None, **parameters}, []

    def beside(self, model, **changes):
        return Stub(**{**self.parameters, **changes})

    def run(self, task, units, config, desc=None):
        self.asked.append(config)
        extra = {"right": 1, "midpoint": 2, "gauss": 3}.get(config.get("rule"), 0) + (
            10 if self.parameters["dtype"] == "bfloat16" else 0
        )
        rows = [
            query(
                f["relation"],
                f"{f['relation']}|{f['subject']}|{f['object']}",
                f["subject"],
                f["object"],
                i,
                [(0, 100), (0, extra)],
                0.5 + extra / 100,
            )
            | dict(prompt=p, left_out=None)
            for unit in units
            for f in unit
            for i, p in enumerate(f["prompts"])
        ]
        return pd.DataFrame(rows)


def test_noise_compares_three_rules_and_three_wordings_of_one_query(pattern_and_object):
    study = Stub()
    found = controls.summarise(
        relocalise.noise(study, pattern_and_object, t=0.2, seed=0, n=4, steps=20)
    ).set_index("kind")
    assert [config.get("rule") for config in study.asked] == ["right", "midpoint", "gauss", None]
    assert found.loc["quadrature", "cs2"] == pytest.approx(
        1 / 4
    )  # neuron 100 thrice, one of its own each
    assert found.loc["quadrature", "jaccard"] == pytest.approx(1 / 3)
    assert found.loc["variants", "cs2"] == 1 and found.loc["neighbours", "cs2"] == pytest.approx(
        1 / 4
    )
    assert found["n"].eq(4).all()


def test_precision_compares_the_sets_of_two_dtypes_query_by_query(pattern_and_object):
    found = relocalise.precision(Stub(), pattern_and_object, t=0.2, seed=0, n=5)
    assert len(found) == 5 and found["jaccard"].tolist() == [pytest.approx(1 / 3)] * 5
    assert found["change"].tolist() == [pytest.approx(0.1)] * 5


def test_the_sample_takes_one_query_a_fact_and_known_ones_first(pattern_and_object):
    queries = pattern_and_object.assign(known=pattern_and_object["prompt_index"] == 2)
    sample = relocalise.sample_queries(queries, 5, 0)
    assert len(sample) == 5 and sample["fact"].is_unique and sample["known"].all()


# --- split half -----------------------------------------------------------------------------------


def facts_with(agreeing, n=24, k=6, seed=0):
    """n facts of 2 relations with k queries; `agreeing(f, rng)` is the chance that a query uses its
    fact's common set."""
    rng, rows = np.random.default_rng(seed), []
    for f in range(n):
        relation = f"P{f % 2}"
        for p in range(k):
            common = rng.random() < agreeing(f, rng)
            kns = (
                [(0, 10 * f + j) for j in range(4)]
                if common
                else [(1, 1000 * f + 10 * p + j) for j in range(4)]
            )
            rows.append(query(relation, f"{relation}|s{f}|o", f"s{f}", "o", p, kns))
    return pd.DataFrame(rows)


def carried_over(queries, outcomes=(), outcome="CS2", threshold="otsu", **options):
    """The row of the split-half test of one outcome and threshold."""
    rows = controls.split_half(queries, outcomes, **options).set_index(["threshold", "outcome"])
    return rows.loc[(threshold, outcome)]


def test_classes_that_are_real_carry_over_to_the_other_half():
    queries = facts_with(lambda f, _: 0.95 if f % 4 < 2 else 0.05)
    row = carried_over(queries)
    assert row["I - II_low"] > 0 and row["p"] < 0.01 and row["n_I"] + row["n_II"] == 24


def test_classes_cut_from_noise_do_not_carry_over_though_the_circular_test_is_significant():
    carried, circular = [], []
    for seed in range(8):
        queries = facts_with(lambda f, _: 0.4, n=80, k=8, seed=seed)
        facts = classified_facts(queries)
        classes = [facts["cs2"][facts["class_otsu"] == name] for name in ("I", "II")]
        if min(map(len, classes)) >= LEAST:
            circular.append(welch(*classes)["p"])
        row = carried_over(queries, seed=seed)
        carried.append(row["I - II_low"] > 0 and row["p"] < 0.05)
    assert len(circular) > 4 and max(circular) < 0.005
    assert sum(carried) <= 1  # of 8; each is an accident with a chance of 2.5 %


def test_the_halves_share_no_query_and_outcomes_come_from_the_second_only():
    queries = facts_with(lambda f, _: 0.95 if f % 4 < 2 else 0.05)
    split = controls.halves(queries)
    assert split.groupby("fact")["half"].value_counts().eq(3).all() and len(split) == len(queries)
    first = split[split["half"] == "A"]
    tainted = {"planted": first[["fact", "prompt_index"]].assign(value=1.0)}
    row = carried_over(queries, tainted, "planted")
    assert row["n_I"] + row["n_II"] == 0 and np.isnan(row["I - II"])
    second = split[split["half"] == "B"].assign(
        value=lambda frame: (frame["layer"].map(max) == 0).astype(float)
    )
    row = carried_over(queries, {"planted": second}, "planted")
    assert row["I - II_low"] > 0.5
    for other, some in ((first, False), (second, True)):
        # what hangs on a query of the first half does not count
        place = other.groupby("fact")["prompt_index"].first()
        edited = second.assign(edited=second["fact"].map(place))
        row = carried_over(queries, {"planted": edited}, "planted")
        assert (row["n_I"] + row["n_II"] > 0) == some


def test_facts_with_fewer_than_four_queries_take_no_part():
    row = controls.split_half(facts_with(lambda f, _: 0.5, k=3)).iloc[0]
    assert row["n_I"] + row["n_II"] == 0 and np.isnan(row["I - II"]) and np.isnan(row["p"])


def test_a_small_class_has_no_interval_and_shows_its_number():
    queries = facts_with(lambda f, _: 0.05 if f < 3 else 0.95, n=30)
    row = carried_over(queries, threshold="static")
    assert 0 < row["n_II"] < LEAST < row["n_I"] and row["I - II"] > 0.5
    assert np.isnan([row["I - II_low"], row["I - II_high"]]).all()
    four = queries["fact"].isin(queries["fact"].unique()[:4])
    known = controls.knowledge(queries.assign(known=four)).set_index("statistic")
    difference = known.loc["CS2 of known facts minus CS2 of others"]
    assert (difference["n"], difference["n_other"]) == (4, 26) and np.isnan(difference["value_low"])
    for threshold in ("static", "otsu"):
        share = known.loc[f"share of K_II, {threshold} threshold, known facts"]
        assert share["n"] == 4 and share["value"] >= 0.5 and np.isnan(share["value_low"])
    within = known.loc[
        "the same, within relations"
    ]  # of two relations, which are what is drawn there
    assert np.isnan([within["value_low"], within["value_high"]]).all()


# --- knowledge ------------------------------------------------------------------------------------


def test_knowledge_finds_a_planted_correlation_and_counts_known_facts_only():
    rows = []
    for f in range(20):  # f of 20 queries' neurons agree, and so does the probability
        for p in range(4):
            shared = [(0, 100 * f + j) for j in range(f)] + [
                (1, 1000 * f + 100 * p + j) for j in range(20 - f)
            ]
            rows.append(
                query(
                    f"P{f % 2}", f"P{f % 2}|s{f}|o", f"s{f}", "o", p, shared, f / 20, known=f >= 10
                )
            )
    found = controls.knowledge(pd.DataFrame(rows), static=0.15).set_index("statistic")
    assert found.loc["correlation of CS2 and P(answer)", "value"] == pytest.approx(1)
    correlations = found.filter(like="P(answer)", axis=0)[["value_low", "value_high"]]
    assert correlations.to_numpy().max() <= 1 + 1e-9 and correlations["value_low"].min() > 0.9
    assert found.loc["CS2 of known facts minus CS2 of others", "value_low"] > 0
    assert found.loc["share of K_II, static threshold, known facts", "value"] == 0
    assert found.loc["share of K_II, static threshold, known facts", "n"] == 10
    assert found.loc["share of K_II, static threshold, all facts", "value"] > 0.2
