"""Notebook 03: what edits of a fact's knowledge neurons change.

An *edit* is one fact, one set of neurons and one operation (Eq. 2). Reliability (Rel) is judged on
one query q_i of the fact, generalization (Gen) on its neighbours, locality (Loc) on queries of
other facts. All edits of a unit of facts go through the model as virtual edits in shared batches
(see `change.rows.score_rows`). What is drawn for them: `edit_plans`; their tables: `edit_tables`.
"""

from itertools import product

import numpy as np
import pandas as pd

from qlutils.change.editing import (
    MIN_TOKENS,
    encode_entries,
    usable_texts,
    virtual_edits,
)
from qlutils.change.rows import score_rows
from qlutils.change.scaling import greedy_answers
from qlutils.experiments.edit_plans import plan_edits
from qlutils.experiments.localize import activations
from qlutils.facts import perplexity_texts, prompt_tokens
from qlutils.neurons.others import active_neurons
from qlutils.neurons.sets import FACT

# A text is broken where an edit multiplies its perplexity by more than this: each of its tokens is
# then, on average, less than a tenth as likely as before. The paper's largest mean dPPL, 2.02, is
# a factor of 3; a few texts beyond 10 (factors of 1e10 occur) would decide a mean alone.
BROKEN = 10.0
GOALS = {"erase": "object", "update": "new_object"}  # what an operation is about
# What is averaged over which of an edit's queries. Rel and Gen are those of edits on a known query.
MEANS = {
    "rel": ("reached", "kind == 'q_i' & judged"),
    "gen": ("reached", "kind == 'neighbour' & known & judged"),
    "loc": ("kept", "kind == 'unrelated' & known"),
    "loc_same": ("kept", "kind == 'unrelated' & known & same"),
    "loc_other": ("kept", "kind == 'unrelated' & known & ~same"),
    "rel_all": ("reached", "kind == 'q_i'"),
    "gen_all": ("reached", "kind == 'neighbour'"),
    "loc_all": ("kept", "kind == 'unrelated'"),
    "rel_match": ("matched", "kind == 'q_i' & judged"),
    "gen_match": ("matched", "kind == 'neighbour' & known & judged"),
    "p_before": ("p_before", "kind == 'q_i'"),
    "p_after": ("p_after", "kind == 'q_i'"),
    "gen_p_before": ("p_before", "kind == 'neighbour'"),
    "gen_p_after": ("p_after", "kind == 'neighbour'"),
}
COUNTS = {
    "n_gen": "kind == 'neighbour' & known",
    "n_loc": "kind == 'unrelated' & known",
}


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
    object, that does not begin with it, whose answer an update makes the new one; those of
    `_perplexities`. NaN: undefined."""
    asked, notes = asked_of(lm, unit, ops, ppl_max_tokens)
    edits = [_edits(lm, plan, op, notes, options) for plan, op in product(unit, ops)]
    edits = pd.concat(edits, ignore_index=True).astype({"note": object})
    changes = edits.pop("change")
    rows = edits.reset_index(names="edit")[["edit", "fact", "op", "new_object"]]
    rows = _scored(lm, changes, rows.merge(asked))
    measures = _measures(rows)
    measures["loc_new"] = _shares_of_new_object(lm, changes, rows)
    return edits.join(measures).join(_perplexities(rows))


def _passes(lm, plan, config):
    """An edit's rows leave the clean pass at the edited layer, on average in the middle."""
    prompts = plan["prompts"] + [query["prompt"] for query in plan["locality"]]
    tokens = sum(map(prompt_tokens, prompts))
    for text in plan["texts"]:
        tokens += min(prompt_tokens(text), config["ppl_max_tokens"])
    return len(plan["edits"]) * len(config["ops"]) * tokens / 2


edit_facts.VERSION = 2
edit_facts.passes = _passes


# --- edits and what they are asked ----------------------------------------------------------------


