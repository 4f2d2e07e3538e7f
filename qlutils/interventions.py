"""Scoring answers while neurons are changed: one change for a whole context, or a different one in every row.

A *query* is (prompt ids, target ids); its score is teacher-forced. A *row* evaluates one query under one `Change`.
Queries of equal length share a batch, so there is no padding. What a change cannot reach is computed once a query
and shared by all its rows: the layers below the lowest changed neuron and, where changes begin at the last prompt
token, the keys and values of the tokens before it. Logits are computed at the scored positions only.

Shapes: Q queries, R rows, S tokens a row (after P tokens of shared prefix), d residual width, N neurons a layer.
"""

from __future__ import annotations

import inspect
import math
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .arch import UnsupportedModel, expand_call_argument
from .replay import _to_logits, final_hidden

LOGITS = 2**23  # logits held at once
CPU_TOKENS = 4096  # tokens of a batch on a CPU; measured: larger ones fall out of the processor's cache


class Change:
    """What a row does to the neurons `neurons`, at every token the row feeds: their activations are multiplied by
    `factor`, and `vector` (d,) times the sum of their activations is added to the MLP's output of their layer."""

    def __init__(self, lm, neurons, factor: float = 1.0, vector: Tensor | None = None):
        self.neurons, self.vector = lm.check_neurons(neurons), vector
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise ValueError(f"factor is {factor!r}; it must be a finite number (0 suppresses, 2 doubles)")
        self.factor = float(factor)
        self.by_layer: dict[int, list[int]] = {}
        for layer, index in self.neurons:
            self.by_layer.setdefault(layer, []).append(index)
        self.start = min(self.by_layer, default=lm.num_layers)


@dataclass
class Scores:
    """Of R rows: `log_probability` (R,) of the whole target, float64; `exact` (R,), whether every teacher-forced
    greedy token is the target's (then greedy decoding gives the target); `match` (R,), the share of tokens that
    are; `greedy`, those greedy tokens, a list a row."""

    log_probability: np.ndarray
    exact: np.ndarray
    match: np.ndarray
    greedy: list[list[int]]


def answer_probability(lm, prompts, answers, *, answer="all") -> Tensor:
    """P(answer | prompt) of Q queries, float32 (Q,) on the CPU: the product of the answer's teacher-forced token
    probabilities, or the first token's with `answer="first"`. Prompts may differ in length: no padding is used.

    Inside `scale_neurons` or `edit_weights` the changed model answers. ValueError names an unusable prompt."""
    if isinstance(prompts, str) or isinstance(answers, str):
        raise ValueError("prompts and answers are lists of texts, one answer a prompt; got a single text")
    prompts, answers = list(prompts), list(answers)
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; give one answer a prompt")
    if answer not in ("all", "first"):
        raise ValueError(f"answer {answer!r} is unknown; use all, first")
    queries = [lm.encode(p, a) for p, a in zip(prompts, answers)]
    scores = score_queries(lm, [(p, a if answer == "all" else a[:1]) for p, a in queries])
    return torch.from_numpy(np.exp(scores.log_probability)).float()


def scaled_answer_probabilities(lm, rows, *, answer="all") -> np.ndarray:
    """(R,) P(answer | prompt) for rows (prompt ids, answer ids, neurons, factor), each with its own set of neurons
    scaled at the last prompt token and every later one (float64). An empty set changes nothing."""
    queries, order, changes, plan = [], {}, {}, []
    for prompt, target, neurons, factor in rows:
        target = target if answer == "all" else target[:1]
        key = tuple(prompt), tuple(target)
        if key not in order:
            order[key] = len(queries)
            queries.append(key)
        name = frozenset(neurons), factor
        if name not in changes:
            changes[name] = Change(lm, neurons, factor)
        plan.append((order[key], changes[name]))
    return np.exp(score_rows(lm, queries, plan, everywhere=False).log_probability)


def score_queries(lm, queries, **options) -> Scores:
    """`score_rows` of each query once, unchanged."""
    return score_rows(lm, queries, [(q, None) for q in range(len(queries))], **options)


