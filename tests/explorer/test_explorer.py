"""The explorer's functions against naive computations, and its page driven from code, on the
bundled GPT-2."""

import json
import os
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from qlutils import attribute, knowledge_neurons, load_facts
from qlutils.change.scaling import answer_probability, scale_neurons
from qlutils.change.synapses import Row, above_threshold, column_scores, run_rows
from qlutils.driver.execute import execute, kernel_environment
from qlutils.experiments.localize import localise
from qlutils.explorer import fact as explorer
from qlutils.explorer.fact import (
    agreement,
    as_code,
    attention_received,
    change,
    choose_neurons,
    control_facts,
    facts_using,
    kn_map,
    kn_table,
    look,
    losses,
    neuron_activations,
    neuron_tokens,
    overlap_figure,
    parse_neurons,
    predictions,
    saved_queries,
    saved_spec,
    typed_fact,
)
from qlutils.explorer.page import (
    Page,
    agreement_html,
    effects_html,
    explore,
    neuron_html,
    png,
    prompts_html,
)
from qlutils.facts import Fact
from qlutils.model.passes import attention_implementation
from qlutils.neurons.cas import cas_candidates, cas_neurons
from qlutils.neurons.sets import consistency, neighbour_sets
from qlutils.paths import NOTEBOOKS
from qlutils.study import store
from qlutils.study.notebook import Study

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def lm():
    return store.cached_model("demo/gpt2", None, None)


@pytest.fixture(scope="module")
def facts():
    return load_facts("demo")


@pytest.fixture(scope="module")
def fact(facts):
    found = next(f for f in facts if f.id == "P36|France|Paris")
    return replace(found, prompts=found.prompts[:3])


@pytest.fixture(scope="module")
def view(lm, fact):
    return look(lm, fact)


@pytest.fixture(scope="module")
def controls(lm, facts, fact):
    return control_facts(lm, facts, fact)


@pytest.fixture
def page(runs, lm):
    made = Page()
    assert "scores computed now" in made.status.value
    return made


def logits(lm, ids):
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids])).logits[0].double()


