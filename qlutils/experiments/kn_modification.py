"""The editing experiment of Tables 2 and 3: what is drawn and what is measured (the tables:
`edit_report`).

An *edit* is one fact, one set of neurons and one operation. Reliability (Rel) is judged on one
query q_i of the fact, generalization (Gen) on its neighbours, locality (Loc) on queries of other
facts. All edits of a unit of facts go through the model as virtual edits in shared batches (see
`rows.score_rows`).
"""

from __future__ import annotations

import zlib

import numpy as np
import pandas as pd

from qlutils.neurons.sets import (
    OtherFacts,
    active_neurons,
    cas_neurons,
    kn_sets,
    random_neurons,
    strongest_neurons,
)

CONTROLS = ("random", "matched", "same_relation", "other_relation", "strongest")
# A text is broken where an edit multiplies its perplexity by more than this: each of its tokens is
# then, on average, less than a tenth as likely as before. The paper's largest mean dPPL, 2.02, is
# a factor of 3; a few texts beyond 10 (factors of 1e10 occur) would decide a mean alone.
BROKEN = 10.0


# --- what is drawn --------------------------------------------------------------------------------


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
    """One JSON-able dict a fact for `edit_facts`, and the named omissions (fact, what, reason).

    queries: a `queries` frame. facts: those whose objects an update may choose from. sets: names,
    or {name: spec} with a spec of None for "local" (N_i) and "global" (union of the N_j), or
    `cas_neurons` keywords.
    controls: for every set as many neurons in each layer, drawn at random ("random"), as active at
    q_i but no KNs of the fact ("matched"), or KNs of one other fact of the same relation
    ("same_relation") or of another ("other_relation"); "strongest": as many in all, of the largest
    mean score over the fact's queries, perhaps in it.
    texts: entries that perplexity is measured on.

    Each fact draws, with its own seed: q_i among its known queries (among all where none is known),
    o' among the relation's other objects, `n_locality` queries of facts that share neither subject
    nor object, half from the same relation and known ones first, and `ppl_entries` texts, the same
    for all of the fact's edits. ValueError: fewer texts than entries."""
    if ppl_entries and len(texts) < ppl_entries:
        raise ValueError(
            f"perplexity needs {ppl_entries} entries an edit and the corpus has {len(texts)} "
            "that are long enough; lower ppl_entries or give another corpus"
        )
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        raise ValueError(f"control {unknown[0]!r} is unknown; use {', '.join(CONTROLS)}")
    specs, own = _specs(sets), kn_sets(queries, t)
    others, locality, said = OtherFacts(queries, own), _Locality(queries), {}
    for fact in facts:
        said.setdefault(fact.relation, []).append((fact.subject, fact.object))
    plans, omissions = [], []
    for fact, group in queries.groupby("fact", sort=False):
        draw = _Draws(seed, fact)
        first, known = group.iloc[0], group["known"].to_numpy(bool)
        relation, subject, obj = first["relation"], first["subject"], first["object"]
        at = int(draw("query").choice(np.flatnonzero(known) if known.any() else len(group)))
        pairs = said.get(relation, [])
        objects = sorted({o for _, o in pairs} - {o for s, o in pairs if s == subject} - {obj})
        mine = [own[queries.index.get_loc(i)] for i in group.index]
        chosen = {name: _select(spec, name, mine, at, first) for name, spec in specs.items()}
        omissions += [(fact, *one) for one in _omissions(known, relation, objects, chosen)]
        edits = [dict(neurons=name, control="none", set=one) for name, one in chosen.items()]
        edits += [
            dict(
                neurons=name,
                control=control,
                set=_control(
                    control, one, num_neurons, others, first, specs[name], draw(f"{control} {name}")
                ),
            )
            for name, one in chosen.items()
            for control in controls
        ]
        plans.append(
            dict(
                fact=fact,
                relation=relation,
                subject=subject,
                object=obj,
                prompts=group["prompt"].tolist(),
                known=known.tolist(),
                query=at,
                kns=sorted(map(list, set().union(*mine))),
                new_object=str(draw("object").choice(objects)) if objects else None,
                edits=[{**edit, "set": sorted(map(list, edit["set"]))} for edit in edits],
                locality=locality.draw(
                    queries.index.get_loc(group.index[0]), n_locality, draw("locality")
                ),
                texts=[texts[i] for i in draw("texts").permutation(len(texts))[:ppl_entries]],
            )
        )
    return plans, pd.DataFrame(omissions, columns=["fact", "what", "reason"])


