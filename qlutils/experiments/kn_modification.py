"""Notebook 03: what edits of a fact's knowledge neurons change.

An *edit* is one fact, one set of neurons and one operation (Eq. 2). Reliability (Rel) is judged on
one query q_i of the fact, generalization (Gen) on its neighbours, locality (Loc) on queries of
other facts. All edits of a unit of facts go through the model as virtual edits in shared batches
(see `change.rows.score_rows`). What is drawn for them: `edit_plans`; their tables: `edit_tables`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from qlutils.change.editing import MIN_TOKENS, encode_entries, usable_texts, virtual_edit
from qlutils.change.rows import Change, Scores, score_rows
from qlutils.change.scaling import greedy_answers
from qlutils.experiments.edit_plans import plan_edits
from qlutils.facts import perplexity_texts, prompt_tokens
from qlutils.model.passes import neuron_vectors
from qlutils.neurons.others import active_neurons

# A text is broken where an edit multiplies its perplexity by more than this: each of its tokens is
# then, on average, less than a tenth as likely as before. The paper's largest mean dPPL, 2.02, is
# a factor of 3; a few texts beyond 10 (factors of 1e10 occur) would decide a mean alone.
BROKEN = 10.0
Query = tuple[tuple[int, ...], tuple[int, ...]]  # token ids of a prompt and of an answer


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
        rows.append(edit.about | _measures(edit, *scores) | {"loc_new": share} | change)
    rows += [edit.about for edit in edits if edit.change is None]
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
    about: dict  # the columns that say which edit it is
    change: Change | None  # None where it cannot be made

    @property
    def targets(self) -> list[Query]:
        return self.fact.targets[self.op]


def _edits(lm, fact, ops, options) -> list[Edit]:
    """All edits of a fact. Equal ones share their `Change`, so that they are computed once."""
    plan, sets, changes, edits = fact.plan, {}, {}, []
    names = ("fact", "relation", "subject", "object", "new_object")
    about = {name: plan[name] for name in names} | {"prompt": plan["prompts"][plan["query"]]}
    for op in ops:
        for edit in plan["edits"]:  # a set itself, "none", comes before its controls: `plan_edits`
            name = edit["neurons"], edit["control"]
            if edit["control"] == "matched" and name not in sets:
                sets[name] = matched_neurons(lm, plan, sets[edit["neurons"], "none"])
            neurons = sets.setdefault(name, edit["set"])
            key = op, tuple(map(tuple, neurons))
            if op in fact.targets and key not in changes:
                old, new = fact.answer("erase"), fact.answer("update")
                changes[key] = virtual_edit(lm, neurons, op, old=old, new=new, **options)
            change = changes.get(key)
            which = dict(
                op=op,
                neurons=name[0],
                control=name[1],
                n_neurons=len(neurons),
                note=fact.note if change is None else None,
            )
            edits.append(Edit(fact, op, about | which, change))
    return edits


def matched_neurons(lm, plan, neurons) -> list[list[int]]:
    """For each of a fact's `neurons` one of its layer that is about as active at the end of q_i and
    a KN of none of the fact's queries."""
    prompt, _ = lm.encode(plan["prompts"][plan["query"]], plan["object"])
    active = neuron_vectors(lm, torch.tensor([prompt], device=lm.device))[0]  # (L, N)
    kns = set(map(tuple, plan["kns"]))
    found = active_neurons(set(map(tuple, neurons)), active.cpu().double(), kns)
    return sorted(map(list, found))


def _scored(lm, edits, queries) -> list[tuple[Scores, Scores]]:
    """The scores of each edit's queries (a list an edit) before and after it."""
    place, rows, found = {}, [], []
    for edit, own in zip(edits, queries):
        for query in own:
            rows.append((place.setdefault(query, len(place)), edit.change))
    clean = [(index, None) for index in range(len(place))]
    scores, start = score_rows(lm, list(place), clean + rows, everywhere=True), len(place)
    for own in queries:
        stop = start + len(own)
        before = _some(scores, [place[query] for query in own])
        found.append((before, _some(scores, range(start, stop))))
        start = stop
    return found


def _some(scores, rows) -> Scores:
    arrays = (one[rows] for one in (scores.log_probability, scores.exact, scores.match))
    return Scores(*arrays, [scores.greedy[row] for row in rows])


