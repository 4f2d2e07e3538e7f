"""Notebook 03: what edits of a fact's knowledge neurons change.

An *edit* is one fact, one set of neurons and one operation (Eq. 2). Reliability (Rel) is judged on
one query q_i of the fact, generalization (Gen) on its neighbours, locality (Loc) on queries of
other facts. All edits of a unit of facts go through the model as virtual edits in shared batches
(see `change.rows.score_rows`). What is drawn for them: `edit_plans`; their tables: `edit_tables`.
"""

import numpy as np
import pandas as pd
import torch

from qlutils.change.editing import MIN_TOKENS, encode_entries, usable_texts, virtual_edits
from qlutils.change.rows import score_rows
from qlutils.change.scaling import greedy_answers
from qlutils.experiments.edit_plans import plan_edits
from qlutils.facts import perplexity_texts, prompt_tokens
from qlutils.model.passes import neuron_vectors
from qlutils.neurons.others import active_neurons

# A text is broken where an edit multiplies its perplexity by more than this: each of its tokens is
# then, on average, less than a tenth as likely as before. The paper's largest mean dPPL, 2.02, is
# a factor of 3; a few texts beyond 10 (factors of 1e10 occur) would decide a mean alone.
BROKEN = 10.0
# What is averaged over which of an edit's queries. Rel and Gen are those of edits on a known query.
MEANS = {
    "rel": ("reached", "q_i & judged"),
    "gen": ("reached", "neighbour & known & judged"),
    "loc": ("kept", "unrelated & known"),
    "loc_same": ("kept", "unrelated & known & same"),
    "loc_other": ("kept", "unrelated & known & ~same"),
    "rel_all": ("reached", "q_i"),
    "gen_all": ("reached", "neighbour"),
    "loc_all": ("kept", "unrelated"),
    "rel_match": ("matched", "q_i & judged"),
    "gen_match": ("matched", "neighbour & known & judged"),
    "p_before": ("p_before", "q_i"),
    "p_after": ("p_after", "q_i"),
    "gen_p_before": ("p_before", "neighbour"),
    "gen_p_after": ("p_after", "neighbour"),
}
ABOUT = (
    "fact",
    "relation",
    "subject",
    "object",
    "new_object",
)
COUNTS = {"n_gen": "neighbour & known", "n_loc": "unrelated & known"}


# --- the task -------------------------------------------------------------------------------------


def edit_facts(
    lm,
    unit,
    *,
    ops=("erase", "update"),
    ppl_max_tokens=256,
    **options,
):
    """One row an edit of the facts in `unit` (dicts of `plan_edits`); a task for `store.run_units`.
    options: lambda1, lambda2 and embedding, see `edit_weights`.

    Columns: fact, relation, subject, object, new_object, prompt (q_i), op, neurons, control,
    n_neurons; note, why an update cannot be made (its object cannot follow every prompt), and then
    no numbers; those of `_measures`; loc_new, the share of the known unrelated queries of another
    object whose answer an update makes the new one; those of `_perplexities`. NaN: undefined."""
    edits = []
    for fact in tokenised_facts(lm, unit, ops):
        asked = {}
        for op in fact.targets:
            asked[op] = _asked(lm, fact, op, ppl_max_tokens)
        for edit in _edits(lm, fact, ops, options):
            edit["asked"] = asked.get(edit["op"])
            edits.append(edit)
    edits.sort(key=lambda edit: edit["change"] is None)  # what cannot be made comes last
    edits = pd.DataFrame(edits).astype({"note": object})
    changes = edits.pop("change")
    asked = dict(edits.pop("asked"))
    rows = pd.concat(asked, names=["edit", "place"])
    rows = _scored(lm, changes, rows.reset_index())
    measures = _measures(rows)
    measures["loc_new"] = _shares_of_new_object(lm, changes, rows)
    return edits.join(measures).join(_perplexities(rows))


