"""Attention as a model really runs it: predominance (Eq. 4), knowledge synapses (Eq. 5, 6), and
what they do.

A is the post-softmax attention of a layer and head: rows attend, columns are attended to, rows sum
to 1. A synapse is (column, layer, head), zero-based; columns count the tokens of a prompt, BOS
included, padding not.

Shapes: Q queries, B rows of a batch, L layers, H query heads, T prompt tokens, A answer tokens."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, product
from numbers import Real

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.change.rows import check_factor, refuse_numbers, token_budget
from qlutils.facts import prompt_tokens
from qlutils.model.answer import token_probabilities
from qlutils.model.architecture import UnsupportedModel, describe
from qlutils.model.attention import EXACT, Control, attention_implementation
from qlutils.model.check import differ, sharply
from qlutils.model.language_model import whole_numbers
from qlutils.model.passes import (
    computing,
    full_precision,
    neuron_vectors,
    within_memory,
)
from qlutils.model.trace import hooked

SCORES = ("sum", "visible_mean")
# What is scaled for a query, beside its own synapses S and those of an irrelevant query S_ir.
SETS = (
    "self",
    "irrelevant",
    "self_without_first",
    "irrelevant_without_first",
    "self_only",
    "irrelevant_only",
    "random",
)


# --- the model's attention, watched or changed ----------------------------------------------------


@contextmanager
def controlled(lm, factors=None, renormalise=False, observe=None):
    """Inside, every forward pass of `lm.model` runs `attention.exact_attention` under a `Control`
    of these arguments.

    `UnsupportedModel`, naming the model, where its attention cannot be replaced."""
    lm.check_ready()
    _check_replaceable(lm)
    with _exact(lm), Control(factors, renormalise, observe).on(lm.model, lm.layers) as control:
        yield control


def _exact(lm):
    return attention_implementation(lm.model, EXACT)


@torch.no_grad()
def _check_replaceable(lm) -> None:
    """Refuse a model unless each of its layers reports an attention matrix and its own logits come
    out; once a model."""
    if getattr(lm, "_attention_checked", False):
        return
    ids = torch.randint(
        0,
        lm.num_embeddings,
        (2, min(6, lm.context)),
        generator=torch.Generator().manual_seed(0),
        device="cpu",
    ).to(lm.device)
    with full_precision(lm.device):
        problem = _replacement_error(lm, ids)
    if problem:
        raise UnsupportedModel(
            f"{lm.name} ({lm.model.config.model_type}): its attention can be neither read nor "
            f"changed exactly ({problem}); notebooks 05 and 06 need another model"
        )
    lm._attention_checked = True


def _replacement_error(lm, ids) -> str:
    """What goes wrong when `exact_attention` takes the place of the model's own on `ids`; "" if
    nothing does."""
    seen, problem = set(), ""
    try:
        with sharply(lm) as tolerance:
            own = lm.model(input_ids=ids, use_cache=False).logits
            watch = Control(observe=lambda layer, *_: seen.add(layer))
            with _exact(lm), watch.on(lm.model, lm.layers):
                ours = lm.model(input_ids=ids, use_cache=False).logits
        if len(seen) < lm.num_layers:
            problem = (
                f"{lm.num_layers - len(seen)} of its {lm.num_layers} layers do not use "
                f"transformers' "
                "attention interface"
            )
        elif differ(ours, own, own, tolerance):
            error = float((ours - own).abs().max())
            problem = f"with the attention replaced its logits differ by {error:.1e}"
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        problem = describe(failure)
    return problem


@contextmanager
def scale_synapses(lm, synapses, factor: float, *, renormalise: bool = False):
    """Inside, the columns `synapses`, a set of (column, layer, head), of the post-softmax attention
    are multiplied.

        with scale_synapses(lm, find_synapses(lm, prompt), 0.0):
            lm.model(**inputs)

    Acts on all rows that attend to the column, those of answer tokens included, in any forward pass
    inside, with or without a key-value cache; padding on the left is told from the (batch, tokens)
    attention mask. Factor 0 suppresses, 2 enhances; `renormalise` divides each row of those heads'
    layers by its new sum. A column that an input does not have changes nothing. ValueError names a
    synapse outside the model."""
    pairs = _checked(lm, synapses)
    if check_factor(lm, factor) < 0:
        raise ValueError(
            f"factor is {factor!r}; use a finite number of at least 0 (0 suppresses, 2 enhances)"
        )
    factors: dict[int, Tensor] = {}
    width = 1 + max((column for column, _, _ in pairs), default=0)
    for column, layer, head in pairs:
        if layer not in factors:
            factors[layer] = torch.ones(
                1, lm.num_heads, width, dtype=lm.score_dtype, device=lm.device
            )
        factors[layer][0, head, column] = factor
    if factor == 1 or not factors:  # nothing to change: not even the rounding of another attention
        _check_replaceable(lm)
        yield
        return
    with controlled(lm, factors, renormalise):
        yield


def _checked(lm, synapses) -> list[tuple[int, int, int]]:
    found = sorted(set(whole_numbers(synapses, ("column", "layer", "head"), "synapse")))
    for column, layer, head in found:
        if not (
            0 <= column < lm.context and 0 <= layer < lm.num_layers and 0 <= head < lm.num_heads
        ):
            raise ValueError(
                f"synapse {column, layer, head} is outside {lm.name}: (column, layer, head), with "
                f"columns from 0, {lm.num_layers} layers and {lm.num_heads} heads, all counted "
                f"from 0"
            )
    return found


# --- finding synapses -----------------------------------------------------------------------------


def find_synapses(
    lm, prompt: str, alpha: float = 0.3, *, score: str = "sum"
) -> set[tuple[int, int, int]]:
    """The knowledge synapses of a prompt: a set of (column, layer, head), columns counting its
    tokens, BOS included.

    score "sum" (Eq. 5, 6): columns that collect more than tau = alpha * (total attention of a layer
    and head, averaged over all of them). A late column can be attended to by few rows only, so it
    cannot pass. "visible_mean" compares the mean over the rows that can see the column with alpha *
    (mean attention a row gives). ValueError: alpha outside (0, 1]; a prompt of one token."""
    _check_alpha(alpha, score)
    [scores] = column_scores(lm, [lm.encode_prompt(prompt)], score)
    layers, heads, columns = np.nonzero(above_threshold(*scores, alpha))
    return set(zip(columns.tolist(), layers.tolist(), heads.tolist()))


def _check_alpha(alpha, score):
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}; use a number above 0 and at most 1 (the paper: 0.3)")
    if score not in SCORES:
        raise ValueError(f"score {score!r} is unknown; use one of {', '.join(SCORES)}")


def column_scores(
    lm, prompts: list[list[int]], score: str = "sum"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each tokenised prompt: attention summed over rows (L, H, T), and the score that decides
    on synapses (L, H, T).

    The score is the sum or T times the mean over the rows that can see the column, so that one
    threshold serves both. Matrices are reduced while the model runs, a batch and layer at a
    time."""
    out: list = [None] * len(prompts)

    def run(tokens):
        for index, ids in _batches(lm, prompts, tokens):
            for query, found in zip(index, _column_scores(lm, ids, score)):
                if not np.isfinite(found[0]).all():
                    refuse_numbers(lm, prompts[query])
                out[query] = found

    with computing(lm):
        within_memory(run, token_budget(lm))
    return out


