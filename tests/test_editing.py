"""Edits against the formula written out, virtual against real ones, and the experiment against
plain code."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from tiny import FAMILIES, WORDS, save_checkpoint, save_dataset, tiny_lm, tiny_model, word_tokenizer
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

from qlutils import Fact, edit_weights, load_facts, load_model, paths, perplexity, save_edited
from qlutils.change.editing import edit_vector, object_tokens, usable_texts, virtual_edit
from qlutils.change.rows import Change, score_rows
from qlutils.experiments import kn_modification as edit_study
from qlutils.experiments.edit_tables import AVG_NOTE, contrasts, edit_table
from qlutils.experiments.kn_modification import cas_spec, cas_sweep, edit_facts, plan_edits
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.language_model import LanguageModel
from qlutils.neurons.sets import cas_candidates, kn_sets, strongest_neurons

ROUNDED = ("gptj", "codegen", "gpt-neo", "bloom", "gemma2", "granite-swa", "gemma4")
NEURONS = {(0, 3), (1, 7), (1, 9), (2, 0), (2, 5)}
OPTIONS = {"erase": {}, "update": dict(old=[20, 21], new=[30], lambda1=1.5, lambda2=0.5)}
SHARED = paths.ROOT.parent / "shared" / "data"


pytestmark = pytest.mark.usefixtures("one_thread")


def value_vector(lm, family, layer, index):
    """Row of a Conv1D, column of a Linear; not through `qlutils.model.architecture`."""
    down = FAMILIES[family].modules(lm.model, "down")[layer]
    return down.weight[:, index] if isinstance(down, torch.nn.Linear) else down.weight[index]


def state(lm):
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


def same_bits(lm, before):
    return all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


# --- real edits -----------------------------------------------------------------------------------
@pytest.mark.parametrize("embedding", ["input", "output"])
@pytest.mark.parametrize(
    "family", ["gpt2", "llama2", "llama3", "neox", "gemma", "opt"]
)  # tied and untied
def test_an_edit_is_the_formula_on_its_value_vectors_and_nothing_else(family, embedding):
    lm = tiny_lm(family)
    before = state(lm)
    e = (
        lm.model.get_input_embeddings()
        if embedding == "input"
        else lm.model.get_output_embeddings()
    ).weight.clone()
    old = {pair: value_vector(lm, family, *pair).clone() for pair in NEURONS}
    with edit_weights(lm, NEURONS, "erase") as edit:
        assert edit.neurons == tuple(sorted(NEURONS)) and edit.op == "erase" and edit.changed
        assert all((value_vector(lm, family, *pair) == 0).all() for pair in NEURONS)
    with edit_weights(lm, NEURONS, "update", old=[20, 21], new=[30], embedding=embedding):
        for pair in NEURONS:
            expected = old[pair] - 2 * (e[20] + e[21]) / 2 + 2 * e[30]
            torch.testing.assert_close(value_vector(lm, family, *pair), expected)
        downs = {id(down.weight) for down in FAMILIES[family].modules(lm.model, "down")}
        assert all(
            torch.equal(p, before[name])
            for name, p in lm.model.named_parameters()
            if id(p) not in downs
        )
    assert same_bits(lm, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_weights_are_bit_identical_afterwards_whatever_happens_inside(error, dtype):
    for family in ("gpt2", "llama3"):
        lm = tiny_lm(family, dtype)
        before = state(lm)
        with pytest.raises(error), edit_weights(lm, NEURONS, "update", **OPTIONS["update"]):
            with edit_weights(lm, {(1, 7), (0, 0)}, "erase"):  # overlaps
                with edit_weights(lm, NEURONS, "update", old=[5], new=[6], lambda1=0.3):
                    assert not same_bits(lm, before)
                    raise error("stop")
        assert same_bits(lm, before)


def test_an_interrupt_between_two_writes_is_undone(monkeypatch):
    lm = tiny_lm("gpt2")
    before, calls, zeros = state(lm), [], torch.zeros_like

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return zeros(*args)

    monkeypatch.setattr(torch, "zeros_like", interrupted)
    with pytest.raises(KeyboardInterrupt), edit_weights(lm, NEURONS, "erase"):
        pass
    assert same_bits(lm, before)


def test_no_neurons_means_no_edit_and_says_so():
    lm = tiny_lm("gpt2")
    before = state(lm)
    with edit_weights(lm, set(), "erase") as edit:
        assert edit.neurons == () and not edit.changed
        assert same_bits(lm, before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_an_edited_checkpoint_loads_elsewhere_as_the_edited_model(family, tmp_path):
    lm = load_model(
        save_checkpoint(tmp_path / "own", family, dtype=torch.float64),
        device="cpu",
        dtype="float64",
    )
    before, ids = state(lm), torch.tensor([[10, 11, 12]])
    folder = save_edited(lm, tmp_path / "edited", NEURONS, "update", **OPTIONS["update"])
    assert same_bits(lm, before)
    other = load_model(str(folder), device="cpu", dtype="float64")
    with edit_weights(lm, NEURONS, "update", **OPTIONS["update"]):
        torch.testing.assert_close(
            other.model(ids).logits, lm.model(ids).logits, rtol=1e-12, atol=0
        )
    assert (other.model(ids).logits - lm.model(ids).logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        save_edited(lm, folder, NEURONS, "erase")


def test_an_object_is_tokenised_as_the_continuation_of_a_word():
    tokenizers = SHARED / "tokenizers"
    if not tokenizers.is_dir():
        pytest.skip("the study's tokenizers are not here")
    from transformers import AutoTokenizer

    class Holder:
        pass

    for name in ("gpt2", "llama2", "llama3"):
        lm = Holder()
        lm.tokenizer = AutoTokenizer.from_pretrained(tokenizers / name)
        ids = object_tokens(lm, " Paris ")
        assert lm.tokenizer.bos_token_id not in ids
        assert len(ids) == 1 and lm.tokenizer.decode(ids).strip() == "Paris"
        whole = lm.tokenizer("The capital of France is Paris").input_ids
        assert whole[-1:] == ids
    assert object_tokens(tiny_lm("llama2", bos=True), "20 21") == [20, 21]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(neurons={(3, 0)}, op="erase"), r"neuron \(3, 0\) is outside"),
        (dict(neurons={(0, -1)}, op="erase"), r"neuron \(0, -1\) is outside"),
        (dict(neurons=NEURONS, op="delete"), "op 'delete' is unknown; use one of erase, update"),
        (dict(neurons=NEURONS, op="update", new=[5]), "needs both objects"),
        (dict(neurons=NEURONS, op="update", old=[5], new=[97]), "has no embedding"),
        (dict(neurons=NEURONS, op="update", old=[], new=[5]), "has no embedding"),
        (dict(neurons=NEURONS, op="update", old=" ", new=[5]), "cannot be tokenised"),
        (
            dict(neurons=NEURONS, op="update", old=[5], new=[6], embedding="value"),
            "embedding 'value' is unknown",
        ),
        (
            dict(neurons=NEURONS, op="update", old=[5], new=[6], lambda1=float("inf")),
            "lambda1 is inf",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_edit_is_refused_by_name_and_changes_nothing(arguments, message):
    lm = tiny_lm("gpt2")
    before = state(lm)
    with pytest.raises(ValueError, match=message), edit_weights(lm, **arguments):
        pass
    assert same_bits(lm, before)


def test_quantised_weights_and_embeddings_of_another_width_are_refused_by_name():
    lm = tiny_lm("llama2")
    down = lm.downs[1]
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        UnsupportedModel, match="tiny-llama2: layer 1 cannot be edited: .*quantised"
    ):
        with edit_weights(lm, {(1, 0)}, "erase"):
            pass
    with pytest.raises(ValueError, match="embeddings have 16 dimensions and its value vectors 32"):
        edit_vector(tiny_lm("opt-350m"), "update", old=[5], new=[6])


# --- edits that a forward pass would not see ------------------------------------------------------
def pruned(projection):
    prune.l1_unstructured(projection, "weight", 0.3)


def weight_normed(projection):
    nn.utils.weight_norm(projection)


def parametrised(projection):
    nn.utils.parametrizations.weight_norm(projection)


def scaled_float8(projection):
    projection.weight = nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)


def rewritten_by_a_hook(projection):
    weight = projection.weight.clone()
    projection.register_forward_pre_hook(lambda module, _: module.weight.copy_(weight))


def with_a_forward_of_its_own(projection):
    weight = projection.weight.clone()
    projection.forward = lambda x: nn.functional.linear(x, weight)


def on_meta(projection):
    projection.weight = nn.Parameter(projection.weight.to("meta"), requires_grad=False)


class Wrapped(nn.Module):
    """A projection inside another one, as adapters leave it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.in_features = base_layer, base_layer.in_features

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + x[..., :32]