class _Draws:
    """A random generator for each thing a fact draws, so that drawing one more does not move the
    others."""

    def __init__(self, seed, fact):
        self.seed = [seed, zlib.crc32(fact.encode())]

    def __call__(self, what):
        return np.random.default_rng([*self.seed, zlib.crc32(what.encode())])


def _omissions(known, relation, objects, chosen):
    """(what, reason) of all that a fact cannot be measured on."""
    if not known.any():
        yield "rel, gen", "no known query: only in the columns over all queries"
    elif known.sum() == 1:
        yield "gen", "no known neighbour of q_i: Gen is undefined"
    if not objects:
        yield "update", f"relation {relation} has no other object to update to"
    for name, one in chosen.items():
        if not one:
            yield name, "no neurons: nothing is edited"


def _specs(sets) -> dict:
    specs = (
        dict(sets)
        if isinstance(sets, dict)
        else {name: {} if name == "cas" else None for name in sets}
    )
    for name, spec in specs.items():
        if spec is None and name not in ("local", "global"):
            raise ValueError(
                f"neuron set {name!r} is unknown; use local, global, or one with CAS settings"
            )
    return specs


def _select(spec, name, sets, at, first):
    if spec is not None:
        return cas_neurons(first, **spec)
    return sets[at] if name == "local" else set().union(*sets)


def _control(control, one, num_neurons, others, first, spec, rng) -> set:
    """As many neurons as `one`, in each layer and none of them in it but for "strongest"; fewer
    where there are not that many.

    "matched" needs the model: `edit_facts` fills it in."""
    if control == "matched":
        return set()
    if control == "random":
        return random_neurons(one, num_neurons, rng)
    if control == "strongest":
        return strongest_neurons(first, len(one), (spec or {}).get("score", "raw"))
    return others.draw(one, first["fact"], rng, same_relation=control == "same_relation")