def weights(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


# --- what a prompt shows --------------------------------------------------------------------------


def test_answers_have_the_probability_rank_and_runners_up_of_a_plain_forward_pass(lm, fact):
    prompts, answer = (
        [*fact.prompts, "Lausanne has signed a town twinning agreement with"],
        fact.object,
    )
    for row, prompt in zip(
        predictions(lm, prompts, answer, top=3).itertuples(), prompts, strict=True
    ):
        ids, target = lm.encode(prompt, answer)
        p = torch.softmax(logits(lm, ids + target), -1)[len(ids) - 1 : -1]
        at = p[range(len(target)), target]
        order = p[0].argsort(descending=True).tolist()
        assert row.probability == pytest.approx(float(at.prod()), rel=1e-4)
        assert row.known == (p.argmax(-1).tolist() == target)
        assert row.rank == order.index(target[0]) + 1
        others = [i for i in order if i != target[0]][:3]
        assert [token for token, _ in row.runners_up] == [lm.tokenizer.decode([i]) for i in others]
        assert [q for _, q in row.runners_up] == pytest.approx(
            [float(p[0, i]) for i in others], rel=1e-4
        )


def test_attention_received_is_the_mean_column_of_the_models_own_attention(lm, fact):
    tokens, shares = attention_received(lm, fact.prompts[0])
    ids = lm.encode_prompt(fact.prompts[0])
    with torch.no_grad(), attention_implementation(lm.model, "eager"):
        own = torch.stack(
            lm.model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
        )
    assert "".join(tokens) == fact.prompts[0] and shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(shares, own.mean((0, 1, 2, 3)), rtol=1e-4)


# --- neurons --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.05, 0.2, 0.55])
def test_sets_at_any_threshold_come_from_stored_scores_and_equal_those_of_the_dense_ones(view, t):
    scores = attribute(view.lm, view.fact.prompts, [view.fact.object] * 3).scores
    sets = knowledge_neurons(scores, t)
    assert view.sets(t) == sets
    assert choose_neurons(view, t, "cas") == cas_neurons(cas_candidates(scores))
    for name, want in neighbour_sets(sets, 1).items():
        assert choose_neurons(view, t, name, prompt=1) == want
    shown, want = agreement(view, t), consistency(sets)
    assert (shown["cs1"], shown["cs2"], shown["sizes"]) == (
        want.cs1,
        want.cs2,
        [len(s) for s in sets],
    )
    table = kn_table(view, t)
    assert {(l, n): p for l, n, p in zip(table["layer"], table["neuron"], table["prompts"])} == {
        neuron: " ".join(f"q{i}" for i in range(3) if neuron in sets[i])
        for neuron in set().union(*sets)
    }
    assert table["n"].is_monotonic_decreasing
    top = scores.flatten(1).amax(1)
    for row in table.head(5).itertuples():
        want = max(
            float(scores[i, row.layer, row.neuron] / top[i])
            for i in range(3)
            if (row.layer, row.neuron) in sets[i]
        )
        assert row.score == pytest.approx(want, rel=1e-5)


def test_overlap_bars_count_each_neuron_in_exactly_one_combination_of_prompts(view):
    bars, dots = overlap_figure(view, 0.2, most=100).axes
    sets = view.sets(0.2)
    assert sum(patch.get_height() for patch in bars.patches) == len(set().union(*sets))
    assert max(patch.get_height() for patch in bars.patches) == max(
        len({n for n in set().union(*sets) if {i for i in range(3) if n in sets[i]} == who})
        for who in ({0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}, {0, 1, 2})
    )
    assert [label.get_text() for label in dots.get_yticklabels()] == [
        f"q{i}: {len(s)} KNs" for i, s in enumerate(sets)
    ]


def test_the_map_has_a_dot_for_every_knowledge_neuron_and_rings_the_chosen_one(view):
    ax = kn_map(view, 0.2, (2, 7)).axes[0]
    [dots], [ring] = ax.collections, ax.lines
    assert {(int(y), int(x)) for x, y in dots.get_offsets()} == set().union(*view.sets(0.2))
    assert ring.get_xydata().tolist() == [[7, 2]]


def test_a_neurons_tokens_are_ordered_by_the_product_of_its_value_vector_and_the_unembedding(lm):
    value = lm.model.transformer.h[3].mlp.c_proj.weight[41]  # Conv1D: a neuron is a row
    score = lm.model.lm_head.weight @ value
    shown, order = neuron_tokens(lm, (3, 41), top=5), score.argsort(descending=True)
    assert shown["promotes"].tolist() == [lm.tokenizer.decode([i]) for i in order[:5]]
    assert shown["suppresses"].tolist() == [lm.tokenizer.decode([i]) for i in order.flip(0)[:5]]
    np.testing.assert_allclose(
        shown["suppresses_score"], score[order.flip(0)[:5]].detach(), rtol=1e-4
    )


def test_a_neurons_page_has_its_activation_at_the_last_token_of_each_prompt(view):
    neuron, seen = (1, 5), []
    down = view.lm.model.transformer.h[1].mlp.c_proj
    hook = down.register_forward_pre_hook(lambda _, x: seen.append(x[0][0, -1, 5].item()))
    for prompt in view.fact.prompts:
        logits(view.lm, view.lm.encode_prompt(prompt))
    hook.remove()
    shown = neuron_activations(view, neuron, 0.2)
    assert shown["activation"].tolist() == pytest.approx(seen, rel=1e-4, abs=1e-6)
    assert shown["kn"].tolist() == [neuron in one for one in view.sets(0.2)]


def test_other_facts_that_use_a_neuron_are_counted_over_their_prompts():
    rows = [
        ("a", [1, 2], [1.0, 0.1]),
        ("a", [1, 2], [1.0, 0.5]),
        ("b", [1, 2], [0.1, 1.0]),
        ("c", [1], [1.0]),
    ]
    saved = pd.DataFrame([dict(fact=f, layer=[0] * len(n), neuron=n, score=s) for f, n, s in rows])
    assert facts_using(saved, (0, 2), 0.2).to_dict("list") == {
        "fact": ["a", "b"],
        "n": [1, 1],
        "of": [2, 1],
    }
    assert facts_using(saved, (0, 1), 0.2, but="a")["fact"].tolist() == ["c"]
    assert facts_using(None, (0, 1), 0.2).empty


def test_a_fact_without_knowledge_neurons_is_drawn_empty(view):
    nothing = [np.zeros(0)] * 3
    empty = replace(view, frame=view.frame.assign(layer=nothing, neuron=nothing, score=nothing))
    assert (
        png(kn_map(empty, 0.2)) and png(overlap_figure(empty, 0.2)) and kn_table(empty, 0.2).empty
    )
    assert np.isnan(agreement(empty, 0.2)["cs1"]) and choose_neurons(empty, 0.2, "union") == set()
    assert neuron_activations(empty, (0, 0), 0.2)["share"].tolist() == [0, 0, 0]


# --- cached results -------------------------------------------------------------------------------


def test_scores_of_a_run_are_read_instead_of_computed_unless_the_prompts_differ(
    runs, lm, monkeypatch
):
    study = Study(
        "01_localize", model="demo/gpt2", method="ig", relations=["P36"], facts_per_relation=1
    )
    localise(study)
    [fact] = study.facts()
    saved = saved_queries("demo/gpt2", "ig")
    assert (
        saved_queries("demo/gpt2", "sig") is None
        and saved_queries("demo/gpt2", "ig", steps=10) is None
    )
    fresh = look(lm, fact, "ig")
    monkeypatch.setattr(explorer, "localise_unit", lambda *_, **__: pytest.fail("computed"))
    read = look(lm, fact, "ig", saved)
    assert (read.source, fresh.source) == ("read from a saved run", "computed now")
    assert read.sets(0.1) == fresh.sets(0.1)
    with pytest.raises(pytest.fail.Exception, match="computed"):
        look(lm, replace(fact, prompts=fact.prompts[:2]), "ig", saved)


def test_what_is_computed_beside_a_saved_run_is_computed_by_the_runs_own_rule(runs, lm, fact):
    study = Study(
        "01_localize", model="demo/gpt2", method="ig", relations=["P36"], facts_per_relation=1
    )
    assert saved_spec("demo/gpt2", "ig") == {}
    localise(study, rule="converged", tolerance=0.2)
    [other] = study.facts()
    spec = saved_spec("demo/gpt2", "ig")
    assert (spec["rule"], spec["tolerance"]) == ("converged", 0.2)
    assert saved_queries("demo/gpt2", "ig") is None  # by the default rule there is nothing
    saved = saved_queries("demo/gpt2", "ig", **spec)
    page = Page(fact=other.id)
    assert "read from a saved run" in page.status.value
    pd.testing.assert_frame_equal(page.saved, saved)
    page.source.value, page.prompts.value = "typed", "\n".join(fact.prompts)
    page.answer.value = fact.object
    page.run.click()
    assert "computed now" in page.status.value and page.view.frame["converged"].notna().all()
    wanted = look(lm, page.view.fact, "ig", saved, rule="converged", tolerance=0.2)
    assert page.view.sets(0.1) == wanted.sets(0.1)
    code, run = page.code.value, {}
    assert "    rule='converged',\n" in code and "    tolerance=0.2\n" in code
    exec(compile(code, "copied", "exec"), run)
    assert run["sets"] == page.view.sets(page.t.value)


# --- changes --------------------------------------------------------------------------------------


def test_controls_share_neither_subject_nor_object_and_one_is_of_the_same_relation(
    lm, facts, fact, controls
):
    assert [name for name, _ in controls] == ["same relation", "other relation"]
    (_, same), (_, other) = controls
    assert same.relation == fact.relation != other.relation
    assert all(f.subject != fact.subject and f.object != fact.object for f in (same, other))
    assert predictions(lm, [same.prompts[0]], same.object)["known"][0]
    assert control_facts(lm, facts, fact) == controls  # seeded


def test_suppression_is_a_hook_that_zeroes_the_neurons_at_the_last_prompt_token(view, controls):
    neurons = choose_neurons(view, 0.2, "self")
    result = change(view, neurons, "suppress", controls)

    def zero(layer):
        def hook(_, inputs):
            x = inputs[0].clone()
            x[0, -1, [n for l, n in neurons if l == layer]] = 0
            return (x,)

        return hook

    handles = [
        down.register_forward_pre_hook(zero(layer)) for layer, down in enumerate(view.lm.downs)
    ]
    for row in result.itertuples():
        ids, target = view.lm.encode(row.prompt, row.answer)
        if len(target) == 1:
            p = torch.softmax(logits(view.lm, ids)[-1], -1)
            assert row.after == pytest.approx(float(p[target[0]]), rel=1e-3)
            assert row.top_after == view.lm.tokenizer.decode([int(p.argmax())])
    [handle.remove() for handle in handles]
    assert result["role"].tolist() == [
        "q0",
        "q1",
        "q2",
        "control: same relation",
        "control: other relation",
    ]
    assert result["after"][0] < result["before"][0]
    assert change(view, set(), "suppress")["change"].tolist() == [0, 0, 0]


def test_synapses_of_one_prompt_are_scaled_in_all_and_combine_with_neurons(view, controls):
    lm, (prompt, answer) = view.lm, (view.fact.prompts[1], view.fact.object)
    ids, target = lm.encode(prompt, answer)
    columns = above_threshold(*column_scores(lm, [ids])[0], 0.3)
    want = run_rows(lm, [Row(ids, target, columns, 0.0)])[0, 0]
    alone = change(view, set(), "none", synapses=0.0, prompt=1)
    assert (
        alone["after"][1] == pytest.approx(want, rel=1e-3)
        and alone["after"][1] != alone["before"][1]
    )
    neurons = choose_neurons(view, 0.2, "self", 1)
    both = change(view, neurons, "suppress", synapses=0.0, prompt=1)
    assert both["after"][1] != alone["after"][1]
    assert both["after"][1] != change(view, neurons, "suppress", prompt=1)["after"][1]


def test_an_update_moves_probability_from_the_old_answer_to_the_new(view):
    result = change(view, choose_neurons(view, 0.2, "union"), "update", new="Madrid")
    assert (result["new_after"] > result["new_before"]).any() and (
        result["after"] < result["before"]
    ).any()


def test_losses_are_means_of_what_is_defined_of_the_prompt_the_others_and_the_controls():
    roles = ["q0", "q1", "q2", "control: same relation", "control: other relation"]
    effects = pd.DataFrame({"role": roles, "change": [-0.9, -0.4, -0.2, 0.1, np.nan]})
    shown = losses(effects, prompt=1)
    assert shown["of"].tolist() == ["other wordings", "q1", "controls"]
    assert shown["loss"].tolist() == pytest.approx([0.55, 0.4, -0.1])
    assert shown["n"].tolist() == [2, 1, 1]


@pytest.mark.parametrize("action", explorer.ACTIONS)
def test_weights_are_bit_identical_after_every_change_and_after_one_that_fails(
    view, action, monkeypatch
):
    before, neurons = weights(view.lm), choose_neurons(view, 0.2, "union")
    change(view, neurons, action, new="Madrid", synapses=2.0)
    calls = []

    def fails_inside_the_change(*_):  # the first three calls measure what is before it
        calls.append(
            {
                name: not torch.equal(before[name], now)
                for name, now in view.lm.model.state_dict().items()
            }
        )
        return torch.ones(2) if len(calls) <= 3 else 1 / 0

    monkeypatch.setattr(explorer, "next_token", fails_inside_the_change)
    with pytest.raises(ZeroDivisionError):
        change(view, neurons, action, new="Madrid", synapses=2.0)
    assert any(calls[-1].values()) == (action in ("erase", "update"))
    monkeypatch.undo()
    after = view.lm.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (
        not view.lm.__dict__.get("scales")
        and change(view, set(), "none")["change"].abs().max() == 0
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(action="burn"), "action 'burn'"),
        (dict(action="update"), "needs a new answer"),
        (dict(action="suppress", neurons={(99, 0)}), "outside demo/gpt2"),
    ],
)
def test_an_unusable_change_is_named(view, options, message):
    with pytest.raises(ValueError, match=message):
        change(view, options.pop("neurons", set()), **options)