def refuse_edits(lm, layer, said, tmp_path):
    """No way of editing `layer` is taken, and nothing is written: no file and no other layer."""
    ways = (
        lambda: edit_weights(lm, {(0, 1), (layer, 3)}, "erase").__enter__(),
        lambda: virtual_edit(lm, {(layer, 3)}, "update", old=[5], new=[6]),
        lambda: save_edited(lm, tmp_path / "edited", {(layer, 3)}, "erase"),
    )
    untouched = value_vector(lm, "llama2", 0, 1).clone()
    for way in ways:
        with pytest.raises(
            UnsupportedModel, match=rf"{lm.name}: layer [0-9] cannot be edited: .*{said}"
        ):
            way()
    assert not (tmp_path / "edited").exists()
    assert torch.equal(value_vector(lm, "llama2", 0, 1), untouched)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "spoil, said",
    [
        (pruned, "made from other tensors"),
        (weight_normed, "made from other tensors"),
        (parametrised, "made from other tensors|modules were added"),
        (scaled_float8, "quantised weights"),
        (rewritten_by_a_hook, "other code hangs on it"),
        (with_a_forward_of_its_own, "other code hangs on it"),
        (on_meta, "offloaded"),
    ],
)
def test_an_edit_of_a_weight_that_no_forward_pass_reads_is_refused(spoil, said, tmp_path):
    lm = tiny_lm("llama2")
    spoil(lm.downs[1])
    refuse_edits(lm, 1, said, tmp_path)


