"""Attention as a model really runs it: read, its columns scaled, and knowledge synapses (Eq. 5, 6).

A is the post-softmax attention of a layer and head: rows attend, columns are attended to, rows sum
to 1. A synapse is (column, layer, head), zero-based; columns count the tokens of a prompt, BOS
included, padding not.

Shapes: B queries or rows of a batch, L layers, H query heads, T prompt tokens, A answer tokens.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch

from qlutils.change.changes import check_finite
from qlutils.change.rows import in_batches, refuse_numbers
from qlutils.checks import CHOICES, one_of
from qlutils.model.answer import token_probabilities
from qlutils.model.architecture import UnsupportedModel, refusing
from qlutils.model.attention import AttentionChange
from qlutils.model.language_model import check_loaded, whole_numbers
from qlutils.model.passes import full_precision
from qlutils.model.trace import traced
from qlutils.model.verify import differ, sample_ids, sharply

# --- the model's attention, watched or changed ----------------------------------------------------


@contextmanager
def controlled(lm, factors=None, renormalise=False, observe=None):
    """Inside, every forward pass of `lm.model` runs `attention.exact_attention` under an
    `AttentionChange` of these arguments.

    `UnsupportedModel`, naming the model, where its attention cannot be replaced."""
    lm.check_ready()
    check_replaceable(lm)
    with AttentionChange(factors, renormalise, observe).on(lm.model, lm.layers):
        yield


@torch.no_grad()
def check_replaceable(lm):
    """`UnsupportedModel` unless each layer's attention matrix can be read and replaced, and the
    model's own logits come out; tried once a model."""
    if "attention" in lm.checked:
        return
    ids = sample_ids(lm, 6)
    seen = set()
    watch = AttentionChange(observe=lambda layer, *_: seen.add(layer))
    trying = refusing("a pass with it replaced")
    try:
        with full_precision(lm.device), trying, sharply(lm) as tolerance:
            own = lm.logits(ids)
            with watch.on(lm.model, lm.layers):
                ours = lm.logits(ids)
            if len(seen) < lm.num_layers:
                unseen = f"{lm.num_layers - len(seen)} of its {lm.num_layers} layers"
                raise UnsupportedModel(f"{unseen} do not use transformers' attention interface")
            if differ(ours, own, own, tolerance):
                error = float((ours - own).abs().max())
                raise UnsupportedModel(f"its logits then differ by {error:.1e}")
    except UnsupportedModel as problem:
        raise UnsupportedModel(
            f"{lm.name} ({lm.model.config.model_type}): its attention can be neither read nor "
            f"changed exactly ({problem}); notebooks 05 and 06 need another model"
        ) from problem
    lm.checked.add("attention")


@contextmanager
def scale_synapses(lm, synapses, factor: float, *, renormalise: bool = False):
    """Inside, the columns `synapses`, a set of (column, layer, head), of the post-softmax attention
    are multiplied.

        with scale_synapses(lm, find_synapses(lm, prompt), 0.0):
            lm.model(**inputs)

    Acts on all rows that attend to the column, those of answer tokens included, in any forward pass
    inside, with or without a key-value cache; padding on the left is told from the (batch, tokens)
    attention mask. Factor 0 suppresses, 2 enhances; `renormalise` divides each row of those heads'
    layers by its new sum. A column that an input does not have changes nothing. Contexts end in the
    order in which `with` ends them, not otherwise. ValueError names a synapse outside the model."""
    check_loaded(lm)
    found = set(whole_numbers(synapses, ("column", "layer", "head"), "synapse"))
    sizes = lm.context, lm.num_layers, lm.num_heads
    for synapse in sorted(found):
        if not all(0 <= place < size for place, size in zip(synapse, sizes)):
            raise ValueError(
                f"synapse {synapse} is outside {lm.name}: (column, layer, head), with columns from "
                f"0, {lm.num_layers} layers and {lm.num_heads} heads, all counted from 0"
            )
    if check_finite(lm, "factor", factor) < 0:
        raise ValueError(f"factor is {factor!r}; use at least 0 (0 suppresses, 2 enhances)")
    if factor == 1 or not found:  # nothing to change: not even the rounding of another attention
        check_replaceable(lm)
        yield
        return
    columns, layers, heads = map(list, zip(*found))
    shape = lm.num_layers, 1, lm.num_heads, 1 + max(columns)
    scale = torch.ones(shape, dtype=lm.score_dtype, device=lm.device)
    scale[layers, 0, heads, columns] = factor
    with controlled(lm, {layer: scale[layer] for layer in layers}, renormalise):
        yield


# --- finding synapses -----------------------------------------------------------------------------


def find_synapses(lm, prompt: str, alpha=0.3, *, score="sum") -> set[tuple[int, int, int]]:
    """The knowledge synapses of a prompt: a set of (column, layer, head), columns counting its
    tokens, BOS included.

    score "sum" (Eq. 5, 6): columns that collect more than tau = alpha * (total attention of a layer
    and head, averaged over all of them). A late column can be attended to by few rows only, so it
    cannot pass. "visible_mean" compares the mean over the rows that can see the column with alpha *
    (mean attention a row gives). ValueError: alpha outside (0, 1]; a prompt of one token."""
    check_loaded(lm)
    check_alpha(alpha, score)
    [attention] = column_scores(lm, [lm.encode_prompt(prompt)], score)
    layers, heads, columns = above_threshold(*attention, alpha).nonzero()
    return set(zip(columns.tolist(), layers.tolist(), heads.tolist()))


