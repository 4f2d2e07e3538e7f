"""Edits against the formula written out, virtual ones against real ones, perplexity against plain
code."""

import numpy as np
import pytest
import torch
from families import SUPPORTED, lm_of, precise
from naive import plain_score, scaled_by_hand
from tiny import FAMILIES, save_checkpoint, tiny_lm, word_tokenizer
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlutils import edit_weights, load_model, paths, perplexity, save_edited
from qlutils.change.editing import object_tokens, usable_texts, virtual_edit
from qlutils.change.rows import Change, score_rows
from qlutils.facts import perplexity_texts
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.language_model import LanguageModel

NEURONS = {(0, 3), (1, 7), (1, 9), (2, 0), (2, 5)}
UPDATE = dict(old=[20, 21], new=[30], lambda1=1.5, lambda2=0.5)
EXACT = dict(device="cpu", dtype="float64")
SHARED = paths.ROOT.parent / "shared" / "data"
IDS = torch.tensor([[10, 11, 12]])
pytestmark = pytest.mark.usefixtures("one_thread")


def value_vector(lm, family, layer, index):
    """Row of a Conv1D, column of a Linear; not through `qlutils.model.architecture`."""
    down = FAMILIES[family].modules(lm.model, "down")[layer]
    return down.weight[:, index] if isinstance(down, nn.Linear) else down.weight[index]


def state(lm):
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


def same_bits(lm, before):
    return all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


def logits(lm):
    with torch.no_grad():
        return lm.model(IDS).logits


# --- real edits -----------------------------------------------------------------------------------
@pytest.mark.parametrize("embedding", ["input", "output"])
@pytest.mark.parametrize("family", ["gpt2", "llama2", "llama3", "neox", "gemma", "opt"])
def test_an_edit_is_the_formula_on_its_value_vectors_and_nothing_else(family, embedding):
    lm = tiny_lm(family)
    before = state(lm)
    e = getattr(lm.model, f"get_{embedding}_embeddings")().weight.clone()
    old = {pair: value_vector(lm, family, *pair).clone() for pair in NEURONS}
    with edit_weights(lm, NEURONS, "erase") as changed:
        assert changed and all((value_vector(lm, family, *pair) == 0).all() for pair in NEURONS)
    with edit_weights(lm, NEURONS, "update", old=[20, 21], new=[30], embedding=embedding):
        for pair in NEURONS:
            expected = old[pair] - 2 * (e[20] + e[21]) / 2 + 2 * e[30]
            torch.testing.assert_close(value_vector(lm, family, *pair), expected)
        downs = {id(down.weight) for down in FAMILIES[family].modules(lm.model, "down")}
        others = [n for n, p in lm.model.named_parameters() if id(p) not in downs]
        assert all(torch.equal(lm.model.get_parameter(name), before[name]) for name in others)
    with edit_weights(lm, set(), "erase") as changed:
        assert not changed and same_bits(lm, before)
    assert same_bits(lm, before)