class _Locality:
    """Queries of other facts. Half of a draw is of the same relation (more from one side where the
    other has too few), and known queries come first."""

    def __init__(self, queries):
        self.prompts, self.objects = queries["prompt"].tolist(), queries["object"].tolist()
        self.known = queries["known"].to_numpy(bool)
        self.codes = {
            name: pd.factorize(queries[name])[0] for name in ("relation", "subject", "object")
        }

    def draw(self, row, count, rng) -> list[dict]:
        """For the fact of query `row`."""
        shared = {name: codes == codes[row] for name, codes in self.codes.items()}
        free = ~shared["subject"] & ~shared["object"]
        same, other = (
            np.flatnonzero(free & part) for part in (shared["relation"], ~shared["relation"])
        )
        half = min(len(same), max(count // 2, count - len(other)))
        chosen = [(i, True) for i in self._known_first(same, half, rng)]
        chosen += [(i, False) for i in self._known_first(other, count - half, rng)]
        return [
            dict(
                prompt=self.prompts[i], object=self.objects[i], known=bool(self.known[i]), same=flag
            )
            for i, flag in chosen
        ]

    def _known_first(self, rows, count, rng) -> list[int]:
        known, unknown = rows[self.known[rows]], rows[~self.known[rows]]
        first = rng.choice(known, min(count, len(known)), replace=False)
        rest = rng.choice(unknown, min(count - len(first), len(unknown)), replace=False)
        return [*first.tolist(), *rest.tolist()]


# --- what is measured -----------------------------------------------------------------------------


def edit_facts(
    lm,
    unit,
    *,
    ops=("erase", "update"),
    lambda1=2.0,
    lambda2=2.0,
    embedding="input",
    ppl_max_tokens=256,
) -> pd.DataFrame:
    """One row an edit of the facts in `unit` (dicts of `plan_edits`); a task for `store.run_units`.

    Columns: fact, relation, subject, object, new_object, op, neurons, control, n_neurons; rel, gen,
    loc, avg over known queries and rel_all, ... over all; loc_same, loc_other, the halves of Loc;
    loc_new, the share of its queries whose object is another and whose answer an update makes the
    new one; rel_match, gen_match, from token-level matches; p_before, p_after of the answer an
    operation is about (erasure: o,
    update: o') at q_i and gen_p_before, gen_p_after at its neighbours; ppl_before, ppl_after and
    their relative change dppl; broken, the share of the texts that the edit breaks (BROKEN); n_gen,
    n_loc, queries behind Gen and Loc; reached, 1 or 0 for each of the fact's queries. NaN where
    undefined. An update whose object cannot follow every prompt is left out, with a `note`.
    """
    book = Book(lm)
    facts = [PlannedFact(book, plan, ops) for plan in unit]
    book.add_locality(facts)
    _match_activations(lm, facts)
    edits, made = [], {}
    for fact in facts:
        options = dict(
            old=fact.old, new=fact.new, lambda1=lambda1, lambda2=lambda2, embedding=embedding
        )
        for op in ops:
            for edit in fact.plan["edits"]:
                if op in fact.targets:
                    edits.append((fact, op, edit, book.change(edit["set"], op, options, made)))
    scores = book.score(
        [(q, change) for fact, op, _, change in edits for q in fact.targets[op] + fact.locality]
    )
    perplexity, spilt = book.perplexities(edits, ppl_max_tokens), book.spilt(edits, scores)
    rows, start = [], len(book.queries)
    for (fact, op, edit, _), ppl, new in zip(edits, perplexity, spilt):
        stop = start + len(fact.targets[op]) + len(fact.locality)
        rows.append(
            _row(fact, op, edit)
            | _metrics(fact, op, scores, range(start, stop))
            | {"loc_new": new}
            | ppl
        )
        start = stop
    for fact in facts:
        rows += [
            _row(fact, "update", edit) | {"note": fact.note}
            for edit in fact.plan["edits"]
            if fact.note
        ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return pd.DataFrame(rows, columns=columns).astype({"note": object})


def _passes(lm, plan: dict, config: dict) -> float:
    """An edit's rows leave the clean pass at the edited layer, on average in the middle."""
    from qlutils.facts import prompt_tokens

    asked = sum(map(prompt_tokens, plan["prompts"]))
    asked += sum(prompt_tokens(query["prompt"]) for query in plan["locality"])
    read = sum(min(prompt_tokens(text), config["ppl_max_tokens"]) for text in plan["texts"])
    return len(plan["edits"]) * len(config["ops"]) * (asked + read) / 2


edit_facts.VERSION = 1
edit_facts.passes = _passes


class Book:
    """The distinct queries of a unit, and the scoring of rows over them."""

    def __init__(self, lm):
        self.lm, self.queries, self.index = lm, [], {}

    def add(self, prompt, target) -> int:
        key = tuple(prompt), tuple(target)
        if key not in self.index:
            self.index[key] = len(self.queries)
            self.queries.append(key)
        return self.index[key]

    def add_locality(self, facts):
        """Add what must not change: the answers that the unedited model gives. It gives known
        queries their objects."""
        from qlutils.change.scaling import greedy_answers

        pairs = {
            (q["prompt"], q["object"]): q["known"] for fact in facts for q in fact.plan["locality"]
        }
        encoded = {pair: self.lm.encode(*pair) for pair in pairs}
        wrong = [pair for pair, known in pairs.items() if not known]
        given = (
            greedy_answers(
                self.lm, *zip(*((encoded[pair][0], len(encoded[pair][1])) for pair in wrong))
            )
            if wrong
            else ()
        )
        for pair, answer in zip(wrong, given):
            encoded[pair] = encoded[pair][0], answer
        for fact in facts:
            fact.locality = [
                self.add(*encoded[q["prompt"], q["object"]]) for q in fact.plan["locality"]
            ]

    def change(self, neurons, op, options, made):
        """One `Change` an edit; equal edits share it, so that they are computed once."""
        from qlutils.change.editing import virtual_edit

        key = (
            tuple(map(tuple, neurons)),
            op,
            tuple(options["old"]) if op == "update" else (),
            tuple(options["new"] or ()) if op == "update" else (),
        )
        if key not in made:
            made[key] = virtual_edit(self.lm, neurons, op, **options)
        return made[key]

    def score(self, rows):
        """Scores of all queries unedited, which costs next to nothing beside `rows`, and then of
        `rows`."""
        from qlutils.change.rows import score_rows

        return score_rows(
            self.lm,
            self.queries,
            [(q, None) for q in range(len(self.queries))] + rows,
            everywhere=True,
        )

    def spilt(self, edits, scores) -> list[float]:
        """loc_new of every edit. Greedy decoding gives the new object where it begins as that does
        and, for one of several tokens, where each of them is the likeliest after those before it;
        only the latter has to be asked for."""
        from qlutils.change.rows import score_rows

        found, asked, start = [], [], len(self.queries)
        for place, (fact, op, _, change) in enumerate(edits):
            start += len(fact.targets[op])
            for row, (q, about) in enumerate(zip(fact.locality, fact.plan["locality"]), start):
                if op == "update" and about["known"] and about["object"] != fact.plan["new_object"]:
                    begins = scores.greedy[row][0] == fact.new[0]
                    if begins and len(fact.new) > 1:
                        asked.append((len(found), (self.queries[q][0], tuple(fact.new)), change))
                    found.append((place, begins))
            start += len(fact.locality)
        if asked:
            queries = list(dict.fromkeys(query for _, query, _ in asked))
            index = {query: i for i, query in enumerate(queries)}
            exact = score_rows(
                self.lm,
                queries,
                [(index[query], change) for _, query, change in asked],
                everywhere=True,
            ).exact
            for (at, *_), given in zip(asked, exact):
                found[at] = found[at][0], bool(given)
        shares = pd.DataFrame(found, columns=["edit", "new"]).groupby("edit")["new"].mean()
        return shares.reindex(range(len(edits))).tolist()

    def perplexities(self, edits, max_tokens) -> list[dict]:
        """ppl_before, ppl_after, dppl and broken of every edit on its fact's entries."""
        from qlutils.change.editing import encode_entries
        from qlutils.change.rows import score_rows

        texts = list(dict.fromkeys(text for fact, *_ in edits for text in fact.plan["texts"]))
        if not texts:
            return [dict.fromkeys(("ppl_before", "ppl_after", "dppl", "broken"), np.nan)] * len(
                edits
            )
        entries = encode_entries(self.lm, texts, max_tokens)
        index = {text: i for i, text in enumerate(texts)}
        used = [[index[text] for text in fact.plan["texts"]] for fact, *_ in edits]
        rows = [(i, change) for (*_, change), mine in zip(edits, used) for i in mine]
        rows = [(i, None) for i in range(len(entries))] + rows
        before, after = np.split(
            score_rows(self.lm, entries, rows, everywhere=True).log_probability, [len(entries)]
        )
        lengths, found, start = np.array([len(target) for _, target in entries]), [], 0
        for mine in used:
            edited, start = after[start : start + len(mine)], start + len(mine)
            tokens = lengths[mine].sum()
            now, then = np.exp(-edited.sum() / tokens), np.exp(-before[mine].sum() / tokens)
            broken = (before[mine] - edited) / lengths[mine] > np.log(BROKEN)
            found.append(
                dict(ppl_before=then, ppl_after=now, dppl=(now - then) / then, broken=broken.mean())
            )
        return found


class PlannedFact:
    """A planned fact with its queries in the book: `targets[op]`, one a prompt, of the object that
    `op` is about."""

    def __init__(self, book, plan, ops):
        self.plan, self.note, self.targets, self.locality, self.new = plan, None, {}, [], None
        lm, prompts = book.lm, plan["prompts"]
        encoded = [lm.encode(prompt, plan["object"]) for prompt in prompts]
        self.prompt, self.old = encoded[plan["query"]]
        if "erase" in ops:
            self.targets["erase"] = [book.add(*one) for one in encoded]
        if "update" in ops and plan["new_object"] is None:
            self.note = f"relation {plan['relation']} has no other object"
        elif "update" in ops:
            try:
                encoded = [lm.encode(prompt, plan["new_object"]) for prompt in prompts]
                self.new = encoded[plan["query"]][1]
                self.targets["update"] = [book.add(*one) for one in encoded]
            except ValueError as error:
                self.note = str(error)


def _match_activations(lm, facts) -> None:
    """Fill in the "matched" controls: neurons about as active at q_i that are KNs of none of the
    fact's queries."""
    import torch

    from qlutils.model.passes import neuron_vectors

    for fact in facts:
        sets = {
            edit["neurons"]: edit["set"] for edit in fact.plan["edits"] if edit["control"] == "none"
        }
        matched = [edit for edit in fact.plan["edits"] if edit["control"] == "matched"]
        if matched:
            active = (
                neuron_vectors(lm, torch.tensor([fact.prompt], device=lm.device))[0]
                .double()
                .cpu()
                .numpy()
            )
        for edit in matched:
            found = active_neurons(
                set(map(tuple, sets[edit["neurons"]])), active, set(map(tuple, fact.plan["kns"]))
            )
            edit["set"] = sorted(map(list, found))


def _row(fact, op, edit) -> dict:
    plan = fact.plan
    return dict(
        fact=plan["fact"],
        relation=plan["relation"],
        subject=plan["subject"],
        object=plan["object"],
        new_object=plan["new_object"],
        prompt=plan["prompts"][plan["query"]],
        op=op,
        neurons=edit["neurons"],
        control=edit["control"],
        n_neurons=len(edit["set"]),
        note=None,
    )


def _metrics(fact, op, scores, rows) -> dict:
    """Of one edit: `rows`, its scores', are those of the fact's targets and locality queries; query
    q unedited is row q."""
    known, at, own = np.array(fact.plan["known"]), fact.plan["query"], fact.targets[op]
    n = len(own)
    exact, match = scores.exact[rows[:n]].astype(float), scores.match[rows[:n]]
    reached, matched = (1 - exact, 1 - match) if op == "erase" else (exact, match)
    p_before, p_after = (np.exp(scores.log_probability[places]) for places in (own, rows[:n]))
    neighbour, locality = np.arange(n) != at, fact.plan["locality"]
    kept = np.array(
        [scores.greedy[row] == scores.greedy[q] for row, q in zip(rows[n:], fact.locality)], float
    )
    same, sure = (np.array([query[key] for query in locality], bool) for key in ("same", "known"))
    found = dict(
        rel=reached[at] if known[at] else np.nan,
        gen=_mean(reached[neighbour & known]) if known[at] else np.nan,
        loc=_mean(kept[sure]),
        loc_same=_mean(kept[sure & same]),
        loc_other=_mean(kept[sure & ~same]),
        rel_all=reached[at],
        gen_all=_mean(reached[neighbour]),
        loc_all=_mean(kept),
        rel_match=matched[at] if known[at] else np.nan,
        gen_match=_mean(matched[neighbour & known]),
        p_before=p_before[at],
        p_after=p_after[at],
        gen_p_before=_mean(p_before[neighbour]),
        gen_p_after=_mean(p_after[neighbour]),
        reached=reached.tolist(),
        n_gen=int((neighbour & known).sum()),
        n_loc=int(sure.sum()),
    )
    for end in ("", "_all"):  # undefined where one of the three is
        found[f"avg{end}"] = float(
            np.mean([found[f"{name}{end}"] for name in ("rel", "gen", "loc")])
        )
    return found


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else np.nan


# --- in a notebook --------------------------------------------------------------------------------


def run_edits(
    study, queries, sets, *, controls=None, facts=None, ops=("erase", "update"), ppl_entries=None
):
    """(frame of `edit_facts`, omissions) of a study's facts, with the notebook's parameters.
    `facts`: ids to keep."""
    from qlutils.change.editing import MIN_TOKENS, usable_texts
    from qlutils.facts import load_facts, perplexity_texts

    p, lm = study.parameters, study.lm()
    entries = p["ppl_entries"] if ppl_entries is None else ppl_entries
    shortest = min(MIN_TOKENS, p["ppl_max_tokens"])
    texts = usable_texts(lm, perplexity_texts(p["corpus"]), shortest) if entries else []
    objects = load_facts(
        study.data, relations=study.relations, middle=p.get("middle", "cut"), warn=False
    )
    plans, omissions = plan_edits(
        queries,
        objects,
        num_neurons=lm.num_neurons,
        sets=sets,
        t=p["t"],
        n_locality=p["n_locality"],
        texts=texts,
        controls=p["controls"] if controls is None else controls,
        ppl_entries=entries,
        seed=study.seed,
    )
    plans = [plan for plan in plans if facts is None or plan["fact"] in facts]
    config = dict(
        ops=list(ops),
        lambda1=p["lambda1"],
        lambda2=p["lambda2"],
        embedding=p["embedding"],
        ppl_max_tokens=p["ppl_max_tokens"],
    )
    what = ", ".join(sets) if len(sets) < 4 else f"{len(sets)} sets"
    name = f"{study.model} {study.method} edits, {what}"
    frame = study.run(edit_facts, [plans], config, desc=name)
    return frame, omissions


def cas_spec(parameters, **changes) -> dict:
    """`cas_neurons` keywords from a notebook's parameters."""
    spec = dict(
        b1=parameters["beta1"],
        b2=parameters["beta2"],
        threshold=parameters["cas_threshold"],
        score=parameters["cas_score"],
    )
    return {**spec, **changes}


def cas_sweep(parameters, betas, thresholds) -> pd.DataFrame:
    """The CAS settings of the sensitivity section, one of the two varied at a time: varied, name,
    spec."""
    base = cas_spec(parameters)
    specs = [("beta", {**base, "b1": b1, "b2": round(1 - b1, 9)}) for b1 in betas]
    specs += [("threshold", {**base, "threshold": threshold}) for threshold in thresholds]
    name = "b1={b1:g} b2={b2:g} threshold={threshold:g}"
    return pd.DataFrame(
        [dict(varied=varied, name=name.format(**spec), spec=spec) for varied, spec in specs]
    )
