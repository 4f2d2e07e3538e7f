"""Edits against the formula written out, virtual against real ones, and the experiment against
plain code."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, save_checkpoint, tiny_lm, tiny_model, word_tokenizer
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

from qlutils import edit_weights, load_model, paths, perplexity, save_edited
from qlutils.change.editing import edit_vector, object_tokens, usable_texts, virtual_edit
from qlutils.change.rows import Change, score_rows
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.language_model import LanguageModel

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
    with edit_weights(lm, NEURONS, "erase") as changed:
        assert changed
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
    with edit_weights(lm, set(), "erase") as changed:
        assert not changed
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
        (with_a_forward_of_its_own, "a forward method was replaced"),
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
        ("10 11", {}, "must be a list of texts"),
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


def test_wikitext_entries_are_paragraphs_of_enough_tokens():
    if not (SHARED / "wikitext-2" / "test.txt").is_file():
        pytest.skip("WikiText-2 is not here")
    from qlutils.facts import perplexity_texts

    texts = perplexity_texts(SHARED / "wikitext-2")
    lm = tiny_lm("gpt2")  # every word of another language is one token, <unk>
    kept = usable_texts(lm, texts, 64)
    assert len(kept) > 1000 and all(len(text.split()) >= 64 for text in kept)
    assert not any(text.startswith("=") for text in kept)
