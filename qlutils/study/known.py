"""Facts that a model knows: it answers at least `known_prompts` of their prompts greedily.

They are looked for in the seeded order of each relation until `facts_per_relation` are found, or
that many times `SCAN_PER_FACT` were looked at. What was looked at is kept beside the model's
results, so that every notebook of a run uses the same facts and only the first one needs the model.
Models know different facts: tables that put models side by side rest on other facts for each.
"""

from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, groupby, islice, zip_longest
from math import ceil, inf
from operator import attrgetter

import pandas as pd

import qlutils
from qlutils import paths
from qlutils.checks import check
from qlutils.facts import Fact, seeded_order
from qlutils.files import locked
from qlutils.study.results import save_frame, saved_frame

SCAN_UNIT = 32  # facts of a unit of `count_known`
SCAN_PER_FACT = 32  # a relation of which less than one fact in 32 is known may stay short


def count_known(lm, unit):
    """How many prompts of each fact of a unit the model answers; a task for `store.run_units`.

    A row a fact: fact, relation, queries (its prompts), answered (greedy decoding gives the whole
    answer). What cannot be read is not answered."""
    facts = [Fact(**record) for record in unit]
    encoded = []
    owners = []
    for fact in facts:
        for prompt in fact.prompts:
            with suppress(ValueError):
                encoded.append(lm.encode(prompt, fact.object))
                owners.append(fact.id)
    exact = qlutils.score_queries(lm, encoded).exact if encoded else []
    answered = Counter(owner for owner, right in zip(owners, exact) if right)
    rows = [(fact.id, fact.relation, len(fact.prompts), answered[fact.id]) for fact in facts]
    return pd.DataFrame(rows, columns=["fact", "relation", "queries", "answered"])


count_known.VERSION = 1


def check_known_prompts(known_prompts, facts):
    """ValueError for a number of prompts that is none, or that no fact has."""
    most = max(len(fact.prompts) for fact in facts)
    check(
        "known_prompts",
        known_prompts,
        0,
        most + 1,
        f"a number of prompts (0: all facts; no fact has more than {most})",
    )


def known_facts(study):
    """(facts, scan) of a study's model: the facts it knows, and `by_relation` of what it was asked.

    ValueError: it knows none; or nobody has looked, and this study may not (`may_scan`)."""
    every = study.candidates()
    check_known_prompts(study.known_prompts, every)
    chosen = {name: study.parameters[name] for name in ("known_prompts", "facts_per_relation")}
    inputs = {**study.origin(every), **chosen}
    path = paths.results_folder(study.root, study.model).parent / "known_facts.parquet"
    scanned = saved_frame(path, inputs)
    if scanned is None:
        if not study.may_scan:
            raise ValueError(
                f"which facts {study.model} knows was not looked for with these parameters; run "
                "notebook 01"
            )
        with locked(path.with_name(".known_facts.lock"), inf):  # another notebook may be looking
            scanned = saved_frame(path, inputs)
            if scanned is None:
                scanned = scan(study, every)
                save_frame(scanned, path, inputs)
    kept = set(scanned.loc[scanned["kept"], "fact"])
    if not kept:
        answered = scanned["answered"]
        queries = scanned["queries"].sum()
        raise ValueError(
            f"{study.model} answers at least known_prompts={study.known_prompts} prompts of none "
            f"of the {len(scanned)} facts of {study.data}; it answers {answered.sum()} of "
            f"{queries} queries, at most {answered.max()} of one fact: lower known_prompts, or "
            "take other facts or another model"
        )
    facts = [fact for fact in every if fact.id in kept]
    return facts, by_relation(scanned, every, study.known_prompts)


def by_relation(scanned, every, known_prompts):
    """A row a relation: facts in the data; scanned, of them; known, of the scanned; kept, of the
    known; queries of the scanned facts, and those that were answered."""
    scanned = scanned.assign(scanned=1, known=scanned["answered"] >= known_prompts)
    counted = ["scanned", "known", "kept", "queries", "answered"]
    table = scanned.groupby("relation", sort=False)[counted].sum()
    table.insert(0, "facts", pd.Series([fact.relation for fact in every]).value_counts())
    return table.astype(int).reset_index()


def scan(study, every):
    """`count_known` of facts in the seeded order of each relation, and whether each is `kept`.

    Relations that have not enough yet are asked a unit each at a time; all units where all known
    facts are wanted. With 2 facts wanted a round asks the next 32 of each relation that has found
    fewer than 2, for 2 * 32 / 32 = 2 rounds at most; kept are the first 2 known ones."""
    wanted = study.facts_per_relation
    askable = [fact for fact in every if len(fact.prompts) >= study.known_prompts]
    waiting = _units(askable, study.seed)
    if wanted is None:
        wanted = inf
        rounds = [chain.from_iterable(waiting)]
    else:
        rounds = islice(zip_longest(*waiting), ceil(wanted * SCAN_PER_FACT / SCAN_UNIT))
    found = Counter()
    parts = []
    for asked in rounds:
        units = [unit for unit in asked if unit and found[unit[0]["relation"]] < wanted]
        if units:
            part = study.run(count_known, units, desc=f"{study.model} known facts")
            part["known"] = part["answered"] >= study.known_prompts
            found.update(part.groupby("relation")["known"].sum().to_dict())
            parts.append(part)
    scanned = pd.concat(parts, ignore_index=True)
    known = scanned.pop("known")
    rank = known.groupby(scanned["relation"]).cumsum()
    return scanned.assign(kept=known & (rank <= wanted))


def _units(facts, seed):
    """The units of each relation's facts, in seeded order, however many are wanted."""
    units = []
    for relation, some in groupby(facts, attrgetter("relation")):
        records = list(map(asdict, some))
        ordered = [records[place] for place in seeded_order(records, relation, seed)]
        units.append([ordered[i : i + SCAN_UNIT] for i in range(0, len(ordered), SCAN_UNIT)])
    return units