def test_an_edit_beside_a_projection_exchanged_after_loading_is_refused(tmp_path):
    lm = tiny_lm("llama2")
    lm.model.model.layers[1].mlp.down_proj = Wrapped(lm.downs[1]).eval()
    refuse_edits(lm, 1, "modules were added or exchanged", tmp_path)
    with pytest.raises(
        ValueError, match="tiny-llama2: modules were added or exchanged after it was loaded"
    ):
        score_rows(lm, [([10, 11], [12])], [(0, None)])


def test_an_edit_of_a_weight_that_two_layers_share_is_refused(tmp_path):
    lm = tiny_lm("llama2")
    lm.downs[2].weight = lm.downs[1].weight
    refuse_edits(
        lm,
        1,
        r"shared by model\.layers\.1\.mlp\.down_proj, model\.layers\.2\.mlp\.down_proj",
        tmp_path,
    )


@torch.no_grad()
def test_neurons_of_a_pruned_projection_can_still_be_scaled_row_by_row():
    """The weight that a forward pass uses is another than the one that stands there to be read."""
    model = tiny_model("llama2")
    pruned(model.model.layers[1].mlp.down_proj)
    lm = LanguageModel(model, word_tokenizer(), "pruned")
    found = score_rows(
        lm, [([10, 11, 12], [13])], [(0, Change(lm, {(1, 3), (2, 5)}, 0.0))], everywhere=True
    )
    plain = tiny_model("llama2")
    for layer, index in ((1, 3), (2, 5)):
        plain.model.layers[layer].mlp.down_proj.weight.copy_(
            model.model.layers[layer].mlp.down_proj.weight
        )
        plain.model.layers[layer].mlp.down_proj.weight[:, index] = 0
    expected = torch.log_softmax(plain(torch.tensor([[10, 11, 12]])).logits[0, -1], -1)[13]
    assert found.log_probability[0] == pytest.approx(float(expected), rel=1e-12)


