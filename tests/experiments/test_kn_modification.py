"""The experiment of notebooks 03 and 07 against plain code: one edit of the weights, one query at a
time; and the tables that are made of it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import query_row, tiny_lm

from qlutils import Fact, edit_weights, perplexity
from qlutils.experiments import kn_modification
from qlutils.experiments.cas_editing import cas_spec, cas_sweep
from qlutils.experiments.edit_tables import (
    by_class,
    class_contrasts,
    contrasts,
    measures_table,
    verdict_counts,
    with_verdicts,
)
from qlutils.experiments.kn_modification import edit_facts, matched_neurons, plan_edits
from qlutils.neurons.sets import kn_sets

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = ["neurons", "control"]
CONTROLS = ["random", "matched", "same_relation", "other_relation"]


def ids(text):
    return [int(word) for word in text.split()]


def invented_queries(lm, facts_per_relation=4, prompts=4, seed=0):
    """Facts whose answers are mostly what the random model says anyway, with random sets of
    neurons."""
    rng = np.random.default_rng(seed)
    rows = []
    for relation, f in np.ndindex(2, facts_per_relation):
        texts = [" ".join(map(str, rng.integers(4, 97, 3 + k % 2))) for k in range(prompts)]
        best = [by_generation(lm, text, 1) for text in texts]
        answer = best[f % prompts] + " 50" * (f == 1)  # one answer of two tokens
        fact = f"R{relation + 1}|sR{relation + 1}{f}|{answer}"
        for k, text in enumerate(texts):
            layer, neuron = (rng.integers(0, n, 5) for n in (lm.num_layers, lm.num_neurons))
            kns = list(zip(layer.tolist(), neuron.tolist()))
            rows.append(query_row(fact, k, kns, prompt=text, known=best[k] == answer))
    return pd.DataFrame(rows)


def by_generation(lm, prompt, length):
    prompt = torch.tensor([ids(prompt)])
    tokens = dict(max_new_tokens=length, min_new_tokens=length, pad_token_id=0, eos_token_id=None)
    mask = torch.ones_like(prompt)
    out = lm.model.generate(input_ids=prompt, attention_mask=mask, do_sample=False, **tokens)
    return " ".join(map(str, out[0, prompt.shape[1] :].tolist()))


def planned_of(queries, lm, **options):
    named = queries[["relation", "subject", "object"]].drop_duplicates()
    facts = [Fact(*names, ("a", "b")) for names in named.itertuples(index=False)]
    return plan_edits(queries, facts, **dict(num_neurons=lm.num_neurons, ppl_entries=0) | options)


@pytest.fixture(scope="module")
def planned():
    lm = tiny_lm("llama3")
    queries = invented_queries(lm)
    texts = [" ".join(str(4 + (7 * i + j * j) % 93) for j in range(8 + i)) for i in range(4)]
    options = dict(controls=CONTROLS, n_locality=6, texts=texts, ppl_entries=2)
    plans, _ = planned_of(queries, lm, **options)
    return lm, queries, json.loads(json.dumps(plans))


def sets_of(plan):
    return {(e["neurons"], e["control"]): set(map(tuple, e["set"])) for e in plan["edits"]}


def layers(neurons):
    return np.bincount([layer for layer, _ in neurons], minlength=3)


def test_what_is_drawn_is_what_the_study_asks_for(planned):
    lm, queries, plans = planned
    queries = queries.assign(kns=kn_sets(queries))
    every = {fact: set().union(*kns) for fact, kns in queries.groupby("fact")["kns"]}
    relation = dict(zip(queries["fact"], queries["relation"]))
    for plan in plans:
        group = queries[queries["fact"] == plan["fact"]]
        assert plan["known"][plan["query"]] or not any(plan["known"])
        others = queries.loc[queries["relation"] == plan["relation"], "object"]
        assert plan["new_object"] in set(others) - {plan["object"]}
        sets = sets_of(plan)
        assert sets["local", "none"] == group["kns"].iloc[plan["query"]]
        assert sets["global", "none"] == every[plan["fact"]]
        for name in ("local", "global"):
            own, random = sets[name, "none"], sets[name, "random"]
            assert not random & own and (layers(random) == layers(own)).all()
            matched = matched_neurons(lm, plan, own)
            assert not set(map(tuple, matched)) & every[plan["fact"]]
            assert (layers(own) == layers(matched)).all()
            for control in ("same_relation", "other_relation"):
                found, same = sets[name, control], control == "same_relation"
                of = [fact for fact, kns in every.items() if found <= kns]
                assert [f for f in of if (relation[f] == plan["relation"]) == same]
                assert not found & every[plan["fact"]] and (layers(found) <= layers(own)).all()
        assert len(plan["locality"]) == 6 and sum(q["same"] for q in plan["locality"]) == 3
        for q in plan["locality"]:
            row = queries[queries[["prompt", "object"]].eq([q["prompt"], q["object"]]).all(axis=1)]
            row = row.iloc[0]
            assert row["subject"] != plan["subject"] and row["object"] != plan["object"]
            assert (row["relation"] == plan["relation"]) == q["same"]
        assert len(set(plan["texts"])) == 2


def test_no_new_object_is_the_beginning_of_the_old_one():
    """Which an update would be said to give, edit or no edit."""
    names = ["New York City", "New York", "Rome"]
    rows = [query_row(f"R|s{name}|{name}", k, [(0, 1)]) for name in names for k in range(2)]
    queries = pd.DataFrame(rows)
    facts = [Fact("R", f"s{name}", name, ("a", "b")) for name in names]
    for seed in range(8):
        options = dict(num_neurons=4, n_locality=1, ppl_entries=0, seed=seed)
        plans, _ = plan_edits(queries, facts, **options)
        assert plans[0]["new_object"] == "Rome"


def test_draws_are_seeded_fact_by_fact(planned):
    lm, queries, plans = planned
    texts = plans[0]["texts"] * 2
    again, _ = planned_of(queries, lm, n_locality=6, texts=texts, ppl_entries=2)
    for one, two in zip(plans, again):  # other controls and texts do not move the other draws
        for name in ("query", "new_object", "locality"):
            assert one[name] == two[name]
    seeds = [planned_of(queries, lm, seed=seed)[0] for seed in range(4)]
    for name in ("query", "new_object"):
        assert len({tuple(plan[name] for plan in plans) for plans in seeds}) > 1


def answers(lm, queries, words=None):
    """What greedy decoding gives for each query, as many tokens as `words` or its object has."""
    return [by_generation(lm, q["prompt"], len((words or q["object"]).split())) for q in queries]


def mean(values):
    return np.mean(values) if len(values) else np.nan


def perplexities(lm, texts):
    return np.array([perplexity(lm, some, 7) for some in (texts, *([text] for text in texts))])


def by_hand(lm, plan, edit, op, clean):
    """An edit's measures, by editing the weights and generating one query at a time."""
    goal = plan["object"] if op == "erase" else plan["new_object"]
    new = f"{plan['new_object']} "
    others = [q for q in plan["locality"] if not f"{q['object']} ".startswith(new)]
    elsewhere = [q for q in others if q["known"]]
    own = [dict(prompt=prompt) for prompt in plan["prompts"]]
    before = perplexities(lm, plan["texts"])
    objects = dict(old=ids(plan["object"]), new=ids(plan["new_object"]))
    with edit_weights(lm, edit["set"], op, **objects):
        done = [float((said == goal) == (op == "update")) for said in answers(lm, own, goal)]
        kept = [said == was for said, was in zip(answers(lm, plan["locality"]), clean)]
        new = [said == plan["new_object"] for said in answers(lm, elsewhere, plan["new_object"])]
        after = perplexities(lm, plan["texts"])
    at, known = plan["query"], plan["known"]
    near = [k for k in range(len(done)) if k != at]
    found = dict(rel_all=done[at], gen_all=mean([done[k] for k in near]), loc_all=mean(kept))
    found["rel"] = done[at] if known[at] else np.nan
    found["gen"] = mean([done[k] for k in near if known[k]]) if known[at] else np.nan
    found["loc"] = mean([one for one, q in zip(kept, plan["locality"]) if q["known"]])
    for end in ("", "_all"):
        found[f"avg{end}"] = np.mean([found[f"{name}{end}"] for name in ("rel", "gen", "loc")])
    found |= dict(ppl_before=before[0], ppl_after=after[0], dppl=(after[0] / before[0] - 1))
    found |= dict(loc_new=mean(new) if op == "update" else np.nan, n_neurons=len(edit["set"]))
    return found | dict(broken=mean(after[1:] > 1.1 * before[1:])), done


