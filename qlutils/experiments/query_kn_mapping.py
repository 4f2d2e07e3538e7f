"""Query-KN mapping (section 3.1): which sets of neurons are scaled for a query, and what that does
to its answer."""

from itertools import product

import numpy as np
import pandas as pd

from qlutils.change.scaling import scaled_answer_probabilities
from qlutils.experiments.effects import NEIGHBOURS, OTHER_FACTS
from qlutils.experiments.localize import activations
from qlutils.facts import prompt_tokens, seeded
from qlutils.neurons.others import active_neurons, random_neurons
from qlutils.neurons.sets import neighbour_sets

NUM_SETS = 18  # of a query: 16 of `query_sets`, 2 of other facts


def scale_kns(
    lm, unit: list[dict], *, suppress=0.0, enhance=2.0, answer="all", seed=0
) -> pd.DataFrame:
    """Notebook 04. P(answer) of each query of a unit (of `effects.units` with `t` and `other`) with
    each of its sets scaled.

    A row a query, set (of `sets_of_query`) and direction: fact, relation, prompt_index, set,
    direction, size of the set, probability, probability_before. An empty set changes nothing. All
    sets of all queries are rows of one batch, see `scaled_answer_probabilities`."""
    for fact in unit:
        if len(fact["prompts"]) < 2:
            raise ValueError(
                f"fact {fact['fact']} has a single query, so no neighbours; it needs at least 2"
            )
    queries = [[lm.encode(prompt, fact["object"]) for prompt in fact["prompts"]] for fact in unit]
    active = iter(activations(lm, [prompt for encoded in queries for prompt, _ in encoded]))
    directions = {"suppress": suppress, "enhance": enhance}
    rows, trials = [], []
    for fact, encoded in zip(unit, queries):
        for i, query in enumerate(encoded):
            key = {
                "fact": fact["fact"],
                "relation": fact["relation"],
                "prompt_index": fact["prompt_index"][i],
                "before": len(trials),
            }
            trials.append((*query, frozenset(), 1.0))
            sets = sets_of_query(fact, i, next(active), seed)
            for (name, neurons), direction in product(sets.items(), directions):
                row = {
                    "set": name,
                    "direction": direction,
                    "size": len(neurons),
                }
                rows.append(key | row | {"after": len(trials)})
                trials.append((*query, frozenset(neurons), directions[direction]))
    probability = scaled_answer_probabilities(lm, trials, answer=answer)
    frame = pd.DataFrame(rows)
    before, after = frame.pop("before"), frame.pop("after")
    return frame.assign(probability=probability[after], probability_before=probability[before])


def _passes(lm, fact: dict, config: dict) -> float:
    """A query's prompt once, and its last token and the answer's with each set scaled, each way."""
    scaled = 2 * NUM_SETS * prompt_tokens(fact["object"])
    return sum(prompt_tokens(prompt) + scaled for prompt in fact["prompts"])


scale_kns.VERSION = 1
scale_kns.passes = _passes


def sets_of_query(fact: dict, i: int, active: np.ndarray, seed) -> dict[str, set]:
    """{name: neurons} of every set that is scaled for query `i` of a fact: `query_sets`, and
    self_same_relation and self_other_relation, KNs of one other fact. active: (L, N)."""
    kns = [set(zip(*places)) for places in zip(fact["layer"], fact["neuron"])]
    rng = seeded(seed, fact["fact"], fact["prompt_index"][i])
    other = {f"self_{kind}": set(map(tuple, fact[kind][i])) for kind in OTHER_FACTS}
    return query_sets(kns, i, active, rng) | other


def query_sets(kn_sets: list[set], i: int, active: np.ndarray, rng) -> dict[str, set]:
    """The sets that are scaled for query `i` of a fact and need no other fact: {name: neurons}.

    kn_sets: the KNs of all the fact's queries. active: (L, N) activations of query i at its last
    token. The paper's four, see `neighbour_sets`, and to compare with, for each of the
    neighbours' three: X_others, without the query's own KNs; X_matched and self_as_X, random
    parts of X and of the own KNs, both of the smaller of the two sizes. self_random, union_random:
    as many neurons in each layer that are not in the set. self_active: KNs of none of the
    fact's queries, as active as the own ones."""
    sets = neighbour_sets(kn_sets, i)
    own = sets["self"]
    for name in NEIGHBOURS:
        size = min(len(own), len(sets[name]))
        sets[f"{name}_others"] = sets[name] - own
        sets[f"{name}_matched"] = _subset(sets[name], size, rng)
        sets[f"self_as_{name}"] = _subset(own, size, rng)
    for name in ("self", "union"):
        sets[f"{name}_random"] = random_neurons(sets[name], active.shape[1], rng)
    sets["self_active"] = active_neurons(own, active, but=sets["union"])
    return sets


def _subset(neurons: set, size: int, rng) -> set:
    """`size` of the neurons, drawn at random; nothing is drawn where they are as many."""
    order = sorted(neurons)
    if size == len(order):
        return set(order)
    return {order[k] for k in rng.choice(len(order), size, replace=False)}