def test_layers_offloaded_to_disk_are_not_edited_and_the_others_are(tmp_path):
    pytest.importorskip("accelerate")
    folder = save_checkpoint(tmp_path / "own", "llama2", dtype=torch.float64)
    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        **{f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)},
    }
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "disk", dtype=torch.float64
    )
    lm = LanguageModel(model, word_tokenizer(), "offloaded")
    refuse_edits(lm, 1, "offloaded", tmp_path)
    edited = load_model(
        str(save_edited(lm, tmp_path / "edited", {(0, 3)}, "erase")), device="cpu", dtype="float64"
    )
    whole = load_model(folder, device="cpu", dtype="float64")
    with torch.no_grad():
        value_vector(whole, "llama2", 0, 3).zero_()
        ids = torch.tensor([[10, 11, 12]])
        torch.testing.assert_close(
            edited.model(ids).logits, whole.model(ids).logits, rtol=1e-12, atol=0
        )


def test_a_checkpoint_that_would_hold_no_edit_is_not_written(tmp_path):
    lm = tiny_lm("llama2", torch.bfloat16)
    same = dict(old=[5], new=[5])
    for neurons, op, options in ((set(), "erase", {}), ({(0, 3)}, "update", same)):
        with pytest.raises(ValueError, match="changes no weight of tiny-llama2"):
            save_edited(lm, tmp_path / "edited", neurons, op, **options)
    lm.model._hf_peft_config_loaded = True  # then transformers saves the adapter alone
    with pytest.raises(UnsupportedModel, match="tiny-llama2 carries an adapter.*merge"):
        save_edited(lm, tmp_path / "edited", {(0, 3)}, "erase")
    assert not (tmp_path / "edited").exists()


# --- virtual edits --------------------------------------------------------------------------------
@torch.no_grad()
def real_scores(lm, neurons, op, queries, **options):
    with edit_weights(lm, neurons, op, **options):
        logits = [
            lm.model(input_ids=torch.tensor([[*p, *t[:-1]]]), use_cache=False).logits[0]
            for p, t in queries
        ]
    return [
        float(torch.log_softmax(z[len(p) - 1 :], -1).gather(1, torch.tensor(t)[:, None]).sum())
        for z, (p, t) in zip(logits, queries)
    ]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "opt-350m"])
def test_a_virtual_edit_gives_the_logits_of_the_real_one_and_rows_do_not_leak(family):
    lm = tiny_lm(family)
    # one query for each of several tokens: log probabilities fix the logits but for a constant
    queries = [([10, 11, 12], [token]) for token in range(0, 97, 12)] + [
        ([40, 41, 42, 43, 44], [50, 51])
    ]
    edits = [
        (neurons, op, options)
        for op, options in OPTIONS.items()
        for neurons in (
            {pair for pair in NEURONS if pair[0] < lm.num_layers},
            {(1, 1)},
            {(0, 4), (1, 4)},
        )
    ]
    plan = [
        (q, virtual_edit(lm, neurons, op, **options))
        for neurons, op, options in edits
        for q in range(len(queries))
    ]
    before = state(lm)
    found = score_rows(lm, queries, plan, everywhere=True).log_probability.reshape(len(edits), -1)
    assert same_bits(lm, before)
    for row, (neurons, op, options) in zip(found, edits):
        expected = real_scores(lm, neurons, op, queries, **options)
        np.testing.assert_allclose(row, expected, rtol=1e-5 if family in ROUNDED else 1e-10)