def test_an_interrupt_between_two_writes_is_undone(monkeypatch):
    lm, calls, own = tiny_lm("gpt2"), [], torch.Tensor.__setitem__
    before = state(lm)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(torch.Tensor, "__setitem__", interrupted)
    with pytest.raises(KeyboardInterrupt), edit_weights(lm, NEURONS, "erase"):
        pass
    assert same_bits(lm, before)


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_an_edited_checkpoint_loads_elsewhere_as_the_edited_model(family, tmp_path):
    folder = save_checkpoint(tmp_path / "own", family, dtype=torch.float64)
    lm = load_model(folder, **EXACT)
    folder = save_edited(lm, tmp_path / "edited", NEURONS, "update", **UPDATE)
    other = load_model(str(folder), **EXACT)
    assert (logits(other) - logits(lm)).abs().max() > 1e-3
    with edit_weights(lm, NEURONS, "update", **UPDATE):
        torch.testing.assert_close(logits(other), logits(lm), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        save_edited(lm, folder, NEURONS, "erase")


@pytest.mark.skipif(not (SHARED / "tokenizers").is_dir(), reason="no tokenizers of the study here")
@pytest.mark.parametrize("name", ["gpt2", "llama2", "llama3"])
def test_an_object_is_tokenised_as_the_continuation_of_a_word(name):
    lm = tiny_lm("llama2", bos=True)
    assert object_tokens(lm, "20 21") == [20, 21]
    lm.tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    ids = object_tokens(lm, " Paris ")
    assert len(ids) == 1 and lm.tokenizer.decode(ids).strip() == "Paris"
    assert lm.tokenizer("The capital of France is Paris").input_ids[-1:] == ids


def test_embeddings_of_another_width_are_refused_by_name():
    with pytest.raises(ValueError, match="embeddings have 16 dimensions and its value vectors 32"):
        virtual_edit(tiny_lm("opt-350m"), NEURONS, "update", old=[5], new=[6])


# --- edits that a forward pass would not see ------------------------------------------------------
def pruned(projection):
    prune.l1_unstructured(projection, "weight", 0.3)


def retyped(dtype):
    def spoil(projection):
        projection.weight = nn.Parameter(projection.weight.to(dtype), requires_grad=False)

    return spoil


def rewritten_by_a_hook(projection):
    weight = projection.weight.clone()
    projection.register_forward_pre_hook(lambda module, _: module.weight.copy_(weight))


def with_a_forward_of_its_own(projection):
    weight = projection.weight.clone()
    projection.forward = lambda x: nn.functional.linear(x, weight)


def refuse_edits(lm, said, tmp_path):
    """No way of editing layer 1 is taken, and nothing is written: no file and no other layer."""
    ways = (
        lambda: edit_weights(lm, {(0, 1), (1, 3)}, "erase").__enter__(),
        lambda: virtual_edit(lm, {(1, 3)}, "update", old=[5], new=[6]),
        lambda: save_edited(lm, tmp_path / "edited", {(1, 3)}, "erase"),
    )
    untouched = value_vector(lm, "llama2", 0, 1).clone()
    for way in ways:
        refusal = f"{lm.name}: layer . cannot be edited: .*{said}"
        with pytest.raises(UnsupportedModel, match=refusal):
            way()
    assert not (tmp_path / "edited").exists()
    assert torch.equal(value_vector(lm, "llama2", 0, 1), untouched)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "spoil, said",
    [
        (pruned, "made from other tensors"),
        (nn.utils.weight_norm, "made from other tensors"),
        (nn.utils.parametrizations.weight_norm, "made from other tensors|modules were added"),
        (retyped(torch.float8_e4m3fn), "quantised weights"),
        (retyped(torch.int8), "quantised weights"),
        (retyped("meta"), "offloaded"),
        (rewritten_by_a_hook, "other code hangs on it"),
        (with_a_forward_of_its_own, "a forward method was replaced"),
        (None, "modules were added or exchanged"),
    ],
)
def test_an_edit_of_a_weight_that_no_forward_pass_reads_is_refused(spoil, said, tmp_path):
    lm = tiny_lm("llama2")
    if spoil is not None:
        spoil(lm.downs[1])
    else:
        lm.model.model.layers[1].mlp.down_proj = nn.Sequential(lm.downs[1]).eval()
    refuse_edits(lm, said, tmp_path)


def test_an_edit_of_a_weight_that_two_layers_share_is_refused(tmp_path):
    lm = tiny_lm("llama2")
    lm.downs[2].weight = lm.downs[1].weight
    refuse_edits(lm, r"shared by model\.layers\.1\.mlp\.down_proj, model\.layers\.2", tmp_path)


@torch.no_grad()
def test_neurons_of_a_pruned_projection_can_still_be_scaled_row_by_row():
    """The weight that a forward pass uses is another than the one that stands there to be read."""
    lm = tiny_lm("llama2")
    pruned(lm.downs[1])
    lm = LanguageModel(lm.model, lm.tokenizer, "pruned")
    change = Change(lm, {(1, 3), (2, 5)}, 0.0)
    query = [10, 11, 12], [13]
    found = score_rows(lm, [query], [(0, change)], everywhere=True)
    with scaled_by_hand(lm.model, "llama2", change.neurons, 0.0, 0):
        expected, _ = plain_score(lm, *query)
    assert found.log_probability[0] == pytest.approx(expected, rel=1e-12)


