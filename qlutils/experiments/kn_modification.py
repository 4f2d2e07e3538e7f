"""Notebook 03: facts edited through their knowledge neurons; what is drawn, and what is measured.

An *edit* is one fact, one set of neurons and one operation (Eq. 2). Reliability (Rel) is judged on
one query q_i of the fact, generalization (Gen) on its neighbours, locality (Loc) on queries of
other facts. All edits of a unit of facts go through the model as virtual edits in shared batches
(see `change.rows.score_rows`); `worked_example` edits the weights themselves.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch

from qlutils.change.editing import (
    MIN_TOKENS,
    edit_weights,
    encode_entries,
    usable_texts,
    virtual_edit,
)
from qlutils.change.rows import Change, score_queries, score_rows
from qlutils.change.scaling import greedy_answers
from qlutils.experiments.edit_tables import PAPER_OP
from qlutils.facts import load_facts, perplexity_texts, prompt_tokens
from qlutils.model.passes import neuron_vectors
from qlutils.neurons.cas import cas_neurons, strongest_neurons
from qlutils.neurons.others import OtherFacts, active_neurons, random_neurons
from qlutils.neurons.sets import kn_sets

CONTROLS = ("random", "matched", "same_relation", "other_relation", "strongest")
# A text is broken where an edit multiplies its perplexity by more than this: each of its tokens is
# then, on average, less than a tenth as likely as before. The paper's largest mean dPPL, 2.02, is
# a factor of 3; a few texts beyond 10 (factors of 1e10 occur) would decide a mean alone.
BROKEN = 10.0
Query = tuple[tuple[int, ...], tuple[int, ...]]  # token ids of a prompt and of an answer


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
    locality, objects = _Locality(queries), _objects(facts)
    plans, omissions = [], []
    for fact, group in queries.groupby("fact", sort=False):
        draw = partial(_generator, seed, fact)
        plan = group.iloc[0][["fact", "relation", "subject", "object"]].to_dict()
        plan |= dict(prompts=group["prompt"].tolist(), known=group["known"].tolist())
        known = np.flatnonzero(plan["known"])
        plan["query"] = int(draw("query").choice(known if len(known) else len(group)))
        plan["kns"] = _as_lists(edited.union(group))
        plan["new_object"] = _new_object(plan, objects[plan["relation"]], draw("object"))
        plan["edits"] = edited.of_fact(group, plan["query"], draw)
        plan["locality"] = locality.draw(group.index[0], n_locality, draw("locality"))
        order = draw("texts").permutation(len(texts))
        plan["texts"] = [texts[i] for i in order[:ppl_entries]]
        plans.append(plan)
        omissions += [(fact, *one) for one in _unmeasured(plan)]
    return plans, pd.DataFrame(omissions, columns=["fact", "what", "reason"])


def _generator(seed, fact, what):
    """A random generator for each thing that a fact draws, so that one draw more does not move the
    others."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in (fact, what))])


def _as_lists(neurons) -> list[list[int]]:
    return sorted(map(list, neurons))


def _objects(facts) -> dict[str, list]:
    """{relation: (subject, object) of its facts}."""
    found = defaultdict(list)
    for fact in facts:
        found[fact.relation].append((fact.subject, fact.object))
    return found


def _new_object(plan, pairs, rng) -> str | None:
    """One of the relation's objects that the subject does not have; None where there is none."""
    own = {plan["object"]} | {obj for subject, obj in pairs if subject == plan["subject"]}
    others = sorted({obj for _, obj in pairs} - own)
    return str(rng.choice(others)) if others else None


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
            sets = {name: {} if name == "cas" else None for name in sets}
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

    def union(self, group) -> set:
        """The KNs of all queries of a fact, whose rows are `group`."""
        return set().union(*(self.kns[row] for row in group.index))

    def of_fact(self, group, query, draw) -> list[dict]:
        """{neurons, control, set} of every edit of a fact whose q_i is `query`."""
        chosen = {name: self._select(name, group, query) for name in self.specs}
        edits = [dict(neurons=name, control="none", set=one) for name, one in chosen.items()]
        for name, one in chosen.items():
            for control in self.controls:
                rng = draw(f"{control} {name}")
                others = self._control(control, name, one, group.iloc[0], rng)
                edits.append(dict(neurons=name, control=control, set=others))
        return [{**edit, "set": _as_lists(edit["set"])} for edit in edits]

    def _select(self, name, group, query) -> set:
        if self.specs[name] is not None:
            return cas_neurons(group.iloc[0], **self.specs[name])
        return self.kns[group.index[query]] if name == "local" else self.union(group)

    def _control(self, control, name, one, first, rng) -> set:
        if control == "matched":
            return set()  # `edit_facts` finds them: it takes the model
        if control == "random":
            return random_neurons(one, self.num_neurons, rng)
        if control == "strongest":
            return strongest_neurons(first, len(one), (self.specs[name] or {}).get("score", "raw"))
        return self.others.draw(one, first["fact"], rng, same_relation=control == "same_relation")