def asked_of(lm, plans, ops=tuple(GOALS), max_tokens=256):
    """What the edits of planned facts are judged on, a row a fact, op and query: kind ("q_i",
    "neighbour", "unrelated" or "text"), prompt, object, known, same (of the fact's relation or
    not), query (ids of prompt and answer), goal (ids of the object that op is about, as it follows
    q_i). {(fact, op): why it cannot be made}; such have no rows.

    An unrelated query's answer is the unedited model's: of a known one that is its object, of
    another as many greedy tokens, asked for once."""
    parts = []
    notes = {}
    for plan, op in product(plans, ops):
        try:
            part = _asked(lm, plan, plan[GOALS[op]])
        except ValueError as error:
            notes[plan["fact"], op] = str(error)
            continue
        _, goal = part["query"].iloc[plan["query"]]
        texts = plan["texts"] and encode_entries(lm, plan["texts"], max_tokens)
        part = pd.concat([part, pd.DataFrame({"query": texts, "kind": "text"})])
        parts.append(part.assign(fact=plan["fact"], op=op, goal=[goal] * len(part)))
    asked = pd.concat(parts, ignore_index=True).astype({"known": bool, "same": bool})
    asked["query"] = [(tuple(prompt), tuple(answer)) for prompt, answer in asked["query"]]
    unknown = asked.loc[(asked["kind"] == "unrelated") & ~asked["known"], "query"]
    different = unknown.unique()
    prompts = [prompt for prompt, _ in different]
    said = greedy_answers(lm, prompts, [len(answer) for _, answer in different])
    said = dict(zip(different, zip(prompts, map(tuple, said))))
    asked.loc[unknown.index, "query"] = unknown.map(said.get)
    return asked, notes


def _asked(lm, plan, goal):
    """The queries of a fact whose answer is `goal`, and the unrelated ones."""
    if goal is None:
        raise ValueError(f"relation {plan['relation']} has no other object")
    own = pd.DataFrame({"prompt": plan["prompts"], "known": plan["known"], "object": goal})
    own["kind"] = "neighbour"
    own.loc[plan["query"], "kind"] = "q_i"
    unrelated = pd.DataFrame(
        plan["locality"],
        columns=["prompt", "object", "known", "same"],
    )
    rows = pd.concat([own, unrelated.assign(kind="unrelated")])
    return rows.assign(query=list(map(lm.encode, rows["prompt"], rows["object"])))


def _edits(lm, plan, op, notes, options):
    """A row an edit of a fact by `op`: which it is, and the `Change`, None where it cannot be made.
    Equal edits share theirs, so that they are computed once."""
    edits = pd.DataFrame(plan["edits"])
    for edit in edits.index[edits["control"] == "matched"]:
        edits.at[edit, "set"] = matched_neurons(lm, plan, edits.at[edit, "set"])
    about = {name: plan[name] for name in [*FACT, "new_object"]}
    note = notes.get((plan["fact"], op))
    neurons = edits.pop("set")
    names = neurons.map(str)
    changes = {}
    if note is None:
        options = options | objects_of(lm, plan, op)
        made = virtual_edits(lm, neurons[~names.duplicated()], op, **options)
        changes = dict(zip(names.unique(), made))
    return edits.assign(
        **about,
        prompt=plan["prompts"][plan["query"]],
        op=op,
        n_neurons=neurons.map(len),
        note=note,
        change=names.map(changes),
    )


def objects_of(lm, plan, op):
    """old and new of an update, see `edit_weights`: token ids as they follow q_i."""
    prompt = plan["prompts"][plan["query"]]
    names = {"old": "object", "new": "new_object"} if op == "update" else {}
    return {name: lm.encode(prompt, plan[goal])[1] for name, goal in names.items()}