def test_the_metrics_equal_editing_the_weights_and_generating_one_query_at_a_time(
    planned, monkeypatch
):
    lm, _, plans = planned
    monkeypatch.setattr(kn_modification, "BROKEN", 1.1)  # random weights break at no factor of ten
    frame = edit_facts(lm, plans, ppl_max_tokens=7)
    assert len(frame) == 2 * 10 * len(plans) and frame["note"].isna().all()
    rows = frame.set_index(["fact", "op", *KEY])
    for plan in plans:
        clean = answers(lm, plan["locality"])
        for edit in (e for e in plan["edits"] if e["control"] in ("none", "random")):
            for op in ("erase", "update"):
                row = rows.loc[(plan["fact"], op, edit["neurons"], edit["control"])]
                expected, done = by_hand(lm, plan, edit, op, clean)
                found = row[list(expected)].astype(float).to_dict()
                assert found == pytest.approx(expected, rel=1e-6, nan_ok=True), row.name
                assert row["reached"] == done
    assert frame["rel"].nunique() > 1 and frame["loc_all"].nunique() > 2  # the edits do something
    assert frame["loc_new"].nunique() > 1 and frame["broken"].nunique() > 1


def test_controls_edited_alone_have_the_numbers_that_they_have_beside_the_sets(planned):
    lm, queries, plans = planned
    together = edit_facts(lm, plans)
    only, _ = planned_of(queries, lm, controls=CONTROLS, own=False, n_locality=6)
    controls = edit_facts(lm, only).set_index(["fact", *KEY, "op"])
    beside = together[together["control"] != "none"].set_index(["fact", *KEY, "op"])
    assert set(controls.index) == set(beside.index) and "matched" in controls.index.levels[2]
    texts = ["ppl_before", "ppl_after", "dppl", "broken"]  # which these controls have none of
    beside, controls = beside.drop(columns=texts), controls.loc[beside.index].drop(columns=texts)
    pd.testing.assert_frame_equal(controls, beside, rtol=1e-9)


