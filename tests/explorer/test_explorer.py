"""The explorer's functions against naive computations, and its page driven from code."""

import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from IPython.display import HTML, Image
from tiny import run_cells

from qlutils import attribute, knowledge_neurons, load_facts
from qlutils.change.scaling import answer_probability, scale_neurons
from qlutils.experiments.localize import localise
from qlutils.explorer import fact as ex
from qlutils.explorer.page import Page, effects_html, explore, neuron_html, png, prompts_html
from qlutils.facts import Fact
from qlutils.model.passes import attention_implementation
from qlutils.neurons.cas import cas_candidates, cas_neurons
from qlutils.neurons.sets import consistency, neighbour_sets
from qlutils.paths import NOTEBOOKS
from qlutils.study import store
from qlutils.study.notebook import Study

ROLES = ["q0", "q1", "q2", "control: same relation", "control: other relation"]
NO_NEURONS = ("", "3", "3:x", "3:1:2", "-1:2", "3:999999")
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def lm():
    return store.cached_model("demo/gpt2", None, None)


@pytest.fixture(scope="module")
def facts():
    return load_facts("demo")


@pytest.fixture(scope="module")
def fact(facts):
    found = ex.find_fact(facts)
    assert found.id == "P36|France|Paris"
    return replace(found, prompts=found.prompts[:3])


@pytest.fixture(scope="module")
def view(lm, fact):
    return ex.look(lm, fact)


@pytest.fixture(scope="module")
def controls(lm, facts, fact):
    return ex.control_facts(lm, facts, fact)


@pytest.fixture
def page(runs, lm):
    made = Page()
    assert "scores computed now" in made.status.value
    return made


@torch.no_grad()
def next_tokens(lm, ids):
    """(T, V) probabilities after each token of a plain forward pass."""
    return torch.softmax(lm.model(input_ids=torch.tensor([ids])).logits[0].double(), -1)


