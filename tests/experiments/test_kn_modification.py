"""The experiment of notebooks 03 and 07 against plain code: one edit of the weights, one query at a
time."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from tiny import WORDS, save_checkpoint, save_dataset, tiny_lm, word_tokenizer

from qlutils import Fact, edit_weights, load_facts, load_model, paths, perplexity
from qlutils.experiments import kn_modification
from qlutils.experiments.cas_editing import cas_spec, cas_sweep
from qlutils.experiments.edit_tables import (
    AVG_NOTE,
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


def invented_queries(lm, facts_per_relation=4, prompts=4, seed=0):
    """Facts whose answers are mostly what the random model says anyway, with random sets of
    neurons."""
    rng = np.random.default_rng(seed)
    rows = []
    for relation in ("R1", "R2"):
        for f in range(facts_per_relation):
            texts = [" ".join(map(str, rng.integers(4, 97, 3 + k % 2))) for k in range(prompts)]
            ids = [[int(word) for word in text.split()] for text in texts]
            with torch.no_grad():
                best = [
                    int(lm.model(input_ids=torch.tensor([one])).logits[0, -1].argmax())
                    for one in ids
                ]
            words = [str(best[f % prompts])] + (
                ["50"] if f == 1 else []
            )  # one answer of two tokens
            for k, text in enumerate(texts):
                layer, neuron = (
                    rng.integers(0, lm.num_layers, 5),
                    rng.integers(0, lm.num_neurons, 5),
                )
                rows.append(
                    dict(
                        fact=f"{relation}|s{relation}{f}|{' '.join(words)}",
                        relation=relation,
                        subject=f"s{relation}{f}",
                        object=" ".join(words),
                        prompt_index=k,
                        prompt=text,
                        known=[best[k]] == [int(word) for word in words],
                        probability=0.5,
                        layer=layer,
                        neuron=neuron,
                        score=np.ones(5),
                    )
                )
    return pd.DataFrame(rows)


def facts_of(queries):
    return [
        Fact(r, s, o, ("a", "b"))
        for r, s, o in queries[["relation", "subject", "object"]]
        .drop_duplicates()
        .itertuples(index=False)
    ]


@pytest.fixture(scope="module")
def planned():
    lm = tiny_lm("llama3")
    queries = invented_queries(lm)
    texts = [" ".join(str(4 + (7 * i + j * j) % 93) for j in range(8 + i)) for i in range(4)]
    plans, omissions = plan_edits(
        queries,
        facts_of(queries),
        num_neurons=lm.num_neurons,
        sets=["local", "global"],
        controls=["random", "matched", "same_relation", "other_relation"],
        n_locality=6,
        texts=texts,
        ppl_entries=2,
    )
    return lm, queries, json.loads(json.dumps(plans)), omissions


def test_what_is_drawn_is_what_the_study_asks_for(planned):
    lm, queries, plans, _ = planned
    own = dict(zip(queries.index, kn_sets(queries)))
    objects = {
        f.relation: {g.object for g in facts_of(queries) if g.relation == f.relation}
        for f in facts_of(queries)
    }
    for plan in plans:
        group = queries[queries["fact"] == plan["fact"]]
        if any(plan["known"]):
            assert plan["known"][plan["query"]]
        assert plan["new_object"] in objects[plan["relation"]] - {plan["object"]}
        sets = {
            (e["neurons"], e["control"]): {tuple(pair) for pair in e["set"]} for e in plan["edits"]
        }
        assert sets["local", "none"] == own[group.index[plan["query"]]]
        assert sets["global", "none"] == set().union(*(own[i] for i in group.index))
        for name in ("local", "global"):
            count = lambda one: sorted(layer for layer, _ in one)  # noqa: E731
            assert not sets[name, "random"] & sets[name, "none"]
            assert count(sets[name, "random"]) == count(sets[name, "none"])
            for control in ("same_relation", "other_relation"):
                found = sets[name, control]
                of = [
                    fact
                    for fact, rows in queries.groupby("fact")
                    if found <= set().union(*(own[i] for i in rows.index))
                    and (rows["relation"].iloc[0] == plan["relation"])
                    == (control == "same_relation")
                ]
                assert of and not found & sets["global", "none"]
                assert not [
                    layer
                    for layer in range(lm.num_layers)
                    if count(found).count(layer) > count(sets[name, "none"]).count(layer)
                ]
        assert len(plan["locality"]) == 6 and sum(q["same"] for q in plan["locality"]) == 3
        for q in plan["locality"]:
            row = queries[
                (queries["prompt"] == q["prompt"]) & (queries["object"] == q["object"])
            ].iloc[0]
            assert row["subject"] != plan["subject"] and row["object"] != plan["object"]
            assert (row["relation"] == plan["relation"]) == q["same"]
        assert len(set(plan["texts"])) == 2


def test_draws_are_seeded_fact_by_fact(planned):
    _, queries, plans, _ = planned
    options = dict(num_neurons=48, sets=["local", "global"], controls=["random"], n_locality=6)
    again, _ = plan_edits(
        queries, facts_of(queries), texts=plans[0]["texts"] * 2, ppl_entries=2, **options
    )
    for one, two in zip(plans, again):  # other controls and texts do not move the other draws
        assert [one[k] for k in ("query", "new_object", "locality")] == [
            two[k] for k in ("query", "new_object", "locality")
        ]
    seeds = [
        plan_edits(queries, facts_of(queries), ppl_entries=0, seed=seed, **options)[0]
        for seed in range(4)
    ]
    assert len({tuple(plan["query"] for plan in plans) for plans in seeds}) > 1
    assert len({tuple(plan["new_object"] for plan in plans) for plans in seeds}) > 1


def by_generation(lm, prompt, length):
    ids = torch.tensor([[int(word) for word in prompt.split()]])
    out = lm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return " ".join(map(str, out[0, ids.shape[1] :].tolist()))


def test_the_metrics_equal_editing_the_weights_and_generating_one_query_at_a_time(
    planned, monkeypatch
):
    lm, _, plans, _ = planned
    monkeypatch.setattr(kn_modification, "BROKEN", 1.1)  # random weights break at no factor of ten
    frame = edit_facts(lm, plans, ppl_max_tokens=7)
    assert len(frame) == 2 * 10 * len(plans) and frame["note"].isna().all()
    for plan in plans:
        rows = frame[(frame["fact"] == plan["fact"]) & frame["control"].isin(["none", "random"])]
        clean = [by_generation(lm, q["prompt"], len(q["object"].split())) for q in plan["locality"]]
        before = perplexity(lm, plan["texts"], 7)
        for row in rows.to_dict("records"):
            edit = next(
                e
                for e in plan["edits"]
                if (e["neurons"], e["control"]) == (row["neurons"], row["control"])
            )
            goal = plan["object"] if row["op"] == "erase" else plan["new_object"]
            words = {k: [int(w) for w in plan[k].split()] for k in ("object", "new_object")}
            with edit_weights(
                lm, edit["set"], row["op"], old=words["object"], new=words["new_object"]
            ):
                said = [
                    by_generation(lm, prompt, len(goal.split())) == goal
                    for prompt in plan["prompts"]
                ]
                others = [
                    by_generation(lm, q["prompt"], len(q["object"].split()))
                    for q in plan["locality"]
                ]
                kept = [answer == before for answer, before in zip(others, clean)]
                spilt = [
                    by_generation(lm, q["prompt"], len(plan["new_object"].split()))
                    for q in plan["locality"]
                    if q["known"] and q["object"] != plan["new_object"]
                ]
                after = perplexity(lm, plan["texts"], 7)
                each = [perplexity(lm, [text], 7) for text in plan["texts"]]
            alone = [perplexity(lm, [text], 7) for text in plan["texts"]]
            broken = [now > 1.1 * then for now, then in zip(each, alone)]
            done = [float(s == (row["op"] == "update")) for s in said]
            assert row["reached"] == done
            at, known = plan["query"], plan["known"]
            near = [k for k in range(len(done)) if k != at]
            sure = [kept[k] for k, q in enumerate(plan["locality"]) if q["known"]]
            new = (
                [answer == plan["new_object"] for answer in spilt] if row["op"] == "update" else []
            )
            expected = dict(
                rel=done[at] if known[at] else np.nan,
                rel_all=done[at],
                gen_all=np.mean([done[k] for k in near]),
                gen=(
                    np.mean([done[k] for k in near if known[k]])
                    if any(known[k] for k in near) and known[at]
                    else np.nan
                ),
                loc=np.mean(sure) if sure else np.nan,
                loc_all=np.mean(kept),
                loc_new=np.mean(new) if new else np.nan,
                ppl_before=before,
                ppl_after=after,
                dppl=(after - before) / before,
                broken=np.mean(broken),
                n_neurons=len(edit["set"]),
            )
            expected["avg_all"] = np.mean([expected[k] for k in ("rel_all", "gen_all", "loc_all")])
            expected["avg"] = np.mean([expected[k] for k in ("rel", "gen", "loc")])
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=1e-6, nan_ok=True), (
                    plan["fact"],
                    row["op"],
                    name,
                )
    assert frame["rel"].nunique() > 1 and frame["loc_all"].nunique() > 2  # the edits do something
    assert frame["loc_new"].nunique() > 1 and frame["broken"].nunique() > 1


def test_every_fact_alone_gives_the_numbers_it_has_in_a_unit(planned):
    lm, _, plans, _ = planned
    together = edit_facts(lm, plans, ppl_max_tokens=7)
    alone = pd.concat(
        [edit_facts(lm, [plan], ppl_max_tokens=7) for plan in plans[:3]], ignore_index=True
    )
    pd.testing.assert_frame_equal(
        together[together["fact"].isin(alone["fact"])].reset_index(drop=True), alone, rtol=1e-9
    )


def test_matched_neurons_are_of_the_same_layers_and_no_kns_of_the_fact(planned):
    lm, _, plans, _ = planned
    frame = edit_facts(lm, plans, ops=["erase"]).set_index(["fact", "neurons", "control"])
    for plan in plans:
        sets = {(e["neurons"], e["control"]): e["set"] for e in plan["edits"]}
        own, matched = sets["local", "none"], matched_neurons(lm, plan, sets["local", "none"])
        assert sorted(layer for layer, _ in own) == sorted(layer for layer, _ in matched)
        assert not [neuron for neuron in matched if neuron in plan["kns"]]
        assert frame.loc[(plan["fact"], "local", "matched"), "n_neurons"] == len(matched)


def test_what_cannot_be_measured_is_named_and_counted():
    lm = tiny_lm("gpt2")
    queries = invented_queries(lm, facts_per_relation=1)
    queries.loc[queries["relation"] == "R1", "known"] = False
    queries["score"] = [np.zeros(5) if r == "R2" else np.ones(5) for r in queries["relation"]]
    plans, omissions = plan_edits(
        queries,
        facts_of(queries),
        num_neurons=lm.num_neurons,
        controls=["random"],
        n_locality=4,
        ppl_entries=0,
    )
    reasons = set(
        zip(omissions["fact"].str[:2], omissions["what"], omissions["reason"].str.split(":").str[0])
    )
    assert {
        ("R1", "rel, gen", "no known query"),
        ("R1", "update", "relation R1 has no other object to update to"),
        ("R2", "local", "no neurons"),
        ("R2", "global", "no neurons"),
    } <= reasons
    frame = edit_facts(lm, plans)
    update = frame[frame["op"] == "update"]
    assert len(update) == 8 and update["note"].notna().all() and update["rel_all"].isna().all()
    erase = frame[frame["op"] == "erase"].set_index(["relation", "neurons", "control"])
    assert erase.loc["R1"]["rel"].isna().all() and erase.loc["R1"]["rel_all"].notna().all()
    empty = erase.loc["R2"]
    assert (
        (empty["n_neurons"] == 0).all()
        and (empty["loc_all"] == 1).all()
        and (empty["p_before"] == empty["p_after"]).all()
    )
    table = measures_table(
        frame,
        pd.DataFrame(dict(fact=frame["fact"].unique(), class_static="I", class_otsu=None)),
        "tiny",
    )
    assert (
        table[(table["class"] == "II")]["n"].eq(0).all()
        and table[table["class"] == "II"]["rel"].isna().all()
    )
    assert table[table["op"] == "erasure"]["n_empty"].iloc[0] == 1
    with pytest.raises(ValueError, match="needs 5 entries an edit and the corpus has 1"):
        plan_edits(queries, facts_of(queries), num_neurons=512, texts=["10 11"], ppl_entries=5)
    with pytest.raises(ValueError, match="control 'none' is unknown"):
        plan_edits(queries, facts_of(queries), num_neurons=512, controls=["none"], ppl_entries=0)
    with pytest.raises(KeyError, match="both"):
        plan_edits(queries, facts_of(queries), num_neurons=512, sets=["both"], ppl_entries=0)


def test_the_paper_s_values_stand_beside_ours_for_its_models_only(planned):
    lm, _, plans, _ = planned
    frame = edit_facts(lm, plans, ops=["erase"])
    classes = pd.DataFrame(
        dict(
            fact=[p["fact"] for p in plans],
            class_static=["I", "II"] * 4,
            class_otsu=["II", "I"] * 4,
        )
    )
    own = measures_table(frame, classes, "demo/gpt2")
    paper = measures_table(frame, classes, "gpt2")
    assert not any(name.endswith("_paper") for name in own)
    row = paper[
        (paper["threshold"] == "static") & (paper["class"] == "II") & (paper["neurons"] == "global")
    ].iloc[0]
    assert [row[f"{name}_paper"] for name in ("rel", "gen", "loc", "avg", "dppl")] == [
        0.65,
        0.6,
        0.7,
        0.65,
        2.02,
    ]
    mine = frame[
        (frame["neurons"] == "global")
        & (frame["control"] == "none")
        & frame["fact"].isin(classes["fact"][1::2])
    ]
    assert row["n"] == 4 and np.isnan([row["rel_low"], row["rel_high"]]).all()
    assert row["rel"] == pytest.approx(mine["rel"].mean()) and row["dppl"] == pytest.approx(
        mine["dppl"].median()
    )
    gap = contrasts(
        frame[frame["control"] == "none"], "neurons", ("global", "local"), ["loc_all"], ["op"]
    ).iloc[0]
    means = frame[frame["control"] == "none"].groupby("neurons")["loc_all"].mean()
    assert gap["difference"] == pytest.approx(means["global"] - means["local"])
    assert gap["n"] == gap["n_other"] == len(plans)


def edited(n, **changed):
    """Rows as of `edit_facts`, one erasure of each of n facts of three relations, in one class."""
    rows = [
        dict(
            fact=f"f{i}",
            relation=f"P{i % 3}",
            op="erase",
            neurons="local",
            control="none",
            note=None,
        )
        | dict(n_neurons=1, rel=1.0, gen=0.5, loc=0.9, avg=0.8, dppl=0.1 * i / n, broken=0.0)
        for i in range(n)
    ]
    return pd.DataFrame(rows).assign(**changed)


def table_of(frame):
    classes = pd.DataFrame(dict(fact=frame["fact"], class_static="I", class_otsu="I"))
    table = measures_table(frame, classes, "demo/gpt2", sets=["local"], controls=[])
    return table[(table["threshold"] == "all") & (table["op"] == "erasure")].iloc[0]


def test_a_perplexity_that_explodes_is_told_by_its_median_and_its_share_of_broken_texts():
    calm = table_of(edited(20))
    assert calm["dppl"] == pytest.approx(np.median([0.1 * i / 20 for i in range(20)]))
    assert calm["broken"] == 0 and calm["dppl_mean"] == pytest.approx(0.1 * 9.5 / 20)
    last = np.arange(20) == 19
    row = table_of(edited(20, dppl=np.where(last, 4e10, 0.1), broken=np.where(last, 0.6, 0.0)))
    assert row["dppl"] == row["dppl_high"] == 0.1 and row["broken"] == pytest.approx(0.03)
    assert np.isnan(row["dppl_mean"])  # 2e9, of one edit
    both = pd.concat(
        [edited(20, neurons="global", dppl=np.where(last, 4e10, 0.3)), edited(20, dppl=0.1)]
    )
    gap = contrasts(both, "neurons", ("global", "local"), ["dppl"], ["op"]).iloc[0]
    assert gap["difference"] == pytest.approx(0.2) and gap["difference_high"] < 1


def test_avg_says_of_how_many_edits_it_is_where_its_parts_are_of_more():
    """A third of the facts have no known neighbour, and so no Gen and no Avg; those have a Rel of
    0."""
    none = np.arange(30) % 3 == 0
    avg = np.where(none, np.nan, 0.8)
    row = table_of(
        edited(30, rel=np.where(none, 0.0, 1.0), gen=np.where(none, np.nan, 0.5), avg=avg)
    )
    assert (row["n"], row["n_rel"], row["n_gen"], row["n_loc"], row["n_avg"]) == (
        30,
        30,
        20,
        30,
        20,
    )
    assert (
        row["avg"]
        == pytest.approx(0.8)
        != pytest.approx((row["rel"] + row["gen"] + row["loc"]) / 3)
    )
    assert "not the mean of the columns beside it" in AVG_NOTE


def test_classes_are_compared_where_a_threshold_fills_both_and_the_rest_is_said_in_short():
    frame = edited(30)
    frame["rel"] = [1.0, 0.0] * 15
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
    sweep = cas_sweep(parameters, (1.0, 0.7), (0.1, 0.3))
    assert sweep["spec"].tolist()[1] == sweep["spec"].tolist()[3] == cas_spec(parameters)
    assert sweep["spec"].tolist()[0] == dict(b1=1.0, b2=0.0, threshold=0.3, score="raw")


def teach(folder, facts, steps=60):
    """Train the checkpoint in `folder` until it answers the facts' prompts."""
    lm = load_model(folder, device="cpu")
    optimizer = torch.optim.Adam(lm.model.requires_grad_(True).parameters(), 3e-3)
    encoded = [lm.encode(prompt, fact.object) for fact in facts for prompt in fact.prompts]
    longest = max(len(p) + len(a) for p, a in encoded)
    ids = torch.tensor([p + a + [0] * (longest - len(p) - len(a)) for p, a in encoded])
    labels = torch.tensor(
        [[-100] * len(p) + a + [-100] * (longest - len(p) - len(a)) for p, a in encoded]
    )
    for _ in range(steps):
        optimizer.zero_grad()
        lm.model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    lm.model.save_pretrained(folder)