# --- perplexity -----------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama2"])
def test_perplexity_weighs_tokens_not_texts_and_does_not_score_the_first(family):
    lm = tiny_lm(family, bos=family == "llama2")
    texts = ["10 11 12 13 14 15 16 17", "20 21", "30 31 32 33 34"]
    total, count = 0.0, 0
    for text in texts:
        ids = lm.tokenizer(text).input_ids[:6]
        logits = torch.log_softmax(lm.model(input_ids=torch.tensor([ids])).logits[0], -1)
        total -= sum(float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1))
        count += len(ids) - 1
    assert perplexity(lm, texts, max_tokens=6) == pytest.approx(np.exp(total / count), rel=1e-10)
    assert np.mean([perplexity(lm, [text], 6) for text in texts]) != pytest.approx(
        np.exp(total / count), rel=1e-3
    )
    with edit_weights(lm, NEURONS, "erase"):
        assert perplexity(lm, texts, max_tokens=6) != pytest.approx(np.exp(total / count), rel=1e-6)


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([], {}, "at least one text"),
        ("10 11", {}, "got a single text"),
        (["10 11", ""], {}, "fewer than two tokens"),
        (["10"], {}, "fewer than two tokens"),
        (["10 11", 3], {}, "got int: 3"),
        (["10 11"], dict(max_tokens=1), "max_tokens is 1"),
        (["10 11"], dict(max_tokens=2.5), "max_tokens is 2.5"),
        (["10 " * 70], {}, "reads at most 64"),
    ],
    ids=["none", "text", "empty", "one token", "number", "max 1", "max 2.5", "too long"],
)
def test_bad_perplexity_input_is_named(texts, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_lm("gpt2"), texts, **options)


# --- the experiment -------------------------------------------------------------------------------
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


def test_the_strongest_neurons_are_as_many_as_the_set_and_led_by_their_mean_score():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(4, 3, 20)) + 2 * rng.random((3, 20))
    mean, candidates = scores.mean(0), cas_candidates(scores)
    ranked = sorted(np.ndindex(mean.shape), key=lambda pair: -mean[pair])
    for count in (0, 1, 7):
        assert strongest_neurons(candidates, count) == set(ranked[:count])
    above = {pair for pair in ranked if mean[pair] > 0.1 * mean.max()}
    assert strongest_neurons(candidates, 60) == above and 7 < len(above) < 60
    assert strongest_neurons(dict(layer=[], neuron=[], mean=[]), 3) == set()


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
    monkeypatch.setattr(edit_study, "BROKEN", 1.1)  # random weights break at no factor of ten
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


def test_matched_neurons_are_as_active_and_outside_the_set(planned):
    lm, _, plans, _ = planned
    edit_facts(lm, plans, ops=["erase"])  # fills the matched sets in
    for plan in plans:
        sets = {
            (e["neurons"], e["control"]): {tuple(pair) for pair in e["set"]} for e in plan["edits"]
        }
        own, matched = sets["local", "none"], sets["local", "matched"]
        assert not own & matched and sorted(a for a, _ in own) == sorted(a for a, _ in matched)


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
    table = edit_table(
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
    with pytest.raises(ValueError, match="neuron set 'both' is unknown"):
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
    own = edit_table(frame, classes, "demo/gpt2")
    paper = edit_table(frame, classes, "gpt2")
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
    table = edit_table(frame, classes, "demo/gpt2", sets=["local"], controls=[])
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


def test_the_cas_sweep_varies_one_setting_at_a_time():
    parameters = dict(beta1=0.7, beta2=0.3, cas_threshold=0.3, cas_score="raw")
    sweep = cas_sweep(parameters, (1.0, 0.7), (0.1, 0.3))
    assert sweep["spec"].tolist()[1] == sweep["spec"].tolist()[3] == cas_spec(parameters)
    assert sweep["spec"].tolist()[0] == dict(b1=1.0, b2=0.0, threshold=0.3, score="raw")


def test_wikitext_entries_are_paragraphs_of_enough_tokens():
    if not (SHARED / "wikitext-2" / "test.txt").is_file():
        pytest.skip("WikiText-2 is not here")
    from qlutils.facts import perplexity_texts

    texts = perplexity_texts(SHARED / "wikitext-2")
    lm = tiny_lm("gpt2")  # every word of another language is one token, <unk>
    kept = usable_texts(lm, texts, 64)
    assert len(kept) > 1000 and all(len(text.split()) >= 64 for text in kept)
    assert not any(text.startswith("=") for text in kept)


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