def test_what_cannot_be_measured_is_named_and_counted():
    lm = tiny_lm("gpt2")
    queries = invented_queries(lm, facts_per_relation=1)
    queries.loc[queries["relation"] == "R1", "known"] = False
    queries["score"] = [np.zeros(5) if r == "R2" else np.ones(5) for r in queries["relation"]]
    plans, omissions = planned_of(queries, lm, n_locality=4)
    reasons = omissions["reason"].str.split(":").str[0]
    update = ("R1", "update", "relation R1 has no other object to update to")
    named = {("R1", "rel, gen", "no known query"), update, ("R2", "global", "no neurons")}
    assert named <= set(zip(omissions["fact"].str[:2], omissions["what"], reasons))
    frame = edit_facts(lm, plans)
    update = frame[frame["op"] == "update"]
    assert len(update) == 8 and update["note"].notna().all() and update["rel_all"].isna().all()
    erase = frame[frame["op"] == "erase"].set_index("relation")
    assert erase.loc["R1", "rel"].isna().all() and erase.loc["R1", "rel_all"].notna().all()
    empty = erase.loc["R2"]
    assert (empty["n_neurons"] == 0).all() and (empty["loc_all"] == 1).all()
    assert (empty["p_before"] == empty["p_after"]).all()
    classes = dict(fact=frame["fact"].unique(), class_static="I", class_otsu=None)
    table = measures_table(frame, pd.DataFrame(classes), "tiny")
    second = table[table["class"] == "II"]
    assert (second["n"] == 0).all() and second["rel"].isna().all()
    assert table[table["op"] == "erasure"]["n_empty"].iloc[0] == 1


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(texts=["10 11"], ppl_entries=5), "needs 5 entries an edit and the corpus has 1"),
        (dict(controls=["none"]), "control 'none' is unknown"),
        (dict(sets=["both"]), "'both'"),
    ],
)
def test_a_wrong_choice_is_named(planned, options, said):
    with pytest.raises((ValueError, KeyError), match=said):
        planned_of(planned[1], planned[0], **options)


# --- tables ---------------------------------------------------------------------------------------
def edited(n, **changed):
    """Rows as of `edit_facts`, one erasure of each of n facts of three relations, in one class."""
    frame = pd.DataFrame(dict(fact=[f"f{i}" for i in range(n)], dppl=np.arange(n) / n / 10))
    frame["relation"] = [f"P{i % 3}" for i in range(n)]
    which = dict(op="erase", neurons="local", control="none", note=None, n_neurons=1)
    return frame.assign(**which, rel=1.0, gen=0.5, loc=0.9, avg=0.8, broken=0.0).assign(**changed)