class _Locality:
    """Queries of facts that share neither subject nor object. Half of a draw is of the same
    relation (more from one side where the other has too few), and known queries come first."""

    def __init__(self, queries):
        self.queries, self.known = queries, queries["known"].to_numpy(bool)
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
        found = self.queries.iloc[chosen][["prompt", "object", "known"]]
        found = found.assign(same=shared["relation"][chosen])
        return found.astype({"known": bool}).to_dict("records")

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

    Columns: fact, relation, subject, object, new_object, prompt (q_i), op, neurons, control,
    n_neurons; note, why an update cannot be made (its object cannot follow every prompt), and then
    no numbers; those of `_measures`; loc_new, the share of the known unrelated queries of another
    object whose answer an update makes the new one; those of `_perplexities`. NaN: undefined."""
    options = dict(lambda1=lambda1, lambda2=lambda2, embedding=embedding)
    edits = []
    for plan in unit:
        edits += _edits(lm, TokenisedFact(lm, plan, ops), ops, options)
    made = [edit for edit in edits if edit.change is not None]
    asked = _scored(lm, made, [edit.targets + edit.fact.locality for edit in made])
    new = _shares_of_new_object(lm, made, asked)
    perplexity = _perplexities(lm, made, ppl_max_tokens)
    rows = []
    for edit, scores, share, change in zip(made, asked, new, perplexity):
        rows.append(edit.keys() | _measures(edit, *scores) | {"loc_new": share} | change)
    rows += [edit.keys() for edit in edits if edit.change is None]
    return pd.DataFrame(rows).astype({"note": object})


def _passes(lm, plan: dict, config: dict) -> float:
    """An edit's rows leave the clean pass at the edited layer, on average in the middle."""
    asked = sum(map(prompt_tokens, plan["prompts"]))
    asked += sum(prompt_tokens(query["prompt"]) for query in plan["locality"])
    read = sum(min(prompt_tokens(text), config["ppl_max_tokens"]) for text in plan["texts"])
    return len(plan["edits"]) * len(config["ops"]) * (asked + read) / 2


edit_facts.VERSION = 1
edit_facts.passes = _passes


class TokenisedFact:
    """A planned fact as token ids. targets: {op: a query a prompt, of the object that op is about},
    of updates where `ops` has them and they can be made; else `note` says why not. locality: the
    unrelated queries with the unedited model's answers; of a known one that is its object, of
    another as many greedy tokens."""

    def __init__(self, lm, plan, ops):
        self.plan, self.note, prompts = plan, None, plan["prompts"]
        self.targets = {"erase": [_encoded(lm, prompt, plan["object"]) for prompt in prompts]}
        if "update" in ops and plan["new_object"] is None:
            self.note = f"relation {plan['relation']} has no other object"
        elif "update" in ops:
            try:
                queries = [_encoded(lm, prompt, plan["new_object"]) for prompt in prompts]
                self.targets["update"] = queries
            except ValueError as error:
                self.note = str(error)
        self.locality = [_encoded(lm, one["prompt"], one["object"]) for one in plan["locality"]]
        unknown = [i for i, one in enumerate(plan["locality"]) if not one["known"]]
        asked, objects = zip(*(self.locality[i] for i in unknown)) if unknown else ((), ())
        for i, answer in zip(unknown, greedy_answers(lm, asked, list(map(len, objects)))):
            self.locality[i] = self.locality[i][0], tuple(answer)

    def answer(self, op) -> tuple[int, ...] | None:
        """The object that `op` is about, as it follows q_i."""
        return self.targets[op][self.plan["query"]][1] if op in self.targets else None


def _encoded(lm, prompt, answer) -> Query:
    return tuple(map(tuple, lm.encode(prompt, answer)))


@dataclass
class Edit:
    """One operation on one set of a fact's neurons."""

    fact: TokenisedFact
    op: str
    neurons: str  # the set's name
    control: str
    n_neurons: int
    change: Change | None  # None where the edit cannot be made

    @property
    def targets(self) -> list[Query]:
        return self.fact.targets[self.op]

    def keys(self) -> dict:
        plan = self.fact.plan
        names = ("fact", "relation", "subject", "object", "new_object")
        return {name: plan[name] for name in names} | dict(
            prompt=plan["prompts"][plan["query"]],
            op=self.op,
            neurons=self.neurons,
            control=self.control,
            n_neurons=self.n_neurons,
            note=self.fact.note if self.change is None else None,
        )


