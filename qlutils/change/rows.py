"""Scoring answers with a different change of the neurons in every row of a batch.

A *query* is (prompt ids, target ids), scored by teacher forcing. A *row* evaluates one query under
one `Change`. Queries of equal length share a batch, so there is no padding. What a change cannot
reach is computed once a query and shared by all its rows: the layers below the lowest changed
neuron and, where changes begin at the last prompt token, the keys and values of the tokens before
it. Logits are computed at scored positions only.

Shapes: Q queries, R rows, S tokens a row (after P tokens of shared prefix), K scored tokens, d
residual width, N neurons a layer, L layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from qlutils.change.changes import Change, layers_run, prompt_of
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.check import sharply
from qlutils.model.passes import (
    call_layer,
    computing,
    final_hidden,
    hooked,
    to_logits,
    within_memory,
)

LOGITS = 2**23  # logits held at once
CPU_TOKENS = 2048  # tokens of a batch on a CPU; from 1,024 on the time is flat
_CHECKED: WeakSet = WeakSet()  # models of which `_check` found that layers run on rows


class Scores:
    """Of R rows: `log_probability` (R,) of the whole target, float64; `exact` (R,), whether every
    teacher-forced greedy token is the target's (then greedy decoding gives the target); `match`
    (R,), the share of tokens that are; `greedy`, those greedy tokens, a list a row."""

    def __init__(self, rows: int):
        self.log_probability = np.zeros(rows)
        self.exact = np.zeros(rows, bool)
        self.match = np.zeros(rows)
        self.greedy: list[list[int]] = [[]] * rows


@dataclass
class _Row:
    """Equal rows of a call (same query, same `Change` object), computed once."""

    query: int  # of the call's queries
    change: Change | None
    places: list[int] = field(default_factory=list)  # of the call's rows
    slot: int = 0  # of the query in its batch


@dataclass
class _Clean:
    """What one pass over Q queries of equal length leaves behind for their rows."""

    calls: list[tuple[tuple, dict]]  # each layer's call arguments after the hidden state
    inputs: list[Tensor]  # L + 1 of (Q, S, d): each layer's input, and the last one's output
    neurons: dict[int, Tensor]  # (Q, S, N) of the layers in which rows begin to differ
    prefix: _RowCache | None
    first: int  # of the S tokens the prompt's last


class _RowCache:
    """Stands in for the key-value cache: gives each row its query's prefix, is never written to."""

    def __init__(self, cache: DynamicCache):
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.slots: Tensor | None = None  # (R,) of each row's query

    def update(self, key, value, layer_idx, *_, **__):
        old_key, old_value = self.layers[layer_idx]  # (Q, Hkv, P, dh)
        key = torch.cat([old_key[self.slots], key], -2)  # (R, Hkv, P + S, dh)
        return key, torch.cat([old_value[self.slots], value], -2)

    def get_seq_length(self, layer_idx=0):
        return self.layers[layer_idx][0].shape[-2]


def score_queries(lm, queries, **options) -> Scores:
    """`score_rows` of each query once, unchanged."""
    return score_rows(lm, queries, [(q, None) for q in range(len(queries))], **options)


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
        return _score(lm, queries, rows, everywhere, tokens)


