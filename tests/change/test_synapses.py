"""Attention that can be watched and changed: against naive attention, transformers' own tensors and
brute force."""

import itertools

import numpy as np
import pytest
import torch
from families import TOWERS, lm_of
from naive import Naive
from tiny import hooked, tiny_lm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.attribution.quadrature import quadrature
from qlutils.change import synapses
from qlutils.change.synapses import Row, column_scores, find_synapses, run_rows, scale_synapses
from qlutils.experiments.attention_predominance import attend
from qlutils.experiments.knowledge_synapses import scale_synapse_columns, scaled_maps, synapse_sets
from qlutils.model import attention
from qlutils.model.attention import attention_implementation

# learned and rotary places, grouped heads, windows of 3, a soft cap
FAMILIES = ("gpt2", "neox", "llama3", "mistral", "gemma2", "gptj")
PROMPT = [13, 17, 8, 25, 40, 9, 31]
TEXT = " ".join(map(str, PROMPT))
CHOSEN = {(0, 0, 0), (1, 1, 2), (4, 2, 1)}


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request):
    return tiny_lm(request.param)


@torch.no_grad()
def logits(lm, ids, **kwargs):
    return lm.model(input_ids=torch.as_tensor(ids), **kwargs).logits


def probabilities(lm, ids):
    return torch.softmax(logits(lm, [ids])[0], -1)


def assert_near(found, expected, share):
    assert (found - expected).abs().max() <= share * expected.abs().max()


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
    query, key, value = torch.randn(1, 2, 2, 3), *torch.randn(2, 1, 2, 5, 3)
    _, weights = attention.exact_attention(torch.nn.Module(), query, key, value, None)
    assert weights[0, 0, 0, 4] == 0 and (weights[0, 0, 1] > 0).all()


# --- finding synapses -----------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_synapses_by_brute_force_over_transformers_tensors(lm, alpha):
    a = own_attentions(lm, PROMPT)
    layers, heads, tokens = a.shape[:3]
    visible, places = (a > 0).sum(2), list(np.ndindex(layers, heads, tokens))
    total = {(l, h, c): sum(a[l, h, r, c] for r in range(tokens)) for l, h, c in places}
    tau = alpha / (layers * heads) * sum(total.values())
    expected = {(c, l, h) for l, h, c in places if total[l, h, c] > tau}
    assert expected and find_synapses(lm, TEXT, alpha) == expected
    assert max(column for column, _, _ in expected) <= tokens - alpha * tokens  # late ones cannot
    expected = {(c, l, h) for l, h, c in places if total[l, h, c] / visible[l, h, c] > alpha}
    assert find_synapses(lm, TEXT, alpha, score="visible_mean") == expected
    if lm.name in ("tiny-mistral", "tiny-gemma2"):
        assert visible.max(axis=(1, 2)).min() == 3


def test_scores_do_not_depend_on_the_batch(lm, monkeypatch):
    prompts = [PROMPT, PROMPT[:4], PROMPT[::-1], [9, 9]]
    together = column_scores(lm, prompts)
    monkeypatch.setattr("qlutils.change.rows.token_budget", lambda lm: 1)
    for (total, _), (wanted, _), prompt in zip(column_scores(lm, prompts), together, prompts):
        np.testing.assert_allclose(total, wanted, atol=1e-12)
        np.testing.assert_allclose(total.sum(-1), len(prompt), atol=1e-9)