def _edits(lm, fact, ops, options) -> list[Edit]:
    """All edits of a fact. Equal ones share their `Change`, so that they are computed once."""
    sets, changes, edits = {}, {}, []
    for op in ops:
        for planned in fact.plan["edits"]:
            name, control = planned["neurons"], planned["control"]
            if control == "matched" and (name, control) not in sets:
                sets[name, control] = matched_neurons(lm, fact.plan, sets[name, "none"])
            neurons = sets.setdefault((name, control), planned["set"])
            key = op, tuple(map(tuple, neurons))
            if op in fact.targets and key not in changes:
                objects = dict(old=fact.answer("erase"), new=fact.answer("update"))
                changes[key] = virtual_edit(lm, neurons, op, **objects, **options)
            edits.append(Edit(fact, op, name, control, len(neurons), changes.get(key)))
    return edits


def matched_neurons(lm, plan, neurons) -> list[list[int]]:
    """For each of a fact's `neurons` one of its layer that is about as active at the end of q_i and
    a KN of none of the fact's queries."""
    prompt, _ = lm.encode(plan["prompts"][plan["query"]], plan["object"])
    active = neuron_vectors(lm, torch.tensor([prompt], device=lm.device))[0]  # (L, N)
    kns = set(map(tuple, plan["kns"]))
    return _as_lists(active_neurons(set(map(tuple, neurons)), active.cpu().double(), kns))


def _scored(lm, edits, queries) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """The scores of each edit's queries before and after it: a row a query, with the columns
    log_probability, exact, match and greedy (see `Scores`)."""
    place, before, after = {}, [], []
    for edit, own in zip(edits, queries):
        for query in own:
            index = place.setdefault(query, len(place))
            before.append((index, None))  # equal rows are computed once
            after.append((index, edit.change))
    scores = pd.DataFrame(vars(score_rows(lm, list(place), before + after, everywhere=True)))
    before, after = scores[: len(before)], scores[len(before) :]
    stops = np.cumsum([len(own) for own in queries])
    return [(before[i:j], after[i:j]) for i, j in zip([0, *stops], stops)]


def _measures(edit, before, after) -> dict:
    """rel, gen, loc and their mean avg, over known queries, and rel_all, ... over all; loc_same,
    loc_other, the halves of Loc; rel_match, gen_match, from token-level matches; p_before, p_after
    of the answer that an operation is about (erasure: o, update: o') at q_i and gen_p_before,
    gen_p_after at its neighbours; reached, 1 or 0 for each of the fact's queries; n_gen, n_loc, the
    queries behind Gen and Loc."""
    plan, n = edit.fact.plan, len(edit.targets)
    at, known = plan["query"], np.array(plan["known"], bool)
    reached, matched = after["exact"].to_numpy(float)[:n], after["match"].to_numpy()[:n]
    if edit.op == "erase":
        reached, matched = 1 - reached, 1 - matched
    p_before, p_after = (np.exp(one["log_probability"].to_numpy()) for one in (before, after))
    neighbour = np.arange(n) != at
    near = neighbour & known
    judged = 1.0 if known[at] else np.nan  # Rel and Gen are those of edits on a known query
    pairs = zip(before["greedy"][n:], after["greedy"][n:])
    kept = np.array([one == other for one, other in pairs], float)
    sure, same = (
        np.array([one[key] for one in plan["locality"]], bool) for key in ("known", "same")
    )
    found = dict(
        rel=judged * reached[at],
        gen=judged * _mean(reached[near]),
        loc=_mean(kept[sure]),
        loc_same=_mean(kept[sure & same]),
        loc_other=_mean(kept[sure & ~same]),
        rel_all=reached[at],
        gen_all=_mean(reached[neighbour]),
        loc_all=_mean(kept),
        rel_match=judged * matched[at],
        gen_match=judged * _mean(matched[near]),
        p_before=p_before[at],
        p_after=p_after[at],
        gen_p_before=_mean(p_before[:n][neighbour]),
        gen_p_after=_mean(p_after[:n][neighbour]),
        reached=reached.tolist(),
        n_gen=int(near.sum()),
        n_loc=int(sure.sum()),
    )
    for ending in ("", "_all"):  # undefined where one of the three is
        parts = [found[f"{name}{ending}"] for name in ("rel", "gen", "loc")]
        found[f"avg{ending}"] = float(np.mean(parts))
    return found


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else np.nan


