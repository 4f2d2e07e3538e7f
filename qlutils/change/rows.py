"""Scoring answers with a different change of the neurons in every row of a batch.

A *query* is (prompt ids, target ids), scored by teacher forcing. A *row* evaluates one query under
one `Change`. Queries of equal length share a batch, so there is no padding. What a change cannot
reach is computed once a query and shared by all its rows: the layers below the lowest changed
neuron and, where changes begin at the last prompt token, the keys and values of the tokens before
it. Logits are computed at scored positions only.

Shapes: Q queries, R rows, S tokens a row (those after the shared prefix), K scored tokens, d
residual width, N neurons a layer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from qlutils.change.changes import Change, prompt_of
from qlutils.model.answer import token_scores
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.passes import CleanPass, clean_pass, computing, run_rows, within_memory
from qlutils.model.trace import edited
from qlutils.model.verify import sharply

CPU_TOKENS = 2048  # tokens of a batch on a CPU; from 1,024 on the time is flat
_CHECKED: WeakSet = WeakSet()  # models that passed `_check`


@dataclass
class Scores:
    """Of R rows: `log_probability` (R,) of the whole target, float64; `exact` (R,), whether every
    teacher-forced greedy token is the target's (then greedy decoding gives the target); `match`
    (R,), the share of tokens that are; `greedy`, those greedy tokens, a list a row."""

    log_probability: np.ndarray
    exact: np.ndarray
    match: np.ndarray
    greedy: list[list[int]]

    @classmethod
    def empty(cls, rows: int) -> Scores:
        return cls(np.zeros(rows), np.zeros(rows, bool), np.zeros(rows), [[]] * rows)


class _Kind(NamedTuple):
    """What the queries of a batch have in common."""

    tokens: int  # S
    prefix: int  # tokens before those, which no change reaches
    first: int  # the prompt's last of the S tokens, where active scalings begin


@dataclass
class _Row:
    """Equal rows of a call (same query, same `Change` object), computed once."""

    prompt: list[int]
    target: list[int]
    change: Change | None
    start: int  # the layer in which it leaves the clean pass
    places: list[int] = field(default_factory=list)  # among the rows of the call
    slot: int = 0  # of its query in the batch


def score_queries(lm, queries, **options) -> Scores:
    """`score_rows` of each query once, unchanged."""
    rows = [(query, None) for query in range(len(queries))]
    return score_rows(lm, queries, rows, **options)


@torch.no_grad()
def score_rows(lm, queries, rows, *, everywhere=False, tokens=None) -> Scores:
    """Score `rows`, pairs (index into `queries`, `Change` or None).

    `everywhere`: changes act at every token (an edited weight); else at the last prompt token and
    later ones. `tokens` bounds the tokens of a batch. Inside `scale_neurons` or `edit_weights` the
    model is the one they make."""
    lm.check_ready()
    with computing(lm):
        if lm not in _CHECKED:
            _check(lm)
            _CHECKED.add(lm)
        return _score(lm, queries, rows, everywhere, tokens or token_budget(lm))


def _score(lm, queries, rows, everywhere: bool, tokens: int) -> Scores:
    by_query = _distinct(lm, queries, rows)
    kinds = [_kind(lm, group, everywhere) for group in by_query]
    scores = Scores.empty(len(rows))

    def score(tokens):
        for batch in equal_batches(kinds, tokens):
            kind = kinds[batch[0]]
            some = [by_query[place] for place in batch]
            _score_batch(lm, kind, some, tokens, scores)

    within_memory(score, tokens)
    return scores


def _distinct(lm, queries, rows) -> list[list[_Row]]:
    """The different rows of a call, those of a query together."""
    found: dict[tuple, _Row] = {}
    by_query: dict[int, list[_Row]] = {}
    for place, (query, change) in enumerate(rows):
        change = change if change is not None and change.neurons else None
        key = query, id(change)
        if key not in found:
            start = change.start if change else lm.num_layers
            found[key] = _Row(*queries[query], change, start)
            by_query.setdefault(query, []).append(found[key])
        found[key].places.append(place)
    return list(by_query.values())


def _kind(lm, rows: list[_Row], everywhere: bool) -> _Kind:
    """Of the query of `rows`. Without active scalings prompts of a batch may end anywhere."""
    last = len(rows[0].prompt) - 1
    changed = any(row.change for row in rows)
    prefix = last if changed and not everywhere else 0
    tokens = last + len(rows[0].target) - prefix
    first = last - prefix if lm.scales else 0
    return _Kind(tokens, prefix, first)


def equal_batches(kinds: list[tuple], tokens: int) -> Iterator[list[int]]:
    """The places of equal `kinds`, (tokens a row, ...), at most `tokens` tokens at a time."""
    order = sorted(range(len(kinds)), key=kinds.__getitem__)
    for kind, group in groupby(order, key=kinds.__getitem__):
        places = list(group)
        size = max(1, tokens // kind[0])
        for start in range(0, len(places), size):
            yield places[start : start + size]


def in_batches(lm, kinds: list[tuple], compute: Callable[[list[int]], Iterable]) -> list:
    """What `compute` gives for each place of `kinds`, asked for a batch of `equal_batches` at a
    time; smaller ones where memory runs out."""
    found: list = [None] * len(kinds)

    def run(tokens):
        for batch in equal_batches(kinds, tokens):
            for place, one in zip(batch, compute(batch)):
                found[place] = one

    with computing(lm):
        within_memory(run, token_budget(lm))
    return found


def token_budget(lm) -> int:
    """Tokens a batch of forward passes may hold: fixed on a CPU, from the model's size and the free
    memory on a GPU."""
    if lm.device.type != "cuda":
        return CPU_TOKENS
    free = torch.cuda.mem_get_info(lm.device)[0]
    width = lm.arch.head.weight.shape[1]  # the clean pass keeps every layer's input
    per_token = ((14 + lm.num_layers) * width + 5 * lm.num_neurons) * lm.dtype.itemsize
    return int(min(2**17, max(256, free // 4 // per_token)))


def _score_batch(lm, kind: _Kind, by_query: list[list[_Row]], tokens: int, scores) -> None:
    """Score all rows of some queries of one kind, so many tokens at a time."""
    texts = [[*group[0].prompt, *group[0].target[:-1]] for group in by_query]
    ids = torch.tensor(texts, device=lm.device)  # (Q, tokens before S, and S)
    rows = _in_order(by_query)
    starts = {row.start for row in rows if row.change}
    size = max(1, tokens // kind.tokens)
    with prompt_of(lm.scales, kind.prefix + kind.first + 1):
        clean = clean_pass(lm, ids, prefix=kind.prefix, layers=starts)
        for scaling in lm.scales:
            scaling.at(kind.tokens, kind.first)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            _read(lm, _run(lm, clean, part), part, scores)


def _in_order(by_query: list[list[_Row]]) -> list[_Row]:
    """The rows by the layer in which they leave the clean pass, those of a change together."""
    rows = []
    order: dict[int, int] = {}
    for slot, group in enumerate(by_query):
        for row in group:
            row.slot = slot
            order.setdefault(id(row.change), len(order))
            rows.append(row)
    return sorted(rows, key=lambda row: (row.start, order[id(row.change)]))


def _run(lm, clean: CleanPass, rows: list[_Row]) -> Tensor:
    """(R, S, d) output of the last layer for `rows`, sorted as by `_in_order`.

    A row joins the batch at its `entry`, the first layer that must be run for it: rows that are
    first changed in layers 2, 2 and 5 join at 2, 2 and 5 with the clean pass's input of that layer;
    where layers add what their MLPs write (`skip`), at 3, 3 and 6, with the clean output of the
    changed layer and the change added to it. Unchanged rows join at the end."""
    slots = torch.tensor([row.slot for row in rows], device=lm.device)
    skip = lm.adds_mlp_output  # then a row's first changed layer need not be run
    entry = [min(row.start + skip, lm.num_layers) for row in rows]
    hidden = clean.inputs[0][:0]  # no row yet
    for layer in range(entry[0], lm.num_layers + 1):
        new = slice(len(hidden), bisect_right(entry, layer))
        if new.start < new.stop:
            begun = clean.inputs[layer][slots[new]]
            if skip:
                _write(lm, clean, layer - 1, rows[new], begun)
            hidden = torch.cat([hidden, begun]) if len(hidden) else begun
        if layer < lm.num_layers:
            running = rows[: len(hidden)]
            with _changing(lm, layer, [row.change for row in running]):
                hidden = run_rows(lm, clean, layer, hidden, slots[: len(hidden)])
    return hidden


def _write(lm, clean: CleanPass, layer: int, rows: list[_Row], hidden: Tensor) -> None:
    """Add to the clean output `hidden` (R, S, d) of `layer`, the first that the changes of `rows`
    reach, what they make its neurons write."""
    first = 0
    for _, group in groupby(rows, key=lambda row: id(row.change)):
        slots = [row.slot for row in group]
        change = rows[first].change
        here = hidden[first : first + len(slots)]
        first += len(slots)
        if change is None:
            continue
        index = change.by_layer[layer]
        neurons = clean.neurons[layer][slots][..., index]  # (rows of the change, S, its neurons)
        if change.factor != 1.0:
            here.add_(neurons @ lm.value_vectors(layer)[index], alpha=change.factor - 1)
        if change.vector is not None:
            here.add_(neurons.sum(-1, keepdim=True) * change.vector.to(hidden))


def _changing(lm, layer: int, changes: list[Change | None]):
    """Inside, the down-projection of `layer` sees and gives what the rows' `changes` ask for: each
    changed activation times its factor and, added to the output, the row's vector times the sum of
    what they were. Of neurons 3 and 7 in row 0 and neuron 4 in row 2 the pairs are row = 0, 0, 2
    and neuron = 3, 7, 4."""
    row, neuron, factor = [], [], []  # of each pair of a row and a neuron
    vectors: dict[int, Tensor] = {}  # of the rows that add one
    for place, change in enumerate(changes):
        index = change.by_layer.get(layer) if change else None
        if index:
            row += [place] * len(index)
            neuron += index
            factor += [change.factor] * len(index)
            if change.vector is not None:
                vectors[place] = change.vector
    if not row:
        return nullcontext()
    row, neuron = torch.tensor([row, neuron], device=lm.device)
    writing = torch.tensor(list(vectors), dtype=torch.long, device=lm.device)
    sums = None  # (rows that add a vector, S)

    def before(_, args, kwargs):
        nonlocal sums
        x = args[0].reshape(len(changes), -1, lm.num_neurons)  # OPT flattens (R, S)
        values = x[row, :, neuron]  # (pairs, S)
        if vectors:
            sums = x.new_zeros(x.shape[:2]).index_add_(0, row, values)[writing]
        factors = torch.tensor(factor).to(x)  # (pairs,)
        x[row, :, neuron] = values * factors[:, None]
        return (x.reshape(args[0].shape),), kwargs

    def after(_, __, output):
        if not vectors:
            return output
        whole = output.reshape(len(changes), -1, output.shape[-1])  # (R, S, d)
        added = torch.stack(list(vectors.values())).to(whole)  # (rows that add one, d)
        whole = whole.index_add(0, writing, sums[..., None] * added[:, None])
        return whole.reshape(output.shape)

    return edited([lm.downs[layer]], before=before, after=after)


def _read(lm, hidden: Tensor, rows: list[_Row], scores: Scores) -> None:
    """Fill in what `rows` are asked for, from the last layer's output `hidden` (R, S, d)."""
    scored = []  # (row, token, target)
    for place, row in enumerate(rows):
        tokens = range(-len(row.target), 0)  # what is fed ends before the target's last token
        scored += zip([place] * len(tokens), tokens, row.target)
    row_of, token_of, gold = torch.tensor(scored, device=lm.device).T  # (K,) each
    log_p, best = token_scores(lm, hidden[row_of, token_of], gold)
    log_p = log_p.double().cpu().numpy()
    best = best.cpu().numpy()
    end = 0
    for row in rows:
        here = slice(end, end + len(row.target))
        end = here.stop
        if not np.isfinite(log_p[here]).all():
            refuse_numbers(lm, row.prompt)
        hits = best[here] == row.target
        for place in row.places:
            scores.log_probability[place] = log_p[here].sum()
            scores.exact[place] = hits.all()
            scores.match[place] = hits.mean()
            scores.greedy[place] = best[here].tolist()


