"""Scaled neurons and scored answers against forward passes changed by hand, one row at a time."""

from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_lm

from qlutils import answer_probability, attribute, scale_neurons
from qlutils.change import rows
from qlutils.change.rows import Change, score_queries, score_rows
from qlutils.change.scaling import greedy_answers, scaled_answer_probabilities
from qlutils.model import answer as model_answer
from qlutils.model.architecture import UnsupportedModel

# Families whose attention rounds to float32 whatever the model's dtype, and then not always the
# same sums.
ROUNDED = ("gptj", "codegen", "gpt-neo", "bloom", "gemma2", "granite-swa", "gemma4")


pytestmark = pytest.mark.usefixtures("one_thread")


def tolerance(family):
    return 1e-5 if family in ROUNDED else 1e-10


@contextmanager
def by_hand(lm, family, neurons, factor, first):
    """Multiply the neurons at the down-projection's input, from token `first` on; one row, no
    padding."""
    with ExitStack() as stack:
        for layer, index in neurons:

            def scale(_, inputs, index=index):
                x = inputs[0].clone().reshape(-1, inputs[0].shape[-1])
                x[first:, index] *= factor
                return (x.reshape(inputs[0].shape),)

            down = FAMILIES[family].modules(lm.model, "down")[layer]
            stack.callback(down.register_forward_pre_hook(scale).remove)
        yield


@torch.no_grad()
def plain_score(lm, prompt, target):
    logits = lm.model(input_ids=torch.tensor([[*prompt, *target[:-1]]]), use_cache=False).logits[
        0, len(prompt) - 1 :
    ]
    log_p = torch.log_softmax(logits, -1)
    return float(log_p.gather(1, torch.tensor(target)[:, None]).sum()), log_p.argmax(-1).tolist()


def queries_and_sets(lm, seed=0):
    rng = np.random.default_rng(seed)
    # lengths repeat, so that batches form; four queries of four tokens, where a batch is as long as
    # its rows
    queries = [
        (rng.integers(4, 97, p).tolist(), rng.integers(4, 97, a).tolist())
        for p, a in [(4, 1), (4, 1), (4, 1), (4, 1), (3, 3), (5, 2), (5, 2), (7, 1)]
    ]
    sets = [
        {(int(rng.integers(lm.num_layers)), int(rng.integers(lm.num_neurons))) for _ in range(6)}
        for _ in range(3)
    ]
    return queries, [*sets, {(lm.num_layers - 1, 3)}, set()]