def greedy_answers(lm, prompts, lengths) -> list[list[int]]:
    """Greedy decoding of `lengths[i]` tokens after the prompt ids `prompts[i]`."""
    found: list[list[int]] = [[] for _ in prompts]
    for step in range(max(lengths, default=0)):
        going = [i for i, length in enumerate(lengths) if length > step]
        scores = score_queries(lm, [(prompts[i], [*found[i], 0]) for i in going])  # the 0 is never fed
        for i, greedy in zip(going, scores.greedy):
            found[i].append(greedy[-1])
    return found


# --- one change for everything inside a context ----------------------------------------------------------

@contextmanager
def scale_neurons(lm, neurons, factor):
    """Multiply the activations of `neurons`, (layer, index) pairs, by `factor` in every forward pass inside, at the
    last prompt token and every later one (section 3.1; 0 suppresses, 2 enhances).

        with scale_neurons(lm, {(3, 17), (4, 2)}, 0):
            p = answer_probability(lm, prompts, answers)
            text = lm.model.generate(**tokens)

    In a bare `lm.model(...)` the whole input is the prompt, its end read from a 2-D `attention_mask` on either
    padding side; a call that continues the cache of an earlier one inside the context is "later" throughout.
    Nested contexts compose. ValueError names a neuron outside the model. `attribute` cannot be used inside.
    """
    change = Change(lm, neurons, factor)
    watch = _Watch(lm, change)
    active = lm.__dict__.setdefault("scales", [])
    active.append(change)
    try:
        watch.__enter__()
        yield
    finally:
        watch.__exit__()
        active.remove(change)


class _Watch:
    """The hooks of one `scale_neurons`: on the body of the model, to learn which tokens are the prompt's, and on
    the down-projections, to scale."""

    def __init__(self, lm, change):
        self.lm, self.change, self.handles = lm, change, []
        self.seen = weakref.WeakSet()  # caches that already hold a prompt
        self.prompt_end = None  # inside `generate`: index of the last prompt token
        self.reach: Tensor | None = None  # (B, S) tokens to scale in the forward now running

    def __enter__(self):
        first = self.lm.layers[0]  # OPT's outer modules call the decoder past the base model's own forward
        body = next(m for m in self.lm.model.modules()
                    if any(isinstance(c, nn.ModuleList) and len(c) and c[0] is first for c in m.children()))
        self.signature = inspect.signature(body.forward)
        self.handles = [body.register_forward_pre_hook(self._before, with_kwargs=True),
                        body.register_forward_hook(self._after, with_kwargs=True, always_call=True)]
        for layer, index in self.change.by_layer.items():
            self.handles.append(self.lm.downs[layer].register_forward_pre_hook(self._scaler(index)))
        self.generate = self.lm.model.__dict__.get("generate")
        self.lm.model.generate = self._wrap(self.lm.model.generate)

    def __exit__(self):
        for handle in self.handles:
            handle.remove()
        if "generate" in self.lm.model.__dict__:
            del self.lm.model.generate
        if getattr(self, "generate", None) is not None:
            self.lm.model.generate = self.generate

    def _wrap(self, generate):
        def run(inputs=None, *args, **kwargs):
            tokens = next((t for t in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None)
            outer, self.prompt_end = self.prompt_end, tokens.shape[1] - 1 if tokens is not None else 0
            try:
                return generate(inputs, *args, **kwargs)
            finally:
                self.prompt_end = outer
        return run

    def _before(self, _, args, kwargs):
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given["inputs_embeds"]
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        batch, length = tokens.shape[:2]
        place = torch.arange(length, device=tokens.device).expand(batch, -1)
        past = cache.get_seq_length() if cache is not None else 0
        if self.prompt_end is not None:
            first = torch.full((batch, 1), self.prompt_end - past, device=tokens.device)
        elif past and cache in self.seen:
            first = torch.zeros(batch, 1, device=tokens.device)
        elif mask is None:
            first = torch.full((batch, 1), length - 1, device=tokens.device)
        elif isinstance(mask, Tensor) and mask.dim() == 2:
            first = (mask[:, -length:].to(tokens.device).bool() * place).amax(1, keepdim=True)
        else:
            raise ValueError("scale_neurons finds the last prompt token in a 2-D attention_mask (1 for a token, 0 for "
                             "padding); this forward pass was given another kind of mask")
        if cache is not None:
            self.seen.add(cache)
        self.reach = place >= first

    def _after(self, _, args, kwargs, output):
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, Cache):
            self.seen.add(cache)
        self.reach = None

    def _scaler(self, index):
        def hook(_, inputs):
            if self.lm.__dict__.get("scoring"):  # `score_rows` applies the active scales itself
                return None
            if self.reach is None:
                raise ValueError("scale_neurons acts on whole forward passes; attribute the neurons outside of it")
            x = inputs[0]
            factors = x.new_ones(x.shape[-1])
            factors[index] = self.change.factor
            reach = self.reach.to(x.device).reshape(*x.shape[:-1], 1)
            return (torch.where(reach, x * factors, x), *inputs[1:])
        return hook