def weights(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same_weights(lm, before):
    return all(torch.equal(before[name], now) for name, now in lm.model.state_dict().items())


def forbid(monkeypatch, *names):
    """Calling one of these functions of the explorer ends the test from now on."""
    for name in names:
        monkeypatch.setattr(ex, name, lambda *_, **__: pytest.fail("computed again"))


def ran(code):
    """The names that a copied script leaves."""
    namespace = {}
    exec(compile(code, "copied", "exec"), namespace)
    return namespace


# --- what a prompt shows --------------------------------------------------------------------------
def test_answers_have_the_probability_rank_and_runners_up_of_a_plain_forward_pass(lm, fact):
    prompts = [*fact.prompts, "Lausanne has signed a town twinning agreement with"]
    found = ex.predictions(lm, prompts, fact.object)
    for row, prompt in zip(found.itertuples(), prompts, strict=True):
        ids, target = lm.encode(prompt, fact.object)
        p = next_tokens(lm, ids + target)[len(ids) - 1 : -1]
        order = p[0].argsort(descending=True).tolist()
        expected = float(p[range(len(target)), target].prod())
        assert row.probability == pytest.approx(expected, rel=1e-4)
        assert row.known == (p.argmax(-1).tolist() == target)
        assert row.rank == order.index(target[0]) + 1
        others = [i for i in order if i != target[0]][:4]
        words, shares = zip(*row.runners_up)
        assert list(words) == [lm.tokenizer.decode([i]) for i in others]
        assert shares == pytest.approx(p[0, others].tolist(), rel=1e-4)


def test_attention_received_is_the_mean_column_of_the_models_own_attention(lm, fact):
    tokens, shares = ex.attention_received(lm, fact.prompts[0])
    ids = torch.tensor([lm.encode_prompt(fact.prompts[0])])
    with torch.no_grad(), attention_implementation(lm.model, "eager"):
        own = torch.stack(lm.model(input_ids=ids, output_attentions=True).attentions)
    assert "".join(tokens) == fact.prompts[0]
    np.testing.assert_allclose(shares, own.mean((0, 1, 2, 3)), rtol=1e-4)


# --- neurons --------------------------------------------------------------------------------------
@pytest.mark.parametrize("t", [0.05, 0.2, 0.55])
def test_sets_at_any_threshold_come_from_stored_scores_and_equal_those_of_the_dense_ones(view, t):
    scores = attribute(view.lm, view.fact.prompts, [view.fact.object] * 3).scores
    sets = knowledge_neurons(scores, t)
    assert view.sets(t) == sets
    assert ex.choose_neurons(view, t, "cas") == cas_neurons(cas_candidates(scores))
    for name, want in neighbour_sets(sets, 1).items():
        assert ex.choose_neurons(view, t, name, prompt=1) == want
    shown, want = ex.agreement(view, t), consistency(sets)
    assert (shown["cs1"], shown["cs2"]) == (want.cs1, want.cs2)
    assert shown["sizes"] == list(map(len, sets)) and shown["union"] == len(set().union(*sets))
    table = ex.kn_table(view, t)
    assert set(zip(table["layer"], table["neuron"])) == set().union(*sets)
    assert table["n"].is_monotonic_decreasing
    shares = (scores / scores.amax((1, 2), keepdim=True)).numpy()
    for row in table.itertuples():
        prompts = [i for i in range(3) if (row.layer, row.neuron) in sets[i]]
        assert row.prompts == " ".join(f"q{i}" for i in prompts) and row.n == len(prompts)
        assert row.score == pytest.approx(shares[prompts, row.layer, row.neuron].max(), rel=1e-5)


def test_the_figures_show_every_knowledge_neuron_once(view):
    sets = view.sets(0.2)
    bars, dots = ex.overlap_figure(view, 0.2, most=100).axes
    heights = [patch.get_height() for patch in bars.patches]
    every = set().union(*sets)
    owners = [tuple(neuron in one for one in sets) for neuron in every]
    assert sum(heights) == len(every) and max(heights) == max(map(owners.count, owners))
    names = [label.get_text() for label in dots.get_yticklabels()]
    assert names == [f"q{i}: {len(one)} KNs" for i, one in enumerate(sets)]
    ax = ex.kn_map(view, 0.2, (2, 7)).axes[0]
    [dots], [ring] = ax.collections, ax.lines
    assert {(int(y), int(x)) for x, y in dots.get_offsets()} == every
    assert ring.get_xydata().tolist() == [[7, 2]]


def test_a_neurons_tokens_are_ordered_by_the_product_of_its_value_vector_and_the_unembedding(lm):
    value = lm.model.transformer.h[3].mlp.c_proj.weight[41]  # Conv1D: a neuron is a row
    score = (lm.model.lm_head.weight @ value).detach()
    shown, order = ex.neuron_tokens(lm, (3, 41)), score.argsort(descending=True)
    for name, best in (("promotes", order[:8]), ("suppresses", order.flip(0)[:8])):
        assert shown[name].tolist() == [lm.tokenizer.decode([i]) for i in best]
        np.testing.assert_allclose(shown[f"{name}_score"], score[best], rtol=1e-4)


def test_a_neurons_page_has_its_activation_at_the_last_token_of_each_prompt(view):
    seen = []
    down = view.lm.model.transformer.h[1].mlp.c_proj
    hook = down.register_forward_pre_hook(lambda _, x: seen.append(x[0][0, -1, 5].item()))
    for prompt in view.fact.prompts:
        next_tokens(view.lm, view.lm.encode_prompt(prompt))
    hook.remove()
    shown = ex.neuron_activations(view, (1, 5), 0.2)
    assert shown["activation"].tolist() == pytest.approx(seen, rel=1e-4, abs=1e-6)
    row = ex.kn_table(view, 0.2).iloc[0]
    shown = ex.neuron_activations(view, (row["layer"], row["neuron"]), 0.2)
    assert shown["kn"].sum() == row["n"]
    assert shown["share"].max() == pytest.approx(row["score"]) and len(shown) == 3


def test_other_facts_that_use_a_neuron_are_counted_over_their_prompts():
    scores = {"a": [[1.0, 0.1], [1.0, 0.5]], "b": [[0.1, 1.0]], "c": [[1.0, 0.0]]}
    rows = [dict(fact=name, score=score) for name, found in scores.items() for score in found]
    saved = pd.DataFrame(rows).assign(layer=[[0, 0]] * 4, neuron=[[1, 2]] * 4)
    found = ex.facts_using(saved, (0, 2), 0.2)
    assert found.to_numpy().tolist() == [["a", 1, 2], ["b", 1, 1]]
    assert ex.facts_using(saved, (0, 1), 0.2, but="a")["fact"].tolist() == ["c"]


def test_a_fact_without_knowledge_neurons_is_drawn_empty(view):
    nothing = [np.zeros(0)] * 3
    empty = replace(view, frame=view.frame.assign(layer=nothing, neuron=nothing, score=nothing))
    assert png(ex.kn_map(empty, 0.2)) and png(ex.overlap_figure(empty, 0.2))
    assert ex.kn_table(empty, 0.2).empty and ex.choose_neurons(empty, 0.2, "union") == set()
    assert np.isnan(ex.agreement(empty, 0.2)["cs1"])
    assert ex.neuron_activations(empty, (0, 0), 0.2)["share"].tolist() == [0, 0, 0]


# --- cached results -------------------------------------------------------------------------------
def a_run(**spec):
    """A run of one fact as notebook 01 makes it."""
    few = dict(relations=["P36"], facts_per_relation=1)
    study = Study("01_localize", model="demo/gpt2", method="ig", **few)
    localise(study, **spec)
    return study.facts()[0]


def test_scores_of_a_run_are_read_instead_of_computed_unless_the_prompts_differ(
    runs, lm, monkeypatch
):
    fact = a_run()
    saved = ex.saved_queries("demo/gpt2", "ig")
    assert ex.saved_queries("demo/gpt2", "sig") is None
    assert ex.saved_queries("demo/gpt2", "ig", steps=10) is None
    fresh = ex.look(lm, fact, "ig")
    forbid(monkeypatch, "localise_unit")
    read = ex.look(lm, fact, "ig", saved)
    assert (read.source, fresh.source) == ("read from a saved run", "computed now")
    assert read.sets(0.1) == fresh.sets(0.1)
    with pytest.raises(pytest.fail.Exception, match="computed"):
        ex.look(lm, replace(fact, prompts=fact.prompts[:2]), "ig", saved)


def test_what_is_computed_beside_a_saved_run_is_computed_by_the_runs_own_rule(runs, lm, fact):
    assert ex.saved_spec("demo/gpt2", "ig") == {}
    other = a_run(rule="converged", tolerance=0.2)
    spec = ex.saved_spec("demo/gpt2", "ig")
    assert (spec["rule"], spec["tolerance"]) == ("converged", 0.2)
    assert ex.saved_queries("demo/gpt2", "ig") is None  # by the default rule there is nothing
    page = Page(fact=other.id)
    assert "read from a saved run" in page.status.value
    pd.testing.assert_frame_equal(page.saved, ex.saved_queries("demo/gpt2", "ig", **spec))
    page.source.value, page.prompts.value = "typed", "\n".join(fact.prompts)
    page.answer.value = fact.object
    page.run.click()
    assert "computed now" in page.status.value and page.view.frame["converged"].notna().all()
    wanted = ex.look(lm, page.view.fact, "ig", rule="converged", tolerance=0.2)
    assert page.view.sets(0.1) == wanted.sets(0.1)
    assert ran(page.code.value)["sets"] == page.view.sets(page.t.value)
    page.which.value, page.prompts.value = "union", fact.prompts[0]  # one has no other prompt's KNs
    page.run.click()
    assert "at least 2 queries" in page.status.value
    assert page.code.value == page.set_size.value == ""  # not those of the fact before


# --- changes --------------------------------------------------------------------------------------
def test_controls_share_neither_subject_nor_object_and_one_is_of_the_same_relation(
    lm, facts, fact, controls
):
    assert [name for name, _ in controls] == ["same relation", "other relation"]
    (_, same), (_, other) = controls
    assert same.relation == fact.relation != other.relation
    assert all(f.subject != fact.subject and f.object != fact.object for f in (same, other))
    assert ex.predictions(lm, [same.prompts[0]], same.object)["known"][0]
    assert ex.control_facts(lm, facts, fact) == controls  # seeded


def test_suppression_is_a_hook_that_zeroes_the_neurons_at_the_last_prompt_token(view, controls):
    neurons = ex.choose_neurons(view, 0.2, "self")
    result = ex.change(view, neurons, "suppress", controls)

    def zero(layer):
        def hook(_, inputs):
            inputs[0][0, -1, [n for l, n in neurons if l == layer]] = 0

        return view.lm.downs[layer].register_forward_pre_hook(hook)

    handles = [zero(layer) for layer in range(view.lm.num_layers)]
    for row in result.itertuples():
        ids, target = view.lm.encode(row.prompt, row.answer)
        if len(target) == 1:
            p = next_tokens(view.lm, ids)[-1]
            assert row.after == pytest.approx(float(p[target[0]]), rel=1e-3)
            assert row.top_after == view.lm.tokenizer.decode([int(p.argmax())])
    for handle in handles:
        handle.remove()
    assert result["role"].tolist() == ROLES and result["after"][0] < result["before"][0]
    assert ex.change(view, set(), "suppress")["change"].tolist() == [0, 0, 0]


def test_losses_are_means_of_what_is_defined_of_the_prompt_the_others_and_the_controls():
    effects = pd.DataFrame({"role": ROLES, "change": [-0.9, -0.4, -0.2, 0.1, np.nan]})
    shown = ex.losses(effects, prompt=1).set_index("of")
    wanted = {
        "other wordings": [0.55, 0.2, 0.9, 2],
        "q1": [0.4] * 3 + [1],
        "controls": [-0.1] * 3 + [1],
    }
    wanted = pd.DataFrame(wanted, ["loss", "least", "most", "n"]).T.rename_axis("of")
    pd.testing.assert_frame_equal(shown, wanted, check_dtype=False)


def test_weights_are_bit_identical_after_a_change_that_fails(view, monkeypatch):
    before, same = weights(view.lm), []

    def fails_inside_the_change(*_):  # the first three calls measure what is before it
        same.append(same_weights(view.lm, before))
        return torch.ones(2) if len(same) <= 3 else 1 / 0

    monkeypatch.setattr(ex, "next_token", fails_inside_the_change)
    with pytest.raises(ZeroDivisionError):
        neurons = ex.choose_neurons(view, 0.2, "union")
        ex.change(view, neurons, "update", new="Madrid", synapses=2.0)
    assert same == [True, True, True, False] and same_weights(view.lm, before)


@pytest.mark.parametrize(
    "call, given, message",
    [
        (ex.change, (set(), "burn"), "action 'burn'"),
        (ex.change, (set(), "update"), "needs a new answer"),
        (ex.change, ({(99, 0)}, "suppress"), "outside demo/gpt2"),
        (lambda view, *given: ex.typed_fact(*given), (" \n", "Paris"), "at least one prompt"),
        (lambda view, *given: ex.typed_fact(*given), ("France chose", " "), "type the answer"),
        (lambda view, *given: ex.typed_fact(*given), ("[X] chose [Y]", "Paris"), "is a pattern"),
        *((ex.choose_neurons, (0.2, "picked", 0, one), "neuron") for one in NO_NEURONS),
    ],
)
def test_what_cannot_be_used_is_named(view, call, given, message):
    with pytest.raises(ValueError, match=message):
        call(view, *given)


def test_typed_prompts_make_a_fact_and_a_single_one_has_no_agreement(lm):
    fact = ex.typed_fact(" France chose\n\nFrance chose \n", " Paris ")
    assert fact.prompts == ("France chose",) and fact.object == "Paris"
    view = ex.look(lm, fact)
    assert np.isnan(ex.agreement(view, 0.2)["cs2"]) and ex.choose_neurons(view, 0.2, "self")
    with pytest.raises(ValueError, match="at least 2 queries"):
        ex.choose_neurons(view, 0.2, "union")
    assert ex.parse_neurons(lm, " 3:17,4:2  3:17") == {(3, 17), (4, 2)}


# --- copy as code ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        dict(which="self", action="suppress", prompt=1),
        dict(which="intersection", action="enhance", synapses=0.0, prompt=2),
        dict(which="cas", action="update", new="Madrid"),
        dict(which="picked", picked="0:3, 2:10", action="erase"),
        dict(which="refine", action="none", synapses=2.0),
    ],
    ids=lambda options: f"{options['which']}-{options['action']}",
)
def test_the_copied_code_computes_the_numbers_shown(view, controls, options, monkeypatch):
    monkeypatch.setattr("qlutils.load_model", {"demo/gpt2": view.lm}.__getitem__, raising=False)
    options = dict(prompt=0, picked="") | options
    run = ran(ex.as_code(view, 0.15, controls=controls, **options))
    which, picked, action = (options.pop(name) for name in ("which", "picked", "action"))
    neurons = ex.choose_neurons(view, 0.15, which, options["prompt"], picked)
    shown = ex.change(view, neurons, action, controls, **options)
    assert run["neurons"] == neurons and run["sets"] == view.sets(0.15)
    names = {"before": "before", "after": "after"}
    if action == "update":
        names |= {"before_new": "new_before", "after_new": "new_after"}
        assert (shown["new_after"] > shown["new_before"]).any()
    for name, column in names.items():
        np.testing.assert_allclose(run[name], shown[column], rtol=1e-5)


