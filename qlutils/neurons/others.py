"""Other neurons, to compare knowledge neurons with: random ones, equally active ones, and the KNs
of other facts."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np


def random_neurons(neurons, num_neurons, rng, *, among=None, outside=True) -> set:
    """As many neurons in each layer, drawn from all `num_neurons`, or from `among`(layer), that are
    not in `neurons` (outside=False: may be in them too); fewer where there are not that many."""
    drawn = set()
    for layer in sorted({layer for layer, _ in neurons}):
        inside = [neuron for at, neuron in neurons if at == layer]
        pool = list(among(layer)) if among else np.arange(num_neurons)
        free = np.setdiff1d(pool, inside if outside else [])
        chosen = rng.choice(free, min(len(inside), len(free)), replace=False)
        drawn |= {(layer, int(neuron)) for neuron in chosen}
    return drawn


def active_neurons(neurons, active, but=()) -> set:
    """For each neuron another of its layer, neither in `neurons` nor in `but`, each used once,
    whose |activation| is nearest; the most active neurons choose first. active: (L, N)."""
    strength = np.abs(np.asarray(active, np.float64))
    taken, found = set(neurons) | set(but), set()
    for layer, neuron in sorted(neurons, key=lambda pair: (-strength[pair], pair)):
        gap = np.abs(strength[layer] - strength[layer, neuron])  # (N,)
        gap[[other for at, other in taken if at == layer]] = np.inf
        if np.isfinite(gap.min()):
            nearest = (layer, int(gap.argmin()))
            found.add(nearest)
            taken.add(nearest)
    return found


@dataclass
class _FactNeurons:
    relation: str
    subject: str
    object: str
    neurons: set = field(default_factory=set)


class OtherFacts:
    """The KNs of whole facts, to be drawn from as a control: if a fact's neurons do what only they
    can, another fact's do not. `queries`: a `queries` frame; `sets`: the KN set of each of its
    rows."""

    def __init__(self, queries, sets):
        self.facts: dict[str, _FactNeurons] = {}
        self.of_relation = defaultdict(list)  # {relation: its facts}
        columns = queries[["fact", "relation", "subject", "object"]]
        for (fact, *about), kns in zip(columns.itertuples(index=False), sets):
            if fact not in self.facts:
                self.facts[fact] = _FactNeurons(*about)
                self.of_relation[self.facts[fact].relation].append(fact)
            self.facts[fact].neurons.update(kns)

    def draw(self, neurons, fact, rng, *, same_relation: bool) -> set:
        """As many neurons in each layer as `neurons`, drawn among the KNs of one fact that `rng`
        chooses, less those of `fact`; fewer where it has fewer. It has another subject and object,
        and is of the same relation or of another. Empty where no fact is."""
        own = self.facts[fact]
        names = self.of_relation[own.relation] if same_relation else list(self.facts)
        for place in rng.permutation(len(names)):
            other = self.facts[names[place]]
            if (
                (other.relation == own.relation) == same_relation
                and other.subject != own.subject
                and other.object != own.object
            ):
                pool = other.neurons - own.neurons
                return random_neurons(
                    neurons, None, rng, among=lambda layer: [n for at, n in pool if at == layer]
                )
        return set()