# --- scaling synapses -----------------------------------------------------------------------------
def edited_eager(lm, ids, chosen, factor, renormalise):
    """Logits with transformers' eager attention function replaced by one that edits its softmax
    matrix by hand."""
    layer_of = {part: i for i, one in enumerate(lm.layers) for part in one.modules()}

    def naive(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        layer, out, weights = layer_of[module], [], []
        groups = query.shape[1] // key.shape[1]
        for h in range(query.shape[1]):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            scores = query[:, h] @ key[:, h // groups].transpose(-1, -2) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            a = torch.softmax(scores + attention_mask[:, 0], -1)
            for column, l, head in chosen:
                if (l, head) == (layer, h):
                    a[:, :, column] *= factor
            touched = renormalise and any(l == layer for _, l, _ in chosen)
            weights.append(a / a.sum(-1, keepdim=True).clamp_min(1e-300) if touched else a)
            out.append(weights[-1] @ value[:, h // groups])
        return torch.stack(out, 2), torch.stack(weights, 1)

    AttentionInterface.register("naive", naive)
    AttentionMaskInterface.register("naive", eager_mask)
    with attention_implementation(lm.model, "naive"):
        return logits(lm, ids)


@pytest.mark.parametrize("factor, divide", [(0.0, False), (2.0, False), (0.0, True), (0.5, True)])
def test_scaling_a_column_is_editing_the_softmax_matrix(lm, factor, divide):
    chosen = {(0, 0, 1), (2, 0, 1), (3, 1, 0), (6, 2, 3)}
    with scale_synapses(lm, chosen, factor, renormalise=divide):
        ours = logits(lm, [PROMPT])
    assert_near(ours, edited_eager(lm, [PROMPT], chosen, factor, divide), 1e-11)
    assert not torch.allclose(ours, logits(lm, [PROMPT]), atol=1e-4)


@pytest.mark.parametrize("name", [*FAMILIES, *TOWERS])
def test_columns_count_prompt_tokens_on_either_padding_side_and_with_a_cache(name):
    lm, apart = lm_of(name, torch.float64), 1e-4 if name in TOWERS else 1e-10
    with scale_synapses(lm, CHOSEN, 0.0):
        alone = logits(lm, [PROMPT])[0]
        for left in (True, False):
            row = [0, 0, 0, *PROMPT] if left else [*PROMPT, 0, 0, 0]
            ids = torch.tensor([row, [*PROMPT[::-1], 11, 12, 13]])
            mask = torch.ones_like(ids)
            mask[0, slice(None, 3) if left else slice(-3, None)] = 0
            places = dict(position_ids=(mask.cumsum(-1) - 1).clamp_min(0)) if left else {}
            found = logits(lm, ids, attention_mask=mask, **places)[0]
            assert_near(found[3:] if left else found[:7], alone, apart)
        first = lm.model(input_ids=torch.tensor([PROMPT[:4]]), use_cache=True)
        rest = [logits(lm, [[token]], cache=first.cache)[0] for token in PROMPT[4:]]
        assert_near(torch.cat([first.logits[0], *rest]), alone, apart)


def test_nested_contexts_multiply(lm):
    with scale_synapses(lm, {(0, 0, 0)}, 2.0), scale_synapses(lm, {(0, 0, 0), (1, 2, 1)}, 3.0):
        nested = logits(lm, [PROMPT])
    factors = {layer: torch.ones(1, 4, 2, dtype=torch.float64) for layer in (0, 2)}
    factors[0][0, 0, 0], factors[2][0, 1, 1] = 6.0, 3.0
    with synapses.controlled(lm, factors):
        assert_near(nested, logits(lm, [PROMPT]), 1e-11)


def test_a_row_that_loses_all_its_mass_stays_zero_when_renormalised():
    lm, kept = tiny_lm("gpt2"), {}
    watching = synapses.controlled(lm, observe=lambda layer, a, _: kept.setdefault(layer, a))
    with scale_synapses(lm, {(0, 1, 2)}, 0.0, renormalise=True), watching:
        assert torch.isfinite(logits(lm, [PROMPT])).all()
    sums = kept[1].sum(-1)[0]
    assert sums[2, 0] == 0
    sums[2, 0] = 1
    torch.testing.assert_close(sums, torch.ones_like(sums))


# --- batches --------------------------------------------------------------------------------------
def test_rows_of_a_batch_equal_one_query_at_a_time_under_the_context_manager(lm):
    rng, rows, kns = np.random.default_rng(0), [], ((0, 3), (2, 40))
    for prompt, answer in ((PROMPT, [5]), (PROMPT[:4], [6, 7]), (PROMPT[::-1], [5])):
        for factor, renormalise in ((0.0, False), (2.0, True), (1.5, False)):
            columns = rng.random((lm.num_layers, lm.num_heads, len(prompt))) < 0.2
            rows.append(Row(prompt, answer, columns, factor, renormalise, kns))
    plain = Row(PROMPT, [5])
    *result, last = run_rows(lm, [*rows, plain])
    assert last[0] == pytest.approx(float(probabilities(lm, PROMPT)[-1, 5]), rel=1e-5)
    assert np.isnan(last[1:]).all()
    for row, (probability, value, signed) in zip(rows, result):
        kept, at = {}, len(row.prompt) - 1
        layers, heads, columns = np.nonzero(row.columns)
        chosen = set(zip(columns, layers, heads))
        with scale_synapses(lm, chosen, row.factor, renormalise=row.renormalise):
            for layer in (0, 2):
                keep = lambda _, x, l=layer: kept.update({l: x[0].view(-1, lm.num_neurons)[at]})  # noqa: E731
                with hooked(lm.downs[layer].register_forward_pre_hook(keep)):
                    p = probabilities(lm, row.prompt + row.answer[:-1])[at:]
        expected = np.prod([float(p[k, token]) for k, token in enumerate(row.answer)])
        read = np.array([float(kept[l][n]) for l, n in kns])
        wanted = expected, np.abs(read).mean(), read.mean()
        assert (probability, value, signed) == pytest.approx(wanted, rel=1e-9)


UNIT = dict(fact="R1|a|8", relation="R1", object="8", prompts=["13 17 8 25 40", "5 17 8 25"])
UNIT |= dict(prompt_index=[0, 2], layer=[[0, 2], []], neuron=[[3, 40], []])
UNIT["irrelevant"] = ["9 8 7 6 5 4 13", None]


def test_the_synapse_task_scales_what_its_sets_say():
    lm = tiny_lm("llama3")
    frame = scale_synapse_columns(lm, [UNIT], alpha=0.2)
    own = find_synapses(lm, "13 17 8 25 40", 0.2)
    other = {s for s in find_synapses(lm, "9 8 7 6 5 4 13", 0.2) if s[0] < 5}
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
    assert (none["n_self"], none["n_irrelevant"]) == (len(own), len(other))
    assert none["by_column"].sum() == len(own)
    assert none["jaccard"] == pytest.approx(len(own & other) / len(own | other))
    for (name, chosen), factor in itertools.product(sets.items(), (0.0, 2.0)):
        row = first.loc[(name, False, "enhance" if factor else "suppress")]
        with scale_synapses(lm, chosen, factor):
            p = float(probabilities(lm, [13, 17, 8, 25, 40])[-1, 8])
        assert row["size"] == len(chosen) and row["probability"] == pytest.approx(p, rel=1e-9)
        assert row["probability_before"] == pytest.approx(none["probability"], rel=1e-12)
    assert first.loc[("random", False, "suppress")]["size"] == len(own)
    second = frame[frame["prompt_index"] == 2]
    assert set(second["set"]) == {"none", "self", "self_without_first", "random"}
    assert second["value"].isna().all()


def test_random_columns_match_each_head_and_avoid_the_synapses():
    rng = np.random.default_rng(0)
    own = rng.random((2, 3, 9)) < 0.3
    drawn = synapse_sets(own, None, rng)["random"]
    assert (drawn.sum(-1) == own.sum(-1)).all() and not (drawn & own).any()
    assert synapse_sets(np.ones((1, 1, 4), bool), None, rng)["random"].all()


def test_the_most_attended_token_by_brute_force():
    lm, ids = tiny_lm("llama3"), [13, 17, 8, 25, 40]
    first, second = attend(lm, [UNIT]).to_dict("records")
    a = own_attentions(lm, ids).mean((0, 1)).sum(0)
    assert (first["column"], first["column_rest"]) == (a.argmax(), 1 + a[1:].argmax())
    assert first["share"] == pytest.approx(a.max() / 5, rel=1e-5)
    assert first["first_share"] == pytest.approx(a[0] / 5, rel=1e-5)
    assert first["token_id"] == ids[a.argmax()] and second["tokens"] == 4


# --- attribution of a changed model ---------------------------------------------------------------
@pytest.mark.parametrize("name", ["gpt2", "llama3", "mistral"])
def test_attribution_inside_is_that_of_the_changed_model_for_prompts_of_any_length(name):
    """Columns are counted from each prompt's own first token."""
    lm, queries = tiny_lm(name), [(PROMPT, [5]), ([9, 4], [7, 6]), ([8, 13, 11], [12])]
    rule, converged = quadrature("right", 4), Spec(rule="converged")
    with scale_synapses(lm, {(0, 0, 1), (2, 1, 0), (6, 2, 3), (1, 1, 0)}, 0.0):
        wanted = [Naive(lm.model, name).attribute(*query, "ig", *rule)[0] for query in queries]
        alone = [attribute_encoded(lm, [query], converged).scores[0] for query in queries]
        found = attribute_encoded(lm, queries, Spec(steps=4)).scores
        together = attribute_encoded(lm, queries, converged).scores
    for one, other in zip([*found, *together], wanted + alone):
        assert_near(one, other, 1e-9)


def test_maps_of_figures_7_and_10_are_taken_under_each_querys_own_synapses():
    lm, query = tiny_lm("llama3"), ([13, 17, 8, 25, 40], [5])
    clean = dict(fact="f", prompt="13 17 8 25 40", answer="5", attribution=None, activation=None)
    [row] = scaled_maps(lm, [clean], alpha=0.2, steps=3, method="ig")
    assert row["unmodified"] is clean
    with scale_synapses(lm, find_synapses(lm, clean["prompt"], 0.2), 2.0):
        expected = attribute_encoded(lm, [query], Spec(steps=3)).scores[0].numpy()
    np.testing.assert_allclose(row["enhanced"]["attribution"], expected, atol=1e-15)
    assert np.abs(row["suppressed"]["activation"] - row["enhanced"]["activation"]).max() > 1e-4
