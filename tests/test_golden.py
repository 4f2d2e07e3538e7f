"""The numbers of every task and of what notebooks make of them, kept in golden.json.

They may move only together with the version that stands for them in the names of stored units.
After raising it, `python tests/test_golden.py` writes them anew; it refuses to where the version
was not raised.
"""

import json
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qlutils.experiments import (
    attention_predominance,
    controls,
    edit_tables,
    effects,
    kn_modification,
    knowledge_synapses,
    localize,
    query_kn_mapping,
)
from qlutils.experiments.consistency import classified_facts, consistency_summary
from qlutils.facts import load_facts
from qlutils.model.loading import load_model
from qlutils.study import identity, known

FILE = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-6  # relative; the model computes in float64, so that machines agree
TASKS = {
    "localise_unit": localize.localise_unit,
    "count_known": known.count_known,
    "edit_facts": kn_modification.edit_facts,
    "scale_kns": query_kn_mapping.scale_kns,
    "attend": attention_predominance.attend,
    "scale_synapse_columns": knowledge_synapses.scale_synapse_columns,
}
WHERE = {"results": "RESULTS_VERSION in qlutils/study/identity.py"} | {
    name: f"{name}.VERSION in {task.__module__}" for name, task in TASKS.items()
}


@cache
def model():
    return load_model("demo/gpt2", device="cpu", dtype="float64")


@cache
def localised(method="ig", rule="right"):
    facts = load_facts("demo", relations=["P36", "P103"], facts_per_relation=2)
    unit = [asdict(replace(fact, prompts=fact.prompts[:3])) for fact in facts]
    unit = unit if method == "ig" else unit[:1]
    return localize.localise_unit(model(), unit, method=method, steps=3, rule=rule)


@cache
def frames(name):
    """The frames of one task, or "results", of the same four facts of the bundled model."""
    if name == "results":
        return derived()
    queries, lm = localised(), model()
    if name == "localise_unit":
        by_method = [localised(method).head(3) for method in ("ig", "sig", "amig")]
        return [*by_method, localised(rule="converged").head(3)]
    if name == "count_known":
        facts = load_facts("demo", relations=["P36", "P103"], facts_per_relation=8)
        return [known.count_known(lm, [asdict(fact) for fact in facts])]
    if name == "edit_facts":
        facts = load_facts("demo", relations=["P36", "P103"])
        options = dict(num_neurons=lm.num_neurons, n_locality=4, controls=("random", "matched"))
        options |= dict(texts=["The river runs to the sea and the sea is wide."], ppl_entries=1)
        plans, _ = kn_modification.plan_edits(queries, facts, **options)
        return [kn_modification.edit_facts(lm, plans)]
    others = dict(other=0) if name == "scale_kns" else dict(irrelevant=0)
    [unit] = effects.units(queries, 0.2, **others)
    return [TASKS[name](lm, unit)]


def derived():
    """What notebooks 02 to 06 make of the tasks' frames."""
    queries, t = localised(), 0.2
    facts = classified_facts(queries, t, 0.1)
    [edits], [scaled] = frames("edit_facts"), frames("scale_kns")
    [winners], [found] = frames("attend"), frames("scale_synapse_columns")
    moved = effects.rates(effects.beside_queries(scaled, queries, t, 0.1))
    changed = effects.rates(
        effects.beside_queries(found[found["set"] != "none"], queries, t, 0.1), "value"
    )
    few = dict(directions=("average",), populations=("all",))
    classes = facts[["fact", "class_static", "class_otsu"]]
    return [
        facts,
        consistency_summary({"ig": facts}),
        controls.null_consistency(queries, model().num_neurons),
        edit_tables.measures_table(edits, facts, "demo/gpt2", sets=("local",), controls=()),
        effects.summary(moved, effects.FIGURE_4_SETS, **few),
        effects.summary(changed[~changed["renormalise"]], ("self", "irrelevant"), **few),
        effects.synapse_counts(found[found["set"] == "none"]),
        effects.predominance_table(effects.predominance(winners).merge(classes, on="fact")),
    ]


def columns(tables) -> dict:
    """{"table column": its values, those of lists one after the other}, of the columns that hold
    numbers."""
    found = {}
    for place, table in enumerate(tables):
        for name in table.columns:
            values = [one for value in table[name] for one in np.ravel(value)]
            if not any(isinstance(one, str) for one in values) and name != "row_budget":
                rounded = [None if pd.isna(one) else float(f"{float(one):.8g}") for one in values]
                found[f"{place} {name}"] = rounded
    return found


def first_difference(stored: dict, now: dict) -> str:
    """Where two `columns` differ by more than rounding, in words; "" if nowhere."""
    for name in [*stored, *now]:
        before, after = stored.get(name), now.get(name)
        if before is None or after is None or len(before) != len(after):
            stored, now = (values and len(values) for values in (before, after))
            return f"column {name!r}: {stored} values were stored, now {now}"
        rounding = 1e-9 * max((abs(one) for one in before if one is not None), default=0)
        for one, other in zip(before, after):
            if one != other and (
                None in (one, other) or abs(one - other) > TOLERANCE * abs(one) + rounding
            ):
                return f"column {name!r}: {one!r} was stored, now {other!r}"
    return ""


def version_of(name):
    """ "results" are made of the tasks' frames, so they may move with any version."""
    return identity.code_versions() if name == "results" else identity.code_versions()[name]


@pytest.mark.parametrize("name", WHERE)
def test_numbers_move_only_with_their_version(name):
    stored, version = json.loads(FILE.read_text(encoding="utf-8"))[name], version_of(name)
    problem = first_difference(stored["columns"], columns(frames(name)))
    assert not problem and stored["version"] == version, (
        f"{problem or 'only the version moved'}. If the numbers are meant to move: raise "
        f"{WHERE[name]}, so that stored results are computed again; then run python "
        "tests/test_golden.py"
    )


def test_every_task_has_a_version_a_cost_and_golden_numbers():
    """`code_versions` reads the package's text; this compares it with what is imported."""
    assert identity.code_versions() == {"results": identity.RESULTS_VERSION} | {
        name: task.VERSION for name, task in TASKS.items()
    }
    for name, task in TASKS.items():
        assert name == "count_known" or callable(task.passes)  # units of its own


def test_a_number_that_moves_is_noticed_and_rounding_is_not():
    now = columns(frames("attend"))
    name = next(name for name in now if name.endswith("share"))
    assert first_difference(now, {**now, name: [one * (1 + 1e-8) for one in now[name]]}) == ""
    for other in ([*now[name][:-1], now[name][-1] * (1 + 1e-5)], now[name][1:]):
        assert repr(name) in first_difference(now, {**now, name: other})


def write():
    """Write golden.json; refuses numbers that moved under an unchanged version."""
    stored = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    lines = []
    for name in WHERE:
        version, now = version_of(name), columns(frames(name))
        before = stored.get(name)
        if before and before["version"] == version:
            if problem := first_difference(before["columns"], now):
                sys.exit(f"{name}: {problem}. Raise {WHERE[name]} first; nothing was written")
        values = ",\n".join(f"  {json.dumps(one)}: {json.dumps(now[one])}" for one in now)
        lines.append(f' "{name}": {{"version": {json.dumps(version)}, "columns": {{\n{values}}}}}')
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