def _shares_of_new_object(lm, edits, scored) -> list[float]:
    """loc_new of every edit. Greedy decoding gives the new object where it begins as that does and,
    for one of several tokens, where each of them is the likeliest after those before it; only the
    latter has to be asked for."""
    begun = [
        _begun(edit, after["greedy"]) if edit.op == "update" else []
        for edit, (_, after) in zip(edits, scored)
    ]
    longer = [[query for query in own if query and len(query[1]) > 1] for own in begun]
    shares = []
    for own, some, (_, after) in zip(begun, longer, _scored(lm, edits, longer)):
        short = sum(query is not None for query in own) - len(some)
        shares.append((short + after["exact"].sum()) / len(own) if own else np.nan)
    return shares


def _begun(edit, greedy) -> list[Query | None]:
    """For each known unrelated query of another object than an update's new one: the query for the
    new object where the edited model's answer begins as that does, else None."""
    found, new = [], edit.fact.answer("update")
    unrelated = zip(edit.fact.locality, edit.fact.plan["locality"], greedy[len(edit.targets) :])
    for (prompt, _), about, said in unrelated:
        if about["known"] and about["object"] != edit.fact.plan["new_object"]:
            found.append((prompt, new) if said[0] == new[0] else None)
    return found


def _perplexities(lm, edits, max_tokens) -> list[dict]:
    """ppl_before and ppl_after of all texts of every edit together, their relative change dppl, and
    broken, the share of the texts that the edit breaks (BROKEN)."""
    texts = list(dict.fromkeys(text for edit in edits for text in edit.fact.plan["texts"]))
    if not texts:
        return [dict.fromkeys(("ppl_before", "ppl_after", "dppl", "broken"), np.nan)] * len(edits)
    entries = dict(zip(texts, encode_entries(lm, texts, max_tokens)))
    entries = {text: tuple(map(tuple, entry)) for text, entry in entries.items()}
    read = [[entries[text] for text in edit.fact.plan["texts"]] for edit in edits]
    found = []
    for own, scores in zip(read, _scored(lm, edits, read)):
        tokens = np.array([len(scored) for _, scored in own])
        before, after = (one["log_probability"].to_numpy() for one in scores)
        then, now = (np.exp(-one.sum() / tokens.sum()) for one in (before, after))
        broken = ((before - after) / tokens > np.log(BROKEN)).mean()
        found.append(dict(ppl_before=then, ppl_after=now, dppl=(now - then) / then, broken=broken))
    return found


# --- in a notebook --------------------------------------------------------------------------------


def study_plans(study, queries, sets, *, controls=(), ppl_entries=0):
    """`plan_edits` of a study's facts with the notebook's parameters."""
    p, lm = study.parameters, study.lm()
    shortest = min(MIN_TOKENS, p["ppl_max_tokens"])
    objects = load_facts(
        study.data, relations=study.relations, middle=p.get("middle", "cut"), warn=False
    )
    return plan_edits(
        queries,
        objects,
        num_neurons=lm.num_neurons,
        sets=sets,
        controls=controls,
        t=p["t"],
        n_locality=p["n_locality"],
        texts=usable_texts(lm, perplexity_texts(p["corpus"]), shortest) if ppl_entries else (),
        ppl_entries=ppl_entries,
        seed=study.seed,
    )


def run_edits(study, queries, sets, *, controls=None, facts=None, ppl_entries=None):
    """(frame of `edit_facts`, omissions) of a study's facts, with the notebook's parameters unless
    others are given. `facts`: ids to keep."""
    p = study.parameters
    plans, omissions = study_plans(
        study,
        queries,
        sets,
        controls=p["controls"] if controls is None else controls,
        ppl_entries=p["ppl_entries"] if ppl_entries is None else ppl_entries,
    )
    if facts is not None:
        plans = [plan for plan in plans if plan["fact"] in facts]
    config = {name: p[name] for name in ("lambda1", "lambda2", "embedding", "ppl_max_tokens")}
    what = ", ".join(sets) if len(sets) < 4 else f"{len(sets)} sets"
    name = f"{study.model} {study.method} edits, {what}"
    frame = study.run(edit_facts, [plans], {"ops": ["erase", "update"], **config}, desc=name)
    return frame, omissions


def sample_of_facts(frame, size, seed=0) -> list[str]:
    """The ids of a seeded sample of the facts of a frame."""
    names = sorted(frame["fact"].unique())
    return sorted(np.random.default_rng(seed).permutation(names)[:size])


