"""Every family that the README's table names: what works, in every dtype, against the naive
reference; what is refused; and that the table says so. What is done to neurons is in change/.

A vision tower, of no use here, is as deep as the text model that it belongs to: were it taken for
that, the scores would be wrong."""

from contextlib import contextmanager, nullcontext
from functools import lru_cache

import numpy as np
import pytest
import torch
import transformers
from families import NOT_IN_FLOAT64, REFUSED, SCALE, SUPPORTED, lm_of, model_of, precise
from naive import Naive, keeping_float64
from tiny import readme_table, tiny_model, word_tokenizer

from qlutils import scale_synapses
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