@torch.no_grad()
def _column_scores(lm, ids, score):
    """`column_scores` of prompts of one length, ids (B, T)."""
    sums: dict[int, Tensor] = {}
    means: dict[int, Tensor] = {}

    def observe(layer, weights, visible):
        sums[layer] = weights.sum(-2)  # (B, H, T)
        means[layer] = sums[layer]
        if score == "visible_mean":
            if visible is None:
                visible = torch.ones_like(weights[:1, :1], dtype=torch.bool).tril()
            means[layer] = sums[layer] * weights.shape[-2] / visible.sum(-2)

    with controlled(lm, observe=observe):
        lm.model.base_model(input_ids=ids, use_cache=False)
    total, mean = (
        torch.stack([one[layer] for layer in range(lm.num_layers)], 1).double().cpu().numpy()
        for one in (sums, means)
    )
    return zip(total, mean)


def above_threshold(total: np.ndarray, score: np.ndarray, alpha: float) -> np.ndarray:
    """(L, H, T) booleans: score > tau (Eq. 6), tau = alpha * mean over layers and heads of the
    total attention (Eq. 5; alpha * T where rows sum to 1)."""
    return score > alpha * total.sum(-1).mean()


def _batches(lm, sequences: list[list[int]], tokens: int):
    """(indices, ids (B, S)) of sequences of equal length, at most so many tokens at a time."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for length, group in groupby(order, key=lambda i: len(sequences[i])):
        group, size = list(group), max(1, tokens // length)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            yield part, torch.tensor([sequences[i] for i in part], device=lm.device)


# --- many queries under many changes, in few batches ----------------------------------------------


@dataclass
class Row:
    """One forward pass: a query, the columns to scale (L, H, T) or None, by what, and the KNs to
    read (layer, index)."""

    prompt: list[int]
    answer: list[int]
    columns: np.ndarray | None = None
    factor: float = 1.0
    renormalise: bool = False
    neurons: tuple = ()


@torch.no_grad()
def run_rows(lm, rows: list[Row]) -> np.ndarray:
    """(rows, 3): probability of the answer (product over its tokens), mean |activation| and mean
    activation of the row's KNs at the last prompt token (NaN without KNs). Each row has its own
    synapses; equal lengths share a batch."""
    out = np.full((len(rows), 3), np.nan)
    keys = [(len(row.prompt), len(row.answer), row.renormalise) for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)

    def run(tokens):
        for (length, answer, renormalise), group in groupby(order, keys.__getitem__):
            group, size = list(group), max(1, tokens // (length + answer))
            for start in range(0, len(group), size):
                part = [rows[i] for i in group[start : start + size]]
                out[group[start : start + size]] = _run_batch(lm, part, length, answer, renormalise)

    with computing(lm):
        within_memory(run, token_budget(lm))
    return out


def _run_batch(lm, rows, length, answer, renormalise) -> np.ndarray:
    ids = torch.tensor([row.prompt + row.answer[:-1] for row in rows], device=lm.device)
    target = torch.tensor([row.answer for row in rows], device=lm.device)
    kns = _KnActivations(lm, [row.neurons for row in rows], length - 1)
    with hooked(kns.hooks()), controlled(lm, _factors(lm, rows), renormalise):
        hidden = lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hidden = hidden[:, length - 1 :].flatten(0, 1)  # (B * A, d)
    p = token_probabilities(lm, hidden, target.flatten())
    p = p.view(len(rows), answer).prod(-1).double().cpu().numpy()
    size, signed = kns.means()
    usable = np.isfinite(p) & ~np.isinf(
        size
    )  # what is not finite at the last prompt token reaches P
    if not usable.all():
        refuse_numbers(lm, rows[int(usable.argmin())].prompt)
    return np.stack([p, size, signed], 1)


class _KnActivations:
    """Reads, while the model runs, the activations of each row's KNs at one token, and no
    others."""

    def __init__(self, lm, kns: list[tuple], token: int):
        self.lm, self.token, self.rows = lm, token, len(kns)
        places = [(row, *neuron) for row, one in enumerate(kns) for neuron in one]
        self.row, self.layer, self.index = np.array(places, int).reshape(-1, 3).T
        self.value = np.full(len(places), np.nan)

    def hooks(self):
        for layer in np.unique(self.layer):
            yield self.lm.downs[layer].register_forward_pre_hook(self._reader(layer))

    def _reader(self, layer):
        places = np.flatnonzero(self.layer == layer)
        row, index = (
            torch.from_numpy(one[places]).to(self.lm.device) for one in (self.row, self.index)
        )

        def read(_, inputs):
            at_token = inputs[0].reshape(self.rows, -1, self.lm.num_neurons)[:, self.token]
            self.value[places] = at_token[row, index].double().cpu().numpy()

        return read

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean |activation| and mean activation of each row's KNs; NaN for a row without."""
        count = np.bincount(self.row, minlength=self.rows)
        with np.errstate(invalid="ignore"):
            return tuple(
                np.bincount(self.row, values, self.rows) / count
                for values in (np.abs(self.value), self.value)
            )


