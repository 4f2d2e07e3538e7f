"""Integrated gradients of the answer's probability over MLP neurons, for many queries (Eq. 8-18).

The neurons of one layer move together along a straight path from a baseline b to their clean values
w, in the clean context; each layer is a separate integral. Gradients along the paths of all layers
and of many queries are taken in one pass (see `gradients`), and summed up by a rule (see
`integrate`).

Shapes: Q queries, B baselines a query, P points a layer, L layers, N neurons a layer, T prompt
tokens.
"""

from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from qlutils.attribution.integrate import Attribution, integrate
from qlutils.change.rows import equal_batches, score_queries
from qlutils.checks import CHOICES, check, one_of
from qlutils.model.attention import is_controlled
from qlutils.model.language_model import check_loaded
from qlutils.model.passes import (
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
# Bytes of activations a batch may keep on a CPU: fixed, so that batches are the same everywhere.
CPU_MEMORY = 2**31


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
        for name in ("method", "rule", "answer", "site", "amig_factor"):
            one_of(name, getattr(self, name), CHOICES[name])
        check("steps is", self.steps, 3 if self.rule == "clenshaw" else 2)
        check("tolerance is", self.tolerance, 1e-9, 1, "a share of a query's largest score")
        if self.row_budget is not None:
            check("row_budget is", self.row_budget, 1)


def default_row_budget(lm):
    """Rows of a batch whose activations fit: of most of a GPU's free memory, of a fixed share on a
    CPU."""
    memory = CPU_MEMORY
    if lm.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(lm.device)
        reserved = torch.cuda.memory_reserved(lm.device)
        unused = reserved - torch.cuda.memory_allocated(lm.device)
        memory = max(2**28, 0.8 * (free + unused))
    width = lm.arch.head.weight.shape[1]
    numbers = 14 * width + 5 * lm.num_neurons  # of a row in a layer
    layers = (lm.num_layers + 1) / 2  # of a row, on average
    rows = memory / (numbers * layers * lm.dtype.itemsize)
    return max(lm.num_layers, int(rows))


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
    16, 18). `rule`: quadrature over the path in `steps` steps, "right" being the paper's Riemann
    sum; "converged" takes gradients where the integral has not settled until no score moves by more
    than `tolerance` of the query's largest. `answer`: "all" averages the raw attribution over the
    answer's tokens, "first" takes the first. `site`: the neurons are the inputs of the
    down-projection, or "pre_activation" those of the activation function; `amig_factor`: Eq. 17
    multiplies the gradients by w - b, as Eq. 16, or as printed by w. `row_budget`: at most so many
    rows of single tokens in a batch, by default what the memory holds.

    Returns an `Attribution`: `scores` (Q, L, N), `probability` (Q,) and more. Dense in memory: for
    a handful of queries (runs stream through `localize`). ValueError names the offending prompt,
    answer or parameter.
    """
    check_loaded(lm)
    spec = Spec(method, steps, rule, answer, site, amig_factor, tolerance, row_budget)
    return attribute_encoded(lm, lm.encode_all(prompts, answers), spec).cpu()


@torch.inference_mode(False)  # in which no gradients could be taken
def attribute_encoded(lm, queries, spec: Spec, names=None) -> Attribution:
    """`attribute` for queries already tokenised into (prompt ids, answer ids), lists. `names` are
    used in errors."""
    if lm.dtype == torch.float16:
        raise ValueError(
            "float16 gradients of a probability underflow silently; load the model in bfloat16 or "
            "float32"
        )
    if names is None:
        names = [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in queries]

    def compute(row_budget):
        return _attribute(lm, queries, replace(spec, row_budget=row_budget), names)

    with computing(lm):
        budget = spec.row_budget or default_row_budget(lm)
        return within_memory(compute, budget, least=lm.num_layers)


@dataclass
class _Token:
    """One of the `used` tokens of a query's answer, to be attributed: `ids`, the prompt of
    `prompt_length` tokens and the answer before it."""

    query: int
    ids: list[int]
    target: int
    prompt_length: int
    used: int


def _tokens(queries, answer):
    """The answer tokens to attribute, by their number of ids."""
    tokens = []
    for query, (prompt, whole) in enumerate(queries):
        used = whole if answer == "all" else whole[:1]
        for k, target in enumerate(used):
            tokens.append(_Token(query, prompt + used[:k], target, len(prompt), len(used)))
    return sorted(tokens, key=lambda token: (len(token.ids), token.prompt_length))


def _kind_of(lm, spec):
    """What tokens have in common whose integrals are computed together: the rows of each, and by a
    rule with fixed nodes the number of ids; "converged" has few rows left in its later rounds."""
    converged = spec.rule == "converged"
    # columns of scaled attention count from a prompt's first token
    mixed = converged and lm.layout == "sequence" and not is_controlled(lm.model)
    points = 2 if converged else spec.steps  # of the first round

    def kind(token):
        baselines = token.prompt_length - lm.bos_offset if spec.method == "sig" else 1
        rows = lm.num_layers * points * baselines
        if mixed:
            return max(1, rows // HELD), baselines
        return rows, baselines, len(token.ids)

    return kind


def _attribute(lm, queries, spec, names):
    # Everything stays on the device to the end: the next batch is on its way meanwhile.
    count = len(queries)
    options = dict(dtype=lm.score_dtype, device=lm.device)
    all_true = torch.ones(count, dtype=torch.bool)
    found = Attribution(
        scores=torch.zeros(count, lm.num_layers, lm.num_neurons, **options),
        completeness_gap=torch.zeros(count, lm.num_layers, **options),
        probability=torch.ones(count, **options),
        known=all_true.to(lm.device, copy=True),
        converged=all_true if spec.rule == "converged" else None,
        evaluations=torch.zeros(count, dtype=torch.float64),
        row_budget=spec.row_budget,
    )
    tokens = _tokens(queries, spec.answer)
    for batch in equal_batches(tokens, _kind_of(lm, spec), spec.row_budget):
        _add_batch(lm, batch, spec, found)
    if spec.answer == "first":
        whole = score_queries(lm, queries)
        found.probability = torch.from_numpy(np.exp(whole.log_probability)).to(found.scores)
        found.known = torch.from_numpy(whole.exact).to(lm.device)
    finite = found.scores.isfinite().flatten(1).all(1)
    if not finite.all():
        name = names[int(finite.int().argmin())]
        raise ValueError(
            f"the scores of {name!r} are not finite: {lm.name} gives infinite or NaN values in "
            f"{lm.dtype}; try float32"
        )
    found.scores = _normalise(found.scores, spec.method, names)
    found.completeness_gap = found.completeness_gap.abs()
    return found


def _add_batch(lm, batch, spec, found):
    """Add to `found` the mean over an answer's tokens of what those in `batch` give."""
    pieces = [list(piece) for _, piece in groupby(batch, lambda token: len(token.ids))]
    passes = []
    starts = []
    for piece in pieces:
        ids = on_device([token.ids for token in piece], lm.device)
        passes.append(clean_pass(lm, ids, spec.site))
        starts.append(_baselines(lm, ids, [token.prompt_length for token in piece], spec))
    starts = None if spec.method == "ig" else torch.cat(starts)
    target = on_device([token.target for token in batch], lm.device)
    clean = join_passes(passes)
    del passes  # the memory of what was joined
    raw = integrate(lm, clean, target, starts, spec)
    # A piece's texts are equally long, so of different queries: it is added at once. Token by token
    # takes a GPU of small models a quarter more operations.
    stop = 0
    for piece in pieces:
        part = slice(stop, stop + len(piece))
        stop = part.stop
        places = [token.query for token in piece]
        used = torch.tensor([token.used for token in piece])
        found.evaluations[places] += raw.evaluations[part] / used
        if spec.rule == "converged":
            found.converged[places] &= raw.converged[part]
        query = on_device(places, lm.device)
        used = on_device(used, lm.device)
        found.scores[query] += raw.scores[part] / used[:, None, None]
        found.completeness_gap[query] += raw.completeness_gap[part] / used[:, None]
        found.probability[query] *= raw.probability[part]
        found.known[query] &= raw.known[part]


