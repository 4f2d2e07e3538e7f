"""Every family that the README's table names: what works, in every dtype, against the naive
reference; what is refused; and that the table says so. What is done to neurons is in change/."""

from contextlib import contextmanager, nullcontext
from functools import lru_cache

import numpy as np
import pytest
import torch
import transformers
from families import NOT_IN_FLOAT64, REFUSED, SCALE, SUPPORTED, lm_of, model_of, precise
from naive import Naive, keeping_float64, scaled_by_hand
from tiny import Family, readme_table, tiny_model, word_tokenizer

from qlutils import scale_neurons, scale_synapses
from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.attribution.quadrature import quadrature
from qlutils.change import synapses
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.language_model import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")

# as many of one length as there are heads, not to be taken for one another, and a longer answer
QUERIES = [([50, 11, 7, 30 + i], [60 + i]) for i in range(4)] + [([9, 40, 41, 8, 77, 15], [22, 23])]
COMPARED = (0, 3, 4)
DTYPES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1}
# transformers' own arithmetic: DeepSeek-V2 rotates in complex numbers of float32
TOLERANCE = {("deepseek_v2 without experts", "float64"): 1e-7}
CASES = [(family, dtype, "down_input") for family in SUPPORTED for dtype in DTYPES]
CASES += [(family, "float64", "pre_activation") for family in SUPPORTED]
CASES = [case for case in CASES if case[0] not in NOT_IN_FLOAT64 or case[1] != "float64"]
CASES += [(family, "float32", "pre_activation") for family in NOT_IN_FLOAT64]


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
def reference(family, site):
    """Naive scores of the queries COMPARED, in float64."""
    model = model_of(family, torch.float64)
    if family == "gemma2":  # its soft cap exists in transformers' written-out attention only
        model.set_attn_implementation("eager")
    naive, rule = Naive(model, SUPPORTED[family], site), quadrature("right", 2)
    with exact(family):
        return [naive.attribute(*QUERIES[i], "ig", *rule)[0] for i in COMPARED]