def test_hand_picked_neurons_are_read_from_text_or_refused_by_name(lm):
    assert parse_neurons(lm, " 3:17,4:2  3:17") == {(3, 17), (4, 2)}
    for text in ("", "3", "3:x", "3:1:2", "-1:2", "3:999999"):
        with pytest.raises(ValueError, match="neuron"):
            parse_neurons(lm, text)


def test_typed_prompts_make_a_fact_and_a_single_one_has_no_agreement(lm):
    fact = typed_fact(" France chose\n\nFrance chose \n", " Paris ")
    assert fact.prompts == ("France chose",) and fact.object == "Paris"
    view = look(lm, fact)
    assert np.isnan(agreement(view, 0.2)["cs2"]) and "–" in agreement_html(view, 0.2)
    assert choose_neurons(view, 0.2, "self")
    with pytest.raises(ValueError, match="only one prompt"):
        choose_neurons(view, 0.2, "union")
    with pytest.raises(ValueError, match="at least one prompt"):
        typed_fact(" \n", "Paris")
    with pytest.raises(ValueError, match="type the answer"):
        typed_fact("France chose", " ")


# --- copy as code ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(which="self", action="suppress", prompt=1),
        dict(which="intersection", action="enhance", synapses=0.0),
        dict(which="cas", action="erase"),
        dict(which="picked", picked="0:3, 2:10", action="update", new="Madrid"),
        dict(which="refine", action="none", synapses=2.0),
    ],
    ids=lambda o: f"{o['which']}-{o['action']}",
)
def test_the_copied_code_computes_the_numbers_shown(view, controls, options, monkeypatch):
    monkeypatch.setattr("qlutils.load_model", {"demo/gpt2": view.lm}.__getitem__, raising=False)
    which, action = options["which"], options["action"]
    extra = {name: options[name] for name in ("new", "synapses") if name in options}
    neurons = choose_neurons(view, 0.15, which, options.get("prompt", 0), options.get("picked", ""))
    shown = change(view, neurons, action, controls, prompt=options.get("prompt", 0), **extra)
    run = {}
    exec(compile(as_code(view, 0.15, controls=controls, **options), "copied", "exec"), run)
    assert run["neurons"] == neurons and run["sets"] == view.sets(0.15)
    np.testing.assert_allclose(run["before"], shown["before"], rtol=1e-5)
    np.testing.assert_allclose(run["after"], shown["after"], rtol=1e-5)
    if action == "update":
        np.testing.assert_allclose(run["after_new"], shown["new_after"], rtol=1e-5)


