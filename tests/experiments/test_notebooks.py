"""Notebooks 01 to 07, the later ones each in a run of its own in which nothing is there: what they
write is what the package computes directly, and the numbers of 04 to 06 are those of one query and
one set at a time. With papermill 01 runs in test_readme.py, the report in test_report.py."""

import io
import json
import re
import warnings
from contextlib import redirect_stdout
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import last_activations, run_cells

from qlutils import answer_probability, load_model, paths
from qlutils.change import scaling, synapses
from qlutils.experiments.consistency import (
    classified_facts,
    consistency_summary,
    relation_table,
    table_1,
    table_4,
)
from qlutils.experiments.localize import localisation_summary, localise
from qlutils.model.passes import attention_implementation
from qlutils.neurons.sets import kn_sets, neighbour_sets
from qlutils.show.tables import pick
from qlutils.study.notebook import Study

MODEL, STATIC = "demo/gpt2", 0.53  # a threshold that divides these few facts
COMMON = dict(model=MODEL, relations=["P36", "P103"], facts_per_relation=2)
COMMON |= dict(device="cpu", dtype="float32")
EDITS = dict(static_threshold=STATIC, ppl_entries=2, ppl_max_tokens=7, n_locality=4)
LATER = {  # the others after 01 and 02, and their parameters
    "03_kn_modification": EDITS | dict(more_controls_facts=2),
    "04_query_kn_mapping": dict(static_threshold=STATIC),
    "05_attention_predominance": {},
    "06_knowledge_synapses": dict(static_threshold=STATIC),
    "07_cas_editing": EDITS | dict(sweep_facts=2),
}
FIGURES = {
    "01": "ig/fig1",
    "02": "all/fig3 all/fig9",
    "04": "ig/fig4",
    "05": "ig/fig5",
    "06": "ig/fig6 ig/fig6_otsu ig/fig7 ig/fig10 ig/fig10_activation ig/synapse_places",
}
TABLES = {"02": "all/table1 all/table4 all/table5", "03": "ig/table2", "07": "ig/table3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where results go; the units that were computed are those of every run."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "units").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", folder)
        patch.setenv("QLUTILS_MODELS", "[]")
        yield folder


@pytest.fixture(scope="module")
def run(folder):
    """run(notebook, run's name, parameters) -> what was printed, shown and warned of."""

    def execute(notebook, output, **parameters):
        if not (folder / output).exists():
            (folder / output).mkdir()
            (folder / output / "units").symlink_to(folder / "units")
        said, shown = io.StringIO(), []
        with warnings.catch_warnings(record=True) as caught, redirect_stdout(said):
            warnings.simplefilter("default")
            for kind in (DeprecationWarning, PendingDeprecationWarning):  # for developers
                warnings.simplefilter("ignore", kind)
            given = COMMON | parameters | dict(output=output)
            run_cells(paths.NOTEBOOKS / f"{notebook}.ipynb", given, shown.append)
        plt.close("all")
        return said.getvalue(), shown, [str(one.message) for one in caught]

    return execute


@pytest.fixture(scope="module")
def books(run):
    """What the notebooks said; `amig` was localised outside of one, `sig` not at all."""
    done = {"01": run("01_localize", "01", method="ig")}
    localise(Study("01_localize", **COMMON, output="01", method="amig"))
    done["02"] = run("02_consistency", "01")
    return done | {name[:2]: run(name, name[:2], **given) for name, given in LATER.items()}


@pytest.fixture(scope="module")
def results(books, folder):
    """Results of a notebook, by its number."""
    return lambda name: folder / ("01" if name == "02" else name) / "results" / "demo--gpt2"


@pytest.fixture(scope="module")
def queries(results):
    return pd.read_parquet(results("01") / "ig" / "queries.parquet")


@pytest.fixture(scope="module")
def lm():
    return load_model(MODEL, device="cpu", dtype="float32")


def assert_is(file, table):
    """A table's CSV is `table`."""
    pd.testing.assert_frame_equal(pd.read_csv(file), table, check_dtype=False, rtol=1e-4)


