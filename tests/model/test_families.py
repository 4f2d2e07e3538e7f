"""Every family that the README's table names: what works, in every dtype, against the naive
reference and hooks made by hand; what is refused; and that the table says so."""

import warnings
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import numpy as np
import pytest
import torch
import transformers
from families import MORE, REFUSED, SUPPORTED
from naive import Naive, keeping_float64, scaled_by_hand
from tiny import Family, readme_table, tiny_model, word_tokenizer

from qlutils import edit_weights, scale_neurons, scale_synapses
from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.attribution.quadrature import quadrature
from qlutils.change import synapses
from qlutils.change.editing import virtual_edit
from qlutils.change.rows import score_rows
from qlutils.change.scaling import scaled_answer_probabilities
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.language_model import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = Spec("ig", 2)
# as many of one length as there are heads, not to be taken for one another, and a longer answer
QUERIES = [([50, 11, 7, 30 + i], [60 + i]) for i in range(4)] + [([9, 40, 41, 8, 77, 15], [22, 23])]
COMPARED = (0, 3, 4)
DTYPES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1}
# Smaller weights where the model itself, naive or not, is far from float64 in bfloat16.
SCALE = dict.fromkeys(["gemma4", "gemma4_text", "gemma4_unified_text"], 0.5)
SCALE |= dict.fromkeys(["gemma4 with a vision tower", "minicpm3", "youtu"], 0.7)
SCALE |= dict.fromkeys(["exaone4", "persimmon", "qwen3"], 1.0)
# transformers' own arithmetic: DeepSeek-V2 rotates in complex numbers of float32, and XGLM's
# softmax does not run in float64
TOLERANCE = {("deepseek_v2 without experts", "float64"): 1e-7}
NOT_IN_FLOAT64 = ("xglm",)


def precise(family):
    """(dtype, relative tolerance) of the most precise passes that the family has."""
    return (torch.float32, 1e-4) if family in NOT_IN_FLOAT64 else (torch.float64, 1e-7)


@contextmanager
def exact(family):
    """XGLM makes a tensor of the default dtype hold the smallest float64."""
    if family not in NOT_IN_FLOAT64:
        with keeping_float64():
            yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@lru_cache(None)
