"""Query-KN mapping (section 3.1): which sets of neurons are scaled for a query, and what that does
to its answer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from qlutils.change.scaling import scaled_answer_probabilities
from qlutils.facts import prompt_tokens
from qlutils.model.passes import neuron_vectors
from qlutils.neurons.others import active_neurons, random_neurons
from qlutils.neurons.sets import neighbour_sets

PAPER_SETS = ("self", "union", "intersection", "refine")
NEIGHBOURS = PAPER_SETS[1:]
# Beyond the paper. "_others": without the query's own KNs. "_matched" and "self_as_...": both cut
# to the smaller of the two sizes, so that sets of one size are compared. "_random": as many neurons
# in each layer, drawn among all that the set does not hold. "self_same_relation",
# "self_other_relation": as many KNs of one other fact. "self_active": the neurons of the same
# layers, KNs of none of the fact's queries, that are closest to being as active.
CONTROL_SETS = (
    *(f"{name}_others" for name in NEIGHBOURS),
    *(f"{name}_matched" for name in NEIGHBOURS),
    *(f"self_as_{name}" for name in NEIGHBOURS),
    "self_random",
    "union_random",
    "self_same_relation",
    "self_other_relation",
    "self_active",
)


def scale_kns(
    lm, unit: list[dict], *, suppress=0.0, enhance=2.0, answer="all", seed=0
) -> pd.DataFrame:
    """Notebook 04. P(answer) of each query of a unit (of `effects.units` with `t` and `other`) with
    each of its sets scaled.

    A row a query, set (PAPER_SETS, CONTROL_SETS) and direction: size of the set, probability,
    probability_before. An empty set changes nothing. Every row is one row of a batch: see
    `interventions.score_rows`."""
    rows, todo = [], []
    for fact in unit:
        if len(fact["prompts"]) < 2:
            raise ValueError(
                f"fact {fact['fact']} has a single query, so no neighbours; it needs at least 2"
            )
    queries = [[lm.encode(prompt, fact["object"]) for prompt in fact["prompts"]] for fact in unit]
    active = iter(_activations(lm, [prompt for encoded in queries for prompt, _ in encoded]))
    for fact, encoded in zip(unit, queries):
        sets = [set(zip(layer, neuron)) for layer, neuron in zip(fact["layer"], fact["neuron"])]
        for i, query in enumerate(encoded):
            rng = np.random.default_rng(
                [seed, *f"{fact['fact']} {fact['prompt_index'][i]}".encode()]
            )
            key = dict(
                fact=fact["fact"],
                relation=fact["relation"],
                prompt_index=fact["prompt_index"][i],
                before=len(todo),
            )
            todo.append((*query, frozenset(), 1.0))
            others = {
                f"self_{kind}": set(map(tuple, fact[kind][i]))
                for kind in ("same_relation", "other_relation")
            }
            for name, neurons in (query_sets(sets, i, next(active), rng) | others).items():
                for direction, factor in (("suppress", suppress), ("enhance", enhance)):
                    rows.append(
                        key | dict(set=name, direction=direction, size=len(neurons), at=len(todo))
                    )
                    todo.append((*query, frozenset(neurons), factor))
    probability, frame = scaled_answer_probabilities(lm, todo, answer=answer), pd.DataFrame(rows)
    frame["probability"], frame["probability_before"] = (
        probability[frame["at"]],
        probability[frame["before"]],
    )
    return frame.drop(columns=["at", "before"])


def _passes(lm, fact: dict, config: dict) -> float:
    """A query's prompt once, and its last token and the answer's with each set scaled, each way."""
    sets = len(PAPER_SETS) + len(CONTROL_SETS)
    scaled = 2 * sets * prompt_tokens(fact["object"])
    return sum(prompt_tokens(prompt) + scaled for prompt in fact["prompts"])


scale_kns.VERSION = 1
scale_kns.passes = _passes


def query_sets(kn_sets: list[set], i: int, active: np.ndarray, rng) -> dict[str, set]:
    """The sets that are scaled for query `i` of a fact and need no other fact: {name: neurons}.

    kn_sets: the KNs of all the fact's queries. active: (L, N) activations of query i at its last
    token."""
    sets = neighbour_sets(kn_sets, i)
    own = sets["self"]
    for name in NEIGHBOURS:
        size = min(len(own), len(sets[name]))
        sets[f"{name}_others"] = sets[name] - own
        sets[f"{name}_matched"] = _subset(sets[name], size, rng)
        sets[f"self_as_{name}"] = _subset(own, size, rng)
    sets["self_random"] = random_neurons(own, active.shape[1], rng)
    sets["union_random"] = random_neurons(sets["union"], active.shape[1], rng)
    sets["self_active"] = active_neurons(own, active, but=sets["union"])
    return sets


def _subset(neurons: set, size: int, rng) -> set:
    order = sorted(neurons)
    return (
        set(order)
        if size == len(order)
        else {order[k] for k in rng.choice(len(order), size, replace=False)}
    )


def _activations(lm, prompts) -> list[np.ndarray]:
    """(L, N) neuron vectors of each tokenised prompt at its last token."""
    out = [None] * len(prompts)
    for length in sorted({len(prompt) for prompt in prompts}):
        same = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        vectors = neuron_vectors(lm, torch.tensor([prompts[i] for i in same], device=lm.device))
        for i, vector in zip(same, vectors.float().cpu().numpy()):
            out[i] = vector
    return out