def test_no_notebook_warns_or_tells_an_undefined_number_and_all_is_written(books, results):
    for number, (said, shown, warned) in books.items():
        assert not warned and len(said) > 200 and not re.search(r"\bnan\b", said)
        assert number < "03" or "localising by the paper's rule" in said
        assert any(hasattr(one, "_repr_html_") and one._repr_html_() for one in shown)
    for (number, stems), kind in product(FIGURES.items(), ("png", "pdf", "csv")):
        for stem in stems.split():
            size = (results(number) / f"{stem}.{kind}").stat().st_size
            assert 100 < size and (kind != "png" or size < 200_000)
    for (number, stems), kind in product(TABLES.items(), ("csv", "md", "tex")):
        assert all((results(number) / f"{stem}.{kind}").stat().st_size for stem in stems.split())


def test_01_writes_what_the_package_computes(books, results, queries, lm, runs):
    computed = localise(Study("01_localize", **COMMON, method="ig"), steps=20)
    pd.testing.assert_frame_equal(queries, computed, check_dtype=False, rtol=1e-4)
    here = results("01") / "ig"
    assert_is(here / "localisation.csv", localisation_summary(queries, kn_sets(queries)))
    said = books["01"][0]
    difference = re.search(r"largest difference over largest score: (\S+)", said)
    assert float(difference[1]) < 1e-4  # of the plain algorithm and the fast one
    record = json.loads((here / "run.json").read_text())["01_localize"]
    assert record["parameters"]["steps"] == 20 and record["parameters"]["model"] == MODEL
    assert record["model"]["fingerprint"] == lm.fingerprint
    assert record["model"]["dtype"] == "float32"
    assert record["versions"]["torch"] and record["facts"] == 4
    record = json.loads((results("07") / "ig/run.json").read_text())["07_cas_editing"]
    assert record["parameters"]["beta1"] == 0.7


def test_01_compares_the_rules_of_the_integral(results):
    rules = pd.read_csv(results("01") / "ig/quadrature.csv")
    first = rules.drop_duplicates("rule").set_index("rule")
    right, converged = first.loc["right"], first.loc["converged"]
    assert converged["error"] < right["error"] and converged["gap"] < right["gap"]
    assert converged["evaluations"] < right["evaluations"] == 20
    assert rules["jaccard"].between(0, 1).all() and (rules["n"] == 3).all()
    other = pd.read_parquet(results("01") / "ig/other_rule.parquet")
    assert set(other["rule"]) == {"converged"} and other["converged"].astype(bool).all()


def test_02_makes_its_tables_from_what_01_found_and_names_a_method_that_has_not_run(
    books, results, queries
):
    said = books["02"][0]
    assert re.search(r"sig: not run yet for demo/gpt2.*missing below", said)
    amig = pd.read_parquet(results("02") / "amig/queries.parquet")
    facts = {"ig": classified_facts(queries), "amig": classified_facts(amig)}
    where = results("02") / "all"
    assert_is(where / "table1.csv", table_1(facts, MODEL))
    assert_is(where / "table4.csv", table_4(facts, MODEL))
    assert_is(where / "consistency.csv", consistency_summary(facts))
    assert_is(where / "cs2_by_relation.csv", relation_table(facts))
    assert len(pd.read_csv(where / "fig3.csv")) == len(pd.read_csv(where / "fig9.csv")) == 4
    assert not list(where.glob("*sig*"))


def test_02_localises_by_its_first_method_where_nothing_was_localised(run, results):
    said, *_ = run("02_consistency", "empty", relations=["P36"], methods=["amig", "ig"])
    assert "ig: not run yet" in said and "localising by the paper's rule" in said
    where = results("empty")
    assert (where / "amig" / "queries.parquet").exists() and not (where / "ig").exists()
    assert pd.read_csv(where / "all" / "table1.csv")["method"].unique().tolist() == ["amig"]


def test_a_mistake_ends_a_notebook_before_it_writes_and_is_named(run, folder):
    with pytest.raises(ValueError, match="unknown parameter 'method'"):
        run("02_consistency", "mistaken", method="ig")
    assert not (folder / "mistaken" / "results").exists()