def test_quotes_and_newlines_in_text_cannot_break_out_of_the_copied_code(view):
    evil = '"""\nraise SystemExit  # \\ \' {0}'
    code = as_code(
        replace(view, fact=Fact("typed", "s", evil, (evil,))), 0.2, action="update", new=evil
    )
    compile(code, "copied", "exec")
    assert not any(line.startswith("raise") for line in code.splitlines())


# --- HTML -----------------------------------------------------------------------------------------


def test_no_text_from_outside_becomes_markup(lm):
    fact = typed_fact(f"{EVIL} lives in\nThe city of {EVIL} is", f"Paris {EVIL}")
    view = look(lm, fact, steps=2)
    result = change(
        view,
        {(0, 1)},
        "update",
        [("same <b>", Fact("r", "s", EVIL, (f"{EVIL} is", "x y")))],
        new=EVIL,
    )
    saved = view.frame.assign(fact=f"r|{EVIL}|o")
    neuron = next(iter(view.sets(0.2)[0]))
    tokens = [([EVIL], None), ([EVIL], np.ones(1))] * len(view.attention)
    pieces = [
        prompts_html(view),
        effects_html(result, EVIL),
        neuron_html(view, neuron, 0.05, saved),
        prompts_html(replace(view, attention=tokens[: len(view.attention)])),
    ]
    for piece in pieces:
        assert "<script" not in piece and "<img" not in piece and "same <b>" not in piece
    assert all("&lt;script" in piece for piece in (pieces[1], *pieces[3:]))