def matched_neurons(lm, plan, neurons):
    """For each of a fact's `neurons` one of its layer that is about as active at the end of q_i and
    a KN of none of the fact's queries."""
    prompt = lm.encode_prompt(plan["prompts"][plan["query"]])
    [active] = activations(lm, [prompt])  # (L, N)
    own = set(map(tuple, neurons))
    kns = set(map(tuple, plan["kns"]))
    return sorted(map(list, active_neurons(own, active, kns)))


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
    rows["judged"] = rows["edit"].isin(rows.query("kind == 'q_i' & known")["edit"])
    found = {
        name: rows.query(counted).groupby("edit")[value].mean()
        for name, (value, counted) in MEANS.items()
    }
    own = rows.query("kind == 'q_i' | kind == 'neighbour'")
    found["reached"] = own.groupby("edit")["reached"].agg(list)
    for name, counted in COUNTS.items():
        found[name] = rows.eval(counted).groupby(rows["edit"]).sum()
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
    pairs = zip(rows["greedy_before"], rows["goal"])
    rows = rows[np.array([said[: len(goal)] != list(goal) for said, goal in pairs], bool)]
    begun = rows[rows["greedy"].str[0] == rows["goal"].str[0]]
    again = [(prompt, tuple(goal)) for (prompt, _), goal in zip(begun["query"], begun["goal"])]
    said = _scored(lm, changes, begun[["edit"]].assign(query=again))["exact"]
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
    sums = edits[["log_probability_before", "log_probability", "tokens"]].sum()
    tokens = sums.pop("tokens")
    found = np.exp(-sums.div(tokens, axis=0))
    found.columns = ["ppl_before", "ppl_after"]
    found["dppl"] = (found["ppl_after"] - found["ppl_before"]) / found["ppl_before"]
    return found.assign(broken=edits["broken"].mean())


# --- in a notebook --------------------------------------------------------------------------------


def study_plans(study, queries, sets, **changes):
    """`plan_edits` of a study's facts, with the notebook's parameters but for `changes`."""
    parameters = {"own": True} | study.parameters | changes
    lm = study.lm()
    texts = []
    if parameters["ppl_entries"]:
        shortest = min(MIN_TOKENS, parameters["ppl_max_tokens"])
        texts = usable_texts(lm, perplexity_texts(parameters["corpus"]), shortest)
    names = ["controls", "own", "t", "n_locality", "ppl_entries", "seed"]
    return plan_edits(
        queries,
        study.candidates(),
        num_neurons=lm.num_neurons,
        sets=sets,
        texts=texts,
        **{name: parameters[name] for name in names},
    )


def run_edits(study, queries, sets, *, facts=None, **changes):
    """(frame of `edit_facts`, omissions) of the facts of `study_plans`; `facts`: ids to keep."""
    plans, omissions = study_plans(study, queries, sets, **changes)
    if facts is not None:
        plans = [plan for plan in plans if plan["fact"] in facts]
    names = ("lambda1", "lambda2", "embedding", "ppl_max_tokens")
    config = {name: study.parameters[name] for name in names}
    config["ops"] = ["erase", "update"]
    what = ", ".join(sets) if len(sets) < 4 else f"{len(sets)} sets"
    desc = f"{study.model} {study.method} edits, {what}"
    return study.run(edit_facts, [plans], config, desc=desc), omissions


def sample_of_facts(frame, size, seed):
    """The ids of a seeded sample of the facts of a frame; size None: of all."""
    names = sorted(frame["fact"].unique())
    shuffled = np.random.default_rng(seed).permutation(names)
    return sorted(shuffled[:size])


def with_more_controls(
    study,
    queries,
    edits,
    controls,
    size=None,
    sets=("local", "global"),
):
    """The `edits` of a sample of `size` facts, and beside them those of other `controls`, without
    perplexity."""
    some = sample_of_facts(edits, size, study.seed)
    more, _ = run_edits(
        study,
        queries,
        sets,
        facts=some,
        controls=controls,
        own=False,
        ppl_entries=0,
    )
    return pd.concat([edits[edits["fact"].isin(some)], more])