def _passes(lm, plan, config):
    """An edit's rows leave the clean pass at the edited layer, on average in the middle."""
    tokens = sum(map(prompt_tokens, plan["prompts"]))
    for query in plan["locality"]:
        tokens += prompt_tokens(query["prompt"])
    for text in plan["texts"]:
        tokens += min(prompt_tokens(text), config["ppl_max_tokens"])
    return len(plan["edits"]) * len(config["ops"]) * tokens / 2


edit_facts.VERSION = 1
edit_facts.passes = _passes


# --- edits and what they are asked ----------------------------------------------------------------


class TokenisedFact:
    """A planned fact as token ids. targets: {op: a query a prompt, of the object that op is about},
    of updates where `ops` has them and they can be made; else `note` says why not. locality: the
    unrelated queries, see `tokenised_facts`."""

    def __init__(self, lm, plan, ops):
        self.plan = plan
        self.note = None
        self.targets = {"erase": _queries(lm, plan, plan["object"])}
        if plan["new_object"] is None:
            self.note = f"relation {plan['relation']} has no other object"
        elif "update" in ops:
            try:
                self.targets["update"] = _queries(lm, plan, plan["new_object"])
            except ValueError as error:
                self.note = str(error)
        self.locality = []
        for query in plan["locality"]:
            encoded = lm.encode(query["prompt"], query["object"])
            self.locality.append(_hashable(encoded))

    def answer(self, op):
        """The object that `op` is about, as it follows q_i; None of an update not to be made."""
        if op not in self.targets:
            return None
        _, answer = self.targets[op][self.plan["query"]]
        return answer


def tokenised_facts(lm, plans, ops):
    """The `TokenisedFact` of each plan. Unrelated queries get the unedited model's answers: of a
    known one that is its object, of another as many greedy tokens, asked for once."""
    facts = [TokenisedFact(lm, plan, ops) for plan in plans]
    unknown = {}  # {query: the answer the model gives}
    for fact in facts:
        for query, about in zip(fact.locality, fact.plan["locality"]):
            if not about["known"]:
                unknown[query] = ()
    prompts = [prompt for prompt, _ in unknown]
    lengths = [len(answer) for _, answer in unknown]
    said = map(tuple, greedy_answers(lm, prompts, lengths))
    unknown = dict(zip(unknown, said))
    for fact in facts:
        locality = []
        for prompt, answer in fact.locality:
            locality.append((prompt, unknown.get((prompt, answer), answer)))
        fact.locality = locality
    return facts


def _queries(lm, plan, answer):
    """A query a prompt of the fact."""
    encoded = [lm.encode(prompt, answer) for prompt in plan["prompts"]]
    return list(map(_hashable, encoded))


def _hashable(query):
    """(ids of a prompt, ids of an answer) as tuples."""
    return tuple(map(tuple, query))


def _asked(lm, fact, op, max_tokens):
    """What an edit is judged on, a row a query: kind, query, known, and of unrelated ones object,
    `same`, whether of the fact's relation, and as_new, the query for an update's new object."""
    plan = fact.plan
    own = pd.DataFrame({"query": fact.targets[op]})
    own["known"] = plan["known"]
    own["kind"] = "neighbour"
    own.loc[plan["query"], "kind"] = "q_i"
    unrelated = pd.DataFrame(plan["locality"], columns=["object", "known", "same"])
    unrelated["kind"] = "unrelated"
    unrelated["query"] = fact.locality
    new = fact.answer("update")
    unrelated["as_new"] = [(prompt, new) for prompt, _ in fact.locality]
    texts = []
    if plan["texts"]:
        texts = encode_entries(lm, plan["texts"], max_tokens)
    texts = pd.DataFrame({"query": map(_hashable, texts)})
    texts["kind"] = "text"
    rows = pd.concat([own, unrelated, texts])
    rows = rows.astype({"known": bool, "same": bool})
    return rows.assign(op=op, new_object=plan["new_object"])