def test_layers_offloaded_to_disk_are_not_edited_and_the_others_are(tmp_path):
    pytest.importorskip("accelerate")
    folder = save_checkpoint(tmp_path / "own", "llama2", dtype=torch.float64)
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    places = dict.fromkeys([*names, "model.layers.0", "model.layers.2"], "cpu")
    places["model.layers.1"] = "disk"
    disk = dict(device_map=places, offload_folder=tmp_path / "disk", dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(folder, **disk)
    lm = LanguageModel(model, word_tokenizer(), "offloaded")
    refuse_edits(lm, "offloaded", tmp_path)
    edited = load_model(str(save_edited(lm, tmp_path / "edited", {(0, 3)}, "erase")), **EXACT)
    whole = load_model(folder, **EXACT)
    with edit_weights(whole, {(0, 3)}, "erase"):
        torch.testing.assert_close(logits(edited), logits(whole), rtol=1e-12, atol=0)


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
@pytest.mark.parametrize("family", [name for name in SUPPORTED if name != "opt-350m"])
def test_a_virtual_edit_gives_the_logits_of_the_real_one_and_rows_do_not_leak(family):
    """A query for each of several tokens: log probabilities fix the logits but for a constant."""
    dtype, tolerance = precise(family)
    lm = lm_of(family, dtype)
    queries = [([10, 11, 12], [token]) for token in range(0, 97, 12)]
    queries.append(([40, 41, 42, 43, 44], [50, 51]))
    sets = {pair for pair in NEURONS if pair[0] < lm.num_layers}, {(1, 1)}, {(0, 4), (1, 4)}
    edits = [(one, op, o) for op, o in (("erase", {}), ("update", UPDATE)) for one in sets]
    changes = [virtual_edit(lm, neurons, op, **options) for neurons, op, options in edits]
    plan = [(q, change) for change in changes for q in range(len(queries))]
    found = score_rows(lm, queries, plan, everywhere=True).log_probability.reshape(len(edits), -1)
    for row, (neurons, op, options) in zip(found, edits):
        with edit_weights(lm, neurons, op, **options):
            expected = [plain_score(lm, *query)[0] for query in queries]
        np.testing.assert_allclose(row, expected, rtol=tolerance)


# --- perplexity -----------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["gpt2", "llama2"])
def test_perplexity_weighs_tokens_not_texts_and_does_not_score_the_first(family):
    lm = tiny_lm(family, bos=family == "llama2")
    texts = ["10 11 12 13 14 15 16 17", "20 21", "30 31 32 33 34"]
    read = [lm.tokenizer(text).input_ids[:6] for text in texts]
    nll = -sum(plain_score(lm, ids[:1], ids[1:])[0] for ids in read)
    expected = np.exp(nll / sum(len(ids) - 1 for ids in read))
    assert perplexity(lm, texts, max_tokens=6) == pytest.approx(expected, rel=1e-10)
    alone = [perplexity(lm, [text], 6) for text in texts]
    assert np.mean(alone) != pytest.approx(expected, rel=1e-3)
    with edit_weights(lm, NEURONS, "erase"):
        assert perplexity(lm, texts, max_tokens=6) != pytest.approx(expected, rel=1e-6)


@pytest.mark.skipif(not (SHARED / "wikitext-2" / "test.txt").is_file(), reason="no WikiText-2 here")
def test_wikitext_entries_are_paragraphs_of_enough_tokens():
    lm = tiny_lm("gpt2")  # every word of another language is one token, <unk>
    kept = usable_texts(lm, perplexity_texts(SHARED / "wikitext-2"), 64)
    assert len(kept) > 1000 and all(len(text.split()) >= 64 for text in kept)
    assert not any(text.startswith("=") for text in kept)