def model_of(family, dtype):
    """The same weights in every dtype: they have bfloat16's 8 bits. Rotary frequencies stay
    float32, as they do when a checkpoint is loaded."""
    model = tiny_model(SUPPORTED[family], torch.float32, scale=SCALE.get(family, 2.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    kept = {name: one.clone() for name, one in model.named_buffers() if "inv_freq" in name}
    model.to(dtype)
    for name, frequencies in kept.items():
        where, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(where), buffer, frequencies)
    return model.eval()


@lru_cache(None)
def lm_of(family, dtype):
    return LanguageModel(model_of(family, dtype), word_tokenizer(), f"tiny {family}")


@lru_cache(None)
def reference(family):
    """Naive scores of the queries COMPARED, in float64."""
    model = model_of(family, torch.float64)
    if family == "gemma2":  # its soft cap exists in transformers' written-out attention only
        model.set_attn_implementation("eager")
    naive = Naive(model, SUPPORTED[family])
    with exact(family):
        return [naive.attribute(*QUERIES[i], "ig", *quadrature("right", 2))[0] for i in COMPARED]


def apart(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", SUPPORTED)
def test_scores_are_the_naive_references_alone_and_in_a_batch(family, dtype):
    if dtype == "float64" and family in NOT_IN_FLOAT64:
        pytest.skip("its forward pass fails in float64 in transformers")
    wanted, tolerance = reference(family), TOLERANCE.get((family, dtype), DTYPES[dtype])
    with keeping_float64() if dtype == "float64" else nullcontext():
        lm = lm_of(family, getattr(torch, dtype))
        together = attribute_encoded(lm, QUERIES, SPEC).scores
        alone = [attribute_encoded(lm, [QUERIES[i]], SPEC).scores[0] for i in COMPARED]
    for i, scores, single in zip(COMPARED, wanted, alone):
        assert apart(together[i], scores) <= tolerance and apart(single, scores) <= tolerance


# in whose layers some arguments belong to queries; of tiny.FAMILIES see test_attribution
@pytest.mark.parametrize("family", ["mpt", "xglm"])
def test_queries_that_need_more_gradients_than_others_keep_their_own_arguments(family):
    spec = Spec("ig", rule="converged", tolerance=0.02)
    dtype, _ = precise(family)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    with keeping_float64():
        lm = lm_of(family, dtype)
        together = attribute_encoded(lm, QUERIES, spec)
        alone = [attribute_encoded(lm, [query], spec) for query in QUERIES]
    assert len(set(together.evaluations[:4].tolist())) > 1
    for scores, one in zip(together.scores, alone):
        assert apart(scores, one.scores[0].double()) <= tolerance


@pytest.mark.parametrize("family", MORE)
def test_pre_activations_are_those_of_the_naive_reference(family):
    dtype, tolerance = precise(family)
    naive = Naive(model_of(family, torch.float64), SUPPORTED[family], "pre_activation")
    with exact(family):
        wanted, _ = naive.attribute(*QUERIES[0], "ig", *quadrature("right", 2))
    with keeping_float64():
        spec = Spec("ig", 2, site="pre_activation")
        found = attribute_encoded(lm_of(family, dtype), QUERIES[:1], spec).scores[0]
    assert apart(found, wanted) <= tolerance


# --- changed neurons ---------------------------------------------------------------------------


@torch.no_grad()
def last_logits(model, ids, **options):
    return model(input_ids=torch.tensor(ids), **options).logits[:, -1]


NEURONS = {(0, 3), (1, 7), (2, 40), (2, 41)}


@pytest.mark.parametrize("family", MORE)
def test_scaled_neurons_are_those_of_hooks_made_by_hand(family):
    dtype, tolerance = precise(family)
    tolerance = max(tolerance, 1e-6)  # some round inside, and then not the same sums
    lm, queries = lm_of(family, dtype), QUERIES[:4]
    prompts = [prompt for prompt, _ in queries]
    answers = torch.tensor([answer for _, answer in queries])
    own = last_logits(lm.model, prompts)
    for factor in (0.0, 2.0):
        with scaled_by_hand(lm.model, SUPPORTED[family], NEURONS, factor, 3, rows=4):
            wanted = last_logits(lm.model, prompts)
        assert apart(own, wanted) > 100 * tolerance
        with scale_neurons(lm, NEURONS, factor):
            found = last_logits(lm.model, prompts)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        p = scaled_answer_probabilities(lm, [(*query, NEURONS, factor) for query in queries])
        expected = torch.softmax(wanted.double(), -1).gather(1, answers)[:, 0]
        np.testing.assert_allclose(p, expected, rtol=10 * tolerance)


@pytest.mark.parametrize("family", MORE)
def test_an_edit_of_the_weights_is_its_virtual_edit(family):
    lm = lm_of(family, torch.float32)
    change = virtual_edit(lm, NEURONS, "update", old=[5], new=[6])
    virtual = score_rows(lm, QUERIES, [(i, change) for i in range(5)], everywhere=True)
    with edit_weights(lm, NEURONS, "update", old=[5], new=[6]):
        real = score_rows(lm, QUERIES, [(i, None) for i in range(5)])
        own = torch.log_softmax(last_logits(lm.model, [QUERIES[0][0]]), -1)[0, QUERIES[0][1][0]]
    np.testing.assert_allclose(virtual.log_probability, real.log_probability, rtol=1e-4)
    assert real.log_probability[0] == pytest.approx(float(own), rel=1e-4)


# --- a vision tower, of no use here, around a text model ---------------------------------------
TOWERS = {
    "gemma3 with a vision tower": "Gemma3TextConfig",
    "gemma4 with a vision tower": "Gemma4TextConfig",
}


@pytest.fixture(scope="module", params=TOWERS)
def twins(request):
    """The checkpoint with the tower, and a text-only model of the same weights."""
    whole, spec = lm_of(request.param, torch.float64), SUPPORTED[request.param]
    text = tiny_model(Family(TOWERS[request.param], spec.options["text_config"]))
    text.model.load_state_dict(whole.model.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.model.lm_head.state_dict())
    return whole, LanguageModel(text, word_tokenizer(), "text only")


def test_a_tower_as_deep_as_the_text_model_is_not_taken_for_it(twins):
    whole, text = twins
    depths = [
        len(module)
        for module in whole.model.model.vision_tower.modules()
        if isinstance(module, torch.nn.ModuleList)
    ]
    assert whole.num_layers == text.num_layers in depths
    assert whole.layers == list(whole.model.model.language_model.layers)
    assert whole.arch.tail == [whole.model.model.language_model.norm]
    scores = [attribute_encoded(lm, QUERIES, SPEC).scores for lm in twins]
    assert apart(*scores) <= 1e-12


IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # padding on the left


def test_scaled_neurons_find_the_prompt_through_the_parts_around_the_text_model(twins):
    """Also with padding, a cache that goes on, and `generate`: the inner text model is handed masks
    that were made of the caller's, not the caller's."""
    later, longer = (
        torch.tensor([[11, 12], [13, 14]]),
        torch.nn.functional.pad(MASK, (0, 2), value=1),
    )
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    found = []
    for lm in twins:
        with scale_neurons(lm, NEURONS, 3.0), torch.no_grad():
            first = lm.model(input_ids=IDS, attention_mask=MASK, use_cache=True)
            second = lm.model(input_ids=later, attention_mask=longer, cache=first.cache)
            written = lm.model.generate(input_ids=IDS, attention_mask=MASK, **options)
        found.append([first.logits[:, -1], second.logits, torch.stack(written.logits)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    model = twins[0].model
    family = next(name for name in TOWERS if model is lm_of(name, torch.float64).model)
    with scaled_by_hand(model, SUPPORTED[family], NEURONS, 3.0, 4, rows=2):
        wanted = last_logits(model, IDS.tolist(), attention_mask=MASK)
    torch.testing.assert_close(found[0][0], wanted, rtol=1e-6, atol=1e-6)
    assert apart(last_logits(model, IDS.tolist(), attention_mask=MASK), wanted) > 1e-3


@pytest.mark.parametrize(
    "columns",
    [{(0, 0, 1), (1, 2, 3)}, {(0, layer, head) for layer in range(3) for head in range(4)}],
)
def test_scaled_synapses_count_columns_through_the_parts_around_the_text_model(twins, columns):
    found = []
    for lm in twins:
        with scale_synapses(lm, columns, 0.0):
            padded = last_logits(lm.model, IDS.tolist(), attention_mask=MASK)
            bare = [last_logits(lm.model, [row]) for row in ([5, 6, 7], [9, 8, 7, 6, 5])]
        found.append((padded, torch.cat(bare)))
    padded, bare = found[0]
    torch.testing.assert_close(padded, bare, rtol=1e-4, atol=1e-4)  # Gemma's norms round
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert apart(last_logits(twins[0].model, [[9, 8, 7, 6, 5]]), bare[1:]) > 1e-3


# --- attention, and what is refused ------------------------------------------------------------
@pytest.mark.parametrize("family", [name for name in MORE if name not in NOT_IN_FLOAT64])
def test_attention_is_transformers_own_or_refused_by_name(family):
    lm, ids = lm_of(family, torch.float64), QUERIES[0][0]
    if not has_attention(lm):
        with pytest.raises(
            UnsupportedModel, match=f"tiny {family}.*notebooks 05 and 06 need another model"
        ):
            synapses.find_synapses(lm, "5 6 7")
        return
    [(total, _)] = synapses.column_scores(lm, [ids])
    options = dict(scale=SCALE.get(family, 2.0), attn_implementation="eager")
    model = tiny_model(SUPPORTED[family], torch.float32, **options).double()
    model.load_state_dict(lm.model.state_dict())
    attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    own = torch.stack([matrix.sum(-2)[0] for matrix in attentions])
    np.testing.assert_allclose(total, own.detach(), atol=1e-5)


def has_attention(lm):
    try:
        synapses.check_replaceable(lm)
    except UnsupportedModel:
        return False
    return True


# Rows of the README's table.
WORKS = "works"
WITHOUT_ATTENTION = "works without notebooks 05 and 06: its attention cannot be replaced"
# What a refusal says, and the row it belongs to.
REASONS = {
    "mixture-of-experts": "refused: experts, so that an MLP has no single set of neurons",
    "recurrent or convolutional": "refused: recurrent or convolutional layers",
    "encoder-decoder": "refused: an encoder-decoder model, or the decoder of one",
    "found no list of": "refused: its MLPs have another layout",
}
NOT_REPLAYED = "refused: its last token needs more than the keys and values of the others"


@lru_cache(None)
def refused(name):
    """(label, reason) of a model of REFUSED; it must be refused, by name."""
    config, options = REFUSED[name]
    config = getattr(transformers, config)(**options)
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_config(config).eval()
    with pytest.raises(UnsupportedModel, match=rf"^tiny {name}\b") as error:
        LanguageModel(model, word_tokenizer(), f"tiny {name}")
    reasons = [reason for said, reason in REASONS.items() if said in str(error.value)]
    return label(model, name), (reasons or [NOT_REPLAYED])[0]


def label(model, name):
    """The model type in code, and what else the name says of a variant."""
    return " ".join([f"`{model.config.model_type}`", *name.split(" ")[1:]])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_studied_is_refused_by_name(name):
    assert refused(name)


def test_the_table_in_the_readme_is_what_was_found():
    found = {}
    for name in SUPPORTED:
        lm = lm_of(name, torch.float32)
        status = WORKS if has_attention(lm) else WITHOUT_ATTENTION
        assert found.setdefault(label(lm.model, name), status) == status, (
            "variants of a family differ: name them apart"
        )
    found |= dict(map(refused, REFUSED))
    stated = {
        name: row["models"]
        for row in readme_table("### Which models")
        for name in row["`model_type`"].split(", ")
    }
    assert stated == found