def test_text_cannot_break_out_of_the_copied_code_nor_become_markup(lm, view):
    evil = '"""\nraise SystemExit  # \\ \' {0}'
    typed = replace(view, fact=Fact("typed", "s", evil, (evil,)))
    code = ex.as_code(typed, 0.2, action="update", new=evil)
    compile(code, "copied", "exec")
    assert not any(line.startswith("raise") for line in code.splitlines())
    view = ex.look(
        lm, ex.typed_fact(f"{EVIL} lives in\nThe city of {EVIL} is", f"Paris {EVIL}"), steps=2
    )
    control = [("same <b>", Fact("r", "s", EVIL, (f"{EVIL} is", "x y")))]
    result = ex.change(view, {(0, 1)}, "update", control, new=EVIL)
    saved = view.frame.assign(fact=f"r|{EVIL}|o")
    neuron = next(iter(view.sets(0.2)[0]))
    pieces = [
        effects_html(result, EVIL),
        neuron_html(view, neuron, 0.05, saved),
        prompts_html(replace(view, attention=[([EVIL], None), ([EVIL], np.ones(1))])),
    ]
    for piece in pieces:
        assert "&lt;script" in piece
        assert "<script" not in piece and "<img" not in piece and "same <b>" not in piece


# --- the page -------------------------------------------------------------------------------------
def test_sliding_selects_among_scores_without_computing_any(page, monkeypatch):
    computing = "localise_unit", "look", "predictions", "activations", "attention_received"
    forbid(monkeypatch, *computing)
    parts = page.page_numbers, page.map, page.overlap, page.page_table
    before = [part.value for part in parts]
    page.t.value = 0.5
    assert all(part.value != old for part, old in zip(parts, before))
    assert "computed now" in page.status.value
    assert f">{len(set().union(*page.view.sets(0.5)))}<" in page.page_numbers.value