def _score(lm, queries, rows, everywhere, tokens=None) -> Scores:
    by_query = _distinct(rows)
    members, kinds, scores = list(by_query), [], Scores(len(rows))
    for query in members:
        prompt, target = queries[query]
        changed = any(row.change for row in by_query[query])
        prefix = len(prompt) - 1 if changed and not everywhere else 0
        first = len(prompt) - 1 - prefix if lm.scales else 0  # else prompts of a batch may differ
        kinds.append((len(prompt) + len(target) - 1 - prefix, prefix, first))

    def score(tokens):
        for batch in equal_batches(kinds, tokens):
            _, prefix, first = kinds[batch[0]]
            batch = [members[place] for place in batch]
            clean, found = _clean_pass(lm, queries, batch, by_query, prefix, first)
            size = max(1, tokens // clean.inputs[0].shape[1])
            for start in range(0, len(found), size):
                _score_batch(lm, queries, clean, found[start : start + size], scores)

    within_memory(score, tokens or token_budget(lm))
    return scores


def _distinct(rows) -> dict[int, list[_Row]]:
    """The different rows of a call by their query."""
    found: dict[tuple, _Row] = {}
    by_query: dict[int, list[_Row]] = {}
    for place, (query, change) in enumerate(rows):
        change = change if change is not None and change.neurons else None
        key = query, id(change)
        if key not in found:
            found[key] = _Row(query, change)
            by_query.setdefault(query, []).append(found[key])
        found[key].places.append(place)
    return by_query


def equal_batches(kinds: list[tuple], tokens: int) -> Iterator[list[int]]:
    """Places of equal entries of `kinds`, (tokens a row, ...), so many tokens at a time at most."""
    order = sorted(range(len(kinds)), key=kinds.__getitem__)
    for (length, *_), group in groupby(order, key=kinds.__getitem__):
        group, size = list(group), max(1, tokens // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def token_budget(lm) -> int:
    """Tokens a batch of forward passes may hold: fixed on a CPU, from the model's size and the free
    memory on a GPU."""
    if lm.device.type != "cuda":
        return CPU_TOKENS
    free = torch.cuda.mem_get_info(lm.device)[0]
    width = lm.arch.head.weight.shape[1]  # the clean pass keeps every layer's input
    per_token = ((14 + lm.num_layers) * width + 5 * lm.num_neurons) * lm.dtype.itemsize
    return int(min(2**17, max(256, free // 4 // per_token)))


# --- the pass that rows share --------------------------------------------------------------------


def _clean_pass(lm, queries, batch, by_query, prefix, first) -> tuple[_Clean, list[_Row]]:
    """The pass over the queries `batch`, the `prefix` first tokens into a cache; and their rows,
    by the layer they begin in, those of a change together."""
    rows, order = [], {}
    for slot, query in enumerate(batch):
        for row in by_query[query]:
            row.slot = slot
            order.setdefault(id(row.change), len(order))
            rows.append(row)
    rows.sort(key=lambda row: (_start(lm, row), order[id(row.change)]))
    texts = [[*queries[query][0], *queries[query][1][:-1]] for query in batch]
    ids, cache = torch.tensor(texts, device=lm.device), DynamicCache() if prefix else None
    clean = _Clean([], [], {}, None, first)
    with prompt_of(lm.scales, prefix + first + 1):
        if prefix:
            lm.model.base_model(input_ids=ids[:, :prefix], use_cache=True, cache=cache)
            clean.prefix = _RowCache(cache)
        starts = {row.change.start for row in rows if row.change}
        with hooked(_recording(lm, clean, ids.shape[1] - prefix, starts)):
            lm.model.base_model(input_ids=ids[:, prefix:], use_cache=bool(prefix), cache=cache)
    return clean, rows


def _start(lm, row: _Row) -> int:
    """The layer in which a row leaves the clean pass."""
    return row.change.start if row.change else lm.num_layers


def _recording(lm, clean: _Clean, tokens: int, starts: set[int]):
    """Hooks that fill `clean` in a pass over (Q, `tokens`), with the neurons of layers `starts`."""

    def call(_, args, kwargs):
        kwargs = dict(kwargs)
        clean.inputs.append(args[0] if args else kwargs.pop("hidden_states"))
        clean.calls.append((tuple(args[1:]), kwargs))

    def output(_, __, output):
        clean.inputs.append(output[0] if isinstance(output, tuple) else output)

    def neurons(layer):
        def keep(_, inputs):
            clean.neurons[layer] = inputs[0].reshape(-1, tokens, lm.num_neurons)

        return keep

    for layer in lm.layers:
        yield layer.register_forward_pre_hook(call, with_kwargs=True)
    for layer in starts:
        yield lm.downs[layer].register_forward_pre_hook(neurons(layer))
    yield lm.layers[-1].register_forward_hook(output)


# --- rows -----------------------------------------------------------------------------------------


def _score_batch(lm, queries, clean: _Clean, rows: list[_Row], scores: Scores) -> None:
    scored = []  # (row, token)
    tokens = clean.inputs[0].shape[1]
    for place, row in enumerate(rows):
        count = len(queries[row.query][1])  # the last tokens of what is fed
        scored += [(place, token) for token in range(tokens - count, tokens)]
    who, at = torch.tensor(scored, device=lm.device).T  # (K,) each
    hidden = _run_rows(lm, clean, rows, who, at)
    _read(lm, hidden[who, at], queries, rows, scores)


def _run_rows(lm, clean: _Clean, rows, who, at) -> Tensor:
    """(R, S, d) output of the last layer for `rows`, sorted by the layer in which they leave the
    clean pass. Of use at the scored tokens only: tokens `at` of rows `who`."""
    slots = torch.tensor([row.slot for row in rows], device=lm.device)
    skip = lm.adds_mlp_output  # then a row's first changed layer need not be run
    entry = [min(_start(lm, row) + skip, lm.num_layers) for row in rows]
    hidden = clean.inputs[0][:0]  # no row yet
    for layer in range(entry[0], lm.num_layers + 1):
        new = slice(len(hidden), bisect_right(entry, layer))
        if new.start < new.stop:
            begun = clean.inputs[layer][slots[new]]
            if skip:
                _write(lm, clean, layer - 1, rows[new], begun)
            hidden = torch.cat([hidden, begun]) if len(hidden) else begun
        if layer < lm.num_layers and len(hidden):
            running = rows[: len(hidden)]
            hidden = _run_layer(lm, clean, layer, hidden, running, slots[: len(hidden)], who, at)
    return hidden


def _write(lm, clean: _Clean, layer, rows, hidden) -> None:
    """Add to the clean output `hidden` (R, S, d) of `layer`, in which `rows` begin to differ, what
    their changes make its neurons write."""
    first = 0
    for _, group in groupby(rows, key=lambda row: id(row.change)):
        group = list(group)
        change, here = group[0].change, slice(first, first + len(group))
        first = here.stop
        if change is None:
            continue
        neurons = change.by_layer[layer]
        values = clean.neurons[layer][[row.slot for row in group]][..., neurons]  # (rows, S, n)
        if change.factor != 1.0:
            vectors = lm.value_vectors(layer)[neurons]  # (n, d)
            hidden[here].add_(values @ vectors, alpha=change.factor - 1)
        if change.vector is not None:
            hidden[here].add_(values.sum(-1, keepdim=True) * change.vector.to(hidden))


def _run_layer(lm, clean: _Clean, layer, hidden, rows, slots, who, at) -> Tensor:
    """Output (R, S, d) of `layer` for `hidden` (R, S, d) of `rows`.

    Nothing after the last attention looks at other places than the scored ones, so there, where
    that is less work, the MLP runs at those alone."""
    changes, tokens, first = [row.change for row in rows], hidden.shape[1], clean.first
    mlp, handles = lm.arch.mlps[layer], ()
    if layer == lm.num_layers - 1 and 2 * len(who) < len(rows) * tokens and mlp is not None:
        here = who < len(rows)
        who, at = who[here], at[here]
        handles = _only_at(mlp, who, at)
        changes, tokens, first = [changes[row] for row in who.tolist()], 1, 0
    if clean.prefix is not None:
        clean.prefix.slots = slots
    handles = chain(handles, _changing(lm, layer, changes))
    with layers_run(lm.scales, tokens, first), hooked(handles):
        queries = len(clean.inputs[0])
        return call_layer(lm, layer, hidden, clean.calls[layer], clean.prefix, queries, slots)


def _changing(lm, layer, changes: list[Change | None]):
    """Hooks with which the down-projection of `layer` sees and gives what `changes` ask for, one
    for each entry of its batch: a row, or one scored token."""
    row, neuron, factor, added = [], [], [], {}
    for place, change in enumerate(changes):
        index = change.by_layer.get(layer, []) if change else []
        row += [place] * len(index)
        neuron += index
        factor += [change.factor] * len(index) if change else []
        if index and change.vector is not None:
            added[place] = change.vector
    if not row:
        return
    row, neuron = (torch.tensor(one, device=lm.device) for one in (row, neuron))
    sums = None

    def before(_, inputs):
        nonlocal sums
        x = inputs[0].reshape(len(changes), -1, inputs[0].shape[-1])  # OPT flattens (R, S)
        values = x[row, :, neuron]  # (pairs of a row and a neuron, S)
        if added:
            sums = x.new_zeros(x.shape[:2]).index_add_(0, row, values)[list(added)]
        x[row, :, neuron] = values * torch.tensor(factor).to(x)[:, None]
        return (x.reshape(inputs[0].shape),)

    def after(_, __, output):
        vectors = torch.stack(list(added.values())).to(output)
        write = sums[..., None] * vectors[:, None]  # (rows with a vector, S, d)
        whole = output.reshape(len(changes), -1, output.shape[-1])
        return whole.index_add(0, torch.tensor(list(added)).to(row), write).reshape(output.shape)

    yield lm.downs[layer].register_forward_pre_hook(before)
    if added:
        yield lm.downs[layer].register_forward_hook(after)


def _only_at(mlp, who, at):
    """Hooks with which `mlp` runs at tokens `at` of rows `who` of its input (R, S, d) and gives 0
    elsewhere."""
    shape = None

    def before(_, inputs):
        nonlocal shape
        shape = inputs[0].shape
        return tuple(
            one[who, at][None] if isinstance(one, Tensor) and one.shape == shape else one
            for one in inputs
        )

    def after(_, __, output):
        whole = output.new_zeros(*shape[:-1], output.shape[-1])
        whole[who, at] = output[0]
        return whole

    yield mlp.register_forward_pre_hook(before)
    yield mlp.register_forward_hook(after)


def _read(lm, hidden, queries, rows, scores: Scores) -> None:
    """Fill `scores` from the last layer's output `hidden` (K, d) at the scored tokens of `rows`."""
    targets = [queries[row.query][1] for row in rows]
    gold = torch.tensor(list(chain.from_iterable(targets)), device=lm.device)
    size, log_p, best = max(1, LOGITS // lm.arch.head.weight.shape[0]), [], []
    for part, own in zip(hidden.split(size), gold.split(size)):
        logits = lm.arch.head(final_hidden(lm, part)).to(lm.score_dtype)
        logits, _ = to_logits(logits, lm.arch.scale, lm.arch.softcap)
        log_p.append(logits.gather(1, own[:, None])[:, 0] - torch.logsumexp(logits, -1))
        best.append(logits.argmax(-1))
    log_p, best = torch.cat(log_p).double().cpu().numpy(), torch.cat(best).cpu().numpy()
    end = 0
    for row, target in zip(rows, targets):
        here = slice(end, end + len(target))
        end = here.stop
        if not np.isfinite(log_p[here]).all():
            refuse_numbers(lm, queries[row.query][0])
        hits = best[here] == target
        for place in row.places:
            scores.log_probability[place] = log_p[here].sum()
            scores.exact[place], scores.match[place] = hits.all(), hits.mean()
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
    nothing, again = Change(lm, [(0, 0)]), Change(lm, [(0, 0)])
    rows = [(1, nothing), (0, nothing), (1, again)]  # not as many as queries, nor in their order
    with sharply(lm) as tolerance:
        logits = lm.model(input_ids=ids[:, :-1], use_cache=False).logits[:, -1].to(lm.score_dtype)
        own = torch.log_softmax(logits, -1).gather(1, ids[:, -1:])[:, 0].double().cpu().numpy()
        limit = tolerance * max(1.0, float(logits.abs().max()))
        for everywhere in (True, False):
            found = _score(lm, queries, rows, everywhere).log_probability
            if not np.abs(found - own[[1, 0, 1]]).max() <= limit:
                raise UnsupportedModel(
                    f"{lm.name} ({type(lm.model).__name__}): its layers do not give the model's "
                    "own probabilities when run row by row, so changes to its neurons would be "
                    "scored wrongly"
                )
