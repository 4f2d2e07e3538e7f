"""(prompt, answer) -> tokens, with small tokenizers and with the real ones of GPT-2, LLaMA 2 and
LLaMA 3."""

import warnings
from itertools import product

import numpy as np
import pytest
import torch
from naive import Naive, plain_score
from tiny import SPECIAL, tiny_lm, tiny_model, word_tokenizer
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlutils import attribute, load_facts, perplexity
from qlutils.attribution.quadrature import quadrature
from qlutils.change.rows import Change, score_rows
from qlutils.change.synapses import column_scores
from qlutils.experiments.attention_predominance import attend
from qlutils.experiments.knowledge_synapses import scale_synapse_columns
from qlutils.model.language_model import LanguageModel
from qlutils.model.passes import attention_implementation
from qlutils.paths import ROOT

SHARED = ROOT.parent / "shared" / "data"
NAMES = ("gpt2", "llama2", "llama3")
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real data is not at ../shared/data"
)


# --- small tokenizers -----------------------------------------------------------------------------
def test_an_answer_is_what_it_adds_to_its_prompt_bos_stays_and_a_trailing_eos_goes():
    lm = tiny_lm("gpt2", torch.float32)
    assert lm.encode("5 6", "7 8") == ([5, 6], [7, 8])
    assert lm.encode("5 6  ", " 7 ") == ([5, 6], [7]) and lm.bos_offset == 0
    for bos in (False, True):  # of one model: its tokenizer may be set after it was loaded
        lm.tokenizer = word_tokenizer(bos=bos, eos_after=True)
        assert lm.tokenizer("5 6").input_ids == [*[1] * bos, 5, 6, 0]
        assert lm.encode("5 6", "7") == ([*[1] * bos, 5, 6], [7]) and lm.bos_offset == bos


def test_what_a_tokenizer_puts_after_a_text_goes_be_it_eos_or_not():
    """[SEP] of BERT's tokenizers; </s> of a chat model whose EOS became another token."""
    lm = tiny_lm("llama3", bos=True)
    wanted = perplexity(lm, ["5 6 7"])
    lm.tokenizer = word_tokenizer(bos=True, eos_after=True)
    lm.tokenizer.eos_token = "<mask>"
    assert lm.tokenizer("5 6").input_ids == [1, 5, 6, 0] and lm.bos_offset == 1
    assert lm.encode("5 6", "7 8") == ([1, 5, 6], [7, 8])
    assert perplexity(lm, ["5 6 7"]) == wanted


@pytest.mark.parametrize("method", ["sig", "amig"])
def test_baselines_keep_bos_where_a_tokenizer_has_no_digits(method):
    """Letters of DNA, say, without a token for what is unknown."""
    lm = tiny_lm("llama3")
    lm.tokenizer = letter_tokenizer("ACGT")
    assert lm.tokenizer("1").input_ids == [1] and lm.bos_offset == 1
    found = attribute(lm, ["ACG"], ["T"], method=method, steps=3).scores
    lm.tokenizer = word_tokenizer(["A", "C", "G", "T"], bos=True)
    wanted = attribute(lm, ["A C G"], ["T"], method=method, steps=3).scores
    assert torch.equal(found, wanted)