# --- the notebooks --------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["gpt2"])
def test_notebooks_03_and_07_make_tables_2_and_3_from_their_own_edits(
    family, tmp_path, runs, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["lives", "rome", "oslo", "latin", "norse", "new", "york"]
    data = save_dataset(tmp_path / "data")
    model = save_checkpoint(tmp_path / "model", family, word_tokenizer(WORDS))
    teach(model, load_facts(data))
    corpus = tmp_path / "text.txt"
    corpus.write_text(
        "\n".join(" ".join(words[(i + j) % 7] for j in range(6 + i)) for i in range(5)) + "\n"
    )
    shared = dict(
        model=model,
        data=data,
        facts_per_relation=None,
        device="cpu",
        output="small",
        corpus=str(corpus),
        ppl_entries=2,
        ppl_max_tokens=7,
        n_locality=4,
    )
    for name, others in (
        ("03_kn_modification", dict(more_controls_facts=2)),
        ("07_cas_editing", dict(sweep_facts=2)),
    ):
        papermill.execute_notebook(
            paths.ROOT / "notebooks" / f"{name}.ipynb",
            tmp_path / f"{name}.ipynb",
            progress_bar=False,
            parameters={**shared, **others},
        )
    results = next(Path(runs / "small" / "results").glob("*/ig"))
    for stem, saved, sets in (("table2", "edits", 2), ("table3", "cas_edits", 3)):
        table, edits = (
            pd.read_csv(results / f"{stem}.csv"),
            pd.read_parquet(results / f"{saved}.parquet"),
        )
        assert all((results / f"{stem}.{kind}").is_file() for kind in ("md", "tex"))
        assert len(table) == 5 * 2 * sets * 2
        every = table[table["threshold"] == "all"].set_index(["op", "neurons"])
        for (op, neurons, control), part in edits.groupby(["op", "neurons", "control"]):
            row = every.loc[
                {"erase": "erasure", "update": "update"}[op],
                neurons if control == "none" else f"{neurons} ({control})",
            ]
            done = part[part["note"].isna()]
            assert row["n"] == len(done)
            for metric in ("rel", "gen", "loc", "avg", "broken"):
                assert row[metric] == pytest.approx(done[metric].mean(), rel=1e-9, nan_ok=True)
            assert row["dppl"] == pytest.approx(done["dppl"].median(), rel=1e-9, nan_ok=True)
            assert row["n_avg"] == done["avg"].notna().sum()
        assert (
            0 < edits[edits["control"] == "none"]["rel"].mean() < 1 and edits["loc"].notna().any()
        )
    record = json.loads((results / "run.json").read_text())
    assert record["07_cas_editing"]["parameters"]["beta1"] == 0.7