@pytest.mark.parametrize(
    "number, stem, saved, sets", [("03", "table2", "edits", 2), ("07", "table3", "cas_edits", 3)]
)
def test_tables_2_and_3_are_the_means_of_their_own_edits(results, number, stem, saved, sets):
    table = pd.read_csv(results(number) / f"ig/{stem}.csv")
    edits = pd.read_parquet(results(number) / f"ig/{saved}.parquet")
    assert len(table) == 5 * 2 * sets * 2  # classes and all; operations; own and random neurons
    every = table[table["threshold"] == "all"].set_index(["op", "neurons"])
    for (op, neurons, control), part in edits.groupby(["op", "neurons", "control"]):
        name = neurons if control == "none" else f"{neurons} ({control})"
        row = every.loc["erasure" if op == "erase" else op, name]
        done = part[part["note"].isna()]
        assert row["n"] == len(done) and row["n_avg"] == done["avg"].count()
        wanted = done[["rel", "gen", "loc", "avg", "broken"]].mean()
        wanted["dppl"] = done["dppl"].median()
        assert row[wanted.index].tolist() == pytest.approx(wanted.tolist(), nan_ok=True)
    assert 0 < edits[edits["control"] == "none"]["rel"].mean() < 1 and edits["loc"].notna().any()


# --- 04 to 06, one query at a time ----------------------------------------------------------------
def probability(lm, row):
    return float(answer_probability(lm, [row["prompt"]], [row["object"]])[0])


def known_of_class(queries, threshold, name):
    facts = classified_facts(queries, static=STATIC)
    chosen = facts.loc[facts[f"class_{threshold}"] == name, "fact"]
    return queries[queries["known"] & queries["fact"].isin(chosen)].to_dict("records")


def test_figure_4_is_the_mean_over_queries_changed_one_by_one(results, queries, lm):
    drawn = pd.read_csv(results("04") / "ig/fig4.csv")
    for name, class_ in product(("self", "refine"), ("I", "II")):
        rates = []
        for row in known_of_class(queries, "otsu", class_):
            group = queries[queries["fact"] == row["fact"]].reset_index(drop=True)
            place = group.index[group["prompt_index"] == row["prompt_index"]][0]
            before = probability(lm, row)
            with scaling.scale_neurons(lm, neighbour_sets(kn_sets(group), place)[name], 0.0):
                rates.append((before - probability(lm, row)) / before)
        keys = dict(set=name, direction="suppress", threshold="otsu", class_=class_)
        cell = pick(drawn, queries="known", **keys)
        assert cell["n"] == len(rates) > 0
        assert cell["mean"] == pytest.approx(np.mean(rates), abs=1e-4)


def test_figure_5_is_predominance_over_transformers_own_attention(results, queries, lm):
    saved = pd.read_parquet(results("05") / "ig/attention_predominance.parquet")
    drawn = pd.read_csv(results("05") / "ig/fig5.csv").merge(saved[["fact", "same_first"]])
    for fact, group in queries.groupby("fact"):
        winners = {"predominance": [], "predominance_rest": [], "same_first": []}
        for prompt in group["prompt"]:
            ids = lm.encode_prompt(prompt)
            with torch.no_grad(), attention_implementation(lm.model, "eager"):
                seen = lm.model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
            total = torch.stack(seen)[:, 0].mean((0, 1)).sum(0)
            winners["predominance"].append(ids[int(total.argmax())])
            winners["predominance_rest"].append(ids[1 + int(total[1:].argmax())])
            winners["same_first"].append(ids[0])
        for name, tokens in winners.items():
            share = max(map(tokens.count, tokens)) / len(tokens)
            assert drawn.set_index("fact").loc[fact, name] == pytest.approx(share)


def test_figure_6_is_the_mean_over_queries_changed_one_by_one(results, queries, lm):
    drawn = pd.read_csv(results("06") / "ig/fig6.csv")
    rates, values = [], []
    for row in known_of_class(queries, "static", "I"):
        [neurons], own = kn_sets(pd.DataFrame([row])), synapses.find_synapses(lm, row["prompt"])
        with synapses.scale_synapses(lm, set(), 1):
            before, value = probability(lm, row), mean_activation(lm, row["prompt"], neurons)
        with synapses.scale_synapses(lm, own, 2.0):
            rates.append((probability(lm, row) - before) / before)
            values.append((mean_activation(lm, row["prompt"], neurons) - value) / value)
    for panel, expected in (("ΔProb", rates), ("ΔValue", values)):
        keys = dict(set="self", direction="enhance", queries="known", class_="I")
        cell = pick(drawn, panel=panel, **keys)
        assert cell["n"] == len(expected) > 0
        assert cell["mean"] == pytest.approx(np.mean(expected), abs=2e-4)


def mean_activation(lm, prompt, neurons):
    active = last_activations(lm, prompt)
    return float(np.mean([abs(active[place]) for place in neurons]))
