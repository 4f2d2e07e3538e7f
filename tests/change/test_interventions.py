"""Scaled neurons and scored answers against forward passes changed by hand, one row at a time."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from families import SUPPORTED, TOWERS, lm_of, precise
from naive import plain_score, scaled_by_hand
from tiny import tiny_lm

from qlutils import answer_probability, attribute, scale_neurons
from qlutils.change import rows
from qlutils.change.rows import Change, score_queries, score_rows
from qlutils.change.scaling import greedy_answers
from qlutils.model import answer as model_answer
from qlutils.model.architecture import UnsupportedModel

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
    queries = [tuple(rng.integers(4, 97, count).tolist() for count in both) for both in lengths]
    sizes = lm.num_layers, lm.num_neurons
    sets = [set(map(tuple, rng.integers(0, sizes, (6, 2)).tolist())) for _ in range(3)]
    return queries, [*sets, {(lm.num_layers - 1, 3)}, set()]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("family", SUPPORTED)
def test_rows_of_a_batch_equal_forward_passes_changed_by_hand(family, everywhere):
    dtype, tolerance = precise(family)
    lm, moved = lm_of(family, dtype), 0
    queries, sets = queries_and_sets(lm)
    cases = list(zip(sets[1:], (0.0, 2.0, 0.0, 0.0)))
    plan = [(q, Change(lm, *case)) for case in cases for q in range(len(queries))]
    found = score_rows(lm, queries, plan, everywhere=everywhere)
    for row, (q, change) in enumerate(plan):
        prompt, target = queries[q]
        first, own = 0 if everywhere else len(prompt) - 1, plain_score(lm, prompt, target)
        spec = SUPPORTED[family]
        with scaled_by_hand(lm.model, spec, change.neurons, change.factor, first):
            expected, greedy = plain_score(lm, prompt, target)
        assert found.log_probability[row] == pytest.approx(expected, rel=tolerance)
        assert (found.greedy[row], found.exact[row]) == (greedy, greedy == target)
        assert found.match[row] == np.mean(np.array(greedy) == target)
        moved += abs(expected - own[0]) > 10 * tolerance * abs(expected)
        if not everywhere and q == 0:
            with scale_neurons(lm, change.neurons, change.factor):
                inside, _ = plain_score(lm, prompt, target)
            assert inside == pytest.approx(expected, rel=tolerance)
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


PROMPTS = ["10 11 12", "20 21", "30 31 32 33", "10 11 12"]
ANSWERS = ["13 14 15", "22", "34 35", "13"]


@pytest.mark.parametrize("scalings", [(), ((NEURONS, 2.0), ({(1, 7), (2, 5)}, 3.0))])
@pytest.mark.parametrize("family", ["gpt2", "llama2", "llama3", "neox", "gemma3", "opt"])
def test_answers_are_those_of_the_model_or_of_the_one_that_nested_contexts_make(family, scalings):
    """The product of the softmax of each token."""
    lm = tiny_lm(family, bos=family == "llama2")
    with ExitStack() as inside:
        for scaling in scalings:
            inside.enter_context(scale_neurons(lm, *scaling))
        found = answer_probability(lm, PROMPTS, ANSWERS)
        first = answer_probability(lm, PROMPTS, ANSWERS, answer="first")
    assert found.dtype == torch.float32 and found.shape == (4,) and found.device.type == "cpu"
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        ids, target = lm.encode(prompt, answer)
        assert ids[0] == (1 if family == "llama2" else int(prompt.split()[0]))
        with ExitStack() as inside:
            for scaling in scalings:
                inside.enter_context(scaled_by_hand(lm.model, family, *scaling, len(ids) - 1))
            for p, scored in ((found[i], target), (first[i], target[:1])):
                expected = np.exp(plain_score(lm, ids, scored)[0])
                assert float(p) == pytest.approx(expected, rel=1e-6)


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
@pytest.mark.parametrize("family", ["gpt2", "llama3", "neox", "opt", "mistral", "gemma3", *TOWERS])
@torch.no_grad()
def test_a_bare_forward_is_scaled_at_each_row_s_last_token(family):
    lm = lm_of(family, torch.float64)
    prompts = [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33]]
    ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask = (ids > 0).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with scale_neurons(lm, NEURONS, 3.0):
        logits = lm.model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    for row, prompt in enumerate(prompts):
        with scaled_by_hand(lm.model, SUPPORTED[family], NEURONS, 3.0, len(prompt) - 1):
            expected = forward(lm, prompt)
        torch.testing.assert_close(logits[row, -len(prompt) :], expected, rtol=1e-7, atol=1e-7)
    ends = torch.stack([forward(lm, prompt)[-1] for prompt in prompts])
    assert (logits[:, -1] - ends).abs().max() > 1e-3


@pytest.mark.parametrize(
    "mask, said",
    [
        (torch.tensor([[1, 1, 1], [1, 1, 0]]), "pad on the left"),
        (torch.zeros(2, 1, 3, 3), "give a 2-D attention_mask"),
    ],
)
def test_a_mask_that_hides_where_the_prompt_ends_is_refused(mask, said):
    lm, ids = tiny_lm("gpt2"), torch.tensor([[10, 11, 12], [20, 21, 0]])
    for call in ("__call__", "generate"):
        with scale_neurons(lm, NEURONS, 3.0), pytest.raises(ValueError, match=said):
            getattr(lm.model, call)(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama2", "neox", "opt", "bloom", *TOWERS])
def test_generation_is_scaled_at_the_last_prompt_token_and_all_later_ones(family, cache):
    lm, prompt = lm_of(family, torch.float64), [10, 11, 12, 13]
    ids = torch.tensor([prompt])
    options = GREEDY | dict(max_new_tokens=6, use_cache=cache, return_dict_in_generate=True)
    options |= dict(attention_mask=torch.ones_like(ids), output_logits=True)
    with scale_neurons(lm, NEURONS, 4.0):
        out = lm.model.generate(ids, **options)
    tokens = list(prompt)
    for logits in out.logits:
        with scaled_by_hand(lm.model, SUPPORTED[family], NEURONS, 4.0, len(prompt) - 1):
            expected = forward(lm, tokens)[-1]
        torch.testing.assert_close(logits[0].double(), expected, rtol=1e-5, atol=1e-5)
        tokens.append(int(expected.argmax()))
    assert out.sequences[0].tolist() == tokens


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # transformers takes the old name
@pytest.mark.parametrize("family", ["llama3", *TOWERS])
def test_a_call_that_continues_a_cache_is_later_throughout(family, name):
    lm, prompt, later = lm_of(family, torch.float64), [10, 11, 12, 13], [14, 15, 16]
    with scale_neurons(lm, NEURONS, 4.0):
        first = lm.model(input_ids=torch.tensor([prompt]), use_cache=True)
        second = lm.model(input_ids=torch.tensor([later]), **{name: first["cache"]})
    with scaled_by_hand(lm.model, SUPPORTED[family], NEURONS, 4.0, len(prompt) - 1):
        expected = forward(lm, prompt + later)
    torch.testing.assert_close(second.logits[0], expected[-3:])


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