def _factors(lm, rows) -> dict[int, Tensor]:
    """{layer: (B, H, T)} of what each row multiplies its columns by; layers where none does are
    left out."""
    if all(row.columns is None for row in rows):
        return {}
    none = np.zeros((lm.num_layers, lm.num_heads, len(rows[0].prompt)), bool)
    columns = np.stack([none if row.columns is None else row.columns for row in rows])
    scale = np.where(columns, np.array([row.factor for row in rows])[:, None, None, None], 1.0)
    return {
        layer: torch.tensor(scale[:, layer], dtype=lm.score_dtype, device=lm.device)
        for layer in np.flatnonzero(columns.any(axis=(0, 2, 3))).tolist()
    }


# --- experiments: tasks of `store.run_units` ------------------------------------------------------


def attend(lm, unit: list[dict]) -> pd.DataFrame:
    """Notebook 05. Where each query of a unit (see `effects.units`) attends: one row a query.

    fact, prompt_index; tokens (T); column, token, token_id of the most attended token (Eq. 4, with
    columns) and the share of all attention it gets, and `at`, the characters before it; the same
    without the first tokens (`_rest`, see `first_tokens`); token_id_first and first_share, the
    first token's."""
    queries = [
        (fact, place, lm.encode_prompt(prompt))
        for fact in unit
        for place, prompt in zip(fact["prompt_index"], fact["prompts"])
    ]
    rows = []
    for (fact, place, ids), (total, _) in zip(
        queries, column_scores(lm, [ids for *_, ids in queries])
    ):
        share = total.mean((0, 1)) / len(ids)
        row = dict(
            fact=fact["fact"],
            relation=fact["relation"],
            prompt_index=place,
            tokens=len(ids),
            token_id_first=ids[0],
            first_share=share[0],
        )
        for name, first in (("", 0), ("_rest", first_tokens(lm))):
            column = first + int(share[first:].argmax())
            before = lm.tokenizer.decode(ids[:column], skip_special_tokens=True)
            row |= {
                f"column{name}": column,
                f"token{name}": lm.tokenizer.decode([ids[column]]),
                f"at{name}": len(before),
                f"token_id{name}": ids[column],
                f"share{name}": share[column],
            }
        rows.append(row)
    return pd.DataFrame(rows)


