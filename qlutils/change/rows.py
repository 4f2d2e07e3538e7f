"""Scoring answers with a different change of the neurons in every row of a batch.

A *query* is (prompt ids, target ids), scored by teacher forcing. A *row* evaluates one query
under one `Change`. Queries of about equal length share a batch, the shorter ones padded after
their end, where no token of theirs attends. What a change cannot reach is computed once a query
and shared by all its rows: the layers below the lowest changed neuron and, where changes begin at
the last prompt token, the keys and values of the tokens before it. Logits are computed at scored
positions only.

Shapes: Q queries, R rows, S tokens a row (those after the shared prefix), K scored tokens, d
residual width, N neurons a layer.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from math import ceil

import numpy as np
import torch

from qlutils.change.changes import Change, prompt_of
from qlutils.model.answer import token_scores
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.passes import clean_pass, computing, run_rows, within_memory
from qlutils.model.trace import edited
from qlutils.model.verify import differ, sample_ids, sharply

CPU_TOKENS = 2048  # tokens of a batch on a CPU; from 1,024 on the time is flat
# Texts share a batch up to the next multiple of so many tokens. It divides the lengths from which
# on some models embed positions in another way (long RoPE), for a whole batch.
LENGTH_STEP = 4


@dataclass
class Scores:
    """Of R rows: `log_probability` (R,) of the whole target, float64; `exact` (R,), whether every
    teacher-forced greedy token is the target's (then greedy decoding gives the target); `match`
    (R,), the share of tokens that are; `greedy`, those greedy tokens, a list a row."""

    log_probability: np.ndarray
    exact: np.ndarray
    match: np.ndarray
    greedy: list[list[int]]


def score_queries(lm, queries):
    """`score_rows` of each query once, unchanged."""
    return score_rows(lm, queries, [(query, None) for query in range(len(queries))])


@torch.no_grad()
def score_rows(lm, queries, rows, *, everywhere=False):
    """Score `rows`, pairs (index into `queries`, `Change` or None).

    `everywhere`: changes act at every token (an edited weight); else at the last prompt token and
    later ones. Inside `scale_neurons` or `edit_weights` the model is the one they make."""
    if "rows" not in lm.checked:
        with computing(lm):
            _check(lm)
        lm.checked.add("rows")
    return _score(lm, queries, rows, everywhere)


def _score(lm, queries, rows, everywhere):
    changed = {query for query, change in rows if change is not None}

    def prefix_of(query):  # what no change reaches
        return 0 if everywhere or query not in changed else len(queries[query][0]) - 1

    def kind(row):
        prompt, target = queries[row[0]]
        last = len(prompt) - 1
        prefix = prefix_of(row[0])
        padded = LENGTH_STEP * ceil((last + len(target)) / LENGTH_STEP) - prefix
        scaled = last if lm.scales else 0  # where `scale_neurons` begins, in all rows alike
        return padded, prefix, scaled

    def compute(some):
        return _score_batch(lm, queries, some, prefix_of(some[0][0]))

    order = sorted(rows, key=lambda row: row[0])  # so that a batch has few queries
    scored = dict(zip(order, in_batches(lm, order, kind, compute)))
    log_p, exact, match, greedy = zip(*(scored[row] for row in rows)) if rows else [()] * 4
    return Scores(np.array(log_p), np.array(exact, bool), np.array(match), list(greedy))


def equal_batches(items, kind, tokens):
    """Lists of items of equal `kind`, tuples (tokens an item, ...), that hold at most `tokens`."""
    for (each, *_), group in groupby(sorted(items, key=kind), key=kind):
        group = list(group)
        size = max(1, tokens // each)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def in_batches(lm, items, kind, compute):
    """What `compute` gives for each of the `items`, asked for a batch of `equal_batches` at a time:
    smaller ones where memory runs out, equal items once."""
    items = list(items)
    found = dict.fromkeys(items)

    def run(tokens):
        for batch in equal_batches(found, kind, tokens):
            found.update(zip(batch, compute(batch)))

    with computing(lm):
        within_memory(run, token_budget(lm))
    return [found[item] for item in items]


def token_budget(lm):
    """Tokens a batch of forward passes may hold: fixed on a CPU, from the model's size and the free
    memory on a GPU."""
    if lm.device.type != "cuda":
        return CPU_TOKENS
    free = torch.cuda.mem_get_info(lm.device)[0]
    width = lm.arch.head.weight.shape[1]  # the clean pass keeps every layer's input
    numbers = (14 + lm.num_layers) * width + 5 * lm.num_neurons
    per_token = numbers * lm.dtype.itemsize
    tokens = free // 4 // per_token
    return int(min(2**17, max(256, tokens)))


def _score_batch(lm, queries, rows, prefix):
    """The fields of `Scores` of each of `rows`, (query, change), whose first `prefix` tokens no
    change reaches."""
    asked = [queries[query] for query, _ in rows]
    used, slots = np.unique([query for query, _ in rows], return_inverse=True)
    texts = []
    for query in used:
        prompt, target = queries[query]
        texts.append([*prompt, *target[:-1]])
    longest = max(map(len, texts))
    texts = [text + text[-1:] * (longest - len(text)) for text in texts]
    ids = torch.tensor(texts, device=lm.device)  # (Q, tokens of the prefix, and S)
    last = len(asked[0][0]) - 1  # of all rows, where it is asked for
    unchanged = Change(lm, ())
    changes = [change or unchanged for _, change in rows]
    with prompt_of(lm.scales, last + 1):
        clean = clean_pass(lm, ids, prefix=prefix)
        for scaling in lm.scales:
            scaling.at(longest - prefix, last - prefix)
        hidden = _run(lm, clean, torch.from_numpy(slots), changes)
    return _answers(lm, hidden, asked, prefix)


def _answers(lm, hidden, asked, prefix):
    """The fields of `Scores` of rows of the queries `asked`, from the last layer's output
    (R, S, d)."""
    places = []  # K of (row, place, token)
    for row, (prompt, target) in enumerate(asked):
        first = len(prompt) - 1 - prefix
        places += [(row, first + k, token) for k, token in enumerate(target)]
    row, place, gold = torch.tensor(places, device=lm.device).T
    log_p, best = token_scores(lm, hidden[row, place], gold)
    ends = np.cumsum([len(target) for _, target in asked])[:-1]
    of_rows = [np.split(one.cpu().numpy(), ends) for one in (log_p.double(), best == gold, best)]
    found = []
    for (prompt, _), own, hits, greedy in zip(asked, *of_rows):
        whole = own.sum()
        if not np.isfinite(whole):
            refuse_numbers(lm, prompt)
        found.append((whole, hits.all(), hits.mean(), greedy.tolist()))
    return found


def _run(lm, clean, slots, changes):
    """(R, S, d) output of the last layer for rows of the queries `slots` (R,) under `changes`.

    A row joins the batch in the first layer that its change reaches, with the clean pass's input of
    that layer: of rows that are first changed in layers 2, 2 and 5 there are 2 in layers 2 to 4,
    and 3 from there on. Unchanged rows join at the end."""
    starts = np.array([change.start for change in changes])
    order = starts.argsort(kind="stable")
    starts = starts[order]
    changes = [changes[place] for place in order]
    slots = slots[order].to(lm.device)
    hidden = clean.inputs[0][:0]  # no row yet
    for layer in range(starts[0], lm.num_layers + 1):
        stop = np.searchsorted(starts, layer, side="right")
        begun = clean.inputs[layer][slots[len(hidden) : stop]]
        hidden = torch.cat([hidden, begun])
        if layer < lm.num_layers:
            with _changing(lm, layer, changes[:stop]):
                hidden = run_rows(lm, clean, layer, hidden, slots[:stop])
    return hidden[order.argsort()]


def _changing(lm, layer, changes):
    """Inside, the down-projection W of `layer` gives W(f x) + v sum(f x) for the activations x of a
    row, f being its change's factors and v its vector; the sum is over the changed neurons."""
    places = []
    for row, change in enumerate(changes):
        places += [(row, neuron) for neuron in change.by_layer.get(layer, ())]
    if not places:
        return nullcontext()
    chosen = torch.zeros(len(changes), 1, lm.num_neurons, dtype=lm.dtype, device=lm.device)
    row, neuron = torch.tensor(places, device=lm.device).T
    chosen[row, 0, neuron] = 1.0
    factor = chosen.new_tensor([change.factor for change in changes])[:, None, None]
    factor = factor.where(chosen > 0, 1.0)  # (R, 1, N)

    def by_row(x):  # OPT flattens (R, S)
        return x.reshape(len(changes), -1, x.shape[-1])

    def before(_, args, kwargs):
        return ((by_row(args[0]) * factor).reshape(args[0].shape),), kwargs

    def after(_, args, output):
        nothing = output.new_zeros(output.shape[-1])
        vectors = [nothing if one.vector is None else one.vector for one in changes]
        x = by_row(args[0])
        sums = (x @ chosen.mT.to(x)).to(output)  # (R, S, 1)
        added = sums * torch.stack(vectors)[:, None]
        return output + added.reshape(output.shape)

    adds = any(change.vector is not None for change in changes)
    return edited([lm.downs[layer]], before=before, after=after if adds else None)