def _measures(edit, before, after) -> dict:
    """rel, gen, loc and avg (their mean; undefined where one is), over known queries, and rel_all,
    ... over all; loc_same, loc_other, the halves of Loc; rel_match, gen_match, shares of tokens;
    p_before, p_after of the answer that an operation is about (erasure: o, update: o') at q_i, and
    gen_p_... at its neighbours; reached, of each query, 1 or 0; n_gen, n_loc, queries counted."""
    plan, n = edit.fact.plan, len(edit.targets)
    at, known = plan["query"], np.array(plan["known"], bool)
    reached, matched = after.exact[:n].astype(float), after.match[:n]
    if edit.op == "erase":
        reached, matched = 1 - reached, 1 - matched
    p_before, p_after = (np.exp(one.log_probability[:n]) for one in (before, after))
    neighbour = np.arange(n) != at
    near = neighbour & known
    judged = 1.0 if known[at] else np.nan  # Rel and Gen are those of edits on a known query
    kept = [one == other for one, other in zip(before.greedy[n:], after.greedy[n:])]
    kept = np.array(kept, float)
    sure = np.array([query["known"] for query in plan["locality"]], bool)
    same = np.array([query["same"] for query in plan["locality"]], bool)
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
        gen_p_before=_mean(p_before[neighbour]),
        gen_p_after=_mean(p_after[neighbour]),
        reached=reached.tolist(),
        n_gen=int(near.sum()),
        n_loc=int(sure.sum()),
    )
    found["avg"] = float(np.mean([found["rel"], found["gen"], found["loc"]]))
    found["avg_all"] = float(np.mean([found["rel_all"], found["gen_all"], found["loc_all"]]))
    return found


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else np.nan


def _shares_of_new_object(lm, edits, scored) -> list[float]:
    """loc_new of every edit. Greedy decoding gives the new object where it begins as that does and,
    for one of several tokens, where each of them is the likeliest after those before it; only the
    latter has to be asked for.

    Of an update to "New York" a query whose edited answer begins with "New" is scored with the
    answer "New York"; one that begins with "The" is not, and counts as no. Of an update to "Rome",
    one token, an answer that begins so is enough."""
    begun = [_begun(edit, after.greedy) for edit, (_, after) in zip(edits, scored)]
    longer = [[query for query in own if query and len(query[1]) > 1] for own in begun]
    shares = []
    for own, some, (_, after) in zip(begun, longer, _scored(lm, edits, longer)):
        short = sum(query is not None for query in own) - len(some)
        shares.append((short + after.exact.sum()) / len(own) if own else np.nan)
    return shares


def _begun(edit, greedy) -> list[Query | None]:
    """For each known unrelated query of another object than an update's new one: the query for the
    new object where the edited model's answer begins as that does, else None."""
    if edit.op != "update":
        return []
    found, new, greedy = [], edit.fact.answer("update"), greedy[len(edit.targets) :]
    for (prompt, _), about, said in zip(edit.fact.locality, edit.fact.plan["locality"], greedy):
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
        before, after = (one.log_probability for one in scores)
        then, now = (np.exp(-one.sum() / tokens.sum()) for one in (before, after))
        broken = ((before - after) / tokens > np.log(BROKEN)).mean()
        found.append(
            dict(
                ppl_before=then,
                ppl_after=now,
                dppl=(now - then) / then,
                broken=broken,
            )
        )
    return found


# --- in a notebook --------------------------------------------------------------------------------


def study_plans(study, queries, sets, **changes):
    """`plan_edits` of a study's facts, with the notebook's parameters but for `changes`."""
    p, lm = study.parameters | changes, study.lm()
    texts = []
    if p["ppl_entries"]:
        shortest = min(MIN_TOKENS, p["ppl_max_tokens"])
        texts = usable_texts(lm, perplexity_texts(p["corpus"]), shortest)
    names = ("controls", "t", "n_locality", "ppl_entries", "seed")
    return plan_edits(
        queries,
        study.candidates(warn=False),
        num_neurons=lm.num_neurons,
        sets=sets,
        texts=texts,
        **{name: p[name] for name in names},
    )


def run_edits(study, queries, sets, *, facts=None, **changes):
    """(frame of `edit_facts`, omissions) of the facts of `study_plans`; `facts`: ids to keep."""
    plans, omissions = study_plans(study, queries, sets, **changes)
    if facts is not None:
        plans = [plan for plan in plans if plan["fact"] in facts]
    names = ("lambda1", "lambda2", "embedding", "ppl_max_tokens")
    config = {"ops": ["erase", "update"]} | {name: study.parameters[name] for name in names}
    what = ", ".join(sets) if len(sets) < 4 else f"{len(sets)} sets"
    desc = f"{study.model} {study.method} edits, {what}"
    return study.run(edit_facts, [plans], config, desc=desc), omissions


def sample_of_facts(frame, size, seed=0) -> list[str]:
    """The ids of a seeded sample of the facts of a frame."""
    names = sorted(frame["fact"].unique())
    return sorted(np.random.default_rng(seed).permutation(names)[:size])


def with_more_controls(study, queries, edits, controls, size) -> pd.DataFrame:
    """The `edits` of a sample of `size` facts, and beside each those of other `controls`, without
    perplexity."""
    some = sample_of_facts(edits, size, study.seed)
    more, _ = run_edits(
        study, queries, ["local", "global"], facts=some, controls=controls, ppl_entries=0
    )
    return pd.concat([edits[edits["fact"].isin(some)], more[more["control"] != "none"]])