def test_another_fact_is_shown_after_run_and_the_first_comes_from_memory(page, monkeypatch):
    first = page.page_prompts.value
    page.neuron.value = kept = page.neuron.options[3][1]
    page.t.value = 0.25
    assert page.neuron.value == kept  # one that is still a KN stays chosen
    page.relation.value, page.model.value, page.method.value = "P37", "demo/llama2", "sig"
    page.t.value = 0.26  # what is shown and changed is still of the first fact, and said to be
    assert "P36|France|Paris, demo/gpt2, ig: " in page.status.value
    page.model.value, page.method.value, page.t.value = "demo/gpt2", "ig", 0.25
    assert page.page_prompts.value == first
    page.run.click()
    assert page.view.fact.relation == "P37" and page.page_prompts.value != first
    assert page.neuron.index == 0
    forbid(monkeypatch, "look")
    page.relation.value, page.fact.value = "P36", "P36|France|Paris"
    page.run.click()
    assert page.page_prompts.value == first


def test_buttons_show_before_and_after_beside_controls_and_leave_the_weights(page):
    before = weights(page.view.lm)
    page.new.value = "Madrid"
    for action, button in page.buttons.items():
        page.page_effects.value = ""
        button.click()
        shown = page.page_effects.value
        assert "control: same relation" in shown, page.status.value
        assert ("choose above" in shown) == (action == "none")  # synapses are left alone, too
        assert ("edit_weights(" in page.code.value) == (action in ("erase", "update"))
    assert same_weights(page.view.lm, before)
    page.buttons["enhance"].click()
    page.t.value, page.which.value, page.prompt.value, page.synapses.value = 0.3, "union", 2, 0.0
    for line in (  # of the controls and the button pressed last
        "t=0.3)",
        "neurons = neighbour_sets(sets, 2)['union']",
        "on_synapses = scale_synapses(lm, find_synapses(lm, prompts[2]), 0.0)",
        "on_neurons = scale_neurons(lm, neurons, 2.0)",
    ):
        assert line in page.code.value


