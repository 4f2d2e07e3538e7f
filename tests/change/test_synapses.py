"""Attention that can be watched and changed: against naive attention, transformers' own tensors and
brute force."""

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
)
from transformers.masking_utils import eager_mask

from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.change import synapses
from qlutils.change.synapses import Row, column_scores, find_synapses, run_rows, scale_synapses
from qlutils.experiments.attention_predominance import attend
from qlutils.experiments.knowledge_synapses import (
    scale_synapse_columns,
    scaled_maps,
    synapse_sets,
)
from qlutils.model import attention
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.attention import attention_implementation
from qlutils.model.language_model import LanguageModel

SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
)
GPT = dict(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64)
CONFIGS = {
    "gpt2": GPT2Config(**GPT),
    "neox": GPTNeoXConfig(**SMALL),
    "llama-gqa": LlamaConfig(**SMALL, num_key_value_heads=2),
    "mistral-window": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3),
    "gemma2": Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=3, attn_logit_softcapping=2.0
    ),
    "gptj": GPTJConfig(**GPT, rotary_dim=4),
    "falcon": FalconConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
}
FAMILIES = [name for name in CONFIGS if name != "falcon"]
PROMPT = [3, 17, 8, 25, 40, 9, 31]


class Words:
    """A tokenizer whose words are the token numbers themselves."""

    bos_token_id, eos_token_id, eos_token = None, 0, "<e>"

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [int(word) for word in text.split()]})

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # attention that is not close to uniform
    return LanguageModel(model, Words(), name)


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request):
    return make(request.param)


def logits(lm, ids, **kwargs):
    with torch.no_grad():
        return lm.model(input_ids=torch.as_tensor(ids), **kwargs).logits


def own_attentions(lm, ids):
    """(L, H, T, T) from transformers' own eager attention."""
    with torch.no_grad(), attention_implementation(lm.model, "eager"):
        seen = lm.model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    return torch.stack(seen)[:, 0].double().numpy()