attend.VERSION = 1
attend.passes = lambda lm, fact, config: sum(map(prompt_tokens, fact["prompts"]))


def first_tokens(lm) -> int:
    """How many tokens "without the first" leaves out: all that the tokenizer puts before every
    prompt (BOS, GLM's [gMASK]<sop>), or one where it puts none. They draw attention whatever is
    asked."""
    return max(1, lm.bos_offset)


def scale_synapse_columns(
    lm,
    unit: list[dict],
    *,
    alpha=0.3,
    score="sum",
    suppress=0.0,
    enhance=2.0,
    renormalise=True,
    seed=0,
) -> pd.DataFrame:
    """Notebook 06. What scaling S, S_ir and control sets does to each query of a unit (see
    `effects.units`).

    A row a query, set of SETS, renormalise (True, if asked for, only of self and irrelevant) and
    direction: size of the set; probability, value (mean |activation| of the query's KNs at the last
    prompt token) and signed_value, and each with `_before`. Sets that could not be made (no query
    of another relation) are left out; an empty set changes nothing. The row of set "none" says
    where S sits: n_self, n_irrelevant, jaccard (`_rest`: without the `first_tokens`), and counts by
    layer (L,), head (L * H,) and column (T,)."""
    _check_alpha(alpha, score)
    queries = [
        (fact, i, *lm.encode(prompt, fact["object"]))
        for fact in unit
        for i, prompt in enumerate(fact["prompts"])
    ]
    others = [
        fact["irrelevant"][i] and lm.encode_prompt(fact["irrelevant"][i]) for fact, i, *_ in queries
    ]
    both = [prompt for _, _, prompt, _ in queries] + [other for other in others if other]
    prompts = list(dict.fromkeys(map(tuple, both)))  # one query may be irrelevant to several others
    found = {
        prompt: above_threshold(*scores, alpha)
        for prompt, scores in zip(prompts, column_scores(lm, prompts, score))
    }
    own = [found[tuple(prompt)] for _, _, prompt, _ in queries]
    foreign = [
        _fit(found[tuple(other)], mine.shape[-1]) if other else None
        for mine, other in zip(own, others)
    ]
    todo, rows = [], []
    for (fact, i, prompt, answer), mine, other in zip(queries, own, foreign):
        rng = np.random.default_rng([seed, *f"{fact['fact']} {fact['prompt_index'][i]}".encode()])
        kns = tuple(zip(fact["layer"][i], fact["neuron"][i]))
        key = dict(
            fact=fact["fact"], relation=fact["relation"], prompt_index=fact["prompt_index"][i]
        )
        before, done = len(todo), {}
        todo.append(Row(prompt, answer, neurons=kns))
        rows.append(
            key
            | dict(
                set="none",
                renormalise=False,
                direction="none",
                at=before,
                before=before,
                **_where(mine, other, first_tokens(lm)),
            )
        )
        for name, columns in synapse_sets(mine, other, rng, first_tokens(lm)).items():
            both = (False, True) if renormalise and name in ("self", "irrelevant") else (False,)
            for divide, (direction, factor) in product(
                both, (("suppress", suppress), ("enhance", enhance))
            ):
                change = columns.tobytes(), factor, divide
                if columns.any() and change not in done:  # equal sets are one row
                    done[change] = len(todo)
                    todo.append(Row(prompt, answer, columns, factor, divide, kns))
                rows.append(
                    key
                    | dict(
                        set=name,
                        renormalise=divide,
                        direction=direction,
                        before=before,
                        size=int(columns.sum()),
                        at=done.get(change, before),
                    )
                )
    result, frame = run_rows(lm, todo), pd.DataFrame(rows)
    for place, name in enumerate(("probability", "value", "signed_value")):
        frame[name], frame[f"{name}_before"] = (
            result[frame["at"], place],
            result[frame["before"], place],
        )
    return frame.drop(columns=["at", "before"])