def letter_tokenizer(letters):
    """A token a letter, BOS before a text, nothing for any other letter, and no spaces."""
    vocabulary = {text: i for i, text in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.normalizer = normalizers.Replace(" ", "")
    backend.post_processor = processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


PREFIXES = {"GLM": ["<mask>", "<bos>"], "XGLM": ["<eos>"], "and an EOS after": ["<mask>", "<bos>"]}


def prefixed(kind):
    """A float64 model whose tokenizer has no BOS token and puts others in front of every text:
    GLM's [gMASK]<sop>, XGLM's </s>."""
    lm = tiny_lm("llama3")
    lm.tokenizer = word_tokenizer(before=PREFIXES[kind], eos_after="after" in kind)
    return lm, [SPECIAL.index(token) for token in PREFIXES[kind]]


@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("method", ["sig", "amig"])
def test_baselines_keep_all_that_the_tokenizer_puts_in_front(kind, method):
    lm, prefix = prefixed(kind)
    query = [*prefix, 50, 61, 77], [80]
    assert lm.encode("50 61 77", "80") == query and lm.bos_offset == len(prefix)
    found = attribute(lm, ["50 61 77"], ["80"], method=method, steps=3).scores[0]
    naive = Naive(lm.model, "llama3")
    # to replace the last token of the prefix, too, is another baseline
    for naive.first, same in ((len(prefix), True), (len(prefix) - 1, prefix[-1] == 0)):
        wanted, _ = naive.attribute(*query, method, *quadrature("right", 3))
        apart = (found - wanted).abs().max() / wanted.abs().max()
        assert apart <= 1e-9 if same else apart > 1e-3


@pytest.mark.parametrize("kind", PREFIXES)
def test_perplexity_does_not_score_what_the_tokenizer_puts_in_front(kind):
    lm, prefix = prefixed(kind)
    wanted = np.exp(-plain_score(lm, prefix, [50, 61, 77])[0] / 3)
    assert perplexity(lm, ["50 61 77"]) == pytest.approx(wanted, rel=1e-9)
    few = len(prefix)
    with pytest.raises(ValueError, match=f"max_tokens is {few}.*at least {few + 1}"):
        perplexity(lm, ["50 61 77"], max_tokens=few)


@pytest.mark.parametrize("kind", PREFIXES)
def test_attention_without_the_first_tokens_is_without_all_that_the_tokenizer_puts_in_front(kind):
    lm, prefix = prefixed(kind)
    unit = dict(fact="f", relation="R", object="80", prompts=["50 61 77 9"], prompt_index=[0])
    unit |= dict(layer=[[0]], neuron=[[3]], irrelevant=["33 44 55 66"])
    ids = torch.tensor([lm.encode_prompt("50 61 77 9")])
    with attention_implementation(lm.model, "eager"):
        matrices = lm.model(ids, output_attentions=True).attentions
    matrices = torch.stack(matrices, 1)[0]  # (L, H, T, T)
    [row] = attend(lm, [unit]).to_dict("records")
    most = int(matrices.mean((0, 1)).sum(0)[len(prefix) :].argmax())
    assert row["column_rest"] == len(prefix) + most
    frame = scale_synapse_columns(lm, [unit], alpha=0.1).set_index("set")
    own = matrices.sum(-2) > 0.1 * ids.shape[1]
    assert own[..., : len(prefix)].any() and own[..., len(prefix) :].any()
    assert frame.loc["none", "n_self_rest"] == own[..., len(prefix) :].sum()
    assert set(frame.loc["self_without_first", "size"]) == {int(own[..., len(prefix) :].sum())}


def test_an_answer_that_changes_the_prompts_tokens_is_refused():
    """A tokenizer that merges across the boundary: "in the" -> one token."""
    lm = tiny_lm("gpt2", torch.float32)
    plain = lm.tokenizer

    class Merging:
        eos_token_id, eos_token = 0, "<eos>"

        def __call__(self, text, **options):
            return plain(text.replace("6 7", "67"), **options)

    lm.tokenizer = Merging()
    with pytest.raises(ValueError, match="answer '7' is not a continuation of the prompt '5 6'"):
        lm.encode("5 6", "7")
    assert lm.encode("5 6", "8") == ([5, 6], [8])


def by_passes(lm, prompt, answer):
    """Log probability of `answer`: in one pass over the whole, in a pass of its own for each token,
    and in a pass that continues the cache of all but the prompt's last token."""
    whole, start = torch.tensor([[*prompt, *answer[:-1]]]), len(prompt) - 1
    cached = lm.model(whole[:, :start], use_cache=True)
    rest = lm.model(whole[:, start:], cache=cached.cache).logits[0]
    ends = range(len(prompt), len(prompt) + len(answer))
    own = [lm.model(whole[:, :end], use_cache=False).logits[0, -1] for end in ends]
    passes = (lm.model(whole, use_cache=False).logits[0, start:], torch.stack(own), rest)
    gold = torch.tensor(answer)[:, None]
    return [float(torch.log_softmax(one, -1).gather(1, gold).sum()) for one in passes]


@torch.no_grad()
@pytest.mark.parametrize("family", ["phi3", "llama2"])
def test_queries_that_straddle_the_switch_of_a_long_rope_are_refused_and_no_others(
    family, one_thread
):
    """What is right is what the model's own passes agree on; where they do not, nothing is."""
    original = dict(original_max_position_embeddings=8)
    rope = dict(original, rope_type="longrope", rope_theta=1e4)
    rope |= dict(short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.0, 2.0, 5.0, 9.0])
    lm = tiny_lm(family, rope_parameters=rope, **(original if family == "phi3" else {}))
    said = "straddles 8, beyond which tiny-.* uses other rotary frequencies"
    refused = 0
    for size, count in product(range(6, 12), (1, 2, 3)):
        prompt, answer = list(range(10, 10 + size)), list(range(50, 50 + count))
        query = [" ".join(map(str, ids)) for ids in (prompt, answer)]
        expected = by_passes(lm, prompt, answer)
        if np.ptp(expected) > 1e-6:
            refused += 1
            with pytest.raises(ValueError, match=said):
                lm.encode(*query)
        else:
            encoded = [lm.encode(*query)]
            for change in (None, Change(lm, {(0, 1)}, 1.0)):  # the second continues a cache
                found = score_rows(lm, encoded, [(0, change)]).log_probability[0]
                assert found == pytest.approx(expected[0], abs=1e-6)
    assert refused == 6


