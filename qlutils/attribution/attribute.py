"""Integrated gradients of the answer's probability over MLP neurons, for many queries (Eq. 8-18).

The neurons of one layer move together along a straight path from a baseline b to their clean values
w, in the clean context; each layer is a separate integral. Gradients along the paths of all layers
and of many queries are taken in one pass (see `gradients`), and summed up by a rule (see
`integrate`).

Shapes: Q queries, B baselines a query, P points a layer, L layers, N neurons a layer, T prompt
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil

import numpy as np
import torch
from torch import Tensor

from qlutils.attribution.integrate import integrate
from qlutils.attribution.quadrature import RULES
from qlutils.change.rows import score_queries
from qlutils.checks import METHODS, check, one_of
from qlutils.model.attention import is_controlled
from qlutils.model.passes import (
    SITES,
    clean_pass,
    computing,
    join_passes,
    neuron_vectors,
    on_device,
    within_memory,
)

# Batches of the first round that the rule "converged" refines together: what it keeps of a query
# is small beside a batch's activations, and its later rounds have few rows a query.
HELD = 4
CHOICES = {
    "method": METHODS,
    "rule": RULES,
    "answer": ("all", "first"),
    "site": SITES,
    "amig_factor": ("w-b", "w"),
}
# Bytes of activations a batch may keep on a CPU: fixed, so that batches are the same everywhere.
CPU_MEMORY = 2**29


@dataclass(frozen=True)
class Spec:
    """How to attribute; every field is a notebook parameter. `steps` is for all rules but
    "converged", which takes as many gradients as it needs, and `tolerance` for that one alone.
    `row_budget` bounds the rows of a batch (None: from the device's memory)."""

    method: str = "ig"
    steps: int = 20
    rule: str = "right"
    answer: str = "all"
    site: str = "down_input"
    amig_factor: str = "w-b"
    tolerance: float = 0.05
    row_budget: int | None = None

    def __post_init__(self):
        for name, known in CHOICES.items():
            one_of(name, getattr(self, name), known)
        check("steps is", self.steps, 3 if self.rule == "clenshaw" else 2)
        check("tolerance is", self.tolerance, 1e-9, 1, "a share of a query's largest score")
        if self.row_budget is not None:
            check("row_budget is", self.row_budget, 1)


@dataclass
class Attribution:
    """Scores of Q queries: `scores` (Q, L, N), normalised as the method says; `completeness_gap`
    (Q, L), of the raw scores; `probability` (Q,) of the whole answer; `known` (Q,), whether greedy
    decoding gives it; `converged` (Q,), whether the rule "converged" got all integrals below its
    tolerance (None for the other rules, which cannot tell); `evaluations` (Q,), gradients taken a
    layer and baseline, mean over layers and answer tokens; all of them on the model's device;
    `row_budget`, the rows a batch was allowed in the end (halved after running out of memory)."""

    scores: Tensor
    completeness_gap: Tensor
    probability: Tensor
    known: Tensor
    converged: Tensor | None
    evaluations: Tensor
    row_budget: int

    def cpu(self) -> Attribution:
        """The same in main memory."""
        moved = {k: v.cpu() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def default_row_budget(lm) -> int:
    """Rows of a batch whose activations fit: of most of a GPU's free memory, of a fixed share on a
    CPU."""
    memory = CPU_MEMORY
    if lm.device.type == "cuda":
        free = torch.cuda.mem_get_info(lm.device)[0]
        free += torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)
        memory = max(2**28, 0.8 * free)
    width = lm.arch.head.weight.shape[1]
    per_row = (14 * width + 5 * lm.num_neurons) * lm.dtype.itemsize * (lm.num_layers + 1) / 2
    return max(lm.num_layers, int(memory / per_row))


def attribute(lm, prompts, answers, **spec) -> Attribution:
    """Attribution scores of every neuron for each query (prompt, answer).

    `prompts`, `answers`: Q texts each. `spec`, with the defaults of `Spec`:
    method: "ig" (Eq. 10), "sig" (Eq. 13, 14) or "amig" (Eq. 16, 18; `amig_factor`: "w-b" or "w").
    rule: quadrature over the path in `steps` steps, "right" being the paper's Riemann sum;
    "converged" takes gradients where the integral has not settled until no score moves by more than
    `tolerance` of the query's largest. answer: "all" averages the raw attribution over the answer's
    tokens, "first" takes the first. site: "down_input" or "pre_activation".
    Dense in memory, Q x L x N: for a handful of queries (runs stream through `localize`).
    ValueError names the offending prompt, answer or parameter.
    """
    spec = Spec(**spec)
    return attribute_encoded(lm, lm.encode_all(prompts, answers), spec).cpu()


@torch.inference_mode(False)  # in which no gradients could be taken
def attribute_encoded(
    lm, queries: list[tuple[list[int], list[int]]], spec: Spec, names=None
) -> Attribution:
    """`attribute` for queries already tokenised into (prompt ids, answer ids). `names` are used in
    errors."""
    lm.check_ready()
    if lm.dtype == torch.float16:
        raise ValueError(
            "float16 gradients of a probability underflow silently; load the model in bfloat16 or "
            "float32"
        )
    names = names or [lm.tokenizer.decode(p, skip_special_tokens=True) for p, _ in queries]
    with computing(lm):
        return within_memory(
            lambda budget: _attribute(lm, queries, replace(spec, row_budget=budget), names),
            spec.row_budget or default_row_budget(lm),
            lm.num_layers,
        )


@dataclass
class _Token:
    """An answer token to attribute: `ids`, the prompt and the answer before it; of the prompt,
    `prompt_length` tokens; one of the `used` tokens of answer `query`."""

    ids: list[int]
    target: int
    prompt_length: int
    query: int
    used: int


def _tokens(queries, answer: str) -> list[_Token]:
    tokens = []
    for index, (prompt, whole) in enumerate(queries):
        used = whole if answer == "all" else whole[:1]
        for k, target in enumerate(used):
            tokens.append(_Token(prompt + used[:k], target, len(prompt), index, len(used)))
    return tokens


def _batches(tokens: list[_Token], spec: Spec, lm) -> Iterator[list[_Token]]:
    """Tokens whose integrals are computed together, sorted by their number of ids: by a rule with
    fixed nodes those with as many ids, by "converged" any (few rows are left in its later rounds).
    With sig as many prompt tokens each, since there is a baseline for each of them."""
    mixed = spec.rule == "converged" and lm.layout == "sequence"
    mixed = mixed and not is_controlled(lm.model)  # columns count from a prompt's first token

    def kind(token):
        prompt_length = token.prompt_length if spec.method == "sig" else 0
        return prompt_length, 0 if mixed else len(token.ids)

    tokens = sorted(tokens, key=lambda token: (kind(token), len(token.ids), token.prompt_length))
    for (prompt_length, _), group in groupby(tokens, kind):
        group = list(group)
        baselines = prompt_length - lm.bos_offset if spec.method == "sig" else 1
        points = 2 if spec.rule == "converged" else spec.steps  # of the first round
        size = max(1, spec.row_budget // (lm.num_layers * points * baselines))
        if mixed:
            size *= HELD
        batches = ceil(len(group) / size)
        size = ceil(len(group) / batches)  # all of about one size
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _attribute(lm, queries, spec: Spec, names) -> Attribution:
    # Everything stays on the device to the end: the next batch is on its way meanwhile.
    shape = len(queries), lm.num_layers
    options = dict(dtype=lm.score_dtype, device=lm.device)
    known = torch.ones(len(queries), dtype=torch.bool, device=lm.device)
    found = Attribution(
        scores=torch.zeros(*shape, lm.num_neurons, **options),
        completeness_gap=torch.zeros(shape, **options),
        probability=torch.ones(len(queries), **options),
        known=known,
        converged=known.clone() if spec.rule == "converged" else None,
        evaluations=torch.zeros(len(queries), dtype=torch.float64),
        row_budget=spec.row_budget,
    )
    for batch in _batches(_tokens(queries, spec.answer), spec, lm):
        _add_batch(lm, batch, spec, found)
    if spec.answer == "first":
        whole = score_queries(lm, queries)
        found.probability = torch.from_numpy(np.exp(whole.log_probability)).to(found.probability)
        found.known = torch.from_numpy(whole.exact).to(lm.device)
    _check_finite(lm, found, names)
    found.scores = _normalise(found.scores, spec.method, names)
    found.completeness_gap = found.completeness_gap.abs()
    return found


def _check_finite(lm, found: Attribution, names) -> None:
    finite = found.scores.isfinite().flatten(1).all(1) & found.probability.isfinite()
    if not finite.all():
        name = names[int(finite.int().argmin())]
        raise ValueError(
            f"the scores of {name!r} are not finite: {lm.name} gives infinite or NaN values in "
            f"{lm.dtype}; try float32"
        )


def _add_batch(lm, batch: list[_Token], spec: Spec, found: Attribution) -> None:
    """Add to `found` the mean over an answer's tokens of what those in `batch` give."""
    passes, starts = [], []
    for _, piece in groupby(batch, lambda token: len(token.ids)):
        piece = list(piece)
        ids = on_device([token.ids for token in piece], lm.device)
        passes.append(clean_pass(lm, ids, spec.site))
        starts.append(_baselines(lm, ids, [token.prompt_length for token in piece], spec))
    clean = join_passes(passes)
    del passes
    starts = None if spec.method == "ig" else torch.cat(starts)
    target = on_device([token.target for token in batch], lm.device)
    raw = integrate(lm, clean, target, starts, spec)
    for i, token in enumerate(batch):
        query = token.query
        found.scores[query] += raw.scores[i] / token.used
        found.completeness_gap[query] += raw.gap[i] / token.used
        found.evaluations[query] += raw.evaluations[i] / token.used
        found.probability[query] *= raw.probability[i]
        found.known[query] &= raw.known[i]
        if found.converged is not None:
            found.converged[query] &= raw.converged[i].item()  # which is on the CPU


def _baselines(lm, ids: Tensor, prompt_lengths: list[int], spec: Spec) -> Tensor | None:
    """(Q, B, L, N) neuron vectors at the last token that the paths start from.

    ig: None, which stands for zero. amig: B = 1, of the prompt with every token but BOS replaced by
    EOS. sig: of the prompt with one token replaced by the mask, pad or EOS token, a baseline for
    each of its B tokens but BOS; all prompts of a batch have as many (see `_batches`). The answer's
    tokens before the one that is attributed stay."""
    if spec.method == "ig":
        return None
    first, (queries, length) = lm.bos_offset, ids.shape
    tokenizer = lm.tokenizer
    eos = tokenizer.eos_token_id
    if spec.method == "amig":
        token = _stand_in(lm, "amig replaces the prompt by EOS tokens", [eos])
        variants = ids[:, None].clone()
        for row, prompt_length in enumerate(prompt_lengths):
            variants[row, 0, first:prompt_length] = token
    else:
        candidates = [tokenizer.mask_token_id, tokenizer.pad_token_id, eos]
        token = _stand_in(lm, "sig needs a mask, pad or EOS token", candidates)
        baselines = prompt_lengths[0] - first
        variants = ids[:, None].repeat(1, baselines, 1)
        for baseline in range(baselines):
            variants[:, baseline, first + baseline] = token
    chunk = max(1, spec.row_budget // length)
    vectors = neuron_vectors(lm, variants.flatten(0, 1), spec.site, chunk)  # of (Q * B, T)
    return vectors.unflatten(0, (queries, -1))


def _stand_in(lm, need: str, candidates: list[int | None]) -> int:
    """The first of the special tokens that the tokenizer has and the model embeds."""
    for token in candidates:
        if token is not None and token < lm.num_embeddings:
            return token
    raise ValueError(f"{lm.name}: {need}, and its tokenizer has none that the model embeds")


def _normalise(raw: Tensor, method: str, names) -> Tensor:
    """Raw scores (Q, L, N) normalised as the method says."""
    if method == "ig":
        return raw
    flat = raw.flatten(1)
    if method == "sig":  # Eq. 14
        size = flat.norm(dim=1).clamp_min(torch.finfo(raw.dtype).tiny)
    else:  # Eq. 18, with the absolute value of the sum
        size = raw.sum((1, 2)).abs()
        if (size == 0).any():
            name = names[int(size.argmin())]
            raise ValueError(
                f"amig divides by the sum of a query's scores, which is zero for {name!r}"
            )
    return raw / size[:, None, None]
