"""Notebook 06: what scaling a query's knowledge synapses S does to its KNs and its answer, beside
those of an irrelevant query, S_ir, and control sets.

Shapes: L layers, H query heads, T prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.change.synapses import (
    Row,
    above_threshold,
    check_alpha,
    column_scores,
    find_synapses,
    first_tokens,
    run_rows,
    scale_synapses,
)
from qlutils.experiments.effects import rates, summary
from qlutils.facts import prompt_tokens, seeded
from qlutils.model.passes import neuron_vectors
from qlutils.show.stats import bootstrap_difference

SETS = (
    "self",
    "irrelevant",
    "self_without_first",
    "irrelevant_without_first",
    "self_only",
    "irrelevant_only",
    "random",
)
QUANTITIES = ("probability", "value", "signed_value")  # in the order of `run_rows`


# --- the task -------------------------------------------------------------------------------------


@dataclass
class _Query:
    """A query of a unit: its names, its tokens and KNs, and the tokens of its irrelevant query."""

    names: dict
    row: Row
    irrelevant: list[int] | None

    def changed(self, sets: dict[str, np.ndarray], renormalise: bool, factors: dict[str, float]):
        """What names each change of the query, and the row with it."""
        for name, columns in sets.items():
            twice = renormalise and name in ("self", "irrelevant")
            for divide in (False, True) if twice else (False,):
                for direction, factor in factors.items():
                    what = dict(set=name, renormalise=divide, direction=direction)
                    what["size"] = int(columns.sum())
                    row = replace(self.row, columns=columns, factor=factor, renormalise=divide)
                    yield what, row if columns.any() else self.row


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
    """What scaling S, S_ir and control sets does to each query of a unit (see `effects.units`).

    A row a query, set of SETS, renormalise (True, if asked for, only of self and irrelevant) and
    direction: size of the set; probability, value (mean |activation| of the query's KNs at the last
    prompt token) and signed_value, and each with `_before`. Sets that could not be made (no query
    of another relation) are left out; an empty set changes nothing. The row of set "none" says
    where S sits: n_self, n_irrelevant, jaccard (`_rest`: without the `first_tokens`), and counts by
    layer (L,), head (L * H,) and column (T,)."""
    check_alpha(alpha, score)
    queries = _encoded(lm, unit)
    found = _synapses(lm, queries, alpha, score)
    first = first_tokens(lm)
    factors = {"suppress": suppress, "enhance": enhance}
    rows: list[dict] = []
    todo: list[Row] = []
    for query in queries:
        own = found[tuple(query.row.prompt)]
        other = query.irrelevant and _fit(found[tuple(query.irrelevant)], own.shape[-1])
        rng = seeded(seed, query.names["fact"], query.names["prompt_index"])
        sets = synapse_sets(own, other, rng, first)
        before = len(todo)
        none = dict(set="none", renormalise=False, direction="none", before=before)
        rows.append(query.names | none | _where(own, other, first))
        todo.append(query.row)
        for what, row in query.changed(sets, renormalise, factors):
            rows.append(query.names | what | dict(before=before))
            todo.append(row)
    return _measured(pd.DataFrame(rows), run_rows(lm, todo))


def _passes(lm, fact: dict, config: dict) -> float:
    """A query and its irrelevant one once; each set scaled either way, two also renormalised."""
    rows = 2 + 2 * (len(SETS) + 2 * config.get("renormalise", True))
    answer = prompt_tokens(fact["object"])
    return sum(rows * (prompt_tokens(prompt) + answer) for prompt in fact["prompts"])


scale_synapse_columns.VERSION = 1
scale_synapse_columns.passes = _passes


def _encoded(lm, unit: list[dict]) -> list[_Query]:
    found = []
    for fact in unit:
        for i, prompt in enumerate(fact["prompts"]):
            names = dict(fact=fact["fact"], relation=fact["relation"])
            names["prompt_index"] = fact["prompt_index"][i]
            kns = tuple(zip(fact["layer"][i], fact["neuron"][i]))
            row = Row(*lm.encode(prompt, fact["object"]), neurons=kns)
            other = fact["irrelevant"][i]
            found.append(_Query(names, row, other and lm.encode_prompt(other)))
    return found


def _synapses(lm, queries: list[_Query], alpha, score) -> dict[tuple, np.ndarray]:
    """{prompt: (L, H, T) booleans} of all queries and irrelevant ones. One query may be irrelevant
    to several others."""
    both = [query.row.prompt for query in queries]
    both += [query.irrelevant for query in queries if query.irrelevant]
    prompts = list(dict.fromkeys(map(tuple, both)))
    scores = column_scores(lm, prompts, score)
    return {prompt: above_threshold(*one, alpha) for prompt, one in zip(prompts, scores)}


def _measured(frame: pd.DataFrame, result: np.ndarray) -> pd.DataFrame:
    """`frame` with its rows' quantities, and those of the rows that its `before` points to."""
    for name, values in zip(QUANTITIES, result.T):
        frame[name] = values
        frame[f"{name}_before"] = values[frame["before"]]
    return frame.drop(columns="before")


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
    shared = columns[..., :tokens]
    fitted = np.zeros((*columns.shape[:2], tokens), bool)
    fitted[..., : shared.shape[-1]] = shared
    return fitted


