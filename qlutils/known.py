"""Facts that a model knows: those of which it answers at least `known_prompts` prompts by greedy decoding.

They are looked for in the seeded order of each relation until `facts_per_relation` are found. What was looked at is kept
beside the model's results, so that every notebook of a run uses the same facts and only the first one needs the model.
Models know different facts: tables that put models side by side rest on other facts for each.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict

import pandas as pd

from . import paths
from .data import Fact, seeded_order
from .files import as_frame, locked, read_metadata, read_table, sha256, write_table

UNIT_FACTS = 32


def count_known(lm, unit: list[dict]) -> pd.DataFrame:
    """How many prompts of each fact of a unit the model answers; a task for `store.run_units`. A row a fact: fact, relation,
    queries (its prompts), answered (greedy decoding gives the whole answer). What cannot be read is not answered."""
    from .rows import score_queries

    facts, encoded, owner = [Fact(**record) for record in unit], [], []
    for place, fact in enumerate(facts):
        for prompt in fact.prompts:
            try:
                encoded.append(lm.encode(prompt, fact.object))
                owner.append(place)
            except ValueError:
                continue
    exact = score_queries(lm, encoded).exact if encoded else []
    answered = Counter(place for place, right in zip(owner, exact) if right)
    return pd.DataFrame([dict(fact=fact.id, relation=fact.relation, queries=len(fact.prompts), answered=answered[place])
                         for place, fact in enumerate(facts)])


def check_known_prompts(known_prompts: int, facts: list[Fact], name="known_prompts") -> None:
    """ValueError for a number of prompts that is none, or that no fact has."""
    most = max(len(fact.prompts) for fact in facts)
    if isinstance(known_prompts, bool) or not isinstance(known_prompts, int) or known_prompts < 0:
        raise ValueError(f"{name} {known_prompts!r}: want a number of prompts, at least 0 (0: all facts)")
    if known_prompts > most:
        raise ValueError(f"{name} {known_prompts}: no fact of this data has more than {most} prompts; want at most {most}")


def known_facts(study) -> tuple[list[Fact], pd.DataFrame]:
    """(facts, scan) of a study's model: the facts it knows, and `by_relation` of what was looked at to find them.

    ValueError: it knows none; or nobody has looked, and this study may not (`may_scan`)."""
    every = study.candidates()
    check_known_prompts(study.known_prompts, every)
    path = study.root / "results" / paths.slug(study.model) / "known_facts.parquet"
    if (scanned := _read(path, study, every)) is None:
        if not study.may_scan:
            raise ValueError(f"which facts {study.model} knows was not looked for with these parameters; run notebook 01")
        with locked(path.with_name(".known_facts.lock"), math.inf):  # another method's notebook may be looking
            if (scanned := _read(path, study, every)) is None:
                scanned = _scan(study, every)
                inputs = _inputs(study, every)  # a first download has a revision only now
                write_table(scanned, path, sha256(inputs), inputs=inputs)
    kept = set(scanned.loc[scanned["kept"], "fact"])
    if not kept:
        raise ValueError(
            f"{study.model} answers at least known_prompts={study.known_prompts} prompts of none of the {len(scanned)} facts "
            f"of {study.data}; it answers {scanned['answered'].sum()} of {scanned['queries'].sum()} queries, at most "
            f"{scanned['answered'].max()} of one fact: lower known_prompts, or take other facts or another model")
    return [fact for fact in every if fact.id in kept], by_relation(scanned, every, study.known_prompts)


def by_relation(scanned: pd.DataFrame, every: list[Fact], known_prompts: int) -> pd.DataFrame:
    """A row a relation: facts in the data; scanned, of them; known, of the scanned; kept, of the known; queries of the
    scanned facts, and those that were answered."""
    scanned = scanned.assign(scanned=1, known=scanned["answered"] >= known_prompts)
    table = scanned.groupby("relation", sort=False)[["scanned", "known", "kept", "queries", "answered"]].sum()
    table.insert(0, "facts", pd.Series([fact.relation for fact in every]).value_counts())
    return table.astype(int).reset_index()


def _inputs(study, every) -> dict:
    return {**study.origin(every), "known_prompts": study.known_prompts, "facts_per_relation": study.facts_per_relation}


def _read(path, study, every) -> pd.DataFrame | None:
    if read_metadata(path).get("inputs") != _inputs(study, every):
        return None
    table, _ = read_table(path)
    return None if table is None else as_frame([table])


def _scan(study, every) -> pd.DataFrame:
    """`count_known` of the facts in the seeded order of each relation, a unit of each at a time until enough are found, and
    whether each is `kept`."""
    waiting, found, wanted = {}, {}, study.facts_per_relation
    for relation in dict.fromkeys(fact.relation for fact in every):
        facts = [fact for fact in every if fact.relation == relation]
        ordered = [asdict(facts[place]) for place in seeded_order(facts, relation, study.seed)]
        waiting[relation] = [ordered[i:i + UNIT_FACTS] for i in range(0, len(ordered), UNIT_FACTS)]
        found[relation] = 0
    parts = []
    while units := [unit for rest in waiting.values() for unit in (rest if wanted is None else rest[:1])]:
        part = study.run(count_known, units, desc=f"{study.model} known facts")
        parts.append(part)
        for relation, known in (part["answered"] >= study.known_prompts).groupby(part["relation"]):
            found[relation] += known.sum()
        waiting = {relation: rest[1:] for relation, rest in waiting.items()
                   if wanted is not None and found[relation] < wanted}
    scanned = pd.concat(parts, ignore_index=True)
    known = scanned["answered"] >= study.known_prompts
    rank = known.groupby(scanned["relation"]).cumsum()
    return scanned.assign(kept=known & (rank <= (math.inf if wanted is None else wanted)))