# --- the page -------------------------------------------------------------------------------------


def test_sliding_selects_among_scores_without_computing_any(page, monkeypatch):
    for name in ("localise_unit", "look", "predictions", "neuron_vectors", "attention_received"):
        monkeypatch.setattr(explorer, name, lambda *_, **__: pytest.fail("computed while sliding"))
    before = page.page_numbers.value, page.map.value, page.overlap.value, page.page_table.value
    page.t.value = 0.5
    after = page.page_numbers.value, page.map.value, page.overlap.value, page.page_table.value
    assert all(a != b for a, b in zip(before, after)) and "computed now" in page.status.value
    assert f">{len(set().union(*page.view.sets(0.5)))}<" in page.page_numbers.value


def test_another_fact_is_shown_after_run_and_the_first_comes_from_memory(page, monkeypatch):
    first = page.page_prompts.value
    page.relation.value = "P37"
    assert page.page_prompts.value == first
    page.run.click()
    assert page.view.fact.relation == "P37" and page.page_prompts.value != first
    monkeypatch.setattr(explorer, "look", lambda *_, **__: pytest.fail("computed again"))
    page.relation.value, page.fact.value = "P36", "P36|France|Paris"
    page.run.click()
    assert page.page_prompts.value == first


def test_buttons_show_before_and_after_beside_controls_and_leave_the_weights(page):
    before = weights(page.view.lm)
    page.new.value = "Madrid"
    for action, button in page.buttons.items():
        page.page_effects.value = ""
        button.click()
        assert "control: same relation" in page.page_effects.value, page.status.value
        assert ("choose above" in page.page_effects.value) == (
            action == "none"
        )  # synapses are left alone, too
        assert page.effects["role"].str.startswith("control").sum() == 2
        assert ("edit_weights(" in page.code.value) == (action in ("erase", "update"))
    assert all(
        torch.equal(before[name], tensor)
        for name, tensor in page.view.lm.model.state_dict().items()
    )


