"""Scaled neurons and scored answers against forward passes changed by hand, one row at a time."""

import numpy as np
import pytest
import torch
from naive import plain_score, scaled_by_hand
from tiny import FAMILIES, tiny_lm

from qlutils import answer_probability, attribute, scale_neurons
from qlutils.change import rows
from qlutils.change.rows import Change, score_queries, score_rows
from qlutils.change.scaling import greedy_answers
from qlutils.model import answer as model_answer
from qlutils.model.architecture import UnsupportedModel

# Families whose attention rounds to float32 whatever the model's dtype, and then not always the
# same sums.
ROUNDED = ("gptj", "codegen", "gpt-neo", "bloom", "gemma2", "granite-swa", "gemma4")
NEURONS = {(0, 3), (1, 7), (1, 9), (2, 0)}
GREEDY = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def forward(lm, ids):
    return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def queries_and_sets(lm):
    """Lengths repeat, so that batches form: four queries make a batch as long as its rows."""
    rng = np.random.default_rng(0)
    lengths = [(4, 1), (4, 1), (4, 1), (4, 1), (3, 3), (5, 2), (5, 2), (7, 1)]
    queries = [
        (rng.integers(4, 97, p).tolist(), rng.integers(4, 97, a).tolist()) for p, a in lengths
    ]
    draw = lambda: (int(rng.integers(lm.num_layers)), int(rng.integers(lm.num_neurons)))  # noqa: E731
    sets = [{draw() for _ in range(6)} for _ in range(3)]
    return queries, [*sets, {(lm.num_layers - 1, 3)}, set()]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_equal_forward_passes_changed_by_hand(family, everywhere):
    lm, moved = tiny_lm(family), 0
    queries, sets = queries_and_sets(lm)
    cases = list(zip(sets[1:], (0.0, 2.0, 0.0, 0.0)))
    plan = [(q, Change(lm, *case)) for case in cases for q in range(len(queries))]
    found = score_rows(lm, queries, plan, everywhere=everywhere)
    for row, (q, change) in enumerate(plan):
        prompt, target = queries[q]
        first = 0 if everywhere else len(prompt) - 1
        with scaled_by_hand(lm.model, family, change.neurons, change.factor, first):
            expected, greedy = plain_score(lm, prompt, target)
        tolerance = 1e-5 if family in ROUNDED else 1e-10
        assert found.log_probability[row] == pytest.approx(expected, rel=tolerance)
        assert (found.greedy[row], found.exact[row]) == (greedy, greedy == target)
        assert found.match[row] == np.mean(np.array(greedy) == target)
        moved += abs(expected - plain_score(lm, prompt, target)[0]) > 1e-3
    assert moved >= len(plan) / 3  # the changes are large enough to be missed