def refuse_numbers(lm, prompt):
    """ValueError for a prompt (token ids) that the model answers with numbers that are not
    finite."""
    text = lm.tokenizer.decode(prompt, skip_special_tokens=True)
    raise ValueError(
        f"{lm.name} gives infinite or NaN numbers for {text!r} in {lm.dtype}; try float32"
    )


def _check(lm):
    """`UnsupportedModel` for one whose layers cannot be run on rows of our own."""
    ids = sample_ids(lm, 4)
    queries = [(prompt, [token]) for *prompt, token in ids.tolist()]
    one = Change(lm, [(0, 0)])
    other = Change(lm, [(0, 0)])
    rows = [(1, one), (0, one), (1, other)]  # not as many as queries, nor in their order
    with sharply(lm) as tolerance:
        logits = lm.logits(ids[:, :-1])[[1, 0, 1], -1].to(lm.score_dtype).cpu()
        own = torch.log_softmax(logits, -1)
        own = own.gather(1, ids[[1, 0, 1], -1:].cpu())[:, 0].double()
        size = logits.abs().clamp_min(1.0)  # the error is that of the logits
        for everywhere in (True, False):
            found = _score(lm, queries, rows, everywhere).log_probability
            if differ(torch.from_numpy(found), own, size, tolerance):
                raise UnsupportedModel(
                    f"{lm.name} ({type(lm.model).__name__}): its layers do not give the model's "
                    "own probabilities when run row by row, so changes to its neurons would be "
                    "scored wrongly"
                )
