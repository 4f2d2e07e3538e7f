"""Notebook 04's interventions and the numbers of notebooks 04-06, against hand-made cases and
one-by-one evaluation."""

import numpy as np
import pandas as pd
import pytest
from tiny import query_row, tiny_lm
from units import EFFECTS_UNIT

from qlutils.change.scaling import answer_probability, scale_neurons
from qlutils.experiments import effects
from qlutils.experiments import query_kn_mapping as mapping
from qlutils.neurons.others import active_neurons, random_neurons
from qlutils.show import tables

QUERIES = pd.DataFrame(
    query_row(fact, i, [(first, 1), (1 - first, 2)], score=[1.0, score], prompt_tokens=tokens)
    for fact, tokens, score in (("R1|a|x", 3, 0.1), ("R1|b|x", 4, 0.9), ("R2|c|x", 3, 0.9))
    for i, first in enumerate((0, 0, 1))
)


def test_every_set_of_a_query_by_hand():
    kns = [{(0, 1), (0, 2), (1, 5)}, {(0, 1), (1, 6)}, {(0, 1), (0, 2), (1, 6), (1, 7)}]
    active = np.array([[0.0, 5.0, 1.0, 1.1, 4.8, 9.0, 9.0, 9.0], [3.0, 0, 0, 0, 0, -2.9, 7.0, 8.0]])
    sets = mapping.query_sets(kns, 0, active, np.random.default_rng(0))
    assert sets["self"] == kns[0] and sets["union"] == kns[1] | kns[2]
    assert sets["intersection"] == sets["refine"] == {(0, 1), (1, 6)}
    assert sets["union_others"] == {(1, 6), (1, 7)} and sets["refine_others"] == {(1, 6)}
    assert len(sets["union_matched"]) == 3 and sets["union_matched"] <= sets["union"]
    assert sets["self_as_union"] == kns[0]
    assert sets["intersection_matched"] == sets["intersection"]
    assert len(sets["self_as_intersection"]) == 2
    assert sets["self_active"] == {(0, 4), (0, 3), (1, 0)}
    for name in ("self", "union"):
        drawn, like = sets[f"{name}_random"], sets[name]
        assert not drawn & like and sorted(l for l, _ in drawn) == sorted(l for l, _ in like)
    shown = {*effects.FIGURE_4_SETS, *effects.COMPARISON_SETS}
    assert shown - {"self_same_relation", "self_other_relation"} <= set(sets)


def test_other_neurons_are_never_of_their_own_set_and_end_where_a_layer_is_used_up():
    everything = {(0, n) for n in range(4)}
    assert random_neurons(everything, 4, np.random.default_rng(0)) == set()
    assert active_neurons(everything - {(0, 3)}, np.zeros((1, 4))) == {(0, 3)}
    among, seen = {0: {1, 2, 3}, 1: set()}, set()
    for rng in map(np.random.default_rng, range(20)):
        drawn = random_neurons({(0, 1), (1, 0)}, 10, rng, among=among.get)
        assert drawn in ({(0, 2)}, {(0, 3)})  # layer 1 has none to give
        anywhere = random_neurons({(0, 1), (0, 2), (3, 3)}, 4, rng, outside=False)
        assert sorted(layer for layer, _ in anywhere) == [0, 0, 3]
        seen |= anywhere
    assert seen == {(layer, n) for layer in (0, 3) for n in range(4)}  # its own, too
    # the most active one is matched first
    active = np.array([[3.0, -5.0, 3.9, 2.0, 6.9]])  # 2 is nearest to both 0 and 1, and 1 takes it
    assert active_neurons({(0, 0), (0, 1)}, active) == {(0, 2), (0, 3)}
    assert active_neurons({(0, 0)}, active) == active_neurons({(0, 1)}, active) == {(0, 2)}


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_rows_of_the_batch_equal_one_set_at_a_time(family):
    lm, [fact] = tiny_lm(family), EFFECTS_UNIT
    frame = mapping.scale_kns(lm, EFFECTS_UNIT, suppress=0.0, enhance=3.0)
    assert len(frame) == 3 * 2 * mapping.NUM_SETS == 3 * 2 * frame["set"].nunique()
    sets = [set(zip(*kns)) for kns in zip(fact["layer"], fact["neuron"])]
    for row in frame[frame["set"].isin(effects.FIGURE_4_SETS)].to_dict("records"):
        i = fact["prompt_index"].index(row["prompt_index"])
        one, two = (sets[k] for k in range(3) if k != i)
        both = dict.fromkeys(("intersection", "refine"), one & two)
        chosen = {"self": sets[i], "union": one | two, **both}[row["set"]]
        ask = [fact["prompts"][i]], ["8 6"]
        before = float(answer_probability(lm, *ask))
        with scale_neurons(lm, chosen, 3.0 if row["direction"] == "enhance" else 0.0):
            after = float(answer_probability(lm, *ask))
        assert row["size"] == len(chosen)
        assert row["probability"] == pytest.approx(after, rel=1e-5)
        assert row["probability_before"] == pytest.approx(before, rel=1e-5)
        assert chosen or row["probability"] == row["probability_before"]


