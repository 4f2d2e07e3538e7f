"""What each fact draws for its edits: a query, a new object, neurons, unrelated queries, texts."""

import zlib
from functools import partial
from itertools import product

import numpy as np
import pandas as pd

from qlutils.checks import one_of
from qlutils.neurons.cas import cas_neurons, strongest_neurons
from qlutils.neurons.others import OtherFacts, random_neurons
from qlutils.neurons.sets import FACT, kn_sets

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
    edited = _edited(sets, controls, own)
    _check(texts, ppl_entries)
    queries = queries.reset_index(drop=True).assign(kns=lambda frame: kn_sets(frame, t))
    others = OtherFacts(queries, queries["kns"])
    objects = pd.DataFrame(facts).groupby("relation")
    plans = []
    omissions = []
    for fact, group in queries.groupby("fact", sort=False):
        draw = partial(_generator, seed, fact)
        plan = _plan(group, objects, draw)
        plan["edits"] = _edits(group, plan["query"], edited, num_neurons, others, draw)
        plan["locality"] = _locality(queries, plan, n_locality, draw("locality"))
        order = draw("texts").permutation(len(texts))
        plan["texts"] = [texts[place] for place in order[:ppl_entries]]
        plans.append(plan)
        omissions += [(fact, what, reason) for what, reason in _unmeasured(plan)]
    return plans, pd.DataFrame(omissions, columns=["fact", "what", "reason"])


def _check(texts, ppl_entries):
    if len(texts) < ppl_entries:
        raise ValueError(
            f"perplexity needs {ppl_entries} entries an edit and the corpus has {len(texts)} "
            "that are long enough; lower ppl_entries or give another corpus"
        )


def _edited(sets, controls, own):
    """Pairs of a set (name, spec) and a control: the sets themselves ("none"), then their
    controls."""
    for control in controls:
        one_of("control", control, CONTROLS)
    sets = sets if isinstance(sets, dict) else dict.fromkeys(sets)
    controls = ("none", *controls) if own else controls
    return sorted(product(sets.items(), controls), key=lambda pair: pair[1] != "none")


def _generator(seed, fact, what):
    """A random generator for each thing that a fact draws, so that one draw more does not move the
    others."""
    return np.random.default_rng([seed, zlib.crc32(fact.encode()), zlib.crc32(what.encode())])


def _plan(group, objects, draw):
    """A fact, whose queries are `group`, with its q_i, its o' and all its KNs."""
    first = group.iloc[0]
    known = group["known"].tolist()
    places = np.flatnonzero(known) if any(known) else len(known)
    return first[FACT].to_dict() | {
        "prompts": group["prompt"].tolist(),
        "known": known,
        "query": int(draw("query").choice(places)),
        "new_object": _new_object(first, objects, draw("object")),
        "kns": _as_lists(set().union(*group["kns"])),
    }


def _new_object(first, objects, rng):
    """One of the relation's objects that the subject does not have; None where there is none. None
    that one of the subject's begins with: of "Nigeria" the model says "Niger" without any edit."""
    facts = objects.get_group(first["relation"])
    own = {first["object"], *facts.loc[facts["subject"] == first["subject"], "object"]}
    others = [one for one in set(facts["object"]) if not any(has.startswith(one) for has in own)]
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


def _edits(group, query, edited, num_neurons, others, draw):
    """Every edit of a fact whose q_i is `query`, dicts of neurons, control and set; see
    `_edited`."""
    first = group.iloc[0]
    sets = {
        "local": group["kns"].iloc[query],
        "global": set().union(*group["kns"]),
    }
    edits = []
    for (name, spec), control in edited:
        neurons = sets[name] if spec is None else cas_neurons(first, **spec)
        rng = draw(f"{control} {name}")
        if control == "random":
            neurons = random_neurons(neurons, num_neurons, rng)
        elif control == "strongest":
            score = spec.get("score", "raw") if spec else "raw"
            neurons = strongest_neurons(first, len(neurons), score)
        elif control.endswith("_relation"):
            same = control == "same_relation"
            neurons = others.draw(neurons, first["fact"], rng, same_relation=same)
        # those of "matched" are found by `edit_facts`, as it takes the model
        edits.append(
            {
                "neurons": name,
                "control": control,
                "set": _as_lists(neurons),
            }
        )
    return edits


def _as_lists(neurons):
    return sorted(map(list, neurons))


def _locality(queries, fact, count, rng):
    """Queries of facts that share neither subject nor object with `fact`. Half are of the same
    relation (more from one side where the other has too few), and known queries come first."""
    free = (queries["subject"] != fact["subject"]) & (queries["object"] != fact["object"])
    queries = queries.assign(same=queries["relation"] == fact["relation"])[free]
    outside, inside = (queries[queries["same"] == same] for same in (False, True))
    half = min(max(count // 2, count - len(outside)), len(inside))
    drawn = []
    for side, size in ((inside, half), (outside, count - half)):
        for known in (True, False):
            part = side[side["known"] == known]
            drawn.append(part.sample(min(size, len(part)), random_state=rng))
            size -= len(drawn[-1])
    return pd.concat(drawn)[["prompt", "object", "known", "same"]].to_dict("records")
