"""Integrated gradients of the answer's probability over MLP neurons, for many queries at once (Eq.
8-18).

The neurons of one layer move together along a straight path from a baseline b to their clean values
w, in the clean context; each layer is a separate integral. All layers' integrals of a batch of
queries go through the model as one growing batch of last-token rows (see `replay`): entering layer
l it holds the rows of layers 0..l-1; layer l adds its own. One backward pass then reaches the L
leaves. Where a rule has a node at the end of the path, that row is the clean forward pass for every
layer, so one row serves all of them.

Shapes: Q queries, B baselines a query, P points a layer, L layers, N neurons a layer, T prompt
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from qlutils.attribution.integrate import integrate
from qlutils.attribution.quadrature import RULES
from qlutils.change.rows import score_queries
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
METHODS = ("ig", "sig", "amig")
CPU_MEMORY = (
    2**29
)  # bytes of activations a batch may keep on a CPU; fixed, so that batches are the same everywhere


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
        for name, allowed in (
            ("method", METHODS),
            ("rule", RULES),
            ("answer", ("all", "first")),
            ("site", SITES),
            ("amig_factor", ("w-b", "w")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}"
                )
        if isinstance(self.steps, bool) or not isinstance(self.steps, Integral) or self.steps < 2:
            raise ValueError(
                f"steps is {self.steps!r}; an integral needs a whole number of at least 2 steps"
            )
        if self.rule == "clenshaw" and self.steps < 3:
            raise ValueError(f"steps is {self.steps}; the rule clenshaw needs at least 3")
        tolerance = self.tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 < tolerance < 1:
            raise ValueError(
                f"tolerance is {tolerance!r}; it is the share of a query's largest score up to "
                f"which "
                "the rule converged leaves its scores uncertain, above 0 and below 1"
            )
        object.__setattr__(self, "tolerance", float(tolerance))
        budget = self.row_budget
        if budget is not None and (
            isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 1
        ):
            raise ValueError(
                f"row_budget is {budget!r}; use a whole number of at least 1 row, or None for the "
                f"default"
            )
        object.__setattr__(
            self, "steps", int(self.steps)
        )  # NumPy's whole numbers have no place in the JSON of a run
        object.__setattr__(self, "row_budget", budget if budget is None else int(budget))


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
        unused = torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(
            lm.device
        )  # torch's own, at hand
        memory = max(2**28, 0.8 * (torch.cuda.mem_get_info(lm.device)[0] + unused))
    width = lm.arch.head.weight.shape[1]
    per_row = (14 * width + 5 * lm.num_neurons) * lm.dtype.itemsize * (lm.num_layers + 1) / 2
    return max(lm.num_layers, int(memory / per_row))


def attribute(
    lm,
    prompts,
    answers,
    *,
    method="ig",
    steps=20,
    rule="right",
    answer="all",
    site="down_input",
    amig_factor="w-b",
    tolerance=0.05,
    row_budget=None,
) -> Attribution:
    """Attribution scores of every neuron for each query (prompt, answer).

    `prompts`, `answers`: Q texts each. `method`: "ig" (Eq. 10), "sig" (Eq. 13, 14) or "amig" (Eq.
        16, 18).
    `rule`: quadrature over the path, "right" being the paper's Riemann sum; "converged" takes
    gradients where the integral has not settled until no score moves by more than `tolerance` of
    the query's largest. `answer`: "all" averages the raw attribution over the answer's tokens,
    "first" takes the first. Dense in memory, Q x L x N: for a handful of queries (runs stream
    through `localize`). ValueError names the offending prompt, answer or parameter.
    """
    spec = Spec(method, steps, rule, answer, site, amig_factor, tolerance, row_budget)
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


def _attribute(lm, queries, spec, names) -> Attribution:
    # Everything stays on the device to the end: nothing here waits for it, and the next batch is on
    # its way meanwhile.
    count, device = len(queries), lm.device
    raw = torch.zeros(count, lm.num_layers, lm.num_neurons, dtype=lm.score_dtype, device=device)
    gap = torch.zeros(count, lm.num_layers, dtype=lm.score_dtype, device=device)
    probability = torch.ones(count, dtype=lm.score_dtype, device=device)
    known = torch.ones(count, dtype=torch.bool, device=device)
    converged = known.clone() if spec.rule == "converged" else None
    evaluations = torch.zeros(count, dtype=torch.float64)
    for batch in _batches(queries, spec, lm):
        target = on_device([item[2] for item in batch], device)
        passes, starts, pieces = [], [], []
        for _, piece in groupby(batch, lambda item: len(item[1])):
            piece = list(piece)
            ids = on_device([item[1] for item in piece], device)
            passes.append(clean_pass(lm, ids, spec.site))
            starts.append(_baselines(lm, ids, [length for length, *_ in piece], spec))
            pieces.append(piece)
        clean = join_passes(passes)
        del passes
        starts = None if starts[0] is None else torch.cat(starts)
        p_clean = torch.softmax(clean.logits, -1).gather(1, target[:, None])[:, 0]
        found = integrate(lm, clean, target, starts, p_clean, spec)
        first = 0
        for piece in pieces:
            # no two tokens of one answer share a piece: they have prompts of different lengths
            here, first = slice(first, first + len(piece)), first + len(piece)
            *_, of_query, tokens = zip(*piece)  # in main memory, with nothing to wait for
            query, used = (on_device(one, device) for one in (of_query, tokens))
            raw[query] += found.scores[here] / used[:, None, None]
            gap[query] += found.gap[here] / used[:, None]
            evaluations[list(of_query)] += found.evaluations[here].double() / torch.tensor(tokens)
            if converged is not None:
                converged[query] &= found.converged[here].to(device)
            probability[query] *= p_clean[here]
            known[query] &= clean.logits[here].argmax(-1) == target[here]
    if spec.answer == "first":
        whole = score_queries(lm, queries)
        probability = torch.from_numpy(np.exp(whole.log_probability)).to(probability)
        known = torch.from_numpy(whole.exact).to(device)
    bad = (~(torch.isfinite(raw).flatten(1).all(1) & torch.isfinite(probability))).cpu()
    if bad.any():
        raise ValueError(
            f"the scores of {names[int(bad.nonzero()[0])]!r} are not finite: {lm.name} gives "
            f"infinite or "
            f"NaN values in {lm.dtype}; try float32"
        )
    return Attribution(
        _normalise(raw, spec.method, names),
        gap.abs(),
        probability,
        known,
        converged,
        evaluations,
        spec.row_budget,
    )


def _batches(queries, spec, lm):
    """Lists of (prompt length, ids up to the answer token, answer token, query, its answer tokens),
    equal lengths together. With answer="first" only the first token is attributed."""
    items = []
    for index, (prompt, answer) in enumerate(queries):
        used = answer if spec.answer == "all" else answer[:1]
        items += [
            (len(prompt), prompt + used[:k], used[k], index, len(used)) for k in range(len(used))
        ]
    # one number of baselines a batch: sig has as many as prompt tokens
    mixed = spec.rule == "converged" and lm.layout == "sequence"
    by_baselines = lambda item: item[0] if spec.method == "sig" else 0  # noqa: E731
    by_length = lambda item: 0 if mixed else len(item[1])  # noqa: E731
    kind = lambda item: (by_length(item), by_baselines(item))  # noqa: E731
    items.sort(key=lambda item: (*kind(item), len(item[1]), item[0]))
    for _, group in groupby(items, kind):
        group = list(group)
        baselines = group[0][0] - lm.bos_offset if spec.method == "sig" else 1
        points = 2 if spec.rule == "converged" else spec.steps  # of the first round
        size = max(1, spec.row_budget // (lm.num_layers * points * baselines))
        size *= HELD if mixed else 1
        size = -(-len(group) // -(-len(group) // size))  # as many batches of even size
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _baselines(lm, ids: Tensor, prompt_lengths: list[int], spec: Spec) -> Tensor | None:
    """(Q, B, L, N) neuron vectors the paths start from; None stands for zero."""
    if spec.method == "ig":
        return None
    first, (queries, length) = lm.bos_offset, ids.shape
    if spec.method == "amig":
        eos = lm.tokenizer.eos_token_id
        if eos is None or eos >= lm.num_embeddings:
            raise ValueError(
                f"{lm.name}: amig replaces the prompt by EOS tokens, and its "
                "tokenizer has none that the model embeds"
            )
        variants = ids.clone()
        for row, prompt_length in enumerate(prompt_lengths):
            variants[row, first:prompt_length] = eos
    else:
        candidates = (
            lm.tokenizer.mask_token_id,
            lm.tokenizer.pad_token_id,
            lm.tokenizer.eos_token_id,
        )
        token = next((c for c in candidates if c is not None and c < lm.num_embeddings), None)
        if token is None:
            raise ValueError(
                f"{lm.name}: sig needs a mask, pad or EOS token, and its tokenizer has none that "
                f"the model embeds"
            )
        places = range(first, prompt_lengths[0])
        variants = ids[:, None].repeat(1, len(places), 1)
        for row, place in enumerate(places):
            variants[:, row, place] = token
    vectors = neuron_vectors(
        lm, variants.reshape(-1, length), spec.site, chunk=max(1, spec.row_budget // length)
    )
    return vectors.view(queries, -1, lm.num_layers, lm.num_neurons)


def _normalise(raw: Tensor, method: str, names) -> Tensor:
    if method == "sig":  # Eq. 14
        return (
            raw / raw.flatten(1).norm(dim=1).clamp_min(torch.finfo(raw.dtype).tiny)[:, None, None]
        )
    if method == "amig":  # Eq. 18, with the absolute value of the sum
        total = raw.sum((1, 2)).abs()
        if (total == 0).any():
            raise ValueError(
                f"amig divides by the sum of a query's scores, which is zero for "
                f"{names[int((total == 0).nonzero()[0])]!r}"
            )
        return raw / total[:, None, None]
    return raw