def apart(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family, dtype, site", CASES)
def test_scores_are_the_naive_references_alone_and_in_a_batch(family, dtype, site):
    spec, tolerance = Spec("ig", 2, site=site), TOLERANCE.get((family, dtype), DTYPES[dtype])
    wanted = reference(family, site)
    with keeping_float64() if dtype == "float64" else nullcontext():
        lm = lm_of(family, getattr(torch, dtype))
        together = attribute_encoded(lm, QUERIES, spec).scores
        alone = [attribute_encoded(lm, [QUERIES[i]], spec).scores[0] for i in COMPARED]
    for i, scores, single in zip(COMPARED, wanted, alone):
        assert apart(together[i], scores) <= tolerance and apart(single, scores) <= tolerance


# in whose layers some arguments belong to queries; of tiny.FAMILIES see test_attribution
@pytest.mark.parametrize("family, tolerance", [("mpt", 1e-12), ("xglm", 1e-5)])
def test_queries_that_need_more_gradients_than_others_keep_their_own_arguments(family, tolerance):
    spec = Spec("ig", rule="converged", tolerance=0.02)
    with keeping_float64():
        lm = lm_of(family, precise(family)[0])
        together = attribute_encoded(lm, QUERIES, spec)
        alone = [attribute_encoded(lm, [query], spec) for query in QUERIES]
    assert len(set(together.evaluations[:4].tolist())) > 1
    for scores, one in zip(together.scores, alone):
        assert apart(scores, one.scores[0].double()) <= tolerance


# --- a vision tower, of no use here, around a text model ------------------------------------------
TOWERS = {
    "gemma3 with a vision tower": "Gemma3TextConfig",
    "gemma4 with a vision tower": "Gemma4TextConfig",
}
NEURONS = {(0, 3), (1, 7), (2, 40), (2, 41)}
IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # padding on the left


@torch.no_grad()
def last_logits(model, ids, **options):
    return model(input_ids=torch.as_tensor(ids), **options).logits[:, -1]


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
    modules = whole.model.model.vision_tower.modules()
    depths = [len(module) for module in modules if isinstance(module, torch.nn.ModuleList)]
    assert whole.num_layers == text.num_layers in depths
    scores = [attribute_encoded(lm, QUERIES, Spec("ig", 2)).scores for lm in twins]
    assert apart(*scores) <= 1e-12


def test_scaled_neurons_find_the_prompt_through_the_parts_around_the_text_model(twins):
    """Also with padding, a cache that goes on, and `generate`: the inner text model is handed masks
    that were made of the caller's, not the caller's."""
    later, longer = IDS[:, -2:] + 10, torch.nn.functional.pad(MASK, (0, 2), value=1)
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
    text, spec = twins[1].model, Family("", {})
    with scaled_by_hand(text, spec, NEURONS, 3.0, 4, rows=2):
        wanted = last_logits(text, IDS, attention_mask=MASK)
    torch.testing.assert_close(found[0][0], wanted, rtol=1e-6, atol=1e-6)
    assert apart(last_logits(text, IDS, attention_mask=MASK), wanted) > 1e-3


@pytest.mark.parametrize(
    "columns",
    [{(0, 0, 1), (1, 2, 3)}, {(0, layer, head) for layer in range(3) for head in range(4)}],
    ids=["two", "the first token's"],
)
def test_scaled_synapses_count_columns_through_the_parts_around_the_text_model(twins, columns):
    found = []
    for lm in twins:
        with scale_synapses(lm, columns, 0.0):
            padded = last_logits(lm.model, IDS, attention_mask=MASK)
            bare = [last_logits(lm.model, [row]) for row in ([5, 6, 7], [9, 8, 7, 6, 5])]
        found.append((padded, torch.cat(bare)))
    padded, bare = found[0]
    torch.testing.assert_close(padded, bare, rtol=1e-4, atol=1e-4)  # Gemma's norms round
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert apart(last_logits(twins[0].model, [[9, 8, 7, 6, 5]]), bare[1:]) > 1e-3


# --- attention, and what is refused ---------------------------------------------------------------
def has_attention(lm):
    """Whether it can be replaced; if not, the model is as it was."""
    before = lm.model.config._attn_implementation
    try:
        synapses.find_synapses(lm, "5 6 7")
    except UnsupportedModel as error:
        assert str(error).startswith(lm.name) and "05 and 06 need another model" in str(error)
        assert lm.model.config._attn_implementation == before
        return False
    return True


@pytest.mark.parametrize("family", [name for name in SUPPORTED if name not in NOT_IN_FLOAT64])
def test_attention_is_transformers_own_or_refused_by_name(family):
    lm, ids = lm_of(family, torch.float64), QUERIES[0][0]
    if not has_attention(lm):
        with pytest.raises(UnsupportedModel), scale_synapses(lm, set(), 0.0):
            pass
        return
    [(total, _)] = synapses.column_scores(lm, [ids])
    options = dict(scale=SCALE.get(family, 2.0), attn_implementation="eager")
    model = tiny_model(SUPPORTED[family], torch.float32, **options).double()
    model.load_state_dict(lm.model.state_dict())
    attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    own = torch.stack([matrix.sum(-2)[0] for matrix in attentions])
    np.testing.assert_allclose(total, own.detach(), atol=1e-5)


# Rows of the README's table.
WORKS = "works"
WITHOUT_ATTENTION = "works without notebooks 05 and 06: its attention cannot be replaced"
# What a refusal says, and the row it belongs to.
REASONS = {
    "mixture-of-experts": "refused: experts, so that an MLP has no single set of neurons",
    "recurrent or convolutional": "refused: recurrent or convolutional layers",
    "encoder-decoder": "refused: an encoder-decoder model, or the decoder of one",
    "found no list of": "refused: its MLPs have another layout",
    "": "refused: its last token needs more than the keys and values of the others",
}


def label(model, name):
    """The model type in code, and what else the name says of a variant."""
    return " ".join([f"`{model.config.model_type}`", *name.split(" ")[1:]])


@pytest.mark.filterwarnings("ignore")
def test_the_table_in_the_readme_is_what_was_found():
    """Also that each model of REFUSED is refused by its name."""
    found = {}
    for name in SUPPORTED:
        lm = lm_of(name, torch.float32)
        status = WORKS if has_attention(lm) else WITHOUT_ATTENTION
        assert found.setdefault(label(lm.model, name), status) == status, "name the variants apart"
    for name, (config, options) in REFUSED.items():
        kind = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
        config = getattr(transformers, config)(**options)
        model = getattr(transformers, kind).from_config(config).eval()
        with pytest.raises(UnsupportedModel, match=rf"^tiny {name}\b") as error:
            LanguageModel(model, word_tokenizer(), f"tiny {name}")
        reason = next(row for said, row in REASONS.items() if said in str(error.value))
        found[label(model, name)] = reason
    stated = {
        name: row["models"]
        for row in readme_table("### Which models")
        for name in row["`model_type`"].split(", ")
    }
    assert stated == found