def test_units_hold_the_neurons_above_the_threshold_and_an_irrelevant_prompt_of_equal_length():
    [[a, b, c]] = effects.units(QUERIES, 0.2, irrelevant=0)
    assert a["layer"] == [[0], [0], [1]] and a["neuron"] == [[1], [1], [1]]
    assert sorted(zip(b["layer"][2], b["neuron"][2])) == [(0, 2), (1, 1)]
    assert b["prompt_index"] == [0, 1, 2]
    assert all(prompt.startswith("c") for prompt in a["irrelevant"] + b["irrelevant"])
    # of R1 only fact a has prompts of 3 tokens
    assert all(prompt.startswith("a") for prompt in c["irrelevant"])
    [[alone]] = effects.units(QUERIES[QUERIES["relation"] == "R2"], irrelevant=0)
    assert alone["irrelevant"] == [None] * 3 and "layer" not in alone


def test_another_fact_s_neurons_are_of_one_fact_and_none_of_this_one():
    facts = {
        "R1|a|x": [[(0, 1), (0, 2), (1, 5)], [(0, 3)]],
        "R1|b|y": [[(0, 1), (0, 6)], [(1, 7), (2, 8)]],
        "R2|c|z": [[(0, 3), (0, 4)], [(0, 5), (1, 6)]],
        "R2|d|z": [[(0, 9)], [(1, 9)]],
        "R3|a|w": [[(0, 10)], [(0, 10)]],
        "R3|e|x": [[(0, 11)], [(0, 11)]],
    }
    rows = [query_row(fact, i, kns) for fact, sets in facts.items() for i, kns in enumerate(sets)]
    queries, drawn = pd.DataFrame(rows), {}
    for seed in range(40):
        for fact in effects.units(queries, 0.2, other=seed)[0]:
            for kind in ("same_relation", "other_relation"):
                drawn.setdefault((fact["fact"], kind), set()).add(tuple(map(tuple, fact[kind])))
    # of b, less (0, 1), which both have; layer 0 has one neuron left for two, and the second query
    # has none in layer 1
    assert drawn["R1|a|x", "same_relation"] == {(((0, 6), (1, 7)), ((0, 6),))}
    # of c (less (0, 3)) or of d, never of both at once; those of R3 have a's subject or its object
    first = {one for one, _ in drawn["R1|a|x", "other_relation"]}
    assert first == {((0, 4), (0, 5), (1, 6)), ((0, 9), (1, 9))}
    assert drawn["R2|c|z", "same_relation"] == {((), ())}  # d has the same object


def changes(rows, classes=None, known=True):
    """`effects.rates` of rows (fact, relation, query, set, size, before, enhanced, suppressed)."""
    long = []
    for fact, relation, index, name, size, before, *after in rows:
        about = dict(fact=fact, relation=relation, prompt_index=index, set=name, size=size)
        for direction, p in zip(("enhance", "suppress"), after):
            probability = dict(probability=p, probability_before=before)
            long.append(about | probability | {"direction": direction})
    frame = pd.DataFrame(long).assign(known=known, class_otsu=None)
    return frame.assign(class_static=frame["fact"].map(classes or {}))


def test_relative_changes_are_signed_by_direction_and_undefined_at_zero():
    rows = [(2, 0.5, 0.6, 0.1), (0, 0.0, 0.0, 0.0), (1, 0.5, 0.4, 0.5)]
    frame = changes([("f", "R", i, "self", *row) for i, row in enumerate(rows)])
    rates, sizes = (effects.rates(frame, size=size) for size in (False, True))
    for found, second in ((rates, (-0.2, 0.0, -0.1)), (sizes, (0.2, 0.0, 0.1))):
        rate = found.set_index(["prompt_index", "direction"])["rate"]
        assert rate[0][list(effects.DIRECTIONS)].tolist() == pytest.approx([0.2, 0.8, 0.5])
        assert rate[2][list(effects.DIRECTIONS)].tolist() == pytest.approx(second)
        assert rate[1].isna().all() and len(rate) == 9


def test_summary_counts_empty_sets_undefined_values_and_classes_without_facts():
    rows = [
        (f"f{k}", f"R{k % 2}", 0, "self", size, before, 0.5 + 0.1 * k, 0.5 - 0.1 * k)
        for k, (size, before) in enumerate([(2, 0.5), (0, 0.5), (3, 0.0)])
    ]
    frame = effects.rates(changes(rows, dict.fromkeys(["f0", "f1", "f2"], "I")))
    static = dict(threshold="static", class_="I", direction="average")
    table = effects.summary(frame, ["self"], populations=("known", "known, not empty"))
    assert np.isnan(table[["mean_low", "median_high", "trimmed_low"]]).all(axis=None)  # three facts
    every = tables.pick(table, **static, queries="known")
    assert (every["n"], every["undefined"], every["mean"]) == (2, 1, pytest.approx(0.1))
    assert every["empty"] == pytest.approx(1 / 3)
    assert tables.pick(table, **static, queries="known, not empty")["mean"] == pytest.approx(0)
    table = effects.summary(frame.assign(known=frame["fact"] == "f1"), ["self"])
    assert list(dict.fromkeys(table["queries"])) == ["all", "known"]
    every, known = (tables.pick(table, **static, queries=name) for name in ("all", "known"))
    assert (every["n"], known["n"]) == (2, 1) and known["trimmed"] == pytest.approx(0.2)
    for name in ("I", "II"):
        none = tables.pick(table, **static | dict(threshold="otsu", class_=name), queries="known")
        assert none["n"] == 0 and np.isnan(none["mean"])
    assert tables.with_interval(none) == "undefined (n = 0)"
    assert tables.verdict(none) == "not testable here (0 facts; an interval needs 10)"