def refuse_numbers(lm, prompt: list[int]):
    """ValueError for a prompt (token ids) that the model answers with numbers that are not
    finite."""
    text = lm.tokenizer.decode(prompt, skip_special_tokens=True)
    raise ValueError(
        f"{lm.name} gives infinite or NaN numbers for {text!r} in {lm.dtype}; try float32"
    )


def _check(lm) -> None:
    """`UnsupportedModel` for one whose layers cannot be run on rows of our own."""
    ids = torch.arange(8, device=lm.device).reshape(2, 4) % lm.num_embeddings
    queries = [(row[:3], row[3:]) for row in ids.tolist()]
    nothing = Change(lm, [(0, 0)])
    again = Change(lm, [(0, 0)])
    rows = [(1, nothing), (0, nothing), (1, again)]  # not as many as queries, nor in their order
    with sharply(lm) as tolerance:
        logits = lm.model(input_ids=ids[:, :-1], use_cache=False).logits[:, -1]
        logits = logits.to(lm.score_dtype)
        own = torch.log_softmax(logits, -1).gather(1, ids[:, -1:])
        own = own[[1, 0, 1], 0].double().cpu().numpy()
        limit = tolerance * max(1.0, float(logits.abs().max()))
        for everywhere in (True, False):
            found = _score(lm, queries, rows, everywhere, CPU_TOKENS).log_probability
            if not np.abs(found - own).max() <= limit:
                raise UnsupportedModel(
                    f"{lm.name} ({type(lm.model).__name__}): its layers do not give the model's "
                    "own probabilities when run row by row, so changes to its neurons would be "
                    "scored wrongly"
                )