def test_a_neuron_can_be_picked_and_changed_with_stock_widgets(page):
    page.neuron.value = page.neuron.options[2][1]
    layer, index = page.neuron.value
    assert f"Layer {layer}, neuron {index}" in page.page_neuron.value
    page.pick.click()
    page.other.value = "4:7"
    page.pick.click()
    assert page.which.value == "picked" and "2 neurons" in page.set_size.value
    page.buttons["suppress"].click()
    with scale_neurons(page.view.lm, {(layer, index), (4, 7)}, 0.0):
        p = answer_probability(page.view.lm, [page.view.fact.prompts[0]], [page.view.fact.object])
    assert page.effects["after"][0] == pytest.approx(float(p[0]), rel=1e-4)
    seen = [page]
    for one in seen:  # JupyterLab and VS Code show them without an extension
        seen += getattr(one, "children", ())
    assert len(seen) > 30 and {one._model_module for one in seen} == {"@jupyter-widgets/controls"}


def test_problems_are_a_line_in_place_and_the_page_goes_on(page, capsys):
    def said(word):
        text = page.status.value
        return word in text and "b00020" in text and "Traceback" not in text

    page.model.value = "demo/none<b>"
    page.run.click()
    assert said("demo/none&lt;b&gt;")
    page.model.value, page.source.value = "demo/gpt2", "typed"
    assert page.of_data.layout.display == "none" and page.of_user.layout.display != "none"
    for prompts, word in ((".", "single token"), ("", "at least one prompt")):
        page.prompts.value = prompts
        page.run.click()
        assert said(word)
    page.prompts.value = "The capital of Spain is\nFor its capital, Spain chose"
    page.answer.value = "Madrid"
    page.run.click()
    page.picked.value, page.which.value = "nonsense", "picked"
    assert said("layer:neuron")
    page.which.value, page.new.value = "self", ""
    page.buttons["update"].click()
    assert said("new answer")
    page.buttons["enhance"].click()
    assert "computed now" in page.status.value and "Enhanced" in page.page_effects.value
    assert page.effects["role"].tolist() == ["q0", "q1", "control: other relation"]
    assert not page.run.disabled and capsys.readouterr().err == ""


def test_a_wrong_start_is_said_on_the_page(runs):
    assert "nowhere" in Page(data="nowhere").status.value
    assert "relation|subject|object" in Page(fact="P36|France").status.value


def test_without_a_front_end_a_line_says_where_to_look(capsys, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JPY_", "VSCODE_", "COLAB_")):
            monkeypatch.delenv(name)
    assert explore() is None and "JupyterLab" in capsys.readouterr().out


def test_the_notebook_draws_a_fixed_example_without_a_front_end(runs, monkeypatch):
    for name in ("JPY_SESSION_NAME", "QLUTILS_MODELS"):
        monkeypatch.setenv(name, "[]")
    monkeypatch.setenv("QLUTILS_PROGRESS", "as under papermill")
    shown = []
    parameters = {"fact": "P37|Australia|English", "t": 0.3}
    run_cells(NOTEBOOKS / "explore_fact.ipynb", parameters, shown.append)
    assert sum(isinstance(one, Image) for one in shown) == 2
    texts = [one.data for one in shown if isinstance(one, HTML)]
    assert not any(isinstance(one, Page) for one in shown)
    assert any("control: other relation" in text for text in texts)
    [runners_up] = [text for text in texts if "runners-up" in text]
    assert "Australia" in runners_up