def test_contrast_pairs_queries_and_leaves_out_those_without_both():
    rows = []
    for k in range(6):
        for name, after in (("self", 0.1 + 0.05 * k), ("union", 0.3), ("refine", 0.5)):
            rows.append((f"f{k}", f"R{k % 2}", 0, name, 1, 0.5, 0.5, after))
    classes = {f"f{k}": "I" if k < 3 else "II" for k in range(6)}
    frame = effects.rates(changes(rows[:-1], classes))  # f5 has no refine
    table = effects.contrast(frame, "self", ["union", "refine"])
    # rates are means of both directions: what is lost of 0.5, halved, is 0.5 less what is left
    gap = [(0.3 + 0.5) / 2 - (0.1 + 0.05 * k) for k in range(5)]
    which = dict(threshold="static", queries="all")
    one, two, apart = (tables.pick(table, **which, class_=name) for name in ("I", "II", "II - I"))
    assert (one["mean"], one["median"]) == pytest.approx((np.mean(gap[:3]), gap[1]))
    assert two["mean"] == pytest.approx(np.mean(gap[3:])) and two["n"] == 2
    assert apart["mean"] == pytest.approx(np.mean(gap[3:]) - np.mean(gap[:3]))
    assert tables.with_interval(apart).endswith("[–, –] (n = 2 and 3)")
    why = "not testable here (2 and 3 facts; an interval needs 10 on each side)"
    assert tables.verdict(apart) == why
    words = {0.1: "lies above 0", -0.4: "lies below 0", -0.1: "cannot be told from 0"}
    for low, said in words.items():
        assert tables.verdict(dict(mean=low, mean_low=low, mean_high=low + 0.3)) == said


def test_a_token_is_in_the_subject_with_or_without_its_space_and_nowhere_if_that_is_missing():
    queries = pd.DataFrame(dict(fact="f", prompt_index=range(4), subject=["France"] * 3 + ["Gaul"]))
    queries["prompt"] = "The capital of France is"
    winners = queries[["fact", "prompt_index"]].assign(at_rest=[14, 15, 21, 0])
    assert effects.inside_subject(winners, queries).tolist() == [True, True, False, False]


def test_predominance_and_the_most_attended_tokens_by_hand():
    """Three queries, as `attend` tells of them (its own test is change/test_synapses.py)."""
    winners = dict(fact="f", relation="R", column=[0, 1, 2], first_share=0.5, share=[0.6, 0.4, 0.2])
    winners |= dict(token_id=[7, 7, 9], token=["7", "7", "9"], token_id_first=[7, 4, 8])
    winners |= dict(token_id_rest=[5, 7, 9], token_rest=["5", "7", "9"], share_rest=0.1)
    winners = pd.DataFrame(winners)
    [fact] = effects.predominance(winners).to_dict("records")
    assert (fact["predominance"], fact["modal"]) == (pytest.approx(2 / 3), "7")
    for name in ("predominance_rest", "first", "same_first"):
        assert fact[name] == pytest.approx(1 / 3)
    assert (fact["first_share"], fact["n_queries"]) == (0.5, 3)
    top = effects.top_tokens(winners).set_index(["counted", "token"])
    assert top.loc[("all tokens", "'7'"), ["queries", "attention"]].tolist() == [2, 0.5]


def test_a_synapse_reaches_the_neurons_of_its_layer_and_of_later_ones():
    found = pd.DataFrame(dict(by_layer=[[1, 0, 2], [0, 1, 0]]))
    share = effects.reach([{(0, 5), (2, 1)}, {(0, 9)}], found)
    assert share == pytest.approx((2 * 1 + 4) / (3 * 4))
    assert effects.reach([set(), set()], found) == 0


def test_synapse_counts_by_hand():
    nan = np.nan
    found = pd.DataFrame(dict(fact=["f", "g"], relation="R", by_layer=[[3, 0, 1], [0, 0, 0]]))
    found = found.assign(n_self=[4, 0], n_self_rest=[1, 0], n_irrelevant=[2, nan])
    found = found.assign(n_irrelevant_rest=[0, nan], jaccard=[0.5, nan], jaccard_rest=[0.0, nan])
    table = effects.synapse_counts(found).set_index("quantity")
    assert table.loc["n_self", "mean"] == 2 and table.loc["n_irrelevant", "n"] == 1
    assert table.loc["share in column 0", "mean"] == 0.75
    assert table.loc["mean depth", "mean"] == 0.25 and table.loc["no synapse", "mean"] == 0.5
