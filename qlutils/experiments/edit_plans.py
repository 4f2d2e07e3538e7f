"""What each fact draws for its edits: a query, a new object, neurons, unrelated queries, texts."""

from __future__ import annotations

import zlib
from collections import defaultdict
from functools import partial

import numpy as np
import pandas as pd

from qlutils.neurons.cas import cas_neurons, strongest_neurons
from qlutils.neurons.others import OtherFacts, random_neurons
from qlutils.neurons.sets import kn_sets

CONTROLS = ("random", "matched", "same_relation", "other_relation", "strongest")


def plan_edits(
    queries,
    facts,
    *,
    num_neurons,
    sets=("local", "global"),
    controls=("random",),
    t=0.2,
    n_locality=20,
    texts=(),
    ppl_entries=5,
    seed=0,
) -> tuple[list[dict], pd.DataFrame]:
    """One JSON-able dict a fact for `edit_facts`, and what cannot be measured: fact, what, reason.

    queries: a `queries` frame. facts: those whose objects an update may choose from. sets,
    controls: see `_EditedSets`. texts: those that perplexity may be measured on; ValueError for
    fewer than `ppl_entries`. Each fact draws, with its own seed: q_i among its known queries (among
    all where none is known), o' among the relation's other objects, `n_locality` queries of other
    facts (`_Locality`), and `ppl_entries` texts, the same for all of the fact's edits."""
    if ppl_entries and len(texts) < ppl_entries:
        raise ValueError(
            f"perplexity needs {ppl_entries} entries an edit and the corpus has {len(texts)} "
            "that are long enough; lower ppl_entries or give another corpus"
        )
    queries = queries.reset_index(drop=True)
    edited = _EditedSets(queries, sets, controls, t, num_neurons)
    locality, objects, plans = _Locality(queries), defaultdict(list), []
    for fact in facts:
        objects[fact.relation].append((fact.subject, fact.object))
    for fact, group in queries.groupby("fact", sort=False):
        draw = partial(_generator, seed, fact)
        plan = _plan(group, edited, objects, draw)
        plan["locality"] = locality.draw(group.index[0], n_locality, draw("locality"))
        chosen = draw("texts").permutation(len(texts))[:ppl_entries]
        plan["texts"] = [texts[place] for place in chosen]
        plans.append(plan)
    omissions = [(plan["fact"], *one) for plan in plans for one in _unmeasured(plan)]
    return plans, pd.DataFrame(omissions, columns=["fact", "what", "reason"])


def _plan(group, edited, objects, draw) -> dict:
    """A fact, whose queries are `group`, with its q_i, its o' and its edits."""
    first = group.iloc[0]
    plan = {name: first[name] for name in ("fact", "relation", "subject", "object")}
    known = group["known"].to_numpy(bool)
    query = draw("query").choice(np.flatnonzero(known) if known.any() else len(known))
    plan["prompts"] = group["prompt"].tolist()
    plan["known"] = known.tolist()
    plan["query"] = int(query)
    plan["new_object"] = _new_object(plan, objects[plan["relation"]], draw("object"))
    plan["kns"], plan["edits"] = edited.of_fact(group, query, draw)
    return plan


def _generator(seed, fact, what):
    """A random generator for each thing that a fact draws, so that one draw more does not move the
    others."""
    return np.random.default_rng([seed, zlib.crc32(fact.encode()), zlib.crc32(what.encode())])


def _new_object(plan, pairs, rng) -> str | None:
    """One of the relation's objects (of its pairs subject, object) that the subject does not have;
    None where there is none."""
    own = {obj for subject, obj in pairs if subject == plan["subject"]}
    others = {obj for _, obj in pairs} - own - {plan["object"]}
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


class _EditedSets:
    """The sets of neurons that are edited, and for each its controls.

    sets: names, or {name: spec} with a spec of None for "local" (N_i) and "global" (union of the
    N_j), or `cas_neurons` keywords. controls: for every set as many neurons in each layer, drawn at
    random ("random"), as active at q_i but no KNs of the fact ("matched"), or KNs of one other fact
    of the same relation ("same_relation") or of another ("other_relation"); "strongest": as many in
    all, of the largest mean score over the fact's queries, perhaps in it."""

    def __init__(self, queries, sets, controls, t, num_neurons):
        if not isinstance(sets, dict):
            sets = dict.fromkeys(sets)
        for name, spec in sets.items():
            if spec is None and name not in ("local", "global"):
                raise ValueError(
                    f"neuron set {name!r} is unknown; use local, global, or one with CAS settings"
                )
        for control in controls:
            if control not in CONTROLS:
                raise ValueError(f"control {control!r} is unknown; use {', '.join(CONTROLS)}")
        self.specs, self.controls, self.num_neurons = sets, controls, num_neurons
        self.kns = kn_sets(queries, t)
        self.others = OtherFacts(queries, self.kns)

    def of_fact(self, group, query, draw) -> tuple[list, list[dict]]:
        """The KNs of all queries of a fact whose q_i is `query`; and every edit of it: neurons,
        control, set."""
        own, first, edits = [self.kns[row] for row in group.index], group.iloc[0], []
        every = set().union(*own)
        for name, spec in self.specs.items():
            chosen = own[query] if name == "local" else every
            if spec is not None:
                chosen = cas_neurons(first, **spec)
            edits.append(_edit(name, "none", chosen))
            for control in self.controls:
                rng = draw(f"{control} {name}")
                others = self._control(control, chosen, first, spec or {}, rng)
                edits.append(_edit(name, control, others))
        edits.sort(key=lambda edit: edit["control"] != "none")
        return _as_lists(every), edits

    def _control(self, control, neurons, first, spec, rng) -> set:
        if control == "matched":
            return set()  # `edit_facts` finds them: it takes the model
        if control == "random":
            return random_neurons(neurons, self.num_neurons, rng)
        if control == "strongest":
            return strongest_neurons(first, len(neurons), spec.get("score", "raw"))
        same_relation = control == "same_relation"
        return self.others.draw(neurons, first["fact"], rng, same_relation=same_relation)


def _edit(name, control, neurons) -> dict:
    return dict(neurons=name, control=control, set=_as_lists(neurons))


def _as_lists(neurons) -> list[list[int]]:
    return sorted(map(list, neurons))


class _Locality:
    """Queries of facts that share neither subject nor object. Half of a draw is of the same
    relation (more from one side where the other has too few), and known queries come first."""

    def __init__(self, queries):
        self.known = queries["known"].to_numpy(bool)
        columns = queries[["prompt", "object"]].assign(known=self.known)
        self.queries = columns.to_dict("records")
        self.codes = {
            name: pd.factorize(queries[name])[0] for name in ("relation", "subject", "object")
        }

    def draw(self, row, count, rng) -> list[dict]:
        """For the fact of query `row`."""
        shared = {name: codes == codes[row] for name, codes in self.codes.items()}
        free = ~shared["subject"] & ~shared["object"]
        same = np.flatnonzero(free & shared["relation"])
        other = np.flatnonzero(free & ~shared["relation"])
        half = min(len(same), max(count // 2, count - len(other)))
        chosen = self._known_first(same, half, rng)
        chosen += self._known_first(other, count - half, rng)
        return [self.queries[i] | {"same": bool(shared["relation"][i])} for i in chosen]

    def _known_first(self, rows, count, rng) -> list[int]:
        known, unknown = rows[self.known[rows]], rows[~self.known[rows]]
        first = rng.choice(known, min(count, len(known)), replace=False)
        rest = rng.choice(unknown, min(count - len(first), len(unknown)), replace=False)
        return [*first.tolist(), *rest.tolist()]