# --- the attention itself -------------------------------------------------------------------------


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_is_the_naive_double_loop_with_grouped_heads_window_and_cap(boolean, softcap):
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, heads, 5, 3).double() for heads in (4, 2, 2))
    allowed = torch.tensor([[c <= r and r - c < 3 for c in range(5)] for r in range(5)])
    mask = allowed if boolean else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    out, weights = attention.exact_attention(
        torch.nn.Module(), query, key, value, mask[None, None], scaling=0.7, softcap=softcap
    )
    for b, h, r in itertools.product(range(2), range(4), range(5)):
        scores = np.array([0.7 * float(query[b, h, r] @ key[b, h // 2, c]) for c in range(5)])
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weight = np.where(allowed[r], np.exp(scores), 0)
        weight /= weight.sum()
        np.testing.assert_allclose(weights[b, h, r], weight, atol=1e-14)
        np.testing.assert_allclose(out[b, r, h], weight @ value[b, h // 2].numpy(), atol=1e-13)


def test_no_mask_means_causal_never_the_future():
    torch.manual_seed(1)
    _, weights = attention.exact_attention(torch.nn.Module(), *torch.randn(3, 1, 2, 4, 3), None)
    assert weights.triu(1).abs().max() == 0
    _, weights = attention.exact_attention(
        torch.nn.Module(), torch.randn(1, 2, 2, 3), *torch.randn(2, 1, 2, 5, 3), None
    )
    assert weights[0, 0, 0, 4] == 0 and (weights[0, 0, 1] > 0).all()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_with_nothing_scaled_the_logits_are_the_models_own(lm, padding):
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, slice(None, 3) if padding == "left" else slice(4, None)] = 0
    own = logits(lm, ids, attention_mask=mask)
    with synapses.controlled(lm):
        ours = logits(lm, ids, attention_mask=mask)
    # transformers' eager rounds the softmax to float32, and in float64 its fully masked rows are
    # NaN; GPT-J rounds too
    tolerance = 1e-5 if lm.name in ("gemma2", "gptj") else 1e-12
    if lm.name == "gemma2" and padding != "none":
        own, ours, mask = own[1:], ours[1:], mask[1:]
    assert torch.allclose(
        own[mask.bool()], ours[mask.bool()], atol=tolerance * float(ours.abs().max()), rtol=0
    )
    with attention_implementation(lm.model, "eager"):
        eager = logits(lm, ids)
    with synapses.controlled(lm):
        assert torch.allclose(eager, logits(lm, ids), atol=1e-5 * float(eager.abs().max()), rtol=0)


def test_a_later_token_never_changes_an_earlier_row(lm):
    seen = []
    for last in (5, 6):
        with synapses.controlled(
            lm, observe=lambda layer, weights, _: seen.append(weights[..., :-1, :])
        ):
            seen.append(logits(lm, [[*PROMPT, last]])[:, :-1])
    half = len(seen) // 2
    assert half == lm.num_layers + 1
    for first, second in zip(seen[:half], seen[half:]):
        assert torch.equal(first, second)
        assert first.dim() == 3 or first.triu(1).abs().max() == 0


def test_an_architecture_without_the_interface_is_refused_by_name():
    falcon = make("falcon")
    with pytest.raises(UnsupportedModel, match="falcon.*attention"):
        find_synapses(falcon, "3 4 5")
    before = falcon.model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match="falcon"), scale_synapses(falcon, set(), 0.0):
        pass
    assert falcon.model.config._attn_implementation == before and not attention.ACTIVE


# --- finding synapses -----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_synapses_by_brute_force_over_transformers_tensors(lm, alpha):
    a = own_attentions(lm, PROMPT)
    layers, heads, tokens = a.shape[:3]
    tau = alpha / (layers * heads) * sum(a[l, h, r, c] for l, h, r, c in np.ndindex(*a.shape))
    expected = {
        (c, l, h)
        for l, h, c in np.ndindex(layers, heads, tokens)
        if sum(a[l, h, r, c] for r in range(tokens)) > tau
    }
    assert expected and find_synapses(lm, "3 17 8 25 40 9 31", alpha) == expected


def test_visible_mean_divides_by_the_rows_that_can_see_a_column(lm):
    a = own_attentions(lm, PROMPT)
    visible, alpha = (a > 0).sum(2), 0.2
    expected = {
        (c, l, h)
        for l, h, c in np.ndindex(*visible.shape)
        if a[l, h, :, c].sum() / visible[l, h, c] > alpha
    }
    assert find_synapses(lm, "3 17 8 25 40 9 31", alpha, score="visible_mean") == expected
    if lm.name in ("mistral-window", "gemma2"):
        assert visible.max(axis=(1, 2)).min() == 3


def test_a_late_column_cannot_collect_enough_to_be_a_synapse():
    found = find_synapses(make("gpt2"), "3 17 8 25 40 9 31 2 3 4", 0.3)
    assert found and max(column for column, _, _ in found) <= 10 - 0.3 * 10


def test_scores_do_not_depend_on_the_batch(lm, monkeypatch):
    prompts = [PROMPT, PROMPT[:4], PROMPT[::-1], [9, 9]]
    together = column_scores(lm, prompts)
    monkeypatch.setattr("qlutils.change.rows.token_budget", lambda lm: 1)
    for (total, _), prompt in zip(column_scores(lm, prompts), prompts):
        np.testing.assert_allclose(total, together[prompts.index(prompt)][0], atol=1e-12)
        np.testing.assert_allclose(total.sum(-1), len(prompt), atol=1e-9)


@pytest.mark.parametrize("alpha", [0, -0.1, 1.01, float("nan"), True, "0.3"])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        find_synapses(make("gpt2"), "3 4 5", alpha)


# --- scaling synapses -----------------------------------------------------------------------------


def edited_eager(lm, ids, chosen, factor, renormalise, shift=0):
    """Logits with transformers' eager attention function replaced by one that edits its softmax
    matrix by hand."""

    def naive(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        layer = next(
            i for i, one in enumerate(lm.layers) if any(part is module for part in one.modules())
        )
        groups = query.shape[1] // key.shape[1]
        out, weights = [], []
        for h in range(query.shape[1]):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            scores = query[:, h] @ key[:, h // groups].transpose(-1, -2) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            a = torch.softmax(scores + attention_mask[:, 0], -1)
            for column, l, head in chosen:
                if (l, head) == (layer, h):
                    a[:, :, column + shift] *= factor
            touched = renormalise and any(l == layer for _, l, _ in chosen)
            weights.append(a / a.sum(-1, keepdim=True).clamp_min(1e-300) if touched else a)
            out.append(weights[-1] @ value[:, h // groups])
        return torch.stack(out, 2), torch.stack(weights, 1)

    AttentionInterface.register("naive", naive)
    AttentionMaskInterface.register("naive", eager_mask)
    with attention_implementation(lm.model, "naive"):
        return logits(lm, ids)


@pytest.mark.parametrize(
    "factor,renormalise", [(0.0, False), (2.0, False), (0.0, True), (0.5, True)]
)
def test_scaling_a_column_is_editing_the_softmax_matrix(lm, factor, renormalise):
    chosen = {(0, 0, 1), (2, 0, 1), (3, 1, 0), (6, 2, 3)}
    with scale_synapses(lm, chosen, factor, renormalise=renormalise):
        ours = logits(lm, [PROMPT])
    expected = edited_eager(lm, [PROMPT], chosen, factor, renormalise)
    assert torch.allclose(ours, expected, atol=1e-11 * float(expected.abs().max()), rtol=0)
    assert not torch.allclose(ours, logits(lm, [PROMPT]), atol=1e-4)


def test_columns_count_prompt_tokens_on_either_padding_side_and_with_a_cache(lm):
    chosen = {(0, 0, 0), (1, 1, 2), (4, 2, 1)}
    with scale_synapses(lm, chosen, 0.0):
        alone = logits(lm, [PROMPT])[0]
        for left in (True, False):
            pad = [0, 0, 0]
            ids = torch.tensor(
                [[*pad, *PROMPT] if left else [*PROMPT, *pad], [*PROMPT[::-1], 1, 2, 3]]
            )
            mask = torch.ones_like(ids)
            mask[0, slice(None, 3) if left else slice(-3, None)] = 0
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            padded = (
                logits(lm, ids, attention_mask=mask, position_ids=positions)[0, 3:]
                if left
                else logits(lm, ids, attention_mask=mask)[0, :7]
            )
            assert torch.allclose(alone, padded, atol=1e-10 * float(alone.abs().max()), rtol=0), (
                left
            )
        first = lm.model(input_ids=torch.tensor([PROMPT[:4]]), use_cache=True)
        rest = [
            lm.model(input_ids=torch.tensor([[token]]), cache=first.cache).logits[0]
            for token in PROMPT[4:]
        ]
        cached = torch.cat([first.logits[0], *rest])
        assert torch.allclose(alone, cached, atol=1e-10 * float(alone.abs().max()), rtol=0)


def test_generation_under_scaling_is_greedy_decoding_without_a_cache():
    for name in ("gpt2", "mistral-window"):
        lm = make(name)
        chosen = {(0, 0, 0), (1, 1, 2), (4, 2, 1)}
        ids = torch.tensor([[0, 0, *PROMPT[:5]], PROMPT])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        with scale_synapses(lm, chosen, 3.0):
            made = lm.model.generate(
                ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
            )
            for row, prompt in enumerate((PROMPT[:5], PROMPT)):
                tokens = list(prompt)
                for _ in range(4):
                    tokens.append(int(logits(lm, [tokens])[0, -1].argmax()))
                assert made[row, 7:].tolist() == tokens[len(prompt) :]


def test_factor_one_and_no_synapses_change_not_one_bit(lm):
    own = logits(lm, [PROMPT])
    for chosen, factor in (({(0, 0, 0), (2, 1, 1)}, 1), (set(), 0.0)):
        with scale_synapses(lm, chosen, factor):
            assert torch.equal(own, logits(lm, [PROMPT]))
    ones = {0: torch.ones(1, lm.num_heads, 3, dtype=torch.float64)}
    with synapses.controlled(lm, ones):
        scaled = logits(lm, [PROMPT])
    with synapses.controlled(lm):
        assert torch.equal(scaled, logits(lm, [PROMPT]))


def test_contexts_compose_and_leave_no_trace_even_after_an_error(lm):
    own, before = logits(lm, [PROMPT]), lm.model.config._attn_implementation
    a, b = {(0, 0, 0)}, {(0, 0, 0), (1, 2, 1)}
    with scale_synapses(lm, a, 2.0), scale_synapses(lm, b, 3.0):
        nested = logits(lm, [PROMPT])
    factors = {
        0: torch.ones(1, 4, 1, dtype=torch.float64),
        2: torch.ones(1, 4, 2, dtype=torch.float64),
    }
    factors[0][0, 0, 0], factors[2][0, 1, 1] = 6.0, 3.0
    with synapses.controlled(lm, factors):
        assert torch.allclose(
            nested, logits(lm, [PROMPT]), atol=1e-11 * float(own.abs().max()), rtol=0
        )
    with pytest.raises(RuntimeError, match="on purpose"), scale_synapses(lm, a, 0.0):
        with scale_synapses(lm, b, 0.0):
            raise RuntimeError("on purpose")
    assert torch.equal(own, logits(lm, [PROMPT]))
    assert lm.model.config._attn_implementation == before and not attention.ACTIVE
    assert not any(part._forward_pre_hooks for part in lm.model.modules())


def test_a_row_that_loses_all_its_mass_stays_zero_when_renormalised():
    lm, kept = make("gpt2"), []
    with (
        scale_synapses(lm, {(0, 1, 2)}, 0.0, renormalise=True),
        synapses.controlled(
            lm, observe=lambda layer, weights, _: kept.append(weights) if layer == 1 else None
        ),
    ):
        assert torch.isfinite(logits(lm, [PROMPT])).all()
    sums = kept[0].sum(-1)[0]
    ones = torch.ones(7, dtype=torch.float64)
    assert (
        sums[2, 0] == 0 and torch.allclose(sums[2, 1:], ones[1:]) and torch.allclose(sums[0], ones)
    )


@pytest.mark.parametrize("synapse", [(-1, 0, 0), (64, 0, 0), (0, 3, 0), (0, 0, 4)])
def test_a_synapse_outside_the_model_is_named(synapse):
    with pytest.raises(
        ValueError, match=rf"\({synapse[0]}, {synapse[1]}, {synapse[2]}\) is outside gpt2"
    ):
        with scale_synapses(make("gpt2"), {synapse}, 0.0):
            pass


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1, "0"])
def test_an_impossible_factor_is_refused(factor):
    with (
        pytest.raises(ValueError, match="factor"),
        scale_synapses(make("gpt2"), {(0, 0, 0)}, factor),
    ):
        pass


# --- batches --------------------------------------------------------------------------------------


def test_rows_of_a_batch_equal_one_query_at_a_time_under_the_context_manager(lm):
    rng = np.random.default_rng(0)
    rows = []
    for prompt, answer in ((PROMPT, [5]), (PROMPT[:4], [6, 7]), (PROMPT[::-1], [5])):
        for factor, renormalise in ((0.0, False), (2.0, True), (1.5, False)):
            columns = rng.random((lm.num_layers, lm.num_heads, len(prompt))) < 0.2
            rows.append(Row(prompt, answer, columns, factor, renormalise, ((0, 3), (2, 40))))
    rows.append(Row(PROMPT, [5], neurons=()))
    result = run_rows(lm, rows)
    assert np.isnan(result[-1, 1:]).all()
    for row, (probability, value, signed) in zip(rows, result):
        kept = {}
        handles = [
            lm.downs[l].register_forward_hook(
                lambda _, inputs, __, l=l: kept.__setitem__(
                    l, inputs[0].reshape(-1, lm.num_neurons)[len(row.prompt) - 1]
                )
            )
            for l in (0, 2)
        ]
        layers, heads, columns = (
            np.nonzero(row.columns) if row.columns is not None else ([], [], [])
        )
        with scale_synapses(
            lm, set(zip(columns, layers, heads)), row.factor, renormalise=row.renormalise
        ):
            p = torch.softmax(
                logits(lm, [row.prompt + row.answer[:-1]])[0, len(row.prompt) - 1 :], -1
            )
        for handle in handles:
            handle.remove()
        expected = np.prod([float(p[k, token]) for k, token in enumerate(row.answer)])
        assert probability == pytest.approx(expected, rel=1e-5 if row.columns is None else 1e-9)
        if row.neurons:
            read = np.array([float(kept[l][n]) for l, n in row.neurons])
            assert value == pytest.approx(np.abs(read).mean(), rel=1e-9)
            assert signed == pytest.approx(read.mean(), rel=1e-9)


def test_kns_are_read_in_the_rows_not_in_the_check_before_them():
    lm, row = make("gpt2"), Row(PROMPT, [5], neurons=((0, 3), (2, 40)))
    np.testing.assert_array_equal(run_rows(lm, [row]), run_rows(lm, [row]))


UNIT = [
    dict(
        fact="R1|a|8",
        relation="R1",
        object="8",
        prompts=["3 17 8 25 40", "5 17 8 25"],
        prompt_index=[0, 2],
        layer=[[0, 2], []],
        neuron=[[3, 40], []],
        irrelevant=["9 8 7 6 5 4 3", None],
    )
]


def test_the_synapse_task_scales_what_its_sets_say():
    lm = make("llama-gqa")
    frame = scale_synapse_columns(lm, UNIT, alpha=0.2)
    own = find_synapses(lm, "3 17 8 25 40", 0.2)
    other = {s for s in find_synapses(lm, "9 8 7 6 5 4 3", 0.2) if s[0] < 5}
    sets = {
        "self": own,
        "irrelevant": other,
        "self_only": own - other,
        "irrelevant_only": other - own,
        "self_without_first": {s for s in own if s[0]},
        "irrelevant_without_first": {s for s in other if s[0]},
    }
    first = frame[frame["prompt_index"] == 0].set_index(["set", "renormalise", "direction"])
    none = first.loc[("none", False, "none")]
    assert (
        none["n_self"] == len(own)
        and none["n_irrelevant"] == len(other)
        and none["by_column"].sum() == len(own)
    )
    assert none["jaccard"] == pytest.approx(len(own & other) / len(own | other))
    for name, chosen in sets.items():
        for direction, factor in (("suppress", 0.0), ("enhance", 2.0)):
            row = first.loc[(name, False, direction)]
            with scale_synapses(lm, chosen, factor):
                p = torch.softmax(logits(lm, [[3, 17, 8, 25, 40]])[0, -1], -1)[8]
            assert row["size"] == len(chosen) and row["probability"] == pytest.approx(
                float(p), rel=1e-9
            )
            assert row["probability_before"] == pytest.approx(none["probability"], rel=1e-12)
    assert first.loc[("random", False, "suppress")]["size"] == len(own)
    second = frame[frame["prompt_index"] == 2]
    assert (
        set(second["set"]) == {"none", "self", "self_without_first", "random"}
        and second["value"].isna().all()
    )


def test_random_columns_match_each_head_and_avoid_the_synapses():
    rng = np.random.default_rng(0)
    own = rng.random((2, 3, 9)) < 0.3
    drawn = synapse_sets(own, None, rng)["random"]
    assert (drawn.sum(-1) == own.sum(-1)).all() and not (drawn & own).any()
    full = np.ones((1, 1, 4), bool)
    assert synapse_sets(full, None, rng)["random"].all()


def test_the_most_attended_token_by_brute_force():
    lm = make("llama-gqa")
    frame = attend(lm, UNIT)
    a = own_attentions(lm, [3, 17, 8, 25, 40]).mean((0, 1)).sum(0)
    assert (
        frame.loc[0, "column"] == a.argmax() and frame.loc[0, "column_rest"] == 1 + a[1:].argmax()
    )
    assert frame.loc[0, "share"] == pytest.approx(a.max() / 5, rel=1e-5)
    assert frame.loc[0, "first_share"] == pytest.approx(a[0] / 5, rel=1e-5)
    assert (
        frame.loc[0, "token_id"] == [3, 17, 8, 25, 40][a.argmax()] and frame.loc[1, "tokens"] == 4
    )


# --- attribution of a changed model ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "mistral-window"])
def test_attribution_inside_is_that_of_the_changed_model(name):
    lm, chosen, target, steps = make(name), {(0, 0, 1), (2, 1, 0), (6, 2, 3)}, 5, 4
    with scale_synapses(lm, chosen, 0.0):
        fast = attribute_encoded(lm, [(PROMPT, [target])], Spec(method="ig", steps=steps)).scores[0]
        for layer, down in enumerate(lm.downs):
            clean = []
            handle = down.register_forward_pre_hook(
                lambda _, x: clean.append(x[0].reshape(len(PROMPT), -1)[-1])
            )
            logits(lm, [PROMPT])
            handle.remove()
            total = 0
            for j in range(1, steps + 1):
                point = (clean[0] * j / steps).requires_grad_()
                handle = down.register_forward_pre_hook(
                    lambda _, x: (
                        torch.cat([x[0].reshape(len(PROMPT), -1)[:-1], point[None]]).reshape(
                            x[0].shape
                        ),
                    )
                )
                p = torch.softmax(lm.model(input_ids=torch.tensor([PROMPT])).logits[0, -1], -1)[
                    target
                ]
                handle.remove()
                total = total + torch.autograd.grad(p, point)[0] / steps
            expected = clean[0] * total
            assert torch.allclose(
                fast[layer], expected, atol=1e-9 * float(expected.abs().max()) + 1e-16, rtol=0
            ), layer


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "mistral-window"])
def test_prompts_of_several_lengths_are_changed_inside_as_each_alone(name):
    """Columns are counted from each prompt's own first token."""
    lm, queries = make(name), [([3, 17, 8, 25, 40], [5]), ([9, 4], [7, 6]), ([8, 3, 11], [12])]
    spec = Spec(method="ig", rule="converged")
    with scale_synapses(lm, {(0, 0, 1), (1, 1, 0), (2, 2, 3)}, 0.0):
        together = attribute_encoded(lm, queries, spec).scores
        alone = [attribute_encoded(lm, [query], spec).scores[0] for query in queries]
    for found, expected in zip(together, alone):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.max()))


def test_maps_of_figures_7_and_10_are_taken_under_each_querys_own_synapses():
    lm = make("llama-gqa")
    clean = dict(
        fact="R1|a|5", prompt="3 17 8 25 40", answer="5", attribution=None, activation=None
    )
    [row] = scaled_maps(lm, [clean], alpha=0.2, steps=3, method="ig")
    assert row["unmodified"] is clean
    with scale_synapses(lm, find_synapses(lm, clean["prompt"], 0.2), 2.0):
        expected = (
            attribute_encoded(lm, [([3, 17, 8, 25, 40], [5])], Spec(steps=3)).scores[0].numpy()
        )
    np.testing.assert_allclose(row["enhanced"]["attribution"], expected, atol=1e-15)
    assert np.abs(row["suppressed"]["activation"] - row["enhanced"]["activation"]).max() > 1e-4