# --- a change for every row ------------------------------------------------------------------------------

@dataclass
class _Shared:
    """What all rows of Q queries of equal length share, from one clean pass."""

    calls: list[tuple[tuple, dict]]  # each layer's call arguments after the hidden state
    inputs: list[Tensor]  # L + 1 tensors (Q, S, d): each layer's input, and the last one's output
    prefix: _RowCache | None


class _RowCache:
    """Stands in for the key-value cache: gives each row the clean prefix of its query and is never written to."""

    def __init__(self, layers):
        self.layers, self.index = layers, None  # index (R,): the query of each row

    def update(self, key, value, layer_idx, *_, **__):
        old_key, old_value = self.layers[layer_idx]  # (Q, Hkv, P, dh)
        return torch.cat([old_key[self.index], key], -2), torch.cat([old_value[self.index], value], -2)

    def get_seq_length(self, layer_idx=0):
        return self.layers[layer_idx][0].shape[-2]


@torch.no_grad()
def score_rows(lm, queries, rows, *, everywhere=False, tokens=None) -> Scores:
    """Score `rows`, pairs (index into `queries`, `Change` or None).

    `everywhere`: changes act at every token (an edited weight); else at the last prompt token and later ones.
    `tokens` bounds the tokens of a batch. Equal rows (same query, same `Change` object) are computed once."""
    if lm.__dict__.setdefault("rows_verified", False) is False:
        lm.rows_verified = None  # being verified
        _verify(lm)
        lm.rows_verified = True
    tokens = tokens or _token_budget(lm)
    plan: dict[tuple, list[int]] = {}
    for place, (query, change) in enumerate(rows):
        change = None if change is None or not change.by_layer else change
        plan.setdefault((query, id(change)), [change]).append(place)
    by_query: dict[int, list] = {}
    for (query, _), (change, *places) in plan.items():
        by_query.setdefault(query, []).append((change, places))
    groups: dict[tuple, list[int]] = {}
    for query in by_query:
        prompt, target = queries[query]
        prefix = 0 if everywhere or not (_scales(lm) or any(c for c, _ in by_query[query])) else len(prompt) - 1
        groups.setdefault((prefix, len(prompt) + len(target) - 1 - prefix), []).append(query)
    out = Scores(np.zeros(len(rows)), np.zeros(len(rows), bool), np.zeros(len(rows)), [[]] * len(rows))
    outer, lm.scoring = lm.__dict__.get("scoring"), True
    try:
        for (prefix, length), members in sorted(groups.items()):
            size = max(1, tokens // length)
            for start in range(0, len(members), size):
                part = members[start:start + size]
                _score_group(lm, queries, part, by_query, prefix, size, out)
    finally:
        lm.scoring = outer
    return out


def _scales(lm):
    return [change for change in lm.__dict__.get("scales", ()) if change.by_layer]


def _token_budget(lm) -> int:
    if lm.device.type != "cuda":
        return CPU_TOKENS
    free = torch.cuda.mem_get_info(lm.device)[0]
    per_token = (14 * lm.arch.head.weight.shape[1] + 5 * lm.num_neurons + lm.num_layers * 64) * lm.dtype.itemsize
    return int(min(2**17, max(256, free // 4 // per_token)))


def _score_group(lm, queries, members, by_query, prefix, size, out) -> None:
    ids = torch.tensor([[*queries[q][0], *queries[q][1][:-1]] for q in members], device=lm.device)
    shared = _clean(lm, ids, prefix)
    low = min([change.start for change in _scales(lm)], default=lm.num_layers)
    rows = [(local, change, min(low, change.start if change else lm.num_layers), places)
            for local, q in enumerate(members) for change, places in by_query[q]]
    rows.sort(key=lambda row: row[2])
    for start in range(0, len(rows), size):
        part = rows[start:start + size]
        hidden = _grow(lm, shared, part, [len(queries[members[local]][0]) - 1 - prefix for local, *_ in part])
        _read(lm, hidden, [queries[members[local]] for local, *_ in part], prefix, [places for *_, places in part], out)


def _clean(lm, ids, prefix) -> _Shared:
    """Run the `prefix` first tokens of `ids` into a cache, then the rest, recording how each layer is called."""
    cache = None
    if prefix:
        cache = DynamicCache()
        lm.model.base_model(input_ids=ids[:, :prefix], past_key_values=cache, use_cache=True)
        kept = _RowCache([(layer.keys, layer.values) for layer in cache.layers])
    calls, inputs, last = [], [], []

    def before(_, args, kwargs):
        inputs.append(args[0] if args else kwargs["hidden_states"])
        calls.append((tuple(args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in lm.layers]
    handles.append(lm.layers[-1].register_forward_hook(
        lambda _, __, output: last.append(output[0] if isinstance(output, tuple) else output)))
    try:
        lm.model.base_model(input_ids=ids[:, prefix:], past_key_values=cache, use_cache=bool(prefix))
    finally:
        for handle in handles:
            handle.remove()
    return _Shared(calls, [*inputs, last[0]], kept if prefix else None)


def _grow(lm, shared: _Shared, rows, prompt_ends) -> Tensor:
    """(R, S, d) output of the last layer for `rows`, sorted by the layer in which they leave the clean pass."""
    index = torch.tensor([local for local, *_ in rows], device=lm.device)
    starts = np.array([start for _, _, start, _ in rows])
    hidden = None
    for layer in range(int(starts[0]), lm.num_layers):
        running = int(np.searchsorted(starts, layer, "right"))
        begun = 0 if hidden is None else hidden.shape[0]
        if running > begun:
            new = shared.inputs[layer][index[begun:running]]
            hidden = new if hidden is None else torch.cat([hidden, new])
        with _changed(lm, layer, rows[:running], prompt_ends, hidden.shape[1]):
            hidden = _run_layer(lm, shared, layer, hidden, index[:running])
    begun = 0 if hidden is None else hidden.shape[0]
    if begun < len(rows):  # rows that change nothing
        new = shared.inputs[-1][index[begun:]]
        hidden = new if hidden is None else torch.cat([hidden, new])
    return hidden


def _run_layer(lm, shared, layer, hidden, index):
    if shared.prefix is not None:
        shared.prefix.index = index
    queries = shared.inputs[0].shape[0]

    def fit(key, value):
        if isinstance(value, Cache):
            return shared.prefix
        if isinstance(value, tuple):
            return tuple(fit(key, v) for v in value)
        if isinstance(value, Tensor) and value.dim() == 1:  # positions, equal for all rows
            return value
        return expand_call_argument(key, value, queries, hidden.shape[0], lm.num_heads)

    args, kwargs = shared.calls[layer]
    out = lm.layers[layer](hidden, *[fit(None, a) for a in args], **{k: fit(k, v) for k, v in kwargs.items()})
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def _changed(lm, layer, rows, prompt_ends, length):
    """Inside, the down-projection of `layer` sees and gives what each row's change asks for."""
    place = [(row, index, change) for row, (_, change, *_) in enumerate(rows)
             if change and (index := change.by_layer.get(layer))]
    scales = [change for change in _scales(lm) if layer in change.by_layer]
    if not place and not scales:
        yield
        return
    as_index = lambda parts: torch.tensor(np.concatenate(parts), device=lm.device)  # noqa: E731
    added = None

    def before(_, inputs):
        nonlocal added
        x = inputs[0].reshape(-1, length, inputs[0].shape[-1]).clone()  # OPT flattens batch and sequence
        for change in scales:
            for row, end in enumerate(prompt_ends[:len(rows)]):
                x[row, end:, change.by_layer[layer]] *= change.factor
        adding = [(row, index, change) for row, index, change in place if change.vector is not None]
        if adding:
            flat = as_index([index for _, index, _ in adding])
            owner = as_index([[k] * len(index) for k, (_, index, _) in enumerate(adding)])
            who = torch.tensor([row for row, *_ in adding], device=lm.device)
            total = x.new_zeros(len(adding), length).index_add_(0, owner, x[who[owner], :, flat])
            added = who, total[..., None] * torch.stack([c.vector for *_, c in adding]).to(x)[:, None]
        scaled = [(row, index, change) for row, index, change in place if change.factor != 1.0]
        if scaled:
            flat = as_index([index for _, index, _ in scaled])
            who = as_index([[row] * len(index) for row, index, _ in scaled])
            factor = as_index([[change.factor] * len(index) for _, index, change in scaled]).to(x)
            x[who, :, flat] = x[who, :, flat] * factor[:, None]
        return (x.reshape(inputs[0].shape),)

    def after(_, __, output):
        if added is None:
            return output
        who, vectors = added
        return output.reshape(-1, length, output.shape[-1]).index_add(0, who, vectors).reshape(output.shape)

    handles = [lm.downs[layer].register_forward_pre_hook(before), lm.downs[layer].register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(lm, hidden, queries, prefix, places, out: Scores) -> None:
    """Fill `out` from the last layer's output `hidden` (R, S, d) of rows that score `queries`."""
    counts = [len(target) for _, target in queries]
    who = np.repeat(np.arange(len(queries)), counts)
    at = np.concatenate([np.arange(len(target)) + len(prompt) - 1 - prefix for prompt, target in queries])
    target = torch.tensor([token for _, tokens in queries for token in tokens], device=lm.device)
    picked = hidden[torch.from_numpy(who).to(lm.device), torch.from_numpy(at).to(lm.device)]
    size, log_p, best = max(1, LOGITS // lm.arch.head.weight.shape[0]), [], []
    for part, gold in zip(picked.split(size), target.split(size)):
        logits, _ = _to_logits(lm.arch.head(final_hidden(lm, part)).to(lm.score_dtype), lm.arch.scale, lm.arch.softcap)
        log_p.append(logits.gather(1, gold[:, None])[:, 0] - torch.logsumexp(logits, -1))
        best.append(logits.argmax(-1))
    log_p, best = torch.cat(log_p).double().cpu().numpy(), torch.cat(best).cpu().numpy()
    if not np.isfinite(log_p).all():
        raise ValueError(f"{lm.name} gives infinite or NaN logits in {lm.dtype}; load it in float32")
    hits = best == target.cpu().numpy()
    for row, (end, count) in enumerate(zip(np.cumsum(counts), counts)):
        part = slice(end - count, end)
        for place in places[row]:
            out.log_probability[place], out.match[place] = log_p[part].sum(), hits[part].mean()
            out.exact[place], out.greedy[place] = hits[part].all(), best[part].tolist()


def _verify(lm) -> None:
    """Refuse, by name, a model whose layers cannot be run on rows of our own; once a model."""
    ids = torch.arange(8, device=lm.device).reshape(2, 4) % lm.arch.head.weight.shape[0]
    queries = [(row[:3], row[3:]) for row in ids.tolist()]
    own = torch.log_softmax(lm.model(input_ids=ids[:, :-1], use_cache=False).logits[:, -1].to(lm.score_dtype), -1)
    own = own.gather(1, ids[:, -1:])[:, 0].double().cpu().numpy()
    nothing = Change(lm, [(0, 0)], 1.0)
    for everywhere in (True, False):
        scores = score_rows(lm, queries, [(0, nothing), (1, nothing)], everywhere=everywhere)
        if not np.allclose(scores.log_probability, own, rtol=1e-2, atol=1e-2 if lm.dtype.itemsize > 2 else 0.2):
            raise UnsupportedModel(f"{lm.name} ({type(lm.model).__name__}): its layers do not give the model's own "
                                   "probabilities when run row by row, so changes to its neurons would be scored wrongly")
