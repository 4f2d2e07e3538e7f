"""Notebook 07: edits of the neurons that a fact's queries use alike (CAS, Eq. 7)."""

from itertools import product

import pandas as pd

from qlutils.experiments.edit_tables import (
    RATES,
    by_class,
    contrasts,
    measures_table,
)
from qlutils.experiments.kn_modification import (
    run_edits,
    sample_of_facts,
    with_more_controls,
)
from qlutils.neurons.cas import cas_neurons, kept_neurons
from qlutils.neurons.sets import kn_sets

# What the paper claims of CAS: to gain Gen against Local, and Loc and dPPL against Global.
COMPARED = {"local": ("rel", "gen", "avg"), "global": ("loc", "dppl", "broken", "avg")}


def cas_spec(parameters):
    """`cas_neurons` keywords from a notebook's parameters."""
    return {
        "b1": parameters["beta1"],
        "b2": parameters["beta2"],
        "threshold": parameters["cas_threshold"],
        "score": parameters["cas_score"],
    }


def cas_of_fact(queries, fact, t, spec):
    """The kept neurons of one fact, the largest CAS first: layer, neuron, mean, std, CAS, in how
    many of the fact's queries each is a KN at `t`, and whether it is `chosen` by `spec`."""
    rows = queries[queries["fact"] == fact]
    chosen = cas_neurons(rows.iloc[0], **spec)
    kns = kn_sets(rows, t)
    found = kept_neurons(rows.iloc[0], spec["score"])
    found["CAS"] = spec["b1"] * found["mean"] - spec["b2"] * found["std"]
    pairs = list(zip(found["layer"], found["neuron"]))
    found["KN of queries"] = [sum(pair in one for one in kns) for pair in pairs]
    found["chosen"] = [pair in chosen for pair in pairs]
    return found.sort_values("CAS", ascending=False, ignore_index=True)


def cas_contrasts(edits, classes, seed):
    """CAS less Local and less Global (`against`) in the measures of COMPARED, on the same facts: of
    all facts and of each class."""
    own = edits[edits["control"] == "none"]
    parts = {}
    for (name, part), other in product(by_class(own, classes).items(), COMPARED):
        parts[name, other] = contrasts(
            part,
            "neurons",
            ("cas", other),
            COMPARED[other],
            ["op"],
            seed,
        )
    return pd.concat(parts, names=["facts", "against"]).reset_index(["facts", "against"])


def size_contrasts(study, queries, edits, classes):
    """CAS less as many neurons of the largest mean attribution, of all facts and of each class;
    `edits`: those of CAS."""
    sets = {"cas": cas_spec(study.parameters)}
    edits = with_more_controls(study, queries, edits, ["strongest"], sets=sets)
    groups = pd.concat(by_class(edits, classes), names=["facts"]).reset_index("facts")
    return contrasts(
        groups,
        "control",
        ("none", "strongest"),
        RATES,
        ["facts", "op"],
        study.seed,
    )


# --- sensitivity to the two settings --------------------------------------------------------------


def cas_sweep(parameters, betas, thresholds):
    """The CAS settings of the sensitivity section, one of the two varied at a time: varied, name,
    spec."""
    base = cas_spec(parameters)
    settings = [("beta", {"b1": b1, "b2": round(1 - b1, 9)}) for b1 in betas]
    settings += [("threshold", {"threshold": threshold}) for threshold in thresholds]
    rows = []
    for varied, changed in settings:
        spec = base | changed
        name = "b1={b1:g} b2={b2:g} threshold={threshold:g}".format(**spec)
        rows.append((varied, name, spec))
    return pd.DataFrame(rows, columns=["varied", "name", "spec"])


def sweep_table(study, queries, classes, betas, thresholds, size):
    """Rel, Gen, Loc and Avg of a sample of `size` facts for every setting of `cas_sweep`, with 95 %
    intervals; without perplexity."""
    sweep = cas_sweep(study.parameters, betas, thresholds)
    some = sample_of_facts(classes, size, study.seed)
    sets = dict(zip(sweep["name"], sweep["spec"]))
    edits, _ = run_edits(study, queries, sets, controls=[], facts=some, ppl_entries=0)
    parts = {}
    for varied, part in sweep.groupby("varied", sort=False):
        rows = measures_table(
            edits,
            classes,
            "",
            sets=part["name"],
            controls=(),
            seed=study.seed,
        )
        parts[varied] = rows[rows["threshold"] == "all"]
    table = pd.concat(parts, names=["varied", None]).reset_index("varied").reset_index(drop=True)
    return table.filter(regex="^(varied|op|n|rel|gen|loc|avg)")


def extremes_of_avg(table):
    """The settings of a `sweep_table` with the lowest and the highest Avg, for each that varies."""
    groups = table.dropna(subset="avg").groupby(["varied", "op"])["avg"]
    rows = pd.concat([groups.idxmin(), groups.idxmax()]).sort_values().unique()
    return table.loc[rows, ["varied", "op", "neurons", "neurons_edited", "avg", "n_avg"]]
