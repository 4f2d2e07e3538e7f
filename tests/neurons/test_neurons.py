"""Knowledge neurons, consistency, CAS and classes against hand-made sets and brute force."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlutils.neurons.cas import CAS_BETAS, cas_candidates, cas_neurons, strongest_neurons
from qlutils.neurons.sets import (
    classify,
    consistency,
    cs2_subsampled,
    fact_table,
    kn_sets,
    knowledge_neurons,
    neighbour_sets,
    otsu_threshold,
)

A, B, C, D = (0, 1), (0, 2), (1, 0), (3, 7)
neurons = st.tuples(st.integers(0, 2), st.integers(0, 3))
some_sets = st.lists(st.sets(neurons, max_size=6), min_size=2, max_size=6)


def cubed(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) ** 3


def queries_frame(scores, fact="P1|s|o", **columns):
    """What a localisation stores of dense scores, written here from its description."""
    rows = []
    for i, score in enumerate(scores):
        layer, neuron = (score > 0.05 * max(score.max(), 0)).nonzero()
        rows.append(
            dict(fact=fact, relation="P1", subject="s", object="o", prompt_index=i, known=True)
            | dict(probability=0.5, layer=layer.tolist(), neuron=neuron.tolist())
            | dict(score=score[layer, neuron].tolist())
            | columns
        )
    return pd.DataFrame(rows)


# --- knowledge neurons ----------------------------------------------------------------------------
def test_knowledge_neurons_score_strictly_above_t_times_the_largest():
    scores = np.zeros((1, 2, 4))
    scores[0, 0, 1], scores[0, 1, 3], scores[0, 1, 0], scores[0, 0, 0] = 10, 2.0, 2.1, -50
    assert knowledge_neurons(scores) == [{(0, 1), (1, 0)}]
    assert knowledge_neurons(scores, t=0.19) == [{(0, 1), (1, 0), (1, 3)}]


def test_a_query_without_a_positive_score_has_no_knowledge_neurons():
    scores = np.stack([-np.ones((2, 3)), np.zeros((2, 3))])
    assert knowledge_neurons(scores) == kn_sets(queries_frame(scores)) == [set(), set()]
    assert len(cas_candidates(scores)["layer"]) == 0
    assert cas_neurons(cas_candidates(scores)) == set()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_give_what_arrays_give(dtype):
    tensor = torch.from_numpy(cubed(3, 2, 5)).to(dtype)
    sets = knowledge_neurons(tensor.requires_grad_())
    assert sets == knowledge_neurons(tensor.detach().double().numpy()) and all(sets)
    assert all(type(i) is int for one in sets for neuron in one for i in neuron)


def test_non_finite_scores_name_the_query():
    scores = np.ones((3, 2, 2))
    scores[1, 0, 1] = np.inf
    for select in (knowledge_neurons, cas_candidates):
        with pytest.raises(ValueError, match="query 1 "):
            select(scores)
    frame = queries_frame(np.ones((2, 1, 1)))
    frame.at[1, "score"] = [np.nan]
    with pytest.raises(ValueError, match=r"P1\|s\|o prompt 1"):
        kn_sets(frame)


@pytest.mark.parametrize("t", [0.05, 0.1, 0.2, 0.5, 0.9])
def test_stored_lists_give_the_sets_of_the_dense_scores(t, tmp_path):
    scores = cubed(6, 3, 40).astype(np.float32)
    frame = queries_frame(scores)
    frame.loc[len(frame)] = frame.loc[0]
    frame[["layer", "neuron", "score"]] = frame[["layer", "neuron", "score"]].astype(object)
    for name in ("layer", "neuron", "score"):
        frame.at[len(frame) - 1, name] = None  # null lists mean no knowledge neurons
    frame.to_parquet(tmp_path / "q.parquet")
    wanted = [*knowledge_neurons(scores, t), set()]
    assert kn_sets(frame, t) == kn_sets(pd.read_parquet(tmp_path / "q.parquet"), t) == wanted


# --- consistency ----------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(some_sets, st.integers(0, 5))
@example([{A, B}, {A, B, C}, {A, D}], 0)
@example([{A}, {A}, set()], 2)  # an empty set counts
def test_consistency_and_neighbour_sets_follow_their_definitions(sets, i):
    union, shared = set().union(*sets), set.intersection(*sets)
    result, pairs = consistency(sets), [two for two in combinations(sets, 2) if any(two)]
    wanted = [np.nan] * 3
    if union:
        cs2 = np.mean([sum(n in s for s in sets) > 1 for n in union])
        jaccard = np.mean([len(one & other) / len(one | other) for one, other in pairs])
        wanted = [len(shared) / len(union), cs2, jaccard]
    assert [result.cs1, result.cs2, result.jaccard] == pytest.approx(wanted, nan_ok=True)
    i %= len(sets)
    others = sets[:i] + sets[i + 1 :]
    union = set.union(*others)
    assert neighbour_sets(sets, i) == {
        "self": sets[i],
        "union": union,
        "intersection": set.intersection(*others),
        "refine": {n for n in union if sum(n in s for s in others) >= 2},
    }


def test_subsampled_cs2_is_the_mean_over_all_small_subsets_or_over_very_many():
    sets = [{A}, {A, B}, {B, C}, {D}, {A, D}]
    brute = np.mean([consistency(subset).cs2 for subset in combinations(sets, 3)])
    assert cs2_subsampled(sets) == pytest.approx(brute)
    assert np.isnan(cs2_subsampled(sets[:2])) and np.isnan(cs2_subsampled([set()] * 4))
    rng = np.random.default_rng(1)
    many = [{(0, int(n)) for n in rng.choice(12, 5, replace=False)} for _ in range(42)]
    brute = np.mean([consistency(subset).cs2 for subset in combinations(many, 3)])
    assert 1e-6 < abs(cs2_subsampled(many) - brute) < 0.003
    assert cs2_subsampled(many) == cs2_subsampled(many)


# --- CAS ------------------------------------------------------------------------------------------
def brute_cas(scores, b1, b2, threshold, kind):
    if kind == "max":
        scores = np.stack([s / s.max() if s.max() > 0 else 0 * s for s in scores])
    cas = b1 * scores.mean(0) - b2 * np.sqrt(((scores - scores.mean(0)) ** 2).mean(0))
    chosen = np.argwhere(cas > threshold * cas.max()).tolist() if cas.max() > 0 else []
    return set(map(tuple, chosen))


@pytest.mark.parametrize("kind", ["raw", "max"])
@pytest.mark.parametrize("betas", CAS_BETAS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_kept_candidates_give_every_offered_setting_exactly(betas, kind, seed):
    scores = np.geomspace(1e-4, 1, 5)[:, None, None] * cubed(5, 3, 60, seed=seed)
    if seed:
        scores[0] = -np.abs(scores[0])  # one query without a positive score
    kept = cas_candidates(scores)
    stored = pd.Series({f"cas_{name}": value.tolist() for name, value in kept.items()})
    for threshold in (0.1, 0.3, 0.9):
        for one in (kept, stored):
            found = cas_neurons(one, b1=betas[0], b2=betas[1], threshold=threshold, score=kind)
            assert found == brute_cas(scores, *betas, threshold, kind)
    assert len(kept["layer"]) < 180, "everything was kept: the test says nothing"
    assert cas_neurons(stored.map(lambda _: None)) == set()


def test_the_strongest_neurons_are_as_many_as_the_set_and_led_by_their_mean_score():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(4, 3, 20)) + 2 * rng.random((3, 20))
    mean, candidates = scores.mean(0), cas_candidates(scores)
    ranked = sorted(np.ndindex(mean.shape), key=lambda pair: -mean[pair])
    for count in (0, 1, 7):
        assert strongest_neurons(candidates, count) == set(ranked[:count])
    above = {pair for pair in ranked if mean[pair] > 0.1 * mean.max()}
    assert strongest_neurons(candidates, 60) == above and 7 < len(above) < 60


# --- what is refused ------------------------------------------------------------------------------
REFUSED = [  # and more in test_hostile.py
    (lambda: kn_sets(queries_frame(np.ones((2, 1, 2))), 0.04), "0.05"),
    (lambda: neighbour_sets([{A}], 0), "at least 2"),
    (lambda: neighbour_sets([{A}, {B}], 2), "query 2 "),
    (lambda: cs2_subsampled([{A}, {B}], k=1), "k must be"),
]


@pytest.mark.parametrize("call, said", REFUSED)
def test_settings_for_which_numbers_would_be_wrong_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# --- classes and the table ------------------------------------------------------------------------
def test_classes_split_above_the_threshold_and_nan_has_none():
    assert list(classify([0.0, 0.1, 0.1001, np.nan, 1.0], 0.1)) == ["II", "II", "I", None, "I"]
    assert list(classify([0.5, 0.7], np.nan)) == [None, None]
    assert list(classify([], 0.1)) == []


def test_otsus_threshold_maximises_the_between_class_variance():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.1, 0.03, 300), rng.normal(0.6, 0.1, 100)])

    def between(t):
        low, high = values[values <= t], values[values > t]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    grid = np.linspace(values.min() + 1e-6, values.max() - 1e-6, 500)
    found = otsu_threshold(np.append(values, np.nan))
    assert between(found) >= 0.999 * max(map(between, grid))
    for few in ([], [np.nan], [0.3], [0.3] * 5, [0.3, np.nan, 0.3]):
        assert np.isnan(otsu_threshold(few))


def test_the_fact_table_has_one_row_a_fact_with_undefined_values_as_nan():
    scores = cubed(4, 3, 20)
    first = queries_frame(scores, fact="P2|a|b", relation="P2")
    first["known"], first["probability"] = [True, False, True, True], [0.1, 0.2, 0.3, 0.4]
    silent = queries_frame(-np.ones((3, 2, 2)), fact="P1|c|d")
    single = queries_frame(scores[:1], fact="P1|e|f", known=False)
    table = fact_table(pd.concat([first, silent, single]), t=0.3)
    sets, row = knowledge_neurons(scores, 0.3), table.iloc[0]
    assert list(table.fact) == ["P2|a|b", "P1|c|d", "P1|e|f"]
    assert (row.cs1, row.cs2) == (consistency(sets).cs1, consistency(sets).cs2)
    assert row.cs2_3 == cs2_subsampled(sets)
    assert row.mean_layer == pytest.approx(np.mean([l for s in sets for l, _ in s]))
    assert (row.known, row.probability, row.union_size) == (0.75, 0.25, len(set.union(*sets)))
    assert np.isnan(table.cs2[1:]).all()
    assert list(table.n_queries) == [4, 3, 1] and list(table.n_empty) == [0, 3, 0]
    assert np.isnan(table.mean_layer[1]) and not np.isnan(table.mean_layer[2])
    assert list(fact_table(first.iloc[:0]).columns) == list(table.columns)
