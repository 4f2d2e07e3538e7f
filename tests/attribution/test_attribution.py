"""The fast attribution against the definition: a full forward pass for every point of every layer's
path, Captum, completeness; and what must hold whatever the scores are (batches, memory, the model
afterwards, refusals)."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from naive import Naive, keeping_float64
from tiny import FAMILIES, hooked, tiny_lm, tiny_model, trusted, watched_rows, word_tokenizer
from torch import nn

from qlutils import attribute
from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.attribution.coordinate import Coordinate
from qlutils.attribution.paths import Paths
from qlutils.attribution.quadrature import RULES, quadrature
from qlutils.change.rows import Change, score_queries, score_rows
from qlutils.change.synapses import Row, column_scores, run_rows
from qlutils.checks import METHODS
from qlutils.model import answer as replay
from qlutils.model.attention import exact_attention, prefix_attention
from qlutils.model.language_model import LanguageModel
from qlutils.model.passes import clean_pass, computing

EOS, BOS = 0, 1
# Families whose attention, in transformers' own code, rounds to float32 whatever the model's dtype.
# Both sides are compared without that: the two round different sums.
ROUNDED = ("gptj", "codegen", "gpt-neo", "bloom", "granite-swa", "gemma4")
FIXED = tuple(
    rule for rule in RULES if rule != "converged"
)  # the rules whose nodes are known in advance
WITH_BOS = ("llama2", "llama3", "gemma", "mistral", "opt")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A vocabulary of 97 goes through the unembedding in three chunks, and the rows in several, as
    real ones do."""
    monkeypatch.setitem(replay.VOCAB_CHUNK, "cpu", 40)
    monkeypatch.setitem(replay.ROW_CHUNK, "cpu", 7)


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the naive reference --------------------------------------------------------------------------
def some_queries(model, bos=False, seed=0):
    """Three queries: two of one length, one with an answer of two tokens. Each answer token is a
    likely one, so that scores are not lost in rounding."""
    generator, queries = torch.Generator().manual_seed(seed), []
    naive = lambda ids: model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]  # noqa: E731
    for length, tokens in ((6, 2), (4, 1), (6, 1)):
        prompt = [BOS] * bos + torch.randint(4, 97, (length - bos,), generator=generator).tolist()
        answer = []
        for rank in range(1, tokens + 1):
            with torch.no_grad():
                answer.append(int(naive(prompt + answer).argsort(descending=True)[rank]))
        queries.append((prompt, answer))
    return queries


def compare(family, spec, *, dtype=torch.float64, bos=False, queries=None):
    """Largest difference over largest score, the worst query; for the gaps too where they have the
    scores' scale."""
    lm = LanguageModel(tiny_model(family, dtype), word_tokenizer(bos=bos), f"tiny-{family}")
    reference = tiny_model(family, torch.float32).double()
    if (
        family == "gemma2"
    ):  # its soft cap exists in transformers' written-out attention only, which rounds
        reference.set_attn_implementation("eager")
    queries = some_queries(reference, bos)[:queries]
    naive = Naive(reference, family, spec.site, bos)
    with keeping_float64() if family in (*ROUNDED, "gemma2") else nullcontext():
        nodes, weights = quadrature(spec.rule, spec.steps)
        wanted = [
            naive.attribute(*query, spec.method, nodes, weights, spec.answer, spec.amig_factor)
            for query in queries
        ]
    with keeping_float64() if family in (*ROUNDED, "gemma2") else nullcontext():
        found = attribute_encoded(lm, queries, spec)
    worst = 0.0
    for i, (scores, gap) in enumerate(wanted):
        largest = scores.abs().amax(1)
        assert largest.min() > 1e-3 * largest.max() > 1e-7, (
            f"layers without scores make no test: {largest}"
        )
        worst = max(worst, float((found.scores[i] - scores).abs().max() / largest.max()))
        if spec.method == "ig":
            worst = max(worst, float((found.completeness_gap[i] - gap).abs().max() / largest.max()))
    assert found.scores.shape == (len(queries), *wanted[0][0].shape)
    assert found.completeness_gap.shape == found.scores.shape[:2]
    assert found.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    return worst


# --- the scores -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_naive_reference_in_float64(family, method):
    assert compare(family, Spec(method, steps=3), bos=family in WITH_BOS) <= 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_at_the_pre_activation_are_those_of_the_naive_reference(family):
    assert compare(family, Spec("ig", steps=2, site="pre_activation"), queries=1) <= 1e-9


@pytest.mark.parametrize(
    "spec",
    [
        *[Spec("ig", 4, rule) for rule in FIXED],
        Spec("sig", 3, "gauss"),
        Spec("amig", 3, "endpoints"),
        Spec("sig", 3, "left", site="pre_activation"),
        Spec("amig", 3, "midpoint", site="pre_activation"),
        Spec("amig", 3, amig_factor="w"),
        Spec("ig", 3, answer="first"),
        Spec("sig", 3, answer="first"),
        Spec("amig", 3, answer="first"),
    ],
    ids=lambda s: f"{s.method}-{s.rule}-{s.answer}-{s.site}-{s.amig_factor}",
)
@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_every_choice_gives_the_naive_references_scores(family, spec):
    assert compare(family, spec, bos=family == "llama3") <= 1e-9


