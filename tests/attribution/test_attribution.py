"""The fast attribution against the definition: a full forward pass for every point of every layer's
path, Captum, completeness; and what must hold whatever the scores are (batches, memory, refusals).
Every other family is in model/test_families.py."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from families import ROUNDED
from naive import Naive, keeping_float64
from tiny import FAMILIES, hooked, tiny_lm, tiny_model, trusted, watched_rows, word_tokenizer
from torch import nn

from qlutils import attribute, scale_neurons
from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.attribution.coordinate import Coordinate
from qlutils.attribution.paths import Paths
from qlutils.attribution.quadrature import quadrature
from qlutils.change.rows import score_queries
from qlutils.change.synapses import Row, column_scores, run_rows
from qlutils.checks import METHODS, RULES
from qlutils.model import answer as model_answer
from qlutils.model.attention import exact_attention, prefix_attention
from qlutils.model.language_model import LanguageModel
from qlutils.model.passes import clean_pass, computing

BOS = 1
FIXED = tuple(rule for rule in RULES if rule != "converged")  # with nodes known in advance
WITH_BOS = ("llama2", "llama3", "gemma", "mistral", "opt")
QUERY = [5, 6, 7, 8], [9]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A vocabulary of 97 goes through the unembedding in three chunks, and the rows in several, as
    real ones do."""
    monkeypatch.setitem(model_answer.VOCAB_CHUNK, "cpu", 40)
    monkeypatch.setitem(model_answer.ROW_CHUNK, "cpu", 7)


def exactly(family):
    """Both sides without the rounding inside: the two round different sums."""
    return keeping_float64() if family in ROUNDED else nullcontext()


def lm_of(model, name="tiny", **tokenizer):
    return LanguageModel(model, word_tokenizer(**tokenizer), name)


def scores_of(lm, *queries, **spec):
    return attribute_encoded(lm, queries or [QUERY], Spec(**{"steps": 4, **spec})).scores


def relative(a, b):
    return float(((a - b).abs().flatten(1).amax(1) / b.abs().flatten(1).amax(1)).max())


def ids_of(generator, length):
    return torch.randint(4, 97, (length,), generator=generator).tolist()


# --- the naive reference --------------------------------------------------------------------------
@torch.no_grad()
def some_queries(model, bos=False):
    """Three queries: two of one length, one with an answer of two tokens. Each answer token is a
    likely one, so that scores are not lost in rounding."""
    generator, queries = torch.Generator().manual_seed(0), []
    for length, tokens in ((6, 2), (4, 1), (6, 1)):
        prompt, answer = [BOS] * bos + ids_of(generator, length - bos), []
        for rank in range(1, tokens + 1):
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits
            answer.append(int(logits[0, -1].argsort(descending=True)[rank]))
        queries.append((prompt, answer))
    return queries


def compare(family, spec, *, bos=False):
    """Largest difference over largest score, the worst query; for the gaps too where they have the
    scores' scale."""
    model, worst = tiny_model(family), 0.0
    lm, queries = lm_of(tiny_model(family), bos=bos), some_queries(model, bos)
    if family == "gemma2":  # its soft cap exists in transformers' written-out attention only
        model.set_attn_implementation("eager")
    naive, rule = Naive(model, family, spec.site, bos), quadrature(spec.rule, spec.steps)
    with exactly(family):
        found = attribute_encoded(lm, queries, spec)
        for i, query in enumerate(queries):
            how = spec.method, *rule, spec.answer, spec.amig_factor
            scores, gap = naive.attribute(*query, *how)
            largest = scores.abs().amax(1)
            assert largest.min() > 1e-3 * largest.max() > 1e-7, "layers without scores are no test"
            apart = [(found.scores[i] - scores).abs().max()]
            if spec.method == "ig":
                apart.append((found.completeness_gap[i] - gap).abs().max())
            worst = max(worst, float(max(apart) / largest.max()))
    assert found.scores.dtype == torch.float64
    return worst