def test_a_neuron_can_be_picked_and_changed(page):
    page.neuron.value = page.neuron.options[2][1]
    assert f"Layer {page.neuron.value[0]}, neuron {page.neuron.value[1]}" in page.page_neuron.value
    page.pick.click()
    page.other.value = "4:7"
    page.pick.click()
    want = {tuple(page.neuron.value), (4, 7)}
    assert page.which.value == "picked" and "2 neurons" in page.set_size.value
    page.buttons["suppress"].click()
    with scale_neurons(page.view.lm, want, 0.0):
        p = answer_probability(page.view.lm, [page.view.fact.prompts[0]], [page.view.fact.object])
    assert page.effects["after"][0] == pytest.approx(float(p[0]), rel=1e-4)


def test_only_stock_widgets_are_used(page):
    """So that JupyterLab and VS Code show it without an extension."""
    seen = [page]
    for one in seen:
        seen += getattr(one, "children", ())
    assert len(seen) > 30 and {one._model_module for one in seen} == {"@jupyter-widgets/controls"}


def test_the_script_is_that_of_the_controls_and_the_button_pressed_last(page):
    page.buttons["enhance"].click()
    page.t.value, page.which.value, page.prompt.value, page.synapses.value = 0.3, "union", 2, 0.0
    for line in (
        "t=0.3)",
        "neurons = neighbour_sets(sets, 2)['union']",
        "on_synapses = scale_synapses(lm, find_synapses(lm, prompts[2]), 0.0)",
        "on_neurons = scale_neurons(lm, neurons, 2.0)",
    ):
        assert line in page.code.value