def _passes(lm, fact: dict, config: dict) -> float:
    """A query and its irrelevant one once; each set scaled either way, two also renormalised."""
    rows = 2 + 2 * (len(SETS) + 2 * config.get("renormalise", True))
    answer = prompt_tokens(fact["object"])
    return sum(rows * (prompt_tokens(prompt) + answer) for prompt in fact["prompts"])


scale_synapse_columns.VERSION = 1
scale_synapse_columns.passes = _passes


def scaled_maps(
    lm, maps: list[dict], *, alpha=0.3, score="sum", suppress=0.0, enhance=2.0, **spec
) -> list[dict]:
    """Figures 7 and 10: the maps of `localize.example_maps` (fact, prompt, answer, attribution,
    activation (L, N)) again with each query's own synapses suppressed and enhanced: {"unmodified",
    "suppressed", "enhanced": {attribution, activation}}.

    `spec`: fields of `attribution.Spec`. Attribution is that of the changed model, its clean
    context included."""
    out = []
    for one in maps:
        prompt, answer = lm.encode(one["prompt"], one["answer"])
        found = find_synapses(lm, one["prompt"], alpha, score=score)
        row = dict(fact=one["fact"], prompt=one["prompt"], unmodified=one)
        for name, factor in (("suppressed", suppress), ("enhanced", enhance)):
            with scale_synapses(lm, found, factor):
                attribution = attribute_encoded(
                    lm, [(prompt, answer)], Spec(**spec), [one["prompt"]]
                ).scores[0]
                activation = neuron_vectors(lm, torch.tensor([prompt], device=lm.device))[0].to(
                    lm.score_dtype
                )
            row[name] = dict(
                attribution=attribution.cpu().numpy(), activation=activation.cpu().numpy()
            )
        out.append(row)
    return out


def synapse_sets(
    own: np.ndarray, other: np.ndarray | None, rng, first: int = 1
) -> dict[str, np.ndarray]:
    """{name of SETS: (L, H, T) booleans}; `other` None leaves out what needs S_ir, and "without
    first" the `first` columns.

    random: in each layer and head as many columns as S has, drawn from those outside S as far as
    there are."""
    rest = np.arange(own.shape[-1]) >= first
    draw = (rng.random(own.shape) + own).argsort(-1).argsort(-1)  # columns of S come last
    sets = {
        "self": own,
        "self_without_first": own & rest,
        "random": draw < own.sum(-1, keepdims=True),
    }
    if other is not None:
        sets |= {
            "irrelevant": other,
            "irrelevant_without_first": other & rest,
            "self_only": own & ~other,
            "irrelevant_only": other & ~own,
        }
    return {name: sets[name] for name in SETS if name in sets}


def _fit(columns: np.ndarray, tokens: int) -> np.ndarray:
    """Another prompt's (L, H, T') columns for a prompt of `tokens` tokens: those beyond it are
    dropped."""
    return np.pad(columns[..., :tokens], [(0, 0), (0, 0), (0, max(0, tokens - columns.shape[-1]))])


def _where(own, other, first) -> dict:
    row = dict(by_layer=own.sum((1, 2)), by_head=own.sum(2).flatten(), by_column=own.sum((0, 1)))
    for name, start in (("", 0), ("_rest", first)):
        mine, union = (
            own[..., start:],
            own[..., start:] | (own if other is None else other)[..., start:],
        )
        row[f"n_self{name}"] = int(mine.sum())
        row[f"n_irrelevant{name}"] = row[f"jaccard{name}"] = (
            np.nan
        )  # where the run has no other relation
        if other is not None:
            row[f"n_irrelevant{name}"] = float(other[..., start:].sum())
            if union.any():
                row[f"jaccard{name}"] = float((mine & other[..., start:]).sum() / union.sum())
    return row