# --- the scores -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_naive_reference_in_float64(family, method):
    assert compare(family, Spec(method, steps=3), bos=family in WITH_BOS) <= 1e-9


CHOICES = [Spec("ig", 4, rule) for rule in FIXED]
CHOICES += [Spec(method, 3, answer="first") for method in METHODS]
CHOICES += [Spec("sig", 3, "gauss"), Spec("amig", 3, "endpoints"), Spec("amig", 3, amig_factor="w")]
CHOICES += [Spec("sig", 3, "left", site="pre_activation")]
CHOICES += [Spec("amig", 3, "midpoint", site="pre_activation")]


@pytest.mark.parametrize("spec", CHOICES, ids=lambda s: f"{s.method}-{s.rule}-{s.answer}-{s.site}")
@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_every_choice_gives_the_naive_references_scores(family, spec):
    assert compare(family, spec, bos=family == "llama3") <= 1e-9


def test_integrated_gradients_are_captums():
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    lm, ids, token = tiny_lm("gpt2"), [5, 61, 17, 30, 8], 12
    naive = Naive(tiny_model("gpt2"), "gpt2")

    class LastTokensNeurons(nn.Module):
        """The answer's probability as a function of one layer's neuron vector at the last token."""

        def __init__(self, layer):
            super().__init__()
            self.layer, self.here = layer, nn.Identity()

        def forward(self, vectors):
            return naive.probability(ids, token, self.layer, self.here(vectors))

    scores = scores_of(lm, (ids, [token]), steps=20)[0]
    for layer, w in enumerate(naive.vectors(ids)):
        module, w = LastTokensNeurons(layer), w[None].clone().requires_grad_()
        integrated = captum.LayerIntegratedGradients(module, module.here)
        options = dict(n_steps=20, method="riemann_right")
        wanted = integrated.attribute(w, torch.zeros_like(w), **options)[0]
        # Captum's nodes are float32 numbers: 1e-7 of the scores is what the two can agree to
        assert (scores[layer] - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert wanted.abs().max() > 1e-6


# --- the sum of the integral ----------------------------------------------------------------------
def test_the_nodes_are_the_documented_ones():
    assert quadrature("right", 4)[0].tolist() == [0.25, 0.5, 0.75, 1]
    assert quadrature("left", 4)[0].tolist() == [0, 0.25, 0.5, 0.75]
    assert quadrature("endpoints", 5)[0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert quadrature("midpoint", 2)[0].tolist() == [0.25, 0.75]


@cache
def smooth():
    """A model without kinks, a query, and by method the largest P(w) - P(b) of a layer, summed over
    baselines, by naive passes."""
    lm = lm_of(tiny_model("gpt2", scale=2))
    prompt, answer = some_queries(lm.model)[2]
    naive, differences = Naive(lm.model, "gpt2"), {}
    for method in METHODS:
        ends = torch.stack([naive.vectors(prompt), *naive.baselines(prompt, [], method)], 1)
        with torch.no_grad():
            p = [naive.probability(prompt, answer[0], *layer) for layer in enumerate(ends)]
        differences[method] = max(abs(float((one[0] - one[1:]).sum())) for one in p)
    return lm, (prompt, answer), differences


@pytest.mark.parametrize("rule", FIXED)
@pytest.mark.parametrize("method", METHODS)
def test_the_completeness_gap_vanishes_as_the_rules_order_says(method, rule):
    lm, query, differences = smooth()
    found = [attribute_encoded(lm, [query], Spec(method, steps, rule)) for steps in (4, 16, 32)]
    gaps = [one.completeness_gap[0].max() for one in found]
    few, some, many = (gap / differences[method] for gap in gaps)
    if rule == "gauss":
        assert few > 1e-9 > some and many < 1e-9
    elif rule == "clenshaw":
        assert few > 1e-3 > 1e-5 > some > many and many < 1e-9
    else:
        assert few > some > many and many < 0.05
        assert some / many == pytest.approx(4 if rule == "midpoint" else 2, rel=0.1)


# --- the rule "converged" -------------------------------------------------------------------------
def largest_error(scores, exact):
    """Of a query's scores, as a share of its largest; up to the factor that amig divides by, a sum
    that nearly cancels in random models."""
    scores, exact = scores.flatten(1), exact.flatten(1)
    factor = (scores * exact).sum(1, keepdim=True) / (scores * scores).sum(1, keepdim=True)
    return float(((factor * scores - exact).abs().amax(1) / exact.amax(1)).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma3", "olmo2"])
def test_the_converged_rule_is_within_its_tolerance_of_many_nodes(family, method):
    lm, errors = tiny_lm(family), []
    queries = some_queries(lm.model)[method == "sig" :]  # `sig` of two answer tokens takes longest
    exact = scores_of(lm, *queries, method=method, steps=1025, rule="clenshaw")
    for tolerance in (0.05, 0.002):
        found = attribute_encoded(lm, queries, Spec(method, rule="converged", tolerance=tolerance))
        assert found.converged.all()
        errors.append(largest_error(found.scores, exact))
        assert errors[-1] <= tolerance, (tolerance, found.evaluations)
    assert errors[1] < errors[0]


def test_the_converged_rule_takes_its_gradients_where_a_layer_needs_them():
    lm = tiny_lm("gemma3")  # a norm after the MLP: a jump close to the zero baseline
    exact = scores_of(lm, steps=1025, rule="clenshaw")
    found = attribute_encoded(lm, [QUERY], Spec("ig", rule="converged"))
    count = int(found.evaluations.ceil())
    assert 3 <= count < 40
    assert relative(found.scores, exact) < 0.1 * relative(scores_of(lm, steps=count), exact)


def test_a_query_that_does_not_settle_is_flagged(monkeypatch):
    lm = tiny_lm("llama3")
    monkeypatch.setattr("qlutils.attribution.bisection.NARROWEST", 1.0)  # nothing is halved
    strict = Spec("ig", rule="converged", tolerance=1e-6)
    found = attribute_encoded(lm, some_queries(lm.model), strict)
    assert not found.converged.any() and (found.evaluations <= 5).all()
    assert attribute_encoded(lm, [QUERY], Spec("ig")).converged is None


def rounded_and_exact(family):
    """Models of the same weights in bfloat16 and in float64."""
    rounded, exact = tiny_model(family, torch.bfloat16, scale=2), tiny_model(family)
    exact.load_state_dict(rounded.state_dict())
    return lm_of(rounded), lm_of(exact)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "olmo2"])
def test_the_converged_rule_does_not_chase_what_bfloat16_rounds(family):
    """A probability is off by a per cent there, in an interval however small."""
    both = rounded_and_exact(family)
    queries = some_queries(both[1].model)
    found, wanted = (attribute_encoded(lm, queries, Spec(rule="converged")) for lm in both)
    assert found.converged.all()
    assert (found.evaluations <= 2 * wanted.evaluations).all()


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_a_sure_answer_are_no_rounding(method):
    """1 - P is 1e-12 all along the paths: in float32 P is 1 everywhere."""
    exact = tiny_model("llama3", seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        exact.lm_head.weight.mul_(60)
        for layer in exact.model.layers:
            layer.mlp.down_proj.weight.mul_(1e-4)
    rounded = tiny_model("llama3", torch.float32, tie_word_embeddings=False)
    rounded.load_state_dict(exact.state_dict())
    prompt = [10, 11, 12, 13, 14]
    answer = exact(torch.tensor([prompt])).logits[0, -1].argmax()
    query = prompt, [int(answer)]
    found, wanted = (scores_of(lm_of(one), query, method=method) for one in (rounded, exact))
    assert relative(found.double(), wanted) < 1e-3


# --- probability and knowledge --------------------------------------------------------------------
@torch.no_grad()
def test_a_query_is_known_when_greedy_decoding_gives_the_whole_answer():
    lm, prompt = tiny_lm("llama3"), [9, 40, 7]
    greedy, probability = [], 1.0
    for _ in range(3):
        p = torch.softmax(lm.model(torch.tensor([prompt + greedy])).logits[0, -1], -1)
        greedy, probability = greedy + [int(p.argmax())], probability * float(p.max())
    wrong = greedy[:2] + [(greedy[2] + 1) % 97]
    result = attribute_encoded(lm, [(prompt, greedy), (prompt, wrong)], Spec(steps=2))
    assert result.known.tolist() == [True, False]
    assert float(result.probability[0]) == pytest.approx(probability, rel=1e-12)
    assert 0 < result.probability[1] < result.probability[0]
    first = attribute_encoded(lm, [(prompt, wrong)], Spec(steps=2, answer="first"))
    assert not first.known.item()  # the whole answer counts, whichever tokens are attributed
    assert float(first.probability) == pytest.approx(float(result.probability[1]), rel=1e-12)


# --- batches and memory ---------------------------------------------------------------------------
def mixed_queries():
    generator = torch.Generator().manual_seed(3)
    lengths = (5, 1), (3, 2), (5, 3), (8, 1), (3, 1), (4, 1), (5, 1), (2, 1)
    return [tuple(ids_of(generator, length) for length in both) for both in lengths]


BATCHED = [(family, "ig", "converged") for family in FAMILIES]  # lengths that share a batch
BATCHED += [("gemma3", "sig", "converged"), ("mistral", "amig", "converged")]
BATCHED += [("llama3", "ig", "right"), ("bloom", "sig", "left"), ("opt", "amig", "endpoints")]


@pytest.mark.parametrize("family, method, rule", BATCHED)
def test_a_batch_of_mixed_lengths_equals_one_query_at_a_time(family, method, rule):
    lm, queries, spec = tiny_lm(family), mixed_queries(), Spec(method, 3, rule)
    with exactly(family):
        together = attribute_encoded(lm, queries, spec)
        if rule != "converged":  # baselines one at a time, too
            spec = replace(spec, row_budget=1)
        alone = [attribute_encoded(lm, [query], spec) for query in queries]
    one_by_one = lambda name: torch.cat([getattr(one, name) for one in alone])  # noqa: E731
    # the last bit, which a batch's shape may move, can decide whether a piece is halved once more
    bound = 1e-6 if rule == "converged" else 1e-12
    assert relative(together.scores, one_by_one("scores")) <= bound
    assert relative(together.completeness_gap, one_by_one("completeness_gap")) <= max(bound, 1e-9)
    torch.testing.assert_close(together.probability, one_by_one("probability"), rtol=1e-12, atol=0)
    assert torch.equal(together.known, one_by_one("known"))


@pytest.mark.parametrize("method", METHODS)
def test_rows_in_flight_are_bounded_by_the_budget_whatever_the_number_of_queries(method):
    lm, budget, peaks, calls = tiny_lm("llama3"), 60, [], []
    for count in (8, 40):
        queries = [([5, 6, 7, 8 + i % 50], [9]) for i in range(count)]
        with watched_rows(lm) as seen:
            scores_of(lm, *queries, method=method, steps=5, row_budget=budget)
        peaks.append(seen["most"])
        calls.append(seen["calls"])
    assert budget / 2 < peaks[0] == peaks[1] <= budget
    assert calls[1] > 3 * calls[0]


@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_halves_the_budget_and_gives_the_same_scores(method):
    lm, queries, spec = tiny_lm("llama3"), 4 * mixed_queries()[:3], Spec(method, 4, row_budget=400)
    with watched_rows(lm) as seen:
        wanted = attribute_encoded(lm, queries, spec)
    assert wanted.row_budget == 400 and seen["most"] > 40
    with watched_rows(lm, limit=40):
        found = attribute_encoded(lm, queries, spec)
    assert found.row_budget in (25, 50, 100, 200)
    assert relative(found.scores, wanted.scores) <= 1e-12


def test_out_of_memory_for_the_smallest_batch_and_other_errors_come_through():
    lm = tiny_lm("gpt2")
    with watched_rows(lm, limit=0), pytest.raises(torch.OutOfMemoryError):
        scores_of(lm)
    fail = trusted(lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with hooked(lm.downs[1].register_forward_pre_hook(fail)):
        with pytest.raises(RuntimeError, match="a bug"):
            scores_of(lm)


# --- what others did to the model since it was loaded ---------------------------------------------
def doubled(_, __, output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def replace_forward(lm):
    own = lm.layers[0].forward
    lm.layers[0].forward = lambda *args, **kwargs: doubled(None, None, own(*args, **kwargs))


HOOK = "has a forward hook of other code.*remove it"
SPOILT = {
    "a layer's hook": (lambda lm: lm.layers[1].register_forward_hook(doubled), HOOK),
    "the head's hook": (lambda lm: lm.model.lm_head.register_forward_hook(doubled), HOOK),
    "a hook on all": (lambda _: nn.modules.module.register_module_forward_hook(doubled), HOOK),
    "another forward": (replace_forward, "modules .*a forward method was replaced"),
    "training mode": (lambda lm: lm.model.transformer.train() and None, "is in training mode"),
    "compiled": (lambda lm: lm.model.compile(backend="eager"), "it was compiled"),
    "exchanged": (lambda lm: setattr(lm.model, "lm_head", nn.Identity()), "modules were added"),
    "soft cap": (lambda lm: setattr(lm.model.config, "final_logit_softcapping", 9), "soft cap was"),
}


@pytest.mark.parametrize("spoil, said", SPOILT.values(), ids=SPOILT)
def test_what_would_change_numbers_without_a_word_is_refused_and_gone_with_it(spoil, said):
    lm = tiny_lm("gpt2")
    plain = scores_of(lm)
    handle = spoil(lm)
    try:
        for call in (
            lambda: scores_of(lm),
            lambda: score_queries(lm, [QUERY]),
            lambda: column_scores(lm, [QUERY[0]]),
            lambda: run_rows(lm, [Row(*QUERY)]),
            lambda: scale_neurons(lm, {(0, 1)}, 0.0).__enter__(),
        )[: 4 if said == HOOK else 5]:
            with pytest.raises(ValueError, match=f"tiny-gpt2.*{said}"):
                call()
    finally:
        if handle is not None:
            handle.remove()
    if said == HOOK:
        assert torch.equal(scores_of(lm), plain)
    if "forward method" in said:  # what a loader set is the model's own
        assert scores_of(lm_of(lm.model)).isfinite().all()


def test_a_second_thread_that_computes_with_a_model_is_refused():
    lm = tiny_lm("llama3")
    with computing(lm), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="tiny-llama3 is in use by another thread"):
            pool.submit(scores_of, lm).result()


# --- bfloat16 -------------------------------------------------------------------------------------
def test_in_bfloat16_points_of_a_path_are_rounded_once():
    """Not their places, too, nor how far it is from one end to the other."""
    lm = tiny_lm("llama3", torch.bfloat16)
    clean = clean_pass(lm, torch.tensor([[5, 6, 7, 8]]), "down_input")
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(1, 1, 3, lm.num_neurons, generator=generator).bfloat16()
    paths = Paths.of(lm, clean, starts, Spec())
    begin, end = paths.begin[0], paths.end[0]
    node = torch.linspace(0, 1, 40, dtype=torch.float64)
    found = paths.rows(0, torch.zeros(1, 40, dtype=torch.long), node[None])[0].double()
    wanted = begin.double()[0] + node[:, None] * (end.double() - begin.double())[0]
    unit = 2.0 ** (wanted.abs().log2().floor() - 7)  # of the last of 8 bits
    assert ((found - wanted).abs() <= 0.501 * unit + 1e-6).all()
    change = (end.double() - begin.double())[0, 0]
    path = torch.zeros(len(change), 3, dtype=torch.long)
    rise = paths.rise(path, torch.eye(len(change)))
    torch.testing.assert_close(rise.double(), change, rtol=1e-6, atol=0)
    ends = (begin, end), (begin.double(), end.double())
    places = [Coordinate.of([one], [other], [1e-6]) for one, other in ends]
    assert torch.equal(places[0].center, places[1].center)


@pytest.mark.parametrize("attend", [prefix_attention, exact_attention])
@pytest.mark.parametrize("name", ["s_aux", "position_bias", "indices"])
def test_an_argument_that_an_attention_would_leave_out_is_refused(attend, name):
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"the attention of Identity takes '{name}' into account"):
        attend(nn.Identity(), query, query, query, None, **{name: torch.zeros(2)})


# --- how it is called -----------------------------------------------------------------------------
def test_scores_are_the_same_bits_again_and_whatever_the_caller_does_with_gradients():
    lm = tiny_lm("gpt2", torch.float32)
    plain = scores_of(lm, *mixed_queries(), method="sig")
    assert torch.equal(scores_of(lm, *mixed_queries(), method="sig"), plain)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = scores_of(lm, *mixed_queries(), method="sig")
        assert torch.equal(found, plain) and not found.is_inference()
    lm.model.requires_grad_(True)
    assert torch.equal(scores_of(lm, *mixed_queries(), method="sig"), plain)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


# --- baselines and refusals -----------------------------------------------------------------------
def test_sig_prefers_the_mask_token_then_pad_then_eos():
    lm, scores = tiny_lm("gpt2"), []
    naive = Naive(tiny_model("gpt2"), "gpt2")
    pad = dict(pad_token="40")
    for token, special in ((0, {}), (40, pad), (41, dict(pad, mask_token="41"))):
        lm.tokenizer, naive.eos = word_tokenizer(**special), token
        scores.append(attribute(lm, ["5 6 7"], ["8"], method="sig", steps=3).scores)
        wanted, _ = naive.attribute([5, 6, 7], [8], "sig", *quadrature("right", 3))
        assert relative(scores[-1], wanted[None]) <= 1e-9
    assert relative(scores[1], scores[0]) > 1e-3


@pytest.mark.parametrize("embedded", [True, False])
def test_baselines_of_tokens_that_the_model_does_not_embed_are_refused(embedded):
    """Some checkpoints have no EOS token, or one that their embeddings were never extended for."""
    lm, tokenizer = tiny_lm("gpt2"), word_tokenizer()
    if embedded:
        tokenizer.eos_token = None
    else:
        tokenizer.add_special_tokens({"eos_token": "<end>"})
        assert tokenizer.eos_token_id == 97
    lm.tokenizer = tokenizer
    for method, need in (("amig", "replaces the prompt by"), ("sig", "needs a mask, pad or")):
        said = f"tiny-gpt2: {method} {need} EOS tokens?, .* has none that the model embeds"
        with pytest.raises(ValueError, match=said):
            attribute(lm, ["10 11 12"], ["13"], method=method)
    attribute(lm, ["10 11 12"], ["13"], method="ig", steps=2)


def test_float16_is_refused():
    with pytest.raises(ValueError, match="float16.*bfloat16 or float32"):
        attribute(lm_of(tiny_model("gpt2", torch.float16)), ["5 6"], ["7"])


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_scores_name_the_query_they_belong_to(method):
    lm = tiny_lm("gpt2")
    lm.model.get_submodule("transformer.wte").weight.data[77] = float("nan")
    weight = torch.randn(97, 32, dtype=torch.float64)
    lm.model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match="'5 77 6' are not finite.*tiny-gpt2.*float64"):
        attribute(lm, ["5 6 7", "5 77 6"], ["8", "8"], method=method)