@pytest.mark.parametrize(
    "everywhere", [False, True], ids=["from the last prompt token", "at every token"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_equal_forward_passes_changed_by_hand(family, everywhere):
    lm = tiny_lm(family)
    queries, sets = queries_and_sets(lm)
    changes = [
        (neurons, factor, Change(lm, neurons, factor))
        for neurons, factor in zip(sets[1:], (0.0, 2.0, 0.0, 0.0))
    ]
    plan = [(q, case) for case in changes for q in range(len(queries))]
    found = score_rows(lm, queries, [(q, case[2]) for q, case in plan], everywhere=everywhere)
    moved = 0
    for row, (q, (neurons, factor, _)) in enumerate(plan):
        prompt, target = queries[q]
        with by_hand(lm, family, neurons, factor, 0 if everywhere else len(prompt) - 1):
            expected, greedy = plain_score(lm, prompt, target)
        assert found.log_probability[row] == pytest.approx(expected, rel=tolerance(family))
        assert found.greedy[row] == greedy
        assert found.exact[row] == (greedy == target)
        assert found.match[row] == np.mean(np.array(greedy) == target)
        moved += abs(expected - plain_score(lm, prompt, target)[0]) > 1e-3
    assert moved >= len(plan) / 3  # the changes are large enough to be missed


def test_a_row_does_not_depend_on_the_other_rows_or_on_the_size_of_a_batch(monkeypatch):
    lm = tiny_lm("llama3")
    queries, sets = queries_and_sets(lm)
    plan = [(q, Change(lm, neurons, 0.0)) for neurons in sets for q in range(len(queries))] + [
        (0, None)
    ]
    for everywhere in (False, True):
        together = score_rows(lm, queries, plan, everywhere=everywhere).log_probability
        alone = [
            score_rows(lm, queries, [row], everywhere=everywhere).log_probability[0] for row in plan
        ]
        with monkeypatch.context() as patch:
            patch.setattr(rows, "token_budget", lambda lm: 9)
            small = score_rows(lm, queries, plan, everywhere=everywhere).log_probability
        np.testing.assert_allclose(together, alone, rtol=1e-12)
        np.testing.assert_allclose(together, small, rtol=1e-12)


def test_the_vocabulary_may_be_read_in_pieces(monkeypatch):
    lm = tiny_lm("gpt2")
    queries, _ = queries_and_sets(lm)
    whole = score_queries(lm, queries)
    monkeypatch.setattr(model_answer, "LOGITS", 200)  # two positions at a time
    np.testing.assert_allclose(
        score_queries(lm, queries).log_probability, whole.log_probability, rtol=1e-13
    )


@pytest.mark.parametrize("family", ["gpt2", "llama2", "neox", "gemma3"])
def test_answer_probability_is_the_product_of_the_softmax_of_each_token(family):
    lm = tiny_lm(family, bos=family == "llama2")
    prompts, answers = (
        ["10 11 12", "20 21", "30 31 32 33", "10 11 12"],
        ["13 14 15", "22", "34 35", "13"],
    )
    found = answer_probability(lm, prompts, answers)
    first = answer_probability(lm, prompts, answers, answer="first")
    assert found.dtype == torch.float32 and found.shape == (4,) and found.device.type == "cpu"
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids, target = lm.encode(prompt, answer)
        assert ids[0] == (1 if family == "llama2" else int(prompt.split()[0]))
        assert float(found[i]) == pytest.approx(np.exp(plain_score(lm, ids, target)[0]), rel=1e-6)
        assert float(first[i]) == pytest.approx(
            np.exp(plain_score(lm, ids, target[:1])[0]), rel=1e-6
        )
        assert float(found[i]) == pytest.approx(
            float(answer_probability(lm, [prompt], [answer])[0]), rel=1e-7
        )
    assert first[0] == first[3] == pytest.approx(float(found[3]))


def test_greedy_answers_are_what_generate_gives():
    lm = tiny_lm("llama3")
    prompts, lengths = [[10, 11, 12], [20, 21], [30, 31, 32], [40, 41, 42, 43]], [3, 1, 2, 4]
    found = greedy_answers(lm, prompts, lengths)
    for prompt, length, tokens in zip(prompts, lengths, found):
        ids = torch.tensor([prompt])
        out = lm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert out[0, len(prompt) :].tolist() == tokens
    # the definition of a known query: teacher-forced exact match is the same as greedy decoding
    exact = score_queries(lm, list(zip(prompts, found))).exact
    assert exact.all()
    assert not score_queries(
        lm, [(p, [(t[0] + 1) % 97, *t[1:]]) for p, t in zip(prompts, found)]
    ).exact.any()


NEURONS = {(0, 3), (1, 7), (1, 9), (2, 0)}


def padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = (ids > 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return dict(input_ids=ids, attention_mask=mask, position_ids=positions)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "neox", "opt", "mistral", "gemma3"])
@torch.no_grad()
def test_a_bare_forward_is_scaled_at_each_row_s_last_token(family):
    lm = tiny_lm(family)
    prompts = [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33]]
    with scale_neurons(lm, NEURONS, 3.0):
        logits = lm.model(**padded(prompts)).logits
    for row, prompt in enumerate(prompts):
        with by_hand(lm, family, NEURONS, 3.0, len(prompt) - 1):
            expected = lm.model(input_ids=torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits[row, -len(prompt) :], expected, rtol=1e-7, atol=1e-7)
    plain = lm.model(input_ids=torch.tensor([prompts[0]])).logits[0]
    torch.testing.assert_close(logits[0, -5:-1], plain[:-1])  # earlier tokens are untouched
    assert (logits[0, -1] - plain[-1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "mask, said",
    [
        (torch.tensor([[1, 1, 1], [1, 1, 0]]), "pad on the left"),
        (torch.zeros(2, 1, 3, 3), "give a 2-D attention_mask"),
    ],
    ids=["right padding", "4-D"],
)
def test_a_mask_that_hides_where_the_prompt_ends_is_refused(mask, said):
    lm, ids = tiny_lm("gpt2"), torch.tensor([[10, 11, 12], [20, 21, 0]])
    with scale_neurons(lm, NEURONS, 3.0), pytest.raises(ValueError, match=said):
        lm.model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("cache", [True, False], ids=["with a cache", "without a cache"])
@pytest.mark.parametrize("family", ["gpt2", "llama2", "neox", "opt", "bloom"])
def test_generation_is_scaled_at_the_last_prompt_token_and_all_later_ones(family, cache):
    lm, prompt = tiny_lm(family), [10, 11, 12, 13]
    ids = torch.tensor([prompt])
    with scale_neurons(lm, NEURONS, 4.0):
        out = lm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            use_cache=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = list(prompt)
    for logits in out.logits:
        with by_hand(lm, family, NEURONS, 4.0, len(prompt) - 1), torch.no_grad():
            expected = lm.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[0].double(), expected, rtol=1e-5, atol=1e-5)
        tokens.append(int(expected.argmax()))
    assert out.sequences[0].tolist() == tokens


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["cache", "past_key_values"]
)  # transformers takes the old one, too
def test_a_call_that_continues_a_cache_is_later_throughout(name):
    lm, prompt, later = tiny_lm("llama3"), [10, 11, 12, 13], [14, 15, 16]
    with scale_neurons(lm, NEURONS, 4.0):
        first = lm.model(input_ids=torch.tensor([prompt]), use_cache=True)
        second = lm.model(input_ids=torch.tensor([later]), **{name: first["cache"]})
    with by_hand(lm, "llama3", NEURONS, 4.0, len(prompt) - 1):
        expected = lm.model(input_ids=torch.tensor([prompt + later])).logits
    torch.testing.assert_close(second.logits, expected[:, -3:])