def test_a_new_facts_page_begins_with_its_most_shared_neuron(page):
    page.neuron.value = kept = page.neuron.options[3][1]
    page.t.value = 0.25
    assert page.neuron.value == kept  # one that is still a KN stays chosen
    page.fact.value = "P36|Germany|Berlin"
    page.run.click()
    assert page.neuron.index == 0


def test_typed_prompts_replace_the_fact(page):
    page.source.value = "typed"
    assert page.of_data.layout.display == "none" and page.of_user.layout.display != "none"
    page.prompts.value, page.answer.value = (
        "The capital of Spain is\nFor its capital, Spain chose",
        "Madrid",
    )
    page.run.click()
    page.buttons["suppress"].click()
    assert page.effects["role"].tolist() == ["q0", "q1", "control: other relation"]


def test_problems_are_a_line_in_place_and_the_page_goes_on(page, capsys):
    def said(word):
        assert (
            word in page.status.value
            and "b00020" in page.status.value
            and "Traceback" not in page.status.value
        )

    page.model.value = "demo/none<b>"
    page.run.click()
    said("demo/none&lt;b&gt;")
    page.model.value = "demo/gpt2"
    page.source.value, page.prompts.value = "typed", "."
    page.run.click()
    said("single token")
    page.prompts.value = ""
    page.run.click()
    said("at least one prompt")
    page.source.value = "data"
    page.picked.value, page.which.value = "nonsense", "picked"
    said("layer:neuron")
    page.buttons["suppress"].click()
    said("layer:neuron")
    page.which.value, page.new.value = "self", ""
    page.buttons["update"].click()
    said("new answer")
    page.run.click()
    page.buttons["enhance"].click()
    assert (
        "computed now" in page.status.value
        and "Enhanced" in page.page_effects.value
        and not page.run.disabled
    )
    assert capsys.readouterr().err == ""


def test_a_wrong_start_is_said_on_the_page(runs):
    assert "nowhere" in Page(data="nowhere").status.value
    assert "relation|subject|object" in Page(fact="P36|France").status.value


def test_without_a_front_end_a_line_says_where_to_look(capsys, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JPY_", "VSCODE_", "COLAB_")):
            monkeypatch.delenv(name)
    assert explore() is None and "JupyterLab" in capsys.readouterr().out


def test_the_notebook_draws_a_fixed_example_under_papermill(runs, tmp_path):
    done = tmp_path / "done.ipynb"
    env = kernel_environment(tmp_path / "kernel", QLUTILS_RUNS=runs, OMP_NUM_THREADS=1)
    env.pop("JPY_SESSION_NAME", None)
    parameters = {"fact": "P37|Australia|English", "t": 0.3}
    failed = execute(NOTEBOOKS / "explore_fact.ipynb", done, parameters, env, tmp_path / "log")
    assert failed == ""
    outputs = [out for cell in nbformat.read(done, 4).cells for out in cell.get("outputs", ())]
    data = [out.get("data", {}) for out in outputs]
    assert sum("image/png" in one for one in data) == 2 and "widget-view" not in json.dumps(data)
    assert any("control: other relation" in one.get("text/html", "") for one in data)
    assert all(
        "Australia" in one["text/html"] for one in data if "runners-up" in one.get("text/html", "")
    )