def _edits(lm, fact, ops, options):
    """A dict an edit of a fact: the columns that say which, and the change, None where it cannot be
    made. Equal edits share their `Change`, so that they are computed once."""
    plan = fact.plan
    about = {name: plan[name] for name in ABOUT}
    about["prompt"] = plan["prompts"][plan["query"]]
    options = options | {
        "old": fact.answer("erase"),
        "new": fact.answer("update"),
    }
    sets = {}
    for edit in plan["edits"]:
        neurons = edit["set"]
        if edit["control"] == "matched":
            neurons = matched_neurons(lm, plan, neurons)
        sets[edit["neurons"], edit["control"]] = neurons
    different = {str(neurons): neurons for neurons in sets.values()}
    for op in ops:
        changes = {}
        if op in fact.targets:
            made = virtual_edits(lm, different.values(), op, **options)
            changes = dict(zip(different, made))
        for (name, control), neurons in sets.items():
            which = {
                "op": op,
                "neurons": name,
                "control": control,
                "n_neurons": len(neurons),
                "note": None if op in fact.targets else fact.note,
                "change": changes.get(str(neurons)),
            }
            yield about | which


def matched_neurons(lm, plan, neurons):
    """For each of a fact's `neurons` one of its layer that is about as active at the end of q_i and
    a KN of none of the fact's queries."""
    prompt = lm.encode_prompt(plan["prompts"][plan["query"]])
    ids = torch.tensor([prompt], device=lm.device)
    active = neuron_vectors(lm, ids)[0]  # (L, N)
    own = set(map(tuple, neurons))
    kns = set(map(tuple, plan["kns"]))
    found = active_neurons(own, active.cpu().double(), kns)
    return sorted(map(list, found))


def _scored(lm, changes, rows):
    """`rows` with the `Scores` of their queries after their edits, and before (`_before`)."""
    places, queries = pd.factorize(rows["query"].to_numpy())
    todo = [(place, None) for place in range(len(queries))]
    todo += zip(places, changes[rows["edit"]])
    scores = score_rows(lm, queries, todo, everywhere=True)
    scores = pd.DataFrame(vars(scores))
    before = scores.iloc[places].set_index(rows.index)
    after = scores.tail(len(rows)).set_index(rows.index)
    return rows.join(after).join(before.add_suffix("_before"))


# --- measures -------------------------------------------------------------------------------------


def _measures(rows):
    """A row an edit: MEANS and their averages avg and avg_all, over known queries and over all
    (undefined where one of the three is); reached, of each query, 1 or 0; n_gen, n_loc, the queries
    counted. An answer is reached where an update gives it and where an erasure does not; `_match`:
    shares of its tokens; p: its probability (erasure: o, update: o')."""
    erased = rows["op"] == "erase"
    rows = rows.assign(
        reached=(rows["exact"] != erased).astype(float),
        matched=rows["match"].mask(erased, 1 - rows["match"]),
        kept=rows["greedy"] == rows["greedy_before"],
        p_before=np.exp(rows["log_probability_before"]),
        p_after=np.exp(rows["log_probability"]),
    )
    for kind in ("q_i", "neighbour", "unrelated"):
        rows[kind] = rows["kind"] == kind
    judged = rows.query("q_i & known")["edit"]
    rows["judged"] = rows["edit"].isin(judged)
    found = {}
    for name, (value, counted) in MEANS.items():
        part = rows.query(counted)
        found[name] = part.groupby("edit")[value].mean()
    own = rows.query("q_i | neighbour")
    found["reached"] = own.groupby("edit")["reached"].agg(list)
    for name, counted in COUNTS.items():
        inside = rows.eval(counted)
        found[name] = inside.groupby(rows["edit"]).sum()
    found = pd.DataFrame(found)
    for ending in ("", "_all"):
        parts = found[[f"rel{ending}", f"gen{ending}", f"loc{ending}"]]
        found[f"avg{ending}"] = parts.mean(axis=1, skipna=False)
    return found


