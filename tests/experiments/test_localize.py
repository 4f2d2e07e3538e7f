"""From facts to stored knowledge neurons, and from those to Tables 1, 4 and 5."""

from dataclasses import asdict
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from tiny import WORDS, last_activations, query_row, save_checkpoint, save_dataset, word_tokenizer

from qlutils import attribute, knowledge_neurons, load_facts, load_model
from qlutils.change.scaling import scale_neurons
from qlutils.change.synapses import scale_synapses
from qlutils.experiments import localize
from qlutils.experiments.consistency import (
    classified_facts,
    common_class_two,
    consistency_summary,
    otsu_null,
    relation_table,
    second_by_relation,
    table_1,
    table_4,
    table_5,
    threshold_sensitivity,
)
from qlutils.experiments.localize import example_facts, example_maps, localise, localised
from qlutils.neurons.cas import CAS_BETAS, cas_neurons
from qlutils.neurons.sets import kn_sets
from qlutils.study import store
from qlutils.study.notebook import Study

STEPS = 3
CS2 = (0.0, 0.1, 0.2, 0.7, 0.8, 0.9)
LONG = " ".join(["the"] * 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint that knows the words of the dataset but "house", and reads few tokens."""
    words = [word for word in WORDS if word != "house"]
    words += [f"filler{i}" for i in range(93 - len(words))]
    tokenizer = word_tokenizer(words, bos=True)
    options = dict(vocab_size=97, max_position_embeddings=16)
    return save_checkpoint(tmp_path_factory.mktemp("model"), "llama3", tokenizer, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp("data"))


def study_of(model, data, method="ig", **parameters):
    shared = dict(device="cpu", dtype="float64", **parameters)
    return Study("01_localize", model=model, method=method, data=data, **shared)


def dense(lm, fact, method):
    answers = [fact.object] * len(fact.prompts)
    return attribute(lm, list(fact.prompts), answers, method=method, steps=STEPS)


# --- what is stored -------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["ig", "sig", "amig"])
def test_the_stored_neurons_are_those_of_the_dense_scores(model, data, runs, method):
    study = study_of(model, data, method)
    queries, lm = localise(study, steps=STEPS), study.lm()
    facts = study.facts()
    assert queries["fact"].unique().tolist() == [fact.id for fact in facts] and len(facts) == 5
    for fact in facts:
        rows, result = queries[queries["fact"] == fact.id], dense(lm, fact, method)
        assert rows["prompt"].tolist() == list(fact.prompts)
        assert rows["prompt_index"].tolist() == list(range(len(rows)))
        for t in (0.05, 0.2, 0.9):
            assert kn_sets(rows, t) == knowledge_neurons(result.scores, t)
        for i, row in enumerate(rows.to_dict("records")):
            wanted = result.scores[i].numpy()[row["layer"], row["neuron"]]
            assert row["score"] == pytest.approx(wanted, rel=1e-9, abs=1e-15)
            gap = result.completeness_gap[i].numpy()
            assert row["gap"] == pytest.approx(gap, rel=1e-6, abs=1e-12)
            tokens = tuple(map(len, lm.encode(fact.prompts[i], fact.object)))
            assert (row["prompt_tokens"], row["answer_tokens"]) == tokens
            assert [row[name] for name in ("relation", "subject", "object")] == fact.id.split("|")
        assert rows["probability"].to_numpy() == pytest.approx(result.probability.numpy(), rel=1e-9)
        assert rows["known"].tolist() == result.known.tolist()
    assert queries["answer_tokens"].max() == 2  # "new york"


@pytest.mark.parametrize("score", ["raw", "max"])
def test_the_stored_cas_lists_give_the_cas_neurons_of_the_dense_scores(model, data, runs, score):
    study = study_of(model, data)
    queries, found = localise(study, steps=STEPS), 0
    for fact in study.facts():
        scores = dense(study.lm(), fact, "ig").scores.numpy()
        if score == "max":
            scores = scores / scores.max((1, 2), keepdims=True)
        rows = queries[queries["fact"] == fact.id]
        assert rows["cas_layer"].iloc[1:].isna().all()
        for (b1, b2), threshold in product(CAS_BETAS, (0.1, 0.3, 0.7)):
            cas = b1 * scores.mean(0) - b2 * scores.std(0)
            kept = set(zip(*(cas > max(threshold * cas.max(), 0)).nonzero()))
            spec = dict(b1=b1, b2=b2, threshold=threshold, score=score)
            assert cas_neurons(rows.iloc[0], **spec) == kept
            found += len(kept)
    assert found > 100


def test_a_query_without_a_positive_score_has_no_neurons(model, data, monkeypatch):
    real = localize.attribute_encoded

    def attributed(*args):
        result = real(*args)
        result.scores[0] = -result.scores[0].abs()
        return result

    monkeypatch.setattr(localize, "attribute_encoded", attributed)
    lm, fact = load_model(model, device="cpu", dtype="float64"), load_facts(data)[0]
    frame = localize.localise_unit(lm, [asdict(fact)], method="ig", steps=2)
    first, *others = kn_sets(frame, 0.05)
    assert len(frame["layer"][0]) == 0 and first == set() and all(others)


# --- what is left out -----------------------------------------------------------------------------
def test_queries_that_cannot_be_read_are_counted_and_named_and_so_is_a_fact_left_with_one(
    model, tmp_path, runs
):
    patterns = {
        "P1": ["[X] lives in [Y] .", "the home of [X] is [Y] .", f"{LONG} [X] is [Y] ."],
        "P2": ["[X] speaks [Y] .", f"{LONG} the [X] has [Y] .", f"{LONG} the [X] is in [Y] ."],
        "P3": [f"{LONG} the the [X] is [Y] .", "[X] lives in [Y] .", "the home of [X] is [Y] ."],
    }
    facts = {"P1": [("ann", "rome"), ("bob", "new york")], "P2": [("dan", "latin")]}
    data = save_dataset(tmp_path, patterns, facts | {"P3": [("cy", "rome")]})
    queries = localise(study := study_of(model, data), steps=2)
    lost = study.load("left_out").set_index(["fact", "prompt"])["left_out"]
    names = ["P1|ann|rome"] * 3 + ["P1|bob|new york"] * 2 + ["P3|cy|rome"] * 2
    assert queries["fact"].tolist() == names and "left_out" not in queries
    assert queries["prompt_index"].tolist() == [0, 1, 2, 0, 1, 1, 2] and len(lost) == 5
    reason = lost["P1|bob|new york", f"{LONG} bob is"]  # one token more than with rome
    assert "17 tokens" in reason and "reads 16" in reason
    alone = "the only usable query of its fact; consistency needs two"
    assert lost["P2|dan|latin", "dan speaks"] == alone
    # the fact's moments are over its usable queries alone, and with the first that is stored
    assert cas_neurons(queries.iloc[5])
    first = queries.iloc[3]
    prompts = ["bob lives in", "the home of bob is"]
    scores = attribute(study.lm(), prompts, ["new york"] * 2, steps=2).scores.numpy()
    at = (np.asarray(first["cas_layer"]), np.asarray(first["cas_neuron"]))
    assert np.asarray(first["cas_mean"]) == pytest.approx(scores.mean(0)[at], rel=1e-9)
    assert np.asarray(first["cas_std"]) == pytest.approx(scores.std(0)[at], rel=1e-6, abs=1e-12)


def test_a_run_without_a_usable_fact_says_why(model, tmp_path, runs):
    patterns = [f"{LONG} {LONG} [X] {word} [Y] ." for word in ("is", "has", "in")]
    data = save_dataset(tmp_path, {"P1": patterns}, {"P1": [("ann", "rome")]})
    with pytest.raises(ValueError, match="no fact of this run has two usable queries.*27 tokens"):
        localise(study_of(model, data), steps=2)


# --- reruns ---------------------------------------------------------------------------------------
def test_what_a_later_notebook_reads_is_what_was_localised(model, data, runs, capsys):
    by_default = localised(study_of(model, data))
    said = capsys.readouterr().out
    assert "localising by the paper's rule: Spec(method='ig', steps=20, rule='right'" in said
    pd.testing.assert_frame_equal(localised(study_of(model, data)), by_default)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="steps is 1"):
        localise(study_of(model, data), steps=1)


def test_other_facts_are_localised_with_the_settings_of_those_that_are_saved(
    model, data, runs, capsys
):
    settings = dict(rule="converged", tolerance=0.2)
    localise(study_of(model, data, facts_per_relation=1), **settings)
    queries, said = localised(study_of(model, data)), capsys.readouterr().out
    assert "with the settings of what is saved: " in said
    assert "rule='converged'" in said and "tolerance=0.2" in said
    pd.testing.assert_frame_equal(queries, localise(study_of(model, data), **settings))
    assert queries["converged"].notna().all() and queries["fact"].nunique() == 5


def test_what_was_made_from_another_localisation_is_not_read(model, data, runs):
    study = study_of(model, data)
    queries = localise(study, steps=3)
    study.save(queries, "made_from_it")
    localize.localise_by_other_rule(study, queries, steps=3)
    pd.testing.assert_frame_equal(study_of(model, data).load("made_from_it"), queries)
    localise(study_of(model, data, "amig"), steps=2)  # each method has its own
    both = Study("02_consistency", **study.parameters | dict(method=None, methods=["ig", "amig"]))
    assert both.methods_done() == ["ig", "amig"] and both.methods_done("other_rule") == ["ig"]
    localise(study_of(model, data), steps=2)
    assert both.methods_done() == ["ig", "amig"] and both.methods_done("other_rule") == []
    with pytest.raises(ValueError, match="'made_from_it'.*made from other localisation"):
        study_of(model, data).load("made_from_it")


def test_units_are_not_computed_or_read_while_a_context_changes_the_model(tmp_path, monkeypatch):
    lm = load_model("demo/gpt2")
    monkeypatch.setattr(store, "cached_model", lambda *_: lm)
    prompts = ["The capital of France is", "France has the capital"]
    unit = [[dict(relation="P1", subject="France", object="Paris", prompts=prompts)]]
    task = localize.localise_unit
    run = partial(store.run_units, task, "demo/gpt2", unit, {"steps": 2}, root=tmp_path, desc="x")
    clean = run()
    for context in (scale_neurons(lm, [(0, 1)], 0.0), scale_synapses(lm, [(0, 1, 2)], 0.0)):
        with context, pytest.raises(ValueError, match="demo/gpt2 is being changed"):
            run()
    pd.testing.assert_frame_equal(run(), clean)


# --- the examples of Figure 1 ---------------------------------------------------------------------
def hand_made(*facts):
    """A `queries` frame of (id, known of each query, KN sets, all of layer 0)."""
    rows = []
    for fact, known, sets in facts:
        for index, (knows, one) in enumerate(zip(known, sets)):
            rows.append(query_row(fact, index, [(0, neuron) for neuron in one], known=knows))
    return pd.DataFrame(rows)


def test_example_facts_are_the_papers_else_the_most_and_the_least_consistent_known_ones():
    low, high = ("P1|low|x", [1, 1], [{1, 2}, {3}]), ("P1|high|x", [1, 1], [{1}, {1}])
    middle = ("P1|middle|x", [1, 1], [{1}, {1, 2}])
    unknown, other = ("P1|unknown|x", [1, 0], [{1}, {1}]), ("P1|other|x", [0, 0], [{1}, {2}])
    empty = ("P1|empty|x", [1, 1], [set(), set()])
    assert example_facts(hand_made(low, unknown, middle, empty)) == ["P1|middle|x", "P1|low|x"]
    assert example_facts(hand_made(unknown, low, high, middle)) == ["P1|high|x", "P1|low|x"]
    assert example_facts(hand_made(unknown, other)) == ["P1|unknown|x", "P1|other|x"]
    three = ("P1|three|x", [1] * 3, [{1}, {1, 2}, {3}]), ("P1|more|x", [1] * 3, [{1}] * 3)
    assert example_facts(hand_made(low, high, *three)) == ["P1|more|x", "P1|three|x"]
    paper = [("|".join(key), [0, 0], [{1}, {2}]) for key in localize.PAPER_EXAMPLES]
    assert example_facts(hand_made(high, *paper, low)) == [fact for fact, *_ in paper]


def test_example_maps_are_the_dense_attribution_and_the_activation(model, data, runs):
    study = study_of(model, data)
    queries = localise(study, steps=2)
    fact, lm = study.facts()[0], study.lm()
    maps = example_maps(lm, queries, [fact.id], method="ig", steps=2)
    assert [one["prompt"] for one in maps] == [fact.prompts[0], fact.prompts[-1]]
    for one in maps:
        active = last_activations(lm, one["prompt"])
        assert one["activation"] == pytest.approx(active, rel=1e-5, abs=1e-6)
        scores = attribute(lm, [one["prompt"]], [fact.object], steps=2).scores[0].numpy()
        assert one["attribution"] == pytest.approx(scores, abs=1e-12)


# --- Tables 1, 4 and 5 ----------------------------------------------------------------------------
def facts_of(cs2):
    """A `queries` frame of facts with these CS2: of ten neurons, so many tenths occur in more than
    one query."""
    rows = []
    for i, value in enumerate(cs2):
        shared = round(10 * value)
        sets = [range(10), range(shared), range(shared)]
        rows.append((f"P{1 + i % 2}|s{i}|x", [1, 1, 1], sets))
    return hand_made(*rows)


def test_table_1_by_hand():
    facts = {"ig": classified_facts(facts_of(5 * CS2))}  # 20 and 10, the least for a test
    static = table_1(facts, "demo/gpt2").set_index("threshold").loc["static"]
    one, two = np.array(5 * CS2[2:]), np.array(5 * CS2[:2])
    assert static[["n", "n_I", "n_II", "at"]].tolist() == [30, 20, 10, 0.1]
    assert static[["R_I", "R_II"]].tolist() == pytest.approx([4 / 6, 2 / 6])
    assert static[["S_I", "S_II"]].tolist() == pytest.approx([one.mean(), two.mean()])
    assert static["S_I_low"] <= static["S_I"] <= static["S_I_high"]
    welch = scipy_stats.ttest_ind(one, two, equal_var=False)
    wanted = (welch.statistic, welch.pvalue, welch.df)
    assert (static["t"], static["p"], static["df"]) == pytest.approx(wanted)


def test_an_empty_class_or_no_otsu_threshold_is_shown_with_nothing_made_up():
    table = table_1({"ig": classified_facts(facts_of((0.5, 0.6, 0.7, 0.7)))}, "demo/gpt2")
    static = table.set_index("threshold").loc["static"]
    assert (static["n"], static["n_I"], static["n_II"]) == (4, 4, 0)
    assert static["R_II"] == 0 and static["R_I"] == 1
    assert static[["S_II", "S_II_low", "S_II_high", "t", "p", "d", "df", "cap_II"]].isna().all()
    frame = classified_facts(facts_of((0.5, 0.5, 0.5)))
    assert frame["threshold_otsu"].isna().all() and frame["class_otsu"].isna().all()
    otsu = table_1({"ig": frame}, "demo/gpt2").set_index("threshold").loc["otsu"]
    assert otsu["n"] == 0 and otsu[["R_I", "R_II", "S_I", "S_II", "t"]].isna().all()


def test_facts_without_neurons_or_with_two_prompts_stand_apart():
    apart = hand_made(("P1|empty|x", [1] * 3, [set()] * 3), ("P1|two|x", [1, 1], [{1}, {1}]))
    facts = classified_facts(pd.concat([facts_of(CS2), apart], ignore_index=True))
    rest, empty, two = facts.iloc[:6], facts.iloc[6], facts.iloc[7]
    assert empty["undefined"] and two["two_prompts"] and two["cs1"] == 1
    assert not (rest["undefined"] | rest["two_prompts"]).any()
    columns = ["cs2", "class_static", "class_otsu"]
    assert facts.loc[6:, columns].isna().all(axis=None) and rest[columns].notna().all(axis=None)
    assert table_1({"ig": facts}, "demo/gpt2")["n"].tolist() == [6, 6]
    summary = consistency_summary({"ig": facts}).iloc[0]
    assert (summary["n"], summary["n_undefined"], summary["n_two_prompts"]) == (6, 1, 1)


def test_relations_stand_from_the_lowest_cs2_each_with_its_share_of_k_ii():
    """Facts of CS2 0, 0.2, 0.8 are of P1, the others of P2; P1303 is "instrument"."""
    facts = classified_facts(facts_of(CS2))
    facts["relation"] = facts["relation"].replace("P2", "P1303")
    table = relation_table({"ig": facts, "amig": facts[facts["relation"] == "P1"]})
    assert table[["method", "relation", "meaning", "n"]].values.tolist() == [
        ["amig", "P1", "–", 3],
        ["ig", "P1", "–", 3],
        ["ig", "P1303", "instrument", 3],
    ]
    assert table["cs2"].tolist() == pytest.approx([1 / 3, 1 / 3, 1.7 / 3])
    assert table["wordings"].tolist() == [3, 3, 3]
    assert table["R_II"].tolist() == pytest.approx([1 / 3] * 3)
    assert second_by_relation(facts) == {"P1": 1, "instrument": 1}
    nothing = facts.assign(cs2=np.nan, class_static=None)
    assert relation_table({"ig": nothing}).empty and second_by_relation(nothing) == {}


def test_cap_ii_is_the_share_that_all_three_methods_put_into_k_ii():
    cs2 = {"ig": (0.0, 0.1, 0.1, 0.9), "sig": (0.1, 0.0, 0.8, 0.9), "amig": (0.0, 0.9, 0.0, 0.9)}
    facts = {name: classified_facts(facts_of(values)) for name, values in cs2.items()}
    assert common_class_two(facts, "static") == 1 / 4
    table = table_1(facts, "demo/gpt2").set_index("threshold")
    assert table.loc["static", "cap_II"].tolist() == [0.25] * 3
    assert np.isnan(common_class_two({name: facts[name] for name in ("ig", "sig")}, "static"))
    facts["amig"] = classified_facts(facts_of((0.0, 0.0, 0.0, 0.0)))
    facts["amig"].loc[0, "class_static"] = None  # what one method cannot classify is in no share
    assert common_class_two(facts, "static") == 1 / 3


def test_the_papers_values_stand_beside_ours_for_its_models_alone():
    facts = {"ig": classified_facts(facts_of(CS2))}
    assert {"R_II_paper", "S_II_paper", "t_paper"} <= set(table_1(facts, "gpt2"))
    assert table_4(facts, "gpt2")["value_paper"].notna().any()
    own = [*table_1(facts, "demo/gpt2"), *table_4(facts, "demo/gpt2")]
    assert not [column for column in own if column.endswith("_paper")]


def test_table_5_is_the_first_query_of_each_relation():
    table = table_5(facts_of(CS2))[["relation", "answer", "example query"]]
    assert table.to_numpy().tolist() == [["P1", "x", "s0 0"], ["P2", "x", "s1 0"]]


def test_noise_is_cut_near_its_middle_and_its_classes_differ_enormously():
    facts = pd.DataFrame(dict(cs2=np.linspace(0.3, 0.7, 400)))
    null = otsu_null(facts, draws=50)
    assert 0.4 < null["R_II_low"] < null["R_II"] < null["R_II_high"] < 0.6 and null["n"] == 400
    # halves of a normal distribution: means 2 sqrt(2 / pi) apart, variance 1 - 2 / pi each
    wanted = 2 * np.sqrt(2 / np.pi) / np.sqrt((1 - 2 / np.pi) * 4 / 400)
    assert null["t"] == pytest.approx(wanted, rel=0.05)
    assert null == otsu_null(facts, draws=50) and null != otsu_null(facts, draws=50, seed=1)
    for few in ([], [0.5], [0.5, 0.5]):
        empty = otsu_null(pd.DataFrame(dict(cs2=np.array(few, float))))
        assert empty.pop("n") == len(few) and np.isnan(list(empty.values())).all()


def test_threshold_sensitivity_by_hand():
    queries = hand_made(
        ("P1|a|x", [1, 1, 1], [{1, 2}] * 3),
        ("P1|b|x", [1, 1, 1], [{1, 2}, {1, 3}, {1, 4}]),
        ("P1|two prompts|x", [1, 1], [{1, 2}, {1, 3}]),
    )  # which are left out
    queries["score"] = [[1.0, 0.15]] * 8  # neurons 2, 3 and 4 are there at t = 0.1 alone
    table = threshold_sensitivity(queries, (0.1, 0.2), (0.3, 0.5)).set_index(["t", "static"])
    assert table.loc[0.1, "cs2"].tolist() == pytest.approx([(1 + 1 / 4) / 2] * 2)
    assert table.loc[0.2, "cs2"].tolist() == [1, 1] and (table["n"] == 2).all()
    assert table["R_II"].tolist() == [0.5, 0.5, 0, 0]