def _baselines(lm, ids, prompt_lengths, spec):
    """(Q, B, L, N) neuron vectors at the last token of `ids` (Q, T) that the paths start from.

    ig: None, which stands for zero. amig: B = 1, of the prompt with every token but BOS replaced by
    EOS. sig: of the prompt with one token replaced by the mask, pad or EOS token, a baseline for
    each of its B tokens but BOS; all prompts of a batch have as many (see `_kind_of`). The answer's
    tokens before the one that is attributed stay."""
    if spec.method == "ig":
        return None
    first = lm.bos_offset
    tokenizer = lm.tokenizer
    place = torch.arange(ids.shape[1])
    if spec.method == "amig":
        special = [tokenizer.eos_token_id]
        token = _stand_in(lm, "amig replaces the prompt by EOS tokens", special)
        end = torch.tensor(prompt_lengths)[:, None, None]
        replaced = (place >= first) & (place < end)  # (Q, 1, T)
    else:
        special = [tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
        token = _stand_in(lm, "sig needs a mask, pad or EOS token", special)
        replaced = place == torch.arange(first, prompt_lengths[0])[:, None]  # (B, T)
    replaced = on_device(replaced, lm.device)
    variants = ids[:, None].where(~replaced, token)  # (Q, B, T)
    chunk = max(1, spec.row_budget // ids.shape[1])
    vectors = neuron_vectors(lm, variants.flatten(0, 1), spec.site, chunk)
    return vectors.unflatten(0, variants.shape[:2])


def _stand_in(lm, need, candidates):
    """The first of the special tokens that the tokenizer has and the model embeds."""
    for token in candidates:
        if token is not None and token < lm.num_embeddings:
            return token
    raise ValueError(f"{lm.name}: {need}, and its tokenizer has none that the model embeds")


def _normalise(raw, method, names):
    """Raw scores (Q, L, N) normalised as the method says."""
    if method == "ig":
        return raw
    flat = raw.flatten(1)
    if method == "sig":  # Eq. 14
        tiny = torch.finfo(raw.dtype).tiny
        size = flat.norm(dim=1).clamp_min(tiny)
    else:  # amig, Eq. 18, with the absolute value of the sum
        size = raw.sum((1, 2)).abs()
        if (size == 0).any():
            name = names[int(size.argmin())]
            raise ValueError(
                f"amig divides by the sum of a query's scores, which is zero for {name!r}"
            )
    return raw / size[:, None, None]