@pytest.mark.parametrize(
    "family, method",
    [
        *(
            (family, "ig") for family in FAMILIES if family != "gemma4"
        ),  # too rough; a smooth one below
        *((family, method) for family in ("gpt2", "llama3") for method in ("sig", "amig")),
    ],
)
def test_scores_in_float32_are_within_1e_4_of_float64(family, method):
    assert compare(family, Spec(method, steps=3), dtype=torch.float32, queries=1) <= 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_neuron_counts_where_its_prompt_tokens_are_and_where_the_answer_leads(method):
    """The naive comparison would not notice scores that ignore the context or the answer: these
    must not."""
    lm = tiny_lm("llama3")
    first, other_context, other_answer = attribute_encoded(
        lm, [([5, 6, 7, 8], [9]), ([5, 30, 7, 8], [9]), ([5, 6, 7, 8], [10])], Spec(method, 4)
    ).scores
    for other in (other_context, other_answer):
        assert (first - other).abs().max() > 0.05 * first.abs().max()


def test_integrated_gradients_are_captums():
    captum = pytest.importorskip(
        "captum.attr", reason="captum is not installed (a test dependency)"
    )
    family, ids, token = "gpt2", [5, 61, 17, 30, 8], 12
    lm, model = tiny_lm(family), tiny_model(family)
    naive = Naive(model, family)
    neurons = naive.vectors(ids)

    class LastTokensNeurons(nn.Module):
        """The answer's probability as a function of one layer's neuron vector at the last token."""

        def __init__(self, layer):
            super().__init__()
            self.layer, self.here = layer, nn.Identity()

        def forward(self, vectors):
            return naive.probability(ids, token, self.layer, self.here(vectors))

    scores = attribute_encoded(lm, [(ids, [token])], Spec("ig", 20)).scores[0]
    for layer in range(lm.num_layers):
        module = LastTokensNeurons(layer)
        w = neurons[layer][None].clone().requires_grad_()
        wanted = captum.LayerIntegratedGradients(module, module.here).attribute(
            w, torch.zeros_like(w), n_steps=20, method="riemann_right"
        )[0]
        # Captum's nodes are float32 numbers: 1e-7 of the scores is what the two can agree to
        assert (scores[layer] - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert wanted.abs().max() > 1e-6


# --- the sum of the integral ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "rule, order", [("right", 0), ("left", 0), ("endpoints", 1), ("midpoint", 1), ("gauss", 9)]
)
def test_quadrature_integrates_polynomials_up_to_its_order_and_no_further(rule, order):
    nodes, weights = quadrature(rule, 5)
    assert len(nodes) == len(weights) == 5 and nodes.min() >= 0 and nodes.max() <= 1
    assert weights.sum() == pytest.approx(1, abs=1e-15)
    for degree in range(order + 1):
        assert weights @ nodes**degree == pytest.approx(1 / (degree + 1), abs=1e-14), degree
    assert weights @ nodes ** (order + 1) != pytest.approx(1 / (order + 2), abs=1e-7)


