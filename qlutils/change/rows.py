"""Scoring answers with a different change of the neurons in every row of a batch.

A *query* is (prompt ids, target ids), scored by teacher forcing. A *row* evaluates one query under
one `Change`. Queries of equal length share a batch, so there is no padding. What a change cannot
reach is computed once a query and shared by all its rows: the layers below the lowest changed
neuron and, where changes begin at the last prompt token, the keys and values of the tokens before
it. Logits are computed at scored positions only.

Shapes: Q queries, R rows, S tokens a row (after P tokens of shared prefix), d residual width, N
neurons a layer.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from qlutils.model.answer import token_scores
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.check import sharply
from qlutils.model.passes import CleanPass, clean_pass, computing, run_rows, within_memory
from qlutils.model.trace import hooked

CPU_TOKENS = 2048  # tokens of a batch on a CPU; from 1,024 on the time is flat


class Change:
    """What a row does to the neurons `neurons`, at every token the row feeds: their activations are
    multiplied by `factor`, and `vector` (d,) times the sum of their activations is added to the
    MLP's output of their layer."""

    def __init__(self, lm, neurons, factor: float = 1.0, vector: Tensor | None = None):
        self.neurons, self.vector = lm.check_neurons(neurons), vector
        self.factor = check_factor(lm, factor)
        self.by_layer: dict[int, list[int]] = {}
        for layer, index in self.neurons:
            self.by_layer.setdefault(layer, []).append(index)
        self.start = min(self.by_layer, default=lm.num_layers)


def check_factor(lm, factor) -> float:
    """`factor` as a float; ValueError for what is no finite number of the model's dtype."""
    largest = torch.finfo(lm.dtype).max
    if isinstance(factor, bool) or not isinstance(factor, Real) or not abs(factor) <= largest:
        raise ValueError(
            f"factor is {factor!r}; it must be a finite number of at most {largest:.0e} in "
            f"magnitude, what "
            f"{lm.dtype} holds (0 suppresses, 2 doubles)"
        )
    return float(factor)


@dataclass
class Scores:
    """Of R rows: `log_probability` (R,) of the whole target, float64; `exact` (R,), whether every
    teacher- forced greedy token is the target's (then greedy decoding gives the target); `match`
    (R,), the share of tokens that are; `greedy`, those greedy tokens, a list a row."""

    log_probability: np.ndarray
    exact: np.ndarray
    match: np.ndarray
    greedy: list[list[int]]


