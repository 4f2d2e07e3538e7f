"""Notebook 06: what scaling a query's knowledge synapses S does to its KNs and its answer, beside
those of an irrelevant query, S_ir, and control sets.

Shapes: L layers, H query heads, T prompt tokens.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd

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
from qlutils.experiments.effects import each_query, rates, summary
from qlutils.experiments.localize import dense_maps
from qlutils.facts import prompt_tokens, seeded
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
RENORMALISED = ("self", "irrelevant")
QUANTITIES = ("probability", "value", "signed_value")  # in the order of `run_rows`


# --- the task -------------------------------------------------------------------------------------


def scale_synapse_columns(
    lm,
    unit,
    *,
    alpha=0.3,
    score="sum",
    suppress=0.0,
    enhance=2.0,
    renormalise=True,
    seed=0,
):
    """What scaling S, S_ir and control sets does to each query of a unit (see `effects.units`).

    A row a query, set of SETS, renormalise (True, if asked for, only of self and irrelevant) and
    direction: size of the set; probability, value (mean |activation| of the query's KNs at the last
    prompt token) and signed_value, and each with `_before`. Sets that could not be made (no query
    of another relation) are left out; an empty set changes nothing. The row of set "none" says
    where S sits: n_self, n_irrelevant, jaccard (`_rest`: without the `first_tokens`), and counts by
    layer (L,), head (L * H,) and column (T,)."""
    check_alpha(alpha, score)
    synapses = _synapses(lm, unit, alpha, score)
    factors = {"suppress": suppress, "enhance": enhance}
    rows = []
    for query in each_query(unit):
        rows += _changes(lm, *query, synapses, factors, renormalise, seed)
    frame = pd.DataFrame(rows)
    found = run_rows(lm, frame.pop("row").tolist())
    for name, values in zip(QUANTITIES, found.T):
        frame[name] = values
        same = frame.groupby(["fact", "prompt_index"])[name]  # first of them is the unchanged one
        frame[f"{name}_before"] = same.transform("first")
    return frame


def _passes(lm, fact, config):
    """A query and its irrelevant one once; each set scaled either way, two also renormalised."""
    rows = 2 + 2 * (len(SETS) + 2 * config.get("renormalise", True))
    answer = prompt_tokens(fact["object"])
    return sum(rows * (prompt_tokens(prompt) + answer) for prompt in fact["prompts"])


scale_synapse_columns.VERSION = 1
scale_synapse_columns.passes = _passes


def _synapses(lm, unit, alpha, score):
    """{prompt: (L, H, T) booleans} of all queries and irrelevant ones. One query may be irrelevant
    to several others."""
    prompts = []
    for fact in unit:
        prompts += fact["prompts"] + list(filter(None, fact["irrelevant"]))
    prompts = list(dict.fromkeys(prompts))
    found = column_scores(lm, map(lm.encode_prompt, prompts), score)
    return {prompt: above_threshold(*scores, alpha) for prompt, scores in zip(prompts, found)}


def _changes(lm, fact, i, about, synapses, factors, renormalise, seed):
    """A dict a change of query `i` of a fact, none first: what names it, and the row with it."""
    prompt = fact["prompts"][i]
    kns = tuple(zip(fact["layer"][i], fact["neuron"][i]))
    clean = Row(*lm.encode(prompt, fact["object"]), neurons=kns)
    own = synapses[prompt]
    other = _fit(synapses.get(fact["irrelevant"][i]), own)
    first = first_tokens(lm)
    none = {"set": "none", "renormalise": False, "direction": "none", "row": clean}
    yield about | none | _where(own, other, first)
    rng = seeded(seed, fact["fact"], about["prompt_index"])
    sets = synapse_sets(own, other, rng, first)
    for name, divide, direction in product(sets, (False, True), factors):
        if divide and not (renormalise and name in RENORMALISED):
            continue
        columns = sets[name]
        row = replace(
            clean,
            columns=columns,
            factor=factors[direction],
            renormalise=divide,
        )
        yield about | {
            "set": name,
            "renormalise": divide,
            "direction": direction,
            "size": int(columns.sum()),
            "row": row if columns.any() else clean,
        }


def synapse_sets(own, other, rng, first=1):
    """{name of SETS: (L, H, T) booleans}; `other` None leaves out what needs S_ir, and "without
    first" the `first` columns.

    random: in each layer and head as many columns as S has, drawn from those outside S as far as
    there are."""
    rest = np.arange(own.shape[-1]) >= first
    order = rng.random(own.shape) + own  # columns of S come last
    random = order.argsort(-1).argsort(-1) < own.sum(-1, keepdims=True)
    sets = {"self": own, "self_without_first": own & rest, "random": random}
    if other is not None:
        sets |= {
            "irrelevant": other,
            "irrelevant_without_first": other & rest,
            "self_only": own & ~other,
            "irrelevant_only": other & ~own,
        }
    return {name: sets[name] for name in SETS if name in sets}


def _fit(columns, own):
    """Another prompt's (L, H, T') columns for the prompt of `own` (L, H, T): those beyond it are
    dropped."""
    if columns is None:
        return None
    shared = columns[..., : own.shape[-1]]
    missing = own.shape[-1] - shared.shape[-1]
    return np.pad(shared, [(0, 0), (0, 0), (0, missing)])


def _where(own, other, first):
    """Where S sits and how far it coincides with S_ir (NaN where the run has one relation only)."""
    row = {
        "by_layer": own.sum((1, 2)),
        "by_head": own.sum(2).flatten(),
        "by_column": own.sum((0, 1)),
    }
    for name, start in (("", 0), ("_rest", first)):
        mine = own[..., start:]
        size = np.nan
        jaccard = np.nan
        if other is not None:
            theirs = other[..., start:]
            union = (mine | theirs).sum()
            size = float(theirs.sum())
            jaccard = (mine & theirs).sum() / union if union else np.nan
        row |= {
            f"n_self{name}": mine.sum(),
            f"n_irrelevant{name}": size,
            f"jaccard{name}": jaccard,
        }
    return row


# --- figures and tables ---------------------------------------------------------------------------


def scaled_maps(
    lm,
    maps,
    *,
    alpha=0.3,
    score="sum",
    suppress=0.0,
    enhance=2.0,
    **spec,
):
    """Figures 7 and 10: the maps of `localize.example_maps` again with each query's own synapses
    suppressed and enhanced: {"unmodified", "suppressed", "enhanced": {attribution, activation
    (L, N), probability}}, and fact and prompt.

    `spec`: fields of `qlutils.Spec`. Attribution is that of the changed model, its clean
    context included."""
    out = []
    for one in maps:
        found = find_synapses(
            lm,
            one["prompt"],
            alpha,
            score=score,
        )
        row = {"fact": one["fact"], "prompt": one["prompt"], "unmodified": one}
        for name, factor in (("suppressed", suppress), ("enhanced", enhance)):
            with scale_synapses(lm, found, factor):
                [row[name]] = dense_maps(
                    lm,
                    [one["prompt"]],
                    [one["answer"]],
                    **spec,
                )
        out.append(row)
    return out


def largest_attributions(maps):
    """The largest attribution of each query of `scaled_maps`, by condition."""
    tops = pd.DataFrame({"prompt": [one["prompt"] for one in maps]})
    for name in ("unmodified", "suppressed", "enhanced"):
        tops[name] = [one[name]["attribution"].max() for one in maps]
    return tops


def direction_gaps(moved, seed):
    """Each quantity of `moved`, {name: `effects.rates` rows}, and each direction alone: the median
    under S, the share of queries that S does not move (`unmoved`), and S minus S_ir."""
    rows = []
    for name, direction in product(moved, ("suppress", "enhance")):
        part = moved[name].query("direction == @direction")
        own = part.query("set == 'self'")["rate"].dropna()
        gap = bootstrap_difference(
            part,
            "rate",
            "set",
            ("self", "irrelevant"),
            seed,
        )
        row = {"quantity": name, "direction": direction, "median": own.median()}
        rows.append(row | {"unmoved": (own == 0).mean()} | gap.row("trimmed"))
    return pd.DataFrame(rows)


def control_summary(scaled, seed):
    """`effects.summary` of all SETS by direction and Otsu's classes: of both quantities, of the
    signed activations under S and S_ir, and of the renormalised versions of those two."""
    wanted = (
        ("value", SETS, False),
        ("probability", SETS, False),
        ("signed_value", RENORMALISED, False),
        ("value", RENORMALISED, True),
        ("probability", RENORMALISED, True),
    )
    shown = {"directions": ("suppress", "enhance"), "thresholds": ("otsu",), "seed": seed}
    tables = []
    for name, sets, divided in wanted:
        frame = scaled[scaled["renormalise"] == divided]
        if len(frame):  # notebook 06 need not renormalise
            table = summary(rates(frame, name), sets, **shown)
            tables.append(table.assign(quantity=name, renormalise=divided))
    return pd.concat(tables, ignore_index=True)