def test_a_row_does_not_depend_on_other_rows_or_on_the_size_of_a_batch(monkeypatch):
    lm = tiny_lm("llama3")
    queries, sets = queries_and_sets(lm)
    plan = [(q, Change(lm, neurons, 0.0)) for neurons in sets for q in range(len(queries))]
    plan.append((0, None))
    for everywhere in (False, True):
        score = lambda plan: score_rows(lm, queries, plan, everywhere=everywhere)  # noqa: E731
        together = score(plan).log_probability
        alone = [score([row]).log_probability[0] for row in plan]
        with monkeypatch.context() as patch:
            patch.setattr(rows, "token_budget", lambda lm: 9)
            patch.setattr(model_answer, "LOGITS", 200)  # two positions at a time
            small = score(plan).log_probability
        np.testing.assert_allclose(together, alone, rtol=1e-12)
        np.testing.assert_allclose(together, small, rtol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama2", "neox", "gemma3"])
def test_answer_probability_is_the_product_of_the_softmax_of_each_token(family):
    lm = tiny_lm(family, bos=family == "llama2")
    prompts = ["10 11 12", "20 21", "30 31 32 33", "10 11 12"]
    answers = ["13 14 15", "22", "34 35", "13"]
    found = answer_probability(lm, prompts, answers)
    first = answer_probability(lm, prompts, answers, answer="first")
    assert found.dtype == torch.float32 and found.shape == (4,) and found.device.type == "cpu"
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids, target = lm.encode(prompt, answer)
        assert ids[0] == (1 if family == "llama2" else int(prompt.split()[0]))
        for p, scored in ((found[i], target), (first[i], target[:1])):
            assert float(p) == pytest.approx(np.exp(plain_score(lm, ids, scored)[0]), rel=1e-6)
    assert first[0] == first[3] == pytest.approx(float(found[3]))


def test_greedy_answers_are_what_generate_gives_and_known_queries_match_them():
    lm = tiny_lm("llama3")
    prompts, lengths = [[10, 11, 12], [20, 21], [30, 31, 32], [40, 41, 42, 43]], [3, 1, 2, 4]
    found = greedy_answers(lm, prompts, lengths)
    for prompt, length, tokens in zip(prompts, lengths, found):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = lm.model.generate(ids, attention_mask=mask, max_new_tokens=length, **GREEDY)
        assert out[0, len(prompt) :].tolist() == tokens
    others = [[(tokens[0] + 1) % 97, *tokens[1:]] for tokens in found]
    assert score_queries(lm, list(zip(prompts, found))).exact.all()
    assert not score_queries(lm, list(zip(prompts, others))).exact.any()


# --- scale_neurons --------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["gpt2", "llama3", "neox", "opt", "mistral", "gemma3"])
@torch.no_grad()
def test_a_bare_forward_is_scaled_at_each_row_s_last_token(family):
    lm = tiny_lm(family)
    prompts = [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33]]
    ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask = (ids > 0).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with scale_neurons(lm, NEURONS, 3.0):
        logits = lm.model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    for row, prompt in enumerate(prompts):
        with scaled_by_hand(lm.model, family, NEURONS, 3.0, len(prompt) - 1):
            expected = forward(lm, prompt)
        torch.testing.assert_close(logits[row, -len(prompt) :], expected, rtol=1e-7, atol=1e-7)
    plain = forward(lm, prompts[0])
    torch.testing.assert_close(logits[0, -5:-1], plain[:-1])  # earlier tokens are untouched
    assert (logits[0, -1] - plain[-1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "mask, said",
    [
        (torch.tensor([[1, 1, 1], [1, 1, 0]]), "pad on the left"),
        (torch.zeros(2, 1, 3, 3), "give a 2-D attention_mask"),
    ],
)
def test_a_mask_that_hides_where_the_prompt_ends_is_refused(mask, said):
    lm, ids = tiny_lm("gpt2"), torch.tensor([[10, 11, 12], [20, 21, 0]])
    with scale_neurons(lm, NEURONS, 3.0), pytest.raises(ValueError, match=said):
        lm.model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama2", "neox", "opt", "bloom"])
def test_generation_is_scaled_at_the_last_prompt_token_and_all_later_ones(family, cache):
    lm, prompt = tiny_lm(family), [10, 11, 12, 13]
    ids = torch.tensor([prompt])
    options = GREEDY | dict(max_new_tokens=6, use_cache=cache, return_dict_in_generate=True)
    options |= dict(attention_mask=torch.ones_like(ids), output_logits=True)
    with scale_neurons(lm, NEURONS, 4.0):
        out = lm.model.generate(ids, **options)
    tokens = list(prompt)
    for logits in out.logits:
        with scaled_by_hand(lm.model, family, NEURONS, 4.0, len(prompt) - 1):
            expected = forward(lm, tokens)[-1]
        torch.testing.assert_close(logits[0].double(), expected, rtol=1e-5, atol=1e-5)
        tokens.append(int(expected.argmax()))
    assert out.sequences[0].tolist() == tokens


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # transformers takes the old name
def test_a_call_that_continues_a_cache_is_later_throughout(name):
    lm, prompt, later = tiny_lm("llama3"), [10, 11, 12, 13], [14, 15, 16]
    with scale_neurons(lm, NEURONS, 4.0):
        first = lm.model(input_ids=torch.tensor([prompt]), use_cache=True)
        second = lm.model(input_ids=torch.tensor([later]), **{name: first["cache"]})
    with scaled_by_hand(lm.model, "llama3", NEURONS, 4.0, len(prompt) - 1):
        expected = forward(lm, prompt + later)
    torch.testing.assert_close(second.logits[0], expected[-3:])


@pytest.mark.parametrize("family", ["gpt2", "llama3", "opt"])
def test_answers_inside_the_context_are_the_scaled_model_s_and_nesting_composes(family):
    lm, others = tiny_lm(family), {(1, 7), (2, 5)}
    prompts, answers = ["10 11 12", "20 21", "30 31 32"], ["13 14 15", "22", "34 35"]
    with scale_neurons(lm, NEURONS, 2.0), scale_neurons(lm, others, 3.0):
        found = answer_probability(lm, prompts, answers)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids, target = lm.encode(prompt, answer)
        last = len(ids) - 1
        with (
            scaled_by_hand(lm.model, family, NEURONS, 2.0, last),
            scaled_by_hand(lm.model, family, others, 3.0, last),
        ):
            expected = np.exp(plain_score(lm, ids, target)[0])
        assert float(found[i]) == pytest.approx(expected, rel=1e-6)


def test_a_factor_of_one_and_no_neurons_change_not_one_bit():
    lm, ids = tiny_lm("llama3"), [10, 11, 12]
    before = forward(lm, ids)
    for neurons, factor, same in ((NEURONS, 0.0, False), (NEURONS, 1.0, True), (set(), 0.0, True)):
        with scale_neurons(lm, neurons, factor):
            assert torch.equal(forward(lm, ids), before) == same
        assert torch.equal(forward(lm, ids), before)


def test_attribution_inside_a_scaled_context_is_refused():
    lm = tiny_lm("gpt2")
    with scale_neurons(lm, NEURONS, 0.0), pytest.raises(ValueError, match="outside of it"):
        attribute(lm, ["10 11 12"], ["13"])


def test_a_model_whose_layers_cannot_be_run_on_rows_is_refused_by_name(monkeypatch):
    lm, run = tiny_lm("gpt2"), rows.run_rows
    monkeypatch.setattr(rows, "run_rows", lambda *args: 2 * run(*args))
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="tiny-gpt2"):
            score_queries(lm, [([10, 11], [12])])


def test_a_prompt_may_be_as_long_as_the_context():
    lm, prompt = tiny_lm("gpt2"), " ".join(["10"] * 63)
    assert 0 < float(answer_probability(lm, [prompt], ["11"])[0]) < 1
    with pytest.raises(ValueError, match="64"):
        answer_probability(lm, [prompt], ["11 12"])
