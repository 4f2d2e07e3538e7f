"""Facts that a model knows: it answers at least `known_prompts` of their prompts greedily.

They are looked for in the seeded order of each relation until `facts_per_relation` are found, or
that many times `SCAN_PER_FACT` were looked at. What was looked at is kept beside the model's
results, so that every notebook of a run uses the same facts and only the first one needs the model.
Models know different facts: tables that put models side by side rest on other facts for each.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict

import pandas as pd

from qlutils import paths
from qlutils.facts import Fact, seeded_order
from qlutils.files import as_frame, locked, read_metadata, read_table, sha256, write_table

UNIT_FACTS = 32
SCAN_PER_FACT = 32  # a relation of which less than one fact in 32 is known may stay short


def count_known(lm, unit: list[dict]) -> pd.DataFrame:
    """How many prompts of each fact of a unit the model answers; a task for `store.run_units`.

    A row a fact: fact, relation, queries (its prompts), answered (greedy decoding gives the whole
    answer). What cannot be read is not answered."""
    from qlutils.change.rows import score_queries

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
    return pd.DataFrame(
        {
            "fact": [fact.id for fact in facts],
            "relation": [fact.relation for fact in facts],
            "queries": [len(fact.prompts) for fact in facts],
            "answered": [answered[place] for place in range(len(facts))],
        }
    )


count_known.VERSION = 1


def check_known_prompts(known_prompts: int, facts: list[Fact], name="known_prompts") -> None:
    """ValueError for a number of prompts that is none, or that no fact has."""
    most = max(len(fact.prompts) for fact in facts)
    if isinstance(known_prompts, bool) or not isinstance(known_prompts, int) or known_prompts < 0:
        raise ValueError(
            f"{name} {known_prompts!r}: want a number of prompts, at least 0 (0: all facts)"
        )
    if known_prompts > most:
        raise ValueError(
            f"{name} {known_prompts}: no fact of this data has more than {most} "
            f"prompts; want at most {most}"
        )


def known_facts(study) -> tuple[list[Fact], pd.DataFrame]:
    """(facts, scan) of a study's model: the facts it knows, and `by_relation` of what it was asked.

    ValueError: it knows none; or nobody has looked, and this study may not (`may_scan`)."""
    every = study.candidates()
    check_known_prompts(study.known_prompts, every)
    path = study.root / "results" / paths.slug(study.model) / "known_facts.parquet"
    if (scanned := _read(path, study, every)) is None:
        if not study.may_scan:
            raise ValueError(
                f"which facts {study.model} knows was not looked for with these "
                "parameters; run notebook 01"
            )
        # another method's notebook may be looking
        with locked(path.with_name(".known_facts.lock"), math.inf):
            if (scanned := _read(path, study, every)) is None:
                scanned = _scan(study, every)
                inputs = _inputs(study, every)  # a first download has a revision only now
                write_table(scanned, path, sha256(inputs), inputs=inputs)
    kept = set(scanned.loc[scanned["kept"], "fact"])
    if not kept:
        answered, queries = scanned["answered"], scanned["queries"].sum()
        raise ValueError(
            f"{study.model} answers at least known_prompts={study.known_prompts} prompts of none "
            f"of the {len(scanned)} facts of {study.data}; it answers {answered.sum()} of "
            f"{queries} queries, at most {answered.max()} of one fact: lower known_prompts, or "
            "take other facts or another model"
        )
    facts = [fact for fact in every if fact.id in kept]
    return facts, by_relation(scanned, every, study.known_prompts)


def by_relation(scanned: pd.DataFrame, every: list[Fact], known_prompts: int) -> pd.DataFrame:
    """A row a relation: facts in the data; scanned, of them; known, of the scanned; kept, of the
    known; queries of the scanned facts, and those that were answered."""
    scanned = scanned.assign(scanned=1, known=scanned["answered"] >= known_prompts)
    counted = ["scanned", "known", "kept", "queries", "answered"]
    table = scanned.groupby("relation", sort=False)[counted].sum()
    table.insert(0, "facts", pd.Series([fact.relation for fact in every]).value_counts())
    return table.astype(int).reset_index()


def _inputs(study, every) -> dict:
    return {
        **study.origin(every),
        "known_prompts": study.known_prompts,
        "facts_per_relation": study.facts_per_relation,
    }


def _read(path, study, every) -> pd.DataFrame | None:
    if read_metadata(path).get("inputs") != _inputs(study, every):
        return None
    table, _ = read_table(path)
    return None if table is None else as_frame([table])


def _scan(study, every) -> pd.DataFrame:
    """`count_known` of facts in the seeded order of each relation, and whether each is `kept`.

    Relations that have not enough yet are asked a unit each at a time; all units where all known
    facts are wanted."""
    wanted = math.inf if study.facts_per_relation is None else study.facts_per_relation
    waiting, parts = _units(every, study.seed), []
    if wanted != math.inf:
        most = math.ceil(wanted * SCAN_PER_FACT / UNIT_FACTS)
        waiting = {relation: units[:most] for relation, units in waiting.items()}
    found = dict.fromkeys(waiting, 0)
    while any(waiting.values()):
        ask = None if wanted == math.inf else 1
        units = [unit for rest in waiting.values() for unit in rest[:ask]]
        parts.append(study.run(count_known, units, desc=f"{study.model} known facts"))
        known = parts[-1]["answered"] >= study.known_prompts
        for relation, count in known.groupby(parts[-1]["relation"]).sum().items():
            found[relation] += count
        waiting = {
            relation: rest[len(rest[:ask]) :]
            for relation, rest in waiting.items()
            if found[relation] < wanted
        }
    scanned = pd.concat(parts, ignore_index=True)
    known = scanned["answered"] >= study.known_prompts
    return scanned.assign(kept=known & (known.groupby(scanned["relation"]).cumsum() <= wanted))


def _units(every, seed) -> dict[str, list[list[dict]]]:
    """{relation: units of its facts, in seeded order}, however many are wanted."""
    units = {}
    for relation in dict.fromkeys(fact.relation for fact in every):
        facts = [fact for fact in every if fact.relation == relation]
        ordered = [asdict(facts[place]) for place in seeded_order(facts, relation, seed)]
        units[relation] = [ordered[i : i + UNIT_FACTS] for i in range(0, len(ordered), UNIT_FACTS)]
    return units