@torch.no_grad()
def score_rows(lm, queries, rows, *, everywhere=False, tokens=None) -> Scores:
    """Score `rows`, pairs (index into `queries`, `Change` or None).

    `everywhere`: changes act at every token (an edited weight); else at the last prompt token and
    later ones. `tokens` bounds the tokens of a batch. Equal rows (same query, same `Change` object)
    are computed once."""
    lm.check_ready()
    with computing(lm):
        if not lm.__dict__.get("rows_verified"):
            _verify(lm)
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
        changed = _scales(lm) or any(change for change, _ in by_query[query])
        prefix = len(prompt) - 1 if changed and not everywhere else 0
        groups.setdefault((prefix, len(prompt) + len(target) - 1 - prefix), []).append(query)
    out = Scores(
        np.zeros(len(rows)), np.zeros(len(rows), bool), np.zeros(len(rows)), [[]] * len(rows)
    )

    def score(tokens):
        for (prefix, length), members in sorted(groups.items()):
            size = max(1, tokens // length)
            for start in range(0, len(members), size):
                _score_group(
                    lm, queries, members[start : start + size], by_query, prefix, size, out
                )

    with computing(lm), scoring(lm):
        within_memory(score, tokens or token_budget(lm))
    return out


def score_queries(lm, queries, **options) -> Scores:
    """`score_rows` of each query once, unchanged."""
    return score_rows(lm, queries, [(q, None) for q in range(len(queries))], **options)


def _scales(lm):
    return [change for change in lm.scales if change.by_layer]


def token_budget(lm) -> int:
    """Tokens a batch of forward passes may hold: fixed on a CPU, from the model's size and the free
    memory on a GPU."""
    if lm.device.type != "cuda":
        return CPU_TOKENS
    free = torch.cuda.mem_get_info(lm.device)[0]
    width = lm.arch.head.weight.shape[1]  # the clean pass keeps every layer's input
    per_token = ((14 + lm.num_layers) * width + 5 * lm.num_neurons) * lm.dtype.itemsize
    return int(min(2**17, max(256, free // 4 // per_token)))


def _score_group(lm, queries, members, by_query, prefix, size, out) -> None:
    ids = torch.tensor([[*queries[q][0], *queries[q][1][:-1]] for q in members], device=lm.device)
    starts = {change.start for q in members for change, _ in by_query[q] if change}
    shared = clean_pass(lm, ids, prefix=prefix, layers=starts)
    low = min([change.start for change in _scales(lm)], default=lm.num_layers)
    rows = [
        (local, change, min(low, change.start if change else lm.num_layers), places)
        for local, q in enumerate(members)
        for change, places in by_query[q]
    ]
    seen = {id(change): place for place, (_, change, *_) in enumerate(rows)}
    rows.sort(
        key=lambda row: (row[2], seen[id(row[1])])
    )  # by the layer they begin in, a change's rows together
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        scored = [queries[members[local]] for local, *_ in part]
        first = [len(prompt) - 1 - prefix for prompt, _ in scored]
        who = np.repeat(np.arange(len(part)), [len(target) for _, target in scored])
        at = np.concatenate(
            [np.arange(begin, begin + len(target)) for begin, (_, target) in zip(first, scored)]
        )
        who, at = (torch.from_numpy(one).to(lm.device) for one in (who, at))
        hidden = _grow(lm, shared, part, first, who, at)
        _read(lm, hidden[who, at], scored, [places for *_, places in part], out)


def _grow(lm, shared: CleanPass, rows, prompt_ends, who, at) -> Tensor:
    """(R, S, d) output of the last layer for `rows`, sorted by the layer in which they leave the
    clean pass; of use at the scored places only, tokens `at` of rows `who`, since nothing after the
    last attention looks elsewhere."""
    index = torch.tensor([local for local, *_ in rows], device=lm.device)
    starts = np.array([start for _, _, start, _ in rows])
    skip = lm.adds_mlp_output and not _scales(
        lm
    )  # then a row's first changed layer need not be run
    entry = np.minimum(starts + skip, lm.num_layers)
    hidden = None
    for layer in range(int(entry[0]), lm.num_layers + 1):
        running = int(np.searchsorted(entry, layer, "right"))
        begun = 0 if hidden is None else hidden.shape[0]
        if running > begun:
            new = shared.inputs[layer][index[begun:running]]
            if skip:
                _write(lm, shared, layer - 1, rows[begun:running], index[begun:running], new)
            hidden = new if hidden is None else torch.cat([hidden, new])
        if hidden is not None and layer < lm.num_layers:
            few = layer == lm.num_layers - 1 and 2 * len(who) < hidden.shape[0] * hidden.shape[1]
            scored = (who, at) if few and lm.arch.mlps[layer] is not None else None
            with _changed(lm, layer, rows[:running], prompt_ends, scored):
                hidden = run_rows(lm, shared, layer, hidden, index[:running])
    return hidden


def _write(lm, shared, layer, rows, index, hidden) -> None:
    """Add to the clean output `hidden` (R, S, d) of `layer` what the changes of `rows` make its
    neurons write."""
    first = 0
    for _, group in groupby(rows, key=lambda row: id(row[1])):
        count, change = len(group := list(group)), group[0][1]
        here, first = slice(first, first + count), first + count
        if change is None or group[0][2] != layer:
            continue
        neurons = change.by_layer[layer]
        activation = shared.neurons[layer][index[here]][
            ..., neurons
        ]  # (rows of the change, S, neurons)
        if change.factor != 1.0:
            hidden[here].add_(
                activation @ lm.value_vectors(layer)[neurons], alpha=change.factor - 1
            )
        if change.vector is not None:
            hidden[here].add_(activation.sum(-1, keepdim=True) * change.vector.to(hidden))


@contextmanager
def _changed(lm, layer, rows, prompt_ends, scored):
    """Inside, the down-projection of `layer` sees and gives what each row's change asks for. With
    `scored` (rows, tokens) the layer's MLP runs at those places only, its output being 0
    elsewhere."""
    handles, owners, length = (), range(len(rows)), -1
    if (
        scored is not None
    ):  # then what is a row here is one scored token, and all of them come after the prompt's end
        of, at = (one[scored[0] < len(rows)] for one in scored)
        handles, owners, length = _only_at(lm.arch.mlps[layer], of, at), of.tolist(), 1
        prompt_ends = [0] * len(owners)
    place = [
        (row, index, change)
        for row, owner in enumerate(owners)
        if (change := rows[owner][1]) and (index := change.by_layer.get(layer))
    ]
    scales = [change for change in _scales(lm) if layer in change.by_layer]
    as_index = lambda parts: torch.tensor(np.concatenate(parts), device=lm.device)  # noqa: E731
    added = None

    def before(_, inputs):
        nonlocal added
        x = inputs[0].reshape(
            len(owners), length, inputs[0].shape[-1]
        )  # OPT flattens batch and sequence
        for change in scales:
            for row, end in zip(range(len(owners)), prompt_ends):
                x[row, end:, change.by_layer[layer]] *= change.factor
        adding = [(row, index, change) for row, index, change in place if change.vector is not None]
        if adding:
            flat = as_index([index for _, index, _ in adding])
            owner = as_index([[k] * len(index) for k, (_, index, _) in enumerate(adding)])
            who = torch.tensor([row for row, *_ in adding], device=lm.device)
            total = x.new_zeros(len(adding), x.shape[1]).index_add_(
                0, owner, x[who[owner], :, flat]
            )
            added = (
                who,
                total[..., None] * torch.stack([c.vector for *_, c in adding]).to(x)[:, None],
            )
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
        return (
            output.reshape(len(owners), -1, output.shape[-1])
            .index_add(0, who, vectors)
            .reshape(output.shape)
        )

    def changing():
        yield from handles
        if place or scales:
            yield lm.downs[layer].register_forward_pre_hook(before)
            yield lm.downs[layer].register_forward_hook(after)

    with hooked(changing()):
        yield


def _only_at(mlp, who, at):
    """Hooks, registered one by one, with which `mlp` runs at tokens `at` of rows `who` of its input
    (R, S, d) and gives 0 elsewhere."""
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


def _read(lm, picked, queries, places, out: Scores) -> None:
    """Fill `out` from the last layer's output `picked` (scored tokens, d) of rows that score
    `queries`."""
    counts = [len(target) for _, target in queries]
    target = torch.tensor([token for _, tokens in queries for token in tokens], device=lm.device)
    log_p, best = token_scores(lm, picked, target)
    log_p, best = log_p.double().cpu().numpy(), best.cpu().numpy()
    if not np.isfinite(log_p).all():
        prompt, _ = queries[
            int(np.searchsorted(np.cumsum(counts), np.flatnonzero(~np.isfinite(log_p))[0], "right"))
        ]
        refuse_numbers(lm, prompt)
    hits = best == target.cpu().numpy()
    for row, (end, count) in enumerate(zip(np.cumsum(counts), counts)):
        part = slice(end - count, end)
        for place in places[row]:
            out.log_probability[place], out.match[place] = log_p[part].sum(), hits[part].mean()
            out.exact[place], out.greedy[place] = hits[part].all(), best[part].tolist()


def refuse_numbers(lm, prompt: list[int]):
    """ValueError for a prompt (token ids) that the model answers with numbers that are not
    finite."""
    raise ValueError(
        f"{lm.name} gives infinite or NaN numbers for "
        f"{lm.tokenizer.decode(prompt, skip_special_tokens=True)!r} "
        f"in {lm.dtype}; try float32"
    )


def _verify(lm) -> None:
    """Refuse, by name, a model whose layers cannot be run on rows of our own; once a model."""
    ids = torch.arange(8, device=lm.device).reshape(2, 4) % lm.num_embeddings
    queries = [(row[:3], row[3:]) for row in ids.tolist()]
    nothing, again = Change(lm, [(0, 0)], 1.0), Change(lm, [(0, 0)], 1.0)
    rows = [(1, nothing), (0, nothing), (1, again)]  # not as many as queries, nor in their order
    lm.rows_verified = True  # from here on `score_rows` may be called; taken back if it fails
    try:
        with sharply(lm) as tolerance:
            logits = lm.model(input_ids=ids[:, :-1], use_cache=False).logits[:, -1]
            logits = logits.to(lm.score_dtype)
            own = torch.log_softmax(logits, -1).gather(1, ids[:, -1:])[:, 0].double().cpu().numpy()
            limit = tolerance * max(1.0, float(logits.abs().max()))
            for everywhere in (True, False):
                found = score_rows(lm, queries, rows, everywhere=everywhere).log_probability
                if not np.abs(found - own[[1, 0, 1]]).max() <= limit:
                    raise UnsupportedModel(
                        f"{lm.name} ({type(lm.model).__name__}): its layers do not give the "
                        "model's own probabilities when run row by row, so changes to its neurons "
                        "would be scored wrongly"
                    )
    except BaseException:
        lm.rows_verified = False
        raise


@contextmanager
def scoring(lm):
    """Inside, the hooks of `interventions.scale_neurons` rest: `score_rows` applies what is active
    itself."""
    outer, lm.scoring = lm.__dict__.get("scoring"), True
    try:
        yield
    finally:
        lm.scoring = outer