def table_of(frame):
    classes = pd.DataFrame(dict(fact=frame["fact"], class_static="I", class_otsu="I"))
    table = measures_table(frame, classes, "demo/gpt2", sets=["local"], controls=[])
    return table[(table["threshold"] == "all") & (table["op"] == "erasure")].iloc[0]


def test_a_class_has_the_means_of_its_facts_and_the_papers_values_stand_beside_for_its_models():
    second = np.arange(8) % 2
    frame = edited(8, neurons="global", rel=second)
    classes = dict(fact=frame["fact"], class_static=["I", "II"] * 4, class_otsu=["II", "I"] * 4)
    classes = pd.DataFrame(classes)
    assert not any(measures_table(frame, classes, "demo/gpt2").columns.str.endswith("_paper"))
    paper = measures_table(frame, classes, "gpt2").set_index(["threshold", "class", "neurons"])
    row = paper.loc[("static", "II", "global")].iloc[0]
    printed = row[[f"{name}_paper" for name in ("rel", "gen", "loc", "avg", "dppl")]]
    assert printed.tolist() == [0.65, 0.6, 0.7, 0.65, 2.02]
    assert (row["n"], row["rel"], row["dppl"]) == (4, 1, pytest.approx(0.05))
    assert row[["rel_low", "rel_high"]].isna().all()  # of four facts


def test_a_perplexity_that_explodes_is_told_by_its_median_and_its_share_of_broken_texts():
    calm = table_of(edited(20))
    assert calm[["dppl", "dppl_mean"]].tolist() == pytest.approx([0.1 * 9.5 / 20] * 2)
    last = np.arange(20) == 19
    row = table_of(edited(20, dppl=np.where(last, 4e10, 0.1), broken=np.where(last, 0.6, 0.0)))
    assert row["dppl"] == row["dppl_high"] == 0.1 and row["broken"] == pytest.approx(0.03)
    assert calm["broken"] == 0 and np.isnan(row["dppl_mean"])  # else 2e9, of one edit
    both = [edited(20, neurons="global", dppl=np.where(last, 4e10, 0.3)), edited(20, dppl=0.1)]
    gap = contrasts(pd.concat(both), "neurons", ("global", "local"), ["dppl"], ["op"]).iloc[0]
    assert gap["difference"] == pytest.approx(0.2) and gap["difference_high"] < 1


def test_avg_says_of_how_many_edits_it_is_where_its_parts_are_of_more():
    none = np.arange(30) % 3 == 0  # of a known neighbour: so no Gen, no Avg, and here a Rel of 0
    gen, avg = (np.where(none, np.nan, value) for value in (0.5, 0.8))
    row = table_of(edited(30, rel=np.where(none, 0.0, 1.0), gen=gen, avg=avg))
    assert row["n":"n_empty"].tolist() == [30, 0] and row["avg"] == pytest.approx(0.8)
    assert row[["n_rel", "n_gen", "n_loc", "n_avg"]].tolist() == [30, 20, 30, 20]


def test_classes_are_compared_where_a_threshold_fills_both_and_the_rest_is_said_in_short():
    frame = edited(30, rel=[1.0, 0.0] * 15)
    classes = pd.DataFrame(dict(fact=frame["fact"], class_static="I", class_otsu=["I", "II"] * 15))
    assert list(by_class(frame, classes)) == ["all facts", "K_I (otsu)", "K_II (otsu)"]
    gaps = with_verdicts(class_contrasts(frame, classes)).set_index(["threshold", "metric"])
    assert gaps.loc[("otsu", "rel"), ["difference", "verdict"]].tolist() == [1, "lies above 0"]
    assert set(gaps["op"]) == {"erasure"} and ("otsu", "median dPPL") in gaps.index
    rel = class_contrasts(frame, classes).query("metric == 'rel'")
    assert verdict_counts(rel, "I minus II") == "I minus II: lies above 0 in 1 of 1"
    none = class_contrasts(frame, classes.assign(class_otsu="I"))
    assert verdict_counts(none, "I minus II") == "I minus II: nothing to compare"


def test_the_cas_sweep_varies_one_setting_at_a_time():
    parameters = dict(beta1=0.7, beta2=0.3, cas_threshold=0.3, cas_score="raw")
    specs = cas_sweep(parameters, (1.0, 0.7), (0.1, 0.3))["spec"].tolist()
    assert specs[1] == specs[3] == cas_spec(parameters)
    assert specs[0] == dict(b1=1.0, b2=0.0, threshold=0.3, score="raw")