def _where(own: np.ndarray, other: np.ndarray | None, first: int) -> dict:
    """Where S sits and how far it coincides with S_ir (NaN where the run has one relation only)."""
    row = {
        "by_layer": own.sum((1, 2)),
        "by_head": own.sum(2).flatten(),
        "by_column": own.sum((0, 1)),
    }
    for name, start in (("", 0), ("_rest", first)):
        mine = own[..., start:]
        row[f"n_self{name}"] = int(mine.sum())
        row[f"n_irrelevant{name}"] = np.nan
        row[f"jaccard{name}"] = np.nan
        if other is not None:
            theirs = other[..., start:]
            row[f"n_irrelevant{name}"] = float(theirs.sum())
            if (mine | theirs).any():
                row[f"jaccard{name}"] = float((mine & theirs).sum() / (mine | theirs).sum())
    return row


# --- figures and tables ---------------------------------------------------------------------------


def scaled_maps(
    lm, maps: list[dict], *, alpha=0.3, score="sum", suppress=0.0, enhance=2.0, **spec
) -> list[dict]:
    """Figures 7 and 10: the maps of `localize.example_maps` again with each query's own synapses
    suppressed and enhanced: {"unmodified", "suppressed", "enhanced": {attribution, activation
    (L, N), probability}}, and fact and prompt.

    `spec`: fields of `qlutils.Spec`. Attribution is that of the changed model, its clean
    context included."""
    out = []
    for one in maps:
        query = lm.encode(one["prompt"], one["answer"])
        ids = torch.tensor([query[0]], device=lm.device)
        found = find_synapses(lm, one["prompt"], alpha, score=score)
        row = dict(fact=one["fact"], prompt=one["prompt"], unmodified=one)
        for name, factor in (("suppressed", suppress), ("enhanced", enhance)):
            with scale_synapses(lm, found, factor):
                scored = attribute_encoded(lm, [query], Spec(**spec), [one["prompt"]])
                [activation] = neuron_vectors(lm, ids).to(lm.score_dtype)
            row[name] = {
                "attribution": scored.scores[0].cpu().numpy(),
                "activation": activation.cpu().numpy(),
                "probability": float(scored.probability[0]),
            }
        out.append(row)
    return out


def largest_attributions(maps: list[dict]) -> pd.DataFrame:
    """The largest attribution of each query of `scaled_maps`, by condition."""
    rows = []
    for one in maps:
        row = dict(prompt=one["prompt"])
        for name in ("unmodified", "suppressed", "enhanced"):
            row[name] = one[name]["attribution"].max()
        rows.append(row)
    return pd.DataFrame(rows)


def direction_gaps(moved: dict[str, pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """Each quantity of `moved`, {name: `effects.rates` rows}, and each direction alone: the median
    under S, the share of queries that S does not move (`unmoved`), and S minus S_ir."""
    rows = []
    for name, frame in moved.items():
        for direction in ("suppress", "enhance"):
            part = frame[frame["direction"] == direction]
            own = part.loc[part["set"] == "self", "rate"].dropna()
            gap = bootstrap_difference(part, "rate", "set", ("self", "irrelevant"), seed=seed)
            row = {
                "quantity": name,
                "direction": direction,
                "median": own.median(),
                "unmoved": (own == 0).mean(),
            }
            rows.append(row | gap.row("trimmed"))
    return pd.DataFrame(rows)


def control_summary(scaled: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`effects.summary` of all SETS by direction and Otsu's classes: of both quantities, of the
    signed activations under S and S_ir, and of the renormalised versions of those two."""
    plain = scaled[~scaled["renormalise"]]
    divided = scaled[scaled["renormalise"]]
    wanted = [(plain, "value", SETS), (plain, "probability", SETS)]
    wanted.append((plain, "signed_value", SETS[:2]))
    if len(divided):
        wanted += [(divided, name, SETS[:2]) for name in ("value", "probability")]
    tables = []
    for frame, name, sets in wanted:
        table = summary(
            rates(frame, name),
            sets,
            directions=("suppress", "enhance"),
            thresholds=("otsu",),
            seed=seed,
        )
        tables.append(table.assign(quantity=name, renormalise=frame is divided))
    return pd.concat(tables, ignore_index=True)