def _shares_of_new_object(lm, changes, rows):
    """loc_new of every update. Greedy decoding gives the new object where it begins as that does
    and each of its tokens is the likeliest after those before it; only the latter has to be asked
    for.

    Of an update to "New York" a query whose edited answer begins with "New" is scored with the
    answer "New York"; one that begins with "The" is not, and counts as no."""
    rows = rows.query("op == 'update' & kind == 'unrelated' & known & object != new_object")
    new = [answer[0] for _, answer in rows["as_new"]]
    begun = rows[rows["greedy"].str[0] == new]
    again = begun[["edit"]].assign(query=begun["as_new"])
    said = _scored(lm, changes, again)["exact"]
    said = said.reindex(rows.index, fill_value=False)
    return said.groupby(rows["edit"]).mean()


def _perplexities(rows):
    """ppl_before and ppl_after of all texts of every edit together, their relative change dppl, and
    broken, the share of the texts that the edit breaks (BROKEN)."""
    texts = rows.query("kind == 'text'")
    tokens = texts["query"].str[1].str.len()
    rise = texts["log_probability_before"] - texts["log_probability"]
    broken = rise / tokens > np.log(BROKEN)
    edits = texts.assign(tokens=tokens, broken=broken).groupby("edit")
    tokens = edits["tokens"].sum()
    before = np.exp(-edits["log_probability_before"].sum() / tokens)
    after = np.exp(-edits["log_probability"].sum() / tokens)
    return pd.DataFrame(
        {
            "ppl_before": before,
            "ppl_after": after,
            "dppl": (after - before) / before,
            "broken": edits["broken"].mean(),
        }
    )


# --- in a notebook --------------------------------------------------------------------------------


def study_plans(study, queries, sets, **changes):
    """`plan_edits` of a study's facts, with the notebook's parameters but for `changes`."""
    parameters = {"own": True} | study.parameters | changes
    lm = study.lm()
    texts = []
    if parameters["ppl_entries"]:
        shortest = min(MIN_TOKENS, parameters["ppl_max_tokens"])
        texts = usable_texts(lm, perplexity_texts(parameters["corpus"]), shortest)
    names = ("controls", "own", "t", "n_locality", "ppl_entries", "seed")
    return plan_edits(
        queries,
        study.candidates(),
        num_neurons=lm.num_neurons,
        sets=sets,
        texts=texts,
        **{name: parameters[name] for name in names},
    )


def run_edits(
    study,
    queries,
    sets,
    *,
    facts=None,
    **changes,
):
    """(frame of `edit_facts`, omissions) of the facts of `study_plans`; `facts`: ids to keep."""
    plans, omissions = study_plans(study, queries, sets, **changes)
    if facts is not None:
        plans = [plan for plan in plans if plan["fact"] in facts]
    names = ("lambda1", "lambda2", "embedding", "ppl_max_tokens")
    config = {name: study.parameters[name] for name in names}
    config["ops"] = ["erase", "update"]
    what = ", ".join(sets) if len(sets) < 4 else f"{len(sets)} sets"
    desc = f"{study.model} {study.method} edits, {what}"
    edits = study.run(edit_facts, [plans], config, desc=desc)
    return edits, omissions


def sample_of_facts(frame, size, seed=0):
    """The ids of a seeded sample of the facts of a frame."""
    names = sorted(frame["fact"].unique())
    shuffled = np.random.default_rng(seed).permutation(names)
    return sorted(shuffled[:size])


def with_more_controls(study, queries, edits, controls, size):
    """The `edits` of a sample of `size` facts, and beside them those of other `controls`, without
    perplexity."""
    some = sample_of_facts(edits, size, study.seed)
    more, _ = run_edits(
        study,
        queries,
        ["local", "global"],
        facts=some,
        controls=controls,
        own=False,
        ppl_entries=0,
    )
    edits = edits[edits["fact"].isin(some)]
    return pd.concat([edits, more])