def test_the_nodes_are_the_documented_ones():
    assert quadrature("right", 4)[0].tolist() == [0.25, 0.5, 0.75, 1]
    assert quadrature("left", 4)[0].tolist() == [0, 0.25, 0.5, 0.75]
    assert quadrature("endpoints", 5)[0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert quadrature("midpoint", 2)[0].tolist() == [0.25, 0.75]


@pytest.fixture(scope="module")
def smooth():
    """A model without kinks, a query, and P(w) - P(b) of every layer, summed over baselines, by
    naive passes."""
    lm = LanguageModel(tiny_model("gpt2", scale=2), word_tokenizer(), "smooth")
    prompt, answer = some_queries(lm.model)[2]
    naive, differences = Naive(tiny_model("gpt2", scale=2), "gpt2"), {}
    for method in METHODS:
        w, starts = naive.vectors(prompt), torch.stack(naive.baselines(prompt, [], method), 1)
        with torch.no_grad():
            ends = [
                naive.probability(
                    prompt, answer[0], layer, torch.cat([w[layer][None], starts[layer]])
                )
                for layer in range(lm.num_layers)
            ]
        differences[method] = torch.stack([(p[0] - p[1:]).sum() for p in ends])
    return lm, (prompt, answer), differences


@pytest.mark.parametrize("rule", FIXED)
@pytest.mark.parametrize("method", METHODS)
def test_the_completeness_gap_vanishes_as_the_rules_order_says(smooth, method, rule):
    lm, query, differences = smooth
    few, some, many = (
        attribute_encoded(lm, [query], Spec(method, steps, rule)).completeness_gap[0].max()
        / differences[method].abs().max()
        for steps in (4, 16, 32)
    )
    if rule == "gauss":
        assert few > 1e-9 > some and many < 1e-9
    elif rule == "clenshaw":
        assert few > 1e-3 > 1e-5 > some > many and many < 1e-9
    else:
        assert few > some > many and many < 0.05
        assert some / many == pytest.approx(4 if rule == "midpoint" else 2, rel=0.1)


def largest_error(scores, exact):
    """Of a query's scores, as a share of its largest; up to the factor that amig divides by, a sum
    that nearly cancels in random models."""
    scores, exact = scores.flatten(1), exact.flatten(1)
    factor = (scores * exact).sum(1, keepdim=True) / (scores * scores).sum(1, keepdim=True)
    return float(((factor * scores - exact).abs().amax(1) / exact.amax(1)).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma3", "olmo2"])
def test_the_converged_rule_is_within_its_tolerance_of_many_nodes(family, method):
    lm = tiny_lm(family)
    queries = some_queries(lm.model)[:3]
    exact = attribute_encoded(lm, queries, Spec(method, 1025, "clenshaw")).scores
    errors = []
    for tolerance in (0.05, 0.002):
        found = attribute_encoded(lm, queries, Spec(method, rule="converged", tolerance=tolerance))
        assert found.converged.all()
        errors.append(largest_error(found.scores, exact))
        assert errors[-1] <= tolerance, (tolerance, found.evaluations)
    assert errors[1] < errors[0]


def test_the_converged_rule_takes_its_gradients_where_a_layer_needs_them():
    lm = tiny_lm("gemma3")  # a norm after the MLP: a jump close to the zero baseline
    query = [([5, 6, 7, 8], [9])]
    exact = attribute_encoded(lm, query, Spec("ig", 1025, "clenshaw")).scores
    found = attribute_encoded(lm, query, Spec("ig", rule="converged"))
    count = int(found.evaluations.ceil())
    assert 3 <= count < 40
    same = attribute_encoded(lm, query, Spec("ig", count, "right"))
    assert relative(found.scores, exact) < 0.1 * relative(same.scores, exact)


def test_a_query_that_does_not_settle_is_flagged(monkeypatch):
    lm = tiny_lm("llama3")
    queries = some_queries(lm.model)
    monkeypatch.setattr(
        "qlutils.attribution.bisection.NARROWEST", 1.0
    )  # not one interval may be halved
    found = attribute_encoded(lm, queries, Spec("ig", rule="converged", tolerance=1e-6))
    assert not found.converged.any() and (found.evaluations <= 5).all()
    assert attribute_encoded(lm, queries, Spec("ig")).converged is None


@pytest.mark.parametrize("family", ["gpt2", "llama3", "olmo2"])
def test_the_converged_rule_does_not_chase_what_bfloat16_rounds(family):
    """A probability is off by a per cent there, in an interval however small."""
    rounded, exact = tiny_model(family, torch.bfloat16, scale=2), tiny_model(family)
    exact.load_state_dict(rounded.state_dict())
    found, wanted = (
        attribute_encoded(
            LanguageModel(model, word_tokenizer(), family),
            some_queries(exact),
            Spec("ig", rule="converged"),
        )
        for model in (rounded, exact)
    )
    assert found.converged.all()
    assert (found.evaluations <= 2 * wanted.evaluations).all()


@pytest.mark.parametrize(
    "family, eps",
    [
        ("gemma2", True),
        ("gemma3", True),
        ("olmo2", True),
        ("llama3", False),
        ("gpt2", False),
        ("phi", False),
    ],
)
def test_a_norm_after_the_mlp_is_found(family, eps):
    lm = tiny_lm(family)
    found = set(lm.arch.norm_epsilons)
    assert found == ({lm.model.config.rms_norm_eps} if eps else {None})


def test_a_converged_sum_of_scores_is_the_difference_of_the_probabilities(smooth):
    lm, query, differences = smooth
    scores = attribute_encoded(lm, [query], Spec("ig", 40, "gauss")).scores[0]
    assert scores.sum(1).tolist() == pytest.approx(differences["ig"].tolist(), rel=1e-9)


def test_the_printed_factor_of_eq_17_is_not_complete(smooth):
    lm, query, differences = smooth
    gap = attribute_encoded(
        lm, [query], Spec("amig", 40, "gauss", amig_factor="w")
    ).completeness_gap
    assert gap.max() > 0.01 * differences["amig"].abs().max()


def test_sig_has_norm_1_and_amig_a_sum_of_1_or_minus_1(smooth):
    lm = smooth[0]
    queries = some_queries(lm.model)
    sig, amig = (
        attribute_encoded(lm, queries, Spec(method, 4)).scores for method in ("sig", "amig")
    )
    assert sig.flatten(1).norm(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-12)
    assert amig.sum((1, 2)).abs().tolist() == pytest.approx([1] * 3, abs=1e-9)


# --- probability and knowledge --------------------------------------------------------------------
def test_a_query_is_known_when_greedy_decoding_gives_the_whole_answer():
    lm, prompt = tiny_lm("llama3"), [9, 40, 7]
    greedy, probability = [], 1.0
    for _ in range(3):
        with torch.no_grad():
            p = torch.softmax(lm.model(torch.tensor([prompt + greedy])).logits[0, -1], -1)
        greedy, probability = greedy + [int(p.argmax())], probability * float(p.max())
    wrong = greedy[:2] + [(greedy[2] + 1) % 97]
    result = attribute_encoded(lm, [(prompt, greedy), (prompt, wrong)], Spec(steps=2))
    assert result.known.tolist() == [True, False]
    assert float(result.probability[0]) == pytest.approx(probability, rel=1e-12)
    assert 0 < result.probability[1] < result.probability[0]
    first = attribute_encoded(lm, [(prompt, wrong)], Spec(steps=2, answer="first"))
    assert first.known.tolist() == [
        False
    ]  # the whole answer counts, whichever tokens are attributed
    assert float(first.probability[0]) == pytest.approx(float(result.probability[1]), rel=1e-12)


# --- batches and memory ---------------------------------------------------------------------------
def mixed_queries():
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(4, 97, (n,), generator=generator).tolist()  # noqa: E731
    return [
        (draw(length), draw(tokens))
        for length, tokens in ((5, 1), (3, 2), (5, 3), (8, 1), (3, 1), (4, 1), (5, 1), (2, 1))
    ]


def relative(a, b):
    return float(((a - b).abs().flatten(1).amax(1) / b.abs().flatten(1).amax(1)).max())


@pytest.mark.parametrize(
    "family, method, rule",
    [
        *(("llama3", method, "right") for method in METHODS),
        *((family, "ig", "converged") for family in FAMILIES),  # lengths that share a batch
        ("gemma3", "sig", "converged"),
        ("mistral", "amig", "converged"),
        ("bloom", "sig", "right"),
        ("mistral", "ig", "left"),
        ("opt", "amig", "endpoints"),
    ],
)
def test_a_batch_of_mixed_lengths_equals_one_query_at_a_time(family, method, rule):
    lm, queries, spec = tiny_lm(family), mixed_queries(), Spec(method, 3, rule)
    with keeping_float64() if family in ROUNDED else nullcontext():
        together = attribute_encoded(lm, queries, spec)
        alone = [attribute_encoded(lm, [query], spec) for query in queries]
    assert relative(together.scores, torch.cat([one.scores for one in alone])) <= 1e-12
    assert (
        relative(together.completeness_gap, torch.cat([one.completeness_gap for one in alone]))
        <= 1e-9
    )
    for name in ("probability", "known"):
        torch.testing.assert_close(
            getattr(together, name),
            torch.cat([getattr(one, name) for one in alone]),
            rtol=1e-12,
            atol=0,
        )


@pytest.mark.parametrize(
    "family, method, rule",
    [
        ("llama3", "ig", "right"),
        ("llama3", "sig", "endpoints"),
        ("llama3", "amig", "gauss"),
        ("llama3", "sig", "converged"),
        ("gptj", "ig", "right"),
        ("gptj", "sig", "midpoint"),
    ],
)
def test_scores_do_not_depend_on_the_row_budget(family, method, rule):
    lm, queries = tiny_lm(family), mixed_queries()[:3]
    with keeping_float64() if family in ROUNDED else nullcontext():
        wanted, calls = attribute_encoded(lm, queries, Spec(method, 4, rule)), []
        for budget in (1, 30, 200):
            with watched_rows(lm) as seen:
                found = attribute_encoded(lm, queries, Spec(method, 4, rule, row_budget=budget))
            assert relative(found.scores, wanted.scores) <= 1e-12
            assert found.row_budget == budget
            calls.append(seen["calls"])
    assert calls[0] > calls[1] >= calls[2], f"the budget changes nothing: {calls}"


@pytest.mark.parametrize("method", METHODS)
def test_the_rows_in_flight_are_bounded_by_the_budget_and_not_by_the_number_of_queries(method):
    lm, budget = tiny_lm("llama3"), 60
    peaks, calls = [], []
    for count in (8, 40):
        with watched_rows(lm) as seen:
            attribute_encoded(
                lm,
                [([5, 6, 7, 8 + i % 50], [9]) for i in range(count)],
                Spec(method, 5, row_budget=budget),
            )
        peaks.append(seen["most"])
        calls.append(seen["calls"])
    assert peaks[0] == peaks[1] <= budget + 1  # and the clean row
    assert peaks[1] > budget / 2, "a budget that is hardly used makes no batches"
    assert calls[1] > 3 * calls[0]


@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_halves_the_budget_and_gives_the_same_scores(method):
    lm, queries = tiny_lm("llama3"), 4 * mixed_queries()[:3]
    with watched_rows(lm) as seen:
        wanted = attribute_encoded(lm, queries, Spec(method, 4, row_budget=400))
    assert wanted.row_budget == 400 and seen["most"] > 40
    with watched_rows(lm, limit=40):
        found = attribute_encoded(lm, queries, Spec(method, 4, row_budget=400))
    assert found.row_budget in (25, 50, 100, 200)
    assert relative(found.scores, wanted.scores) <= 1e-12


def test_out_of_memory_for_the_smallest_batch_and_other_errors_come_through():
    lm = tiny_lm("gpt2")
    with watched_rows(lm, limit=0), pytest.raises(torch.OutOfMemoryError):
        attribute_encoded(lm, [([5, 6, 7], [8])], Spec(steps=4))
    with hooked(
        lm.downs[1].register_forward_pre_hook(
            trusted(lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
        )
    ):
        with pytest.raises(RuntimeError, match="a bug"):
            attribute_encoded(lm, [([5, 6, 7], [8])], Spec(steps=4))


# --- what others did to the model since it was loaded ---------------------------------------------
def doubled(_, __, output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


@pytest.mark.parametrize("place", ["layer", "head", "every module"])
def test_hooks_of_others_are_refused_and_gone_with_them(place):
    lm, query = tiny_lm("gpt2"), ([5, 6, 7, 8], [9])
    plain = attribute_encoded(lm, [query], Spec(steps=4)).scores
    module = {"layer": lm.layers[1], "head": lm.model.lm_head}.get(place)
    register = (
        nn.modules.module.register_module_forward_hook
        if module is None
        else module.register_forward_hook
    )
    with hooked(register(doubled)):
        for call in (
            lambda: attribute_encoded(lm, [query], Spec(steps=4)),
            lambda: score_queries(lm, [query]),
            lambda: column_scores(lm, [query[0]]),
            lambda: run_rows(lm, [Row(*query)]),
        ):
            with pytest.raises(
                ValueError, match="tiny-gpt2 has a forward hook of other code.*remove it"
            ):
                call()
    assert torch.equal(attribute_encoded(lm, [query], Spec(steps=4)).scores, plain)


def test_a_forward_that_was_replaced_since_loading_is_refused(monkeypatch):
    lm, query = tiny_lm("gpt2"), ([5, 6, 7, 8], [9])
    own = lm.layers[0].forward
    monkeypatch.setattr(
        lm.layers[0], "forward", lambda *args, **kwargs: doubled(None, None, own(*args, **kwargs))
    )
    with pytest.raises(ValueError, match="tiny-gpt2: modules .*a forward method was replaced"):
        attribute_encoded(lm, [query], Spec(steps=4))
    before = LanguageModel(lm.model, lm.tokenizer, "wrapped")  # a loader's own is the model's
    assert torch.isfinite(attribute_encoded(before, [query], Spec(steps=4)).scores).all()


def test_a_part_in_training_mode_is_refused():
    lm = tiny_lm("gpt2")
    lm.model.transformer.train()
    with pytest.raises(ValueError, match="tiny-gpt2 is in training mode"):
        attribute_encoded(lm, [([5, 6, 7, 8], [9])], Spec(steps=4))


def test_weights_that_take_gradients_keep_none():
    lm, query = tiny_lm("gpt2"), ([5, 6, 7, 8], [9])
    plain = attribute_encoded(lm, [query], Spec(steps=4)).scores
    lm.model.requires_grad_(True)
    try:
        assert torch.equal(attribute_encoded(lm, [query], Spec(steps=4)).scores, plain)
        assert all(parameter.grad is None for parameter in lm.model.parameters())
    finally:
        lm.model.requires_grad_(False)


def test_a_second_thread_that_computes_with_a_model_is_refused():
    lm, spec = tiny_lm("llama3"), Spec(steps=4)
    with computing(lm), ThreadPoolExecutor(1) as pool:
        other = pool.submit(attribute_encoded, lm, [([5, 6, 7, 8], [9])], spec)
        with pytest.raises(ValueError, match="tiny-llama3 is in use by another thread"):
            other.result()


# --- bfloat16 -------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_bfloat16_is_close_to_float64_of_the_same_weights(family, method):
    """bfloat16 keeps 8 bits (0.4 %): three layers of it may lose 10 % of the largest score, and 3 %
    of a probability. Scores are compared up to a query's scale: amig divides by a sum in which most
    of the digits cancel."""
    tokenizer, queries = word_tokenizer(), some_queries(tiny_model(family, scale=2))
    rounded, exact = tiny_model(family, torch.bfloat16, scale=2), tiny_model(family)
    exact.load_state_dict(rounded.state_dict())
    found = attribute_encoded(LanguageModel(rounded, tokenizer, family), queries, Spec(method, 8))
    wanted = attribute_encoded(LanguageModel(exact, tokenizer, family), queries, Spec(method, 8))
    assert found.scores.dtype == torch.float32 and bool(torch.isfinite(found.scores).all())
    scores, exact = (
        one.scores.double() / one.scores.double().flatten(1).norm(dim=1)[:, None, None]
        for one in (found, wanted)
    )
    assert relative(scores, exact) < 0.1
    assert found.probability.tolist() == pytest.approx(wanted.probability.tolist(), rel=0.03)


def test_in_bfloat16_points_of_a_path_are_rounded_once():
    """Not their places, too, nor how far it is from one end to the other."""
    lm = tiny_lm("llama3", torch.bfloat16)
    clean = clean_pass(lm, torch.tensor([[5, 6, 7, 8]]))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(1, 1, 3, lm.num_neurons, generator=generator).bfloat16()
    paths = Paths.of(lm, clean, starts, Spec())
    begin, end = paths.begin[0], paths.end[0]
    node = torch.linspace(0, 1, 40, dtype=torch.float64)
    found = paths.rows(0, torch.zeros(1, 40, dtype=torch.long), node[None])[0].double()
    wanted = begin.double()[0] + node[:, None] * (end.double() - begin.double())[0]
    unit = 2.0 ** (wanted.abs().log2().floor() - 7)  # of the last of 8 bits
    assert ((found - wanted).abs() <= 0.501 * unit + 1e-6).all()
    path = torch.zeros(3, 1, dtype=torch.long)
    change = (end.double() - begin.double())[0, 0]
    rise = paths.rise(path.expand(3, len(change)), torch.eye(len(change)))
    torch.testing.assert_close(rise.double(), change, rtol=1e-6, atol=0)
    both = (begin, end), (begin.double(), end.double())
    places = [Coordinate.of_norm(*ends, 1e-6) for ends in both]
    torch.testing.assert_close(places[0], places[1], rtol=1e-12, atol=0)


# (family, scale, weak, layout, changes) whose wrong replay was within what a check in bfloat16 can
# see of a probability. At these scales what bfloat16 rounds by itself stays below the bounds;
# `weak` scales what Gemma 4's layers take from their own inputs.
VARIANTS = [
    ("granite-swa", 1.5, 1, None, {}),
    ("gemma4", 1, 1, "sequence", {}),
    ("gemma4", 1, 0.1, "batch", {}),
    ("granite", 2, 1, "sequence", {"residual_multiplier": 0.95}),
    ("granite", 2, 1, "sequence", {"residual_multiplier": 1.05}),
]
VARIANTS = [variant for variant in VARIANTS if variant[0] in FAMILIES]


BOUNDS = [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.1)]


def variant_model(family, dtype, scale=1, weak=1, **changes):
    model = tiny_model(family, dtype, scale=scale, **changes)
    for name, parameter in model.named_parameters():
        if "post_per_layer_input_norm" in name:
            parameter.data.mul_(weak)
        if name.endswith("sinks"):
            parameter.data.zero_()  # as before training; the softmax still has a column more
    return model


@pytest.mark.parametrize("dtype, most", BOUNDS)
@pytest.mark.parametrize("family, scale, weak, layout, changes", VARIANTS)
def test_what_low_precision_could_hide_is_right_in_every_dtype(
    family, scale, weak, layout, changes, dtype, most
):
    """Against the naive reference in float64 with the same, rounded, weights, and against one query
    at a time; queries of one batch have different tokens."""
    model = variant_model(family, dtype, scale, weak, **changes)
    exact = copy.deepcopy(model).double()
    lm = LanguageModel(model, word_tokenizer(), f"tiny-{family}")
    lm.layout = layout or lm.layout
    queries, (nodes, along) = some_queries(exact), quadrature("right", 4)
    naive = Naive(exact, family)
    with keeping_float64() if family in ROUNDED else nullcontext():
        wanted = torch.stack([naive.attribute(*query, "ig", nodes, along)[0] for query in queries])
        found = attribute_encoded(lm, queries, Spec("ig", 4)).scores
        alone = [attribute_encoded(lm, [query], Spec("ig", 4)).scores for query in queries]
    assert relative(found.double(), wanted) <= most
    assert relative(found, torch.cat(alone)) <= most


@pytest.mark.parametrize("dtype, most", BOUNDS)
@pytest.mark.skipif("gemma4" not in FAMILIES, reason="transformers has no Gemma 4")
def test_rows_of_scaled_neurons_get_their_own_querys_arguments(dtype, most):
    """Log-probabilities of many rows a query: in a batch, one by one, and with hooks on the whole
    sequence."""
    lm = LanguageModel(variant_model("gemma4", dtype), word_tokenizer(), "tiny-gemma4")
    queries = [([5, 6, 7, 8], [9]), ([15, 6, 30, 41], [9]), ([61, 5, 18, 20], [12])]
    changes = [
        Change(lm, [(layer, 3), (layer, 4)], factor) for layer in range(3) for factor in (0.0, 3.0)
    ]
    rows = [(query, change) for change in changes for query in (2, 0, 1, 2)]
    together = score_rows(lm, queries, rows).log_probability
    for (query, change), found in zip(rows, together):
        prompt, answer = queries[query]
        alone = score_rows(lm, [queries[query]], [(0, change)]).log_probability[0]
        assert abs(alone - found) <= most

        def scale(_, inputs, neurons=change.by_layer, factor=change.factor):
            x = inputs[0].clone()
            x[:, -1, [3, 4]] *= factor
            return (x,)

        [layer] = change.by_layer
        with torch.no_grad(), hooked(lm.downs[layer].register_forward_pre_hook(scale)):
            logits = lm.model(torch.tensor([prompt])).logits[0, -1].double()
        assert abs(torch.log_softmax(logits, -1)[answer[0]] - found) <= most


@pytest.mark.parametrize("attend", [prefix_attention, exact_attention])
@pytest.mark.parametrize("name", ["s_aux", "position_bias", "indices"])
def test_an_argument_that_an_attention_would_leave_out_is_refused(attend, name):
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"the attention of Identity takes '{name}' into account"):
        attend(nn.Identity(), query, query, query, None, **{name: torch.zeros(2)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.skipif("granite-swa" not in FAMILIES, reason="transformers has no such Granite")
def test_synapses_of_a_model_with_attention_sinks_are_refused(dtype):
    lm = LanguageModel(variant_model("granite-swa", dtype), word_tokenizer(), "with-sinks")
    with pytest.raises(ValueError, match="with-sinks.*takes 's_aux' into account"):
        column_scores(lm, [[5, 6, 7]])


# --- the model afterwards -------------------------------------------------------------------------
def state(lm):
    """All that an attribution could leave changed: bits, hooks, gradients, the attention that
    runs."""
    hooks = [
        (name, kind, len(getattr(module, kind)))
        for name, module in lm.model.named_modules()
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    ]
    attention = [
        module.config._attn_implementation
        for module in lm.model.modules()
        if hasattr(module, "config")
    ]
    grads = [(parameter.requires_grad, parameter.grad) for parameter in lm.model.parameters()]
    tensors = {name: value.clone() for name, value in lm.model.state_dict().items()}
    return tensors, (hooks, attention, grads, lm.model.training, torch.is_grad_enabled())


def assert_unchanged(lm, before):
    now = state(lm)
    assert all(torch.equal(now[0][name], value) for name, value in before[0].items())
    assert now[1] == before[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma2", "bloom"])
def test_the_model_is_the_same_afterwards_also_after_an_exception(family, method):
    lm, queries = tiny_lm(family), mixed_queries()
    before, ids = state(lm), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = lm.model(ids).logits
    attribute_encoded(lm, queries, Spec(method, 3))
    assert_unchanged(lm, before)
    calls = len(lm.layers[1]._forward_pre_hooks)
    for stop_at in (1, 3, 5, 6):  # in the prefix, in a baseline or the clean pass, while rows grow
        seen = []

        def fail(*_, stop_at=stop_at, seen=seen):
            seen.append(1)
            if len(seen) == stop_at:
                raise KeyboardInterrupt

        with (
            hooked(lm.layers[1].register_forward_pre_hook(trusted(fail))),
            pytest.raises(KeyboardInterrupt),
        ):
            attribute_encoded(lm, queries, Spec(method, 3))
        assert len(lm.layers[1]._forward_pre_hooks) == calls
        assert_unchanged(lm, before)
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, logits)


def test_gradients_are_taken_even_where_the_caller_switched_them_off():
    lm, query = tiny_lm("gpt2"), ([5, 6, 7], [8])
    wanted = attribute_encoded(lm, [query], Spec(steps=3)).scores
    with torch.no_grad():
        assert torch.equal(attribute_encoded(lm, [query], Spec(steps=3)).scores, wanted)


def test_scores_are_the_same_in_inference_mode():
    lm, query = tiny_lm("gpt2"), ([5, 6, 7], [8])
    wanted = attribute_encoded(lm, [query], Spec(steps=3)).scores
    with torch.inference_mode():
        found = attribute_encoded(lm, [query], Spec(steps=3)).scores
    assert torch.equal(found, wanted) and not found.is_inference()


def test_the_same_call_gives_the_same_bits():
    lm = tiny_lm("llama3", torch.float32)
    first, second = (attribute_encoded(lm, mixed_queries(), Spec("sig", 3)) for _ in range(2))
    assert torch.equal(first.scores, second.scores) and torch.equal(
        first.completeness_gap, second.completeness_gap
    )


# --- refusals -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def gpt2():
    return tiny_lm("gpt2")


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(method="gradient"), "method 'gradient'.*ig, sig, amig"),
        (dict(rule="simpson"), "rule 'simpson'.*midpoint"),
        (dict(answer="last"), "answer 'last'.*all, first"),
        (dict(site="residual"), "site 'residual'.*down_input"),
        (dict(amig_factor="b"), "amig_factor 'b'.*w-b"),
        (dict(steps=1), "steps is 1.*at least 2"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=2.5), "steps is 2.5"),
        (dict(steps=True), "steps is True"),
        (dict(row_budget=0), "row_budget is 0"),
    ],
)
def test_a_parameter_that_is_no_good_is_named_with_what_would_be(gpt2, options, named):
    with pytest.raises(ValueError, match=named):
        attribute(gpt2, ["5 6 7"], ["8"], **options)


