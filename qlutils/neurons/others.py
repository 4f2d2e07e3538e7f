"""Other neurons, to compare knowledge neurons with: random ones, equally active ones, and the KNs
of other facts."""

from collections import defaultdict

import numpy as np

from qlutils.neurons.sets import FACT


def random_neurons(neurons, num_neurons, rng, *, among=None, outside=True):
    """As many neurons in each layer, drawn from all `num_neurons`, or from `among`(layer), that are
    not in `neurons` (outside=False: may be in them too); fewer where there are not that many."""
    drawn = set()
    for layer in sorted({layer for layer, _ in neurons}):
        inside = [neuron for at, neuron in neurons if at == layer]
        pool = list(among(layer)) if among else np.arange(num_neurons)
        free = np.setdiff1d(pool, inside if outside else [])
        count = min(len(inside), len(free))
        chosen = rng.choice(free, count, replace=False)
        drawn |= {(layer, int(neuron)) for neuron in chosen}
    return drawn


def active_neurons(neurons, active, but=()):
    """For each neuron another of its layer, neither in `neurons` nor in `but`, each used once,
    whose |activation| is nearest; the most active neurons choose first. active: (L, N)."""
    strength = np.abs(np.asarray(active, np.float64))
    taken = set(neurons) | set(but)
    found = set()
    for layer, neuron in sorted(neurons, key=lambda pair: (-strength[pair], pair)):
        gap = np.abs(strength[layer] - strength[layer, neuron])  # (N,)
        used = [other for at, other in taken if at == layer]
        gap[used] = np.inf
        if np.isfinite(gap.min()):
            nearest = (layer, int(gap.argmin()))
            found.add(nearest)
            taken.add(nearest)
    return found


class OtherFacts:
    """The KNs of whole facts, to be drawn from as a control: if a fact's neurons do what only they
    can, another fact's do not. `queries`: a `queries` frame; `sets`: the KN set of each of its
    rows."""

    def __init__(self, queries, sets):
        self.facts = queries[FACT].drop_duplicates().set_index("fact")
        self.neurons = defaultdict(set)  # {fact: its KNs}
        for fact, kns in zip(queries["fact"], sets):
            self.neurons[fact].update(kns)

    def draw(self, neurons, fact, rng, *, same_relation):
        """As many neurons in each layer as `neurons`, drawn among the KNs of one fact that `rng`
        chooses, less those of `fact`; fewer where it has fewer. It has another subject and object,
        and is of the same relation or of another. Empty where no fact is."""
        own = self.facts.loc[fact]
        others = self.facts
        if same_relation:
            others = others[others["relation"] == own["relation"]]
        for place in rng.permutation(len(others)):
            other = others.iloc[place]
            shared = other == own
            apart = not (shared["subject"] or shared["object"])
            if apart and shared["relation"] == same_relation:
                pool = self.neurons[other.name] - self.neurons[fact]

                def of_layer(layer):
                    return [neuron for at, neuron in pool if at == layer]

                return random_neurons(neurons, None, rng, among=of_layer)
        return set()