def with_more_controls(study, queries, edits, controls, size) -> pd.DataFrame:
    """The `edits` of a sample of `size` facts, and the same edits of other `controls` in their
    place; of those without perplexity."""
    some = sample_of_facts(edits, size, study.seed)
    more, _ = run_edits(
        study, queries, ["local", "global"], controls=controls, facts=some, ppl_entries=0
    )
    return pd.concat([edits[edits["fact"].isin(some)], more[more["control"] != "none"]])


# --- one fact, to be read -------------------------------------------------------------------------


@dataclass
class WorkedExample:
    """What the edits of one fact change.

    answers, a row an edit and query: op, neurons, n_neurons; prompt; asked: "q_i", "rephrasing" or
    "unrelated"; object, that an operation is about (of unrelated queries the unedited answer);
    p_before, p_after, its probability; answer_before, answer_after, the greedy answers; changed.
    texts: what the model writes after q_i."""

    answers: pd.DataFrame
    texts: pd.DataFrame


def worked_example(lm, plan, tokens=12, **options) -> WorkedExample:
    """Erase and update one planned fact by each of its sets, in the weights, and ask its own and
    its locality queries before and after. options: those of `edit_weights`."""
    fact = TokenisedFact(lm, plan, ("erase", "update"))
    old, new = fact.answer("erase"), fact.answer("update")
    start = fact.targets["erase"][plan["query"]][0]
    own, unrelated = plan["prompts"], [query["prompt"] for query in plan["locality"]]
    asked = pd.DataFrame(dict(prompt=own + unrelated, asked="unrelated"))
    asked.loc[: len(own) - 1, "asked"] = "rephrasing"
    asked.loc[plan["query"], "asked"] = "q_i"
    answers, texts = [], []
    for op, goal in (("erase", plan["object"]), ("update", plan["new_object"])):
        if op not in fact.targets:
            continue
        queries = fact.targets[op] + fact.locality
        before, text = _replies(lm, queries, start, tokens)
        texts = texts or [dict(op="none", neurons="", text=text)]
        asked["object"] = [goal] * len(own) + before["answer"].tolist()[len(own) :]
        for edit in plan["edits"]:
            with edit_weights(lm, edit["set"], op, old=old, new=new, **options):
                after, text = _replies(lm, queries, start, tokens)
            keys = dict(op=PAPER_OP[op], neurons=edit["neurons"])
            part = asked.assign(**keys, n_neurons=len(edit["set"]))
            answers.append(part.join(before.add_suffix("_before")).join(after.add_suffix("_after")))
            texts.append({**keys, "text": text})
    answers = pd.concat(answers, ignore_index=True)
    answers["changed"] = answers["answer_before"] != answers["answer_after"]
    return WorkedExample(answers, pd.DataFrame(texts))


def _replies(lm, queries, start, tokens) -> tuple[pd.DataFrame, str]:
    """The probability p of each query's answer and as many greedy tokens, as text; and `tokens`
    tokens after the prompt `start`."""
    prompts = [prompt for prompt, _ in queries] + [start]
    lengths = [len(answer) for _, answer in queries] + [tokens]
    said = [
        lm.tokenizer.decode(ids, skip_special_tokens=True).strip()
        for ids in greedy_answers(lm, prompts, lengths)
    ]
    p = np.exp(score_queries(lm, queries).log_probability)
    return pd.DataFrame(dict(p=p, answer=said[:-1])), said[-1]


def example_table(example: WorkedExample) -> pd.DataFrame:
    """A row a prompt of the fact and operation: the answer, and P of the operation's object."""
    own = example.answers[example.answers["asked"] != "unrelated"].copy()
    own["prompt"] += np.where(own["asked"] == "q_i", "  ← q_i", "")
    for when in ("before", "after"):
        own[when] = [
            f"{answer}; P({goal}) = {p:.2f}"
            for answer, goal, p in zip(own[f"answer_{when}"], own["object"], own[f"p_{when}"])
        ]
    wide = own.pivot(index=["op", "object", "prompt", "before"], columns="neurons", values="after")
    wide = wide[list(dict.fromkeys(own["neurons"]))]
    return wide.reset_index("before").rename_axis(columns=None)


def changed_answers(example: WorkedExample) -> pd.DataFrame:
    """How many answers each edit changes, of the fact's prompts and of unrelated queries."""
    keys = ["op", "neurons", "n_neurons", "asked"]
    groups = example.answers.groupby(keys, sort=False)["changed"]
    text = groups.sum().astype(str) + " of " + groups.size().astype(str)
    return text.unstack("asked", sort=False).reset_index().rename_axis(columns=None)