@pytest.mark.parametrize(
    "prompts, answers, named",
    [
        (["5 6", ""], ["7", "8"], "prompt is empty"),
        (["5 6", "   "], ["7", "8"], "prompt is empty"),
        (["5"], ["6"], "prompt '5' is a single token"),
        (["5 6"], [""], "answer to '5 6' is ''"),
        (["5 6"], ["  "], "answer to '5 6' is '  '"),
        (["5 6"], [None], "answer to '5 6' is None"),
        ([None], ["6"], "prompt must be text.*None"),
        ([7], ["6"], "prompt must be text.*int: 7"),
        (["5 6", "7 8"], ["9"], "2 prompts but 1 answers"),
        ("5 6", ["7"], "list of texts.*single text"),
        (["5 6"], "7", "list of texts.*single text"),
        ([" ".join(["5"] * 65)], ["7"], "65 tokens.*at most 64"),
        ([" ".join(["5"] * 64)], ["7"], "with its answer has 65 tokens.*64"),
    ],
)
def test_a_prompt_or_answer_that_is_no_good_is_named(gpt2, prompts, answers, named):
    with pytest.raises(ValueError, match=named):
        attribute(gpt2, prompts, answers)


def test_float16_is_refused():
    lm = LanguageModel(tiny_model("gpt2", torch.float16), word_tokenizer(), "half")
    with pytest.raises(ValueError, match="float16.*bfloat16 or float32"):
        attribute(lm, ["5 6"], ["7"])


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_scores_name_the_query_they_belong_to(method):
    lm = tiny_lm("gpt2")
    lm.model.get_submodule("transformer.wte").weight.data[77] = float("nan")
    lm.model.lm_head.weight = nn.Parameter(
        torch.randn(97, 32, dtype=torch.float64), requires_grad=False
    )
    with pytest.raises(ValueError, match="'5 77 6' are not finite.*tiny-gpt2.*float64"):
        attribute(lm, ["5 6 7", "5 77 6"], ["8", "8"], method=method)


