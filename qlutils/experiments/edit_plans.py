"""What each fact draws for its edits: a query, a new object, neurons, unrelated queries, texts."""

import zlib
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import pandas as pd

from qlutils.checks import one_of
from qlutils.neurons.cas import cas_neurons, strongest_neurons
from qlutils.neurons.others import OtherFacts, random_neurons
from qlutils.neurons.sets import kn_sets

# Other neurons, edited in place of a set: as many in each layer, drawn at random, as active at q_i
# but no KNs of the fact, KNs of one other fact of the same relation or of another; and as many in
# all, of the largest mean score over the fact's queries, perhaps in the set.
CONTROLS = ("random", "matched", "same_relation", "other_relation", "strongest")


def plan_edits(
    queries,
    facts,
    *,
    num_neurons,
    sets=("local", "global"),
    controls=("random",),
    own=True,
    t=0.2,
    n_locality=20,
    texts=(),
    ppl_entries=5,
    seed=0,
):
    """One JSON-able dict a fact for `edit_facts`, and what cannot be measured: fact, what, reason.

    queries: a `queries` frame. facts: those whose objects an update may choose from. sets:
    names, or {name: spec} with a spec of None for "local" (N_i) and "global" (union of the
    N_j), or `cas_neurons` keywords. controls: some of CONTROLS; `own`: the sets themselves are
    edited, too. texts: those that perplexity may be measured on; ValueError for fewer than
    `ppl_entries`. Each fact draws, with its own seed: q_i among its known queries (among all
    where none is known), o' among the relation's other objects, `n_locality` queries of other
    facts (`_locality`), and `ppl_entries` texts, the same for all of the fact's edits."""
    sets = sets if isinstance(sets, dict) else dict.fromkeys(sets)
    queries = queries.reset_index(drop=True)
    queries["kns"] = kn_sets(queries, t)
    others = OtherFacts(queries, queries["kns"])
    edited = _EditedSets(sets, controls, own, num_neurons, others)
    objects = pd.DataFrame(facts).groupby("relation")
    plans = []
    omissions = []
    for fact, group in queries.groupby("fact", sort=False):
        draw = partial(_generator, seed, fact)
        plan = _plan(group, objects, draw)
        plan["edits"] = edited.of_fact(group, plan["query"], draw)
        plan["locality"] = _locality(queries, plan, n_locality, draw("locality"))
        plan["texts"] = _some(texts, ppl_entries, draw("texts"))
        plans.append(plan)
        omissions += [(fact, what, reason) for what, reason in _unmeasured(plan)]
    return plans, pd.DataFrame(omissions, columns=["fact", "what", "reason"])


def _some(texts, count, rng):
    """`count` of the texts."""
    if len(texts) < count:
        raise ValueError(
            f"perplexity needs {count} entries an edit and the corpus has {len(texts)} "
            "that are long enough; lower ppl_entries or give another corpus"
        )
    order = rng.permutation(len(texts))
    return [texts[place] for place in order[:count]]


def _generator(seed, fact, what):
    """A random generator for each thing that a fact draws, so that one draw more does not move the
    others."""
    fact = zlib.crc32(fact.encode())
    what = zlib.crc32(what.encode())
    return np.random.default_rng([seed, fact, what])


def _plan(group, objects, draw):
    """A fact, whose queries are `group`, with its q_i, its o' and all its KNs."""
    first = group.iloc[0]
    plan = {name: first[name] for name in ("fact", "relation", "subject", "object")}
    known = group["known"].tolist()
    places = np.flatnonzero(known) if any(known) else len(known)
    plan["prompts"] = group["prompt"].tolist()
    plan["known"] = known
    plan["query"] = int(draw("query").choice(places))
    plan["new_object"] = _new_object(first, objects, draw("object"))
    kns = set().union(*group["kns"])
    plan["kns"] = _as_lists(kns)
    return plan


def _new_object(first, objects, rng):
    """One of the relation's objects that the subject does not have; None where there is none."""
    facts = objects.get_group(first["relation"])
    own = facts.loc[facts["subject"] == first["subject"], "object"]
    others = set(facts["object"]) - {first["object"], *own}
    return str(rng.choice(sorted(others))) if others else None


def _unmeasured(plan):
    """(what, reason) of all that a fact cannot be measured on."""
    if not any(plan["known"]):
        yield "rel, gen", "no known query: only in the columns over all queries"
    elif sum(plan["known"]) == 1:
        yield "gen", "no known neighbour of q_i: Gen is undefined"
    if plan["new_object"] is None:
        yield "update", f"relation {plan['relation']} has no other object to update to"
    for edit in plan["edits"]:
        if edit["control"] == "none" and not edit["set"]:
            yield edit["neurons"], "no neurons: nothing is edited"


@dataclass
class _EditedSets:
    """The sets of neurons that are edited, and for each its controls; see `plan_edits`."""

    specs: dict
    controls: tuple
    own: bool
    num_neurons: int
    others: OtherFacts

    def of_fact(self, group, query, draw):
        """Every edit of a fact whose q_i is `query`, dicts of neurons, control and set: the sets
        themselves, then their controls."""
        first = group.iloc[0]
        kns = group["kns"]
        sets = {"local": kns.iloc[query], "global": set().union(*kns)}
        edits = []
        for name, spec in self.specs.items():
            if spec is not None:
                sets[name] = cas_neurons(first, **spec)
            if self.own:
                edits.append(_edit(name, "none", sets[name]))
        for name, control in product(self.specs, self.controls):
            spec = self.specs[name] or {}
            rng = draw(f"{control} {name}")
            drawn = self._control(control, sets[name], first, spec, rng)
            edits.append(_edit(name, control, drawn))
        return edits

    def _control(
        self,
        control,
        neurons,
        first,
        spec,
        rng,
    ):
        one_of("control", control, CONTROLS)
        if control == "matched":
            return neurons  # `edit_facts` finds theirs: it takes the model
        if control == "random":
            return random_neurons(neurons, self.num_neurons, rng)
        if control == "strongest":
            score = spec.get("score", "raw")
            return strongest_neurons(first, len(neurons), score)
        same = control == "same_relation"
        return self.others.draw(neurons, first["fact"], rng, same_relation=same)


def _edit(name, control, neurons):
    return {
        "neurons": name,
        "control": control,
        "set": _as_lists(neurons),
    }


def _as_lists(neurons):
    return sorted(map(list, neurons))


def _locality(queries, fact, count, rng):
    """Queries of facts that share neither subject nor object with `fact`. Half are of the same
    relation (more from one side where the other has too few), and known queries come first."""
    free = queries["subject"] != fact["subject"]
    free &= queries["object"] != fact["object"]
    same = queries["relation"] == fact["relation"]
    outside = np.flatnonzero(free & ~same)
    inside = np.flatnonzero(free & same)
    half = max(count // 2, count - len(outside))
    half = min(half, len(inside))
    known = queries["known"].to_numpy()
    chosen = _known_first(inside, known, half, rng)
    chosen += _known_first(outside, known, count - half, rng)
    found = queries.assign(same=same).iloc[chosen]
    found = found[["prompt", "object", "known", "same"]]
    return found.to_dict("records")


def _known_first(places, known, count, rng):
    """`count` of the places, drawn among those of known queries, then among the others."""
    chosen = []
    for part in (places[known[places]], places[~known[places]]):
        count -= len(chosen)
        size = min(count, len(part))
        chosen += rng.choice(part, size, replace=False).tolist()
    return chosen