@pytest.mark.parametrize("family", ["gpt2", "llama3", "opt"])
def test_answers_inside_the_context_are_the_scaled_model_s_and_nesting_composes(family):
    lm = tiny_lm(family)
    prompts, answers = ["10 11 12", "20 21", "30 31 32"], ["13 14 15", "22", "34 35"]
    with scale_neurons(lm, NEURONS, 2.0), scale_neurons(lm, {(1, 7), (2, 5)}, 3.0):
        found = answer_probability(lm, prompts, answers)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids, target = lm.encode(prompt, answer)
        with (
            by_hand(lm, family, NEURONS, 2.0, len(ids) - 1),
            by_hand(lm, family, {(1, 7), (2, 5)}, 3.0, len(ids) - 1),
        ):
            expected = np.exp(plain_score(lm, ids, target)[0])
        assert float(found[i]) == pytest.approx(expected, rel=1e-6)


def test_many_sets_in_a_batch_equal_one_set_at_a_time():
    lm = tiny_lm("gpt2")
    queries, sets = queries_and_sets(lm)
    plan = [
        (prompt, target, neurons, factor)
        for prompt, target in queries
        for neurons in sets
        for factor in (0.0, 2.0)
    ]
    found = scaled_answer_probabilities(lm, plan)
    for value, (prompt, target, neurons, factor) in zip(found, plan):
        with scale_neurons(lm, neurons, factor):
            assert value == pytest.approx(
                np.exp(score_queries(lm, [(prompt, target)]).log_probability[0]), rel=1e-10
            )
    plain = np.exp(score_queries(lm, queries).log_probability)
    np.testing.assert_allclose(
        found.reshape(len(queries), len(sets), 2)[:, -1, 0], plain
    )  # the empty set


@torch.no_grad()
def test_the_model_is_as_before_afterwards_also_after_an_exception():
    lm = tiny_lm("llama3")
    ids = torch.tensor([[10, 11, 12]])
    before = lm.model(input_ids=ids).logits
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), scale_neurons(lm, NEURONS, 0.0), scale_neurons(lm, NEURONS, 5.0):
            raise error("stop")
    with scale_neurons(lm, NEURONS, 0.0):
        assert not torch.equal(lm.model(input_ids=ids).logits, before)
    assert torch.equal(lm.model(input_ids=ids).logits, before)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )
    assert "generate" not in vars(lm.model) and not lm.scales
    with scale_neurons(lm, NEURONS, 1.0):
        assert torch.equal(lm.model(input_ids=ids).logits, before)
    with scale_neurons(lm, set(), 0.0):
        assert torch.equal(lm.model(input_ids=ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_to_float64(dtype):
    exact, rounded = tiny_lm("llama3"), tiny_lm("llama3", dtype)
    queries, sets = queries_and_sets(exact)
    plan = [(*queries[q], sets[0], 0.0) for q in range(len(queries))]
    difference = np.abs(
        np.log(scaled_answer_probabilities(exact, plan))
        - np.log(scaled_answer_probabilities(rounded, plan))
    )
    assert difference.max() < (1e-3 if dtype == torch.float32 else 1.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda lm: scale_neurons(lm, {(9, 0)}, 0).__enter__(), r"neuron \(9, 0\) is outside"),
        (
            lambda lm: scale_neurons(lm, {(0, 4800)}, 0).__enter__(),
            r"neuron \(0, 4800\) is outside",
        ),
        (lambda lm: scale_neurons(lm, NEURONS, float("nan")).__enter__(), "factor is nan"),
        (lambda lm: scale_neurons(lm, NEURONS, "0").__enter__(), "factor is '0'"),
        (lambda lm: answer_probability(lm, "10 11", "12"), "single text"),
        (lambda lm: answer_probability(lm, ["10 11"], ["12", "13"]), "1 prompts but 2 answers"),
        (lambda lm: answer_probability(lm, ["10 11"], [""]), "answer"),
        (lambda lm: answer_probability(lm, ["10 11"], ["12"], answer="last"), "answer 'last'"),
    ],
    ids=["layer", "neuron", "nan", "text factor", "text", "lengths", "empty answer", "answer"],
)
def test_bad_input_is_named(call, message):
    lm = tiny_lm("gpt2")
    with pytest.raises(ValueError, match=message):
        call(lm)
    assert not any(module._forward_pre_hooks for module in lm.model.modules())


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
    lm = tiny_lm("gpt2")
    prompt = " ".join(["10"] * 63)
    assert 0 < float(answer_probability(lm, [prompt], ["11"])[0]) < 1
    with pytest.raises(ValueError, match="64"):
        answer_probability(lm, [prompt], ["11 12"])