def check_alpha(alpha, score):
    """ValueError for a threshold or a score that `find_synapses` does not know."""
    number = isinstance(alpha, Real) and not isinstance(alpha, bool)
    if not number or not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}; use a number above 0 and at most 1 (the paper: 0.3)")
    one_of("score", score, CHOICES["score"])


def column_scores(lm, prompts, score="sum"):
    """(2, L, H, T) for each tokenised prompt: attention summed over rows, and the score that
    decides on synapses.

    The score is the sum or T times the mean over the rows that can see the column, so that one
    threshold serves both. Matrices are reduced while the model runs, a batch and layer at a
    time."""

    def compute(some):
        found = _column_scores(lm, torch.tensor(some, device=lm.device), score)
        for prompt, (total, _) in zip(some, found):
            if not np.isfinite(total).all():
                refuse_numbers(lm, prompt)
        return found

    return in_batches(lm, map(tuple, prompts), lambda prompt: (len(prompt),), compute)


@torch.no_grad()
def _column_scores(lm, ids, score):
    """`column_scores` of prompts of one length, ids (B, T)."""
    sums, scores = {}, {}  # a layer that attends twice (DiffLlama) counts once

    def observe(layer, weights, visible):  # (B, H, T, T), (B or 1, 1 or H, T, T)
        total = weights.sum(-2)  # (B, H, T)
        sums[layer] = total
        if score == "visible_mean":
            if visible is None:
                visible = torch.ones_like(weights[:1, :1]).tril()
            rows = weights.shape[-2]
            total = total * rows / visible.sum(-2)
        scores[layer] = total

    with controlled(lm, observe=observe):
        lm.model.base_model(input_ids=ids, use_cache=False)
    both = [torch.stack(list(one.values()), 1) for one in (sums, scores)]
    both = torch.stack(both, 1)  # (B, 2, L, H, T)
    return both.double().cpu().numpy()


def above_threshold(total, score, alpha):
    """(L, H, T) booleans: score > tau (Eq. 6), tau = alpha * mean over layers and heads of the
    total attention (Eq. 5; alpha * T where rows sum to 1)."""
    return score > alpha * total.sum(-1).mean()


def first_tokens(lm):
    """How many columns "without the first" leaves out: those of all tokens that the tokenizer puts
    before every prompt (BOS, GLM's [gMASK]<sop>), or one where it puts none. They draw attention
    whatever is asked."""
    return max(1, lm.bos_offset)


# --- many queries under many changes, in few batches ----------------------------------------------


@dataclass(eq=False)
class Row:
    """A query to answer with `columns` (L, H, T) of its attention scaled by `factor` (None: the
    model as it is), and the KNs, (layer, index) pairs, to read meanwhile."""

    prompt: list[int]
    answer: list[int]
    columns: np.ndarray | None = None
    factor: float = 1.0
    renormalise: bool = False
    neurons: tuple = ()


@torch.no_grad()
def run_rows(lm, rows):
    """(rows, 3): probability of the answer (product over its tokens), mean |activation| and mean
    activation of the row's KNs at the last prompt token (NaN without KNs). Each row has its own
    synapses; equal lengths share a batch, and a row that comes again is computed once."""

    def kind(row):
        return len(row.prompt) + len(row.answer), len(row.answer), row.renormalise

    found = in_batches(lm, rows, kind, lambda some: _run_batch(lm, some))
    return np.array(found).reshape(-1, 3)


def _run_batch(lm, rows):
    """`run_rows` of rows whose prompts are of one length, their answers too, and that all
    renormalise or do not."""
    last = len(rows[0].prompt) - 1
    ids = torch.tensor([row.prompt + row.answer[:-1] for row in rows], device=lm.device)
    target = torch.tensor([row.answer for row in rows], device=lm.device)  # (B, A)

    def at_last(call):  # (B, N); OPT flattens (B, T)
        return call.args[0].reshape(*ids.shape, -1)[:, last]

    changed = controlled(lm, _factors(lm, rows), rows[0].renormalise)
    with changed, traced(lm.downs, at_last) as vectors:
        hidden = lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hidden = hidden[:, last:].flatten(0, 1)  # (B * A, d)
    p = token_probabilities(lm, hidden, target.flatten()).view(target.shape).prod(-1)
    neurons = torch.stack(vectors, 1)  # (B, L, N)
    found = []
    for row, probability, activations in zip(rows, p.tolist(), neurons):
        layer, index = torch.tensor(row.neurons, dtype=torch.long).reshape(-1, 2).T
        kns = activations[layer, index].double()
        numbers = probability, kns.abs().mean().item(), kns.mean().item()
        if not np.isfinite([probability, *kns.tolist()]).all():
            refuse_numbers(lm, row.prompt)
        found.append(numbers)
    return found


def _factors(lm, rows):
    """{layer: (B, H, T)} of what each row multiplies its columns by."""
    scale = np.ones((lm.num_layers, len(rows), lm.num_heads, len(rows[0].prompt)))
    for place, row in enumerate(rows):
        if row.columns is not None:
            scale[:, place][row.columns] = row.factor
    scale = torch.tensor(scale, dtype=lm.score_dtype, device=lm.device)
    return dict(enumerate(scale))
