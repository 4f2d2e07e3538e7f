"""Knowledge neurons, consistency, CAS and classes against hand-made sets and brute force."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
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


def queries_frame(scores, floor=0.05, **columns):
    """What a localisation stores of dense scores, written here a second time from its
    description."""
    rows = []
    for i, score in enumerate(scores):
        top = score.max()
        where = np.argwhere(score > floor * top) if top > 0 else np.zeros((0, 2), int)
        rows.append(
            dict(
                fact="P1|s|o",
                relation="P1",
                subject="s",
                object="o",
                prompt_index=i,
                prompt=f"p{i}",
                probability=0.5,
                known=True,
                layer=where[:, 0].tolist(),
                neuron=where[:, 1].tolist(),
                score=[float(score[tuple(w)]) for w in where],
            )
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
    assert knowledge_neurons(scores) == [set(), set()]
    assert kn_sets(queries_frame(scores)) == [set(), set()]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_tensors_give_what_arrays_give(dtype):
    torch = pytest.importorskip("torch")
    tensor = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).to(
        getattr(torch, dtype)
    )
    sets = knowledge_neurons(tensor.requires_grad_())
    assert sets == knowledge_neurons(tensor.detach().double().numpy()) and all(sets)
    assert all(type(i) is int for one in sets for neuron in one for i in neuron)


@pytest.mark.parametrize("t", [0, 1, -0.1, 1.5, float("nan")])
def test_t_outside_zero_and_one_is_refused(t):
    with pytest.raises(ValueError, match="t must lie strictly between 0 and 1"):
        knowledge_neurons(np.ones((1, 1, 2)), t)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_name_the_query(value):
    scores = np.ones((3, 2, 2))
    scores[1, 0, 1] = value
    with pytest.raises(ValueError, match="query 1 "):
        knowledge_neurons(scores)
    with pytest.raises(ValueError, match="query 1 "):
        cas_candidates(scores)
    frame = queries_frame(np.ones((2, 1, 1)))
    frame.at[1, "score"] = [value]
    with pytest.raises(ValueError, match=r"P1\|s\|o prompt 1"):
        kn_sets(frame)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        knowledge_neurons(np.ones((2, 3)))
    assert knowledge_neurons(np.ones((0, 2, 3))) == []


@pytest.mark.parametrize("t", [0.05, 0.1, 0.2, 0.5, 0.9])
def test_stored_lists_give_the_sets_of_the_dense_scores(t):
    scores = np.random.default_rng(0).normal(size=(6, 3, 40)).astype(np.float32) ** 3
    assert kn_sets(queries_frame(scores), t) == knowledge_neurons(scores, t)


def test_the_store_refuses_thresholds_below_what_it_keeps():
    with pytest.raises(ValueError, match="0.05"):
        kn_sets(queries_frame(np.ones((2, 1, 2))), 0.04)


def test_null_lists_mean_no_knowledge_neurons(tmp_path):
    frame = queries_frame(np.ones((2, 1, 1)))
    for column in ("layer", "neuron", "score"):
        frame[column] = pd.Series([None, [0.0 if column == "score" else 0]], dtype=object)
    frame.to_parquet(tmp_path / "q.parquet")
    assert kn_sets(frame) == kn_sets(pd.read_parquet(tmp_path / "q.parquet")) == [set(), set()]


# --- consistency ----------------------------------------------------------------------------------


def test_consistency_of_hand_made_sets():
    result = consistency([{A, B}, {A, B, C}, {A, D}])
    assert (result.cs1, result.cs2) == (1 / 4, 2 / 4)
    assert result.jaccard == pytest.approx((2 / 3 + 1 / 3 + 1 / 4) / 3)
    assert (result.n_queries, result.n_union, result.n_intersection, result.sizes) == (
        3,
        4,
        1,
        (2, 3, 2),
    )


def test_equal_sets_agree_fully_and_disjoint_sets_not_at_all():
    assert (consistency([{A, B}] * 4).cs1, consistency([{A, B}] * 4).cs2) == (1, 1)
    assert (consistency([{A}, {B}, {C}]).cs1, consistency([{A}, {B}, {C}]).cs2) == (0, 0)


def test_an_empty_union_is_nan_and_an_empty_set_counts():
    empty = consistency([set(), set()])
    assert np.isnan([empty.cs1, empty.cs2, empty.jaccard]).all() and empty.n_union == 0
    partly = consistency([{A}, {A}, set()])
    assert (partly.cs1, partly.cs2) == (0, 1) and partly.jaccard == pytest.approx(1 / 3)


@pytest.mark.parametrize("sets", [[], [{A}]])
def test_consistency_of_fewer_than_two_sets_is_refused(sets):
    with pytest.raises(ValueError, match="at least 2"):
        consistency(sets)
    with pytest.raises(ValueError, match="at least 2"):
        neighbour_sets(sets, 0)


@settings(max_examples=60, deadline=None)
@given(some_sets)
def test_consistency_follows_its_definition(sets):
    union = set().union(*sets)
    result = consistency(sets)
    if not union:
        assert np.isnan(result.cs2)
        return
    assert result.cs1 == len(set.intersection(*sets)) / len(union)
    assert result.cs2 == len([n for n in union if sum(n in s for s in sets) > 1]) / len(union)
    assert 0 <= result.cs1 <= result.cs2 <= 1
    if len(sets) == 2:
        assert result.cs1 == result.cs2 == result.jaccard


def test_subsampled_cs2_is_the_mean_over_all_small_subsets():
    sets = [{A}, {A, B}, {B, C}, {D}, {A, D}]
    brute = np.mean([consistency(subset).cs2 for subset in combinations(sets, 3)])
    assert cs2_subsampled(sets) == pytest.approx(brute)
    assert cs2_subsampled(sets[:3]) == consistency(sets[:3]).cs2
    assert np.isnan(cs2_subsampled(sets[:2])) and np.isnan(cs2_subsampled([set()] * 4))
    with pytest.raises(ValueError, match="k must be"):
        cs2_subsampled(sets, k=1)


def test_subsampled_cs2_of_many_sets_is_seeded_and_near_the_full_mean():
    rng = np.random.default_rng(1)
    sets = [{(0, int(n)) for n in rng.choice(12, 5, replace=False)} for _ in range(12)]
    full = np.mean([consistency(subset).cs2 for subset in combinations(sets, 3)])
    assert (
        cs2_subsampled(sets, seed=0)
        == cs2_subsampled(sets, seed=0)
        == pytest.approx(full, abs=0.06)
    )
    assert len({cs2_subsampled(sets, seed=s) for s in range(5)}) > 1


def test_neighbour_sets_of_a_hand_made_fact():
    result = neighbour_sets([{A}, {A, B}, {B, C}, {B, D}], 0)
    assert result == dict(self={A}, union={A, B, C, D}, intersection={B}, refine={B})


def test_with_two_queries_refine_is_empty():
    assert neighbour_sets([{A}, {A, B}], 1) == dict(
        self={A, B}, union={A}, intersection={A}, refine=set()
    )


@settings(max_examples=40, deadline=None)
@given(some_sets, st.data())
def test_neighbour_sets_follow_equation_three(sets, data):
    i = data.draw(st.integers(0, len(sets) - 1))
    others = [s for j, s in enumerate(sets) if j != i]
    result = neighbour_sets(sets, i)
    assert result["union"] == set.union(*others) and result["intersection"] == set.intersection(
        *others
    )
    assert result["refine"] == {n for n in result["union"] if sum(n in s for s in others) >= 2}


def test_a_query_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="query 2 "):
        neighbour_sets([{A}, {B}], 2)


# --- CAS ------------------------------------------------------------------------------------------


def brute_cas(scores, b1, b2, threshold, kind):
    scores = scores.astype(float)
    if kind == "max":
        scores = np.stack([s / s.max() if s.max() > 0 else 0 * s for s in scores])
    cas = b1 * scores.mean(0) - b2 * np.sqrt(((scores - scores.mean(0)) ** 2).mean(0))
    if cas.max() <= 0:
        return set()
    return {(int(l), int(n)) for l, n in np.argwhere(cas > threshold * cas.max())}


@pytest.mark.parametrize("kind", ["raw", "max"])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("betas", CAS_BETAS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_kept_candidates_give_every_offered_setting_exactly(betas, threshold, kind, seed):
    sizes = np.geomspace(1e-4, 1, 5)[:, None, None]
    scores = sizes * np.random.default_rng(seed).normal(size=(5, 3, 60)) ** 3
    if seed:
        scores[0] = -np.abs(scores[0])  # one query without a positive score
    kept = cas_candidates(scores)
    selected = cas_neurons(kept, b1=betas[0], b2=betas[1], threshold=threshold, score=kind)
    assert selected == brute_cas(scores, *betas, threshold, kind)
    assert len(kept["layer"]) < 180, "everything was kept: the test says nothing"


def test_cas_of_a_hand_made_fact():
    scores = np.array([[[4.0, 6.0, 1.0]], [[4.0, 0.0, 1.2]]])  # CAS .7m-.3s: 2.8, 1.2, 0.74
    assert cas_neurons(cas_candidates(scores)) == {(0, 0), (0, 1)}  # 0.3 * 2.8 = 0.84
    assert cas_neurons(cas_candidates(scores), threshold=0.5) == {(0, 0)}


def test_cas_reads_a_fact_of_the_stored_frame():
    scores = np.random.default_rng(3).normal(size=(4, 2, 30)) ** 3
    kept = cas_candidates(scores)
    row = pd.Series({f"cas_{name}": value.tolist() for name, value in kept.items()})
    assert cas_neurons(row, score="max") == cas_neurons(kept, score="max") != set()
    empty = pd.Series({f"cas_{name}": None for name in kept})
    assert cas_neurons(empty) == set()


def test_a_fact_without_a_positive_score_has_no_cas_neurons():
    kept = cas_candidates(-np.ones((3, 2, 4)))
    assert len(kept["layer"]) == 0 and cas_neurons(kept) == set()


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(b1=0.75, b2=0.25), r"\(0.75, 0.25\) is not offered"),
        (dict(score="mean"), "'mean'"),
        (dict(threshold=0.05), "threshold 0.05"),
        (dict(threshold=1.0), "threshold 1.0"),
        (dict(threshold=np.nan), "threshold nan"),
    ],
)
def test_cas_settings_outside_the_grid_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        cas_neurons(cas_candidates(np.ones((2, 1, 2))), **setting)


def test_the_strongest_neurons_are_as_many_as_the_set_and_led_by_their_mean_score():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(4, 3, 20)) + 2 * rng.random((3, 20))
    mean, candidates = scores.mean(0), cas_candidates(scores)
    ranked = sorted(np.ndindex(mean.shape), key=lambda pair: -mean[pair])
    for count in (0, 1, 7):
        assert strongest_neurons(candidates, count) == set(ranked[:count])
    above = {pair for pair in ranked if mean[pair] > 0.1 * mean.max()}
    assert strongest_neurons(candidates, 60) == above and 7 < len(above) < 60
    assert strongest_neurons(dict(layer=[], neuron=[], mean=[], std=[]), 3) == set()


# --- classes and the table ------------------------------------------------------------------------


def test_classes_split_above_the_threshold_and_nan_has_none():
    assert list(classify([0.0, 0.1, 0.1001, np.nan, 1.0], 0.1)) == ["II", "II", "I", None, "I"]
    assert list(classify([0.5, 0.7], np.nan)) == [None, None]
    assert list(classify([], 0.1)) == []


def test_otsu_is_scikit_images_and_maximises_the_between_class_variance():
    from skimage.filters import threshold_otsu

    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.1, 0.03, 300), rng.normal(0.6, 0.1, 100)])
    found = otsu_threshold(np.append(values, np.nan))
    assert found == threshold_otsu(values)

    def between(t):
        low, high = values[values <= t], values[values > t]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    grid = np.linspace(values.min() + 1e-6, values.max() - 1e-6, 500)
    assert between(found) >= 0.999 * max(map(between, grid))


@pytest.mark.parametrize("values", [[], [np.nan], [0.3], [0.3] * 5, [0.3, np.nan, 0.3]])
def test_otsu_of_values_without_two_groups_is_nan(values):
    assert np.isnan(otsu_threshold(values))


def test_the_fact_table_has_one_row_a_fact_with_undefined_values_as_nan():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 3, 20)) ** 3
    first = queries_frame(scores, fact="P2|a|b", relation="P2")
    first["known"], first["probability"] = [True, False, True, True], [0.1, 0.2, 0.3, 0.4]
    silent = queries_frame(-np.ones((3, 2, 2)), fact="P1|c|d")
    single = queries_frame(scores[:1], fact="P1|e|f", known=False)
    table = fact_table(pd.concat([first, silent, single]), t=0.3)
    sets = knowledge_neurons(scores, 0.3)
    row = table.iloc[0]
    assert list(table.fact) == ["P2|a|b", "P1|c|d", "P1|e|f"]
    assert (row.cs1, row.cs2) == (consistency(sets).cs1, consistency(sets).cs2)
    assert row.cs2_3 == cs2_subsampled(sets)
    assert row.mean_layer == pytest.approx(np.mean([l for s in sets for l, _ in s]))
    assert (row.known, row.probability, row.union_size) == (0.75, 0.25, len(set.union(*sets)))
    assert np.isnan(table.cs2[1:]).all()
    assert list(table.n_queries) == [4, 3, 1] and list(table.n_empty) == [0, 3, 0]
    assert np.isnan(table.mean_layer[1]) and not np.isnan(table.mean_layer[2])
    assert list(fact_table(first.iloc[:0]).columns) == list(table.columns)