@torch.no_grad()
def test_a_dynamic_rope_is_read_as_if_no_longer_text_had_been(one_thread):
    """Its frequencies grow with the longest pass so far, and only a shorter one than the original
    length resets them."""
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    lm = tiny_lm("llama2", rope_parameters=rope, max_position_embeddings=12)
    ids = lm.encode_prompt(" ".join(map(str, range(10, 21))))
    fresh = column_scores(lm, [ids])[0][0]
    lm.model(torch.arange(10, 60)[None])
    assert np.array_equal(column_scores(lm, [ids])[0][0], fresh)
    with pytest.raises(ValueError, match="has 12 tokens; tiny-llama2 reads at most 11"):
        lm.encode_prompt(" ".join(map(str, range(10, 22))))


# --- the real ones --------------------------------------------------------------------------------
class NoModel(LanguageModel):
    """A tokenizer alone: `encode` needs no more."""

    context, num_embeddings, rope_switches = 1024, float("inf"), ()

    def __init__(self, tokenizer, name):
        self.tokenizer, self.name = tokenizer, name


@pytest.fixture(scope="module")
def real():
    return {
        name: NoModel(AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name), name)
        for name in NAMES
    }


@pytest.fixture(scope="module")
def facts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_facts(str(SHARED / "pararel"), facts_per_relation=3, seed=1)


@needs_data
@pytest.mark.parametrize("name, ids", [("gpt2", [6342]), ("llama2", [3681]), ("llama3", [12366])])
def test_known_ids(real, name, ids):
    prompt, answer = real[name].encode("The capital of France is", "Paris")
    bos = {"gpt2": [], "llama2": [1], "llama3": [128000]}[name]
    assert answer == ids and real[name].bos_offset == len(bos) and prompt[: len(bos)] == bos


@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_answers_of_pararel_are_what_they_add_to_the_prompt(real, facts, name):
    lm, seen = real[name], 0
    lone = lm.tokenizer.convert_tokens_to_ids("▁") if name == "llama2" else None
    special = set(lm.tokenizer.all_special_ids)
    for fact in facts:
        for prompt in fact.prompts[:3]:
            ids, answer = lm.encode(prompt, fact.object)
            assert ids == lm.tokenizer(prompt).input_ids
            assert ids + answer == lm.tokenizer(f"{prompt} {fact.object}").input_ids
            assert answer and not special & set(answer) and answer[0] != lone
            assert lm.tokenizer.decode(answer).strip() == fact.object
            seen += 1
    assert seen > 250 and len({fact.relation for fact in facts}) == 36


SPECIAL_TEXTS = [("gpt2", "<|endoftext|>"), ("llama2", "<s>"), ("llama2", "</s>")]
SPECIAL_TEXTS += [("llama3", "<|begin_of_text|>"), ("llama3", "<|end_of_text|>")]


@needs_data
@pytest.mark.parametrize("name, text", SPECIAL_TEXTS)
def test_text_that_spells_a_special_token_stays_text(real, name, text):
    lm = real[name]
    token = lm.tokenizer.convert_tokens_to_ids(text)
    assert token in lm.tokenizer.all_special_ids
    for prompt in (f"The band {text} plays in", f"{text} plays in", f"They play in {text}"):
        ids, answer = lm.encode(prompt, "Paris")
        assert token not in ids[lm.bos_offset :] and token not in answer, prompt
        assert ids[: lm.bos_offset] == [lm.tokenizer.bos_token_id] * lm.bos_offset
        assert text in lm.tokenizer.decode(ids[lm.bos_offset :])
    _, answer = lm.encode("They play in", text)
    assert token not in answer and lm.tokenizer.decode(answer).strip() == text


@needs_data
@pytest.mark.parametrize("method", ["ig", "sig", "amig"])
@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_scores_with_a_real_vocabulary_are_those_of_the_naive_reference(real, family, method):
    """Its special tokens make the baselines, and the unembedding goes in chunks."""
    tokenizer = real[family].tokenizer
    model = tiny_model(family, vocab_size=len(tokenizer))
    lm = LanguageModel(model, tokenizer, family)
    query = "The official language of Malmö is", "Swedish"
    naive = Naive(model, family, bos=family == "llama3")
    naive.eos = tokenizer.eos_token_id
    wanted, gap = naive.attribute(*lm.encode(*query), method, *quadrature("right", 3))
    found = attribute(lm, *([text] for text in query), method=method, steps=3)
    assert (found.scores[0] - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    torch.testing.assert_close(found.completeness_gap[0], gap, rtol=1e-6, atol=1e-12)