def test_a_baseline_needs_a_token_to_stand_in():
    lm = tiny_lm("gpt2")
    lm.tokenizer = word_tokenizer()
    lm.tokenizer.eos_token = None
    for method in ("sig", "amig"):
        with pytest.raises(ValueError, match=f"tiny-gpt2.*{method}.*EOS"):
            attribute(lm, ["5 6"], ["7"], method=method)
    attribute(lm, ["5 6"], ["7"], method="ig", steps=2)


def test_sig_prefers_the_mask_token_then_pad_then_eos(gpt2):
    lm = tiny_lm("gpt2")
    scores = {}
    for name, special in (
        ("eos", {}),
        ("pad", dict(pad_token="40")),
        ("mask", dict(pad_token="40", mask_token="41")),
    ):
        lm.tokenizer = word_tokenizer(**special)
        scores[name] = attribute(lm, ["5 6 7"], ["8"], method="sig", steps=3).scores
    for name, token in (("pad", 40), ("mask", 41)):
        naive = Naive(tiny_model("gpt2"), "gpt2")
        naive.baselines = lambda prompt, gold, _, token=token: [
            naive.vectors(prompt[:i] + [token] + prompt[i + 1 :] + gold) for i in range(len(prompt))
        ]
        wanted, _ = naive.attribute([5, 6, 7], [8], "sig", *quadrature("right", 3))
        assert relative(scores[name], wanted[None]) <= 1e-9
    assert relative(scores["pad"], scores["eos"]) > 1e-3


def test_the_answers_of_attribute_are_those_of_its_tokens(gpt2):
    """Text in, the same scores as ids in; arrays may be tuples or other iterables."""
    by_text = attribute(gpt2, ("5 6 7", "5 6 7 8"), iter(["9 10", "11"]), steps=3)
    by_ids = attribute_encoded(gpt2, [([5, 6, 7], [9, 10]), ([5, 6, 7, 8], [11])], Spec(steps=3))
    assert torch.equal(by_text.scores, by_ids.scores)
    assert np.asarray(by_text.scores).shape == (2, 3, 128)


def test_baselines_of_tokens_that_the_model_does_not_embed_are_refused(gpt2):
    """Some checkpoints name an EOS token that their embeddings were never extended for."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    lm = LanguageModel(gpt2.model, tokenizer, "short")
    assert tokenizer.eos_token_id == 97
    for method, said in (
        ("amig", "short: amig replaces .* has none that the model embeds"),
        ("sig", "short: sig needs a mask, .* has none that the model embeds"),
    ):
        with pytest.raises(ValueError, match=said):
            attribute(lm, ["10 11 12"], ["13"], method=method)
