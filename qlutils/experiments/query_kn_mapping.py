"""Query-KN mapping (section 3.1): which sets of neurons are scaled for a query, and what that does
to its answer."""

from itertools import product

import pandas as pd

from qlutils.change.scaling import scaled_answer_probabilities
from qlutils.experiments.effects import NEIGHBOURS, OTHER_FACTS, each_query
from qlutils.experiments.localize import activations
from qlutils.facts import prompt_tokens, seeded
from qlutils.neurons.others import active_neurons, random_neurons
from qlutils.neurons.sets import QUERY, neighbour_sets

NUM_SETS = 18  # of a query: 16 of `query_sets`, 2 of other facts


def scale_kns(lm, unit, *, suppress=0.0, enhance=2.0, answer="all", seed=0):
    """Notebook 04. P(answer) of each query of a unit (of `effects.units` with `t` and `other`) with
    each of its sets scaled.

    A row a query, set (of `sets_of_query`) and direction: fact, relation, prompt_index, set,
    direction, size of the set, probability, probability_before. An empty set changes nothing. All
    sets of all queries are rows of one batch, see `scaled_answer_probabilities`."""
    queries = list(each_query(unit))
    encoded = [lm.encode(fact["prompts"][i], fact["object"]) for fact, i, _ in queries]
    active = activations(lm, [prompt for prompt, _ in encoded])
    factors = {"suppress": suppress, "enhance": enhance}
    rows = []
    trials = []
    for (fact, i, about), ids, vectors in zip(queries, encoded, active):
        sets = sets_of_query(fact, i, vectors, seed)
        for name, direction in (("none", "none"), *product(sets, factors)):
            neurons = sets.get(name, ())
            rows.append(about | {"set": name, "direction": direction, "size": len(neurons)})
            trials.append((*ids, neurons, factors.get(direction, 1.0)))
    frame = pd.DataFrame(rows)
    frame["probability"] = scaled_answer_probabilities(lm, trials, answer=answer)
    same = frame.groupby(QUERY)["probability"]
    frame["probability_before"] = same.transform("first")
    return frame[frame["set"] != "none"].reset_index(drop=True)


def _passes(lm, fact, config):
    """A query's prompt once, and its last token and the answer's with each set scaled, each way."""
    scaled = 2 * NUM_SETS * prompt_tokens(fact["object"])
    return sum(prompt_tokens(prompt) + scaled for prompt in fact["prompts"])


scale_kns.VERSION = 1
scale_kns.passes = _passes


def sets_of_query(fact, i, active, seed):
    """{name: neurons} of every set that is scaled for query `i` of a fact: `query_sets`, and
    self_same_relation and self_other_relation, KNs of one other fact. active: (L, N)."""
    kns = map(zip, fact["layer"], fact["neuron"])
    rng = seeded(seed, fact["fact"], fact["prompt_index"][i])
    sets = query_sets(list(map(set, kns)), i, active, rng)
    return sets | {f"self_{kind}": set(map(tuple, fact[kind][i])) for kind in OTHER_FACTS}


def query_sets(kn_sets, i, active, rng):
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
        neurons = sets[name]
        size = min(len(own), len(neurons))
        sets |= {
            f"{name}_others": neurons - own,
            f"{name}_matched": _subset(neurons, size, rng),
            f"self_as_{name}": _subset(own, size, rng),
        }
    _, num_neurons = active.shape
    for name in ("self", "union"):
        sets[f"{name}_random"] = random_neurons(sets[name], num_neurons, rng)
    sets["self_active"] = active_neurons(own, active, but=sets["union"])
    return sets


def _subset(neurons, size, rng):
    """`size` of the neurons, drawn at random; nothing is drawn where they are as many."""
    if size == len(neurons):
        return neurons
    order = sorted(neurons)
    drawn = rng.choice(len(order), size, replace=False)
    return {order[k] for k in drawn}
